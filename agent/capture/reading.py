"""Reading arrived files once each: whether they are whole, what they measure. Blocking: call in a thread."""

from __future__ import annotations

import errno
import os
import stat
import time
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from agent.capture.container import MAX_BYTES
from agent.capture.folders import Found
from agent.capture.image_quality import BrokenImageError, Measures, capture_time, check_container, measure


@dataclass(frozen=True)
class Examined:
    """What the bytes of an arrival told: `kind` of fault, None when whole; the CRC of its bytes; capture time in epoch
    seconds by EXIF.
    """

    found: Found
    kind: str | None = None
    checksum: int | None = None
    taken_at: float | None = None
    vanished: bool = False


def examine(arrivals: list[Found]) -> list[Examined]:
    """Read each file once and check its container. Blocking."""
    return [_examine(found) for found in arrivals]


def _examine(found: Found) -> Examined:
    if found.vanished:
        return Examined(found, vanished=True)
    if found.size > MAX_BYTES:
        return Examined(found, kind="too_large")
    try:
        data = _read(found.path)
    except FileNotFoundError:
        return Examined(found, vanished=True)
    except OSError:
        return Examined(found, kind="unreadable")
    return Examined(found, check_container(data), zlib.crc32(data), capture_time(data))


def _read(path: str) -> bytes:
    with open_regular(path) as file:
        return file.read(MAX_BYTES + 1)


def analyse(path: str) -> tuple[Measures | None, str | None, float]:
    """Measures of the file, None when it is gone or being written again; what kept a whole file from being decoded; the
    CPU seconds it took in this thread. Blocking.
    """
    begun = time.thread_time()
    measures, kind = None, None
    try:
        data = _read(path)
        if check_container(data) is None:
            measures = measure(data)
    except BrokenImageError as error:
        kind = error.kind
    except OSError:
        pass
    return measures, kind, time.thread_time() - begun


def open_regular(path: str) -> BinaryIO:
    """Open the file for reading without ever waiting for a writer. Blocking.

    Raises FileNotFoundError for what is no regular file (any more), a link included, and OSError.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise FileNotFoundError(errno.ENOENT, "not a regular file", path) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, "not a regular file", path)
    return os.fdopen(descriptor, "rb")
