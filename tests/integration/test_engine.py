"""The engine with a real journal against a model of the Jobs service: each execution ends once, with the truth."""

import asyncio
import contextlib
import itertools
import threading
from dataclasses import replace

import pytest

from agent.cloud.session import Rejected
from agent.errors import FailedError, RefusedError, StoreError
from agent.jobs import conversation
from agent.jobs import engine as engine_module
from agent.jobs.engine import Engine
from agent.jobs.machine import Phase, Record
from agent.store import Store
from tests import skipping_loop
from tests.fakes import TERMINAL, JobsService

DOCUMENT = {"version": "1.0", "operation": "restart"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in {
        "RETRY_S": (0.01, 0.05),
        "HEARTBEAT_S": 0.02,
        "NEWS_INTERVAL_S": 0.0,
        "POLL_S": 0.05,
        "NOTICES_S": 0.0,
    }.items():
        monkeypatch.setattr(engine_module, name, value)
    monkeypatch.setattr(conversation, "RETRY_S", (0.01, 0.05))


@pytest.fixture
async def store(tmp_path):
    opened = await Store.open(tmp_path / "state.db")
    yield opened
    await opened.close()


class Work:
    """An operation that does what the test tells it."""

    name = "restart"

    def __init__(self, act=None, refuse=None):
        self.act = act
        self.refuse = refuse
        self.runs = []

    def check(self, document):
        if self.refuse:
            raise self.refuse

    async def run(self, job):
        self.runs.append((job.id, job.execution_number, dict(job.progress)))
        return await self.act(job) if self.act else {"message": "done"}


@contextlib.asynccontextmanager
async def running(store, cloud, work, allow=("restart",)):
    engine = Engine(store=store, jobs=cloud, operations={"restart": work}, allow=list(allow))
    task = asyncio.create_task(engine.run())
    try:
        engine.wake()
        yield engine
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


async def journal(store, job_id, number=1):
    return await store.read(lambda t: t.job(job_id, number))


async def closed(store, job_id, number=1):
    async with asyncio.timeout(20):
        while True:
            record = await journal(store, job_id, number)
            if record and record["phase"] == "closed":
                return record
            await asyncio.sleep(0.005)


async def test_a_job_is_announced_run_and_reported(store):
    cloud, work = JobsService(), Work()
    cloud.create("a", DOCUMENT)
    async with running(store, cloud, work):
        record = await closed(store, "a")
    assert [status for _, status, _ in cloud.updates] == ["IN_PROGRESS", "SUCCEEDED"]
    assert cloud.details("a") == {"reason_code": "ok", "message": "done"}
    assert record["superseded"] is None


@pytest.mark.conformance("C-JOBS-12", "F-20")
@pytest.mark.parametrize(
    ("document", "allow", "refuse", "code"),
    [
        (None, ["restart"], None, "bad_document"),
        ({"version": "1.0", "operation": "explode"}, ["restart"], None, "unknown_operation"),
        (DOCUMENT, [], None, "not_allowed"),
        (DOCUMENT, ["restart"], RefusedError("unknown_target", "no such target"), "unknown_target"),
    ],
)
async def test_what_is_not_acceptable_is_rejected_before_anything_is_touched(store, document, allow, refuse, code):
    cloud, work = JobsService(), Work(refuse=refuse)
    cloud.create("a", document)
    async with running(store, cloud, work, allow):
        await closed(store, "a")
    assert cloud.status("a") == "REJECTED"
    assert cloud.details("a")["reason_code"] == code
    assert cloud.details("a")["message"]
    assert work.runs == []


@pytest.mark.conformance("C-JOBS-12", "F-14")
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (RefusedError("signature_bad", "no"), "REJECTED", "signature_bad"),
        (FailedError("capture_worse", "dark"), "FAILED", "capture_worse"),
        (ZeroDivisionError("oops"), "FAILED", "internal_error"),
    ],
)
async def test_how_an_operation_ends_is_the_status(store, error, status, code):
    async def fail(job):
        raise error

    cloud = JobsService()
    cloud.create("a", DOCUMENT)
    async with running(store, cloud, Work(fail)):
        await closed(store, "a")
    assert cloud.status("a") == status
    assert cloud.details("a")["reason_code"] == code


