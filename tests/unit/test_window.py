"""The window's sums, and the governor's pauses."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.capture.governor import LONGEST_PAUSE_S, Governor
from agent.capture.window import Window, quantile


@dataclass(frozen=True)
class Picture:
    mean: float
    sharpness: float
    contrast: int = 100
    assessable: bool = True


def test_a_steady_source() -> None:
    window = Window(1.0, 100.0)
    for second in range(60):
        window.image(100.5 + second, 1000)
        window.latency(0.2 + second / 1000, exif=True)
        window.analysed(Picture(100 + second, 0.5))
    report = window.close(160.0)
    assert report["images"] == 60
    assert report["expected"] == 60
    assert report["delivered_ratio"] == 1
    assert report["rate_hz"] == 1
    assert report["bytes"] == 60000
    assert (report["gaps"], report["longest_gap_s"]) == (0, 1.0)
    assert report["last_image_age_s"] == 0.5
    assert report["luma"] == {"p10": 106, "p50": 130, "p90": 154}
    assert report["latency_s"] == {"p50": 0.23, "p90": 0.254, "max": 0.259}
    assert report["latency_exif"] == report["latency_samples"] == 60
    assert report["assessable_pct"] == 100


def test_nothing_measured_is_absent_not_zero() -> None:
    window = Window(1.0, 0.0)
    report = window.close(60.0)
    assert report["images"] == 0
    assert report["delivered_ratio"] == 0
    for absent in ("luma", "sharpness", "contrast", "latency_s", "last_image_age_s", "assessable_pct"):
        assert absent not in report
    assert (report["gaps"], report["longest_gap_s"]) == (1, 60.0)
    assert "rate_hz" not in window.close(60.0)


def test_pictures_too_dark_to_judge_give_no_sharpness() -> None:
    window = Window(1.0, 0.0)
    window.analysed(Picture(3, -2.0, 5, assessable=False))
    report = window.close(1.0)
    assert report["luma"]["p50"] == 3
    assert report["assessable_pct"] == 0
    assert "sharpness" not in report


def test_a_gap_over_several_windows_counts_once_and_its_length_grows() -> None:
    window = Window(1.0, 0.0)
    window.image(1.0, 1)
    first, second = window.close(10.0), window.close(20.0)
    window.image(25.0, 1)
    third = window.close(25.5)
    assert [report["gaps"] for report in (first, second, third)] == [1, 0, 0]
    assert [report["longest_gap_s"] for report in (first, second, third)] == [9.0, 19.0, 24.0]
    window.image(26.0, 1)
    window.image(30.0, 1)
    assert window.close(30.0)["gaps"] == 1


@pytest.mark.parametrize(
    ("interval_s", "pause", "gaps"), [(0.1, 1.9, 0), (0.1, 2.1, 1), (10.0, 19.0, 0), (10.0, 21.0, 1)]
)
def test_what_counts_as_a_gap(interval_s: float, pause: float, gaps: int) -> None:
    window = Window(interval_s, 0.0)
    window.image(0.0, 1)
    window.image(pause, 1)
    assert window.close(pause)["gaps"] == gaps


def test_faults_are_counted_by_kind() -> None:
    window = Window(1.0, 0.0)
    for kind in ("empty", "truncated", "truncated", None):
        window.image(1.0, 10, kind=kind)
    window.image(1.0, 10, duplicate=True)
    window.image(1.0, 0, vanished=True)
    window.undecodable("decode")
    window.skipped()
    window.overflow()
    report = window.close(2.0)
    assert report["corrupt"] == 4
    assert report["corrupt_kinds"] == {"decode": 1, "empty": 1, "truncated": 2}
    assert (report["zero_byte"], report["duplicate"], report["vanished"]) == (1, 1, 1)
    assert (report["skipped_budget"], report["overflow"]) == (1, 1)
    assert window.close(3.0)["corrupt"] == 0


@pytest.mark.parametrize("seconds", [-1.5, -7200.0, 86401.0, float("inf")])
def test_implausible_latencies_are_counted_not_averaged(seconds: float) -> None:
    window = Window(1.0, 0.0)
    window.latency(seconds, exif=True)
    window.latency(-0.5, exif=False)
    report = window.close(1.0)
    assert report["latency_implausible"] == 1
    assert report["latency_s"] == {"p50": 0, "p90": 0, "max": 0}
    assert report["latency_exif"] == 0


steps = st.lists(
    st.tuples(
        st.floats(0, 1e4),
        st.sampled_from(["image", "late", "corrupt", "picture", "latency", "close"]),
        st.floats(-10, 1e5),
    ),
    max_size=60,
)


@given(st.floats(0.01, 1e4), steps)
def test_counts_are_never_negative_and_add_up(interval_s: float, actions: list[tuple[float, str, float]]) -> None:
    now = 50.0
    window = Window(interval_s, now)
    reports = []
    for pause, action, value in actions:
        now += pause
        if action in ("image", "late", "corrupt"):
            window.image(now - 20 * (action == "late"), 7, kind="marker" if action == "corrupt" else None)
        elif action == "picture":
            window.analysed(Picture(abs(value) % 256, value))
        elif action == "latency":
            window.latency(value, exif=value > 5)
        else:
            reports.append(window.close(now))
    reports.append(window.close(now))
    kinds = [action for _, action, _ in actions]
    assert sum(report["images"] for report in reports) == sum(
        kinds.count(kind) for kind in ("image", "late", "corrupt")
    )
    assert sum(report["corrupt"] for report in reports) == kinds.count("corrupt")
    assert sum(report["bytes"] for report in reports) == 7 * sum(report["images"] for report in reports)
    assert sum(report.get("latency_samples", 0) + report["latency_implausible"] for report in reports) == kinds.count(
        "latency"
    )
    for report in reports:
        json.dumps(report, allow_nan=False)
        assert all(value >= 0 for value in report.values() if isinstance(value, (int, float)))
        for name in ("luma", "sharpness"):
            if name in report:
                assert report[name]["p10"] <= report[name]["p50"] <= report[name]["p90"]
        assert report["longest_gap_s"] <= now - 50 + 20 + 1e-3


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 1))
def test_a_quantile_is_one_of_the_values_and_splits_them(values: list[float], share: float) -> None:
    found = quantile(values, share)
    assert found in values
    assert sum(value < found for value in values) <= share * len(values)


def test_the_first_analyses_are_free_and_the_rest_keep_to_the_budget() -> None:
    governor = Governor(3.0, free=2)
    assert governor.wait_s(0.0) == 0
    governor.spent(0.03, 0.0)
    assert governor.wait_s(0.0) == 0
    governor.spent(0.03, 1.0)
    assert governor.wait_s(1.0) == pytest.approx(0.03 * (100 / 3 - 1))
    governor.grant(1)
    assert governor.wait_s(1.0) == 0
    governor.spent(1e6, 2.0)
    assert governor.wait_s(2.0) == LONGEST_PAUSE_S


@given(st.floats(0.1, 100), st.lists(st.floats(0, 2), min_size=1, max_size=50))
def test_the_share_of_time_stays_within_the_budget(budget: float, costs: list[float]) -> None:
    governor = Governor(budget, free=0)
    now = spent = 0.0
    for cost in costs:
        now += cost
        spent += cost
        governor.spent(cost, now)
        wait = governor.wait_s(now)
        assert wait <= LONGEST_PAUSE_S + 1e-6
        now += max(wait, cost * (100 / budget - 1))
    assert spent <= now * budget / 100 + 1e-6
