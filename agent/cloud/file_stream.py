"""Files of AWS IoT streams over MQTT: described, and read block by block with memory for one request's blocks.

Lost blocks are asked for again, wrong ones and those nobody asked for are dropped. What is read is not verified here:
the digest of the whole is its reader's to check.
"""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from agent.cloud import topics
from agent.cloud.replies import PASSING
from agent.cloud.session import Link, Session
from agent.cloud.stream_blocks import (
    BLOCK_BYTES,
    MOST_BLOCKS,
    Description,
    Wanted,
    block_of,
    blocks_at,
    description_of,
    next_run,
    refusal_of,
    request,
)
from agent.errors import CloudError
from agent.logs import get_logger

FRUITLESS = 5
"""Requests in a row that bring nothing, until a stream is given up."""
HINTS = {
    "Unauthorized": "check that the stream's role may read its S3 object",
    "ResourceNotFound": "check the ids of stream and file in the job's URL",
}

log = get_logger("cloud.streams")


@dataclass(frozen=True)
class Patience:
    """How long answers are waited for, in seconds."""

    answer_s: float = 30
    """Without a new block for so long, what is missing is asked for again."""
    first_wait_s: float = 1
    longest_wait_s: float = 30
    """Waits before fruitless requests are repeated double, with jitter, from the first to the longest."""


@dataclass
class _Asking:
    """What is being asked of a stream, and what has come of it."""

    stream_id: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)
    description: Description | None = None
    wanted: Wanted | None = None
    """None while it is the description that is asked for."""
    missing: set[int] = field(default_factory=set)
    run: range = range(0)
    """The blocks of the request under way."""
    blocks: dict[int, bytes] = field(default_factory=dict)
    refusal: CloudError | None = None
    failure: CloudError | None = None
    """Of the connection, or of sending the request."""
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def done(self) -> bool:
        """Whether nothing has to be asked for any more."""
        return not self.missing if self.wanted else self.description is not None

    @property
    def answered(self) -> bool:
        """Whether the request under way has all its answers."""
        came = bool(self.wanted) and self.missing.isdisjoint(self.run)
        return self.done or came or self.refusal is not None or self.failure is not None


