"""The disk queue of everything that is published: in it before it is sent, out of it once the cloud has acknowledged it.

What is made while connected goes at once; what waited from before the connect drains beside it at a bounded rate, in the
order of its topic. Events and the truths about jobs go before reports. Beyond its bounds the queue drops the oldest of the
least important messages, counts them and says so; a quarter of its bytes is the reports', so that a flood of events can't
take all of it. However large its bounds are set, it takes no more than half of the disk that others leave.

No topic stops another: one that fails pauses, and is then tried with one message at a time. A message that seems to end
the connection is sent alone, and after three times put into quarantine: it is tried again at growing pauses, because on a
bad link three times can be bad luck.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from agent.errors import CloudError, StoreError
from agent.host.clock import clock_synchronised
from agent.host.files import free_bytes
from agent.logs import get_logger
from agent.settings import Telemetry
from agent.store import Message, Store, Tables

EVENT = JOB = 0
REPORT = 1
SHARES = {EVENT: 0.75, REPORT: 0.25}
IN_FLIGHT = 16
OF_BACKLOG = OF_TOPIC = 8
"""Messages in flight above which nothing of the backlog, and nothing more to the same topic, is sent."""
LOSSES = 3
QUARANTINE_S = 3600.0
FAILED_S = (2.0, 300.0)
LOOK_S = 60.0
LINK_PAUSE_S = 1.0
STORE_RETRY_S = (5.0, 60.0)
NOTHING_IS_LIVE = 2**62
LINK_CODES = ("offline", "connection_ended", "connection_lost")
"""What says nothing about the topic; of these, only the last may be the message's doing."""
NOT_ITS_DOING = ("offline", "connection_ended", "messages_held")
"""What does not count as a failure of the message."""
log = get_logger("outbox")


