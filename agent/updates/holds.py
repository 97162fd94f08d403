"""What an update waits for besides other changes: its window and its turn in it, apply locks, power, temperature.

Each camera's turn is a hash of its name and the job's id, so that it is the same after every restart and a fleet spreads
evenly. The judgements are pure; `Holds` asks the machine.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, Literal

from agent.host import power
from agent.host.clock import clock_synchronised
from agent.host.power import Battery
from agent.settings import Updates
from agent.timetable import Window, parse_window, soonest
from agent.updates.apply_lock import ApplyLocks, Lock

LONGEST_LOOK_S = 600.0
"""A window is looked at again after so long at the latest, because the wall clock may be set meanwhile."""
SHORTEST_LOOK_S = 0.5
MACHINE_LOOK_S = 60.0
ADJOINING = 16
"""Windows that follow each other without a break are looked along for so many steps, more than a week."""


@dataclass(frozen=True)
class Hold:
    """Something that an update waits for: `code` is stable, `words` are for people."""

    code: Literal["clock", "window", "jitter", "apply_lock", "battery", "temperature"]
    words: str
    look_again_s: float


def turn(thing_name: str, job_id: str) -> float:
    """The camera's place in the roll-out of a job, from 0 to below 1."""
    digest = hashlib.sha256(f"{thing_name}\0{job_id}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def window_hold(
    windows: Sequence[Window],
    local: datetime,
    *,
    clock_believed: bool | None,
    share: float = 0.0,
    jitter_s: float = 0.0,
) -> Hold | None:
    """What the windows say at the time `local`, which knows its zone; no windows: nothing.

    `share` is this camera's turn: it begins that share of `jitter_s`, or of half the time a window is open, after its
    opening. `clock_believed` None: it can't be asked, so the clock is taken as it is.
    """
    if not windows:
        return None
    if clock_believed is False:
        words = "the clock is not set, so the update window counts as closed; see timedatectl, and that NTP is reached"
        return Hold("clock", words, MACHINE_LOOK_S)
    stretch = open_stretch(windows, local)
    if stretch is None:
        opens, left_s = next_opening(windows, local)
        when = opens.strftime("%a %H:%M %Z").strip()
        return Hold("window", f"the update window opens {when}, in {_duration(left_s)}", _look(left_s))
    ago, left = stretch
    wait = timedelta(seconds=share * min(jitter_s, (ago + left).total_seconds() / 2)) - ago
    if wait <= timedelta(0):
        return None
    left_s = real_seconds(local, wait)
    return Hold("jitter", f"the window is open, this camera's turn in it is in {_duration(left_s)}", _look(left_s))


def open_stretch(windows: Sequence[Window], local: datetime) -> tuple[timedelta, timedelta] | None:
    """For how long a window has been open and will be, through all that adjoin; None while closed. By the wall's clock."""
    begun = ends = local
    for step in range(ADJOINING):
        ends += max((window.left(ends) for window in windows), default=timedelta(0))
        before = begun - timedelta.resolution if step else begun
        sinces = [window.since(before) + (begun - before) for window in windows if window.left(before)]
        begun -= max(sinces, default=timedelta(0))
    return (local - begun, ends - local) if ends > local else None


def next_opening(windows: Sequence[Window], local: datetime) -> tuple[datetime, float]:
    """When one of `windows`, all closed at `local`, opens, and in how many seconds."""
    wait = soonest(windows, local)
    return local + wait, real_seconds(local, wait)


def real_seconds(local: datetime, wait: timedelta) -> float:
    """The seconds that pass while the clock on the wall goes on from `local` by `wait`, also where summer time changes."""
    then = (local + wait).replace(fold=local.fold)
    return max(0.0, then.timestamp() - local.timestamp())


def lock_hold(held: Sequence[tuple[Lock, float]]) -> Hold | None:
    """What the locks that are `held`, each with its seconds left, say."""
    if not held:
        return None
    words = "; ".join(lock.words(left) for lock, left in held)
    return Hold("apply_lock", words, max(SHORTEST_LOOK_S, min(left for _, left in held)))


def battery_hold(battery: Battery | None, min_percent: float) -> Hold | None:
    """Whether the charge is too low for a switch on battery."""
    if battery is None or not battery.discharging or battery.percent >= min_percent:
        return None
    words = f"the battery is at {battery.percent:.0f} %, {min_percent:g} % are wanted, or mains power"
    return Hold("battery", words, MACHINE_LOOK_S)


def heat_hold(too_hot: str) -> Hold | None:
    """Whether the camera is too hot; `too_hot` says what is."""
    return Hold("temperature", f"it is too hot: {too_hot}", MACHINE_LOOK_S) if too_hot else None


