"""Judging a trial: what passes was well without a break, what fails early did harm for long."""

import itertools
import time
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.capture.comparison import judging_s
from agent.capture.reference import GRACE_S, JUDGED_INTERVALS
from agent.updates import gate as gates
from agent.updates.gate import LONGEST_GAP_S, Check, ConfigurationGate, Gate, Seen, Terms, harmful_after_s, judge
from tests.unit.test_reference import Camera

TERMS = Terms(started=100.0, stable_for_s=20, deadline_s=120)
HARMFUL_S = harmful_after_s(TERMS.stable_for_s)


def images(ok):
    return Check("images", ok, "front: blurred", "capture_worse", HARMFUL_S)


def probe(ok):
    return Check("probe", ok, "the probe ended with exit status 3", "probe_failed")


def play(looks, terms=TERMS):
    """(time of the verdict, verdict, looks up to it) for a script of (seconds since the look before, checks)."""
    seen, now, done = Seen(), terms.started, []
    for pause, checks in looks:
        now += pause
        done.append((now, checks))
        seen, verdict = judge(seen, checks, now, terms)
        if verdict.passed is not None:
            return now, verdict, done
    return None, verdict, done


def test_all_well():
    at, verdict, _ = play([(1, [images(True), probe(True)])] * 200)
    assert verdict.passed
    assert at == 121
    assert "images, probe" in verdict.reasons[0]


def test_only_what_was_judged_is_claimed():
    claim = "images judged by rate only: front: 3 pictures measured before the change"
    rate_only = Check("images", True, "", "capture_worse", HARMFUL_S, held_as=claim)
    _, verdict, _ = play([(1, [rate_only, probe(True)])] * 200)
    assert verdict.reasons == (f"held for 20 s: probe; {claim}",)


class Images:
    def __init__(self, judged="pictures", lacks=()):
        self.lacks = list(lacks)
        self.verdict = SimpleNamespace(assessed=9, ok=True, waiting=False, reasons=["front: why"], judged=judged)

    def lacking(self):
        return self.lacks.pop(0) if self.lacks else ""

    def reference(self):
        assert not self.lacks
        return {}

    def compare(self, reference, since, least_share):
        return self.verdict

    def judging_s(self, reference, intervals):
        return 30 + 10 * max(intervals)


@pytest.mark.parametrize(
    ("judged", "words"),
    [
        ("pictures", "held for 0.05 s: images"),
        ("partly", "held for 0.05 s: nothing to look at; images judged in part: front: why"),
        ("rate", "held for 0.05 s: nothing to look at; images judged by rate only: front: why"),
        ("nothing", "held for 0.05 s: nothing to look at; images not judged: front: why"),
    ],
)
async def test_the_end_says_by_what_images_were_judged(judged, words):
    gate = Gate(None, Images(judged), lambda: False)
    verdict = await gate.watch(await gate.baseline(), since=time.monotonic(), stable_for_s=0.05, deadline_s=60)
    assert verdict.reasons == (words,)


async def test_a_reference_is_waited_for_and_it_says_so(monkeypatch):
    monkeypatch.setattr(gates, "WAIT_LOOK_S", 0.001)
    said = []

    async def say(words):
        said.append(words)

    lacks = ["front: 5 of 16 pictures measured"] * 3 + ["front: 6 of 16 pictures measured"]
    images_before = Images(lacks=lacks)
    await Gate(None, images_before, lambda: False).settled(say)
    assert images_before.lacks == []
    assert said == [f"watching the images before the change: {words}" for words in (lacks[0], lacks[3])]


def test_a_blip_starts_the_time_again():
    at, verdict, _ = play([(1, [images(i != 15)]) for i in range(200)])
    assert verdict.passed
    assert at == pytest.approx(100 + 17 + 20)


def test_spoilt_images_fail_long_before_the_deadline():
    at, verdict, _ = play([(1, [images(False), probe(True)])] * 200)
    assert (verdict.passed, verdict.code) == (False, "capture_worse")
    assert at == 101 + HARMFUL_S
    assert verdict.reasons == ("front: blurred",)


def test_short_spoilt_times_do_not_fail_early():
    script = [(1, [images(None if i % 9 == 0 else False)]) for i in range(300)]
    at, verdict, _ = play(script)
    assert (at, verdict.code) == (220, "capture_worse")


def test_a_failing_probe_has_until_the_deadline():
    at, verdict, _ = play([(1, [images(True), probe(False)])] * 200)
    assert (at, verdict.code) == (220, "probe_failed")
    assert "exit status 3" in verdict.reasons[0]
    assert play([(1, [probe(i > 90)]) for i in range(200)])[1].passed


def test_what_could_not_be_said_in_time_says_what_to_do():
    waiting = Check("images", None, "front: too few", "capture_worse", late="give it more time")
    at, verdict, _ = play([(1, [waiting])] * 200)
    assert (at, verdict.code) == (220, "deadline")
    assert verdict.reasons[0] == "front: too few"
    assert verdict.reasons[-1] == "give it more time"
    assert "give it more time" not in play([(1, [waiting])] * 50)[1].reasons, "only at the end"


