"""Conditions are set and cleared by their rules, in turn, and not because the agent itself stalled."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.capture.alarms import Alarms, Hold
from agent.capture.image_quality import REGIONS, Measures
from agent.settings import Capture

START = 1000.0


def measures(sharpness: float = 0.5, mean: float = 110, p99: int = 220, p1: int = 20) -> Measures:
    return Measures(1920, 1080, mean, 40, p1, 100, p99, 0.0, 0.0, sharpness, (sharpness,) * REGIONS, 1.0)


class Camera:
    """Time passes in ticks of a second; `at` is the wall clock."""

    def __init__(self, interval_s: float = 1.0) -> None:
        self.events: list[dict[str, Any]] = []
        self.now = START
        self.interval_s = interval_s
        self.alarms = Alarms("front", interval_s, Capture(), self.now, self.events.append)

    @property
    def at(self) -> float:
        return self.now + 1.7e9

    def silence(self, seconds: float) -> None:
        for _ in range(round(seconds)):
            self.now += 1
            self.alarms.tick(self.now, self.at, stalled=False)

    def flow(self, count: int, every_s: float = 1.0, corrupt: bool = False, picture: Measures | None = None) -> None:
        for _ in range(count):
            self.now += every_s
            self.alarms.image(self.now, self.at, corrupt=corrupt)
            if picture:
                self.alarms.picture(picture, self.now, self.at)
            self.alarms.tick(self.now, self.at, stalled=False)

    @property
    def story(self) -> list[tuple[str, str]]:
        return [(event["condition"], event["state"]) for event in self.events]


@pytest.mark.conformance("F-19")
def test_silence_is_stopped_and_three_images_clear_it() -> None:
    camera = Camera()
    camera.flow(10)
    camera.silence(60)
    assert camera.story == []
    camera.silence(1)
    assert camera.story == [("capture.stopped", "set")]
    event = camera.events[0]
    assert (event["source"], event["severity"], event["at"]) == ("front", "critical", camera.at)
    assert event["message"]
    assert event["remedy"]
    assert [item["condition"] for item in camera.alarms.conditions()] == ["capture.stopped"]
    assert camera.alarms.conditions()[0]["since"] == camera.at
    camera.flow(2)
    assert len(camera.events) == 1
    camera.flow(1)
    assert camera.story[-1] == ("capture.stopped", "clear")
    assert camera.alarms.conditions() == []


def test_a_source_that_never_delivered_is_stopped_too() -> None:
    camera = Camera(interval_s=100)
    camera.silence(300)
    assert camera.story == []
    camera.silence(1)
    assert camera.story == [("capture.stopped", "set")]


def test_a_single_image_in_a_long_silence_does_not_clear() -> None:
    camera = Camera()
    camera.silence(61)
    for _ in range(5):
        camera.flow(1)
        camera.silence(61)
    assert camera.story == [("capture.stopped", "set")]


def test_no_verdict_while_the_agent_itself_stalled() -> None:
    camera = Camera()
    camera.flow(5)
    camera.now += 500
    camera.alarms.tick(camera.now, camera.at, stalled=True)
    camera.flow(120)
    assert camera.story == []


def test_a_stall_only_puts_off_a_true_stop() -> None:
    camera = Camera()
    camera.flow(5)
    camera.now += 500
    camera.alarms.tick(camera.now, camera.at, stalled=True)
    camera.silence(31)
    assert camera.story == [("capture.stopped", "set")]


@pytest.mark.parametrize(("every_s", "slow"), [(1.0, False), (1.05, False), (1.08, False), (1.2, True), (2.0, True)])
def test_a_low_rate_is_slow(every_s: float, slow: bool) -> None:
    camera = Camera()
    camera.flow(200, every_s)
    assert camera.story == ([("capture.slow", "set")] if slow else [])
    camera.flow(60)
    camera.flow(200)
    assert camera.story == ([("capture.slow", "set"), ("capture.slow", "clear")] if slow else [])


def test_what_is_said_of_a_slow_or_stopped_source_stays_up_to_date() -> None:
    camera = Camera()
    camera.flow(200, 2.0)
    before = camera.alarms.conditions()[0]["message"]
    camera.flow(120, 1.1)
    (slow,) = camera.alarms.conditions()
    assert "30 of 6" in before
    assert "55 of 6" in slow["message"]
    camera.silence(500)
    messages = [item["message"] for item in camera.alarms.conditions()]
    assert any("no image for 500 s" in message for message in messages)
    assert [event["condition"] for event in camera.events] == ["capture.slow", "capture.stopped"]


def test_the_time_of_a_trial_of_our_own_is_not_slow() -> None:
    camera = Camera()
    for _ in range(100):
        camera.flow(1, 3.0)
        camera.alarms.disturbed()
    assert camera.story == []


@pytest.mark.parametrize("interval_s", [0.1, 1.0, 30.0, 600.0])
def test_jitter_is_not_slow(interval_s: float) -> None:
    camera = Camera(interval_s)
    for number in range(300):
        camera.flow(1, interval_s * (0.6 if number % 2 else 1.4))
    assert camera.story == []


def test_two_broken_images_of_twenty_and_a_hundred_whole_ones() -> None:
    camera = Camera()
    camera.flow(10)
    camera.flow(1, corrupt=True)
    camera.flow(18)
    assert camera.story == []
    camera.flow(1, corrupt=True)
    assert camera.story == [("capture.corrupt", "set")]
    camera.flow(99)
    assert len(camera.events) == 1
    camera.flow(1)
    assert camera.story[-1] == ("capture.corrupt", "clear")


def test_rare_broken_images_are_no_condition() -> None:
    camera = Camera()
    for _ in range(20):
        camera.flow(1, corrupt=True)
        camera.flow(20)
    assert camera.story == []


def test_dark_needs_ten_minutes_and_clears_after_twenty() -> None:
    camera = Camera()
    camera.flow(30, picture=measures())
    dark = measures(mean=8, p99=20, p1=2)
    camera.flow(590, picture=dark)
    assert camera.story == []
    camera.flow(20, picture=dark)
    assert camera.story == [("image.dark", "set")]
    camera.flow(1190, picture=measures())
    assert len(camera.events) == 1
    camera.flow(20, picture=measures())
    assert camera.story[-1] == ("image.dark", "clear")


def test_blur_is_told_by_the_cameras_own_reference_which_stays_frozen() -> None:
    camera = Camera()
    camera.flow(20, picture=measures(0.5))
    camera.flow(700, picture=measures(0.1))
    assert camera.story == [("image.blurred", "set")]
    samples = camera.alarms.baseline.samples
    camera.flow(7200, every_s=1.0, picture=measures(0.1))
    assert camera.alarms.baseline.samples == samples
    assert len(camera.events) == 1
    camera.flow(1300, picture=measures(0.48))
    assert camera.story[-1] == ("image.blurred", "clear")


def test_no_blur_without_a_reference_or_without_light() -> None:
    camera = Camera()
    camera.flow(15, picture=measures(0.5))
    camera.flow(1, picture=measures(0.1))
    assert camera.alarms.baseline.samples == 16
    night = Camera()
    night.flow(20, picture=measures(0.5))
    night.flow(3000, picture=measures(-1.0, mean=10, p99=40))
    assert night.story == []


def test_other_thresholds_hold_at_once() -> None:
    camera = Camera()
    camera.alarms.configure(1.0, Capture(dark_luma=200))
    camera.flow(620, picture=measures(p99=190))
    assert camera.story == [("image.dark", "set")]


def test_five_pictures_with_one_or_two_bad_change_nothing() -> None:
    hold = Hold(10)
    for second in range(200):
        hold.add(second % 5 in (0, 1), second)
    assert not hold.is_set


actions = st.lists(
    st.tuples(
        st.sampled_from(["image", "corrupt", "dark", "blurred", "good", "tick", "stall", "folder"]), st.floats(0, 900)
    ),
    max_size=150,
)


@settings(deadline=None)
@given(st.floats(0.05, 600), actions)
def test_set_and_clear_alternate_and_agree_with_the_list(interval_s: float, steps: list[tuple[str, float]]) -> None:
    camera = Camera(interval_s)
    missing = False
    for action, pause in steps:
        camera.now += pause
        if action in ("image", "corrupt"):
            camera.alarms.image(camera.now, camera.at, corrupt=action == "corrupt")
        elif action in ("dark", "blurred", "good"):
            picture = {"dark": measures(p99=10, mean=5), "blurred": measures(-1.0), "good": measures()}[action]
            camera.alarms.picture(picture, camera.now, camera.at)
        elif action == "folder":
            missing = not missing
            camera.alarms.folder(missing=missing, directory="/x", at=camera.at)
        else:
            camera.alarms.tick(camera.now, camera.at, stalled=action == "stall")
        states: dict[str, str] = {}
        for event in camera.events:
            assert event["state"] != states.get(event["condition"], "clear")
            states[event["condition"]] = event["state"]
        assert {name for name, state in states.items() if state == "set"} == {
            condition["condition"] for condition in camera.alarms.conditions()
        }
