"""Stand-ins for what is outside the agent, with the semantics of the real thing."""

from __future__ import annotations

from typing import Any

from agent.cloud.jobs import Execution
from agent.cloud.session import Rejected
from agent.errors import CloudError

TERMINAL = ("SUCCEEDED", "FAILED", "REJECTED", "TIMED_OUT", "CANCELED", "REMOVED")


class JobsService:
    """AWS IoT Jobs for one thing, as a JobsClient answers: versions, transitions, lost requests and lost answers."""

    def __init__(self) -> None:
        self.executions: dict[tuple[str, int], dict[str, Any]] = {}
        self.requests = 0
        """Updates that arrived, refused ones too."""
        self.updates: list[tuple[str, str, dict[str, str]]] = []
        self.lose_request = 0
        """So many of the next requests do not arrive."""
        self._created = 0
        self.throttle = 0
        """So many of the next requests are answered with RequestThrottled."""
        self.refuse_updates: Rejected | None = None
        """What every update is refused with."""
        self.lose_answer = 0
        """So many of the next requests are carried out, but their answer does not arrive."""

    def create(self, job_id: str, document: Any, *, number: int = 1, status: str = "QUEUED") -> None:
        self._created += 1
        self.executions[(job_id, number)] = {
            "status": status,
            "version": 1,
            "document": document,
            "details": {},
            "queued_at": float(self._created),
        }

    def end(self, job_id: str, status: str, number: int = 1) -> None:
        """What an operator or a timer does: cancel, time out, remove."""
        if status == "REMOVED":
            del self.executions[(job_id, number)]
        else:
            entry = self.executions[(job_id, number)]
            entry["status"] = status
            entry["version"] += 1

    def status(self, job_id: str, number: int = 1) -> str:
        return self.executions[(job_id, number)]["status"]

    def details(self, job_id: str, number: int = 1) -> dict[str, str]:
        return self.executions[(job_id, number)]["details"]

    async def describe_next(self) -> Execution | None:
        self._arrive()
        pending = [(key, e) for key, e in self.executions.items() if e["status"] not in TERMINAL]
        pending.sort(key=lambda item: item[1]["status"] != "IN_PROGRESS")
        self._answer()
        return self._execution(*pending[0]) if pending else None

    async def describe(self, job_id: str, execution_number: int | None = None) -> Execution:
        self._arrive()
        entry = self._find(job_id, execution_number)
        if entry["status"] in TERMINAL:
            raise Rejected("TerminalStateReached", "finished", details={"code": "TerminalStateReached"})
        self._answer()
        return self._execution((job_id, execution_number or 1), entry)

    async def update(
        self,
        job_id: str,
        *,
        execution_number: int | None = None,
        status: str,
        details: dict[str, str],
        expected_version: int | None = None,
        step_timeout_minutes: int | None = None,
    ) -> int:
        self._arrive()
        entry = self._find(job_id, execution_number)
        self.requests += 1
        if self.refuse_updates:
            raise self.refuse_updates
        state = {"executionState": {"status": entry["status"], "versionNumber": entry["version"]}}
        if entry["status"] in TERMINAL:
            raise Rejected("InvalidStateTransition", "finished", details=state)
        if expected_version not in (None, entry["version"]):
            raise Rejected("VersionMismatch", "stale", details=state)
        entry.update(status=status, version=entry["version"] + 1, details=details)
        self.updates.append((job_id, status, details))
        self._answer()
        return entry["version"]

    def _find(self, job_id: str, number: int | None) -> dict[str, Any]:
        entry = self.executions.get((job_id, number or 1))
        if entry is None:
            raise Rejected("ResourceNotFound", "no such execution", details={"code": "ResourceNotFound"})
        return entry

    @staticmethod
    def _execution(key: tuple[str, int], entry: dict[str, Any]) -> Execution:
        return Execution(
            job_id=key[0],
            execution_number=key[1],
            version_number=entry["version"],
            status=entry["status"],
            document=entry["document"],
            details=entry["details"],
            queued_at=entry["queued_at"],
        )

    def _arrive(self) -> None:
        if self.lose_request:
            self.lose_request -= 1
            raise CloudError("offline", "not connected", retryable=True)
        if self.throttle:
            self.throttle -= 1
            raise Rejected("RequestThrottled", "slow down", retryable=True, details={})

    def _answer(self) -> None:
        if self.lose_answer:
            self.lose_answer -= 1
            raise CloudError("no_answer", "no answer within 20 s", retryable=True)
