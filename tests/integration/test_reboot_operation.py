"""Reboots, as an operation and as what a step asks for: proven by the boot id, never repeated, never in the middle of a trial."""

import asyncio
import contextlib
import itertools

import pytest

from agent.errors import FailedError
from agent.jobs import conversation
from agent.jobs import engine as engine_module
from agent.jobs.engine import Engine
from agent.jobs.operations import reboot as reboot_module
from agent.jobs.operations.reboot import MAX_ATTEMPTS, Reboot
from agent.store import Store
from tests.fakes import TERMINAL, JobsService
from tests.integration.steps import Handlers, Job, Machine, command, document, operation, step
from tests.places import own_folder

DOCUMENT = {"version": "1.0", "operation": "reboot"}
REFUSED = FailedError("reboot_failed", "systemd-logind refused the reboot", "ask polkit")


@pytest.fixture
def handlers(tmp_path):
    with own_folder() as folder:
        (folder / "handlers").mkdir(mode=0o755)
        add = Handlers(folder / "handlers")
        add("reboot.sh", f"echo reboot >> {tmp_path}/log; echo out; exit 194\n")
        add("note.sh", f"echo $2 >> {tmp_path}/log\n")
        yield add


def build(boot_id="boot-1", machine=None, lock=None):
    return Reboot(boot_id, (machine or Machine()).reboot, lock or asyncio.Lock())


async def until_asked(run, job, machine):
    """Run until the machine was asked for a reboot, and end the agent there."""
    task = asyncio.create_task(run(job))
    asked = asyncio.create_task(machine.asked.wait())
    await asyncio.wait({task, asked}, return_when=asyncio.FIRST_COMPLETED)
    assert not task.done(), task.result()
    task.cancel()
    await asyncio.wait({task})


# ---- the operation


@pytest.mark.conformance("C-JOBS-26")
async def test_it_succeeds_only_with_another_boot_id_and_is_not_repeated():
    machine, job = Machine(), Job(DOCUMENT)
    await until_asked(build(machine=machine).run, job, machine)
    assert job.progress["boot_id"] == "boot-1"
    assert machine.times == 1
    details = await build("boot-2", machine).run(job)
    assert "boot-1 to boot-2" in details["message"]
    assert machine.times == 1


@pytest.mark.conformance("C-JOBS-26")
async def test_with_the_same_boot_id_it_is_asked_for_again_but_not_for_ever():
    machine, job = Machine(), Job(DOCUMENT)
    for _ in range(MAX_ATTEMPTS):
        machine.asked.clear()
        await until_asked(build(machine=machine).run, job, machine)
    with pytest.raises(FailedError) as caught:
        await build(machine=machine).run(job)
    assert caught.value.code == "reboot_failed"
    assert machine.times == MAX_ATTEMPTS


async def test_progress_is_durable_before_the_reboot_is_asked_for():
    job = Job(DOCUMENT)
    kept = []

    async def reboot():
        kept.append(dict(job.progress))
        raise REFUSED

    with pytest.raises(FailedError):
        await Reboot("boot-1", reboot, asyncio.Lock()).run(job)
    assert [k["boot_id"] for k in kept] == ["boot-1"]


async def test_a_machine_that_stays_up_fails_the_job(monkeypatch):
    monkeypatch.setattr(reboot_module, "DOWN_LIMIT_S", 0.05)
    lock = asyncio.Lock()
    with pytest.raises(FailedError, match="did not go down within") as caught:
        await build(lock=lock).run(Job(DOCUMENT))
    assert caught.value.code == "reboot_failed"
    assert not lock.locked()


async def test_a_refusal_fails_the_job():
    lock = asyncio.Lock()
    with pytest.raises(FailedError) as caught:
        await build(machine=Machine(REFUSED), lock=lock).run(Job(DOCUMENT))
    assert caught.value is REFUSED
    assert not lock.locked()


