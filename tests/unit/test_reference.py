"""The gate's short reference: worse is seen, normal variation is not, and too little is awaited."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.capture.image_quality import REGIONS, Measures
from agent.capture.reference import HISTORY_SAMPLES, Baseline, Comparison, History, compare_source, join
from agent.settings import Capture


def measures(sharpness: float = 0.5, mean: float = 110, p99: int = 220, p1: int = 20, over: float = 0.01) -> Measures:
    return Measures(1920, 1080, mean, 40, p1, 100, p99, 0.0, over, sharpness, (sharpness,) * REGIONS, 1.0)


GOOD = measures()


class Camera:
    def __init__(self, interval_s: float = 1.0) -> None:
        self.interval_s = interval_s
        self.now = 500.0
        self.history = History(self.now)

    def deliver(
        self,
        count: int,
        picture: Measures | None = GOOD,
        *,
        every_s: float | None = None,
        broken: bool = False,
        repeated: bool = False,
    ) -> None:
        for _ in range(count):
            self.now += every_s or self.interval_s
            self.history.image(self.now, broken=broken, repeated=repeated)
            if picture and not broken:
                self.history.picture(self.now, picture)

    def reference(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(
            json.dumps(self.history.reference(self.now, 1.7e9, self.interval_s), allow_nan=False)
        )
        return document

    def compare(self, reference: dict[str, Any], since: float, interval_s: float | None = None) -> Comparison:
        return compare_source(
            "front",
            reference,
            self.history,
            since=since,
            now=self.now,
            interval_s=interval_s or self.interval_s,
            settings=Capture(),
        )


def after_a_minute() -> tuple[Camera, dict[str, Any], float]:
    camera = Camera()
    camera.deliver(60)
    return camera, camera.reference(), camera.now


def test_a_camera_one_minute_old_has_a_reference() -> None:
    _, reference, _ = after_a_minute()
    assert reference["samples"] == 60
    assert reference["rate_hz"] == pytest.approx(1, abs=0.02)
    assert reference["flowing"]
    assert reference["last_image_at"] == 1.7e9
    assert reference["luma"] == {"median": 110, "mad": 0, "p2": 110, "p98": 110}
    assert reference["sharpness"]["medians"] == [0.5] * REGIONS


def test_as_before_is_ok() -> None:
    camera, reference, since = after_a_minute()
    camera.deliver(12)
    verdict = camera.compare(reference, since)
    assert (verdict.ok, verdict.waiting, verdict.assessed, verdict.reasons) == (True, False, 12, [])


def test_too_little_is_awaited() -> None:
    camera, reference, since = after_a_minute()
    assert camera.compare(reference, since).waiting
    camera.deliver(3)
    verdict = camera.compare(reference, since)
    assert verdict.waiting
    assert not verdict.ok
    assert verdict.reasons


def test_a_pipeline_may_take_half_a_minute_to_start() -> None:
    camera, reference, since = after_a_minute()
    camera.now += 28
    assert camera.compare(reference, since).waiting
    camera.deliver(8)
    assert camera.compare(reference, since).ok


def test_no_image_is_worse_after_the_grace() -> None:
    camera, reference, since = after_a_minute()
    camera.now += 31
    verdict = camera.compare(reference, since)
    assert not verdict.ok
    assert not verdict.waiting
    assert "no image" in verdict.reasons[0]


@pytest.mark.parametrize(("every_s", "ok"), [(1.0, True), (1.1, True), (2.0, False), (4.0, False)])
def test_the_rate_must_be_four_fifths(every_s: float, ok: bool) -> None:
    camera, reference, since = after_a_minute()
    camera.deliver(30, every_s=every_s)
    verdict = camera.compare(reference, since)
    assert verdict.ok is ok
    assert ok or "images a second" in verdict.reasons[0]


def test_images_that_cease_again_are_worse() -> None:
    camera, reference, since = after_a_minute()
    camera.deliver(20)
    assert camera.compare(reference, since).ok
    camera.now += 10
    assert not camera.compare(reference, since).ok


def test_a_slower_interval_set_by_the_change_itself_is_what_counts() -> None:
    camera, reference, since = after_a_minute()
    camera.deliver(12, every_s=5.0)
    assert not camera.compare(reference, since).ok
    assert camera.compare(reference, since, interval_s=5.0).ok


@pytest.mark.parametrize(
    ("picture", "word"),
    [
        (measures(sharpness=0.1), "blurred"),
        (measures(mean=40, p99=120), "dark"),
        (measures(mean=5, p99=15, p1=1), "dark"),
        (measures(mean=250, p99=255, p1=240, over=0.9), "overexposed"),
        (measures(p1=90, p99=130), "without contrast"),
    ],
)
def test_spoiled_pictures_are_seen_and_named(picture: Measures, word: str) -> None:
    camera, reference, since = after_a_minute()
    camera.deliver(10, picture)
    verdict = camera.compare(reference, since)
    assert not verdict.ok
    assert not verdict.waiting
    assert word in verdict.reasons[0]


def test_some_odd_pictures_do_not_decide_and_the_latest_count() -> None:
    camera, reference, since = after_a_minute()
    camera.deliver(6, measures(sharpness=0.1))
    camera.deliver(15)
    assert camera.compare(reference, since).ok
    camera.deliver(4, measures(sharpness=0.1))
    assert camera.compare(reference, since).ok


def test_different_faults_add_up() -> None:
    camera, reference, since = after_a_minute()
    for _ in range(3):
        camera.deliver(1, measures(sharpness=0.1))
        camera.deliver(1, measures(mean=20))
        camera.deliver(1, measures(p1=90, p99=130))
    verdict = camera.compare(reference, since)
    assert not verdict.ok
    assert len(verdict.reasons) == 3


def test_broken_and_repeated_files() -> None:
    camera, reference, since = after_a_minute()
    camera.deliver(8, broken=True)
    assert "broken" in camera.compare(reference, since).reasons[0]
    camera, reference, since = after_a_minute()
    camera.deliver(10, repeated=True)
    assert "repeat" in camera.compare(reference, since).reasons[0]


def test_a_camera_that_repeated_before_may_go_on() -> None:
    camera = Camera()
    camera.deliver(60, repeated=True)
    reference, since = camera.reference(), camera.now
    camera.deliver(12, repeated=True)
    assert camera.compare(reference, since).ok


def test_few_pictures_before_go_by_rate_and_say_so() -> None:
    camera = Camera()
    camera.deliver(15)
    reference, since = camera.reference(), camera.now
    camera.deliver(12, measures(sharpness=0.0))
    verdict = camera.compare(reference, since)
    assert verdict.ok
    assert "going by rate" in verdict.reasons[0]


def test_a_source_silent_before_is_not_required() -> None:
    camera = Camera()
    camera.deliver(60)
    camera.now += 100
    reference = camera.reference()
    assert not reference["flowing"]
    camera.now += 100
    verdict = camera.compare(reference, camera.now - 100)
    assert verdict.ok
    assert not verdict.waiting
    assert "silent before" in verdict.reasons[0]


def test_a_dark_night_before_is_no_reason_after() -> None:
    camera = Camera()
    camera.deliver(60, measures(mean=6, p99=20, p1=2))
    reference, since = camera.reference(), camera.now
    camera.deliver(12, measures(mean=6, p99=20, p1=2))
    assert camera.compare(reference, since).ok
    camera.deliver(20)
    assert camera.compare(reference, since).ok


def test_one_worse_source_decides_and_waiting_comes_next() -> None:
    good, bad, waiting = (
        Comparison(9, True, False, []),
        Comparison(7, False, False, ["b"]),
        Comparison(1, False, True, ["w"]),
    )
    assert join([good, bad, waiting]) == Comparison(17, False, False, ["b"])
    assert join([good, waiting]).waiting
    assert not join([good, waiting]).ok
    assert join([good]).ok
    assert join([]).ok
    assert join([]).reasons


@settings(deadline=None, max_examples=40)
@given(st.integers(), st.floats(0.0, 0.05), st.floats(0.2, 20))
def test_ordinary_variation_is_never_worse(seed: int, spread: float, interval_s: float) -> None:
    chance = random.Random(seed)
    camera = Camera(interval_s)

    def deliver(count: int) -> None:
        for _ in range(count):
            picture = measures(chance.gauss(0.5, spread), mean=chance.gauss(110, 5))
            camera.deliver(1, picture, every_s=interval_s * chance.uniform(0.8, 1.2))

    deliver(60)
    reference, since = camera.reference(), camera.now
    for _ in range(40):
        deliver(1)
        verdict = camera.compare(reference, since)
        assert verdict.ok or verdict.waiting, verdict.reasons
    assert verdict.ok


def test_a_history_stays_small_and_covers_the_hour() -> None:
    camera = Camera()
    camera.deliver(7200)
    assert len(camera.history.pictures) <= HISTORY_SAMPLES
    assert len(camera.history.arrivals) <= 2048
    assert camera.reference()["rate_hz"] == pytest.approx(1, abs=0.02)


def test_the_baseline_takes_sixteen_at_once_then_one_a_minute() -> None:
    baseline = Baseline()
    for second in range(16 + 600):
        baseline.add((0.5,) * REGIONS, float(second))
    assert baseline.samples == 26
    assert baseline.drop((0.2,) * REGIONS) == pytest.approx(0.3)
    assert baseline.limit(0.25) == 0.25
