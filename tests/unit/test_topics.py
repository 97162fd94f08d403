"""Topics, their limits, matching; status details; and what a failure to connect means."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cloud import topics
from agent.cloud.jobs import parse_execution, sanitise, seconds
from agent.cloud.offline import Diagnosis, Facts, Failure, History, Pace, diagnose, wait_s

LONGEST_THING = "t" * 128


@pytest.mark.parametrize(
    ("topic", "expected"),
    [
        (topics.jobs_notify_next("cam"), "$aws/things/cam/jobs/notify-next"),
        (topics.job_get("cam"), "$aws/things/cam/jobs/$next/get"),
        (topics.job_get("cam", "j1"), "$aws/things/cam/jobs/j1/get"),
        (topics.job_update("cam", "j1"), "$aws/things/cam/jobs/j1/update"),
        (topics.job_replies("cam")[0], "$aws/things/cam/jobs/+/get/+"),
        (topics.job_replies("cam")[1], "$aws/things/cam/jobs/+/update/+"),
        (topics.shadow_get("cam", "config"), "$aws/things/cam/shadow/name/config/get"),
        (topics.shadow_update("cam", ""), "$aws/things/cam/shadow/update"),
        (topics.shadow_delta("cam", "config"), "$aws/things/cam/shadow/name/config/update/delta"),
        (topics.certificate_from_csr(), "$aws/certificates/create-from-csr/json"),
        (topics.register_thing("fleet"), "$aws/provisioning-templates/fleet/provision/json"),
        (topics.accepted("a"), "a/accepted"),
        (topics.rejected("a"), "a/rejected"),
        (topics.report("$aws/rules/r/cameras", "cam"), "$aws/rules/r/cameras/cam/report"),
        (topics.event("p", "cam"), "p/cam/event"),
    ],
)
def test_topics_are_as_aws_names_them(topic, expected):
    assert topic == expected


@pytest.mark.parametrize(
    "topic",
    [
        "a/2/3/4/5/6/7/8",
        "a" * 256,
        "é" * 128,
        "$aws/rules/my_rule/1/2/3/4/5/6/7/8",
        "$aws/rules/" + "r" * 200 + "/" + "a" * 256,
        topics.job_update(LONGEST_THING, "j" * 64),
        topics.accepted(topics.shadow_update("t" * 128, "s" * 64)),
    ],
)
def test_what_aws_takes_passes(topic):
    assert topics.problem(topic) == ""


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "a/+",
        "#",
        "a\x00",
        "\ud800",
        "1/2/3/4/5/6/7/8/9",
        "a" * 257,
        "é" * 129,
        "$aws/rules/r",
        "$aws/rules/r/",
        "$aws/rules/r/1/2/3/4/5/6/7/8/9",
        "$aws/rules/r/" + "a" * 257,
    ],
)
def test_what_aws_refuses_is_told(topic):
    assert topics.problem(topic)


@pytest.mark.parametrize(
    ("topic_filter", "topic", "matching"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/b/c", "a/b", False),
        ("a/+", "a/b", True),
        ("a/+", "a/b/c", False),
        ("a/+", "a/", True),
        ("a/#", "a/b/c", True),
        ("a/#", "a/", True),
        ("a/#", "a", False),
        ("#", "a/b", True),
        ("#", "$aws/b", False),
        ("+/b", "$aws/b", False),
        ("$aws/things/cam/jobs/+/get/+", "$aws/things/cam/jobs/$next/get/accepted", True),
        ("$aws/things/cam/jobs/+/get/+", "$aws/things/cam/jobs/get/accepted", False),
        ("$aws/things/cam/jobs/+/get/+", "$aws/things/cam2/jobs/j/get/accepted", False),
    ],
)
def test_matching(topic_filter, topic, matching):
    assert topics.matches(topic_filter, topic) is matching


@given(st.lists(st.text(st.characters(exclude_characters="/+#$"), max_size=4), min_size=1, max_size=6), st.data())
def test_a_filter_made_from_a_topic_matches_it(levels, data):
    plus = data.draw(st.sets(st.integers(0, len(levels) - 1)))
    cut = data.draw(st.none() | st.integers(0, len(levels) - 1))
    wanted = ["+" if position in plus else level for position, level in enumerate(levels)]
    if cut is not None:
        wanted = [*wanted[:cut], "#"]
    assert topics.matches("/".join(wanted), "/".join(levels))


@given(st.dictionaries(st.text(max_size=200), st.one_of(st.text(max_size=1500), st.integers(), st.none()), max_size=15))
def test_status_details_are_always_acceptable_to_aws(details):
    result = sanitise(details)
    assert len(result) <= 10
    for key, value in result.items():
        assert re.fullmatch(r"[a-zA-Z0-9:_-]{1,128}", key)
        assert 1 <= len(value) <= 1024
        assert not any(unicodedata.category(character).startswith("C") for character in value)


def test_status_details_keep_what_can_be_kept():
    assert sanitise({"message": "two\nlines\tand \x1b[31mred", "empty": "", "a key": 7}) == {
        "message": "two lines and [31mred",
        "empty": "-",
        "a_key": "7",
    }
    assert sanitise({"stdout": "x" * 2000 + "end"})["stdout"].endswith("end")
    assert list(sanitise({str(n): "v" for n in range(12)})) == [str(n) for n in range(10)]


EXECUTION = {"jobId": "j1", "executionNumber": 2, "versionNumber": 3, "status": "QUEUED", "queuedAt": 1767225600}


def test_executions():
    execution = parse_execution({**EXECUTION, "jobDocument": {"a": 1}, "statusDetails": {"step": "x"}})
    assert execution
    assert (execution.job_id, execution.execution_number, execution.version_number) == ("j1", 2, 3)
    assert (execution.document, execution.details, execution.queued_at) == ({"a": 1}, {"step": "x"}, 1767225600.0)
    assert parse_execution(None) is None
    assert parse_execution({}) is None
    for document, expected in [('{"a": 1}', {"a": 1}), ("{", None), ("[1]", None), (["x"], None), (None, None)]:
        parsed = parse_execution({**EXECUTION, "jobDocument": document})
        assert parsed
        assert parsed.document == expected


@pytest.mark.parametrize(
    "malformed",
    [
        [],
        "x",
        {"status": "QUEUED"},
        {**EXECUTION, "jobId": "../x"},
        {**EXECUTION, "jobId": 1},
        {**EXECUTION, "versionNumber": "3"},
        {**EXECUTION, "executionNumber": True},
        {**EXECUTION, "status": None},
    ],
)
def test_malformed_executions_raise(malformed):
    with pytest.raises(ValueError):
        parse_execution(malformed)


def test_times_are_seconds_and_milliseconds_are_tolerated():
    assert seconds(1767225600) == 1767225600.0
    assert seconds(1767225600123) == 1767225600.123
    assert seconds("x") is None
    assert seconds(True) is None


FACTS = Facts("x.iot.example", 8883, "cam-7", "ab" * 32, 1000.0, 2000.0, True, 1500.0)


@pytest.mark.parametrize(
    ("failure", "changes", "code"),
    [
        (Failure("AWS_IO_DNS_QUERY_FAILED"), {}, "dns"),
        (Failure("AWS_IO_DNS_NO_ADDRESS_FOR_HOST"), {}, "dns"),
        (Failure("AWS_IO_SOCKET_CONNECTION_REFUSED"), {}, "tcp"),
        (Failure("AWS_IO_SOCKET_TIMEOUT"), {}, "tcp"),
        (Failure("AWS_ERROR_HTTP_PROXY_CONNECT_FAILED"), {}, "proxy"),
        (Failure("AWS_IO_TLS_ERROR_NEGOTIATION_FAILURE"), {}, "tls"),
        (Failure("AWS_IO_TLS_ERROR_NEGOTIATION_FAILURE"), {"now": 2001.0}, "certificate"),
        (Failure("AWS_IO_TLS_ERROR_NEGOTIATION_FAILURE"), {"now": 2001.0, "clock_synchronised": False}, "clock"),
        (Failure("AWS_IO_TLS_ERROR_NEGOTIATION_FAILURE"), {"now": 999.0}, "clock"),
        (Failure("AWS_ERROR_MQTT5_CONNACK_CONNECTION_REFUSED", 0x87), {}, "not_authorised"),
        (Failure("AWS_ERROR_MQTT5_CONNACK_CONNECTION_REFUSED", 0x87), {"now": 2001.0}, "certificate"),
        (Failure("AWS_ERROR_MQTT5_CONNACK_CONNECTION_REFUSED", 0x97), {}, "throttled"),
        (Failure("AWS_ERROR_MQTT5_CONNACK_CONNECTION_REFUSED", 0x85), {}, "not_authorised"),
        (Failure("AWS_ERROR_MQTT5_DISCONNECT_RECEIVED", 0x8E, True), {}, "taken_over"),
        (Failure("AWS_ERROR_MQTT5_DISCONNECT_RECEIVED", 0x87, True), {}, "not_authorised"),
        (Failure("AWS_ERROR_MQTT5_DISCONNECT_RECEIVED", 0x8B, True), {}, "closed"),
        (Failure("AWS_ERROR_MQTT_UNEXPECTED_HANGUP"), {}, "closed"),
        (Failure("AWS_ERROR_MQTT_UNEXPECTED_HANGUP", None, True), {}, "lost"),
        (Failure("AWS_ERROR_MQTT5_PING_RESPONSE_TIMEOUT", None, True), {}, "no_answer"),
        (Failure("AWS_ERROR_MQTT5_CONNACK_TIMEOUT"), {}, "no_answer"),
        (Failure("SOMETHING_NEW"), {}, "unknown"),
    ],
)
def test_a_failure_is_put_into_words(failure, changes, code):
    facts = Facts(**{**FACTS.__dict__, **changes})
    diagnosis = diagnose(failure, History().after(failure, 0.0, 0.0, Pace()), facts)
    assert diagnosis.code == code
    assert diagnosis.reason
    assert diagnosis.hint


def test_repeated_hangups_before_the_connack_mean_not_authorised():
    history, codes = History(), []
    for _ in range(5):
        failure = Failure("AWS_ERROR_MQTT_UNEXPECTED_HANGUP")
        history = history.after(failure, 0.0, 0.0, Pace())
        codes.append(diagnose(failure, history, FACTS).code)
    assert codes == ["closed", "closed", "not_authorised", "not_authorised", "not_authorised"]


def waits(failure: Failure, times: int, chance: float, every_s: float = 10.0, lasted_s: float = 0.0) -> list[float]:
    history, found = History(), []
    for number in range(times):
        history = history.after(failure, number * every_s, lasted_s, Pace())
        found.append(wait_s(diagnose(failure, history, FACTS), history, Pace(), chance))
    return found


def test_the_back_off_doubles_to_two_minutes_with_full_jitter():
    failure = Failure("AWS_IO_SOCKET_TIMEOUT")
    assert waits(failure, 9, 1.0) == [2, 4, 8, 16, 32, 64, 120, 120, 120]
    assert waits(failure, 9, 0.0) == [1] * 9


def test_a_connection_that_held_starts_the_back_off_anew():
    assert waits(Failure("AWS_ERROR_MQTT_UNEXPECTED_HANGUP", None, True), 4, 1.0, lasted_s=31) == [2, 2, 2, 2]
    assert waits(Failure("AWS_ERROR_MQTT_UNEXPECTED_HANGUP", None, True), 4, 1.0, lasted_s=3) == [2, 4, 8, 16]


def test_refused_for_long_it_slows_down_but_never_gives_up():
    found = waits(Failure("AWS_ERROR_MQTT5_CONNACK_CONNECTION_REFUSED", 0x87), 30, 0.0)
    assert found[:4] == [1, 1, 1, 1]
    assert all(60 <= wait <= 180 for wait in found[4:])


def test_taken_over_three_times_in_two_minutes_waits_five_minutes():
    failure = Failure("AWS_ERROR_MQTT5_DISCONNECT_RECEIVED", 0x8E, True)
    found = waits(failure, 3, 0.5, lasted_s=31)
    assert max(found[:2]) < 5
    assert found[2] >= 300
    assert max(waits(failure, 20, 0.5, every_s=61, lasted_s=31)) < 5


@given(
    st.integers(0, 100), st.integers(0, 100), st.floats(0, 1), st.sampled_from(["tcp", "not_authorised", "taken_over"])
)
def test_waits_stay_between_a_second_and_seven_minutes(attempts, refusals, chance, code):
    history = History(attempts=attempts, refusals=refusals, takeovers=(0.0,) * 3)
    assert 1 <= wait_s(Diagnosis(code, "", ""), history, Pace(), chance) <= 420
