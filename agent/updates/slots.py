"""Slots: each version unpacked into its own folder `slots/<digest>`, and the link `current` that says which one runs.

A slot appears under its name only when all of it is on disk; `current` always points to a whole slot. What is known of
a slot stands beside it in `slots/<digest>.json`. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agent.errors import FailedError
from agent.host.files import fsync_folder, write_atomic
from agent.updates.archive import damage_named, make_folders, unpack
from agent.updates.manifest import Manifest
from agent.updates.states import Slot
from agent.updates.trust import Installed

OURS = re.compile(r"^\.?([0-9a-f]{64})(\.tmp|\.json|\.json\.new)?$")


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
        try:
            record = json.loads((self.slots / f"{Path(link).name}.json").read_bytes())
            return Installed(
                str(record["name"]), str(record["version"]), Path(link).name, int(record["security_counter"])
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def install(self, artifact: Path, manifest: Manifest) -> None:
        """Unpack into `<digest>.tmp`, fsync all of it, rename. Raises FailedError archive_refused, archive_damaged."""
        slot, candidate = self.slots / manifest.sha256, self.slots / f"{manifest.sha256}.tmp"
        if slot.is_dir():
            return
        make_folders(self.slots)
        _remove_tree(candidate)
        try:
            with damage_named():
                unpack(artifact, candidate, max_bytes=manifest.installed_size)
            _fsync_tree(candidate)
            self._write_record(manifest.sha256, _record(manifest))
            candidate.rename(slot)
        except BaseException:
            _remove_tree(candidate)
            raise
        fsync_folder(self.slots)
        fsync_folder(self.root)

    def previous(self) -> tuple[str | None, Installed | None]:
        """The same of the whole slot that is not the current one; of the latest, should there be several."""
        current, _ = self.running()
        found: list[tuple[float, str]] = []
        with contextlib.suppress(FileNotFoundError):
            found = [
                (path.stat().st_mtime, path.name)
                for path in self.slots.iterdir()
                if re.fullmatch(r"[0-9a-f]{64}", path.name) and path.is_dir() and path.name != Path(current or "").name
            ]
        if not found:
            return None, None
        link = f"slots/{max(found)[1]}"
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
        self._write_record(manifest.sha256, _record(manifest))
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
        for name in (sha256, f"{sha256}.tmp", f"{sha256}.json"):
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

    def _write_record(self, sha256: str, record: dict[str, Any]) -> None:
        write_atomic(self.slots / f"{sha256}.json", json.dumps(record).encode(), mode=0o644)


def _record(manifest: Manifest) -> dict[str, Any]:
    return asdict(Installed(manifest.name, manifest.version, manifest.sha256, manifest.security_counter))


def _fsync_tree(folder: Path) -> None:
    for place, _, _ in os.walk(folder, topdown=False):
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
