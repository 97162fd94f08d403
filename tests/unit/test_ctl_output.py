"""What agentctl prints: widths, columns, times and words, without control characters."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.ctl import output
from agent.ctl.capture import summary
from agent.ctl.conditions import by_severity, describe_condition
from agent.ctl.config import differences
from agent.ctl.doctor import describe as describe_findings
from agent.ctl.jobs import story
from agent.ctl.main import VERBS, parser
from agent.ctl.status import describe, exit_code
from agent.health.probes import Finding

short = st.text(max_size=12)
words = st.lists(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=15), max_size=40).map(" ".join)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "-"),
        (-3, "0.0 s"),
        (0.84, "0.8 s"),
        (9.96, "10 s"),
        (119, "119 s"),
        (119.6, "2 min"),
        (3599, "1 h 0 min"),
        (11520, "3 h 12 min"),
        (86400 * 2, "2 d 0 h"),
        (86400 * 5 + 7300, "5 d 2 h"),
    ],
)
def test_durations(seconds, text):
    assert output.duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (52100, "52.1 kB"),
        (16e6, "16.0 MB"),
        (2.5e9, "2.5 GB"),
    ],
)
def test_sizes(count, text):
    assert output.size(count) == text


def test_times_are_local_and_name_their_zone(monkeypatch):
    monkeypatch.setenv("TZ", "CET-1CEST,M3.5.0,M10.5.0/3")  # needs no tzdata
    time.tzset()
    try:
        assert output.moment(1_700_000_000) == "2023-11-14 23:13:20 CET"
        assert output.moment(time.time()).endswith((" CET", " CEST"))
        assert len(output.moment(time.time()).split()) == 2
    finally:
        monkeypatch.undo()
        time.tzset()


@given(st.text())
def test_nothing_plays_tricks_on_a_terminal(text):
    assert output.clean(text).isprintable()


def test_an_escape_code_in_a_message_is_defused():
    assert output.clean("a\x1b[2Jb\u202e\n  c") == "a?[2Jb? c"


@given(st.lists(st.tuples(short, short, words), min_size=1, max_size=6))
def test_tables_fit_and_lose_nothing(rows):
    lines = output.table(rows)
    assert all(len(line) <= output.WIDTH for line in lines)
    shown = "".join("".join(lines).split())
    assert shown == "".join("".join(output.clean(cell) for cell in row) for row in rows).replace(" ", "")


def test_columns_are_aligned():
    assert output.table([["a", "bb", "c"], ["aaa", "b", "cc"]]) == ["a    bb  c", "aaa  b   cc"]


def test_without_a_terminal_nothing_is_painted(capsys):
    assert output.paint("bad", "bad") == "bad"
    output.show(output.table([[("bad", "bad"), ("x", "good")]]))
    assert capsys.readouterr().out == "bad  x\n"


def test_the_worst_condition_is_first():
    severities = ["info", "critical", "warning", "unheard-of"]
    found = by_severity([{"condition": s, "severity": s} for s in severities])
    assert [c["condition"] for c in found] == ["critical", "unheard-of", "warning", "info"]


def test_a_condition_says_what_since_when_and_what_to_do():
    condition = {
        "condition": "capture.stopped",
        "source": "front",
        "severity": "critical",
        "message": "no image",
        "remedy": "systemctl restart pipeline",
        "since": 1000.0,
    }
    lines = describe_condition(condition, 1240.0)
    assert lines[0].startswith("  capture.stopped front  for 4 min, since ")
    assert lines[1:] == ["    no image", "    fix: systemctl restart pipeline"]


@pytest.mark.parametrize(
    ("state", "code"), [("healthy", 0), ("degraded", 10), ("unhealthy", 11), ("unheard-of", 11), (None, 11)]
)
def test_exit_codes_of_states(state, code):
    assert exit_code({"health": {"state": state}}) == code


def test_a_status_with_nothing_in_it_is_still_shown():
    lines = describe({}, 0.0)
    assert lines[0] == "camera-agent: unknown, not connected to the cloud"
    assert any(line.startswith("Capture") for line in lines)


def test_a_source_that_has_seen_nothing():
    assert summary({}) == "-/s, no image yet"
    assert summary({"rate_hz": 0.5, "interval_s": 2, "last_image_age_s": 3, "luma": {"p50": 99.6}}) == (
        "0.50 of 0.50/s, last 3.0 s ago, bright 100"
    )


def test_differences_point_into_what_is_wanted():
    in_force = {
        "telemetry.interval_s": {"value": 30.0},
        "log.level": {"value": "info"},
        "targets.pipeline.gain": {"value": 2},
        "targets.pipeline.on": {"value": 1},
    }
    wanted = {
        "agent": {"telemetry": {"interval_s": 30}, "log": {"level": "debug"}, "capture": {"a/b": 1}},
        "targets": {"pipeline": {"gain": 2, "on": True, "gone": None}},
    }
    assert differences(wanted, in_force) == [
        {"pointer": "/agent/log/level", "wanted": "debug", "in_force": "info"},
        {"pointer": "/agent/capture/a~1b", "wanted": 1, "in_force": None},
        {"pointer": "/targets/pipeline/on", "wanted": True, "in_force": 1},
    ]
    assert differences({}, in_force) == []


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_fits(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        parser().parse_args([verb, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "exit status" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_common_options_may_stand_before_and_after_the_verb():
    for words_ in (["--json", "jobs", "show", "x"], ["jobs", "--json", "show", "x"], ["jobs", "show", "x", "--json"]):
        arguments = parser().parse_args(words_)
        assert (arguments.json, arguments.socket, arguments.id) == (True, None, "x")
    assert parser().parse_args(["--socket", "a", "status"]).socket == "a"
    assert parser().parse_args(["status", "--socket", "a"]).socket == "a"
    assert parser().parse_args(["status"]).json is False


def test_doctor_names_failures_before_warnings_and_the_skipped_last():
    lines = describe_findings(
        [
            Finding("clock", "clock", "critical", "warn", "not synchronised", "it drifts", "timedatectl"),
            Finding("dns", "name", "critical", "fail", "unknown host", "no name server", "resolvectl status"),
            Finding("tcp", "connection", "critical", "skip", "not checked because of dns", because="dns"),
        ]
    )
    assert lines == [
        "bad: 1 failed, 1 warning; begin with dns",
        "",
        "  dns  failed",
        "    seen:  unknown host",
        "    means: no name server",
        "    fix:   resolvectl status",
        "",
        "  clock  warning",
        "    seen:  not synchronised",
        "    means: it drifts",
        "    fix:   timedatectl",
        "",
        "WARN  clock  not synchronised",
        "FAIL  dns    unknown host",
        "skip  tcp    not checked because of dns",
    ]


def test_doctor_without_troubles():
    assert describe_findings([Finding("dns", "name", "critical", "pass", "10.0.0.1")]) == [
        "healthy, nothing is wrong",
        "",
        "ok  dns  10.0.0.1",
    ]


@pytest.mark.parametrize(
    ("job", "words"),
    [
        ({"superseded": "CANCELED"}, "the cloud cancelled it; it had not begun here"),
        (
            {"status": "SUCCEEDED", "superseded": "CANCELED", "details": {"message": "1.4.2 runs"}},
            "the cloud cancelled it; here it had ended as SUCCEEDED: 1.4.2 runs",
        ),
        (
            {"status": "FAILED", "superseded": "TIMED_OUT", "details": {"message": "rolled back"}},
            "the cloud's time for it ran out; here it had ended as FAILED: rolled back",
        ),
        (
            {"status": "FAILED", "superseded": "REMOVED"},
            "the cloud has removed it; here it had ended as FAILED",
        ),
        ({"status": "FAILED", "superseded": "X"}, "the cloud ended it as X; here it had ended as FAILED"),
        (
            {"cancelled": "CANCELED", "message": "downloading"},
            "the cloud cancelled it; it stops where it safely can: downloading",
        ),
        ({"status": "SUCCEEDED", "details": {"message": "done"}}, "done"),
        ({"message": "downloading"}, "downloading"),
        ({}, ""),
    ],
)
def test_a_jobs_story_tells_both_sides(job, words):
    assert story(job) == words
    shown = " ".join("\n".join(describe({"jobs": {"last": {"job_id": "j", **job}}}, 0)).split())
    assert words in shown
