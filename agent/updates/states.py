"""The update machine: which state follows which, and where an interrupted update goes on. Pure.

A state is saved before its act, so that after a cut at any place the act is done again or its result is recognised.
Before ARMED nothing that runs has changed; from COMMITTING on nothing asks again whether it is well,
and only a version that will not stay is taken back.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

MAX_ENTRIES = 32
MAX_DOWNLOADS = 2
MAX_INSTALLS = 2
MAX_ARMS = 3
MAX_RESTARTS = 3
MAX_BOOTS = 3
MAX_ROLL_BACKS = 5
"""Each needs two entries when it restarts the camera or the agent."""

Slot = Literal["absent", "partial", "staged", "active"]


class State(StrEnum):
    RECEIVED = "RECEIVED"
    VERIFIED = "VERIFIED"
    PREFLIGHT = "PREFLIGHT"
    DOWNLOADING = "DOWNLOADING"
    DOWNLOADED = "DOWNLOADED"
    WAITING = "WAITING"
    INSTALLING = "INSTALLING"
    ARMED = "ARMED"
    RESTARTING = "RESTARTING"
    TRIAL = "TRIAL"
    COMMITTING = "COMMITTING"
    COMMITTED = "COMMITTED"
    ROLLING_BACK = "ROLLING_BACK"
    ROLLED_BACK = "ROLLED_BACK"
    FAILED = "FAILED"


FORWARD = tuple(State)[: tuple(State).index(State.COMMITTED) + 1]
UNTOUCHED = FORWARD[: FORWARD.index(State.ARMED)]
"""States in which the target still runs what it ran before; a cancel is honoured here."""
ON_TRIAL = (State.ARMED, State.RESTARTING, State.TRIAL)
FINAL = (State.COMMITTED, State.ROLLED_BACK, State.FAILED)


class Outcome(StrEnum):
    """How a state's act ended; `again`: what was fetched is not what was signed, it was thrown away."""

    DONE = "done"
    AGAIN = "again"
    FAILED = "failed"


@dataclass(frozen=True)
class Seen:
    """What is known where a decision is due.

    `attempts` counts the entries into the state in question, `entries` those into all states, `boots` the starts of
    the trial; `slot` is what the installer's probe says of the wanted version; `restarted` whether the restart of
    RESTARTING has happened; `moved` whether something else runs than what ran before installing.
    """

    slot: Slot = "absent"
    attempts: int = 1
    entries: int = 1
    boots: int = 0
    restarted: bool = False
    moved: bool = False
    cancelled: bool = False


def following(state: State, outcome: Outcome, seen: Seen) -> State:
    """The state after `state`'s act."""
    if state in FINAL:
        return state
    if state is State.ROLLING_BACK:
        return State.ROLLED_BACK if outcome is Outcome.DONE else State.FAILED
    if state is State.COMMITTING:
        return State.COMMITTED if outcome is Outcome.DONE else State.ROLLING_BACK
    if outcome is Outcome.FAILED or seen.entries >= MAX_ENTRIES or (seen.cancelled and state in UNTOUCHED):
        return _give_up(state)
    if outcome is Outcome.AGAIN:
        retry = state is State.DOWNLOADED and seen.attempts < MAX_DOWNLOADS
        return State.DOWNLOADING if retry else _give_up(state)
    return FORWARD[FORWARD.index(state) + 1]


def resume(state: State, seen: Seen) -> State:
    """The state to enter when the agent starts and finds `state` saved: its act may be undone, half done or done."""
    if state in FINAL or state is State.COMMITTING:
        return state
    if state is State.ROLLING_BACK:
        return state if seen.attempts < MAX_ROLL_BACKS else State.FAILED
    if state is State.INSTALLING and seen.moved:
        return State.ROLLING_BACK
    if seen.entries >= MAX_ENTRIES or (seen.cancelled and state in UNTOUCHED):
        return _give_up(state)
    if state is State.INSTALLING and seen.slot in ("absent", "partial"):
        return state if seen.attempts < MAX_INSTALLS else State.FAILED
    if state is State.INSTALLING:
        return state
    if state is State.ARMED:
        return state if seen.attempts < MAX_ARMS else State.ROLLING_BACK
    if state is State.RESTARTING and seen.restarted:
        return State.TRIAL if seen.slot == "active" else State.ROLLING_BACK
    if state is State.RESTARTING:
        return state if seen.attempts < MAX_RESTARTS else State.ROLLING_BACK
    if state is State.TRIAL:
        return state if seen.slot == "active" and seen.boots < MAX_BOOTS else State.ROLLING_BACK
    return state


def rebuild(slot: Slot, *, committed: bool) -> State:
    """Where an update stands whose record can't be read: `committed` when the store says that it is what is installed."""
    if slot != "active":
        return State.RECEIVED
    return State.COMMITTED if committed else State.ROLLING_BACK


def _give_up(state: State) -> State:
    return State.FAILED if state in UNTOUCHED else State.ROLLING_BACK
