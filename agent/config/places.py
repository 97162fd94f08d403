"""Where a file of another program really is, so that who else may write there can't lead the agent to a file of its own.

Links of other users are not followed, and what is swapped on the way meanwhile changes nothing. Blocking.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

MAX_LINKS = 40
FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW


@dataclass(frozen=True)
class Place:
    """Where a file really is: `real` to be told, `file` by way of its folder, held open whatever is put in the way of it."""

    real: Path
    file: Path


@contextlib.contextmanager
def placed(path: Path) -> Iterator[Place]:
    """The place of the file at `path`: a linked file is replaced where it is, and the link stays. Raises OSError."""
    folder, real = _walk(path)
    try:
        yield Place(real, Path(f"/proc/self/fd/{folder}", real.name))
    finally:
        os.close(folder)


def _walk(path: Path) -> tuple[int, Path]:
    """The folder that a file is in, opened, and the file's path without links. Raises OSError."""
    left, real, links = [*reversed(path.parts[1:])], Path("/"), 0
    folder = os.open("/", FOLDER)
    try:
        while left:
            name = left.pop()
            leads_to = _link(name, folder, real / name, path)
            if leads_to:
                links += 1
                if links > MAX_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                left += [part for part in reversed(Path(leads_to).parts) if part != "/"]
                step, real = ("/", Path("/")) if leads_to.startswith("/") else (".", real)
            elif left or name == "..":
                step, real = name, real.parent if name == ".." else real / name
            else:
                return folder, real / name
            folder = _enter(step, folder, real)
        raise OSError(errno.EISDIR, "is a directory, not a regular file")
    except BaseException:
        os.close(folder)
        raise


def _link(name: str, folder: int, where: Path, path: Path) -> str:
    """What `name` in the open `folder` leads to, empty when it is no link.

    Only links that root or the agent's own user made are followed: whoever else may write somewhere on the way could lead
    the agent to a file that is not theirs, such as its own key. Raises OSError.
    """
    try:
        found = os.open(name, os.O_PATH | os.O_NOFOLLOW, dir_fd=folder)
    except FileNotFoundError:
        return ""
    try:
        its = os.fstat(found)
        if not stat.S_ISLNK(its.st_mode):
            return ""
        if its.st_uid not in (0, os.geteuid()):
            words = "" if where == path else f"leads through {where}, which "
            raise OSError(errno.ELOOP, f"{words}is a link that another user made")
        return os.readlink("", dir_fd=found)
    finally:
        os.close(found)


def _enter(name: str, folder: int, where: Path) -> int:
    """Open another folder, seen from `folder`, in its place. Raises OSError, which names `where`."""
    try:
        entered = os.open(name, FOLDER, dir_fd=folder)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(where)) from None
    os.close(folder)
    return entered


def opened(file: Path) -> IO[bytes]:
    """The regular file, for reading. Raises OSError."""
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW)
    try:
        _check_kind(os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb")


def status(file: Path) -> os.stat_result | None:
    """The regular file's status, None where there is nothing. Opens nothing; raises OSError for what is no regular file."""
    try:
        found = file.lstat()
    except FileNotFoundError:
        return None
    _check_kind(found)
    return found


def _check_kind(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link"}
        kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        raise OSError(errno.EINVAL, f"is {kind}, not a regular file")
