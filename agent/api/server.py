"""The local API's server: HTTP/1.1 on the Unix socket `api.sock`. Owner of aiohttp's server side.

The socket listens from the start; aiohttp is imported when the first client connects, so that a camera nobody looks at
never pays for it. The kernel says who a client is (SO_PEERCRED, SO_PEERGROUPS), and that decides what it may do.
"""

from __future__ import annotations

import asyncio
import contextlib
import grp
import json
import math
import os
import pwd
import socket
import stat
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.api import routes
from agent.errors import AgentError, CloudError, RefusedError
from agent.logs import get_logger, redact

if TYPE_CHECKING:
    from aiohttp import web

log = get_logger("api")

SCHEMA = 1
OPERATORS = "camera-operators"
ADMINS = "camera-admins"
BODY_LIMIT = 64 * 1024
CONNECTION_LIMIT = 64
BODY_TIMEOUT_S = 10.0
SO_PEERGROUPS = 59
"""socket(7), since Linux 4.13; Python has no name for it."""


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a connection, by the kernel's word."""

    pid: int
    uid: int
    groups: frozenset[int]


class Server:
    """The API of `agent` on `socket_file`: `open`, then `run` until cancelled; `run` removes the socket at its end."""

    def __init__(self, agent: routes.Agent, socket_file: Path) -> None:
        self._agent = agent
        self._path = socket_file
        self._listener: socket.socket | None = None
        self._inode = 0
        self._admins: int | None = None
        self._http: web.Server | None = None
        self._protocol: Callable[[], asyncio.Protocol]

    async def open(self) -> None:
        """Listen. A killed daemon's socket file is replaced. Raises AgentError when a live one has it or it can't be made."""
        self._listener, self._inode, self._admins = await asyncio.to_thread(_listen, self._path)

    async def run(self) -> None:
        """Answer clients until cancelled."""
        assert self._listener, "open() first"
        loop = asyncio.get_running_loop()
        try:
            while True:
                try:
                    client, _ = await loop.sock_accept(self._listener)
                except OSError as error:
                    log.warning("can't accept a client", error=str(error))
                    await asyncio.sleep(1)
                    continue
                await self._greet(client)
        finally:
            await self._close()

    async def _greet(self, client: socket.socket) -> None:
        try:
            if self._http is None:
                await asyncio.to_thread(__import__, "aiohttp.web")
                self._http, self._protocol = self._http_server()
            if len(self._http.connections) >= CONNECTION_LIMIT:
                client.setblocking(False)
                with contextlib.suppress(OSError):
                    client.send(_busy())
                client.close()
                return
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, client)
        except OSError as error:
            client.close()
            log.debug("a client went away", error=str(error))
        except BaseException:
            client.close()
            raise

    async def _close(self) -> None:
        assert self._listener
        self._listener.close()
        if self._http:
            self._http.pre_shutdown()
            await self._http.shutdown(timeout=1.0)
        await asyncio.to_thread(_remove_own, self._path, self._inode)

    def _http_server(self) -> tuple[web.Server, Callable[[], asyncio.Protocol]]:
        from aiohttp import web

        class Connection(web.RequestHandler):
            """A connection whose malformed requests are answered in JSON too."""

            def handle_error(
                self,
                request: web.BaseRequest,  # noqa: ARG002  the signature is aiohttp's
                status: int = 500,
                exc: BaseException | None = None,
                message: str | None = None,
            ) -> web.StreamResponse:
                if status >= 500:
                    log.error("request failed", error=repr(exc))
                self.close()
                words = (message or "the request can't be read").strip().splitlines()[0]
                return _error(status, "bad_request" if status < 500 else "internal", words)

        server = web.Server(self._answer, handler_cancellation=True)
        loop = asyncio.get_running_loop()
        return server, lambda: Connection(server, loop=loop, keepalive_timeout=30, tcp_keepalive=False, access_log=None)  # type: ignore[arg-type]  # none is wanted

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await self._route(request)
        except RefusedError as error:
            return _error(_status_of(error), error.code, error.message, error.hint)
        except CloudError as error:
            return _error(503, error.code, error.message, error.hint)
        except AgentError as error:
            log.warning("request failed", path=request.path, code=error.code, error=error.message)
            return _error(500, error.code, error.message, error.hint)
        except ConnectionError:
            raise
        except Exception as error:  # noqa: BLE001  one broken answer must not end the others
            # In a thread, because a traceback reads source files.
            await asyncio.to_thread(log.error, "request failed", path=request.path, exc_info=error)
            return _error(500, "internal", "the agent could not answer", "its log has the details: agentctl logs")

    async def _route(self, request: web.BaseRequest) -> web.StreamResponse:
        method = "GET" if request.method == "HEAD" else request.method
        route, values, methods = routes.match(method, request.rel_url.raw_path)
        if route is None:
            if methods:
                refusal = _error(405, "bad_method", f"{request.path} takes {', '.join(methods)}, not {request.method}")
                refusal.headers["Allow"] = ", ".join(methods)
                return refusal
            raise RefusedError("no_such_path", f"there is no {request.path}")
        peer = peer_of(request.transport)
        if route.access == "write" and not self._may_write(peer):
            return _error(
                403,
                "forbidden",
                f"uid {peer.uid} may look but not change anything",
                f"use sudo, or become a member of the group {ADMINS}",
            )
        await _read_body(request)
        actor = f"local:{peer.uid}"
        if route.access == "write":
            actor = f"local:{await asyncio.to_thread(_user_name, peer.uid)}"
            log.info("request", method=request.method, path=request.path, actor=actor, pid=peer.pid)
        reply = await route.handler(self._agent, routes.Request(values, dict(request.query), actor))
        if isinstance(reply, dict):
            return _json(200, reply)
        if isinstance(reply, routes.Text):
            return _text(reply)
        return await _send_lines(request, reply)

    def _may_write(self, peer: Peer) -> bool:
        return peer.uid in (0, os.getuid()) or (self._admins is not None and self._admins in peer.groups)


