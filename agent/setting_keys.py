"""The tree of agent.toml's keys: what there is at a path, what the cloud may set, and what is wrong with a value, in words. Pure."""

from __future__ import annotations

import difflib
from typing import Any, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from agent.settings import Remote, Section, Settings


def explain(error: ValidationError) -> list[tuple[tuple[str, ...], str]]:
    """Each problem of a pydantic error as (path of the key, what is wrong in plain words)."""
    problems: list[tuple[tuple[str, ...], str]] = []
    for detail in error.errors(include_url=False):
        key = tuple(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            words = "unknown key"
            near = difflib.get_close_matches(key[-1], _keys_at(key[:-1]), n=1)
            if near:
                words += f", did you mean {near[0]}?"
        elif detail["type"] == "missing":
            words = "missing"
        else:
            words = detail["msg"].removeprefix("Value error, ")
            if not isinstance(detail["input"], dict):
                words += f" (got {detail['input']!r:.60})"
        problems.append((key, words))
    return problems


def section_at(path: tuple[str, ...]) -> type[Section] | None:
    """The model of the table at `path` of agent.toml, None when there is no such table."""
    model: type[Section] = Settings
    parts = iter(path)
    for part in parts:
        field = model.model_fields.get(part)
        if field is None:
            return None
        annotation: Any = field.annotation
        if getattr(annotation, "__origin__", None) is dict:
            annotation = annotation.__args__[1]
            if next(parts, None) is None:
                return None
        if not (isinstance(annotation, type) and issubclass(annotation, Section)):
            return None
        model = annotation
    return model


def field_at(path: tuple[str, ...]) -> FieldInfo | None:
    """The key at `path`, which for an entry of a table of plain values, such as `labels.site`, is the table's."""
    section = section_at(path[:-1])
    field = section.model_fields.get(path[-1]) if section and path else None
    if field is None and len(path) > 1 and is_open_table(path[:-1]):
        return field_at(path[:-1])
    return field


def is_open_table(path: tuple[str, ...]) -> bool:
    """Whether `path` is a table whose keys are the owner's own and whose values are plain, such as `labels`."""
    section = section_at(path[:-1])
    field = section.model_fields.get(path[-1]) if section and path else None
    return field is not None and get_origin(field.annotation) is dict and section_at((*path, "x")) is None


def remote(path: tuple[str, ...]) -> Remote | None:
    """The Remote mark of the key at `path`, None when the cloud may not set it or it does not exist.

    A table of plain values that the cloud may set has the mark on each of its entries, not on itself.
    """
    field = None if is_open_table(path) else field_at(path)
    return next((mark for mark in field.metadata if isinstance(mark, Remote)), None) if field else None


def _keys_at(path: tuple[str, ...]) -> list[str]:
    section = section_at(path)
    return list(section.model_fields) if section else []
