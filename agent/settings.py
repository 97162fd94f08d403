"""agent.toml: every key with its type, default, unit and whether the cloud may change it.

One model validates three things with the same rules and words: the file at start, `camera-agent check-config`, and the
file merged with what the shadow wants. Keys marked `Remote` may be set through the shadow; all others are local only.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from agent.errors import SettingsError
from agent.setting_types import (
    AbsolutePath,
    Command,
    HostName,
    Name,
    PackageName,
    ProxyUrl,
    SocketDir,
    ThingName,
    TimeZone,
    UnitName,
    Window,
)

DEFAULT_CONFIG_FILE = Path("/etc/camera-agent/agent.toml")
Operation = Literal["update", "restart", "reboot", "diagnostics", "snapshot", "rotate-certificate", "run"]


def _refuse_shared(owners: Iterable[tuple[str, object]], kind: str, what: str) -> None:
    """Raises ValueError when two of the named `owners` have the same thing; None is nobody's."""
    seen: dict[object, str] = {}
    for name, thing in owners:
        if thing is not None and seen.setdefault(thing, name) != name:
            raise ValueError(f"{kind} {seen[thing]} and {name} have the same {what}; give each its own")


def _place(path: Path | None) -> str | None:
    return os.path.normpath(path) if path else None


class Remote:
    """Marks a key that the shadow may set; `applies` says what happens to running components."""

    def __init__(self, applies: Literal["live", "restart-component", "connectivity", "reboot"] = "live") -> None:
        self.applies = applies


class Section(BaseModel):
    """A table of agent.toml: unknown keys are errors, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False, use_attribute_docstrings=True)


def unit(name: str) -> Any:
    """Field metadata: the unit of a number, shown in the reference."""
    return {"unit": name}


class Cloud(Section):
    """The connection to AWS IoT Core."""

    endpoint: HostName = ""
    """Host name of the account's `iot:Data-ATS` endpoint. Empty: the agent works off-line and says so."""
    port: int = Field(8883, ge=1, le=65535)
    """8883, or 443 where only that is open (then ALPN `x-amzn-mqtt-ca` is used)."""
    ca_file: AbsolutePath = Path("/etc/camera-agent/root-ca.pem")
    """PEM file with the root certificates to trust; it replaces the system's store."""
    certificate_file: AbsolutePath | None = None
    """PEM file of the device certificate. Default: `<state_dir>/identity/certificate.pem`."""
    private_key_file: AbsolutePath | None = None
    """PEM file of the device's private key. Default: `<state_dir>/identity/private-key.pem`."""
    proxy_url: ProxyUrl = ""
    """HTTP proxy for MQTT and downloads, `http://[user:password@]host:port`. Empty: none."""
    keep_alive_s: int = Field(45, ge=30, le=1200, json_schema_extra=unit("s"))
    """MQTT keep-alive; mobile networks drop idle connections after one to five minutes."""
    session_expiry_s: int = Field(3600, ge=0, le=604800, json_schema_extra=unit("s"))
    """How long AWS keeps the session, and queues messages, while the camera is off-line."""
    announce: bool = True
    """Say on the event topic when the connection comes, and by a last will when it is lost."""


class Provisioning(Section):
    """Fleet provisioning by claim; used when there is no device certificate yet."""

    template: str = ""
    """Name of the provisioning template. Empty: no provisioning."""
    claim_certificate_file: AbsolutePath | None = None
    """PEM file of the claim certificate."""
    claim_private_key_file: AbsolutePath | None = None
    """PEM file of the claim's private key."""
    parameters: dict[str, str] = {}
    """Parameters for the template, such as `SerialNumber`."""


class Paths(Section):
    """Where the agent keeps its things."""

    state_dir: AbsolutePath = Path("/var/lib/camera-agent")
    """State that must survive a reboot: identity, state.db, downloads."""
    runtime_dir: SocketDir = Path("/run/camera-agent")
    """Sockets; may be lost at a reboot."""


