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
from functools import partial
from pathlib import Path
from typing import Any

from agent.cloud import proxy, topics
from agent.cloud.announcement import Announce, Announcement
from agent.cloud.connection import Connection, Options, facts_of, lost
from agent.cloud.fallback import Route, way
from agent.cloud.offline import (
    REFUSED,
    SUBSCRIBE_UNANSWERED,
    Diagnosis,
    Failure,
    Link,
    Pace,
    diagnose,
    messages_held,
    publish_refused,
    subscriptions_refused,
)
from agent.cloud.outgoing import Outgoing
from agent.cloud.pacing import Pacing, cancel, first_of
from agent.cloud.replies import Rejected, Replies
from agent.cloud.status import Status
from agent.cloud.subscriptions import Handler, Subscriptions
from agent.errors import CloudError
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

    `own` are agent.toml's own settings (default: `cloud`), by which the camera also tries to connect once others have not
    worked for six hours; `unreached_s` is what the property of this name said at the end of the process before.
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
        own: Cloud | None = None,
        unreached_s: float = 0.0,
    ) -> None:
        self._client_id = client_id
        self._route = Route(cloud, own or cloud, unreached_s)
        self._used = cloud
        self._certificate_file = certificate_file
        self._private_key_file = private_key_file
        self._announce = announce
        self._announcement = Announcement(announce)
        self._pacing = Pacing(pace or Pace())
        self._subscriptions = Subscriptions()
        self._on_ready: list[Callable[[], Awaitable[None]]] = []
        self._outgoing = Outgoing()
        self._replies = Replies()
        self._options: Options
        self._connection: Connection | None = None
        self._certificate_id = ""
        self._status = Status()
        self._ready = asyncio.Event()
        self._ready_since: float | None = None
        self._moved = asyncio.Event()

    @property
    def link(self) -> Link:
        """The present state."""
        return self._status.link

    @property
    def cloud(self) -> Cloud:
        """The settings of the present connection, or of the last attempt at one."""
        return self._used

    @property
    def fallback(self) -> str:
        """That the camera goes by agent.toml's own settings, or tries them in turns, and why; normally empty."""
        return told.reason if (told := self._route.told(time.monotonic())) else ""

    @property
    def unreached_s(self) -> float:
        """For how many seconds the cloud has not been reached by the settings in force, to be kept for the next process."""
        return self._route.unreached_s(time.monotonic())

    @property
    def certificate_id(self) -> str:
        """AWS IoT's id of the certificate in use; empty before the first connect."""
        return self._certificate_id

    def on_link(self, callback: Callable[[Link], None]) -> None:
        """Call `callback` on the event loop with every new state; it must not block."""
        self._status.listen(callback)

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

    def connected_with(self, cloud: Cloud) -> bool:
        """Whether there is a usable connection at this moment, and it was made with exactly these settings."""
        return self._connection is not None and self.link.state == "connected" and self._used == cloud

    async def restart_with(self, cloud: Cloud) -> None:
        """Leave the present connection or attempt cleanly and connect with other settings at once; does not wait for that.

        What is in flight fails now (`connection_ended`, `connection_lost`, both retryable). What is begun from now on goes
        over the new connection only, so its answer proves the new settings. No message for the camera is lost. CONNECTs
        stay a second apart. Settings that are asked for already change nothing: no reconnect; while run() does not run they
        are only taken. Certificate files named in `cloud` replace ours.
        """
        if cloud != self._route.cloud:
            await self._move(cloud)

    async def reconnect(self) -> None:
        """The same with the settings as they are, for when the network behind them has changed."""
        await self._move(self._route.cloud)

    async def _move(self, cloud: Cloud) -> None:
        self._route = self._route.to(cloud)
        self._certificate_file = cloud.certificate_file or self._certificate_file
        self._private_key_file = cloud.private_key_file or self._private_key_file
        self._announcement = Announcement(self._announce)
        self._pacing.forget()
        self._outgoing.forget()
        if self.link.state == "stopped":
            return
        self._moved.set()
        if self._connection:
            self._connection.fail()
        self._replies.fail(lost)
        self._unusable()
        self._subscriptions.forget()
        self._status.set("connecting", code="", reason="", hint="", via=way(cloud))

    async def publish(self, topic: str, payload: bytes, *, timeout_s: float = 60) -> None:
        """Send with QoS 1; returns once AWS IoT has taken it.

        Raises CloudError: `offline` (not sent), `connection_lost` (the connection was closed while it was under way),
        `connection_ended` (the same, for a reason that has nothing to do with messages) or
        `no_answer`, which both may have been taken, all retryable;
        `topic_not_valid`, `packet_too_large` (not sent) or the reason of the refusal, such as `not_authorised`.
        """
        topics.check_message(topic, len(payload))
        if (connection := self._connection) is None:
            reason = f": {self.link.reason}" if self.link.reason else ""
            raise CloudError("offline", f"there is no connection to AWS IoT{reason}", self.link.hint, retryable=True)
        code, was_held = await self._outgoing.send(
            connection, self.link.connects, topic, payload, timeout_s, self._certificate_id
        )
        if was_held and self.link.state == "connected":
            self._status.note(**self._degraded())
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
            raise self._subscriptions.unanswered(topic, timeout_s, self._certificate_id) from None

    async def run(self) -> None:
        """Stay connected until cancelled, then disconnect cleanly.

        Raises CloudError when the first attempt can't even begin: no endpoint, unreadable or unusable files.
        """
        if not self._route.cloud.endpoint:
            raise CloudError(
                "not_configured", "cloud.endpoint is not set", "set it in agent.toml to the account's endpoint"
            )
        self._status.set("connecting")
        first = True
        try:
            while True:
                await self._pacing.await_turn()
                self._moved.clear()
                diagnosis = await self._attempt(first=first)
                if diagnosis and not self._moved.is_set():
                    await self._hold_off(diagnosis)
                first = False
        finally:
            if self.link.state != "stopped":
                self._status.set("stopped", reason="the agent was stopped")

    async def _attempt(self, *, first: bool) -> Diagnosis | None:
        """Connect and serve until the connection ends; why it did, None when other settings were asked for."""
        try:
            connection = await self._open()
        except CloudError as error:
            if first:
                self._status.set("stopped", code=error.code, reason=error.message, hint=error.hint)
                raise
            self._pacing.not_begun()
            return Diagnosis(error.code, error.message, error.hint)
        began = time.time()
        failure, lasted_s = await self._try(connection)
        if failure is None or self._moved.is_set():
            return None
        self._announcement.ended(failure)
        self._pacing.failed(failure, lasted_s)
        # A refused handshake is told half a minute late; the clock may have been set right meanwhile.
        at = time.time() if failure.was_connected else began
        facts = await asyncio.to_thread(facts_of, self._options, self._certificate_id, at)
        return diagnose(failure, self._pacing.history, facts)

    async def _open(self) -> Connection:
        cloud = self._route.choose(time.monotonic())
        if cloud != self._used:
            if cloud != self._route.cloud:
                log.warning("agent.toml's own settings are tried", reason=self.fallback, via=way(cloud))
            self._pacing.forget()
            self._announcement = Announcement(self._announce)
        self._used = cloud
        self._status.note(via=way(cloud))
        will = self._announcement.will()
        self._options = Options(self._client_id, cloud, self._certificate_file, self._private_key_file, will)
        connection, self._certificate_id = await asyncio.to_thread(
            Connection.prepare, self._options, self._subscriptions.dispatch, asyncio.get_running_loop()
        )
        return connection

    async def _try(self, connection: Connection) -> tuple[Failure | None, float]:
        """As _use(), unless there is a proxy that opens no way."""
        refusal = await self._refusal(self._used) if self._used.proxy_url else None
        if refusal or self._moved.is_set():
            await connection.close()
            return refusal, 0.0
        return await self._use(connection)

    async def _refusal(self, cloud: Cloud) -> Failure | None:
        """Why the proxy opens no way; None as well when other settings are asked for meanwhile."""
        asking = asyncio.create_task(proxy.refusal(cloud.proxy_url, cloud.endpoint, cloud.port))
        moved = asyncio.create_task(self._moved.wait())
        try:
            await first_of(asking, moved)
            return asking.result() if asking.done() else None
        finally:
            await cancel(asking, moved)

    async def _use(self, connection: Connection) -> tuple[Failure | None, float]:
        """Connect, and serve until the connection ends; why (None: it was left) and how long it stood."""
        moved = asyncio.create_task(self._moved.wait())
        ready: asyncio.Task[None] | None = None
        tasks: list[asyncio.Task[Any]] = [moved]
        connection.ended.add_done_callback(lambda _: self._unusable() if self._connection is connection else None)
        try:
            connection.start()
            await first_of(connection.opened, connection.ended, moved, timeout_s=CONNECT_TIMEOUT_S)
            if self._moved.is_set():  # awscrt would send the DISCONNECT before the CONNACK
                await first_of(connection.opened, connection.ended, timeout_s=self._pacing.pace.between_connects_s)
            self._pacing.sent()  # by now the CONNECT has arrived, if it went at all
            if connection.opened.done() and not connection.ended.done() and not self._moved.is_set():
                self._connection = connection
                ready = asyncio.create_task(self._serve(connection, rejoined=connection.opened.result()))
                tasks += [ready, asyncio.create_task(self._publish_birth(self._announcement))]
                await first_of(connection.ended, moved, ready)
            if self._moved.is_set():
                return None, self._served_s()
            if connection.ended.done():
                return connection.ended.result(), self._served_s()
            if not ready:
                return Failure("CONNECT_UNANSWERED"), 0.0
            error = None if ready.cancelled() else ready.exception()
            log.warning("subscribing failed, the connection is given up", reason=str(error or "cancelled"))
            return Failure(SUBSCRIBE_UNANSWERED, was_connected=True), self._served_s()
        finally:
            self._unusable()
            self._ready_since = None
            self._route.lost(time.monotonic())
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
        """Make missing subscriptions whenever there are some and tell that all is ready, until the connection is over."""
        subscriptions = self._subscriptions
        if not rejoined:
            subscriptions.forget()
        subscriptions.refused.clear()
        self._announcement.connected()
        self._status.set("connecting", session_present=rejoined, connects=self.link.connects + 1)
        log.info("connected", endpoint=self._used.endpoint, via=way(self._used), session_present=rejoined)
        first, again_s = True, SUBSCRIBE_AGAIN_S[0]
        while True:
            accepted_after_all = await subscriptions.make(connection.subscribe)
            if self._connection is not connection:
                return  # the answer came, and then other settings were asked for
            self._route.reached(self._used)
            self._status.set("connected", **self._degraded())
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
        if held := self._outgoing.held():
            return vars(messages_held(held, self._certificate_id))
        if self._subscriptions.refused:
            return vars(subscriptions_refused(self._subscriptions.refused, self._certificate_id))
        return vars(self._route.told(time.monotonic()) or Diagnosis("", "", ""))

    async def _publish_birth(self, announcement: Announcement) -> None:
        await self._ready.wait()
        await announcement.publish_birth(self.publish)

    async def _call_ready(self) -> None:
        for callback in self._on_ready:
            try:
                await callback()
            except CloudError as error:
                log.warning("work after the connect failed", code=error.code, reason=error.message)
            except Exception:
                log.exception("work after the connect failed")

    async def _hold_off(self, diagnosis: Diagnosis) -> None:
        wait = min(self._pacing.wait_s(diagnosis), self._route.left_s(time.monotonic()))
        reason = "; ".join(filter(None, (diagnosis.reason, self.fallback)))
        self._status.set("offline", code=diagnosis.code, reason=reason, hint=diagnosis.hint)
        log.warning(
            "off-line",
            code=diagnosis.code,
            reason=reason,
            hint=diagnosis.hint,
            endpoint=f"{self._used.endpoint}:{self._used.port}",
            via=way(self._used),
            certificate_id=self._certificate_id,
            next_s=round(wait, 1),
        )
        await self._pacing.hold_off(wait, self._moved, clock_counts=diagnosis.code in ("clock", "tls", "certificate"))
