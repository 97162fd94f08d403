"""What the shadow `config` reports: the values in force, the state and the errors, within what a shadow can hold. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from agent import setting_keys as schema
from agent.config.desired import MAX_INTEGER, Desired, Marks, leaves, pointer, remote_leaves
from agent.logs import redact
from agent.settings import Settings

SHADOW_BYTES = 8192
SLACK_BYTES = 256
LEAST_BYTES = 80
"""As much as the state and the version it is about may need; nothing makes a report smaller."""
MOST_LEVELS = 5
"""Keys below keys under `reported`. AWS IoT says six in one place and eight in another."""

PARTS = ("targets", "agent")
LONG, SHORT = (120, 200), (60, 60)
"""Characters of an error's message and of its pointer."""
FEW_ERRORS = 5


def build(
    wanted: Desired,
    in_force: Desired,
    effective: Settings,
    status: Mapping[str, Any],
    room: int,
    remote: Marks = schema.remote,
) -> dict[str, Any]:
    """The whole reported document, at most `room` bytes of JSON, or LEAST_BYTES where there is less.

    It mirrors the keys of the agent that are wanted or in force, with the value in force, so that a refused value stays
    visible as a delta, and the documents of targets in force. `wanted` is what the shadow itself holds. A mirror that no
    shadow could hold (too deep, null in an array) is left out and named in `status.left_out`; for room, see trimmed().
    """
    mirror: dict[str, Any] = {}
    values = leaves(effective.model_dump(mode="json"))
    asked = remote_leaves(wanted.agent, remote)
    by_fleet = remote_leaves(in_force.agent, remote)
    for path in {**by_fleet, **asked}:
        if path in values:
            value = _written(values[path], asked.get(path))
            own = path not in by_fleet and isinstance(value, str)  # agent.toml's, whose passwords are not for the cloud
            _place(mirror, path, redact(value) if own else value)
    document: dict[str, Any] = {"status": _fitting(status, MOST_LEVELS)[0]}
    deepest = max(MOST_LEVELS, _levels(wanted.as_json()))  # as deep as AWS IoT has taken it already
    for part, documents in (("agent", mirror), ("targets", in_force.targets)):
        document[part], unfit = _fitting(documents, deepest - 1)
        _leave_out(document["status"], [pointer(part, name) for name in unfit])
    return trimmed(document, room)


def trimmed(document: Mapping[str, Any], room: int) -> dict[str, Any]:
    """A reported document cut to `room` bytes of JSON, or LEAST_BYTES where there is less.

    Errors get shorter and fewer (`more_errors` counts), then the largest mirrors are left out and named in
    `status.left_out`, then all else but the state and the version it is about.
    """
    reported = {part: dict(document.get(part, {})) for part in ("agent", "targets", "status")}
    for _ in chain([None], _cuts(reported)):
        present = {part: value for part, value in reported.items() if value}
        if size(present) <= room:
            break
    return present


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The shadow update that turns `old` into `new`: changed values, arrays whole, and null for what is gone.

    A null or an empty object in `new` is nothing, as in a shadow. A key of `old` that is no valid text can't be sent and stays.
    """
    return _difference(old, _without_nothing(new))


def size(document: Any) -> int:
    """Bytes of JSON."""
    return len(json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass"))


def room_beside(desired: Any) -> int:
    """Bytes that reported may use: a shadow's limit counts desired and reported together."""
    try:
        return max(0, SHADOW_BYTES - SLACK_BYTES - size(desired))
    except (TypeError, ValueError, RecursionError):
        return SHADOW_BYTES // 2