@pytest.mark.conformance("C-JOBS-21")
async def test_lost_requests_and_answers_at_every_place_change_nothing(store):
    tried = 0
    for kind in ("lose_request", "lose_answer"):
        for place in range(4):
            for count in (1, 3):
                cloud, work, job_id = JobsService(), Work(), f"{kind}-{place}-{count}"
                cloud.create(job_id, DOCUMENT)
                calls = 0
                for name in ("describe_next", "describe", "update"):
                    original = getattr(cloud, name)

                    async def counted(
                        *args, _original=original, _cloud=cloud, _kind=kind, _place=place, _count=count, **kw
                    ):
                        nonlocal calls
                        calls += 1
                        if calls == _place + 1:
                            setattr(_cloud, _kind, _count)
                        return await _original(*args, **kw)

                    setattr(cloud, name, counted)
                async with running(store, cloud, work):
                    await closed(store, job_id)
                tried += 1
                assert cloud.status(job_id) == "SUCCEEDED"
                assert len(work.runs) == 1, f"{kind} at request {place}: run {len(work.runs)} times"
    print(f"{tried} losses tried")


@pytest.mark.conformance("C-JOBS-22")
async def test_the_journal_knows_before_the_cloud(store):
    seen = []

    class Watching(JobsService):
        async def update(self, job_id, **kw):
            record = await journal(store, job_id)
            seen.append((kw["status"], record["phase"], record["status"]))
            return await super().update(job_id, **kw)

    cloud = Watching()
    cloud.create("a", DOCUMENT)
    async with running(store, cloud, Work()):
        await closed(store, "a")
    assert seen == [("IN_PROGRESS", "received", None), ("SUCCEEDED", "ended", "SUCCEEDED")]


@pytest.mark.conformance("C-JOBS-07", "F-18")
async def test_a_restart_of_the_agent_goes_on_with_what_was_saved(store):
    saved, go_on = asyncio.Event(), asyncio.Event()

    async def act(job):
        if not job.progress:
            await job.save({"step": 1}, "half way", facts={"floor": 7})
            saved.set()
            await asyncio.Event().wait()
        return {"message": f"from step {job.progress['step']}"}

    cloud, work = JobsService(), Work(act)
    cloud.create("a", DOCUMENT)
    async with running(store, cloud, work):
        await saved.wait()
    assert await store.read(lambda t: t.fact("floor")) == 7
    async with running(store, cloud, work):
        await closed(store, "a")
    assert [progress for _, _, progress in work.runs] == [{}, {"step": 1}]
    assert cloud.details("a")["message"] == "from step 1"
    go_on.set()


@pytest.mark.conformance("C-JOBS-22")
async def test_the_terminal_status_is_sent_after_a_restart_until_it_is_taken(store):
    cloud, work = JobsService(), Work()
    cloud.create("a", DOCUMENT)
    done = asyncio.Event()

    async def act(job):
        cloud.lose_request = 10_000
        done.set()
        return {"message": "done"}

    work.act = act
    async with running(store, cloud, work):
        await done.wait()
        await until(lambda: cloud.lose_request < 9_998)
    assert cloud.status("a") == "IN_PROGRESS"
    cloud.lose_request = 2
    async with running(store, cloud, work):
        await closed(store, "a")
    assert cloud.status("a") == "SUCCEEDED"
    assert len(work.runs) == 1


@pytest.mark.conformance("C-JOBS-08", "F-18")
async def test_an_execution_in_progress_that_the_journal_does_not_know_was_interrupted(store):
    cloud, work = JobsService(), Work()
    cloud.create("a", DOCUMENT, status="IN_PROGRESS")
    async with running(store, cloud, work):
        await closed(store, "a")
    assert (cloud.status("a"), cloud.details("a")["reason_code"]) == ("FAILED", "interrupted")
    assert work.runs == []


@pytest.mark.conformance("C-JOBS-09")
async def test_the_same_execution_runs_once_and_a_retry_runs(store):
    cloud, work = JobsService(), Work()
    cloud.create("a", DOCUMENT)
    async with running(store, cloud, work) as engine:
        await closed(store, "a")
        for _ in range(3):
            engine.wake()
        cloud.create("a", DOCUMENT, number=2)
        engine.wake()
        await closed(store, "a", 2)
    assert [(job, number) for job, number, _ in work.runs] == [("a", 1), ("a", 2)]


