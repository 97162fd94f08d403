"""Whose turn it is to connect: the settings in force or agent.toml's own, at every moment of three days."""

from __future__ import annotations

import itertools

import pytest

from agent.cloud.fallback import FALLBACK_AFTER_S, LONG_TURN_S, SHORT_TURN_S, Route, turn, way
from agent.settings import Cloud

OWN = Cloud(endpoint="x.iot.example")
SET = Cloud(endpoint="x.iot.example", port=443, proxy_url="http://cam:secret@proxy.example:3128")
CYCLE_S = LONG_TURN_S + SHORT_TURN_S
DAYS_S = 3 * 86400
STEP_S = 5


@pytest.mark.parametrize("own_reached", [False, True])
def test_a_turn_lasts_exactly_as_long_as_it_says(own_reached):
    at, seen, tried = 0.0, [], 0
    while at < DAYS_S:
        own, left_s = turn(at, own_reached=own_reached)
        assert left_s > 0
        inner = range(int(at), int(at + left_s), STEP_S)
        for moment in inner:
            assert turn(moment, own_reached=own_reached) == (own, at + left_s - moment)
        tried += len(inner)
        seen.append((own, left_s))
        at += left_s
    first = [] if own_reached else [(False, FALLBACK_AFTER_S)]
    pair = [(True, LONG_TURN_S), (False, SHORT_TURN_S)] if own_reached else [(True, SHORT_TURN_S), (False, LONG_TURN_S)]
    assert seen == (first + pair * 100)[: len(seen)]
    print(f"{tried} moments tried")


def test_after_six_hours_both_have_a_turn_in_any_seventy_minutes():
    tried = 0
    for begin in range(int(FALLBACK_AFTER_S), DAYS_S, 60):
        for own_reached in (False, True):
            turns = {turn(begin + more, own_reached=own_reached)[0] for more in range(0, int(CYCLE_S), 60)}
            assert turns == {True, False}
            tried += 1
    assert not any(turn(moment)[0] for moment in range(0, int(FALLBACK_AFTER_S), STEP_S))
    print(f"{tried} windows of seventy minutes tried")


def test_there_is_no_other_way_when_the_settings_in_force_are_agent_tomls_own():
    route = Route(OWN, OWN, unreached_s=1e9)
    for moment in (0.0, FALLBACK_AFTER_S, 1e8):
        assert route.choose(moment) == OWN
        assert route.left_s(moment) == float("inf")
        assert route.told(moment) is None


def test_the_clock_begins_with_the_first_attempt():
    route = Route(SET, OWN)
    assert route.unreached_s(1e6) == 0
    assert route.choose(1e6) == SET
    assert route.left_s(1e6) == FALLBACK_AFTER_S
    assert route.told(1e6 + FALLBACK_AFTER_S - 1) is None
    assert route.choose(1e6 + FALLBACK_AFTER_S) == OWN
    told = route.told(1e6 + FALLBACK_AFTER_S)
    assert told
    assert "proxy.example:3128" in told.reason
    assert "secret" not in told.reason + told.hint


def test_what_connects_stays_and_is_tried_first_when_it_is_lost():
    route = Route(SET, OWN)
    route.choose(0)
    now = FALLBACK_AFTER_S + 1
    assert route.choose(now) == OWN
    route.reached(OWN)
    for _ in range(3):
        told = route.told(now)
        assert told
        assert "connected by agent.toml's own" in told.reason
        now += 86400
        assert route.choose(now - 1) is not None
        route.lost(now)
        assert route.choose(now) == OWN
        assert route.left_s(now) == LONG_TURN_S
        assert route.choose(now + LONG_TURN_S) == SET
        assert route.choose(now + CYCLE_S) == OWN
        now += LONG_TURN_S
        route.reached(OWN)
    route.lost(now)
    route.reached(SET)  # the settings in force work again
    assert route.told(now) is None
    route.lost(now)
    assert (route.choose(now), route.left_s(now)) == (SET, FALLBACK_AFTER_S)


def test_losing_twice_counts_from_the_first():
    route = Route(SET, OWN)
    route.choose(0)
    route.reached(SET)
    route.lost(100)
    route.lost(5000)
    assert route.unreached_s(5100) == 5000


def test_restarts_of_the_process_do_not_put_the_turn_off_for_ever():
    unreached_s, runs = 0.0, 0
    while True:
        route = Route(OWN, OWN, unreached_s).to(
            SET
        )  # as at a start: agent.toml first, then what is stored comes in force
        if route.choose(7.0) == OWN:
            break
        unreached_s = route.unreached_s(7.0 + 1800)
        runs += 1
    assert runs == FALLBACK_AFTER_S / 1800
    route.reached(OWN)
    again = Route(SET, OWN, route.unreached_s(9999.0))
    assert again.choose(0.0) == OWN
    route.reached(SET)
    assert route.unreached_s(9999.0) == 0
    print(f"{runs} restarts tried")


def test_new_settings_have_their_six_hours():
    route = Route(SET, OWN)
    route.choose(0)
    other = SET.model_copy(update={"port": 8883})
    moved = route.to(other)
    assert moved.choose(FALLBACK_AFTER_S + 1) == other
    assert moved.left_s(FALLBACK_AFTER_S + 1) == FALLBACK_AFTER_S
    assert moved.own == OWN


@pytest.mark.parametrize(("cloud", "words"), [(OWN, "port 8883"), (SET, "port 443, proxy proxy.example:3128")])
def test_the_way_is_told_without_the_password(cloud, words):
    assert way(cloud) == words


def test_every_order_of_reaching_and_losing_leaves_a_turn_for_both():
    tried = 0
    for steps in itertools.product(("own", "set", "lost", "wait"), repeat=6):
        route, now = Route(SET, OWN), 0.0
        route.choose(now)
        for step in steps:
            now += 4000
            if step == "lost":
                route.lost(now)
            elif step != "wait":
                route.reached(OWN if step == "own" else SET)
        route.lost(now)
        chosen = [route.choose(now + more) == OWN for more in range(0, int(FALLBACK_AFTER_S + CYCLE_S), 300)]
        assert True in chosen
        assert False in chosen
        tried += 1
    print(f"{tried} orders tried")
