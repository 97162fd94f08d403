"""What the shadow wants, judged: parsing, merging with agent.toml, validation with JSON pointers, and what a change touches.

Pure. No document, however deep, large or wrongly typed, makes a function here raise; it yields problems instead.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from agent import setting_keys as schema
from agent.settings import Remote, Settings

MAX_DEPTH = 8
MAX_BYTES = 8192
MAX_INTEGER = 2**63 - 1
MOST_PROBLEMS, MOST_POINTER, MOST_MESSAGE = 20, 200, 300

KeyPath = tuple[str, ...]
Marks = Callable[[KeyPath], Remote | None]


@dataclass(frozen=True)
class Problem:
    """Why a document is not in force: a JSON pointer into `desired`, a sentence, and a stable snake_case code."""

    pointer: str
    message: str
    code: str

    def as_json(self) -> dict[str, str]:
        return {"pointer": self.pointer, "message": self.message, "code": self.code}


@dataclass(frozen=True)
class Desired:
    """A well-formed desired document: keys of agent.toml to override, and the whole document of each target."""

    agent: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {"agent": self.agent, "targets": self.targets}

    @property
    def digest(self) -> str:
        return digest(self.as_json())


@dataclass(frozen=True)
class Candidate:
    """A desired document that is acceptable, and the settings that result from it."""

    desired: Desired
    settings: Settings


@dataclass(frozen=True)
class Plan:
    """What a candidate changes: keys of agent.toml whose value differs, targets whose document differs."""

    keys: tuple[KeyPath, ...]
    targets: tuple[str, ...]
    applies: frozenset[str]

    @property
    def gated(self) -> bool:
        """Whether images could suffer, so that the change has to prove itself on trial."""
        return bool(self.targets) or any(key[0] == "capture" for key in self.keys)

    @property
    def on_trial(self) -> bool:
        """Whether it has to prove itself at all, and so waits for a maintenance window."""
        return self.gated or bool(self.applies - {"live"})

    @property
    def connectivity(self) -> bool:
        """Whether the connection could suffer, so that the cloud has to be reached over the new settings."""
        return "connectivity" in self.applies


def pointer(*parts: str | int) -> str:
    """The JSON pointer (RFC 6901) of `parts`; the whole document is the empty text."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def few(problems: Sequence[Problem]) -> list[Problem]:
    """No more of them, and no longer ones, than a person reads and a record can hold."""
    kept = [
        Problem(problem.pointer[:MOST_POINTER], problem.message[:MOST_MESSAGE], problem.code)
        for problem in problems[:MOST_PROBLEMS]
    ]
    if len(problems) > MOST_PROBLEMS:
        kept.append(Problem("", f"and {len(problems) - MOST_PROBLEMS} more", "more"))
    return kept


def digest(document: Any) -> str:
    """SHA-256 of the canonical JSON of `document`: equal documents have equal digests, whatever their order of keys."""
    try:
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    except (RecursionError, TypeError, ValueError):
        text = "not representable"
    return hashlib.sha256(text.encode()).hexdigest()


def parse(document: Any, max_bytes: int = MAX_BYTES) -> tuple[Desired, list[Problem]]:
    """The parts of a desired document; with problems, which are about form alone, the parts are empty."""
    if document is None:
        return Desired(), []
    problems = _malformed(document, max_bytes)
    if problems:
        return Desired(), problems
    if not isinstance(document, dict):
        return Desired(), [_wrong("", "desired must be an object")]
    for key in document.keys() - {"agent", "targets"}:
        problems.append(Problem(pointer(key), "unknown key; desired holds agent and targets", "unknown_key"))
    agent, targets = document.get("agent"), document.get("targets")
    if agent is not None and not isinstance(agent, dict):
        problems.append(_wrong(pointer("agent"), "agent must be an object, like the tables of agent.toml"))
    if targets is not None and not isinstance(targets, dict):
        problems.append(_wrong(pointer("targets"), "targets must be an object of one document for each target"))
    elif targets:
        for name, wanted in targets.items():
            if wanted is not None and not isinstance(wanted, dict):
                problems.append(_wrong(pointer("targets", name), "a target's document must be an object"))
    if problems:
        return Desired(), problems
    documents = {name: _without_nulls(wanted) for name, wanted in (targets or {}).items() if wanted is not None}
    return Desired(dict(agent or {}), documents), []


