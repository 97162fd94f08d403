"""When the next CONNECT may go: never within a second of the last one, and the later the more attempts have failed."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import replace
from typing import Any

from agent.cloud.connection import abandoned
from agent.cloud.offline import Diagnosis, Failure, History, Pace, wait_s
from agent.host import clock

MANY_ABANDONED, MANY_ABANDONED_WAIT_S = 20, 300.0
"""From so many native clients on that hang in a half-dead proxy attempts are this rare: the process can bear a hundred."""


class Pacing:
    """What has happened since a connection last held, as `history`, and what follows from it."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.history = History()
        self._connect_at = float("-inf")

    async def await_turn(self) -> None:
        """At most one CONNECT a second, whatever asks for it."""
        remaining = self._connect_at + self.pace.between_connects_s - time.monotonic()
        if remaining > 0:
            await asyncio.sleep(remaining)
        self.sent()

    def sent(self) -> None:
        """A CONNECT may have gone until now."""
        self._connect_at = time.monotonic()

    def forget(self) -> None:
        """What failed until now says nothing about the next attempt."""
        self.history = History()

    def failed(self, failure: Failure, lasted_s: float) -> None:
        """A connection, of use for `lasted_s` seconds, is over."""
        self.history = self.history.after(failure, time.monotonic(), lasted_s, self.pace)

    def not_begun(self) -> None:
        """An attempt failed before there was anything to send."""
        self.history = replace(self.history, attempts=self.history.attempts + 1)

    def wait_s(self, diagnosis: Diagnosis) -> float:
        """Seconds until the next attempt."""
        wait = wait_s(diagnosis, self.history, self.pace, random.random())  # noqa: S311
        return max(wait, MANY_ABANDONED_WAIT_S) if abandoned() >= MANY_ABANDONED else wait

    async def hold_off(self, wait_s: float, moved: asyncio.Event, *, clock_counts: bool) -> None:
        """Wait so long, or until `moved` is set, or, if it counts, the clock."""
        ends: list[asyncio.Task[Any]] = [asyncio.create_task(moved.wait())]
        if clock_counts:
            ends.append(asyncio.create_task(clock.jump()))
        try:
            await first_of(*ends, timeout_s=wait_s)
        finally:
            await cancel(*ends)


async def first_of(*futures: asyncio.Future[Any], timeout_s: float | None = None) -> None:
    """Wait until one of them is done, or for so long."""
    await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


async def cancel(*tasks: asyncio.Task[Any]) -> None:
    """Cancel them and wait for their end, whatever it is."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
