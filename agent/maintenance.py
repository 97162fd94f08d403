"""When this camera may be changed: windows in its local time, and its own turn in them, which may be set anew while others wait.

Each camera's turn is a hash of its name and of what is to be changed, so that it is the same after every restart and a fleet
spreads evenly. `window_hold` is pure; `Maintenance` asks the clock.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo
from typing import Any, Literal

from agent.host.clock import clock_synchronised
from agent.settings import Maintenance as Settings
from agent.timetable import Window, next_opening, open_stretch, parse_window

Noun = Literal["update", "configuration"]

LONGEST_LOOK_S = 600.0
"""A window is looked at again after so long at the latest, because the wall clock may be set meanwhile."""
SHORTEST_LOOK_S = 0.5
CLOCK_LOOK_S = 60.0


@dataclass(frozen=True)
class Hold:
    """Something that a change waits for: `code` is stable, `words` are for people."""

    code: Literal["clock", "window", "jitter", "apply_lock", "battery", "temperature"]
    words: str
    look_again_s: float


def together(holds: Sequence[Hold | None]) -> Hold | None:
    """All that hold as one, by the code of the first; looked at again when the first of them may have ended."""
    found = [hold for hold in holds if hold]
    if not found:
        return None
    return Hold(found[0].code, "; ".join(hold.words for hold in found), min(hold.look_again_s for hold in found))


def turn(thing_name: str, subject: str) -> float:
    """The camera's place in the roll-out of `subject`, such as a job's id, from 0 to below 1."""
    digest = hashlib.sha256(f"{thing_name}\0{subject}".encode()).digest()
    return int.from_bytes(digest[:6]) / 2**48


def window_hold(
    windows: Sequence[Window],
    local: datetime,
    *,
    clock_believed: bool | None,
    share: float = 0.0,
    jitter_s: float = 0.0,
    noun: Noun = "update",
) -> Hold | None:
    """What the windows say at the time `local`, which knows its zone; no windows: nothing.

    `share` is this camera's turn: it begins that share of `jitter_s`, or of half the time a window is open, after its
    opening. `clock_believed` None: it can't be asked, so the clock is taken as it is.
    """
    if not windows:
        return None
    if clock_believed is False:
        words = f"the clock is not set, so the {noun} window counts as closed; see timedatectl, and that NTP is reached"
        return Hold("clock", words, CLOCK_LOOK_S)
    stretch = open_stretch(windows, local)
    if stretch is None:
        opens = next_opening(windows, local)
        left_s = opens.timestamp() - local.timestamp()
        when = opens.strftime("%a %H:%M %Z").strip()
        return Hold("window", f"the {noun} window opens {when}, in {in_words(left_s)}", _look(left_s))
    ago, left = stretch
    left_s = share * min(jitter_s, (ago + left).total_seconds() / 2) - ago.total_seconds()
    if left_s <= 0:
        return None
    return Hold("jitter", f"the window is open, this camera's turn in it is in {in_words(left_s)}", _look(left_s))


class Maintenance:
    """The windows in force of the camera `thing_name`, and how they stand by its clock.

    `clock_believed` says whether the clock is synchronised, `wall` gives epoch seconds.
    """

    def __init__(
        self,
        settings: Settings,
        thing_name: str,
        *,
        clock_believed: Callable[[], bool | None] = clock_synchronised,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._windows = _parsed(settings)
        self._thing_name = thing_name
        self._clock_believed = clock_believed
        self._wall = wall
        self._zones: dict[str, tzinfo] = {"UTC": UTC}
        self._wake: list[Callable[[], None]] = []

    def reconfigure(self, settings: Settings) -> None:
        """Go by other settings from now on; who waits is woken when they differ."""
        if settings == self._settings:
            return
        self._settings, self._windows = settings, _parsed(settings)
        for wake in self._wake:
            wake()

    def on_change(self, wake: Callable[[], None]) -> None:
        """Have `wake` called, on the loop, whenever other settings hold: what was waited for may be over, or begin."""
        self._wake.append(wake)

    def turn_s(self, subject: str) -> float:
        """Seconds from the beginning of the roll-out of `subject` to the turn of this camera in it."""
        return turn(self._thing_name, subject) * self._settings.jitter_s

    async def hold(self, subject: str, noun: Noun) -> Hold | None:
        """What the change `subject` has to wait for; None: nothing. The same subject has the same turn after a restart."""
        local = await self._local()
        return window_hold(
            self._windows,
            local,
            clock_believed=self._clock_believed(),
            share=turn(self._thing_name, subject),
            jitter_s=self._settings.jitter_s,
            noun=noun,
        )

    async def window(self) -> dict[str, Any]:
        """How the windows stand, as JSON: `windows`, `time_zone`, `jitter_s`, `state` always, open, closed or unknown, `words`,
        and `opens_at` or `closes_at` in epoch seconds.
        """
        local = await self._local()
        windows, settings = self._windows, self._settings
        told: dict[str, Any] = {"windows": list(settings.windows), "time_zone": settings.time_zone}
        told |= {"jitter_s": settings.jitter_s, "opens_at": None, "closes_at": None}
        if not windows:
            return told | {"state": "always", "words": "no window is set, an update is switched to at any time"}
        hold = window_hold(windows, local, clock_believed=self._clock_believed())
        if hold and hold.code == "clock":
            return told | {"state": "unknown", "words": hold.words}
        if hold:
            opens_at = next_opening(windows, local).timestamp()
            return told | {"state": "closed", "words": hold.words, "opens_at": opens_at}
        _, left = open_stretch(windows, local) or (timedelta(0), timedelta(0))
        closes_at = local.timestamp() + left.total_seconds()
        return told | {"state": "open", "words": "the update window is open", "closes_at": closes_at}

    async def _local(self) -> datetime:
        """The time by the camera's clock in the zone in force; that is read once, in a thread."""
        while (zone := self._zones.get(name := self._settings.time_zone)) is None:
            self._zones[name] = await asyncio.to_thread(_zone, name)
        return datetime.fromtimestamp(self._wall(), zone)


def in_words(seconds: float) -> str:
    """A time to wait, such as `3 h 5 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min" if minutes < 48 * 60 else f"{minutes // 1440} d"


def _parsed(settings: Settings) -> list[Window]:
    return [parse_window(text) for text in settings.windows]


def _zone(name: str) -> tzinfo:
    from zoneinfo import ZoneInfo

    return ZoneInfo(name)


def _look(left_s: float) -> float:
    return min(max(SHORTEST_LOOK_S, left_s), LONGEST_LOOK_S)
