"""Configuration files of other programs: judging a wanted document, and putting a file's content in place or back.

A file is replaced whole or not at all and keeps its owner, group and mode; the program's own schema and check command see
the document before its file is touched.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import stat
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from agent.config import schema_check
from agent.config.desired import Problem, pointer
from agent.config.formats import FormatError, render
from agent.errors import FailedError, RefusedError
from agent.host import processes
from agent.host.files import fsync_folder, write_atomic
from agent.logs import get_logger, redact
from agent.settings import ConfigTarget

__all__ = ["UnitState", "Units", "activate", "judge", "put", "read", "remove_leftovers", "render"]

log = get_logger("config")

CHECK_TIMEOUT_S = 30.0
SCHEMA_TIMEOUT_S = 30.0
APPLY_TIMEOUT_S = 120.0
NEW_FILE_MODE = 0o644
MAX_KEPT_BYTES = 2**20
MAX_ANSWER_BYTES = 2**20


class UnitState(Protocol):
    """What systemd says about a unit: `active` is ActiveState, `restarts` how often systemd restarted it."""

    @property
    def active(self) -> str: ...
    @property
    def restarts(self) -> int: ...


class Units(Protocol):
    """Starting and asking systemd units; raises FailedError."""

    async def restart(self, unit: str) -> None: ...
    async def reload(self, unit: str) -> None: ...
    async def state(self, unit: str) -> UnitState: ...


async def judge(
    name: str,
    target: ConfigTarget,
    document: Mapping[str, Any],
    *,
    schema_timeout_s: float = SCHEMA_TIMEOUT_S,
    check_timeout_s: float = CHECK_TIMEOUT_S,
) -> list[Problem]:
    """Everything wrong with `document` for a target: its syntax, its JSON Schema, then its file's place and its check command.

    The file is not touched; what is written beside it is gone when this returns. A target without a file has its schema alone.
    """
    if target.path is None:
        return await _violations(name, target, document, schema_timeout_s)
    try:
        content = render(document, target.format)
    except RefusedError as error:
        path = error.path if isinstance(error, FormatError) else ()
        return [Problem(pointer("targets", name, *path), f"{error.message}; {error.hint}", error.code)]
    problems = await _violations(name, target, document, schema_timeout_s)
    return problems or await _try_out(name, target, target.path, content, check_timeout_s)


async def read(target: ConfigTarget) -> bytes | None:
    """The file's content, None when there is no file. Raises FailedError."""
    path = _path(target)

    def content() -> bytes | None:
        real = _real(path)
        if _status(real) is None:
            return None
        descriptor = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        with os.fdopen(descriptor, "rb") as file:
            return file.read(MAX_KEPT_BYTES + 1)

    try:
        found = await asyncio.to_thread(content)
    except OSError as error:
        raise FailedError("target_unreadable", f"{path}: {error.strerror}") from None
    if found is not None and len(found) > MAX_KEPT_BYTES:
        raise FailedError("target_unreadable", _too_large(path))
    return found


async def put(target: ConfigTarget, content: bytes | None) -> None:
    """Make `content` the file's content, None removes the file; durable when this returns. Raises FailedError."""
    path = _path(target)

    def place() -> None:
        real = _real(path)
        before = _status(real)
        if content is not None:
            write_atomic(real, content, NEW_FILE_MODE)
        elif before:
            real.unlink()
            fsync_folder(real.parent)

    try:
        await asyncio.to_thread(place)
    except OSError as error:
        raise FailedError("target_unwritable", f"{path}: {error.strerror}") from None


async def activate(target: ConfigTarget, units: Units, *, timeout_s: float = APPLY_TIMEOUT_S) -> None:
    """Make the program take its file, as the target's `apply` says. Raises FailedError.

    Nothing is done here for `none`, for `reboot`, which is the caller's, and for `api`, where the program asks by itself.
    """
    if target.apply == "restart":
        await units.restart(target.unit)
    elif target.apply == "reload":
        await units.reload(target.unit)
    elif not isinstance(target.apply, str):
        try:
            result = await processes.run(target.apply, timeout_s=timeout_s)
        except OSError as error:
            raise FailedError("apply_failed", f"{target.apply[0]} can't be started: {error.strerror}") from None
        if not result.succeeded:
            raise FailedError("apply_failed", f"{target.apply[0]}: {_last_words(result)}")


def remove_leftovers(target: ConfigTarget) -> None:
    """Remove what a cut while checking or writing left beside the file. Blocking; raises OSError."""
    if target.path is None:
        return
    real = _real(target.path)
    candidate = _candidate(real)
    for path in (candidate, *(one.with_name(f".{one.name}.new") for one in (candidate, real))):
        path.unlink(missing_ok=True)


def _path(target: ConfigTarget) -> Path:
    if target.path is None:
        raise FailedError("target_unwritable", "the target has no file: its program asks the local API")
    return target.path


def _real(path: Path) -> Path:
    """`path` with links followed, so that a linked file is replaced where it is and the link stays."""
    return Path(os.path.realpath(path))


def _candidate(real: Path) -> Path:
    return real.with_name(f".candidate-{real.name}")


def _too_large(path: Path) -> str:
    return f"{path} is above 1 MiB, too large to keep for a revert"