def merge(site: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """`site` overridden by `patch` as in JSON Merge Patch (RFC 7396): tables merge, null removes, all else replaces."""
    merged = dict(site)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            below = merged.get(key)
            merged[key] = merge(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def validate(
    site: Mapping[str, Any], document: Any, remote: Marks = schema.remote
) -> tuple[Candidate | None, list[Problem]]:
    """All of a desired document against `site`, the parsed agent.toml: a candidate, or every problem found.

    The contents of targets are judged elsewhere, by their own schema and check command.
    """
    desired, problems = parse(document, 2 * MAX_BYTES)
    if problems:
        return None, problems
    problems = list(_forbidden(desired.agent, site, remote))
    known = _names(site, ("config", "targets"))
    problems += [
        Problem(pointer("targets", name), f"unknown target{_suggest(name, known)}", "unknown_target")
        for name in desired.targets
        if name not in known
    ]
    allowed = _allowed(desired.agent, site, remote)
    try:
        merged = Settings.model_validate(merge(site, allowed))
    except ValidationError as error:
        return None, problems + [_invalid(key, words, allowed) for key, words in schema.explain(error)]
    problems += _coerced(allowed, merged.model_dump(mode="json"), remote)
    return (None, problems) if problems else (Candidate(desired, merged), [])


def plan(
    before: Settings, before_targets: Mapping[str, Any], candidate: Candidate, remote: Marks = schema.remote
) -> Plan:
    """What putting `candidate` in force changes, compared with the settings and targets' documents in force."""
    old, new = leaves(before.model_dump(mode="json")), leaves(candidate.settings.model_dump(mode="json"))
    keys = tuple(key for key in {**old, **new} if old.get(key) != new.get(key))
    wanted = candidate.desired.targets
    targets = tuple(
        name
        for name in sorted({*before_targets, *wanted})
        if name in candidate.settings.config.targets and digest(before_targets.get(name)) != digest(wanted.get(name))
    )
    applies = {mark.applies for mark in (remote(key) for key in keys) if mark}
    for name in targets:
        target = candidate.settings.config.targets[name]
        applies |= {"reboot"} if target.apply == "reboot" else set()
        applies |= {"connectivity"} if target.connectivity else set()
    return Plan(keys, targets, frozenset(applies))


def words(plan: Plan) -> list[str]:
    """What carrying out a plan means, step by step."""
    if not plan.keys and not plan.targets:
        return ["nothing: it is in force already"]
    found = []
    if plan.on_trial:
        found.append("wait for the maintenance window, and until no update or other configuration is on trial")
    found += [f"set {'.'.join(key)}" for key in plan.keys]
    found += [f"give target {name} its new document" for name in plan.targets]
    if "reboot" in plan.applies:
        found.append("reboot the camera")
    if plan.connectivity:
        found.append("take it back unless the cloud is reached over the new settings")
    if plan.gated:
        found.append("take it back when the images get fewer or worse")
    return found


def leaves(tree: Mapping[str, Any], path: KeyPath = ()) -> dict[KeyPath, Any]:
    """Each value of nested tables under its path; arrays and empty tables are values."""
    found: dict[KeyPath, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= leaves(value, (*path, key))
        else:
            found[(*path, key)] = value
    return found


def remote_leaves(agent: Mapping[str, Any], remote: Marks = schema.remote, path: KeyPath = ()) -> dict[KeyPath, Any]:
    """The keys of desired.agent that the cloud may set, under their paths, with what is wanted."""
    found: dict[KeyPath, Any] = {}
    for key, value in agent.items():
        if remote((*path, key)):
            found[(*path, key)] = value
        elif isinstance(value, Mapping):
            found |= remote_leaves(value, remote, (*path, key))
    return found


def is_table(path: KeyPath) -> bool:
    """Whether `path` names a table of agent.toml, such as `capture`, `capture.sources` or `capture.sources.front`."""
    if not path:
        return False
    inner = _is_key(path) and schema.section_at((*path, "*")) is not None
    return inner or schema.section_at(path) is not None or schema.is_open_table(path)


def suggestion(path: KeyPath) -> str:
    """`, did you mean …?` for an unknown key, where one that exists is near."""
    section = schema.section_at(path[:-1])
    return _suggest(path[-1], section.model_fields if section else ())


def _is_key(path: KeyPath) -> bool:
    section = schema.section_at(path[:-1])
    return section is not None and path[-1] in section.model_fields


def _malformed(document: Any, max_bytes: int) -> list[Problem]:
    """What makes `document` unusable as JSON in a shadow; walks without recursion."""
    stack: list[tuple[KeyPath, Any]] = [((), document)]
    while stack:
        path, value = stack.pop()
        if len(path) > MAX_DEPTH:
            return [Problem(pointer(*path[:2]), f"nested deeper than {MAX_DEPTH} levels", "too_deep")]
        words = _unusable(value)
        if words:
            return [Problem(pointer(*path), words, "not_json")]
        if isinstance(value, dict):
            for key, below in value.items():
                if not isinstance(key, str) or not _is_text(key):
                    return [Problem(pointer(*path), "has a key that is not valid Unicode text", "not_json")]
                stack.append(((*path, key), below))
        elif isinstance(value, list):
            if None in value:
                return [Problem(pointer(*path), "null inside an array, which a shadow can't hold", "not_json")]
            stack.extend(((*path, str(index)), below) for index, below in enumerate(value))
    size = len(json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode())
    if size > max_bytes:
        return [Problem("", f"{size} bytes of JSON, at most {max_bytes} are taken", "too_large")]
    return []


def _unusable(value: Any) -> str:
    if isinstance(value, str):
        return "" if _is_text(value) else "is not valid Unicode text"
    if isinstance(value, float):
        return "" if math.isfinite(value) else "is not a finite number"
    if isinstance(value, int):
        return "" if abs(value) <= MAX_INTEGER else "is an integer of more than 64 bits"
    return "" if value is None or isinstance(value, (dict, list)) else f"is no JSON value ({type(value).__name__})"


def _is_text(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_nulls(below) if isinstance(below, dict) else below
        for key, below in value.items()
        if below is not None
    }


def _forbidden(
    agent: Mapping[str, Any], site: Mapping[str, Any], remote: Marks, path: KeyPath = ()
) -> Iterator[Problem]:
    """Keys of desired.agent that don't exist or that only agent.toml may set."""
    for key, value in agent.items():
        here = (*path, key)
        where = pointer("agent", *here)
        if remote(here):
            if not _exists(site, here):
                yield Problem(where, f"agent.toml has no [{'.'.join(here[:-1])}]", "unknown_name")
        elif is_table(here):
            if isinstance(value, dict):
                yield from _forbidden(value, site, remote, here)
            else:
                yield _wrong(where, "is a table of agent.toml; set or remove its keys one by one")
        elif _is_key(here) or schema.is_open_table(path):
            yield Problem(where, "can't be set remotely: local only, change it in agent.toml", "local_only")
        else:
            yield Problem(where, f"unknown key{suggestion(here)}", "unknown_key")


def _allowed(agent: Mapping[str, Any], site: Mapping[str, Any], remote: Marks, path: KeyPath = ()) -> dict[str, Any]:
    """What is left of desired.agent without the keys that `_forbidden` names."""
    kept: dict[str, Any] = {}
    for key, value in agent.items():
        here = (*path, key)
        if remote(here):
            if _exists(site, here):
                kept[key] = value
        elif is_table(here) and isinstance(value, dict):
            below = _allowed(value, site, remote, here)
            if below:
                kept[key] = below
    return kept


def _exists(site: Mapping[str, Any], path: KeyPath) -> bool:
    """Whether each named table on the way to `path` (such as a capture source) is in agent.toml."""
    return all(
        path[end - 1] in _names(site, path[: end - 1])
        for end in range(2, len(path))
        if schema.section_at(path[: end - 1]) is None
    )


def _names(site: Mapping[str, Any], path: KeyPath) -> Mapping[str, Any]:
    for part in path:
        below = site.get(part)
        if not isinstance(below, Mapping):
            return {}
        site = below
    return site


def _invalid(key: KeyPath, words: str, agent: Mapping[str, Any]) -> Problem:
    """A problem that the settings' own rules found; what desired did not set itself is laid at the nearest key it did."""
    shown = 0
    here: Any = agent
    for part in key:
        if not isinstance(here, Mapping) or part not in here:
            break
        here, shown = here[part], shown + 1
    message = words if shown == len(key) else f"{'.'.join(key)}: {words}"
    return Problem(pointer("agent", *key[:shown]), message, "invalid_value")


def _coerced(agent: Mapping[str, Any], effective: Mapping[str, Any], remote: Marks) -> Iterator[Problem]:
    """Values of the wrong JSON type that would be taken for another value, such as "60" for 60."""
    for key, value in remote_leaves(agent, remote).items():
        if value is None:
            continue
        taken: Any = effective
        for part in key:
            taken = taken[part]
        if isinstance(value, bool) != isinstance(taken, bool) or value != taken:
            where = pointer("agent", *key)
            yield _wrong(where, f"write {json.dumps(taken)} instead of {json.dumps(value):.60}")


def _suggest(word: str, known: Any) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


def _wrong(where: str, words: str) -> Problem:
    return Problem(where, words, "wrong_type")
