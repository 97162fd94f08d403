"""Installer `agent`: the agent's own versions, in slots as of installer `app`, each tried before it is switched to.

While a new version is on trial the file `trial` beside `current` lets the loader, which starts the agent, go back to the
version before by itself. A new version is tried by one process and kept by another: what runs is what this process is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from agent.errors import FailedError, RefusedError
from agent.host import processes
from agent.host.files import fsync_folder, write_atomic
from agent.host.threads import to_end
from agent.updates.manifest import Manifest
from agent.updates.slots import Slots
from agent.updates.states import Slot
from agent.updates.trust import Installed

NAME = "camera-agent"
PROGRAM = Path("bin") / "camera-agent"
TRY_S = 60.0
"""Time for the new version to say its version, and again to check agent.toml."""
NOT_HANDED_DOWN = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")
REASONS = {
    "failed_starts": "it was started {starts} times and did not last",
    "not_ready_in_time": "it was not ready in time, or did not stop in time",
    "watchdog": "it hung and was ended by the watchdog",
    "not_executable": "it can't be executed",
    "trial_damaged": "the loader's record of the trial was damaged",
}


@dataclass(frozen=True)
class Started:
    """What the loader said when it started this process: the folder it works on, and which slot there it chose.

    `slot` is the text of a link relative to `root`; None stands for the packaged version.
    """

    root: Path
    slot: str | None


def started_by_loader(environ: Mapping[str, str] = os.environ) -> Started | None:
    """How this process was started; None without the loader."""
    if not environ.get("CAMERA_AGENT_LOADER") or not environ.get("CAMERA_AGENT_ROOT"):
        return None
    return Started(Path(environ["CAMERA_AGENT_ROOT"]), environ.get("CAMERA_AGENT_SLOT") or None)


class AgentInstaller:
    """The agent's slots below `root`. `version` is this process's own, `config_file` the agent.toml that it works with."""

    restarts = frozenset({"unit"})

    def __init__(self, root: Path, *, config_file: Path, version: str, started: Started | None) -> None:
        self.slots = Slots(root)
        self._root = root
        self._config_file = config_file
        self._version = version
        self._started = started
        self._tried: set[str] = set()

    async def check(self, manifest: Manifest) -> None:  # noqa: ARG002
        """Refuse what could not be taken back. Raises RefusedError no_loader, loader_elsewhere."""
        if self._started is None:
            raise RefusedError(
                "no_loader",
                "this agent was not started by camera-agent-loader, which could take a new version back",
                "start it by camera-agent.service",
            )
        if self._started.root != self._root:
            raise RefusedError(
                "loader_elsewhere",
                f"the loader starts what is in {self._started.root}, the target's root is {self._root}",
                "give the loader's CAMERA_AGENT_ROOT and the target the same folder",
            )

    async def probe(self, manifest: Manifest) -> Slot:
        """`active` only in the process that was started from the slot."""
        slot = await to_end(self.slots.probe, manifest.sha256)
        return "staged" if slot == "active" and not self._is_own(manifest) else slot

    async def running(self) -> tuple[str | None, Installed | None]:
        """The slot of this process; None for the packaged version, of which no more than its version is known."""
        link, installed = await to_end(self.slots.running)
        own = self._started.slot if self._started else link
        if own is not None and own == link:
            return link, installed
        return own, Installed(NAME, self._version, Path(own).name if own else "")

    async def previous(self) -> tuple[str | None, Installed | None]:
        """The other slot, never this process's own."""
        link, installed = await to_end(self.slots.previous)
        return (None, None) if self._started and link == self._started.slot else (link, installed)

    async def install(
        self,
        artifact: Path,
        manifest: Manifest,
        envelope: Mapping[str, Any],  # noqa: ARG002
        tell: Callable[[str], None],
    ) -> None:
        """Unpack it and try it. Raises FailedError archive_refused, archive_damaged, agent_unfit."""
        await to_end(self.slots.install, artifact, manifest)
        tell("trying whether the new version starts and accepts agent.toml")
        await self._try(manifest)

    async def arm(self, manifest: Manifest) -> None:
        """Note for the loader where to go back to, then move `current`. Raises FailedError slot_missing, agent_unfit."""
        if manifest.sha256 not in self._tried and not self._is_own(manifest):
            await self._try(manifest)
        await to_end(self._arm, manifest.sha256, (await self.running())[0])

    async def verify_running(self, manifest: Manifest) -> bool:
        """Whether this process is that version, and the next one would be."""
        return self._is_own(manifest) and await to_end(self.slots.verify_running, manifest.sha256)

    async def why_not_running(self) -> str:
        """Why the loader went back, as the end of a sentence; empty when it did not."""
        return await to_end(self._why_not_running)

    async def count_anew(self, manifest: Manifest) -> None:
        """Hold the starts until now not against the new version; for a trial that goes on although all else is proven."""
        if await self.verify_running(manifest):
            await to_end(self._count_anew)

    async def commit(self, manifest: Manifest, previous: str | None) -> None:
        """End the trial; from here on the loader keeps this version. Raises FailedError fell_back in another version."""
        if not await self.verify_running(manifest):
            why = await self.why_not_running()
            raise FailedError(
                "fell_back", f"this is not {manifest.name} {manifest.version}" + (f": {why}" if why else "")
            )
        await to_end(self._drop, "trial")
        await to_end(self._drop, "fell_back")
        await to_end(self.slots.commit, manifest, previous)

    async def roll_back(self, previous: str | None) -> None:
        await to_end(self.slots.roll_back, previous)
        await to_end(self._drop, "trial")

    async def step_back(self, previous: str) -> None:
        """Move `current` with the loader's trial the other way round. Raises FailedError slot_missing, agent_unfit."""
        program = self._root / previous / PROGRAM
        await self._starts(program, Path(previous).name[:12])
        own, link = (await self.running())[0], (await to_end(self.slots.running))[0]
        if link != previous:  # a cut came after the switch: what runs now must not become what the loader goes back to
            await to_end(self._write_trial, own or "", previous)
        await to_end(self.slots.roll_back, previous)

    async def stay(self) -> None:
        await to_end(self._drop, "trial")
        await to_end(self._drop, "fell_back")

    async def clean_up(self, keep: frozenset[str]) -> None:
        """Also forget why the loader went back, once what it says has been kept elsewhere."""
        await to_end(self._drop_settled)
        own = frozenset({self._started.slot}) if self._started and self._started.slot else frozenset[str]()
        await to_end(self.slots.clean_up, keep | own)

    async def forget(self, manifest: Manifest) -> None:
        self._tried.discard(manifest.sha256)
        if self._started is None or not self._is_own(manifest):
            await to_end(self.slots.forget, manifest.sha256)

    def needs(self, manifest: Manifest) -> Mapping[Path, int]:
        return {self.slots.slots: manifest.installed_size}

    def _is_own(self, manifest: Manifest) -> bool:
        return self._started is None or self._started.slot == f"slots/{manifest.sha256}"

    async def _try(self, manifest: Manifest) -> None:
        """Start it without consequences; what does not pass is removed. Raises FailedError agent_unfit."""
        try:
            await self._starts(self.slots.slots / manifest.sha256 / PROGRAM, f"{manifest.name} {manifest.version}")
        except FailedError:
            await self.forget(manifest)
            raise
        self._tried.add(manifest.sha256)

    async def _starts(self, program: Path, what: str) -> None:
        """That `program` says its version and accepts agent.toml. Raises FailedError agent_unfit."""
        if not await to_end(_is_script, program):
            _unfit(what, f"has no {PROGRAM} that can be started: it must be a script")
        environment = {key: value for key, value in os.environ.items() if key not in NOT_HANDED_DOWN}
        try:
            for arguments, words in (
                (["--version"], "does not start"),
                (["check-config", str(self._config_file)], f"does not accept {self._config_file}"),
            ):
                result = await processes.run([str(program), *arguments], timeout_s=TRY_S, env=environment)
                if not result.succeeded:
                    said = " ".join((result.stderr.text or result.stdout.text).split())[-300:]
                    _unfit(what, f"{words} ({result.describe()}){': ' + said if said else ''}")
        except processes.NotStartedError as error:
            _unfit(what, f"has no {PROGRAM} that can be started: {error.strerror}")

    def _arm(self, sha256: str, before: str | None) -> None:
        link = f"slots/{sha256}"
        if not (self._root / link).is_dir():
            raise FailedError("slot_missing", f"{self._root / link} is not there", "start the job again")
        if not self.slots.verify_running(sha256):
            self._drop("fell_back")
            self._write_trial(before or "", link)
        self.slots.arm(sha256)

    def _count_anew(self) -> None:
        trial = _lines(self._root / "trial")
        if trial.get("from") is not None and trial.get("to"):
            self._write_trial(trial["from"], trial["to"])

    def _write_trial(self, before: str, to: str) -> None:
        write_atomic(self._root / "trial", f"from={before}\nto={to}\nstarts=0\n".encode(), mode=0o644)

    def _why_not_running(self) -> str:
        told = _lines(self._root / "fell_back")
        if not told:
            return ""
        why = REASONS.get(told.get("why", ""), "for a reason that it could not keep")
        return f"the loader went back to the version before: {why.format(starts=told.get('starts', 'several'))}"

    def _drop_settled(self) -> None:
        """Remove `fell_back`, and a `trial` that is over; not what the loader still goes by."""
        trial = _lines(self._root / "trial")
        link, _ = self.slots.running()
        if trial and trial.get("to") == link:
            return
        self._drop("trial")
        self._drop("fell_back")

    def _drop(self, name: str) -> None:
        (self._root / name).unlink(missing_ok=True)
        if self._root.is_dir():
            fsync_folder(self._root)


def _lines(path: Path) -> dict[str, str]:
    """The `key=value` lines of one of the loader's files; empty when it is not there."""
    try:
        text = path.read_text("utf-8", errors="replace")
    except FileNotFoundError:
        return {}
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def _is_script(program: Path) -> bool:
    try:
        with program.open("rb") as file:
            return file.read(2) == b"#!"
    except OSError:
        return False


def _unfit(what: str, why: str) -> NoReturn:
    raise FailedError(
        "agent_unfit",
        f"{what} {why}",
        "build the slot for this camera with make-agent-slot",
    )
