"""Whose signatures count: the root document with its keys and roles, its rotation, and the floors below which nothing is installed.

An update is accepted when enough distinct keys of the role `release`, or of `emergency`, signed its exact bytes. A root
is signed by its own `emergency` role; root N+1 replaces root N only when the emergency roles of both signed it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field, ValidationError

from agent.errors import RefusedError
from agent.updates.manifest import (
    Digest,
    Document,
    Envelope,
    Instant,
    Manifest,
    epoch,
    parse_envelope,
    parse_manifest,
    problems,
    strict_json,
)
from agent.versions import compare_versions

ROOT_PAYLOAD_TYPE = "application/vnd.camera-agent.root+json"
ROOT_FILE = re.compile(r"^([1-9][0-9]{0,8}\.)?root\.json$")
MAX_ROOT_BYTES = 100_000
FORGET_KEPT_ROOT = (
    "look first why it changed; then, with the agent stopped and the newest root.json in keys_dir: "
    """sqlite3 state.db "DELETE FROM facts WHERE key='updates.root'\""""
)
"""What a person at the camera can do about a kept root that can't be used; nothing does it from afar."""

RoleName = Literal["release", "emergency"]


class Key(Document):
    keytype: Literal["ed25519"]
    public: Digest
    """The 32 bytes of the public key, lower-case hexadecimal."""


class Role(Document):
    threshold: int = Field(ge=1, le=16)
    """How many distinct keys must sign."""
    keyids: list[Digest] = Field(min_length=1, max_length=16)


class Roles(Document):
    release: Role
    emergency: Role


class RootDocument(Document):
    """The payload of root.json."""

    schema_version: Literal[1] = Field(alias="schema")
    version: int = Field(ge=1, le=10**9)
    expires: Instant
    keys: dict[Digest, Key] = Field(min_length=1, max_length=32)
    """Public keys by keyid, the SHA-256 of the key's 32 bytes."""
    roles: Roles


@dataclass(frozen=True)
class Root:
    """A parsed root with the document it came in, as it is kept in the store."""

    document: RootDocument
    envelope: Envelope
    source: Mapping[str, Any]

    @property
    def version(self) -> int:
        return self.document.version


@dataclass(frozen=True)
class Installed:
    """What a target runs; `security_counter` is that of its manifest."""

    name: str
    version: str
    sha256: str
    security_counter: int = 0


@dataclass(frozen=True)
class Verified:
    """A manifest whose signatures count, and the roles that signed it."""

    manifest: Manifest
    roles: frozenset[RoleName]


def key_id(public: bytes) -> str:
    """The keyid of an Ed25519 public key of 32 bytes."""
    return hashlib.sha256(public).hexdigest()


def parse_root(source: Any, name: str = "root.json") -> Root:
    """A root that is consistent and signed by its own emergency role. Raises RefusedError keys_invalid."""
    try:
        envelope = parse_envelope(source, ROOT_PAYLOAD_TYPE)
        document = RootDocument.model_validate(strict_json(envelope.payload))
        epoch(document.expires)
    except RefusedError as error:
        _bad_root(name, error.message.removeprefix("the update's manifest can't be used: "))
    except ValidationError as error:
        _bad_root(name, problems(error))
    for keyid, key in document.keys.items():
        if key_id(bytes.fromhex(key.public)) != keyid:
            _bad_root(name, f"keyid {keyid[:12]} is not the digest of its key")
    release, emergency = document.roles.release, document.roles.emergency
    if set(release.keyids) & set(emergency.keyids):
        _bad_root(name, "a key is in both roles")
    for role in (release, emergency):
        if not set(role.keyids) <= set(document.keys):
            _bad_root(name, "a role names a key that is not there")
        if len(set(role.keyids)) < role.threshold:
            _bad_root(name, "a role has fewer keys than its threshold")
    root = Root(document, envelope, source)
    if "emergency" not in roles_of(envelope, root):
        _bad_root(name, "it is not signed by enough of its own emergency keys")
    return root


