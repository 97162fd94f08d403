"""Arguments of agentctl that argparse has no type for; what doesn't fit is a usage error."""

from __future__ import annotations

from argparse import ArgumentTypeError
from math import isfinite


def seconds(text: str) -> float:
    """A time in seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not isfinite(value) or value < 0:
        raise ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return value


def name(text: str) -> str:
    """A text that isn't empty."""
    if not text.strip():
        raise ArgumentTypeError("must not be empty")
    return text
