"""DSSE envelopes that are still on their way: unsigned, partly signed, complete; and who signed them."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from agent.errors import RefusedError
from agent.host.files import write_atomic
from agent.updates.manifest import (
    MAX_SIGNATURES,
    PAYLOAD_TYPE,
    Signature,
    parse_envelope,
    pre_authentication_encoding,
    strict_json,
)
from agent.updates.trust import ROOT_PAYLOAD_TYPE, Role, Root

from .errors import SigningError
from .keys import Signer

MAX_FILE_BYTES = 200_000
KINDS = {PAYLOAD_TYPE: "a manifest", ROOT_PAYLOAD_TYPE: "a root document"}

Standing = Literal["good", "bad", "unknown"]


@dataclass(frozen=True)
class Draft:
    """An envelope of any number of signatures, none included."""

    kind: str
    payload: bytes
    signatures: tuple[Signature, ...] = ()

    def signed_bytes(self) -> bytes:
        return pre_authentication_encoding(self.kind, self.payload)

    def document(self) -> dict[str, Any]:
        return {
            "payloadType": self.kind,
            "payload": base64.b64encode(self.payload).decode(),
            "signatures": [{"keyid": s.keyid, "sig": base64.b64encode(s.value).decode()} for s in self.signatures],
        }


def new_draft(kind: str, payload: Mapping[str, Any]) -> Draft:
    return Draft(kind, json.dumps(payload, separators=(",", ":"), sort_keys=True).encode())


def read_json(path: Path) -> Any:
    """A JSON document without duplicate keys. Raises SigningError, OSError."""
    with path.open("rb") as file:
        text = file.read(MAX_FILE_BYTES + 1)
    if len(text) > MAX_FILE_BYTES:
        raise SigningError(f"{path} is too large for a signed document")
    try:
        return strict_json(text)
    except RefusedError as error:
        raise SigningError(f"{path}: {error.message.partition(': ')[2].replace('the payload', 'it')}") from None


def parse_draft(document: Any, kind: str, name: str) -> Draft:
    """An envelope of this payload type, as strictly as a camera reads it but for missing signatures. Raises SigningError."""
    if isinstance(document, Mapping) and document.get("payloadType") in KINDS.keys() - {kind}:
        raise SigningError(f"{name} is {KINDS[document['payloadType']]}, not {KINDS[kind]}")
    unsigned = isinstance(document, Mapping) and document.get("signatures") == []
    if unsigned:
        document = {**document, "signatures": [{"keyid": "", "sig": "AA=="}]}
    try:
        envelope = parse_envelope(document, kind)
    except RefusedError as error:
        raise SigningError(f"{name} is not {KINDS[kind]}: {error.message.rpartition(': ')[2]}") from None
    return Draft(kind, envelope.payload, () if unsigned else envelope.signatures)


def write_document(path: Path, document: Mapping[str, Any]) -> None:
    """Replace a file that is for everyone's eyes, durably. Raises OSError."""
    write_atomic(path, (json.dumps(document, indent=2) + "\n").encode(), mode=0o644)


def add_signature(draft: Draft, signer: Signer) -> Draft:
    """The envelope with one more signature, which is checked before it is taken. Raises SigningError."""
    if any(s.keyid == signer.keyid and verifies(s, signer.public, draft) for s in draft.signatures):
        raise SigningError(f"key {signer.keyid[:12]} ({signer.place}) has signed already")
    others = tuple(s for s in draft.signatures if s.keyid != signer.keyid)
    if len(others) >= MAX_SIGNATURES:
        raise SigningError(f"it has {len(others)} signatures, no more fit")
    signature = Signature(signer.keyid, signer.sign(draft.signed_bytes()))
    if not verifies(signature, signer.public, draft):
        raise SigningError(f"{signer.place} signed with another key than its public key says; nothing was written")
    return replace(draft, signatures=(*others, signature))


def verifies(signature: Signature, public: bytes, draft: Draft) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature.value, draft.signed_bytes())
    except (InvalidSignature, ValueError):
        return False
    return True


def standings(draft: Draft, *roots: Any) -> dict[str, Standing]:
    """How each signature stands by its keyid, with the keys of some root documents."""
    public = {keyid: bytes.fromhex(key.public) for root in roots for keyid, key in root.keys.items()}
    found: dict[str, Standing] = {}
    for signature in draft.signatures:
        key = public.get(signature.keyid)
        if key is None:
            found[signature.keyid] = "unknown"
        elif found.get(signature.keyid) != "bad":
            found[signature.keyid] = "good" if verifies(signature, key, draft) else "bad"
    return found


@dataclass(frozen=True)
class Count:
    """How far a role has come: keys that signed, how many it takes, and which of its keys could still sign."""

    role: str
    signed: tuple[str, ...]
    threshold: int
    waiting: tuple[str, ...]

    @property
    def missing(self) -> int:
        return max(0, self.threshold - len(self.signed))

    def words(self, names: Mapping[str, str] | None = None) -> str:
        """`release: 1 of 2 signatures; 1 more is missing, from ab12cd… or …`."""
        known = names or {}
        text = f"{self.role}: {len(self.signed)} of {self.threshold} signature{'s'[: self.threshold != 1]}"
        if not self.missing:
            return text
        from_whom = ", ".join(f"{k[:12]} ({known[k]})" if k in known else k[:12] for k in self.waiting)
        return f"{text}; {self.missing} more {'is' if self.missing == 1 else 'are'} missing, from {from_whom}"


def count(role: str, definition: Role, found: Mapping[str, Standing]) -> Count:
    keyids = tuple(dict.fromkeys(definition.keyids))
    signed = tuple(keyid for keyid in keyids if found.get(keyid) == "good")
    return Count(role, signed, definition.threshold, tuple(k for k in keyids if k not in signed))


def counts(draft: Draft, root: Root) -> tuple[Count, Count]:
    """How far release and emergency have come, in this order."""
    found = standings(draft, root.document)
    roles = root.document.roles
    return count("release", roles.release, found), count("emergency", roles.emergency, found)


def refuse_bad_signatures(found: Mapping[str, Standing], name: str) -> None:
    """Raises SigningError: cameras refuse an envelope with a wrong signature of a known key."""
    bad = ", ".join(keyid[:12] for keyid, standing in found.items() if standing == "bad")
    if bad:
        raise SigningError(
            f"{name}: the signature of {bad} does not fit, the document was changed after signing; make it again"
        )