@pytest.mark.conformance("C-JOBS-10", "C-JOBS-11")
async def test_jobs_wait_for_the_running_one(store):
    release = asyncio.Event()

    async def act(job):
        if job.id == "a":
            await release.wait()
        return {"message": job.id}

    cloud, work = JobsService(), Work(act)
    cloud.create("a", DOCUMENT)
    async with running(store, cloud, work) as engine:
        await until(lambda: work.runs)
        cloud.create("b", DOCUMENT)
        engine.wake()
        await asyncio.sleep(0.05)
        assert engine.current.job_id == "a"
        assert len(work.runs) == 1
        release.set()
        await closed(store, "b")
    assert (cloud.status("a"), cloud.status("b")) == ("SUCCEEDED", "SUCCEEDED")


@pytest.mark.conformance("C-JOBS-18")
@pytest.mark.parametrize("end", ["CANCELED", "TIMED_OUT", "REMOVED"])
async def test_what_the_cloud_ends_is_stopped_and_not_reported_over(store, end):
    async def act(job):
        await job.cancelled.wait()
        raise FailedError("cancelled", "stopped")

    cloud, work = JobsService(), Work(act)
    cloud.create("a", DOCUMENT)
    async with running(store, cloud, work):
        await until(lambda: work.runs)
        cloud.end("a", end)
        record = await closed(store, "a")
    assert record["superseded"] == end
    assert all(status == "IN_PROGRESS" for _, status, _ in cloud.updates)


async def test_a_local_cancel_is_reported(store):
    async def act(job):
        await job.cancelled.wait()
        raise FailedError("cancelled", "stopped by the technician")

    cloud, work = JobsService(), Work(act)
    cloud.create("a", DOCUMENT)
    async with running(store, cloud, work) as engine:
        await until(lambda: work.runs)
        assert not await engine.cancel("other")
        assert await engine.cancel("a")
        await closed(store, "a")
    assert (cloud.status("a"), cloud.details("a")["reason_code"]) == ("FAILED", "cancelled")


async def test_progress_is_told_and_the_step_timer_renewed(store):
    release = asyncio.Event()

    async def act(job):
        await job.save({"n": 1}, "downloading")
        await release.wait()
        return {"message": "done"}

    cloud = JobsService()
    cloud.create("a", DOCUMENT)
    async with running(store, cloud, Work(act)):
        await until(lambda: sum(d["message"] == "downloading" for _, _, d in cloud.updates) >= 3)
        release.set()
        await closed(store, "a")
    assert [s for _, s, _ in cloud.updates if s in TERMINAL] == ["SUCCEEDED"]


async def test_a_job_removed_before_it_began_runs_when_it_is_offered_again(store):
    cloud, work = JobsService(), Work()
    cloud.create("a", DOCUMENT)
    describe = cloud.describe_next

    async def vanish():
        execution = await describe()
        if execution:
            cloud.end("a", "REMOVED")
        return execution

    cloud.describe_next = vanish
    async with running(store, cloud, work) as engine:
        record = await closed(store, "a")
        assert (record["superseded"], record["status"], work.runs) == ("REMOVED", None, [])
        cloud.describe_next = describe
        cloud.create("a", DOCUMENT)
        engine.wake()
        await until(lambda: cloud.status("a") == "SUCCEEDED")
    assert len(work.runs) == 1


async def test_a_full_disk_makes_the_job_wait_not_the_agent_end(store, monkeypatch):
    monkeypatch.setattr(engine_module, "STORE_RETRY_S", 0.02)
    cloud, work = JobsService(), Work()
    cloud.create("a", DOCUMENT)
    pages = await store._call(lambda: store._sql.execute("PRAGMA page_count").fetchone()[0])
    await store._call(lambda: store._sql.execute(f"PRAGMA max_page_count = {pages}").fetchone())
    for size in (300, 1):
        with contextlib.suppress(StoreError):
            for n in range(1000):
                await store.write(lambda t: t.put_job(f"{size}-{n}", 1, {"pad": "x" * size}, finished=True))
    async with running(store, cloud, work):
        for _ in range(10):
            await asyncio.sleep(0.02)
        assert cloud.status("a") == "QUEUED", "nothing is announced that is not in the journal"
        await store._call(lambda: store._sql.execute(f"PRAGMA max_page_count = {pages + 100}").fetchone())
        await closed(store, "a")
    assert cloud.status("a") == "SUCCEEDED"


