"""Drives one job execution at a time through the machine: journal first, then the effect, until the cloud has the end.

An operation is a plain object (see `Operation`); what it returns or raises decides the terminal status.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from agent.cloud.jobs import Execution, JobsClient
from agent.errors import AgentError, CloudError, FailedError, RefusedError, StoreError
from agent.jobs import machine
from agent.jobs.document import parse
from agent.jobs.machine import Effect, Event, Phase, Record
from agent.logs import get_logger
from agent.store import Store, Tables

HEARTBEAT_S = 50.0
NEWS_INTERVAL_S = 2.0
POLL_S = 600.0
STEP_TIMEOUT_MINUTES = 240
RETRY_S = (2.0, 300.0)
STORE_RETRY_S = 10.0
KEPT_EXECUTIONS = 50
log = get_logger("jobs")


class Job:
    """The execution as its operation sees it.

    `document` is validated; `progress` is what `save` kept before a restart, {} at first; `cancelled` is set when the
    job should stop where it safely can (then raise FailedError("cancelled", …)).
    """

    def __init__(self, engine: Engine, record: Record) -> None:
        self._engine = engine
        self.id = record.job_id
        self.execution_number = record.execution_number
        self.document: Mapping[str, Any] = record.document
        self.progress = record.progress
        self.cancelled = asyncio.Event()
        if record.cancelled:
            self.cancelled.set()

    async def save(self, progress: dict[str, Any], message: str, *, facts: Mapping[str, Any] | None = None) -> None:
        """Keep `progress`, and `facts` in the same transaction; durable on return. The cloud is told in the background."""
        await self._engine.keep_progress(progress, message, facts or {})
        self.progress = progress

    async def fresh_document(self) -> Mapping[str, Any]:
        """The document asked for anew, with newly signed URLs. Raises CloudError or RefusedError."""
        return await self._engine.fresh_document(self.id, self.execution_number)


class Operation(Protocol):
    """What a job can ask for."""

    @property
    def name(self) -> str:
        """The `operation` of its documents."""

    def check(self, document: Mapping[str, Any]) -> None:
        """Refuse, before anything is touched, what can't be done here. Called in a thread. Raises RefusedError."""

    async def run(self, job: Job) -> dict[str, str]:
        """Do it, or go on with it after a restart; the status details of SUCCEEDED.

        Raises RefusedError (nothing was touched: REJECTED) or FailedError (FAILED).
        """


