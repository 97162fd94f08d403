"""Watching what the capture pipelines produce: arrivals, measures, conditions, and the comparison around a change.

One task per source; an error in one restarts only this one. Nothing here can stop the daemon.
"""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.capture.alarms import Alarms
from agent.capture.container import MAX_BYTES
from agent.capture.folders import Found
from agent.capture.governor import Governor
from agent.capture.image_quality import BrokenImageError, Measures, capture_time, check_container, measure
from agent.capture.reference import Comparison, History, compare_source, join
from agent.capture.sources import FolderSource, in_thread
from agent.capture.window import Window
from agent.logs import get_logger
from agent.settings import Capture as CaptureSettings
from agent.settings import CaptureSource

log = get_logger("capture")

TICK_S = 1.0
STALLED_S = 3.0
FOLDER_HOLD_S = 5.0
PICTURES_AFTER_CHANGE = 8
BACK_OFF_S = (1.0, 60.0)


@dataclass(frozen=True)
class Examined:
    """What the bytes of an arrival told: `kind` of fault, None when whole; the CRC of its bytes; capture time in epoch
    seconds by EXIF.
    """

    found: Found
    kind: str | None = None
    checksum: int | None = None
    taken_at: float | None = None
    vanished: bool = False


def examine(arrivals: list[Found]) -> list[Examined]:
    """Read each file once and check its container. Blocking."""
    return [_examine(found) for found in arrivals]


def _examine(found: Found) -> Examined:
    if found.vanished:
        return Examined(found, vanished=True)
    if found.size > MAX_BYTES:
        return Examined(found, kind="too_large")
    try:
        data = _read(found.path)
    except FileNotFoundError:
        return Examined(found, vanished=True)
    except OSError:
        return Examined(found, kind="unreadable")
    return Examined(found, check_container(data), zlib.crc32(data), capture_time(data))


def _read(path: str) -> bytes:
    with Path(path).open("rb") as file:
        return file.read(MAX_BYTES + 1)


def analyse(path: str) -> tuple[Measures | None, str | None, float]:
    """Measures of the file, None when it is gone or being written again; what kept a whole file from being decoded; the
    CPU seconds it took in this thread. Blocking.
    """
    begun = time.thread_time()
    measures, kind = None, None
    try:
        data = _read(path)
        if check_container(data) is None:
            measures = measure(data)
    except BrokenImageError as error:
        kind = error.kind
    except OSError:
        pass
    return measures, kind, time.thread_time() - begun


class _Source:
    """One source: its folder, its window, its alarms, its history."""

    def __init__(
        self, name: str, source: CaptureSource, settings: CaptureSettings, on_event: Callable[[dict[str, Any]], None]
    ) -> None:
        now = time.monotonic()
        self.name = name
        self.interval_s = source.interval_s
        self._directory = source.directory
        self._pattern = source.pattern
        self.window = Window(source.interval_s, now)
        self.history = History(now)
        self.alarms = Alarms(name, source.interval_s, settings, now, on_event)
        self.governor = Governor(settings.budget_pct)
        self._state = "starting"
        self._missing_since: float | None = None
        self._overflows = 0
        self._newest: Found | None = None
        self._checksum: int | None = None
        self._measures: Measures | None = None
        self._images = self._corrupt = self._analysed = 0
        self._last: tuple[float, str] | None = None
        self._ticked = now

    def configure(self, interval_s: float, settings: CaptureSettings) -> None:
        self.interval_s = self.window.interval_s = interval_s
        self.alarms.configure(interval_s, settings)
        self.governor.set_budget(settings.budget_pct)

    async def follow(self) -> None:
        """Watch until cancelled."""
        poll_s = min(max(self.interval_s / 2, 1.0), 5.0)
        folder = FolderSource(self._directory, self._pattern, poll_s=poll_s)
        self._overflows = 0
        self._ticked = time.monotonic()
        try:
            while True:
                timeout_s = TICK_S
                if self._newest:
                    timeout_s = min(TICK_S, self.governor.wait_s(time.monotonic()))
                arrivals = await folder.next(timeout_s)
                if arrivals:
                    self._take(await in_thread(lambda found=arrivals: examine(found)))  # type: ignore[misc]
                if self._newest and self.governor.wait_s(time.monotonic()) <= 0:
                    await self._analyse_newest()
                self._tick(folder)
        finally:
            await folder.close()

    def _take(self, examined: list[Examined]) -> None:
        for item in examined:
            found = item.found
            repeated = item.checksum is not None and item.checksum == self._checksum
            self._checksum = item.checksum
            self._images += 1
            self._corrupt += item.kind is not None
            self._last = (found.seen, found.path)
            self.window.image(
                found.at, found.size, kind=item.kind, duplicate=repeated and not item.kind, vanished=item.vanished
            )
            if not item.vanished:
                taken_at = found.mtime if item.taken_at is None else item.taken_at
                self.window.latency(found.seen - taken_at, exif=item.taken_at is not None)
            self.history.image(found.at, broken=item.kind is not None, repeated=repeated)
            self.alarms.image(found.at, found.seen, corrupt=item.kind is not None)
            if item.kind is None and not item.vanished:
                if self._newest:
                    self.window.skipped()
                self._newest = found

    async def _analyse_newest(self) -> None:
        found, self._newest = self._newest, None
        if found is None:
            return
        measures, kind, cost_s = await in_thread(lambda: analyse(found.path))
        now = time.monotonic()
        self.governor.spent(cost_s, now)
        if measures is None:
            if kind:
                self._corrupt += 1
                self.window.undecodable(kind)
                log.debug("image can't be measured", source=self.name, file=found.path, kind=kind)
            return
        self._measures = measures
        self._analysed += 1
        self.window.analysed(measures)
        self.history.picture(found.at, measures)
        self.alarms.picture(measures, now, time.time())

    def _tick(self, folder: FolderSource) -> None:
        now, at = time.monotonic(), time.time()
        tree = folder.tree
        for _ in range(tree.overflows - self._overflows):
            self.window.overflow()
        self._overflows = tree.overflows
        if tree.state != self._state:
            log.info("capture folder", source=self.name, state=tree.state, directory=str(self._directory))
            self._state = tree.state
        if tree.state != "missing":
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = now
        missing = self._missing_since is not None and now - self._missing_since >= FOLDER_HOLD_S
        self.alarms.folder(missing=missing, directory=str(self._directory), at=at)
        self.alarms.tick(now, at, stalled=now - self._ticked > STALLED_S)
        self._ticked = now

    def live(self) -> dict[str, Any]:
        """The state of this moment, as JSON."""
        now, at = time.monotonic(), time.time()
        document: dict[str, Any] = {
            "state": self._state,
            "directory": str(self._directory),
            "interval_s": self.interval_s,
            "rate_hz": round(self.history.rate_hz(now, 60.0), 3),
            "images": self._images,
            "corrupt": self._corrupt,
            "analysed": self._analysed,
            "reference_samples": self.alarms.baseline.samples,
            "conditions": [condition["condition"] for condition in self.alarms.conditions()],
        }
        if self._last:
            document |= {
                "last_image_at": self._last[0],
                "last_image_age_s": round(max(0.0, at - self._last[0]), 1),
                "last_image": self._last[1],
            }
        if self._measures:
            document |= {
                "width": self._measures.width,
                "height": self._measures.height,
                "luma": round(self._measures.mean, 1),
                "contrast": self._measures.contrast,
                "noise": self._measures.noise,
                "assessable": self._measures.assessable,
            }
            if self._measures.assessable:
                document["sharpness"] = round(self._measures.sharpness, 3)
        return document


