"""A thread that hangs is left by `leavable` and waited for by `to_end`."""

import asyncio
import threading
import time

import pytest

from agent.host import threads
from agent.host.threads import leavable, to_end

LIMIT_S = 30


def add(first, second=0):
    return first + second


def fail():
    raise KeyError("of the work")


@pytest.mark.parametrize("run", [leavable, to_end])
async def test_results_and_errors_come_back(run):
    assert await run(add, 1, second=2) == 3
    with pytest.raises(KeyError, match="of the work"):
        await run(fail)


async def test_a_cancelled_caller_leaves_a_thread_that_hangs(monkeypatch):
    monkeypatch.setattr(threads, "LEAVE_AFTER_S", 0.05)
    begun, release = threading.Event(), threading.Event()

    def hang():
        begun.set()
        release.wait(LIMIT_S)

    task = asyncio.create_task(leavable(hang))
    await asyncio.to_thread(begun.wait, LIMIT_S)
    left = time.monotonic()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert time.monotonic() - left < LIMIT_S / 2
    (hanging,) = [thread for thread in threading.enumerate() if thread.name == "leavable"]
    assert hanging.daemon
    release.set()


async def test_a_cancelled_caller_waits_for_the_end_of_what_writes():
    begun, release, ended = threading.Event(), threading.Event(), threading.Event()

    def write():
        begun.set()
        release.wait(LIMIT_S)
        ended.set()

    task = asyncio.create_task(to_end(write))
    await asyncio.to_thread(begun.wait, LIMIT_S)
    task.cancel()
    await asyncio.sleep(0.05)
    assert not task.done()
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended.is_set()
