"""One network connection of the session: an awscrt client that is started once, and the operations in flight on it. Owner of awscrt.

awscrt calls back on its own native thread; every callback here only hands over to the event loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from awscrt import http, io, mqtt5
from awscrt.exceptions import AwsCrtError

from agent.cloud import identity
from agent.cloud.fallback import proxy_address
from agent.cloud.offline import PUBLISH_UNANSWERED, Facts, Failure
from agent.errors import CloudError
from agent.host.clock import clock_synchronised
from agent.logs import get_logger
from agent.settings import Cloud

ALPN_PORT = 443
ALPN = "x-amzn-mqtt-ca"
IN_FLIGHT = 20
PUBLISHES_PER_S, BURST = 80, 10
"""AWS IoT drops what is above 100 a second, both directions together; awscrt's own pacing lets 128 through at first."""
ACK_TIMEOUT_S = 30
STOP_TIMEOUT_S = 10.0
ABANDON_TIMEOUT_S = 1.0
MAX_PACKET_BYTES = 149_504
"""What AWS IoT sends and takes at most."""
UNANSWERED = 3
"""Publishes in a row without an acknowledgement until the connection is given up."""
MAX_ABANDONED = 100
"""Native clients that never stopped, each with its socket, until the process had better start anew."""
TCP_TIMEOUT_S = 10
NEVER_BY_ITSELF_MS = 86_400_000
CONNECTION_OVER = ("OFFLINE_QUEUE_POLICY", "USER_REQUESTED_STOP", "CLIENT_TERMINATED", "SOCKET", "HANGUP")
"""In awscrt's errors of operations that the end of the connection took along."""

log = get_logger("cloud")


@dataclass(frozen=True)
class Options:
    """All that a connection depends on."""

    client_id: str
    cloud: Cloud
    certificate_file: Path
    private_key_file: Path
    will: tuple[str, bytes] | None


_abandoned: set[asyncio.Event] = set()


def abandoned() -> int:
    """How many native clients have been let go of and have not ended yet."""
    return len(_abandoned)


