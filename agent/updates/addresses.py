"""URLs of artifacts: which are usable, where a redirect may lead, and what a stream's URL names. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import urljoin, urlsplit

STREAM = re.compile(r"iot-stream:([a-zA-Z0-9_-]{1,128})/([0-9]{1,3})")


def is_usable(url: str) -> bool:
    """Whether `url` is http or https with a host, and a port if any, that can be."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(host) and port != 0 and url.isprintable() and " " not in url


def stream_of(url: str) -> tuple[str, int] | None:
    """Stream id and file id (0–255) of `iot-stream:<stream id>/<file id>`, None for any other URL."""
    match = STREAM.fullmatch(url)
    return (match[1], int(match[2])) if match and int(match[2]) <= 255 else None


def in_order(urls: Iterable[str]) -> list[str]:
    """The order to try `urls` in: as given, but file streams last."""
    return sorted(urls, key=lambda url: stream_of(url) is not None)


def redirected(url: str, location: str) -> str:
    """Where a redirect from `url` to `location` leads. Raises ValueError, in words, where it must not be followed."""
    try:
        target = urljoin(url, location)
    except ValueError:
        target = ""
    if not location:
        raise ValueError("redirects to nowhere")
    if not is_usable(target):
        raise ValueError("redirects to what is not an http or https URL")
    if urlsplit(url).scheme == "https" and urlsplit(target).scheme != "https":
        raise ValueError("redirects from https to http")
    return target
