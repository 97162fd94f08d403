"""What the bytes of a JPEG tell without decoding it: whether it is whole, its size in pixels and when it was taken. Pure.

It finds every truncation and the zeroed blocks that a power cut or a dying card leaves, at about a millisecond for ten
megabytes, and never calls a whole file broken because of padding, an appended preview or a flat picture.
"""

from __future__ import annotations

import re
import struct
import time
from dataclasses import dataclass
from datetime import UTC, datetime

MAX_BYTES = 64 * 2**20
"""Files above this are not read."""
MAX_PIXELS = 64_000_000
TAIL = 32
ZERO_RUN = bytes(64)

SOI, EOI, SOS, DHT = 0xD8, 0xD9, 0xDA, 0xC4
BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
FRAMES = frozenset({*range(0xC0, 0xD0)} - {DHT, 0xC8, 0xCC})
SEGMENTS = FRAMES | {DHT, SOS, 0xCC, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF, 0xFE} | set(range(0xE0, 0xF0))
BETWEEN_SCANS = frozenset({DHT, SOS, 0xDB, 0xDC, 0xDD, 0xFE} | set(range(0xE0, 0xF0)))
NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")

EXIF_POINTER, TAKEN, TAKEN_SUBSECOND, TAKEN_OFFSET = 0x8769, 0x9003, 0x9291, 0x9011


