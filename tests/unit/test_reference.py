"""The gate's short reference: worse is seen, normal variation is not, and too little is awaited."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.capture import kept
from agent.capture.comparison import Comparison, compare_source, join, judging_s
from agent.capture.image_quality import REGIONS, Measures
from agent.capture.reference import HISTORY_SAMPLES, Baseline, History
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

    def compare(
        self,
        reference: dict[str, Any],
        since: float,
        interval_s: float | None = None,
        settings: Capture = Capture(),  # noqa: B008
    ) -> Comparison:
        return compare_source(
            "front",
            reference,
            self.history,
            since=since,
            now=self.now,
            interval_s=interval_s or self.interval_s,
            settings=settings,
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


SETTINGS = {
    "blur_drop": (0.01, 0.1, 0.25, 0.26, 1.0, 5.0),
    "dark_luma": (0.0, 27.0, 28.0, 29.0, 130.0, 219.0, 220.0, 255.0),
}


@pytest.mark.parametrize(("picture", "word"), [(measures(sharpness=0.2), "blurred"), (measures(p99=20), "dark")])
def test_no_setting_makes_the_gate_laxer_than_the_defaults(picture: Measures, word: str) -> None:
    tried = list(itertools.product(*SETTINGS.values()))
    for values in tried:
        camera, reference, since = after_a_minute()
        camera.deliver(10, picture)
        chosen = Capture.model_validate(dict(zip(SETTINGS, values, strict=True)))
        verdict = camera.compare(reference, since, settings=chosen)
        assert not verdict.ok, (chosen, verdict)
        assert word in verdict.reasons[0], chosen
    print(f"{len(tried)} pairs of thresholds tried")


def test_a_stricter_setting_counts() -> None:
    camera, reference, since = after_a_minute()
    camera.deliver(10, measures(sharpness=0.35, p99=130))
    assert camera.compare(reference, since).ok
    assert "blurred" in camera.compare(reference, since, settings=Capture(blur_drop=0.1)).reasons[0]
    assert "dark" in camera.compare(reference, since, settings=Capture(dark_luma=140)).reasons[0]


def test_how_long_the_judging_takes_at_most() -> None:
    source = {"interval_s": 1.0, "rate_hz": 1.0, "flowing": True}
    assert judging_s({}, [60.0]) == 0
    assert judging_s({"front": source | {"silent": True}}, [60.0]) == 0
    assert judging_s({"front": source}, []) == 40
    assert judging_s({"front": source | {"interval_s": 0.1, "rate_hz": 10.0}}, []) == 35
    assert judging_s({"front": source}, [1.0, 60.0]) == 630
    assert judging_s({"front": source | {"rate_hz": 0.02}, "rear": source}, [1.0]) == 530
    assert judging_s({"front": source | {"rate_hz": 0.0, "flowing": False}}, [10.0]) == 130


@settings(deadline=None, max_examples=60)
@given(st.floats(0.02, 3600), st.floats(0, 30), st.floats(0.85, 1.15), st.booleans())
def test_images_that_are_well_are_judged_in_that_time(
    interval_s: float, start_s: float, pace: float, enough_before: bool
) -> None:
    camera = Camera(interval_s)
    camera.deliver(60 if enough_before else 12)
    reference, since = camera.reference(), camera.now
    end = since + judging_s({"front": reference}, [interval_s])
    camera.now += start_s
    while camera.now + interval_s * pace <= end:
        camera.deliver(1, every_s=interval_s * pace)
    camera.now = end
    verdict = camera.compare(reference, since)
    assert verdict.ok, verdict


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
    assert reference["silent"]
    camera.now += 100
    verdict = camera.compare(reference, camera.now - 100)
    assert verdict.ok
    assert not verdict.waiting
    assert verdict.judged == "nothing"
    assert "silent before" in verdict.reasons[0]


def test_a_source_never_known_to_be_silent_must_deliver() -> None:
    camera = Camera()
    camera.now += 3
    reference, since = camera.reference(), camera.now
    assert not reference["flowing"]
    assert not reference["silent"]
    assert camera.compare(reference, since).waiting
    camera.now += 31
    verdict = camera.compare(reference, since)
    assert not verdict.ok
    assert not verdict.waiting
    assert "no image" in verdict.reasons[0]
    camera.deliver(3)
    verdict = camera.compare(reference, since)
    assert verdict.ok
    assert verdict.judged == "nothing"
    camera.now += 100
    assert not camera.compare(reference, since).ok


def test_by_what_images_were_judged() -> None:
    camera = Camera()
    camera.deliver(15)
    reference, since = camera.reference(), camera.now
    camera.deliver(12)
    assert camera.compare(reference, since).judged == "rate"
    reference, since = camera.reference(), camera.now
    camera.deliver(12)
    assert camera.compare(reference, since).judged == "pictures"
    pictures, rate, nothing = (Comparison(9, True, False, [], by) for by in ("pictures", "rate", "nothing"))
    assert join([pictures, pictures]).judged == "pictures"
    assert join([pictures, nothing]).judged == join([pictures, rate]).judged == "partly"
    assert join([rate, nothing]).judged == "rate"
    assert join([nothing]).judged == join([]).judged == "nothing"


@pytest.mark.parametrize(("interval_s", "most_s"), [(0.1, 60), (1, 60), (10, 200), (86400, 3600)])
def test_the_wait_for_a_reference_is_no_longer_than_needed(interval_s: float, most_s: float) -> None:
    camera = Camera(interval_s)
    asked = camera.now
    lacking = lambda: camera.history.lacking(asked, camera.now, interval_s)  # noqa: E731
    assert "no image" in lacking()
    camera.deliver(15)
    if camera.now - asked < most_s:
        assert "15 of 16" in lacking()
        camera.deliver(1)
    assert lacking() == ""
    stalled = Camera(interval_s)
    stalled.deliver(3)
    asked = stalled.now
    stalled.now += max(3 * interval_s, 60) + 1
    assert stalled.history.lacking(asked, stalled.now, interval_s) == ""
    unmeasured = Camera(interval_s)
    asked = unmeasured.now
    while unmeasured.now - asked <= most_s:
        unmeasured.deliver(1, None)
    assert unmeasured.history.lacking(asked, unmeasured.now, interval_s) == ""


def keep(camera: Camera) -> dict[str, Any]:
    document = kept.as_json(
        camera.history, now=camera.now, at=camera.now + 1.7e9, boot_id="a", interval_s=camera.interval_s, place="/x"
    )
    copy: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
    return copy


def restart(document: dict[str, Any], *, now: float, at: float, boot_id: str = "a", **other: Any) -> Camera:
    camera = Camera(other.pop("interval_s", 1.0))
    camera.now = now
    camera.history = History(now)
    arguments = {"interval_s": camera.interval_s, "place": "/x", "clock_believed": True, **other}
    kept.restore(camera.history, document, now=now, at=at, boot_id=boot_id, **arguments)
    return camera


def test_what_another_boot_kept_counts_only_while_the_clock_is_believed() -> None:
    camera, _, _ = after_a_minute()
    document = keep(camera)
    later = {"now": 5.0, "at": camera.now + 1.7e9 + 12, "boot_id": "b"}
    assert restart(document, **later).history.pictures
    assert not restart(document, **later, clock_believed=False).history.pictures
    assert restart(document, now=camera.now + 20, at=0, clock_believed=False).history.pictures, "the same boot"


def test_a_restart_keeps_the_reference_and_it_is_not_taken_for_flowing() -> None:
    camera, before, _ = after_a_minute()
    document = keep(camera)
    again = restart(document, now=camera.now + 20, at=0)
    reference = again.reference()
    assert reference["samples"] == 60
    assert reference["rate_hz"] == before["rate_hz"]
    assert reference["sharpness"] == before["sharpness"] | {"samples": 60}
    assert not reference["flowing"]
    assert "no image" in again.history.lacking(again.now, again.now, 1.0)
    again.deliver(1)
    assert again.history.lacking(again.now, again.now, 1.0) == ""
    reference, since = again.reference(), again.now
    again.deliver(10, measures(sharpness=0.1))
    assert "blurred" in again.compare(reference, since).reasons[0]


def test_a_reboot_goes_by_the_wall_clock_and_what_is_old_or_of_another_source_is_left() -> None:
    camera, _, _ = after_a_minute()
    document = keep(camera)
    at = camera.now + 1.7e9
    assert restart(document, now=5, at=at + 60, boot_id="b").reference()["samples"] == 60
    assert restart(document, now=5, at=at + 3700, boot_id="b").reference()["samples"] == 0
    assert restart(document, now=5, at=at - 60, boot_id="b").reference()["samples"] == 0
    assert restart(document, now=camera.now + 3700, at=at).reference()["samples"] == 0
    assert restart(document, now=camera.now + 5, at=at, place="/y").reference()["samples"] == 0
    assert restart(document, now=camera.now + 5, at=at, interval_s=2.0).history.kept_rate_hz == 0


def test_what_is_kept_is_small_and_what_a_change_spoilt_is_forgotten() -> None:
    camera = Camera()
    camera.deliver(3000)
    assert len(json.dumps(keep(camera))) < 16_000
    since = camera.now
    camera.deliver(10, measures(mean=20))
    camera.history.forget(since, camera.now)
    assert camera.reference()["luma"]["p2"] == 110


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
