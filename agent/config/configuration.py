"""Brings the camera to the configuration that the shadow `config` wants, and keeps it only when images still flow.

Every step is durable before it is announced: after any cut the camera ends up on the old or the new configuration, whole,
and the shadow's `reported` says which and why. `desired` is never written.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any, Protocol

from agent import settings as schema
from agent.config import desired as wishes
from agent.config import origins, records, reported, targets
from agent.config import trial as trials
from agent.config.apply import Components
from agent.config.desired import Candidate, Desired, Marks, Plan, Problem, pointer
from agent.config.records import InForce, Kept, Refused
from agent.config.reporting import Reporter, ShadowService
from agent.config.targets import Units
from agent.config.trial import Trial
from agent.errors import AgentError, CloudError
from agent.host import clock
from agent.logs import get_logger
from agent.settings import Settings
from agent.store import Store, Tables

log = get_logger("config")

SETTLE_S = 2.0
REFRESH_S = 3600.0
LONGEST_BACK_OFF_S = 300.0


class Gate(Protocol):
    """Judges a change by the images: `reference` before it, then `watch` until it held or failed, with the reasons.

    `settled` waits, a long time where images are rare, until a reference can be had or it is plain that there is none.
    """

    async def settled(self) -> None: ...
    async def reference(self) -> dict[str, Any]: ...
    async def watch(
        self, reference: dict[str, Any], *, stable_for_s: float, deadline_s: float
    ) -> tuple[bool, list[str]]: ...


class Configuration:
    """The configuration of this camera: agent.toml (`site` parsed, `settings` validated) and what the shadow sets over it.

    `apply_agent` puts new settings in force; `mutation_lock` is held while something is applied or on trial, so that an
    update and a configuration never overlap; `online` says whether the cloud is reached; `on_change` is called, on the
    loop, when `state()` may have changed. `settle_s`, `refresh_s`, `remote`, `now` (epoch s) and `boot_id` are the usual ones unless given.
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
        on_change: Callable[[], None] = lambda: None,
        settle_s: float = SETTLE_S,
        refresh_s: float = REFRESH_S,
        remote: Marks = schema.remote,
        now: Callable[[], float] = time.time,
        boot_id: str | None = None,
    ) -> None:
        self._site, self._settings, self._store = site, settings, store
        self._gate, self._lock, self._online, self._on_change = gate, mutation_lock, online, on_change
        self._settle_s, self._refresh_s, self._remote = settle_s, refresh_s, remote
        self._now, self._boot_id = now, boot_id
        self._kept = Kept()
        self._good_settings = settings
        self._components = Components(settings, units, apply_agent)
        self._wanted = Desired()
        self._judged = ""
        self._waits_for = ""
        self._seen = -1
        self._connected = False
        self._room = reported.SHADOW_BYTES
        self._reporter = Reporter(shadow)
        self._wake = asyncio.Event()
        shadow.on_delta(self._on_delta)

    async def run(self) -> None:
        """Put in force what is stored, finish what a restart interrupted, then follow the shadow until cancelled."""
        await self._start()
        failures = 0
        while True:
            delay = random.uniform(0.5, 1) * min(LONGEST_BACK_OFF_S, 2.0**failures)  # noqa: S311  jitter
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout((delay if failures else self._refresh_s) if self._online() else None):
                    await self._wake.wait()
            await asyncio.sleep(self._settle_s)
            self._wake.clear()
            try:
                await self._synchronise()
                failures = 0
            except CloudError as error:
                failures = min(failures + 1, 20) if error.retryable else 0
                log.warning("the shadow can't be followed now", code=error.code, reason=error.message)

    async def on_ready(self) -> None:
        """To be called after every connect: the shadow is read whole and reported to; returns at once."""
        self._connected = True
        self._wake.set()

    def look_again(self) -> None:
        """To be called when desired may have changed without a delta: the service sends none when keys are only removed.

        Without such calls a removal is noticed at the next connect, or within `refresh_s`.
        """
        self._wake.set()

    def state(self) -> dict[str, Any]:
        """`state` applied, trial, rejected or reverted; `desired_version` that it is about; `errors` with JSON pointers."""
        kept = self._kept
        if kept.trial:
            name, version, problems = "trial", kept.trial.version, kept.trial.problems
        elif kept.refused:
            name, version, problems = kept.refused.state, kept.refused.version, kept.refused.problems
        else:
            name, version, problems = "applied", kept.good.version, ()
        state = {"state": name, "desired_version": version, "errors": [problem.as_json() for problem in problems]}
        return state | ({"waits_for": self._waits_for} if self._waits_for else {})

    def wanted(self) -> dict[str, Any]:
        """What the shadow asks for, as far as it could be read: `agent` and `targets`."""
        return {"agent": self._wanted.agent, "targets": self._wanted.targets}

    def effective(self) -> dict[str, dict[str, Any]]:
        """Every key in dotted form with its value in force, its origin, since when, and whether the shadow may set it."""
        return origins.effective(self._site, self._in_force_settings(), self._in_force(), self._remote)

    def explain(self, key: str) -> dict[str, Any]:
        """All about one key such as `telemetry.interval_s` or `targets.pipeline.exposure`. Raises RefusedError `unknown_key`."""
        return origins.explain(key, self._site, self._in_force_settings(), self._in_force(), self._remote)

    def _on_delta(self, version: int, _state: dict[str, Any]) -> None:
        # A lower version is old, or the shadow was created anew: reading it tells which.
        if version != self._seen:
            self._wake.set()

    def _in_force(self) -> InForce:
        trial, good = self._kept.trial, self._kept.good
        return records.put_in_force(trial.desired, trial.version, trial.started, good) if trial else good

    def _in_force_settings(self) -> Settings:
        return self._components.settings or self._good_settings

    # ---- start -----------------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        if self._boot_id is None:
            self._boot_id = await asyncio.to_thread(clock.boot_id)
        self._reporter.forget()
        self._kept = await self._store.read(records.load)
        self._load_good()
        await asyncio.to_thread(self._components.remove_leftovers)
        try:
            await self._components.put_settings(self._good_settings)
        except AgentError as error:
            log.exception("the stored configuration can't be put in force", code=error.code, reason=error.message)
        self._on_change()
        if self._kept.trial:
            async with self._lock:
                trial = trials.after_restart(self._kept.trial, self._now(), self._boot_id)
                log.warning("a configuration trial was interrupted", then=trial.phase, attempts=trial.attempts)
                await self._keep(replace(self._kept, trial=trial))
                await self._carry_out(trial, resumed=True)
            self._wake.set()

    def _load_good(self) -> None:
        """The last known good configuration; where agent.toml no longer goes with it, the one before, else agent.toml alone."""
        good, problems = self._kept.good, list[Problem]()
        for agent in (good.agent, self._kept.previous.agent, {}):
            candidate, found = wishes.validate(self._site, {"agent": agent}, self._remote)
            if candidate:
                break
            problems = problems or found
        self._good_settings = candidate.settings if candidate else self._settings
        if problems:
            log.error("the stored configuration does not go with agent.toml", errors=[p.as_json() for p in problems])
            refused = Refused(good.desired.digest, good.version, "rejected", tuple(problems))
            fallback = candidate.desired.agent if candidate else {}
            in_force = records.put_in_force(Desired(fallback, good.targets), good.version, self._now(), good)
            self._kept = replace(self._kept, good=in_force, refused=refused)

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
        digest = wishes.digest(document) if malformed else self._wanted.digest
        self._room = reported.SHADOW_BYTES // 2 if malformed else reported.room_beside(document)
        good, refused = self._kept.good, self._kept.refused
        if digest == good.desired.digest:
            if refused:
                log.info("the shadow wants what is in force again", version=version)
                await self._keep(replace(self._kept, good=replace(good, version=version), refused=None))
            return True
        if refused and refused.digest == digest and (refused.state == "reverted" or self._judged == digest):
            return True
        self._judged = digest
        candidate, problems = wishes.validate(self._site, document, self._remote)
        plan = wishes.plan(self._good_settings, good.targets, candidate, self._remote) if candidate else None
        for name, wanted in self._wanted.targets.items():
            if name in self._components.targets and (plan is None or name in plan.targets):
                problems += await targets.judge(name, self._components.targets[name], wanted)
        if candidate is None or plan is None or problems:
            await self._reject(digest, version, problems)
            return True
        if (plan.gated or plan.connectivity) and not await self._settled():
            self._judged = ""
            return False
        async with self._lock:
            if self._wake.is_set():
                self._judged = ""
                return False
            await self._try(candidate, plan, version)
        return True

    async def _settled(self) -> bool:
        """Wait for a reference of the images, while nothing is locked; False when something newer may be wanted by now."""
        waiting, woken = asyncio.create_task(self._gate.settled()), asyncio.create_task(self._wake.wait())
        self._waits_for = "watching the images before the change"
        try:
            await asyncio.wait({waiting, woken}, return_when=asyncio.FIRST_COMPLETED)
            if waiting.done():
                waiting.result()
            return waiting.done()
        finally:
            self._waits_for = ""
            waiting.cancel()
            woken.cancel()
            await asyncio.gather(waiting, woken, return_exceptions=True)

    async def _reject(self, digest: str, version: int, problems: list[Problem]) -> None:
        before = self._kept.refused
        if before and before.digest == digest:
            version = before.version
        refused = Refused(digest, version, "rejected", tuple(problems))
        if refused != before:
            log.warning("configuration rejected", version=version, errors=[problem.as_json() for problem in problems])
            await self._keep(replace(self._kept, refused=refused), "config.rejected", version, problems)

    def _reported(self, room: int | None = None) -> dict[str, Any]:
        in_force, settings = self._in_force().desired, self._in_force_settings()
        limit = self._room if room is None else room
        return reported.build(self._wanted, in_force, settings, self.state(), limit, self._remote)

    def _smallest(self) -> dict[str, Any]:
        return self._reported(0)

    # ---- changing what is in force ---------------------------------------------------------------------------------

    async def _try(self, candidate: Candidate, plan: Plan, version: int) -> None:
        gated = plan.gated or plan.connectivity
        try:
            reference = await self._gate.reference() if gated else {}
            previous = await self._components.contents(plan.targets)
        except AgentError as error:
            await self._reject(candidate.desired.digest, version, [Problem("", error.message, error.code)])
            return
        trial = Trial(
            version=version,
            agent=candidate.desired.agent,
            targets=candidate.desired.targets,
            changed=plan.targets,
            previous={name: records.encode(content) for name, content in previous.items()},
            gated=gated,
            connectivity=plan.connectivity,
            stable_for_s=self._settings.config.trial_s,
            reach_within_s=self._settings.config.connectivity_trial_s if plan.connectivity else 0.0,
            reference=reference,
            started=self._now(),
            boot_id=self._boot_id or "",
        )
        newly = {name: trial.previous[name] for name in plan.targets if name not in self._kept.originals}
        log.info("configuration on trial" if gated else "configuration accepted", version=version, targets=plan.targets)
        await self._keep(replace(self._kept, trial=trial, originals={**self._kept.originals, **newly}))
        await self._carry_out(trial)

    async def _carry_out(self, trial: Trial, *, resumed: bool = False) -> None:
        """Apply what is on trial, let it prove itself, and end with a commit or a revert."""
        touched = set(trial.changed) if resumed else set[str]()
        candidate, problems = None, list(trial.problems)
        if trial.phase == "trial":
            candidate, problems = wishes.validate(self._site, trial.desired.as_json(), self._remote)
        if candidate:
            files = {name: self._content(trial, name) for name in trial.changed}
            problems = await self._components.apply(candidate.settings, files, touched) or await self._prove(trial)
        if candidate and not problems:
            await self._commit(trial, candidate)
        else:
            await self._revert(trial, problems, touched)

    def _content(self, trial: Trial, name: str) -> bytes | None:
        """What a target's file has to hold: the wanted document, or the site's own content when the shadow left it."""
        if name in trial.targets:
            return targets.render(trial.targets[name], self._components.targets[name].format)
        return records.decode(self._kept.originals.get(name, trial.previous[name]))

    async def _prove(self, trial: Trial) -> list[Problem]:
        """What speaks against the candidate that is now in force; empty when it held."""
        if not trial.gated:
            return []
        if trial.connectivity and not await self._reach_cloud(trial):
            words = f"the cloud was not reached over the new settings within {trial.reach_within_s:.0f} s"
            return [Problem("/agent", words, "unreachable")]
        announcement = asyncio.create_task(self._announce())
        try:
            before = await self._components.restarts(trial.changed)
            left = trials.time_left_s(trial, self._now())
            held, reasons = await self._gate.watch(trial.reference, stable_for_s=trial.stable_for_s, deadline_s=left)
            complaints = await self._components.complaints(before)
            reasons = [*complaints, *([] if held else reasons or ["the trial was not passed"])]
        except AgentError as error:
            reasons = [error.message]
        except BaseException:
            announcement.cancel()
            raise
        await announcement
        where = pointer("targets", trial.changed[0]) if len(trial.changed) == 1 else ""
        return [Problem(where, why, "trial_failed") for why in reasons]

    async def _announce(self) -> None:
        """Report that a trial is going on, where the cloud can be reached; the end is reported in any case."""
        with contextlib.suppress(CloudError):
            if self._online():
                await self._reporter.send(self._reported(), self._smallest)

    async def _reach_cloud(self, trial: Trial) -> bool:
        """Whether a report is acknowledged over the settings now in force."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(trial.reach_within_s, trials.time_left_s(trial, self._now()))):
                while True:
                    try:
                        await self._reporter.acknowledge(self._reported())
                        return True
                    except CloudError as error:
                        log.info("not reached over the new settings yet", reason=error.message)
                    await asyncio.sleep(1)
        return False

    async def _commit(self, trial: Trial, candidate: Candidate) -> None:
        good = records.put_in_force(trial.desired, trial.version, self._now(), self._kept.good)
        kept = replace(self._kept, good=good, previous=self._kept.good, trial=None, refused=None)
        self._good_settings = candidate.settings
        await self._keep(records.without_stale_originals(kept), "config.applied", trial.version, [])
        log.info("configuration applied", version=trial.version)

    async def _revert(self, trial: Trial, problems: list[Problem], touched: set[str]) -> None:
        """Take the candidate back: the decision is durable first, then the last known good configuration is put back."""
        if trial.phase != "reverting":
            await self._keep(replace(self._kept, trial=trials.reverting(trial, problems)))
        names = [name for name in trial.changed if name in touched and name in self._components.targets]
        files = {name: records.decode(trial.previous[name]) for name in names}
        failed = await self._components.restore(self._good_settings, files)
        reasons = [*problems, *failed]
        refused = Refused(trial.desired.digest, trial.version, "reverted", tuple(reasons))
        kept = records.without_stale_originals(replace(self._kept, trial=None, refused=refused))
        await self._keep(kept, "config.reverted", trial.version, reasons)
        log.warning("configuration reverted", version=trial.version, errors=[problem.as_json() for problem in reasons])

    async def _keep(
        self, kept: Kept, action: str = "", version: int = 0, problems: list[Problem] | None = None
    ) -> None:
        """Make `kept` durable, with an entry in the audit trail for an `action`, in one transaction."""
        before = self._kept

        def change(tables: Tables) -> None:
            records.save(tables, before, kept)
            if action:
                detail = {"version": version, "errors": [problem.as_json() for problem in problems or []]}
                tables.add_audit("shadow", action, detail)

        await self._store.write(change)
        self._kept = kept
        self._on_change()
