"""The disk queue of everything that is published: in it before it is sent, out of it once the cloud has acknowledged it.

What is made while connected goes first; what waited from before the connect drains beside it at a bounded rate, in order.
Events and the truths about jobs go before reports. Beyond its bounds the queue drops the oldest of the least important
messages, counts them and says so; a quarter of its bytes is the reports', so that a flood of events can't take all of it.

A message that seems to end the connection is sent alone, and after three times put into quarantine: the others flow, and
it is tried again at growing pauses, because on a bad link three times can be bad luck.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol

from agent.errors import CloudError, StoreError
from agent.host.clock import clock_synchronised
from agent.logs import get_logger
from agent.settings import Telemetry
from agent.store import Message, Store, Tables

EVENT = JOB = 0
REPORT = 1
SHARES = {EVENT: 0.75, REPORT: 0.25}
BATCH = 16
LOSSES = 3
QUARANTINE_S = 3600.0
REFUSALS = 3
REFUSED_S = (60.0, 600.0)
FAILED_S = (2.0, 300.0)
LONGEST_PAUSE_S = 60.0
LOOK_S = 60.0
STORE_RETRY_S = (5.0, 60.0)
NOTHING_IS_LIVE = 2**62
log = get_logger("outbox")


class Publish(Protocol):
    """Sends one message and returns when it is acknowledged. Raises CloudError."""

    def __call__(self, topic: str, payload: bytes) -> Awaitable[None]: ...


class Outbox:
    """Queue and sender. `wait_online` returns when the session is up, at once when it is."""

    def __init__(
        self, store: Store, settings: Telemetry, *, publish: Publish, wait_online: Callable[[], Awaitable[None]]
    ) -> None:
        self._store = store
        self._settings = settings
        self._publish = publish
        self._wait_online = wait_online
        self._boundary = NOTHING_IS_LIVE
        self._fresh = asyncio.Event()
        self._waiting = asyncio.Event()
        self._choosing = asyncio.Lock()
        self._chosen: frozenset[int] = frozenset()
        """Messages that are being sent, or are acknowledged and not out of the queue yet; replaced, never changed."""
        self._in_flight = 0
        self._alone = False
        self._landed = asyncio.Event()
        self._not_kept = 0

    async def put(self, kind: str, priority: int, topic: str, render: Callable[[int], bytes]) -> int:
        """Number a message of `kind`, queue it, and return its number; durable on return.

        `render` makes the payload from the number, which rises by one for each message of the kind. Raises StoreError;
        the message is lost then, and counted as soon as there is room.
        """
        missed, self._not_kept = self._not_kept, 0

        def change(tables: Tables) -> int:
            if missed:
                _count_dropped(tables, {"not_kept": missed})
            return self.add(tables, kind, priority, topic, render)

        try:
            seq = await self._store.write(change)
        except StoreError:
            self._not_kept += missed + 1
            raise
        self.announce_fresh()
        return seq

    def add(self, tables: Tables, kind: str, priority: int, topic: str, render: Callable[[int], bytes]) -> int:
        """The part of `put` that happens in a transaction, for one who queues a message together with a record.

        Call `announce_fresh` on the event loop when the transaction is durable.
        """
        seq: int = tables.fact(f"telemetry.seq.{kind}", 0) + 1
        tables.set_fact(f"telemetry.seq.{kind}", seq)
        believed = clock_synchronised() is True
        tables.enqueue(topic, render(seq), priority=priority, clock_believed=believed)
        dropped = tables.trim_queue(
            max_bytes=self._settings.outbox_max_bytes,
            max_age_s=self._settings.outbox_max_age_s,
            clock_believed=believed,
            shares=SHARES,
            keep=self._chosen,
        )
        if dropped:
            _count_dropped(tables, dropped)
            log.warning("messages were dropped, too old or too many", **dropped)
        return seq

    def announce_fresh(self) -> None:
        """There is something new in the queue."""
        self._fresh.set()
        if self._boundary == NOTHING_IS_LIVE:
            self._waiting.set()

    async def status(self) -> dict[str, Any]:
        """What waits and what was lost.

        `messages`, `bytes` on the disk and `oldest_at` (epoch seconds) of what waits, how many of it are `quarantined`;
        how many were `dropped` since the first start, and of these by reason: `age`, `size`, `refused`, `not_kept`.
        """

        def query(tables: Tables) -> dict[str, Any]:
            size = tables.queue_size()
            return {
                "messages": size.messages,
                "bytes": size.bytes,
                "oldest_at": size.oldest_at,
                "quarantined": tables.lost_at_least(LOSSES),
                "dropped": tables.fact("outbox.dropped", 0),
                "dropped_by_reason": tables.fact("outbox.dropped_by_reason", {}),
            }

        return await self._store.read(query)

    async def connected(self) -> None:
        """Called after each connect: what is queued now is backlog, what comes is live."""
        # Until it is known what waited nothing counts as live, else the backlog would go without regard to its rate.
        self._boundary = NOTHING_IS_LIVE
        try:
            self._boundary = await self._store.read(lambda t: t.newest_queued())
        finally:
            self._fresh.set()
            self._waiting.set()

    async def run(self) -> None:
        """Send until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send_live(), name="outbox live")
            group.create_task(self._send_waiting(), name="outbox backlog")

    async def _send_live(self) -> None:
        while True:
            await self._until_online()
            self._fresh.clear()
            async with self._choose(self._next_live) as batch:
                answered = not batch or await self._send(batch)
            if not answered:
                await asyncio.sleep(1)
            elif not batch:
                await self._fresh.wait()

    async def _send_waiting(self) -> None:
        """The backlog, and what has to be sent again."""
        loop, spacing = asyncio.get_running_loop(), 1 / self._settings.backlog_per_s
        while True:
            await self._until_online()
            self._waiting.clear()
            async with self._choose(self._next_waiting) as batch:
                alone = any(message.losses for message in batch)
                began = loop.time()
                answered = not batch or await self._send(batch, alone=alone)
            if not answered:
                await asyncio.sleep(max(spacing, min(_wait_s(batch[0].failures), LONGEST_PAUSE_S)))
            elif batch:
                await asyncio.sleep(spacing if alone else began + spacing - loop.time())
            elif self._boundary == NOTHING_IS_LIVE:
                await self.connected()
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._waiting.wait()

    def _next_live(self, tables: Tables) -> list[Message]:
        return tables.queued(limit=BATCH, after=self._boundary, without=self._chosen)

    def _next_waiting(self, tables: Tables) -> list[Message]:
        message = tables.backlog(up_to=self._boundary, without=self._chosen)
        return [message] if message else []

    async def _until_online(self) -> None:
        """Wait for the session; when it was not up, what is queued is backlog until `connected` says where that ends."""
        try:
            async with asyncio.timeout(0):
                await self._wait_online()
        except TimeoutError:
            self._boundary = NOTHING_IS_LIVE
            await self._wait_online()

    @contextlib.asynccontextmanager
    async def _choose(self, query: Callable[[Tables], list[Message]]) -> AsyncIterator[list[Message]]:
        """Messages that nobody else sends for the time of the block."""
        async with self._choosing:
            batch = await self._store.read(query)
            ids = frozenset(message.id for message in batch)
            self._chosen |= ids
        try:
            yield batch
        finally:
            self._chosen -= ids

    @contextlib.asynccontextmanager
    async def _flight(self, count: int, *, alone: bool) -> AsyncIterator[None]:
        """Beside the others, or with nothing else in flight."""
        while self._alone or (alone and self._in_flight):
            self._landed.clear()
            await self._landed.wait()
        self._alone = alone
        self._in_flight += count
        try:
            yield
        finally:
            self._in_flight -= count
            self._alone = False
            self._landed.set()

    async def _send(self, batch: list[Message], *, alone: bool = False) -> bool:
        """Send, and keep what became of each; whether all were answered for good."""
        async with self._flight(len(batch), alone=alone):
            errors = await asyncio.gather(*(self._send_one(message) for message in batch))
        outcomes = list(zip(batch, errors, strict=True))

        def change(tables: Tables) -> None:
            for message, error in outcomes:
                _settle(tables, message, error)

        await self._keep(change)
        answered = not any(error and error.retryable for error in errors)
        if not answered:
            longest = max(_wait_s(message.failures) for message in batch)
            asyncio.get_running_loop().call_later(longest, self._waiting.set)
        return answered

    async def _keep(self, change: Callable[[Tables], None]) -> None:
        """Write, once there is room: to send more of what can't be taken out would only make duplicates."""
        pause = STORE_RETRY_S[0]
        while True:
            try:
                return await self._store.write(change)
            except StoreError as error:
                if error.code != "store_full":
                    raise
                if pause == STORE_RETRY_S[0]:
                    log.error("the outbox can't be written, sending waits", reason=error.message, hint=error.hint)
                await asyncio.sleep(pause)
                pause = min(2 * pause, STORE_RETRY_S[1])

    async def _send_one(self, message: Message) -> CloudError | None:
        try:
            await self._publish(message.topic, message.payload)
        except CloudError as error:
            return error
        return None


