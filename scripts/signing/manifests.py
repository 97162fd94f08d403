"""Manifests: the payload for an artifact, its words for the person who signs, and what a camera would say of it."""

from __future__ import annotations

import argparse
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from agent.errors import RefusedError
from agent.updates.manifest import Manifest, digest_of, epoch, parse_manifest
from agent.updates.trust import RoleName, Root, Verified, verify

from .artifacts import Facts, inspect
from .envelopes import Draft, counts
from .errors import SigningError
from .roots import in_days, now

RESTARTS = {"app": "unit", "deb": "unit", "agent": "unit", "rauc": "reboot"}


def manifest_payload(arguments: argparse.Namespace, tell: Callable[[str], None]) -> dict[str, Any]:
    """The payload for an artifact, as the command line and the artifact itself say. Raises SigningError, OSError."""
    artifact: Path = arguments.artifact
    facts = inspect(artifact, arguments.installer)
    if facts.unchecked:
        tell(facts.unchecked)
    name = arguments.name or facts.name or _needed("--name")
    version = _agreed("--version", arguments.version, facts.version, artifact)
    _check_compatible(arguments.compatible, facts, artifact)
    payload = {
        "schema": 1,
        "id": arguments.id or f"{name}-{version}-{uuid.uuid4().hex[:8]}",
        "target": arguments.target,
        "installer": arguments.installer,
        "name": name,
        "version": version,
        "security_counter": arguments.counter,
        "compatible": arguments.compatible,
        "requires": _requires(arguments.requires),
        "arch": _agreed("--arch", arguments.arch, facts.arch, artifact, otherwise="any"),
        "size": artifact.stat().st_size,
        "installed_size": facts.installed_size,
        "sha256": digest_of(artifact),
        "created": now(),
        "expires": arguments.expires or in_days(arguments.expires_days),
        "restart": _restart(arguments),
        "gate": {
            "stable_for_s": arguments.stable_for,
            "deadline_s": arguments.deadline,
            "min_capture_ratio": arguments.min_capture_ratio,
            "offline_policy": arguments.offline_policy,
        },
        "rollback": arguments.rollback,
        "allow_downgrade": arguments.allow_downgrade,
    }
    parse_payload(json.dumps(payload).encode())
    return payload


def parse_payload(payload: bytes) -> Manifest:
    """Raises SigningError naming what a camera would not understand."""
    try:
        return parse_manifest(payload)
    except RefusedError as error:
        raise SigningError(f"no camera would accept that manifest: {error.message.partition(': ')[2]}") from None


def wanted_roles(manifest: Manifest, *, emergency: bool = False) -> tuple[RoleName, ...]:
    """Whose signatures it needs: a downgrade is believed only with those of the emergency role too."""
    return ("release", "emergency") if emergency or manifest.allow_downgrade else ("release",)


def describe(manifest: Manifest) -> list[str]:
    """All that is signed, a line per key; every value is printable, which `parse_manifest` has checked."""
    values = manifest.model_dump(by_alias=True)
    gate = values.pop("gate")
    title = f"{values.pop('name')} {values.pop('version')} for target {values.pop('target')}, installer {values.pop('installer')}"
    rest = {**values, **{f"gate.{key}": value for key, value in gate.items()}}
    warning = ["  it may REPLACE A NEWER VERSION"] if manifest.allow_downgrade else []
    warning += ["  the version before can NOT come back"] if manifest.rollback == "no" else []
    return [title, *warning, *(f"  {key:22} {_words(value)}" for key, value in rest.items())]


def check_with_root(draft: Draft, root: Root, names: Mapping[str, str]) -> Verified:
    """What a camera that trusts `root` says today. Raises SigningError with who has yet to sign."""
    manifest = parse_payload(draft.payload)
    refuse_expired(manifest, root)
    counted = counts(draft, root)
    try:
        verified = verify(draft.document(), root, datetime.now(UTC).timestamp())
    except RefusedError as error:
        lacks = missing_words(draft, root, names) if error.code in ("signature_unknown", "signature_missing") else ""
        raise SigningError(f"{error.message}{f' ({lacks})' if lacks else ''}") from None
    if manifest.allow_downgrade and "emergency" not in verified.roles:
        raise SigningError(f"allow_downgrade counts with emergency signatures only ({counted[1].words(names)})")
    return verified


def missing_words(draft: Draft, root: Root, names: Mapping[str, str]) -> str:
    """Which signatures it still needs; empty: none."""
    manifest = parse_payload(draft.payload)
    release, emergency = counts(draft, root)
    needed = [emergency] if manifest.allow_downgrade else [] if not emergency.missing else [release]
    return "; ".join(one.words(names) for one in needed if one.missing)


def refuse_expired(manifest: Manifest, root: Root | None) -> None:
    """Raises SigningError when no camera with a right clock would take it any more."""
    today = datetime.now(UTC).timestamp()
    if root and epoch(root.document.expires) <= today:
        raise SigningError(
            f"root version {root.version} expired on {root.document.expires}: make the next version first"
        )
    if epoch(manifest.expires) <= today:
        raise SigningError(f"the manifest expired on {manifest.expires}: make it again")


def check_artifact(manifest: Manifest, artifact: Path) -> None:
    """Raises SigningError unless the file is the one that was signed, and can be installed as was signed; OSError."""
    size = artifact.stat().st_size
    if size != manifest.size:
        raise SigningError(f"{artifact} has {size} bytes, {manifest.size} were signed")
    if digest_of(artifact) != manifest.sha256:
        raise SigningError(f"{artifact} is another file than the one that was signed: its SHA-256 differs")
    facts = inspect(artifact, manifest.installer)
    if facts.installed_size != manifest.installed_size:
        raise SigningError(
            f"{artifact} has {facts.installed_size} bytes when installed, {manifest.installed_size} were signed"
        )


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value) or "all"
    if isinstance(value, dict):
        return ", ".join(f"{key} {least}" for key, least in value.items()) or "nothing"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _needed(option: str) -> NoReturn:
    raise SigningError(f"{option} is needed: this kind of artifact does not say it itself")


def _agreed(option: str, given: str | None, found: str | None, artifact: Path, otherwise: str | None = None) -> str:
    """What was given, which must be what the artifact says where it says it."""
    if given and found and given != found:
        raise SigningError(f"{option} {given} differs from what {artifact} says, {found}")
    return given or found or otherwise or _needed(option)


def _check_compatible(given: Sequence[str], facts: Facts, artifact: Path) -> None:
    if given and facts.compatible and facts.compatible not in given:
        raise SigningError(f"{artifact} is a bundle for {facts.compatible}, which is not among --compatible")


def _requires(given: Sequence[str]) -> dict[str, str]:
    required = {}
    for text in given:
        name, equals, version = text.partition("=")
        if not equals or name in required:
            raise SigningError(f"--requires {text}: give each product once, as NAME=LEAST_VERSION")
        required[name] = version
    return required


def _restart(arguments: argparse.Namespace) -> str:
    restart: str = arguments.restart or RESTARTS[arguments.installer]
    only = {"rauc": "reboot", "agent": "unit"}.get(arguments.installer, restart)
    if restart != only:
        raise SigningError(f"--restart {restart}: installer {arguments.installer} needs {only}")
    return restart
