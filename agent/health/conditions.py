"""Conditions: what is wrong, since when, and what to do. Pure: readings and clocks are handed in.

A condition sets when its observation has been bad for `hold_s` and clears when it has been good for `clear_hold_s`; an
observation between the two thresholds, or none at all, changes nothing. While a root cause is set its consequences are
hidden. The events are exactly the changes of what is visible, so whoever replays them has the list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Severity = Literal["critical", "warning", "info"]
Verdict = Literal["bad", "good", "unclear"]


@dataclass(frozen=True)
class Rule:
    """One kind of condition. `depends_on` names its possible root causes; `forget_s` clears it when its source is no longer observed."""

    name: str
    severity: Severity
    remedy: str
    hold_s: float = 0
    clear_hold_s: float = 0
    depends_on: tuple[str, ...] = ()
    forget_s: float = 900


@dataclass(frozen=True)
class Observation:
    """What one reading says: `source` is the mount point, sensor or camera meant, empty for the whole machine."""

    condition: str
    source: str
    verdict: Verdict
    message: str


@dataclass
class _Track:
    is_set: bool = False
    since: float = 0.0
    message: str = ""
    turning_from: float | None = None
    observed: float = 0.0


class Conditions:
    """The conditions of `rules` over time."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self._rules = {rule.name: rule for rule in rules}
        self._tracks: dict[tuple[str, str], _Track] = {}

    def observe(self, observations: Iterable[Observation], *, now: float, at: float) -> list[dict[str, Any]]:
        """Take one round of observations; `now` is monotonic, `at` the same moment in epoch seconds. Returns the events."""
        before = self._visible()
        for observation in observations:
            rule = self._rules[observation.condition]
            track = self._tracks.setdefault((rule.name, observation.source), _Track())
            _advance(rule, track, observation, now, at)
        for (name, source), track in list(self._tracks.items()):
            if now - track.observed > self._rules[name].forget_s:
                del self._tracks[name, source]
        after = self._visible()
        cleared = [self._event(key, before[key], "clear", at) for key in before if key not in after]
        return cleared + [self._event(key, after[key], "set", at) for key in after if key not in before]

    def current(self) -> list[dict[str, Any]]:
        """The visible conditions, the gravest first, then the oldest."""
        order = {"critical": 0, "warning": 1, "info": 2}
        listed = [
            {
                "condition": name,
                "source": source,
                "severity": self._rules[name].severity,
                "message": track.message,
                "remedy": self._rules[name].remedy,
                "since": track.since,
            }
            for (name, source), track in self._visible().items()
        ]
        return sorted(listed, key=lambda condition: (order[condition["severity"]], condition["since"]))

    def _visible(self) -> dict[tuple[str, str], _Track]:
        active = {key: track for key, track in self._tracks.items() if track.is_set}
        causes = {name: rule.depends_on for name, rule in self._rules.items()}
        return {key: active[key] for key in root_causes(active, causes)}

    def _event(self, key: tuple[str, str], track: _Track, state: str, at: float) -> dict[str, Any]:
        rule = self._rules[key[0]]
        return {
            "condition": rule.name,
            "state": state,
            "source": key[1],
            "severity": rule.severity,
            "message": track.message,
            "remedy": rule.remedy if state == "set" else "",
            "at": at,
        }


def root_causes(active: Iterable[tuple[str, str]], depends_on: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    """Those of `active` (condition, source) that no other active one explains.

    A cause explains a consequence of the same source; a cause or consequence without source concerns all.
    """
    active = list(active)
    return [
        (name, source)
        for name, source in active
        if not any(
            cause in depends_on.get(name, ()) and (cause_source == source or "" in (cause_source, source))
            for cause, cause_source in active
        )
    ]


def health_state(conditions: Iterable[Mapping[str, Any]]) -> Literal["healthy", "degraded", "unhealthy"]:
    """`unhealthy` with a critical condition, `degraded` with a warning; information changes nothing."""
    severities = {condition["severity"] for condition in conditions}
    if "critical" in severities:
        return "unhealthy"
    return "degraded" if "warning" in severities else "healthy"


def _advance(rule: Rule, track: _Track, observation: Observation, now: float, at: float) -> None:
    track.observed = now
    against = "good" if track.is_set else "bad"
    if observation.verdict != against:
        track.turning_from = None
        if track.is_set and observation.verdict == "bad":
            track.message = observation.message
        return
    if track.turning_from is None:
        track.turning_from = now
    if now - track.turning_from >= (rule.clear_hold_s if track.is_set else rule.hold_s):
        track.is_set = not track.is_set
        track.turning_from = None
        track.message = observation.message
        if track.is_set:
            track.since = at
