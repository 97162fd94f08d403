"""What is reported always fits a shadow, never loses the state, and its differences merge to exactly it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent import settings_file
from agent.cloud.shadow import Rate
from agent.config import desired as wishes
from agent.config import reported
from agent.config.desired import Desired
from tests.fakes_shadow import merge

SITE: dict[str, Any] = {
    "capture": {"sources": {"front": {"directory": "/var/lib/capture/front"}}},
    "config": {"targets": {"pipeline": {"path": "/etc/p/config.json"}}},
    "labels": {"site": "north"},
}
SETTINGS = settings_file.validate(SITE, "site")
STATES = ("applied", "trial", "rejected", "reverted")

text = st.text(st.characters(codec=None), max_size=12) | st.sampled_from(
    ["", "ü" * 40, "像" * 300, "\0" * 90, "\ud800", "/~"]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | text | st.sampled_from([10**400, "x" * 3000])
trees = st.recursive(
    scalars, lambda below: st.lists(below, max_size=4) | st.dictionaries(text, below, max_size=4), max_leaves=15
)
documents = st.dictionaries(text, st.dictionaries(text, trees, max_size=4), max_size=4)
errors = st.lists(st.fixed_dictionaries({"pointer": text, "message": text, "code": st.just("c")}), max_size=30)
statuses = st.fixed_dictionaries(
    {"state": st.sampled_from(STATES), "desired_version": st.integers(0, 2**63 - 1), "errors": errors},
    optional={"waits_for": text, "job": text, "else": trees},
)
agents = st.fixed_dictionaries(
    {},
    optional={
        "telemetry": st.fixed_dictionaries({"interval_s": st.sampled_from([60, 60.0, "60", None, [1]])}),
        "capture": st.just({"sources": {"front": {"interval_s": 1, "nothing": 2}}}),
        "labels": st.dictionaries(text, text, max_size=3),
        "unknown": trees,
    },
)


def levels(tree: Any) -> int:
    """Keys below keys, arrays that hold objects or arrays among them."""
    below = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    nested = any(isinstance(each, (dict, list)) for each in below)
    return (isinstance(tree, dict) or nested) + max((levels(each) for each in below), default=0)


def assert_a_shadow_takes(tree: Any, *, in_array: bool = False) -> None:
    """No null, no empty object outside of arrays, valid text, finite numbers of 64 bits."""
    if isinstance(tree, dict):
        assert in_array or all(value != {} for value in tree.values())
        for key, value in tree.items():
            key.encode()
            assert_a_shadow_takes(value, in_array=in_array)
    elif isinstance(tree, list):
        for each in tree:
            assert_a_shadow_takes(each, in_array=True)
    elif isinstance(tree, str):
        tree.encode()
    else:
        assert isinstance(tree, (bool, int, float))
        assert isinstance(tree, float) or abs(tree) < 2**63


def the_same(one: Any, other: Any) -> bool:
    """Also in type: 1, 1.0 and true differ."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@pytest.mark.conformance("C-SHDW-09", "C-SHDW-10")
@given(documents, agents, agents, statuses, st.integers(-300, 9000))
@example({}, {}, {}, {"state": "applied", "desired_version": 0, "errors": []}, 0)
def test_whatever_is_in_force_the_report_fits_and_the_state_is_in_it(
    targets: dict[str, Any], agent: dict[str, Any], wanted: dict[str, Any], status: dict[str, Any], room: int
) -> None:
    document = reported.build(Desired(wanted, {}), Desired(agent, targets), SETTINGS, status, room)
    sent = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    assert len(sent) <= max(room, reported.LEAST_BYTES)
    assert json.loads(sent) == document
    assert levels(document) <= max(reported.MOST_LEVELS, levels({"agent": wanted}))
    assert_a_shadow_takes(document)
    assert document["status"]["state"] == status["state"]
    assert document["status"]["desired_version"] == status["desired_version"]
    kept, counted = document["status"].get("errors", []), document["status"].get("more_errors", 0)
    assert not kept or len(kept) + counted == len(status["errors"])
    for name, tree in document.get("targets", {}).items():
        assert any(name == key.encode(errors="replace").decode() for key in targets), tree


