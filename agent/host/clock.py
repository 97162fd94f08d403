"""Which boot this is, and whether the wall clock can be believed."""

from __future__ import annotations

import asyncio
import ctypes
import ctypes.util
import time
from functools import cache
from pathlib import Path

JUMP_S = 60.0
LOOK_S = 2.0
STA_UNSYNC = 0x0040
TIME_ERROR = 5


@cache
def boot_id() -> str:
    """The kernel's random id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def clock_synchronised() -> bool | None:
    """Whether the kernel's clock is disciplined by NTP (adjtimex(2)); None where it can't be asked."""
    library = ctypes.CDLL(None, use_errno=True)
    # struct timex begins with modes (int), offset, freq, maxerror, esterror (long), status (int); 208 bytes on 64-bit.
    buffer = (ctypes.c_char * 512)()
    state = library.adjtimex(ctypes.byref(buffer))
    if state < 0:
        return None
    long_size = ctypes.sizeof(ctypes.c_long)
    status = ctypes.c_int.from_buffer(buffer, 5 * long_size).value
    return state != TIME_ERROR and not status & STA_UNSYNC


async def jump() -> None:
    """Return when the wall clock has been set by a minute or more."""
    offset = time.time() - time.monotonic()
    while abs(time.time() - time.monotonic() - offset) < JUMP_S:  # noqa: ASYNC110  nothing tells that it was set
        await asyncio.sleep(LOOK_S)
