"""A scripted MQTT 5 server: it answers as told, misbehaves as told, and records every packet in order.

Stands where AWS IoT stands: TLS with client certificates, sessions, QoS 0 and 1, and services that answer requests.
Replies of services go to the connection that asked, subscribed or not, as in AWS IoT.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import struct
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Self

CONNECT, CONNACK, PUBLISH, PUBACK = 1, 2, 3, 4
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK = 8, 9, 10, 11
PINGREQ, PINGRESP, DISCONNECT = 12, 13, 14

# Properties by number: how they are written. b/h/i: one, two, four bytes; v: variable; s: string; y: bytes; p: pair.
PROPERTIES = {
    0x01: ("payload_format_indicator", "b"),
    0x02: ("message_expiry_interval", "i"),
    0x03: ("content_type", "s"),
    0x08: ("response_topic", "s"),
    0x09: ("correlation_data", "y"),
    0x0B: ("subscription_identifier", "v"),
    0x11: ("session_expiry_interval", "i"),
    0x12: ("assigned_client_identifier", "s"),
    0x13: ("server_keep_alive", "h"),
    0x15: ("authentication_method", "s"),
    0x16: ("authentication_data", "y"),
    0x17: ("request_problem_information", "b"),
    0x18: ("will_delay_interval", "i"),
    0x19: ("request_response_information", "b"),
    0x1A: ("response_information", "s"),
    0x1C: ("server_reference", "s"),
    0x1F: ("reason_string", "s"),
    0x21: ("receive_maximum", "h"),
    0x22: ("topic_alias_maximum", "h"),
    0x23: ("topic_alias", "h"),
    0x24: ("maximum_qos", "b"),
    0x25: ("retain_available", "b"),
    0x26: ("user_property", "p"),
    0x27: ("maximum_packet_size", "i"),
    0x28: ("wildcard_subscription_available", "b"),
    0x29: ("subscription_identifier_available", "b"),
    0x2A: ("shared_subscription_available", "b"),
}
NUMBERS = {name: (number, kind) for number, (name, kind) in PROPERTIES.items()}
LIKE_AWS = {
    "maximum_qos": 1,
    "retain_available": 1,
    "wildcard_subscription_available": 1,
    "subscription_identifier_available": 0,
    "shared_subscription_available": 1,
    "topic_alias_maximum": 8,
    "receive_maximum": 100,
    "maximum_packet_size": 149504,
}


@dataclass
class Packet:
    """A packet from a client. Only the fields of its kind are set."""

    kind: int
    connection: int
    """Number of the connection, counting from 1."""
    at: float = field(default_factory=time.monotonic)
    client_id: str = ""
    username: str | None = None
    clean_start: bool = False
    keep_alive: int = 0
    will: tuple[str, bytes] | None = None
    will_qos: int = 0
    will_retain: bool = False
    topic: str = ""
    payload: bytes = b""
    qos: int = 0
    retain: bool = False
    dup: bool = False
    packet_id: int = 0
    filters: list[str] = field(default_factory=list)
    reason: int = 0
    properties: dict[str, Any] = field(default_factory=dict)

    def json(self) -> Any:
        """The payload as JSON."""
        return json.loads(self.payload)


@dataclass
class Stored:
    """A client's session on the server."""

    subscriptions: set[str] = field(default_factory=set)
    waiting: list[tuple[str, bytes]] = field(default_factory=list)


Service = Callable[[Packet], Iterable[tuple[str, Any]]]
"""From a request to its answers: (topic, bytes or something JSON)."""


