"""The job machine: every phase with every event, and random histories against a model of the cloud."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.jobs.machine import (
    HARD_FACTOR,
    MAX_STARTS,
    MAX_STARTS_LASTING,
    TERMINAL,
    Done,
    Effect,
    Gone,
    Phase,
    Record,
    Restarted,
    Seen,
    Took,
    Unclear,
    advance,
    ended,
)

STATUSES = ["QUEUED", "IN_PROGRESS", *sorted(TERMINAL)]
EVENTS = [
    Took(5),
    *(Seen(status, 5) for status in STATUSES),
    Unclear(),
    Gone(),
    *(Done(status, {"reason_code": "x"}, 9.0) for status in ("SUCCEEDED", "FAILED", "REJECTED")),
    Restarted(9.0),
]


def received():
    return Record("j", 1, 1, Phase.RECEIVED, "run", {}, 0.0)


def records():
    start = received()
    running = advance(start, Took(2))[0]
    yield start
    yield running
    yield advance(running, Seen("CANCELED", 3))[0]
    for status in ("SUCCEEDED", "FAILED", "REJECTED"):
        done = ended(running, status, {"reason_code": "x"}, 1.0)
        yield done
        yield advance(done, Took(4))[0]
        yield advance(done, Seen("TIMED_OUT", 4))[0]
    yield advance(start, Gone())[0]


@pytest.mark.conformance("C-JOBS-17", "C-JOBS-18")
def test_every_phase_with_every_event():
    tried = 0
    for record, event in itertools.product(records(), EVENTS):
        after, effect = advance(record, event)
        tried += 1
        assert after.key == record.key
        if record.status:
            assert (after.status, after.details, after.ended_at) == (record.status, record.details, record.ended_at)
        if effect is Effect.RUN:
            assert after.phase is Phase.RUNNING
            assert record.phase in (Phase.RECEIVED, Phase.RUNNING)
        if effect is Effect.REPORT:
            assert after.phase is Phase.ENDED
            assert after.status in ("SUCCEEDED", "FAILED", "REJECTED")
        if effect is Effect.ANNOUNCE:
            assert after.phase is Phase.RECEIVED
        if after.phase is Phase.CLOSED:
            assert effect is Effect.NOTHING
            assert after.status or after.superseded
        if isinstance(event, Seen) and event.status in TERMINAL and record.phase is not Phase.CLOSED:
            assert effect in (Effect.STOP, Effect.NOTHING), "the cloud's end is never reported over"
        assert Record.from_json(after.to_json()) == after
    print(f"{tried} pairs of record and event tried")


@pytest.mark.conformance("F-12")
def test_restarts_in_a_job_are_counted_and_end():
    record, effect = advance(received(), Took(2))
    starts = 1
    while effect is Effect.RUN:
        record, effect = advance(record, Restarted(1.0))
        starts += effect is Effect.RUN
    assert starts == MAX_STARTS
    assert effect is Effect.REPORT
    assert record.details["reason_code"] == "restarted_too_often"
    record, effect = advance(received(), Took(2))
    starts = 1
    while effect is Effect.RUN:
        record, effect = advance(record, Restarted(1.0, lasting=True))
        starts += effect is Effect.RUN
    assert starts == MAX_STARTS_LASTING


@pytest.mark.conformance("F-12")
def test_an_operation_that_has_begun_something_is_asked_to_take_it_back_before_it_is_given_up():
    record, effect = advance(received(), Took(2))
    record = replace(record, progress={"state": "TRIAL"})
    asked = 0
    while effect is Effect.RUN:
        record, effect = advance(record, Restarted(1.0))
        asked += effect is Effect.RUN and record.stop_requested
    assert asked == (HARD_FACTOR - 1) * MAX_STARTS
    assert effect is Effect.REPORT


@pytest.mark.conformance("C-JOBS-18")
def test_a_cancelled_job_reports_nothing_when_it_has_stopped():
    running, _ = advance(received(), Took(2))
    stopping, effect = advance(running, Seen("CANCELED", 3))
    assert effect is Effect.STOP
    closed, effect = advance(stopping, Done("FAILED", {"reason_code": "cancelled"}, 2.0))
    assert (closed.phase, closed.superseded, effect) == (Phase.CLOSED, "CANCELED", Effect.NOTHING)


@pytest.mark.conformance("C-JOBS-22")
def test_a_lost_acknowledgement_is_sent_again_when_the_cloud_still_waits():
    closed, _ = advance(ended(received(), "SUCCEEDED", {"reason_code": "ok"}, 1.0), Took(3))
    again, effect = advance(closed, Seen("IN_PROGRESS", 2))
    assert effect is Effect.REPORT
    assert (again.status, again.version_number) == ("SUCCEEDED", 2)


@pytest.mark.conformance("C-JOBS-07")
@given(st.lists(st.sampled_from(EVENTS), max_size=40))
def test_any_history_keeps_the_first_verdict_and_never_restarts_a_closed_job(history):
    record, verdict, closed = received(), None, False
    for event in history:
        before = record
        record, effect = advance(record, event)
        if verdict:
            assert record.status == verdict
        verdict = record.status
        closed = closed or record.phase is Phase.CLOSED
        if closed:
            assert effect is not Effect.RUN
        if effect is Effect.RUN:
            assert before.phase is not Phase.ENDED
