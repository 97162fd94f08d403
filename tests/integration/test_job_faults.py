"""Every fault, and every pair of faults, at every point of a job's life: one end each, the truth, and nothing done twice.

The engine with a real journal, on a loop whose clock jumps, against the model of the Jobs service. The points of a life
are its requests, its journal writes and its operation's acts, counted as they come.
"""

import asyncio
import contextlib
from dataclasses import dataclass, field

import pytest

from agent import logs
from agent.cloud.session import Rejected
from agent.errors import CloudError, FailedError
from agent.jobs.engine import Engine
from agent.store import Store
from tests import skipping_loop
from tests.fakes import TERMINAL, JobsService

DOCUMENT = {"version": "1.0", "operation": "restart"}
ACTS = ("one", "two")
LONGEST_LIFE_S = 6 * 3600
IN_THE_CLOUD = ("notify", "cancel", "force-cancel", "time-out", "deletion", "touch")
ON_THE_WAY = ("lost request", "lost answer", "throttled", "refused inside")
TO_THE_AGENT = ("kill before", "kill after", "stop")
FAULTS = {
    "request": (*IN_THE_CLOUD, *ON_THE_WAY, *TO_THE_AGENT),
    "write": ("force-cancel", *TO_THE_AGENT),
    "act": ("cancel here", *TO_THE_AGENT),
}


class Killed(BaseException):
    """Unwinds what runs at the point of a kill; the rest of this life is dead."""


@dataclass
class Life:
    """One run of the engine, from the job's creation to its end, over all restarts; `faults` by the number of the point."""

    store: Store
    job_id: str
    faults: dict[int, str]
    others: tuple[str, ...] = ()
    points: list[str] = field(default_factory=list)
    hit: list[str] = field(default_factory=list)
    acts: list[tuple[str, str]] = field(default_factory=list)
    begun: list[tuple[str, dict]] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    """Jobs whose operation came to its end."""

    def __post_init__(self):
        self.cloud = JobsService()
        for job_id in (self.job_id, *self.others):
            self.cloud.create(job_id, DOCUMENT)
        self.attempts: list[tuple[str, str]] = []
        self.cancels: list[asyncio.Task[bool]] = []
        self.told_over: list[tuple[str, str]] = []
        """Updates of jobs that the agent knew to be over."""
        self.deaths = 0
        self.over = asyncio.Event()

    def point(self, kind: str, life: int) -> str:
        """The fault at this point, "" when there is none. Raises Killed in a life that is over."""
        if life != self.deaths:
            raise Killed
        self.points.append(kind)
        fault = self.faults.get(len(self.points) - 1, "")
        if fault not in FAULTS[kind]:
            return ""
        self.hit.append(fault)
        if fault in IN_THE_CLOUD:
            self.meddle(fault)
        elif fault == "cancel here":
            self.cancels.append(asyncio.create_task(self.engine.cancel(self.job_id)))
        elif fault == "stop":
            self.over.set()
        elif fault == "kill before":
            self.kill()
        return fault

    def kill(self):
        self.deaths += 1
        self.over.set()
        raise Killed

    def meddle(self, fault):
        entry = self.cloud.executions.get((self.job_id, 1))
        if fault == "notify":
            self.engine.wake()
        elif entry is None or entry["status"] in TERMINAL:
            return
        elif fault == "touch":
            entry["version"] += 1
        elif fault == "cancel":
            if entry["status"] == "QUEUED":
                self.cloud.end(self.job_id, "CANCELED")
        else:
            end = {"force-cancel": "CANCELED", "time-out": "TIMED_OUT", "deletion": "REMOVED"}[fault]
            self.cloud.end(self.job_id, end)

    async def live(self):
        """Run the agent, again after each kill and stop, until all jobs have ended and it is at rest."""
        async with asyncio.timeout(LONGEST_LIFE_S):
            while True:
                self.over.clear()
                journal, wire = Journal(self), Wire(self)
                self.engine = Engine(store=journal, jobs=wire, operations={"restart": Work(self)}, allow=["restart"])
                runner = asyncio.create_task(self.engine.run())
                resting = asyncio.create_task(self.rest(wire))
                over = asyncio.create_task(self.over.wait())
                await asyncio.wait({runner, resting, over}, return_when=asyncio.FIRST_COMPLETED)
                at_rest, broken = resting.done(), runner.done() and not self.over.is_set()
                tasks = {runner, resting, over}
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks)
                await asyncio.gather(*self.cancels, return_exceptions=True)
                if broken:
                    raise AssertionError("the engine ended") from runner.exception()
                if at_rest:
                    return

    async def rest(self, wire):
        while True:
            await asyncio.sleep(5)
            waiting = any(entry["status"] not in TERMINAL for entry in self.cloud.executions.values())
            if not waiting and self.engine.current is None and wire.idle:
                return


class Wire:
    """The service as one life of the agent reaches it."""

    def __init__(self, life):
        self.life, self.number, self.idle = life, life.deaths, False
        self.over = set()
        """Jobs of which the agent knows that the cloud has ended them otherwise."""

    async def describe_next(self):
        execution = await self.ask(self.life.cloud.describe_next)
        self.idle = execution is None
        return execution

    async def describe(self, *arguments):
        return await self.ask(self.life.cloud.describe, *arguments)

    async def update(self, job_id, *, status, **options):
        if status in TERMINAL:
            self.life.attempts.append((job_id, status))
        if job_id in self.over:
            self.life.told_over.append((job_id, status))
        try:
            return await self.ask(self.life.cloud.update, job_id, status=status, **options)
        except Rejected as refusal:
            if (
                refusal.code == "ResourceNotFound"
                or refusal.details.get("executionState", {}).get("status") in TERMINAL
            ):
                self.over.add(job_id)
            raise

    async def ask(self, call, *arguments, **options):
        self.idle = False
        await asyncio.sleep(0.1)
        fault = self.life.point("request", self.number)
        if fault == "lost request":
            raise CloudError("no_answer", "no answer within 20 s", retryable=True)
        if fault in ("throttled", "refused inside"):
            code = {"throttled": "RequestThrottled", "refused inside": "InternalError"}[fault]
            raise Rejected(code, "later", retryable=True, details={"code": code})
        answer = await call(*arguments, **options)
        if fault == "kill after":
            self.life.kill()
        await asyncio.sleep(0.1)
        if fault == "lost answer":
            raise CloudError("no_answer", "no answer within 20 s", retryable=True)
        return answer


