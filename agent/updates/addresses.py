"""URLs of artifacts: which are usable, where a redirect may lead, and what a stream's URL names. Pure."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from ipaddress import IPv6Address, ip_address, ip_network
from urllib.parse import unquote, urljoin, urlsplit

STREAM = re.compile(r"iot-stream:([a-zA-Z0-9_-]{1,128})/([0-9]{1,3})")
PLACEHOLDER = "${aws:iot:s3-presigned-url:"
HOST = re.compile(r"[a-z0-9.-]{1,253}|[0-9a-f:.]{2,45}")
LOCAL_NAMES = ("localhost", "localhost.localdomain", "localhost6", "ip6-localhost", "ip6-loopback")
LOCAL = tuple(map(ip_network, ("0.0.0.0/8", "127.0.0.0/8", "169.254.0.0/16", "::/128", "::1/128", "fe80::/10")))
"""Addresses of the camera itself, and of what is on its link without an address of its own."""


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


def spoken(url: str) -> str:
    """As much of an URL, usable or not, as can be told: scheme and host, where they are certainly these and no secrets."""
    if url.startswith(PLACEHOLDER):
        return "a placeholder"
    if url.startswith("iot-stream:"):
        return "iot-stream:…"
    try:
        parts = urlsplit(url)
        scheme, host = parts.scheme, parts.hostname or ""
    except ValueError:
        return "an URL that can't be read"
    if not parts.netloc or not HOST.fullmatch(host) or "@" in url.removeprefix(f"{parts.scheme}://{parts.netloc}"):
        host = "…"
    return f"{scheme:.20}://{host}" if scheme and parts.netloc else "a text without scheme and host"


def is_local(url: str) -> bool:
    """Whether `url` names the camera itself or its link by address, however written, or by a name that always means it."""
    host = unquote(urlsplit(url).hostname or "")
    try:
        host = host.encode("idna").decode().lower().rstrip(".")
    except UnicodeError:
        return True
    if host in LOCAL_NAMES or host.endswith(".localhost"):
        return True
    try:
        address = ip_address(host if ":" in host else socket.inet_aton(host))
    except (OSError, ValueError):
        return False
    if isinstance(address, IPv6Address):
        address = address.ipv4_mapped or IPv6Address(int(address))
    return any(address in network for network in LOCAL)


def redirected(url: str, location: str, *, own: str) -> str:
    """Where a redirect from `url` to `location` leads, on the way that began at the job's `own` URL.

    Raises ValueError, in words, where it must not be followed.
    """
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
    if is_local(target) and not is_local(own):
        raise ValueError("redirects to the camera itself or its link")
    return target
