"""What a JSON Schema has against a document, as the program that the agent starts for it judges."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from referencing.exceptions import Unresolvable

from agent.config.schema_check import MAX_PROBLEMS, violations

SCHEMA = {
    "type": "object",
    "properties": {
        "fps": {"type": "integer", "minimum": 1, "maximum": 30},
        "lens": {"type": "object", "properties": {"focus": {"type": "number"}}, "required": ["focus"]},
        "modes": {"type": "array", "items": {"enum": ["day", "night"]}},
    },
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("document", "path", "words"),
    [
        ({"fps": 99}, ["fps"], "99 is greater than the maximum of 30"),
        ({"fps": True}, ["fps"], "True is not of type 'integer'"),
        ({"lens": {}}, ["lens"], "'focus' is a required property"),
        ({"modes": ["day", "dusk"]}, ["modes", 1], "'dusk' is not one of"),
        ({"a/b": 1}, [], "'a/b' was unexpected"),
    ],
)
def test_a_violation_says_where_and_what(document: dict[str, Any], path: list[str | int], words: str) -> None:
    ((found, message),) = violations(SCHEMA, document)
    assert found == path
    assert words in message


def test_a_good_document_has_none() -> None:
    assert violations(SCHEMA, {"fps": 5, "lens": {"focus": 1.5}, "modes": ["night"]}) == []


@given(st.integers(0, 40))
def test_at_most_ten_are_told_in_order_of_place(number: int) -> None:
    document = {f"k{index:02}": "no number " * 100 for index in reversed(range(number))}
    found = violations({"additionalProperties": {"type": "number"}}, document)
    assert [path for path, _ in found] == [[f"k{index:02}"] for index in range(min(number, MAX_PROBLEMS))]
    assert all(len(message) <= 200 for _, message in found)


def test_format_is_an_annotation() -> None:
    assert violations({"properties": {"host": {"format": "ipv4"}}}, {"host": "not at all"}) == []


def test_an_older_draft_is_used_where_the_schema_names_it() -> None:
    schema = {"properties": {"size": {"items": [{"type": "integer"}], "additionalItems": False}}}
    draft_7 = {"$schema": "http://json-schema.org/draft-07/schema#", **schema}
    assert [path for path, _ in violations(draft_7, {"size": ["a", 2]})] == [["size"], ["size", 0]]
    with pytest.raises(jsonschema.SchemaError):
        violations(schema, {})


def test_references_find_the_schema_itself_and_the_standards_own_and_nothing_else() -> None:
    schema = {"$defs": {"n": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/n"}}}
    assert [path for path, _ in violations(schema, {"a": "x"})] == [["a"]]
    meta = {"$ref": "https://json-schema.org/draft/2020-12/schema"}
    assert [path for path, _ in violations(meta, {"type": 5})] == [["type"]]
    for reference in ("http://127.0.0.1:9/x.json", "file:///etc/passwd", "other.json", "#/gone"):
        with pytest.raises(Unresolvable):
            violations({"$ref": reference}, {})


def test_what_is_no_schema_raises() -> None:
    for schema in (5, [], {"type": 5}, {"$schema": 5}, {"properties": {"a": {"pattern": "("}}}):
        with pytest.raises(jsonschema.SchemaError):
            violations(schema, {})
    with pytest.raises(RecursionError):
        violations({"$ref": "#"}, {})
