"""Reboots of the camera that a change needs: at most one in ten minutes, whatever asks for them, so that no fault becomes a loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from agent.errors import FailedError, StoreError
from agent.store import Store

SPACING_S = 600.0
FACT = "updates.reboot"
DOWN_LIMIT_S = 300.0
"""How long the machine may take to go down after it was asked to."""


def uptime_s() -> float:
    """Seconds since this boot, sleep included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Reboots:
    """`boot_id` is the kernel's id of this boot; `reboot` asks for a reboot and returns when asked, None: there is no way to."""

    def __init__(
        self,
        store: Store,
        boot_id: str,
        reboot: Callable[[], Awaitable[None]] | None,
        uptime_s: Callable[[], float] = uptime_s,
    ) -> None:
        self._store, self._boot_id, self._reboot, self._uptime_s = store, boot_id, reboot, uptime_s

    async def spacing_s(self) -> float:
        """Seconds until a reboot may come: when this boot came of a reboot of ours, it must be ten minutes old."""
        asked = await self._store.read(lambda t: t.fact(FACT))
        ours = isinstance(asked, dict) and asked.get("boot_id") not in (None, self._boot_id)
        return max(0.0, SPACING_S - self._uptime_s()) if ours else 0.0

    async def reboot(self, tell: Callable[[str], None] = lambda _: None, *, recorded: bool = True) -> None:
        """Wait until one may come, saying so by `tell`, and reboot; never returns.

        Not `recorded`: also when the store takes nothing. Raises FailedError `reboot_failed`, StoreError.
        """
        if self._reboot is None:
            raise FailedError("reboot_failed", "this agent has no way to reboot the camera")
        while (left := await self.spacing_s()) > 0:
            tell(spacing_words(left))
            await asyncio.sleep(min(left, 10.0))
        try:
            await self._store.write(lambda t: t.set_fact(FACT, {"boot_id": self._boot_id}))
        except StoreError:
            if recorded:
                raise
        await self._reboot()
        await asyncio.sleep(DOWN_LIMIT_S)
        raise FailedError(
            "reboot_failed",
            f"the camera did not go down within {DOWN_LIMIT_S:g} s after it was asked to",
            "see `systemctl list-jobs` and `systemd-inhibit --list`",
        )


def spacing_words(left_s: float) -> str:
    """Why a reboot waits."""
    return f"the last reboot was just now, the next may come in {left_s:.0f} s"
