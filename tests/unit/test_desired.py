from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent import setting_keys as schema
from agent import settings_file
from agent.config import desired as wishes
from agent.config import origins, reported
from agent.config import trial as trials
from agent.config.desired import Desired, Problem
from agent.config.layers import InForce, Layer
from agent.config.trial import Trial
from agent.errors import RefusedError
from agent.settings import Remote, Settings

SITE: dict[str, Any] = {
    "thing_name": "cam-1",
    "cloud": {"proxy_url": "http://user:word@proxy:3128"},
    "config": {"targets": {"pipeline": {"path": "/etc/p/config.json"}}},
    "capture": {"slow_ratio": 0.8, "sources": {"front": {"directory": "/var/lib/capture/front"}}},
    "telemetry": {"interval_s": 30},
}
SETTINGS = settings_file.validate(SITE, "site")

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters())
anything = st.recursive(
    scalars, lambda below: st.lists(below, max_size=4) | st.dictionaries(st.text(), below, max_size=4)
)
keys = st.sampled_from(
    [
        "agent",
        "targets",
        "capture",
        "sources",
        "front",
        "interval_s",
        "telemetry",
        "log",
        "level",
        "cloud",
        "pipeline",
        "",
    ]
)
likely = st.recursive(
    scalars, lambda below: st.dictionaries(keys, below, max_size=5) | st.lists(below, max_size=2), max_leaves=12
)


def problems(document: Any) -> dict[str, str]:
    candidate, found = wishes.validate(SITE, document)
    assert (candidate is None) == bool(found)
    return {problem.pointer: problem.code for problem in found}


@given(anything | likely | st.fixed_dictionaries({"agent": likely}) | st.fixed_dictionaries({"targets": likely}))
@example({"agent": {"capture": {"sources": {"front": {"interval_s": 10**400}}}}})
@example({"targets": {"pipeline": {"x": "\ud800"}}})
def test_any_document_is_judged_without_a_crash(document: Any) -> None:
    candidate, found = wishes.validate(SITE, document)
    assert (candidate is None) == bool(found)
    for problem in found:
        assert problem.message
        json.dumps(problem.as_json())
    wishes.digest(document)
    if candidate:
        room = reported.room_beside(candidate.desired.as_json())
        status = {"state": "applied", "desired_version": 1, "errors": []}
        mirror = reported.build(candidate.desired, candidate.desired, candidate.settings, status, room)
        assert reported.size(mirror) <= max(room, 200)


def test_a_document_nested_without_end_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(50_000):
        deep = {"a": deep}
    assert list(problems({"agent": deep}).values()) == ["too_deep"]
    assert wishes.digest(deep) == wishes.digest(deep)
    while deep:  # taken apart from the outside, since freeing it at once would recurse
        deep = deep.pop("a")


def test_a_document_that_fits_no_shadow_is_refused() -> None:
    document = {"targets": {"pipeline": {"x": "y" * 9000}}}
    assert [problem.code for problem in wishes.parse(document)[1]] == ["too_large"]
    assert problems(document) == {}, "shadow and fleet may set as much each"
    assert problems({"targets": {"pipeline": {"x": "y" * 17_000}}}) == {"": "too_large"}


