"""What of the stored layers goes with agent.toml as it is now; the rest stays stored and comes back when agent.toml is mended. Pure."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from agent.config import desired as wishes
from agent.config.desired import Desired, Marks, Problem, leaves, pointer
from agent.config.layers import InForce, Layer

ROUNDS = 8


@dataclass(frozen=True)
class Dormant:
    """Values of a layer, by their JSON pointers, that do not go with agent.toml."""

    fleet: Mapping[str, Any]
    shadow: Mapping[str, Any]


def fit(in_force: InForce, site: Mapping[str, Any], remote: Marks) -> tuple[InForce, list[Problem]]:
    """`in_force` without what does not go with `site`, the parsed agent.toml, and why it does not."""
    fleet, of_fleet = _fit(in_force.fleet, site, remote)
    shadow, of_shadow = _fit(in_force.shadow, site, remote)
    problems = of_fleet + of_shadow
    for fitted in (
        replace(in_force, fleet=fleet, shadow=shadow),
        replace(in_force, fleet=fleet, shadow=Layer({}, shadow.targets, shadow.since)),
    ):
        candidate, found = wishes.validate(site, fitted.desired.as_json(), remote)
        if candidate:
            return fitted, problems
        problems += found
    return replace(in_force, fleet=Layer(), shadow=Layer()), problems


def dormant(whole: InForce, fitted: InForce) -> Dormant:
    """What `fit` left out."""
    return Dormant(_missing(whole.fleet, fitted.fleet), _missing(whole.shadow, fitted.shadow))


def to_try(in_force: InForce, sleeping: Dormant, *, by_job: bool) -> Desired:
    """The document of a proposal: what sleeps is left out, unless who proposes, a job or the shadow, has set it anew."""
    shadow = awake(in_force.shadow, sleeping.shadow) if by_job else in_force.shadow
    return replace(in_force, fleet=awake(in_force.fleet, sleeping.fleet), shadow=shadow).desired


def awake(layer: Layer, sleeping: Mapping[str, Any]) -> Layer:
    """`layer` without those of its values that sleep, where they have not changed."""
    document = copy.deepcopy(layer.desired.as_json())
    for path, value in leaves(layer.desired.as_json()).items():
        where = pointer(*path)
        if where in sleeping and sleeping[where] == value:
            _drop(document, where)
    for name in [name for name, left in document["targets"].items() if not left and layer.targets[name]]:
        del document["targets"][name]
    return Layer(document["agent"], document["targets"], layer.since)


def _missing(whole: Layer, fitted: Layer) -> dict[str, Any]:
    there = leaves(fitted.desired.as_json())
    return {pointer(*path): value for path, value in leaves(whole.desired.as_json()).items() if path not in there}


def _fit(layer: Layer, site: Mapping[str, Any], remote: Marks) -> tuple[Layer, list[Problem]]:
    document = copy.deepcopy(layer.desired.as_json())
    found: list[Problem] = []
    for _ in range(ROUNDS):
        candidate, problems = wishes.validate(site, document, remote)
        if candidate:
            return Layer(document["agent"], document["targets"], layer.since), found
        found += [_said(problem, layer) for problem in problems]
        for problem in problems:
            _drop(document, problem.pointer)
    return Layer(), found


def _said(problem: Problem, layer: Layer) -> Problem:
    origin = InForce(shadow=layer).latest_below(problem.pointer)
    by = f", set by {origin[0]}," if origin else ""
    return Problem(problem.pointer, f"what is stored{by} does not go with agent.toml: {problem.message}", problem.code)


def _drop(document: dict[str, Any], where: str) -> None:
    """Remove what a JSON pointer leads to, or as much below `agent` or `targets` as there is on the way."""
    parts = [part.replace("~1", "/").replace("~0", "~") for part in where.split("/")[1:]]
    if len(parts) < 2:
        for section in parts or ("agent", "targets"):
            document[section] = {}
        return
    here: Any = document
    for part in parts[:-1]:
        if not isinstance(here.get(part), dict):
            break
        here = here[part]
    else:
        here.pop(parts[-1], None)
        return
    here.pop(part, None)
