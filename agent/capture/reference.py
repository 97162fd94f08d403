"""What a camera's pictures are like when all is well, and whether they are worse after a change. Pure.

`Baseline` is for the alarm of a blurred picture: this camera's own sharpness over hours. `History` is for the gate of an
update or a configuration: the last hour before the change, as JSON that survives a restart, against what came since.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Literal

from agent.capture.image_quality import Measures
from agent.settings import Capture

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

ENOUGH_PICTURES = 5
JUDGED_PICTURES = 15
LEAST_RATE = 0.8
JUDGED_INTERVALS = 10
LEAST_JUDGED_S = 5.0
GRACE_S = 30.0
DARKER = 0.55
OVEREXPOSED_MORE = 0.15
CONTRAST_LEFT = 0.5
BROKEN_MORE = 0.1
REPEATED_MOST = 0.5


Judged = Literal["pictures", "partly", "rate", "nothing"]


@dataclass(frozen=True)
class Comparison:
    """Whether images are as good as before a change.

    `assessed` pictures were looked at; `waiting` says that too little has come since the change for a verdict, and then
    `ok` is False but means nothing yet. `reasons` are sentences: what is worse, what is awaited, what could not be judged.
    `judged` says by what: the pictures of all sources, of some (`partly`), the rate only, or nothing.
    """

    assessed: int
    ok: bool
    waiting: bool
    reasons: list[str]
    judged: Judged = "pictures"


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
        return bool(self.arrivals) and now - self.arrivals[-1].at <= _patience_s(interval_s)

    def silent(self, now: float, interval_s: float) -> bool:
        """Whether none came for that long although the folder was watched; neither is true just after the start."""
        return now - (self.arrivals[-1].at if self.arrivals else self.begun) > _patience_s(interval_s)

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
            "broken_share": _share([arrival.broken for arrival in recent]),
            "repeated_share": _share([arrival.repeated for arrival in recent]),
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


def compare_source(
    name: str,
    before: Mapping[str, Any],
    history: History,
    *,
    since: float,
    now: float,
    interval_s: float,
    settings: Capture,
    least_share: float = LEAST_RATE,
) -> Comparison:
    """One source against its reference; only images that came after `since` count, `least_share` of them must come."""
    if before.get("silent"):
        return Comparison(0, True, False, [f"{name}: silent before the change, not judged"], "nothing")
    begin = max(since, history.begun)
    arrivals = [arrival for arrival in history.arrivals if arrival.at > begin]
    pictures = [measures for taken, measures in history.pictures if taken > begin][-JUDGED_PICTURES:]
    worse: list[str] = []
    awaited: list[str] = []
    notes: list[str] = []
    judged: Judged = "pictures"
    if before.get("flowing") and before.get("rate_hz"):
        _judge_rate(arrivals, begin, now, least_share, min(before["rate_hz"], 1 / interval_s), worse, awaited)
    else:
        _judge_presence(arrivals, begin, now, interval_s, worse, awaited)
        judged = "nothing"
    _judge_files(arrivals, before, worse)
    if before.get("samples", 0) < MINIMUM_SAMPLES:
        went_by = "only that images come" if judged == "nothing" else "going by rate"
        judged = "nothing" if judged == "nothing" else "rate"
        notes.append(
            f"{name}: {before.get('samples', 0)} pictures measured before the change, {MINIMUM_SAMPLES} needed: {went_by}"
        )
    elif len(pictures) >= ENOUGH_PICTURES:
        judged = "pictures"
        worse += _judge_pictures(pictures, before, settings)
    elif not worse:
        awaited.append(f"{len(pictures)} of {ENOUGH_PICTURES} pictures measured since the change")
    reasons = [f"{name}: {words}" for words in (worse or awaited)]
    return Comparison(len(pictures), not worse and not awaited, bool(awaited) and not worse, reasons + notes, judged)


def _patience_s(interval_s: float) -> float:
    return max(SILENT_INTERVALS * interval_s, SILENT_LEAST_S)


def _judge_presence(
    arrivals: Sequence[Arrival], begin: float, now: float, interval_s: float, worse: list[str], awaited: list[str]
) -> None:
    """Where no rate is known from before, but no long silence either: images must come."""
    if arrivals and now - arrivals[-1].at <= _patience_s(interval_s):
        return
    if not arrivals and now - begin < max(GRACE_S, SILENT_INTERVALS * interval_s):
        awaited.append("no image since the change yet")
    else:
        worse.append(f"no image for {now - (arrivals[-1].at if arrivals else begin):.0f} s since the change")


def _judge_rate(
    arrivals: Sequence[Arrival],
    begin: float,
    now: float,
    least_share: float,
    wanted_hz: float,
    worse: list[str],
    awaited: list[str],
) -> None:
    """The rate over the last ten intervals, with one image of tolerance; a pipeline that has just been restarted gets
    half a minute to deliver its first images.
    """
    span = max(JUDGED_INTERVALS / wanted_hz, LEAST_JUDGED_S)
    start = max(now - span, begin)
    if arrivals and arrivals[0].at > start:
        start = arrivals[0].at
    count = sum(arrival.at >= start for arrival in arrivals)
    rate = count / (now - start) if now > start else 0.0
    if now - begin < max(GRACE_S, span) and (not arrivals or now - arrivals[0].at < span / 2):
        awaited.append(f"{len(arrivals)} images since the change, too few to tell the rate")
    elif not arrivals:
        worse.append(f"no image since the change, {wanted_hz:.2f} a second before")
    elif count + 1 < least_share * wanted_hz * (now - start):
        worse.append(f"{rate:.2f} images a second, {wanted_hz:.2f} before the change")


def _judge_files(arrivals: Sequence[Arrival], before: Mapping[str, Any], worse: list[str]) -> None:
    if len(arrivals) < ENOUGH_PICTURES:
        return
    broken = [arrival.broken for arrival in arrivals]
    if sum(broken) >= 2 and _share(broken) > before.get("broken_share", 0.0) + BROKEN_MORE:
        worse.append(f"{sum(broken)} of {len(broken)} images are broken files")
    latest = [arrival.repeated for arrival in arrivals][-JUDGED_PICTURES:]
    if _share(latest) > REPEATED_MOST >= 2 * before.get("repeated_share", 0.0):
        worse.append(f"{sum(latest)} of the last {len(latest)} images repeat the one before, byte for byte")


def _judge_pictures(pictures: Sequence[Measures], before: Mapping[str, Any], settings: Capture) -> list[str]:
    """What is wrong when more than half of the pictures have a fault."""
    faults = [fault for picture in pictures if (fault := _fault(picture, before, settings))]
    if 2 * len(faults) <= len(pictures):
        return []
    counts = Counter(kind for kind, _ in faults)
    latest = dict(faults)
    return [f"{kind} in {count} of {len(pictures)} pictures: {latest[kind]}" for kind, count in counts.most_common()]


def _fault(picture: Measures, before: Mapping[str, Any], settings: Capture) -> tuple[str, str] | None:
    luma, contrast = before["luma"], before["contrast"]
    went_dark = picture.p99 <= settings.dark_luma < before["p99"]["median"]
    if went_dark or picture.mean < DARKER * luma["p2"] - 1:
        return "dark", f"mean luma {picture.mean:.0f}, {luma['median']:.0f} before"
    if picture.over > before["over"]["p98"] + OVEREXPOSED_MORE:
        return "overexposed", f"{picture.over:.0%} of the picture is white, {before['over']['median']:.0%} before"
    if picture.contrast < CONTRAST_LEFT * contrast["p2"]:
        return "without contrast", f"contrast {picture.contrast}, {contrast['median']:.0f} before"
    sharpness = before.get("sharpness")
    if picture.assessable and sharpness and sharpness["samples"] >= MINIMUM_SAMPLES:
        drop = region_drop(sharpness["medians"], picture.regions)
        limit = max(settings.blur_drop, MAD_FACTOR * median(sharpness["mads"]))
        if drop > limit:
            return "blurred", f"sharpness fell by {drop:.2f} (limit {limit:.2f})"
    return None


def join(parts: Sequence[Comparison]) -> Comparison:
    """The verdict over all sources: one that is worse decides at once, then one that waits."""
    if not parts:
        return Comparison(0, True, False, ["no source of images is configured"], "nothing")
    worse = [part for part in parts if not part.ok and not part.waiting]
    waiting = any(part.waiting for part in parts) and not worse
    reasons = [reason for part in (worse or parts) for reason in part.reasons]
    by = {part.judged for part in parts}
    judged: Judged = "partly" if "pictures" in by and len(by) > 1 else "rate" if len(by) > 1 else by.pop()
    return Comparison(sum(part.assessed for part in parts), not worse and not waiting, waiting, reasons, judged)


def _share(flags: Sequence[bool]) -> float:
    return round(sum(flags) / len(flags), 4) if flags else 0.0


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
