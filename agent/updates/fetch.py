"""Downloading an artifact: goes on after every break where it stopped, holds at most one chunk in memory, and hands out only what has the right digest.

The part file is named by the digest; beside it a small JSON file says how much of it is on disk for certain. Query
strings of URLs are credentials and never appear in errors or logs.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from agent.errors import CloudError, FailedError, RefusedError
from agent.host.files import fsync_folder, write_atomic
from agent.logs import get_logger, redact
from agent.updates.manifest import digest_of
from agent.updates.threads import to_end

if TYPE_CHECKING:
    import aiohttp

log = get_logger("updates")

CONTENT_RANGE = re.compile(r"^bytes (\d+)-(\d+)/(\d+)$")
EXPIRED = frozenset({400, 401, 403, 410})
"""Answers of object stores to a signed URL whose time is over."""
LATER = frozenset({408, 425, 429})
READ_BYTES = 64 * 1024


@dataclass(frozen=True)
class Limits:
    """How patient a download is."""

    chunk_bytes: int = 4 * 2**20
    """Bytes between two fsyncs; the most that a power cut costs."""
    slow_bytes: int = 1024
    """Least bytes per second."""
    slow_for_s: float = 60
    """A connection slower than that for so long is given up."""
    first_wait_s: float = 1
    longest_wait_s: float = 60
    """Waits between attempts double, with jitter, from the first to the longest, and start again after progress."""
    fresh_urls: int = 3
    """How often in a row new URLs are asked for without a byte of progress."""
    connect_s: float = 30


DEFAULT_LIMITS = Limits()


class _Broken(Exception):  # noqa: N818  a state of the connection rather than a program's error
    """The attempt is over; the next may go on."""


class _Expired(Exception):  # noqa: N818
    """The URL is not valid any more."""


class _Useless(Exception):  # noqa: N818
    """The URL does not serve the artifact."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(why)
        self.code = code


def check_urls(urls: Sequence[str]) -> None:
    """Raises RefusedError url_invalid unless every URL is http or https with a host."""
    for url in urls:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable() and " " not in url
        except ValueError:
            usable = False
        if not usable:
            raise RefusedError(
                "url_invalid",
                f"{url.split('?')[0]:.80} is not an http or https URL",
                "a placeholder ${aws:iot:s3-presigned-url:…} is replaced only when the job has a presignedUrlConfig",
            )