class FileStreams:
    """The streams of one thing. One request is under way at a time.

    Raises CloudError, retryable while there is no connection; otherwise with AWS's code (`VersionMismatch`,
    `ETagMismatch`: the stream or its file has changed, describe it again) or `stream_silent` after five requests in vain.
    """

    def __init__(self, session: Session, thing: str, patience: Patience | None = None) -> None:
        self._session = session
        self._thing = thing
        self._patience = patience or Patience()
        self._subscribed = False
        self._asking: _Asking | None = None
        self._lock = asyncio.Lock()
        self._at_once = MOST_BLOCKS
        session.on_link(self._on_link)

    async def describe(self, stream_id: str, file_id: int) -> tuple[int, int]:
        """The stream's version, and the size of one of its files in bytes."""
        asking = _Asking(stream_id)
        topic = topics.stream_describe(self._thing, stream_id)
        async with self._lock:
            await self._insist(asking, topic, lambda: {"c": asking.token})
        assert asking.description
        sizes = asking.description.sizes
        if file_id not in sizes:
            raise CloudError("ResourceNotFound", f"stream {stream_id} has no file {file_id}", HINTS["ResourceNotFound"])
        return asking.description.version, sizes[file_id]

    async def read(self, stream_id: str, file_id: int, *, version: int, offset: int, size: int, most: int) -> bytes:
        """What the file of `size` bytes has from `offset` on, to the end of a block: at least one byte, about `most`."""
        blocks = blocks_at(offset, most, size)
        asking = _Asking(stream_id, missing=set(blocks))
        wanted = asking.wanted = Wanted(file_id, size, asking.token)

        def body() -> Mapping[str, Any]:
            asking.run = next_run(asking.missing, self._at_once)
            return request(wanted, version, asking.run)

        async with self._lock:
            await self._insist(asking, topics.stream_get(self._thing, stream_id), body)
        return b"".join(asking.blocks[block] for block in blocks)[offset - blocks.start * BLOCK_BYTES :]

    async def _insist(self, asking: _Asking, topic: str, body: Callable[[], Mapping[str, Any]]) -> None:
        """Send requests, each after the answers to the former or in vain, until `asking` is done. Raises CloudError."""
        await self._subscribe()
        self._asking = asking
        fruitless, wait = 0, self._patience.first_wait_s
        try:
            while True:
                before = len(asking.missing)
                await self._send(asking, topic, json.dumps(body(), separators=(",", ":")).encode())
                if asking.done:
                    return
                if asking.refusal and not asking.refusal.retryable:
                    raise asking.refusal
                complete = asking.missing.isdisjoint(asking.run) and not asking.refusal
                self._at_once = min(MOST_BLOCKS, self._at_once + 1) if complete else max(1, self._at_once // 2)
                if len(asking.missing) < before:
                    fruitless, wait = 0, self._patience.first_wait_s
                    continue
                fruitless += 1
                if fruitless == FRUITLESS:
                    raise self._silent(asking)
                await asyncio.sleep(wait * random.uniform(0.5, 1))  # noqa: S311  jitter, no secret
                wait = min(self._patience.longest_wait_s, wait * 2)
        finally:
            self._asking = None

    async def _send(self, asking: _Asking, topic: str, payload: bytes) -> None:
        """One request, until it is answered or nothing has come for too long. Raises CloudError when it can't be sent."""
        asking.refusal = None
        publishing = asyncio.create_task(self._session.publish(topic, payload))
        publishing.add_done_callback(partial(_published, asking))
        try:
            with suppress(TimeoutError):
                while not asking.answered:
                    async with asyncio.timeout(self._patience.answer_s):
                        await asking.news.wait()
                    asking.news.clear()
        finally:
            publishing.cancel()
            await asyncio.wait({publishing})
        if asking.failure and not asking.done:
            raise asking.failure

    async def _subscribe(self) -> None:
        """Declare the subscriptions with the first use, and give them time to be made.

        The service answers whoever has asked, subscribed or not, so that a refused subscription harms nothing.
        """
        if not self._subscribed:
            for topic_filter in topics.stream_replies(self._thing):
                self._session.subscribe(topic_filter, self._handle)
            self._subscribed = True
        if self._session.link.state == "connected":
            with suppress(TimeoutError):
                async with asyncio.timeout(self._patience.answer_s):
                    await self._session.wait_connected()

    def _handle(self, topic: str, payload: bytes) -> None:
        stream_id, kind = topics.stream_reply(topic)
        asking = self._asking
        if asking is None or asking.stream_id != stream_id:
            log.debug("ignored a message of a stream that nobody waits for", topic=topic)
            return
        if kind == "rejected":
            self._refused(asking, payload)
        elif asking.wanted and kind == "data":
            found = block_of(payload, asking.wanted, asking.missing)
            if isinstance(found, str):
                log.debug("dropped a block", why=found, topic=topic, bytes=len(payload))
                return
            block, data = found
            asking.blocks[block] = data
            asking.missing.discard(block)
            asking.news.set()
        elif not asking.wanted and kind == "description":
            asking.description = description_of(payload, asking.token)
            asking.news.set()

    def _refused(self, asking: _Asking, payload: bytes) -> None:
        refusal = refusal_of(payload)
        if refusal.token not in (None, asking.token):
            return
        why = f"AWS IoT refuses stream {asking.stream_id}: {refusal.code} {refusal.message}".rstrip()
        asking.refusal = CloudError(refusal.code, why, HINTS.get(refusal.code, ""), retryable=refusal.code in PASSING)
        asking.news.set()

    def _on_link(self, link: Link) -> None:
        if self._asking and link.state != "connected":
            self._asking.failure = CloudError("connection_lost", "the connection to AWS IoT broke off", retryable=True)
            self._asking.news.set()

    def _silent(self, asking: _Asking) -> CloudError:
        if asking.refusal:
            return CloudError(asking.refusal.code, f"{asking.refusal.message}, {FRUITLESS} times in a row")
        return CloudError(
            "stream_silent",
            f"stream {asking.stream_id} sent nothing of use after {FRUITLESS} requests in a row",
            "check that the certificate's policy lets the camera publish to and receive from its streams",
        )


def _published(asking: _Asking, publishing: asyncio.Task[None]) -> None:
    error = None if publishing.cancelled() else publishing.exception()
    if error:
        asking.failure = (
            error if isinstance(error, CloudError) else CloudError("message_not_valid", f"can't be sent: {error}")
        )
        asking.news.set()
