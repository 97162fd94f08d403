"""Watching what the capture pipelines produce: arrivals, measures, conditions, and the comparison around a change.

One task per source; an error in one restarts only this one, and a file system that hangs holds up neither the alarms nor
the end of the process. What a reference needs is kept in the store, so that it survives a restart of the agent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from agent.capture import kept
from agent.capture.alarms import Alarms
from agent.capture.comparison import LEAST_RATE, Comparison, compare, judging_s
from agent.capture.folders import Found, printable
from agent.capture.governor import Governor
from agent.capture.image_quality import Measures
from agent.capture.reading import Examined, analyse, examine
from agent.capture.reference import MINIMUM_SAMPLES, History
from agent.capture.sources import FolderSource
from agent.capture.window import Window
from agent.errors import AgentError
from agent.host.clock import boot_id, clock_synchronised
from agent.host.threads import leavable
from agent.logs import get_logger
from agent.settings import Capture as CaptureSettings
from agent.settings import CaptureSource
from agent.store import Store, Tables
from agent.supervise import restarting

log = get_logger("capture")

TICK_S = 1.0
STALLED_S = 3.0
FOLDER_HOLD_S = 5.0
PICTURES_AFTER_CHANGE = 8
KEEP_EVERY_S = 300.0
KEEP_TIMEOUT_S = 5.0
KEEP_LOOK_S = 5.0
ON_TRIAL_S = 60.0
GOING_BACK_S = 15.0
HANGS_S = 30.0


class _Source:
    """One source: its folder, its window, its alarms, its history."""

    def __init__(
        self, name: str, source: CaptureSource, settings: CaptureSettings, on_event: Callable[[dict[str, Any]], None]
    ) -> None:
        now = time.monotonic()
        self.name = name
        self.interval_s = source.interval_s
        self._directory = source.directory
        self._place = printable(str(source.directory))
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
        self._ticked = self._turned = now

    def configure(self, source: CaptureSource, settings: CaptureSettings) -> None:
        self.interval_s = self.window.interval_s = source.interval_s
        self._pattern = source.pattern
        self.alarms.configure(source.interval_s, settings)
        self.governor.set_budget(settings.budget_pct)

    async def follow(self) -> None:
        """Watch until cancelled, anew when another pattern is set."""
        while True:
            await self._follow(self._pattern)

    async def _follow(self, pattern: str) -> None:
        poll_s = min(max(self.interval_s / 2, 1.0), 5.0)
        folder = FolderSource(self._directory, pattern, poll_s=poll_s)
        self._overflows = 0
        self._ticked = time.monotonic()
        ticks = asyncio.create_task(self._keep_ticking(folder), name=f"alarms of {self.name}")
        try:
            while self._pattern == pattern:
                timeout_s = TICK_S
                if self._newest:
                    timeout_s = min(TICK_S, self.governor.wait_s(time.monotonic()))
                self._turned = time.monotonic()
                arrivals = await folder.next(timeout_s)
                if arrivals:
                    self._take(await leavable(examine, arrivals))
                if self._newest and self.governor.wait_s(time.monotonic()) <= 0:
                    await self._analyse_newest()
                if ticks.done():
                    ticks.result()
        finally:
            ticks.cancel()
            await asyncio.wait([ticks])
            await folder.close()

    async def _keep_ticking(self, folder: FolderSource) -> None:
        """Beside the watch, so that images are called missing also while a read hangs."""
        while True:
            self._tick(folder)
            await asyncio.sleep(TICK_S)

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
        measures, kind, cost_s = await leavable(analyse, found.path)
        now = time.monotonic()
        self.governor.spent(cost_s, now)
        if measures is None:
            if kind:
                self._corrupt += 1
                self.window.undecodable(kind)
                log.debug("image can't be measured", source=self.name, file=printable(found.path), kind=kind)
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
        state = "hanging" if now - self._turned > HANGS_S else tree.state
        if state != self._state:
            log.info("capture folder", source=self.name, state=state, directory=self._place)
            self._state = state
        if tree.state != "missing":
            self._missing_since = None
        elif self._missing_since is None:
            self._missing_since = now
        missing = self._missing_since is not None and now - self._missing_since >= FOLDER_HOLD_S
        self.alarms.folder(missing=missing, directory=self._place, at=at)
        self.alarms.tick(now, at, stalled=now - self._ticked > STALLED_S)
        self._ticked = now

    @property
    def key(self) -> str:
        return f"capture.history.{self.name}"

    def keep(self, boot: str, trial_since: float | None) -> dict[str, Any]:
        """The history as it is kept in the store; without what came since `trial_since`, which has yet to prove itself."""
        now = time.monotonic()
        history = self.history
        if trial_since is not None:
            proven = [item for item in history.pictures if item[0] <= trial_since]
            history = replace(history, pictures=proven)
        return kept.as_json(
            history, now=now, at=time.time(), boot_id=boot, interval_s=self.interval_s, place=self._place
        )

    def restore(self, document: Mapping[str, Any], boot: str) -> int:
        """Take over what `keep` gave, also from before a reboot; the number of pictures."""
        return kept.restore(
            self.history,
            document,
            now=time.monotonic(),
            at=time.time(),
            boot_id=boot,
            interval_s=self.interval_s,
            place=self._place,
            clock_believed=clock_synchronised() is True,
        )

    def live(self) -> dict[str, Any]:
        """The state of this moment, as JSON."""
        now, at = time.monotonic(), time.time()
        document: dict[str, Any] = {
            "state": self._state,
            "directory": self._place,
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
                "last_image": printable(self._last[1]),
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
    """All sources. Create it, `run` it in a task, and ask it; everything but `run` is quick and for the event loop.

    With a `store`, what a reference needs is kept there: when there is enough for one, then every five minutes at most
    and at an orderly end.
    """

    def __init__(
        self,
        sources: Mapping[str, CaptureSource],
        settings: CaptureSettings,
        *,
        on_event: Callable[[dict[str, Any]], None],
        store: Store | None = None,
    ) -> None:
        self._settings = settings
        self._sources = {name: _Source(name, source, settings, on_event) for name, source in sources.items()}
        self._store = store
        self._loaded = False
        self._kept_at = float("-inf")
        self._changed_at: float | None = None
        self._compared_at = float("-inf")
        self._worse = False
        self._asked_at: float | None = None
        self._asked_last = 0.0

    async def run(self) -> None:
        """Watch all sources until cancelled."""
        await self._load()
        try:
            async with asyncio.TaskGroup() as group:
                for source in self._sources.values():
                    group.create_task(restarting(f"capture {source.name}", source.follow))
                group.create_task(restarting("capture history", self._keep_now_and_then))
        finally:
            await self._keep()

    async def _load(self) -> None:
        if self._store is None or self._loaded:
            return
        self._loaded = True
        boot = await asyncio.to_thread(boot_id)
        keys = {name: source.key for name, source in self._sources.items()}
        try:
            found = await self._store.read(lambda t: {name: t.fact(key) for name, key in keys.items()})
        except AgentError as error:
            log.warning("no capture history", code=error.code, reason=error.message)
            return
        for name, document in found.items():
            count = 0
            try:
                count = self._sources[name].restore(document, boot) if document else 0
            except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
                log.warning("capture history can't be read", source=name, reason=repr(error))
            if count:
                self._kept_at = time.monotonic()
                log.info("capture history", source=name, pictures=count)

    async def _keep_now_and_then(self) -> None:
        while True:
            await asyncio.sleep(KEEP_LOOK_S)
            now = time.monotonic()
            counts = [len(source.history.recent(now, source.interval_s)) for source in self._sources.values()]
            if max(counts, default=0) >= MINIMUM_SAMPLES and now - self._kept_at >= KEEP_EVERY_S:
                await self._keep()

    async def _keep(self) -> None:
        """Write what is worth it, for all sources in one transaction."""
        if self._store is None:
            return
        now = self._kept_at = time.monotonic()
        self._forget_spoilt()
        trial_since = self._changed_at if now - self._compared_at < ON_TRIAL_S else None
        documents = {source.key: source.keep(boot_id(), trial_since) for source in self._sources.values()}
        worth = {key: document for key, document in documents.items() if document["pictures"]}

        def write(tables: Tables) -> None:
            for key, document in worth.items():
                tables.set_fact(key, document)

        if worth:
            try:
                async with asyncio.timeout(KEEP_TIMEOUT_S):
                    await self._store.write(write)
            except (AgentError, TimeoutError) as error:
                log.warning("capture history can't be kept", reason=str(error))

    def _forget_spoilt(self) -> None:
        """Once a trial ended with images that were worse, its pictures are no reference for the next."""
        if self._worse and self._changed_at is not None:
            for source in self._sources.values():
                source.history.forget(self._changed_at, self._compared_at + GOING_BACK_S)

    def reconfigure(self, settings: CaptureSettings) -> None:
        """Take other thresholds, another budget, other intervals and patterns; which folders there are stays until a restart."""
        self._settings = settings
        for name, source in self._sources.items():
            if wanted := settings.sources.get(name):
                source.configure(wanted, settings)

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
        self._asked_at = None
        self._forget_spoilt()
        now, at = time.monotonic(), time.time()
        return {
            "schema": 1,
            "at": at,
            "sources": {
                name: source.history.reference(now, at, source.interval_s) for name, source in self._sources.items()
            },
        }

    def lacking(self) -> str:
        """What `reference` would lack that is worth waiting for, in words; "" when nothing. Ask about once a second."""
        now = time.monotonic()
        self._forget_spoilt()
        if self._asked_at is None or now - self._asked_last > ON_TRIAL_S:
            self._asked_at = now
            for source in self._sources.values():
                source.governor.grant(MINIMUM_SAMPLES)
        self._asked_last = now
        asked = self._asked_at
        lacks = {n: s.history.lacking(asked, now, s.interval_s) for n, s in self._sources.items()}
        return "; ".join(f"{name}: {words}" for name, words in lacks.items() if words)

    def compare(self, reference: Mapping[str, Any], since: float, least_share: float = LEAST_RATE) -> Comparison:
        """Whether images since the monotonic time `since` are as good as in `reference`, with `least_share` of its rate."""
        if since != self._changed_at:
            self._changed_at = since
            for source in self._sources.values():
                source.governor.grant(PICTURES_AFTER_CHANGE)
        for source in self._sources.values():
            source.alarms.disturbed()
        now = self._compared_at = time.monotonic()
        verdict = compare(
            reference.get("sources", {}),
            {name: (source.history, source.interval_s) for name, source in self._sources.items()},
            since=since,
            now=now,
            settings=self._settings,
            least_share=least_share,
        )
        self._worse = not verdict.ok and not verdict.waiting
        return verdict

    def judging_s(self, reference: Mapping[str, Any], intervals: Iterable[float]) -> float:
        """Seconds after a change by which sources that are well are judged, see `comparison.judging_s`."""
        return judging_s(reference.get("sources", {}), intervals)
