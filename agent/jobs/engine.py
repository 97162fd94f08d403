"""Drives one job execution at a time through the machine: journal first, then the effect, until the cloud has the end.

An operation is a plain object (see operation.py); what it returns or raises decides the terminal status.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from agent.cloud.jobs import Execution, JobsClient
from agent.errors import AgentError, CloudError, FailedError, RefusedError, StoreError
from agent.jobs import conditions, machine
from agent.jobs.conversation import RETRY_S, Conversation
from agent.jobs.document import parse
from agent.jobs.machine import Effect, Event, Phase, Record
from agent.jobs.operation import Job, Operation
from agent.jobs.plan import plan
from agent.logs import get_logger, redact
from agent.store import Store, Tables

HEARTBEAT_S = 50.0
NEWS_INTERVAL_S = 2.0
NOTICES_S = 0.2
POLL_S = 600.0
STORE_RETRY_S = 10.0
KEPT_EXECUTIONS = 50
BUGS = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)
"""What a mistake in somebody else's code raises; the database's own errors are none of these and undo the transaction."""
log = get_logger("jobs")


class Engine:
    """The one runner of jobs on this camera.

    `facts` are what conditions of documents may ask about. `on_ended` is called in the transaction in which an end is
    decided, once for each execution, with what it was.
    """

    def __init__(
        self,
        *,
        store: Store,
        jobs: JobsClient,
        operations: Mapping[str, Operation],
        allow: list[str],
        facts: Callable[[], Mapping[str, str]] = dict,
        on_ended: Callable[[Tables, Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._store = store
        self._cloud = Conversation(jobs)
        self._operations = operations
        self._allow = frozenset(allow)
        self._facts = facts
        self._on_ended = on_ended
        self._news = asyncio.Event()
        self._current: Record | None = None
        self._job: Job | None = None
        self._last_offer: tuple[str, int] | None = None
        self._again_s = 0.0
        self._changing = asyncio.Lock()
        """Held while the running job's record is read, changed and journalled."""
        self._absorbing = asyncio.Lock()
        """Held from when the cloud's word on the running job is known until it is in the record."""

    @property
    def current(self) -> Record | None:
        """The execution that is being worked on."""
        return self._current

    def wake(self) -> None:
        """Ask the cloud soon: after a connect, and on a notification. It may have ended the running job."""
        self._cloud.wake.set()
        self._news.set()

    async def run(self) -> None:
        """Finish what the journal holds, then take jobs as they come; never returns."""
        for data in await self._store.read(lambda t: t.jobs(finished=False)):
            try:
                record = Record.from_json(data)
            except (TypeError, ValueError, KeyError):
                log.exception("a journal record can't be read and is not used", record=str(data)[:200])
                continue
            log.info("going on with a job after a restart", job_id=record.job_id, phase=record.phase)
            try:
                await self._resume(record)
            except BUGS:  # one record that can't be gone on with must not stop every job there will ever be
                log.exception("a job can't be gone on with and is left", job_id=record.job_id)
        self._cloud.wake.set()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._cloud.wake.wait()
            self._cloud.wake.clear()
            while await self._take_next():
                pass
            await asyncio.sleep(NOTICES_S)  # however many notifications come

    async def _resume(self, record: Record) -> None:
        """Go on with a record of the journal; the policy may have changed since it was made."""
        if record.phase is Phase.RECEIVED:
            try:
                await self._judge(record.operation, record.document)
            except RefusedError as error:
                await self._step(record, machine.Done("REJECTED", _reason(error), time.time()))
                return
        elif record.phase is Phase.RUNNING and record.operation not in self._allow and record.progress:
            record = replace(record, stop_requested=True)  # what it has begun is the operation's to take back
        lasting = getattr(self._operations.get(record.operation), "lasting", False)
        await self._step(record, machine.Restarted(time.time(), lasting))

    async def cancel(self, job_id: str) -> bool:
        """Ask the running job to stop where it safely can; False when it isn't the running one. Raises StoreError."""
        job = self._job
        if job is None or job.id != job_id or self._current is None:
            return False
        job.cancelled.set()
        await self._change(lambda record: replace(record, stop_requested=True))
        return True

    async def keep_progress(self, progress: dict[str, Any], message: str, facts: Mapping[str, Any]) -> None:
        """Journal an operation's own state together with `facts`."""
        record = await self._change(lambda record: replace(record, progress=progress, message=message), facts)
        self._news.set()
        log.info(message, job_id=record.job_id)

    async def _change(self, change: Callable[[Record], Record], facts: Mapping[str, Any] | None = None) -> Record:
        """Change the running job's record, durably, together with `facts`; not once it has ended. Raises StoreError."""
        async with self._changing:
            assert self._current is not None
            if self._current.phase is not Phase.RUNNING:
                return self._current
            record = change(self._current)

            def write(tables: Tables) -> None:
                _put(tables, record)
                for key, value in (facts or {}).items():
                    tables.set_fact(key, value)

            await self._store.write(write)
            self._current = record
            return record

    async def fresh_document(self, job_id: str, execution_number: int) -> Mapping[str, Any]:
        """See `Job.fresh_document`."""
        return parse(await self._cloud.document(job_id, execution_number))[1]

    async def _take_next(self) -> bool:
        """Ask for the pending job and work on it; whether there may be another."""
        execution = await self._cloud.next()
        return execution is not None and await self._offer(execution)

    async def _offer(self, execution: Execution) -> bool:
        known = await self._known(execution)
        if known is not None:
            # The same again: the cloud has not taken in yet what it was told, or never will.
            self._again_s = min(2 * self._again_s, RETRY_S[1]) if self._last_offer == known.key else RETRY_S[0] / 2
            if self._last_offer == known.key:
                await asyncio.sleep(self._again_s)
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
            queued_at=execution.queued_at,
        )
        log.info("job received", job_id=record.job_id, execution=record.execution_number, status=execution.status)
        if execution.status == "IN_PROGRESS":
            await self._step(record, _interrupted())
            return True
        try:
            operation, document = await self._accept(execution.document)
        except RefusedError as error:
            await self._step(record, machine.Done("REJECTED", _reason(error), time.time()))
        else:
            await self._follow(replace(record, operation=operation, document=document), Effect.ANNOUNCE)
        return True

    async def _accept(self, document: Mapping[str, Any] | None) -> tuple[str, dict[str, Any]]:
        """The operation and the document in our form, when policy and operation take it. Raises RefusedError."""
        operation, normal = parse(document)
        await self._judge(operation, normal)
        return operation, normal

    async def _judge(self, operation: str, document: Mapping[str, Any]) -> None:
        """Policy, conditions, and the operation's own check. Raises RefusedError."""
        if operation not in self._allow or operation not in self._operations:
            raise RefusedError(
                "not_allowed",
                f"operation {operation} is not allowed on this camera",
                "allow it in agent.toml: jobs.allow",
            )

        def check() -> None:
            conditions.check(document.get("conditions", ()), self._facts())
            self._operations[operation].check(document)

        try:
            await asyncio.to_thread(check)
        except RefusedError:
            raise
        except Exception as error:  # nothing that a document holds may end the engine
            log.exception("a job document could not be judged", operation=operation)
            words = f"it can't be judged: {type(error).__name__}"
            raise RefusedError("bad_document", words, "mend the document") from error

    async def plan(self, document: Any) -> dict[str, Any]:
        """See `agent.jobs.plan.plan`."""
        return await plan(self._accept, self._operations, document)

    async def _known(self, execution: Execution) -> Record | None:
        """The journal's record of what is offered.

        None for one that ended before it was begun, and for another job of the same name: the service forgets a deleted
        job, and IN_PROGRESS never becomes QUEUED again.
        """
        data = await self._store.read(lambda t: t.job(execution.job_id, execution.execution_number))
        if data is None:
            return None
        try:
            record = Record.from_json(data)
        except (TypeError, ValueError, KeyError):
            log.exception("a journal record can't be read and is not used", job_id=execution.job_id)
            return None
        if record.phase is Phase.CLOSED and record.status is None:
            return None
        created_anew = None not in (record.queued_at, execution.queued_at) and record.queued_at != execution.queued_at
        begun_before = execution.status == "QUEUED" and record.starts > 0
        return None if created_anew or begun_before else record

    async def _step(self, record: Record, event: Event) -> None:
        await self._follow(*machine.advance(record, event))

    async def _follow(self, record: Record, effect: Effect) -> None:
        """Journal the record, carry out the effect, and so on until nothing is left to do."""
        delay = 0.0
        try:
            while True:
                await self._keep(record)
                if effect is Effect.NOTHING:
                    break
                before, event = effect, await self._perform(record, effect)
                assert self._current is not None
                record, effect = machine.advance(self._current, event)
                if effect is before:  # the cloud says something else each time; the first answer is taken at once
                    delay = await self._cloud.pause(delay) if delay else RETRY_S[0]
            if record.phase is Phase.CLOSED:
                details = {"status": record.status, "superseded": record.superseded, **record.details}
                log.info("job ended", job_id=record.job_id, details=details)
        finally:
            self._current = None

    async def _keep(self, record: Record) -> None:
        def change(tables: Tables) -> None:
            before = tables.job(record.job_id, record.execution_number) or {}
            _put(tables, record)
            tables.prune_jobs(KEPT_EXECUTIONS)
            if record.status and not before.get("status"):
                self._tell_end(tables, record)

        while True:
            try:
                async with self._changing:
                    await self._store.write(change)
                    self._current = record
                break
            except StoreError as error:  # nothing may go on without its record, and nothing is lost by waiting
                if error.code != "store_full":
                    raise
                log.error("the journal can't be written, the job waits", job_id=record.job_id, reason=error.message)
                await asyncio.sleep(STORE_RETRY_S)

    def _tell_end(self, tables: Tables, record: Record) -> None:
        """Let the end be told; a failure in the telling must not keep the end out of the journal."""
        if self._on_ended:
            try:
                self._on_ended(tables, _ended_facts(record))
            except BUGS:
                log.exception("the end of a job could not be told", job_id=record.job_id)

    async def _perform(self, record: Record, effect: Effect) -> Event:
        match effect:
            case Effect.ANNOUNCE:
                details = {"reason_code": "in_progress", "message": "accepted"}
                return await self._cloud.announce(record, details)
            case Effect.REPORT:
                assert record.status is not None
                return await self._cloud.tell(record, record.status, record.details)
            case Effect.DESCRIBE:
                return await self._cloud.ask(record)
            case Effect.RUN:
                return await self._run(record)
            case _:
                raise AssertionError(effect)

    async def _run(self, record: Record) -> machine.Done:
        operation = self._operations.get(record.operation)
        if operation is None or (record.operation not in self._allow and not record.progress):
            return _done("FAILED", FailedError("not_allowed", f"operation {record.operation} is not allowed any more"))
        self._job = job = Job(record, self.keep_progress, self.fresh_document)
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
            return machine.Done("SUCCEEDED", {"reason_code": "ok", **_redacted(details)}, time.time())
        finally:
            self._job = None
            async with self._absorbing:
                reporter.cancel()
            await asyncio.wait({reporter})
            if not reporter.cancelled() and (broken := reporter.exception()):
                log.error("telling the progress broke", job_id=record.job_id, exc_info=broken)

    async def _report_progress(self) -> None:
        """While the operation runs: tell the cloud what it does, and notice when the cloud has cancelled it."""
        started = time.monotonic()
        await asyncio.sleep(NEWS_INTERVAL_S)  # the cloud has just been told; a short job needs no more before its end
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
            answer = await self._cloud.try_once(record, "IN_PROGRESS", details)
            if isinstance(answer, machine.Unclear):
                answer = await self._cloud.ask(record)
            if not isinstance(answer, CloudError):
                await self._absorb(answer)
            await asyncio.sleep(NEWS_INTERVAL_S)

    async def _absorb(self, event: Event) -> None:
        """Take an answer into the running record; stop the operation when the cloud has ended the job."""
        assert self._current is not None
        async with self._absorbing:
            if machine.advance(self._current, event)[1] is Effect.STOP and self._job:
                log.warning("the cloud has ended this job, stopping it", job_id=self._job.id)
                self._job.cancelled.set()
            with contextlib.suppress(StoreError):  # the cloud will say it again
                await self._change(lambda record: machine.advance(record, event)[0])