class MqttPeer:
    """`async with MqttPeer(authority.server_context()) as peer`: listens on `port` of localhost, by default a free one.

    The public attributes are the script and may be changed at any time.
    """

    def __init__(self, tls: ssl.SSLContext | None, port: int = 0) -> None:
        self._tls = tls
        self.port = port
        self.alpn: list[str | None] = []
        """The protocol that each client and we agreed on by ALPN."""
        self.packets: list[Packet] = []
        self.wills: list[tuple[str, bytes]] = []
        """Last wills that were published."""
        self.connack_reason = 0
        self.connack_reasons: list[int] = []
        """Reasons of the next CONNACKs, before `connack_reason` counts again; -1 closes without an answer."""
        self.connack_gate = asyncio.Event()
        """CONNACKs wait until it is set, which it is from the start."""
        self.connack_gate.set()
        self.early: list[Packet] = []
        """Packets that came before the CONNACK went."""
        self.refuse_wills: dict[str, int] = {}
        """CONNACK reasons by topic of the will; -1 closes without an answer."""
        self.connack_properties: dict[str, Any] = dict(LIKE_AWS)
        self.refuse_filters: dict[str, int] = {}
        """SUBACK reason codes by filter."""
        self.refuse_topics: dict[str, int] = {}
        """PUBACK reason codes by topic."""
        self.disconnect_topics: dict[str, int] = {}
        """Topics whose publish is answered with a DISCONNECT of this reason; -1 closes without a word."""
        self.silent_kinds: set[int] = set()
        """Packet kinds that get no answer: PUBLISH no PUBACK, SUBSCRIBE no SUBACK, …"""
        self.drop_replies = False
        """Services do their work, but their answers get lost."""
        self.take_over = True
        """A second CONNECT with the same client id ends the first with 0x8E."""
        self._services: list[tuple[str, Service]] = []
        self._sessions: dict[str, Stored] = {}
        self._live: dict[int, _Client] = {}
        self._count = 0
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def serve(self, topic_filter: str, service: Service) -> None:
        """Answer publishes that match `topic_filter` with `service`."""
        self._services.append((topic_filter, service))

    def of(self, *kinds: int, topic: str = "") -> list[Packet]:
        """The recorded packets of some kinds, of one topic if given."""
        return [p for p in self.packets if p.kind in kinds and (not topic or p.topic == topic)]

    async def until(self, met: Callable[[], Any], timeout_s: float = 20) -> Any:
        """Wait until `met()` is true, looking again after each packet and each connection that ends; its value."""
        async with asyncio.timeout(timeout_s), self._changed:
            while not (value := met()):
                await self._changed.wait()
        return value

    @property
    def connections(self) -> int:
        """How many connections are open at the moment (after a CONNACK with success)."""
        return len(self._live)

    def forget_sessions(self) -> None:
        """Lose all stored sessions."""
        self._sessions.clear()

    def remember_session(self, client_id: str, filters: Iterable[str], waiting: Iterable[tuple[str, Any]] = ()) -> None:
        """As if `client_id` had been connected before: with subscriptions, and messages sent right after the CONNACK."""
        self._sessions[client_id] = Stored(set(filters), [(topic, _bytes(payload)) for topic, payload in waiting])

    def cut(self) -> None:
        """Reset all connections, without a word."""
        for client in list(self._live.values()):
            client.writer.transport.abort()

    def close(self) -> None:
        """Close all connections orderly, without a word."""
        for client in list(self._live.values()):
            client.writer.close()

    def disconnect(self, reason: int) -> None:
        """Send DISCONNECT with `reason` to all and close."""
        for client in list(self._live.values()):
            client.send(DISCONNECT, 0, bytes((reason, 0)))
            client.writer.close()

    def send(self, topic: str, payload: Any, qos: int = 1) -> int:
        """Publish to the clients that subscribed to a matching filter; to how many. Queued for absent sessions."""
        sent = 0
        for client in self._live.values():
            if any(matches(f, topic) for f in self._sessions[client.id].subscriptions):
                client.publish(topic, _bytes(payload), qos)
                sent += 1
        present = {client.id for client in self._live.values()}
        for name, stored in self._sessions.items():
            if name not in present and any(matches(f, topic) for f in stored.subscriptions):
                stored.waiting.append((topic, _bytes(payload)))
        return sent

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        self._count += 1
        secured = writer.get_extra_info("ssl_object")
        self.alpn.append(secured.selected_alpn_protocol() if secured else None)
        client = _Client(self._count, reader, writer)
        try:
            await self._talk(client)
        except (OSError, EOFError, asyncio.CancelledError, ssl.SSLError):
            pass
        finally:
            self._tasks.discard(task)
            if self._live.pop(client.number, None) and client.will and not client.clean_end:
                self.wills.append(client.will)
            if not client.keep_session:
                self._sessions.pop(client.id, None)
            writer.transport.abort()
            with contextlib.suppress(asyncio.CancelledError):
                await self._notify()

    async def _talk(self, client: _Client) -> None:
        connect = await client.read()
        await self._record(connect)
        following = await self._hold_connack(client)
        if not self._greet(client, connect):
            with contextlib.suppress(OSError):
                await client.writer.drain()
                client.writer.close()
            return
        while True:
            packet, following = await (following or client.read()), None
            answered = packet.kind not in self.silent_kinds
            goes_on = self._handle(client, packet, answered)
            await self._record(packet)
            if not goes_on:
                return

    async def _hold_connack(self, client: _Client) -> asyncio.Task[Packet] | None:
        """Wait for the gate, and see whether the client can wait too; its next packet, if that is being read already."""
        if self.connack_gate.is_set():
            return None
        reading = asyncio.create_task(client.read())
        gate = asyncio.create_task(self.connack_gate.wait())
        try:
            await asyncio.wait({reading, gate}, return_when=asyncio.FIRST_COMPLETED)
            if reading.done() and not reading.exception():
                self.early.append(reading.result())
            await asyncio.wait({gate})
        except asyncio.CancelledError:
            reading.cancel()
            raise
        finally:
            gate.cancel()
        return reading

    def _greet(self, client: _Client, connect: Packet) -> bool:
        reason = self.connack_reasons.pop(0) if self.connack_reasons else self.connack_reason
        if connect.will and not reason:
            reason = self.refuse_wills.get(connect.will[0], 0)
        if reason < 0:
            return False
        client.id, client.will = connect.client_id, connect.will
        client.keep_session = bool(connect.properties.get("session_expiry_interval"))
        if self.take_over and not reason:
            for other in [c for c in self._live.values() if c.id == client.id]:
                other.send(DISCONNECT, 0, bytes((0x8E, 0)))
                other.writer.close()
                other.keep_session = True
        present = not reason and not connect.clean_start and client.id in self._sessions
        if not present:
            self._sessions[client.id] = Stored()
        stored = self._sessions[client.id]
        properties = {} if reason else self.connack_properties
        parts = [bytes((int(present), reason)) + _properties(properties)]
        if reason:
            self._sessions.pop(client.id, None)
        client.send(CONNACK, 0, *parts)
        if not reason:
            self._live[client.number] = client
            for topic, payload in stored.waiting:
                client.publish(topic, payload, 1)
            stored.waiting.clear()
        return not reason

    def _handle(self, client: _Client, packet: Packet, answered: bool) -> bool:
        """Do what the script says; whether the connection goes on."""
        match packet.kind:
            case 3:
                if packet.topic in self.disconnect_topics:
                    if self.disconnect_topics[packet.topic] >= 0:
                        client.send(DISCONNECT, 0, bytes((self.disconnect_topics[packet.topic], 0)))
                    return False
                reason = self.refuse_topics.get(packet.topic, 0)
                if packet.qos and answered:
                    client.send(PUBACK, 0, struct.pack("!HB", packet.packet_id, reason) + b"\0")
                if not reason:
                    self._answer(client, packet)
            case 8:
                codes = [self.refuse_filters.get(name, 1) for name in packet.filters]
                self._sessions[client.id].subscriptions.update(
                    name for name, code in zip(packet.filters, codes, strict=True) if code < 0x80
                )
                if answered:
                    client.send(SUBACK, 0, struct.pack("!HB", packet.packet_id, 0) + bytes(codes))
            case 10:
                self._sessions[client.id].subscriptions.difference_update(packet.filters)
                if answered:
                    client.send(UNSUBACK, 0, struct.pack("!HB", packet.packet_id, 0) + bytes(len(packet.filters)))
            case 12:
                if answered:
                    client.send(PINGRESP, 0)
            case 14:
                client.clean_end = packet.reason == 0
                return False
        return True

    def _answer(self, client: _Client, packet: Packet) -> None:
        for topic_filter, service in self._services:
            if matches(topic_filter, packet.topic):
                for topic, payload in service(packet):
                    if not self.drop_replies:
                        client.publish(topic, _bytes(payload), 1)

    async def _record(self, packet: Packet) -> None:
        self.packets.append(packet)
        await self._notify()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()


