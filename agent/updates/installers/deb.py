"""Installer `deb`: one Debian package. Both versions' .debs are kept by root before dpkg begins, so that either can be made whole.

The agent may not run dpkg: what changes something is done by `DebWork`, as root in a unit of its own (`ThroughUnit`), or
here (`Direct`) where the agent itself is root.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from agent.errors import FailedError, RefusedError
from agent.host.files import write_atomic
from agent.host.threads import to_end
from agent.updates.installers.deb_store import DebStore, State
from agent.updates.installers.deb_work import DebWork, old_package_missing
from agent.updates.installers.dpkg import Dpkg, Status
from agent.updates.manifest import Manifest
from agent.updates.privileged import REQUESTS, RESULTS, read_result
from agent.updates.states import Slot
from agent.updates.trust import Installed
from agent.versions import VERSION

UNIT_LIMIT_S = 4 * 3600.0
"""Longer than the root part's own limits on locks and scripts: it must not be given up while it works."""
POLL_S = 1.0
BUSY_POLL_S = 5.0
BUSY_LIMIT_S = UNIT_LIMIT_S
"""How long another change of a package is waited for."""
REQUEST_LIFE_S = 86_400
OWN_PACKAGE = "camera-agent"


class UnitState(Protocol):
    @property
    def active(self) -> str: ...


class Units(Protocol):
    """Of systemd, what is needed to start a unit and see it end."""

    async def restart(self, unit: str, *, timeout_s: float = ...) -> None: ...
    async def state(self, unit: str) -> UnitState: ...


class Root(Protocol):
    """Who does what needs root. Raises RefusedError, FailedError."""

    async def do(self, verb: str, target: str, package: str, request: Mapping[str, Any]) -> str: ...


class Direct:
    """In this process, which is root or works on a tree of its own."""

    def __init__(self, work: DebWork) -> None:
        self._work = work

    async def do(self, verb: str, target: str, package: str, request: Mapping[str, Any]) -> str:
        return await to_end(self._work.do, verb, target, package, request)


class ThroughUnit:
    """By camera-agent-deb@.service. `state_dir` is the agent's, `results` the folder in which the unit leaves results."""

    def __init__(self, units: Units, state_dir: Path, results: Path = RESULTS) -> None:
        self._units = units
        self._requests = state_dir / REQUESTS
        self._results = results

    async def do(self, verb: str, target: str, package: str, request: Mapping[str, Any]) -> str:  # noqa: ARG002
        """The unit knows the target's package itself, from agent.toml."""
        request_id = secrets.token_hex(8)
        unit = f"camera-agent-deb@{verb}_{request_id}_{target}.service"
        asked, answer = self._requests / f"{request_id}.json", self._results / f"{request_id}.json"
        await to_end(self._write, asked, request)
        problem: FailedError | None = None
        try:
            await self._units.restart(unit, timeout_s=UNIT_LIMIT_S)
        except FailedError as error:
            problem = error  # what counts is the result; a package may restart D-Bus in the middle
        result = await to_end(read_result, answer)
        while result is None and problem and await self._works(unit):
            await asyncio.sleep(POLL_S)
            result = await to_end(read_result, answer)
        await to_end(asked.unlink, missing_ok=True)
        if result is None:
            raise _no_result(unit, problem)
        if result["status"] == "done":
            return result["message"]
        kind = RefusedError if result["status"] == "refused" else FailedError
        raise kind(result["code"], result["message"], result["hint"])

    async def _works(self, unit: str) -> bool:
        try:
            return (await self._units.state(unit)).active in ("activating", "deactivating", "reloading", "active")
        except FailedError:
            return False

    def _write(self, path: Path, request: Mapping[str, Any]) -> None:
        path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        for old in path.parent.glob("*.json"):
            if old.stat().st_mtime < time.time() - REQUEST_LIFE_S:
                old.unlink(missing_ok=True)
        write_atomic(path, json.dumps(request).encode())


