"""An event loop on which hours pass at once: when nothing is ready, its clock jumps to the next timer.

It waits in truth only for what threads do: while a call to an executor is under way, time stands still.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

EPOCH = 1_767_225_600.0
STUCK_S = 60


class VirtualLoop(asyncio.SelectorEventLoop):
    """`time()` begins at `now` seconds; `in_threads` counts the executor calls that are under way."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self.in_threads = 0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        future = super().run_in_executor(executor, func, *args)
        self.in_threads += 1
        future.add_done_callback(self._back)
        return future

    def _back(self, _: object) -> None:
        self.in_threads -= 1


class _Jumping(selectors.DefaultSelector):
    """Moves the loop's clock instead of waiting."""

    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if self._loop.in_threads and timeout != 0:
            ready = super().select(STUCK_S)
            assert ready, "a thread does not come back"
            return ready
        ready = super().select(0)
        if not ready and timeout is None:
            raise RuntimeError("nothing will ever happen any more")
        if not ready and timeout:
            self._loop.now += timeout
        return ready


class Clock:
    """Stands in for the module `time` where an agent's module looks at it.

    `monotonic` follows the loop; `time` is `offset` seconds ahead of it, which a test may change: the wall clock jumps.
    """

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self.offset = EPOCH

    def monotonic(self) -> float:
        return self._loop.now

    def time(self) -> float:
        return self._loop.now + self.offset


@contextlib.contextmanager
def virtual_time(monkeypatch: Any, *modules: ModuleType) -> Iterator[tuple[asyncio.Runner, Clock]]:
    """A runner whose loop is virtual, and the clock that `modules` see."""
    loop = VirtualLoop()
    clock = Clock(loop)
    for module in modules:
        monkeypatch.setattr(module, "time", clock)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        yield runner, clock
