"""What a command stands on: the root that counts here, the keys at hand, secrets, and the person at the terminal."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from agent.updates.trust import Role, Root

from . import roots
from .errors import NotAtHandError, SigningError
from .keys import KeyEntry, KeyFolder, Signer, read_folder
from .passphrases import Secrets


def tell(*lines: str) -> None:
    print(*lines, sep="\n", file=sys.stderr)


@dataclass(frozen=True)
class Trust:
    """The root that counts here, and what is known of its keys."""

    root: Root
    folder: KeyFolder

    @property
    def names(self) -> dict[str, str]:
        return names_in(self.folder)


def trusted_by(arguments: argparse.Namespace) -> Trust:
    """Raises SigningError, OSError."""
    path: Path = arguments.keys or arguments.root
    if arguments.keys and not path.is_dir():
        raise SigningError(f"there is no folder {path} with a root.json: make it with `sign-update keys {path}`")
    root, notes = roots.current_root(path)
    tell(*notes) if notes else None
    return Trust(root, key_folder(path if path.is_dir() else path.resolve().parent, root))


def key_folder(path: Path, root: Root) -> KeyFolder:
    """What keys.json says; without one, the one key of each role is in its file, as the first version left it."""
    known = read_folder(path)
    if known:
        return known
    roles = (("release", root.document.roles.release), ("emergency", root.document.roles.emergency))
    return KeyFolder(
        path,
        tuple(
            KeyEntry(role, role, bytes.fromhex(root.document.keys[definition.keyids[0]].public), f"{role}.key.pem")
            for role, definition in roles
            if len(definition.keyids) == 1 and (path / f"{role}.key.pem").exists()
        ),
    )


def secrets_of(arguments: argparse.Namespace) -> Secrets:
    return Secrets(arguments.passphrase_file, arguments.pin_file, arguments.module)


def confirmed(arguments: argparse.Namespace) -> bool:
    """Asks on a terminal only."""
    if arguments.yes or not sys.stdin.isatty():
        return True
    print("Sign this? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def at_hand(role: Role, signed: Iterable[str], folder: KeyFolder, secrets: Secrets) -> tuple[list[Signer], list[str]]:
    """Keys of a role that are here, as many as its threshold still needs; and in words, which are not."""
    done, found, notes = set(signed) & set(role.keyids), list[Signer](), list[str]()
    for entry in folder.entries:
        if len(done) + len(found) >= role.threshold:
            break
        if entry.keyid in role.keyids and entry.keyid not in done and entry.private is not None:
            try:
                found.append(folder.signer(entry, secrets))
            except NotAtHandError as error:
                notes.append(str(error))
    return found, notes


def names_in(folder: KeyFolder | None) -> dict[str, str]:
    return {entry.keyid: entry.name for entry in folder.entries} if folder else {}
