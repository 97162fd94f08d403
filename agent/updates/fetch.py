"""Downloading an artifact: goes on after every break where it stopped, holds at most one chunk in memory, and hands out only what has the right digest.

The part file is named by the digest; beside it a small JSON file says how much of it is on disk for certain. Query
strings of URLs are credentials and never appear in errors or logs.
"""

from __future__ import annotations

import asyncio
import errno
import random
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from agent.errors import CloudError, FailedError, RefusedError
from agent.host.threads import to_end
from agent.logs import get_logger, redact
from agent.updates.addresses import is_usable, redirected
from agent.updates.part import Part

if TYPE_CHECKING:
    import aiohttp

log = get_logger("updates")

CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
LENGTH = re.compile(r"[0-9]{1,18}")
STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]*"')
REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 5
EXPIRED = frozenset({400, 401, 403, 410})
"""Answers of object stores to a signed URL whose time is over."""
LATER = frozenset({408, 425, 429})
READ_BYTES = 64 * 1024


@dataclass(frozen=True)
class Limits:
    """How patient a download is, and the way it takes."""

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
    senseless_answers: int = 3
    """Answers in a row that are not what HTTP allows, or that redirect to where nobody may be sent, until a URL is given up."""
    connect_s: float = 30
    proxy_url: str = field(default="", repr=False)
    """HTTP proxy, `http://[user:password@]host:port`. Empty: none."""


DEFAULT_LIMITS = Limits()


class _Broken(Exception):  # noqa: N818  a state of the connection rather than a program's error
    """The attempt is over; the next may go on."""


class _Expired(Exception):  # noqa: N818
    """The URL is not valid any more."""


class _Senseless(Exception):  # noqa: N818
    """The server's answer can't be used; a few of them in a row, and the URL is useless."""


class _Useless(Exception):  # noqa: N818
    """The URL does not serve the artifact."""

    def __init__(self, code: str, why: str) -> None:
        super().__init__(why)
        self.code = code


def check_urls(urls: Sequence[str]) -> None:
    """Raises RefusedError url_invalid unless every URL is http or https with a host."""
    for url in urls:
        if not is_usable(url):
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
    on_wait: Callable[[str], None] = lambda _: None,
) -> Path:
    """The file `<folder>/<sha256>`, with that digest and `size` bytes, fsynced.

    Tries the URLs in turn until `patience_s` is over; `fresh_urls` is asked for new ones when they have expired.
    `on_progress` gets the bytes that are safe on disk; `on_wait` a sentence, before each wait, that says how far it is
    and what went wrong. Raises FailedError: download_timeout, download_refused, download_failed, download_wrong_size,
    download_too_large, digest_mismatch, disk_full, disk_failed.
    """
    part = Part(folder, sha256, size)
    try:
        if await to_end(part.complete):
            return part.finished
        download = _Download(part, limits, time.monotonic() + patience_s, fresh_urls, on_progress, on_wait)
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


