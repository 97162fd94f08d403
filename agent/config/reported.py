"""What the shadow `config` reports: the values in force, the state and the errors, kept within the shadow's size. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from agent import settings as schema
from agent.config.desired import Desired, Marks, leaves, remote_leaves
from agent.settings import Settings

SHADOW_BYTES = 8192
SLACK_BYTES = 256
SHORT_MESSAGE = 120
FEW_ERRORS = 5


def build(
    wanted: Desired,
    in_force: Desired,
    effective: Settings,
    status: Mapping[str, Any],
    room: int,
    remote: Marks = schema.remote,
) -> dict[str, Any]:
    """The whole reported document, at most `room` bytes of JSON where that can be done.

    It mirrors the keys of the agent that are wanted or in force, with the value in force, so that a refused value stays
    visible as a delta, and the documents of targets in force. Without room, messages get shorter and fewer, then the
    largest mirrors are left out and named in `status.left_out`; the state always stays.
    """
    mirror: dict[str, Any] = {}
    values = leaves(effective.model_dump(mode="json"))
    asked = remote_leaves(wanted.agent, remote)
    for path in {**remote_leaves(in_force.agent, remote), **asked}:
        if path in values:
            _place(mirror, path, _written(values[path], asked.get(path)))
    reported = {"agent": mirror, "targets": dict(in_force.targets), "status": dict(status)}
    _trim(reported, room)
    return {key: value for key, value in reported.items() if value}


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The shadow update that turns `old` into `new`: changed values, and null for what is gone."""
    patch: dict[str, Any] = {key: None for key in old if key not in new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            below = difference(before, value)
            if below:
                patch[key] = below
        elif key not in old or not _same(before, value):
            patch[key] = value
    return patch


def size(document: Any) -> int:
    """Bytes of JSON."""
    return len(json.dumps(document, ensure_ascii=True, separators=(",", ":")))


def room_beside(desired: Any) -> int:
    """Bytes that reported may use: a shadow's limit counts desired and reported together."""
    return max(0, SHADOW_BYTES - SLACK_BYTES - size(desired))


def _trim(reported: dict[str, Any], room: int) -> None:
    status = reported["status"]
    if size(reported) > room:
        status["errors"] = [{**error, "message": error["message"][:SHORT_MESSAGE]} for error in status["errors"]]
    if size(reported) > room:
        status["errors"] = status["errors"][:FEW_ERRORS]
    mirrors = [(part, name) for part in ("targets", "agent") for name in reported[part]]
    for part, name in sorted(mirrors, key=lambda mirror: (mirror[0] == "agent", -size(reported[mirror[0]][mirror[1]]))):
        if size(reported) > room:
            del reported[part][name]
            status["left_out"] = [*status.get("left_out", []), f"/{part}/{name}"]
    if size(reported) > room:
        status["errors"] = status["errors"][:1]
        status.pop("left_out", None)


def _place(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value


def _written(value: Any, asked: Any) -> Any:
    """One way to write a value: as it was asked for, else a whole number without a fraction."""
    if _same(value, asked):
        return asked
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _same(one: Any, other: Any) -> bool:
    return bool(isinstance(one, bool) == isinstance(other, bool) and one == other)
