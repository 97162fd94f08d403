"""What is done in each state of an update; every act may be done again after a cut."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Literal

from agent.errors import AgentError, FailedError, RefusedError
from agent.host.threads import to_end
from agent.logs import get_logger
from agent.reboots import spacing_words
from agent.updates import records, trust
from agent.updates.case import Case
from agent.updates.fetch import fetch
from agent.updates.gate import Verdict
from agent.updates.manifest import digest_of
from agent.updates.preflight import bytes_on_disk, check_fit, check_space, discard_others
from agent.updates.restarts import Restarts, kind_of
from agent.updates.states import Outcome, State

log = get_logger("updates")

PROGRESS_EVERY_S = 60.0
OFFLINE_SAVE_S = 600.0
MAX_COMMITS = 3
TRIES = 3
AGAIN_S = 2.0


class AlreadyInstalled(Exception):  # noqa: N818
    """The target runs this version; nothing was done."""


class Acts:
    """The acts of one update."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._around = case.around
        self._installer = case.installer
        self._manifest = case.manifest
        self._progress = case.progress
        self.restarts = Restarts(
            kind_of(case.target, case.manifest.restart),
            case.target,
            case.around.restarter,
            case.around.store,
            lambda words: case.on_state(case.state, words),
        )
        self._told = float("-inf")

    async def verify(self) -> Outcome:
        """Signatures, floors, versions and fit. Raises RefusedError or AlreadyInstalled."""
        manifest, around, case = self._manifest, self._around, self._case
        kept = await records.read(around.store, case.name, manifest)
        running, installed = await self._installer.running()
        if installed is None and kept.installed and running and Path(running).name == kept.installed.sha256:
            installed = kept.installed
        root = await to_end(trust.load_root, around.keys_dir, kept.root)
        if records.is_newer(root, kept.root):  # kept at once: what it has revoked must not come back with an older file
            await around.store.write(lambda t: t.set_fact(records.ROOT, dict(root.source)))
        if kept.now is None:
            log.warning("the clock can't be believed, expiry is not checked", job_id=case.job.id)
        verified = await to_end(trust.verify, case.envelope, root, kept.now)
        own = {"camera-agent": around.agent_version}
        products = own | ({installed.name: installed.version} if installed else {})
        check_fit(manifest, case.name, case.target, self._installer.restarts, around.compatible, products)
        floor = kept.floor
        if installed and installed.name == manifest.name:
            floor = max(floor, installed.security_counter)  # also when state.db, and the floor in it, was lost
        same = trust.check_version(verified, installed, floor) == "already_installed"
        if same and kept.installed and kept.installed.sha256 == manifest.sha256:
            raise AlreadyInstalled  # committed, not only in place: a trial may have been cut short
        records.check_quarantine(kept.failures, case.job.id, manifest.sha256)
        await self._installer.check(manifest)
        case.facts = records.seen_time(kept.now)
        return Outcome.DONE

    async def preflight(self) -> Outcome:
        await to_end(discard_others, self._around.downloads_dir, self._manifest.sha256)
        await self.check_room()
        return Outcome.DONE

    async def check_room(self) -> None:
        """Whether download and installation fit on the disk. Raises RefusedError."""
        manifest, folder = self._manifest, self._around.downloads_dir
        staged = await self._installer.probe(manifest) in ("staged", "active")
        have = await to_end(bytes_on_disk, folder, manifest.sha256)
        need = {folder: max(0, manifest.size - have)}
        if not staged:
            for place, size in self._installer.needs(manifest).items():
                need[place] = need.get(place, 0) + size
        await to_end(check_space, need)

    async def download(self) -> Outcome:
        manifest, case = self._manifest, self._case
        await self.held("download")
        told = time.monotonic()
        saves: set[asyncio.Task[None]] = set()

        def say(words: str) -> None:
            nonlocal told
            case.on_state(State.DOWNLOADING, words)
            if time.monotonic() - told >= PROGRESS_EVERY_S and not saves:
                told = time.monotonic()
                save = asyncio.create_task(case.job.save(copy.deepcopy(case.progress), words))
                saves.add(save)
                save.add_done_callback(saves.discard)

        def tell(done: int) -> None:
            case.percent = 100 * done // manifest.size
            say(f"downloaded {case.percent} % of {manifest.size} bytes")

        async def fresh_urls() -> list[str]:
            urls = (await case.job.fresh_document()).get("urls")
            if not isinstance(urls, list):
                raise RefusedError("url_invalid", "the job document has no list of urls any more", "send a new job")
            return urls

        try:
            await fetch(
                case.job.document["urls"],
                sha256=manifest.sha256,
                size=manifest.size,
                folder=self._around.downloads_dir,
                patience_s=self._around.patience_s,
                fresh_urls=fresh_urls,
                limits=self._around.limits,
                on_progress=tell,
                on_wait=say,
            )
        finally:
            if saves:
                await asyncio.wait(saves)
        return Outcome.DONE

    async def check_digest(self) -> Outcome:
        path = self._around.downloads_dir / self._manifest.sha256
        with contextlib.suppress(FileNotFoundError):
            if await to_end(digest_of, path) == self._manifest.sha256:
                return Outcome.DONE
        await to_end(path.unlink, missing_ok=True)
        self._case.reason("digest_mismatch", "the downloaded file was damaged on this camera's disk, twice")
        return Outcome.AGAIN

    async def note_what_runs(self) -> None:
        """Keep in the record what there is to go back to."""
        running, before = await self._installer.running()
        if before is None and await self._installer.probe(self._manifest) == "active":
            running, before = await self._installer.previous()  # an earlier trial of it was forgotten half-way
        self._progress.update({"from": running, "from_version": before.version if before else ""})

    async def install(self) -> Outcome:
        """Stage it, to the end: what half an installation leaves is not to be counted on."""
        manifest = self._manifest
        if await self._installer.probe(manifest) in ("absent", "partial"):
            artifact = self._around.downloads_dir / manifest.sha256

            def tell(words: str) -> None:
                self._case.on_state(State.INSTALLING, f"{manifest.name} {manifest.version}: {words}")

            await self._installer.install(artifact, manifest, self._case.envelope, tell)
        return Outcome.DONE

    async def settle(self) -> Outcome:
        """Wait for a reference of the images, for the trial to compare with."""
        await self._around.gate.settled(self._tell_wait)
        return Outcome.DONE

    async def held(self, before: Literal["download", "switch"]) -> bool:
        """Wait until nothing holds the update any more; whether anything did."""
        holds, waited = self._around.holds, False
        while hold := await self._hold(before):
            words, look_again_s = hold
            waited = True
            await self._tell_wait(words)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(look_again_s):
                    await (holds.changed.wait() if holds else asyncio.Event().wait())
            if holds:
                holds.changed.clear()
        return waited

    async def is_held(self, before: Literal["download", "switch"]) -> bool:
        """Whether something holds the update now."""
        return await self._hold(before) is not None

    async def _hold(self, before: Literal["download", "switch"]) -> tuple[str, float] | None:
        holds = self._around.holds
        if holds and (hold := await holds.hold(before, self._case.job.id)):
            return hold.words, hold.look_again_s
        if before == "switch" and self.restarts.kind == "reboot" and (left := await self.restarts.spacing_s()):
            return spacing_words(left), left
        return None

    async def _tell_wait(self, words: str) -> None:
        """Say in the status what is waited for, and to the cloud now and then."""
        self._case.on_state(self._case.state, f"{self._manifest.name} {self._manifest.version}: {words}")
        if time.monotonic() - self._told >= PROGRESS_EVERY_S:
            self._told = time.monotonic()
            await self._case.job.save(copy.deepcopy(self._progress), words)

    async def note_how_things_are(self) -> None:
        """Keep in the record how things are before the switch, for the trial."""
        target = self._case.target
        self._progress["baseline"] = await self._around.gate.baseline(probe=target.probe, unit=target.unit)
        self._progress["boots"] = 0

    async def arm(self) -> Outcome:
        await self._installer.arm(self._manifest)
        return Outcome.DONE

    async def restart(self) -> Outcome:
        await self.restarts.restart()
        return Outcome.DONE

    async def trial(self) -> Outcome:
        if not await self._installer.verify_running(self._manifest):
            self._case.reason("fell_back", await self.fell_back_words())
            return Outcome.FAILED
        terms, was_online = self._manifest.gate, bool(self._progress["baseline"].get("cloud"))
        verdict = await self._watch(terms.deadline_s, self._progress["trial"]["since"], cloud=was_online)
        if verdict.passed and not was_online and not self._around.gate.cloud_ok():
            verdict = await self._wait_for_the_cloud(verdict)
        if verdict.passed:
            self._progress["gate"] = verdict.reasons[0]
            return Outcome.DONE
        self._case.reason(verdict.code, "; ".join(verdict.reasons))
        return Outcome.FAILED

    async def fell_back_words(self) -> str:
        """That the target is not on the new version any more, with the installer's own words on why."""
        words = await self._installer.why_not_running()
        return f"target {self._case.name} is not on the new version any more" + (f": {words}" if words else "")

    async def _watch(self, deadline_s: float, since: float, *, cloud: bool) -> Verdict:
        terms = self._manifest.gate
        return await self._around.gate.watch(
            self._progress["baseline"],
            since=since,
            stable_for_s=terms.stable_for_s,
            deadline_s=deadline_s,
            unit=self._case.target.unit,
            probe=self._case.target.probe,
            cloud=cloud,
            least_share=terms.min_capture_ratio,
            on_look=lambda verdict: self._case.on_state(State.TRIAL, "; ".join(verdict.reasons)),
        )

    async def _wait_for_the_cloud(self, proven: Verdict) -> Verdict:
        """The camera was off-line before: for a day the cloud may come back, then the manifest's policy decides.

        All else has been proven, so the boots of that day are not counted against the new version.
        """
        patience_s, started = self._around.offline_patience_s, time.monotonic()
        waited: float = self._progress.get("offline_s", 0.0)
        last = Verdict(False, "cloud_lost")
        self._progress["boots"] = 0
        await self._installer.count_anew(self._manifest)
        while (left := patience_s - waited) > 0:
            await self._case.save(
                f"{self._manifest.name} {self._manifest.version}: all is well but for the cloud, awaited"
            )
            verdict = await self._watch(
                min(left, OFFLINE_SAVE_S) + self._manifest.gate.stable_for_s, started, cloud=True
            )
            waited += time.monotonic() - started
            started = time.monotonic()
            self._progress["offline_s"] = waited
            if verdict.passed or verdict.harm:
                return verdict
            last = verdict
        if last.code != "cloud_lost":
            return last
        if self._manifest.gate.offline_policy == "commit":
            return Verdict(True, reasons=(f"{proven.reasons[0]}; the cloud was not reached before nor after",))
        return Verdict(False, "cloud_lost", (f"the cloud was not reached within {patience_s:g} s",))

    async def commit(self) -> Outcome:
        """The trial is passed; what goes wrong in tidying up can't change that, only a version that does not stay can."""
        manifest = self._manifest
        owed = self._progress.get("owed")  # a restart since the version was switched to once more; {}: not switched yet
        if not await self._installer.verify_running(manifest) or (
            owed is not None and not self.restarts.happened(owed)
        ):
            if self._progress["attempts"][State.COMMITTING] > MAX_COMMITS:
                self._case.reason("fell_back", await self.fell_back_words())
                return Outcome.FAILED
            self._progress["owed"] = {}
            await self._case.save(f"{manifest.name} {manifest.version}: switching to it once more")
            await self._installer.arm(manifest)
            self._progress["owed"] = self.restarts.now()
            await self._case.save(f"{manifest.name} {manifest.version}: restarting")
            await self.restarts.restart()
            del self._progress["owed"]
        try:
            await self._patiently(lambda: self._installer.commit(manifest, self._progress.get("from")))
            await to_end(discard_others, self._around.downloads_dir, "-")
        except OSError as error:
            log.warning("tidying up after an update failed", target=self._case.name, reason=str(error))
        return Outcome.DONE

    async def roll_back(self) -> Outcome:
        """Back to what was before, and see that it runs. Without a version before, a restart may well fail."""
        case, before = self._case, self._progress.get("from")
        if self._manifest.rollback == "no":
            case.rollback_failed("it is signed with rollback = no")
            return Outcome.FAILED
        await to_end(discard_others, self._around.downloads_dir, "-")
        back = await self._is_back()
        await self._patiently(lambda: self._installer.roll_back(before))
        if self.restarts.ends_process and not back:  # after the act: a restart in between led to the new version again
            self._progress["undone"] = self.restarts.now()
            await case.save(f"{self._manifest.name} {self._manifest.version}: going back")
        if "RESTARTING" in self._progress["attempts"] or self.restarts.ends_process:
            if before is None:
                if not back:
                    with contextlib.suppress(FailedError):
                        await self.restarts.restart()
                running, _ = await self._installer.running()
                if running is not None:
                    case.rollback_failed(f"{running} runs instead of what was there before")
                    return Outcome.FAILED
            elif not await self._runs_again(back):
                return Outcome.FAILED
        await self._installer.clean_up(frozenset({before} if before else ()))
        return Outcome.DONE

    async def _patiently(self, act: Callable[[], Awaitable[None]]) -> None:
        """What fails for now, as while a service is being started again, must not decide over the version that runs."""
        for left in reversed(range(TRIES)):
            try:
                await act()
            except (AgentError, OSError) as error:
                if not left or getattr(error, "code", "") == "fell_back":
                    raise
                log.warning("it did not work, once more", target=self._case.name, reason=str(error))
                await asyncio.sleep(AGAIN_S)
            else:
                return

    async def _is_back(self) -> bool:
        """Whether the version before already runs, as the camera or the agent was restarted into it."""
        if not self.restarts.ends_process:
            return False
        if "undone" in self._progress:
            return self.restarts.happened(self._progress["undone"])
        if self._case.target.installer not in ("agent", "rauc"):  # of others only what would run next is known
            return False
        running, _ = await self._installer.running()
        return running == self._progress.get("from")

    async def _runs_again(self, back: bool) -> bool:
        if not back:
            await self.restarts.restart()
        running, _ = await self._installer.running()
        if running != self._progress.get("from"):
            self._case.rollback_failed(f"{running or 'nothing'} runs instead of {self._progress.get('from')}")
            return False
        verdict = await self._old_runs()
        if not verdict.passed:
            self._case.rollback_failed("; ".join(verdict.reasons))
        return bool(verdict.passed)

    async def _old_runs(self) -> Verdict:
        """Unit and probe, as far as they were well before the update."""
        baseline, target = self._progress.get("baseline", {}), self._case.target
        return await self._around.gate.watch(
            baseline,
            since=time.monotonic(),
            stable_for_s=self._around.settle_s,
            deadline_s=self._around.settle_deadline_s,
            unit=target.unit if baseline.get("unit") else "",
            probe=target.probe if baseline.get("probe") else None,
            cloud=False,
            images=False,
        )

    async def forget_staged(self) -> None:
        """Remove what an update that ends before the switch has staged."""
        try:
            await self._installer.forget(self._manifest)
        except (AgentError, OSError) as error:
            log.warning("tidying up failed", target=self._case.name, reason=str(error))