class Jobs(Section):
    """The local policy: what the cloud may ask for. The cloud can't change it."""

    allow: list[Operation] = ["update", "restart", "reboot", "diagnostics", "snapshot", "rotate-certificate", "run"]
    """Operations that jobs may use. diagnostics, snapshot and rotate-certificate are reserved: this version refuses them."""
    handler_dir: AbsolutePath = Path("/etc/camera-agent/handlers")
    """Folder of the handlers that `runHandler` steps may start; neither it, nor a folder above it, nor a handler may be writable by others."""
    commands: Literal["deny", "allow"] = "deny"
    """Whether `runCommand` steps (AWS-Run-Command) may run."""
    run_as: list[str] = []
    """Users a step may run as, besides the agent's own."""
    step_timeout_s: int = Field(600, ge=1, le=86400, json_schema_extra=unit("s"))
    """Time limit of a step that sets none itself."""
    facts: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")], str] = {}
    """More that conditions of job documents may ask about, such as `site`; they can't replace the agent's own facts."""
    reboot: Command | None = None
    """Command that reboots the camera, exit status 0 meaning that it will. Default: systemd-logind is asked over D-Bus."""


class UpdateTarget(Section):
    """Something that can be updated, by one installer."""

    installer: Literal["app", "deb", "rauc", "agent"]
    """How it is installed."""
    root: AbsolutePath | None = None
    """Installers `app` and `agent`: the folder of `slots/<digest>/` and the link `current`."""
    package: PackageName = ""
    """Installer `deb`: the Debian package that is updated."""
    unit: UnitName = ""
    """systemd unit restarted after the switch and watched by the gate."""
    restart: Command | None = None
    """Command run after the switch where there is no systemd unit."""
    probe: Command | None = None
    """Command of the gate: exit status 0 is healthy."""

    @model_validator(mode="after")
    def _complete(self) -> UpdateTarget:
        if self.installer in ("app", "agent") and self.root is None:
            raise ValueError(f"installer {self.installer} needs root, the folder of its slots")
        if self.installer == "deb" and not self.package:
            raise ValueError("installer deb needs package, the name of the Debian package")
        if self.unit and self.restart:
            raise ValueError("set unit or restart, not both")
        return self


class RateLimit(Section):
    """A cap on downloads at some hours."""

    hours: Window
    """When it holds, local time in `updates.time_zone`: `06:00-22:00` or `mon-fri 06:00-22:00`."""
    bytes_per_s: Annotated[int, Field(ge=1024)]
    """Most bytes per second."""


class Updates(Section):
    """Software updates."""

    keys_dir: AbsolutePath = Path("/etc/camera-agent/update-keys")
    """Folder with root.json, the keys that software must be signed with. Without keys every update is refused."""
    targets: dict[Name, UpdateTarget] = {}
    """What may be updated."""
    windows: list[Window] = []
    """When a new version may be switched to, local time in `updates.time_zone`: `22:00-04:00`, `sat,sun 00:00-24:00`. Empty: always."""
    time_zone: TimeZone = "UTC"
    """IANA name of the time zone of `windows` and `rate_limits`."""
    jitter_s: Annotated[float, Field(ge=0, le=86_400)] = 0
    """Spreads a roll-out: each camera waits a time of its own, up to this many seconds, before a download and in a window."""
    rate_limits: list[RateLimit] = []
    """Caps on downloads by hour; where several hold, the lowest."""
    apply_lock_max_s: Annotated[float, Field(ge=1, le=604_800)] = 3600
    """Longest time for which the lock against switching can be taken at once, in seconds."""
    apply_lock_users: list[str] = []
    """System users, besides those who may write to the local API, that may hold the lock against switching."""
    min_battery_percent: Annotated[float, Field(ge=0, le=100)] = 30
    """On battery below this charge a camera waits before it switches; cameras without a battery are not asked."""
    package_shadow: bool = True
    """Report the versions that run in the shadow `$package`, which AWS IoT's software package catalog reads."""

    @model_validator(mode="after")
    def _apart(self) -> Updates:
        _refuse_shared(((name, _place(target.root)) for name, target in self.targets.items()), "targets", "root")
        _refuse_shared(((name, target.package or None) for name, target in self.targets.items()), "targets", "package")
        systems = ((name, "the system") for name, target in self.targets.items() if target.installer == "rauc")
        _refuse_shared(systems, "targets", "system")
        return self


