"""The JSON Schema of `desired` and the camera's own judgement are one: what either takes, the other takes, but for a list."""

from __future__ import annotations

import copy
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agent import setting_keys
from agent.config import desired as wishes
from agent.config import layers
from agent.config.desired import Desired
from agent.settings import Section, Settings

ROOT = Path(__file__).parents[2]
SITE: dict[str, Any] = {
    "thing_name": "cam-1",
    "labels": {"owner": "city"},
    "config": {"targets": {"pipeline": {"path": "/etc/p.json"}, "lens": {"path": "/etc/l.toml", "format": "toml"}}},
    "capture": {
        "sources": {
            "front": {"directory": "/var/lib/capture"},
            "side": {"directory": "/var/lib/capture", "pattern": "*.png"},
        }
    },
}
NAMES = {"/agent/capture/sources": ["front", "side", "back"], "/targets": ["pipeline", "lens", "nope"]}


def script(name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        return importlib.import_module(name)


SCHEMA: dict[str, Any] = script("desired_schema").schema()
ALL = [path for path, *_ in script("desired_schema").remote_keys()]


def ecma(schema: Any) -> Any:
    """`schema` with `$` in patterns as JSON Schema means it: the end, and not the line break before it, as Python has it."""
    if isinstance(schema, dict):
        return {
            k: v.replace("$", r"\Z") if k == "pattern" and isinstance(v, str) else ecma(v) for k, v in schema.items()
        }
    return [ecma(each) for each in schema] if isinstance(schema, list) else schema


VALIDATOR = jsonschema.Draft202012Validator(ecma(SCHEMA))


# ---- where the two may differ ------------------------------------------------------------------------------------------

CAMERA_KNOWS: dict[str, Callable[[str, Any], bool]] = {
    "capture sources and targets are those that agent.toml has": lambda *_: False,
    "a name of the time zone database": lambda where, _: where == "/agent/maintenance/time_zone",
    "the form of a proxy's URL": lambda where, _: where == "/agent/cloud/proxy_url",
    "two capture sources can't share folder and pattern": lambda where, _: where == "/agent/capture",
    "16 labels with those of agent.toml": lambda where, _: where == "/agent/labels",
    "an integer of more than 64 bits, which is written as a float": lambda where, value: (
        where.startswith("/agent/updates/rate_limits/") and isinstance(value, float) and value >= 2**63
    ),
}
"""What only the camera can find, of what it calls `invalid_value`: by its pointer and the value there."""
OF_THE_CAMERA = {"unknown_name", "unknown_target"}
OF_FORM = {"not_json", "too_deep", "too_large"}
"""Not Unicode, not finite, more than 64 bits; deeper than 8 levels; above 8 KiB."""


def at(document: Any, pointer: str) -> Any:
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        document = document[int(part)] if isinstance(document, list) else document[part]
    return document


def may_refuse(document: Any, problem: wishes.Problem) -> bool:
    if problem.code in OF_THE_CAMERA | OF_FORM:
        return True
    value = at(document, problem.pointer)
    if problem.code == "wrong_type":  # the service takes away a table that is null, so that no camera sees it
        return value is None
    return problem.code == "invalid_value" and any(known(problem.pointer, value) for known in CAMERA_KNOWS.values())


def schema_may_refuse(document: Any) -> bool:
    """What the camera takes although the schema is stricter: windows in capitals or with blanks, and what sets nothing."""

    def plainer(window: Any) -> Any:
        return window.strip().lower() if isinstance(window, str) else window

    document = copy.deepcopy(document)
    agent = document.get("agent") or {}
    maintenance, updates, labels = (agent.get(key) or {} for key in ("maintenance", "updates", "labels"))
    if maintenance.get("windows"):
        maintenance["windows"] = [plainer(window) for window in maintenance["windows"]]
    for limit in updates.get("rate_limits") or []:
        limit["hours"] = plainer(limit["hours"])
    for name in [name for name, value in labels.items() if value is None]:
        del labels[name]
    sources = (agent.get("capture") or {}).get("sources") or {}
    for name in [name for name, value in sources.items() if value == {}]:
        del sources[name]
    targets = document.get("targets") or {}
    for name in [name for name, value in targets.items() if value is None]:
        del targets[name]
    return VALIDATOR.is_valid(document)


def compare(document: Any) -> bool:
    """Whether the schema takes it; fails where schema and camera differ without a reason."""
    before = json.dumps(document)
    _, problems = wishes.validate(SITE, document)
    taken = VALIDATOR.is_valid(document)
    if taken:
        assert all(may_refuse(document, problem) for problem in problems), (document, problems)
    elif not problems:
        assert schema_may_refuse(document), (document, [error.message for error in VALIDATOR.iter_errors(document)])
    assert json.dumps(document) == before
    return taken


# ---- documents from the schema -----------------------------------------------------------------------------------------


def values(schema: dict[str, Any], path: str = "", depth: int = 0) -> st.SearchStrategy[Any]:
    """What `schema` allows, names of this camera preferred."""
    if "$ref" in schema and schema["$ref"] != "#/$defs/value":
        return values(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]], path, depth)
    if "$ref" in schema:
        return JSON
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    made = [of_kind(kind, schema, path, depth) for kind in kinds if kind != "null"]
    return st.one_of(*made, *([st.none()] if "null" in kinds and depth else []))


