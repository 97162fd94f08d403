"""Operation `restart`: the agent itself, or the program of an update target."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from agent.errors import FailedError, RefusedError


class Job(Protocol):
    """What this operation needs of an execution."""

    @property
    def document(self) -> Mapping[str, Any]: ...
    @property
    def progress(self) -> dict[str, Any]: ...
    @property
    def cancelled(self) -> asyncio.Event: ...
    async def save(self, progress: dict[str, Any], message: str) -> None: ...


class Restart:
    """`instance` names this run of the agent: a different one after the restart is the proof that it happened.

    A target is not restarted while an update or a configuration is on trial (`mutation_lock`): the gap in its images
    would be laid at their door.
    """

    name = "restart"

    def __init__(
        self,
        *,
        instance: str,
        restart_agent: Callable[[], None],
        targets: Mapping[str, Callable[[], Awaitable[None]]],
        mutation_lock: asyncio.Lock,
    ) -> None:
        self._instance = instance
        self._restart_agent = restart_agent
        self._targets = targets
        self._mutation_lock = mutation_lock

    def check(self, document: Mapping[str, Any]) -> None:
        target = document["target"]
        if target != "agent" and target not in self._targets:
            known = ", ".join(["agent", *self._targets])
            raise RefusedError("unknown_target", f"target: {target!r} can't be restarted here", f"use one of {known}")

    async def run(self, job: Job) -> dict[str, str]:
        target = job.document["target"]
        if target != "agent":
            await self._lock(job)
            try:
                await self._targets[target]()
            finally:
                self._mutation_lock.release()
            return {"message": f"{target} was restarted"}
        before = job.progress.get("instance")
        if before is None or before == self._instance:
            await job.save({"instance": self._instance}, "restarting the agent")
            self._restart_agent()
            await asyncio.Event().wait()  # ends with this process
        return {"message": "the agent was restarted"}

    async def _lock(self, job: Job) -> None:
        """Wait for the end of another change. Raises FailedError when the job is cancelled meanwhile."""
        locking = asyncio.create_task(self._mutation_lock.acquire())
        cancelled = asyncio.create_task(job.cancelled.wait())
        try:
            await asyncio.wait({locking, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            cancelled.cancel()
            if not locking.done():
                locking.cancel()
            await asyncio.gather(locking, cancelled, return_exceptions=True)
        if locking.cancelled() or job.cancelled.is_set():
            if not locking.cancelled():
                self._mutation_lock.release()
            raise FailedError("cancelled", "the job was cancelled while it waited for another change to end")