class ConfigTarget(Section):
    """A configuration file of another program that the shadow may set."""

    path: AbsolutePath
    """The file to write."""
    format: Literal["json", "toml"] = "json"
    """Syntax of the file."""
    schema_file: AbsolutePath | None = None
    """JSON Schema (draft 2020-12) that the wanted document must satisfy."""
    check: Command | None = None
    """Command that must exit 0 before the file is written; `{path}` is the candidate."""
    apply: Literal["none", "reload", "restart"] | Command = "none"
    """What makes the program take it: reload or restart of `unit`, or a command."""
    unit: UnitName = ""
    """systemd unit for `apply`."""

    @model_validator(mode="after")
    def _complete(self) -> ConfigTarget:
        if self.apply in ("reload", "restart") and not self.unit:
            raise ValueError(f"apply = {self.apply!r} needs unit")
        return self


class Config(Section):
    """Remote configuration through the shadow `config`."""

    trial_s: float = Field(60, ge=1, le=3600, json_schema_extra=unit("s"))
    """How long images must keep flowing before a new configuration stays."""
    connectivity_trial_s: float = Field(300, ge=1, le=3600, json_schema_extra=unit("s"))
    """The same for keys that the connection depends on."""
    targets: dict[Name, ConfigTarget] = {}
    """What may be configured besides the agent itself."""

    @model_validator(mode="after")
    def _apart(self) -> Config:
        _refuse_shared(((name, _place(target.path)) for name, target in self.targets.items()), "targets", "path")
        return self


class CaptureSource(Section):
    """A folder that a capture pipeline writes its images into."""

    directory: AbsolutePath
    """Watched recursively."""
    pattern: str = Field("*.jpg", min_length=1)
    """Names that count as images."""
    interval_s: Annotated[float, Remote()] = Field(1.0, ge=0.01, le=86400, json_schema_extra=unit("s"))
    """Expected time between images."""


class Capture(Section):
    """Watching what the capture pipeline produces."""

    budget_pct: Annotated[float, Remote()] = Field(3.0, ge=0.1, le=100, json_schema_extra=unit("% of one core"))
    """Share of one core that image analysis may use."""
    slow_ratio: Annotated[float, Remote()] = Field(0.9, ge=0.01, le=1, json_schema_extra=unit("ratio"))
    """`capture.slow` is raised below this share of the expected images."""
    dark_luma: Annotated[float, Remote()] = Field(28, ge=0, le=255, json_schema_extra=unit("luma 0-255"))
    """`image.dark` is raised when the brightest hundredth of the image is at or below this."""
    blur_drop: Annotated[float, Remote()] = Field(0.25, ge=0.01, le=5, json_schema_extra=unit("log ratio"))
    """`image.blurred` is raised when sharpness falls by more than this against the camera's own reference."""
    sources: dict[Name, CaptureSource] = {}
    """The cameras' folders."""

    @model_validator(mode="after")
    def _apart(self) -> Capture:
        places = ((name, (_place(source.directory), source.pattern)) for name, source in self.sources.items())
        _refuse_shared(places, "sources", "directory and pattern")
        return self


class Telemetry(Section):
    """Reports and events to the cloud."""

    interval_s: Annotated[float, Remote()] = Field(60, ge=1, le=86400, json_schema_extra=unit("s"))
    """Length of a report's window."""
    topic_prefix: str = Field("$aws/rules/camera_fleet/cameras", pattern=r"^[^+#\s]{1,200}$")
    """Reports go to `<prefix>/<thing>/report`, events to `<prefix>/<thing>/event`."""
    outbox_max_bytes: int = Field(16 * 2**20, ge=65536, le=2**40, json_schema_extra=unit("bytes"))
    """Disk that unsent messages may use, of which a quarter is kept for reports; beyond it the oldest are dropped and counted."""
    outbox_max_age_s: int = Field(7 * 86400, ge=60, le=3650 * 86400, json_schema_extra=unit("s"))
    """Age at which an unsent message is dropped."""
    backlog_per_s: float = Field(5, ge=0.01, le=50, json_schema_extra=unit("messages/s"))
    """Rate at which messages that waited off-line are sent beside the live ones."""


