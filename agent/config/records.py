"""What is kept in state.db about the configuration: what is in force, what was before, what is on trial, what was refused."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

from agent.config import desired as wishes
from agent.config import layers
from agent.config import trial as trials
from agent.config.deliveries import Deliveries
from agent.config.desired import Marks, Problem
from agent.config.layers import InForce
from agent.config.trial import Trial
from agent.logs import get_logger
from agent.settings import Settings
from agent.store import Store, Tables

log = get_logger("config")
T = TypeVar("T")

GOOD, PREVIOUS, TRIAL, REFUSED, ORIGINALS, OUTCOME = (
    f"config.{name}" for name in ("good", "previous", "trial", "refused", "originals", "outcome")
)


@dataclass(frozen=True)
class Refused:
    """A document of the shadow that is not in force: never applied (`rejected`) or taken back (`reverted`), and why."""

    digest: str
    version: int
    state: Literal["rejected", "reverted"]
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a job's change: `job` names the execution."""

    job: str
    state: Literal["applied", "rejected", "reverted"]
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Kept:
    """Everything kept; `originals` holds each applied target's own file from before the fleet set it, in base64."""

    good: InForce = field(default_factory=InForce)
    previous: InForce = field(default_factory=InForce)
    trial: Trial | None = None
    refused: Refused | None = None
    outcome: Outcome | None = None
    originals: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """For the audit trail: what happened to a change, at which version of the shadow, by whom (`shadow`, or `job …`)."""

    state: Literal["applied", "rejected", "reverted"]
    version: int
    by: str = "shadow"
    problems: Sequence[Problem] = ()


class Keeper:
    """Holds `kept` and writes what changes; `on_change` is called after each write."""

    def __init__(self, store: Store, on_change: Callable[[], None]) -> None:
        self._store = store
        self._on_change = on_change
        self.kept = Kept()

    async def load(self) -> None:
        """Read what is kept."""
        self.kept = await self._store.read(load)

    async def keep(self, kept: Kept, note: Note | None = None) -> None:
        """Make `kept` durable, with a `note` in the audit trail, in one transaction."""
        before = self.kept

        def change(tables: Tables) -> None:
            save(tables, before, kept)
            if note:
                detail = {"version": note.version, "errors": [problem.as_json() for problem in note.problems]}
                tables.add_audit(note.by, f"config.{note.state}", detail)

        await self._store.write(change)
        self.kept = kept
        self._on_change()


def load(tables: Tables) -> Kept:
    """What is kept; a record that can't be read counts as absent and is logged."""
    return Kept(
        good=_read(tables, GOOD, layers.from_json) or InForce(),
        previous=_read(tables, PREVIOUS, layers.from_json) or InForce(),
        trial=_read(tables, TRIAL, trials.from_json),
        refused=_read(tables, REFUSED, _refused),
        outcome=_read(tables, OUTCOME, _outcome),
        originals=_read(tables, ORIGINALS, dict) or {},
    )


async def offer_stored(store: Store, deliveries: Deliveries, targets: Iterable[str]) -> None:
    """Tell programs that ask what was proven last."""
    documents = (await store.read(load)).good.desired.targets
    for name in targets:
        deliveries.offer(name, documents.get(name), "applied")


def save(tables: Tables, old: Kept, new: Kept) -> None:
    """Write what differs, as part of the caller's transaction."""
    rows = (
        (GOOD, old.good, new.good),
        (PREVIOUS, old.previous, new.previous),
        (TRIAL, old.trial, new.trial),
        (REFUSED, old.refused, new.refused),
        (OUTCOME, old.outcome, new.outcome),
    )
    for key, before, after in rows:
        if after is None:
            tables.delete_fact(key)
        elif after != before:
            tables.set_fact(key, asdict(after))
    tables.set_fact(ORIGINALS, new.originals)


def usable(kept: Kept, site: Mapping[str, Any], remote: Marks) -> tuple[Kept, Settings | None, list[Problem]]:
    """What of `kept` goes with agent.toml, the settings that come of it, and what does not go with it.

    That is the last known good configuration, else the agent's keys of the one before, else those of agent.toml alone.
    """
    found: list[Problem] = []
    for in_force in (kept.good, kept.previous, InForce()):
        candidate, problems = wishes.validate(site, {"agent": in_force.desired.agent}, remote)
        found = found or problems
        if candidate:
            break
    if found:
        refused = Refused(kept.good.digest, kept.good.version, "rejected", tuple(found))
        kept = replace(kept, good=kept.good.with_agent_of(in_force), refused=refused)
    return kept, candidate.settings if candidate else None, found


def without_stale_originals(kept: Kept) -> Kept:
    """`kept` without the original files of targets that the configuration in force leaves alone."""
    targets = kept.good.desired.targets
    return replace(kept, originals={n: content for n, content in kept.originals.items() if n in targets})


def encode(content: bytes | None) -> str | None:
    """A file's content as kept in the store; None for a file that is not there."""
    return None if content is None else base64.b64encode(content).decode()


def decode(text: str | None) -> bytes | None:
    """What `encode` was given."""
    return None if text is None else base64.b64decode(text)


def _read(tables: Tables, key: str, form: Callable[[dict[str, Any]], T]) -> T | None:
    try:
        record = tables.fact(key)
        return form(record) if record is not None else None
    except (TypeError, KeyError, ValueError, AttributeError):
        log.exception("a kept record can't be read and is ignored", record=key)
        return None


def _refused(record: Mapping[str, Any]) -> Refused:
    return Refused(**{**record, "problems": tuple(Problem(**problem) for problem in record["problems"])})


def _outcome(record: Mapping[str, Any]) -> Outcome:
    return Outcome(**{**record, "problems": tuple(Problem(**problem) for problem in record["problems"])})