@pytest.mark.conformance("F-08", "F-13")
async def test_a_document_that_breaks_its_check_is_rejected_and_the_engine_lives(store):
    cloud, work = JobsService(), Work(refuse=ZeroDivisionError("a bug of ours"))
    cloud.create("a", DOCUMENT)
    async with running(store, cloud, work) as engine:
        await closed(store, "a")
        work.refuse = None
        cloud.create("b", DOCUMENT)
        engine.wake()
        await closed(store, "b")
    assert (cloud.status("a"), cloud.details("a")["reason_code"]) == ("REJECTED", "bad_document")
    assert cloud.status("b") == "SUCCEEDED"


async def test_a_cancel_noticed_during_a_save_does_not_take_the_journal_back(store):
    async def act(job):
        release = threading.Event()
        blocked = asyncio.create_task(store.read(lambda _: release.wait(20)))
        saving = asyncio.create_task(job.save({"state": "COMMITTING"}, "committing"))
        await asyncio.sleep(0)
        cloud.end("a", "CANCELED")
        await job.cancelled.wait()
        release.set()
        await asyncio.gather(blocked, saving)
        await until(lambda: engine.current.cancelled)
        record = await journal(store, "a")
        seen.append((record["progress"], record["cancelled"]))
        return {"message": "done"}

    cloud, seen = JobsService(), []
    cloud.create("a", DOCUMENT)
    async with running(store, cloud, Work(act)) as engine:
        await closed(store, "a")
    assert seen == [({"state": "COMMITTING"}, "CANCELED")]


async def test_a_job_created_again_under_the_same_name_runs_again(store):
    cloud, work = JobsService(), Work()
    cloud.create("a", DOCUMENT)
    async with running(store, cloud, work) as engine:
        await closed(store, "a")
        cloud.end("a", "REMOVED")
        cloud.create("a", DOCUMENT)
        engine.wake()
        await until(lambda: len(work.runs) == 2)
        await closed(store, "a")
    assert cloud.status("a") == "SUCCEEDED"


@pytest.mark.conformance("C-JOBS-20")
async def test_a_throttled_question_is_asked_again_soon(store, monkeypatch):
    monkeypatch.setattr(engine_module, "POLL_S", 1000)
    cloud, work = JobsService(), Work()
    cloud.create("a", DOCUMENT)
    cloud.throttle = 4
    async with running(store, cloud, work):
        await closed(store, "a")
    assert len(work.runs) == 1


@pytest.mark.conformance("C-JOBS-29")
async def test_the_next_job_is_asked_for_after_a_resumed_one(store, monkeypatch):
    monkeypatch.setattr(engine_module, "POLL_S", 1000)
    begun = asyncio.Event()

    async def act(job):
        if job.id == "a" and not job.progress:
            await job.save({"n": 1}, "begun")
            begun.set()
            await asyncio.Event().wait()
        return {"message": "done"}

    cloud, work = JobsService(), Work(act)
    cloud.create("a", DOCUMENT)
    async with running(store, cloud, work):
        await begun.wait()
    cloud.create("b", DOCUMENT)
    cloud.lose_request = 2
    async with running(store, cloud, work):
        await closed(store, "b")
    assert (cloud.status("a"), cloud.status("b")) == ("SUCCEEDED", "SUCCEEDED")


async def test_a_cloud_that_refuses_without_end_is_not_asked_without_pause(store, monkeypatch):
    monkeypatch.setattr(conversation, "RETRY_S", (0.1, 0.2))
    monkeypatch.setattr(engine_module, "RETRY_S", (0.1, 0.2))
    cloud, work = JobsService(), Work()
    cloud.create("a", DOCUMENT)
    state = {"executionState": {"status": "QUEUED", "versionNumber": 1}}
    cloud.refuse_updates = Rejected("InvalidStateTransition", "no", details=state)
    async with running(store, cloud, work):
        await until(lambda: cloud.requests)
        await asyncio.sleep(1)
        assert 2 <= cloud.requests <= 20
        cloud.refuse_updates = None
        await closed(store, "a")
    assert cloud.status("a") == "SUCCEEDED"


