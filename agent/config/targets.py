"""Configuration files of other programs: judging a wanted document, and putting a file's content in place or back.

A file is replaced whole or not at all and keeps its owner and mode; the program's own schema and check command see the
document before its file is touched.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from agent.config.desired import Problem, pointer
from agent.errors import FailedError, RefusedError
from agent.host import processes
from agent.host.files import fsync_folder, write_atomic
from agent.logs import redact
from agent.settings import ConfigTarget

CHECK_TIMEOUT_S = 30.0
APPLY_TIMEOUT_S = 120.0
NEW_FILE_MODE = 0o644
MAX_KEPT_BYTES = 2**20
MAX_SCHEMA_PROBLEMS = 10
BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


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


async def judge(name: str, target: ConfigTarget, document: Mapping[str, Any]) -> list[Problem]:
    """Everything wrong with `document` for a target: its syntax, its JSON Schema, then its check command."""
    try:
        content = render(document, target.format)
    except RefusedError as error:
        return [Problem(pointer("targets", name), error.message, error.code)]
    problems = await asyncio.to_thread(_violations, name, target, dict(document))
    if problems or target.check is None:
        return problems or await asyncio.to_thread(_unwritable, name, target)
    return await _run_check(name, target, target.check, content)


def render(document: Mapping[str, Any], syntax: str) -> bytes:
    """The file's content. Raises RefusedError when the document can't be written in `syntax` without loss."""
    if syntax == "json":
        return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
    text = "".join(_toml_table(document, ()))
    try:
        parsed = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RefusedError("target_format", f"can't be written as TOML: {error}") from None
    if json.dumps(parsed, sort_keys=True) != json.dumps(document, sort_keys=True):
        raise RefusedError("target_format", "can't be written as TOML without changing its meaning")
    return text.encode()


async def read(target: ConfigTarget) -> bytes | None:
    """The file's content, None when there is no file. Raises FailedError."""

    def content() -> bytes | None:
        try:
            with target.path.open("rb") as file:
                return file.read(MAX_KEPT_BYTES + 1)
        except FileNotFoundError:
            return None

    try:
        found = await asyncio.to_thread(content)
    except OSError as error:
        raise FailedError("target_unreadable", f"{target.path}: {error.strerror}") from None
    if found is not None and len(found) > MAX_KEPT_BYTES:
        raise FailedError("target_unreadable", f"{target.path} is above 1 MiB, too large to keep for a revert")
    return found


async def put(target: ConfigTarget, content: bytes | None) -> None:
    """Make `content` the file's content, None removes the file; durable when this returns. Raises FailedError."""

    def place() -> None:
        path = _real(target.path)
        if content is not None:
            write_atomic(path, content, NEW_FILE_MODE)
        elif path.exists():
            path.unlink()
            fsync_folder(path.parent)

    try:
        await asyncio.to_thread(place)
    except OSError as error:
        raise FailedError("target_unwritable", f"{target.path}: {error.strerror}") from None


async def activate(target: ConfigTarget, units: Units) -> None:
    """Make the program take its file, as the target's `apply` says. Raises FailedError."""
    if target.apply == "restart":
        await units.restart(target.unit)
    elif target.apply == "reload":
        await units.reload(target.unit)
    elif not isinstance(target.apply, str):
        try:
            result = await processes.run(target.apply, timeout_s=APPLY_TIMEOUT_S)
        except OSError as error:
            raise FailedError("apply_failed", f"{target.apply[0]} can't be started: {error.strerror}") from None
        if not result.succeeded:
            raise FailedError("apply_failed", f"{target.apply[0]}: {_last_words(result)}")


def remove_leftovers(target: ConfigTarget) -> None:
    """Remove what a cut while checking left beside the file. Blocking; raises OSError."""
    _candidate(target).unlink(missing_ok=True)


def _real(path: Path) -> Path:
    """`path` with links followed, so that a linked file is replaced where it is and the link stays."""
    return Path(os.path.realpath(path))