async def test_it_waits_for_a_trial_to_end_and_holds_off_others():
    machine, lock, job = Machine(), asyncio.Lock(), Job(DOCUMENT)
    await lock.acquire()
    task = asyncio.create_task(build(machine=machine, lock=lock).run(job))
    for _ in range(20):
        await asyncio.sleep(0)
    assert (machine.times, job.progress) == (0, {})
    lock.release()
    await machine.asked.wait()
    assert lock.locked()
    task.cancel()
    await asyncio.wait({task})
    assert not lock.locked()


async def test_a_cancel_ends_the_wait_for_a_trial():
    machine, lock, job = Machine(), asyncio.Lock(), Job(DOCUMENT)
    await lock.acquire()
    task = asyncio.create_task(build(machine=machine, lock=lock).run(job))
    await asyncio.sleep(0)
    job.cancelled.set()
    with pytest.raises(FailedError) as caught:
        await task
    assert (caught.value.code, machine.times) == ("cancelled", 0)
    lock.release()
    async with asyncio.timeout(5), lock:
        pass


async def test_a_cancel_after_it_was_asked_for_comes_too_late_for_the_truth():
    machine, job = Machine(), Job(DOCUMENT)
    task = asyncio.create_task(build(machine=machine).run(job))
    await machine.asked.wait()
    job.cancelled.set()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    await asyncio.wait({task})
    assert "boot-2" in (await build("boot-2", machine).run(job))["message"]
    with pytest.raises(FailedError) as caught:  # but after a restart of the agent alone it is not asked for again
        await build(machine=machine).run(job)
    assert (caught.value.code, machine.times) == ("cancelled", 1)


async def test_the_plan():
    assert await build().plan(Job(DOCUMENT).document) == [
        "wait until no update or configuration is on trial",
        "reboot the camera",
        "succeed when the agent has started again and the kernel's boot id has changed",
    ]


# ---- a step that ends with 194


@pytest.mark.conformance("C-JOBS-26")
async def test_after_the_reboot_the_next_step_runs_and_no_step_twice(handlers, tmp_path):
    machine = Machine()
    doc = document(step("note.sh", "a"), step("reboot.sh"), step("note.sh", "b"), finalStep=step("note.sh", "end"))
    job = Job(doc)
    await until_asked(operation(handlers, machine=machine).run, job, machine)
    kept = {key: job.progress[key] for key in ("step", "rebooting", "boot_id", "left_s")}
    assert kept == {"step": 1, "rebooting": True, "boot_id": "boot-1", "left_s": None}
    details = await operation(handlers, boot_id="boot-2", machine=machine).run(job)
    assert (tmp_path / "log").read_text() == "a\nreboot\nb\nend\n"
    assert details["message"] == "4 of 4 steps done; the camera was rebooted after step reboot.sh"
    assert machine.times == 1


async def test_a_reboot_as_the_last_step_reports_what_the_step_printed(handlers):
    for doc in (
        document(step("reboot.sh"), includeStdOut=True),
        document(step("note.sh"), finalStep=step("reboot.sh"), includeStdOut=True),
    ):
        machine, job = Machine(), Job(doc)
        await until_asked(operation(handlers, machine=machine).run, job, machine)
        details = await operation(handlers, boot_id="boot-2", machine=machine).run(job)
        assert (details["step"], details["exit_code"], details["stdout"]) == ("reboot.sh", "194", "out")


async def test_the_same_boot_id_asks_again_but_not_for_ever(handlers, tmp_path):
    machine, job = Machine(), Job(document(step("reboot.sh"), step("note.sh", "b")))
    for _ in range(MAX_ATTEMPTS):
        machine.asked.clear()
        await until_asked(operation(handlers, machine=machine).run, job, machine)
    with pytest.raises(FailedError) as caught:
        await operation(handlers, machine=machine).run(job)
    assert (caught.value.code, machine.times) == ("reboot_failed", MAX_ATTEMPTS)
    assert caught.value.details["step"] == "reboot.sh"
    assert (tmp_path / "log").read_text() == "reboot\n"