@pytest.mark.conformance("F-21")
async def test_an_end_that_the_cloud_finds_malformed_does_not_block_the_next_job(store):
    cloud = JobsService()

    async def act(job):
        if job.id == "a":
            cloud.refuse_updates = Rejected("InvalidRequest", "bad details", details={"code": "InvalidRequest"})
        return {"message": "done"}

    cloud.create("a", DOCUMENT)
    async with running(store, cloud, Work(act)) as engine:
        await closed(store, "a")
        cloud.end("a", "TIMED_OUT")
        cloud.refuse_updates = None
        cloud.create("b", DOCUMENT)
        engine.wake()
        await closed(store, "b")
    assert cloud.status("b") == "SUCCEEDED"


async def test_a_local_cancel_holds_over_a_restart(store):
    async def act(job):
        await job.save({"n": 1}, "begun")
        await asyncio.Event().wait()

    async def stop(job):
        if job.cancelled.is_set():
            raise FailedError("cancelled", "stopped")
        return {"message": "went on"}

    cloud = JobsService()
    cloud.create("a", DOCUMENT)
    async with running(store, cloud, Work(act)) as engine:
        await until(lambda: cloud.updates)
        await until(lambda: engine.current and engine.current.progress)
        assert await engine.cancel("a")
    async with running(store, cloud, Work(stop)):
        await closed(store, "a")
    assert (cloud.status("a"), cloud.details("a")["reason_code"]) == ("FAILED", "cancelled")


@pytest.mark.conformance("C-JOBS-07", "C-JOBS-08", "F-08")
async def test_a_record_of_a_later_version_can_be_used_and_a_damaged_one_does_no_harm(store):
    cloud, work = JobsService(), Work()
    for job_id in ("later", "damaged"):
        cloud.create(job_id, DOCUMENT, status="IN_PROGRESS")
    record = engine_module.Record(
        "later", 1, 1, engine_module.Phase.RUNNING, "restart", {}, 0.0, starts=1, queued_at=1.0
    )
    await store.write(lambda t: t.put_job("later", 1, {**record.to_json(), "new_in_2.0": 7}, finished=False))
    await store.write(lambda t: t.put_job("damaged", 1, {"phase": "future"}, finished=False))
    async with running(store, cloud, work):
        await closed(store, "later")
        await closed(store, "damaged")
    assert cloud.status("later") == "SUCCEEDED"
    assert (cloud.status("damaged"), cloud.details("damaged")["reason_code"]) == ("FAILED", "interrupted")


@pytest.mark.conformance("C-JOBS-07", "C-JOBS-09", "C-CONN-29")
@pytest.mark.parametrize("status", ["QUEUED", "IN_PROGRESS"])
async def test_an_ended_execution_that_an_old_answer_offers_again_is_not_run_again(store, status):
    class Lagging(JobsService):
        old = None

        async def describe_next(self):
            (old, self.old), fresh = (self.old, None), await super().describe_next()
            return fresh or old

    cloud, work, asked = Lagging(), Work(), []
    cloud.create("a", DOCUMENT)
    update = cloud.update

    async def noted(job_id, **options):
        asked.append(options["status"])
        return await update(job_id, **options)

    cloud.update = noted
    offered = replace(await cloud.describe_next(), status=status)
    async with running(store, cloud, work) as engine:
        await closed(store, "a")
        cloud.old = offered
        engine.wake()
        await until(lambda: len(asked) > 2)
        cloud.create("b", DOCUMENT)
        engine.wake()
        await closed(store, "b")
        record = await journal(store, "a")
    assert [name for name, _, _ in work.runs] == ["a", "b"]
    assert {status for status in asked if status in TERMINAL} == {"SUCCEEDED"}
    assert record["phase"] == "closed"
    assert "SUCCEEDED" in (record["status"], record["superseded"])


class Timed(JobsService):
    """Notes when which update came, with its step timer, by the loop's clock."""

    def __init__(self):
        super().__init__()
        self.times = []

    async def update(self, job_id, **options):
        at = asyncio.get_running_loop().time()
        self.times.append((at, options["status"], options["step_timeout_minutes"]))
        return await super().update(job_id, **options)


def in_no_time(path, monkeypatch, scenario):
    """Run `scenario(store)` with the engine's real times, on a loop whose clock jumps."""
    monkeypatch.undo()

    async def main():
        store = await Store.open(path)
        try:
            await scenario(store)
        finally:
            await store.close()

    skipping_loop.run(main())


