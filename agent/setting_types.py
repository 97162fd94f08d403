"""Types of settings that are more than a string or a path: each is checked, and says how to write it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, StringConstraints

from agent.timetable import parse_window

MAX_PORT = 65535
MAX_SOCKET_PATH = 107
"""Bytes that Linux allows for the path of a socket."""

ThingName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9:_-]{1,128}$")]
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]


def _absolute(path: Path) -> Path:
    if "\0" in str(path):
        raise ValueError("has a NUL character, which no path can have")
    if not path.is_absolute():
        raise ValueError("give an absolute path, one that begins with /")
    return path


def _startable(command: list[str]) -> list[str]:
    if not command[0] or any("\0" in word for word in command):
        raise ValueError("give the program and its arguments, without NUL characters")
    return command


def _room_for_socket(folder: Path) -> Path:
    length = len(os.fsencode(folder / "api.sock"))
    if length > MAX_SOCKET_PATH:
        raise ValueError(f"too long: the path of api.sock in it has {length} bytes, at most {MAX_SOCKET_PATH} work")
    return folder


def _window(text: str) -> str:
    parse_window(text)
    return text


def _time_zone(name: str) -> str:
    if name != "UTC":
        from zoneinfo import ZoneInfo

        try:
            ZoneInfo(name)
        except (OSError, ValueError, KeyError):
            raise ValueError(
                "give a name of the time zone database (Debian's package tzdata), such as Europe/Madrid"
            ) from None
    return name


def _host_name(name: str) -> str:
    if not re.fullmatch(r"[^\s/\x00]{0,253}", name) or re.fullmatch(r"[^:]+:[0-9]*", name):
        raise ValueError("give the host name only, such as abc-ats.iot.eu-central-1.amazonaws.com")
    return name


def _proxy(url: str) -> str:
    if not url:
        return url
    form = ValueError(
        "give http://[user:password@]host[:port]; write signs like @ : / # [ ] in a password as %40, %3A, …"
    )
    try:
        parts = urlsplit(url)
        name, port = parts.hostname or "", parts.port or 80
        name.encode("idna")
    except (ValueError, UnicodeError):
        raise form from None
    plain = re.fullmatch(
        r"http://([^\s/@:#?\[\]]+(:[^\s/@#?\[\]]*)?@)?([A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(:[0-9]+)?/?", url
    )
    if not plain or not name or port > MAX_PORT:
        raise form
    return url


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
SocketDir = Annotated[AbsolutePath, AfterValidator(_room_for_socket)]
ProxyUrl = Annotated[str, AfterValidator(_proxy)]
HostName = Annotated[str, AfterValidator(_host_name)]
Command = Annotated[list[str], Field(min_length=1), AfterValidator(_startable)]
UnitName = Annotated[str, StringConstraints(pattern=r"^[^\s/\x00]{0,255}$")]
PackageName = Annotated[str, StringConstraints(pattern=r"^([a-z0-9][a-z0-9+.-]{1,127})?$")]
Window = Annotated[str, AfterValidator(_window)]
TimeZone = Annotated[str, AfterValidator(_time_zone)]
Labels = Annotated[
    dict[
        Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")],
        Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,128}$")],
    ],
    Field(max_length=16),
]
