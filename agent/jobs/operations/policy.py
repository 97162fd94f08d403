"""The camera's policy on steps: which programs they may start, and as whom. Nobody is run as somebody else because a look-up failed.

Everything here blocks: call it in a thread. It raises RefusedError.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agent.errors import RefusedError
from agent.host.processes import User
from agent.settings import Jobs

CAPABILITIES = {"CAP_KILL": 5, "CAP_SETGID": 6, "CAP_SETUID": 7}
"""What it takes to start a program as another user, and to end it. The numbers are the kernel's."""
UNIT_HINT = 'give the agent\'s unit the drop-in of docs/jobs.md, "Steps as another user", or leave runAsUser empty'
MAX_LINKS = 40


def command(policy: Jobs, action: Mapping[str, Any]) -> list[str]:
    """The words of a step's command line: a handler with the user and its arguments, or a command where they are allowed."""
    where = f"step {action['name']!r}"
    if action["type"] == "runHandler":
        return [str(_handler(policy.handler_dir, action, where)), action["run_as_user"], *action["input"]["args"]]
    if policy.commands != "allow":
        raise RefusedError(
            "commands_denied",
            f"{where}: runCommand is not allowed on this camera",
            'use a handler, or set jobs.commands = "allow" in agent.toml',
        )
    words = split_command(action["input"]["command"])
    if not words[0]:
        raise RefusedError("bad_document", f"{where}: the command names no program", "mend the job document")
    return words


def split_command(text: str) -> list[str]:
    r"""The words of a `runCommand`: separated by commas, `\,` is a comma, blanks around a word are dropped."""
    return [word.replace("\\,", ",").strip() for word in re.split(r"(?<!\\),", text)]


def user(policy: Jobs, name: str) -> User | None:
    """Whom a step runs as; None is the agent's own user, which needs no permission."""
    if not name:
        return None
    try:
        found = User.named(name)
    except (KeyError, ValueError):
        raise RefusedError(
            "unknown_user", f"runAsUser: there is no user {name!r} on this camera", "create it, or name another"
        ) from None
    except OSError as error:
        raise RefusedError(
            "user_lookup_failed",
            f"runAsUser: {name!r} can't be looked up: {error}",
            "try `getent passwd` on the camera",
        ) from None
    if found.uid == os.geteuid():
        return None
    if name not in policy.run_as:
        raise RefusedError(
            "user_denied", f"runAsUser: {name} is not allowed on this camera", "add it to jobs.run_as in agent.toml"
        )
    if found.uid == 0 and "root" not in policy.run_as:
        raise RefusedError(
            "user_denied",
            f"runAsUser: {name} is root by another name, and root is not allowed on this camera",
            "add root to jobs.run_as in agent.toml",
        )
    if missing := _missing_capabilities():
        raise RefusedError(
            "user_unavailable",
            f"runAsUser: the agent can't become {name}, or can't end what it starts as {name}: it has not {missing}",
            UNIT_HINT,
        )
    return found


def _missing_capabilities() -> str:
    """The names of those that we don't have; all when nobody knows."""
    try:
        status = Path("/proc/self/status").read_bytes()
    except OSError:
        status = b""
    found = re.search(rb"^CapEff:\s*([0-9a-f]+)$", status, re.MULTILINE)
    effective = int(found[1], 16) if found else 0
    return " ".join(name for name, number in CAPABILITIES.items() if not effective >> number & 1)


def _handler(folder: Path, action: Mapping[str, Any], where: str) -> Path:
    """The handler's file, when nobody but root and the agent could have put it there."""
    name, path = action["input"]["handler"], action["input"]["path"]
    if path not in ("", "default") and Path(path) != folder:
        raise RefusedError(
            "handler_denied", f"{where}: handlers are taken from {folder} only", 'use path "default" or none'
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RefusedError(
            "handler_denied", f"{where}: {name!r} is not the name of a handler", "name a file of the handler folder"
        )
    handler: Path = folder / name
    try:
        way = list(_way(handler))
    except OSError as error:
        raise RefusedError(
            "handler_missing", f"{where}: {handler}: {error.strerror}", "install it on the camera first"
        ) from None
    for (passed, status), (_, below) in zip(way, [*way[1:], way[-1]], strict=True):
        if not _is_ours_alone(status, below):
            raise RefusedError(
                "handler_unsafe",
                f"{where}: {passed} can be changed by others",
                f"chown root {passed} && chmod go-w {passed}, or move jobs.handler_dir elsewhere",
            )
    mode = way[-1][1].st_mode
    if not stat.S_ISREG(mode):
        raise RefusedError("handler_missing", f"{where}: {handler} is not a file", "install it on the camera first")
    if not os.access(handler, os.X_OK):
        raise RefusedError("handler_missing", f"{where}: {handler} is not executable", f"chmod +x {handler}")
    return handler


def _way(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Every folder and link that is passed on the way to `path`, from / on and through all links, and at last the file."""
    root = Path("/")
    yield root, root.lstat()
    here, ahead, links = root, list(path.parts[1:]), 0
    while ahead:
        name = ahead.pop(0)
        if name == "..":
            here = here.parent
            continue
        status = (here / name).lstat()
        yield here / name, status
        if not stat.S_ISLNK(status.st_mode):
            here /= name
            continue
        links += 1
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        target = (here / name).readlink()
        here = root if target.is_absolute() else here
        ahead = [part for part in target.parts if part != "/"] + ahead


def _is_ours_alone(status: os.stat_result, below: os.stat_result) -> bool:
    """Whether only root and the agent can change what `status` is of; `below` is the next on the way.

    A folder like /tmp, where everybody writes but only owners remove, is no exception, unless the next folder is one
    that only its owner may enter: nobody else can put another in its place, or anything into it.
    """
    if status.st_uid not in (0, os.geteuid()):
        return False
    if stat.S_ISLNK(status.st_mode) or not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return True
    private = stat.S_ISDIR(below.st_mode) and not below.st_mode & 0o077
    return bool(status.st_mode & stat.S_ISVTX) and private