def roles_of(envelope: Envelope, root: Root) -> frozenset[RoleName]:
    """The roles of `root` whose threshold the envelope's signatures reach; a key counts once.

    Signatures of keys that the root does not know are passed over; a wrong one of a known key spoils the envelope.
    Raises RefusedError signature_invalid.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    signed = envelope.signed_bytes()
    signers = set()
    for signature in envelope.signatures:
        key = root.document.keys.get(signature.keyid)
        if key is None:
            continue
        try:
            Ed25519PublicKey.from_public_bytes(bytes.fromhex(key.public)).verify(signature.value, signed)
        except (InvalidSignature, ValueError):
            raise RefusedError(
                "signature_invalid",
                f"the signature of key {signature.keyid[:12]} does not fit the signed bytes",
                "the document was changed after signing: sign it again",
            ) from None
        signers.add(signature.keyid)
    roles: tuple[tuple[RoleName, Role], ...] = (
        ("release", root.document.roles.release),
        ("emergency", root.document.roles.emergency),
    )
    return frozenset(name for name, role in roles if len(signers & set(role.keyids)) >= role.threshold)


def load_root(keys_dir: Path, kept: Any, *, way_out: str = FORGET_KEPT_ROOT) -> Root:
    """The root to trust: the kept one, or root.json when none is kept, moved on by every newer root in the folder.

    A kept root that can't be used is never passed over, as that would bring back older keys; `way_out` is the hint for it.
    Blocking. Raises RefusedError: no_update_keys, keys_invalid, keys_rejected, kept_root_invalid.
    """
    found: dict[int, tuple[str, Root]] = {}
    for name, source in _root_files(keys_dir):
        root = parse_root(source, name)
        if root.version in found and found[root.version][1].envelope.payload != root.envelope.payload:
            _bad_root(name, f"there is another root of version {root.version}")
        found[root.version] = (name, root)
    if not found:
        raise RefusedError(
            "no_update_keys",
            f"there is no root.json in {keys_dir}, so no signature can be checked",
            "make keys with scripts/sign-update and put root.json there",
        )
    trusted = _kept_root(kept, way_out) if kept is not None else found[min(found)][1]
    if trusted.version in found and found[trusted.version][1].envelope.payload != trusted.envelope.payload:
        _rejected(found[trusted.version][0], f"it is not the version {trusted.version} that this camera trusts")
    for version in sorted(v for v in found if v > trusted.version):
        name, candidate = found[version]
        trusted = accept_root(trusted, candidate, name)
    return trusted


def accept_root(trusted: Root, candidate: Root, name: str = "root.json") -> Root:
    """`candidate` when it may follow `trusted`. Raises RefusedError keys_rejected."""
    if candidate.version != trusted.version + 1:
        _rejected(name, f"it is version {candidate.version}, after version {trusted.version} comes the next one only")
    try:
        accepted = "emergency" in roles_of(candidate.envelope, trusted)
    except RefusedError:
        accepted = False
    if not accepted:
        _rejected(name, f"it is not signed by enough emergency keys of version {trusted.version}")
    return candidate


def verify(document: Any, root: Root, now: float | None) -> Verified:
    """The manifest in a signed envelope; `now` is in epoch seconds, None while the clock can't be trusted.

    Raises RefusedError: manifest_malformed, signature_missing, signature_invalid, signature_unknown, keys_expired,
    manifest_expired.
    """
    if now is not None and epoch(root.document.expires) <= now:
        raise RefusedError(
            "keys_expired", f"the update keys expired on {root.document.expires}", "deliver the next root"
        )
    envelope = parse_envelope(document)
    roles = roles_of(envelope, root)
    if not roles:
        raise RefusedError(
            "signature_unknown",
            f"the manifest is not signed by enough keys that this camera trusts (root version {root.version})",
            "sign it with the release keys of the fleet's root",
        )
    manifest = parse_manifest(envelope.payload)
    if now is not None and epoch(manifest.expires) <= now:
        raise RefusedError("manifest_expired", f"the manifest expired on {manifest.expires}", "sign it again")
    return Verified(manifest, roles)


def check_version(
    verified: Verified, installed: Installed | None, floor: int
) -> Literal["install", "already_installed"]:
    """Whether to install over what is there. Raises RefusedError: counter_too_low, name_differs, version_not_newer,
    version_unknown.
    """
    manifest = verified.manifest
    downgrade = manifest.allow_downgrade and "emergency" in verified.roles
    if manifest.security_counter < floor:
        raise RefusedError(
            "counter_too_low",
            f"{manifest.name} {manifest.version} has security counter {manifest.security_counter}, below {floor}",
            "releases below the floor have known faults and are never installed again",
        )
    if installed is None:
        return "install"
    if (installed.name, installed.version, installed.sha256) == (manifest.name, manifest.version, manifest.sha256):
        return "already_installed"
    if installed.name != manifest.name and not downgrade:
        raise RefusedError(
            "name_differs",
            f"the target runs {installed.name}, the update is of {manifest.name}",
            "changing the product needs --allow-downgrade and an emergency signature",
        )
    if not downgrade and not _is_newer(manifest, installed):
        raise RefusedError(
            "version_not_newer",
            f"{manifest.name} {manifest.version} is not newer than the installed {installed.version}",
            "going back needs --allow-downgrade and an emergency signature",
        )
    return "install"


def _is_newer(manifest: Manifest, installed: Installed) -> bool:
    try:
        return compare_versions(manifest.version, installed.version) > 0
    except ValueError:
        raise RefusedError(
            "version_unknown",
            f"the installed {installed.version!r:.80} can't be ordered against {manifest.name} {manifest.version}",
            "send it with --allow-downgrade and an emergency signature",
        ) from None


def _kept_root(kept: Any, way_out: str) -> Root:
    try:
        return parse_root(kept, "the root that this camera keeps")
    except RefusedError as error:
        raise RefusedError("kept_root_invalid", error.message, way_out) from None


def _root_files(keys_dir: Path) -> list[tuple[str, Any]]:
    files = []
    try:
        for path in sorted(keys_dir.iterdir()):
            if ROOT_FILE.match(path.name):
                with path.open("rb") as file:
                    text = file.read(MAX_ROOT_BYTES + 1)
                if len(text) > MAX_ROOT_BYTES:
                    _bad_root(path.name, "it is too large")
                files.append((path.name, json.loads(text)))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        _bad_root(str(keys_dir), str(error.strerror))
    except (ValueError, RecursionError):
        _bad_root(path.name, "it is not JSON")
    return files


def _bad_root(name: str, why: str) -> NoReturn:
    raise RefusedError(
        "keys_invalid", f"{name} can't be used: {why}", "put the fleet's root.json into keys_dir again"
    ) from None


def _rejected(name: str, why: str) -> NoReturn:
    raise RefusedError(
        "keys_rejected",
        f"{name} is refused: {why}",
        "deliver every version in turn, each signed by the emergency keys of the one before and its own",
    )