JSON = st.recursive(
    st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below | st.none(), max_size=3),
    max_leaves=5,
)


def of_kind(kind: str, schema: dict[str, Any], path: str, depth: int) -> st.SearchStrategy[Any]:
    low, high = schema.get("minimum", -(2**63)), schema.get("maximum", 2**63 - 1)
    if kind == "integer":
        return st.integers(low, high) | st.integers(low, min(high, low + 2**50)).map(float)
    if kind == "number":
        return st.floats(low, high) | st.integers(-int(-low // 1), int(high))
    if kind == "string":
        if "pattern" in schema:
            return st.from_regex(re.compile(schema["pattern"].replace("$", r"\Z")), fullmatch=True)
        return st.text(min_size=schema.get("minLength", 0))
    if kind == "array":
        return st.lists(values(schema["items"], path, depth + 1), max_size=3)
    known = {key: values(below, f"{path}/{key}", depth + 1) for key, below in schema.get("properties", {}).items()}
    if known:
        required = {key: known.pop(key) for key in schema.get("required", [])}
        return st.fixed_dictionaries(required, optional=known)
    below = values(schema["additionalProperties"], f"{path}/*", depth + 1)
    own = st.from_regex(schema.get("propertyNames", {}).get("pattern", "").replace("$", r"\Z"), fullmatch=True)
    names = st.sampled_from(NAMES[path]) if path in NAMES else own if "propertyNames" in schema else st.text(max_size=5)
    return st.dictionaries(names, below, max_size=3)


ODD: list[Any] = [
    None, "", "x", "60", "\n", "info\n", "a\0b", "\ud800", "y" * 200, "MON 06:00-22:00 ", "25:00-26:00", "24:00-01:00",
    True, False, 0, 1, -1, -0.0, 2.5, 60, 60.0, 1024, 2**53 + 1, 2**63 - 1, 2**63, 2**70, 1e300, float("nan"), float("inf"),
    [], [1], [None], ["x"], [[]], [{}], [{"a": None}], ["22:00-04:00"], ["22:00-04:00", None],
    {}, {"x": 1}, {"x": None}, {"": {}}, {"a/b~": 1}, {"x": {"y": [1, {"z": [None]}]}},
    [{"hours": "06:00-22:00", "bytes_per_s": 4096}], [{"hours": "06:00-22:00", "bytes_per_s": 4096.5}],
    [{"hours": "06:00-22:00", "bytes_per_s": "4096"}], [{"hours": None, "bytes_per_s": 4096}], [{"hours": "06:00-22:00"}],
    [{"hours": "06:00-22:00", "bytes_per_s": 4096, "x": 1}],
]  # fmt: skip
KEYS = [
    *{part for path in ALL for part in path.split(".")},
    "agent",
    "targets",
    "front",
    "pipeline",
    "x",
    "",
    "a/b~",
    "x\n",
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield from places(below, (*path, key))


@st.composite
def documents(draw: st.DrawFn) -> Any:
    """One that the schema allows, with up to three changes."""
    document = draw(values(SCHEMA))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 1, 2, 3]))):
        path = draw(st.sampled_from(list(places(document))))
        there = at_path(document, path)
        if isinstance(there, dict) and draw(st.booleans()):
            there[draw(st.sampled_from(KEYS))] = draw(st.sampled_from(ODD) | JSON)
        elif path:
            at_path(document, path[:-1])[path[-1]] = draw(st.sampled_from(ODD) | JSON)
        document = copy.deepcopy(document)
    return document


