"""The device's certificate and key on disk: what the certificate says, new keys, and switching to a new pair in one step.

The pair lives in a folder of its own per generation; `certificate.pem`, `private-key.pem` and `thing.json` are links
through the link `current`, whose replacement is the switch. A power cut leaves the old or the new pair, complete.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from agent.errors import CloudError
from agent.host.files import fsync_folder
from agent.settings import Settings

CURRENT = "current"
GENERATION = re.compile(r"^generation-[0-9a-f]{16}$")
CERTIFICATE, PRIVATE_KEY, THING = "certificate.pem", "private-key.pem", "thing.json"


@dataclass(frozen=True)
class Certificate:
    """What a certificate says about itself."""

    id: str
    """AWS IoT's certificate id: SHA-256 of the DER form, 64 lower-case hexadecimal digits."""
    common_name: str
    """Of the subject; empty when there is none."""
    not_before: float
    not_after: float
    """Validity, seconds since the epoch."""


def certificate_id(pem: bytes) -> str:
    """AWS IoT's id of the first certificate in `pem`. Raises CloudError when there is none."""
    found = re.search(rb"-----BEGIN CERTIFICATE-----(.+?)-----END CERTIFICATE-----", pem, re.DOTALL)
    try:
        return (
            hashlib.sha256(base64.b64decode(b"".join(found[1].split()), validate=True)).hexdigest() if found else _no()
        )
    except binascii.Error:
        return _no()


def parse_certificate(pem: bytes) -> Certificate:
    """The facts of the first certificate in `pem`. Raises CloudError when it can't be parsed."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    try:
        certificate = x509.load_pem_x509_certificate(pem)
        names = certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
    except ValueError:
        _no()
    return Certificate(
        id=hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest(),
        common_name=str(names[0].value) if names else "",
        not_before=certificate.not_valid_before_utc.timestamp(),
        not_after=certificate.not_valid_after_utc.timestamp(),
    )


def read_certificate(path: Path) -> Certificate:
    """The facts of the certificate in the file `path`. Blocking. Raises CloudError."""
    try:
        return parse_certificate(path.read_bytes())
    except OSError as error:
        raise CloudError(
            "certificate", f"the device certificate can't be read: {path}: {error.strerror}", "provision the camera"
        ) from error


def key_matches(certificate_pem: bytes, key_pem: bytes) -> bool:
    """Whether the private key belongs to the certificate; False also when either can't be parsed."""
    from cryptography import x509
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        certificate = x509.load_pem_x509_certificate(certificate_pem)
        key = load_pem_private_key(key_pem, password=None)
        return bool(certificate.public_key() == key.public_key())
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return False


def make_key_and_request(common_name: str) -> tuple[bytes, bytes]:
    """A new P-256 private key (PKCS #8) and a certificate signing request for it, both PEM."""
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name[:64] or "camera")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, SHA256())
    return (
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        request.public_bytes(Encoding.PEM),
    )


def exists(settings: Settings) -> bool:
    """Whether there is a device certificate with its key. Blocking."""
    return settings.certificate_file.is_file() and settings.private_key_file.is_file()


def thing_name(settings: Settings) -> str:
    """The name in AWS IoT: from agent.toml, else what provisioning returned, else the certificate's common name.

    Blocking. Raises CloudError when none is known.
    """
    if settings.thing_name:
        return settings.thing_name
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads((settings.certificate_file.parent / THING).read_bytes())["thing_name"]
        if isinstance(kept, str) and kept:
            return kept
    name = read_certificate(settings.certificate_file).common_name
    if not re.fullmatch(r"[a-zA-Z0-9:_-]{1,128}", name):
        raise CloudError(
            "thing_name_unknown",
            f"the certificate's common name {name!r} is no thing name",
            "set thing_name in agent.toml",
        )
    return name


def stage(certificate_file: Path, key_pem: bytes) -> Path:
    """Keep a new private key durably, mode 0600, in a new generation's folder that nothing points to yet. Blocking."""
    folder = certificate_file.parent
    folder.mkdir(parents=True, exist_ok=True)
    generation = folder / f"generation-{secrets.token_hex(8)}"
    generation.mkdir(mode=0o755)
    _write(generation / PRIVATE_KEY, key_pem, 0o600)
    fsync_folder(generation)
    fsync_folder(folder)
    return generation


def discard(generation: Path) -> None:
    """Remove a generation that was not switched to. Blocking."""
    shutil.rmtree(generation, ignore_errors=True)


def switch(
    generation: Path, certificate_pem: bytes, thing: str, certificate_file: Path, private_key_file: Path
) -> None:
    """Complete a staged generation and make it the current one, in one step. The one before is kept. Blocking.

    Raises CloudError when certificate and key don't fit; then the old pair stays.
    """
    folder = certificate_file.parent
    if not key_matches(certificate_pem, (generation / PRIVATE_KEY).read_bytes()):
        raise CloudError("certificate", "the certificate does not belong to the key made for it", "provision again")
    _complete(generation, certificate_pem, thing)
    links = {private_key_file: PRIVATE_KEY, folder / THING: THING, certificate_file: CERTIFICATE}
    current = folder / CURRENT
    if not current.is_symlink():
        if certificate_file.is_file() and private_key_file.is_file():
            _adopt(folder, certificate_file, private_key_file)
        else:
            certificate_file.unlink(missing_ok=True)
            fsync_folder(folder)
            _link(current, Path(generation.name))
    for path, name in links.items():
        _link(path, Path(os.path.relpath(current / name, path.parent)))
    before = current.readlink().name
    _link(current, Path(generation.name))
    for old in folder.iterdir():
        if GENERATION.match(old.name) and old.name not in (before, generation.name):
            shutil.rmtree(old, ignore_errors=True)


def _adopt(folder: Path, certificate_file: Path, private_key_file: Path) -> None:
    """Make a pair of plain files, placed by hand, a generation, so that it can be switched away from in one step."""
    old = stage(certificate_file, private_key_file.read_bytes())
    name = ""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        name = str(json.loads((folder / THING).read_bytes())["thing_name"])
    _complete(old, certificate_file.read_bytes(), name)
    _link(folder / CURRENT, Path(old.name))


def _complete(generation: Path, certificate_pem: bytes, thing: str) -> None:
    known = {"thing_name": thing, "certificate_id": certificate_id(certificate_pem), "since": int(time.time())}
    _write(generation / CERTIFICATE, certificate_pem, 0o644)
    _write(generation / THING, json.dumps(known).encode() + b"\n", 0o644)
    fsync_folder(generation)


def _link(path: Path, target: Path) -> None:
    """Make `path` a link to `target` in one durable step, whatever it was."""
    if path.is_symlink() and path.readlink() == target:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    candidate = path.with_name(f".{path.name}.new")
    candidate.unlink(missing_ok=True)
    candidate.symlink_to(target)
    candidate.rename(path)
    fsync_folder(path.parent)


def _write(path: Path, data: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.write(data)
        file.flush()
        os.fsync(descriptor)


def _no() -> str:
    raise CloudError("certificate", "this is no PEM certificate", "provision the camera, or put its certificate there")
