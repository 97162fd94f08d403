"""Telling the cloud how a job stands, and asking it: every answer becomes an event of the machine, no answer is tried again."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Mapping
from dataclasses import replace

from agent.cloud.jobs import Execution, JobsClient
from agent.errors import CloudError
from agent.jobs import machine
from agent.jobs.machine import Event, Record
from agent.logs import get_logger

RETRY_S = (2.0, 300.0)
STEP_TIMEOUT_MINUTES = 240
NO_VERSION = 2**31 - 1
MALFORMED = ("InvalidRequest", "InvalidJson", "InvalidTopic")
log = get_logger("jobs")


class Conversation:
    """About executions, with one thing's Jobs service. `wake` ends the present pause between two tries."""

    def __init__(self, jobs: JobsClient) -> None:
        self._jobs = jobs
        self.wake = asyncio.Event()

    async def next(self) -> Execution | None:
        """The pending execution; None when there is none, or when off-line: the next connect wakes us."""
        delay = RETRY_S[0]
        while True:
            self.wake.clear()
            try:
                return await self._jobs.describe_next()
            except CloudError as error:
                if error.code in ("offline", "connection_lost", "connection_ended"):
                    return None
                level = log.debug if error.retryable else log.error
                level("could not ask for the next job", code=error.code, reason=error.message, hint=error.hint)
            delay = await self.pause(delay)

    async def document(self, job_id: str, execution_number: int) -> Mapping[str, object] | None:
        """The job's document made anew. Raises CloudError."""
        return (await self._jobs.describe(job_id, execution_number)).document

    async def announce(self, record: Record, details: dict[str, str]) -> Event:
        """Send IN_PROGRESS until the cloud has answered definitely; looks each time whether it is still the same job."""
        delay = RETRY_S[0]
        while True:
            self.wake.clear()
            answer = await self.try_once(record, "IN_PROGRESS", details)
            if not isinstance(answer, CloudError):
                return answer
            delay = await self.pause(delay)
            seen = await self.ask(record)
            if not isinstance(seen, machine.Seen) or seen.version != record.version_number or seen.status != "QUEUED":
                return seen

    async def tell(self, record: Record, status: str, details: dict[str, str]) -> Event:
        """Send a status until the cloud has answered definitely."""
        delay, malformed = RETRY_S[0], 0
        while True:
            self.wake.clear()
            answer = await self.try_once(record, status, details)
            if not isinstance(answer, CloudError):
                return answer
            if answer.code in MALFORMED:
                malformed += 1
                if malformed == 2:
                    details = {"reason_code": details["reason_code"]}
                if malformed > 2:
                    log.error("the cloud does not take this job's end, giving up", job_id=record.job_id)
                    return machine.Gone()
            delay = await self.pause(delay)

    async def pause(self, delay: float) -> float:
        """Wait with jitter; the next delay. When something wakes us, now or since that was cleared, not so long."""
        least = random.uniform(0.5, 1) * RETRY_S[0]  # noqa: S311  jitter; however often we are woken
        await asyncio.sleep(least)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(random.uniform(0.5, 1) * delay - least):  # noqa: S311
                await self.wake.wait()
                return delay
        return min(delay * 2, RETRY_S[1])

    async def try_once(self, record: Record, status: str, details: dict[str, str]) -> Event | CloudError:
        """One update; what the cloud answered, or why there was no definite answer."""
        try:
            version = await self._jobs.update(
                record.job_id,
                execution_number=record.execution_number,
                status=status,
                details=details,
                expected_version=record.version_number,
                step_timeout_minutes=STEP_TIMEOUT_MINUTES if status == "IN_PROGRESS" else None,
            )
        except CloudError as error:
            return _answer(error) or error
        return machine.Took(version)

    async def ask(self, record: Record) -> Event:
        """What the cloud has of the execution; asks until there is an answer."""
        delay = RETRY_S[0]
        while True:
            self.wake.clear()
            try:
                execution = await self._jobs.describe(record.job_id, record.execution_number)
            except CloudError as error:
                if error.code == "TerminalStateReached":
                    return await self._how_it_ended(record)
                event = _answer(error)
                if event is not None and not isinstance(event, machine.Unclear):
                    return event
            else:
                if None not in (record.queued_at, execution.queued_at) and record.queued_at != execution.queued_at:
                    return machine.Gone()  # it was deleted, and this is another one of its name
                return machine.Seen(execution.status, execution.version_number)
            delay = await self.pause(delay)

    async def _how_it_ended(self, record: Record) -> Event:
        """The status of an execution that has ended, which a describe does not tell and the refusal of an update does.

        The version that the update asks for is none that any execution can have, so it changes nothing.
        """
        never = replace(record, version_number=NO_VERSION)
        answer = await self.try_once(never, "IN_PROGRESS", {"reason_code": "in_progress"})
        return answer if isinstance(answer, machine.Seen) else machine.Gone()


def _answer(error: CloudError) -> Event | None:
    """What a refused request says about the execution; None when it says nothing definite."""
    state = getattr(error, "details", {}).get("executionState") or {}
    if isinstance(state, Mapping) and isinstance(state.get("status"), str):
        version = state.get("versionNumber")
        return machine.Seen(state["status"], version if isinstance(version, int) else 0)
    if error.code in ("ResourceNotFound", "TerminalStateReached"):
        return machine.Gone()
    if error.code in ("InvalidStateTransition", "VersionMismatch"):
        return machine.Unclear()
    if not error.retryable:
        log.error("the cloud refuses a job update", code=error.code, reason=error.message)
    return None
