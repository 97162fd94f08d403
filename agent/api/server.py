"""The local API's server: HTTP/1.1 on the Unix socket `api.sock`. Owner of aiohttp's server side.

The socket listens from the start; aiohttp is imported when the first client connects, so that a camera nobody looks at
never pays for it. The kernel says who a client is (SO_PEERCRED, SO_PEERGROUPS), and that decides what it may do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from agent.api import routes, sockets
from agent.api.redaction import marked, presentable
from agent.errors import AgentError, CloudError, RefusedError
from agent.logs import get_logger

if TYPE_CHECKING:
    from aiohttp import web

log = get_logger("api")

SCHEMA = 1
BODY_LIMIT = 128 * 1024
CONNECTION_LIMIT = 64
"""At once; half of them for one user, and a quarter kept for those who may write."""
HEAD_TIMEOUT_S = 5.0
"""For a request's head, from the connection's start or the last answer; also how long an idle connection is kept."""
BODY_TIMEOUT_S = 10.0
SEND_TIMEOUT_S = 10.0
"""For a client to read an answer, or one line of a stream."""
CHECK_EVERY_S = 10.0

Show = Callable[[routes.Json], routes.Json]
"""What of a reply is shown; `dict` is all of it."""


class Server:
    """The API of `agent` on `socket_file`: `open`, then `run` until cancelled; `run` removes the socket at its end.

    `lock_users` are the names of those who may use what has access `lock`, besides those who may write; `target_users`, by
    the target's name, of those who may use what has access `target`.
    """

    def __init__(
        self,
        agent: routes.Agent,
        socket_file: Path,
        lock_users: Collection[str] = (),
        target_users: Mapping[str, Collection[str]] = MappingProxyType({}),
    ) -> None:
        self._agent = agent
        self._path = socket_file
        self._named = {routes.users_key("target", {"name": name}): frozenset(us) for name, us in target_users.items()}
        """Users by the key of agent.toml that names them."""
        self._named[routes.users_key("lock", {})] = frozenset(lock_users)
        self._listener: sockets.Listener | None = None
        self._http: web.Server | None = None
        self._protocol: Callable[[], asyncio.Protocol]
        self._users: dict[asyncio.BaseProtocol, sockets.Peer] = {}
        """The open connections."""
        self._streams: set[asyncio.Timeout] = set()
        """What ends each stream that is being sent."""

    async def open(self) -> None:
        """Listen. A killed daemon's socket file is replaced. Raises AgentError when a live one has it or it can't be made."""
        self._listener = await asyncio.to_thread(sockets.listen, self._path)

    async def run(self) -> None:
        """Answer clients until cancelled; where the socket's file goes away, it is made anew."""
        assert self._listener, "open() first"
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    accepting = tasks.create_task(self._accept(self._listener.socket))
                    fresh = await self._await_loss(self._listener)
                    accepting.cancel()
                    await asyncio.wait({accepting})
                    self._listener.socket.close()
                    self._listener = fresh
        finally:
            await self._close()

    async def _await_loss(self, listener: sockets.Listener) -> sockets.Listener:
        """Wait until the socket's file is gone; the new listener."""
        said = ""
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            if await asyncio.to_thread(sockets.is_at, self._path, listener):
                continue
            try:
                fresh = await asyncio.to_thread(sockets.listen, self._path)
            except AgentError as error:
                if error.message != said:
                    log.error("the API socket is gone and can't be made anew", code=error.code, error=error.message)
                    said = error.message
                continue
            log.warning("the API socket was gone and is made anew", path=str(self._path))
            return fresh

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = await asyncio.get_running_loop().sock_accept(listener)
            except OSError as error:
                log.warning("can't accept a client", error=str(error))
                await asyncio.sleep(1)
                continue
            await self._greet(client)

    async def _greet(self, client: socket.socket) -> None:
        try:
            if self._http is None:
                await asyncio.to_thread(__import__, "aiohttp.web")
                self._http, self._protocol = self._http_server()
            if not self._has_place(sockets.peer_of(client)):
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

    def _has_place(self, peer: sockets.Peer) -> bool:
        """Whether one more connection of this user may be kept: no user can shut out the others, nor readers the admins."""
        mine = sum(other.uid == peer.uid for other in self._users.values())
        places = CONNECTION_LIMIT if self._may_write(peer) else CONNECTION_LIMIT * 3 // 4
        return mine < CONNECTION_LIMIT // 2 and len(self._users) < places

    async def _close(self) -> None:
        assert self._listener
        await asyncio.to_thread(sockets.remove, self._path, self._listener)
        self._listener.socket.close()
        if self._http:
            self._http.pre_shutdown()
            for stream in self._streams:
                stream.reschedule(asyncio.get_running_loop().time())
            await self._http.shutdown(timeout=1.0)

    def _http_server(self) -> tuple[web.Server, Callable[[], asyncio.Protocol]]:
        from aiohttp import web

        users = self._users

        class Connection(web.RequestHandler):
            """A connection that is counted, whose malformed requests are answered in JSON too, and whose trouble is one line."""

            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                assert isinstance(transport, asyncio.WriteTransport)
                # So that an answer counts as sent only when all of it is: closing would wait for a client that never reads.
                transport.set_write_buffer_limits(0)
                with contextlib.suppress(OSError):
                    users[self] = sockets.peer_of(transport.get_extra_info("socket"))
                super().connection_made(transport)

            def connection_lost(self, exc: BaseException | None) -> None:
                users.pop(self, None)
                super().connection_lost(exc)

            def log_exception(self, *_: object, exc_info: object = None, **__: object) -> None:
                log.error("connection failed", error=repr(exc_info))

            def handle_error(
                self,
                request: web.BaseRequest,  # noqa: ARG002  the signature is aiohttp's
                status: int = 500,
                exc: BaseException | None = None,
                message: str | None = None,
            ) -> web.StreamResponse:
                if status >= 500 and not isinstance(exc, ConnectionError):
                    log.error("request failed", error=repr(exc))
                self.close()
                words = (message or "the request can't be read").strip().splitlines()[0]
                return _error(status, "bad_request" if status < 500 else "internal", words)

        server = web.Server(self._answer, handler_cancellation=True)
        loop = asyncio.get_running_loop()
        return server, lambda: Connection(
            server,
            loop=loop,
            keepalive_timeout=HEAD_TIMEOUT_S,
            tcp_keepalive=False,
            access_log=None,  # type: ignore[arg-type]  # none is wanted
            auto_decompress=False,
        )

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        response = await self._respond(request)
        try:
            async with asyncio.timeout(SEND_TIMEOUT_S):
                await response.prepare(request)
                await response.write_eof()
        except TimeoutError:
            log.warning("a client does not read its answer", path=request.path)
            _abort(request)
        except ConnectionError:
            log.debug("a client went away", path=request.path)
        return response

    async def _respond(self, request: web.BaseRequest) -> web.StreamResponse:
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
        peer = _peer(request)
        admin, user = self._may_write(peer), str(peer.uid)
        if route.access != "read" or route.whole:
            user = await asyncio.to_thread(sockets.user_name, peer.uid)
        if route.access != "read" and not (admin or self._names(user, route.access, values)):
            return _forbidden(routes.users_key(route.access, values), peer)
        body = await _read_body(request)
        if route.access != "read":
            log.info("request", method=request.method, path=request.path, actor=f"local:{user}", pid=peer.pid)
        asked = routes.Request(values, dict(request.query), f"local:{user}", body, admin)
        reply = await route.handler(self._agent, asked)
        show: Show = presentable
        if route.whole:
            show = dict if admin or self._names(user, route.whole, values) else marked
        if isinstance(reply, dict):
            return _json(200, reply, show)
        if isinstance(reply, routes.Text):
            return _text(reply)
        return await self._send_lines(request, reply, show)

    async def _send_lines(
        self, request: web.BaseRequest, lines: AsyncIterator[routes.Json], show: Show
    ) -> web.StreamResponse:
        """Send a line for each object, until there are no more, the client doesn't read them, or the server ends."""
        from aiohttp import web

        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", "Cache-Control": "no-store"})
        await response.prepare(request)
        stream = asyncio.timeout(None)
        try:
            async with stream:
                self._streams.add(stream)
                if request.method != "HEAD":
                    async for line in lines:
                        async with asyncio.timeout(SEND_TIMEOUT_S):
                            await response.write(_encode(line, show) + b"\n")
        except TimeoutError:
            if not stream.expired():
                log.warning("a client does not read its stream", path=request.path)
                _abort(request)
                return response
        finally:
            self._streams.discard(stream)
            close = getattr(lines, "aclose", None)
            if close:
                await close()
        await response.write_eof()
        return response

    def _names(self, user: str, access: routes.Access, values: Mapping[str, str]) -> bool:
        """Whether agent.toml gives this user the access to what the path stands for."""
        return user in self._named.get(routes.users_key(access, values), ())

    def _may_write(self, peer: sockets.Peer) -> bool:
        admins = self._listener.admins if self._listener else None
        return peer.uid in (0, os.getuid()) or (admins is not None and admins in peer.groups)


