"""What was set by whom: the fleet layer, which jobs set, below the shadow's `desired`; together they lie over agent.toml. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from agent.config.desired import Desired, KeyPath, Problem, digest, is_table, leaves, merge, parse, pointer

Since = tuple[str, float]
"""Who set a value, such as `shadow version 7` or `job J-1`, and when, in epoch seconds."""


@dataclass(frozen=True)
class Layer:
    """One layer: keys of agent.toml and documents of targets, and for each value, under its JSON pointer, whence it came."""

    agent: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    since: dict[str, Since] = field(default_factory=dict)

    @property
    def desired(self) -> Desired:
        return Desired(self.agent, self.targets)

    def revised(self, desired: Desired, origin: str, at: float) -> Layer:
        """`desired` in its place; a value that was there already keeps its origin and time."""
        before = leaves(self.desired.as_json())
        since = {}
        for path, value in leaves(desired.as_json()).items():
            where = pointer(*path)
            known = self.since.get(where) if path in before and before[path] == value else None
            since[where] = known or (origin, at)
        return Layer(desired.agent, desired.targets, since)


@dataclass(frozen=True)
class InForce:
    """What the fleet and the shadow, at `version`, set together; where both set a value the shadow's counts."""

    version: int = 0
    fleet: Layer = field(default_factory=Layer)
    shadow: Layer = field(default_factory=Layer)

    @property
    def desired(self) -> Desired:
        """Both layers as one document."""
        targets = {name: overlay({}, document) for name, document in self.fleet.targets.items()}
        for name, document in self.shadow.targets.items():
            targets[name] = overlay(targets.get(name, {}), document)
        return Desired(overlay(self.fleet.agent, self.shadow.agent), targets)

    @property
    def digest(self) -> str:
        """Of who wants what: two that differ in it may still have the same values in force."""
        return digest([self.fleet.desired.as_json(), self.shadow.desired.as_json()])

    def without_targets(self, names: Collection[str]) -> InForce:
        """The rest of it."""

        def rest(layer: Layer) -> Layer:
            targets = {name: document for name, document in layer.targets.items() if name not in names}
            return Layer(layer.agent, targets, layer.since)

        return InForce(self.version, rest(self.fleet), rest(self.shadow)) if names else self

    def since(self, where: str) -> Since | None:
        """Whence the value under a JSON pointer came."""
        return self.shadow.since.get(where) or self.fleet.since.get(where)

    def latest_below(self, where: str) -> Since | None:
        """Whence the newest of the values under a JSON pointer came."""
        found = [
            since
            for layer in (self.fleet, self.shadow)
            for below, since in layer.since.items()
            if below == where or below.startswith(where + "/")
        ]
        return max(found, key=lambda since: since[1], default=None)


def overlay(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """`lower` with `upper` over it: tables merge, all else replaces, and null stays null."""
    merged = dict(lower)
    for key, value in upper.items():
        if isinstance(value, Mapping):
            below = merged.get(key)
            merged[key] = overlay(below if isinstance(below, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def patched(desired: Desired, patch: Mapping[str, Any]) -> dict[str, Any]:
    """The document that a JSON Merge Patch (RFC 7396) makes of `desired`; tables of the agent that become empty are gone."""
    document = merge(desired.as_json(), patch)
    if isinstance(document.get("agent"), dict):
        document["agent"] = _without_empty(document["agent"])
    return document


def with_fleet(
    good: InForce, job: str, patch: Mapping[str, Any], at: float, *, whole: bool
) -> tuple[InForce, list[Problem]]:
    """What would be in force once a job has patched the fleet layer, or with `whole` replaced it, and what is wrong with the patch."""
    wanted, problems = parse(patched(Desired() if whole else good.fleet.desired, patch))
    return replace(good, fleet=good.fleet.revised(wanted, f"job {job.partition('/')[0]}", at)), problems


def hidden(patch: Mapping[str, Any], shadow: Layer) -> list[Problem]:
    """Which values of a job's patch are not in force, because the camera's own shadow sets them otherwise."""
    there = leaves(shadow.desired.as_json())
    words = "the camera's own shadow sets it otherwise"
    return [
        Problem(pointer(*path), words, "overridden")
        for path, value in leaves(patch).items()
        if value is not None and value != there.get(path, value)
    ]


def _without_empty(tree: dict[str, Any], path: KeyPath = ()) -> dict[str, Any]:
    kept = {
        key: _without_empty(value, (*path, key)) if isinstance(value, dict) else value for key, value in tree.items()
    }
    return {key: value for key, value in kept.items() if value != {} or not is_table((*path, key))}


def from_json(record: Mapping[str, Any]) -> InForce:
    """What `asdict` of an InForce was. Raises KeyError, TypeError or ValueError for a record of another form."""
    return InForce(record["version"], _layer(record["fleet"]), _layer(record["shadow"]))


def _layer(record: Mapping[str, Any]) -> Layer:
    since = {where: (str(origin), float(at)) for where, (origin, at) in record["since"].items()}
    return Layer(dict(record["agent"]), dict(record["targets"]), since)
