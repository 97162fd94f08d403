"""Every key's effective value and where it comes from: a default, agent.toml, or a version of the shadow. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from agent import settings as schema
from agent.config.desired import KeyPath, Marks, is_table, leaves, pointer, suggestion
from agent.config.records import InForce
from agent.errors import RefusedError
from agent.logs import redact
from agent.settings import Settings

DEFAULT, SITE = "default", "site file"


def effective(
    site: Mapping[str, Any], settings: Settings, in_force: InForce, remote: Marks = schema.remote
) -> dict[str, dict[str, Any]]:
    """Each key in dotted form with `value`, `origin`, `since` (epoch seconds or null) and whether it is `remote`."""
    found = {}
    own = leaves(site)
    wanted = leaves(in_force.agent)
    for path, value in leaves(settings.model_dump(mode="json")).items():
        origin, since = _origin(path, own, wanted, in_force)
        found[".".join(path)] = {
            "value": _shown(value),
            "origin": origin,
            "since": since,
            "remote": remote(path) is not None,
        }
    for name, document in in_force.targets.items():
        for path, value in leaves(document, ("targets", name)).items():
            version, at = in_force.since[pointer(*path)]
            found[".".join(path)] = {"value": value, "origin": _shadow(version), "since": at, "remote": True}
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
    section = schema.section_at(path[:-1])
    field = section.model_fields.get(path[-1]) if section else None
    value, known = _look_up(settings.model_dump(mode="json"), path)
    if is_table(path) and known:
        raise _is_table(key, value)
    if field is None or not known:
        hint = suggestion(path).removeprefix(", ") if all(path) and not is_table(path) else ""
        raise RefusedError("unknown_key", f"{key} is no key of agent.toml", hint or _neighbours(settings, path))
    origin, since = _origin(path, leaves(site), leaves(in_force.agent), in_force)
    default = None if field.is_required() else field.get_default(call_default_factory=True)
    layers = [{"origin": DEFAULT, "value": _shown(default)}]
    own, in_site = _look_up(site, path)
    if in_site:
        layers.insert(0, {"origin": SITE, "value": _shown(own)})
    overridden = {SITE: layers[1:], DEFAULT: []}.get(origin, layers)
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return {
        "key": key,
        "value": _shown(value),
        "origin": origin,
        "since": since,
        "overrides": overridden,
        "default": _shown(default),
        "unit": extra.get("unit"),
        "remote": remote(path) is not None,
        "description": field.description or "",
    }


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
    value, known_value = _look_up(in_force.targets, path[1:])
    origin, since = f"{SITE} {target.path}", None
    if known_value:
        version, since = max(_came(in_force, pointer(*path)), default=(in_force.version, None))
        origin = _shadow(version)
    return {
        "key": key,
        "value": value,
        "origin": origin,
        "since": since,
        "overrides": [{"origin": f"{SITE} {target.path}", "value": None}] if known_value else [],
        "default": None,
        "unit": None,
        "remote": True,
        "description": f"A value of {target.path}" + ("" if known_value else ", which the shadow does not set"),
    }


def _came(in_force: InForce, where: str) -> list[tuple[int, float]]:
    return [came for below, came in in_force.since.items() if below == where or below.startswith(where + "/")]


def _origin(
    path: KeyPath, own: Mapping[KeyPath, Any], wanted: Mapping[KeyPath, Any], in_force: InForce
) -> tuple[str, float | None]:
    if wanted.get(path) is not None:
        version, at = in_force.since[pointer("agent", *path)]
        return _shadow(version), at
    if path in wanted:
        return DEFAULT, None
    return (SITE if any(key[: len(path)] == path or key == path[: len(key)] for key in own) else DEFAULT), None


def _look_up(tree: Any, path: KeyPath) -> tuple[Any, bool]:
    for part in path:
        if not isinstance(tree, Mapping) or part not in tree:
            return None, False
        tree = tree[part]
    return tree, True


def _shadow(version: int) -> str:
    return f"shadow version {version}"


def _shown(value: Any) -> Any:
    """A value as JSON, without passwords."""
    if isinstance(value, (str, bool, int, float, type(None))):
        return redact(value) if isinstance(value, str) else value
    if isinstance(value, Mapping):
        return {str(key): _shown(below) for key, below in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shown(below) for below in value]
    return redact(str(value))
