"""Carries out one change of the configuration: apply, prove, then commit or take back, over restarts and power cuts.

Every step is durable before it is done, so that after any cut the camera ends up on the old or the new configuration, whole.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from agent.config import desired as wishes
from agent.config import records
from agent.config import trial as trials
from agent.config.apply import Components
from agent.config.desired import Candidate, Marks, Plan, Problem, pointer
from agent.config.layers import InForce
from agent.config.records import Keeper, Note, Outcome, Refused, owed_problem
from agent.config.request import Request
from agent.config.trial import Trial
from agent.errors import AgentError, CloudError, FailedError, StoreError
from agent.logs import get_logger
from agent.settings import Settings

log = get_logger("config")

REACH_AGAIN_S = 1.0
CANCELLED = Problem("", "the job was cancelled", "cancelled")


class Gate(Protocol):
    """Judges a change by the images: `reference` before it, then `watch` until it held or failed, with the reasons.

    `settled` waits, a long time where images are rare, until a reference can be had or it is plain that there is none;
    `judging_s` is how long images that are well may take to be judged, by the intervals of the sources.
    """

    async def settled(self) -> None: ...
    async def reference(self) -> dict[str, Any]: ...
    def judging_s(self, reference: Mapping[str, Any], intervals: Iterable[float]) -> float: ...
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
        """Set to take back the change that is on trial; of the job that asked for it."""

    async def start(
        self, candidate: Candidate, plan: Plan, in_force: InForce, request: Request | None, boot_id: str
    ) -> list[Problem]:
        """Try what `plan` says; why it could not even begin, empty when it went to its end, which is kept."""
        self.cancelled = request.cancelled if request else asyncio.Event()
        settings, gated = self.good, plan.gated or plan.connectivity
        if problems := await self._still_owed(plan.targets):
            return problems
        kept = self._keeper.kept
        in_place = {name: doc for name, doc in self._keeper.fitted.desired.targets.items() if name in kept.placed}
        try:
            reference = await self._camera.gate.reference() if gated else {}
            previous = await self._components.contents(plan.targets, in_place)
        except AgentError as error:
            return [Problem("", error.message, error.code)]
        trial = Trial(
            candidate=in_force,
            applied=candidate.desired.as_json(),
            job=request.job if request else "",
            job_digest=request.digest if request else "",
            changed=plan.targets,
            where=_where(plan, self._camera.remote),
            previous={name: records.encode(content) for name, content in previous.items()},
            gated=gated,
            connectivity=plan.connectivity,
            reboots="reboot" in plan.applies,
            stable_for_s=settings.config.trial_s,
            reach_within_s=settings.config.connectivity_trial_s if plan.connectivity else 0.0,
            judging_s=self._camera.gate.judging_s(reference, _intervals(settings, candidate.settings))
            if gated
            else 0.0,
            reference=reference,
            started=self._camera.now(),
            boot_id=boot_id,
        )
        newly = {name: trial.previous[name] for name in plan.targets if name not in kept.originals}
        places = {name: place for name in plan.targets if (place := self._components.place(name))}
        words = "configuration on trial" if gated else "configuration accepted"
        keys = [".".join(key) for key in plan.keys]
        log.info(words, version=trial.version, job=trial.job, targets=plan.targets, keys=keys)
        await self._keeper.keep(
            replace(kept, trial=trial, originals={**kept.originals, **newly}, placed={**kept.placed, **places})
        )
        await self._carry_out(trial, candidate, set(), [])
        return []

    async def resume(self, trial: Trial) -> None:
        """Go on with a trial after a restart."""
        candidate, problems, touched = None, list(trial.problems), set(trial.changed)
        if trial.phase == "trial":
            candidate, problems = wishes.validate(self._camera.site, trial.desired.as_json(), self._camera.remote)
        try:
            await self._keeper.keep(replace(self._keeper.kept, trial=trial))
        except StoreError:
            await self._put_back(trial, touched)
            raise
        log.warning("a configuration trial was interrupted", then=trial.phase, attempts=trial.attempts)
        await self._carry_out(trial, candidate, touched, problems)

    async def settle(self) -> None:
        """Put back what could not be put back when a change was taken back."""
        kept = self._keeper.kept
        due = {name: records.decode(content) for name, content in kept.owed.items() if name in self._components.targets}
        if not kept.owed:
            return
        failed = await self._components.put_back(due)
        owed = {name: content for name, content in kept.owed.items() if name in failed}
        if owed == kept.owed:
            return
        done = {owed_problem(name).pointer for name in kept.owed.keys() - owed.keys()}
        refused = kept.refused
        if refused:
            left = [each for each in refused.problems if each.code != "revert_failed" or each.pointer not in done]
            refused = replace(refused, problems=tuple(left))
        await self._keeper.keep(replace(kept, owed=owed, refused=refused))

    async def _still_owed(self, names: Iterable[str]) -> list[Problem]:
        if any(name in self._keeper.kept.owed for name in names):
            await self.settle()
        return [owed_problem(name) for name in names if name in self._keeper.kept.owed]

    async def _carry_out(
        self, trial: Trial, candidate: Candidate | None, touched: set[str], problems: list[Problem]
    ) -> None:
        """Apply what is on trial, let it prove itself, and end with a commit or by taking it back.

        Where the store takes nothing no decision can be kept, so what runs must be what the last one said.
        """
        try:
            if candidate and not problems:
                problems = await self._try(trial, candidate, touched)
            if candidate and not problems:
                await self._commit(trial, candidate)
                return
            if trial.phase != "reverting":
                trial = trials.reverting(trial, problems)
                await self._keeper.keep(replace(self._keeper.kept, trial=trial))
        except StoreError:
            log.exception("state.db can't be written in the middle of a change, going back")
            await self._put_back(trial, touched)
            raise
        await self._take_back(trial, problems, touched)

    async def _try(self, trial: Trial, candidate: Candidate, touched: set[str]) -> list[Problem]:
        """What speaks against it."""
        problems = await self._apply(trial, candidate, touched)
        if not problems and trial.reboots and trial.booted_with != "new":
            problems = await self._unless_cancelled(self._reboot(trial))
        return problems or await self._prove(trial)

    async def _apply(self, trial: Trial, candidate: Candidate, touched: set[str]) -> list[Problem]:
        try:
            contents = {name: self._content(trial, name) for name in trial.changed}
        except AgentError as error:  # what an earlier version of the agent could write
            return [Problem(trial.where, error.message, error.code)]
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
            return [CANCELLED] if self.cancelled.is_set() else []
        return await self._unless_cancelled(self._watched(trial))

    async def _unless_cancelled(self, proof: Coroutine[Any, Any, list[Problem]]) -> list[Problem]:
        work, cancel = asyncio.create_task(proof), asyncio.create_task(self.cancelled.wait())
        try:
            await asyncio.wait({work, cancel}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not work.done():
                work.cancel()
            cancel.cancel()
            await asyncio.wait({work, cancel})
        return [CANCELLED] if work.cancelled() else work.result()

    async def _watched(self, trial: Trial) -> list[Problem]:
        if trial.connectivity:
            if any(self._components.targets[name].connectivity for name in trial.changed):
                await self._camera.reconnect()  # what is connected still goes the old way
            if not await self._reach_cloud(trial):
                words = f"the cloud was not reached over the new settings within {trial.reach_within_s:.0f} s"
                return [Problem(trial.where, words, "unreachable")]
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
            return [Problem(trial.where, "the cloud was reached over the new settings, and lost again", "unreachable")]
        return [Problem(trial.where, why, "trial_failed") for why in reasons]

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
            trial=None,
            refused=kept.refused if trial.job else None,
            outcome=Outcome(trial.job, trial.job_digest, "applied") if trial.job else kept.outcome,
        )
        await self._keeper.keep(records.without_stale_originals(ended), Note("applied", trial.version, _by(trial)))
        self.good = candidate.settings
        self._components.offer(trial.desired.targets)
        await self._wake_up()
        log.info("configuration applied", version=trial.version, job=trial.job)

    async def _wake_up(self) -> None:
        """Put in force what slept while the trial was made, and goes with agent.toml by now."""
        agent = {"agent": self._keeper.fitted.desired.agent}
        candidate, _ = wishes.validate(self._camera.site, agent, self._camera.remote)
        if candidate and candidate.settings != self.good:
            self.good = candidate.settings
            try:
                await self._components.put_settings(self.good)
            except AgentError as error:
                log.exception("the stored configuration can't be put in force", code=error.code, reason=error.message)

    async def _put_back(self, trial: Trial, touched: set[str]) -> dict[str, Problem]:
        names = [name for name in trial.changed if name in touched and name in self._components.targets]
        return await self._components.restore(self.good, {name: records.decode(trial.previous[name]) for name in names})

    async def _take_back(self, trial: Trial, problems: list[Problem], touched: set[str]) -> None:
        """Put the last known good configuration back; that it has to be is durable already."""
        failed = await self._put_back(trial, touched)
        not_back = list(failed.values())
        if trial.reboots and trial.booted_with != "old":
            not_back += await self._reboot(trial)
        reasons, kept = (*problems, *not_back), self._keeper.kept
        owed = {name: content for name, content in kept.owed.items() if name not in trial.changed}
        owed |= {name: trial.previous[name] for name in failed if name}
        kept = replace(kept, trial=None, owed=owed)
        if trial.job:
            kept = replace(kept, outcome=Outcome(trial.job, trial.job_digest, "reverted", reasons))
        else:
            kept = replace(kept, refused=Refused(trial.candidate.digest, trial.version, "reverted", reasons))
        note = Note("reverted", trial.version, _by(trial), reasons)
        await self._keeper.keep(records.without_stale_originals(kept), note)
        self._components.offer(self._keeper.fitted.desired.targets)
        errors = [problem.as_json() for problem in reasons]
        log.warning("configuration reverted", version=trial.version, job=trial.job, errors=errors)


def _intervals(*settings: Settings) -> list[float]:
    return [source.interval_s for each in settings for source in each.capture.sources.values()]


def _by(trial: Trial) -> str:
    return f"job {trial.job}" if trial.job else "shadow"


def _where(plan: Plan, remote: Marks) -> str:
    """The JSON pointer of what changes, as closely as that can be said."""
    everything = [pointer("targets", name) for name in plan.targets] + [pointer("agent", *key) for key in plan.keys]
    if len(everything) == 1:
        return everything[0]
    keys = [key for key in plan.keys if (mark := remote(key)) and mark.applies == "connectivity"]
    return pointer("agent", *keys[0]) if len(keys) == 1 else ""