class Capture:
    """All sources. Create it, `run` it in a task, and ask it; everything but `run` is quick and for the event loop."""

    def __init__(
        self,
        sources: Mapping[str, CaptureSource],
        settings: CaptureSettings,
        *,
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        self._settings = settings
        self._sources = {name: _Source(name, source, settings, on_event) for name, source in sources.items()}
        self._changed_at: float | None = None

    async def run(self) -> None:
        """Watch all sources until cancelled."""
        async with asyncio.TaskGroup() as group:
            for source in self._sources.values():
                group.create_task(_supervise(source), name=f"capture {source.name}")

    def reconfigure(self, settings: CaptureSettings) -> None:
        """Take other thresholds, another budget and other intervals at once; folders stay as they are until a restart."""
        self._settings = settings
        for name, source in self._sources.items():
            wanted = settings.sources.get(name)
            source.configure(wanted.interval_s if wanted else source.interval_s, settings)

    def close_window(self) -> dict[str, dict[str, Any]]:
        """Per source the report of the window that ends now (see `Window.close`)."""
        now = time.monotonic()
        return {name: source.window.close(now) for name, source in self._sources.items()}

    def live(self) -> dict[str, dict[str, Any]]:
        """Per source what is going on at this moment."""
        return {name: source.live() for name, source in self._sources.items()}

    def conditions(self) -> list[dict[str, Any]]:
        """The conditions that are set."""
        return [condition for source in self._sources.values() for condition in source.alarms.conditions()]

    def reference(self) -> dict[str, Any]:
        """What images are like now, for `compare` after a change; JSON, see `History.reference`."""
        now, at = time.monotonic(), time.time()
        return {
            "schema": 1,
            "at": at,
            "sources": {
                name: source.history.reference(now, at, source.interval_s) for name, source in self._sources.items()
            },
        }

    def compare(self, reference: Mapping[str, Any], since: float) -> Comparison:
        """Whether images since the monotonic time `since` are as good as in `reference`."""
        if since != self._changed_at:
            self._changed_at = since
            for source in self._sources.values():
                source.governor.grant(PICTURES_AFTER_CHANGE)
        now = time.monotonic()
        return join(
            [
                compare_source(
                    name,
                    before,
                    self._sources[name].history,
                    since=since,
                    now=now,
                    interval_s=self._sources[name].interval_s,
                    settings=self._settings,
                )
                for name, before in reference.get("sources", {}).items()
                if name in self._sources
            ]
        )


async def _supervise(source: _Source) -> None:
    """Follow a source for ever; an error restarts it, later each time."""
    pause_s = BACK_OFF_S[0]
    while True:
        begun = time.monotonic()
        try:
            await source.follow()
        except Exception as error:  # noqa: BLE001  whatever it is, it must not reach the other sources
            words = "capture source failed and is started again"
            await asyncio.to_thread(log.error, words, source=source.name, pause_s=pause_s, exc_info=error)
        if time.monotonic() - begun > BACK_OFF_S[1]:
            pause_s = BACK_OFF_S[0]
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, BACK_OFF_S[1])
