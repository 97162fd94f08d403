"""The file an artifact is downloaded into: what is counted as there is fsynced and hashed, also after a power cut.

Whatever is found in its place, a link, a folder, another file's second name, damaged or too long, is made into a file of ours.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.host.files import fsync_folder, write_atomic
from agent.updates.manifest import digest_of

SIDECAR_BYTES = 16 * 1024


@dataclass(frozen=True)
class Origin:
    """Where bytes came from, and the entity tag they had there; empty: unknown."""

    source: str = ""
    etag: str = ""


class Part:
    """The part file with its sidecar; every method blocks."""

    def __init__(self, folder: Path, sha256: str, size: int) -> None:
        self.size = size
        self.origin = Origin()
        """Of the bytes that came last; noted with the next ones."""
        self.offset = 0
        """Bytes on disk, fsynced and hashed."""
        self.finished = folder / sha256
        self._sha256 = sha256
        self._path = folder / f"{sha256}.part"
        self._sidecar = folder / f"{sha256}.json"
        self._digest = hashlib.sha256()
        self._file: int | None = None

    def complete(self) -> bool:
        """Whether the finished file is there and right; otherwise the part file is opened where it can go on."""
        self.finished.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        for path in (self.finished, self._path, self._sidecar):
            _clear(path)
        if self.finished.exists():
            if digest_of(self.finished) == self._sha256:
                return True
            self.finished.unlink()
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self.origin, self.offset = self._kept(os.fstat(self._file).st_size)
        if not self.offset:
            self._sidecar.unlink(missing_ok=True)
        position = 0
        while position < self.offset:
            data = os.pread(self._file, min(2**20, self.offset - position), position)
            if not data:
                raise OSError(errno.EIO, f"{self._path.name} is being changed by somebody else")
            self._digest.update(data)
            position += len(data)
        os.ftruncate(self._file, self.offset)
        return False

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Write, fsync, and only then count the bytes."""
        assert self._file is not None
        view = memoryview(data)
        position = self.offset
        while view:
            written = os.pwrite(self._file, view, position)
            view, position = view[written:], position + written
        os.fsync(self._file)
        self._digest.update(data)
        self.offset = position
        self._note()

    def start_over(self, origin: Origin) -> None:
        """Forget all bytes; the next come from `origin`."""
        assert self._file is not None
        self.origin, self.offset, self._digest = origin, 0, hashlib.sha256()
        self._note()
        os.ftruncate(self._file, 0)

    def finish(self) -> bool:
        """Give the part file its final name when its digest is right, else throw its bytes away."""
        if self.offset != self.size or self._digest.hexdigest() != self._sha256:
            self.start_over(Origin())
            return False
        self._path.rename(self.finished)
        self._sidecar.unlink(missing_ok=True)
        fsync_folder(self.finished.parent)
        return True

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _kept(self, there: int) -> tuple[Origin, int]:
        """Origin and verified offset as noted; nothing when the note can't be of a file with `there` bytes."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            with self._sidecar.open("rb") as file:
                kept = json.loads(file.read(SIDECAR_BYTES))
            offset = kept["verified_offset"]
            if type(offset) is int and kept["size"] == self.size and 0 <= offset <= min(there, self.size):
                return Origin(_text(kept.get("source")), _text(kept["etag"])), offset
        return Origin(), 0

    def _note(self) -> None:
        record = {
            "etag": self.origin.etag,
            "source": self.origin.source,
            "size": self.size,
            "verified_offset": self.offset,
        }
        write_atomic(self._sidecar, json.dumps(record).encode())


def _clear(path: Path) -> None:
    """Remove what stands at `path` unless it is a file that has no other name."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISDIR(found.st_mode):
        shutil.rmtree(path)
    elif not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        path.unlink()


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
