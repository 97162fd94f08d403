"""Makes docs/schemas/desired.schema.json: what the shadow `config` may want, from the Remote marks of agent/settings.py.

`definitions` are used by the schema of the job `configure` too.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic.json_schema import GenerateJsonSchema

from agent.setting_types import Name, ProxyUrl, TimeZone, Window
from agent.settings import Remote, Section, Settings

FOLDER = Path(__file__).parent.parent / "docs" / "schemas"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
APPLIES = {
    "live": "Takes effect at once.",
    "restart-component": "Restarts a part of the agent.",
    "connectivity": "Taken back when the cloud is not reached over it.",
    "reboot": "Reboots the camera.",
}
_DAYS = "(mon|tue|wed|thu|fri|sat|sun)"
_RANGE = f"{_DAYS}(-{_DAYS})?"
_START = "([01][0-9]|2[0-3]):[0-5][0-9]"
FORMS: dict[Any, dict[str, str]] = {
    Window: {"pattern": f"^({_RANGE}(,{_RANGE})* +)?{_START}-({_START}|24:00)$"},
    TimeZone: {"pattern": r"^[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*$"},
    ProxyUrl: {"pattern": r"^(http://\S+)?$"},
}
"""What a schema can say of the types that the agent itself checks by functions."""


class Generator(GenerateJsonSchema):
    """Without the titles that only repeat the keys, and with FORMS."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002  the signature is pydantic's
        return False

    def function_after_schema(self, schema: Any) -> dict[str, Any]:
        made = super().function_after_schema(schema)
        checks = {form.__metadata__[0].func: words for form, words in FORMS.items()}
        return {**made, **checks.get(schema["function"]["function"], {})}


def outputs() -> dict[Path, str]:
    """Path and text of the schema."""
    return {FOLDER / "desired.schema.json": json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"}


def schema() -> dict[str, Any]:
    """The schema of the shadow's `desired`, also as an update of it, in which null takes a value back."""
    return {
        "$schema": DIALECT,
        "title": "Shadow config: desired",
        "description": "What a camera is to run with. At most 8192 bytes, 8 levels and integers of 64 bits; null stops setting a value.",
        "type": ["object", "null"],
        "properties": {"agent": {"$ref": "#/$defs/agent"}, "targets": {"$ref": "#/$defs/targets"}},
        "additionalProperties": False,
        "$defs": definitions(),
    }


def definitions() -> dict[str, Any]:
    """`agent`, `targets` and what they refer to."""
    below: dict[str, Any] = {}
    agent = _table(Settings, below)
    agent["description"] = (
        "Keys of agent.toml that may be set remotely; null stops setting one, or all of a table. A default is what holds "
        "where agent.toml does not set the key."
    )
    targets = {
        "description": "The documents of other programs, by the names that `[config.targets]` of agent.toml has.",
        "type": ["object", "null"],
        "propertyNames": _named(Name),
        "additionalProperties": {
            "description": "The whole document, in the form that its program reads. The camera may have a schema of its own for it.",
            "type": ["object", "null"],
            "additionalProperties": {"$ref": "#/$defs/value"},
        },
    }
    value = {
        "description": "Any JSON, without null in an array.",
        "additionalProperties": {"$ref": "#/$defs/value"},
        "items": {"type": ["boolean", "object", "array", "number", "string"], "$ref": "#/$defs/value"},
    }
    return {"agent": agent, "targets": targets, **below, "value": value}


def remote_keys(model: type[Section] = Settings, path: str = "") -> Iterator[tuple[str, type[Section], str, Remote]]:
    """Each key that may be set remotely, in dotted form, with the model it is in, its name there and its mark."""
    for name, field in model.model_fields.items():
        mark = next((mark for mark in field.metadata if isinstance(mark, Remote)), None)
        section, many = section_of(field.annotation)
        if mark:
            yield f"{path}{name}", model, name, mark
        elif section:
            yield from remote_keys(section, f"{path}{name}." + ("<name>." if many else ""))


def section_of(annotation: Any) -> tuple[type[Section] | None, bool]:
    """The model of a table, and whether the key holds many of them, by name; None for a value."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, False
    if get_origin(annotation) is dict:
        of = get_args(annotation)[1]
        return (of, True) if isinstance(of, type) and issubclass(of, Section) else (None, False)
    return None, False


def _table(model: type[Section], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a table with those of its keys that may be set remotely; what they refer to is added to `definitions`."""
    made = model.model_json_schema(schema_generator=Generator)
    properties: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        mark = next((mark for mark in field.metadata if isinstance(mark, Remote)), None)
        section, many = section_of(field.annotation)
        if mark:
            properties[name] = _key(made["properties"][name], mark)
            _gather(made["properties"][name], made.get("$defs", {}), definitions)
        elif section and any(remote_keys(section)):
            below = _table(section, definitions)
            properties[name] = _by_name(field.description, get_args(field.annotation)[0], below) if many else below
    found: dict[str, Any] = {"type": ["object", "null"], "properties": properties, "additionalProperties": False}
    return {"description": _sentence(model.__doc__), **found} if model is not Settings else found


def _by_name(description: str | None, name: Any, below: dict[str, Any]) -> dict[str, Any]:
    words = f"{_sentence(description)} Those that agent.toml has, by name."
    return {
        "description": words,
        "type": ["object", "null"],
        "propertyNames": _named(name),
        "additionalProperties": below,
    }


def _named(name: Any) -> dict[str, str]:
    return {"pattern": name.__metadata__[0].pattern}


def _key(schema: dict[str, Any], mark: Remote) -> dict[str, Any]:
    """A key's schema, with all there is to say in its description, and null allowed."""
    made = copy.deepcopy(schema)
    unit = made.pop("unit", "")
    words = [_sentence(made.pop("description", "")), f"Unit: {unit}." if unit else "", APPLIES[mark.applies]]
    if "patternProperties" in made:
        ((names, values),) = made.pop("patternProperties").items()
        made |= {"propertyNames": {"pattern": names}, "additionalProperties": _or_null(values)}
    return {"description": " ".join(filter(None, words)), **_or_null(made)}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(schema.get("type"), str):
        raise TypeError(f"null can't be added to {schema}")
    made = {**schema, "type": [schema["type"], "null"]}
    return {**made, "enum": [*made["enum"], None]} if "enum" in made else made


def _gather(schema: Any, known: dict[str, Any], found: dict[str, Any]) -> None:
    """Add to `found` what `schema` refers to, and what that refers to, with their units in the descriptions."""
    if isinstance(schema, dict):
        name = str(schema.get("$ref", "")).removeprefix("#/$defs/")
        if name and name not in found:
            found[name] = {key: value for key, value in known[name].items() if key != "title"}
            _gather(found[name], known, found)
    for below in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        _gather(below, known, found)


def _sentence(text: str | None) -> str:
    return " ".join((text or "").split())
