"""What is kept for Debian packages that are updated: their .debs, which one is installed, floors and the trusted root.

A folder that only root writes to: `<target>/state.json` and `<target>/<sha256>.deb`, `trust.json`, and `seed`, where an
engineer puts .debs of versions that were installed by other means. The agent reads it. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from agent.errors import AgentError, FailedError
from agent.host.files import fsync_folder, write_atomic
from agent.updates.installers.dpkg import read_control
from agent.updates.manifest import digest_of
from agent.updates.trust import Installed

STORE = Path("/var/lib/camera-agent-debs")
APT_CACHE = Path("/var/cache/apt/archives")
BLOCK = 2**20
MAX_CANDIDATES = 64

Phase = Literal["staged", "armed", "done", "restoring"]


@dataclass(frozen=True)
class Staged:
    """An update under way. `before` is None when the package was not installed; its digest is empty when its .deb is not kept.

    `held`: the package was held back from apt. `armed` is written before dpkg begins, `done` when the version was seen
    to be installed.
    """

    new: Installed
    before: Installed | None
    downgrade: bool
    held: bool
    envelope: Mapping[str, Any]
    phase: Phase = "staged"


@dataclass(frozen=True)
class State:
    """What is known of one target's package. `installed` was committed; `previous` is what it replaced."""

    staged: Staged | None = None
    installed: Installed | None = None
    previous: Installed | None = None

    def of_version(self, version: str) -> Installed | None:
        """What is known of the content of a version that is completely installed."""
        staged = self.staged
        if staged:
            began = staged.phase == "done" or (staged.phase != "staged" and not _is(staged.before, version))
            if began and _is(staged.new, version):
                return staged.new
            if _is(staged.before, version) and staged.before and staged.before.sha256:
                return staged.before
        return next((known for known in (self.installed, self.previous) if known and known.version == version), None)

    def kept(self) -> frozenset[str]:
        """Digests of the .debs that are still needed."""
        staged = (self.staged.new, self.staged.before) if self.staged else ()
        return frozenset(known.sha256 for known in (*staged, self.installed, self.previous) if known and known.sha256)


@dataclass(frozen=True)
class Trust:
    """Root's own memory of what to believe: the envelope of the root document, the floors by product, the last time."""

    root: Any = None
    floors: Mapping[str, int] = field(default_factory=dict)
    last_time: float = 0.0


class DebStore:
    """The store at `folder`."""

    def __init__(self, folder: Path = STORE, *, apt_cache: Path = APT_CACHE) -> None:
        self.folder = folder
        self._apt_cache = apt_cache

    def deb(self, target: str, sha256: str) -> Path:
        return self.folder / target / f"{sha256}.deb"

    def state(self, target: str) -> State:
        """What is kept of a target; nothing when there is nothing that can be read. Raises OSError."""
        document = self._read(self.folder / target / "state.json")
        try:
            staged = document.get("staged")
            return State(
                staged=Staged(
                    new=Installed(**staged["new"]),
                    before=_as_installed(staged["before"]),
                    downgrade=bool(staged["downgrade"]),
                    held=bool(staged["held"]),
                    envelope=staged["envelope"],
                    phase=staged["phase"],
                )
                if staged
                else None,
                installed=_as_installed(document.get("installed")),
                previous=_as_installed(document.get("previous")),
            )
        except (KeyError, TypeError):
            return State()

    def save(self, target: str, state: State) -> None:
        """Make `state` durable, then remove the .debs that it does not need."""
        folder = self.folder / target
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_atomic(folder / "state.json", json.dumps(asdict(state)).encode(), mode=0o644)
        kept = state.kept()
        for path in folder.iterdir():
            if path.name.endswith((".deb", ".new")) and path.name.removesuffix(".deb") not in kept:
                path.unlink()
        fsync_folder(folder)

    def trust(self) -> Trust:
        document = self._read(self.folder / "trust.json")
        try:
            return Trust(document.get("root"), dict(document.get("floors", {})), float(document.get("last_time", 0)))
        except (TypeError, ValueError):
            return Trust()

    def save_trust(self, trust: Trust) -> None:
        write_atomic(self.folder / "trust.json", json.dumps(asdict(trust)).encode(), mode=0o644)

    def raise_floor(self, name: str, counter: int) -> None:
        """Never lowers it."""
        trust = self.trust()
        if counter > trust.floors.get(name, 0):
            self.save_trust(replace(trust, floors={**trust.floors, name: counter}))

    def take(self, target: str, source: Path, *, owners: frozenset[int], signed: tuple[int, str] | None = None) -> str:
        """Copy a file in under its digest, which is returned; the copy is durable. Raises FailedError, OSError.

        `source` must be a plain file of one of `owners`, no link, and of the size and digest in `signed` where that is given.
        """
        folder = self.folder / target
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        candidate = folder / "incoming.new"
        candidate.unlink(missing_ok=True)
        digest, total = hashlib.sha256(), 0
        try:
            with open_plain(source, owners) as file, candidate.open("xb") as copy:
                os.fchmod(copy.fileno(), 0o600)
                while (block := file.read(BLOCK)) and (signed is None or total <= signed[0]):
                    total += len(block)
                    digest.update(block)
                    copy.write(block)
                copy.flush()
                os.fsync(copy.fileno())
            sha256 = digest.hexdigest()
            if signed and signed != (total, sha256):
                raise FailedError(
                    "digest_mismatch", "the artifact is not the one that was signed", "start the job again"
                )
            candidate.rename(self.deb(target, sha256))
        except BaseException:
            candidate.unlink(missing_ok=True)
            raise
        fsync_folder(folder)
        return sha256

    def whole(self, target: str, sha256: str) -> bool:
        """Whether the .deb of that digest is here, undamaged."""
        try:
            return bool(sha256) and digest_of(self.deb(target, sha256)) == sha256
        except FileNotFoundError:
            return False

    def find(self, package: str, version: str) -> Path | None:
        """A .deb of that version in `seed` or in apt's cache, by what its control file says and not by its name."""
        for folder in (self.folder / "seed", self._apt_cache):
            for path in sorted(folder.glob(f"{package}_*.deb"))[:MAX_CANDIDATES]:
                with contextlib.suppress(AgentError, OSError):
                    control = read_control(path)
                    if (control.package, control.version) == (package, version):
                        return path
        return None

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            document = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError:
            with contextlib.suppress(PermissionError):
                path.rename(path.with_name(f"{path.name}.damaged"))
            return {}
        return document if isinstance(document, dict) else {}


@contextlib.contextmanager
def open_plain(path: Path, owners: frozenset[int]) -> Iterator[Any]:
    """A plain file that belongs to one of `owners`, for reading; no link, device or pipe. Raises FailedError artifact_refused.

    It is looked at before it is opened, for opening alone does something to a device. What there is instead is not told:
    root sees what the agent may not.
    """
    try:
        descriptor = _open_plain(path, owners)
    except (OSError, ValueError):  # ValueError: a path that can't be one
        raise FailedError(
            "artifact_refused", "what was handed over is not a plain file of the agent", "see docs/deb.md"
        ) from None
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _open_plain(path: Path, owners: frozenset[int]) -> int:
    seen = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(seen)
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in owners:
            raise PermissionError
        return os.open(f"/proc/self/fd/{seen}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(seen)


def _is(known: Installed | None, version: str) -> bool:
    return known is not None and known.version == version


def _as_installed(document: Any) -> Installed | None:
    return Installed(**document) if document else None
