"""The record of a configuration on trial, and what a restart in the middle of one means. Pure.

The record is durable before anything is applied, so whatever is cut, whenever: the candidate is tried once more or taken
back, and after the second unplanned restart, or past the deadline, it is always taken back.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from agent.config import layers
from agent.config.desired import Desired, Problem
from agent.config.layers import InForce

MAX_ATTEMPTS = 2
SETTLING_S = 60.0


@dataclass(frozen=True)
class Trial:
    """A candidate that is being applied and watched, or taken back.

    `applied` is the document that is tried, which is `candidate` but for stored values that do not go with agent.toml.
    `job` names the job execution that asked for it, empty: the shadow did; `judging_s` is what the gate may need where images are rare. `where` is the JSON pointer of what changed, as closely as it
    can be said. `previous` holds each touched target's file
    before the change in base64, None where there was none; `reference` is the gate's picture of the images before the
    change; times are in epoch seconds. `reboots`: it takes effect by a reboot; `booted_with` is what the camera started
    with; `awaits_boot`: the boot id at which a reboot was asked for, once all files were in place.
    """

    candidate: InForce
    applied: dict[str, Any]
    job: str
    job_digest: str
    changed: tuple[str, ...]
    where: str
    previous: dict[str, str | None]
    gated: bool
    connectivity: bool
    reboots: bool
    stable_for_s: float
    reach_within_s: float
    judging_s: float
    reference: dict[str, Any]
    started: float
    boot_id: str
    attempts: int = 1
    phase: Literal["trial", "reverting"] = "trial"
    booted_with: Literal["old", "either", "new"] = "old"
    awaits_boot: str = ""
    problems: tuple[Problem, ...] = ()

    @property
    def version(self) -> int:
        return self.candidate.version

    @property
    def desired(self) -> Desired:
        return Desired(self.applied["agent"], self.applied["targets"])

    @property
    def deadline_s(self) -> float:
        """How long one attempt may take to become stable."""
        return self.reach_within_s + 3 * self.stable_for_s + self.judging_s + SETTLING_S

    @property
    def deadline(self) -> float:
        """When the last attempt must have ended; it holds across boots."""
        return self.started + MAX_ATTEMPTS * self.deadline_s

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def from_json(record: dict[str, Any]) -> Trial:
    """The trial kept by `as_json`. Raises TypeError, ValueError or KeyError for a record of another form."""
    problems = tuple(Problem(**problem) for problem in record["problems"])
    candidate = layers.from_json(record["candidate"])
    known = {field.name for field in fields(Trial)}
    trial = {key: value for key, value in record.items() if key in known}  # a later version may have kept more
    return Trial(**{**trial, "candidate": candidate, "changed": tuple(record["changed"]), "problems": problems})


def salvage(record: Any) -> Trial | None:
    """A trial whose record can't be read, to be taken back: as far as it says what was there before."""
    previous = record.get("previous") if isinstance(record, dict) else None
    if not isinstance(previous, dict):
        return None
    kept = {str(name): content for name, content in previous.items() if content is None or isinstance(content, str)}
    return Trial(
        candidate=InForce(),
        applied={"agent": {}, "targets": {}},
        job=str(record.get("job", "")),
        job_digest=str(record.get("job_digest", "")),
        changed=tuple(kept),
        where="",
        previous=kept,
        gated=False,
        connectivity=False,
        reboots=False,
        stable_for_s=0.0,
        reach_within_s=0.0,
        judging_s=0.0,
        reference={},
        started=0.0,
        boot_id="",
        phase="reverting",
        problems=(Problem("", "the record of the trial can't be read", "trial_interrupted"),),
    )


def reverting(trial: Trial, problems: list[Problem]) -> Trial:
    """The decision to take the candidate back, and why."""
    return replace(trial, phase="reverting", awaits_boot="", problems=tuple(problems))


def after_restart(trial: Trial, now: float, boot_id: str) -> Trial:
    """How a trial goes on that a restart of the agent or the camera interrupted: once more, or taken back.

    A reboot that was asked for is part of the trial: its time begins anew. A clock that was set back can't extend it
    beyond the attempts.
    """
    rebooted = boot_id != trial.boot_id
    as_asked = bool(trial.awaits_boot) and boot_id != trial.awaits_boot
    if as_asked:
        trial = replace(trial, booted_with="new" if trial.phase == "trial" else "old")
    elif rebooted and trial.booted_with == "old":
        trial = replace(trial, booted_with="either")
    trial = replace(trial, awaits_boot="", boot_id=boot_id)
    if trial.phase == "reverting":
        return trial
    if as_asked:
        return replace(trial, started=now)
    what = "the camera rebooted" if rebooted else "the agent restarted"
    if trial.attempts >= MAX_ATTEMPTS:
        words = f"{what} during the trial for the second time"
        return reverting(trial, [Problem("", words, "trial_interrupted")])
    if now > trial.deadline:
        words = f"{what} during the trial and came back {now - trial.deadline:.0f} s after its deadline"
        return reverting(trial, [Problem("", words, "trial_deadline")])
    return replace(trial, attempts=trial.attempts + 1)


def time_left_s(trial: Trial, now: float) -> float:
    """Seconds that this attempt may take, at most `deadline_s`, and enough to become stable even when the clock was set."""
    return max(trial.stable_for_s + SETTLING_S, min(trial.deadline_s, trial.deadline - now))
