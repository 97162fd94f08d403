"""Root documents: version 1, the next version, who has signed, and whether cameras will take it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agent.errors import RefusedError
from agent.updates.manifest import epoch, problems, strict_json
from agent.updates.trust import ROOT_FILE, ROOT_PAYLOAD_TYPE, Root, RootDocument, accept_root, key_id, parse_root

from .envelopes import Count, Draft, count, new_draft, parse_draft, read_json, standings
from .errors import SigningError
from .keys import ROLES, KeyEntry, KeyFolder

SOON_DAYS = 90


@dataclass(frozen=True)
class RootDraft:
    """A root document that may still lack signatures."""

    name: str
    document: RootDocument
    draft: Draft
    source: Any

    def emergency(self) -> Count:
        """How far its own emergency role has come."""
        return count("emergency", self.document.roles.emergency, standings(self.draft, self.document))

    def complete(self) -> Root:
        """As a camera reads it. Raises SigningError."""
        try:
            return parse_root(self.source, self.name)
        except RefusedError as error:
            missing = self.emergency()
            lacks = f" ({missing.words()})" if missing.missing else ""
            raise SigningError(f"{error.message}{lacks}") from None


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def in_days(days: int) -> str:
    """That many days from now, as signed documents have it. Raises SigningError."""
    if days < 1:
        raise SigningError(f"--expires-days {days}: it must be 1 or more")
    try:
        return (datetime.now(UTC) + timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%SZ")
    except OverflowError:
        raise SigningError(f"--expires-days {days} is too far away") from None


def root_payload(
    version: int, expires: str, keys: Mapping[str, Iterable[KeyEntry]], thresholds: Mapping[str, int]
) -> dict[str, Any]:
    """The payload of a root document with the keys of each role. Raises SigningError when it can't work."""
    by_role = {role: {entry.keyid: entry for entry in keys[role]} for role in ROLES}
    payload = {
        "schema": 1,
        "version": version,
        "expires": expires,
        "keys": {
            keyid: {"keytype": "ed25519", "public": entry.public.hex()}
            for entries in by_role.values()
            for keyid, entry in entries.items()
        },
        "roles": {role: {"threshold": thresholds[role], "keyids": list(by_role[role])} for role in ROLES},
    }
    for role in ROLES:
        have, threshold = len(by_role[role]), thresholds[role]
        if not 1 <= threshold <= have:
            raise SigningError(f"role {role} has {have} keys, a threshold of {threshold} can't be reached with them")
    parse_payload(payload, "the root")
    return payload


def parse_payload(payload: Any, name: str) -> RootDocument:
    """The document, consistent but for its signatures. Raises SigningError."""
    try:
        document = RootDocument.model_validate(payload)
        epoch(document.expires)
    except ValidationError as error:
        raise SigningError(f"{name} can't be used: {problems(error)}") from None
    except RefusedError as error:
        raise SigningError(f"{name} can't be used: {error.message}") from None
    roles = document.roles
    shared = set(roles.release.keyids) & set(roles.emergency.keyids)
    if shared:
        raise SigningError(f"{name}: key {min(shared)[:12]} is in both roles; each role needs keys of its own")
    for keyid, key in document.keys.items():
        if key_id(bytes.fromhex(key.public)) != keyid:
            raise SigningError(f"{name}: keyid {keyid[:12]} is not the digest of its key")
    for role in (roles.release, roles.emergency):
        if not set(role.keyids) <= set(document.keys) or len(set(role.keyids)) < role.threshold:
            raise SigningError(f"{name}: a role names a key that is not there, or has fewer keys than its threshold")
    return document


def read_root(path: Path) -> RootDraft:
    """A root document from a file, complete or not. Raises SigningError, OSError."""
    source = read_json(path)
    draft = parse_draft(source, ROOT_PAYLOAD_TYPE, str(path))
    try:
        payload = strict_json(draft.payload)
    except RefusedError as error:
        raise SigningError(f"{path}: {error.message}") from None
    return RootDraft(str(path), parse_payload(payload, str(path)), draft, source)


def root_draft(payload: Mapping[str, Any], name: str) -> RootDraft:
    draft = new_draft(ROOT_PAYLOAD_TYPE, payload)
    return RootDraft(name, parse_payload(dict(payload), name), draft, draft.document())


def with_draft(root: RootDraft, draft: Draft) -> RootDraft:
    return RootDraft(root.name, root.document, draft, draft.document())


def current_root(path: Path) -> tuple[Root, list[str]]:
    """What cameras that follow a folder trust: root.json and every complete version after it; or the root in a file.

    With it, in words, why a newer version in the folder does not count yet. Raises SigningError, OSError.
    """
    if not path.is_dir():
        return read_root(path).complete(), []
    files = sorted(file for file in path.iterdir() if ROOT_FILE.match(file.name))
    if not files:
        raise SigningError(f"{path} has no root.json: make it with `sign-update keys {path}`")
    found = {root.document.version: root for root in map(read_root, files)}
    trusted = found[min(found)].complete()
    for version in sorted(found)[1:]:
        try:
            trusted = accept_root(trusted, found[version].complete(), found[version].name)
        except (SigningError, RefusedError) as error:
            return trusted, [f"{error}; version {trusted.version} is used"]
    return trusted, []


