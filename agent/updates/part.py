"""The file an artifact is downloaded into: what is counted as there is fsynced and hashed, also after a power cut."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path

from agent.host.files import fsync_folder, write_atomic
from agent.updates.manifest import digest_of


class Part:
    """The part file with its sidecar; every method blocks."""

    def __init__(self, folder: Path, sha256: str, size: int) -> None:
        self.size = size
        self.etag = ""
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
        if self.finished.exists():
            if digest_of(self.finished) == self._sha256:
                return True
            self.finished.unlink()
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(self._sidecar.read_bytes())
            if kept["size"] == self.size and 0 <= kept["verified_offset"] <= os.fstat(self._file).st_size:
                self.etag, self.offset = str(kept["etag"]), int(kept["verified_offset"])
        position = 0
        while position < self.offset:
            data = os.pread(self._file, min(2**20, self.offset - position), position)
            self._digest.update(data)
            position += len(data)
        os.ftruncate(self._file, self.offset)
        return False

    def append(self, data: bytearray) -> None:
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

    def start_over(self, etag: str) -> None:
        """Forget all bytes."""
        assert self._file is not None
        self.etag, self.offset, self._digest = etag, 0, hashlib.sha256()
        self._note()
        os.ftruncate(self._file, 0)

    def finish(self) -> bool:
        """Give the part file its final name when its digest is right, else throw its bytes away."""
        if self.offset != self.size or self._digest.hexdigest() != self._sha256:
            self.start_over("")
            return False
        self._path.rename(self.finished)
        self._sidecar.unlink(missing_ok=True)
        fsync_folder(self.finished.parent)
        return True

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _note(self) -> None:
        record = {"etag": self.etag, "size": self.size, "verified_offset": self.offset}
        write_atomic(self._sidecar, json.dumps(record).encode())
