"""Configuration files of other programs: judging a wanted document, and putting a file's content in place or back.

A file is replaced whole or not at all and keeps its owner, group and mode; the program's own schema and check command see
the document before its file is touched. Whoever may write to its folder can't lead the agent to another file.
"""

from __future__ import annotations

import asyncio
import contextlib
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
from agent.config.places import Place, opened, placed, status
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
TOO_LARGE = "{} is above 1 MiB, too large to keep for a revert"


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
        try:
            with placed(path) as place:
                if status(place.file) is None:
                    return None
                with opened(place.file) as file:
                    return file.read(MAX_KEPT_BYTES + 1)
        except FileNotFoundError:
            return None

    try:
        found = await asyncio.to_thread(content)
    except OSError as error:
        raise FailedError("target_unreadable", f"{path}: {error.strerror}") from None
    if found is not None and len(found) > MAX_KEPT_BYTES:
        raise FailedError("target_unreadable", TOO_LARGE.format(path))
    return found


async def put(target: ConfigTarget, content: bytes | None) -> None:
    """Make `content` the file's content, None removes the file; durable when this returns. Raises FailedError."""
    path = _path(target)

    def place() -> None:
        with placed(path) as place:
            before = status(place.file)
            if content is not None:
                write_atomic(place.file, content, NEW_FILE_MODE)
            elif before:
                place.file.unlink()
                fsync_folder(place.file.parent)

    try:
        await asyncio.to_thread(place)
    except OSError as error:
        if content is None and isinstance(error, FileNotFoundError):
            return
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
    _remove_candidate(target.path)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), placed(target.path) as place:
        place.file.with_name(f".{place.file.name}.new").unlink(missing_ok=True)


def _path(target: ConfigTarget) -> Path:
    if target.path is None:
        raise FailedError("target_unwritable", "the target has no file: its program asks the local API")
    return target.path


def _candidate(real: Path) -> Path:
    return real.with_name(f".candidate-{real.name}")


async def _try_out(name: str, target: ConfigTarget, path: Path, content: bytes, timeout_s: float) -> list[Problem]:
    """Write the candidate beside the file, which shows that it can be written there, and let the check command judge it."""
    where = pointer("targets", name)
    try:
        candidate = await asyncio.to_thread(_place_candidate, path, content)
        if target.check is None:
            return []
        argv = [part.replace("{path}", str(candidate)) for part in target.check]
        return await _run_check(where, argv, timeout_s)
    except FailedError as error:
        return [Problem(where, error.message, error.code)]
    finally:
        await asyncio.to_thread(_clear_away, name, path)


def _place_candidate(path: Path, content: bytes) -> Path:
    """Write the candidate, with the owner and mode that the file has; its path. Raises FailedError for what speaks against it."""
    try:
        with placed(path) as place:
            before = status(place.file)
            if before:
                _check_original(place, before)
            _write_candidate(place, content, before)
            return _candidate(place.real)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FailedError("target_unwritable", f"the folder {error.filename or path.parent} does not exist") from None
    except OSError as error:
        raise FailedError("target_unwritable", f"{path} {error.strerror}") from None


def _check_original(place: Place, before: os.stat_result) -> None:
    if before.st_size > MAX_KEPT_BYTES:
        raise FailedError("target_unreadable", TOO_LARGE.format(place.real))
    try:
        opened(place.file).close()
    except PermissionError:
        words = f"{place.real} can't be read by the agent, which keeps its content for a revert"
        raise FailedError("target_unreadable", words) from None


def _write_candidate(place: Place, content: bytes, before: os.stat_result | None) -> None:
    candidate = _candidate(place.file)
    try:
        candidate.unlink(missing_ok=True)
        descriptor = os.open(candidate, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            lost = _lost_readers(descriptor, before)
            file.write(content)
    except OSError as error:
        words = f"the folder {place.real.parent} can't be written to by the agent: {error.strerror}"
        raise FailedError("target_unwritable", words) from None
    if lost:
        raise FailedError("target_unwritable", f"{place.real} {lost}")


def _lost_readers(descriptor: int, before: os.stat_result | None) -> str:
    """Who could read the file before and could not read what the agent puts in its place, where it can't keep the owner."""
    for owner in ((before.st_uid, -1), (-1, before.st_gid)) if before else ():
        with contextlib.suppress(PermissionError):
            os.fchown(descriptor, *owner)
    os.fchmod(descriptor, stat.S_IMODE(before.st_mode) if before else NEW_FILE_MODE)
    if before is None or before.st_mode & stat.S_IROTH:
        return ""
    after = os.fstat(descriptor)
    group_keeps = before.st_gid == after.st_gid
    owner_reads = before.st_uid in (0, after.st_uid) or (group_keeps and before.st_mode & stat.S_IRGRP)
    if not owner_reads or (before.st_mode & stat.S_IRGRP and not group_keeps):
        return "could not be read by its owner or group any more: the agent may not give files to others"
    return ""


def _clear_away(name: str, path: Path) -> None:
    try:
        _remove_candidate(path)
    except OSError as error:
        log.warning("can't remove a candidate file", target=name, reason=str(error))


def _remove_candidate(path: Path) -> None:
    """And nothing else: the file itself may be being written."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), placed(path) as place:
        candidate = _candidate(place.file)
        for each in (candidate, candidate.with_name(f".{candidate.name}.new")):
            each.unlink(missing_ok=True)


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