@pytest.mark.parametrize("ignore", [False, True])
async def test_only_when_the_policy_allows_reboots(handlers, tmp_path, ignore):
    machine, job = Machine(), Job(document(step("reboot.sh", ignoreStepFailure=ignore), step("note.sh", "b")))
    steps = operation(handlers, machine=machine, allow=["run"])
    if ignore:
        details = await steps.run(job)
        assert "failure ignored as asked: reboot.sh (step 'reboot.sh' asks for a reboot" in details["message"]
    else:
        with pytest.raises(FailedError) as caught:
            await steps.run(job)
        assert caught.value.code == "reboot_denied"
        assert "jobs.allow" in caught.value.hint
    assert machine.times == 0
    assert (tmp_path / "log").read_text() == ("reboot\nb\n" if ignore else "reboot\n")


async def test_a_command_may_not_ask_for_it(handlers):
    machine = Machine()
    with pytest.raises(FailedError, match="exit status 194"):
        await operation(handlers, machine=machine, commands="allow").run(
            Job(document(command(f"{handlers.folder}/reboot.sh")))
        )
    assert machine.times == 0


async def test_ignoring_failures_does_not_ignore_the_wish_for_a_reboot(handlers, tmp_path):
    machine, job = Machine(), Job(document(step("reboot.sh", ignoreStepFailure=True), step("note.sh", "b")))
    await until_asked(operation(handlers, machine=machine).run, job, machine)
    assert (tmp_path / "log").read_text() == "reboot\n"


async def test_ignored_failures_before_a_reboot_are_told_after_it(handlers):
    handlers("fail.sh", "exit 3\n")
    machine, job = Machine(), Job(document(step("fail.sh", ignoreStepFailure=True), step("reboot.sh")))
    await until_asked(operation(handlers, machine=machine).run, job, machine)
    details = await operation(handlers, boot_id="boot-2").run(job)
    assert "fail.sh (step 'fail.sh': exit status 3)" in details["message"]


@pytest.mark.parametrize("ignore", [False, True])
async def test_a_refused_reboot_may_be_ignored_and_one_that_may_still_come_not(handlers, tmp_path, monkeypatch, ignore):
    doc = document(step("reboot.sh", ignoreStepFailure=ignore), step("note.sh", "b"))
    refused = operation(handlers, machine=Machine(REFUSED)).run(Job(doc))
    if ignore:
        await refused
    else:
        with pytest.raises(FailedError, match="logind refused") as caught:
            await refused
        assert (caught.value.code, caught.value.hint) == ("reboot_failed", "ask polkit")
    monkeypatch.setattr(reboot_module, "DOWN_LIMIT_S", 0.05)
    (tmp_path / "log").unlink()
    with pytest.raises(FailedError, match="did not go down within") as caught:
        await operation(handlers).run(Job(doc))
    assert caught.value.code == "reboot_failed"
    assert (tmp_path / "log").read_text() == "reboot\n", "no step is begun while the camera may go down at any moment"


async def test_the_jobs_time_limit_goes_on_after_the_reboot(handlers, tmp_path):
    handlers("sleep.sh", "sleep 1000\n")
    doc = document(step("reboot.sh"), step("sleep.sh"), timeoutSeconds=3000)
    machine, job = Machine(), Job(doc)
    await until_asked(operation(handlers, machine=machine).run, job, machine)
    assert 0 < job.progress["left_s"] < 3000
    job.progress["left_s"] = 0.3
    with pytest.raises(FailedError) as caught:
        await operation(handlers, boot_id="boot-2").run(job)
    assert caught.value.code == "deadline"
    assert job.messages[-1] == "step 2 of 2: sleep.sh"
    job = Job(doc, {**job.history[1], "left_s": -1.0})
    with pytest.raises(FailedError) as caught:
        await operation(handlers, boot_id="boot-2").run(job)
    assert (caught.value.code, job.history) == ("deadline", [])


