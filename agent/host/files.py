"""Writing files so that a power cut leaves either the old or the new content, never a mixture. Blocking: call in a thread."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from pathlib import Path
from typing import IO


def write_atomic(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Replace `path` with `data`. An existing file keeps its mode and, where permitted, owner, group and extended attributes.

    Raises OSError.
    """
    owner = None
    with contextlib.suppress(FileNotFoundError):
        before = path.stat()
        mode, owner = stat.S_IMODE(before.st_mode), (before.st_uid, before.st_gid)
    candidate = path.with_name(f".{path.name}.new")
    candidate.unlink(missing_ok=True)
    descriptor = os.open(candidate, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if owner:
                _keep_owner(descriptor, *owner)
                _keep_attributes(descriptor, path)
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        candidate.rename(path)
    except BaseException:
        candidate.unlink(missing_ok=True)
        raise
    fsync_folder(path.parent)


def _keep_owner(descriptor: int, uid: int, gid: int) -> None:
    for owner in ((uid, -1), (-1, gid)):
        with contextlib.suppress(PermissionError):
            os.fchown(descriptor, *owner)


def _keep_attributes(descriptor: int, path: Path) -> None:
    """Access control lists are extended attributes too; those that only root or the kernel may set are left."""
    with contextlib.suppress(OSError):
        for name in os.listxattr(path):
            with contextlib.suppress(OSError):
                os.setxattr(descriptor, name, os.getxattr(path, name))


def lock(path: Path) -> IO[bytes] | None:
    """Take the lock that the file at `path` stands for until the returned file is closed; None when another has it.

    The kernel gives it back when its holder ends, however that happens. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def fsync_folder(path: Path) -> None:
    """Make creations, renames and removals in the folder `path` durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Bytes that an unprivileged user can still write on the file system of `path`, which need not exist yet."""
    while not path.exists():
        path = path.parent
    usage = os.statvfs(path)
    return usage.f_bavail * usage.f_frsize
