"""Passphrases and PINs: from a file, the environment, or a prompt on a terminal; never from the command line."""

from __future__ import annotations

import getpass
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from .errors import SigningError

MIN_PASSPHRASE = 12
PASSPHRASE_VARIABLE = "SIGN_UPDATE_PASSPHRASE"
PIN_VARIABLE = "SIGN_UPDATE_PIN"


@dataclass(frozen=True)
class Secrets:
    """Where this run takes its secrets from. A PIN is asked for once per token."""

    passphrase_file: Path | None = None
    pin_file: Path | None = None
    module: str = ""
    """The PKCS#11 library of tokens whose URI names none."""
    pins: dict[str, str] = field(default_factory=dict, repr=False)

    def passphrase(self, path: Path) -> bytes:
        """The passphrase of an encrypted key. Raises SigningError."""
        given = _from_file(self.passphrase_file) or os.environ.get(PASSPHRASE_VARIABLE)
        if not given:
            given = _ask(f"Passphrase of {path}: ", f"{path} is encrypted", "--passphrase-file", PASSPHRASE_VARIABLE)
        return given.encode()

    def new_passphrase(self, *, wanted: bool) -> bytes | None:
        """The passphrase that new keys get, or None: not encrypted. Raises SigningError."""
        given = _from_file(self.passphrase_file) or os.environ.get(PASSPHRASE_VARIABLE)
        if not given and not wanted:
            return None
        if not given:
            what = "new keys are to be encrypted"
            given = _ask("Passphrase for the new keys: ", what, "--passphrase-file", PASSPHRASE_VARIABLE)
            if getpass.getpass("The same again: ") != given:
                raise SigningError("the two passphrases differ; no key was made")
        if len(given) < MIN_PASSPHRASE:
            raise SigningError(f"the passphrase has {len(given)} characters, it needs {MIN_PASSPHRASE}; take six words")
        return given.encode()

    def pin(self, token: str, source: Path | None) -> str:
        """The PIN of a token; `source` is the file that its URI names. Raises SigningError."""
        if token not in self.pins:
            given = _from_file(self.pin_file) or os.environ.get(PIN_VARIABLE) or _from_file(source)
            self.pins[token] = given or _ask(
                f"PIN of token {token}: ", f"token {token} needs its PIN", "--pin-file", PIN_VARIABLE
            )
        return self.pins[token]


def _from_file(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        secret = path.read_text(encoding="utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        raise SigningError(f"{path} is not UTF-8 text, so it can't be a passphrase or PIN") from None
    if not secret:
        raise SigningError(f"{path} is empty; a passphrase or PIN should be in it")
    return secret


def _ask(prompt: str, need: str, option: str, variable: str) -> str:
    if not sys.stdin.isatty():
        raise SigningError(f"{need}: give {option} FILE or set {variable}")
    return getpass.getpass(prompt)