async def test_waiting_for_a_trial_ends_with_the_jobs_time_limit_or_a_cancel(handlers):
    machine, lock = Machine(), asyncio.Lock()
    await lock.acquire()
    with pytest.raises(FailedError) as caught:
        await operation(handlers, machine=machine, lock=lock).run(
            Job(document(step("reboot.sh", ignoreStepFailure=True), timeoutSeconds=1))
        )
    assert caught.value.code == "deadline"
    job = Job(document(step("reboot.sh", ignoreStepFailure=True), step("note.sh")))
    task = asyncio.create_task(operation(handlers, machine=machine, lock=lock).run(job))
    while not job.progress.get("rebooting"):
        await asyncio.sleep(0.01)
    job.cancelled.set()
    with pytest.raises(FailedError) as caught:
        await task
    assert (caught.value.code, machine.times) == ("cancelled", 0)


async def test_a_cancel_during_the_reboot_lets_no_further_step_begin(handlers, tmp_path):
    machine, job = Machine(), Job(document(step("reboot.sh"), step("note.sh", "b")))
    await until_asked(operation(handlers, machine=machine).run, job, machine)
    job.cancelled.set()
    with pytest.raises(FailedError) as caught:
        await operation(handlers, boot_id="boot-2", machine=machine).run(job)
    assert caught.value.code == "cancelled"
    assert (tmp_path / "log").read_text() == "reboot\n"


# ---- with the engine and its journal: the agent or the machine ends at every point


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in {"RETRY_S": (0.01, 0.05), "HEARTBEAT_S": 0.02, "NEWS_INTERVAL_S": 0.0, "POLL_S": 0.05}.items():
        monkeypatch.setattr(engine_module, name, value)
    monkeypatch.setattr(conversation, "RETRY_S", (0.01, 0.05))


async def life(folder, cloud, operations, ends):
    """One life of the agent, until `ends` is set or no job is left."""
    store = await Store.open(folder / "state.db")
    engine = Engine(store=store, jobs=cloud, operations={o.name: o for o in operations}, allow=["run", "reboot"])
    task, end = asyncio.create_task(engine.run()), asyncio.create_task(ends.wait())
    try:
        async with asyncio.timeout(30):
            while not end.done() and any(e["status"] not in TERMINAL for e in cloud.executions.values()):
                await asyncio.wait({task, end}, timeout=0.01, return_when=asyncio.FIRST_COMPLETED)
                if task.done():
                    task.result()
    finally:
        for each in (task, end):
            each.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await each
        await store.close()


@pytest.mark.conformance("C-JOBS-26")
async def test_whatever_ends_when_each_job_ends_once_and_each_reboot_happens_once(handlers, tmp_path):
    """Lives of the agent on one boot, as many as stand in the case, and the machine goes down in the last of each boot."""
    tried = 0
    for lives in itertools.product((1, 2, 3), repeat=2):
        for doc in (DOCUMENT, document(step("reboot.sh"), step("note.sh", "b"), finalStep=step("reboot.sh"))):
            folder = tmp_path / str(tried)
            folder.mkdir()
            (tmp_path / "log").unlink(missing_ok=True)
            cloud, asked = JobsService(), []
            cloud.create("j", doc)
            for boot, count in enumerate((*lives, 1)):
                for _ in range(count):
                    machine = Machine()
                    around = (machine.reboot, asyncio.Lock())
                    steps = operation(handlers, boot_id=f"boot-{boot}", machine=machine)
                    await life(folder, cloud, [steps, Reboot(f"boot-{boot}", *around)], machine.asked)
                    asked.append((boot, machine.times))
            assert cloud.status("j") == "SUCCEEDED", cloud.details("j")
            assert sum(status == "SUCCEEDED" for _, status, _ in cloud.updates) == 1
            boots = {boot for boot, times in asked if times}
            assert boots == ({0} if doc is DOCUMENT else {0, 1})
            if doc is not DOCUMENT:
                assert (tmp_path / "log").read_text() == "reboot\nb\nreboot\n"
            tried += 1
    print(f"{tried} orders of restarts of the agent and of the machine tried")
