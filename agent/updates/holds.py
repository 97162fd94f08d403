"""What an update waits for besides other changes: its window and its turn in it, apply locks, power, temperature.

The judgements are pure; `Holds` asks the machine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from agent.host import power
from agent.host.power import Battery
from agent.maintenance import SHORTEST_LOOK_S, Hold, Maintenance, in_words, together
from agent.updates.apply_lock import ApplyLocks, changes_hold

MACHINE_LOOK_S = 60.0


def battery_hold(battery: Battery | None, min_percent: float) -> Hold | None:
    """Whether the charge is too low for a switch on battery."""
    if battery is None or not battery.discharging or battery.percent >= min_percent:
        return None
    words = f"the battery is at {battery.percent:.0f} %, {min_percent:g} % are wanted, or mains power"
    return Hold("battery", words, MACHINE_LOOK_S)


def heat_hold(too_hot: str) -> Hold | None:
    """Whether the camera is too hot; `too_hot` says what is."""
    return Hold("temperature", f"it is too hot: {too_hot}", MACHINE_LOOK_S) if too_hot else None


class Holds:
    """What updates of this camera wait for now; `changed` is set when it is worth to look again at once, for one waiter to clear.

    `received_at` tells when a job arrived, in epoch seconds, None when that isn't known; `too_hot` says what is too hot,
    empty when nothing is. `battery` may block.
    """

    def __init__(
        self,
        maintenance: Maintenance,
        locks: ApplyLocks,
        min_battery_percent: float,
        *,
        received_at: Callable[[str], Awaitable[float | None]],
        too_hot: Callable[[], str] = str,
        battery: Callable[[], Battery | None] = power.battery,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.changed = asyncio.Event()
        self._maintenance = maintenance
        self._locks = locks
        self._min_battery_percent = min_battery_percent
        self._received_at = received_at
        self._too_hot = too_hot
        self._battery = battery
        self._wall = wall
        self._monotonic = monotonic
        self._asked: tuple[str, float] = ("", 0.0)
        """A job, and when it came by the monotonic clock."""
        for source in (maintenance, locks):
            source.on_change(self.changed.set)

    async def hold(self, before: Literal["download", "switch"], job_id: str) -> Hold | None:
        """What has to be waited for before that; None: nothing."""
        if before == "download":
            return await self._download_hold(job_id)
        low = battery_hold(await asyncio.to_thread(self._battery), self._min_battery_percent)
        change = await changes_hold(self._maintenance, self._locks, job_id, "update")
        return together([change, low, heat_hold(self._too_hot())])

    async def window(self) -> dict[str, Any]:
        """How the windows stand, see `Maintenance.window`."""
        return await self._maintenance.window()

    async def _download_hold(self, job_id: str) -> Hold | None:
        """A wait from when the job arrived; where that can't be told, from when this process first asked."""
        if self._asked[0] != job_id:
            received = await self._received_at(job_id)
            waited_s = max(0.0, self._wall() - received) if received is not None else 0.0
            self._asked = (job_id, self._monotonic() - waited_s)
        left_s = self._asked[1] + self._maintenance.turn_s(job_id) - self._monotonic()
        if left_s <= 0:
            return None
        return Hold("jitter", f"this camera's turn to download is in {in_words(left_s)}", max(SHORTEST_LOOK_S, left_s))
