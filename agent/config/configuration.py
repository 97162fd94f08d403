"""Brings the camera to the configuration that the fleet wants, and keeps it only when it proves itself.

Two layers lie over agent.toml: what jobs set for a group of cameras, and what the camera's shadow `config` wants. The
shadow's `reported` says what is in force and why; `desired` is never written.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from agent import setting_keys as schema
from agent.config import desired as wishes
from agent.config import layers, origins, reported, targets
from agent.config import trial as trials
from agent.config.apply import Components
from agent.config.changes import Camera, Changes, Gate, no_reboot, no_reconnect
from agent.config.deliveries import Deliveries
from agent.config.desired import Candidate, Desired, Marks, Plan, Problem
from agent.config.fitting import to_try
from agent.config.layers import InForce
from agent.config.moved import leave_old_places
from agent.config.patience import Hold, Patience, unheld
from agent.config.records import Keeper, Note, Outcome, Refused, status
from agent.config.reporting import Reporter, ShadowService
from agent.config.request import Request
from agent.config.targets import Units
from agent.errors import AgentError, CloudError
from agent.host import clock
from agent.logs import get_logger
from agent.settings import Settings
from agent.store import Store

log = get_logger("config")

SETTLE_S = 2.0
REFRESH_S = 3600.0
LONGEST_BACK_OFF_S = 300.0
MIRROR_BYTES = reported.SHADOW_BYTES // 2
"""At most this of the shadow is for `reported`: what is taken there is not there for the next `desired`."""


def _tell_nobody(_: str) -> None:
    return None


class Configuration:
    """The configuration of this camera: agent.toml (`site` parsed, `settings` validated) and what the fleet sets over it.

    `apply_agent` puts new settings in force; `mutation_lock` is held while something is applied or on trial, so that an
    update and a configuration never overlap; `hold` says what a change with a trial, named by its argument, has to wait for;
    `online` says whether the cloud is reached, `connected_with` whether by just these settings; `on_change` is called, on
    the loop, when `state()` may have changed. For `reconnect` and `reboot` see changes.Camera. `settle_s`, `refresh_s`,
    `remote`, `now` (epoch s) and `boot_id` are the usual ones unless given.
    """

    def __init__(
        self,
        *,
        site: dict[str, Any],
        settings: Settings,
        store: Store,
        shadow: ShadowService,
        units: Units,
        gate: Gate,
        apply_agent: Callable[[Settings], Awaitable[None]],
        mutation_lock: asyncio.Lock,
        online: Callable[[], bool],
        deliveries: Deliveries | None = None,
        hold: Callable[[str], Awaitable[Hold | None]] = unheld,
        connected_with: Callable[[Settings], bool] = lambda _: True,
        reconnect: Callable[[], Awaitable[None]] = no_reconnect,
        reboot: Callable[[], Awaitable[None]] = no_reboot,
        on_change: Callable[[], None] = lambda: None,
        settle_s: float = SETTLE_S,
        refresh_s: float = REFRESH_S,
        remote: Marks = schema.remote,
        now: Callable[[], float] = time.time,
        boot_id: str | None = None,
    ) -> None:
        self._site, self._settings = site, settings
        self._lock, self._hold, self._on_change = mutation_lock, hold, on_change
        self._online, self._connected_with = online, connected_with
        self._settle_s, self._refresh_s, self._remote = settle_s, refresh_s, remote
        self._now, self._boot_id = now, boot_id
        self._keeper = Keeper(store, on_change, site, remote)
        self._components = Components(settings, units, apply_agent, deliveries or Deliveries(settings.config.targets))
        camera = Camera(site, gate, self._acknowledge, self._announce, reconnect, reboot, remote, now)
        self._changes = Changes(camera, self._components, self._keeper, settings)
        self._asked: Request | None = None
        self._wanted = Desired()
        self._judged = ""
        self._seen = -1
        self._shadow_is_newer = False
        """Whether the shadow changed after a job asked: what came last goes first, so that it may end what the other waits for."""
        self._connected = False
        self._loaded = self._holds_lock = False
        self._room = reported.SHADOW_BYTES
        self._reporter = Reporter(shadow)
        self._judging = asyncio.Lock()  # each target has one place for a candidate, and plans are asked for at any time
        self._wake = asyncio.Event()
        self._patience = Patience(hold, gate.settled, self._wake, self._announce)
        shadow.on_delta(self._on_delta)

    async def load(self) -> None:
        """Put in force what is stored; to be called before the cloud is connected to. `run` does it where it was not done."""
        if self._boot_id is None:
            self._boot_id = await asyncio.to_thread(clock.boot_id)
        await self._keeper.load()
        if problems := self._keeper.problems:
            errors = [problem.as_json() for problem in wishes.few(problems)]
            log.error("what is stored does not go with agent.toml", errors=errors)
        good, _ = wishes.validate(self._site, {"agent": self._keeper.fitted.desired.agent}, self._remote)
        self._changes.good = good.settings if good else self._settings
        async with self._judging:
            await asyncio.to_thread(self._components.remove_leftovers)
        try:
            await self._components.put_settings(self._changes.good)
        except AgentError as error:
            log.exception("the stored configuration can't be put in force", code=error.code, reason=error.message)
        self._components.offer(self._keeper.fitted.desired.targets)
        if self._keeper.kept.trial and not self._holds_lock:
            await self._lock.acquire()  # until `run` has ended it
            self._holds_lock = True
        self._loaded = True
        self._on_change()

    async def run(self) -> None:
        """Finish what a restart interrupted, then follow jobs and the shadow until cancelled."""
        if not self._loaded:
            await self.load()
        self._loaded = False  # when this ends by an error and begins again, all is read anew
        self._reporter.forget()
        await self._go_on()
        self._wake.set()
        failures = 0
        while True:
            delay = random.uniform(0.5, 1) * min(LONGEST_BACK_OFF_S, 2.0**failures)  # noqa: S311  jitter
            if not self._asked or self._asked.is_answered:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout((delay if failures else self._refresh_s) if self._online() else None):
                        await self._wake.wait()
                await asyncio.sleep(self._settle_s)
            self._wake.clear()
            try:
                await self._settle_debts()
                if self._shadow_is_newer:
                    await self._synchronise()
                await self._answer_job()
                await self._synchronise()
                failures = 0
            except CloudError as error:
                self._shadow_is_newer = False
                failures = min(failures + 1, 20) if error.retryable else 0
                log.warning("the shadow can't be followed now", code=error.code, reason=error.message)

    async def on_ready(self) -> None:
        """To be called after every connect: the shadow is read whole and reported to; returns at once."""
        self._connected = True
        self.look_again()

    def look_again(self) -> None:
        """To be called when desired may have changed without a delta: the service sends none when keys are only removed.

        Without such calls a removal is noticed at the next connect, or within `refresh_s`.
        """
        self._shadow_is_newer = True
        self._wake.set()

    async def set_fleet(
        self,
        job: str,
        patch: Mapping[str, Any],
        *,
        whole: bool = False,
        cancelled: asyncio.Event | None = None,
        tell: Callable[[str], None] = _tell_nobody,
    ) -> Outcome:
        """Change the fleet layer for the job execution `job`; what became of it, after its trial.

        `patch` is a JSON Merge Patch of `{"agent": …, "targets": …}`, or with `whole` what the layer is to be. May be called
        again after a restart, and then says what has become of it. `cancelled`: what is on trial is taken back.
        """
        asked = self._asked = Request(job, patch, whole, cancelled or asyncio.Event(), tell)
        self._shadow_is_newer = False
        self._wake.set()
        try:
            return await asked.answered(lambda: self._on_cancel(asked))
        finally:
            if self._asked is asked:
                self._asked = None

    async def judge_fleet(
        self, patch: Mapping[str, Any], *, whole: bool = False
    ) -> tuple[Sequence[Problem], list[str]]:
        """What is wrong with such a change, and what it would do, in words; nothing is touched."""
        in_force, problems = layers.with_fleet(self._keeper.kept.good, "plan", patch, self._now(), whole=whole)
        if problems:
            return problems, []
        _, plan, problems = await self._judge(to_try(in_force, self._keeper.dormant, by_job=True))
        return problems, wishes.words(plan) if plan and not problems else []

    def _on_cancel(self, asked: Request) -> None:
        trial = self._keeper.kept.trial
        if trial and trial.job == asked.job:
            self._changes.cancelled.set()
        self._wake.set()

    def state(self) -> dict[str, Any]:
        """`state` applied, trial, rejected or reverted; `desired_version` that it is about; `errors` with JSON pointers.

        `job` where a job's change is on trial; `waits_for` in words where a change has to wait.
        """
        state = status(self._keeper.kept, self._keeper.problems)
        return state | ({"waits_for": self._patience.waits_for} if self._patience.waits_for else {})

    def wanted(self) -> dict[str, Any]:
        """What the fleet asks for, as far as it could be read: `agent` and `targets`, the shadow's over what jobs have set."""
        shadow = layers.Layer(self._wanted.agent, self._wanted.targets)
        return replace(self._keeper.fitted, shadow=shadow).desired.as_json()

    def effective(self) -> dict[str, dict[str, Any]]:
        """Every key in dotted form with its value in force, its origin, since when, and whether the fleet may set it."""
        return origins.effective(self._site, self._in_force_settings(), self._in_force(), self._remote)

    def explain(self, key: str) -> dict[str, Any]:
        """All about one key such as `telemetry.interval_s` or `targets.pipeline.exposure`. Raises RefusedError `unknown_key`."""
        return origins.explain(key, self._site, self._in_force_settings(), self._in_force(), self._remote)

    def _on_delta(self, version: int, _state: dict[str, Any]) -> None:
        # A lower version is old, or the shadow was created anew: reading it tells which.
        if not version or version not in (self._seen, self._reporter.version):
            self.look_again()

    def _in_force(self) -> InForce:
        trial = self._keeper.kept.trial
        return trial.candidate if trial else self._keeper.in_place

    def _in_force_settings(self) -> Settings:
        return self._components.settings or self._changes.good

    # ---- start -----------------------------------------------------------------------------------------------------

    async def _go_on(self) -> None:
        """What was on trial when the agent ended goes on, or is taken back; no other change comes in between."""
        if not self._holds_lock:
            await self._lock.acquire()
        self._holds_lock = False
        try:
            await leave_old_places(self._keeper, self._components)
            if trial := self._keeper.kept.trial:
                trial = trials.after_restart(trial, self._now(), self._boot_id or "")
                await self._changes.resume(trial)
        finally:
            self._lock.release()

    # ---- jobs ------------------------------------------------------------------------------------------------------

    async def _answer_job(self) -> None:
        """Carry out what a job asks for; stays asked for where something else comes first."""
        asked = self._asked
        if asked is None or asked.is_answered:
            return
        known = self._keeper.kept.outcome
        if known and (known.job, known.digest) == (asked.job, asked.digest) and known.state == "reverted":
            asked.answer(known)
        elif asked.cancelled.is_set():
            asked.reject(Problem("", "the job was cancelled", "cancelled"))
        else:
            await self._carry_out(asked)

    async def _carry_out(self, asked: Request) -> None:
        in_force, problems = layers.with_fleet(
            self._keeper.kept.good, asked.job, asked.patch, self._now(), whole=asked.whole
        )
        if in_force.digest == self._keeper.kept.good.digest and not (problems or self._keeper.out_of_place):
            asked.answer(asked.told(Outcome(asked.job, asked.digest, "applied"), self._keeper.kept.good))
            return
        if not problems:
            candidate, plan, problems = await self._judge(to_try(in_force, self._keeper.dormant, by_job=True))
            if candidate and plan and not problems:
                began = await self._begin(in_force, candidate, plan, asked)
                if began is None:
                    return
                problems = began
        self._patience.over()
        self._seen = -1  # what the shadow wants may go with the new fleet layer
        if problems:
            asked.reject(*problems)
        elif outcome := self._keeper.kept.outcome:
            asked.answer(asked.told(outcome, self._keeper.kept.good))

    # ---- following the shadow --------------------------------------------------------------------------------------

    async def _synchronise(self) -> None:
        connected, self._connected = self._connected, False
        try:
            shadow = await self._reporter.read()
            version = shadow.version if shadow else 0
            if shadow and version == self._seen and not connected and not self._reporter.in_doubt:
                return
            self._seen = version
            if not await self._consider(shadow.desired if shadow else None, version):
                self._seen, self._connected = -1, self._connected or connected
                return
            await self._reporter.send(self._reported(), self._smallest, resend=connected)
        except CloudError:
            self._connected |= connected
            raise

    async def _consider(self, document: Any, version: int) -> bool:
        """Bring what is wanted in force or say why not; False when something newer may be wanted by now."""
        self._wanted, malformed = wishes.parse(document)
        kept = self._keeper.kept
        good, refused = kept.good, kept.refused
        shadow = good.shadow.revised(self._wanted, f"shadow version {version}", self._now())
        in_force = replace(good, version=version, shadow=shadow)
        digest = wishes.digest(document) if malformed else in_force.digest
        self._room = min(reported.room_beside(document), MIRROR_BYTES)
        if digest == good.digest and not self._keeper.out_of_place:
            self._patience.over()
            if refused:
                log.info("the shadow wants what is in force again", version=version)
                await self._keeper.keep(replace(kept, good=replace(good, version=version), refused=None))
            return True
        if refused and refused.digest == digest and (refused.state == "reverted" or self._judged == digest):
            return True
        self._judged = digest
        if malformed:
            await self._reject(digest, version, malformed)
            return True
        candidate, plan, problems = await self._judge(to_try(in_force, self._keeper.dormant, by_job=False))
        if candidate and plan and not problems:
            began = await self._begin(in_force, candidate, plan)
            if began is None:
                self._judged = ""
                return False
            problems = began
        if problems:
            await self._reject(digest, version, problems)
        return True

    async def _reject(self, digest: str, version: int, problems: list[Problem]) -> None:
        before = self._keeper.kept.refused
        if before and before.digest == digest:
            version = before.version
        self._patience.over()
        refused = Refused(digest, version, "rejected", tuple(wishes.few(problems)))
        if refused != before:
            log.warning("configuration rejected", version=version, errors=[problem.as_json() for problem in problems])
            note = Note("rejected", version, problems=problems)
            await self._keeper.keep(replace(self._keeper.kept, refused=refused), note)

    # ---- both ------------------------------------------------------------------------------------------------------

    async def _judge(self, desired: Desired) -> tuple[Candidate | None, Plan | None, list[Problem]]:
        """Whether this may be tried, and what it would change."""
        candidate, problems = await asyncio.to_thread(
            wishes.validate, self._site, desired.as_json(), self._remote
        )  # a time zone is a file
        in_place = self._keeper.in_place.desired.targets
        plan = wishes.plan(self._changes.good, in_place, candidate, self._remote) if candidate else None
        async with self._judging:
            for name, wanted in desired.targets.items():
                if name in self._components.targets and (plan is None or name in plan.targets):
                    problems += await targets.judge(name, self._components.targets[name], wanted)
        return candidate, plan, wishes.few(problems)

    async def _begin(
        self, in_force: InForce, candidate: Candidate, plan: Plan, asked: Request | None = None
    ) -> list[Problem] | None:
        """Wait until it may begin, and carry it out; None when something newer may be wanted, else why it could not begin."""
        subject = f"job {asked.job}" if asked else f"config {in_force.digest}"
        images, tell = plan.gated or plan.connectivity, asked.tell if asked else _tell_nobody
        while True:
            if plan.on_trial and not await self._patience.may_begin(subject, images=images, tell=tell):
                return None
            if self._lock.locked():
                await self._patience.say("change", "waits until an update or another change has ended", tell)
            async with self._lock:
                if self._wake.is_set() or (asked and asked is not self._asked):
                    return None
                if plan.on_trial and await self._hold(subject):  # it may have taken long to get here
                    continue
                self._patience.over()
                tell("on trial" if plan.on_trial else "being applied")
                if asked and asked.cancelled.is_set():
                    return None
                return await self._changes.start(candidate, plan, in_force, asked, self._boot_id or "")

    async def _settle_debts(self) -> None:
        if self._keeper.kept.owed:
            async with self._lock:
                await self._changes.settle()

    # ---- reporting -------------------------------------------------------------------------------------------------

    def _reported(self, room: int | None = None) -> dict[str, Any]:
        in_force, settings = self._in_force().desired, self._in_force_settings()
        limit = self._room if room is None else room
        return reported.build(self._wanted, in_force, settings, self.state(), limit, self._remote)

    def _smallest(self) -> dict[str, Any]:
        return self._reported(0)

    async def _announce(self) -> None:
        """Report how it stands, where the cloud can be reached; the end is reported in any case."""
        with contextlib.suppress(CloudError):
            if self._online():
                await self._reporter.send(self._reported(), self._smallest)

    async def _acknowledge(self) -> None:
        """Report over the settings in force. Raises CloudError."""
        await self._reporter.acknowledge(self._reported())
        if not self._connected_with(self._in_force_settings()):
            raise CloudError("other_way", "the cloud is reached, but not by these settings", retryable=True)
