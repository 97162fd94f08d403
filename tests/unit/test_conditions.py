"""Conditions: set and clear with hysteresis and hold times, root cause first, and the machine's thresholds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.health.conditions import Conditions, Observation, Rule, Verdict, health_state, root_causes
from agent.health.machine_conditions import GIB, MACHINE_RULES, MIB, observe_machine

RULES = (
    Rule("power.low", "critical", "change the battery"),
    Rule("disk.slow", "warning", "replace the disk", hold_s=60, clear_hold_s=120, depends_on=("power.low",)),
    Rule("image.late", "info", "wait", hold_s=10, depends_on=("disk.slow", "power.low")),
)


def observation(name: str, verdict: Verdict, source: str = "", message: str = "seen") -> Observation:
    return Observation(name, source, verdict, message)


def visible(conditions: Conditions) -> set[tuple[str, str]]:
    return {(c["condition"], c["source"]) for c in conditions.current()}


def test_it_sets_after_the_hold_and_clears_after_its_own() -> None:
    conditions = Conditions(RULES)
    bad, good = [observation("disk.slow", "bad", "sda")], [observation("disk.slow", "good", "sda")]
    assert conditions.observe(bad, now=0, at=1000) == []
    assert conditions.observe(bad, now=59, at=1059) == []
    events = conditions.observe(bad, now=60, at=1060)
    assert events == [
        {
            "condition": "disk.slow",
            "state": "set",
            "source": "sda",
            "severity": "warning",
            "message": "seen",
            "remedy": "replace the disk",
            "at": 1060,
        }
    ]
    assert conditions.current() == [
        {
            "condition": "disk.slow",
            "source": "sda",
            "severity": "warning",
            "message": "seen",
            "remedy": "replace the disk",
            "since": 1060,
        }
    ]
    assert conditions.observe(good, now=100, at=1100) == []
    assert conditions.observe(good, now=219, at=1219) == []
    assert [e["state"] for e in conditions.observe(good, now=220, at=1220)] == ["clear"]
    assert conditions.current() == []


def test_a_blip_starts_the_hold_again() -> None:
    conditions = Conditions(RULES)
    for now, verdict in ((0, "bad"), (50, "good"), (55, "bad"), (114, "bad")):
        assert conditions.observe([observation("disk.slow", verdict)], now=now, at=now) == []
    assert conditions.observe([observation("disk.slow", "bad")], now=115, at=115)


def test_between_the_thresholds_nothing_changes() -> None:
    conditions = Conditions([Rule("disk.filling", "warning", "delete")])
    assert conditions.observe([observation("disk.filling", "unclear")], now=0, at=0) == []
    assert conditions.observe([observation("disk.filling", "bad")], now=1, at=1)
    for now in range(2, 900, 60):
        assert conditions.observe([observation("disk.filling", "unclear")], now=now, at=now) == []
    assert visible(conditions) == {("disk.filling", "")}


def test_a_root_cause_hides_its_consequences_and_gives_them_back() -> None:
    conditions = Conditions(RULES)
    late = observation("image.late", "bad", "front")
    conditions.observe([late], now=0, at=0)
    assert [e["condition"] for e in conditions.observe([late], now=10, at=10)] == ["image.late"]
    events = conditions.observe([late, observation("power.low", "bad")], now=11, at=11)
    assert [(e["condition"], e["state"]) for e in events] == [("image.late", "clear"), ("power.low", "set")]
    events = conditions.observe([late, observation("power.low", "good")], now=12, at=12)
    assert [(e["condition"], e["state"]) for e in events] == [("power.low", "clear"), ("image.late", "set")]
    assert conditions.current()[0]["since"] == 10


def test_a_cause_explains_only_its_own_source() -> None:
    assert root_causes([("disk.slow", "sda"), ("image.late", "front")], {"image.late": ["disk.slow"]}) == [
        ("disk.slow", "sda"),
        ("image.late", "front"),
    ]
    assert root_causes([("disk.slow", ""), ("image.late", "front")], {"image.late": ["disk.slow"]}) == [
        ("disk.slow", "")
    ]


def test_what_is_no_longer_observed_is_forgotten() -> None:
    conditions = Conditions(RULES)
    conditions.observe([observation("power.low", "bad", "usb")], now=0, at=0)
    assert conditions.observe([], now=900, at=900) == []
    assert [e["state"] for e in conditions.observe([], now=901, at=901)] == ["clear"]


rounds = st.lists(
    st.tuples(
        st.floats(0, 500),
        st.lists(
            st.builds(
                Observation,
                st.sampled_from([rule.name for rule in RULES]),
                st.sampled_from(["", "front", "rear"]),
                st.sampled_from(["bad", "good", "unclear"]),
                st.just("seen"),
            ),
            max_size=6,
        ),
    ),
    max_size=40,
)


@given(rounds)
def test_events_are_exactly_the_changes_of_the_list(history: list[tuple[float, list[Observation]]]) -> None:
    conditions, replayed, now = Conditions(RULES), set(), 0.0
    for pause, observations in history:
        now += pause
        for event in conditions.observe(observations, now=now, at=now):
            key = (event["condition"], event["source"])
            if event["state"] == "set":
                assert key not in replayed
                replayed.add(key)
            else:
                replayed.remove(key)
        assert replayed == visible(conditions)


@given(rounds)
def test_no_consequence_is_shown_beside_its_cause(history: list[tuple[float, list[Observation]]]) -> None:
    conditions, now = Conditions(RULES), 0.0
    causes = {rule.name: rule.depends_on for rule in RULES}
    for pause, observations in history:
        now += pause
        conditions.observe(observations, now=now, at=now)
        shown = visible(conditions)
        assert not any(
            other in causes[name] and (other_source == source or "" in (source, other_source))
            for name, source in shown
            for other, other_source in shown
        )


@given(st.lists(st.tuples(st.floats(0.1, 30), st.sampled_from(["bad", "unclear"])), max_size=30))
def test_it_never_sets_before_its_hold(history: list[tuple[float, Verdict]]) -> None:
    conditions, now, bad_since = Conditions(RULES), 0.0, None
    for pause, verdict in history:
        now += pause
        bad_since = (now if bad_since is None else bad_since) if verdict == "bad" else None
        was_set = bool(visible(conditions))
        conditions.observe([observation("disk.slow", verdict)], now=now, at=now)
        due = bad_since is not None and now - bad_since >= 60
        assert bool(visible(conditions)) == (was_set or due)


def test_health_state() -> None:
    assert health_state([]) == "healthy"
    assert health_state([{"severity": "info"}]) == "healthy"
    assert health_state([{"severity": "info"}, {"severity": "warning"}]) == "degraded"
    assert health_state([{"severity": "warning"}, {"severity": "critical"}]) == "unhealthy"


# ---- the machine's own conditions


def disk(total: float, free: float) -> dict[str, float]:
    return {
        "system.filesystem.limit{mountpoint=/data}": total,
        "system.filesystem.usage{mountpoint=/data,state=free}": free,
    }


def verdict_of(values: dict[str, float], condition: str, **arguments: float) -> Verdict | None:
    found = [o for o in observe_machine(values, at=arguments.pop("at", 0.0), **arguments) if o.condition == condition]
    return found[0].verdict if found else None


@pytest.mark.parametrize(
    ("total", "free", "verdict"),
    [
        (100 * GIB, 9.9 * GIB, "bad"),
        (100 * GIB, 10.1 * GIB, "unclear"),
        (100 * GIB, 12.1 * GIB, "good"),
        (2 * GIB, 255 * MIB, "bad"),
        (2 * GIB, 257 * MIB, "unclear"),
        (2 * GIB, 321 * MIB, "good"),
        (200 * MIB, 30 * MIB, "good"),
        (200 * MIB, 19 * MIB, "bad"),
    ],
)
def test_disk_filling(total: float, free: float, verdict: Verdict) -> None:
    assert verdict_of(disk(total, free), "disk.filling") == verdict


def test_disk_without_inodes_is_filling() -> None:
    inodes = {
        "system.filesystem.inodes.limit{mountpoint=/data}": 1000,
        "system.filesystem.inodes.usage{mountpoint=/data,state=free}": 49,
    }
    assert verdict_of(disk(100 * GIB, 50 * GIB) | inodes, "disk.filling") == "bad"


def test_read_only_hides_filling() -> None:
    conditions = Conditions(MACHINE_RULES)
    values = disk(100 * GIB, GIB) | {"system.filesystem.read_only{mountpoint=/data}": 1}
    conditions.observe(observe_machine(values, at=0), now=0, at=0)
    assert [(c["condition"], c["source"]) for c in conditions.current()] == [("disk.read_only", "/data")]


@pytest.mark.parametrize(("celsius", "verdict"), [(85.1, "bad"), (80, "unclear"), (77, "good")])
def test_temperature(celsius: float, verdict: Verdict) -> None:
    assert verdict_of({"hw.temperature{sensor=cpu-thermal}": celsius}, "temperature.high") == verdict


@pytest.mark.parametrize(("available", "verdict"), [(69, "bad"), (100, "unclear"), (121, "good")])
def test_memory(available: float, verdict: Verdict) -> None:
    values = {"system.memory.limit": 1000 * MIB, "system.linux.memory.available": available * MIB}
    assert verdict_of(values, "memory.low") == verdict


def test_clock_sets_only_after_a_quarter_of_an_hour() -> None:
    conditions = Conditions(MACHINE_RULES)
    values = {"system.clock.synchronized": 0.0}
    assert conditions.observe(observe_machine(values, at=0), now=0, at=0) == []
    assert conditions.observe(observe_machine(values, at=899), now=899, at=899) == []
    assert len(conditions.observe(observe_machine(values, at=900), now=900, at=900)) == 1


def test_certificate() -> None:
    day = 86400.0
    arguments = {"certificate_not_after": 100 * day}
    assert verdict_of({}, "certificate.expiring", at=60 * day, **arguments) == "good"
    assert verdict_of({}, "certificate.expiring", at=71 * day, **arguments) == "bad"
    assert verdict_of({}, "certificate.expired", at=99 * day, **arguments) == "good"
    conditions = Conditions(MACHINE_RULES)
    conditions.observe(observe_machine({}, at=101 * day, **arguments), now=0, at=101 * day)
    assert [c["condition"] for c in conditions.current()] == ["certificate.expired"]


def test_nothing_measured_says_nothing() -> None:
    assert list(observe_machine({}, at=0)) == []