class BrokenImageError(Exception):
    """The bytes are not a usable JPEG; `kind` is one of the kinds of `check_container`."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.kind = kind


@dataclass(frozen=True)
class Header:
    """What precedes the picture: size in pixels, whether it is progressive, where its first scan begins (offset of the
    marker), the offset and length of the EXIF block (0, 0 when there is none), and whether flat areas may be zero bytes.
    """

    width: int
    height: int
    progressive: bool
    scan: int
    exif: tuple[int, int]
    zeros_are_legal: bool


def check_container(data: bytes) -> str | None:
    """None when the JPEG is whole, else what is wrong.

    `empty` no byte · `not_jpeg` begins otherwise · `truncated` ends before the end marker · `zero_tail` the end is zeros ·
    `zero_hole` 64 zeros inside the picture · `marker` impossible markers or lengths · `unsupported` a JPEG that can't be
    decoded here (more than 8 bits, lossless, arithmetic) · `too_large` above 64 MB or 64 megapixels.
    """
    try:
        header = read_header(data)
        _check_scans(data, header)
    except BrokenImageError as error:
        return error.kind
    return None


def read_header(data: bytes) -> Header:
    """Walk the segments up to the first scan. Raises BrokenImageError."""
    if not data:
        raise BrokenImageError("empty")
    if len(data) > MAX_BYTES:
        raise BrokenImageError("too_large")
    if data[:2] != b"\xff\xd8"[: len(data)]:
        raise BrokenImageError("zero_tail" if not data.strip(b"\0") else "not_jpeg")
    frame: tuple[int, int, int] | None = None
    exif = (0, 0)
    first_symbols: dict[int, int] = {}
    at = 2
    while True:
        marker, begin, end = _segment(data, at)
        if marker == SOS:
            break
        if marker in FRAMES:
            if frame:
                raise BrokenImageError("marker")
            frame = (marker, *_frame_size(marker, data[begin:end]))
        elif marker == DHT:
            first_symbols.update(_first_symbols(data[begin:end]))
        elif marker == 0xE1 and not exif[1] and data[begin : begin + 6] == b"Exif\0\0":
            exif = (begin + 6, end - begin - 6)
        at = end
    if frame is None:
        raise BrokenImageError("marker")
    # Only an optimised code gives an unchanged block nothing but zero bits, and refinement scans carry raw bits.
    zeros_are_legal = frame[0] == PROGRESSIVE or (bool(first_symbols) and not any(first_symbols.values()))
    return Header(frame[1], frame[2], frame[0] == PROGRESSIVE, at, exif, zeros_are_legal)


def _segment(data: bytes, at: int) -> tuple[int, int, int]:
    """(marker, begin, end) of the segment at `at`, its length bytes left out."""
    while data[at : at + 2] == b"\xff\xff":
        at += 1
    if at + 4 > len(data):
        raise BrokenImageError("truncated")
    marker = data[at + 1]
    length = int.from_bytes(data[at + 2 : at + 4], "big")
    if data[at] != 0xFF or marker not in SEGMENTS or length < 2:
        raise BrokenImageError("zero_tail" if not data[at:].strip(b"\0") else "marker")
    end = at + 2 + length
    if end > len(data):
        raise BrokenImageError("truncated")
    return marker, at + 4, end


def _frame_size(marker: int, body: bytes) -> tuple[int, int]:
    if len(body) < 6:
        raise BrokenImageError("marker")
    precision, height, width, components = struct.unpack(">BHHB", body[:6])
    if marker not in (BASELINE, EXTENDED, PROGRESSIVE) or precision != 8 or components not in (1, 3, 4):
        raise BrokenImageError("unsupported")
    if not width or not height:
        raise BrokenImageError("marker")
    if width * height > MAX_PIXELS:
        raise BrokenImageError("too_large")
    return width, height


def _first_symbols(body: bytes) -> dict[int, int]:
    """Per Huffman table (class and number) the symbol that a code of zero bits stands for."""
    found: dict[int, int] = {}
    at = 0
    while at + 17 < len(body):
        found[body[at]] = body[at + 17]
        at += 17 + sum(body[at + 1 : at + 17])
    return found


def _check_scans(data: bytes, header: Header) -> None:
    at = header.scan
    end = None
    while match := NEXT_MARKER.search(data, at):
        marker = match.group()[1]
        if marker == EOI:
            end = match.end()
            break
        if marker not in BETWEEN_SCANS:
            raise BrokenImageError("marker")
        at = _segment(data, match.start())[2]
    if end is None:
        raise BrokenImageError("truncated" if data[-TAIL:].strip(b"\0") else "zero_tail")
    if not header.zeros_are_legal and data.find(ZERO_RUN, header.scan, end) >= 0:
        raise BrokenImageError("zero_hole")
    if data.find(b"\xff\xd9", -TAIL) < 0 and data[end:].strip(b"\0\xff"):
        raise BrokenImageError("truncated")


def capture_time(data: bytes) -> float | None:
    """When the picture was taken by its EXIF block, in epoch seconds; None when it does not say.

    DateTimeOriginal with SubSecTimeOriginal and OffsetTimeOriginal; without the offset it is taken as local time.
    """
    try:
        offset, length = read_header(data).exif
        tags = _exif_texts(data[offset : offset + length])
        taken = tags.get(TAKEN, "")
        moment = datetime.strptime(taken, "%Y:%m:%d %H:%M:%S").replace(tzinfo=UTC)
        seconds = float(f"0.{tags.get(TAKEN_SUBSECOND, '').strip() or 0}")
        zone = tags.get(TAKEN_OFFSET, "").strip()
        if not zone:
            return time.mktime((*moment.timetuple()[:8], -1)) + seconds
        sign = {"+": 1, "-": -1}[zone[0]]
        return moment.timestamp() + seconds - sign * (int(zone[1:3]) * 3600 + int(zone[4:6]) * 60)
    except (BrokenImageError, ValueError, KeyError, OverflowError, struct.error):
        return None


def _exif_texts(tiff: bytes) -> dict[int, str]:
    """The short text tags of the EXIF sub-directory. Raises struct.error on offsets outside the block."""
    order = {b"II": "<", b"MM": ">"}[tiff[:2]]
    (first,) = struct.unpack_from(f"{order}I", tiff, 4)
    pointer = _directory(tiff, order, first).get(EXIF_POINTER)
    if pointer is None:
        return {}
    (where,) = struct.unpack(f"{order}I", pointer[2])
    texts: dict[int, str] = {}
    for tag, (kind, count, value) in _directory(tiff, order, where).items():
        if kind == 2 and tag in (TAKEN, TAKEN_SUBSECOND, TAKEN_OFFSET) and count <= 64:
            at = struct.unpack(f"{order}I", value)[0]
            raw = value[:count] if count <= 4 else tiff[at : at + count]
            texts[tag] = raw.split(b"\0")[0].decode("ascii", "replace")
    return texts


def _directory(tiff: bytes, order: str, at: int) -> dict[int, tuple[int, int, bytes]]:
    (entries,) = struct.unpack_from(f"{order}H", tiff, at)
    rows = (struct.unpack_from(f"{order}HHI4s", tiff, at + 2 + 12 * row) for row in range(min(entries, 256)))
    return {tag: (kind, count, value) for tag, kind, count, value in rows}