class Engine:
    """The one runner of jobs on this camera."""

    def __init__(
        self, *, store: Store, jobs: JobsClient, operations: Mapping[str, Operation], allow: list[str]
    ) -> None:
        self._store = store
        self._jobs = jobs
        self._operations = operations
        self._allow = frozenset(allow)
        self._wake = asyncio.Event()
        self._news = asyncio.Event()
        self._current: Record | None = None
        self._job: Job | None = None
        self._last_offer: tuple[str, int] | None = None

    @property
    def current(self) -> Record | None:
        """The execution that is being worked on."""
        return self._current

    def wake(self) -> None:
        """Ask the cloud for the next job soon: after a connect, and on a notification."""
        self._wake.set()

    async def run(self) -> None:
        """Finish what the journal holds, then take jobs as they come; never returns."""
        for data in await self._store.read(lambda t: t.jobs(finished=False)):
            try:
                record = Record.from_json(data)
            except (TypeError, ValueError, KeyError):
                log.exception("a journal record can't be read and is not used", record=str(data)[:200])
                continue
            log.info("going on with a job after a restart", job_id=record.job_id, phase=record.phase)
            await self._step(record, machine.Restarted(time.time()))
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()
            self._wake.clear()
            while await self._take_next():
                pass

    def cancel(self, job_id: str) -> bool:
        """Ask the running job to stop where it safely can; False when it isn't the running one."""
        if self._job is None or self._job.id != job_id:
            return False
        self._job.cancelled.set()
        return True

    async def keep_progress(self, progress: dict[str, Any], message: str, facts: Mapping[str, Any]) -> None:
        """Journal an operation's own state together with `facts`."""
        assert self._current is not None
        record = replace(self._current, progress=progress, message=message)

        def change(tables: Tables) -> None:
            _put(tables, record)
            for key, value in facts.items():
                tables.set_fact(key, value)

        await self._store.write(change)
        self._current = record
        self._news.set()
        log.info(message, job_id=record.job_id)

    async def fresh_document(self, job_id: str, execution_number: int) -> Mapping[str, Any]:
        """See `Job.fresh_document`."""
        execution = await self._jobs.describe(job_id, execution_number)
        return parse(execution.document)[1]

    async def _take_next(self) -> bool:
        """Ask for the pending job and work on it; whether there may be another."""
        try:
            execution = await self._jobs.describe_next()
        except CloudError as error:
            log.debug("could not ask for the next job", code=error.code)
            if error.retryable:
                return False  # the next connect wakes us
            log.error("asking for jobs is refused", code=error.code, reason=error.message, hint=error.hint)
            return False
        if execution is None:
            return False
        return await self._offer(execution)

    async def _offer(self, execution: Execution) -> bool:
        known = await self._known(execution)
        if known is not None:
            if self._last_offer == known.key:
                await asyncio.sleep(RETRY_S[0])  # the cloud has not taken in yet what it was told
            self._last_offer = known.key
            await self._step(known, machine.Seen(execution.status, execution.version_number))
            return True
        record = Record(
            job_id=execution.job_id,
            execution_number=execution.execution_number,
            version_number=execution.version_number,
            phase=Phase.RECEIVED,
            operation="",
            document={},
            received_at=time.time(),
        )
        log.info("job received", job_id=record.job_id, execution=record.execution_number, status=execution.status)
        if execution.status == "IN_PROGRESS":
            await self._step(record, _interrupted())
            return True
        try:
            operation, document = parse(execution.document)
            record = replace(record, operation=operation, document=document)
            if operation not in self._allow or operation not in self._operations:
                raise RefusedError(
                    "not_allowed",
                    f"operation {operation} is not allowed on this camera",
                    "allow it in agent.toml: jobs.allow",
                )
            await asyncio.to_thread(self._operations[operation].check, document)
        except RefusedError as error:
            await self._step(record, machine.Done("REJECTED", _reason(error), time.time()))
            return True
        await self._follow(record, Effect.ANNOUNCE)
        return True

    async def _known(self, execution: Execution) -> Record | None:
        """The journal's record; none of one that ended before it was begun, so that it is taken anew."""
        data = await self._store.read(lambda t: t.job(execution.job_id, execution.execution_number))
        if data is None:
            return None
        try:
            record = Record.from_json(data)
        except (TypeError, ValueError, KeyError):
            log.exception("a journal record can't be read and is not used", job_id=execution.job_id)
            return None
        return None if record.phase is Phase.CLOSED and record.status is None else record

    async def _step(self, record: Record, event: Event) -> None:
        await self._follow(*machine.advance(record, event))

    async def _follow(self, record: Record, effect: Effect) -> None:
        """Journal the record, carry out the effect, and so on until nothing is left to do."""
        try:
            while True:
                await self._keep(record)
                if effect is Effect.NOTHING:
                    break
                event = await self._perform(record, effect)
                assert self._current is not None
                record, effect = machine.advance(self._current, event)
            if record.phase is Phase.CLOSED:
                log.info(
                    "job ended",
                    job_id=record.job_id,
                    status=record.status,
                    superseded=record.superseded,
                    **record.details,
                )
        finally:
            self._current = None

    async def _keep(self, record: Record) -> None:
        def change(tables: Tables) -> None:
            _put(tables, record)
            tables.prune_jobs(KEPT_EXECUTIONS)

        while True:
            try:
                await self._store.write(change)
                break
            except StoreError as error:  # nothing may go on without its record, and nothing is lost by waiting
                log.error("the journal can't be written, the job waits", job_id=record.job_id, reason=error.message)
                await asyncio.sleep(STORE_RETRY_S)
        self._current = record

    async def _perform(self, record: Record, effect: Effect) -> Event:
        match effect:
            case Effect.ANNOUNCE:
                details = {"reason_code": "in_progress", "message": "accepted"}
                return await self._until_answered(record, "IN_PROGRESS", details)
            case Effect.REPORT:
                assert record.status is not None
                return await self._until_answered(record, record.status, record.details)
            case Effect.DESCRIBE:
                return await self._describe(record)
            case Effect.RUN:
                return await self._run(record)
            case _:
                raise AssertionError(effect)

    async def _until_answered(self, record: Record, status: str, details: dict[str, str]) -> Event:
        delay = RETRY_S[0]
        while True:
            event = await self._send(record, status, details)
            if event is not None:
                return event
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(random.uniform(0.5, 1) * delay):  # noqa: S311  jitter
                    await self._wake.wait()
            delay = min(delay * 2, RETRY_S[1])

    async def _send(self, record: Record, status: str, details: dict[str, str]) -> Event | None:
        """One update; what the cloud answered, None when there was no definite answer."""
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
            return _answer(error)
        return machine.Took(version)

    async def _describe(self, record: Record) -> Event:
        delay = RETRY_S[0]
        while True:
            try:
                execution = await self._jobs.describe(record.job_id, record.execution_number)
            except CloudError as error:
                event = _answer(error)
                if event is not None and not isinstance(event, machine.Unclear):
                    return event
            else:
                return machine.Seen(execution.status, execution.version_number)
            await asyncio.sleep(random.uniform(0.5, 1) * delay)  # noqa: S311  jitter
            delay = min(delay * 2, RETRY_S[1])

    async def _run(self, record: Record) -> machine.Done:
        operation = self._operations.get(record.operation)
        if operation is None:
            return _done("FAILED", FailedError("not_allowed", f"operation {record.operation} is not known any more"))
        self._job = job = Job(self, record)
        reporter = asyncio.create_task(self._report_progress(), name=f"job {record.job_id} progress")
        try:
            details = await operation.run(job)
        except RefusedError as error:
            return _done("REJECTED", error)
        except FailedError as error:
            return _done("FAILED", error)
        except AgentError as error:
            log.warning("job failed", job_id=record.job_id, code=error.code, reason=error.message)
            return _done("FAILED", error)
        except Exception as error:
            log.exception("operation broke", job_id=record.job_id, operation=record.operation)
            return _done("FAILED", FailedError("internal_error", f"{type(error).__name__}: {error}"))
        else:
            return machine.Done("SUCCEEDED", {"reason_code": "ok", **details}, time.time())
        finally:
            self._job = None
            reporter.cancel()
            await asyncio.wait({reporter})

    async def _report_progress(self) -> None:
        """While the operation runs: tell the cloud what it does, and notice when the cloud has cancelled it."""
        started = time.monotonic()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._news.wait()
            self._news.clear()
            record = self._current
            assert record is not None
            if record.cancelled:
                return
            details = {
                "reason_code": "in_progress",
                "message": record.message or "running",
                "elapsed_s": str(round(time.monotonic() - started)),
            }
            event = await self._send(record, "IN_PROGRESS", details)
            if event is not None:
                await self._absorb(event)
            await asyncio.sleep(NEWS_INTERVAL_S)

    async def _absorb(self, event: Event) -> None:
        """Take an answer into the running record; stop the operation when the cloud has ended the job."""
        assert self._current is not None
        record, effect = machine.advance(self._current, event)
        if effect is Effect.STOP:
            log.warning("the cloud has ended this job, stopping it", job_id=record.job_id, status=record.cancelled)
            await self._keep(record)
            if self._job:
                self._job.cancelled.set()
        else:
            self._current = record


def _put(tables: Tables, record: Record) -> None:
    finished = record.phase is Phase.CLOSED
    tables.put_job(record.job_id, record.execution_number, record.to_json(), finished=finished)


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


def _reason(error: AgentError) -> dict[str, str]:
    message = f"{error.message}; {error.hint}" if error.hint else error.message
    return {"reason_code": error.code, "message": message}


def _done(status: str, error: AgentError) -> machine.Done:
    details = _reason(error) | getattr(error, "details", {})
    return machine.Done(status, details, time.time())


def _interrupted() -> machine.Done:
    message = "this job was under way, but the camera has no record of it (its state was lost or replaced)"
    return machine.Done("FAILED", {"reason_code": "interrupted", "message": message}, time.time())
