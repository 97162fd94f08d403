"""The commands `keys`, `key` and `root`: keys, and the documents that say which of them cameras trust.

Each takes the parsed command line and returns the exit status.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from agent.updates.trust import Root

from . import roots
from .envelopes import Draft, add_signature, refuse_bad_signatures, standings, write_document
from .errors import SigningError
from .keys import (
    DESCRIPTION,
    ROLES,
    KeyEntry,
    KeyFolder,
    Signer,
    describe_key,
    discard,
    load_signer,
    new_keys,
    public_pem,
    read_folder,
    refuse_overwriting,
    write_new,
)
from .passphrases import Secrets
from .trusting import at_hand, confirmed, key_folder, names_in, secrets_of, tell


def keys(arguments: argparse.Namespace) -> int:
    folder, secrets = arguments.directory, secrets_of(arguments)
    path = folder / "root.json"
    given = {role: getattr(arguments, f"{role}_key") for role in ROLES}
    counts = {role: _how_many(getattr(arguments, role), given[role], arguments) for role in ROLES}
    files = {role: _key_files(folder, role, counts[role]) for role in ROLES}
    for file in (*files["release"], *files["emergency"], path, folder / DESCRIPTION):
        refuse_overwriting(file)
    known = [describe_key(key, role, folder, secrets) for role in ROLES for key in given[role]]
    expires = roots.in_days(arguments.expires_days)
    passphrase = secrets.new_passphrase(wanted=arguments.encrypt) if any(files.values()) else None
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = new_keys([*files["release"], *files["emergency"]], passphrase)
    try:
        described = KeyFolder(folder, ()).having([*_entries(made, files), *known])
        by_role = {role: [entry for entry in described.entries if entry.role == role] for role in ROLES}
        if len(described.entries) != len(made) + len(known):
            raise SigningError("a key was given twice; every key has one role and counts once")
        thresholds = {role: getattr(arguments, f"{role}_threshold") for role in ROLES}
        root = roots.root_draft(roots.root_payload(1, expires, by_role, thresholds), str(path))
        root, notes = _sign_root(root, None, described, secrets, made)
        described.write()
        write_new(path, (json.dumps(root.source, indent=2) + "\n").encode(), mode=0o644)
    except BaseException:
        if not path.exists():
            discard([*(Path(signer.place) for signer in made), folder / DESCRIPTION])
        raise
    tell(*notes, *_root_outcome(root, None, path, described))
    if made and not passphrase:
        tell("the new .key.pem files are not encrypted: keep them off-line, release and emergency apart.")
    return 0


def key(arguments: argparse.Namespace) -> int:
    path = arguments.file
    public = path.with_name(re.sub(r"(\.key)?(\.pem)?$", "", path.name) + ".pub.pem")
    refuse_overwriting(public)
    signer = new_keys([path], secrets_of(arguments).new_passphrase(wanted=arguments.encrypt))[0]
    write_new(public, public_pem(signer.public), mode=0o644)
    tell(f"{path} is yours alone; hand on {public}. keyid {signer.keyid}")
    return 0


def root_show(arguments: argparse.Namespace) -> int:
    root = roots.read_root(arguments.file)
    names = names_in(read_folder(arguments.file.resolve().parent))
    before = roots.beside(arguments.file, root.document.version - 1)
    print(*roots.describe(root, names, before), sep="\n")
    return 0


def root_new(arguments: argparse.Namespace) -> int:
    secrets = secrets_of(arguments)
    trusted, notes = roots.current_root(arguments.keys)
    folder = key_folder(arguments.keys, trusted)
    path = arguments.keys / f"{trusted.version + 1}.root.json"
    if path.exists():
        raise SigningError(f"{path} is there already: finish it with `root sign`, or remove it")
    added = [
        describe_key(text, role, arguments.keys, secrets)
        for role in ROLES
        for text in getattr(arguments, f"add_{role}")
    ]
    described = folder.having(added)
    thresholds = {role: getattr(arguments, f"{role}_threshold") for role in ROLES}
    expires = roots.in_days(arguments.expires_days)
    payload = roots.next_payload(trusted.document, folder, added, arguments.remove, thresholds, expires)
    root, before = roots.root_draft(payload, str(path)), _as_draft(trusted)
    if arguments.sign:
        root, more = _sign_root(root, before, described, secrets, [])
        notes += more
    described.write()
    write_new(path, (json.dumps(root.source, indent=2) + "\n").encode(), mode=0o644)
    tell(*notes, *_root_outcome(root, before, path, described))
    return 0


def root_sign(arguments: argparse.Namespace) -> int:
    secrets = secrets_of(arguments)
    root = roots.read_root(arguments.file)
    version = root.document.version
    before = roots.read_root(arguments.previous) if arguments.previous else roots.beside(arguments.file, version - 1)
    if before and before.document.version != version - 1:
        raise SigningError(f"--previous is version {before.document.version}, {version - 1} comes before {version}")
    folder = read_folder(arguments.keys or arguments.file.resolve().parent) or KeyFolder(arguments.file.parent, ())
    refuse_bad_signatures(standings(root.draft, root.document), str(arguments.file))
    tell(*roots.describe(root, names_in(folder), before))
    if not confirmed(arguments):
        return 1
    both = [one for one in (before, root) if one]
    for text in arguments.key:
        signer = load_signer(folder.reference(text), secrets)
        if not any(signer.keyid in one.document.roles.emergency.keyids for one in both):
            hint = (
                "" if before or version == 1 else f"; if it is one of version {version - 1}, give that with --previous"
            )
            raise SigningError(f"key {signer.keyid[:12]} ({signer.place}) is no emergency key of this root{hint}")
        root = roots.with_draft(root, add_signature(root.draft, signer))
    write_document(arguments.file, root.source)
    tell(*_root_outcome(root, before, arguments.file, folder))
    return 0


def root_check(arguments: argparse.Namespace) -> int:
    before, after = roots.check_step(arguments.old, arguments.new)
    wrong = roots.problems_of(roots.read_root(arguments.new), roots.read_root(arguments.old), {})
    print(f"cameras that trust version {before.version} will take version {after.version}", *wrong, sep="\n")
    return 0


def _sign_root(
    root: roots.RootDraft, before: roots.RootDraft | None, folder: KeyFolder, secrets: Secrets, made: Sequence[Signer]
) -> tuple[roots.RootDraft, list[str]]:
    """With the emergency keys at hand, the new ones first: as many as the thresholds need."""
    draft, notes = root.draft, list[str]()
    for one in (before, root):
        if one is None:
            continue
        role = one.document.roles.emergency
        new = [signer for signer in made if signer.keyid in role.keyids][: role.threshold]
        signed = {s.keyid for s in draft.signatures} | {signer.keyid for signer in new}
        more, lacks = at_hand(role, signed, folder, secrets)
        notes += lacks
        for signer in (*new, *more):
            draft = add_signature(draft, signer)
    return roots.with_draft(root, draft), notes


def _root_outcome(root: roots.RootDraft, before: roots.RootDraft | None, path: Path, folder: KeyFolder) -> list[str]:
    missing = roots.missing_of(root, before)
    if missing:
        return [
            f"{path} is not complete yet, cameras would refuse it:",
            *(f"  {one.words(names_in(folder))}" for one in missing),
            f"add signatures with `sign-update root sign {path} --key KEY`",
        ]
    return [f"{path} goes into keys_dir of every camera."]


def _as_draft(root: Root) -> roots.RootDraft:
    draft = Draft(root.envelope.payload_type, root.envelope.payload, root.envelope.signatures)
    return roots.RootDraft(f"version {root.version}", root.document, draft, root.source)


def _how_many(asked: int | None, given: Sequence[str], arguments: argparse.Namespace) -> int:
    number = asked if asked is not None else int(not given)
    if not 0 <= number <= 16:
        arguments.usage(f"{number} keys: make 0 to 16 of a role")
    return number


def _key_files(folder: Path, role: str, number: int) -> list[Path]:
    if number == 1:
        return [folder / f"{role}.key.pem"]
    return [folder / f"{role}-{count}.key.pem" for count in range(1, number + 1)]


def _entries(made: Sequence[Signer], files: dict[str, list[Path]]) -> list[KeyEntry]:
    roles = {str(path): role for role, paths in files.items() for path in paths}
    return [
        KeyEntry(name.removesuffix(".key.pem"), roles[signer.place], signer.public, name)
        for signer in made
        for name in [Path(signer.place).name]
    ]