@pytest.mark.parametrize("filling", ["x", "ä", "\U0001f4f7", '"', "\0", "\\"])
def test_a_document_of_8192_bytes_is_taken_and_of_one_more_is_not(filling: str) -> None:
    """Bytes are those of the shortest JSON, in which a character is itself."""

    def document(length: int) -> Any:
        return {"targets": {"pipeline": {"x": filling * length}}}

    each = reported.size(document(1)) - reported.size(document(0))
    tried = 0
    for length in range((8100 - reported.size(document(0))) // each, 8200 // each):
        size = reported.size(document(length))
        codes = [problem.code for problem in wishes.parse(document(length))[1]]
        assert codes == (["too_large"] if size > 8192 else []), size
        tried += 1
    print(f"{tried} sizes tried")


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ([], {"": "wrong_type"}),
        ("on", {"": "wrong_type"}),
        ({"agnet": {}}, {"/agnet": "unknown_key"}),
        ({"agent": [], "targets": 3}, {"/agent": "wrong_type", "/targets": "wrong_type"}),
        ({"targets": {"pipeline": [1]}}, {"/targets/pipeline": "wrong_type"}),
        ({"targets": {"pipelin": {}}}, {"/targets/pipelin": "unknown_target"}),
        ({"targets": {"pipeline": {"a/b": [1, None]}}}, {"/targets/pipeline/a~1b": "not_json"}),
        ({"targets": {"pipeline": {"x": math.inf}}}, {"/targets/pipeline/x": "not_json"}),
        ({"agent": {"cloud": {"endpoint": "evil.example"}}}, {"/agent/cloud/endpoint": "local_only"}),
        ({"agent": {"thing_name": "other"}}, {"/agent/thing_name": "local_only"}),
        ({"agent": {"jobs": {"allow": []}}}, {"/agent/jobs/allow": "local_only"}),
        ({"agent": {"provisioning": {"parameters": {"a": "b"}}}}, {"/agent/provisioning/parameters/a": "local_only"}),
        ({"agent": {"jobs": {"facts": {"site": "Graz"}}}}, {"/agent/jobs/facts/site": "local_only"}),
        ({"agent": {"capture": {"sources": {"front": {"directory": "/"}}}}}, {"/agent/capture/sources/front/directory": "local_only"}),
        ({"agent": {"capture": {"sources": {"back": {"interval_s": 1}}}}}, {"/agent/capture/sources/back/interval_s": "unknown_name"}),
        ({"agent": {"capture": None}}, {"/agent/capture": "wrong_type"}),
        ({"agent": {"capture": {"sources": 5}}}, {"/agent/capture/sources": "wrong_type"}),
        ({"agent": {"telemetry": {"intervall_s": 5}}}, {"/agent/telemetry/intervall_s": "unknown_key"}),
        ({"agent": {"telemetry": {"interval_s": 0}}}, {"/agent/telemetry/interval_s": "invalid_value"}),
        ({"agent": {"telemetry": {"interval_s": "60"}}}, {"/agent/telemetry/interval_s": "wrong_type"}),
        ({"agent": {"telemetry": {"interval_s": True}}}, {"/agent/telemetry/interval_s": "wrong_type"}),
        ({"agent": {"telemetry": {"interval_s": {"a": 1}}}}, {"/agent/telemetry/interval_s": "invalid_value"}),
        ({"agent": {"log": {"level": "loud"}, "capture": {"slow_ratio": 2}}}, {"/agent/log/level": "invalid_value", "/agent/capture/slow_ratio": "invalid_value"}),
    ],
)  # fmt: skip
def test_every_mistake_has_its_pointer_and_code(document: Any, expected: dict[str, str]) -> None:
    assert problems(document) == expected


def test_the_words_help() -> None:
    def words(document: Any) -> str:
        return wishes.validate(SITE, document)[1][0].message

    assert words({"agent": {"telemetry": {"intervall_s": 5}}}) == "unknown key, did you mean interval_s?"
    assert "local only" in words({"agent": {"cloud": {"endpoint": "x"}}})
    assert words({"targets": {"pipelin": {}}}) == "unknown target, did you mean pipeline?"
    assert words({"agent": {"telemetry": {"interval_s": "60"}}}) == 'write 60.0 instead of "60"'


def test_merging_follows_the_shadow_over_the_file_over_the_default() -> None:
    document = {"agent": {"telemetry": {"interval_s": 10}, "capture": {"slow_ratio": None}}}
    candidate, _ = wishes.validate(SITE, document)
    assert candidate
    assert candidate.settings.telemetry.interval_s == 10
    assert candidate.settings.capture.slow_ratio == 0.9
    assert candidate.settings.capture.sources["front"].directory == Path("/var/lib/capture/front")
    assert SITE["telemetry"]["interval_s"] == 30


