"""Log lines that others can cause in masses: at most one a minute of each kind, with the number of those left out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from agent.logs import Logger

EVERY_S = 60.0


class Seldom:
    """Warnings through `log`; the event's text is the kind. `clock` gives monotonic seconds."""

    def __init__(self, log: Logger, clock: Callable[[], float] = time.monotonic) -> None:
        self._log = log
        self._clock = clock
        self._said: dict[str, tuple[float, int]] = {}

    def warning(self, event: str, **facts: Any) -> None:
        """Log as log.warning() does, or count only; `exc_info=True` adds the present exception."""
        now = self._clock()
        at, left_out = self._said.get(event, (float("-inf"), 0))
        if now - at < EVERY_S:
            self._said[event] = (at, left_out + 1)
            return
        self._said[event] = (now, 0)
        self._log.warning(event, **facts, **({"left_out": left_out} if left_out else {}))
