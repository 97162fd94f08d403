"""Supervised tasks: one that fails or ends starts again without harm to its neighbours; a vital one ends the process."""

import asyncio

import pytest

from agent import supervise
from agent.supervise import VitalTaskError, restarting, vital


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(supervise, "BACKOFF_S", (0.001, 0.004))


class Task:
    """Fails, or just ends, each time that it is run."""

    def __init__(self, error=None):
        self.error = error
        self.runs = 0
        self.again = asyncio.Event()

    async def run(self):
        self.runs += 1
        if self.runs == 5:
            self.again.set()
        if self.error:
            raise self.error


@pytest.mark.conformance("F-14")
@pytest.mark.parametrize(
    "error",
    [ZeroDivisionError("a bug"), OSError("a disk"), TimeoutError(), ExceptionGroup("two", [ValueError()]), None],
)
async def test_a_task_that_fails_starts_again_and_the_others_do_not_notice(error):
    failing, healthy = Task(error), asyncio.Event()

    async def neighbour():
        await failing.again.wait()
        healthy.set()
        await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(restarting("failing", failing.run)), group.create_task(vital("other", neighbour))]
        async with asyncio.timeout(20):
            await healthy.wait()
        assert not any(task.done() for task in tasks)
        for task in tasks:
            task.cancel()
    assert failing.runs >= 5


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), None])
async def test_a_vital_task_that_ends_is_told(error):
    task = Task(error)
    with pytest.raises(VitalTaskError, match="loop") as raised:
        await vital("loop", task.run)
    assert raised.value.__cause__ is error
    assert task.runs == 1
