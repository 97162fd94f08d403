"""Asks the HTTP proxy for a way to the endpoint just before awscrt does, and tells why there is none.

awscrt waits without limit for a proxy that does not answer, and names every refusal alike.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import socket
from urllib.parse import unquote, urlsplit

from agent.cloud.offline import Failure
from agent.host.threads import leavable

REACH_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 30.0


async def refusal(url: str, host: str, port: int) -> Failure | None:
    """Why the proxy at `url` opens no tunnel to host:port, as PROXY_…; None when it does."""
    parts = urlsplit(url)
    try:
        async with asyncio.timeout(REACH_TIMEOUT_S):
            found = await leavable(
                socket.getaddrinfo, parts.hostname, parts.port or 80, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
            )
    except (OSError, UnicodeError, TimeoutError):
        return Failure("PROXY_DNS")
    try:
        async with asyncio.timeout(REACH_TIMEOUT_S):
            reader, writer = await _connect([str(address[0]) for *_, address in found], parts.port or 80)
    except (OSError, TimeoutError):
        return Failure("PROXY_UNREACHABLE")
    line = b""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            writer.write(_request(url, host, port))
            line = await reader.readline()
            while (await reader.readline()).strip():  # awscrt would wait for the end of the answer without limit
                pass
    except TimeoutError:
        return Failure("PROXY_SILENT")
    except (OSError, ValueError):
        line = b""
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    status = re.match(rb"HTTP/1\.[01] (\d{3})\b", line)
    if not status:
        return Failure("PROXY_NOT_HTTP" if line else "PROXY_CLOSED")
    return None if status[1].startswith(b"2") else Failure(f"PROXY_STATUS_{status[1].decode()}")


async def _connect(addresses: list[str], port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to the first address that answers. Raises OSError, TimeoutError."""
    last: OSError = OSError("no address")
    for address in dict.fromkeys(addresses):
        try:
            return await asyncio.open_connection(address, port)
        except OSError as error:
            last = error
    raise last


def _request(url: str, host: str, port: int) -> bytes:
    lines = [f"CONNECT {host}:{port} HTTP/1.1", f"Host: {host}:{port}"]
    parts = urlsplit(url)
    if parts.username is not None:
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        lines.append("Proxy-Authorization: Basic " + base64.b64encode(credentials.encode()).decode())
    return "\r\n".join([*lines, "", ""]).encode()
