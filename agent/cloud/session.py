"""The one MQTT 5 session with AWS IoT: it reconnects, subscribes and asks again by itself.

Every connection is a fresh awscrt client that never reconnects on its own, so that the pace of CONNECTs, changed
certificates and hold-offs are decided here. Nothing is queued while off-line: what must not be lost waits in the outbox.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from agent.cloud import proxy, topics
from agent.cloud.announcement import Announce, Announcement
from agent.cloud.connection import Connection, Options, facts_of, lost
from agent.cloud.offline import (
    REFUSED,
    SUBSCRIBE_UNANSWERED,
    Diagnosis,
    Failure,
    History,
    Link,
    Pace,
    blames_a_message,
    diagnose,
    messages_held,
    publish_refused,
    subscriptions_refused,
    wait_s,
)
from agent.cloud.replies import Rejected, Replies
from agent.cloud.subscriptions import Handler, Subscriptions
from agent.cloud.suspects import Suspects
from agent.errors import CloudError
from agent.host import clock
from agent.logs import get_logger
from agent.settings import Cloud

__all__ = ["Link", "Rejected", "Session"]

LONGEST_REQUEST_S = 30.0
SUBSCRIBE_AGAIN_S = (5.0, 300.0)
CONNECT_TIMEOUT_S = 90.0
"""More than TCP, TLS and the CONNACK may take together; awscrt has no limit of its own for an HTTP proxy's silence."""

log = get_logger("cloud")


