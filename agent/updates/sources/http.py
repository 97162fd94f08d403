"""An artifact from an HTTP server: one attempt takes what comes until it ends, and says what that means.

Query strings of URLs are credentials and never appear in errors or logs.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

from agent.logs import get_logger, redact
from agent.updates.addresses import redirected
from agent.updates.intake import Intake
from agent.updates.part import Origin
from agent.updates.rate import Pace
from agent.updates.sources import Broken, Strange
from agent.updates.sources.answers import STRONG_ETAG, Answer, WrongRangeError, judge, wrong_size

if TYPE_CHECKING:
    import aiohttp

log = get_logger("updates")

REDIRECTS = frozenset({301, 302, 303, 307, 308})
MAX_REDIRECTS = 5
READ_BYTES = 64 * 1024
BUFFER_BYTES = 64 * 1024


class Limits(Protocol):
    """How patient an attempt is; `fetch.Limits` says what each means."""

    @property
    def slow_bytes(self) -> int: ...
    @property
    def slow_for_s(self) -> float: ...
    @property
    def connect_s(self) -> float: ...
    @property
    def proxy_url(self) -> Callable[[], str]: ...


class Http:
    """Attempts that share one client session, which is made for the first of them; close() ends it."""

    def __init__(self, intake: Intake, pace: Pace, limits: Limits) -> None:
        self._intake = intake
        self._pace = pace
        self._limits = limits
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        if self._session:
            await self._session.close()

    async def attempt(self, url: str, deadline: float) -> None:
        """One request for what is missing, until monotonic time `deadline`; returns when nothing is missing any more.

        Raises Broken, Expired, Strange or Useless, and OSError of the disk; what came before is on disk.
        """
        import aiohttp

        host, secure = str(urlsplit(url).hostname), urlsplit(url).scheme == "https"
        failure = ""
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())) as patience:
                async with asyncio.timeout(self._limits.connect_s + self._limits.slow_for_s):
                    response = await self._ask_for(url)
                async with response:
                    await self._take(response, url)
        except TimeoutError:
            failure = "no time left" if patience.expired() else "no answer"
        except aiohttp.ClientHttpProxyError as error:
            failure = f"the proxy answered HTTP {error.status}"
        except aiohttp.InvalidURL:
            raise Strange(f"{host}: the URL can't be asked for", doubtful=False) from None
        except (aiohttp.ClientResponseError, aiohttp.http_exceptions.HttpProcessingError) as error:
            why = f"{host} does not speak HTTP: {_first_line(error.message)}"
            raise Strange(why, doubtful=not secure) from None
        except (aiohttp.ClientError, ConnectionError) as error:
            words = " ".join(redact(str(error)).replace(url, host).split())
            failure = f"{type(error).__name__}: {words:.200}"
        if failure:
            raise Broken(f"{host}: {failure}")

    async def _ask_for(self, url: str) -> aiohttp.ClientResponse:
        """The answer after redirects. Raises Strange and aiohttp's errors."""
        secure, headers = urlsplit(url).scheme == "https", {"Accept-Encoding": "identity"}
        if self._intake.position:
            headers["Range"] = f"bytes={self._intake.position}-"
            kept = self._intake.part.origin
            if kept.source == source_of(url) and STRONG_ETAG.fullmatch(kept.etag):
                headers["If-Range"] = kept.etag
        proxy, own = self._limits.proxy_url() or None, url
        for _ in range(MAX_REDIRECTS + 1):
            try:
                response = await self._opened().get(url, headers=headers, allow_redirects=False, proxy=proxy)
            except UnicodeError:
                raise Strange("the URL names no host that can be", doubtful=not secure) from None
            if response.status not in REDIRECTS:
                return response
            response.close()
            try:
                url = redirected(url, response.headers.get("Location", ""), own=own)
            except ValueError as refusal:
                raise Strange(f"{urlsplit(url).hostname} {refusal}", doubtful=not secure) from None
        why = f"{urlsplit(url).hostname} redirects more than {MAX_REDIRECTS} times"
        raise Strange(why, doubtful=not secure)

    def _opened(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._limits.connect_s)
            self._session = aiohttp.ClientSession(timeout=timeout, auto_decompress=False, read_bufsize=BUFFER_BYTES)
        return self._session

    async def _take(self, response: aiohttp.ClientResponse, url: str) -> None:
        """Judge the answer to the request for `url` and take its body."""
        intake, asked = self._intake, urlsplit(url)
        host = str(response.url.host or asked.hostname)
        answer = Answer(host, response.status, response.headers, asked.scheme == "https", host != asked.hostname)
        try:
            body = judge(answer, intake.position, intake.part.size)
        except WrongRangeError:
            await intake.start_over(Origin())
            raise
        origin = Origin(source_of(url), body.etag)
        if body.from_start:
            if intake.position:
                log.info("the server starts over", host=host, bytes_lost=intake.position)
            await intake.start_over(origin)
        elif body.etag:
            intake.part.origin = origin
        try:
            await self._receive(response.content, answer)
        finally:
            await intake.flush()
        if intake.position < intake.part.size:
            # A body in chunks has an end of its own: reached, it was all there is.
            if not body.sized and response.headers.get("Transfer-Encoding", "").lower() == "chunked":
                verdict = wrong_size(answer, intake.position, intake.part.size)
                await intake.start_over(Origin())
                raise verdict
            raise Broken("the connection ended early")

    async def _receive(self, content: aiohttp.StreamReader, answer: Answer) -> None:
        """Take the body as it comes, no faster than the cap allows."""
        intake, slow = self._intake, _Slow(self._limits)
        while data := await slow.read(content, self._pace.piece(READ_BYTES)):
            if intake.position + len(data) > intake.part.size:
                verdict = wrong_size(answer, intake.position + len(data), intake.part.size)
                await intake.start_over(Origin())
                raise verdict
            await intake.take(data)
            await self._pace.took(len(data))


class _Slow:
    """Gives up a connection that brings too little while it is waited for; time spent otherwise does not count."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._waited = 0.0
        self._came = 0

    async def read(self, content: aiohttp.StreamReader, most: int) -> bytes:
        """What comes next, empty at the end. Raises Broken, and aiohttp's errors."""
        least, window = self._limits.slow_bytes, self._limits.slow_for_s
        while True:
            if self._waited >= window:
                if self._came < least * window:
                    raise Broken(f"under {least} bytes/s for {window:g} s")
                self._waited, self._came = 0.0, 0
            begun = time.monotonic()
            data = None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(window - self._waited):
                    data = await content.read(most)
            self._waited += time.monotonic() - begun
            if data is not None:
                self._came += len(data)
                return data


def source_of(url: str) -> str:
    """A short name of where `url` leads, the same for all its signatures, that gives none of it away."""
    parts = urlsplit(url)
    return hashlib.sha256(f"{parts.scheme}://{parts.hostname}:{parts.port}{parts.path}".encode()).hexdigest()[:16]


def _first_line(words: str) -> str:
    return redact(words.strip().split("\n")[0].rstrip(": ")[:120])