def _put(tables: Tables, record: Record) -> None:
    finished = record.phase is Phase.CLOSED
    tables.put_job(record.job_id, record.execution_number, record.to_json(), finished=finished)


def _ended_facts(record: Record) -> dict[str, Any]:
    """What is told of an end beside the job's own status, which the cloud may have decided otherwise meanwhile."""
    return {
        "job_id": record.job_id,
        "execution": record.execution_number,
        "operation": record.operation,
        "status": record.status,
        "reason_code": record.details.get("reason_code", ""),
        "cloud_status": record.cancelled or record.status,
        "at": record.ended_at,
    }


def _reason(error: AgentError) -> dict[str, str]:
    message = f"{error.message}; {error.hint}" if error.hint else error.message
    return {"reason_code": error.code, "message": message}


def _done(status: str, error: AgentError) -> machine.Done:
    details = _reason(error) | getattr(error, "details", {})
    return machine.Done(status, _redacted(details), time.time())


def _redacted(details: Mapping[str, str]) -> dict[str, str]:
    return {key: redact(value) for key, value in details.items()}


def _interrupted() -> machine.Done:
    message = "this job was under way, but the camera has no record of it (its state was lost or replaced)"
    return machine.Done("FAILED", {"reason_code": "interrupted", "message": message}, time.time())
