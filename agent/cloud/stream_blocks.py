"""The messages of an AWS IoT file stream, and which blocks to ask for. Pure: whatever comes, a block is right or dropped."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

BLOCK_BYTES = 16 * 1024
"""Bytes of a block; with base64 a message of 22 KB, some seconds on a bad mobile link."""
MOST_BLOCKS = 4
"""Blocks in one request; AWS IoT sends at most 128 KB for one."""
LARGEST = 2**53
MAX_WORDS = 300


@dataclass(frozen=True)
class Description:
    """A stream: its version, and the size of each file by id."""

    version: int
    sizes: dict[int, int]


@dataclass(frozen=True)
class Refusal:
    """Why the service refused a request; `token` None where it names none."""

    code: str
    message: str
    token: str | None


@dataclass(frozen=True)
class Wanted:
    """The file whose blocks are asked for, and the token of the requests."""

    file_id: int
    size: int
    token: str

    def length_of(self, block: int) -> int:
        """Bytes of a block: only the last one is shorter."""
        return min(BLOCK_BYTES, self.size - block * BLOCK_BYTES)


def blocks_at(offset: int, most: int, size: int) -> range:
    """The blocks that hold the bytes from `offset` on, about `most` of them: at least one block."""
    first = offset // BLOCK_BYTES
    count = min(max(1, most // BLOCK_BYTES), MOST_BLOCKS)
    return range(first, min(first + count, -(-size // BLOCK_BYTES)))


def next_run(missing: Collection[int], most: int) -> range:
    """The first blocks without a gap between them among `missing`, at most `most`."""
    first = end = min(missing)
    while end in missing and end - first < most:
        end += 1
    return range(first, end)


def request(wanted: Wanted, version: int, run: range) -> dict[str, Any]:
    """The body that asks for the blocks of `run`; the offset counts blocks, not bytes."""
    return {
        "c": wanted.token,
        "s": version,
        "f": wanted.file_id,
        "l": BLOCK_BYTES,
        "o": run.start,
        "n": len(run),
    }


def block_of(payload: bytes, wanted: Wanted, missing: Collection[int]) -> tuple[int, bytes] | str:
    """Number and content of the block a message brings, or in words why the message is dropped."""
    message = _parsed(payload)
    if message.get("c", wanted.token) != wanted.token:
        return "it answers another request"
    if _number(message.get("f")) != wanted.file_id:
        return "it is of another file"
    block, length, content = _number(message.get("i")), _number(message.get("l")), message.get("p")
    if block not in missing:
        return "it was not asked for, or came already"
    if length != wanted.length_of(block) or not isinstance(content, str):
        return "it has not the length of its block"
    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        return "its content is no base64"
    return (block, data) if len(data) == length else "it has not the length it says"


def description_of(payload: bytes, token: str) -> Description | None:
    """What a description says; None when it is malformed or answers another request."""
    message = _parsed(payload)
    version, files = _number(message.get("s")), message.get("r")
    if message.get("c", token) != token or version < 0 or not isinstance(files, list):
        return None
    sizes = {_number(file.get("f")): _number(file.get("z")) for file in files if isinstance(file, dict)}
    return Description(version, {file_id: size for file_id, size in sizes.items() if file_id >= 0 and size >= 0})


def refusal_of(payload: bytes) -> Refusal:
    """What a refusal says, with the short or the long names of its keys."""
    message = _parsed(payload)
    code, words = (message.get(short, message.get(long)) for short, long in (("o", "code"), ("m", "message")))
    token = message.get("c", message.get("clientToken"))
    return Refusal(
        code[:MAX_WORDS] if isinstance(code, str) and code else "rejected",
        words[:MAX_WORDS] if isinstance(words, str) else "",
        token if isinstance(token, str) else None,
    )


def _parsed(payload: bytes) -> dict[str, Any]:
    try:
        message = json.loads(payload)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _number(value: Any) -> int:
    """A count from 0 on; -1 for anything else."""
    return value if type(value) is int and 0 <= value <= LARGEST else -1
