"""Downloading an artifact: goes on after every break where it stopped, holds two chunks in memory, and hands out only what has the right digest.

The part file is named by the digest; beside it a small JSON file says how much of it is on disk for certain. All URLs
serve the same artifact, so what came from one is gone on with from the next, whatever their kinds.
"""

from __future__ import annotations

import asyncio
import errno
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.errors import CloudError, FailedError, RefusedError
from agent.host.threads import to_end
from agent.logs import get_logger
from agent.updates.addresses import in_order, is_usable, spoken, stream_of
from agent.updates.intake import Intake
from agent.updates.part import Part
from agent.updates.rate import Pace
from agent.updates.sources import Broken, Expired, Strange, Useless, stream
from agent.updates.sources.http import Http
from agent.updates.sources.stream import Streams

log = get_logger("updates")

PROGRESS_BYTES = 64 * 1024


@dataclass(frozen=True)
class Limits:
    """How patient a download is, the ways it takes, and how fast it may be."""

    chunk_bytes: int = 4 * 2**20
    """Bytes between two fsyncs; twice that is the most that a power cut costs, and the memory for it."""
    slow_bytes: int = 1024
    """Least bytes per second."""
    slow_for_s: float = 60
    """A connection slower than that for so long, while it is waited for, is given up."""
    first_wait_s: float = 1
    longest_wait_s: float = 60
    """Waits between attempts double, with jitter, from the first to the longest, and start again after progress."""
    fresh_urls: int = 3
    """How often in a row new URLs are asked for without a byte of progress."""
    strange_answers: int = 3
    """Answers in a row that can't be used until a URL is given up."""
    doubtful_s: float = 3600
    """For how long they must have come as well, in seconds, where they may be of a network's login page."""
    connect_s: float = 30
    proxy_url: Callable[[], str] = str
    """HTTP proxy at this moment, `http://[user:password@]host:port`. Empty: none."""
    bytes_per_s: Callable[[], float] | None = None
    """The most bytes per second at this moment, 0 for no cap; asked about once a second. None: never a cap.

    Counts the artifact's bytes as they are taken. What the kernel and the HTTP client read ahead, some 100 kB for each
    connection, and what TLS and MQTT add, come on top.
    """
    waste_bytes: int = 64 * 2**20
    """A download is given up when more than that, and three times its size, was taken and thrown away."""
    streams: Streams | None = None
    """The files of AWS IoT streams, for URLs `iot-stream:<stream id>/<file id>`."""


DEFAULT_LIMITS = Limits()