def _cuts(reported: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Makes `reported` smaller step by step, the least important first."""
    status = reported["status"]
    _cut_errors(status, len(status.get("errors", [])), LONG)
    yield
    _cut_errors(status, FEW_ERRORS, LONG)
    yield
    for part in PARTS:
        for name in sorted(reported[part], key=lambda name: -size(reported[part][name])):
            del reported[part][name]
            _leave_out(status, [pointer(part, name)])
            yield
    status["left_out"] = sorted({"/" + name.split("/")[1] for name in status.get("left_out", [])})
    yield
    for key in sorted(status.keys() - {"state", "desired_version", "errors", "more_errors", "left_out"}):
        del status[key]
        yield
    for lengths in (LONG, SHORT):
        _cut_errors(status, 1, lengths)
        yield
    for key in sorted(status.keys() - {"state", "desired_version"}):
        del status[key]
        yield


def _cut_errors(status: dict[str, Any], most: int, lengths: tuple[int, int]) -> None:
    errors = status.get("errors", [])
    if errors:
        status["errors"] = [
            {
                **error,
                "message": _start(error.get("message", ""), lengths[0]),
                "pointer": _start(error.get("pointer", ""), lengths[1]),
            }
            for error in errors[:most]
        ]
    if len(errors) > most:
        status["more_errors"] = status.get("more_errors", 0) + len(errors) - most


def _start(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _leave_out(status: dict[str, Any], names: list[str]) -> None:
    if names:
        status["left_out"] = [*status.get("left_out", []), *names]


def _fitting(documents: Mapping[str, Any], levels: int) -> tuple[dict[str, Any], list[str]]:
    """Those of `documents` that a shadow can hold with at most `levels` levels, and the names of the others."""
    fit: dict[str, Any] = {}
    unfit: list[str] = []
    for name, document in documents.items():
        try:
            value = _plain(document, levels - 1)
        except ValueError:
            unfit.append(_sound(name))
        else:
            if value is not None and value != {}:
                fit[_sound(name)] = value
    return fit, unfit


def _plain(value: Any, levels: int, *, in_array: bool = False) -> Any:
    """`value` as a shadow holds it: no null, no empty object, sound text. Raises ValueError where that can't be."""
    if isinstance(value, str):
        return _sound(value)
    if value is None or isinstance(value, (bool, int, float)):
        if not _holds(value, in_array=in_array):
            raise ValueError("no value that a shadow takes")
        return value
    if not isinstance(value, (Mapping, list, tuple)):
        raise ValueError("no JSON value")  # noqa: TRY004  one error for all that does not fit
    within = list(value.values() if isinstance(value, Mapping) else value)
    flat = not isinstance(value, Mapping) and not any(isinstance(each, (Mapping, list, tuple)) for each in within)
    if within and not flat and levels < 1:
        raise ValueError("too deep")
    below = [_plain(each, levels - 1, in_array=in_array or not isinstance(value, Mapping)) for each in within]
    if not isinstance(value, Mapping):
        return below
    named = {_sound(key): each for key, each in zip(value, below, strict=True)}
    return named if in_array else {key: each for key, each in named.items() if each is not None and each != {}}


def _holds(value: float | None, *, in_array: bool) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return not in_array if value is None else abs(value) <= MAX_INTEGER


def _levels(value: Any) -> int:
    """How deep keys lie below `value`; arrays count where they hold objects or arrays."""
    within = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    if not any(isinstance(each, (Mapping, list, tuple)) for each in within):
        return int(isinstance(value, Mapping))
    return 1 + max(_levels(each) for each in within)


def _sound(text: str) -> str:
    return text.encode(errors="replace").decode()


def _without_nothing(tree: Mapping[str, Any]) -> dict[str, Any]:
    below = {key: _without_nothing(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    return {key: value for key, value in below.items() if value is not None and value != {}}


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    patch: dict[str, Any] = {key: None for key in old if key not in new and key == _sound(key)}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            below = _difference(before, value)
            if below:
                patch[key] = below
        elif key not in old or json.dumps(before, sort_keys=True) != json.dumps(value, sort_keys=True):
            patch[key] = value
    return patch


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
    """Whether two values mean the same: 60 and 60.0 do, 1 and true don't, however deep."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(isinstance(one, bool) == isinstance(other, bool) and one == other)
