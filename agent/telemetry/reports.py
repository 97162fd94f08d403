"""Makes one report a window and one event a change or ended job, and puts them into the outbox."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agent.errors import StoreError
from agent.logs import get_logger
from agent.store import Tables
from agent.telemetry import report
from agent.telemetry.outbox import EVENT, JOB, REPORT, Outbox

log = get_logger("reports")


@dataclass(frozen=True)
class Sources:
    """Where a report's parts come from; each is asked at the end of a window."""

    host: Callable[[], Mapping[str, Any]]
    capture: Callable[[], Mapping[str, Any]]
    """Closes the sources' windows and begins the next ones."""
    conditions: Callable[[], list[str]]


class Reports:
    """`topics` names where `report` and `event` go; `agent` says what made them."""

    def __init__(
        self,
        outbox: Outbox,
        sources: Sources,
        *,
        thing_name: str,
        boot_id: str,
        topics: Mapping[str, str],
        agent: Mapping[str, Any],
        interval_s: float,
        labels: Mapping[str, str],
    ) -> None:
        self._outbox = outbox
        self._sources = sources
        self._thing_name = thing_name
        self._boot_id = boot_id
        self._topics = topics
        self._agent = agent
        self._interval_s = interval_s
        self._labels = labels
        self._changed = asyncio.Event()
        self._events: asyncio.Queue[Mapping[str, Any]] = asyncio.Queue()

    def reconfigure(self, interval_s: float, labels: Mapping[str, str]) -> None:
        """Windows last `interval_s` seconds from now on, the present one ends when that is over; `labels` go with all that is sent."""
        self._interval_s, self._labels = interval_s, labels
        self._changed.set()

    def note(self, change: Mapping[str, Any]) -> None:
        """Send an event as soon as may be."""
        self._events.put_nowait(change)

    def job_ended(self, tables: Tables, facts: Mapping[str, Any]) -> None:
        """Queue the truth about a job that ended, in the transaction of `tables` that decides it.

        Called on the store's thread; the caller tells the outbox with `announce_fresh` once the transaction is durable.
        """
        self._outbox.add(tables, "event", JOB, self._topics["event"], self._event({"job": facts}))

    async def run(self) -> None:
        """Make reports and events until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._make_reports(), name="reports")
            group.create_task(self._make_events(), name="events")

    async def _make_reports(self) -> None:
        self._sources.capture()
        begin, begun = time.time(), time.monotonic()
        while True:
            self._changed.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(begun + self._interval_s):
                    await self._changed.wait()
                continue
            begun, end = begun + self._interval_s, time.time()
            if time.monotonic() - begun > self._interval_s:
                begun = time.monotonic()  # the machine slept; no burst of empty windows
            await self._put("report", REPORT, self._report((begin, end), await self._outbox.status()))
            begin = end

    async def _make_events(self) -> None:
        while True:
            await self._put("event", EVENT, self._event(await self._events.get()))

    def _event(self, change: Mapping[str, Any]) -> Callable[[int], bytes]:
        labels = self._labels

        def render(seq: int) -> bytes:
            return report.event(
                thing_name=self._thing_name, boot_id=self._boot_id, seq=seq, labels=labels, change=change
            )

        return render

    def _report(self, window: tuple[float, float], outbox: Mapping[str, Any]) -> Callable[[int], bytes]:
        host, capture, conditions = self._sources.host(), self._sources.capture(), self._sources.conditions()
        labels = self._labels

        def render(seq: int) -> bytes:
            return report.report(
                thing_name=self._thing_name,
                boot_id=self._boot_id,
                seq=seq,
                window=window,
                host=host,
                capture=capture,
                conditions=conditions,
                agent=self._agent,
                outbox=outbox,
                labels=labels,
            )

        return render

    async def _put(self, kind: str, priority: int, render: Callable[[int], bytes]) -> None:
        try:
            await self._outbox.put(kind, priority, self._topics[kind], render)
        except StoreError as error:
            log.error("a message could not be kept and is lost", kind=kind, reason=error.message)