def check_urls(urls: Sequence[str]) -> None:
    """Raises RefusedError url_invalid unless every URL is http or https with a host, or names the file of a stream."""
    for number, url in enumerate(urls, start=1):
        if not isinstance(url, str) or (not is_usable(url) and not stream_of(url)):
            what = spoken(url) if isinstance(url, str) else "no text"
            raise RefusedError(
                "url_invalid",
                f"URL {number} ({what}) is not an http or https URL with a host, nor iot-stream:STREAM/FILE",
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

    Tries the URLs in turn, file streams last, until `patience_s` is over; `fresh_urls` is asked for new ones when they
    have expired. A URL is given up at once when it certainly serves something else, and after some answers that can't be
    used; where these may be a network's login page's, only when they've come for `limits.doubtful_s`.
    `on_progress` gets the bytes that are safe on disk; `on_wait` a sentence, before each wait, that says how far it is
    and what went wrong. What was downloaded stays for the next time, whatever the end. Raises FailedError:
    download_timeout, download_refused, download_failed, download_wrong_size, download_too_large, digest_mismatch,
    disk_full, disk_failed.
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


class _CountingPace(Pace):
    """Also counts the bytes that were taken, whether they are kept or not."""

    taken = 0

    async def took(self, count: int) -> None:
        self.taken += count
        await super().took(count)


@dataclass
class _Row:
    """Answers of one URL that could not be used, without a new byte between them."""

    since: float
    count: int = 0


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
        self._pace = _CountingPace(limits.bytes_per_s)
        self._had = part.offset
        self._current: list[str] = []
        self._useless: dict[str, Useless] = {}
        self._expired = False
        self._furthest = part.offset
        self._rows: dict[str, _Row] = {}
        self._asked = 0
        self._wait = limits.first_wait_s
        self._why = "nothing was tried"

    async def run(self, urls: Sequence[str]) -> None:
        """Returns when all bytes are on disk. Raises FailedError, OSError."""
        self._current, self._useless, self._expired = in_order(urls), {}, False
        intake = Intake(self._part, self._limits.chunk_bytes, self._on_progress)
        http = Http(intake, self._pace, self._limits)
        try:
            while self._part.offset < self._part.size:
                if not self._current or (self._expired and all(map(stream_of, self._current))):
                    await self._renew()
                    continue
                url, before = self._current[0], self._part.offset
                try:
                    await self._attempt(http, intake, url)
                except (Broken, Expired, Strange, Useless) as verdict:
                    self._why = str(verdict)
                    self._check_waste()
                    await self._bear(verdict, url, before)
                    log.info("download interrupted", why=self._why, bytes=self._part.offset, size=self._part.size)
        finally:
            await http.close()

    async def _attempt(self, http: Http, intake: Intake, url: str) -> None:
        if not stream_of(url):
            await http.attempt(url, self._deadline)
            return
        try:
            async with asyncio.timeout(max(0.0, self._deadline - time.monotonic())):
                await stream.attempt(url, self._limits.streams, intake, self._pace)
        except TimeoutError:
            raise Broken("no time left") from None

    async def _bear(self, verdict: Broken | Expired | Strange | Useless, url: str, before: int) -> None:
        """What follows for `url` from how the attempt ended; waits where another attempt may help."""
        match verdict:
            case Expired():
                self._current.remove(url)
                self._expired = True
            case Useless():
                self._current.remove(url)
                self._useless[url] = verdict
            case Strange() if given_up := self._given_up(verdict, url):
                self._current.remove(url)
                self._useless[url] = given_up
            case Strange():
                self._current.append(self._current.pop(0))
                await self._pause(progress=0)
            case Broken():
                self._rows.pop(url, None)
                self._current.append(self._current.pop(0))
                await self._pause(progress=self._part.offset - before)

    def _check_waste(self) -> None:
        """Raises FailedError when too much that was taken is not there any more."""
        wasted = self._had + self._pace.taken - self._part.offset
        if wasted > 3 * self._part.size + self._limits.waste_bytes:
            raise FailedError(
                "download_failed",
                f"{wasted // 1000} kB were taken and thrown away for {_amount(self._part.offset, self._part.size)}, "
                f"as the server begins from the start after each break; last: {self._why}",
                "serve the artifact from a server that can go on in the middle (HTTP ranges with a steady ETag)",
            )

    def _given_up(self, answer: Strange, url: str) -> Useless | None:
        """The verdict on `url` after one more answer that can't be used, None while it is too early for one."""
        if self._part.offset > self._furthest:
            self._furthest = self._part.offset
            self._rows.clear()
        row = self._rows.setdefault(url, _Row(time.monotonic()))
        row.count += 1
        lasted_s = time.monotonic() - row.since
        if row.count < self._limits.strange_answers or (answer.doubtful and lasted_s < self._limits.doubtful_s):
            return None
        return Useless(answer.code, f"{answer}, {row.count} times in {lasted_s / 60:.0f} minutes")

    async def _renew(self) -> None:
        """Ask for new URLs in place of expired ones; streams that are left are used when there are none to be had."""
        gone = list(self._useless.values())
        if gone and not self._expired:
            raise FailedError(gone[-1].code, str(gone[-1]), "check what was uploaded to the job's URLs")
        try:
            if self._asked >= self._limits.fresh_urls:
                raise RefusedError(
                    "", f"the URLs are refused, also new ones: {self._why}", "check the role that signs them"
                )
            fresh = await self._fresh_urls()
        except CloudError as error:
            self._why = f"no new URL: {error.message}"
            await self._pause(progress=0)
            return
        except RefusedError as error:
            if not self._current:
                raise FailedError("download_refused", error.message, error.hint) from None
            self._expired = False
            return
        self._asked += 1
        if self._asked > 1:
            await self._pause(progress=0)
        self._current, self._expired = [url for url in in_order(fresh) if url not in self._useless], False

    async def _fresh_urls(self) -> list[str]:
        """New URLs, checked. Raises CloudError, and RefusedError when there are none to be had."""
        try:
            fresh = list(await self._ask())
        except (AttributeError, KeyError, TypeError):
            fresh = []
        if not fresh:
            raise RefusedError("url_invalid", "the job document has no list of urls any more", "send a new job")
        check_urls(fresh)
        return fresh

    async def _pause(self, *, progress: int) -> None:
        """Wait before the next attempt: shortly after progress, longer and longer without."""
        if progress >= max(1, min(PROGRESS_BYTES, self._part.size // 100)):
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


def _amount(done: int, size: int) -> str:
    unit, name = (1, "bytes") if size < 10_000 else (1000, "kB") if size < 10_000_000 else (10**6, "MB")
    return f"{done // unit} of {size // unit} {name}"
