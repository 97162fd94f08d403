"""An artifact from a file stream over MQTT, for cameras that reach nothing but AWS IoT."""

from __future__ import annotations

from typing import Protocol

from agent.errors import CloudError
from agent.logs import get_logger
from agent.updates.addresses import stream_of
from agent.updates.intake import Intake
from agent.updates.part import Origin
from agent.updates.rate import Pace
from agent.updates.sources import Broken, Strange, Useless

log = get_logger("updates")

READ_BYTES = 64 * 1024
CHANGED = frozenset({"VersionMismatch", "ETagMismatch"})
"""Codes of a stream that is no longer what was described."""
REFUSED = frozenset({"Unauthorized", "ResourceNotFound"})


class Streams(Protocol):
    """The files of AWS IoT streams. Raises CloudError; its code is AWS's where the service has refused something."""

    async def describe(self, stream_id: str, file_id: int) -> tuple[int, int]:
        """The stream's version, and the bytes the file has."""
        ...

    async def read(self, stream_id: str, file_id: int, *, version: int, offset: int, size: int, most: int) -> bytes:
        """What the file of `size` bytes has at `offset`: at least one byte, about `most`."""
        ...


async def attempt(url: str, streams: Streams | None, intake: Intake, pace: Pace) -> None:
    """Read what is missing until nothing is; what came before an end is on disk.

    Raises Broken, Strange (the stream has changed, which costs all bytes) or Useless, and OSError of the disk.
    """
    named = stream_of(url)
    if named is None or streams is None:
        raise Useless("download_refused", "file streams can't be read here")
    stream_id, file_id = named
    size = intake.part.size
    try:
        version, total = await streams.describe(stream_id, file_id)
        if total != size:
            code = "download_too_large" if total > size else "download_wrong_size"
            raise Useless(code, f"file {file_id} of stream {stream_id} has {total} bytes, signed were {size}")
        await _begin(intake, Origin(url, f"version {version}"))
        try:
            while intake.position < size:
                data = await streams.read(
                    stream_id,
                    file_id,
                    version=version,
                    offset=intake.position,
                    size=size,
                    most=pace.piece(READ_BYTES),
                )
                await intake.take(data)
                await pace.took(len(data))
        finally:
            await intake.flush()
    except CloudError as error:
        if error.code in CHANGED:
            log.info("the stream has changed, starting over", stream=stream_id, bytes_lost=intake.position)
            await intake.start_over(Origin())
            raise Strange(error.message, doubtful=False) from None
        if error.retryable:
            raise Broken(error.message) from None
        raise Useless("download_refused" if error.code in REFUSED else "download_failed", error.message) from None


async def _begin(intake: Intake, origin: Origin) -> None:
    """Go on with what is there, from whatever source, unless it is from this stream as it was before."""
    if intake.position and intake.part.origin.source == origin.source and intake.part.origin != origin:
        await intake.start_over(origin)
    intake.part.origin = origin
