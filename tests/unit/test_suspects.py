"""Topics that make the server hang up are held back, and whoever was only near them is cleared."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cloud.suspects import ALONE_S, FORGOTTEN_S, HELD_S, TIMES, Suspects

connections = itertools.count(1)


def guilty(suspects, topic, now=0.0, times=TIMES):
    return [suspects.lost(topic, next(connections), now) for _ in range(times)]


def test_many_messages_in_flight_at_one_loss_count_once():
    suspects = Suspects()
    assert [suspects.lost("busy", 1, 0.0) for _ in range(20)] == [False] * 20
    assert suspects.wait_s("busy", 0.0) == 0


def test_three_losses_in_a_row_hold_a_topic_back_and_an_answer_forgives():
    suspects = Suspects()
    assert guilty(suspects, "bad") == [False, False, True]
    assert suspects.held(0.0) == ["bad"]
    assert suspects.wait_s("bad", 0.0) == HELD_S[0]
    assert suspects.wait_s("good", 0.0) == 0
    assert suspects.wait_s("bad", HELD_S[0]) == 0
    suspects.answered("bad")
    assert suspects.held(0.0) == []
    assert guilty(suspects, "bad", times=2) == [False, False]
    assert suspects.wait_s("bad", 0.0) == 0


def test_an_answer_in_between_starts_the_count_anew():
    suspects = Suspects()
    guilty(suspects, "shaky", times=2)
    suspects.answered("shaky")
    guilty(suspects, "shaky", times=2)
    assert suspects.held(0.0) == []


def test_suspects_are_tried_one_at_a_time_so_that_the_innocent_are_cleared():
    suspects = Suspects()
    for _ in range(TIMES):
        for topic in ("jobs", "shadow"):
            suspects.lost(topic, next(connections), 0.0)
    now = HELD_S[0]
    assert suspects.wait_s("shadow", now) == 0
    assert suspects.wait_s("jobs", now) == ALONE_S
    suspects.lost("shadow", next(connections), now + 1)
    assert suspects.wait_s("jobs", now + 1) == 0
    suspects.answered("jobs")
    assert suspects.held(now) == ["shadow"]
    assert suspects.wait_s("shadow", now + 1) == 2 * HELD_S[0]


def test_a_probe_that_is_never_answered_blocks_nobody_for_ever():
    suspects = Suspects()
    for topic in ("a", "b"):
        guilty(suspects, topic)
    assert suspects.wait_s("a", HELD_S[0]) == 0
    assert suspects.wait_s("b", HELD_S[0] + ALONE_S) == 0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["lost", "answered", "ask"]), st.floats(0, 1000))))
def test_whatever_happens_nobody_waits_longer_than_the_longest_hold(steps):
    suspects, now = Suspects(), 0.0
    for topic, what, passed in steps:
        now += passed
        if what == "ask":
            assert 0 <= suspects.wait_s(topic, now) <= HELD_S[1] + ALONE_S
        elif what == "lost":
            suspects.lost(topic, next(connections), now)
        else:
            suspects.answered(topic)
            assert topic not in suspects.held(now)


@pytest.mark.parametrize("losses", range(TIMES, 40))
def test_the_hold_doubles_up_to_an_hour(losses):
    suspects = Suspects()
    guilty(suspects, "bad", times=losses)
    assert suspects.wait_s("bad", 0.0) == min(HELD_S[0] * 2 ** (losses - TIMES), HELD_S[1])


def test_a_topic_that_nobody_uses_any_more_is_forgotten():
    suspects = Suspects()
    for number in range(1000):
        guilty(suspects, f"jobs/{number}/get")
    assert len(suspects.held(0.0)) == 1000
    assert suspects.held(FORGOTTEN_S + HELD_S[1]) == []
    assert suspects._known == {}
