"""What a job execution goes through, as a function of what is known and what happened. Pure: no clock, no I/O.

    (offered) ─▶ RECEIVED ── cloud took IN_PROGRESS ─▶ RUNNING ── operation ended ─▶ ENDED ── cloud took it ─▶ CLOSED
                     │                                    │                            ▲
                     └── document refused ────────────────┼────────────────────────────┘
                     └── gone from the cloud ─▶ CLOSED ◀──┘ cancelled: stop first

Rules: a record is in the journal before its effect is carried out. The terminal status is decided once and never
changes. An execution that the journal does not know but the cloud has IN_PROGRESS was interrupted, and ends FAILED.
What the cloud has ended otherwise (cancelled, timed out, removed) is never reported over; it is kept as `superseded`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import Any

TERMINAL = frozenset({"SUCCEEDED", "FAILED", "REJECTED", "TIMED_OUT", "CANCELED", "REMOVED"})
MAX_STARTS = 8
MAX_STARTS_LASTING = 64
"""Of an operation that lasts, as one that waits for its window does, and limits its own attempts."""
HARD_FACTOR = 8
"""Beyond so many times that number even an operation that has begun something is given up: better a wrong end than a loop without one."""


class Phase(StrEnum):
    """How far an execution has come."""

    RECEIVED = "received"
    RUNNING = "running"
    ENDED = "ended"
    CLOSED = "closed"


class Effect(StrEnum):
    """What the engine does next, after the record is in the journal."""

    ANNOUNCE = "announce"
    """Tell the cloud IN_PROGRESS, with the expected version."""
    RUN = "run"
    """Start or resume the operation."""
    STOP = "stop"
    """Ask the running operation to stop where it safely can."""
    REPORT = "report"
    """Send the terminal status."""
    DESCRIBE = "describe"
    """Ask the cloud what it has."""
    NOTHING = "nothing"


@dataclass(frozen=True)
class Record:
    """One job execution as the journal keeps it; times are epoch seconds, `status` is the terminal one once decided."""

    job_id: str
    execution_number: int
    version_number: int
    phase: Phase
    operation: str
    document: dict[str, Any]
    received_at: float
    queued_at: float | None = None
    progress: dict[str, Any] = field(default_factory=dict)
    message: str = ""
    starts: int = 0
    status: str | None = None
    details: dict[str, str] = field(default_factory=dict)
    ended_at: float | None = None
    stop_requested: bool = False
    """Somebody at the camera asked for its end."""
    cancelled: str | None = None
    """How the cloud ended it while it ran."""
    superseded: str | None = None
    """How the cloud ended it, where that is not what happened here."""

    @property
    def key(self) -> tuple[str, int]:
        return (self.job_id, self.execution_number)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        """The record in journal data; what a later version added is left out.

        Raises TypeError, ValueError or KeyError when it is not one.
        """
        known = {key: data[key] for key in cls.__dataclass_fields__ if key in data}
        record = cls(**{**known, "phase": Phase(data["phase"])})
        shapes = {
            str: (record.job_id, record.operation, record.message),
            int: (record.execution_number, record.version_number, record.starts),
            dict: (record.document, record.progress, record.details),
        }
        if not all(isinstance(value, kind) for kind, values in shapes.items() for value in values):
            raise TypeError("a value has another type than it was written with")
        return record


@dataclass(frozen=True)
class Took:
    """The cloud accepted an update; the execution now has this version."""

    version: int


@dataclass(frozen=True)
class Seen:
    """The cloud says what the execution is: in answer to a describe, or with a refusal."""

    status: str
    version: int


@dataclass(frozen=True)
class Unclear:
    """The cloud refused because of a state that it did not tell."""


@dataclass(frozen=True)
class Gone:
    """The cloud does not have the execution any more, or has ended it without saying how."""


@dataclass(frozen=True)
class Done:
    """The operation ended, at `at`, with this terminal status and its details."""

    status: str
    details: dict[str, str]
    at: float


@dataclass(frozen=True)
class Restarted:
    """The agent started and found the record in the journal, at `at`; `lasting` operations may see many starts."""

    at: float
    lasting: bool = False


Event = Took | Seen | Unclear | Gone | Done | Restarted


def advance(record: Record, event: Event) -> tuple[Record, Effect]:
    """The record after `event`, and what to do next. Events that mean nothing in a phase change nothing."""
    match record.phase:
        case Phase.RECEIVED:
            return _received(record, event)
        case Phase.RUNNING:
            return _running(record, event)
        case Phase.ENDED:
            return _ended(record, event)
        case Phase.CLOSED:
            return _closed(record, event)


def ended(record: Record, status: str, details: dict[str, str], at: float) -> Record:
    """The record with its terminal status decided."""
    return replace(record, phase=Phase.ENDED, status=status, details=details, ended_at=at, message="")


def _received(record: Record, event: Event) -> tuple[Record, Effect]:
    match event:
        case Took(version):
            return replace(record, phase=Phase.RUNNING, version_number=version, starts=1), Effect.RUN
        case Seen(status, _) if status in TERMINAL:
            return _close(record, status), Effect.NOTHING
        case Seen(_, version):
            return replace(record, version_number=version), Effect.ANNOUNCE
        case Gone():
            return _close(record, "REMOVED"), Effect.NOTHING
        case Unclear():
            return record, Effect.DESCRIBE
        case Restarted():
            return record, Effect.DESCRIBE
        case Done(status, details, at):
            return ended(record, status, details, at), Effect.REPORT


def _running(record: Record, event: Event) -> tuple[Record, Effect]:
    match event:
        case Took(version):
            return replace(record, version_number=version), Effect.NOTHING
        case Seen(status, _) if status in TERMINAL:
            return replace(record, cancelled=status), Effect.STOP
        case Seen("IN_PROGRESS", version):
            return replace(record, version_number=version), Effect.NOTHING
        case Seen() | Gone():  # QUEUED: ours is gone, and somebody made another one of its name
            return replace(record, cancelled="REMOVED"), Effect.STOP
        case Unclear():
            return record, Effect.DESCRIBE
        case Restarted(at, lasting):
            most = MAX_STARTS_LASTING if lasting else MAX_STARTS
            if most <= record.starts < HARD_FACTOR * most and record.progress:
                # What it has begun is the operation's to take back: it is asked to stop where it safely can.
                return replace(record, starts=record.starts + 1, stop_requested=True), Effect.RUN
            if record.starts >= most:
                message = f"the agent was restarted {record.starts} times during this job"
                details = {"reason_code": "restarted_too_often", "message": message}
                return ended(record, "FAILED", details, at), Effect.REPORT
            return replace(record, starts=record.starts + 1), Effect.RUN
        case Done(status, details, at):
            finished = ended(record, status, details, at)
            if record.cancelled:
                return _close(finished, record.cancelled), Effect.NOTHING
            return finished, Effect.REPORT


def _ended(record: Record, event: Event) -> tuple[Record, Effect]:
    match event:
        case Took(version):
            return replace(record, phase=Phase.CLOSED, version_number=version), Effect.NOTHING
        case Seen(status, version) if status == record.status:
            return replace(record, phase=Phase.CLOSED, version_number=version), Effect.NOTHING
        case Seen(status, _) if status in TERMINAL:
            return _close(record, status), Effect.NOTHING
        case Seen("QUEUED", _) if record.starts:  # somebody made another one of its name
            return _close(record, "REMOVED"), Effect.NOTHING
        case Seen(_, version):
            return replace(record, version_number=version), Effect.REPORT
        case Gone():
            return _close(record, "REMOVED"), Effect.NOTHING
        case Unclear():
            return record, Effect.DESCRIBE
        case Restarted():
            return record, Effect.REPORT
        case Done():
            return record, Effect.NOTHING


def _closed(record: Record, event: Event) -> tuple[Record, Effect]:
    """The cloud may offer again what it was told: then its copy of the answer was lost, and is sent once more."""
    match event:
        case Seen(status, version) if status not in TERMINAL and record.status:
            reopened = replace(record, phase=Phase.ENDED, version_number=version, superseded=None, cancelled=None)
            return reopened, Effect.REPORT
        case _:
            return record, Effect.NOTHING


def _close(record: Record, status: str) -> Record:
    return replace(record, phase=Phase.CLOSED, superseded=None if status == record.status else status)
