"""Topics, filters, their limits, matching; status details and executions."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cloud import topics
from agent.cloud.jobs import parse_execution, sanitise, seconds

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


@pytest.mark.conformance("C-CONN-14")
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


@pytest.mark.conformance("C-CONN-28")
@pytest.mark.parametrize(
    ("topic_filter", "said"),
    [
        ("", "empty"),
        ("a\0b", "null"),
        ("\ud800", "Unicode"),
        ("a" * 257, "257 bytes"),
        ("é" * 129, "258 bytes"),
        ("/".join("123456789"), "8 slashes"),
        ("a/#/b", "#"),
        ("a#", "#"),
        ("#a", "#"),
        ("a/b+", "+"),
        ("a+/b", "+"),
        ("$aws/rules/r/a", "rules engine"),
        ("$aws/rules/#", "rules engine"),
        ("$aws/rules", "rules engine"),
        ("$share/group", "$share/"),
        ("$share//a", "$share/"),
        ("$share/g+/a", "$share/"),
        ("$share/group/" + "/".join("123456789"), "8 slashes"),
        ("$share/group/$aws/rules/r/a", "rules engine"),
    ],
)
def test_filters_that_aws_would_not_take_are_told(topic_filter, said):
    assert said in topics.filter_problem(topic_filter)


@pytest.mark.parametrize(
    "topic_filter",
    [
        "a",
        "#",
        "+",
        "a/#",
        "+/b/+",
        "a" * 256,
        "/".join("12345678"),
        "$share/group/" + "/".join("12345678"),
        "$aws/ruler/a",
    ]
    + [
        name
        for thing in ("cam", "t" * 128)
        for name in (
            topics.jobs_notify_next(thing),
            *topics.job_replies(thing),
            topics.accepted(topics.shadow_update(thing, "config")),
            topics.shadow_delta(thing, "config"),
            topics.rejected(topics.certificate_from_csr()),
            topics.accepted(topics.register_thing("fleet")),
        )
    ],
)
def test_filters_that_aws_takes_and_all_of_the_agents_are_fine(topic_filter):
    assert topics.filter_problem(topic_filter) == ""


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
