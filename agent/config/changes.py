"""Carries out one change of the configuration: apply, prove, then commit or take back, over restarts and power cuts.

Every step is durable before it is done, so that after any cut the camera ends up on the old or the new configuration, whole.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from agent.config import desired as wishes
from agent.config import records
from agent.config import trial as trials
from agent.config.apply import Components
from agent.config.desired import Candidate, Marks, Plan, Problem, pointer
from agent.config.layers import InForce
from agent.config.records import Keeper, Note, Outcome, Refused
from agent.config.trial import Trial
from agent.errors import AgentError, CloudError, FailedError
from agent.logs import get_logger
from agent.settings import Settings

log = get_logger("config")

REACH_AGAIN_S = 1.0


class Gate(Protocol):
    """Judges a change by the images: `reference` before it, then `watch` until it held or failed, with the reasons.

    `settled` waits, a long time where images are rare, until a reference can be had or it is plain that there is none.
    """

    async def settled(self) -> None: ...
    async def reference(self) -> dict[str, Any]: ...
    async def watch(
        self, reference: dict[str, Any], *, stable_for_s: float, deadline_s: float
    ) -> tuple[bool, list[str]]: ...


async def no_reconnect() -> None:
    """There is no connection to make anew."""


async def no_reboot() -> None:
    """Raises FailedError."""
    raise FailedError("reboot_failed", "this agent has no way to reboot the camera")


@dataclass(frozen=True)
class Camera:
    """What a change needs of the camera.

    `site` is agent.toml parsed. `acknowledge` returns once a report was acknowledged over the connection in use, and raises
    CloudError; `announce` reports that a trial is going on, where that can be done now. `reconnect` leaves the connection and
    makes it anew; `reboot` returns only when it failed, with FailedError. `now` is in epoch seconds.
    """

    site: Mapping[str, Any]
    gate: Gate
    acknowledge: Callable[[], Awaitable[None]]
    announce: Callable[[], Awaitable[None]]
    reconnect: Callable[[], Awaitable[None]]
    reboot: Callable[[], Awaitable[None]]
    remote: Marks
    now: Callable[[], float]


class Changes:
    """`good` are the settings of the configuration that was proven last, to which a change is taken back."""

    def __init__(self, camera: Camera, components: Components, keeper: Keeper, good: Settings) -> None:
        self._camera = camera
        self._components = components
        self._keeper = keeper
        self.good = good
        self.cancelled = asyncio.Event()
        """Set to take back the change that is on trial."""

    async def start(
        self, candidate: Candidate, plan: Plan, in_force: InForce, *, job: str, boot_id: str
    ) -> list[Problem]:
        """Try what `plan` says; why it could not even begin, empty when it went to its end, which is kept."""
        kept, settings = self._keeper.kept, self.good
        self.cancelled.clear()
        gated = plan.gated or plan.connectivity
        try:
            reference = await self._camera.gate.reference() if gated else {}
            previous = await self._components.contents(plan.targets, kept.good.desired.targets)
        except AgentError as error:
            return [Problem("", error.message, error.code)]
        trial = Trial(
            candidate=in_force,
            job=job,
            changed=plan.targets,
            previous={name: records.encode(content) for name, content in previous.items()},
            gated=gated,
            connectivity=plan.connectivity,
            reboots="reboot" in plan.applies,
            stable_for_s=settings.config.trial_s,
            reach_within_s=settings.config.connectivity_trial_s if plan.connectivity else 0.0,
            reference=reference,
            started=self._camera.now(),
            boot_id=boot_id,
        )
        newly = {name: trial.previous[name] for name in plan.targets if name not in kept.originals}
        words = "configuration on trial" if gated else "configuration accepted"
        log.info(words, version=trial.version, job=job, targets=plan.targets, keys=[".".join(key) for key in plan.keys])
        await self._keeper.keep(replace(kept, trial=trial, originals={**kept.originals, **newly}))
        await self.carry_out(trial, candidate)
        return []

    async def resume(self, trial: Trial) -> None:
        """Go on with a trial after a restart."""
        await self._keeper.keep(replace(self._keeper.kept, trial=trial))
        candidate, problems = None, list(trial.problems)
        if trial.phase == "trial":
            candidate, problems = wishes.validate(self._camera.site, trial.desired.as_json(), self._camera.remote)
        await self.carry_out(trial, candidate, touched=set(trial.changed), problems=problems)

    async def carry_out(
        self,
        trial: Trial,
        candidate: Candidate | None,
        *,
        touched: set[str] | None = None,
        problems: list[Problem] | None = None,
    ) -> None:
        """Apply what is on trial, let it prove itself, and end with a commit or by taking it back."""
        touched = set() if touched is None else touched
        problems = problems or []
        if candidate and not problems:
            problems = await self._apply(trial, candidate, touched)
            if not problems and trial.reboots and trial.booted_with != "new":
                problems = await self._reboot(trial)
            problems = problems or await self._prove(trial)
        if candidate and not problems:
            await self._commit(trial, candidate)
        else:
            await self._take_back(trial, problems, touched)

    async def _apply(self, trial: Trial, candidate: Candidate, touched: set[str]) -> list[Problem]:
        try:
            contents = {name: self._content(trial, name) for name in trial.changed}
        except AgentError as error:  # what an earlier version of the agent could write
            return [Problem(_where(trial), error.message, error.code)]
        return await self._components.apply(candidate.settings, contents, touched)

    def _content(self, trial: Trial, name: str) -> bytes | None:
        """What a target has to have: the wanted document, or the site's own content when the fleet left it."""
        wanted = trial.desired.targets
        if name in wanted:
            return self._components.content(name, wanted[name])
        return records.decode(self._keeper.kept.originals.get(name, trial.previous[name]))

    async def _reboot(self, trial: Trial) -> list[Problem]:
        """Reboot, as part of the trial; returns only when that failed."""
        log.warning("rebooting for a configuration", version=trial.version, phase=trial.phase)
        trial = replace(trial, awaits_boot=trial.boot_id)
        await self._keeper.keep(replace(self._keeper.kept, trial=trial))
        try:
            await self._camera.reboot()
        except AgentError as error:
            return [Problem("", error.message, error.code)]
        return [Problem("", "the camera did not reboot", "reboot_failed")]

    # ---- proving ---------------------------------------------------------------------------------------------------

    async def _prove(self, trial: Trial) -> list[Problem]:
        """What speaks against the candidate that is now in force; empty when it held."""
        if not trial.gated:
            return []
        proof = asyncio.create_task(self._watched(trial))
        cancel = asyncio.create_task(self.cancelled.wait())
        try:
            await asyncio.wait({proof, cancel}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not proof.done():
                proof.cancel()
            cancel.cancel()
            await asyncio.wait({proof, cancel})
        if proof.cancelled():
            return [Problem("", "the job was cancelled", "cancelled")]
        return proof.result()

    async def _watched(self, trial: Trial) -> list[Problem]:
        if trial.connectivity:
            if any(self._components.targets[name].connectivity for name in trial.changed):
                await self._camera.reconnect()  # what is connected still goes the old way
            if not await self._reach_cloud(trial):
                words = f"the cloud was not reached over the new settings within {trial.reach_within_s:.0f} s"
                return [Problem(_where(trial), words, "unreachable")]
        announcement = asyncio.ensure_future(self._camera.announce())
        try:
            before = await self._components.restarts(trial.changed)
            left = trials.time_left_s(trial, self._camera.now())
            held, reasons = await self._camera.gate.watch(
                trial.reference, stable_for_s=trial.stable_for_s, deadline_s=left
            )
            complaints = await self._components.complaints(before)
            reasons = [*complaints, *([] if held else reasons or ["the trial was not passed"])]
        except AgentError as error:
            reasons = [error.message]
        finally:
            if not announcement.done():
                announcement.cancel()
            await asyncio.wait({announcement})
        if not reasons and trial.connectivity and not await self._reach_cloud(trial):
            return [
                Problem(_where(trial), "the cloud was reached over the new settings, and lost again", "unreachable")
            ]
        return [Problem(_where(trial), why, "trial_failed") for why in reasons]

    async def _reach_cloud(self, trial: Trial) -> bool:
        """Whether a report is acknowledged over the settings now in force."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(trial.reach_within_s, trials.time_left_s(trial, self._camera.now()))):
                while True:
                    try:
                        await self._camera.acknowledge()
                        return True
                    except CloudError as error:
                        log.info("not reached over the new settings yet", reason=error.message)
                    await asyncio.sleep(REACH_AGAIN_S)
        return False

    # ---- ending ----------------------------------------------------------------------------------------------------

    async def _commit(self, trial: Trial, candidate: Candidate) -> None:
        kept = self._keeper.kept
        ended = replace(
            kept,
            good=trial.candidate,
            previous=kept.good,
            trial=None,
            refused=kept.refused if trial.job else None,
            outcome=Outcome(trial.job, "applied") if trial.job else kept.outcome,
        )
        self.good = candidate.settings
        await self._keeper.keep(records.without_stale_originals(ended), Note("applied", trial.version, _by(trial)))
        self._components.offer(trial.desired.targets)
        log.info("configuration applied", version=trial.version, job=trial.job)

    async def _take_back(self, trial: Trial, problems: list[Problem], touched: set[str]) -> None:
        """Take the candidate back: the decision is durable first, then the last known good configuration is put back."""
        if trial.phase != "reverting":
            trial = trials.reverting(trial, problems)
            await self._keeper.keep(replace(self._keeper.kept, trial=trial))
        names = [name for name in trial.changed if name in touched and name in self._components.targets]
        contents = {name: records.decode(trial.previous[name]) for name in names}
        failed = await self._components.restore(self.good, contents)
        if trial.reboots and trial.booted_with != "old":
            failed += await self._reboot(trial)
        reasons = (*problems, *failed)
        kept = replace(self._keeper.kept, trial=None)
        if trial.job:
            kept = replace(kept, outcome=Outcome(trial.job, "reverted", reasons))
        else:
            kept = replace(kept, refused=Refused(trial.candidate.digest, trial.version, "reverted", reasons))
        note = Note("reverted", trial.version, _by(trial), reasons)
        await self._keeper.keep(records.without_stale_originals(kept), note)
        self._components.offer(kept.good.desired.targets)
        errors = [problem.as_json() for problem in reasons]
        log.warning("configuration reverted", version=trial.version, job=trial.job, errors=errors)


def _by(trial: Trial) -> str:
    return f"job {trial.job}" if trial.job else "shadow"


def _where(trial: Trial) -> str:
    """The JSON pointer of what changed, as closely as that can be said."""
    return pointer("targets", trial.changed[0]) if len(trial.changed) == 1 else ""