def together(holds: Sequence[Hold | None]) -> Hold | None:
    """All that hold as one, by the code of the first; looked at again when the first of them may have ended."""
    found = [hold for hold in holds if hold]
    if not found:
        return None
    return Hold(found[0].code, "; ".join(hold.words for hold in found), min(hold.look_again_s for hold in found))


class Holds:
    """What updates of this camera wait for now; `changed` is set when it is worth to look again at once.

    `received_at` tells when a job arrived, in epoch seconds, None when that isn't known; `too_hot` says what is too hot,
    empty when nothing is. `battery` may block.
    """

    def __init__(
        self,
        settings: Updates,
        thing_name: str,
        locks: ApplyLocks,
        *,
        received_at: Callable[[str], Awaitable[float | None]],
        too_hot: Callable[[], str] = str,
        battery: Callable[[], Battery | None] = power.battery,
        clock_believed: Callable[[], bool | None] = clock_synchronised,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.changed = locks.changed
        self._settings = settings
        self._thing_name = thing_name
        self._windows = [parse_window(text) for text in settings.windows]
        self._locks = locks
        self._received_at = received_at
        self._too_hot = too_hot
        self._battery = battery
        self._clock_believed = clock_believed
        self._wall = wall
        self._monotonic = monotonic
        self._zone: tzinfo | None = UTC if settings.time_zone == "UTC" else None
        self._download: tuple[str, float] = ("", 0.0)
        """A job, and when its turn to download comes by the monotonic clock."""

    async def hold(self, before: Literal["download", "switch", "arm"], job_id: str) -> Hold | None:
        """What has to be waited for before that; None: nothing. `arm` is the very last moment: only locks count."""
        if before == "download":
            return await self._download_hold(job_id)
        if before == "arm":
            return lock_hold(self._locks.held())
        window = window_hold(
            self._windows,
            await self._local(),
            clock_believed=self._clock_believed(),
            share=turn(self._thing_name, job_id),
            jitter_s=self._settings.jitter_s,
        )
        low = battery_hold(await asyncio.to_thread(self._battery), self._settings.min_battery_percent)
        return together([window, lock_hold(self._locks.held()), low, heat_hold(self._too_hot())])

    async def window(self) -> dict[str, Any]:
        """How the windows stand, as JSON: `windows`, `time_zone`, `state` always, open, closed or unknown, `words`, and
        `opens_at` or `closes_at` in epoch seconds.
        """
        local = await self._local()
        told: dict[str, Any] = {"windows": list(self._settings.windows), "time_zone": self._settings.time_zone}
        told |= {"jitter_s": self._settings.jitter_s, "opens_at": None, "closes_at": None}
        hold = window_hold(self._windows, local, clock_believed=self._clock_believed())
        if not self._windows:
            return told | {"state": "always", "words": "no window is set, an update is switched to at any time"}
        if hold and hold.code == "clock":
            return told | {"state": "unknown", "words": hold.words}
        if hold:
            return told | {
                "state": "closed",
                "words": hold.words,
                "opens_at": local.timestamp() + next_opening(self._windows, local)[1],
            }
        _, left = open_stretch(self._windows, local) or (timedelta(0), timedelta(0))
        closes_at = local.timestamp() + real_seconds(local, left)
        return told | {"state": "open", "words": "the update window is open", "closes_at": closes_at}

    async def _download_hold(self, job_id: str) -> Hold | None:
        """A wait from when the job arrived; where that can't be told, from when this process first asked."""
        if self._download[0] != job_id:
            wait_s = turn(self._thing_name, job_id) * self._settings.jitter_s
            received = await self._received_at(job_id) if wait_s else None
            waited_s = max(0.0, self._wall() - received) if received is not None else 0.0
            self._download = (job_id, self._monotonic() + wait_s - waited_s)
        left_s = self._download[1] - self._monotonic()
        if left_s <= 0:
            return None
        return Hold("jitter", f"this camera's turn to download is in {_duration(left_s)}", max(SHORTEST_LOOK_S, left_s))

    async def _local(self) -> datetime:
        if self._zone is None:
            self._zone = await asyncio.to_thread(_zone, self._settings.time_zone)
        return datetime.fromtimestamp(self._wall(), self._zone)


def _zone(name: str) -> tzinfo:
    from zoneinfo import ZoneInfo

    return ZoneInfo(name)


def _look(left_s: float) -> float:
    return min(max(SHORTEST_LOOK_S, left_s), LONGEST_LOOK_S)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes // 1440} d"
