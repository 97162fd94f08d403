"""The system's D-Bus: connections to it, calls whose errors are FailedErrors, signals in their order, and introspection.

Owner of dbus-fast, which is imported with the first connection.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.errors import FailedError

if TYPE_CHECKING:
    from dbus_fast import Message
    from dbus_fast.aio import MessageBus

BUS = "org.freedesktop.DBus"
BUS_PATH = "/org/freedesktop/DBus"
REPLY_TIMEOUT_S = 25.0

DENIED = (f"{BUS}.Error.AccessDenied", f"{BUS}.Error.InteractiveAuthorizationRequired", f"{BUS}.Error.AuthFailed")
NOBODY = (f"{BUS}.Error.ServiceUnknown", f"{BUS}.Error.NameHasNoOwner")
NO_ANSWER = tuple(f"{BUS}.Error.{name}" for name in ("NoReply", "Disconnected", "TimedOut"))


class BusError(FailedError):
    """A call that did not succeed.

    `code` is `bus_unavailable` (no connection can be made), `bus_lost` (it ended), `no_answer`, `service_absent` (nobody
    has the name and nobody can be started), `permission` (the bus or polkit said no) or `call_failed`. `name` is D-Bus's
    name of the error and `words` what came with it; both are empty when no error was received.
    """

    def __init__(self, code: str, message: str, name: str = "", words: str = "") -> None:
        super().__init__(code, message, "see `systemctl status dbus` and `busctl list`")
        self.name = name
        self.words = words


@dataclass(frozen=True)
class Reply:
    """The answer to a call. Of two messages with the same `sender`, the one with the greater `serial` was sent later."""

    body: list[Any]
    sender: str
    serial: int


@dataclass(frozen=True)
class Signal:
    """A signal; `sender` is a unique name, `serial` counts the sender's messages."""

    sender: str
    path: str
    interface: str
    member: str
    body: list[Any]
    serial: int


