"""Asking the daemon: the little of HTTP/1.1 that its Unix socket needs, because http.client doubles the start-up time."""
# pathlib would cost some milliseconds at every start; os.path is there already.
# ruff: noqa: PTH110, PTH118, PTH120, PTH123

from __future__ import annotations

import io
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from agent.ctl.exits import DAEMON_DOWN, ERROR, FORBIDDEN, NO_SUCH_THING, TIMED_OUT, Failure

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Json = dict[str, Any]

DEFAULT_CONFIG_FILE = "/etc/camera-agent/agent.toml"
DEFAULT_SOCKET_FILE = "/run/camera-agent/api.sock"
ANSWER_LIMIT = 64 * 2**20
MALFORMED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What comes of using an answer, or a kept status, that isn't built as it should be."""


def config_file(option: str | None) -> str:
    """agent.toml as the option, else CAMERA_AGENT_CONFIG, else the usual place, names it."""
    return option or os.environ.get("CAMERA_AGENT_CONFIG") or DEFAULT_CONFIG_FILE


def socket_file(option: str | None, config_option: str | None) -> str:
    """The daemon's socket: the option, AGENTCTL_SOCKET, `runtime_dir` of agent.toml, or the usual place.

    A configuration named by its option goes before the environment's socket. Raises Failure when it can't be used.
    """
    chosen = option or (None if config_option else os.environ.get("AGENTCTL_SOCKET"))
    if chosen:
        return chosen
    path = config_file(config_option)
    try:
        with open(path, "rb") as file:
            text = file.read().decode()
    except (OSError, UnicodeDecodeError) as error:
        if config_option:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise Failure(ERROR, "settings_unreadable", f"{path}: {reason}", "check --config") from None
        return DEFAULT_SOCKET_FILE
    if "runtime_dir" not in text:
        return DEFAULT_SOCKET_FILE
    import tomllib

    try:
        folder = tomllib.loads(text).get("paths", {}).get("runtime_dir")
    except (tomllib.TOMLDecodeError, AttributeError) as error:
        if config_option:
            raise Failure(ERROR, "settings_syntax", f"{path}: not valid TOML: {error}", "mend it") from None
        return DEFAULT_SOCKET_FILE
    return os.path.join(folder, "api.sock") if isinstance(folder, str) else DEFAULT_SOCKET_FILE


class Client:
    """The daemon at `path`; every call is a connection of its own and raises Failure when there is no good answer.

    The whole of an answer, or the next object of a stream, must be there within `timeout_s`.
    """

    def __init__(self, path: str, timeout_s: float = 10.0) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self.answered = False
        """Whether an object has been handed out."""

    def get(self, target: str, **parts: type) -> Json:
        """The JSON object at `target`, a path with its query, which must have these parts."""
        return self._document(self._ask("GET", target), parts)

    def post(self, target: str, body: bytes = b"", **parts: type) -> Json:
        """The JSON object that a POST with this body answers, which must have these parts."""
        return self._document(self._ask("POST", target, body), parts)

    def text(self, target: str) -> str:
        """The text at `target`."""
        return self._ask("GET", target).decode("utf-8", "replace")

    def lines(self, target: str) -> Iterator[Json]:
        """The JSON objects of a stream, as they arrive, until the daemon ends it."""
        try:
            with Connection(self.path, self.timeout_s) as connection:
                rest = b""
                for piece in _exchange(connection, "GET", target):
                    *whole, rest = (rest + piece).split(b"\n")
                    if len(rest) > ANSWER_LIMIT:
                        raise garbled("the answer is too large")
                    for line in whole:
                        yield self._document(line, {})
                        connection.set_deadline()
        except OSError as error:
            raise self._explain(error) from None

    def last_known(self) -> Json | None:
        """What the daemon wrote down before it went: `at` in epoch seconds, `age_s`, and `status` as it was."""
        path = os.path.join(os.path.dirname(self.path), "status.json")
        try:
            with open(path, "rb") as file:
                status = json.loads(file.read())
                at = os.fstat(file.fileno()).st_mtime
        except (OSError, ValueError, RecursionError):
            return None
        return {"at": at, "age_s": max(0.0, time.time() - at), "status": status} if isinstance(status, dict) else None

    def _ask(self, method: str, target: str, body: bytes = b"") -> bytes:
        try:
            with Connection(self.path, self.timeout_s) as connection:
                return b"".join(_exchange(connection, method, target, body))
        except OSError as error:
            raise self._explain(error) from None

    def _document(self, data: bytes, parts: dict[str, type]) -> Json:
        try:
            document = json.loads(data)
        except ValueError:
            raise garbled("the answer is not JSON") from None
        except RecursionError:
            raise garbled("the answer is nested too deep") from None
        if not isinstance(document, dict):
            raise garbled("the answer is not an object")
        for name, kind in parts.items():
            if not isinstance(document.get(name), kind):
                raise garbled(f"its {name!r} is missing or of the wrong type")
        self.answered = True
        return document

    def _explain(self, error: OSError) -> Failure:
        """An error of the socket in words, with what to do."""
        if isinstance(error, (FileNotFoundError, ConnectionError)):
            where = "" if self.path == DEFAULT_SOCKET_FILE else f" (nothing answers on {self.path})"
            hint = "camera-agent run --config FILE"
            if os.path.exists("/run/systemd/system"):
                hint = "systemctl start camera-agent; why it stopped: systemctl status camera-agent"
            return Failure(DAEMON_DOWN, "daemon_down", f"camera-agent is not running{where}", hint)
        if isinstance(error, PermissionError):
            hint = "sudo usermod -aG camera-operators $USER, then log in again; or use sudo"
            return Failure(FORBIDDEN, "forbidden", f"you may not use {self.path}", hint)
        if isinstance(error, (TimeoutError, BlockingIOError)):
            return Failure(
                TIMED_OUT,
                "no_answer",
                f"camera-agent runs but did not answer within {self.timeout_s:g} s",
                "see what it is doing: journalctl -u camera-agent -n 50; then systemctl restart camera-agent",
            )
        return Failure(ERROR, "socket_failed", f"{self.path}: {error.strerror or error}", "check --socket")


