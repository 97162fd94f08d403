"""What arrived from one source between two reports, in numbers. Pure: the caller passes the monotonic clock."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Protocol

IMPLAUSIBLE_EARLY_S = -1.0
IMPLAUSIBLE_LATE_S = 86400.0
LEAST_GAP_S = 2.0
MOST_SAMPLES = 4096


class Measured(Protocol):
    """The measures of a picture that a window sums up."""

    @property
    def mean(self) -> float: ...
    @property
    def sharpness(self) -> float: ...
    @property
    def contrast(self) -> int: ...
    @property
    def assessable(self) -> bool: ...


def quantile(values: Sequence[float], share: float) -> float:
    """The value below or at which `share` of `values`, not empty, lie (nearest rank)."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class Window:
    """Accumulates one source's images; `close` gives the report and begins the next window.

    A gap is a pause above max(2 × interval, 2 s) between two images; one that reaches over several windows counts once,
    in the first that it is long enough in.
    """

    def __init__(self, interval_s: float, now: float) -> None:
        self.interval_s = interval_s
        self._last_at: float | None = None
        self._begun = now
        self._in_gap = False
        self._clear(now)

    def _clear(self, now: float) -> None:
        self._start = now
        self._images = self._bytes = self._duplicates = self._vanished = self._skipped = self._overflows = 0
        self._corrupt: Counter[str] = Counter()
        self._gaps = 0
        self._longest_gap_s = 0.0
        self._latencies: deque[float] = deque(maxlen=MOST_SAMPLES)
        self._from_exif = self._implausible = 0
        self._measured: deque[Measured] = deque(maxlen=MOST_SAMPLES)

    @property
    def last_at(self) -> float | None:
        """When the last image arrived, None before the first."""
        return self._last_at

    def image(
        self, at: float, size: int, *, kind: str | None = None, duplicate: bool = False, vanished: bool = False
    ) -> None:
        """An image of `size` bytes arrived; `kind` says what is wrong with it, `vanished` that it was gone again before
        it could be read.
        """
        self._pause(at)
        self._in_gap = False
        self._last_at = at if self._last_at is None else max(at, self._last_at)
        self._images += 1
        self._bytes += size
        self._duplicates += duplicate
        self._vanished += vanished
        if kind:
            self._corrupt[kind] += 1

    def latency(self, seconds: float, *, exif: bool) -> None:
        """Time from capture (by EXIF, else by the file's modification time) to when the file was seen."""
        if not IMPLAUSIBLE_EARLY_S <= seconds <= IMPLAUSIBLE_LATE_S:
            self._implausible += 1
            return
        self._latencies.append(max(0.0, seconds))
        self._from_exif += exif

    def analysed(self, measures: Measured) -> None:
        self._measured.append(measures)

    def undecodable(self, kind: str) -> None:
        """An image that had seemed whole could not be decoded."""
        self._corrupt[kind] += 1

    def skipped(self) -> None:
        """An image was not measured because a newer one came before the budget allowed it."""
        self._skipped += 1

    def overflow(self) -> None:
        """The kernel's event queue overflowed."""
        self._overflows += 1

    def _pause(self, now: float) -> None:
        since = self._begun if self._last_at is None else self._last_at
        pause = max(0.0, now - since)
        self._longest_gap_s = max(self._longest_gap_s, pause)
        if pause > max(2 * self.interval_s, LEAST_GAP_S) and not self._in_gap:
            self._in_gap = True
            self._gaps += 1

    def close(self, now: float) -> dict[str, Any]:
        """The window as JSON, and the next one begins.

        `window_s` its length · `images`, `expected` (window_s / interval), `delivered_ratio`, `rate_hz`, `bytes` · `gaps`,
        `longest_gap_s` (the one still open included) · `last_image_age_s` (absent before the first image) · `corrupt` and
        `corrupt_kinds` {kind: count}, `zero_byte`, `duplicate` (same bytes as the image before), `vanished` (gone before
        it could be read) · `overflow` of the event queue · `analysed`, `skipped_budget` · with latencies: `latency_s`
        {p50, p90, max}, `latency_samples`, `latency_exif` (how many by EXIF); `latency_implausible` (before the capture by
        more than 1 s, or more than a day) · with analysed images: `luma` and `sharpness` {p10, p50, p90}, `contrast` {p50},
        `assessable_pct`. What was not measured is absent, never zero; `sharpness` counts assessable images only.
        """
        self._pause(now)
        length = max(0.0, now - self._start)
        expected = length / self.interval_s
        report: dict[str, Any] = {
            "window_s": round(length, 3),
            "images": self._images,
            "expected": round(expected, 2),
            "bytes": self._bytes,
            "gaps": self._gaps,
            "longest_gap_s": round(self._longest_gap_s, 3),
            "corrupt": self._corrupt.total(),
            "corrupt_kinds": dict(sorted(self._corrupt.items())),
            "zero_byte": self._corrupt["empty"],
            "duplicate": self._duplicates,
            "vanished": self._vanished,
            "overflow": self._overflows,
            "analysed": len(self._measured),
            "skipped_budget": self._skipped,
            "latency_implausible": self._implausible,
        }
        if length > 0:
            report["rate_hz"] = round(self._images / length, 4)
            report["delivered_ratio"] = round(self._images / expected, 4)
        if self._last_at is not None:
            report["last_image_age_s"] = round(max(0.0, now - self._last_at), 3)
        report |= self._latency_report() | self._picture_report()
        self._clear(now)
        return report

    def _latency_report(self) -> dict[str, Any]:
        if not self._latencies:
            return {}
        values = list(self._latencies)
        return {
            "latency_s": {
                "p50": round(quantile(values, 0.5), 4),
                "p90": round(quantile(values, 0.9), 4),
                "max": round(max(values), 4),
            },
            "latency_samples": len(values),
            "latency_exif": min(self._from_exif, len(values)),
        }

    def _picture_report(self) -> dict[str, Any]:
        if not self._measured:
            return {}
        pictures = list(self._measured)
        clear = [picture.sharpness for picture in pictures if picture.assessable]
        report: dict[str, Any] = {
            "luma": _spread([picture.mean for picture in pictures], 1),
            "contrast": {"p50": quantile([picture.contrast for picture in pictures], 0.5)},
            "assessable_pct": round(100 * len(clear) / len(pictures), 1),
        }
        if clear:
            report["sharpness"] = _spread(clear, 3)
        return report


def _spread(values: Sequence[float], digits: int) -> dict[str, float]:
    return {name: round(quantile(values, share), digits) for name, share in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9))}