@given(st.permutations(["a", "b", "c"]))
def test_the_digest_does_not_depend_on_the_order_of_keys(order: list[str]) -> None:
    assert wishes.digest({key: key for key in order}) == wishes.digest({"a": "a", "b": "b", "c": "c"})
    assert wishes.digest({"a": 1}) != wishes.digest({"a": True})


def test_nothing_wanted_is_the_same_in_every_form() -> None:
    forms: list[Any] = [None, {}, {"agent": {}}, {"targets": {}}, {"agent": None, "targets": {"pipeline": None}}]
    assert len({wishes.parse(form)[0].digest for form in forms}) == 1


def plan(document: Any, before: dict[str, Any] | None = None, remote: wishes.Marks = schema.remote) -> wishes.Plan:
    candidate, found = wishes.validate(SITE, document, remote)
    assert candidate, found
    return wishes.plan(SETTINGS, before or {}, candidate, remote)


def test_what_a_change_touches() -> None:
    level = plan({"agent": {"log": {"level": "debug"}}})
    assert (level.keys, level.gated, level.connectivity) == ((("log", "level"),), False, False)
    assert plan({"agent": {"telemetry": {"interval_s": 30}}}).keys == ()
    assert plan({"agent": {"capture": {"sources": {"front": {"interval_s": 2}}}}}).gated
    assert plan({"targets": {"pipeline": {"fps": 1}}}).targets == ("pipeline",)
    assert plan({"targets": {"pipeline": {"fps": 1}}}, {"pipeline": {"fps": 1}}).targets == ()
    assert plan({}, {"pipeline": {"fps": 1}}).targets == ("pipeline",)

    def marks(path: tuple[str, ...]) -> Remote | None:
        return Remote("connectivity") if path == ("cloud", "keep_alive_s") else schema.remote(path)

    assert plan({"agent": {"cloud": {"keep_alive_s": 60}}}, remote=marks).connectivity


def build(wanted: Any, in_force: Any, room: int = 8000, errors: int = 0) -> dict[str, Any]:
    candidate, _ = wishes.validate(SITE, in_force)
    assert candidate
    status = {
        "state": "rejected",
        "desired_version": 7,
        "errors": [{"pointer": f"/{n}", "message": "m" * 200, "code": "c"} for n in range(errors)],
    }
    return reported.build(wishes.parse(wanted)[0], candidate.desired, candidate.settings, status, room)


def test_reported_mirrors_what_is_in_force_for_each_wanted_key() -> None:
    good = {"agent": {"telemetry": {"interval_s": 60}}, "targets": {"pipeline": {"fps": 2}}}
    bad = {"agent": {"telemetry": {"interval_s": -1}, "log": {"level": "debug"}}, "targets": {"pipeline": {"fps": 99}}}
    document = build(bad, good)
    assert document["agent"] == {"telemetry": {"interval_s": 60}, "log": {"level": "info"}}
    assert isinstance(document["agent"]["telemetry"]["interval_s"], int)
    assert document["targets"] == {"pipeline": {"fps": 2}}
    exact = {"agent": {"telemetry": {"interval_s": 60.0}}}
    assert isinstance(build(exact, exact)["agent"]["telemetry"]["interval_s"], float)


@given(st.integers(300, 4000), st.integers(0, 12), st.integers(0, 3000))
def test_reported_is_trimmed_to_its_room_and_says_what_it_left_out(room: int, errors: int, length: int) -> None:
    document = build(
        {}, {"targets": {"pipeline": {"x": "y" * length}}, "agent": {"log": {"level": "debug"}}}, room, errors
    )
    assert reported.size(document) <= room
    assert document["status"]["state"] == "rejected"
    assert bool(document["status"]["errors"]) == bool(errors)
    if "targets" not in document:
        assert length + 200 * errors > 100


