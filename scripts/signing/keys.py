"""Private keys in encrypted files or tokens, and DIR/keys.json, which says whose they are and where they live.

Key files have the mode 0600 from their first byte on, appear whole or not at all, and never replace another.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent.host.files import fsync_folder, write_atomic
from agent.updates.trust import key_id

from . import tokens
from .errors import NotAtHandError, SigningError
from .passphrases import Secrets

ROLES = ("release", "emergency")
DESCRIPTION = "keys.json"


@dataclass(frozen=True)
class Signer:
    """A private key that can be used now; `place` says where it lives."""

    place: str
    public: bytes
    sign: Callable[[bytes], bytes]

    @property
    def keyid(self) -> str:
        return key_id(self.public)


@dataclass(frozen=True)
class KeyEntry:
    """One key of keys.json. `private` is a file, relative to the folder, or a pkcs11: URI; None: somebody else has it."""

    name: str
    role: str
    public: bytes
    private: str | None

    @property
    def keyid(self) -> str:
        return key_id(self.public)


@dataclass(frozen=True)
class KeyFolder:
    """The folder DIR with what its keys.json says."""

    path: Path
    entries: tuple[KeyEntry, ...]

    def name_of(self, keyid: str) -> str:
        """A key for people: the start of its keyid, and its name where it is known."""
        names = [entry.name for entry in self.entries if entry.keyid == keyid]
        return f"{keyid[:12]} ({names[0]})" if names else keyid[:12]

    def reference(self, text: str) -> str:
        """What --key names: a name or the start of a keyid of this folder, else the text as it is."""
        for entry in self.entries:
            if text == entry.name or (len(text) >= 6 and entry.keyid.startswith(text)):
                return self.place(entry)
        return text

    def place(self, entry: KeyEntry) -> str:
        """The file or URI of a private key. Raises NotAtHandError."""
        if entry.private is None:
            raise NotAtHandError(f"the private key of {self.name_of(entry.keyid)} is not in {self.path}")
        return entry.private if entry.private.startswith(tokens.SCHEME) else str(self.path / entry.private)

    def signer(self, entry: KeyEntry, secrets: Secrets) -> Signer:
        """Raises SigningError, NotAtHandError."""
        place = self.place(entry)
        signer = load_signer(place, secrets)
        if signer.public != entry.public:
            raise SigningError(f"{place} holds key {signer.keyid[:12]}, but {self.name_of(entry.keyid)} belongs there")
        return signer

    def having(self, more: Iterable[KeyEntry]) -> KeyFolder:
        """With more keys; names stay unique, and a key that was there keeps its name."""
        entries = {entry.keyid: entry for entry in self.entries}
        for entry in more:
            known = entries.get(entry.keyid)
            if known:
                entries[entry.keyid] = replace(known, role=entry.role, private=entry.private or known.private)
                continue
            taken, name, count = {e.name for e in entries.values()}, entry.name, 2
            while name in taken:
                name, count = f"{entry.name}-{count}", count + 1
            entries[entry.keyid] = replace(entry, name=name)
        return replace(self, entries=tuple(entries.values()))

    def write(self) -> None:
        keys = {
            entry.keyid: {
                "name": entry.name,
                "role": entry.role,
                "public": entry.public.hex(),
                "private": entry.private,
            }
            for entry in self.entries
        }
        text = json.dumps({"schema": 1, "keys": keys}, indent=2) + "\n"
        write_atomic(self.path / DESCRIPTION, text.encode(), mode=0o600)


def read_folder(path: Path) -> KeyFolder | None:
    """What keys.json says; None when there is none. Raises SigningError."""
    file = path / DESCRIPTION
    try:
        document = json.loads(file.read_bytes())
        if document["schema"] != 1:
            raise SigningError(f"{file} is of schema {document['schema']}, this tool knows 1")
        entries = tuple(_entry(keyid, values) for keyid, values in document["keys"].items())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SigningError(f"{file} can't be used: {type(error).__name__} {error}") from None
    return KeyFolder(path, entries)


def _entry(keyid: str, values: Any) -> KeyEntry:
    entry = KeyEntry(str(values["name"]), str(values["role"]), bytes.fromhex(values["public"]), values["private"])
    if entry.keyid != keyid or not isinstance(entry.private, str | None):
        raise ValueError(f"{keyid[:12]} is not the digest of its key")
    return entry


def describe_key(reference: str, role: str, folder: Path, secrets: Secrets) -> KeyEntry:
    """The entry for a key that is handed in: a public or private PEM file, or a pkcs11: URI. Raises SigningError."""
    if reference.startswith(tokens.SCHEME):
        key = tokens.parse_uri(reference, secrets.module)
        public = tokens.public_key(key, secrets)
        return KeyEntry(key.name, role, public, tokens.with_module(reference, secrets.module))
    path = Path(reference)
    name = re.sub(r"(\.(key|pub))?(\.pem)?$", "", path.name)
    if b"PUBLIC KEY" in _content(path):
        return KeyEntry(name, role, _load_public(path), None)
    inside = path.resolve().is_relative_to(folder.resolve())
    place = path.resolve().relative_to(folder.resolve()) if inside else path.resolve()
    return KeyEntry(name, role, _load_private(path, secrets).public_key().public_bytes_raw(), str(place))


def load_signer(reference: str, secrets: Secrets) -> Signer:
    """The key of a file or a pkcs11: URI, ready to sign. Raises SigningError, NotAtHandError."""
    if reference.startswith(tokens.SCHEME):
        key = tokens.parse_uri(reference, secrets.module)
        return Signer(reference.partition("?")[0], tokens.public_key(key, secrets), tokens.signing(key, secrets))
    private = _load_private(Path(reference), secrets)
    return Signer(reference, private.public_key().public_bytes_raw(), private.sign)


def new_keys(paths: Iterable[Path], passphrase: bytes | None) -> list[Signer]:
    """Make a private key in each file: all of them or none. Raises SigningError when one of the files exists."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    paths = list(paths)
    for path in paths:
        refuse_overwriting(path)
    encryption = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    made: list[Signer] = []
    try:
        for path in paths:
            key = Ed25519PrivateKey.generate()
            pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
            write_new(path, pem)
            made.append(Signer(str(path), key.public_key().public_bytes_raw(), key.sign))
    except BaseException:
        discard(Path(signer.place) for signer in made)
        raise
    return made


