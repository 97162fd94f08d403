"""Operation `restart`: the agent itself, or the program of an update target."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agent.errors import FailedError, RefusedError
from agent.jobs.operations.execution import Job, alone


class Restart:
    """`instance` names this run of the agent: a different one after the restart is the proof that it happened.

    A target is not restarted while an update or a configuration is on trial (`mutation_lock`): the gap in its images
    would be laid at their door.

    `check_settings` raises RefusedError when the agent could not start again with the agent.toml that is there now.
    """

    name = "restart"

    def __init__(
        self,
        *,
        instance: str,
        restart_agent: Callable[[], None],
        check_settings: Callable[[], None],
        targets: Mapping[str, Callable[[], Awaitable[None]]],
        mutation_lock: asyncio.Lock,
    ) -> None:
        self._instance = instance
        self._restart_agent = restart_agent
        self._check_settings = check_settings
        self._targets = targets
        self._mutation_lock = mutation_lock

    def check(self, document: Mapping[str, Any]) -> None:
        target = document["target"]
        if target != "agent" and target not in self._targets:
            known = ", ".join(["agent", *self._targets])
            raise RefusedError("unknown_target", f"target: {target!r} can't be restarted here", f"use one of {known}")
        if target == "agent":
            self._check_settings()

    async def plan(self, document: Mapping[str, Any]) -> list[str]:
        """What `run` would do, in words."""
        if document["target"] == "agent":
            return ["restart the agent", "succeed when its successor has started"]
        return ["wait until no update or configuration is on trial", f"restart {document['target']}"]

    async def run(self, job: Job) -> dict[str, str]:
        target = job.document["target"]
        if target != "agent":
            if "restarting" in job.progress:
                raise FailedError(
                    "interrupted", f"the agent was restarted while {target} was; it is not done a second time"
                )
            async with alone(job, self._mutation_lock):
                await job.save({"restarting": target}, f"restarting {target}")
                await self._targets[target]()
            return {"message": f"{target} was restarted"}
        before = job.progress.get("instance")
        if before is None or before == self._instance:
            await asyncio.to_thread(self._check_settings)  # it may have been edited meanwhile
            await job.save({"instance": self._instance}, "restarting the agent")
            self._restart_agent()
            await asyncio.Event().wait()  # ends with this process
        return {"message": "the agent was restarted"}
