"""When a source's images are called missing, slow, corrupt, dark or blurred, and when no longer. Pure.

Every condition has hysteresis: it is set and cleared in turn, never twice the same way. There is no verdict while the
agent itself stalled: its own lag must not look like a dead camera.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.capture.image_quality import Measures
from agent.capture.reference import MINIMUM_SAMPLES, Baseline
from agent.settings import Capture

STOPPED_INTERVALS, STOPPED_LEAST_S, STOPPED_CLEARS_AFTER = 3, 60.0, 3
SLOW_LEAST_S, SLOW_LEAST_IMAGES, SLOW_CLEAR_RATIO, SLOW_CLEAR_WINDOWS = 60.0, 20, 0.97, 2
CORRUPT_OF, CORRUPT_SET, CORRUPT_CLEAR_OF = 20, 2, 100
PICTURES, PICTURES_SET, PICTURES_CLEAR = 5, 3, 1
DARK_HOLD_S = BLUR_HOLD_S = 600.0

FOLDER_MISSING, STOPPED, SLOW, CORRUPT = (
    "capture.folder_missing",
    "capture.stopped",
    "capture.slow",
    "capture.corrupt",
)
DARK, BLURRED = "image.dark", "image.blurred"

SEVERITY = {
    FOLDER_MISSING: "critical",
    STOPPED: "critical",
    SLOW: "warning",
    CORRUPT: "warning",
    DARK: "warning",
    BLURRED: "warning",
}
REMEDY = {
    FOLDER_MISSING: "mount or create the folder, or correct `directory` of this source in agent.toml",
    STOPPED: "look at the capture pipeline and the camera: is its service running, is the disk full, is the sensor found?",
    SLOW: "look for throttling, a slow or full disk, or a pipeline set to another rate than `interval_s`",
    CORRUPT: "look at the power supply and the storage; a pipeline that writes in place should rename into place instead",
    DARK: "look for a covered lens, a failed infra-red lamp or a wrong exposure setting",
    BLURRED: "clean the lens, look for condensation, and check the focus",
}


@dataclass
class _Set:
    since: float
    message: str


class Hold:
    """A verdict over the last five pictures: set at 3 bad ones that lasted `hold_s`, cleared at 1 or fewer for twice that."""

    def __init__(self, hold_s: float) -> None:
        self._hold_s = hold_s
        self._recent: deque[bool] = deque(maxlen=PICTURES)
        self._since: float | None = None
        self.is_set = False

    @property
    def suspicious(self) -> bool:
        """Whether any of the last five was bad."""
        return any(self._recent)

    def add(self, bad: bool, now: float) -> None:
        self._recent.append(bad)
        count = sum(self._recent)
        towards = count <= PICTURES_CLEAR if self.is_set else count >= PICTURES_SET
        if not towards:
            self._since = None
        elif self._since is None:
            self._since = now
        elif now - self._since >= self._hold_s * (2 if self.is_set else 1):
            self.is_set = not self.is_set
            self._since = None


class Alarms:
    """The conditions of one source. `now` is monotonic seconds, `at` epoch seconds; every method that can change a
    condition hands the event to `on_event`.
    """

    def __init__(
        self, source: str, interval_s: float, settings: Capture, now: float, on_event: Callable[[dict[str, Any]], None]
    ) -> None:
        self._source = source
        self._on_event = on_event
        self._set: dict[str, _Set] = {}
        self.configure(interval_s, settings)
        self._alive_at = now
        self._flowing = STOPPED_CLEARS_AFTER
        self._pace_from: float | None = None
        self._paced = 0
        self._pace_spoiled = False
        self._good_paces = 0
        self._corrupt: deque[bool] = deque(maxlen=CORRUPT_CLEAR_OF)
        self._dark = Hold(DARK_HOLD_S)
        self._blurred = Hold(BLUR_HOLD_S)
        self.baseline = Baseline()

    def configure(self, interval_s: float, settings: Capture) -> None:
        """Take other thresholds; what is set stays set until its own rule clears it."""
        self._interval_s = interval_s
        self._settings = settings
        self._stopped_after_s = max(STOPPED_INTERVALS * interval_s, STOPPED_LEAST_S)
        self._pace_s = max(SLOW_LEAST_S, SLOW_LEAST_IMAGES * interval_s)

    def conditions(self) -> list[dict[str, Any]]:
        """The conditions that are set, oldest first."""
        ordered = sorted(self._set.items(), key=lambda item: item[1].since)
        return [self._words(name, held.message) | {"since": held.since} for name, held in ordered]

    def disturbed(self) -> None:
        """A change of our own is on trial: the rate of this time is no sign of a fault."""
        self._pace_spoiled = True

    def folder(self, *, missing: bool, directory: str, at: float) -> None:
        """The watched folder is there or not."""
        self._put(FOLDER_MISSING, missing, f"{self._source}: the folder {directory} does not exist", at)

    def image(self, now: float, at: float, *, corrupt: bool) -> None:
        """An image arrived."""
        self._alive_at = max(now, self._alive_at)
        self._flowing += 1
        if self._pace_from is None:
            self._pace_from, self._paced = now, 0
        else:
            self._paced += 1
            if now - self._pace_from >= self._pace_s:
                self._judge_pace(now - self._pace_from, at)
                self._pace_from, self._paced, self._pace_spoiled = now, 0, False
        if STOPPED in self._set and self._flowing >= STOPPED_CLEARS_AFTER:
            self._put(STOPPED, False, f"{self._source}: images arrive again", at)
        self._corrupt.append(corrupt)
        latest = list(self._corrupt)[-CORRUPT_OF:]
        if CORRUPT not in self._set and sum(latest) >= CORRUPT_SET:
            self._put(CORRUPT, True, f"{self._source}: {sum(latest)} of the last {len(latest)} images are broken", at)
        elif not any(self._corrupt):
            self._put(CORRUPT, False, f"{self._source}: the last {len(self._corrupt)} images are whole", at)

    def picture(self, measures: Measures, now: float, at: float) -> None:
        """An image was measured."""
        self._dark.add(measures.p99 <= self._settings.dark_luma, now)
        self._put(
            DARK,
            self._dark.is_set,
            f"{self._source}: the brightest hundredth of the image is at {measures.p99} of 255"
            f" (limit {self._settings.dark_luma:g})",
            at,
        )
        if not measures.assessable:
            return
        drop = 0.0
        blurred = False
        if self.baseline.samples >= MINIMUM_SAMPLES:
            drop, limit = self.baseline.drop(measures.regions), self.baseline.limit(self._settings.blur_drop)
            blurred = drop > limit
            self._blurred.add(blurred, now)
        self._put(
            BLURRED,
            self._blurred.is_set,
            f"{self._source}: sharpness is {drop:.2f} below this camera's own reference",
            at,
        )
        if not self._blurred.is_set and not blurred:
            self.baseline.add(measures.regions, now)

    def tick(self, now: float, at: float, *, stalled: bool) -> None:
        """Time passed; call it about once a second, after the images that have arrived were handed in."""
        if stalled:
            self._alive_at = max(self._alive_at, now - self._stopped_after_s / 2)
            self._pace_spoiled = True
            return
        silence = now - self._alive_at
        if silence > self._stopped_after_s:
            self._flowing = 0
            self._pace_from = None
            words = f"{self._source}: no image for {silence:.0f} s, one every {self._interval_s:g} s expected"
            self._put(STOPPED, True, words, at)
            self._set[STOPPED].message = words

    def _judge_pace(self, elapsed: float, at: float) -> None:
        """Judged when an image arrives, since silence is another condition; one image of tolerance for the edges."""
        if self._pace_spoiled or STOPPED in self._set:
            return
        expected = elapsed / self._interval_s
        delivered = self._paced + 1
        words = f"{self._source}: {self._paced} of {expected:.0f} expected images in {elapsed:.0f} s"
        if SLOW in self._set:
            self._set[SLOW].message = words
        if delivered < self._settings.slow_ratio * expected:
            self._good_paces = 0
            self._put(SLOW, True, words, at)
        elif delivered >= SLOW_CLEAR_RATIO * expected:
            self._good_paces += 1
            if self._good_paces >= SLOW_CLEAR_WINDOWS:
                self._put(SLOW, False, f"{self._source}: images arrive at the expected rate", at)
        else:
            self._good_paces = 0

    def _put(self, name: str, wanted: bool, message: str, at: float) -> None:
        if wanted == (name in self._set):
            return
        if wanted:
            self._set[name] = _Set(at, message)
        else:
            del self._set[name]
            if name in (DARK, BLURRED):
                message = f"{self._source}: the picture is as before"
        state = "set" if wanted else "clear"
        self._on_event(self._words(name, message) | {"state": state, "at": at})

    def _words(self, name: str, message: str) -> dict[str, Any]:
        return {
            "condition": name,
            "source": self._source,
            "severity": SEVERITY[name],
            "message": message,
            "remedy": REMEDY[name],
        }