@given(likely, likely)
@example({"a": {"b": 1}}, {"a": 1})
def test_the_difference_turns_one_reported_into_the_other(old: Any, new: Any) -> None:
    def clean(tree: Any) -> Any:
        if isinstance(tree, dict):
            below = {key: clean(value) for key, value in tree.items() if value is not None}
            return {key: value for key, value in below.items() if value != {}}
        return tree

    old, new = json.loads(json.dumps([clean({"s": old}), clean({"s": new})]), parse_constant=str)
    assert clean(wishes.merge(old, reported.difference(old, new))) == new


def test_reported_nulls_what_is_gone() -> None:
    assert reported.difference({"a": 1, "b": {"c": 1, "d": 2}}, {"b": {"c": 1}}) == {"a": None, "b": {"d": None}}
    assert reported.difference({"a": 1}, {"a": True}) == {"a": True}


def in_force(document: Any, version: int, at: float, before: InForce | None = None) -> InForce:
    shadow = (before or InForce()).shadow.revised(wishes.parse(document)[0], f"shadow version {version}", at)
    return InForce(version, shadow=shadow)


def explain(key: str, force: InForce) -> dict[str, Any]:
    candidate, _ = wishes.validate(SITE, {"agent": force.desired.agent})
    assert candidate
    return origins.explain(key, SITE, candidate.settings, force)


@pytest.mark.parametrize(
    ("key", "message", "hint"),
    [
        ("log", "log is a table; its keys: level", "ask for one of them: log.level"),
        ("capture", "capture is a table; its keys: budget_pct, slow_ratio,", "ask for one of them: capture.budget_pct"),
        (
            "capture.sources",
            "capture.sources is a table; its keys: front",
            "ask for one of them: capture.sources.front",
        ),
        ("capture.sources.front", "is a table; its keys: directory, pattern, interval_s", "capture.sources.front.d"),
        ("updates.targets", "updates.targets is a table, and has no keys", "agent.toml may give it some"),
        ("capture.sources.side", "capture.sources.side is no key of agent.toml", "capture.sources has front"),
        ("captur", "captur is no key of agent.toml", "did you mean capture?"),
        ("log.", "log. is no key of agent.toml", "log has level"),
        ("", " is no key of agent.toml", ""),
    ],
)
def test_explain_of_a_table_lists_its_keys(key: str, message: str, hint: str) -> None:
    with pytest.raises(RefusedError) as caught:
        explain(key, in_force({}, 1, 1.0))
    assert caught.value.code == "unknown_key"
    assert message in caught.value.message
    assert hint in str(caught.value.hint)


def test_explain_names_the_origin_and_what_it_overrides() -> None:
    first = in_force({"agent": {"telemetry": {"interval_s": 10}}, "targets": {"pipeline": {"fps": 2}}}, 5, 100.0)
    second = in_force(
        {"agent": {"telemetry": {"interval_s": 10}, "log": {"level": "debug"}}, "targets": {"pipeline": {"fps": 3}}},
        9, 200.0, first,
    )  # fmt: skip
    answer = explain("telemetry.interval_s", second)
    assert (answer["value"], answer["origin"], answer["since"]) == (10, "shadow version 5", 100.0)
    assert answer["overrides"] == [{"origin": "site file", "value": 30}, {"origin": "default", "value": 60}]
    assert (answer["default"], answer["unit"], answer["remote"]) == (60, "s", True)
    assert answer["description"] == "Length of a report's window."
    assert explain("log.level", second)["origin"] == "shadow version 9"
    assert explain("capture.slow_ratio", second)["overrides"] == [{"origin": "default", "value": 0.9}]
    assert explain("capture.sources.front.interval_s", second)["origin"] == "default"
    assert explain("capture.sources.front.directory", second)["default"] is None
    assert explain("targets.pipeline.fps", second)["since"] == 200.0
    assert explain("targets.pipeline", second)["value"] == {"fps": 3}
    assert explain("targets.pipeline.other", second)["origin"] == "site file /etc/p/config.json"
    assert explain("cloud.proxy_url", second)["value"] == "http://[redacted]@proxy:3128"
    everything = origins.effective(SITE, SETTINGS, second)
    assert everything["targets.pipeline.fps"]["origin"] == "shadow version 9"
    assert everything["capture.dark_luma"] == {"value": 28.0, "origin": "default", "since": None, "remote": True}


