"""What a camera's pictures are like when all is well. Pure.

`Baseline` is for the alarm of a blurred picture: this camera's own sharpness over hours. `History` is for the gate of an
update or a configuration: the last hour before the change, as JSON that survives a restart, which `comparison` goes by.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from agent.capture.image_quality import Measures

MINIMUM_SAMPLES = 16
BASELINE_SAMPLES = 672
BASELINE_SPACING_S = 60.0
MAD_FACTOR = 5.0

HISTORY_S = 3600.0
HISTORY_SAMPLES = 256
RATE_WINDOW_S = 300.0
MOST_ARRIVALS = 2048

SILENT_INTERVALS, SILENT_LEAST_S = 3, 60.0
WAIT_INTERVALS, WAIT_LEAST_S, WAIT_MOST_S = 20, 60.0, 3600.0

JUDGED_INTERVALS = 10
GRACE_S = 30.0


def region_medians(samples: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """Per region the median of `samples` (each one value per region) and the median absolute deviation from it."""
    columns = list(zip(*samples, strict=True))
    middles = [median(column) for column in columns]
    spreads = [median(abs(value - middle) for value in column) for column, middle in zip(columns, middles, strict=True)]
    return middles, spreads


def region_drop(reference: Sequence[float], regions: Sequence[float]) -> float:
    """How far sharpness fell: the median over the regions, so that a burned-in overlay can't hide it."""
    return median(before - now for before, now in zip(reference, regions, strict=True))


class Baseline:
    """The sharpness of one camera: the first 16 good pictures at once, then one a minute, 672 at most. In memory only."""

    def __init__(self) -> None:
        self._regions: deque[tuple[float, ...]] = deque(maxlen=BASELINE_SAMPLES)
        self._added_at = float("-inf")
        self._medians: list[float] = []
        self._spread = 0.0

    @property
    def samples(self) -> int:
        return len(self._regions)

    def add(self, regions: tuple[float, ...], now: float) -> None:
        """Offer a picture that is not suspicious; later ones within the minute are left out."""
        if self.samples >= MINIMUM_SAMPLES and now - self._added_at < BASELINE_SPACING_S:
            return
        self._regions.append(regions)
        self._added_at = now
        if self.samples >= MINIMUM_SAMPLES:
            self._medians, spreads = region_medians(self._regions)
            self._spread = median(spreads)

    def drop(self, regions: Sequence[float]) -> float:
        """Needs at least 16 samples."""
        return region_drop(self._medians, regions)

    def limit(self, least: float) -> float:
        """The drop above which a picture is blurred."""
        return max(least, MAD_FACTOR * self._spread)


@dataclass(frozen=True, slots=True)
class Arrival:
    """An image: monotonic time, whether the file was broken, whether it repeated the bytes of the one before."""

    at: float
    broken: bool
    repeated: bool


def horizon_s(interval_s: float) -> float:
    """How far back a reference looks: an hour, or as long as a slow camera needs for its pictures."""
    return max(HISTORY_S, WAIT_INTERVALS * interval_s)