class Connection(io.RawIOBase):
    """A connection whose connecting, sending and reading must all be done before one deadline. Raises OSError."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.set_deadline()
        try:
            self._socket.settimeout(timeout_s)
            self._socket.connect(path)
        except BaseException:
            self.close()
            raise

    def set_deadline(self) -> None:
        """Put the deadline `timeout_s` from now."""
        self._deadline = time.monotonic() + self._timeout_s

    def sendall(self, data: bytes) -> None:
        """Send all of `data`."""
        self._socket.settimeout(self._left())
        self._socket.sendall(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        self._socket.settimeout(self._left())
        return self._socket.recv_into(cast(bytearray, buffer))

    def close(self) -> None:
        self._socket.close()
        super().close()

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def _exchange(connection: Connection, method: str, target: str, body: bytes = b"") -> Iterator[bytes]:
    """Send a request and give the pieces of a good answer's body. Raises Failure for any other answer, and OSError."""
    length = f"Content-Length: {len(body)}\r\n" if body else ""
    connection.sendall(
        f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{length}\r\n".encode() + body
    )
    with io.BufferedReader(connection) as answer:
        first = answer.readline(65536)
        if not first:
            raise ConnectionResetError
        parts = first.split(None, 2)
        if len(parts) < 2 or not parts[0].startswith(b"HTTP/1.") or not parts[1].isdigit():
            raise garbled("it did not answer in HTTP")
        status = int(parts[1])
        headers = {}
        while (line := answer.readline(65536)) not in (b"\r\n", b"\n"):
            if not line:
                raise garbled("the answer ends in its headers")
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip()
        content = _body(answer, headers)
        if status == 200:
            yield from content
        else:
            raise _refusal(status, b"".join(content))


def _body(answer: BinaryIO, headers: dict[bytes, bytes]) -> Iterator[bytes]:
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        while size := _number(answer.readline(1024).split(b";")[0], 16):
            yield _exactly(answer, size)
            answer.readline(1024)
    elif b"content-length" in headers:
        yield _exactly(answer, _number(headers[b"content-length"], 10))
    else:
        yield answer.read(ANSWER_LIMIT)


def _number(text: bytes, base: int) -> int:
    try:
        number = int(text, base)
    except ValueError:
        raise garbled("the answer is cut off") from None
    if not 0 <= number <= ANSWER_LIMIT:
        raise garbled("the answer is too large")
    return number


def _exactly(answer: BinaryIO, size: int) -> bytes:
    data = answer.read(size)
    if len(data) < size:
        raise garbled("the answer is cut off")
    return data


def _refusal(status: int, body: bytes) -> Failure:
    exit_code = {403: FORBIDDEN, 404: NO_SUCH_THING, 408: TIMED_OUT, 504: TIMED_OUT}.get(status, ERROR)
    try:
        error = json.loads(body)["error"]
        return Failure(exit_code, str(error["code"]), str(error["message"]), str(error.get("hint") or ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Failure(exit_code, "garbled_answer", f"camera-agent answered with status {status} and no reason")


def garbled(reason: str) -> Failure:
    """An answer that makes no sense."""
    return Failure(
        ERROR, "garbled_answer", f"camera-agent's answer can't be understood: {reason}", "is it the agent's socket?"
    )