def test_a_removed_key_comes_from_the_default() -> None:
    answer = explain("capture.slow_ratio", in_force({"agent": {"capture": {"slow_ratio": None}}}, 3, 1.0))
    assert (answer["value"], answer["origin"]) == (0.9, "default")


@given(st.text() | st.lists(keys, min_size=1).map(".".join))
@example("telemetry")
@example("capture.sources.front")
@example("targets.nope")
def test_explain_refuses_what_is_no_key(key: str) -> None:
    known = origins.effective(SITE, SETTINGS, InForce())
    if key in known or key.startswith("targets.pipeline"):
        assert origins.explain(key, SITE, SETTINGS, InForce())["key"] == key
    else:
        with pytest.raises(RefusedError) as caught:
            origins.explain(key, SITE, SETTINGS, InForce())
        assert caught.value.code == "unknown_key"


def trial(**changes: Any) -> Trial:
    shadow = Layer(
        {"log": {"level": "debug"}}, {"pipeline": {"fps": 1}}, {"/agent/log/level": ("shadow version 4", 9.0)}
    )
    values: dict[str, Any] = {
        "candidate": InForce(4, Layer({}, {}, {}), shadow), "applied": shadow.desired.as_json(), "job": "",
        "job_digest": "", "judging_s": 0.0, "where": "", "changed": ("pipeline",),
        "previous": {"pipeline": None}, "gated": True, "connectivity": False, "reboots": False, "stable_for_s": 60.0,
        "reach_within_s": 0.0, "reference": {"front": {"rate": 1}}, "started": 1000.0, "boot_id": "one",
    }  # fmt: skip
    return Trial(**{**values, **changes})


def test_one_unplanned_restart_is_an_attempt_the_second_takes_back() -> None:
    once = trials.after_restart(trial(), 1030.0, "one")
    assert (once.phase, once.attempts) == ("trial", 2)
    twice = trials.after_restart(once, 1040.0, "two")
    assert (twice.phase, twice.problems[0].code) == ("reverting", "trial_interrupted")
    assert "rebooted" in twice.problems[0].message
    thrice = trials.after_restart(twice, 9999.0, "three")
    assert (thrice.phase, thrice.problems, thrice.attempts) == ("reverting", twice.problems, 2)


def test_the_deadline_holds_across_boots_and_a_clock_set_back_does_not_stretch_it() -> None:
    late = trials.after_restart(trial(), trial().deadline + 1, "two")
    assert (late.phase, late.problems[0].code) == ("reverting", "trial_deadline")
    back = trials.after_restart(trial(), 0.0, "two")
    assert back.attempts == 2
    assert trials.time_left_s(back, 0.0) == trial().deadline_s
    assert trials.after_restart(back, 0.0, "three").phase == "reverting"


@given(st.lists(st.tuples(st.floats(0, 1e9), st.sampled_from(["one", "two"]))))
def test_a_trial_never_survives_more_than_one_restart(restarts: list[tuple[float, str]]) -> None:
    record = trial()
    for now, boot in restarts:
        record = trials.from_json(json.loads(json.dumps(trials.after_restart(record, now, boot).as_json())))
    assert record.phase == "reverting" or len(restarts) <= 1


def test_a_record_survives_being_kept() -> None:
    kept = trials.reverting(trial(), [Problem("/targets/pipeline", "dark", "trial_failed")])
    assert trials.from_json(json.loads(json.dumps(kept.as_json()))) == kept
    assert kept.desired == Desired({"log": {"level": "debug"}}, {"pipeline": {"fps": 1}})
    assert isinstance(SETTINGS, Settings)