def _candidate(target: ConfigTarget) -> Path:
    path = _real(target.path)
    return path.with_name(f".{path.stem}.candidate{path.suffix}")


def _unwritable(name: str, target: ConfigTarget) -> list[Problem]:
    folder = _real(target.path).parent
    if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK):
        return []
    words = "is not writable for the agent" if folder.is_dir() else "does not exist"
    return [Problem(pointer("targets", name), f"the folder {folder} {words}", "target_unwritable")]


async def _run_check(name: str, target: ConfigTarget, command: list[str], content: bytes) -> list[Problem]:
    where = pointer("targets", name)
    candidate = await asyncio.to_thread(_candidate, target)

    def place() -> None:
        existing = _real(target.path)
        mode = existing.stat().st_mode & 0o7777 if existing.exists() else NEW_FILE_MODE
        write_atomic(candidate, content, mode)

    try:
        await asyncio.to_thread(place)
    except OSError as error:
        return [Problem(where, f"can't write beside {target.path}: {error.strerror}", "target_unwritable")]
    argv = [part.replace("{path}", str(candidate)) for part in command]
    try:
        result = await processes.run(argv, timeout_s=CHECK_TIMEOUT_S)
    except OSError as error:
        return [Problem(where, f"the check {argv[0]} can't be started: {error.strerror}", "check_unusable")]
    finally:
        await asyncio.to_thread(remove_leftovers, target)
    return [] if result.succeeded else [Problem(where, f"refused by its check: {_last_words(result)}", "check_failed")]


def _last_words(result: processes.Result) -> str:
    """How a program ended and the last line it printed, on standard error before standard output."""
    lines = (result.stderr.text.strip() or result.stdout.text.strip()).splitlines()
    return f"{result.describe()}: {redact(lines[-1].strip())[:300]}" if lines else result.describe()


def _violations(name: str, target: ConfigTarget, document: dict[str, Any]) -> list[Problem]:
    if target.schema_file is None:
        return []
    import jsonschema
    import referencing.exceptions

    where = pointer("targets", name)
    try:
        schema = json.loads(target.schema_file.read_bytes())
        jsonschema.Draft202012Validator.check_schema(schema)
        # An empty registry of its own keeps `$ref` from fetching anything over the network.
        found = list(jsonschema.Draft202012Validator(schema, registry=referencing.Registry()).iter_errors(document))
    except OSError as error:
        return [Problem(where, f"its schema {target.schema_file}: {error.strerror}", "schema_unusable")]
    except (ValueError, RecursionError) as error:
        return [Problem(where, f"its schema {target.schema_file} is not valid JSON: {error}", "schema_unusable")]
    except jsonschema.SchemaError as error:
        message = f"its schema {target.schema_file} is not a JSON Schema: {error.message[:200]}"
        return [Problem(where, message, "schema_unusable")]
    except referencing.exceptions.Unresolvable as error:
        return [
            Problem(where, f"its schema {target.schema_file} refers to {error.ref!r}, not found", "schema_unusable")
        ]
    found.sort(key=lambda error: [str(part) for part in error.absolute_path])
    return [
        Problem(pointer("targets", name, *error.absolute_path), error.message[:200], "schema_violation")
        for error in found[:MAX_SCHEMA_PROBLEMS]
    ]


def _toml_table(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = [f"[{'.'.join(_toml_key(part) for part in path)}]\n"] if path else []
    lines += [f"{_toml_key(key)} = {_toml_value(v)}\n" for key, v in table.items() if not isinstance(v, Mapping)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += ["\n", *_toml_table(value, (*path, key))]
    return lines


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _toml_string(value)
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml_value(below)}" for key, below in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml_value(below) for below in value) + "]"
    raise RefusedError("target_format", f"TOML has no value for {value!r:.20}")


def _toml_string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _toml_key(text: str) -> str:
    return text if BARE_KEY.fullmatch(text) else _toml_string(text)
