"""Requests that wait for their answer, matched by clientToken and topic; an entry lives only as long as its waiter."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from agent.cloud import topics
from agent.cloud.seldom import Seldom
from agent.errors import CloudError
from agent.logs import get_logger

PASSING = {"InternalError", "RequestThrottled", "429", "500", "503"}

log = get_logger("cloud")


class Rejected(CloudError):  # noqa: N818  the service's word for it
    """The service refused a request: `code` is the service's, `details` the whole answer (jobs: `executionState`)."""

    def __init__(
        self, code: str, message: str, hint: str = "", *, retryable: bool = False, details: Mapping[str, Any]
    ) -> None:
        super().__init__(code, message, hint, retryable=retryable)
        self.details = details


@dataclass(frozen=True)
class _Waiting:
    topic: str
    answer: asyncio.Future[dict[str, Any]]


class Replies:
    """The token map."""

    def __init__(self) -> None:
        self._waiting: dict[str, _Waiting] = {}
        self._seldom = Seldom(log)

    def __len__(self) -> int:
        return len(self._waiting)

    async def ask(
        self,
        publish: Callable[[str, bytes], Coroutine[Any, Any, None]],
        topic: str,
        body: Mapping[str, Any],
        timeout_s: float,
    ) -> dict[str, Any]:
        """Publish `body` with a token to `topic`, and the answer to it. Raises Rejected, CloudError, TimeoutError."""
        token = uuid.uuid4().hex
        payload = json.dumps({**body, "clientToken": token}, separators=(",", ":"), ensure_ascii=False).encode()
        answer = self.expect(token, topic)
        publishing = asyncio.create_task(publish(topic, payload))
        try:
            async with asyncio.timeout(timeout_s):
                first: set[asyncio.Future[Any]] = {publishing, answer}
                await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
                if not answer.done():  # the answer may overtake the acknowledgement, or come without it
                    await publishing
                return await answer
        finally:
            self.forget(token)
            answer.cancel()
            publishing.cancel()
            await asyncio.gather(publishing, answer, return_exceptions=True)

    def expect(self, token: str, topic: str) -> asyncio.Future[dict[str, Any]]:
        """The future answer to the request with `token` on `topic`; forget() it in any case."""
        answer = asyncio.get_running_loop().create_future()
        self._waiting[token] = _Waiting(topic, answer)
        return answer

    def forget(self, token: str) -> None:
        """Nobody waits for `token` any more."""
        self._waiting.pop(token, None)

    def fail(self, error: Callable[[], CloudError]) -> None:
        """End every waiting request with `error`."""
        for waiting in self._waiting.values():
            if not waiting.answer.done():
                waiting.answer.set_exception(error())

    def feed(self, topic: str, payload: bytes) -> None:
        """Take a message of a reply topic. Malformed answers and those to other clients' requests are ignored."""
        try:
            reply = json.loads(payload)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            self._seldom.warning("ignored an answer that is not a JSON object", topic=topic, bytes=len(payload))
            return
        token = reply.get("clientToken")
        waiting = self._waiting.get(token) if isinstance(token, str) else None
        if waiting is None or waiting.answer.done():
            log.debug("ignored an answer that nobody waits for", topic=topic)
        elif topic == topics.accepted(waiting.topic):
            waiting.answer.set_result(reply)
        elif topic == topics.rejected(waiting.topic):
            waiting.answer.set_exception(_rejection(waiting.topic, reply))
        else:
            self._seldom.warning("ignored an answer on another topic than asked", topic=topic, expected=waiting.topic)


def _rejection(topic: str, reply: dict[str, Any]) -> Rejected:
    code = str(reply.get("code", "rejected"))
    message = str(reply.get("message", ""))
    passing = code in PASSING or (code.isdigit() and int(code) >= 500)
    return Rejected(
        code, f"AWS IoT rejected the request on {topic}: {code} {message}".rstrip(), retryable=passing, details=reply
    )
