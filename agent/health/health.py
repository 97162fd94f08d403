"""The machine's health: one round of metrics every few seconds, and the conditions that follow from it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from agent.health.collectors import Collectors
from agent.health.conditions import Conditions
from agent.health.machine_conditions import MACHINE_RULES, observe_machine

ROUND_S = 10.0


class Health:
    """`certificate_not_after` answers in epoch seconds, None while there is no certificate; `on_event` gets each change."""

    def __init__(
        self,
        state_dir: Path,
        directories: Iterable[Path],
        *,
        certificate_not_after: Callable[[], float | None],
        on_event: Callable[[dict[str, Any]], None],
    ) -> None:
        self._collectors = Collectors(state_dir, directories)
        self._conditions = Conditions(MACHINE_RULES)
        self._certificate_not_after = certificate_not_after
        self._on_event = on_event
        self.values: dict[str, float] = {}
        """The latest metrics by their flat names; empty before the first round."""

    async def run(self) -> None:
        """Look at the machine every few seconds until cancelled."""
        while True:
            self.values = await asyncio.to_thread(self._collectors.collect)
            at = time.time()
            observations = observe_machine(self.values, at=at, certificate_not_after=self._certificate_not_after())
            for event in self._conditions.observe(observations, now=time.monotonic(), at=at):
                self._on_event(event)
            await asyncio.sleep(ROUND_S)

    def conditions(self) -> list[dict[str, Any]]:
        """The machine's conditions that are set, the gravest first."""
        return self._conditions.current()
