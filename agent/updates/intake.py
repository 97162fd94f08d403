"""What has come of an artifact on its way to the part file: one chunk is filled while the former one is written.

Memory for two chunks, however large the artifact. After an error of the disk nothing more is written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agent.host.threads import to_end
from agent.updates.part import Origin, Part


class Intake:
    """Takes the bytes of `part` in their order. `on_progress` is called with the bytes that are safe on disk."""

    def __init__(self, part: Part, chunk_bytes: int, on_progress: Callable[[int], None]) -> None:
        self.part = part
        self.position = part.offset
        """Bytes taken: those on disk and those in memory."""
        self._chunk_bytes = min(chunk_bytes, part.size)
        self._on_progress = on_progress
        self._filling, self._spare = bytearray(self._chunk_bytes), bytearray()
        self._filled = 0
        self._writing: asyncio.Task[None] | None = None
        self._failed = False

    async def take(self, data: bytes) -> None:
        """The next bytes. Raises OSError when writing has failed."""
        view = memoryview(data)
        while view:
            count = min(len(view), len(self._filling) - self._filled)
            self._filling[self._filled : self._filled + count] = view[:count]
            self._filled += count
            self.position += count
            view = view[count:]
            if self._filled == len(self._filling):
                await self._hand_over()

    async def flush(self) -> None:
        """Everything taken is on disk when this returns, even to a caller who is cancelled. Raises OSError."""
        await self._written()
        if self._filled and not self._failed:
            await self._hand_over()
            await self._written()

    async def start_over(self, origin: Origin) -> None:
        """Forget all bytes; the next come from `origin`. Raises OSError."""
        self._filled = 0
        await self._written()
        if self.part.offset:
            await to_end(self.part.start_over, origin)
        self.part.origin, self.position = origin, 0

    async def _hand_over(self) -> None:
        await self._written()
        full, count = self._filling, self._filled
        self._filling, self._spare = self._spare or bytearray(self._chunk_bytes), full
        self._filled = 0
        self._writing = asyncio.create_task(to_end(self.part.append, memoryview(full)[:count]))
        self._writing.add_done_callback(self._tell)

    async def _written(self) -> None:
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        try:
            await writing
        except OSError:
            self._failed, self._filled = True, 0
            raise

    def _tell(self, writing: asyncio.Task[None]) -> None:
        if not writing.cancelled() and not writing.exception():
            self._on_progress(self.part.offset)