def next_payload(
    root: RootDocument,
    folder: KeyFolder,
    added: Iterable[KeyEntry],
    removed: Iterable[str],
    thresholds: Mapping[str, int | None],
    expires: str,
) -> dict[str, Any]:
    """Version N+1 with keys added and taken out. Raises SigningError."""
    roles = {"release": root.roles.release, "emergency": root.roles.emergency}
    gone = {_one_key(text, root, folder) for text in removed}
    keys = {
        role: [
            KeyEntry(keyid[:12], role, bytes.fromhex(root.keys[keyid].public), None)
            for keyid in definition.keyids
            if keyid not in gone
        ]
        for role, definition in roles.items()
    }
    for entry in added:
        if entry.keyid in root.keys and entry.keyid not in gone:
            raise SigningError(f"key {entry.keyid[:12]} is in version {root.version} already")
        keys[entry.role].append(entry)
    wanted = {role: thresholds[role] or roles[role].threshold for role in ROLES}
    return root_payload(root.version + 1, expires, keys, wanted)


def _one_key(text: str, root: RootDocument, folder: KeyFolder) -> str:
    """The keyid that a keyid's start or a name stands for. Raises SigningError."""
    fitting = {keyid for keyid in root.keys if len(text) >= 6 and keyid.startswith(text.lower())}
    fitting |= {entry.keyid for entry in folder.entries if entry.name == text and entry.keyid in root.keys}
    if len(fitting) != 1:
        raise SigningError(f"--remove {text}: {len(fitting)} keys of version {root.version} fit, it must be one")
    return fitting.pop()


def describe(root: RootDraft, names: Mapping[str, str], previous: RootDraft | None) -> list[str]:
    """A root document for people: version, roles, keys, who signed, and what is wrong."""
    document, found = root.document, standings(root.draft, root.document, *([previous.document] if previous else []))
    left = (epoch(document.expires) - datetime.now(UTC).timestamp()) / 86_400
    lines = [
        f"{root.name}: root version {document.version}",
        f"expires {document.expires} ({'expired' if left <= 0 else f'in {left:.0f} days'})",
    ]
    roles = {"release": document.roles.release, "emergency": document.roles.emergency}
    for role, definition in roles.items():
        lines.append(f"{role}: {definition.threshold} of {len(definition.keyids)} keys must sign")
        lines += [f"  {keyid} {names.get(keyid, '')}".rstrip() for keyid in definition.keyids]
    lines.append("signed by:" if found else "signed by nobody yet")
    lines += [f"  {_signature_line(keyid, root, previous, names, found)}" for keyid in found]
    wrong = problems_of(root, previous, names)
    return [*lines, "complete" if not wrong else "problems:", *(f"  {line}" for line in wrong)]


def _signature_line(
    keyid: str, root: RootDraft, previous: RootDraft | None, names: Mapping[str, str], found: Mapping[str, str]
) -> str:
    roles = [
        f"{role} of version {one.document.version}"
        for one in (previous, root)
        if one
        for role, definition in (("release", one.document.roles.release), ("emergency", one.document.roles.emergency))
        if keyid in definition.keyids
    ]
    return (
        f"{keyid} {names.get(keyid, '')}".rstrip() + f": {found[keyid]}, {' and '.join(roles) or 'a key unknown here'}"
    )


def problems_of(root: RootDraft, previous: RootDraft | None, names: Mapping[str, str]) -> list[str]:
    """What is missing or wrong, in words; nothing: cameras can use it."""
    document = root.document
    found = standings(root.draft, document, *([previous.document] if previous else []))
    wrong = [f"the signature of {k[:12]} does not fit, it must be made again" for k, s in found.items() if s == "bad"]
    own = root.emergency()
    if own.missing:
        wrong.append(f"its own {own.words(names)}")
    if previous and previous.document.version == document.version - 1:
        before = count("emergency", previous.document.roles.emergency, found)
        if before.missing:
            wrong.append(f"version {document.version - 1}'s {before.words(names)}")
    elif document.version > 1:
        wrong.append(f"version {document.version - 1} is not beside it, so its signatures were not checked")
    left = (epoch(document.expires) - datetime.now(UTC).timestamp()) / 86_400
    if left <= 0:
        wrong.append("it has expired: cameras with a right clock refuse every update")
    elif left < SOON_DAYS:
        wrong.append(f"it expires in {left:.0f} days: make the next version now")
    return wrong


def beside(path: Path, version: int) -> RootDraft | None:
    """The root of that version in the folder of `path`, when there is one that can be read."""
    for file in sorted(path.resolve().parent.iterdir()):
        if ROOT_FILE.match(file.name):
            try:
                root = read_root(file)
            except SigningError:
                continue
            if root.document.version == version:
                return root
    return None


def missing_of(root: RootDraft, previous: RootDraft | None) -> list[Count]:
    """The emergency roles, of the version before and its own, that still lack signatures."""
    found = standings(root.draft, root.document, *([previous.document] if previous else []))
    both = [one.document.roles.emergency for one in (previous, root) if one]
    counted = [count("emergency", definition, found) for definition in both]
    return [one for one in counted if one.missing]


def check_step(old: Path, new: Path) -> tuple[Root, Root]:
    """Both roots, when cameras that trust `old` will take `new`. Raises SigningError saying why not."""
    before, after = read_root(old), read_root(new)
    trusted = before.complete()
    try:
        return trusted, accept_root(trusted, after.complete(), str(new))
    except RefusedError as error:
        lacking = count("emergency", before.document.roles.emergency, standings(after.draft, before.document))
        lacks = f" ({lacking.words()})" if lacking.missing else ""
        raise SigningError(f"{error.message}{lacks}") from None
