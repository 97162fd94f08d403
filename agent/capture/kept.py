"""The history of a source as JSON that survives a restart of the agent, so that a change soon after it can be judged. Pure.

Only what the next reference needs is kept: some pictures' measures with their ages, and the rate. What is older than an
hour when the agent starts again, or of unknown age, is no reference any more: a night would be judged by the day.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent.capture.image_quality import REGIONS, Measures
from agent.capture.reference import History, horizon_s

SCHEMA = 1
MOST_PICTURES = 64
"""About 10 kB."""


def as_json(history: History, *, now: float, at: float, boot_id: str, interval_s: float, place: str) -> dict[str, Any]:
    """What is to be kept; `now` is monotonic, `at` epoch seconds, `place` the folder that was watched."""
    pictures = [(now - taken, measures) for taken, measures in history.recent(now, interval_s)]
    if len(pictures) > MOST_PICTURES:
        step = len(pictures) / MOST_PICTURES
        pictures = [pictures[int((number + 1) * step) - 1] for number in range(MOST_PICTURES)]
    return {
        "schema": SCHEMA,
        "place": place,
        "interval_s": interval_s,
        "rate_hz": round(history.normal_rate_hz(now, interval_s), 4),
        "boot_id": boot_id,
        "now": now,
        "at": at,
        "pictures": [[round(age, 1), *_numbers(measures)] for age, measures in pictures],
    }


def restore(
    history: History,
    kept: Mapping[str, Any],
    *,
    now: float,
    at: float,
    boot_id: str,
    interval_s: float,
    place: str,
    clock_believed: bool,
) -> int:
    """Put what `as_json` kept before what `history` holds; the number of pictures taken over.

    What another boot kept counts only while the clock is believed: without one, a night could be judged by the day.

    Raises KeyError, TypeError, ValueError or IndexError for a document of another form.
    """
    if kept["schema"] != SCHEMA or kept["place"] != place:
        return 0
    if kept["boot_id"] != boot_id and not clock_believed:
        return 0
    elapsed = now - kept["now"] if kept["boot_id"] == boot_id else at - kept["at"]
    horizon = horizon_s(interval_s)
    if not 0 <= elapsed <= horizon:
        return 0
    pictures = [(now - elapsed - float(age), _measures(numbers)) for age, *numbers in kept["pictures"]]
    taken_over = [item for item in pictures if item[0] >= now - horizon]
    if kept["interval_s"] == interval_s and kept["rate_hz"] > 0:
        history.kept_rate_hz = float(kept["rate_hz"])
    history.pictures = taken_over + history.pictures
    return len(taken_over)


def _numbers(picture: Measures) -> list[float]:
    levels = [picture.width, picture.height, picture.p1, picture.p50, picture.p99]
    shares = [picture.mean, picture.std, picture.under, picture.over, picture.sharpness, picture.noise]
    return [*levels, *(round(value, 4) for value in (*shares, *picture.regions))]


def _measures(numbers: list[Any]) -> Measures:
    width, height, p1, p50, p99 = (int(value) for value in numbers[:5])
    mean, std, under, over, sharpness, noise, *regions = (float(value) for value in numbers[5:])
    if len(regions) != REGIONS:
        raise ValueError(f"{len(regions)} regions")
    return Measures(width, height, mean, std, p1, p50, p99, under, over, sharpness, tuple(regions), noise)
