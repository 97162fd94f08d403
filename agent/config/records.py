"""What is kept in state.db about the configuration: what is in force, what was before, what is on trial, what was refused."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

from agent.config import layers
from agent.config import trial as trials
from agent.config.deliveries import Deliveries
from agent.config.desired import Marks, Problem, few, pointer
from agent.config.fitting import Dormant, dormant, fit
from agent.config.layers import InForce
from agent.config.trial import Trial
from agent.logs import get_logger
from agent.store import Store, Tables

log = get_logger("config")
T = TypeVar("T")

GOOD, TRIAL, REFUSED, ORIGINALS, PLACED, OWED, OUTCOME = (
    f"config.{name}" for name in ("good", "trial", "refused", "originals", "placed", "owed", "outcome")
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
    """What became of a job's change: `job` names the execution, `digest` what it asked for."""

    job: str
    digest: str
    state: Literal["applied", "rejected", "reverted"]
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Place:
    """How a target was configured in agent.toml when its document was put there: `path` is empty for the local API."""

    path: str
    format: str


@dataclass(frozen=True)
class Kept:
    """Everything kept.

    `originals` holds each applied target's own file from before the fleet set it, in base64, and `placed` where it was put;
    `owed` is what could not be put back yet.
    """

    good: InForce = field(default_factory=InForce)
    trial: Trial | None = None
    refused: Refused | None = None
    outcome: Outcome | None = None
    originals: dict[str, str | None] = field(default_factory=dict)
    placed: dict[str, Place] = field(default_factory=dict)
    owed: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Note:
    """For the audit trail: what happened to a change, at which version of the shadow, by whom (`shadow`, or `job …`)."""

    state: Literal["applied", "rejected", "reverted"]
    version: int
    by: str = "shadow"
    problems: Sequence[Problem] = ()


class Keeper:
    """Holds `kept` and writes what changes; `on_change` is called after each write.

    `fitted` is what of the configuration in force goes with `site`, the parsed agent.toml, and `problems` why the rest
    does not; that stays kept, for when agent.toml is mended.
    """

    def __init__(self, store: Store, on_change: Callable[[], None], site: Mapping[str, Any], remote: Marks) -> None:
        self._store = store
        self._on_change = on_change
        self._site, self._remote = site, remote
        self.kept = Kept()
        self.fitted = InForce()
        self.problems: list[Problem] = []

    @property
    def out_of_place(self) -> frozenset[str]:
        """Targets whose documents are kept, but are not where agent.toml says now."""
        return frozenset(self.fitted.desired.targets) - frozenset(self.kept.placed)

    @property
    def in_place(self) -> InForce:
        """What is really in force."""
        return self.fitted.without_targets(self.out_of_place)

    @property
    def dormant(self) -> Dormant:
        """What is kept and does not go with agent.toml."""
        return dormant(self.kept.good, self.fitted)

    async def load(self) -> None:
        """Read what is kept."""
        self.kept = await self._store.read(load)
        await self._fit()

    async def _fit(self) -> None:
        self.fitted, self.problems = await asyncio.to_thread(fit, self.kept.good, self._site, self._remote)

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
        if kept.good != before.good:
            await self._fit()
        self._on_change()


def load(tables: Tables) -> Kept:
    """What is kept; a record that can't be read counts as absent and is logged."""
    return Kept(
        good=_read(tables, GOOD, layers.from_json) or InForce(),
        trial=_read(tables, TRIAL, trials.from_json) or trials.salvage(tables.fact(TRIAL)),
        refused=_read(tables, REFUSED, _refused),
        outcome=_read(tables, OUTCOME, _outcome),
        originals=_read(tables, ORIGINALS, dict) or {},
        placed=_read(tables, PLACED, _placed) or {},
        owed=_read(tables, OWED, dict) or {},
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
    tables.set_fact(PLACED, {name: asdict(place) for name, place in new.placed.items()})
    tables.set_fact(OWED, new.owed)


def without_stale_originals(kept: Kept) -> Kept:
    """`kept` without the original files and places of targets that the configuration in force leaves alone."""
    targets = kept.good.desired.targets
    return replace(
        kept,
        originals={name: content for name, content in kept.originals.items() if name in targets},
        placed={name: place for name, place in kept.placed.items() if name in targets},
    )


def owed_problem(name: str) -> Problem:
    """That a target has not got back what it had."""
    words = "what was there before could not be put back yet; it is tried again"
    return Problem(pointer("targets", name), words, "revert_failed")


def status(kept: Kept, dormant: Sequence[Problem]) -> dict[str, Any]:
    """How the configuration stands, for the shadow: `state`, `desired_version`, `errors`, and `job` where one's change is on trial.

    `dormant` says what of it does not go with agent.toml.
    """
    name, version, problems = "applied", kept.good.version, list(dormant)
    if kept.trial:
        name, version, problems = "trial", kept.trial.version, list(kept.trial.problems)
    elif kept.refused:
        name, version, problems = kept.refused.state, kept.refused.version, list(kept.refused.problems)
    said = {(problem.pointer, problem.code) for problem in problems}
    problems += [problem for problem in map(owed_problem, kept.owed) if (problem.pointer, problem.code) not in said]
    errors = [problem.as_json() for problem in few(problems)]
    state = {"state": name, "desired_version": version, "errors": errors}
    return state | ({"job": kept.trial.job} if kept.trial and kept.trial.job else {})


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


def _placed(record: Mapping[str, Any]) -> dict[str, Place]:
    return {name: Place(place["path"], place["format"]) for name, place in record.items()}


def _outcome(record: Mapping[str, Any]) -> Outcome:
    return Outcome(**{**record, "problems": tuple(Problem(**problem) for problem in record["problems"])})
