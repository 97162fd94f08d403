"""URLs of artifacts: which are usable, and where a redirect may lead. Pure."""

from __future__ import annotations

from urllib.parse import urljoin, urlsplit


def is_usable(url: str) -> bool:
    """Whether `url` is http or https with a host, and a port if any, that can be."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(host) and port != 0 and url.isprintable() and " " not in url


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
