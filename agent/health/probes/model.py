"""What a check is, what it looks at, and what it finds."""

from __future__ import annotations

import os
import socket
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

DEFAULT_STATE_DIR = "/var/lib/camera-agent"
DEFAULT_RUNTIME_DIR = "/run/camera-agent"
DEFAULT_CA_FILE = "/etc/camera-agent/root-ca.pem"
DEFAULT_PORT = 8883

Status = Literal["pass", "warn", "fail", "skip"]
Severity = Literal["critical", "warning", "info"]


@dataclass(frozen=True)
class Outcome:
    """What a check found: what was `seen`, what it means, and the `remedy` with the exact command."""

    status: Status
    seen: str
    meaning: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Finding:
    """A check's result as shown; `code` is the check's, `because` is the code of the failed check that explains a skipped one."""

    code: str
    title: str
    severity: Severity
    status: Status
    seen: str
    meaning: str = ""
    remedy: str = ""
    because: str = ""

    def as_dict(self) -> dict[str, str]:
        """The finding as JSON object."""
        return dict(vars(self))


class ConfigProblem(Exception):  # noqa: N818  it is reported, not raised to callers
    """agent.toml can't be used; the text says why."""


@dataclass
class Site:
    """What the checks look at: agent.toml, the roots of /proc and /sys, the clock, and the daemon's socket.

    The fields after `config_path` are for tests; `agent_status` is what the daemon answered, once it was asked.
    """

    config_path: Path
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")
    now: Callable[[], float] = time.time
    clock_synchronised: Callable[[], bool | None] | None = None
    api_socket: Path | None = None
    agent_status: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def document(self) -> dict[str, Any]:
        """The parsed agent.toml. Raises ConfigProblem."""
        try:
            return tomllib.loads(self.config_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigProblem(f"{self.config_path}: no such file") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigProblem(f"{self.config_path}: {error}") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigProblem(f"{self.config_path}: not valid TOML: {error}") from None

    def get(self, section: str, key: str, default: Any) -> Any:
        """A key of agent.toml. Raises ConfigProblem when it has another type than `default`."""
        table = self.document.get(section, {})
        value = table.get(key, default) if isinstance(table, dict) else None
        if not isinstance(value, type(default)) or isinstance(value, bool):
            raise ConfigProblem(f"{self.config_path}: {section}.{key} is not {_words(default)}")
        return value

    @property
    def state_dir(self) -> Path:
        return Path(self.get("paths", "state_dir", DEFAULT_STATE_DIR))

    @property
    def socket_path(self) -> Path:
        if self.api_socket:
            return self.api_socket
        named = os.environ.get("AGENTCTL_SOCKET")
        return Path(named) if named else Path(self.get("paths", "runtime_dir", DEFAULT_RUNTIME_DIR)) / "api.sock"

    @property
    def certificate_file(self) -> Path:
        return Path(self.get("cloud", "certificate_file", "") or self.state_dir / "identity" / "certificate.pem")

    @property
    def private_key_file(self) -> Path:
        return Path(self.get("cloud", "private_key_file", "") or self.state_dir / "identity" / "private-key.pem")

    @property
    def ca_file(self) -> Path:
        return Path(self.get("cloud", "ca_file", DEFAULT_CA_FILE))

    @property
    def endpoint(self) -> tuple[str, int]:
        """Host and port of the cloud; the host is empty when none is configured."""
        return self.get("cloud", "endpoint", ""), self.get("cloud", "port", DEFAULT_PORT)

    @property
    def proxy_url(self) -> str:
        return str(self.get("cloud", "proxy_url", ""))

    @property
    def first_hop(self) -> tuple[str, int]:
        """Host and port that a connection is made to: the proxy's when there is one, else the endpoint's."""
        from urllib.parse import urlsplit

        url = urlsplit(self.proxy_url)
        return (url.hostname, url.port or 80) if url.hostname else self.endpoint

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        """The tables of `[capture.sources]`."""
        sources = self.get("capture", "sources", {})
        return {name: table for name, table in sources.items() if isinstance(table, dict)}


@dataclass(frozen=True)
class Check:
    """One check. After `limit_s` without an end it counts as failed; `silent` is what that means, and the remedy."""

    code: str
    title: str
    severity: Severity
    run: Callable[[Site], Outcome]
    depends_on: tuple[str, ...] = ()
    limit_s: float = 3.0
    silent: tuple[str, str] = ("something does not answer at all", "see `journalctl -b -p err -n 50`")


def _words(default: Any) -> str:
    return {str: "a text", int: "a whole number", dict: "a table"}.get(type(default), type(default).__name__)


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine itself."""
    import ipaddress

    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_address(host: str) -> bool:
    """Whether `host` is an IP address."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return True
    return False
