"""The documents that are sent: compact, honest about what is missing, within the first metering step."""

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from agent.telemetry import report

CAPTURE = {
    "images": 60, "expected": 60, "delivered_ratio": 1.0, "bytes": 9_123_456, "rate_hz": 0.99871234, "longest_gap_s": 1.23456789,
    "last_image_age_s": 0.4, "latency_s": {"p50": 0.1234567, "p90": 0.2, "max": 0.9}, "corrupt": {}, "analysed": 30,
    "luma": {"p10": 80.1, "p50": 91.23456, "p90": 99.0}, "sharpness": {"p10": 1.1, "p50": 1.2, "p90": 1.3},
}  # fmt: skip


def make(**changes):
    parts = {
        "thing_name": "cam-0412",
        "boot_id": "0b2f6f0e-0d8c-4d3f-9f7e-0e5e1f5b6a7c",
        "seq": 7,
        "window": (1767225600.123456, 1767225660.123456),
        "host": {f"system.metric.number{n}": n / 7 for n in range(40)},
        "capture": dict.fromkeys(("front", "rear"), CAPTURE),
        "conditions": ["capture.slow"],
        "agent": {"version": "0.1.0"},
        "outbox": {"messages": 0},
        "labels": {"site": "A1", "lane": "2"},
    }
    return report.report(**{**parts, **changes})


def test_a_report_of_two_sources_fits_the_first_metering_step():
    assert len(make()) < report.METERING_STEP_BYTES


def test_numbers_are_rounded_and_times_are_not():
    body = json.loads(make())
    assert body["capture"]["front"]["rate_hz"] == 0.99871
    assert body["capture"]["front"]["bytes"] == 9_123_456
    assert body["start"] == 1767225600.123
    assert "corrupt" not in body["capture"]["front"], "an empty part is left out"
    assert body["labels"] == {"site": "A1", "lane": "2"}


def test_what_is_not_known_is_absent_never_zero():
    body = json.loads(make(host={"a": math.nan, "b": math.inf, "c": None, "d": 0}))
    assert body["host"] == {"d": 0}


def test_an_event_carries_its_number_and_the_change():
    change = {"condition": "capture.stopped", "state": "set", "source": "front", "at": 1767225600.5}
    body = json.loads(report.event(thing_name="cam", boot_id="b", seq=3, labels={"site": "A1"}, change=change))
    assert {"thing": "cam", "boot_id": "b", "seq": 3, "labels": {"site": "A1"}, **change}.items() <= body.items()


def test_an_ended_job_is_told_with_its_times_unrounded():
    job = {"id": "j", "status": "FAILED", "started_at": 1767225600.123, "ended_at": 1767225660.456, "details": {}}
    body = json.loads(report.event(thing_name="cam", boot_id="b", seq=3, labels={}, change={"job": job}))
    assert body["job"] == {"id": "j", "status": "FAILED", "started_at": 1767225600.123, "ended_at": 1767225660.456}


def test_will_and_birth_are_of_one_session_and_say_the_opposite():
    birth, will = (
        json.loads(report.presence(thing_name="cam", boot_id="b", session="n1", connected=up)) for up in (True, False)
    )
    assert birth == {"schema": 1, "thing": "cam", "boot_id": "b", "session": "n1", "connection": "up"}
    assert will == {**birth, "connection": "lost"}


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=15,
)


@given(st.dictionaries(st.text(max_size=8), values, max_size=6))
def test_anything_encodes_to_strict_json(host):
    json.loads(make(host=host), parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