def trial_of(interval_s, deadline_s, *, start_s=20.0, stable_for_s=60.0):
    """A camera with an image every `interval_s` that is restarted by a change and is well, judged every 5 s."""
    camera = Camera(interval_s)
    camera.deliver(60)
    reference, since = camera.reference(), camera.now
    terms, seen, verdict = Terms(since, stable_for_s, deadline_s), Seen(), None
    delivered = since + start_s
    while verdict is None or verdict.passed is None:
        look = camera.now + 5
        while delivered + interval_s <= look:
            camera.now = delivered
            camera.deliver(1)
            delivered = camera.now
        camera.now = look
        found = camera.compare(reference, since)
        ok = None if found.waiting else found.ok
        check = Check("images", ok, "; ".join(found.reasons), "capture_worse", harmful_after_s(stable_for_s))
        seen, verdict = judge(seen, [check], camera.now, terms)
    return verdict, judging_s({"front": reference}, [interval_s])


SLOW = [1.0, 7.0, 30.0, 60.0, 300.0, 1800.0]


def test_a_camera_of_any_pace_passes_a_trial_with_the_time_that_the_judging_takes():
    for interval_s, start_s in itertools.product(SLOW, (0.0, 25.0)):
        time_s = GRACE_S + JUDGED_INTERVALS * interval_s
        verdict, judging = trial_of(interval_s, 3 * 60 + 60 + time_s, start_s=start_s)
        assert judging == pytest.approx(time_s, rel=0.1)
        assert verdict.passed, (interval_s, start_s, verdict)
    print(f"{2 * len(SLOW)} trials of slow cameras tried")


def test_a_slow_camera_fails_a_trial_without_it_and_is_told_why():
    verdict, _ = trial_of(60.0, 3 * 60 + 60)
    assert verdict.passed is False
    assert "too few to tell the rate: one every 60 s is told 300 s after the first" in verdict.reasons[0]


async def test_the_gate_tells_how_long_it_takes_by_what_it_saw_before():
    gate = Gate(None, Images(), lambda: False)
    assert gate.judging_s(await gate.baseline(), [60.0]) == 630
    assert gate.judging_s({"capture": None}, [60.0]) == 0
    blind = ConfigurationGate(Gate(None, None, lambda: False))
    assert blind.judging_s(await blind.reference(), [60.0]) == 0


async def test_too_few_images_until_the_deadline_say_what_to_do():
    images_after = Images()
    images_after.verdict = SimpleNamespace(
        assessed=0, ok=False, waiting=True, reasons=["front: too few"], judged="rate"
    )
    gate = Gate(None, images_after, lambda: False)
    verdict = await gate.watch(await gate.baseline(), since=time.monotonic(), stable_for_s=0.05, deadline_s=0.1)
    assert (verdict.passed, verdict.code, verdict.harm) == (False, "deadline", False)
    assert "config.trial_s" in verdict.reasons[-1]
    assert "interval_s" in verdict.reasons[-1]


def test_unknown_is_not_well():
    at, verdict, _ = play([(1, [images(None)])] * 200)
    assert (at, verdict.passed, verdict.code) == (220, False, "deadline")


def test_well_too_late():
    _, verdict, _ = play([(1, [images(i > 110 or i % 5)]) for i in range(200)])
    assert verdict.code == "deadline"


def test_a_gap_is_a_break():
    _, verdict, _ = play([(1, [images(True)]), (LONGEST_GAP_S + 1, [images(True)])])
    assert verdict.passed is None


def test_a_crash_loop_fails_at_once():
    at, verdict, _ = play([(1, [Check("unit", False, "restarted 3 times", "unit_failed", 0)])])
    assert (at, verdict.code) == (101, "unit_failed")


STATES = st.sampled_from([True, True, True, True, False, None])
LOOKS = st.lists(
    st.tuples(st.floats(0.1, 50), st.tuples(STATES.map(images), STATES.map(probe))), min_size=1, max_size=60
)


@given(LOOKS)
def test_any_script(looks):
    at, verdict, done = play(looks)
    deadline = TERMS.started + TERMS.deadline_s
    if verdict.passed is None:
        assert done[-1][0] < deadline
        assert verdict.reasons
        return
    if verdict.passed:
        assert at <= deadline
        start = max((i for i, (_, checks) in enumerate(done) if not all(c.ok for c in checks)), default=-1) + 1
        times = [now for now, _ in done[start:]]
        assert times[-1] - times[0] >= TERMS.stable_for_s
        return
    assert verdict.reasons
    if at < deadline:
        assert verdict.code == "capture_worse"
        harmful = [now for now, checks in done if now >= at - HARMFUL_S]
        assert all(checks[0].ok is False for now, checks in done if now in harmful)


@given(st.floats(1, 86_400))
def test_harm_is_never_a_blip(stable_for_s):
    assert 10 <= harmful_after_s(stable_for_s) <= 60
