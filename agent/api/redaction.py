"""What of a reply is for readers: no passwords and the like, known by their form or by the names they have. Pure."""

from __future__ import annotations

import math
from typing import Any

from agent.logs import is_secret, redact

Json = dict[str, Any]


def marked(document: Json) -> Json:
    """`document` without secrets, saying so with `redacted` where there were some."""
    shown: Json = presentable(document)
    return shown if shown == document else {**shown, "redacted": True}


def presentable(value: Any, hidden: bool = False) -> Any:
    """`value` without secrets, known by their form or by their names, and with null for the numbers that JSON doesn't have.

    `hidden`: the name of what it is in stands for a secret.
    """
    if isinstance(value, str):
        return "[redacted]" if hidden and value else redact(value)
    if isinstance(value, dict):
        if {"origin", "value"} <= value.keys():
            return _setting(value, hidden or _names_secret(str(value.get("key", "")), None))
        return {key: presentable(item, hidden or _names_secret(str(key), item)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [presentable(item, hidden) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return "[redacted]" if hidden and isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _setting(setting: Json, hidden: bool) -> Json:
    """A setting, with where it comes from and what it overrides: of a secret one the values alone are hidden."""
    values = ("value", "default", "overrides")
    return {key: presentable(item, hidden and key in values) for key, item in setting.items()}


def _names_secret(key: str, value: Any) -> bool:
    """Whether a key, or a part of a dotted one, stands for a secret; a number of tokens is none."""
    if isinstance(value, (int, float)) and "token" in key.lower():
        return False
    return any(map(is_secret, key.split(".")))