def test_the_least_that_is_reported_is_the_state_and_its_version() -> None:
    """For every state and the longest version: 80 bytes are enough, and nothing but these two is there."""
    for state in STATES:
        status = {
            "state": state,
            "desired_version": 2**63 - 1,
            "errors": [{"pointer": "p", "message": "m", "code": "c"}],
        }
        for room in (-1, 0, reported.LEAST_BYTES):
            document = reported.build(Desired(), Desired({}, {"t": {"x": 1}}), SETTINGS, status, room)
            assert document == {"status": {"state": state, "desired_version": 2**63 - 1}}
            assert reported.size(document) <= reported.LEAST_BYTES


@pytest.mark.conformance("C-SHDW-10")
def test_with_less_and_less_room_the_least_important_goes_first() -> None:
    """At every room from 0 to 5,000 bytes; what is kept grows with the room, in the order of importance."""
    errors = [{"pointer": f"/agent/key{n}", "message": "m" * 300, "code": "invalid_value"} for n in range(9)]
    status = {"state": "rejected", "desired_version": 7, "errors": errors, "waits_for": "the window"}
    targets = {"big": {"x": "y" * 900}, "small": {"x": "y" * 90}}
    agent = {"log": {"level": "info"}}
    seen: list[tuple[bool, ...]] = []
    for room in range(5001):
        document = reported.build(Desired(agent), Desired(agent, targets), SETTINGS, status, room)
        assert reported.size(document) <= max(room, reported.LEAST_BYTES)
        told, mirrors = document["status"], document.get("targets", {})
        kept = (
            bool(told.get("errors")),
            "waits_for" in told,
            "agent" in document,
            "small" in mirrors,
            "big" in mirrors,
            len(told.get("errors", [])) == 9,
            len(told.get("errors", [])) == 9 and len(told["errors"][0]["message"]) == 300,
        )
        assert list(kept) == sorted(kept, reverse=True), (room, kept)
        out = {f"/targets/{name}" for name in targets if name not in mirrors} | {"/agent/log"} - {
            f"/agent/{name}" for name in document.get("agent", {})
        }
        if told.get("left_out"):
            assert set(told["left_out"]) in (out, {name[: name.rindex("/")] for name in out})
        elif "waits_for" in told:
            assert not out
        seen.append(kept)
    assert seen[-1] == (True,) * 7
    assert len(set(seen)) == 8
    print(f"{len(seen)} sizes of room tried, {len(set(seen))} degrees of detail")


def nested(levels_below: int) -> dict[str, Any]:
    tree: dict[str, Any] = {"value": 1}
    for _ in range(levels_below - 1):
        tree = {"k": tree}
    return tree


@pytest.mark.conformance("C-SHDW-10")
@pytest.mark.parametrize("depth", range(1, 12))
def test_what_lies_deeper_than_a_shadow_is_left_out_by_name_unless_the_shadow_holds_as_deep(depth: int) -> None:
    """`targets` and the name are two levels; the fleet's documents may be deeper than what the shadow itself took."""
    status = {"state": "applied", "desired_version": 1, "errors": []}
    in_force = Desired({}, {"deep": nested(depth), "flat": {"x": 1}})
    document = reported.build(Desired(), in_force, SETTINGS, status, 8000)
    assert document["targets"]["flat"] == {"x": 1}
    assert ("deep" in document["targets"]) == (depth + 2 <= reported.MOST_LEVELS)
    assert document["status"].get("left_out", []) == ([] if "deep" in document["targets"] else ["/targets/deep"])
    same = reported.build(Desired({}, {"deep": nested(depth)}), in_force, SETTINGS, status, 8000)
    assert same["targets"]["deep"] == nested(depth)


@pytest.mark.conformance("C-SHDW-09")
@pytest.mark.parametrize(
    "document",
    [
        {"x": [1, None]},
        {"x": [[None]]},
        {"x": [{"y": None}]},
        {"x": float("nan")},
        {"x": float("inf")},
        {"x": 10**400},
        {"x": object()},
    ],
)
def test_a_document_that_no_shadow_can_hold_is_left_out_by_name(document: dict[str, Any]) -> None:
    status = {"state": "applied", "desired_version": 1, "errors": []}
    built = reported.build(Desired(), Desired({}, {"odd": document, "fit": {"x": [1, 2]}}), SETTINGS, status, 8000)
    assert built == {"targets": {"fit": {"x": [1, 2]}}, "status": {**status, "left_out": ["/targets/odd"]}}


