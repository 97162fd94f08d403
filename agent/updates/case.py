"""One update as everything in `updates` sees it: the job that asks, the target, its installer, and the record that is saved."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from agent.errors import StoreError
from agent.settings import UpdateTarget
from agent.store import Store
from agent.updates.fetch import Limits
from agent.updates.gate import Gate
from agent.updates.installers import Installer
from agent.updates.manifest import parse_envelope, parse_manifest
from agent.updates.preflight import envelope_of
from agent.updates.restarts import Restarter
from agent.updates.states import State

SAVE_TRIES = 13
SAVE_AGAIN_S = 5.0


class Job(Protocol):
    """The job execution that asked for the update."""

    id: str
    document: Mapping[str, Any]
    progress: dict[str, Any]
    cancelled: asyncio.Event

    async def save(self, progress: dict[str, Any], message: str, *, facts: Mapping[str, Any] | None = None) -> None: ...
    async def fresh_document(self) -> Mapping[str, Any]: ...


class Hold(Protocol):
    """Something an update waits for, in words, and when to look again."""

    @property
    def words(self) -> str: ...
    @property
    def look_again_s(self) -> float: ...


class Holds(Protocol):
    """What an update waits for besides other changes: the window, its jitter, locks, power."""

    changed: asyncio.Event
    """Set when it is worth to look again at once."""

    async def hold(self, before: Literal["download", "switch"], job_id: str) -> Hold | None:
        """What has to be waited for before that; None: nothing."""


@dataclass(frozen=True)
class Surroundings:
    """What all updates of a camera share."""

    keys_dir: Path
    downloads_dir: Path
    store: Store
    gate: Gate
    restarter: Restarter
    mutation_lock: asyncio.Lock
    holds: Holds | None
    agent_version: str
    compatible: frozenset[str]
    patience_s: float
    offline_patience_s: float
    limits: Limits
    settle_s: float
    settle_deadline_s: float


@dataclass
class Case:
    """One update of one target. `progress` is the record that is saved; `facts` go with the next save."""

    job: Job
    name: str
    target: UpdateTarget
    installer: Installer
    around: Surroundings
    on_state: Callable[[State, str], None] = lambda *_: None
    progress: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    percent: int | None = None
    """How much is downloaded."""
    switching: bool = False
    """Whether the decision to switch has been made."""

    def __post_init__(self) -> None:
        self.envelope = envelope_of(self.job.document)
        self.manifest = parse_manifest(parse_envelope(self.envelope).payload)

    async def save(self, message: str) -> None:
        """Make the record durable, with `facts` in the same transaction; a full disk is waited for, a while. Raises StoreError."""
        facts, self.facts = self.facts, {}
        for left in reversed(range(SAVE_TRIES)):
            try:
                await self.job.save(copy.deepcopy(self.progress), message, facts=facts)
            except StoreError as error:
                if error.code != "store_full" or not left:
                    raise
                self.on_state(self.state, f"the disk is full, what happens next can't be recorded: {error.message}")
                await asyncio.sleep(SAVE_AGAIN_S)
            else:
                return

    def reason(self, code: str, message: str, hint: str = "") -> None:
        """Why the update does not stay."""
        self.progress["reason"] = {"code": code, "message": message, "hint": hint}

    @property
    def state(self) -> State:
        """The state that was saved last."""
        return State(self.progress["state"])

    def rollback_failed(self, why: str) -> None:
        """Going back failed too; why it was gone back from stays in the words."""
        first = self.progress.get("reason", {}).get("message", "the update failed")
        self.reason(
            "rollback_failed", f"{first}; going back failed too: {why}", "look at the camera; a new update can mend it"
        )
