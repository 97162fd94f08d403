"""Conditions of job documents against the facts of this camera. Pure: the facts come as an argument.

All conditions must hold. One that can't be judged, because its key or type is not known, refuses the document.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from agent.errors import RefusedError
from agent.versions import VERSION, compare_versions

DEFAULT_TYPE = "stringEqual"
TYPES = {
    "stringEqual": "must be {}",
    "stringNotEqual": "must not be {}",
    "stringLike": "must be like {}",
    "versionAtLeast": "must be {} or later",
    "versionBelow": "must be before {}",
}
"""Each type, and what it says of a key with the values in the braces."""
VERSIONS = ("versionAtLeast", "versionBelow")
ALIASES = {"operatingSystem": "os.id"}
RESERVED = ("os.", "host.", "agent.", "thing.", "target.", "label.")
MAX_TOLD = 4
MAX_NAMES = 600
MAX_VALUE = 80


def facts(
    host: Mapping[str, str],
    *,
    agent_version: str,
    thing_name: str,
    targets: Mapping[str, str | None],
    labels: Mapping[str, str],
    own: Mapping[str, str],
) -> dict[str, str]:
    """What conditions may ask about; "" where this camera has no value.

    `host` is what `host_facts` gives, `targets` the installed version of each update target, `labels` what the owner says of the camera, `own` the operator's
    `[jobs.facts]`, of which those with one of our names, or beginning like them, are left out.
    """
    ours = {
        **host,
        "agent.version": agent_version,
        "thing.name": thing_name,
        **{f"target.{name}.version": version or "" for name, version in targets.items()},
        **{f"label.{name}": value for name, value in labels.items()},
    }
    ours |= {alias: ours.get(key, "") for alias, key in ALIASES.items()}
    return {**{k: v for k, v in own.items() if not k.startswith(RESERVED)}, **ours}


def check(conditions: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> None:
    """Refuse when a condition does not hold, or can't be judged. Each has `key`, `value` (a list) and `type`.

    Raises RefusedError condition_unknown or condition_not_met.
    """
    failed = unmet(conditions, facts)
    if failed:
        more = f"; and {len(failed) - MAX_TOLD} more" if len(failed) > MAX_TOLD else ""
        raise RefusedError(
            "condition_not_met",
            f"conditions: {'; '.join(failed[:MAX_TOLD])}{more}",
            "aim the job at other cameras, or change its conditions",
        )


def unmet(conditions: Sequence[Mapping[str, Any]], facts: Mapping[str, str]) -> list[str]:
    """A sentence for each condition that does not hold: key, what is wanted, what is found.

    Raises RefusedError condition_unknown.
    """
    for condition in conditions:
        _check_known(condition, facts)
    return [_explain(condition, facts) for condition in conditions if not _holds(condition, facts)]


def _check_known(condition: Mapping[str, Any], facts: Mapping[str, str]) -> None:
    key, kind = condition["key"], condition["type"]
    if kind not in TYPES:
        raise RefusedError(
            "condition_unknown", f"conditions: type {_quoted(kind)} is not known here", f"use one of {', '.join(TYPES)}"
        )
    if key not in facts:
        names = ", ".join(sorted(facts))
        names = names if len(names) <= MAX_NAMES else f"{names[:MAX_NAMES].rpartition(', ')[0]} …"
        raise RefusedError(
            "condition_unknown", f"conditions: key {_quoted(key)} is not known here", f"use one of {names}"
        )
    for value in condition["value"] if kind in VERSIONS else ():
        if not VERSION.fullmatch(value):
            raise RefusedError(
                "condition_unknown",
                f"conditions: {_quoted(key)}: {_quoted(value)} is not a version",
                "give a version such as 1.2.0",
            )


def _holds(condition: Mapping[str, Any], facts: Mapping[str, str]) -> bool:
    found, wanted = facts[condition["key"]], condition["value"]
    match condition["type"]:
        case "stringEqual":
            return found in wanted
        case "stringNotEqual":
            return bool(found) and found not in wanted
        case "stringLike":
            return bool(found) and any(fnmatchcase(found, value) for value in wanted)
    if not VERSION.fullmatch(found):
        return False
    at_least = condition["type"] == "versionAtLeast"
    return any((compare_versions(found, value) >= 0) is at_least for value in wanted)


def _explain(condition: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    found, values = facts[condition["key"]], condition["value"]
    wanted = " or ".join(_quoted(value) for value in values[:MAX_TOLD]) + (" or …" if len(values) > MAX_TOLD else "")
    is_here = f"is {_quoted(found)}" if found else "has no value on this camera"
    return f"{_quoted(condition['key'], '')} {TYPES[condition['type']].format(wanted)}, but {is_here}"


def _quoted(text: str, mark: str = "'") -> str:
    """`text`, cut short, with what can't be printed as escapes."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:MAX_VALUE])
    return f"{mark}{shown}{'…' if len(text) > MAX_VALUE else ''}{mark}"
