"""The update machine, every state with every observation."""

from itertools import product

from agent.updates.states import (
    FINAL,
    FORWARD,
    MAX_ARMS,
    MAX_BOOTS,
    MAX_ENTRIES,
    MAX_RESTARTS,
    MAX_ROLL_BACKS,
    ON_TRIAL,
    UNTOUCHED,
    Outcome,
    Seen,
    State,
    following,
    rebuild,
    resume,
)

EVERYTHING = [
    Seen(slot, attempts, entries, boots, restarted, moved, cancelled)  # type: ignore[arg-type]
    for slot, attempts, entries, boots, restarted, moved, cancelled in product(
        ("absent", "partial", "staged", "active"),
        (1, 2, 3, 4, 5),
        (1, 31, 32, 33),
        (0, 2, 3, 4),
        (False, True),
        (False, True),
        (False, True),
    )
]


def test_the_way_forward():
    way = [State.RECEIVED]
    while way[-1] not in FINAL:
        way.append(following(way[-1], Outcome.DONE, Seen(entries=len(way))))
    assert tuple(way) == FORWARD


def test_every_state_with_every_outcome_and_observation():
    tried = 0
    for state, outcome, seen in product(State, Outcome, EVERYTHING):
        after = following(state, outcome, seen)
        tried += 1
        if state in FINAL:
            assert after is state
        elif state is State.COMMITTING:
            assert after is (State.COMMITTED if outcome is Outcome.DONE else State.ROLLING_BACK)
        elif state is State.ROLLING_BACK:
            assert after in (State.ROLLED_BACK, State.FAILED)
        elif state in ON_TRIAL:
            assert after in (State.ROLLING_BACK, FORWARD[FORWARD.index(state) + 1])
            if outcome is not Outcome.DONE or seen.entries >= MAX_ENTRIES:
                assert after is State.ROLLING_BACK
        else:
            assert after not in (State.ROLLING_BACK, State.ROLLED_BACK)
            if outcome is Outcome.FAILED or seen.entries >= MAX_ENTRIES or seen.cancelled:
                assert after is State.FAILED
        if outcome is Outcome.AGAIN and state in UNTOUCHED and after is not State.FAILED:
            assert (state, after) == (State.DOWNLOADED, State.DOWNLOADING)
    print(f"{tried} transitions")


def test_every_restart():
    tried = 0
    for state, seen in product(State, EVERYTHING):
        after = resume(state, seen)
        tried += 1
        if state in FINAL or state is State.COMMITTING:
            assert after is state
        elif state is State.INSTALLING and seen.moved:
            assert after is State.ROLLING_BACK
        elif state in UNTOUCHED:
            assert after in (*UNTOUCHED, State.ARMED, State.FAILED)
            assert (after is State.FAILED) or not (seen.cancelled or seen.entries >= MAX_ENTRIES)
        elif state is State.ROLLING_BACK:
            assert after in (State.ROLLING_BACK, State.FAILED)
        else:
            assert after in (*ON_TRIAL, State.ROLLING_BACK)
            if after is State.TRIAL:
                assert seen.slot == "active"
        assert resume(after, seen) is after or after in (State.ARMED, State.TRIAL, State.ROLLING_BACK, State.INSTALLING)
    print(f"{tried} restarts")


def test_limits():
    assert resume(State.TRIAL, Seen("active", boots=MAX_BOOTS)) is State.ROLLING_BACK
    assert resume(State.TRIAL, Seen("active", boots=MAX_BOOTS - 1)) is State.TRIAL
    assert resume(State.TRIAL, Seen("staged")) is State.ROLLING_BACK
    assert resume(State.RESTARTING, Seen("active", attempts=MAX_RESTARTS)) is State.ROLLING_BACK
    assert resume(State.RESTARTING, Seen("active", restarted=True)) is State.TRIAL
    assert resume(State.INSTALLING, Seen("partial")) is State.INSTALLING
    assert resume(State.INSTALLING, Seen("partial", attempts=2)) is State.FAILED
    assert resume(State.INSTALLING, Seen("staged", attempts=2)) is State.INSTALLING  # it waits there for a reference
    assert resume(State.INSTALLING, Seen("staged", cancelled=True)) is State.FAILED
    assert resume(State.ARMED, Seen("staged", attempts=MAX_ARMS)) is State.ROLLING_BACK
    assert resume(State.INSTALLING, Seen("active", moved=True)) is State.ROLLING_BACK
    assert resume(State.ROLLING_BACK, Seen(attempts=MAX_ROLL_BACKS)) is State.FAILED


def test_a_lost_record():
    assert rebuild("active", committed=True) is State.COMMITTED
    assert rebuild("active", committed=False) is State.ROLLING_BACK
    assert rebuild("staged", committed=False) is State.RECEIVED


def test_no_endless_walk():
    """From any state with every act failing or done again the end comes within the limit of entries."""
    for first in State:
        for outcome in Outcome:
            state, entries, attempts = first, 0, {}
            while state not in FINAL:
                entries += 1
                attempts[state] = attempts.get(state, 0) + 1
                state = following(state, outcome, Seen(attempts=attempts[state], entries=entries))
                assert entries <= MAX_ENTRIES + 2