def _status(path: Path) -> os.stat_result | None:
    """The regular file's status, None where there is nothing. Opens nothing; raises OSError for what is no regular file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, f"is {_kind(found.st_mode)}, not a regular file")
    return found


def _kind(mode: int) -> str:
    kinds = {
        stat.S_IFDIR: "a directory",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFSOCK: "a socket",
        stat.S_IFLNK: "a link that leads to itself",
    }
    return kinds.get(stat.S_IFMT(mode), "a device")


async def _try_out(name: str, target: ConfigTarget, path: Path, content: bytes, timeout_s: float) -> list[Problem]:
    """Write the candidate beside the file, which shows that it can be written there, and let the check command judge it."""
    where = pointer("targets", name)
    real = await asyncio.to_thread(_real, path)
    try:
        problems = [Problem(where, *found) for found in await asyncio.to_thread(_place_candidate, real, content)]
        if problems or target.check is None:
            return problems
        argv = [part.replace("{path}", str(_candidate(real))) for part in target.check]
        return await _run_check(where, argv, timeout_s)
    finally:
        await asyncio.to_thread(_clear_away, name, target)


def _place_candidate(real: Path, content: bytes) -> list[tuple[str, str]]:
    """Write the candidate, with the owner and mode that the file has; what speaks against that, as words and code."""
    if not real.parent.is_dir():
        return [(f"the folder {real.parent} does not exist", "target_unwritable")]
    try:
        before = _status(real)
    except OSError as error:
        return [(f"{real} {error.strerror}", "target_unwritable")]
    if before and before.st_size > MAX_KEPT_BYTES:
        return [(_too_large(real), "target_unreadable")]
    if before and not os.access(real, os.R_OK, effective_ids=True):
        return [(f"{real} can't be read by the agent, which keeps its content for a revert", "target_unreadable")]
    candidate = _candidate(real)
    try:
        candidate.unlink(missing_ok=True)
        write_atomic(candidate, content, stat.S_IMODE(before.st_mode) if before else NEW_FILE_MODE)
        lost = _lost_readers(candidate, before) if before else ""
    except OSError as error:
        words = f"the folder {real.parent} can't be written to by the agent: {error.strerror}"
        return [(words, "target_unwritable")]
    return [(f"{real} {lost}", "target_unwritable")] if lost else []


def _lost_readers(candidate: Path, before: os.stat_result) -> str:
    """Who could read the file before and could not read what the agent puts in its place, where it can't keep the owner."""
    try:
        os.chown(candidate, before.st_uid, before.st_gid)
    except PermissionError:
        after = candidate.stat()
        if before.st_mode & stat.S_IROTH:
            return ""
        group_keeps = before.st_gid == after.st_gid
        owner_reads = before.st_uid in (0, after.st_uid) or (group_keeps and before.st_mode & stat.S_IRGRP)
        if not owner_reads or (before.st_mode & stat.S_IRGRP and not group_keeps):
            return "could not be read by its owner or group any more: the agent may not give files to others"
    else:
        candidate.chmod(stat.S_IMODE(before.st_mode))
    return ""


def _clear_away(name: str, target: ConfigTarget) -> None:
    try:
        remove_leftovers(target)
    except OSError as error:
        log.warning("can't remove a candidate file", target=name, reason=str(error))


async def _run_check(where: str, argv: list[str], timeout_s: float) -> list[Problem]:
    mark = uuid.uuid4().hex
    try:
        result = await processes.run(argv, timeout_s=timeout_s, mark=mark)
        # A check has nothing to leave running, unlike a command that applies.
        await processes.end_marked(mark)
    except OSError as error:
        return [Problem(where, f"the check {argv[0]} can't be started: {error.strerror}", "check_unusable")]
    return [] if result.succeeded else [Problem(where, f"refused by its check: {_last_words(result)}", "check_failed")]


def _last_words(result: processes.Result) -> str:
    """How a program ended and the last line it printed, on standard error before standard output."""
    lines = (_printable(result.stderr.text) or _printable(result.stdout.text)).splitlines()
    return f"{result.describe()}: {redact(lines[-1].strip())[:300]}" if lines else result.describe()


def _printable(text: str) -> str:
    return "".join(one if one.isprintable() or one in "\n\t" else " " for one in text).strip()


async def _violations(name: str, target: ConfigTarget, document: Mapping[str, Any], timeout_s: float) -> list[Problem]:
    """What the target's JSON Schema has against `document`, judged by a process of its own."""
    if target.schema_file is None:
        return []
    where, its = pointer("targets", name), f"its schema {target.schema_file}"
    # The libraries may be known to this process alone (the agent's slots): it hands its own path on.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(Path(path).absolute()) for path in sys.path),
        schema_check.DOCUMENT: json.dumps(document),
    }
    argv = [sys.executable, "-S", "-B", "-P", schema_check.__file__, str(target.schema_file)]
    try:
        result = await processes.run(argv, timeout_s=timeout_s, env=environment, keep_bytes=MAX_ANSWER_BYTES)
    except OSError as error:
        return [Problem(where, f"{its} can't be checked: {error.strerror}", "schema_unusable")]
    if result.timed_out or result.signal == signal.SIGXCPU:
        return [Problem(where, f"{its} takes too long for this document: {result.describe()}", "schema_timeout")]
    if not result.succeeded:
        return [Problem(where, f"{its} can't be checked: {_last_words(result)}", "schema_unusable")]
    answer = json.loads(result.stdout.text)
    if "unusable" in answer:
        return [Problem(where, f"{its} {answer['unusable']}", "schema_unusable")]
    return [
        Problem(pointer("targets", name, *path), redact(message), "schema_violation")
        for path, message in answer["problems"]
    ]
