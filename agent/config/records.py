"""What is kept in state.db about the configuration: what is in force, what was before, what is on trial, what was refused."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

from agent.config import trial as trials
from agent.config.desired import Desired, Problem, leaves, pointer
from agent.config.trial import Trial
from agent.logs import get_logger
from agent.store import Tables

log = get_logger("config")
T = TypeVar("T")

GOOD, PREVIOUS, TRIAL, REFUSED, ORIGINALS = (
    f"config.{name}" for name in ("good", "previous", "trial", "refused", "originals")
)


@dataclass(frozen=True)
class InForce:
    """A desired document that was proven: the last known good one.

    `version` is the shadow's when it was asked for; `since` says for each value, under its JSON pointer, with which
    version and when (epoch seconds) it came.
    """

    version: int = 0
    agent: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    since: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def desired(self) -> Desired:
        return Desired(self.agent, self.targets)


@dataclass(frozen=True)
class Refused:
    """A desired document that is not in force: never applied (`rejected`) or taken back (`reverted`), and why."""

    digest: str
    version: int
    state: Literal["rejected", "reverted"]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Kept:
    """Everything kept; `originals` holds each applied target's own file from before the shadow set it, in base64."""

    good: InForce = field(default_factory=InForce)
    previous: InForce = field(default_factory=InForce)
    trial: Trial | None = None
    refused: Refused | None = None
    originals: dict[str, str | None] = field(default_factory=dict)


def load(tables: Tables) -> Kept:
    """What is kept; a record that can't be read counts as absent and is logged."""
    return Kept(
        good=_read(tables, GOOD, _in_force) or InForce(),
        previous=_read(tables, PREVIOUS, _in_force) or InForce(),
        trial=_read(tables, TRIAL, trials.from_json),
        refused=_read(tables, REFUSED, _refused),
        originals=_read(tables, ORIGINALS, dict) or {},
    )


def save(tables: Tables, old: Kept, new: Kept) -> None:
    """Write what differs, as part of the caller's transaction."""
    rows = (
        (GOOD, old.good, new.good),
        (PREVIOUS, old.previous, new.previous),
        (TRIAL, old.trial, new.trial),
        (REFUSED, old.refused, new.refused),
    )
    for key, before, after in rows:
        if after is None:
            tables.delete_fact(key)
        elif after != before:
            tables.set_fact(key, asdict(after))
    tables.set_fact(ORIGINALS, new.originals)


def put_in_force(desired: Desired, version: int, at: float, before: InForce) -> InForce:
    """`desired` as what is in force from `at` on; a value that was in force before keeps its version and time."""
    old = leaves(before.desired.as_json())
    since = {}
    for path, value in leaves(desired.as_json()).items():
        where = pointer(*path)
        known = before.since.get(where) if path in old and old[path] == value else None
        since[where] = known or (version, at)
    return InForce(version, desired.agent, desired.targets, since)


def _read(tables: Tables, key: str, form: Callable[[dict[str, Any]], T]) -> T | None:
    try:
        record = tables.fact(key)
        return form(record) if record is not None else None
    except (TypeError, KeyError, ValueError, AttributeError):
        log.exception("a kept record can't be read and is ignored", record=key)
        return None


def _in_force(record: Mapping[str, Any]) -> InForce:
    since = {where: (version, at) for where, (version, at) in record["since"].items()}
    return InForce(**{**record, "since": since})


def _refused(record: Mapping[str, Any]) -> Refused:
    return Refused(**{**record, "problems": tuple(Problem(**problem) for problem in record["problems"])})


def without_stale_originals(kept: Kept) -> Kept:
    """`kept` without the original files of targets that the configuration in force leaves alone."""
    return replace(kept, originals={n: content for n, content in kept.originals.items() if n in kept.good.targets})


def encode(content: bytes | None) -> str | None:
    """A file's content as kept in the store; None for a file that is not there."""
    return None if content is None else base64.b64encode(content).decode()


def decode(text: str | None) -> bytes | None:
    """What `encode` was given."""
    return None if text is None else base64.b64decode(text)