class Connection:
    """From start() to close(). `opened` gives whether the session was resumed, `ended` why the connection is over."""

    def __init__(self, make_client: Callable[[Connection], Any], loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.opened: asyncio.Future[bool] = loop.create_future()
        self.ended: asyncio.Future[Failure] = loop.create_future()
        self._started = False
        self._stopped = asyncio.Event()
        self._attempted = self._stopped_natively = False
        self._slots = asyncio.Semaphore(IN_FLIGHT)
        self._pending: set[asyncio.Future[Any]] = set()
        self._over = False
        self._unanswered = 0
        self._next_publish = 0.0
        self._client = make_client(self)

    @classmethod
    def prepare(
        cls, options: Options, on_message: Callable[[str, bytes], None], loop: asyncio.AbstractEventLoop
    ) -> tuple[Connection, str]:
        """A connection ready to start, and its certificate's id. Blocking: reads files. Raises CloudError."""
        certificate, tls = _tls_context(options)

        def make_client(connection: Connection) -> Any:
            return mqtt5.Client(_client_options(options, tls, connection, on_message))

        return cls(make_client, loop), identity.certificate_id(certificate)

    def hand_over(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run `function` on the event loop; harmless when that is closed already."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            pass

    def start(self) -> None:
        """Send the CONNECT."""
        self._started = True
        self._client.start()

    async def close(self) -> None:
        """End with a DISCONNECT, so that the will is not sent, and let go of the client; takes at most 10 s.

        A failed TLS handshake keeps the client busy for up to 30 s; nobody needs to wait for that. One that is stopped
        before it has begun never tells its end.
        """
        if not self._started:
            self._client = None
            return
        self._client.stop(mqtt5.DisconnectPacket())
        limit = STOP_TIMEOUT_S if self.opened.done() else ABANDON_TIMEOUT_S
        try:
            async with asyncio.timeout(limit):
                await self._stopped.wait()
        except TimeoutError:
            log.debug("the MQTT client did not stop in time", timeout_s=limit)
            if self._attempted:
                _abandoned.add(self._stopped)
            if self._stopped_natively:  # just now, on its own thread
                _abandoned.discard(self._stopped)
        finally:
            self._client = None
        if len(_abandoned) > MAX_ABANDONED:
            raise RuntimeError(f"{MAX_ABANDONED} MQTT clients did not stop, the process must start anew")

    async def publish(self, topic: str, payload: bytes) -> int:
        """Send with QoS 1; the reason code of the PUBACK. Raises CloudError when the connection ends before."""
        packet = mqtt5.PublishPacket(topic=topic, payload=payload, qos=mqtt5.QoS.AT_LEAST_ONCE)
        try:
            completion = await self._operate(lambda: self._client.publish(packet), self._await_turn)
        except CloudError as error:
            if error.code == "no_answer":
                self._unanswered += 1
                if self._unanswered >= UNANSWERED:
                    self._end(Failure(PUBLISH_UNANSWERED, was_connected=True))
            raise
        self._unanswered = 0
        return int(completion.puback.reason_code)

    async def subscribe(self, topic_filters: Sequence[str]) -> list[int]:
        """Subscribe with QoS 1; one reason code for each filter. Raises CloudError when no SUBACK comes."""
        packet = mqtt5.SubscribePacket([mqtt5.Subscription(name, mqtt5.QoS.AT_LEAST_ONCE) for name in topic_filters])
        suback = await self._operate(lambda: self._client.subscribe(packet))
        return [int(code) for code in suback.reason_codes]

    def fail(self) -> None:
        """The connection is over: end all that waits for it."""
        self._over = True
        for future in self._pending:
            if not future.done():
                future.set_exception(lost())
            self._slots.release()
        self._pending.clear()

    async def _await_turn(self) -> None:
        """Spread publishes out over time."""
        now = self._loop.time()
        self._next_publish = max(self._next_publish, now - BURST / PUBLISHES_PER_S) + 1 / PUBLISHES_PER_S
        if self._next_publish > now:
            await asyncio.sleep(self._next_publish - now)

    async def _operate(
        self,
        begin: Callable[[], concurrent.futures.Future[Any]],
        turn: Callable[[], Awaitable[None]] | None = None,
    ) -> Any:
        """Run a client operation. Its slot stays taken until awscrt is done with it, even when the caller gives up."""
        await self._slots.acquire()
        try:
            if turn and not self._over:
                await turn()
        except asyncio.CancelledError:
            self._slots.release()
            raise
        if self._over:
            self._slots.release()
            raise CloudError("offline", "the connection to AWS IoT ended before the message was sent", retryable=True)
        outcome: asyncio.Future[Any] = self._loop.create_future()
        try:
            operation = begin()
        except BaseException as error:
            self._slots.release()
            if isinstance(error, (AwsCrtError, RuntimeError)):
                raise CloudError("message_not_valid", f"the message can't be sent: {error}") from error
            raise
        self._pending.add(outcome)
        operation.add_done_callback(lambda done: self.hand_over(self._finish, outcome, done))
        try:
            return await outcome
        except AwsCrtError as error:
            raise _operation_error(error) from error

    def _finish(self, outcome: asyncio.Future[Any], operation: concurrent.futures.Future[Any]) -> None:
        if outcome not in self._pending:
            return
        self._pending.discard(outcome)
        self._slots.release()
        if outcome.done():
            return
        error = operation.exception()
        if error is not None:
            outcome.set_exception(error)
        else:
            outcome.set_result(operation.result())

    def on_attempt(self, _: Any) -> None:
        """Native thread: it begins to connect."""
        self._attempted = True

    def on_up(self, data: Any) -> None:
        """Native thread: CONNACK with success."""
        self.hand_over(_resolve, self.opened, bool(data.negotiated_settings.rejoined_session))

    def on_refused(self, data: Any) -> None:
        """Native thread: no connection came about."""
        code = data.connack_packet.reason_code if data.connack_packet else None
        failure = Failure(_error_name(data.exception), None if code is None else int(code))
        self.hand_over(self._end, failure)

    def on_down(self, data: Any) -> None:
        """Native thread: the connection ended."""
        code = data.disconnect_packet.reason_code if data.disconnect_packet else None
        failure = Failure(_error_name(data.exception), None if code is None else int(code), was_connected=True)
        self.hand_over(self._end, failure)

    def on_stopped(self, _: Any) -> None:
        """Native thread: nothing will happen any more."""
        self._stopped_natively = True
        _abandoned.discard(self._stopped)
        self.hand_over(self._stopped.set)

    def _end(self, failure: Failure) -> None:
        _resolve(self.ended, failure)
        self.fail()


def lost() -> CloudError:
    """For what was handed over and may have arrived."""
    return CloudError("connection_lost", "the connection broke off before the answer came", retryable=True)


def _resolve(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)


def _operation_error(error: AwsCrtError) -> CloudError:
    if any(word in error.name for word in CONNECTION_OVER):
        return lost()
    if "VALIDATION" in error.name:
        return CloudError("message_not_valid", f"the message can't be sent: {error.message}")
    return CloudError("no_answer", f"AWS IoT did not answer: {error.name}", retryable=True)


def _error_name(error: BaseException | None) -> str:
    return str(getattr(error, "name", "") or type(error).__name__)


@cache
def _bootstrap() -> Any:
    """The process's one native event-loop thread and resolver."""
    group = io.EventLoopGroup(1)
    return io.ClientBootstrap(group, io.DefaultHostResolver(group))


def _tls_context(options: Options) -> tuple[bytes, Any]:
    cloud = options.cloud
    authority = _read(cloud.ca_file, "cloud.ca_file")
    certificate = _read(options.certificate_file, "the device certificate")
    key = _read(options.private_key_file, "the private key")
    tls = io.TlsContextOptions.create_client_with_mtls(certificate, key)
    tls.override_default_trust_store(authority)
    tls.min_tls_ver = io.TlsVersion.TLSv1_2
    if cloud.port == ALPN_PORT:
        tls.alpn_list = [ALPN]
    try:
        return certificate, io.ClientTlsContext(tls)
    except (AwsCrtError, RuntimeError) as error:
        raise CloudError(
            "certificate",
            f"the certificate, its private key or ca_file can't be used: {error}",
            f"check {options.certificate_file}, {options.private_key_file} and {cloud.ca_file}; the first two must be a pair",
        ) from error


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CloudError(
            "certificate", f"{what} can't be read: {path}: {error.strerror}", "make it a PEM file the agent may read"
        ) from error


def _proxy(url: str) -> Any:
    if not url:
        return None
    parts = urlsplit(url)
    authenticated = parts.username is not None
    return http.HttpProxyOptions(
        host_name=parts.hostname,
        port=parts.port or 80,
        auth_type=http.HttpProxyAuthenticationType.Basic if authenticated else http.HttpProxyAuthenticationType.Nothing,
        auth_username=unquote(parts.username or "") if authenticated else None,
        auth_password=unquote(parts.password or "") if authenticated else None,
        connection_type=http.HttpProxyConnectionType.Tunneling,
    )


def _socket_options() -> Any:
    """With TCP's own keep-alive, so that no socket to a vanished peer stays open for ever."""
    options = io.SocketOptions()
    options.connect_timeout_ms = TCP_TIMEOUT_S * 1000
    options.keep_alive = True
    options.keep_alive_interval_secs = options.keep_alive_timeout_secs = 75
    options.keep_alive_max_probes = 3
    return options


def _client_options(
    options: Options, tls: Any, connection: Connection, on_message: Callable[[str, bytes], None]
) -> Any:
    cloud = options.cloud

    def on_publish(data: Any) -> None:
        packet = data.publish_packet
        connection.hand_over(on_message, packet.topic, bytes(packet.payload or b""))

    will = None
    if options.will:
        topic, payload = options.will
        will = mqtt5.PublishPacket(topic=topic, payload=payload, qos=mqtt5.QoS.AT_LEAST_ONCE)
    return mqtt5.ClientOptions(
        host_name=cloud.endpoint,
        port=cloud.port,
        bootstrap=_bootstrap(),
        socket_options=_socket_options(),
        tls_ctx=tls,
        http_proxy_options=_proxy(cloud.proxy_url),
        connect_options=mqtt5.ConnectPacket(
            client_id=options.client_id,
            keep_alive_interval_sec=cloud.keep_alive_s,
            session_expiry_interval_sec=cloud.session_expiry_s,
            maximum_packet_size=MAX_PACKET_BYTES,
            will=will,
        ),
        session_behavior=mqtt5.ClientSessionBehaviorType.REJOIN_ALWAYS
        if cloud.session_expiry_s
        else mqtt5.ClientSessionBehaviorType.CLEAN,
        offline_queue_behavior=mqtt5.ClientOperationQueueBehaviorType.FAIL_ALL_ON_DISCONNECT,
        extended_validation_and_flow_control_options=mqtt5.ExtendedValidationAndFlowControlOptions.AWS_IOT_CORE_DEFAULTS,
        retry_jitter_mode=mqtt5.ExponentialBackoffJitterMode.NONE,
        min_reconnect_delay_ms=NEVER_BY_ITSELF_MS,
        max_reconnect_delay_ms=NEVER_BY_ITSELF_MS,
        ping_timeout_ms=min(30_000, cloud.keep_alive_s * 500),
        connack_timeout_ms=20_000,
        ack_timeout_sec=ACK_TIMEOUT_S,
        on_publish_callback_fn=on_publish,
        on_lifecycle_event_attempting_connect_fn=connection.on_attempt,
        on_lifecycle_event_stopped_fn=connection.on_stopped,
        on_lifecycle_event_connection_success_fn=connection.on_up,
        on_lifecycle_event_connection_failure_fn=connection.on_refused,
        on_lifecycle_event_disconnection_fn=connection.on_down,
        disable_metrics=True,
    )


def facts_of(options: Options, certificate_id: str, now: float) -> Facts:
    """What diagnose() may want to know of an attempt that began at `now`, epoch seconds. Blocking; loads cryptography."""
    starts = until = None
    with contextlib.suppress(CloudError):
        certificate = identity.read_certificate(options.certificate_file)
        starts, until = certificate.not_before, certificate.not_after
    return Facts(
        endpoint=options.cloud.endpoint,
        port=options.cloud.port,
        client_id=options.client_id,
        certificate_id=certificate_id,
        certificate_from=starts,
        certificate_until=until,
        clock_synchronised=clock_synchronised(),
        proxy=proxy_address(options.cloud.proxy_url),
        now=now,
    )
