"""A change of the fleet layer that a job asks for, until it is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from agent.config.desired import Problem, digest, few
from agent.config.layers import InForce, hidden
from agent.config.records import Outcome


@dataclass(eq=False)
class Request:
    """A JSON Merge Patch of the fleet layer, or with `whole` what it is to be, for a job execution; `tell` takes words on its progress."""

    job: str
    patch: Mapping[str, Any]
    whole: bool
    cancelled: asyncio.Event
    tell: Callable[[str], None]
    _outcome: asyncio.Future[Outcome] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    async def answered(self, on_cancel: Callable[[], None]) -> Outcome:
        """What became of it; `on_cancel` is called when the job is cancelled meanwhile."""
        cancel = asyncio.create_task(self.cancelled.wait())
        cancel.add_done_callback(lambda task: None if task.cancelled() else on_cancel())
        try:
            return await asyncio.shield(self._outcome)
        finally:
            cancel.cancel()

    def answer(self, outcome: Outcome) -> None:
        """Say what became of it."""
        if not self._outcome.done():
            self._outcome.set_result(outcome)

    def reject(self, *problems: Problem) -> None:
        """Say why nothing was done."""
        self.answer(Outcome(self.job, self.digest, "rejected", problems))

    def told(self, outcome: Outcome, good: InForce) -> Outcome:
        """`outcome` with what of it is not in force."""
        if outcome.state != "applied":
            return outcome
        return replace(outcome, problems=tuple(few(hidden(self.patch, good.shadow))))

    @property
    def digest(self) -> str:
        """Of what is asked for: another document under the same name is another request."""
        return digest([self.patch, self.whole])

    @property
    def is_answered(self) -> bool:
        return self._outcome.done()
