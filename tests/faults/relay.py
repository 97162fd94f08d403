"""A TCP relay that is the bad network: it cuts at an exact byte, swallows, delays, slows down and refuses, as told.

Stands between the agent and the cloud's port and knows nothing of what it carries. `up` is from the agent to the cloud.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Self

Direction = Literal["up", "down"]
DIRECTIONS: tuple[Direction, Direction] = ("up", "down")
CHUNK = 4096


@dataclass
class Crossing:
    """One connection through the relay."""

    at: float = field(default_factory=time.monotonic)
    """When it was accepted, monotonic seconds."""
    passed: dict[Direction, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    """Bytes handed on so far."""
    cut: tuple[Direction, int] | None = None
    """The planned cut that ended it."""
    over: bool = False


class Relay:
    """`async with Relay(target_port) as relay`: listens on `port`; the public attributes are the script.

    They may be changed at any time and count at once for connections that are open. With `host` it listens elsewhere
    than on 127.0.0.1.
    """

    def __init__(self, target_port: int, host: str = "127.0.0.1") -> None:
        self.host, self.port = host, 0
        self.target_port = target_port
        self.crossings: list[Crossing] = []
        self.blackhole: set[Direction] = set()
        """Directions in which nothing passes. What is held arrives when the direction is taken out again."""
        self.delay_s: dict[Direction, float] = {"up": 0.0, "down": 0.0}
        """How much later everything arrives; the rate is not touched."""
        self.throttle_bytes_per_s: float | None = None
        """The rate of each direction of each connection."""
        self.refuse = False
        """Reset each connection as soon as it is accepted."""
        self._cuts: list[tuple[Direction, int]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: dict[int, tuple[asyncio.StreamWriter, ...]] = {}
        self._server: asyncio.Server | None = None
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> Self:
        await self.plug()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.unplug()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def plug(self) -> None:
        """Listen; after unplug() on the same port as before."""
        self._server = await asyncio.start_server(self._accept, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def unplug(self) -> None:
        """Nobody listens any more, so that connecting is refused, and all connections are reset."""
        if self._server:
            self._server.close()
            self._server = None
        self.cut()

    def cut_after(self, n_bytes: int, direction: Direction) -> None:
        """Reset the next connection, or the one after those already planned, exactly after `n_bytes` in `direction`.

        Later bytes of that direction never arrive. Zero: before the first byte.
        """
        self._cuts.append((direction, n_bytes))

    @property
    def cuts_left(self) -> int:
        """Planned cuts that no connection has been given yet."""
        return len(self._cuts)

    def cut(self) -> None:
        """Reset all connections now."""
        for number in list(self._writers):
            self._reset(number)

    async def until(self, met: Callable[[], Any], timeout_s: float = 20) -> Any:
        """Wait until `met()` is true, looking again whenever a connection comes or ends; its value."""
        async with asyncio.timeout(timeout_s), self._changed:
            while not (value := met()):
                await self._changed.wait()
        return value

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        crossing, number = Crossing(), len(self.crossings)
        self.crossings.append(crossing)
        self._writers[number] = (writer,)
        planned = self._cuts.pop(0) if self._cuts and not self.refuse else None
        try:
            await self._notify()
            if not self.refuse:
                await self._carry(number, crossing, reader, writer, planned)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            crossing.over = True
            self._tasks.discard(task)
            self._reset(number)
            with contextlib.suppress(asyncio.CancelledError):
                await self._notify()

    async def _carry(
        self,
        number: int,
        crossing: Crossing,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        planned: tuple[Direction, int] | None,
    ) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
        self._writers[number] = (writer, far_writer)
        ways = {
            asyncio.create_task(self._pass("up", crossing, reader, far_writer, planned)),
            asyncio.create_task(self._pass("down", crossing, far_reader, writer, planned)),
        }
        try:
            # A cut, or a reset of either side, ends both ways at once; an orderly end of one lets the other finish.
            await asyncio.wait(ways, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.wait(ways)
            for way in ways:
                if not way.cancelled():
                    way.exception()

    async def _pass(
        self,
        direction: Direction,
        crossing: Crossing,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        planned: tuple[Direction, int] | None,
    ) -> None:
        """Hand on until the end of the stream. Raises ConnectionResetError at the planned cut."""
        last = planned[1] if planned and planned[0] == direction else None
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        reading = asyncio.create_task(self._read(direction, reader, under_way))
        try:
            while True:
                if last is not None and crossing.passed[direction] >= last:
                    crossing.cut = planned
                    raise ConnectionResetError
                due, data = await under_way.get()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                await self._open(direction)
                if not data:
                    writer.write_eof()
                    return
                if last is not None:
                    data = data[: last - crossing.passed[direction]]
                if self.throttle_bytes_per_s:
                    await asyncio.sleep(len(data) / self.throttle_bytes_per_s)
                writer.write(data)
                crossing.passed[direction] += len(data)
                await writer.drain()
        finally:
            reading.cancel()
            await asyncio.wait({reading})
            if not reading.cancelled():
                reading.exception()

    async def _read(
        self, direction: Direction, reader: asyncio.StreamReader, under_way: asyncio.Queue[tuple[float, bytes]]
    ) -> None:
        while True:
            try:
                data = await reader.read(CHUNK)
            except OSError:
                data = b""
            await under_way.put((time.monotonic() + self.delay_s[direction], data))
            if not data:
                return

    async def _open(self, direction: Direction) -> None:
        while direction in self.blackhole:
            await asyncio.sleep(0.02)

    def _reset(self, number: int) -> None:
        for writer in self._writers.pop(number, ()):
            connection: socket.socket | None = writer.get_extra_info("socket")
            if connection is not None and not writer.transport.is_closing():
                with contextlib.suppress(OSError):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()