class Signals:
    """What came since the listening began, in order and none left out."""

    def __init__(self, lost: asyncio.Task[None]) -> None:
        self._lost = lost
        self._arrived: deque[Signal] = deque()
        self._changed = asyncio.Event()

    def put(self, signal: Signal) -> None:
        self._arrived.append(signal)
        self._changed.set()

    async def next(self) -> Signal:
        """The next signal, awaited without limit. Raises BusError bus_lost when the connection has ended."""
        while not self._arrived:
            if self._lost.done():
                raise BusError("bus_lost", "the connection to D-Bus was lost")
            self._changed.clear()
            waiting = asyncio.create_task(self._changed.wait())
            try:
                await asyncio.wait({waiting, self._lost}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
        return self._arrived.popleft()


class Connection:
    """One connection to the system bus; see `connect`. What it raises is a BusError."""

    def __init__(self, bus: MessageBus) -> None:
        self._bus = bus
        self._lost = asyncio.create_task(_wait_until_lost(bus))

    @property
    def alive(self) -> bool:
        return not self._lost.done()

    async def call(
        self,
        destination: str,
        path: str,
        interface: str,
        member: str,
        signature: str = "",
        body: Sequence[Any] = (),
        *,
        timeout_s: float = REPLY_TIMEOUT_S,
    ) -> Reply:
        """Call a method; variants in the answer's body are dbus-fast's, see `plain`."""
        from dbus_fast import Message, MessageType

        message = Message(
            destination=destination, path=path, interface=interface, member=member, signature=signature, body=list(body)
        )
        try:
            async with asyncio.timeout(timeout_s):
                reply = await self._bus.call(message)
        except TimeoutError:
            raise BusError("no_answer", f"{destination} did not answer {member} within {timeout_s:g} s") from None
        except Exception as error:  # noqa: BLE001  dbus-fast raises OSError, EOFError and errors of its own when the connection ends
            raise BusError("bus_lost", f"the connection to D-Bus was lost: {error or type(error).__name__}") from None
        if reply is None:
            raise BusError("bus_lost", "the connection to D-Bus was closed")
        if reply.message_type is MessageType.ERROR:
            raise _refusal(reply, destination, member)
        return Reply(list(reply.body), reply.sender or "", reply.serial)

    async def get(self, destination: str, path: str, interface: str, name: str) -> Reply:
        """A property; its value is the only element of the body."""
        reply = await self.call(destination, path, f"{BUS}.Properties", "Get", "ss", [interface, name])
        return Reply([plain(reply.body[0])], reply.sender, reply.serial)

    async def match(self, rule: str) -> None:
        """Have the bus deliver the signals of a match rule for as long as the connection lasts."""
        await self.call(BUS, BUS_PATH, BUS, "AddMatch", "s", [rule])

    @contextlib.contextmanager
    def signals(self) -> Iterator[Signals]:
        """The signals that arrive from now on, of every rule that was matched."""
        from dbus_fast import MessageType

        signals = Signals(self._lost)

        def listen(message: Message) -> None:
            if message.message_type is MessageType.SIGNAL:
                signals.put(
                    Signal(
                        message.sender or "",
                        message.path or "",
                        message.interface or "",
                        message.member or "",
                        list(message.body),
                        message.serial,
                    )
                )

        self._bus.add_message_handler(listen)
        try:
            yield signals
        finally:
            self._bus.remove_message_handler(listen)

    async def methods(self, destination: str, path: str, interface: str) -> frozenset[str]:
        """Names of the methods that an object says it has in `interface`; empty when it has no such interface."""
        from dbus_fast import InvalidIntrospectionError
        from dbus_fast.introspection import Node

        reply = await self.call(destination, path, f"{BUS}.Introspectable", "Introspect")
        try:
            node = Node.parse(str(reply.body[0]))
        except (InvalidIntrospectionError, SyntaxError, ValueError) as error:
            raise BusError(
                "call_failed", f"{destination} describes itself in a way that can't be read: {error}"
            ) from None
        return frozenset(
            method.name for described in node.interfaces if described.name == interface for method in described.methods
        )

    async def close(self) -> None:
        self._bus.disconnect()
        await asyncio.wait({self._lost})


async def connect(timeout_s: float = REPLY_TIMEOUT_S) -> Connection:
    """A new connection to the system bus, to be closed by the caller. Raises BusError bus_unavailable."""
    from dbus_fast import BusType
    from dbus_fast.aio import MessageBus

    try:
        async with asyncio.timeout(timeout_s):
            bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    except TimeoutError:
        raise BusError("bus_unavailable", f"the system's D-Bus did not answer within {timeout_s:g} s") from None
    except Exception as error:  # noqa: BLE001  dbus-fast raises OSError, AuthError and its own address errors
        why = str(error) or type(error).__name__
        raise BusError("bus_unavailable", f"the system's D-Bus can't be reached: {why}") from None
    return Connection(bus)


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[Connection]:
    """A connection for a few calls. Raises BusError bus_unavailable."""
    connection = await connect()
    try:
        yield connection
    finally:
        await connection.close()


def plain(value: Any) -> Any:
    """A value without the variants around and, in dictionaries and lists, inside it."""
    from dbus_fast import Variant

    while isinstance(value, Variant):
        value = value.value
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return value


def _refusal(reply: Message, destination: str, member: str) -> BusError:
    name = reply.error_name or ""
    words = str(reply.body[0]) if reply.body else name
    if name in DENIED:
        return BusError("permission", f"{member} of {destination} is not permitted: {words}", name, words)
    if name in NOBODY or name.startswith(f"{BUS}.Error.Spawn."):
        return BusError("service_absent", f"{destination} is not on the D-Bus: {words}", name, words)
    if name in NO_ANSWER:
        return BusError("no_answer", f"{destination} did not answer {member}: {words}", name, words)
    return BusError("call_failed", f"{destination} refused {member}: {words}", name, words)


async def _wait_until_lost(bus: MessageBus) -> None:
    with contextlib.suppress(Exception):
        await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]  # dbus-fast does not annotate it
