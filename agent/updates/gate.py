"""The gate: what must be seen after a change before it stays, judged from what was seen and when.

A change passes when every check held without a break for `stable_for_s` before the deadline. It fails at the deadline,
or earlier when a check that proves harm failed for a sustained time; a blip only starts the stable time again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from agent.errors import AgentError, FailedError
from agent.host import processes
from agent.logs import get_logger

log = get_logger("gate")

LONGEST_GAP_S = 40.0
PROBE_TIMEOUT_S = 30.0
WAIT_LOOK_S = 0.5
MAX_UNIT_RESTARTS = 3
TOO_SHORT = (
    "the images were neither good nor bad, too few came to tell: give the trial more time (config.trial_s, or"
    " gate.deadline_s of an update), or correct interval_s of a source that is slower than it says"
)
MACHINE = frozenset({"memory.low", "temperature.high", "disk.read_only"})
"""Conditions that a trial must not bring about."""


class UnitState(Protocol):
    """What systemd says of a unit."""

    @property
    def active(self) -> str: ...
    @property
    def sub(self) -> str: ...
    @property
    def restarts(self) -> int: ...


class Units(Protocol):
    """Restarting and asking systemd units; raises FailedError."""

    async def restart(self, unit: str) -> None: ...
    async def state(self, unit: str) -> UnitState: ...


class Comparison(Protocol):
    """The images since a change against those before: `waiting` means not enough seen yet to say.

    `judged` is by what: pictures, partly (not of all sources), rate, nothing.
    """

    @property
    def assessed(self) -> int: ...
    @property
    def ok(self) -> bool: ...
    @property
    def waiting(self) -> bool: ...
    @property
    def reasons(self) -> Sequence[str]: ...
    @property
    def judged(self) -> str: ...


class Capture(Protocol):
    """How the images are doing; `since` is the monotonic time of the change in seconds.

    `lacking` says what a reference would lack that is worth waiting for, "" when nothing; it ends the wait itself.
    """

    def lacking(self) -> str: ...
    def reference(self) -> dict[str, Any]: ...
    def compare(self, reference: dict[str, Any], since: float, least_share: float) -> Comparison: ...
    def judging_s(self, reference: Mapping[str, Any], intervals: Iterable[float]) -> float: ...


@dataclass(frozen=True)
class Check:
    """One thing seen: `ok` is None while it can't be said.

    `code` is the reason code of a change that fails by it. `harmful_after_s` is how long it must fail without a break
    to end the trial early; None: only the deadline does. `held_as` are the words for the end, where the name says too much;
    `late` those for a deadline at which it still can't be said.
    """

    name: str
    ok: bool | None
    reason: str = ""
    code: str = "deadline"
    harmful_after_s: float | None = None
    held_as: str = ""
    late: str = ""


@dataclass(frozen=True)
class Terms:
    """Times of a trial in seconds; `started` is monotonic."""

    started: float
    stable_for_s: float
    deadline_s: float


@dataclass(frozen=True)
class Seen:
    """What the judging remembers between two looks."""

    at: float | None = None
    good_since: float | None = None
    bad_since: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """`passed` is None while the trial goes on; `code` and `reasons` say why it failed, or what it waits for.

    `harm`: it failed because of something that lasted, not because its time was over.
    """

    passed: bool | None
    code: str = ""
    reasons: tuple[str, ...] = ()
    harm: bool = False


def judge(seen: Seen, checks: Sequence[Check], now: float, terms: Terms) -> tuple[Seen, Verdict]:
    """Take one look at all checks into account. Pure; `now` is monotonic and never falls."""
    if seen.at is not None and now - seen.at > LONGEST_GAP_S:
        seen = Seen()
    good = all(check.ok for check in checks)
    good_since = (now if seen.good_since is None else seen.good_since) if good else None
    bad_since = {check.name: seen.bad_since.get(check.name, now) for check in checks if check.ok is False}
    seen = replace(seen, at=now, good_since=good_since, bad_since=bad_since)
    if good_since is not None and now - good_since >= terms.stable_for_s and now <= terms.started + terms.deadline_s:
        held = ", ".join(check.name for check in checks if not check.held_as) or "nothing to look at"
        words = "; ".join([held, *(check.held_as for check in checks if check.held_as)])
        return seen, Verdict(True, reasons=(f"held for {terms.stable_for_s:g} s: {words}",))
    bad = [check for check in checks if check.ok is False]
    for check in bad:
        if check.harmful_after_s is not None and now - bad_since[check.name] >= check.harmful_after_s:
            return seen, Verdict(False, check.code, _reasons([check, *(c for c in bad if c is not check)]), harm=True)
    unknown = [check for check in checks if check.ok is None]
    if now >= terms.started + terms.deadline_s:
        words = f"not all was well for {terms.stable_for_s:g} s without a break within {terms.deadline_s:g} s"
        late = tuple(check.late for check in unknown if check.late)
        return seen, Verdict(False, bad[0].code if bad else "deadline", (*_reasons(bad + unknown), words, *late))
    return seen, Verdict(None, reasons=_reasons(bad + unknown) or ("all is well, for long enough is awaited",))


def harmful_after_s(stable_for_s: float) -> float:
    """How long images must be spoilt to end a trial early: half the stable time, within 10 to 60 s."""
    return min(60.0, max(10.0, stable_for_s / 2))


async def _log_only(words: str) -> None:
    log.info(words)


class Gate:
    """Looks at the unit, the probe, the images and the cloud around a change."""

    def __init__(
        self,
        units: Units | None,
        capture: Capture | None,
        cloud_ok: Callable[[], bool],
        conditions: Callable[[], Collection[str]] = frozenset,
    ) -> None:
        """`conditions` gives the names of the conditions that are set."""
        self.cloud_ok = cloud_ok
        self._units = units
        self._capture = capture
        self._conditions = conditions

    async def settled(self, on_wait: Callable[[str], Awaitable[None]] = _log_only) -> None:
        """Wait until there is a reference of the images, or it is plain that there will be none soon.

        `on_wait` gets the words whenever they change.
        """
        told = ""
        while self._capture and (lacking := self._capture.lacking()):
            if lacking != told:
                told = lacking
                await on_wait(f"watching the images before the change: {lacking}")
            await asyncio.sleep(WAIT_LOOK_S)

    async def baseline(self, *, probe: Sequence[str] | None = None, unit: str = "") -> dict[str, Any]:
        """How things are just before a change, as JSON for `watch`; `settled` first."""
        return {
            "capture": self._capture.reference() if self._capture else None,
            "cloud": self.cloud_ok(),
            "machine": self._machine(),
            "probe": (await check_probe(probe)).ok if probe else None,
            "unit": (await self._unit(unit, _Restarts())).ok if unit else None,
        }

    def judging_s(self, baseline: Mapping[str, Any], intervals: Iterable[float]) -> float:
        """Seconds after a change by which images that are well are judged, however slow the cameras; 0 without images.

        `intervals` are the `interval_s` of the sources, before the change and after it. The stable time comes on top.
        """
        if self._capture is None or baseline.get("capture") is None:
            return 0.0
        return self._capture.judging_s(baseline["capture"], intervals)

    async def watch(
        self,
        baseline: Mapping[str, Any],
        *,
        since: float,
        stable_for_s: float,
        deadline_s: float,
        unit: str = "",
        probe: Sequence[str] | None = None,
        cloud: bool | None = None,
        images: bool = True,
        least_share: float = 0.8,
        on_look: Callable[[Verdict], None] = lambda _: None,
    ) -> Verdict:
        """Look again and again until the change at the monotonic time `since` has passed or failed.

        The cloud is asked when it was reachable before, or as `cloud` says; images and machine unless `images` is False, with
        `least_share` of their rate before.
        """
        terms = Terms(since, stable_for_s, deadline_s)
        pause = min(5.0, stable_for_s / 10)
        restarts, seen = _Restarts(), Seen()
        while True:
            checks = []
            if unit:
                checks.append(await self._unit(unit, restarts))
            if probe:
                checks.append(await check_probe(probe))
            if images and self._capture and baseline.get("capture") is not None:
                checks.append(self._images(self._capture, baseline["capture"], since, stable_for_s, least_share))
            worse = sorted(set(self._machine()) - set(baseline.get("machine", MACHINE)))
            if worse and images:
                words = f"since the change: {', '.join(worse)}"
                checks.append(Check("machine", False, words, "machine_worse", harmful_after_s(stable_for_s)))
            if baseline.get("cloud") if cloud is None else cloud:
                checks.append(Check("cloud", self.cloud_ok(), "the cloud is not reached again", "cloud_lost"))
            seen, verdict = judge(seen, checks, time.monotonic(), terms)
            on_look(verdict)
            if verdict.passed is not None:
                log.info("gate decided", passed=verdict.passed, code=verdict.code, reasons=list(verdict.reasons))
                return verdict
            await asyncio.sleep(max(0.0, min(pause, since + deadline_s - time.monotonic())))

    async def _unit(self, unit: str, restarts: _Restarts) -> Check:
        if self._units is None:
            return Check("unit", None, f"{unit} can't be asked about, there is no systemd", "unit_failed")
        try:
            state = await self._units.state(unit)
        except FailedError as error:
            return Check("unit", None, error.message, "unit_failed")
        more, total = restarts.note(state.restarts)
        if total >= MAX_UNIT_RESTARTS:
            return Check("unit", False, f"{unit} restarted {total} times by itself", "unit_failed", 0)
        if more:
            return Check("unit", False, f"{unit} restarted by itself", "unit_failed")
        if state.active == "failed":
            return Check("unit", False, f"{unit} has failed", "unit_failed", 10)
        ok = state.active in ("active", "reloading")
        return Check("unit", ok, "" if ok else f"{unit} is {state.active} ({state.sub})", "unit_failed")

    def _machine(self) -> list[str]:
        """What is set of the conditions that a bad program brings about."""
        return sorted(set(self._conditions()) & MACHINE)

    def _images(
        self, capture: Capture, reference: dict[str, Any], since: float, stable_for_s: float, least_share: float
    ) -> Check:
        try:
            seen = capture.compare(reference, since, least_share)
        except AgentError as error:
            return Check("images", None, error.message, "capture_worse")
        words = "; ".join(seen.reasons)
        if seen.waiting:
            words = words or f"{seen.assessed} images seen since, more are awaited"
            return Check("images", None, words, "capture_worse", late=TOO_SHORT)
        held_as = _held_as(seen.judged, words)
        return Check("images", seen.ok, words, "capture_worse", harmful_after_s(stable_for_s), held_as)


def _held_as(judged: str, words: str) -> str:
    """What may be claimed of images that were well; "" when all were judged by their pictures."""
    if judged == "pictures":
        return ""
    claim = {"partly": "images judged in part", "rate": "images judged by rate only"}.get(judged, "images not judged")
    return f"{claim}: {words}"


class _Restarts:
    """How often a unit restarted by itself since the first look; starting it by hand sets systemd's count back."""

    def __init__(self) -> None:
        self._last: int | None = None
        self._total = 0

    def note(self, count: int) -> tuple[int, int]:
        more = 0 if self._last is None else max(0, count - self._last)
        self._last = count
        self._total += more
        return more, self._total


