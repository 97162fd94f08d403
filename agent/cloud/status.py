"""The present state of the connection, and who is told of every new one."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from agent.cloud.offline import Link
from agent.logs import get_logger

log = get_logger("cloud")


class Status:
    """Holds `link`; a listener that fails harms nobody."""

    def __init__(self) -> None:
        self.link = Link(since=time.time(), since_monotonic=time.monotonic())
        self._listeners: list[Callable[[Link], None]] = []

    def listen(self, callback: Callable[[Link], None]) -> None:
        """Call `callback` with every new state."""
        self._listeners.append(callback)

    def set(self, state: Literal["connected", "connecting", "offline", "stopped"], **changes: Any) -> None:
        """Go to `state`; code, reason and hint are kept only while the camera connects after a failure."""
        goes_on = (state == "connected") == (self.link.state == "connected")
        begins = {} if goes_on else {"since": time.time(), "since_monotonic": time.monotonic()}
        cleared = {} if state == "connecting" and goes_on else {"code": "", "reason": "", "hint": ""}
        self.note(**{**cleared, **begins, **changes}, state=state)

    def note(self, **changes: Any) -> None:
        """Change some of it, and keep the rest."""
        link = replace(self.link, **changes)
        if link == self.link:
            return
        self.link = link
        for callback in self._listeners:
            try:
                callback(link)
            except Exception:
                log.exception("a listener for the connection's state failed")