@pytest.mark.conformance("C-JOBS-19", "C-JOBS-23")
def test_during_a_long_step_the_cloud_hears_of_it_and_its_timer_never_comes_half_way(tmp_path, monkeypatch):
    async def act(job):
        await asyncio.sleep(24 * 3600)
        return {"message": "done"}

    async def scenario(store):
        cloud = Timed()
        cloud.create("a", DOCUMENT)
        async with running(store, cloud, Work(act)) as engine:
            while cloud.status("a") != "SUCCEEDED":
                await asyncio.sleep(60)
            assert engine.current is None
        began = [(at, minutes) for at, status, minutes in cloud.times if status == "IN_PROGRESS"]
        assert len(began) >= 24 * 60
        for (earlier, minutes), (later, _) in itertools.pairwise(began):
            assert 1 <= minutes <= 10080
            assert later - earlier <= min(60, minutes * 60 / 2), "a forced cancel is noticed within a minute"

    in_no_time(tmp_path / "state.db", monkeypatch, scenario)


@pytest.mark.conformance("C-JOBS-29")
def test_the_next_job_comes_within_ten_seconds_without_a_notification(tmp_path, monkeypatch):
    async def scenario(store):
        cloud = Timed()
        for number in range(20):
            cloud.create(f"job-{number}", DOCUMENT)
        async with running(store, cloud, Work()):
            while cloud.status("job-19") != "SUCCEEDED":
                await asyncio.sleep(1)
        times = [at for at, _, _ in cloud.times]
        assert len(times) == 40
        assert max(later - earlier for earlier, later in itertools.pairwise(times)) < 10

    in_no_time(tmp_path / "state.db", monkeypatch, scenario)


@pytest.mark.conformance("F-12")
def test_a_job_that_ends_the_agent_each_time_is_given_up(tmp_path, monkeypatch):
    async def scenario(store):
        cloud, work = JobsService(), Work(lambda job: asyncio.Event().wait())
        cloud.create("a", DOCUMENT)
        starts = 0
        while cloud.status("a") not in TERMINAL:
            before = len(work.runs)
            async with running(store, cloud, work):
                while len(work.runs) == before and cloud.status("a") not in TERMINAL:
                    await asyncio.sleep(0.1)
            starts += 1
            assert starts < 20
        assert (cloud.status("a"), cloud.details("a")["reason_code"]) == ("FAILED", "restarted_too_often")

    in_no_time(tmp_path / "state.db", monkeypatch, scenario)


async def test_a_mistake_in_telling_an_end_costs_neither_the_end_nor_the_engine(store):
    cloud = JobsService()
    told = []

    def on_ended(tables, facts):
        told.append(facts["status"])
        raise TypeError("a bug in telemetry")

    engine = Engine(store=store, jobs=cloud, operations={"restart": Work()}, allow=["restart"], on_ended=on_ended)
    task = asyncio.create_task(engine.run())
    try:
        for job_id in ("a", "b"):
            cloud.create(job_id, DOCUMENT)
            engine.wake()
            await closed(store, job_id)
            assert cloud.status(job_id) == "SUCCEEDED"
    finally:
        task.cancel()
        await asyncio.wait({task})
    assert told == ["SUCCEEDED", "SUCCEEDED"]


async def test_each_end_is_told_once_with_what_the_cloud_made_of_it(store):
    cloud, told = JobsService(), []
    engine = Engine(
        store=store,
        jobs=cloud,
        operations={"restart": Work()},
        allow=["restart"],
        on_ended=lambda tables, facts: told.append((facts["job_id"], facts["status"], facts["cloud_status"])),
    )
    task = asyncio.create_task(engine.run())
    try:
        cloud.create("good", DOCUMENT)
        cloud.create("bad", {"version": "1.0", "operation": "format"})
        engine.wake()
        await closed(store, "good")
        await closed(store, "bad")
    finally:
        task.cancel()
        await asyncio.wait({task})
    assert told == [("good", "SUCCEEDED", "SUCCEEDED"), ("bad", "REJECTED", "REJECTED")]


