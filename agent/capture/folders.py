"""Which folders below a root matter, and which files in them are images. Blocking: call in a thread.

Dated folders pile up for years; only those that changed within two days, and the way to the newest, are looked into.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

YOUNG_S = 48 * 3600
REMEMBER_S = 120.0
DEEPEST = 16
UNFINISHED = (".part", ".tmp")
NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "fuse.", "afs", "lustre", "glusterfs", "vboxsf", "prl_fs")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A file that is an image by its name: sizes in bytes, times in epoch seconds."""

    path: str
    inode: int
    size: int
    mtime_ns: int
    changed: float

    @property
    def key(self) -> tuple[int, int]:
        """What makes two sightings the same image: content not written since, whatever the file is called now."""
        return self.inode, self.mtime_ns

    @property
    def mtime(self) -> float:
        return self.mtime_ns / 1e9


@dataclass(frozen=True, slots=True)
class Found:
    """An image that arrived: `at` in monotonic seconds, `seen` and the file's `mtime` in epoch seconds, size in bytes.

    `vanished`: it was gone again before it could be looked at; it did arrive, but its size and times are unknown.
    """

    path: str
    at: float
    seen: float
    size: int = 0
    mtime: float = 0.0
    vanished: bool = False


class Sightings:
    """Which images have been counted: each key with the file's time, so that what can't be looked at again is forgotten."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[float, float]] = {}

    def __contains__(self, key: tuple[int, int]) -> bool:
        return key in self._known

    def add(self, key: tuple[int, int], stamp: float, now: float) -> None:
        """`stamp` is the file's time in epoch seconds, `now` monotonic seconds."""
        self._known[key] = (stamp, now)

    def forget(self, oldest: float, now: float) -> None:
        """Drop those with a stamp before `oldest` that were not added within two minutes."""
        self._known = {
            key: (stamp, added)
            for key, (stamp, added) in self._known.items()
            if stamp >= oldest or now - added < REMEMBER_S
        }


def eligible(name: str, pattern: str) -> bool:
    """Whether a file of this name is a finished image."""
    return not name.startswith(".") and not name.endswith(UNFINISHED) and fnmatchcase(name, pattern)


def printable(path: str) -> str:
    """`path` as text that JSON, a log and a terminal can take: bytes that are no UTF-8 and control characters escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def look(path: str) -> ImageFile | None:
    """The regular file at `path`; None for a link or another kind. Raises OSError."""
    facts = os.lstat(path)
    if not stat.S_ISREG(facts.st_mode):
        return None
    return ImageFile(path, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime)


def images(folder: str, pattern: str) -> Iterator[ImageFile]:
    """The images directly in `folder`; what vanishes or can't be read while listing is left out."""
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if eligible(entry.name, pattern):
                with suppress(OSError):
                    file = look(entry.path)
                    if file:
                        yield file


def live_folders(root: str, now: float) -> dict[str, int]:
    """`root` and the folders below it that images may appear in, each with its mtime in ns; `now` is epoch seconds.

    A folder counts when it changed within two days, when one below it does, or when it is the newest of its siblings.
    Links and dot folders are not followed. Raises OSError when `root` can't be read.
    """
    live: dict[str, int] = {}
    _visit(root, Path(root).stat(), now, DEEPEST, True, live)
    return live


def _visit(path: str, facts: os.stat_result, now: float, depth: int, wanted: bool, live: dict[str, int]) -> bool:
    below = _subfolders(path, facts) if depth else []
    newest = max(below, key=lambda item: item[1].st_mtime_ns)[0] if below and wanted else None
    for child, child_facts in below:
        wanted |= _visit(child, child_facts, now, depth - 1, child == newest, live)
    wanted |= now - facts.st_mtime < YOUNG_S
    if wanted:
        live[path] = facts.st_mtime_ns
    return wanted


def _subfolders(path: str, facts: os.stat_result) -> list[tuple[str, os.stat_result]]:
    if facts.st_nlink == 2:  # where the file system counts, a folder without subfolders has two links
        return []
    found: list[tuple[str, os.stat_result]] = []
    with suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                    found.append((entry.path, entry.stat(follow_symlinks=False)))
    return found


def on_network(path: str) -> bool:
    """Whether `path` lies on a file system whose changes by other machines inotify does not see."""
    best, kind = "", ""
    real = os.path.realpath(path)
    with suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            fields, _, rest = line.partition(" - ")
            point = fields.split()[4]
            if len(point) >= len(best) and (real == point or real.startswith(point.rstrip("/") + "/")):
                best, kind = point, rest.split()[0]
    return kind.startswith(NETWORK)
