"""Slots: each version unpacked into its own folder `slots/<digest>`, and the link `current` that says which one runs.

A slot appears under its name only when all of it is on disk; `current` always points to a whole slot. What is known of
a slot stands beside it in `slots/<digest>.json`, also whether it ever proved itself. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent.errors import FailedError
from agent.host.files import free_bytes, fsync_folder, write_atomic
from agent.updates.archive import damage_named, make_folders, unpack
from agent.updates.manifest import Manifest
from agent.updates.states import Slot
from agent.updates.trust import Installed

OURS = re.compile(r"^\.?([0-9a-f]{64})(\.tmp|\.json|\.json\.new)?$")
KEEP_FREE = 16 * 2**20
"""Bytes that unpacking leaves to the others on the file system."""


class Slots:
    """The slots below `root`, a folder on one file system that only the agent writes to."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.slots = root / "slots"
        self.current = root / "current"

    def probe(self, sha256: str) -> Slot:
        if self.verify_running(sha256):
            return "active"
        if (self.slots / sha256).is_dir():
            return "staged"
        return "partial" if (self.slots / f"{sha256}.tmp").exists() else "absent"

    def running(self) -> tuple[str | None, Installed | None]:
        """The text of the link `current` and the record of its slot. Raises FailedError current_not_a_link."""
        try:
            link = str(self.current.readlink())
        except FileNotFoundError:
            return None, None
        except OSError:
            raise FailedError(
                "current_not_a_link", f"{self.current} is not a symbolic link", "move it away; the agent makes the link"
            ) from None
        return link, self._installed(link)

    def _installed(self, link: str) -> Installed | None:
        """The record of the slot that `link` points to; None when there is none that can be read."""
        record = self._record(Path(link).name)
        try:
            return Installed(
                str(record["name"]), str(record["version"]), Path(link).name, int(record["security_counter"])
            )
        except (ValueError, KeyError, TypeError):
            return None

    def committed(self, sha256: str) -> bool:
        """Whether the slot is there and was ever committed. Records of earlier versions don't say; theirs count as committed."""
        record = self._record(sha256)
        return bool(record) and record.get("committed", True) is True and (self.slots / sha256).is_dir()

    def _record(self, sha256: str) -> dict[str, Any]:
        """What stands beside a slot; empty when there is nothing that can be read."""
        try:
            record = json.loads((self.slots / f"{sha256}.json").read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        return record if isinstance(record, dict) else {}

    def install(self, artifact: Path, manifest: Manifest) -> None:
        """Unpack into `<digest>.tmp`, make all of it durable, rename.

        Raises FailedError archive_refused, archive_damaged, disk_full, and leaves nothing behind then.
        """
        slot, candidate = self.slots / manifest.sha256, self.slots / f"{manifest.sha256}.tmp"
        if slot.is_dir():
            fsync_folder(self.slots)
            return
        try:
            with damage_named():
                make_folders(self.slots)
                _remove_tree(candidate)
                room = free_bytes(self.slots) - KEEP_FREE
                with _durable_after(candidate):
                    unpack(artifact, candidate, max_bytes=manifest.installed_size, room=room)
                self._write_record(manifest, committed=False)
                candidate.rename(slot)
                fsync_folder(self.slots)
                fsync_folder(self.root)
        except BaseException:
            if not slot.is_dir():
                _remove_tree(candidate)
                (self.slots / f"{manifest.sha256}.json").unlink(missing_ok=True)
            raise

    def previous(self) -> tuple[str | None, Installed | None]:
        """The same of the whole slot that is not the current one; should there be several, of the latest that was committed."""
        current, _ = self.running()
        found: list[tuple[bool, float, str]] = []
        with contextlib.suppress(FileNotFoundError):
            found = [
                (self.committed(path.name), path.stat().st_mtime, path.name)
                for path in self.slots.iterdir()
                if re.fullmatch(r"[0-9a-f]{64}", path.name) and path.is_dir() and path.name != Path(current or "").name
            ]
        if not found:
            return None, None
        link = f"slots/{max(found)[-1]}"
        return link, self._installed(link)

    def arm(self, sha256: str) -> None:
        if not (self.slots / sha256).is_dir():
            raise FailedError("slot_missing", f"{self.slots / sha256} is not there", "start the job again")
        self._point(f"slots/{sha256}")

    def verify_running(self, sha256: str) -> bool:
        try:
            return self.current.readlink() == Path("slots") / sha256
        except OSError:
            return False

    def commit(self, manifest: Manifest, previous: str | None) -> None:
        self._write_record(manifest, committed=True)
        self.clean_up(frozenset({manifest.sha256, Path(previous).name} if previous else {manifest.sha256}))

    def roll_back(self, previous: str | None) -> None:
        """Point `current` back. Without a version before there was no link, and there is none again."""
        if previous is None:
            self.current.unlink(missing_ok=True)
            fsync_folder(self.root)
            return
        if not (self.root / previous).exists():
            raise FailedError("slot_missing", f"{self.root / previous} is not there", "install a version by a new job")
        self._point(previous)

    def clean_up(self, keep: frozenset[str]) -> None:
        link, _ = self.running()
        kept = {Path(name).name for name in keep} | ({Path(link).name} if link else set())
        with contextlib.suppress(FileNotFoundError):
            for path in list(self.slots.iterdir()):
                match = OURS.match(path.name)
                if match and (match[1] not in kept or match[2] == ".tmp"):
                    self._discard(path)
            fsync_folder(self.slots)

    def forget(self, sha256: str) -> None:
        if self.verify_running(sha256):
            return
        for name in (sha256, f"{sha256}.tmp", f"{sha256}.json", f".{sha256}.json.new"):
            self._discard(self.slots / name)

    def _discard(self, path: Path) -> None:
        """Remove a slot so that a cut half-way leaves nothing that looks whole."""
        if path.is_dir() and not path.name.endswith(".tmp"):
            doomed = path.with_name(f"{path.name}.tmp")
            _remove_tree(doomed)
            path.rename(doomed)
            fsync_folder(self.slots)
            path = doomed
        if path.is_dir() and not path.is_symlink():
            _remove_tree(path)
        elif path.is_symlink() or path.exists():
            path.unlink()

    def _point(self, link: str) -> None:
        self.running()
        candidate = self.root / "current.new"
        candidate.unlink(missing_ok=True)
        candidate.symlink_to(link)
        candidate.rename(self.current)
        fsync_folder(self.root)

    def _write_record(self, manifest: Manifest, *, committed: bool) -> None:
        what = Installed(manifest.name, manifest.version, manifest.sha256, manifest.security_counter)
        record = json.dumps({**asdict(what), "committed": committed})
        write_atomic(self.slots / f"{manifest.sha256}.json", record.encode(), mode=0o644)


@contextlib.contextmanager
def _durable_after(folder: Path) -> Iterator[None]:
    """What is written to the new folder `folder` meanwhile is on disk afterwards. Raises OSError when it can't be."""
    # Opened before anything is written: the kernel tells a descriptor of failed write-back since it was opened.
    descriptor = os.open(folder.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield
        if not _sync_file_system(descriptor):
            _fsync_tree(folder)
    finally:
        os.close(descriptor)


def _sync_file_system(descriptor: int) -> bool:
    """syncfs(2); False where it is missing, forbidden, or says nothing of failed write-back (before Linux 5.8)."""
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    libc = ctypes.CDLL(None, use_errno=True)
    if not release or (int(release[1]), int(release[2])) < (5, 8) or not hasattr(libc, "syncfs"):
        return False
    if libc.syncfs(descriptor) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code))


def _fsync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder, topdown=False):
        for path in (Path(place) / name for name in names):
            if not path.is_symlink():
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        fsync_folder(Path(place))


def _remove_tree(folder: Path) -> None:
    """Remove a folder also when its own modes forbid it."""

    def permit(remove: Callable[..., Any], path: str, _: Any) -> None:
        Path(path).parent.chmod(0o700)
        remove(path)

    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder, onerror=permit)
