"""A TCP proxy in front of the broker that plays a bad network: cut, restored, slow, or a black hole."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import Self

CHUNK = 65536


class Proxy:
    """Forwards `127.0.0.1:port` to `127.0.0.1:target_port`; a port of 0 is chosen at the start and then kept.

    `delay_s` is added to every chunk in each direction and may be changed at any time.
    """

    def __init__(self, target_port: int, *, port: int = 0, delay_s: float = 0.0) -> None:
        self.target_port = target_port
        self.port = port
        self.delay_s = delay_s
        self.accepted = 0
        self._socket: socket.socket | None = None
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()

    async def start(self) -> None:
        """Listen."""
        self._socket = self._bind()
        self.port = self._socket.getsockname()[1]
        await self.restore()

    async def cut(self) -> None:
        """Reset every connection and refuse new ones until `restore`."""
        if self._server is not None:
            self._server.close()
            self._server = None
            self._socket = self._bind()
        await self._drop_connections()

    def blackhole(self) -> None:
        """Swallow everything without closing anything, as a lost mobile link does, until `restore` or `cut`."""
        self._flowing.clear()

    async def restore(self) -> None:
        """Forward again; what a black hole held back is delivered."""
        self._flowing.set()
        if self._server is None:
            held, self._socket = self._socket, None
            self._server = await asyncio.start_server(self._serve, sock=held)

    async def stop(self) -> None:
        """Close everything."""
        if self._server is not None:
            self._server.close()
            self._server = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        await self._drop_connections()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _bind(self) -> socket.socket:
        """A socket that holds the port without listening: connections to it are refused."""
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setblocking(False)
        try:
            bound.bind(("127.0.0.1", self.port))
        except OSError:
            bound.close()
            raise
        return bound

    async def _drop_connections(self) -> None:
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: ends when either side ends it, and is reset when cancelled."""
        task = asyncio.current_task()
        assert task
        self._connections.add(task)
        self.accepted += 1
        ends = [writer]
        pumps: list[asyncio.Task[None]] = []
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
            ends.append(far_writer)
            pumps = [
                asyncio.create_task(self._pump(reader, far_writer)),
                asyncio.create_task(self._pump(far_reader, writer)),
            ]
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        except OSError:
            _reset(writer)
        except asyncio.CancelledError:
            for end in ends:
                _reset(end)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
            for end in ends:
                end.close()
                with contextlib.suppress(OSError):
                    await end.wait_closed()
            self._connections.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(CHUNK):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            await self._flowing.wait()
            writer.write(chunk)
            await writer.drain()


def _reset(end: asyncio.StreamWriter) -> None:
    """Close with RST, as a router does that has forgotten the connection."""
    with contextlib.suppress(OSError):
        end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.transport.abort()