class Log(Section):
    """The agent's own log."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Remote()] = "info"
    """Least level that is written."""


class Settings(Section):
    """The whole of agent.toml."""

    thing_name: ThingName | None = None
    """Name in AWS IoT. Default: what provisioning returned, else the certificate's common name."""
    cloud: Cloud = Cloud()
    provisioning: Provisioning = Provisioning()
    paths: Paths = Paths()
    jobs: Jobs = Jobs()
    updates: Updates = Updates()
    config: Config = Config()
    capture: Capture = Capture()
    telemetry: Telemetry = Telemetry()
    log: Log = Log()

    @property
    def certificate_file(self) -> Path:
        return self.cloud.certificate_file or self.paths.state_dir / "identity" / "certificate.pem"

    @property
    def private_key_file(self) -> Path:
        return self.cloud.private_key_file or self.paths.state_dir / "identity" / "private-key.pem"

    @property
    def api_socket(self) -> Path:
        return self.paths.runtime_dir / "api.sock"


def read_document(path: Path) -> dict[str, Any]:
    """The parsed TOML of `path`. Raises SettingsError for a missing, unreadable or malformed file."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            "settings_missing", f"{path}: no such file", "create it, or name it with --config"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            "settings_unreadable", f"{path}: {error}", "make it a UTF-8 file the agent may read"
        ) from None
    except (ValueError, RecursionError) as error:
        raise SettingsError("settings_syntax", f"{path}: not valid TOML: {error}", "mend the line it names") from None


def validate(document: dict[str, Any], origin: str) -> Settings:
    """The settings in `document`. Raises SettingsError with one line that names each wrong key and `origin`."""
    try:
        return Settings.model_validate(document)
    except ValidationError as error:
        problems = [f"{'.'.join(key)}: {words}" for key, words in explain(error)]
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in "; ".join(problems))
        raise SettingsError("settings_invalid", f"{origin}: {line}", "correct or remove the key") from None


def load(path: Path) -> Settings:
    """Read and validate agent.toml. Raises SettingsError."""
    return validate(read_document(path), str(path))


def explain(error: ValidationError) -> list[tuple[tuple[str, ...], str]]:
    """Each problem of a pydantic error as (path of the key, what is wrong in plain words)."""
    problems: list[tuple[tuple[str, ...], str]] = []
    for detail in error.errors(include_url=False):
        key = tuple(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            words = "unknown key"
            near = difflib.get_close_matches(key[-1], _keys_at(key[:-1]), n=1)
            if near:
                words += f", did you mean {near[0]}?"
        elif detail["type"] == "missing":
            words = "missing"
        else:
            words = detail["msg"].removeprefix("Value error, ")
            if not isinstance(detail["input"], dict):
                words += f" (got {detail['input']!r:.60})"
        problems.append((key, words))
    return problems


def section_at(path: tuple[str, ...]) -> type[Section] | None:
    """The model of the table at `path` of agent.toml, None when there is no such table."""
    model: type[Section] = Settings
    parts = iter(path)
    for part in parts:
        field = model.model_fields.get(part)
        if field is None:
            return None
        annotation: Any = field.annotation
        if getattr(annotation, "__origin__", None) is dict:
            annotation = annotation.__args__[1]
            if next(parts, None) is None:
                return None
        if not (isinstance(annotation, type) and issubclass(annotation, Section)):
            return None
        model = annotation
    return model


def remote(path: tuple[str, ...]) -> Remote | None:
    """The Remote mark of the key at `path`, None when the cloud may not set it or it does not exist."""
    section = section_at(path[:-1])
    field = section.model_fields.get(path[-1]) if section and path else None
    return next((mark for mark in field.metadata if isinstance(mark, Remote)), None) if field else None


def _keys_at(path: tuple[str, ...]) -> list[str]:
    section = section_at(path)
    return list(section.model_fields) if section else []
