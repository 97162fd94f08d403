"""The signed description of an update and the DSSE envelope around it; nothing here is believed before `trust` has verified it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from agent.errors import RefusedError

PAYLOAD_TYPE = "application/vnd.camera-agent.update+json"
MAX_PAYLOAD_BYTES = 24_000
MAX_SIGNATURES = 16

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Target = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$")]
Version = Annotated[str, StringConstraints(pattern=r"^([0-9]{1,9}:)?[0-9][0-9A-Za-z.+~-]{0,63}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Instant = Annotated[str, StringConstraints(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z$")]
Label = Annotated[str, StringConstraints(pattern=r"^[!-~]{1,128}$")]


class Document(BaseModel):
    """Base of what is signed: unknown keys are errors, types are exact, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


class GateTerms(Document):
    """What the trial must show before the update stays."""

    stable_for_s: float = Field(120, ge=0.1, le=86_400)
    """How long every check must hold without a break, in seconds."""
    deadline_s: float = Field(900, ge=0.2, le=86_400)
    """Time for all of the trial, in seconds."""
    min_capture_ratio: float = Field(0.8, ge=0, le=1)
    """Least share of the image rate before the update."""
    offline_policy: Literal["commit", "roll_back"] = "commit"
    """A camera that was off-line before the update: leave the cloud out of the trial, or demand it all the same."""


class Manifest(Document):
    """One update. All that matters for security is in here; job id and URLs are only hints."""

    schema_version: Literal[1] = Field(alias="schema")
    """Version of this format."""
    id: Label
    """Name of this signed document, for people."""
    target: Target
    """Which of the camera's targets it is for."""
    installer: Literal["app", "deb", "rauc", "agent"]
    """How it is installed; must be the target's installer."""
    name: Name
    """The product; the security counter's floor is kept by this name."""
    version: Version
    """Ordered as Debian orders versions: 1.10 after 1.9, 2.0~rc1 before 2.0."""
    security_counter: int = Field(ge=0, le=2**53)
    """Raised when older releases must never be installed again."""
    compatible: list[Label] = Field([], max_length=64)
    """Kinds of camera it fits; empty: all."""
    requires: dict[Name, Version] = Field({}, max_length=16)
    """Least versions of other products that must be installed; `camera-agent` is the agent."""
    arch: Literal["any", "x86_64", "aarch64", "armv7l"] = "any"
    """Machine it is built for."""
    size: int = Field(ge=1, le=2**40)
    """Bytes of the artifact."""
    installed_size: int = Field(ge=0, le=2**42)
    """Bytes of all files when unpacked."""
    sha256: Digest
    """Digest of the artifact, lower-case hexadecimal."""
    created: Instant
    """When it was signed, UTC."""
    expires: Instant
    """After this it is not installed any more, UTC."""
    restart: Literal["none", "unit", "reboot"] = "unit"
    """What makes the camera run it."""
    gate: GateTerms = GateTerms()
    rollback: Literal["yes", "no"] = "yes"
    """Whether the version before can come back."""
    allow_downgrade: bool = False
    """May replace a newer version; only believed with signatures of the emergency role."""


@dataclass(frozen=True)
class Signature:
    """One signature: `keyid` says whose it claims to be."""

    keyid: str
    value: bytes


@dataclass(frozen=True)
class Envelope:
    """A DSSE envelope, decoded and not verified."""

    payload_type: str
    payload: bytes
    signatures: tuple[Signature, ...]

    def signed_bytes(self) -> bytes:
        """What the signatures are over: DSSE's pre-authentication encoding of type and payload."""
        return pre_authentication_encoding(self.payload_type, self.payload)


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """DSSE's PAE: `DSSEv1 <length> <type> <length> <payload>`, lengths in bytes."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def parse_envelope(document: Any, payload_type: str = PAYLOAD_TYPE) -> Envelope:
    """Decode an envelope strictly. Raises RefusedError: manifest_malformed, manifest_too_large, signature_missing."""
    if not isinstance(document, Mapping) or set(document) != {"payloadType", "payload", "signatures"}:
        _malformed("the envelope must have payloadType, payload and signatures, and nothing else")
    if document["payloadType"] != payload_type:
        _malformed(f"payloadType is not {payload_type}")
    payload = _decode(document["payload"], "payload")
    if len(payload) >= MAX_PAYLOAD_BYTES:
        raise RefusedError(
            "manifest_too_large", f"the signed payload has {len(payload)} bytes", f"keep it under {MAX_PAYLOAD_BYTES}"
        )
    entries = document["signatures"]
    if not isinstance(entries, list) or len(entries) > MAX_SIGNATURES:
        _malformed(f"signatures must be a list of at most {MAX_SIGNATURES}")
    if not entries:
        raise RefusedError("signature_missing", "the manifest is not signed", "sign it with scripts/sign-update")
    signatures = []
    for entry in entries:
        if not isinstance(entry, Mapping) or set(entry) != {"keyid", "sig"} or not isinstance(entry["keyid"], str):
            _malformed("a signature must have keyid and sig, and nothing else")
        signatures.append(Signature(entry["keyid"], _decode(entry["sig"], "sig")))
    return Envelope(payload_type, payload, tuple(signatures))


def parse_manifest(payload: bytes) -> Manifest:
    """The manifest in an envelope's payload. Raises RefusedError manifest_malformed naming the wrong keys."""
    document = strict_json(payload)
    try:
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        _malformed(problems(error))
    if epoch(manifest.expires) <= epoch(manifest.created):
        _malformed("expires is not after created")
    if manifest.gate.stable_for_s >= manifest.gate.deadline_s:
        _malformed("gate: stable_for_s is not shorter than deadline_s")
    return manifest


def strict_json(payload: bytes) -> Any:
    """Parse UTF-8 JSON without duplicate keys, NaN or infinities. Raises RefusedError manifest_malformed."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("duplicate key")
        return result

    def no_constants(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(payload.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constants)
    except (ValueError, RecursionError) as error:
        _malformed(f"the payload is not valid JSON: {error}")


def problems(error: ValidationError) -> str:
    """A pydantic error in one line that names each wrong key."""
    lines = []
    for detail in error.errors(include_url=False, include_input=False):
        words = "unknown key" if detail["type"] == "extra_forbidden" else detail["msg"]
        lines.append(f"{'.'.join(str(part) for part in detail['loc'])}: {words}")
    return "; ".join(lines)


def digest_of(path: Path) -> str:
    """SHA-256 of an artifact, as a manifest has it. Blocking."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def epoch(instant: str) -> float:
    """An `Instant` in seconds since 1970. Raises RefusedError manifest_malformed for a day that does not exist."""
    try:
        return datetime.strptime(instant, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    except ValueError:
        _malformed(f"{instant} is not a time")


def _decode(text: Any, what: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        data = b""
    if not data or base64.b64encode(data).decode() != text:
        _malformed(f"{what} is not canonical base64")
    return data


def _malformed(why: str) -> NoReturn:
    raise RefusedError("manifest_malformed", f"the update's manifest can't be used: {why}", "sign it again") from None
