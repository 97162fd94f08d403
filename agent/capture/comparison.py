"""Whether the images since a change are as good as those of the reference from before it. Pure.

Its thresholds may be made stricter by settings and never laxer than the defaults: who can change the settings from afar
could else blind the gate that his next change has to pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from agent.capture.image_quality import Measures
from agent.capture.reference import (
    GRACE_S,
    JUDGED_INTERVALS,
    MAD_FACTOR,
    MINIMUM_SAMPLES,
    SILENT_INTERVALS,
    Arrival,
    History,
    patience_s,
    region_drop,
    share,
)
from agent.settings import Capture

ENOUGH_PICTURES = 5
JUDGED_PICTURES = 15
LEAST_RATE = 0.8
LEAST_JUDGED_S = 5.0
DARKER = 0.55
OVEREXPOSED_MORE = 0.15
CONTRAST_LEFT = 0.5
BROKEN_MORE = 0.1
REPEATED_MOST = 0.5
DEFAULTS = Capture()

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


def judging_s(before: Mapping[str, Any], intervals: Iterable[float]) -> float:
    """Seconds after a change by which sources that are well are always judged: half a minute, and ten of the longest interval.

    `before` maps sources to their references; `intervals` are the expected ones before and after the change, in seconds.
    A source that was slower than that counts with its rate, a silent one is not judged. 0 when none is.
    """
    judged = [source for source in before.values() if not source.get("silent")]
    if not judged:
        return 0.0
    seen: list[float] = [1 / source["rate_hz"] for source in judged if source.get("flowing") and source.get("rate_hz")]
    longest: float = max([*intervals, *(source["interval_s"] for source in judged), *seen])
    return GRACE_S + max(JUDGED_INTERVALS * longest, LEAST_JUDGED_S)


def _judge_presence(
    arrivals: Sequence[Arrival], begin: float, now: float, interval_s: float, worse: list[str], awaited: list[str]
) -> None:
    """Where no rate is known from before, but no long silence either: images must come."""
    if arrivals and now - arrivals[-1].at <= patience_s(interval_s):
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
        first = f"{len(arrivals)} images since the change are too few to tell the rate"
        awaited.append(f"{first}: one every {1 / wanted_hz:.3g} s is told {span / 2:.3g} s after the first")
    elif not arrivals:
        worse.append(f"no image since the change, {wanted_hz:.2f} a second before")
    elif count + 1 < least_share * wanted_hz * (now - start):
        worse.append(f"{rate:.2f} images a second, {wanted_hz:.2f} before the change")


def _judge_files(arrivals: Sequence[Arrival], before: Mapping[str, Any], worse: list[str]) -> None:
    if len(arrivals) < ENOUGH_PICTURES:
        return
    broken = [arrival.broken for arrival in arrivals]
    if sum(broken) >= 2 and share(broken) > before.get("broken_share", 0.0) + BROKEN_MORE:
        worse.append(f"{sum(broken)} of {len(broken)} images are broken files")
    latest = [arrival.repeated for arrival in arrivals][-JUDGED_PICTURES:]
    if share(latest) > REPEATED_MOST >= 2 * before.get("repeated_share", 0.0):
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
    limits = (settings.dark_luma, DEFAULTS.dark_luma)
    went_dark = any(picture.p99 <= limit < before["p99"]["median"] for limit in limits)
    if went_dark or picture.mean < DARKER * luma["p2"] - 1:
        return "dark", f"mean luma {picture.mean:.0f}, {luma['median']:.0f} before"
    if picture.over > before["over"]["p98"] + OVEREXPOSED_MORE:
        return "overexposed", f"{picture.over:.0%} of the picture is white, {before['over']['median']:.0%} before"
    if picture.contrast < CONTRAST_LEFT * contrast["p2"]:
        return "without contrast", f"contrast {picture.contrast}, {contrast['median']:.0f} before"
    sharpness = before.get("sharpness")
    if picture.assessable and sharpness and sharpness["samples"] >= MINIMUM_SAMPLES:
        drop = region_drop(sharpness["medians"], picture.regions)
        limit = max(min(settings.blur_drop, DEFAULTS.blur_drop), MAD_FACTOR * median(sharpness["mads"]))
        if drop > limit:
            return "blurred", f"sharpness fell by {drop:.2f} (limit {limit:.2f})"
    return None


def compare(
    before: Mapping[str, Mapping[str, Any]],
    sources: Mapping[str, tuple[History, float]],
    *,
    since: float,
    now: float,
    settings: Capture,
    least_share: float = LEAST_RATE,
) -> Comparison:
    """All `sources` (history, expected interval) against their references; those that there are no more do not count."""
    return join(
        [
            compare_source(
                name,
                reference,
                sources[name][0],
                since=since,
                now=now,
                interval_s=sources[name][1],
                settings=settings,
                least_share=least_share,
            )
            for name, reference in before.items()
            if name in sources
        ]
    )


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