class _Client:
    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number, self.reader, self.writer = number, reader, writer
        self.id = ""
        self.will: tuple[str, bytes] | None = None
        self.keep_session = False
        self.clean_end = False
        self._packet_id = 0

    async def read(self) -> Packet:
        first = (await self.reader.readexactly(1))[0]
        length = shift = 0
        while True:
            byte = (await self.reader.readexactly(1))[0]
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        return _decode(first, _Cursor(await self.reader.readexactly(length)), self.number)

    def send(self, kind: int, flags: int, *parts: bytes) -> None:
        body = b"".join(parts)
        if not self.writer.is_closing():
            self.writer.write(bytes((kind << 4 | flags,)) + _variable(len(body)) + body)

    def publish(self, topic: str, payload: bytes, qos: int) -> None:
        self._packet_id = self._packet_id % 65535 + 1
        identifier = struct.pack("!H", self._packet_id) if qos else b""
        self.send(PUBLISH, qos << 1, _string(topic), identifier, b"\0", payload)


class _Cursor:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise EOFError("malformed packet")
        part = self.data[self.at : self.at + count]
        self.at += count
        return part

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "big")

    def binary(self) -> bytes:
        return self.take(self.number(2))

    def string(self) -> str:
        return self.binary().decode()

    def variable(self) -> int:
        value = shift = 0
        while True:
            byte = self.number(1)
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    def rest(self) -> bytes:
        return self.take(len(self.data) - self.at)

    def properties(self) -> dict[str, Any]:
        end = self.variable() + self.at
        found: dict[str, Any] = {}
        while self.at < end:
            name, kind = PROPERTIES[self.variable()]
            found[name] = self._value(kind)
        return found

    def _value(self, kind: str) -> Any:
        match kind:
            case "b":
                return self.number(1)
            case "h":
                return self.number(2)
            case "i":
                return self.number(4)
            case "v":
                return self.variable()
            case "y":
                return self.binary()
            case "p":
                return self.string(), self.string()
            case _:
                return self.string()