async def test_a_job_deleted_and_made_anew_under_its_name_is_another_job(store):
    """While the first one runs: it is stopped, nothing is told of it, and the new one runs with its own document."""
    cloud, began = JobsService(), asyncio.Event()
    targets = []

    async def act(job):
        targets.append(job.document["target"])
        if len(targets) == 1:
            began.set()
            await job.cancelled.wait()
            raise FailedError("cancelled", "stopped")
        return {"message": "done"}

    cloud.create("J", {**DOCUMENT, "target": "first"})
    async with running(store, cloud, Work(act)) as engine:
        await began.wait()
        cloud.end("J", "REMOVED")
        cloud.create("J", {**DOCUMENT, "target": "second"})
        engine.wake()
        await until(lambda: cloud.status("J") == "SUCCEEDED")
    assert targets == ["first", "second"]
    assert [status for _, status, _ in cloud.updates if status != "IN_PROGRESS"] == ["SUCCEEDED"]


async def test_made_anew_before_the_announcement_was_taken(store):
    cloud, targets = JobsService(), []

    async def act(job):
        targets.append(job.document["target"])
        return {"message": "done"}

    cloud.create("J", {**DOCUMENT, "target": "first"})
    replace = cloud.update

    async def update(job_id, **changes):
        if not targets and "first" in str(cloud.executions[("J", 1)]["document"]):
            cloud.end("J", "REMOVED")
            cloud.create("J", {**DOCUMENT, "target": "second"})
            raise Rejected("RequestThrottled", "slow down", retryable=True, details={})
        return await replace(job_id, **changes)

    cloud.update = update
    async with running(store, cloud, Work(act)):
        await until(lambda: cloud.status("J") == "SUCCEEDED")
    assert targets == ["second"]


async def test_made_anew_before_its_end_could_be_told_it_blocks_nobody(store):
    cloud = JobsService()
    targets = []

    async def act(job):
        targets.append(job.document["target"])
        if targets == ["first"]:
            cloud.throttle = 3
            cloud.end("J", "REMOVED")
            cloud.create("J", {**DOCUMENT, "target": "second"})
        return {"message": "done"}

    cloud.create("J", {**DOCUMENT, "target": "first"})
    async with running(store, cloud, Work(act)) as engine:
        cloud.create("K", {**DOCUMENT, "target": "third"})
        engine.wake()
        await until(lambda: cloud.status("K") == cloud.status("J") == "SUCCEEDED")
    assert sorted(targets) == ["first", "second", "third"]


@pytest.mark.parametrize(("phase", "starts", "status"), [("received", 0, "REJECTED"), ("running", 1, "FAILED")])
async def test_a_policy_that_was_narrowed_holds_for_what_is_in_the_journal_too(store, phase, starts, status):
    cloud, work = JobsService(), Work()
    cloud.create("J", DOCUMENT, status="QUEUED" if phase == "received" else "IN_PROGRESS")
    record = Record("J", 1, 1, Phase(phase), "restart", {"target": "agent"}, 0.0, queued_at=1.0, starts=starts)
    await store.write(lambda t: t.put_job("J", 1, record.to_json(), finished=False))
    async with running(store, cloud, work, allow=()):
        assert (await closed(store, "J"))["status"] == status
    assert work.runs == []
    assert cloud.status("J") == status
    assert cloud.details("J")["reason_code"] == "not_allowed"


async def test_many_cancels_at_once_leave_one_end_in_the_journal(store):
    cloud, began = JobsService(), asyncio.Event()

    async def act(job):
        began.set()
        await job.cancelled.wait()
        raise FailedError("cancelled", "stopped")

    cloud.create("J", DOCUMENT)
    async with running(store, cloud, Work(act)) as engine:
        await began.wait()
        await asyncio.gather(*(engine.cancel("J") for _ in range(10)))
        record = await closed(store, "J")
        assert (record["phase"], record["status"]) == ("closed", "FAILED")
        for _ in range(20):
            await store.read(lambda t: t.jobs())
        assert (await journal(store, "J"))["phase"] == "closed"


@pytest.mark.parametrize("end", ["CANCELED", "TIMED_OUT"])
async def test_how_the_cloud_ended_a_job_is_known_also_where_a_describe_does_not_tell(store, end):
    cloud, work = JobsService(), Work()
    cloud.create("J", DOCUMENT)
    record = Record("J", 1, 1, Phase.RECEIVED, "restart", {"target": "agent"}, 0.0, queued_at=1.0)
    await store.write(lambda t: t.put_job("J", 1, record.to_json(), finished=False))
    cloud.end("J", end)
    before = dict(cloud.executions[("J", 1)])
    async with running(store, cloud, work):
        assert (await closed(store, "J"))["superseded"] == end
    assert work.runs == []
    assert cloud.executions[("J", 1)] == before