def at_path(document: Any, path: tuple[Any, ...]) -> Any:
    for part in path:
        document = document[part]
    return document


def test_schema_and_camera_agree(request: pytest.FixtureRequest) -> None:
    taken = {True: 0, False: 0}
    exhaustive = request.config.getoption("--exhaustive", default=False)

    @settings(max_examples=10_000 if exhaustive else 600, suppress_health_check=[HealthCheck.too_slow])
    @given(documents())
    @example({"agent": {"capture": {"sources": {"side": {"pattern": "*.jpg"}}}}})
    @example({"agent": {"labels": {f"n{n}": "x" for n in range(16)}}})
    @example({"agent": {"labels": {"site": "x\n"}}})
    @example({"agent": {"maintenance": {"windows": [" MON-FRI 22:00-04:00\n"], "time_zone": "Europe/Atlantis"}}})
    @example({"agent": {"cloud": {"proxy_url": "http://"}}})
    @example({"agent": None, "targets": {"pipeline": None}})
    @example({"agent": {"labels": {"a b": None}, "capture": {"sources": {"": {}}}}, "targets": {"": None}})
    def look(document: Any) -> None:
        taken[compare(document)] += 1

    look()
    assert taken[True] > 100
    assert taken[False] > 50
    print(f"{sum(taken.values())} documents tried, the schema took {taken[True]}")


def test_schema_and_camera_agree_on_every_odd_value_of_every_key() -> None:
    count = 0
    for path in [
        *ALL,
        "labels.site",
        "labels.a b",
        "capture.sources.back.pattern",
        "cloud.endpoint",
        "jobs.allow",
        "nope",
    ]:
        parts = path.replace("<name>", "front").split(".")
        limits = [limit + step for limit in bounds(path) for step in (0, -1, 1, -0.001, 0.001)]
        for odd in [*ODD, *limits]:
            document: Any = copy.deepcopy(odd)
            for part in reversed(["agent", *parts]):
                document = {part: document}
            compare(document)
            count += 1
    for odd in ODD:
        for document in ({"targets": {"pipeline": odd}}, {"targets": {"pipeline": {"x": odd}}}, {"targets": odd}):
            compare(copy.deepcopy(document))
            count += 1
        for document in ({"agent": odd}, {"agent": {"capture": odd}}, {"agent": {"capture": {"sources": odd}}}, odd):
            compare(copy.deepcopy(document))
            count += 1
    assert count > 1000
    print(f"{count} odd values tried")


def bounds(path: str) -> list[float]:
    field = setting_keys.field_at(tuple(path.replace("<name>", "front").split(".")))
    marks = field.metadata if field else []
    return [getattr(mark, side) for mark in marks for side in ("ge", "le") if hasattr(mark, side)]


