"""An event loop on which waiting costs no time: when only timers are left to wait for, its clock jumps to the next one.

Work in threads takes the time that it takes. Real constants can be tested so, and hours pass in milliseconds.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class SkippingLoop(asyncio.SelectorEventLoop):
    """Not for tests with sockets: their bytes would come after all timers."""

    def __init__(self) -> None:
        super().__init__(_Selector(self))
        self.skipped_s = 0.0
        self.in_threads = 0

    def time(self) -> float:
        return super().time() + self.skipped_s

    def run_in_executor(self, executor: Any, function: Any, *arguments: Any) -> asyncio.Future[Any]:
        future = super().run_in_executor(executor, function, *arguments)
        self.in_threads += 1
        future.add_done_callback(self._back)
        return future

    def _back(self, _: Any) -> None:
        self.in_threads -= 1


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    def __init__(self, loop: SkippingLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None or timeout <= 0 or self._loop.in_threads:
            return super().select(timeout)
        events = super().select(0)
        if not events:
            self._loop.skipped_s += timeout
        return events


def run(main: Coroutine[Any, Any, T]) -> T:
    """Like asyncio.run, on a SkippingLoop."""
    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        return runner.run(main)
