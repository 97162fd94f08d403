"""Where a camera lives whose power is cut, and what outlives the cut: the cloud, and what the world has seen of the camera."""

from __future__ import annotations

import pickle
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tests.fakes import TERMINAL, JobsService


@dataclass
class Place:
    """`folder` is on the file system that is cut, `world` is not; `label` says in which state the journal is.

    `cuts` is how often the power was cut before this boot. A violation is a sentence in `saw`.
    """

    folder: Path
    world: Path
    set_text: Callable[[str, str], None]
    listener: socket.socket
    """Of a web server: it is there before the first boot, so that its address stays."""
    cuts: int = 0
    saw: list[str] = field(default_factory=list)
    state: str = "boot"

    def label(self, state: str, doing: str = "") -> None:
        """From here on `state` is durable; what is done besides."""
        self.state = state
        self.set_text("label", f"{state}, {doing}" if doing else state)

    def expect(self, holds: bool, words: str) -> None:
        if not holds:
            self.saw.append(f"after cut {self.cuts}: {words}" if self.cuts else words)


class Scenario(Protocol):
    """One course of events; each call is in a process of its own."""

    def prepare(self, place: Place) -> None:
        """Make the camera as it is before the first boot."""

    def boot(self, place: Place) -> None:
        """Look at what is there, start the agent, let it work until nothing is left to do, look again."""


class World:
    """A dict that is on the disk of the host after every change, however its process ends."""

    def __init__(self, place: Place) -> None:
        self._file = place.world / "world.pickle"
        self.kept: dict[str, Any] = pickle.loads(self._file.read_bytes()) if self._file.exists() else {}

    def save(self, **values: Any) -> None:
        self.kept |= values
        candidate = self._file.with_suffix(".new")
        candidate.write_bytes(pickle.dumps(self.kept))
        candidate.rename(self._file)

    def get(self, key: str, default: Any = None) -> Any:
        return self.kept.get(key, default)


class LastingJobs(JobsService):
    """The Jobs service of a camera whose power is cut; `said` are the ends that arrived, refused ones too."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self.said: list[tuple[str, str, str]] = []
        for name, value in world.get("jobs", {}).items():
            setattr(self, name, value)

    def keep(self) -> None:
        self._world.save(
            jobs={name: getattr(self, name) for name in ("executions", "updates", "said", "_created", "requests")}
        )

    async def update(self, job_id: str, **changes: Any) -> int:
        if changes["status"] in TERMINAL:
            self.said.append((job_id, changes["status"], changes["details"].get("reason_code", "")))
        try:
            return await super().update(job_id, **changes)
        finally:
            self.keep()

    def all_ended(self) -> bool:
        return all(entry["status"] in TERMINAL for entry in self.executions.values())

    def ends(self, job_id: str) -> list[str]:
        """The terminal statuses that were accepted."""
        return [status for job, status, _ in self.updates if job == job_id and status in TERMINAL]


def tree(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything below a folder: kind, mode, and content."""
    found: dict[str, tuple[Any, ...]] = {}
    for path in sorted(folder.rglob("*")):
        name, status = str(path.relative_to(folder)), path.lstat()
        if stat.S_ISLNK(status.st_mode):
            found[name] = ("link", str(path.readlink()))
        elif stat.S_ISDIR(status.st_mode):
            found[name] = ("folder", stat.S_IMODE(status.st_mode))
        else:
            found[name] = ("file", stat.S_IMODE(status.st_mode), path.read_bytes())
    return found
