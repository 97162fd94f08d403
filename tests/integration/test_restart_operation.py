"""Operation `restart`: the proof of the agent's own, and the wait for other changes."""

import asyncio

import pytest

from agent.errors import FailedError, RefusedError
from agent.jobs.operations.restart import Restart


class Job:
    id = "job-1"

    def __init__(self, target, progress=None):
        self.document = {"target": target}
        self.progress = progress or {}
        self.cancelled = asyncio.Event()

    async def save(self, progress, message):
        self.progress = progress


def build(lock=None, instance="one", wrong=None):
    calls = []

    def check_settings():
        if wrong:
            raise wrong

    async def restart_pipeline():
        calls.append("pipeline")

    operation = Restart(
        instance=instance,
        restart_agent=lambda: calls.append("agent"),
        check_settings=check_settings,
        targets={"pipeline": restart_pipeline},
        mutation_lock=lock or asyncio.Lock(),
    )
    return operation, calls


async def test_a_target_is_restarted_and_an_unknown_one_refused():
    operation, calls = build()
    assert (await operation.run(Job("pipeline")))["message"] == "pipeline was restarted"
    assert calls == ["pipeline"]
    with pytest.raises(RefusedError, match="printer"):
        operation.check({"target": "printer"})


async def test_a_restart_of_a_target_that_was_cut_is_not_done_twice():
    operation, calls = build()
    with pytest.raises(FailedError) as caught:
        await operation.run(Job("pipeline", {"restarting": "pipeline"}))
    assert caught.value.code == "interrupted"
    assert calls == []


async def test_an_agent_that_could_not_start_again_is_not_restarted():
    wrong = RefusedError("settings_invalid", "the agent could not start again: agent.toml: …")
    operation, calls = build(wrong=wrong)
    with pytest.raises(RefusedError):
        operation.check({"target": "agent"})
    operation.check({"target": "pipeline"})
    with pytest.raises(RefusedError):
        await operation.run(Job("agent"))
    assert calls == []


async def test_the_agents_restart_is_proven_by_another_instance():
    operation, calls = build()
    job = Job("agent")
    task = asyncio.create_task(operation.run(job))
    while not calls:
        await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    successor, again = build(instance="two")
    assert (await successor.run(Job("agent", job.progress)))["message"] == "the agent was restarted"
    assert again == []


async def test_it_waits_for_another_change_and_a_cancel_ends_the_wait():
    lock = asyncio.Lock()
    operation, calls = build(lock)
    await lock.acquire()
    waiting, cancelled = Job("pipeline"), Job("pipeline")
    tasks = [asyncio.create_task(operation.run(job)) for job in (waiting, cancelled)]
    await asyncio.sleep(0)
    cancelled.cancelled.set()
    with pytest.raises(FailedError) as caught:
        await tasks[1]
    assert caught.value.code == "cancelled"
    assert calls == []
    lock.release()
    await tasks[0]
    assert calls == ["pipeline"]
    assert not lock.locked()


async def test_a_lock_that_comes_together_with_the_end_of_the_task_is_given_back():
    for ticks in range(6):
        lock = asyncio.Lock()
        operation, _ = build(lock)
        await lock.acquire()
        task = asyncio.create_task(operation.run(Job("pipeline")))
        await asyncio.sleep(0)
        lock.release()
        for _ in range(ticks):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        await asyncio.sleep(0)
        assert not lock.locked(), f"{ticks} turns of the loop after the release"


async def test_the_plan():
    operation, calls = build()
    assert await operation.plan({"target": "agent"}) == ["restart the agent", "succeed when its successor has started"]
    assert (await operation.plan({"target": "pipeline"}))[-1] == "restart pipeline"
    assert calls == []