def test_the_schema_has_every_remote_key_and_no_other() -> None:
    def keys(schema: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[str]:
        inner = dict(schema.get("properties", {}))
        if isinstance(schema.get("additionalProperties"), dict) and "properties" in schema["additionalProperties"]:
            inner["<name>"] = schema["additionalProperties"]
        if not inner:
            yield ".".join(path)
        for key, below in inner.items():
            yield from keys(below, (*path, key))

    def marked(model: type[Section], path: tuple[str, ...] = ()) -> Iterator[str]:
        for name in model.model_fields:
            here = (*path, name)
            section, many = script("desired_schema").section_of(model.model_fields[name].annotation)
            if section:
                yield from marked(section, (*here, *(["<name>"] if many else [])))
            elif setting_keys.remote(here) or setting_keys.remote((*here, "x")):
                yield ".".join(here)

    assert sorted(keys(SCHEMA["$defs"]["agent"])) == sorted(ALL)
    assert sorted(marked(Settings)) == sorted(ALL)


def test_the_schema_helps_an_editor() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    interval = SCHEMA["$defs"]["agent"]["properties"]["telemetry"]["properties"]["interval_s"]
    assert interval == {
        "description": "Length of a report's window. Unit: s. Takes effect at once.",
        "default": 60,
        "maximum": 86400,
        "minimum": 1,
        "type": ["number", "null"],
    }

    def tables(schema: Any) -> Iterator[dict[str, Any]]:
        if isinstance(schema, dict):
            if "properties" in schema and "type" in schema:
                yield schema
            for below in schema.values():
                yield from tables(below)

    assert all(table["additionalProperties"] is False for table in tables(SCHEMA))
    for table in tables(SCHEMA["$defs"]["agent"]):
        assert all(below["description"] for below in table["properties"].values())


def test_the_job_configure_has_the_same_definitions_and_its_whole_may_be_null_nowhere() -> None:
    schema = json.loads(script("document_schemas").outputs()[ROOT / "docs" / "schemas" / "configure.schema.json"])
    assert {name: schema["$defs"][name] for name in SCHEMA["$defs"]} == SCHEMA["$defs"]
    validator = jsonschema.Draft202012Validator(ecma(schema))
    job = {"version": "1.0", "operation": "configure"}
    taken_back = {"agent": {"capture": {"sources": {"front": None}}, "log": None}, "targets": {"pipeline": None}}
    assert validator.is_valid(job | taken_back)
    assert wishes.validate(SITE, layers.patched(Desired(), taken_back))[1] == []
    assert not validator.is_valid({**job, "agent": None})
    assert not validator.is_valid({**job, "agent": {"telemetry": {"interval_s": 0}}})
    assert not validator.is_valid({**job, "agent": {"cloud": {"endpoint": "x"}}})
    assert not validator.is_valid({**job, "targets": {"pipeline": 1}})


def test_the_documents_in_the_docs_are_of_the_schema() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    found = [json.loads(block) for block in re.findall(r'^```json\n(\{"state".*?)^```', text, re.MULTILINE | re.DOTALL)]
    assert found
    for document in found:
        VALIDATOR.validate(document["state"]["desired"])


# ---- the page of all settings ------------------------------------------------------------------------------------------


def test_the_page_has_every_key_once_and_says_who_may_set_it() -> None:
    page = script("generate_docs").page()
    first, _, second = page.partition("## All remote keys")
    tables = re.findall(r"^## (.*)\n((?:.|\n)*?)(?=^## |\Z)", first, re.MULTILINE)
    said = {}
    for heading, body in tables:
        path = "" if heading == "Top level" else heading.strip("[]") + "."
        for row in re.findall(r"^\| `(\w+)` \|(.*)\|$", body, re.MULTILINE):
            key = path + row[0]
            assert key not in said, key
            said[key] = re.split(r"(?<!\\)\|", row[1])[3].strip(" `")
    assert len(said) > 50
    assert {key for key, remote in said.items() if remote != "local only"} == set(ALL)
    assert set(re.findall(r"^\| `([\w.<>]+)` \|", second, re.MULTILINE)) == set(ALL)
    assert {"live", "restart-component", "connectivity"} <= set(said.values())


def test_a_stale_page_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    docs = script("generate_docs")
    monkeypatch.setattr(docs, "PAGE", tmp_path / "settings.md")
    monkeypatch.setattr(docs.conformance_docs, "outputs", dict)
    monkeypatch.setattr(docs.document_schemas, "outputs", lambda: {tmp_path / "desired.schema.json": "{}\n"})
    monkeypatch.setattr(sys, "argv", ["generate_docs.py", "--check"])
    assert docs.main() == 1
    monkeypatch.setattr(sys, "argv", ["generate_docs.py"])
    assert docs.main() == 0
    monkeypatch.setattr(sys, "argv", ["generate_docs.py", "--check"])
    assert docs.main() == 0
    (tmp_path / "desired.schema.json").write_text("{} \n")
    assert docs.main() == 1
    assert capsys.readouterr().out.splitlines()[-1] == "desired.schema.json is stale: run scripts/generate-docs"