def peer_of(transport: asyncio.BaseTransport | None) -> Peer:
    """Who is at the other end, as it was when they connected. Raises RefusedError when they are gone."""
    connection = transport.get_extra_info("socket") if transport else None
    if connection is None:
        raise RefusedError("client_gone", "the client has closed the connection")
    pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    groups: tuple[int, ...] = ()
    with contextlib.suppress(OSError):  # more groups than fit: only the primary one counts
        groups = tuple(
            value for (value,) in struct.iter_unpack("I", connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024))
        )
    return Peer(pid, uid, frozenset((gid, *groups)))


def _listen(path: Path) -> tuple[socket.socket, int, int | None]:
    """The listening socket, its file's inode, and the gid of the admins' group where there is one. Blocking."""
    _make_way(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.fchmod(listener.fileno(), 0o600)  # the file is born with it, so that nobody slips in before the next lines
        listener.bind(str(path))
        operators = _gid(OPERATORS)
        if operators is not None:
            try:
                os.chown(path, -1, operators)
            except PermissionError:
                log.warning("can't give the API socket to its group", group=OPERATORS, path=str(path))
        path.chmod(0o660)
        listener.setblocking(False)
        listener.listen(CONNECTION_LIMIT)
        return listener, path.stat().st_ino, _gid(ADMINS)
    except OSError as error:
        listener.close()
        raise AgentError(
            "api_socket_failed", f"{path}: {error.strerror or error}", "check [paths] runtime_dir"
        ) from error


def _make_way(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise AgentError("api_socket_failed", f"{path} is there and is not a socket", "remove it")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # its queue is full: somebody listens
        except OSError as error:
            raise AgentError("api_socket_failed", f"{path}: {error.strerror}", "check its owner and mode") from error
    raise AgentError(
        "already_running",
        f"another camera-agent already answers on {path}",
        "stop it, or give this one another [paths] runtime_dir",
    )


def _remove_own(path: Path, inode: int) -> None:
    with contextlib.suppress(OSError):
        if path.lstat().st_ino == inode:
            path.unlink()


def _gid(group: str) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


async def _read_body(request: web.BaseRequest) -> bytes:
    from aiohttp import web

    too_large = RefusedError("body_too_large", f"the body may have {BODY_LIMIT} bytes at most")
    if (request.content_length or 0) > BODY_LIMIT:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.content.iter_any():
                body += chunk
                if len(body) > BODY_LIMIT:
                    raise too_large
    except TimeoutError:
        raise RefusedError("body_too_slow", f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None
    except web.RequestPayloadError as error:
        raise RefusedError("bad_request", f"the body can't be read: {error}") from None
    return bytes(body)


async def _send_lines(request: web.BaseRequest, lines: AsyncIterator[routes.Json]) -> web.StreamResponse:
    from aiohttp import web

    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
    await response.prepare(request)
    try:
        if request.method != "HEAD":
            async for line in lines:
                await response.write(_encode(line) + b"\n")
    finally:
        close = getattr(lines, "aclose", None)
        if close:
            await close()
    await response.write_eof()
    return response


def _status_of(error: RefusedError) -> int:
    if error.code.startswith(("no_such_", "unknown_")):
        return 404
    return {"bad_request": 400, "body_too_large": 413, "body_too_slow": 408, "forbidden": 403}.get(error.code, 409)


def _json(status: int, document: routes.Json) -> web.Response:
    from aiohttp import web

    return web.Response(
        status=status,
        body=_encode(document),
        headers={"Content-Type": "application/json", "Cache-Control": "no-store"},
    )


def _text(reply: routes.Text) -> web.Response:
    from aiohttp import web

    return web.Response(body=reply.body.encode(), headers={"Content-Type": reply.content_type})


def _error(status: int, code: str, message: str, hint: str = "") -> web.Response:
    return _json(status, {"error": {"code": code, "message": message, "hint": hint}})


def _encode(document: routes.Json) -> bytes:
    return json.dumps({"schema": SCHEMA, **_presentable(document)}, default=str, ensure_ascii=False).encode()


def _presentable(value: Any) -> Any:
    """`value` without secrets, and with null for the numbers that JSON doesn't have."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: _presentable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_presentable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _busy() -> bytes:
    body = _encode({"error": {"code": "busy", "message": "too many clients at once", "hint": "try again"}})
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
