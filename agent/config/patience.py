"""Waiting until a change may begin: its maintenance window, the apply lock, and a picture of the images before it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Protocol

HELD_LOOK_S = 10.0
"""What holds a change is looked at again after so long at the latest."""
IMAGES = "images"


class Hold(Protocol):
    """Something a change has to wait for: a stable code, and words."""

    @property
    def code(self) -> str: ...
    @property
    def words(self) -> str: ...
    @property
    def look_again_s(self) -> float: ...


async def unheld(_: str) -> None:
    """Nothing holds a change."""


class Patience:
    """Waits while nothing is locked; `wake` ends a wait, since something newer may be wanted then.

    `hold` says what a change, named by its argument, has to wait for; `settled` returns when there is a reference of the
    images; `announce` is awaited when the kind of wait changes; `waits_for` is in words, empty when nothing waits.
    """

    def __init__(
        self,
        hold: Callable[[str], Awaitable[Hold | None]],
        settled: Callable[[], Awaitable[None]],
        wake: asyncio.Event,
        announce: Callable[[], Awaitable[None]],
    ) -> None:
        self._hold, self._settled, self._wake, self._announce = hold, settled, wake, announce
        self._code = ""
        self.waits_for = ""

    async def may_begin(self, subject: str, *, images: bool, tell: Callable[[str], None]) -> bool:
        """Wait for all of it, with a reference where `images`; False when something newer may be wanted by now."""
        while hold := await self._hold(subject):
            await self.say(hold.code, hold.words, tell)
            if await self._woken_within(min(hold.look_again_s, HELD_LOOK_S)):
                return False
        if images:
            await self.say(IMAGES, "watching the images before the change", tell)
            if not await self._reference():
                return False
        self.over()
        return True

    def over(self) -> None:
        """Nothing waits any more."""
        self._code = self.waits_for = ""

    async def say(self, code: str, words: str, tell: Callable[[str], None]) -> None:
        """Say what is waited for."""
        if words != self.waits_for:
            self.waits_for = words
            tell(words)
        if code not in (self._code, IMAGES):
            self._code = code
            await self._announce()

    async def _woken_within(self, seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        return self._wake.is_set()

    async def _reference(self) -> bool:
        waiting, woken = asyncio.ensure_future(self._settled()), asyncio.create_task(self._wake.wait())
        try:
            await asyncio.wait({waiting, woken}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                waiting.result()
            return waiting.done()
        finally:
            waiting.cancel()
            woken.cancel()
            await asyncio.gather(waiting, woken, return_exceptions=True)
