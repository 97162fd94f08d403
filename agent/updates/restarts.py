"""Making a switched version run: the unit of the target, the whole camera, or the agent itself; and knowing when that has happened.

A restart of the camera or of the agent ends this process: it has happened when another boot id or another instance is
seen than the one that was saved before it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from agent.errors import FailedError
from agent.reboots import Reboots, uptime_s
from agent.settings import UpdateTarget
from agent.store import Store
from agent.updates.gate import Units
from agent.updates.preflight import restart_target

DOWN_LIMIT_S = 300.0
"""How long this process may take to end after it was asked to."""

Kind = Literal["none", "unit", "reboot", "agent"]


@dataclass(frozen=True)
class Restarter:
    """How things are restarted on this camera, and what differs after a restart: the kernel's boot id, this process's instance."""

    units: Units | None
    boot_id: str
    instance: str = ""
    reboot: Callable[[], Awaitable[None]] | None = None
    """Asks for a reboot; returns when asked."""
    restart_agent: Callable[[], None] | None = None
    """Makes this process end and its successor begin."""
    uptime_s: Callable[[], float] = uptime_s


def kind_of(target: UpdateTarget, restart: Literal["none", "unit", "reboot"]) -> Kind:
    """What has to be restarted for a target whose manifest says `restart`."""
    return "agent" if target.installer == "agent" and restart == "unit" else restart


class Restarts:
    """The restarts of one change of a target; `tell` takes words on what a restart waits for."""

    def __init__(
        self, kind: Kind, target: UpdateTarget, by: Restarter, store: Store, tell: Callable[[str], None]
    ) -> None:
        self.kind = kind
        self._target = target
        self._by = by
        self._reboots = Reboots(store, by.boot_id, by.reboot, by.uptime_s)
        self._tell = tell

    @property
    def ends_process(self) -> bool:
        """Whether the restart ends this process, so that a successor has to go on."""
        return self.kind in ("reboot", "agent")

    def now(self) -> dict[str, str]:
        """What will differ after a restart."""
        return {"boot_id": self._by.boot_id, "instance": self._by.instance}

    def happened(self, saved: dict[str, Any] | None) -> bool:
        """Whether the restart has happened since `saved`, what `now` was then. A boot starts everything."""
        if not saved:
            return False
        if saved.get("boot_id") != self._by.boot_id:
            return True
        return self.kind == "agent" and saved.get("instance") != self._by.instance

    async def restart(self, *, recorded: bool = True) -> None:
        """Restart it. Returns only when this process goes on. Not `recorded`: also when the store takes nothing. Raises FailedError."""
        if self.kind == "reboot":
            await self._reboots.reboot(self._tell, recorded=recorded)
        elif self.kind == "agent":
            await self._restart_agent()
        elif self.kind == "unit":
            await restart_target(self._target, self._by.units)

    async def _restart_agent(self) -> None:
        if self._by.restart_agent is None:
            raise FailedError("restart_failed", "this agent has no way to restart itself")
        self._by.restart_agent()
        await asyncio.sleep(DOWN_LIMIT_S)
        raise FailedError("restart_failed", f"the agent did not end within {DOWN_LIMIT_S:g} s to start anew")

    async def spacing_s(self) -> float:
        """Seconds until a reboot may come."""
        return await self._reboots.spacing_s()
