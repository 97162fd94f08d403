"""The order of version numbers, as Debian has it. Pure."""

from __future__ import annotations

import re

VERSION = re.compile(r"v?(?:(?P<epoch>[0-9]{1,9}):)?(?P<rest>[0-9][0-9A-Za-z.+~_-]{0,127})")


def compare_versions(one: str, other: str) -> int:
    """Negative, zero or positive as `one` comes before, with or after `other` in Debian's order; a leading v is dropped.

    1.10 after 1.9, 1.0~rc1 before 1.0, 1.0-2 (a revision) and 1.0+b1 after 1.0, 1:0.9 (an epoch) after 1.0, 1.0 before
    1.0.0. Raises ValueError for what is no version.
    """
    left, right = _key(one), _key(other)
    return (left > right) - (left < right)


def _key(version: str) -> tuple[int, list[tuple[list[int], int]]]:
    """The epoch, then the runs of other characters and of digits in turn."""
    match = VERSION.fullmatch(version)
    if match is None:
        raise ValueError(f"{version!r:.80} is not a version")
    runs = re.findall(r"([^0-9]*)([0-9]*)", match["rest"])
    key = [([_rank(c) for c in text] + [0], int(digits or "0")) for text, digits in runs if text or digits]
    return int(match["epoch"] or "0"), [*key, ([0], 0)]


def _rank(character: str) -> int:
    """`~` comes before the end, which is 0; then what begins a revision, then letters, then all else."""
    special = {"~": -1, "-": 1}
    if character in special:
        return special[character]
    return ord(character) if character.isalpha() else ord(character) + 256