class Deb:
    """The package of target `name`. `root` does what needs root; `store` and `dpkg` are only read here."""

    restarts = frozenset({"none", "unit", "reboot"})

    def __init__(
        self, name: str, package: str, root: Root, *, store: DebStore | None = None, dpkg: Dpkg | None = None
    ) -> None:
        self._name = name
        self._package = package
        self._root = root
        self._store = store or DebStore()
        self._dpkg = dpkg or Dpkg()

    async def check(self, manifest: Manifest) -> None:
        """Raises RefusedError: old_package_missing, package_is_agent."""
        if self._package == OWN_PACKAGE or self._package.startswith(f"{OWN_PACKAGE}-"):
            raise RefusedError(
                "package_is_agent", f"{self._package} is the agent itself", "use a target of installer agent for it"
            )
        if manifest.rollback == "yes":
            await to_end(self._check_old)

    def _check_old(self) -> None:
        state, status = self._look()
        if status is None or (state.staged and not status.complete):
            return
        known = state.of_version(status.version)
        if known and self._store.deb(self._name, known.sha256).exists():
            return
        if self._store.find(self._package, status.version) is None:
            raise old_package_missing(self._package, status.version, self._store)

    def _look(self) -> tuple[State, Status | None]:
        return self._store.state(self._name), self._dpkg.status(self._package)

    async def probe(self, manifest: Manifest) -> Slot:
        return await to_end(self._probe, manifest)

    def _probe(self, manifest: Manifest) -> Slot:
        state, status = self._look()
        if status and not status.complete:
            return "partial"
        known = state.of_version(status.version) if status else None
        if status and status.version == manifest.version and known and known.sha256 == manifest.sha256:
            return "active"
        staged = state.staged
        if staged and staged.new.sha256 == manifest.sha256 and self._store.deb(self._name, manifest.sha256).exists():
            return "staged"
        return "absent"

    async def running(self) -> tuple[str | None, Installed | None]:
        """`package=version`; while an update is half done, the version that it replaces.

        Nothing is told about a version that only dpkg can order: root compares that one.
        """
        state, status = await to_end(self._look)
        if status and not status.complete and state.staged:
            return self._called(state.staged.before), _ordered(state.staged.before)
        if status is None:
            return None, None
        return f"{self._package}={status.version}", _ordered(state.of_version(status.version))

    async def previous(self) -> tuple[str | None, Installed | None]:
        state, status = await to_end(self._look)
        known = state.previous
        if known is None or (status and status.version == known.version):
            return None, None
        there = await to_end(self._store.deb(self._name, known.sha256).exists)
        return (self._called(known), known) if there else (None, None)

    def _called(self, known: Installed | None) -> str | None:
        return f"{self._package}={known.version}" if known else None

    async def install(
        self, artifact: Path, manifest: Manifest, envelope: Mapping[str, Any], tell: Callable[[str], None]
    ) -> None:
        """Keep both versions' .debs where only root writes; dpkg is not started."""
        tell("checking the package as root, keeping the one that is installed")
        await self._do("keep", {"envelope": dict(envelope), "artifact": str(artifact), "sha256": manifest.sha256})

    async def arm(self, manifest: Manifest) -> None:
        await self._do("install", {"sha256": manifest.sha256})

    async def verify_running(self, manifest: Manifest) -> bool:
        return await self.probe(manifest) == "active"

    async def why_not_running(self) -> str:
        return ""

    async def count_anew(self, manifest: Manifest) -> None:
        """Nothing counts its starts."""

    async def commit(self, manifest: Manifest, previous: str | None) -> None:  # noqa: ARG002
        await self._do("commit", {"sha256": manifest.sha256})

    async def roll_back(self, previous: str | None) -> None:
        package, _, version = (previous or "").partition("=")
        if previous is not None and package != self._package:
            raise FailedError("not_kept", f"{previous:.80} is not a version of {self._package}")
        await self._do("restore", {"version": None if previous is None else version})

    async def step_back(self, previous: str) -> None:
        """The .deb of the version that goes is kept."""
        await self.roll_back(previous)

    async def stay(self) -> None:
        """Nothing: what was restored is kept."""

    async def clean_up(self, keep: frozenset[str]) -> None:
        """Nothing: whatever changes what root keeps removes what is not needed any more."""

    async def forget(self, manifest: Manifest) -> None:
        await self._do("forget", {"sha256": manifest.sha256})

    def needs(self, manifest: Manifest) -> Mapping[Path, int]:
        """Room for the .debs of both versions, and for the new files beside the old ones."""
        return {self._store.folder: 2 * manifest.size, self._dpkg.root or Path("/"): manifest.installed_size}

    async def _do(self, verb: str, request: Mapping[str, Any]) -> None:
        """What root refuses here is a failure: it comes after the time for refusing. Another change is waited for."""
        until = time.monotonic() + BUSY_LIMIT_S
        while True:
            try:
                await self._root.do(verb, self._name, self._package, request)
                return
            except RefusedError as error:
                raise FailedError(error.code, error.message, error.hint) from None
            except FailedError as error:
                if error.code != "deb_busy" or time.monotonic() >= until:
                    raise
            await asyncio.sleep(BUSY_POLL_S)


def _ordered(known: Installed | None) -> Installed | None:
    return known if known and VERSION.fullmatch(known.version) else None


def _no_result(unit: str, problem: FailedError | None) -> FailedError:
    if problem and problem.code == "permission":
        return FailedError(
            "permission",
            "the agent may not start camera-agent-deb@.service",
            "install polkitd and /etc/polkit-1/rules.d/52-camera-agent-deb.rules",
        )
    why = problem.message if problem else "it ended early"
    return FailedError("deb_no_result", f"{unit} left no result: {why}", f"see journalctl -u {unit}")
