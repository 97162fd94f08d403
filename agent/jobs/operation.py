"""What the engine asks of an operation, and the job that it hands to one; each operation is a file in operations/."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from agent.jobs.machine import Record


class Job:
    """The execution as its operation sees it.

    `document` is validated; `progress` is what `save` kept before a restart, {} at first; `cancelled` is set when the
    job should stop where it safely can (then raise FailedError("cancelled", …)).
    """

    def __init__(
        self,
        record: Record,
        keep: Callable[[dict[str, Any], str, Mapping[str, Any]], Awaitable[None]],
        fresh: Callable[[str, int], Awaitable[Mapping[str, Any]]],
    ) -> None:
        self._keep = keep
        self._fresh = fresh
        self.id = record.job_id
        self.execution_number = record.execution_number
        self.document: Mapping[str, Any] = record.document
        self.progress = record.progress
        self.cancelled = asyncio.Event()
        if record.cancelled or record.stop_requested:
            self.cancelled.set()

    async def save(self, progress: dict[str, Any], message: str, *, facts: Mapping[str, Any] | None = None) -> None:
        """Keep `progress`, and `facts` in the same transaction; durable on return. The cloud is told in the background."""
        await self._keep(progress, message, facts or {})
        self.progress = progress

    async def fresh_document(self) -> Mapping[str, Any]:
        """The document asked for anew, with newly signed URLs. Raises CloudError or RefusedError."""
        return await self._fresh(self.id, self.execution_number)


class Operation(Protocol):
    """What a job can ask for."""

    @property
    def name(self) -> str:
        """The `operation` of its documents."""

    def check(self, document: Mapping[str, Any]) -> None:
        """Refuse, before anything is touched, what can't be done here. Called in a thread. Raises RefusedError."""

    async def plan(self, document: Mapping[str, Any]) -> list[str]:
        """What run() would do with a document that check() took, step by step in words. Raises RefusedError."""

    async def run(self, job: Any) -> dict[str, str]:
        """Do it, or go on with it after a restart; the status details of SUCCEEDED.

        Raises RefusedError (nothing was touched: REJECTED) or FailedError (FAILED).
        """