class Journal:
    """The store as one life of the agent reaches it."""

    def __init__(self, life):
        self.life, self.number = life, life.deaths

    async def read(self, query):
        return await self.life.store.read(query)

    async def write(self, change):
        fault = self.life.point("write", self.number)
        await self.life.store.write(change)
        if fault == "kill after":
            self.life.kill()


class Work:
    """Two acts, each noted before it is done; what was under way is looked at, not done again."""

    def __init__(self, life):
        self.life, self.number = life, life.deaths

    def check(self, document):
        pass

    async def run(self, job):
        life = self.life
        record = await life.store.read(lambda t: t.job(job.id, 1))
        assert record["phase"] == "running", "never begun after its end"
        life.begun.append((job.id, dict(job.progress)))
        for act in ACTS[ACTS.index(job.progress["at"]) if job.progress else 0 :]:
            if (job.id, act) in life.acts:
                continue
            if job.cancelled.is_set():
                raise FailedError("cancelled", "stopped")
            await job.save({"at": act}, act)
            fault = life.point("act", self.number)
            life.acts.append((job.id, act))
            if fault == "kill after":
                life.kill()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(20):
                    await job.cancelled.wait()
        life.ended.append(job.id)
        return {"message": "done"}


async def judge(life):
    """Assert what must hold of a life that is over."""
    for job_id in (life.job_id, *life.others):
        records = await life.store.read(lambda t: [r for r in t.jobs(limit=10_000) if r["job_id"] == job_id])
        entry = life.cloud.executions.get((job_id, 1))
        status = entry["status"] if entry else "REMOVED"
        done = tuple(act for name, act in life.acts if name == job_id)
        assert done in ((), ACTS[:1], ACTS), "each act once, in order"
        attempts = {attempt for name, attempt in life.attempts if name == job_id}
        assert len(attempts) <= 1, "one verdict"
        begun = [ACTS.index(progress["at"]) if progress else -1 for name, progress in life.begun if name == job_id]
        assert begun == sorted(begun), "gone on with, never begun anew"
        if status == "SUCCEEDED":
            assert done == ACTS
        if status == "FAILED":
            assert "cancel here" in life.hit
            assert done != ACTS
        assert status != "REJECTED"
        if not records:
            assert (status in ("CANCELED", "TIMED_OUT", "REMOVED"), done, attempts) == (True, (), set())
            continue
        [record] = records
        assert record["phase"] == "closed"
        if status in ("SUCCEEDED", "FAILED"):
            assert (record["status"], record["superseded"]) == (status, None)
        else:
            assert record["superseded"] in (status, "REMOVED"), "how the cloud has ended it"
            assert record["status"] in (None, "SUCCEEDED", "FAILED")
    assert life.told_over == []
    if life.others:
        assert [life.cloud.status(name) for name in life.others] == ["SUCCEEDED"] * len(life.others)


@pytest.fixture(autouse=True)
def _quiet():
    logs.set_level("critical")
    yield
    logs.set_level("debug")


def pairs_of(points, first):
    """Every fault at every point after `first`, in a life that had these points."""
    return [(number, fault) for number in range(first + 1, len(points)) for fault in FAULTS[points[number]]]


async def enumerate_lives(path, tried, others=(), *, pairs):
    store = await Store.open(path)
    await store._call(lambda: store._sql.execute("PRAGMA synchronous = OFF"))  # nobody pulls the plug here
    try:

        async def one(faults):
            tried.append(faults)
            life = Life(store, f"job-{len(tried)}", faults, tuple(f"{name}-{len(tried)}" for name in others))
            try:
                await life.live()
                await judge(life)
            except BaseException as error:
                error.add_note(f"{faults} at {[f'{n} {life.points[n]}' for n in faults]}; {life.points}")
                raise
            return life

        base = await one({})
        for number, fault in pairs_of(base.points, -1):
            single = await one({number: fault})
            assert single.hit == [fault]
            if pairs:
                for second, other in pairs_of(single.points, number):
                    await one({number: fault, second: other})
    finally:
        await store.close()


@pytest.mark.conformance("C-JOBS-11", "C-JOBS-29", "F-13", "F-21")
def test_every_fault_at_every_point_of_two_jobs(tmp_path):
    tried = []
    skipping_loop.run(enumerate_lives(tmp_path / "state.db", tried, ("next",), pairs=False))
    print(f"{len(tried) - 1} faults in the lives of two jobs tried")


@pytest.mark.conformance("C-JOBS-07", "C-JOBS-18", "C-JOBS-21", "C-JOBS-22", "F-18")
def test_every_pair_of_faults_at_every_two_points_of_a_job(tmp_path):
    tried = []
    skipping_loop.run(enumerate_lives(tmp_path / "state.db", tried, pairs=True))
    print(f"{len(tried) - 1} faults and pairs of faults in the life of a job tried")