async def check_probe(argv: Sequence[str]) -> Check:
    """Run a probe command: exit status 0 within 30 s is healthy."""
    try:
        result = await processes.run(argv, timeout_s=PROBE_TIMEOUT_S, keep_bytes=512)
    except OSError as error:
        return Check("probe", False, f"the probe {argv[0]} can't be started: {error.strerror}", "probe_failed")
    said = " ".join((result.stderr.text or result.stdout.text).split())[-200:]
    reason = "" if result.succeeded else f"the probe ended with {result.describe()}" + (f": {said}" if said else "")
    return Check("probe", result.succeeded, reason, "probe_failed")


def _reasons(checks: Sequence[Check]) -> tuple[str, ...]:
    return tuple(check.reason or f"{check.name} is not well" for check in checks)


class ConfigurationGate:
    """The gate in the form that a configuration's trial asks for."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def settled(self) -> None:
        await self._gate.settled()

    async def reference(self) -> dict[str, Any]:
        return await self._gate.baseline()

    def judging_s(self, reference: Mapping[str, Any], intervals: Iterable[float]) -> float:
        """What to add to a deadline so that images are judged before it: see `Gate.judging_s`."""
        return self._gate.judging_s(reference, intervals)

    async def watch(
        self, reference: dict[str, Any], *, stable_for_s: float, deadline_s: float
    ) -> tuple[bool, list[str]]:
        """Whether the images stayed well, and why not."""
        verdict = await self._gate.watch(
            reference,
            since=time.monotonic(),
            stable_for_s=stable_for_s,
            deadline_s=deadline_s,
            cloud=False,  # a lost network says nothing about a configuration that has nothing to do with it
        )
        return verdict.passed is True, list(verdict.reasons)
