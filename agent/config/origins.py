"""Every key's effective value and where it comes from: a default, agent.toml, a job, or a version of the shadow. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent import setting_keys as schema
from agent.config.desired import KeyPath, Marks, is_table, leaves, pointer, suggestion
from agent.config.layers import InForce
from agent.errors import RefusedError
from agent.logs import redact
from agent.settings import Settings

DEFAULT, SITE, UNKNOWN = "default", "site file", "the fleet"


def effective(
    site: Mapping[str, Any], settings: Settings, in_force: InForce, remote: Marks = schema.remote
) -> dict[str, dict[str, Any]]:
    """Each key in dotted form with `value`, `origin`, `since` (epoch seconds or null) and whether it is `remote`."""
    found = {}
    own = leaves(site)
    desired = in_force.desired
    wanted = leaves(desired.agent)
    for path, value in leaves(settings.model_dump(mode="json")).items():
        origin, since = _origin(path, own, wanted, in_force)
        found[".".join(path)] = {
            "value": _shown(value),
            "origin": origin,
            "since": since,
            "remote": remote(path) is not None,
        }
    for name, document in desired.targets.items():
        for path, value in leaves(document, ("targets", name)).items():
            origin, since = in_force.since(pointer(*path)) or (UNKNOWN, None)
            found[".".join(path)] = {"value": value, "origin": origin, "since": since, "remote": True}
    return found


def explain(
    key: str, site: Mapping[str, Any], settings: Settings, in_force: InForce, remote: Marks = schema.remote
) -> dict[str, Any]:
    """All about one key such as `telemetry.interval_s` or `targets.pipeline.exposure`: value, origin, what it overrides.

    Raises RefusedError `unknown_key`, also for a table, with the names of its keys.
    """
    path = tuple(key.split("."))
    if path[0] == "targets":
        return _explain_target(key, path, settings, in_force)
    field = None if is_table(path) else schema.field_at(path)
    value, known = _look_up(settings.model_dump(mode="json"), path)
    if is_table(path) and known:
        raise _is_table(key, value)
    if field is None or not known:
        hint = suggestion(path).removeprefix(", ") if all(path) and not is_table(path) else ""
        raise RefusedError("unknown_key", f"{key} is no key of agent.toml", hint or _neighbours(settings, path))
    origin, since = _origin(path, leaves(site), leaves(in_force.desired.agent), in_force)
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    if isinstance(default, Mapping) and schema.is_open_table(path[:-1]):
        default = default.get(path[-1])
    stack = [*_set_by(path, in_force), *_by_site(path, site), {"origin": DEFAULT, "value": _shown(default)}]
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    mark = remote(path)
    return {
        "key": key,
        "value": _shown(value),
        "origin": origin,
        "since": since,
        "overrides": [] if origin == DEFAULT else stack[[layer["origin"] for layer in stack].index(origin) + 1 :],
        "default": _shown(default),
        "unit": extra.get("unit"),
        "remote": mark is not None,
        "applies": mark.applies if mark else None,
        "description": field.description or "",
    }


def _set_by(path: KeyPath, in_force: InForce) -> list[dict[str, Any]]:
    """Who of shadow and fleet sets a key of the agent, the one that counts first."""
    found = []
    for layer in (in_force.shadow, in_force.fleet):
        value, known = _look_up(layer.agent, path)
        if known and value is not None:
            origin, _ = layer.since.get(pointer("agent", *path)) or (UNKNOWN, 0.0)
            found.append({"origin": origin, "value": _shown(value)})
    return found


def _by_site(path: KeyPath, site: Mapping[str, Any]) -> list[dict[str, Any]]:
    own, known = _look_up(site, path)
    return [{"origin": SITE, "value": _shown(own)}] if known else []


def _is_table(key: str, table: Mapping[str, Any]) -> RefusedError:
    if not table:
        return RefusedError("unknown_key", f"{key} is a table, and has no keys", "agent.toml may give it some")
    return RefusedError(
        "unknown_key",
        f"{key} is a table; its keys: {', '.join(table)}",
        f"ask for one of them: {key}.{next(iter(table))}",
    )


def _neighbours(settings: Settings, path: KeyPath) -> str:
    """What the table that `path` would be in holds, where there is such a table."""
    table, known = _look_up(settings.model_dump(mode="json"), path[:-1])
    where = ".".join(path[:-1])
    return f"{where} has {', '.join(table) or 'nothing'}" if known and where and isinstance(table, Mapping) else ""


def _explain_target(key: str, path: KeyPath, settings: Settings, in_force: InForce) -> dict[str, Any]:
    if len(path) < 2 or path[1] not in settings.config.targets:
        known = ", ".join(settings.config.targets) or "none"
        raise RefusedError("unknown_key", f"{key} names no target of this camera", f"its targets: {known}")
    target = settings.config.targets[path[1]]
    where = str(target.path) if target.path else "the program's own"
    value, is_set = _look_up(in_force.desired.targets, path[1:])
    stack: list[dict[str, Any]] = []
    for layer in (in_force.shadow, in_force.fleet):
        below, set_here = _look_up(layer.targets, path[1:])
        if set_here:
            origin, since = InForce(shadow=layer).latest_below(pointer(*path)) or (UNKNOWN, None)
            stack.append({"origin": origin, "since": since, "value": below})
    stack.append({"origin": f"{SITE} {where}" if target.path else where, "since": None, "value": None})
    return {
        "key": key,
        "value": value,
        "origin": stack[0]["origin"],
        "since": stack[0]["since"],
        "overrides": [{"origin": layer["origin"], "value": layer["value"]} for layer in stack[1:]],
        "default": None,
        "unit": None,
        "remote": True,
        "applies": "connectivity"
        if target.connectivity
        else target.apply
        if isinstance(target.apply, str)
        else "command",
        "description": f"A value of {where}" + ("" if is_set else ", which the fleet does not set"),
    }


def _origin(
    path: KeyPath, own: Mapping[KeyPath, Any], wanted: Mapping[KeyPath, Any], in_force: InForce
) -> tuple[str, float | None]:
    if wanted.get(path) is not None:
        return in_force.since(pointer("agent", *path)) or (UNKNOWN, None)
    if path in wanted:
        return DEFAULT, None
    return (SITE if any(key[: len(path)] == path or key == path[: len(key)] for key in own) else DEFAULT), None


def _look_up(tree: Any, path: KeyPath) -> tuple[Any, bool]:
    for part in path:
        if not isinstance(tree, Mapping) or part not in tree:
            return None, False
        tree = tree[part]
    return tree, True


def _shown(value: Any) -> Any:
    """A value as JSON, without passwords."""
    if isinstance(value, (str, bool, int, float, type(None))):
        return redact(value) if isinstance(value, str) else value
    if isinstance(value, Mapping):
        return {str(key): _shown(below) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(below) for below in value]
    return redact(str(value))
