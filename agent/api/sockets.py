"""The API's Unix socket: making its file, noticing that it's gone, and who is at the other end by the kernel's word.

Everything but `peer_of` blocks.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from agent.errors import AgentError
from agent.logs import get_logger

log = get_logger("api")

OPERATORS = "camera-operators"
ADMINS = "camera-admins"
BACKLOG = 64
SO_PEERGROUPS = 59
"""socket(7), since Linux 4.13; Python has no name for it."""


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a connection, by the kernel's word."""

    pid: int
    uid: int
    groups: frozenset[int]


@dataclass(frozen=True)
class Listener:
    """A listening socket, its file's inode, and the gid of the admins' group where there is one."""

    socket: socket.socket
    inode: int
    admins: int | None


def peer_of(connection: socket.socket) -> Peer:
    """Who is at the other end, as it was when they connected. Raises OSError."""
    pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    groups: tuple[int, ...] = ()
    with contextlib.suppress(OSError):  # more groups than fit: only the primary one counts
        groups = tuple(
            value for (value,) in struct.iter_unpack("I", connection.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, 1024))
        )
    return Peer(pid, uid, frozenset((gid, *groups)))


def listen(path: Path) -> Listener:
    """Listen at `path`. A dead daemon's socket is replaced. Raises AgentError when a live one has it or it can't be made."""
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
        listener.listen(BACKLOG)
        return Listener(listener, path.stat().st_ino, _gid(ADMINS))
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


def is_at(path: Path, listener: Listener) -> bool:
    """Whether clients still find `listener` there. Its inode can't be another file's while it is open."""
    with contextlib.suppress(OSError):
        return path.lstat().st_ino == listener.inode
    return False


def remove(path: Path, listener: Listener) -> None:
    """Remove the file, if it is still the listener's own; call it before closing the listener."""
    with contextlib.suppress(OSError):
        if is_at(path, listener):
            path.unlink()


def _gid(group: str) -> int | None:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        return None


def user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
