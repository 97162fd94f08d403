"""What an HTTP answer to the request for an artifact means: take it, start over, come again, or never. Pure.

Only TLS proves who answered. Without it a web page, an answer from elsewhere, or a wrong length without an entity tag may be
a network's login page: that says nothing about the artifact, and nothing that was downloaded is thrown away for it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from agent.updates.sources import Broken, Expired, Strange, Useless

CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
LENGTH = re.compile(r"[0-9]{1,18}")
STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]{0,1000}"')
EXPIRED = frozenset({400, 401, 403, 410})
"""Answers of object stores to a signed URL whose time is over."""
LATER = frozenset({408, 425, 429})
WEB_PAGES = frozenset({"text/html", "application/xhtml+xml"})


@dataclass(frozen=True)
class Answer:
    """Status and headers of an answer, and who gave it."""

    host: str
    status: int
    headers: Mapping[str, str]
    """By name, whatever its case."""
    secure: bool
    """Every host on the way has proved by TLS who it is."""
    elsewhere: bool
    """After redirects, another host than the URL names has answered."""

    @property
    def etag(self) -> str:
        """The strong entity tag; empty when there is none that could be sent back."""
        etag = self.headers.get("ETag", "")
        return etag if STRONG_ETAG.fullmatch(etag) else ""

    @property
    def doubtful(self) -> bool:
        """Whether somebody between the server and the camera may have given it."""
        return not self.secure and (self.elsewhere or self._is_web_page())

    @property
    def anonymous(self) -> bool:
        """Doubtful, or nothing but its word says that it is about the artifact."""
        return self.doubtful or (not self.secure and not self.etag)

    def describe(self) -> str:
        """Who answered and how, in words."""
        page = " with a web page, as a network's login page would" if self._is_web_page() else ""
        return f"{self.host} answered HTTP {self.status}{page}"

    def _is_web_page(self) -> bool:
        return self.headers.get("Content-Type", "").split(";")[0].strip().lower() in WEB_PAGES


@dataclass(frozen=True)
class Body:
    """A body that can be taken. `from_start`: what was downloaded before has to go."""

    from_start: bool
    etag: str
    sized: bool
    """The server has said how long the artifact is, and it is right."""


class WrongRangeError(Strange):
    """The server does not do ranges right; without asking for one it may still serve the artifact."""

    def __init__(self, why: str) -> None:
        super().__init__(why, doubtful=False)


def judge(answer: Answer, offset: int, size: int) -> Body:
    """What to do with the answer to a request for the bytes from `offset` on, of `size`.

    Raises Broken (come again), Expired, Strange, WrongRangeError (forget what is there), Useless.
    """
    status = answer.status
    if status in LATER or status >= 500:
        raise Broken(answer.describe())
    if status == 206:
        return _part(answer, offset, size)
    if status == 200:
        return _whole(answer, size)
    if answer.doubtful:
        raise Strange(answer.describe(), code="download_refused", doubtful=True)
    if status in EXPIRED:
        raise Expired(answer.describe())
    if status == 416:
        raise _out_of_range(answer, size)
    raise Useless("download_refused", answer.describe())


def wrong_size(answer: Answer, total: int, size: int) -> Useless | Strange:
    """The verdict on an answer that holds `total` bytes instead of `size`."""
    code = "download_too_large" if total > size else "download_wrong_size"
    encoding = answer.headers.get("Content-Encoding", "")
    encoded = f", with Content-Encoding {encoding:.20}" if encoding.isprintable() and encoding else ""
    page = " in a web page, as a network's login page would" if answer.doubtful else ""
    why = f"{answer.host} serves {total} bytes{encoded}{page}, signed were {size}"
    return Strange(why, code=code, doubtful=True) if answer.anonymous else Useless(code, why)


def _part(answer: Answer, offset: int, size: int) -> Body:
    match = CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    start, end, total = (int(number) for number in match.groups()) if match else (-1, -1, -1)
    if start != offset or not start <= end < total:
        raise WrongRangeError(f"{answer.host} answered with another range than asked for")
    if total != size:
        raise wrong_size(answer, total, size)
    return Body(from_start=False, etag=answer.etag, sized=True)


def _whole(answer: Answer, size: int) -> Body:
    length = answer.headers.get("Content-Length")
    if length is None:
        if answer.doubtful:
            raise Strange(answer.describe(), doubtful=True)
        return Body(from_start=True, etag=answer.etag, sized=False)
    if not LENGTH.fullmatch(length):
        raise Strange(f"{answer.host} answered with a length that is none", doubtful=not answer.secure)
    if int(length) != size:
        raise wrong_size(answer, int(length), size)
    return Body(from_start=True, etag=answer.etag, sized=True)


def _out_of_range(answer: Answer, size: int) -> Strange | Useless:
    if answer.headers.get("Content-Range", "") == f"bytes */{size}":
        return WrongRangeError(f"{answer.host} has all the bytes and refuses a range of them")
    return Useless("download_wrong_size", f"{answer.host} serves fewer bytes than were signed")
