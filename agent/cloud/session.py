"""The one MQTT 5 session with AWS IoT: it reconnects, subscribes and asks again by itself. Owner of awscrt.

Every connection is a fresh awscrt client that never reconnects on its own, so that the pace of CONNECTs, changed
certificates and hold-offs are decided here. Nothing is queued while off-line: what must not be lost waits in the outbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from agent.cloud import identity, topics
from agent.cloud.connection import Connection, Options
from agent.cloud.offline import (
    REFUSED,
    Diagnosis,
    Facts,
    Failure,
    History,
    Link,
    Pace,
    diagnose,
    publish_refused,
    reason_name,
    subscriptions_refused,
    wait_s,
)
from agent.cloud.replies import Rejected, Replies
from agent.errors import CloudError
from agent.host.clock import clock_synchronised
from agent.logs import get_logger
from agent.settings import Cloud

__all__ = ["Link", "Rejected", "Session"]

LONGEST_REQUEST_S = 30.0
SUBSCRIBE_AGAIN_S = (5.0, 300.0)

log = get_logger("cloud")

Handler = Callable[[str, bytes], None]


class Session:
    """Keeps the camera connected from run() until that is cancelled."""

    def __init__(
        self,
        *,
        client_id: str,
        cloud: Cloud,
        certificate_file: Path,
        private_key_file: Path,
        will: tuple[str, bytes] | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._client_id = client_id
        self._cloud = cloud
        self._certificate_file = certificate_file
        self._private_key_file = private_key_file
        self._will = will
        self._pace = pace or Pace()
        self._handlers: dict[str, list[Handler]] = {}
        self._subscribed: set[str] = set()
        self._refused: dict[str, int] = {}
        self._on_ready: list[Callable[[], Awaitable[None]]] = []
        self._on_link: list[Callable[[Link], None]] = []
        self._replies = Replies()
        self._connection: Connection | None = None
        self._certificate_id = ""
        self._history = History()
        self._connect_at = float("-inf")
        self._link = Link(since=time.time())
        self._declared = asyncio.Event()
        self._ready = asyncio.Event()
        self._restart = asyncio.Event()

    @property
    def link(self) -> Link:
        """The present state."""
        return self._link

    @property
    def certificate_id(self) -> str:
        """AWS IoT's id of the certificate in use; empty before the first connect."""
        return self._certificate_id

    def on_link(self, callback: Callable[[Link], None]) -> None:
        """Call `callback` on the event loop with every new state; it must not block."""
        self._on_link.append(callback)

    def on_ready(self, callback: Callable[[], Awaitable[None]]) -> None:
        """Call `callback` after every connect, once all declared subscriptions are answered, one after the other.

        Also when a subscription that had been refused is accepted later. Cancelled when the connection ends meanwhile;
        an exception is logged and harms nobody else.
        """
        self._on_ready.append(callback)

    def subscribe(self, topic_filter: str, handler: Handler) -> None:
        """Declare a permanent QoS 1 subscription, before run() or while it runs.

        `handler(topic, payload)` runs on the event loop and must not block. Messages may come twice, in any order, and
        before the first on_ready.
        """
        handlers = self._handlers.setdefault(topic_filter, [])
        handlers.append(handler)
        if topic_filter not in self._subscribed:
            self._ready.clear()
            self._declared.set()

    def subscribe_replies(self, *topic_filters: str) -> None:
        """Declare permanent subscriptions whose messages answer request()."""
        for topic_filter in topic_filters:
            if topic_filter not in self._handlers:
                self.subscribe(topic_filter, self._replies.feed)

    async def wait_connected(self) -> None:
        """Return as soon as there is a connection and every declared subscription is answered."""
        await self._ready.wait()

    async def restart_with(self, cloud: Cloud) -> None:
        """Leave the present connection cleanly and connect with other settings; returns at once.

        Whether it worked is told by wait_connected() and `link`. Certificate files named in `cloud` replace ours.
        """
        self._cloud = cloud
        self._certificate_file = cloud.certificate_file or self._certificate_file
        self._private_key_file = cloud.private_key_file or self._private_key_file
        self._subscribed.clear()
        self._ready.clear()
        if self._link.state != "stopped":
            self._set_link("connecting")
        self._restart.set()

    async def publish(self, topic: str, payload: bytes, *, timeout_s: float = 60) -> None:
        """Send with QoS 1; returns once AWS IoT has taken it.

        Raises CloudError: `offline` (not sent), `connection_lost` or `no_answer` (may have been taken), all retryable;
        `topic_not_valid`, `packet_too_large` (not sent) or the reason of the refusal, such as `not_authorised`.
        """
        wrong = topics.problem(topic)
        if wrong:
            raise CloudError("topic_not_valid", f"can't publish to {topic[:300]!r}: {wrong}")
        if len(payload) > topics.MAX_PAYLOAD_BYTES:
            raise CloudError(
                "packet_too_large", f"{len(payload)} bytes for {topic}: AWS IoT takes {topics.MAX_PAYLOAD_BYTES}"
            )
        if self._connection is None:
            raise self._offline_error()
        try:
            async with asyncio.timeout(timeout_s):
                code = await self._connection.publish(topic, payload)
        except TimeoutError:
            raise CloudError(
                "no_answer", f"AWS IoT did not acknowledge a message to {topic} within {timeout_s:g} s", retryable=True
            ) from None
        if code >= REFUSED:
            raise publish_refused(topic, code, self._certificate_id)

    async def request(self, topic: str, body: Mapping[str, Any], *, timeout_s: float = 20) -> dict[str, Any]:
        """Publish `body` with a clientToken to `topic` and return the JSON object of `<topic>/accepted`.

        The answers' filter must have been declared with subscribe_replies(). Waits at most 30 s. Raises Rejected when
        the service refuses, CloudError when it can't be asked or does not answer in time.
        """
        token = uuid.uuid4().hex
        timeout_s = min(timeout_s, LONGEST_REQUEST_S)
        payload = json.dumps({**body, "clientToken": token}, separators=(",", ":"), ensure_ascii=False).encode()
        answer = self._replies.expect(token, topic)
        publishing = asyncio.create_task(self.publish(topic, payload, timeout_s=LONGEST_REQUEST_S))
        try:
            async with asyncio.timeout(timeout_s):
                await _first_of(publishing, answer)
                if not answer.done():  # the answer may overtake the acknowledgement, or come without it
                    await publishing
                return await answer
        except TimeoutError:
            raise self._unanswered(topic, timeout_s) from None
        finally:
            self._replies.forget(token)
            answer.cancel()
            publishing.cancel()
            await asyncio.gather(publishing, answer, return_exceptions=True)

    async def run(self) -> None:
        """Stay connected until cancelled, then disconnect cleanly.

        Raises CloudError when the first attempt can't even begin: no endpoint, unreadable or unusable files.
        """
        if not self._cloud.endpoint:
            raise CloudError(
                "not_configured", "cloud.endpoint is not set", "set it in agent.toml to the account's endpoint"
            )
        self._set_link("connecting")
        first = True
        try:
            while True:
                await self._await_turn()
                self._restart.clear()
                try:
                    connection = await self._open()
                except CloudError as error:
                    if first:
                        self._set_link("stopped", code=error.code, reason=error.message, hint=error.hint)
                        raise
                    diagnosis = Diagnosis(error.code, error.message, error.hint)
                    self._history = replace(self._history, attempts=self._history.attempts + 1)
                else:
                    first = False
                    failure, lasted_s = await self._use(connection)
                    if failure is None:
                        self._history = History()
                        continue
                    self._history = self._history.after(failure, time.monotonic(), lasted_s, self._pace)
                    diagnosis = diagnose(failure, self._history, await asyncio.to_thread(self._facts, failure))
                await self._hold_off(diagnosis)
        finally:
            if self._link.state != "stopped":
                self._set_link("stopped", reason="the agent was stopped")

    async def _await_turn(self) -> None:
        """At most one CONNECT a second, whatever asks for it."""
        remaining = self._connect_at + self._pace.between_connects_s - time.monotonic()
        if remaining > 0:
            await asyncio.sleep(remaining)
        self._connect_at = time.monotonic()

    async def _open(self) -> Connection:
        options = Options(self._client_id, self._cloud, self._certificate_file, self._private_key_file, self._will)
        connection, self._certificate_id = await asyncio.to_thread(
            Connection.prepare, options, self._dispatch, asyncio.get_running_loop()
        )
        return connection

    async def _use(self, connection: Connection) -> tuple[Failure | None, float]:
        """Connect, and serve until the connection ends; why (None: a restart was asked for) and how long it stood."""
        restart = asyncio.create_task(self._restart.wait())
        ready: asyncio.Task[None] | None = None
        began = time.monotonic()
        connection.ended.add_done_callback(lambda _: self._unusable() if self._connection is connection else None)
        try:
            self._connect_at = began
            connection.start()
            await _first_of(connection.opened, connection.ended, restart)
            began = time.monotonic()
            if connection.opened.done() and not connection.ended.done():
                self._connection = connection
                ready = asyncio.create_task(self._serve(connection, rejoined=connection.opened.result()))
                await _first_of(connection.ended, restart, ready)
            if connection.ended.done():
                return connection.ended.result(), time.monotonic() - began
            if restart.done():
                return None, time.monotonic() - began
            assert ready
            error = None if ready.cancelled() else ready.exception()
            log.warning("subscribing failed, the connection is given up", reason=str(error or "cancelled"))
            return Failure("SUBSCRIBE_UNANSWERED", was_connected=True), time.monotonic() - began
        finally:
            self._unusable()
            tasks = [task for task in (restart, ready) if task]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            connection.fail()
            self._replies.fail(_lost)
            await connection.close()

    def _unusable(self) -> None:
        self._connection = None
        self._ready.clear()

    async def _serve(self, connection: Connection, *, rejoined: bool) -> None:
        """Make missing subscriptions whenever there are some and tell that all is ready; ends by an exception only."""
        if not rejoined:
            self._subscribed.clear()
        self._refused = {}
        self._set_link("connecting", session_present=rejoined, connects=self._link.connects + 1)
        log.info("connected", endpoint=self._cloud.endpoint, port=self._cloud.port, session_present=rejoined)
        first, again_s = True, SUBSCRIBE_AGAIN_S[0]
        while True:
            before = set(self._refused)
            self._declared.clear()
            await self._subscribe_missing(connection)
            degraded = subscriptions_refused(self._refused, self._certificate_id)
            self._set_link("connected", code=degraded.code, reason=degraded.reason, hint=degraded.hint)
            if not self._declared.is_set():
                self._ready.set()
            if first or before - set(self._refused):
                await self._call_ready()
            first = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(again_s * random.uniform(0.5, 1) if self._refused else None):  # noqa: S311
                    await self._declared.wait()
                continue
            again_s = min(again_s * 2, SUBSCRIBE_AGAIN_S[1])

    async def _subscribe_missing(self, connection: Connection) -> None:
        missing = [topic_filter for topic_filter in self._handlers if topic_filter not in self._subscribed]
        for start in range(0, len(missing), topics.MAX_FILTERS_PER_SUBSCRIBE):
            group = missing[start : start + topics.MAX_FILTERS_PER_SUBSCRIBE]
            for topic_filter, code in zip(group, await connection.subscribe(group), strict=True):
                if code < REFUSED:
                    self._subscribed.add(topic_filter)
                    self._refused.pop(topic_filter, None)
                    continue
                self._refused[topic_filter] = code
                log.warning("subscription refused", filter=topic_filter, reason=reason_name(code))

    async def _call_ready(self) -> None:
        for callback in self._on_ready:
            try:
                await callback()
            except CloudError as error:
                log.warning("work after the connect failed", code=error.code, reason=error.message)
            except Exception:
                log.exception("work after the connect failed")

    async def _hold_off(self, diagnosis: Diagnosis) -> None:
        wait = wait_s(diagnosis, self._history, self._pace, random.random())  # noqa: S311
        self._set_link("offline", code=diagnosis.code, reason=diagnosis.reason, hint=diagnosis.hint)
        log.warning(
            "off-line", code=diagnosis.code, reason=diagnosis.reason, hint=diagnosis.hint, next_s=round(wait, 1)
        )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await self._restart.wait()
                self._history = History()

    def _dispatch(self, topic: str, payload: bytes) -> None:
        handlers = [h for pattern, known in self._handlers.items() if topics.matches(pattern, topic) for h in known]
        if not handlers:
            log.debug("ignored a message that no subscription matches", topic=topic, bytes=len(payload))
        for handler in handlers:
            try:
                handler(topic, payload)
            except Exception:
                log.exception("handling a message failed", topic=topic, bytes=len(payload))

    def _facts(self, failure: Failure) -> Facts:
        """What diagnose() may want to know. Blocking; reads the certificate only when it may be the cause."""
        starts = until = None
        if "TLS" in failure.error or failure.reason_code == 0x87:
            with contextlib.suppress(CloudError):
                facts = identity.read_certificate(self._certificate_file)
                starts, until = facts.not_before, facts.not_after
        return Facts(
            endpoint=self._cloud.endpoint,
            port=self._cloud.port,
            client_id=self._client_id,
            certificate_id=self._certificate_id,
            certificate_from=starts,
            certificate_until=until,
            clock_synchronised=clock_synchronised(),
            now=time.time(),
        )

    def _set_link(self, state: Literal["connected", "connecting", "offline", "stopped"], **changes: Any) -> None:
        since = self._link.since if state == self._link.state else time.time()
        cleared = {"code": "", "reason": "", "hint": ""}
        link = replace(self._link, **{**cleared, **changes}, state=state, since=since)
        if link == self._link:
            return
        self._link = link
        for callback in self._on_link:
            try:
                callback(link)
            except Exception:
                log.exception("a listener for the connection's state failed")

    def _offline_error(self) -> CloudError:
        reason = f": {self._link.reason}" if self._link.reason else ""
        return CloudError("offline", f"there is no connection to AWS IoT{reason}", self._link.hint, retryable=True)

    def _unanswered(self, topic: str, timeout_s: float) -> CloudError:
        refused = [name for name in self._refused if topics.matches(name, topics.accepted(topic))]
        if refused:
            return CloudError(
                "subscription_refused",
                f"no answer on {topic}: AWS IoT refused the subscription to {refused[0]}",
                f"check that the policy of certificate {self._certificate_id} allows iot:Subscribe on it",
                retryable=True,
            )
        return CloudError("no_answer", f"AWS IoT did not answer on {topic} within {timeout_s:g} s", retryable=True)


def _lost() -> CloudError:
    return CloudError("connection_lost", "the connection broke off before the answer came", retryable=True)


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
