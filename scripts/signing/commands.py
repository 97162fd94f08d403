"""The commands `manifest`, `sign`, `verify` and `job`: each takes the parsed command line and returns the exit status."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from agent.updates.manifest import PAYLOAD_TYPE, Manifest

from . import jobs, manifests
from .envelopes import (
    Draft,
    add_signature,
    counts,
    new_draft,
    parse_draft,
    read_json,
    refuse_bad_signatures,
    standings,
    write_document,
)
from .errors import SigningError
from .keys import load_signer, write_new
from .trusting import Trust, at_hand, confirmed, secrets_of, tell, trusted_by


def manifest(arguments: argparse.Namespace) -> int:
    draft = _new_manifest(arguments)
    described = manifests.parse_payload(draft.payload)
    path = arguments.output or Path(f"{described.name}-{described.version}.manifest.json")
    if path.exists():
        raise SigningError(f"{path} is there already, perhaps with signatures: remove it or give another --output")
    if arguments.keys:
        trust = trusted_by(arguments)
        draft, notes = _sign_manifest(draft, trust, arguments)
        tell(*notes, *_manifest_outcome(draft, trust))
    else:
        tell(*manifests.describe(described), "not signed yet")
    write_new(path, (json.dumps(draft.document(), indent=2) + "\n").encode(), mode=0o644)
    print(path)
    return 0


def sign(arguments: argparse.Namespace) -> int:
    if not arguments.key and not arguments.keys:
        arguments.usage("give --key KEY, or --keys DIR to sign with the keys at hand")
    draft = parse_draft(read_json(arguments.file), PAYLOAD_TYPE, str(arguments.file))
    described = manifests.parse_payload(draft.payload)
    trust = trusted_by(arguments) if arguments.keys or arguments.root else None
    manifests.refuse_expired(described, trust.root if trust else None)
    if trust:
        refuse_bad_signatures(standings(draft, trust.root.document), str(arguments.file))
    if not arguments.key and trust:
        signed, notes = _sign_manifest(draft, trust, arguments)
        if signed == draft:
            raise SigningError("; ".join(["nothing was signed", *notes]))
        tell(*notes)
    else:
        tell(*manifests.describe(described))
        if not confirmed(arguments):
            return 1
        signed = draft
        for text in arguments.key:
            signer = load_signer(trust.folder.reference(text) if trust else text, secrets_of(arguments))
            if trust and signer.keyid not in trust.root.document.keys:
                raise SigningError(
                    f"key {signer.keyid[:12]} ({signer.place}) is not in root version {trust.root.version}: cameras do not know it"
                )
            signed = add_signature(signed, signer)
    write_document(arguments.file, signed.document())
    tell(*(_manifest_outcome(signed, trust) if trust else [f"signed; {len(signed.signatures)} signatures in all"]))
    return 0


def verify(arguments: argparse.Namespace) -> int:
    trust = trusted_by(arguments)
    document = read_json(arguments.file)
    envelope = document["manifest"] if isinstance(document, dict) and "manifest" in document else document
    draft = parse_draft(envelope, PAYLOAD_TYPE, str(arguments.file))
    verified = manifests.check_with_root(draft, trust.root, trust.names)
    if isinstance(document, dict) and document is not envelope and document.get("target") != verified.manifest.target:
        raise SigningError(f"the job names target {document.get('target')}, signed is {verified.manifest.target}")
    if arguments.artifact:
        manifests.check_artifact(verified.manifest, arguments.artifact)
    print(*manifests.describe(verified.manifest), sep="\n")
    print(f"a camera that trusts root version {trust.root.version} accepts it, signed by {_and(verified.roles)}")
    return 0


def job(arguments: argparse.Namespace) -> int:
    if arguments.manifest:
        for option in ("target", "installer", "name", "version", "counter"):
            if getattr(arguments, option) is not None:
                arguments.usage(f"--{option} is in the manifest, where it is signed")
    else:
        required = [f"--{o}" for o in ("target", "installer", "counter") if getattr(arguments, o) is None]
        required += [] if arguments.artifact else ["ARTIFACT"]
        if required or not arguments.keys:
            arguments.usage(f"needed without --manifest: {', '.join(required) or '--keys'}")
    for url in arguments.url:
        jobs.job_url(url)
    trust = trusted_by(arguments)
    if arguments.manifest:
        draft = parse_draft(read_json(arguments.manifest), PAYLOAD_TYPE, str(arguments.manifest))
        notes = list[str]()
    else:
        draft, notes = _sign_manifest(_new_manifest(arguments), trust, arguments, quietly=True)
    try:
        verified = manifests.check_with_root(draft, trust.root, trust.names)
        if arguments.emergency and "emergency" not in verified.roles:
            raise SigningError(f"--emergency: {counts(draft, trust.root)[1].words(trust.names)}")
    except SigningError as error:
        hint = [] if arguments.manifest else ["for several signers there are `manifest` and `sign`"]
        raise SigningError("; ".join([str(error), *notes, *hint])) from None
    signed = verified.manifest
    if arguments.manifest and arguments.artifact:
        manifests.check_artifact(signed, arguments.artifact)
    _give_out(arguments, signed, jobs.job_document(signed, draft.document(), arguments.url))
    return 0


def _give_out(arguments: argparse.Namespace, signed: Manifest, text: str) -> None:
    if arguments.output:
        write_document(arguments.output, json.loads(text))
    else:
        print(text, end="")
    tell(*jobs.warnings(signed, arguments.url), "next:")
    tell(*(f"  {line}" for line in jobs.next_commands(signed, arguments.url, arguments.artifact, arguments.output)))


def _sign_manifest(
    draft: Draft, trust: Trust, arguments: argparse.Namespace, *, quietly: bool = False
) -> tuple[Draft, list[str]]:
    """With the keys at hand of the roles it needs. Raises SigningError."""
    described = manifests.parse_payload(draft.payload)
    if not quietly:
        tell(*manifests.describe(described))
        if not confirmed(arguments):
            raise SigningError("not signed")
    notes: list[str] = []
    wanted = manifests.wanted_roles(described, emergency=getattr(arguments, "emergency", False))
    for name in wanted:
        role = getattr(trust.root.document.roles, name)
        found, lacks = at_hand(role, {s.keyid for s in draft.signatures}, trust.folder, secrets_of(arguments))
        notes += lacks
        for signer in found:
            draft = add_signature(draft, signer)
    return draft, notes


def _new_manifest(arguments: argparse.Namespace) -> Draft:
    payload = manifests.manifest_payload(arguments, tell)
    return new_draft(PAYLOAD_TYPE, payload)


def _manifest_outcome(draft: Draft, trust: Trust) -> list[str]:
    lacks = manifests.missing_words(draft, trust.root, trust.names)
    if lacks:
        return [f"not complete yet: {lacks}"]
    manifests.check_with_root(draft, trust.root, trust.names)
    return [f"complete: cameras that trust root version {trust.root.version} accept it"]


def _and(words: Iterable[str]) -> str:
    return " and ".join(sorted(words, reverse=True))