class _Download:
    """Attempts, waits and URLs until the part file has all its bytes."""

    def __init__(
        self,
        part: Part,
        limits: Limits,
        deadline: float,
        fresh_urls: Callable[[], Awaitable[Sequence[str]]],
        on_progress: Callable[[int], None],
        on_wait: Callable[[str], None],
    ) -> None:
        self._part = part
        self._limits = limits
        self._deadline = deadline
        self._ask = fresh_urls
        self._on_progress = on_progress
        self._on_wait = on_wait
        self._furthest = part.offset
        self._senseless: dict[str, int] = {}
        self._asked = 0
        self._wait = limits.first_wait_s
        self._why = "nothing was tried"

    async def run(self, urls: Sequence[str]) -> None:
        """Returns when all bytes are on disk. Raises FailedError."""
        import aiohttp

        current, useless, expired = list(urls), dict[str, _Useless](), False
        async with aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._limits.connect_s),
            auto_decompress=False,
            read_bufsize=READ_BYTES,
        ) as session:
            while self._part.offset < self._part.size:
                if not current:
                    gone = [] if expired else list(useless.values())
                    current = [url for url in await self._fresh_urls(gone) if url not in useless]
                    expired = False
                    continue
                url, before = current[0], self._part.offset
                try:
                    await self._attempt(session, url)
                    continue
                except _Expired as verdict:
                    current.remove(url)
                    expired = True
                    self._why = str(verdict)
                except _Useless as verdict:
                    current.remove(url)
                    useless[url] = verdict
                    self._why = str(verdict)
                except _Senseless as answer:
                    self._why = str(answer)
                    if self._count(url) < self._limits.senseless_answers:
                        current.append(current.pop(0))
                        await self._pause(progress=0)
                    else:
                        current.remove(url)
                        useless[url] = _Useless("download_failed", self._why)
                except _Broken as broken:
                    self._senseless.pop(url, None)
                    current.append(current.pop(0))
                    self._why = str(broken)
                    await self._pause(progress=self._part.offset - before)
                log.info("download interrupted", why=self._why, bytes=self._part.offset, size=self._part.size)

    def _count(self, url: str) -> int:
        """How many senseless answers in a row `url` has given, without a byte that was not there before."""
        if self._part.offset > self._furthest:
            self._furthest = self._part.offset
            self._senseless.clear()
        self._senseless[url] = self._senseless.get(url, 0) + 1
        return self._senseless[url]

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
        self._on_wait(f"downloading, {_amount(self._part.offset, self._part.size)}; waiting after: {self._why}")
        await asyncio.sleep(min(left, self._wait * random.uniform(0.5, 1.0)))  # noqa: S311  jitter, no secret
        self._wait = min(self._limits.longest_wait_s, self._wait * 2)

    async def _attempt(self, session: aiohttp.ClientSession, url: str) -> None:
        """One request. Raises _Broken, _Expired or _Useless; the bytes that came are kept."""
        import aiohttp

        host = str(urlsplit(url).hostname)
        failure = ""
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())) as patience:
                async with asyncio.timeout(self._limits.connect_s + self._limits.slow_for_s):
                    response = await self._ask_for(session, url)
                async with response:
                    await self._check_answer(response, str(response.url.host or host))
                    await self._receive(response)
        except TimeoutError:
            failure = "no time left" if patience.expired() else "no answer"
        except aiohttp.ClientHttpProxyError as error:
            failure = f"the proxy answered HTTP {error.status}"
        except aiohttp.InvalidURL:
            raise _Senseless(f"{host}: the URL can't be asked for") from None
        except (aiohttp.ClientResponseError, aiohttp.http_exceptions.HttpProcessingError) as error:
            raise _Senseless(f"{host} does not speak HTTP: {_first_line(error.message)}") from None
        except (aiohttp.ClientError, ConnectionError) as error:
            words = " ".join(redact(str(error)).replace(url, host).split())
            failure = f"{type(error).__name__}: {words:.200}"
        if failure:
            raise _Broken(f"{host}: {failure}")

    async def _ask_for(self, session: aiohttp.ClientSession, url: str) -> aiohttp.ClientResponse:
        """The answer to a request for what is missing, after redirects. Raises _Senseless and aiohttp's errors."""
        headers = {"Accept-Encoding": "identity"}
        if self._part.offset:
            headers["Range"] = f"bytes={self._part.offset}-"
            if self._part.etag:
                headers["If-Range"] = self._part.etag
        proxy = self._limits.proxy_url or None
        for _ in range(MAX_REDIRECTS + 1):
            try:
                response = await session.get(url, headers=headers, allow_redirects=False, proxy=proxy)
            except UnicodeError:
                raise _Senseless("the URL names no host that can be") from None
            if response.status not in REDIRECTS:
                return response
            response.close()
            try:
                url = redirected(url, response.headers.get("Location", ""))
            except ValueError as refusal:
                raise _Senseless(f"{urlsplit(url).hostname} {refusal}") from None
        raise _Senseless(f"{urlsplit(url).hostname} redirects more than {MAX_REDIRECTS} times")

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
            match = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            start, end, total = (int(number) for number in match.groups()) if match else (-1, -1, -1)
            if start != part.offset or not start <= end < total:
                await to_end(part.start_over, "")
                raise _Senseless(f"{host} answered with another range than asked for")
        else:
            length = response.headers.get("Content-Length", str(part.size))
            if not LENGTH.fullmatch(length):
                raise _Senseless(f"{host} answered with a length that is none")
            total = int(length)
            if part.offset:
                log.info("the server starts over", host=host, bytes_lost=part.offset)
            etag = response.headers.get("ETag", "")
            await to_end(part.start_over, etag if STRONG_ETAG.fullmatch(etag) else "")
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


def _first_line(words: str) -> str:
    return redact(words.strip().split("\n")[0].rstrip(": ")[:120])


def _amount(done: int, size: int) -> str:
    unit, name = (1, "bytes") if size < 10_000 else (1000, "kB") if size < 10_000_000 else (10**6, "MB")
    return f"{done // unit} of {size // unit} {name}"
