from __future__ import annotations

import json
import tomllib
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.config import targets
from agent.errors import RefusedError

words = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | words
values = st.recursive(
    scalars, lambda below: st.lists(below, max_size=4) | st.dictionaries(words, below, max_size=4), max_leaves=15
)
documents = st.dictionaries(words, values, max_size=5)


def canonical(document: Any) -> str:
    return json.dumps(document, sort_keys=True)


@given(documents)
@example({"a": {"b": {}}, "c": [{"d": {"e": 1}}], "": {"\x7f\n\"'\\": "\x00\u2028"}, "x": 1e300, "y": -0.0})
def test_a_document_survives_being_written_in_either_syntax(document: dict[str, Any]) -> None:
    assert canonical(json.loads(targets.render(document, "json"))) == canonical(document)
    assert canonical(tomllib.loads(targets.render(document, "toml").decode())) == canonical(document)


def test_toml_is_readable() -> None:
    text = targets.render({"fps": 2, "lens": {"focus": 1.5}, "names": ["a", "b"]}, "toml").decode()
    assert text == 'fps = 2\nnames = ["a", "b"]\n\n[lens]\nfocus = 1.5\n'


def test_what_toml_can_not_hold_is_refused() -> None:
    with pytest.raises(RefusedError) as caught:
        targets.render({"a": [1, None]}, "toml")
    assert caught.value.code == "target_format"