async def fetch(
    urls: Sequence[str],
    *,
    sha256: str,
    size: int,
    folder: Path,
    patience_s: float,
    fresh_urls: Callable[[], Awaitable[Sequence[str]]],
    limits: Limits = DEFAULT_LIMITS,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Path:
    """The file `<folder>/<sha256>`, with that digest and `size` bytes, fsynced.

    Tries the URLs in turn until `patience_s` is over; `fresh_urls` is asked for new ones when they have expired.
    `on_progress` gets the bytes that are safe on disk. Raises FailedError: download_timeout, download_refused,
    download_wrong_size, download_too_large, digest_mismatch, disk_full, disk_failed.
    """
    part = _Part(folder, sha256, size)
    try:
        if await to_end(part.complete):
            return part.finished
        download = _Download(part, limits, time.monotonic() + patience_s, fresh_urls, on_progress)
        for attempt in (1, 2):
            await download.run(urls)
            if await to_end(part.finish):
                return part.finished
            log.warning("download has the wrong digest, thrown away", attempt=attempt, sha256=sha256)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise FailedError(
            "disk_full" if full else "disk_failed",
            f"{folder}: {error.strerror}",
            "free some space" if full else "check the health of the disk",
        ) from error
    finally:
        await to_end(part.close)
    raise FailedError(
        "digest_mismatch",
        f"what the URLs serve has not the signed digest {sha256[:12]}…, twice",
        "upload the artifact that was signed",
    )


class _Part:
    """The part file with its sidecar; every method blocks."""

    def __init__(self, folder: Path, sha256: str, size: int) -> None:
        self.size = size
        self.etag = ""
        self.offset = 0
        """Bytes on disk, fsynced and hashed."""
        self.finished = folder / sha256
        self._sha256 = sha256
        self._path = folder / f"{sha256}.part"
        self._sidecar = folder / f"{sha256}.json"
        self._digest = hashlib.sha256()
        self._file: int | None = None

    def complete(self) -> bool:
        """Whether the finished file is there and right; otherwise the part file is opened where it can go on."""
        self.finished.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if self.finished.exists():
            if digest_of(self.finished) == self._sha256:
                return True
            self.finished.unlink()
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = json.loads(self._sidecar.read_bytes())
            if kept["size"] == self.size and 0 <= kept["verified_offset"] <= os.fstat(self._file).st_size:
                self.etag, self.offset = str(kept["etag"]), int(kept["verified_offset"])
        position = 0
        while position < self.offset:
            data = os.pread(self._file, min(2**20, self.offset - position), position)
            self._digest.update(data)
            position += len(data)
        os.ftruncate(self._file, self.offset)
        return False

    def append(self, data: bytearray) -> None:
        """Write, fsync, and only then count the bytes."""
        assert self._file is not None
        view = memoryview(data)
        position = self.offset
        while view:
            written = os.pwrite(self._file, view, position)
            view, position = view[written:], position + written
        os.fsync(self._file)
        self._digest.update(data)
        self.offset = position
        self._note()

    def start_over(self, etag: str) -> None:
        """Forget all bytes."""
        assert self._file is not None
        self.etag, self.offset, self._digest = etag, 0, hashlib.sha256()
        self._note()
        os.ftruncate(self._file, 0)

    def finish(self) -> bool:
        """Give the part file its final name when its digest is right, else throw its bytes away."""
        if self.offset != self.size or self._digest.hexdigest() != self._sha256:
            self.start_over("")
            return False
        self._path.rename(self.finished)
        self._sidecar.unlink(missing_ok=True)
        fsync_folder(self.finished.parent)
        return True

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _note(self) -> None:
        record = {"etag": self.etag, "size": self.size, "verified_offset": self.offset}
        write_atomic(self._sidecar, json.dumps(record).encode())


class _Download:
    """Attempts, waits and URLs until the part file has all its bytes."""

    def __init__(
        self,
        part: _Part,
        limits: Limits,
        deadline: float,
        fresh_urls: Callable[[], Awaitable[Sequence[str]]],
        on_progress: Callable[[int], None],
    ) -> None:
        self._part = part
        self._limits = limits
        self._deadline = deadline
        self._ask = fresh_urls
        self._on_progress = on_progress
        self._asked = 0
        self._wait = limits.first_wait_s
        self._why = "nothing was tried"

    async def run(self, urls: Sequence[str]) -> None:
        """Returns when all bytes are on disk. Raises FailedError."""
        import aiohttp

        current, useless = list(urls), dict[str, _Useless]()
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._limits.connect_s),
            auto_decompress=False,
            read_bufsize=READ_BYTES,
        ) as session:
            while self._part.offset < self._part.size:
                if not current:
                    current = [url for url in await self._fresh_urls(list(useless.values())) if url not in useless]
                    continue
                url, before = current[0], self._part.offset
                try:
                    await self._attempt(session, url)
                    continue
                except _Expired as expired:
                    current.remove(url)
                    self._why = str(expired)
                except _Useless as verdict:
                    current.remove(url)
                    useless[url] = verdict
                    self._why = str(verdict)
                except _Broken as broken:
                    current.append(current.pop(0))
                    self._why = str(broken)
                    await self._pause(progress=self._part.offset - before)
                log.info("download interrupted", why=self._why, bytes=self._part.offset, size=self._part.size)

    async def _fresh_urls(self, useless: list[_Useless]) -> Sequence[str]:
        if useless:
            raise FailedError(useless[-1].code, str(useless[-1]), "check what was uploaded to the job's URLs")
        if self._asked >= self._limits.fresh_urls:
            raise FailedError(
                "download_refused",
                f"the URLs are refused, also new ones: {self._why}",
                "check the role that signs them",
            )
        try:
            fresh = await self._ask()
            check_urls(fresh)
        except CloudError as error:
            self._why = f"no new URL: {error.message}"
            await self._pause(progress=0)
            return []
        except RefusedError as error:
            raise FailedError("download_refused", error.message, error.hint) from None
        self._asked += 1
        if self._asked > 1:
            await self._pause(progress=0)
        return fresh

    async def _pause(self, *, progress: int) -> None:
        """Wait before the next attempt: shortly after progress, longer and longer without."""
        if progress >= min(READ_BYTES, self._part.size // 100):
            self._wait = self._limits.first_wait_s
            self._asked = 0
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise FailedError(
                "download_timeout",
                f"{self._part.offset} of {self._part.size} bytes came in the time there was; last: {self._why}",
                "check the camera's link, then start the job again: it goes on where it stopped",
            )
        await asyncio.sleep(min(left, self._wait * random.uniform(0.5, 1.0)))  # noqa: S311  jitter, no secret
        self._wait = min(self._limits.longest_wait_s, self._wait * 2)

    async def _attempt(self, session: aiohttp.ClientSession, url: str) -> None:
        """One request. Raises _Broken, _Expired or _Useless; the bytes that came are kept."""
        import aiohttp

        host = urlsplit(url).hostname
        failure = ""
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())) as patience:
                headers = {"Accept-Encoding": "identity"}
                if self._part.offset:
                    headers["Range"] = f"bytes={self._part.offset}-"
                    if self._part.etag:
                        headers["If-Range"] = self._part.etag
                waiting = asyncio.timeout(self._limits.connect_s + self._limits.slow_for_s)
                async with waiting:
                    response = await session.get(url, headers=headers)
                async with response:
                    await self._check_answer(response, str(host))
                    await self._receive(response)
        except TimeoutError:
            failure = "no time left" if patience.expired() else "no answer"
        except (aiohttp.ClientError, ConnectionError) as error:
            failure = f"{type(error).__name__}: {redact(str(error))}".replace(url, str(host))
        if failure:
            raise _Broken(f"{host}: {failure}")

    async def _check_answer(self, response: aiohttp.ClientResponse, host: str) -> None:
        """Compare status and headers with what was asked for; start over where the server does."""
        part, status = self._part, response.status
        if status in EXPIRED:
            raise _Expired(f"{host} answered HTTP {status}")
        if status == 416:
            await to_end(part.start_over, "")
            raise _Useless("download_wrong_size", f"{host} serves fewer bytes than were signed")
        if status in LATER or status >= 500:
            raise _Broken(f"{host} answered HTTP {status}")
        if status not in (200, 206):
            raise _Useless("download_refused", f"{host} answered HTTP {status}")
        if status == 206:
            match = CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
            start, end, total = (int(number) for number in match.groups()) if match else (-1, -1, -1)
            if start != part.offset or not start <= end < total:
                await to_end(part.start_over, "")
                raise _Broken(f"{host} answered with another range than asked for")
        else:
            total = int(response.headers.get("Content-Length", part.size))
            if part.offset:
                log.info("the server starts over", host=host, bytes_lost=part.offset)
            etag = response.headers.get("ETag", "")
            await to_end(part.start_over, "" if etag.startswith("W/") else etag)
        if total != part.size:
            code = "download_too_large" if total > part.size else "download_wrong_size"
            await to_end(part.start_over, "")
            raise _Useless(code, f"{host} serves {total} bytes, signed were {part.size}")

    async def _receive(self, response: aiohttp.ClientResponse) -> None:
        """Read the body chunk by chunk. What came before a break is kept."""
        part, limits = self._part, self._limits
        buffer = bytearray()
        window_ends, window_bytes = time.monotonic() + limits.slow_for_s, 0
        try:
            while True:
                left = window_ends - time.monotonic()
                if left <= 0:
                    if window_bytes < limits.slow_bytes * limits.slow_for_s:
                        raise _Broken(f"under {limits.slow_bytes} bytes/s for {limits.slow_for_s:g} s")
                    window_ends, window_bytes = time.monotonic() + limits.slow_for_s, 0
                    continue
                try:
                    async with asyncio.timeout(left):
                        data = await response.content.read(READ_BYTES)
                except TimeoutError:
                    continue
                if not data:
                    break
                window_bytes += len(data)
                buffer += data
                if part.offset + len(buffer) > part.size:
                    buffer.clear()
                    await to_end(part.start_over, "")
                    raise _Useless("download_too_large", f"more than the signed {part.size} bytes came")
                if len(buffer) >= limits.chunk_bytes:
                    full, buffer = buffer, bytearray()
                    await self._keep(full)
        finally:
            if buffer:
                await self._keep(buffer)
        if part.offset < part.size:
            raise _Broken("the connection ended early")

    async def _keep(self, buffer: bytearray) -> None:
        await to_end(self._part.append, buffer)
        self._on_progress(self._part.offset)
