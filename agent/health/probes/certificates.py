"""The validity dates of a PEM certificate, read from its DER bytes with the standard library."""

from __future__ import annotations

import base64
import binascii
import re
from datetime import UTC, datetime

SEQUENCE, UTC_TIME, GENERALIZED_TIME, VERSION = 0x30, 0x17, 0x18, 0xA0
PEM = re.compile(r"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", re.DOTALL)


def validity(pem: str) -> tuple[float, float]:
    """Begin and end of the validity of the first certificate in `pem`, in epoch seconds. Raises ValueError."""
    block = PEM.search(pem)
    if not block:
        raise ValueError("it holds no PEM certificate")
    try:
        der = base64.b64decode("".join(block[1].split()), validate=True)
    except binascii.Error:
        raise ValueError("its base64 text is damaged") from None
    try:
        # Certificate > tbsCertificate: [0] version, serial, signature algorithm, issuer, validity, …
        fields = _children(_children(der)[0][1])[0][1]
        entries = _children(fields)
        if entries[0][0] == VERSION:
            entries = entries[1:]
        begin, end = _children(entries[3][1])
        return _time(*begin), _time(*end)
    except (IndexError, ValueError):
        raise ValueError("it is not a certificate in DER form") from None


def _children(data: bytes) -> list[tuple[int, bytes]]:
    """(tag, content) of the values that follow one another in `data`. Raises ValueError, IndexError."""
    found, position = [], 0
    while position < len(data):
        tag, length = data[position], data[position + 1]
        position += 2
        if length & 0x80:
            size = length & 0x7F
            if not 1 <= size <= 4:
                raise ValueError("bad length")
            length = int.from_bytes(data[position : position + size], "big")
            position += size
        if position + length > len(data):
            raise ValueError("cut off")
        found.append((tag, data[position : position + length]))
        position += length
    return found


def _time(tag: int, content: bytes) -> float:
    text = content.decode("ascii")
    if tag == UTC_TIME:
        # Two-digit years from 50 on are of the last century (RFC 5280).
        text = ("19" if int(text[:2]) >= 50 else "20") + text
    elif tag != GENERALIZED_TIME:
        raise ValueError("not a time")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()