def _decode(first: int, cursor: _Cursor, connection: int) -> Packet:
    packet = Packet(first >> 4, connection)
    match packet.kind:
        case 1:
            assert cursor.string() == "MQTT"
            assert cursor.number(1) == 5
            flags = cursor.number(1)
            packet.clean_start = bool(flags & 2)
            packet.keep_alive = cursor.number(2)
            packet.properties = cursor.properties()
            packet.client_id = cursor.string()
            if flags & 4:
                cursor.properties()
                packet.will = cursor.string(), cursor.binary()
                packet.will_qos, packet.will_retain = flags >> 3 & 3, bool(flags & 0x20)
            if flags & 0x80:
                packet.username = cursor.string()
        case 3:
            packet.dup, packet.qos, packet.retain = bool(first & 8), first >> 1 & 3, bool(first & 1)
            packet.topic = cursor.string()
            packet.packet_id = cursor.number(2) if packet.qos else 0
            packet.properties = cursor.properties()
            packet.payload = cursor.rest()
        case 4:
            packet.packet_id = cursor.number(2)
        case 8 | 10:
            packet.packet_id = cursor.number(2)
            packet.properties = cursor.properties()
            while cursor.at < len(cursor.data):
                packet.filters.append(cursor.string())
                if packet.kind == SUBSCRIBE:
                    packet.qos = cursor.number(1) & 3
        case 14 if cursor.data:
            packet.reason = cursor.number(1)
    return packet


def matches(topic_filter: str, topic: str) -> bool:
    """MQTT topic matching, written for this server."""
    wanted, given = topic_filter.split("/"), topic.split("/")
    if wanted[-1] == "#":
        wanted, given = wanted[:-1], given[: len(wanted) - 1]
    return len(wanted) == len(given) and all(w in ("+", g) for w, g in zip(wanted, given, strict=True))


def _bytes(payload: Any) -> bytes:
    return payload if isinstance(payload, bytes) else json.dumps(payload).encode()


def _variable(value: int) -> bytes:
    encoded = bytearray()
    while True:
        value, byte = value >> 7, value & 0x7F
        encoded.append(byte | (0x80 if value else 0))
        if not value:
            return bytes(encoded)


def _string(text: str) -> bytes:
    return struct.pack("!H", len(text.encode())) + text.encode()


def _properties(values: dict[str, Any]) -> bytes:
    sizes = {"b": "!B", "h": "!H", "i": "!I"}
    encoded = b""
    for name, value in values.items():
        number, kind = NUMBERS[name]
        encoded += bytes((number,)) + (struct.pack(sizes[kind], value) if kind in sizes else _string(value))
    return _variable(len(encoded)) + encoded
