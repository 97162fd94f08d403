"""The disk queue of everything that is published: in it before it is sent, out of it once the cloud has acknowledged it.

What is made while connected goes first; what waited from before the connect drains beside it at a bounded rate. Events go
before reports. Beyond its bounds the queue drops the least important oldest messages, counts them and says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from agent.errors import CloudError
from agent.host.clock import clock_synchronised
from agent.logs import get_logger
from agent.settings import Telemetry
from agent.store import Message, Store, Tables

EVENT, REPORT = 0, 1
BATCH = 16
REFUSALS = 3
NOTHING_IS_LIVE = 2**62
log = get_logger("outbox")


class Publish(Protocol):
    """Sends one message and returns when it is acknowledged. Raises CloudError."""

    def __call__(self, topic: str, payload: bytes) -> Awaitable[None]: ...


class Outbox:
    """Queue and sender. `wait_online` returns when the session is up."""

    def __init__(
        self, store: Store, settings: Telemetry, *, publish: Publish, wait_online: Callable[[], Awaitable[None]]
    ) -> None:
        self._store = store
        self._settings = settings
        self._publish = publish
        self._wait_online = wait_online
        self._fresh = asyncio.Event()
        self._boundary = 0
        self._refused: dict[int, int] = {}
        self._sending: set[int] = set()
        self._connected_anew = asyncio.Event()

    async def put(self, kind: str, priority: int, topic: str, render: Callable[[int], bytes]) -> int:
        """Number a message of `kind`, queue it, and return its number; durable on return.

        `render` makes the payload from the number, which rises by one for each message of the kind. Raises StoreError.
        """

        def change(tables: Tables) -> tuple[int, int]:
            seq = tables.fact(f"telemetry.seq.{kind}", 0) + 1
            tables.set_fact(f"telemetry.seq.{kind}", seq)
            tables.enqueue(topic, render(seq), priority=priority)
            dropped = tables.trim_queue(
                max_bytes=self._settings.outbox_max_bytes,
                max_age_s=self._settings.outbox_max_age_s,
                clock_believed=clock_synchronised() is True,
            )
            if dropped:
                tables.set_fact("outbox.dropped", tables.fact("outbox.dropped", 0) + dropped)
            return seq, dropped

        seq, dropped = await self._store.write(change)
        if dropped:
            log.warning("the outbox is full, dropped the oldest messages", dropped=dropped)
        self._fresh.set()
        return seq

    async def status(self) -> dict[str, Any]:
        """messages, bytes and oldest_at (epoch seconds) of what waits, and how many were dropped since the first start."""

        def query(tables: Tables) -> dict[str, Any]:
            size = tables.queue_size()
            return {
                "messages": size.messages,
                "bytes": size.bytes,
                "oldest_at": size.oldest_at,
                "dropped": tables.fact("outbox.dropped", 0),
            }

        return await self._store.read(query)

    async def connected(self) -> None:
        """Called after each connect: what is queued now is backlog, what comes is live."""
        # Until it is known what waited nothing counts as live, else it would be sent as live and as backlog.
        self._boundary = NOTHING_IS_LIVE
        try:
            self._boundary = await self._store.read(lambda t: t.newest_queued())
        finally:
            self._fresh.set()
            self._connected_anew.set()

    async def run(self) -> None:
        """Send until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._send_live(), name="outbox live")
            group.create_task(self._send_backlog(), name="outbox backlog")

    async def _send_live(self) -> None:
        while True:
            await self._wait_online()
            self._fresh.clear()
            batch = await self._store.read(lambda t: t.queued(limit=BATCH, after=self._boundary))
            if not batch:
                await self._fresh.wait()
                continue
            await self._send(batch)

    async def _send_backlog(self) -> None:
        while True:
            await self._connected_anew.wait()
            await self._wait_online()
            batch = await self._store.read(lambda t: t.queued(limit=1, before=self._boundary + 1))
            if not batch:
                self._connected_anew.clear()
                continue
            await self._send(batch)
            await asyncio.sleep(1 / self._settings.backlog_per_s)

    async def _send(self, batch: list[Message]) -> None:
        """Send those that are not being sent already, and take what was acknowledged out of the queue."""
        batch = [message for message in batch if message.id not in self._sending]
        self._sending.update(message.id for message in batch)
        try:
            results = await asyncio.gather(*(self._send_one(message) for message in batch))
            done = [message.id for message, sent in zip(batch, results, strict=True) if sent]
            if done:
                await self._store.write(lambda t: t.dequeue(done))
        finally:
            self._sending.difference_update(message.id for message in batch)
        if not done:
            await asyncio.sleep(1)

    async def _send_one(self, message: Message) -> bool:
        """Whether the message may leave the queue: it was acknowledged, or the cloud refused it for good."""
        try:
            await self._publish(message.topic, message.payload)
        except CloudError as error:
            if error.retryable:
                return False
            refusals = self._refused[message.id] = self._refused.get(message.id, 0) + 1
            log.warning("a message was refused", topic=message.topic, code=error.code, reason=error.message)
            if refusals < REFUSALS:
                return False
            await self._store.write(_count_drop)
        self._refused.pop(message.id, None)
        return True


def _count_drop(tables: Tables) -> None:
    tables.set_fact("outbox.dropped", tables.fact("outbox.dropped", 0) + 1)
