"""The versions that really run, in the reserved shadow `$package` that AWS IoT's software package catalog reads.

AWS writes that shadow itself when a job succeeds, and can't know what was taken back or installed by hand: so the camera
reports at each start and after each update. A package has the keys `version` and `attributes` there and no others.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from agent.errors import CloudError
from agent.logs import get_logger
from agent.store import Store

SHADOW = "$package"
KNOWN = "updates.packages_reported"
RETRY_S = (5.0, 3600.0)
log = get_logger("updates")


class Packages:
    """`versions` gives what runs as package → version; `report` merges into the shadow, None removing a key."""

    def __init__(
        self,
        store: Store,
        *,
        versions: Callable[[], Mapping[str, str]],
        changed: asyncio.Event,
        report: Callable[[dict[str, Any]], Awaitable[int]],
        wait_online: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._versions = versions
        self._changed = changed
        self._report = report
        self._wait_online = wait_online

    async def run(self) -> None:
        """Report now and whenever `changed` is set, until cancelled."""
        while True:
            self._changed.clear()
            bringing = asyncio.create_task(self._bring(packages(self._versions())))
            changed = asyncio.create_task(self._changed.wait())
            try:
                await asyncio.wait({bringing, changed}, return_when=asyncio.FIRST_COMPLETED)
                if bringing.done():
                    bringing.result()
                    await changed
            finally:
                for task in (bringing, changed):
                    task.cancel()
                await asyncio.wait({bringing, changed})

    async def _bring(self, wanted: dict[str, Any]) -> None:
        known = await self._store.read(lambda t: t.fact(KNOWN, []))
        vanished = {name: None for name in known if name not in wanted}
        # Remembered before it is told: a name must not stay in the shadow because power failed in between.
        await self._store.write(lambda t: t.set_fact(KNOWN, sorted({*known, *wanted})))
        delay = RETRY_S[0]
        while True:
            await self._wait_online()
            try:
                await self._report({**vanished, **wanted})
                break
            except CloudError as error:
                level = log.debug if error.retryable else log.warning
                level("the shadow $package was not updated", code=error.code, reason=error.message)
                if not error.retryable:
                    return
            await asyncio.sleep(random.uniform(0.5, 1) * delay)  # noqa: S311  jitter
            delay = min(2 * delay, RETRY_S[1])
        await self._store.write(lambda t: t.set_fact(KNOWN, sorted(wanted)))


def packages(versions: Mapping[str, str]) -> dict[str, Any]:
    """What the shadow says of `versions`; what AWS would not take as a name or version is left out."""
    fits = re.compile(r"[a-zA-Z0-9_.-]+").fullmatch
    return {
        name: {"version": version, "attributes": {}}
        for name, version in versions.items()
        if fits(name) and fits(version) and len(name) <= 128 and len(version) <= 64
    }
