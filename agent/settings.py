"""agent.toml: every key with its type, default, unit and whether the cloud may change it.

One model validates three things with the same rules and words: the file at start, `camera-agent check-config`, and the
file merged with what the shadow wants. Keys marked `Remote` may be set through the shadow; all others are local only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from agent.setting_types import (
    AbsolutePath,
    Command,
    HostName,
    Labels,
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
Operation = Literal["update", "configure", "restart", "reboot", "diagnostics", "snapshot", "rotate-certificate", "run"]


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
    port: Annotated[int, Remote("connectivity")] = Field(8883, ge=1, le=65535)
    """8883, or 443 where only that is open (then ALPN `x-amzn-mqtt-ca` is used)."""
    ca_file: AbsolutePath = Path("/etc/camera-agent/root-ca.pem")
    """PEM file with the root certificates to trust; it replaces the system's store."""
    certificate_file: AbsolutePath | None = None
    """PEM file of the device certificate. Default: `<state_dir>/identity/certificate.pem`."""
    private_key_file: AbsolutePath | None = None
    """PEM file of the device's private key. Default: `<state_dir>/identity/private-key.pem`."""
    proxy_url: Annotated[ProxyUrl, Remote("connectivity")] = ""
    """HTTP proxy for MQTT and downloads, `http://[user:password@]host:port`. Empty: none."""
    keep_alive_s: Annotated[int, Remote("connectivity")] = Field(45, ge=30, le=1200, json_schema_extra=unit("s"))
    """MQTT keep-alive; mobile networks drop idle connections after one to five minutes."""
    session_expiry_s: Annotated[int, Remote("connectivity")] = Field(3600, ge=0, le=604800, json_schema_extra=unit("s"))
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

    allow: list[Operation] = [
        "update",
        "configure",
        "restart",
        "reboot",
        "diagnostics",
        "snapshot",
        "rotate-certificate",
        "run",
    ]
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
    """When it holds, local time in `maintenance.time_zone`: `06:00-22:00` or `mon-fri 06:00-22:00`."""
    bytes_per_s: Annotated[int, Field(ge=1024, le=2**40)]
    """Most bytes per second."""


class Updates(Section):
    """Software updates."""

    keys_dir: AbsolutePath = Path("/etc/camera-agent/update-keys")
    """Folder with root.json, the keys that software must be signed with. Without keys every update is refused."""
    targets: dict[Name, UpdateTarget] = {}
    """What may be updated."""
    rate_limits: Annotated[list[RateLimit], Remote()] = []
    """Caps on downloads by hour; where several hold, the lowest."""
    apply_lock_max_s: float = Field(3600, ge=1, le=604_800, json_schema_extra=unit("s"))
    """Longest time for which the lock against switching can be taken at once."""
    apply_lock_users: list[str] = []
    """System users, besides those who may write to the local API, that may hold the lock against switching."""
    min_battery_percent: float = Field(30, ge=0, le=100, json_schema_extra=unit("%"))
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


class Maintenance(Section):
    """When the camera may be changed: updates are switched to, and configurations with a trial begin, only then."""

    windows: Annotated[list[Window], Remote()] = []
    """Hours in the camera's local time: `22:00-04:00`, `sat,sun 00:00-24:00`. Empty: always."""
    time_zone: Annotated[TimeZone, Remote()] = "UTC"
    """IANA name of the camera's time zone, for `windows` and `updates.rate_limits`."""
    jitter_s: Annotated[float, Remote()] = Field(0, ge=0, le=86_400, json_schema_extra=unit("s"))
    """Spreads a roll-out: each camera waits a time of its own, up to this, before a download and in a window."""


class ConfigTarget(Section):
    """The configuration of another program, which the fleet may set: a file, or what the program asks the local API for."""

    path: AbsolutePath | None = None
    """The file to write; none with `apply = "api"`."""
    format: Literal["json", "toml", "ini", "env"] = "json"
    """Syntax of the file; `env` is what systemd's EnvironmentFile and a shell read."""
    schema_file: AbsolutePath | None = None
    """JSON Schema (draft 2020-12) that the wanted document must satisfy."""
    check: Command | None = None
    """Command that must exit 0 before the file is written; `{path}` is the candidate."""
    apply: Literal["none", "reload", "restart", "reboot", "api"] | Command = "none"
    """What makes the program take it: reload or restart of `unit`, a reboot of the camera, or a command. `api`: the program reads it from the local API and confirms it."""
    unit: UnitName = ""
    """systemd unit for `apply`; watched during the trial."""
    connectivity: bool = False
    """The connection depends on it: a change stays only when the cloud is reached over it within `connectivity_trial_s`."""
    users: list[str] = []
    """System users, besides those who may write to the local API, that may confirm it there."""

    @model_validator(mode="after")
    def _complete(self) -> ConfigTarget:
        if self.apply in ("reload", "restart") and not self.unit:
            raise ValueError(f"apply = {self.apply!r} needs unit")
        if self.apply == "api" and (self.path or self.check):
            raise ValueError("apply = 'api' writes no file: leave out path and check")
        if self.apply != "api" and self.path is None:
            raise ValueError("needs path, the file to write, or apply = 'api'")
        return self


class Config(Section):
    """Remote configuration through the shadow `config`."""

    trial_s: float = Field(60, ge=1, le=3600, json_schema_extra=unit("s"))
    """How long images must keep flowing before a new configuration stays; where they are rare, judging them takes longer."""
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
    pattern: Annotated[str, Remote("restart-component")] = Field("*.jpg", min_length=1)
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
    """`image.dark` is raised when the brightest hundredth of the image is at or below this. The gate of updates and configurations never gets laxer than by the default."""
    blur_drop: Annotated[float, Remote()] = Field(0.25, ge=0.01, le=5, json_schema_extra=unit("log ratio"))
    """`image.blurred` is raised when sharpness falls by more than this against the camera's own reference. The gate of updates and configurations never gets laxer than by the default."""
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
    outbox_max_bytes: Annotated[int, Remote()] = Field(16 * 2**20, ge=65536, le=2**30, json_schema_extra=unit("bytes"))
    """Disk that unsent messages may use, of which a quarter is kept for reports; beyond it the oldest are dropped and counted."""
    outbox_max_age_s: Annotated[int, Remote()] = Field(7 * 86400, ge=60, le=3650 * 86400, json_schema_extra=unit("s"))
    """Age at which an unsent message is dropped."""
    backlog_per_s: Annotated[float, Remote()] = Field(5, ge=0.01, le=50, json_schema_extra=unit("messages/s"))
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
    labels: Annotated[Labels, Remote()] = {}
    """What the owner says of the camera, such as `site` or `lane`; in every report and event, and in job conditions."""
    provisioning: Provisioning = Provisioning()
    paths: Paths = Paths()
    jobs: Jobs = Jobs()
    maintenance: Maintenance = Maintenance()
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