@dataclass
class History:
    """One source's last hour: arrivals since the watch `begun`, and measures, with monotonic times.

    `kept_rate_hz` is the rate before a restart of the agent; it counts until this watch has one of its own.
    """

    begun: float
    kept_rate_hz: float = 0.0
    arrivals: deque[Arrival] = field(default_factory=lambda: deque(maxlen=MOST_ARRIVALS))
    pictures: list[tuple[float, Measures]] = field(default_factory=list)

    def image(self, now: float, *, broken: bool, repeated: bool) -> None:
        self.arrivals.append(Arrival(now, broken, repeated))

    def picture(self, now: float, measures: Measures) -> None:
        """Keep it; when there are too many the older half is thinned, so that the hour stays covered."""
        self.pictures.append((now, measures))
        if len(self.pictures) > HISTORY_SAMPLES:
            half = HISTORY_SAMPLES // 2
            self.pictures = self.pictures[:half:2] + self.pictures[half:]

    def rate_hz(self, now: float, within_s: float = RATE_WINDOW_S) -> float:
        """Images a second over the last `within_s`, or since the watch began when that is less."""
        begin = max(now - within_s, self.begun)
        if len(self.arrivals) == MOST_ARRIVALS:
            begin = max(begin, self.arrivals[0].at)
        count = sum(arrival.at >= begin for arrival in self.arrivals)
        return count / max(now - begin, 1.0)

    def normal_rate_hz(self, now: float, interval_s: float) -> float:
        """Images a second, from before a restart while this watch is too young to tell."""
        if self.kept_rate_hz and now - self.begun < max(GRACE_S, JUDGED_INTERVALS * interval_s):
            return self.kept_rate_hz
        return self.rate_hz(now, max(RATE_WINDOW_S, JUDGED_INTERVALS * interval_s))

    def recent(self, now: float, interval_s: float) -> list[tuple[float, Measures]]:
        """The pictures that a reference is made of."""
        oldest = now - horizon_s(interval_s)
        return [(taken, measures) for taken, measures in self.pictures if taken >= oldest]

    def forget(self, since: float, until: float) -> None:
        """Drop the pictures of that time, so that what a change spoilt is never taken for normal."""
        self.pictures = [(taken, measures) for taken, measures in self.pictures if not since < taken <= until]

    def flowing(self, now: float, interval_s: float) -> bool:
        """Whether an image came within max(3 × interval, 60 s)."""
        return bool(self.arrivals) and now - self.arrivals[-1].at <= patience_s(interval_s)

    def silent(self, now: float, interval_s: float) -> bool:
        """Whether none came for that long although the folder was watched; neither is true just after the start."""
        return now - (self.arrivals[-1].at if self.arrivals else self.begun) > patience_s(interval_s)

    def lacking(self, asked: float, now: float, interval_s: float) -> str:
        """What a reference still lacks; "" when it has all, the source is silent, or it was waited for long enough since
        the monotonic time `asked`: max(60 s, 20 × interval), an hour at most.
        """
        count = len(self.recent(now, interval_s))
        flowing = self.flowing(now, interval_s)
        longest_s = min(WAIT_MOST_S, max(WAIT_LEAST_S, WAIT_INTERVALS * interval_s))
        complete = flowing and count >= MINIMUM_SAMPLES
        if complete or self.silent(now, interval_s) or now - asked >= longest_s:
            return ""
        return f"{count} of {MINIMUM_SAMPLES} pictures measured" if flowing else "no image seen yet"

    def reference(self, now: float, at: float, interval_s: float) -> dict[str, Any]:
        """What is normal now, as JSON; `at` is epoch seconds.

        `rate_hz`, `interval_s` (expected), `samples` (pictures measured), `last_image_at` (epoch s, absent before the
        first), `flowing` and `silent` (see there), `broken_share`, `repeated_share`; with samples
        also `luma` {median, mad, p2, p98}, `p99` and `over` {median, p98}, `contrast` {median, p2}; with assessable ones
        `sharpness` {samples, medians, mads}, one value per region.
        """
        recent = [arrival for arrival in self.arrivals if arrival.at >= now - HISTORY_S]
        pictures = [measures for _, measures in self.recent(now, interval_s)]
        age = now - self.arrivals[-1].at if self.arrivals else None
        document: dict[str, Any] = {
            "rate_hz": round(self.normal_rate_hz(now, interval_s), 4),
            "interval_s": interval_s,
            "samples": len(pictures),
            "flowing": self.flowing(now, interval_s),
            "silent": self.silent(now, interval_s),
            "broken_share": share([arrival.broken for arrival in recent]),
            "repeated_share": share([arrival.repeated for arrival in recent]),
        }
        if age is not None:
            document["last_image_at"] = at - age
        if not pictures:
            return document
        means = [picture.mean for picture in pictures]
        middle = median(means)
        document["luma"] = {
            "median": round(middle, 2),
            "mad": round(median(abs(mean - middle) for mean in means), 2),
            "p2": round(_quantile(means, 0.02), 2),
            "p98": round(_quantile(means, 0.98), 2),
        }
        brightest, over = [float(picture.p99) for picture in pictures], [picture.over for picture in pictures]
        contrasts = [float(picture.contrast) for picture in pictures]
        document["p99"] = {"median": median(brightest), "p98": _quantile(brightest, 0.98)}
        document["over"] = {"median": round(median(over), 4), "p98": round(_quantile(over, 0.98), 4)}
        document["contrast"] = {"median": median(contrasts), "p2": _quantile(contrasts, 0.02)}
        clear = [picture.regions for picture in pictures if picture.assessable]
        if clear:
            medians, spreads = region_medians(clear)
            document["sharpness"] = {
                "samples": len(clear),
                "medians": [round(value, 3) for value in medians],
                "mads": [round(value, 3) for value in spreads],
            }
        return document


def patience_s(interval_s: float) -> float:
    """How long no image may come before a source counts as silent."""
    return max(SILENT_INTERVALS * interval_s, SILENT_LEAST_S)


def share(flags: Sequence[bool]) -> float:
    """The part of them that is set, 0 of none."""
    return round(sum(flags) / len(flags), 4) if flags else 0.0


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