class Session:
    """Keeps the camera connected from run() until that is cancelled.

    `announce(nonce, alive)` gives topic and payload of the last will (alive False) and of the birth message, which is
    published once per connection when all subscriptions are answered; both carry the nonce of their connection.
    """

    def __init__(
        self,
        *,
        client_id: str,
        cloud: Cloud,
        certificate_file: Path,
        private_key_file: Path,
        announce: Announce | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._client_id = client_id
        self._cloud = cloud
        self._certificate_file = certificate_file
        self._private_key_file = private_key_file
        self._announce = announce
        self._announcement = Announcement(announce)
        self._pace = pace or Pace()
        self._subscriptions = Subscriptions()
        self._on_ready: list[Callable[[], Awaitable[None]]] = []
        self._on_link: list[Callable[[Link], None]] = []
        self._suspects = Suspects()
        self._replies = Replies()
        self._options: Options
        self._connection: Connection | None = None
        self._certificate_id = ""
        self._history = History()
        self._connect_at = float("-inf")
        self._link = Link(since=time.time(), since_monotonic=time.monotonic())
        self._ready = asyncio.Event()
        self._ready_since: float | None = None
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
        before the first on_ready. Raises CloudError: `filter_not_valid`, `too_many_subscriptions`.
        """
        if self._subscriptions.declare(topic_filter, handler):
            self._ready.clear()

    def subscribe_replies(self, *topic_filters: str) -> None:
        """Declare permanent subscriptions whose messages answer request()."""
        for topic_filter in topic_filters:
            if topic_filter not in self._subscriptions:
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
        self._announcement = Announcement(self._announce)
        self._subscriptions.forget()
        self._ready.clear()
        if self._link.state != "stopped":
            self._set_link("connecting")
        self._restart.set()

    async def publish(self, topic: str, payload: bytes, *, timeout_s: float = 60) -> None:
        """Send with QoS 1; returns once AWS IoT has taken it.

        Raises CloudError: `offline` (not sent), `connection_lost` (the connection was closed while it was under way),
        `connection_ended` (the same, for a reason that has nothing to do with messages) or
        `no_answer`, which both may have been taken, all retryable;
        `topic_not_valid`, `packet_too_large` (not sent) or the reason of the refusal, such as `not_authorised`.
        """
        topics.check_message(topic, len(payload))
        connection, connects = self._connection, self._link.connects
        if connection is None:
            raise self._offline_error()
        held_s = self._suspects.wait_s(topic, time.monotonic())
        if held_s:
            held = messages_held([topic], self._certificate_id)
            raise CloudError(held.code, f"{held.reason}, next in {held_s:.0f} s", held.hint, retryable=True)
        try:
            async with asyncio.timeout(timeout_s):
                code = await connection.publish(topic, payload)
        except TimeoutError:
            raise CloudError(
                "no_answer", f"AWS IoT did not acknowledge a message to {topic} within {timeout_s:g} s", retryable=True
            ) from None
        except CloudError as error:
            if error.code != "connection_lost":
                raise
            if not (connection.ended.done() and blames_a_message(connection.ended.result())):
                raise CloudError("connection_ended", error.message, retryable=True) from None
            self._suspects.lost(topic, connects, time.monotonic())
            raise
        if self._suspects.answered(topic):
            self._set_link(self._link.state, **self._degraded())
        if code >= REFUSED:
            raise publish_refused(topic, code, self._certificate_id)

    async def request(self, topic: str, body: Mapping[str, Any], *, timeout_s: float = 20) -> dict[str, Any]:
        """Publish `body` with a clientToken to `topic` and return the JSON object of `<topic>/accepted`.

        The answers' filter must have been declared with subscribe_replies(). Waits at most 30 s. Raises Rejected when
        the service refuses, CloudError when it can't be asked or does not answer in time.
        """
        timeout_s = min(timeout_s, LONGEST_REQUEST_S)
        publish = partial(self.publish, timeout_s=LONGEST_REQUEST_S)
        try:
            return await self._replies.ask(publish, topic, body, timeout_s)
        except TimeoutError:
            raise self._unanswered(topic, timeout_s) from None

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
                    self._history = replace(self._history, attempts=self._history.attempts + 1)
                    await self._hold_off(Diagnosis(error.code, error.message, error.hint))
                    continue
                first = False
                began = time.time()
                failure, lasted_s = await self._try(connection)
                if failure is None:
                    self._history = History()
                    continue
                self._history = self._history.after(failure, time.monotonic(), lasted_s, self._pace)
                # A refused handshake is told half a minute late; the clock may have been set right meanwhile.
                at = time.time() if failure.was_connected else began
                facts = await asyncio.to_thread(facts_of, self._options, self._certificate_id, at)
                await self._hold_off(diagnose(failure, self._history, facts))
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
        will = self._announcement.will()
        self._options = Options(self._client_id, self._cloud, self._certificate_file, self._private_key_file, will)
        connection, self._certificate_id = await asyncio.to_thread(
            Connection.prepare, self._options, self._subscriptions.dispatch, asyncio.get_running_loop()
        )
        return connection

    async def _try(self, connection: Connection) -> tuple[Failure | None, float]:
        """As _use(), unless there is a proxy that opens no way."""
        cloud = self._cloud
        refusal = await proxy.refusal(cloud.proxy_url, cloud.endpoint, cloud.port) if cloud.proxy_url else None
        if refusal:
            await connection.close()
            return refusal, 0.0
        failure, lasted_s = await self._use(connection)
        if failure:
            self._announcement.ended(failure)
        return failure, lasted_s

    async def _use(self, connection: Connection) -> tuple[Failure | None, float]:
        """Connect, and serve until the connection ends; why (None: a restart was asked for) and how long it stood."""
        restart = asyncio.create_task(self._restart.wait())
        ready: asyncio.Task[None] | None = None
        tasks: list[asyncio.Task[Any]] = [restart]
        connection.ended.add_done_callback(lambda _: self._unusable() if self._connection is connection else None)
        try:
            connection.start()
            await _first_of(connection.opened, connection.ended, restart, timeout_s=CONNECT_TIMEOUT_S)
            self._connect_at = time.monotonic()  # by now the CONNECT has arrived, if it was sent at all
            if connection.opened.done() and not connection.ended.done():
                self._connection = connection
                ready = asyncio.create_task(self._serve(connection, rejoined=connection.opened.result()))
                tasks += [ready, asyncio.create_task(self._publish_birth())]
                await _first_of(connection.ended, restart, ready)
            if connection.ended.done():
                return connection.ended.result(), self._served_s()
            if restart.done():
                return None, self._served_s()
            if not ready:
                return Failure("CONNECT_UNANSWERED"), 0.0
            error = None if ready.cancelled() else ready.exception()
            log.warning("subscribing failed, the connection is given up", reason=str(error or "cancelled"))
            return Failure(SUBSCRIBE_UNANSWERED, was_connected=True), self._served_s()
        finally:
            self._unusable()
            self._ready_since = None
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            connection.fail()
            self._replies.fail(lost)
            await connection.close()

    def _served_s(self) -> float:
        """For how long the present connection has been of use, in seconds."""
        return 0.0 if self._ready_since is None else time.monotonic() - self._ready_since

    def _unusable(self) -> None:
        self._connection = None
        self._ready.clear()

    async def _serve(self, connection: Connection, *, rejoined: bool) -> None:
        """Make missing subscriptions whenever there are some and tell that all is ready; ends by an exception only."""
        subscriptions = self._subscriptions
        if not rejoined:
            subscriptions.forget()
        subscriptions.refused.clear()
        self._announcement.connected()
        self._set_link("connecting", session_present=rejoined, connects=self._link.connects + 1)
        log.info("connected", endpoint=self._cloud.endpoint, port=self._cloud.port, session_present=rejoined)
        first, again_s = True, SUBSCRIBE_AGAIN_S[0]
        while True:
            accepted_after_all = await subscriptions.make(connection.subscribe)
            self._set_link("connected", **self._degraded())
            if not subscriptions.declared.is_set():
                self._ready.set()
                self._ready_since = self._ready_since or time.monotonic()
            if first or accepted_after_all:
                await self._call_ready()
            first = False
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(again_s * random.uniform(0.5, 1) if subscriptions.refused else None):  # noqa: S311
                    await subscriptions.declared.wait()
                continue
            again_s = min(again_s * 2, SUBSCRIBE_AGAIN_S[1])

    def _degraded(self) -> dict[str, str]:
        """What does not work although there is a connection, for the link."""
        if held := self._suspects.held(time.monotonic()):
            return vars(messages_held(held, self._certificate_id))
        return vars(subscriptions_refused(self._subscriptions.refused, self._certificate_id))

    async def _publish_birth(self) -> None:
        await self._ready.wait()
        await self._announcement.publish_birth(self.publish)

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
            "off-line",
            code=diagnosis.code,
            reason=diagnosis.reason,
            hint=diagnosis.hint,
            endpoint=f"{self._cloud.endpoint}:{self._cloud.port}",
            certificate_id=self._certificate_id,
            next_s=round(wait, 1),
        )
        restart = asyncio.create_task(self._restart.wait())
        clock_set = asyncio.create_task(clock.jump()) if diagnosis.code in ("clock", "tls", "certificate") else restart
        try:
            await _first_of(restart, clock_set, timeout_s=wait)
            if restart.done():
                self._history = History()
        finally:
            for task in (restart, clock_set):
                task.cancel()
            await asyncio.wait({restart, clock_set})

    def _set_link(self, state: Literal["connected", "connecting", "offline", "stopped"], **changes: Any) -> None:
        goes_on = (state == "connected") == (self._link.state == "connected")
        begins = {} if goes_on else {"since": time.time(), "since_monotonic": time.monotonic()}
        cleared = {} if state == "connecting" and goes_on else {"code": "", "reason": "", "hint": ""}
        link = replace(self._link, **{**cleared, **begins, **changes}, state=state)
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
        refused = self._subscriptions.refused_for(topics.accepted(topic))
        if refused:
            return CloudError(
                "subscription_refused",
                f"no answer on {topic}: AWS IoT refused the subscription to {refused}",
                f"check that the policy of certificate {self._certificate_id} allows iot:Subscribe on it",
                retryable=True,
            )
        return CloudError("no_answer", f"AWS IoT did not answer on {topic} within {timeout_s:g} s", retryable=True)


async def _first_of(*futures: asyncio.Future[Any], timeout_s: float | None = None) -> None:
    await asyncio.wait(futures, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