def _peer(request: web.BaseRequest) -> sockets.Peer:
    connection = request.transport.get_extra_info("socket") if request.transport else None
    if connection is None:
        raise RefusedError("client_gone", "the client has closed the connection")
    return sockets.peer_of(connection)


def _forbidden(users_key: str, peer: sockets.Peer) -> web.Response:
    hint = f"use sudo, or become a member of the group {sockets.ADMINS}"
    if users_key:
        hint += f", or let {users_key:.80} of agent.toml name the user"
    return _error(403, "forbidden", f"uid {peer.uid} may look but not change anything", hint)


def _abort(request: web.BaseRequest) -> None:
    if isinstance(request.transport, asyncio.WriteTransport):
        request.transport.abort()


async def _read_body(request: web.BaseRequest) -> bytes:
    from aiohttp import web

    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise RefusedError("bad_encoding", f"a body can't be encoded as {encoding!r:.40}", "send it as it is")
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


STATUSES = {"bad_request": 400, "forbidden": 403, "body_too_slow": 408, "body_too_large": 413, "bad_encoding": 415}


def _status_of(error: RefusedError) -> int:
    if error.code.startswith(("no_such_", "unknown_")):
        return 404
    return STATUSES.get(error.code, 409)


def _json(status: int, document: routes.Json, show: Show | None = None) -> web.Response:
    from aiohttp import web

    return web.Response(
        status=status,
        body=_encode(document, show),
        headers={"Content-Type": "application/json", "Cache-Control": "no-store"},
    )


def _text(reply: routes.Text) -> web.Response:
    from aiohttp import web

    return web.Response(body=reply.body.encode(errors="replace"), headers={"Content-Type": reply.content_type})


def _error(status: int, code: str, message: str, hint: str = "") -> web.Response:
    return _json(status, {"error": {"code": code, "message": message, "hint": hint}})


def _encode(document: routes.Json, show: Show | None = None) -> bytes:
    """JSON in UTF-8; halves of surrogate pairs, as in file names that are not UTF-8, become JSON's own escapes."""
    text = json.dumps({"schema": SCHEMA, **(show or presentable)(document)}, default=str, ensure_ascii=False)
    return text.encode(errors="backslashreplace")


def _busy() -> bytes:
    body = _encode({"error": {"code": "busy", "message": "too many clients at once", "hint": "try again"}})
    return (
        b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
