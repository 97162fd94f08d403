"""A small HTTP proxy that opens tunnels with CONNECT, asks for credentials, or misbehaves as told."""

from __future__ import annotations

import asyncio
import base64
import contextlib
from typing import Literal, Self


class HttpProxy:
    """`async with HttpProxy() as proxy`: listens on `port` of 127.0.0.1. The public attributes are the script.

    With `credentials` only clients that send them get through. All tunnels lead to `target`, when it is set, whatever
    address was asked for.
    """

    def __init__(self, credentials: tuple[str, str] | None = None) -> None:
        self.credentials = credentials
        self.behaviour: Literal["tunnel", "refuse", "silent", "half", "close", "swallow"] = "tunnel"
        """tunnel; answer 403; never answer; answer without an end; close without an answer; open the tunnel but let nothing through."""
        self.target: tuple[str, int] | None = None
        self.asked: list[tuple[str, bool]] = []
        """For each CONNECT the address asked for, and whether it brought credentials."""
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def url(self, credentials: str = "") -> str:
        """As cloud.proxy_url; `credentials` as `user:password`."""
        return f"http://{credentials + '@' if credentials else ''}127.0.0.1:{self.port}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        try:
            await self._talk(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:  # a client may ask again on the same connection, with credentials
            request, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            address, given = request.split()[1], headers.get("proxy-authorization", "")
            self.asked.append((address, bool(given)))
            if self.behaviour == "close":
                return
            if self.behaviour == "silent":
                await reader.read()
                return
            if self.behaviour == "half":
                writer.write(b"HTTP/1.1 200 ok\r\n")
                await reader.read()
                return
            if self.behaviour == "refuse":
                await self._answer(writer, "403 Forbidden")
            elif self.credentials and given != _basic(*self.credentials):
                await self._answer(writer, "407 Proxy Authentication Required", 'Proxy-Authenticate: Basic realm="p"')
            else:
                await self._answer(writer, "200 Connection Established", length=False)
                break
        if self.behaviour == "swallow":
            await reader.read()
            return
        host, _, port = address.rpartition(":")
        far_reader, far_writer = await asyncio.open_connection(*(self.target or (host, int(port))))
        try:
            await _either(_pump(reader, far_writer), _pump(far_reader, writer))
        finally:
            far_writer.transport.abort()

    @staticmethod
    async def _answer(writer: asyncio.StreamWriter, status: str, *headers: str, length: bool = True) -> None:
        lines = [f"HTTP/1.1 {status}", *headers, *(["Content-Length: 0"] if length else []), "", ""]
        writer.write("\r\n".join(lines).encode())
        await writer.drain()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


async def _either(*pumps) -> None:
    tasks = [asyncio.create_task(pump) for pump in pumps]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
