"""Times of the week, such as `mon-fri 22:00-04:00`: whether an instant is inside, and how long until it is. Pure.

The clock on the wall decides. What a `Window` tells are hours on the wall; what `next_opening` and `open_stretch` tell are
hours that pass, exact also over a night in which clocks change.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, tzinfo

ADJOINING = 16
"""Windows that follow each other without a break are looked along for so many steps each way, more than a week of whole days."""
DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
FORM = re.compile(r"(?:(?P<days>[a-z,-]+) +)?(?P<from>[0-9]{2}:[0-9]{2})-(?P<to>[0-9]{2}:[0-9]{2})")


@dataclass(frozen=True)
class Window:
    """Hours of some days: from `start` for `length` minutes; a day is that on which the window opens, 0 is Monday."""

    days: frozenset[int]
    start: int
    length: int

    def left(self, local: datetime) -> timedelta:
        """How long the window stays open at the local time `local`; zero when it is closed."""
        for back in (0, 1):  # one that opened yesterday may still be open
            day = local.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=back)
            if day.weekday() in self.days:
                opened = day + timedelta(minutes=self.start)
                closes = opened + timedelta(minutes=self.length)
                if opened <= local < closes:
                    return closes - local
        return timedelta(0)

    def since(self, local: datetime) -> timedelta:
        """How long it has been open, when it is."""
        return timedelta(minutes=self.length) - self.left(local)

    def until(self, local: datetime) -> timedelta:
        """How long until it opens; zero when it is open."""
        if self.left(local):
            return timedelta(0)
        midnight = local.replace(hour=0, minute=0, second=0, microsecond=0)
        for ahead in range(8):
            opens = midnight + timedelta(days=ahead, minutes=self.start)
            if opens.weekday() in self.days and opens >= local:
                return opens - local
        raise AssertionError("a window opens every week")


def parse_window(text: str) -> Window:
    """`[DAYS ]HH:MM-HH:MM` with DAYS such as `mon-fri` or `sat,sun`; over midnight when the end is not after the start.

    Raises ValueError, saying how to write it.
    """
    match = FORM.fullmatch(text.strip().lower())
    if match is None:
        raise ValueError("write it as 22:00-04:00 or mon-fri 22:00-04:00")
    start, end = (_minutes(match[part]) for part in ("from", "to"))
    if start == 24 * 60:
        raise ValueError("24:00 can only be an end")
    return Window(_days(match["days"]), start, end - start if end > start else end + 24 * 60 - start)


def soonest(windows: Iterable[Window], local: datetime) -> timedelta:
    """How long until one of `windows` is open, by the clock on the wall."""
    return min(window.until(local) for window in windows)


def next_opening(windows: Sequence[Window], local: datetime) -> datetime:
    """When one of `windows` is open next after `local`, which knows its zone; `local` itself when one is."""
    while wait := soonest(windows, local):
        local = _on(local, wait)
    return local


def open_stretch(windows: Sequence[Window], local: datetime) -> tuple[timedelta, timedelta] | None:
    """For how long a window has been open and will be, through all that adjoin; None while closed."""
    begun = ends = local
    for _ in range(ADJOINING):
        if not (open_for := max((window.left(ends) for window in windows), default=timedelta(0))):
            break
        ends = _on(ends, open_for)
    if ends is local:
        return None
    for _ in range(ADJOINING):
        before = _later(begun, -timedelta.resolution)
        if not (sinces := [window.since(before) for window in windows if window.left(before)]):
            break
        begun = _on(before, -max(sinces))
    now = local.astimezone(UTC)  # times of one zone are subtracted as if every hour came once
    return now - begun.astimezone(UTC), ends.astimezone(UTC) - now


def _on(local: datetime, by: timedelta) -> datetime:
    """The time when the clock on the wall has gone on, or back, by `by`; that of a change of clocks on the way, if there is one."""
    then = _later(local, by)
    if then.utcoffset() == local.utcoffset():
        return then
    low, high = (int(end.timestamp() // 1) for end in sorted((local, then), key=datetime.timestamp))
    after = _at(high, local.tzinfo).utcoffset()
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _at(middle, local.tzinfo).utcoffset() == after else (middle, high)
    return _at(high, local.tzinfo)


def _later(local: datetime, by: timedelta) -> datetime:
    """`local` after `by` has passed."""
    return (local.astimezone(UTC) + by).astimezone(local.tzinfo)


def _at(instant: int, zone: tzinfo | None) -> datetime:
    return datetime.fromtimestamp(instant, zone)


def _minutes(text: str) -> int:
    hours, minutes = int(text[:2]), int(text[3:])
    if minutes > 59 or hours * 60 + minutes > 24 * 60:
        raise ValueError(f"{text} is no time of day")
    return hours * 60 + minutes


def _days(text: str | None) -> frozenset[int]:
    if text is None:
        return frozenset(range(7))
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.partition("-")
        try:
            one, other = DAYS.index(first), DAYS.index(last if dash else first)
        except ValueError:
            raise ValueError(f"{part!r} is none of {', '.join(DAYS)}, nor a range of them") from None
        found.update((one + step) % 7 for step in range((other - one) % 7 + 1))
    return frozenset(found)
