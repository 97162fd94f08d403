"""A cap on bytes per second: a token bucket that may go into debt and waits until it is paid.

Over any time t at most t × cap + one second's worth comes, plus one piece; in the long run exactly the cap, when there is as much.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, tzinfo

from agent.settings import RateLimit, Settings
from agent.timetable import parse_window

ASK_EVERY_S = 1.0
BURST_S = 1.0
PIECE_S = 0.25
LEAST_S = 0.001


class Pace:
    """`bytes_per_s` says the cap at this moment, 0 for none; it is asked about once a second."""

    def __init__(self, bytes_per_s: Callable[[], float] | None) -> None:
        self._ask = bytes_per_s or (lambda: 0.0)
        self._level = 0.0
        self._at = self._asked = time.monotonic()
        self._cap = max(0.0, self._ask())

    def piece(self, most: int) -> int:
        """How many bytes to take at once: a quarter of a second's worth, at most `most`, at least one."""
        self._look()
        return max(1, min(most, int(self._cap * PIECE_S))) if self._cap else most

    async def took(self, count: int) -> None:
        """Account for `count` bytes, and return when the next may be taken."""
        self._look()
        self._level -= count
        while self._cap and self._level < 0:
            await asyncio.sleep(min(ASK_EVERY_S, max(LEAST_S, -self._level / self._cap)))
            self._look()

    def _look(self) -> None:
        now = time.monotonic()
        self._level = min(self._cap * BURST_S, self._level + (now - self._at) * self._cap)
        self._at = now
        if now - self._asked >= ASK_EVERY_S:
            self._asked, self._cap = now, max(0.0, self._ask())
        if not self._cap:
            self._level = 0.0


def lowest_cap(limits: Sequence[RateLimit], local: datetime) -> float:
    """The lowest of the caps that hold at the local time; 0 when none does."""
    return min((limit.bytes_per_s for limit in limits if parse_window(limit.hours).left(local)), default=0.0)


def cap_by_hour(settings: Callable[[], Settings]) -> Callable[[], float]:
    """The cap at each moment, 0 for none, by the limits and the time zone of the `settings` in force at that moment."""

    def cap() -> float:
        present = settings()
        limits = present.updates.rate_limits
        return lowest_cap(limits, datetime.now(_zone(present.maintenance.time_zone))) if limits else 0.0

    return cap


def _zone(name: str) -> tzinfo:
    """A time zone, which was read, and kept by zoneinfo, when the settings that name it were checked."""
    if name == "UTC":
        return UTC
    from zoneinfo import ZoneInfo

    return ZoneInfo(name)
