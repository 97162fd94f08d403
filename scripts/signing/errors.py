"""The one error of the signing tool."""

from __future__ import annotations


class SigningError(Exception):
    """What was asked for can't be done, in a sentence that says what to do about it; nothing was written."""


class NotAtHandError(SigningError):
    """The private key is not here now: its file is missing, or its token is not plugged in."""