@dataclass
class _Topic:
    """What the answers so far say of a topic: `answers` when messages to it are acknowledged.

    After a failure nothing is sent to it until `paused_until`, in seconds of the loop, and then one message.
    """

    in_flight: int = 0
    answers: bool = False
    failures: int = 0
    paused_until: float = 0.0

    def has_room(self) -> bool:
        return not self.failures and self.in_flight < (OF_TOPIC if self.answers else 1)

    def is_due(self, now: float) -> bool:
        return self.failures > 0 and self.paused_until <= now and not self.in_flight


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
        self._look = asyncio.Event()
        self._turn = asyncio.Lock()
        """Held while the next message is chosen and while an outcome is written: a full disk stops sending."""
        self._chosen: set[int] = set()
        """Messages that are being sent, or are acknowledged and not out of the queue yet; added on the store's thread."""
        self._topics: defaultdict[str, _Topic] = defaultdict(_Topic)
        self._in_flight = 0
        self._backlog_from = self._link_from = 0.0
        """Times of the loop before which nothing of the backlog, and nothing at all, is sent."""
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
            free_bytes=_free_bytes(self._store.path),
        )
        if dropped:
            _count_dropped(tables, dropped)
            log.warning("messages were dropped, too old or too many", **dropped)
        return seq

    def reconfigure(self, settings: Telemetry) -> None:
        """Other bounds and another rate from now on; what is beyond the bounds goes with the next message."""
        self._settings = settings

    def announce_fresh(self) -> None:
        """There is something new in the queue."""
        self._look.set()

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

        status = await self._store.read(query)
        if missed := self._not_kept:  # the disk is full at present, so it can't be counted there
            status["dropped"] += missed
            by_reason = status["dropped_by_reason"]
            by_reason["not_kept"] = by_reason.get("not_kept", 0) + missed
        return status

    async def connected(self) -> None:
        """Called after each connect: what is queued now is backlog, what comes is live."""
        # Until it is known what waited nothing counts as live, else the backlog would go without regard to its rate.
        self._boundary = NOTHING_IS_LIVE
        try:
            self._boundary = await self._store.read(lambda t: t.newest_queued())
        finally:
            self._look.set()

    async def run(self) -> None:
        """Send until cancelled."""
        self._topics.clear()
        self._chosen.clear()
        self._in_flight = 0
        async with asyncio.TaskGroup() as group:
            while True:
                await self._until_online()
                await asyncio.sleep(self._link_from - asyncio.get_running_loop().time())
                self._look.clear()
                message = await self._choose()
                if message is None:
                    await self._rest()
                elif message.losses:
                    await self._send_alone(message)
                else:
                    group.create_task(self._send(message))

    async def _choose(self) -> Message | None:
        """The message to send now, which then counts as in flight."""
        async with self._turn:
            now = asyncio.get_running_loop().time()
            backlog = self._backlog_from <= now and self._in_flight < OF_BACKLOG
            due = [name for name, topic in self._topics.items() if backlog and topic.is_due(now)]
            without = [name for name, topic in self._topics.items() if not topic.has_room()]
            done_with: list[str] = []

            def query(tables: Tables) -> Message | None:
                message = None
                for name in due:
                    if message := tables.probe(name):
                        break
                    done_with.append(name)
                if backlog and not message:
                    message = tables.backlog(up_to=self._boundary, without=self._chosen, without_topics=without)
                if self._in_flight < IN_FLIGHT and not message:
                    live = tables.queued(limit=1, after=self._boundary, without=self._chosen, without_topics=without)
                    message = live[0] if live else None
                if message:
                    self._chosen.add(message.id)
                return message

            message = await self._store.read(query)
            for name in done_with:
                del self._topics[name]
        if message:
            self._in_flight += 1
            self._topics[message.topic].in_flight += 1
            if message.id <= self._boundary or _went_wrong(message) or message.topic in due:
                self._backlog_from = now + 1 / self._settings.backlog_per_s
        elif backlog and self._boundary == NOTHING_IS_LIVE:
            await self.connected()
        return message

    async def _rest(self) -> None:
        """Until there may be something to send."""
        now = asyncio.get_running_loop().time()
        times = [self._backlog_from, *(topic.paused_until for topic in self._topics.values() if topic.failures)]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min([LOOK_S, *(at - now for at in times if at > now)])):
                await self._look.wait()

    async def _until_online(self) -> None:
        """Wait for the session; when it was not up, what is queued is backlog until `connected` says where that ends."""
        try:
            async with asyncio.timeout(0):
                await self._wait_online()
        except TimeoutError:
            self._boundary = NOTHING_IS_LIVE
            await self._wait_online()

    async def _send_alone(self, message: Message) -> None:
        while self._in_flight > 1:
            self._look.clear()
            await self._look.wait()
        self._backlog_from = asyncio.get_running_loop().time() + 1 / self._settings.backlog_per_s
        await self._send(message)

    async def _send(self, message: Message) -> None:
        """Send, and keep what became of it."""
        error: CloudError | None = None
        try:
            try:
                await self._publish(message.topic, message.payload)
            except CloudError as failure:
                error = failure
            async with self._turn:
                newest = await self._keep(message, error)
                self._judge(message, error, newest)
        finally:
            self._in_flight -= 1
            self._topics[message.topic].in_flight -= 1
            self._chosen.discard(message.id)
            self._look.set()

    def _judge(self, message: Message, error: CloudError | None, newest: int) -> None:
        """What the outcome says of the topic, and of the connection. `newest`: the message queued last."""
        topic, loop = self._topics[message.topic], asyncio.get_running_loop()
        topic.answers = error is None
        if error is None:
            if topic.failures:  # what came during the pause has waited, so it is backlog
                self._boundary = max(self._boundary, newest)
            topic.failures = 0
        elif error.code in LINK_CODES:
            self._link_from = loop.time() + LINK_PAUSE_S
        elif topic.paused_until <= loop.time():  # else the pause is for those that were in flight with this one, too
            topic.failures += 1
            topic.paused_until = loop.time() + _wait_s(topic.failures - 1)
            loop.call_later(_wait_s(message.failures), self._look.set)
            if topic.failures == 1:
                log.warning("messages to a topic wait", topic=message.topic, code=error.code, reason=error.message)

    async def _keep(self, message: Message, error: CloudError | None) -> int:
        """Write, once there is room: to send more of what can't be taken out would only make duplicates."""

        def change(tables: Tables) -> int:
            _settle(tables, message, error)
            return tables.newest_queued()

        pause = STORE_RETRY_S[0]
        while True:
            try:
                return await self._store.write(change)
            except StoreError as failure:
                if failure.code != "store_full":
                    raise
                if pause == STORE_RETRY_S[0]:
                    log.error("the outbox can't be written, sending waits", reason=failure.message, hint=failure.hint)
                await asyncio.sleep(pause)
                pause = min(2 * pause, STORE_RETRY_S[1])


def _free_bytes(path: Path) -> int | None:
    try:
        return free_bytes(path)
    except OSError:
        return None


def _went_wrong(message: Message) -> bool:
    return message.losses + message.failures > 0


def _wait_s(failures: int) -> float:
    """Seconds until a message or a topic is tried again that failed for now, `failures` times before."""
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
        if error.code not in NOT_ITS_DOING:
            tables.postpone(message.id, wait_s=_wait_s(message.failures), failures=1)
    else:
        # Never sent again as it is; its topic pauses, so that a policy that is mended costs a few messages only.
        log.warning("a message was refused", topic=message.topic, code=error.code, reason=error.message)
        tables.dequeue([message.id])
        _count_dropped(tables, {"refused": 1})


def _count_dropped(tables: Tables, counts: dict[str, int]) -> None:
    by_reason = tables.fact("outbox.dropped_by_reason", {})
    for reason, count in counts.items():
        by_reason[reason] = by_reason.get(reason, 0) + count
    tables.set_fact("outbox.dropped_by_reason", by_reason)
    tables.set_fact("outbox.dropped", tables.fact("outbox.dropped", 0) + sum(counts.values()))
