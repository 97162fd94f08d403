"""What is done in each state of an update; every act may be done again after a cut."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from agent.errors import AgentError, FailedError
from agent.host.threads import to_end
from agent.logs import get_logger
from agent.settings import UpdateTarget
from agent.store import Store
from agent.updates import records, trust
from agent.updates.fetch import Limits, fetch
from agent.updates.gate import Gate, Units, Verdict
from agent.updates.installers import Installer
from agent.updates.manifest import digest_of, parse_envelope, parse_manifest
from agent.updates.preflight import bytes_on_disk, check_fit, check_space, discard_others, envelope_of, restart_target
from agent.updates.states import Outcome, State
from agent.updates.trust import Installed

log = get_logger("updates")

PROGRESS_EVERY_S = 60.0


class Job(Protocol):
    """The job execution that asked for the update."""

    id: str
    document: Mapping[str, Any]
    progress: dict[str, Any]
    cancelled: asyncio.Event

    async def save(self, progress: dict[str, Any], message: str, *, facts: Mapping[str, Any] | None = None) -> None: ...
    async def fresh_document(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Surroundings:
    """What all updates of a camera share."""

    keys_dir: Path
    downloads_dir: Path
    store: Store
    units: Units | None
    gate: Gate
    mutation_lock: asyncio.Lock
    agent_version: str
    compatible: frozenset[str]
    patience_s: float
    limits: Limits
    settle_s: float
    settle_deadline_s: float


class AlreadyInstalled(Exception):  # noqa: N818
    """The target runs this version; nothing was done."""


class Acts:
    """The acts of one update. `progress` is the record that is saved; `facts` go with the next save."""

    def __init__(
        self,
        job: Job,
        name: str,
        target: UpdateTarget,
        installer: Installer,
        around: Surroundings,
        progress: dict[str, Any],
        on_state: Callable[[State, str], None],
    ) -> None:
        self._job = job
        self._name = name
        self._target = target
        self._installer = installer
        self._around = around
        self._progress = progress
        self._on_state = on_state
        self._envelope = envelope_of(job.document)
        self.manifest = parse_manifest(parse_envelope(self._envelope).payload)
        self.facts: dict[str, Any] = {}
        self._told_wait = float("-inf")

    async def verify(self) -> Outcome:
        """Signatures, floors, versions and fit. Raises RefusedError or AlreadyInstalled."""
        manifest, around = self.manifest, self._around
        kept = await records.read(around.store, self._name, manifest)
        link, installed = await to_end(self._installer.running)
        if installed is None and kept.installed and link and Path(link).name == kept.installed.sha256:
            installed = kept.installed
        root = await to_end(trust.load_root, around.keys_dir, kept.root)
        if kept.now is None:
            log.warning("the clock can't be believed, expiry is not checked", job_id=self._job.id)
        verified = await to_end(trust.verify, self._envelope, root, kept.now)
        check_fit(verified.manifest, self._name, self._target, around.compatible, self._products(installed))
        floor = kept.floor
        if installed and installed.name == manifest.name:
            floor = max(floor, installed.security_counter)  # also when state.db, and the floor in it, was lost
        same = trust.check_version(verified, installed, floor) == "already_installed"
        if same and kept.installed and kept.installed.sha256 == manifest.sha256:
            raise AlreadyInstalled  # committed, not only in place: a trial may have been cut short
        records.check_quarantine(kept.failures, self._job.id, manifest.sha256)
        self.facts = records.seen_root(root, kept.now)
        return Outcome.DONE

    def _products(self, installed: Installed | None) -> dict[str, str]:
        own = {"camera-agent": self._around.agent_version}
        return own | ({installed.name: installed.version} if installed else {})

    async def preflight(self) -> Outcome:
        await to_end(discard_others, self._around.downloads_dir, self.manifest.sha256)
        await self.check_room()
        return Outcome.DONE

    async def check_room(self) -> None:
        """Whether download and installation fit on the disk. Raises RefusedError."""
        manifest, around = self.manifest, self._around
        staged = await to_end(self._installer.probe, manifest.sha256) in ("staged", "active")
        have = await to_end(bytes_on_disk, around.downloads_dir, manifest.sha256)
        need = {around.downloads_dir: max(0, manifest.size - have)}
        place = self._installer.free_space()
        need[place] = need.get(place, 0) + (0 if staged else manifest.installed_size)
        await to_end(check_space, need)

    async def download(self) -> Outcome:
        manifest, around = self.manifest, self._around
        told = time.monotonic()
        saves: set[asyncio.Task[None]] = set()

        def say(words: str) -> None:
            nonlocal told
            self._on_state(State.DOWNLOADING, words)
            if time.monotonic() - told >= PROGRESS_EVERY_S and not saves:
                told = time.monotonic()
                save = asyncio.create_task(self._job.save(copy.deepcopy(self._progress), words))
                saves.add(save)
                save.add_done_callback(saves.discard)

        def tell(done: int) -> None:
            say(f"downloaded {100 * done // manifest.size} % of {manifest.size} bytes")

        async def fresh_urls() -> list[str]:
            return list((await self._job.fresh_document())["urls"])

        try:
            await fetch(
                self._job.document["urls"],
                sha256=manifest.sha256,
                size=manifest.size,
                folder=around.downloads_dir,
                patience_s=around.patience_s,
                fresh_urls=fresh_urls,
                limits=around.limits,
                on_progress=tell,
                on_wait=say,
            )
        finally:
            if saves:
                await asyncio.wait(saves)
        return Outcome.DONE

    async def check_digest(self) -> Outcome:
        path = self._around.downloads_dir / self.manifest.sha256
        with contextlib.suppress(FileNotFoundError):
            if await to_end(digest_of, path) == self.manifest.sha256:
                return Outcome.DONE
        await to_end(path.unlink, missing_ok=True)
        self.reason("digest_mismatch", "the downloaded file was damaged on this camera's disk, twice")
        return Outcome.AGAIN

    async def install(self) -> Outcome:
        if await to_end(self._installer.probe, self.manifest.sha256) in ("absent", "partial"):
            artifact = self._around.downloads_dir / self.manifest.sha256
            await to_end(self._installer.install, artifact, self.manifest)
        await self._around.gate.settled(self.tell_wait)
        return Outcome.DONE

    async def tell_wait(self, words: str) -> None:
        """Say in the status what the switch waits for, and to the cloud now and then."""
        self._on_state(State.INSTALLING, f"{self.manifest.name} {self.manifest.version}: {words}")
        if time.monotonic() - self._told_wait >= PROGRESS_EVERY_S:
            self._told_wait = time.monotonic()
            await self._job.save(copy.deepcopy(self._progress), words)

    async def note_what_runs(self) -> None:
        """Keep in the record what there is before the switch, for the trial and for going back."""
        target = self._target
        baseline = await self._around.gate.baseline(probe=target.probe, unit=target.unit)
        link, before = await to_end(self._installer.running)
        version = before.version if before else ""
        self._progress.update({"from": link, "from_version": version, "baseline": baseline, "boots": 0})

    async def arm(self) -> Outcome:
        await to_end(self._installer.arm, self.manifest.sha256)
        return Outcome.DONE

    async def restart(self) -> Outcome:
        if self.manifest.restart != "none":
            await restart_target(self._target, self._around.units)
        return Outcome.DONE

    async def trial(self) -> Outcome:
        if not await to_end(self._installer.verify_running, self.manifest.sha256):
            self.reason("fell_back", f"{self.target_words()} is not on the new version any more")
            return Outcome.FAILED
        terms = self.manifest.gate
        verdict = await self._around.gate.watch(
            self._progress["baseline"],
            since=self._progress["trial"]["since"],
            stable_for_s=terms.stable_for_s,
            deadline_s=terms.deadline_s,
            unit=self._target.unit,
            probe=self._target.probe,
            cloud=True if terms.offline_policy == "roll_back" else None,
            on_look=self._tell_look,
        )
        if verdict.passed:
            self._progress["gate"] = verdict.reasons[0]
            return Outcome.DONE
        self.reason(verdict.code, "; ".join(verdict.reasons))
        return Outcome.FAILED

    def _tell_look(self, verdict: Verdict) -> None:
        self._on_state(State.TRIAL, "; ".join(verdict.reasons))

    async def commit(self) -> Outcome:
        """The decision is made; what goes wrong in tidying up can't change it."""
        manifest = self.manifest
        record = asdict(Installed(manifest.name, manifest.version, manifest.sha256, manifest.security_counter))
        try:
            if not await to_end(self._installer.verify_running, manifest.sha256):
                await self.arm()
                await self.restart()
            await to_end(self._installer.commit, manifest.sha256, self._progress.get("from"), record)
            await to_end(discard_others, self._around.downloads_dir, "-")
        except (AgentError, OSError) as error:
            log.warning("tidying up after an update failed", target=self._name, reason=str(error))
        return Outcome.DONE

    async def roll_back(self) -> Outcome:
        """Back to what was before, and see that it runs. Without a version before, a restart may well fail."""
        before = self._progress.get("from")
        await to_end(discard_others, self._around.downloads_dir, "-")
        await to_end(self._installer.roll_back, before)
        restarts = self.manifest.restart != "none" and "RESTARTING" in self._progress["attempts"]
        if before is None:
            with contextlib.suppress(FailedError):
                await self.restart()
        elif restarts:
            await self.restart()
            verdict = await self._old_runs()
            if not verdict.passed:
                self.rollback_failed("; ".join(verdict.reasons))
                return Outcome.FAILED
        await to_end(self._installer.clean_up, frozenset({before} if before else ()))
        return Outcome.DONE

    async def _old_runs(self) -> Verdict:
        """Unit and probe, as far as they were well before the update."""
        baseline = self._progress.get("baseline", {})
        return await self._around.gate.watch(
            baseline,
            since=time.monotonic(),
            stable_for_s=self._around.settle_s,
            deadline_s=self._around.settle_deadline_s,
            unit=self._target.unit if baseline.get("unit") else "",
            probe=self._target.probe if baseline.get("probe") else None,
            cloud=False,
            images=False,
        )

    async def forget_staged(self) -> None:
        """Remove what an update that ends before the switch has staged."""
        try:
            await to_end(self._installer.forget, self.manifest.sha256)
        except (AgentError, OSError) as error:
            log.warning("tidying up failed", target=self._name, reason=str(error))

    def reason(self, code: str, message: str, hint: str = "") -> None:
        self._progress["reason"] = {"code": code, "message": message, "hint": hint}

    def rollback_failed(self, why: str) -> None:
        first = self._progress.get("reason", {}).get("message", "the update failed")
        self.reason(
            "rollback_failed", f"{first}; going back failed too: {why}", "look at the camera; a new update can mend it"
        )

    def target_words(self) -> str:
        return f"target {self._name}"