def _wait_s(failures: int) -> float:
    """Seconds until a message is sent again that was refused or unanswered for now, `failures` times before."""
    return min(FAILED_S[0] * 2.0 ** min(failures, 20), FAILED_S[1])


def _settle(tables: Tables, message: Message, error: CloudError | None) -> None:
    """Keep what became of a message that was sent."""
    if error is None:
        tables.dequeue([message.id])
    elif error.code == "connection_lost":
        losses = message.losses + 1
        pause = QUARANTINE_S * 2.0 ** min(losses - LOSSES, 20) if losses >= LOSSES else 0.0
        tables.postpone(message.id, wait_s=pause, losses=1)
        if losses == LOSSES:
            log.error(
                "a message is in quarantine: the connection ended each time it was sent",
                topic=message.topic,
                bytes=len(message.payload),
                times=losses,
                hint="check that the certificate's policy allows its topic; it is tried again, alone, at growing pauses",
            )
    elif error.retryable:
        if error.code != "offline":
            tables.postpone(message.id, wait_s=_wait_s(message.failures), failures=1)
    else:
        refusals = message.refusals + 1
        dropped = refusals >= REFUSALS
        log.warning(
            "a message was refused", topic=message.topic, code=error.code, reason=error.message, dropped=dropped
        )
        if dropped:
            tables.dequeue([message.id])
            _count_dropped(tables, {"refused": 1})
        else:
            tables.postpone(message.id, wait_s=REFUSED_S[message.refusals], refusals=1)


def _count_dropped(tables: Tables, counts: dict[str, int]) -> None:
    by_reason = tables.fact("outbox.dropped_by_reason", {})
    for reason, count in counts.items():
        by_reason[reason] = by_reason.get(reason, 0) + count
    tables.set_fact("outbox.dropped_by_reason", by_reason)
    tables.set_fact("outbox.dropped", tables.fact("outbox.dropped", 0) + sum(counts.values()))