sound = st.text(max_size=4)
values = st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, 1.0, 0.5]) | sound
plain = st.recursive(
    values,
    lambda below: (
        st.lists(below | st.just({}), max_size=3)
        | st.dictionaries(st.sampled_from("abc"), below, min_size=1, max_size=3)
    ),
    max_leaves=12,
)
sections = st.dictionaries(st.sampled_from("abc"), plain, max_size=3)
loose = st.recursive(
    st.none() | values, lambda below: st.dictionaries(st.sampled_from("abc"), below, max_size=3), max_leaves=12
)


@pytest.mark.conformance("C-SHDW-08", "C-SHDW-09")
@given(sections, sections)
@example({"a": {"b": 1}}, {"a": 1})
@example({"a": 1}, {"a": {"b": 1}})
@example({"a": [1]}, {"a": [True]})
@example({"a": 15}, {"a": 15.0})
@example({"a": {"b": {"c": 1}}}, {"a": {"c": 1}})
@example({"a": [{"b": 1, "c": 2}]}, {"a": [{"b": 1}]})
def test_a_difference_merged_as_aws_does_gives_exactly_the_new(old: dict[str, Any], new: dict[str, Any]) -> None:
    patch = reported.difference(old, new)
    assert the_same(merge(old, patch), new)
    assert (patch == {}) == the_same(old, new)
    assert reported.difference(new, new) == {}


@given(sections, st.dictionaries(st.sampled_from("abc"), loose, max_size=3))
def test_null_and_empty_objects_count_as_nothing(old: dict[str, Any], new: dict[str, Any]) -> None:
    there = merge(old, reported.difference(old, new))
    assert the_same(there, merge({}, new))
    assert reported.difference(there, new) == {}


def test_an_array_goes_whole() -> None:
    assert reported.difference({"a": [1, 2, 3], "b": 1}, {"a": [1, 2, 4], "b": 1}) == {"a": [1, 2, 4]}


@pytest.mark.parametrize(
    "desired", [None, {}, [], 7, "x", {"a": [None]}, {"a": "\ud800"}, {"a": float("nan")}, object()]
)
def test_there_is_a_room_beside_whatever_is_desired(desired: Any) -> None:
    assert 0 <= reported.room_beside(desired) < reported.SHADOW_BYTES


def test_no_room_beside_a_desired_that_takes_all_and_text_counts_by_its_bytes() -> None:
    assert reported.room_beside({"a": "x" * 9000}) == 0
    assert reported.room_beside({"a": "ü" * 100}) == reported.room_beside({"a": "x" * 200})
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    assert reported.room_beside(deep) == reported.SHADOW_BYTES // 2


def test_a_value_is_written_as_it_was_asked_for_and_never_true_for_one() -> None:
    status = {"state": "applied", "desired_version": 1, "errors": []}

    def mirror(asked: Any) -> Any:
        wanted = wishes.parse({"agent": {"telemetry": {"interval_s": asked}}})[0]
        return reported.build(wanted, Desired(), SETTINGS, status, 8000)["agent"]["telemetry"]["interval_s"]

    usual = SETTINGS.telemetry.interval_s
    for asked in (usual, float(usual), int(usual), True, [usual], "60", None, {}):
        written = mirror(asked)
        assert written == usual
        assert not isinstance(written, bool)
    assert isinstance(mirror(float(usual)), float)
    assert isinstance(mirror(int(usual)), int)
    assert isinstance(mirror(True), int)


@pytest.mark.conformance("C-SHDW-12")
@given(
    st.integers(1, 12),
    st.floats(0.1, 10),
    st.lists(st.floats(0, 3) | st.just(0.0), max_size=60),
)
def test_no_window_ever_holds_more_than_the_rate_allows(most: int, per_s: float, pauses: list[float]) -> None:
    rate, now, begun = Rate(most, per_s), 1000.0, list[float]()
    for pause in pauses:
        now += pause
        wait = rate.book(now)
        assert wait >= 0
        if len(begun) < most or begun[-most] + per_s <= now:
            assert wait == 0, "nobody waits where there is room"
        begun.append(now + wait)
    assert begun == sorted(begun)
    for first, last in zip(begun, begun[most:], strict=False):
        assert last - first >= per_s - 1e-6


def test_a_key_that_no_message_can_hold_is_left_alone() -> None:
    assert reported.difference({"\ud800": 1, "a": {"\udfff": 1, "b": 2}}, {"a": {"c": 1}}) == {"a": {"b": None, "c": 1}}
