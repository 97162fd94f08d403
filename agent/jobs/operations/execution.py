"""What `run`, `restart` and `reboot` share: the execution as they see it, and waiting until nothing else changes the camera."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from agent.errors import FailedError


class Job(Protocol):
    """What an operation needs of an execution."""

    @property
    def id(self) -> str: ...
    @property
    def execution_number(self) -> int: ...
    @property
    def document(self) -> Mapping[str, Any]: ...
    @property
    def progress(self) -> dict[str, Any]: ...
    @property
    def cancelled(self) -> asyncio.Event: ...
    async def save(self, progress: dict[str, Any], message: str) -> None: ...


@contextlib.asynccontextmanager
async def alone(job: Job, mutation_lock: asyncio.Lock, *, timeout_s: float | None = None) -> AsyncIterator[None]:
    """Hold the lock that updates and configurations on trial hold.

    Raises FailedError `cancelled` when the job is cancelled while it waits, `deadline` when `timeout_s` are over.
    """
    locking = asyncio.create_task(mutation_lock.acquire())
    cancelled = asyncio.create_task(job.cancelled.wait())
    try:
        await asyncio.wait({locking, cancelled}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if job.cancelled.is_set():
            raise FailedError("cancelled", "the job was cancelled while it waited for another change to end")
        if not locking.done():
            raise FailedError("deadline", "the job's time limit is over; it waited for another change to end")
        yield
    finally:  # nothing is awaited here: a second cancellation must not keep the lock from being given back
        cancelled.cancel()
        locking.cancel()
        if locking.done() and not locking.cancelled():
            mutation_lock.release()
