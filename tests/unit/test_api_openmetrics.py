"""OpenMetrics text: what is written is what the format allows, and what it can't say is refused."""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.api.openmetrics import Metric, render

SAMPLE = re.compile(
    r'^[a-zA-Z_:][a-zA-Z0-9_:]*(\{[a-zA-Z_]\w*="([^"\\\n]|\\[\\n"])*"(,[a-zA-Z_]\w*="([^"\\\n]|\\[\\n"])*")*\})? \S+$',
    re.ASCII,
)
COMMENT = re.compile(r'^# (TYPE|UNIT|HELP) [a-zA-Z_:][a-zA-Z0-9_:]* ([^"\\\n]|\\[\\n"])+$', re.ASCII)


def test_nothing_is_a_document_too():
    assert render([]) == "# EOF\n"


def test_a_gauge_and_a_counter():
    text = render(
        [
            Metric(
                "system.memory.usage", "By", "gauge", "Memory in use", [({"state": "used"}, 5), ({"state": "free"}, 7)]
            ),
            Metric("capture.images", "{image}", "counter", "Images seen", [({"source": "front"}, 60)]),
        ]
    )
    assert text == (
        "# TYPE system_memory_usage_bytes gauge\n"
        "# UNIT system_memory_usage_bytes bytes\n"
        "# HELP system_memory_usage_bytes Memory in use\n"
        'system_memory_usage_bytes{state="used"} 5\n'
        'system_memory_usage_bytes{state="free"} 7\n'
        "# TYPE capture_images counter\n"
        "# HELP capture_images Images seen\n"
        'capture_images_total{source="front"} 60\n'
        "# EOF\n"
    )


@pytest.mark.parametrize(
    ("name", "unit", "type_", "family", "sample"),
    [
        ("a.time", "s", "counter", "a_time_seconds", "a_time_seconds_total"),
        ("a_seconds_total", "s", "counter", "a_seconds", "a_seconds_total"),
        ("cpu.utilization", "1", "gauge", "cpu_utilization", "cpu_utilization"),
        ("events", "1", "counter", "events", "events_total"),
        ("hw.temperature", "Cel", "gauge", "hw_temperature_celsius", "hw_temperature_celsius"),
        ("rate", "{image}/s", "gauge", "rate_per_second", "rate_per_second"),
        ("agent", "", "info", "agent", "agent_info"),
        ("9lives", "", "unknown", "_9lives", "_9lives"),
    ],
)
def test_names_get_their_unit_and_suffix(name, unit, type_, family, sample):
    lines = render([(name, unit, type_, "", [({}, 1)])]).splitlines()
    assert lines[0] == f"# TYPE {family} {type_}"
    assert lines[-2] == f"{sample} 1"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.1"),
        (3, "3"),
        (True, "1"),
        (math.nan, "NaN"),
        (math.inf, "+Inf"),
        (-math.inf, "-Inf"),
        (1e300, "1e+300"),
    ],
)
def test_values(value, text):
    assert f"x {text}\n" in render([("x", "", "gauge", "", [({}, value)])])


def test_what_was_not_measured_is_left_out():
    assert "x{" not in render([("x", "", "gauge", "", [({"a": "b"}, None)])])


def test_text_is_escaped():
    text = render([("x", "", "gauge", 'a "b"\n\\', [({"path": 'c:\\"\n'}, 1)])])
    assert '# HELP x a \\"b\\"\\n\\\\\n' in text
    assert 'x{path="c:\\\\\\"\\n"} 1\n' in text


@pytest.mark.parametrize(
    "metrics",
    [
        [("a.b", "", "gauge", "", []), ("a_b", "", "gauge", "", [])],
        [("a", "", "gauge", "", [({"x": "1"}, 1), ({"x": "1"}, 2)])],
        [("a", "", "gauge", "", [({"x.y": "1", "x_y": "2"}, 1)])],
        [("a", "", "gauge", "", [({"__name__": "b"}, 1)])],
        [("a", "", "gauge", "", [({"1": "b"}, 1)])],
        [("a", "", "counter", "", [({}, -1)])],
        [("a", "", "counter", "", [({}, math.nan)])],
        [("a", "", "info", "", [({}, 2)])],
    ],
)
def test_what_the_format_can_not_say_is_refused(metrics):
    with pytest.raises(ValueError):
        render(metrics)


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
samples = st.lists(
    st.tuples(
        st.dictionaries(st.sampled_from(["a", "b.c", "d-e"]), st.text(), max_size=3),
        st.one_of(st.none(), st.floats(), st.integers()),
    ),
    max_size=4,
)


@given(st.lists(st.tuples(names, names, st.just("gauge"), st.text(), samples), max_size=4))
def test_every_line_is_in_the_grammar(metrics):
    try:
        text = render(metrics)
    except ValueError:
        return
    *lines, end, nothing = text.split("\n")
    assert (end, nothing) == ("# EOF", "")
    for line in lines:
        assert (COMMENT if line.startswith("#") else SAMPLE).match(line), line