def public_pem(public: bytes) -> bytes:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    return Ed25519PublicKey.from_public_bytes(public).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def write_new(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Write a file that must not exist yet; it appears whole. Raises SigningError, OSError."""
    candidate = path.with_name(f".{path.name}.{os.getpid()}.new")
    descriptor = os.open(candidate, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        _appear(candidate, path)
    finally:
        candidate.unlink(missing_ok=True)
    fsync_folder(path.parent)


def _appear(candidate: Path, path: Path) -> None:
    """Give a finished file its name, which must be free; also on file systems of memory sticks, without hard links."""
    try:
        os.link(candidate, path, follow_symlinks=False)
    except FileExistsError:
        refuse_overwriting(path)
        raise
    except OSError:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        candidate.rename(path)


def refuse_overwriting(path: Path) -> None:
    if path.exists() or path.is_symlink():
        raise SigningError(f"{path} is there already and is not overwritten: cameras may depend on it")


def discard(paths: Iterable[Path]) -> None:
    """Remove what a run that failed has made."""
    for path in paths:
        path.unlink(missing_ok=True)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise NotAtHandError(f"the key {path} is not there") from None


def _load_private(path: Path, secrets: Secrets) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    pem = _content(path)
    if b"PUBLIC KEY" in pem:
        raise SigningError(f"{path} is a public key, signing needs the private one")
    encrypted = b"ENCRYPTED" in pem
    try:
        key = load_pem_private_key(pem, password=secrets.passphrase(path) if encrypted else None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        why = "the passphrase is wrong" if encrypted else "it is not a private key in PEM"
        raise SigningError(f"{path} can't be used: {why}") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningError(f"{path} is a key of another kind, Ed25519 is needed")
    return key


def _load_public(path: Path) -> bytes:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(path.read_bytes())
    except (ValueError, UnsupportedAlgorithm):
        raise SigningError(f"{path} can't be used: it is not a public key in PEM") from None
    if not isinstance(key, Ed25519PublicKey):
        raise SigningError(f"{path} is a key of another kind, Ed25519 is needed")
    return key.public_bytes_raw()
