"""Operation `reboot`: the camera itself. Another boot id is the proof that it happened, and then it is never repeated."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agent.errors import FailedError
from agent.jobs.operations.execution import Job, alone

DOWN_LIMIT_S = 300.0
"""How long the machine may take to go down; systemd gives each unit 90 s to stop."""
MAX_ATTEMPTS = 3
"""How often a reboot is asked for that has not come, each time after a restart of the agent alone."""


class Reboot:
    """Reboots the camera once nothing is on trial (`mutation_lock`).

    `boot_id` is the kernel's id of this boot; `reboot` asks for the reboot, returns when asked, and raises FailedError.
    """

    name = "reboot"

    def __init__(self, boot_id: str, reboot: Callable[[], Awaitable[None]], mutation_lock: asyncio.Lock) -> None:
        self._boot_id = boot_id
        self._reboot = reboot
        self._mutation_lock = mutation_lock

    def check(self, document: Mapping[str, Any]) -> None:
        """Nothing in its document can be refused."""

    async def plan(self, document: Mapping[str, Any]) -> list[str]:  # noqa: ARG002
        """What `run` would do, in words."""
        return [
            "wait until no update or configuration is on trial",
            "reboot the camera",
            "succeed when the agent has started again and the kernel's boot id has changed",
        ]

    async def run(self, job: Job) -> dict[str, str]:
        before = job.progress.get("boot_id", self._boot_id)
        if before != self._boot_id:
            return {"message": f"the camera was rebooted, its boot id went from {before} to {self._boot_id}"}
        attempt = next_attempt(job.progress)
        async with alone(job, self._mutation_lock):
            await job.save({"boot_id": self._boot_id, "attempt": attempt}, "rebooting the camera")
            await self._reboot()
            await wait_until_down()
        raise AssertionError


def next_attempt(progress: Mapping[str, Any]) -> int:
    """The number of the attempt after those in `progress`. Raises FailedError after the last."""
    attempt: int = progress.get("attempt", 0) + 1
    if attempt > MAX_ATTEMPTS:
        raise FailedError(
            "reboot_failed",
            f"the camera did not reboot in {MAX_ATTEMPTS} attempts; each time only the agent was started again",
            "look for the reason in `journalctl -u camera-agent -u systemd-logind`",
        )
    return attempt


async def wait_until_down() -> None:
    """Wait for the end of this process after a reboot was asked for; a cancel comes too late now.

    Raises FailedError `reboot_failed` when the machine has not gone down in time.
    """
    await asyncio.sleep(DOWN_LIMIT_S)
    raise FailedError(
        "reboot_failed",
        f"the camera did not go down within {DOWN_LIMIT_S:g} s after it was asked to",
        "see `systemctl list-jobs` and `systemd-inhibit --list`",
    )
