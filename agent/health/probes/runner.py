"""Running checks side by side: each waits for those it depends on, and is skipped when one of them failed.

So only root causes are shown as failures. The whole run ends within `DEADLINE_S` whatever hangs.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

DEADLINE_S = 9.5
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


class UnknownCheckError(ValueError):
    """A check was asked for that does not exist."""


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


def list_checks() -> dict[str, str]:
    """Title of every check by its code, in the order of reports: what others depend on comes first."""
    return {check.code: check.title for check in _table()}


def _table() -> Sequence[Check]:
    from agent.health.probes.table import CHECKS

    return CHECKS


def run_checks(
    config_path: Path,
    only: Sequence[str] | None = None,
    *,
    site: Site | None = None,
    checks: Sequence[Check] | None = None,
) -> list[Finding]:
    """Run all checks, or `only` those and what they depend on; blocking, at most ten seconds.

    Returns a finding for each wanted check in the table's order, and for every dependency that did not pass. Raises
    UnknownCheckError.
    """
    table = {check.code: check for check in (_table() if checks is None else checks)}
    unknown = set(only or ()) - set(table)
    if unknown:
        raise UnknownCheckError(f"no such check: {', '.join(sorted(unknown))} (there are {', '.join(table)})")
    wanted = set(only) if only else set(table)
    needed = [check for code, check in table.items() if code in _with_dependencies(wanted, table)]
    found = _run(needed, site or Site(config_path))
    return [
        found[check.code] for check in needed if check.code in wanted or found[check.code].status in ("fail", "warn")
    ]


def _run(checks: Sequence[Check], site: Site) -> dict[str, Finding]:
    deadline = time.monotonic() + DEADLINE_S
    waiting = {check.code: check for check in checks}
    running: dict[str, tuple[Check, float]] = {}
    found: dict[str, Finding] = {}
    results: queue.SimpleQueue[tuple[str, Outcome]] = queue.SimpleQueue()
    while waiting or running:
        for check in [c for c in waiting.values() if all(d in found for d in c.depends_on)]:
            del waiting[check.code]
            cause = _root_cause(check, found)
            if cause:
                outcome = Outcome("skip", f"not checked because of {cause}")
                found[check.code] = replace(_finding(check, outcome), because=cause)
                continue
            running[check.code] = (check, min(time.monotonic() + check.limit_s, deadline))
            # A daemon thread: one that hangs in the resolver can't be stopped and must not hold up the exit.
            threading.Thread(target=_call, args=(check, site, results), daemon=True).start()
        if not running:
            continue
        try:
            pause = max(min(end for _, end in running.values()) - time.monotonic(), 0)
            code, outcome = results.get(timeout=pause)
        except queue.Empty:
            for code, (check, end) in list(running.items()):
                if end <= time.monotonic():
                    del running[code]
                    found[code] = _finding(check, _no_answer(check))
        else:
            if code in running:
                found[code] = _finding(running.pop(code)[0], outcome)
    return found


def _call(check: Check, site: Site, results: queue.SimpleQueue[tuple[str, Outcome]]) -> None:
    try:
        outcome = check.run(site)
    except ConfigProblem as problem:
        outcome = Outcome(
            "fail", str(problem), "the agent can't use this file", f"camera-agent check-config {site.config_path}"
        )
    except Exception as error:  # noqa: BLE001  a bug in one check must not cost the others
        outcome = Outcome(
            "warn", f"the check itself failed: {type(error).__name__}: {error}", "nothing is known about this point"
        )
    results.put((check.code, outcome))


def _no_answer(check: Check) -> Outcome:
    return Outcome("fail", f"no answer within {check.limit_s:g} s", *check.silent)


def _root_cause(check: Check, found: dict[str, Finding]) -> str:
    for dependency in check.depends_on:
        finding = found[dependency]
        if finding.status == "fail":
            return dependency
        if finding.because:
            return finding.because
    return ""


def _with_dependencies(codes: Iterable[str], table: dict[str, Check]) -> set[str]:
    reached: set[str] = set()
    pending = list(codes)
    while pending:
        code = pending.pop()
        if code not in reached:
            reached.add(code)
            pending += [dependency for dependency in table[code].depends_on if dependency in table]
    return reached


def _finding(check: Check, outcome: Outcome) -> Finding:
    return Finding(
        check.code, check.title, check.severity, outcome.status, outcome.seen, outcome.meaning, outcome.remedy
    )


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
