"""One update from its job document to its one true end: every state is saved before its act, and a restart goes on from there."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from agent.errors import AgentError, FailedError, RefusedError, StoreError
from agent.host.clock import boot_id
from agent.logs import get_logger
from agent.settings import UpdateTarget
from agent.store import Store
from agent.updates import records, trust
from agent.updates.fetch import Limits, bytes_on_disk, discard_others, fetch
from agent.updates.gate import Gate, Units, Verdict
from agent.updates.installers import Installer
from agent.updates.manifest import digest_of, parse_envelope, parse_manifest
from agent.updates.preflight import check_fit, check_space, envelope_of, restart_target
from agent.updates.states import FINAL, UNTOUCHED, Outcome, Seen, Slot, State, following, rebuild, resume
from agent.updates.threads import to_end
from agent.updates.trust import Installed

T = TypeVar("T")
log = get_logger("updates")

PROGRESS_EVERY_S = 60.0
MESSAGES = {
    State.RECEIVED: "verifying the manifest",
    State.VERIFIED: "the manifest is signed by keys this camera trusts",
    State.PREFLIGHT: "checking space",
    State.DOWNLOADING: "downloading",
    State.DOWNLOADED: "checking the digest",
    State.WAITING: "waiting for another change to end",
    State.INSTALLING: "installing beside what runs",
    State.ARMED: "switching to the new version",
    State.RESTARTING: "restarting",
    State.TRIAL: "on trial",
    State.COMMITTING: "the trial is passed, keeping the new version",
    State.COMMITTED: "the new version stays",
    State.ROLLING_BACK: "going back to the version before",
    State.ROLLED_BACK: "the version before runs again",
    State.FAILED: "failed",
}


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


class Flow:
    """One update of one target."""

    def __init__(
        self,
        job: Job,
        name: str,
        target: UpdateTarget,
        installer: Installer,
        around: Surroundings,
        on_state: Callable[[State, str], None],
    ) -> None:
        self._job = job
        self._name = name
        self._target = target
        self._installer = installer
        self._around = around
        self._on_state = on_state
        self._envelope = envelope_of(job.document)
        self.manifest = parse_manifest(parse_envelope(self._envelope).payload)
        self._progress: dict[str, Any] = {}
        self._floor = 0
        self._failures: dict[str, Any] = {}
        self._facts: dict[str, Any] = {}
        self._holds_lock = False

    async def run(self) -> dict[str, str]:
        """Returns the details of SUCCEEDED. Raises RefusedError, FailedError."""
        try:
            state, save = await self._first_state()
            while True:
                if save:
                    await self._enter(state)
                save = True
                if state in FINAL:
                    return self._end(state)
                outcome = await self._attempt(state)
                state = following(state, outcome, self._seen(state))
        except AlreadyInstalled:
            words = f"{self.manifest.name} {self.manifest.version} is installed already"
            return {"reason_code": "already_installed", "message": words, "version": self.manifest.version}
        except RefusedError:
            await self._forget_staged()
            raise
        except StoreError:
            await self._take_back_unrecorded()
            raise
        finally:
            if self._holds_lock:
                self._around.mutation_lock.release()

    async def _first_state(self) -> tuple[State, bool]:
        """Where to begin or go on, and whether that has yet to be saved."""
        kept = await records.read(self._around.store, self._name, self.manifest)
        self._floor, self._failures = kept.floor, kept.failures
        slot = await to_end(self._installer.probe, self.manifest.sha256)
        if not self._job.progress:
            return State.RECEIVED, True
        try:
            self._progress = copy.deepcopy(self._job.progress)
            state = State(self._progress["state"])
            after = resume(state, self._seen(state, slot))
        except (KeyError, ValueError, TypeError, AttributeError):
            log.exception("the record of an update can't be read, going by what is there", job_id=self._job.id)
            self._progress = {"from": f"slots/{kept.installed.sha256}" if kept.installed else None}
            state = after = rebuild(
                slot, committed=bool(kept.installed and kept.installed.sha256 == self.manifest.sha256)
            )
            self._reason("interrupted", "the record of this update can't be read")
        log.info("going on with an update", job_id=self._job.id, saved=state, state=after, slot=slot)
        if after is not state and "reason" not in self._progress:
            fell_back = state in (State.TRIAL, State.RESTARTING) and slot != "active"
            if self._job.cancelled.is_set() and after is State.FAILED:
                self._reason("cancelled", "the job was cancelled, nothing was changed")
            elif fell_back:
                self._reason("fell_back", f"{self._target_words()} is not on the new version any more")
            else:
                self._reason("interrupted", f"the update was interrupted too often in {state}")
            if after not in (State.ROLLING_BACK, State.FAILED):
                del self._progress["reason"]
        if after is State.FAILED and state is State.ROLLING_BACK:
            self._rollback_failed("it was interrupted too often")
        if after in UNTOUCHED and after is not State.RECEIVED:
            await self._verify()
        if after not in FINAL and (after not in UNTOUCHED or after is State.INSTALLING):
            await self._lock()
        return after, not (after in FINAL and after is state)

    async def _enter(self, state: State) -> None:
        """Make `state` durable with what its act needs; only then the act may begin."""
        progress = self._progress
        progress["schema"], progress["state"] = 1, str(state)
        attempts = progress.setdefault("attempts", {})
        attempts[state] = attempts.get(state, 0) + 1
        if state not in (State.DOWNLOADING, State.WAITING):
            progress["entries"] = progress.get("entries", 0) + 1
        facts, self._facts = self._facts, {}
        if state is State.ARMED and "baseline" not in progress:
            progress["from"], before = await to_end(self._installer.running)
            progress["from_version"] = before.version if before else ""
            progress["baseline"] = await self._around.gate.baseline(probe=self._target.probe, unit=self._target.unit)
            progress["boots"] = 0
        if state is State.RESTARTING:
            progress["boot_id"] = boot_id()
        if state is State.TRIAL:
            progress["boots"] = progress.get("boots", 0) + 1
            if progress.get("trial", {}).get("boot_id") != boot_id():
                progress["trial"] = {"since": time.monotonic(), "boot_id": boot_id()}
        if state is State.COMMITTING:
            facts |= records.committed(self._name, self.manifest, self._floor)
        if state in (State.ROLLED_BACK, State.FAILED) and State.INSTALLING in attempts:
            code = progress["reason"]["code"]
            facts |= records.failed(self._name, self.manifest, self._job.id, self._failures, code)
        message = self._message(state)
        await self._job.save(copy.deepcopy(progress), message, facts=facts)
        self._on_state(state, message)
        log.info("update", job_id=self._job.id, target=self._name, version=self.manifest.version, state=state)

    async def _attempt(self, state: State) -> Outcome:
        """Do the act of `state`; whatever goes wrong is kept as the reason."""
        acts: dict[State, Callable[[], Coroutine[Any, Any, Outcome]]] = {
            State.RECEIVED: self._verify,
            State.VERIFIED: self._nothing,
            State.PREFLIGHT: self._preflight,
            State.DOWNLOADING: self._download,
            State.DOWNLOADED: self._check_digest,
            State.WAITING: self._lock,
            State.INSTALLING: self._install,
            State.ARMED: self._arm,
            State.RESTARTING: self._restart,
            State.TRIAL: self._trial,
            State.COMMITTING: self._commit,
            State.ROLLING_BACK: self._roll_back,
        }
        try:
            if state in UNTOUCHED:
                outcome = await self._unless_cancelled(acts[state]())
            else:
                outcome = await acts[state]()
        except (RefusedError, StoreError):
            raise
        except AgentError as error:
            self._failed(state, error.code, error.message, error.hint)
            outcome = Outcome.FAILED
        except OSError as error:
            self._failed(state, "io_error", f"{type(error).__name__}: {error.filename or ''} {error.strerror}")
            outcome = Outcome.FAILED
        if outcome is Outcome.FAILED and state in UNTOUCHED:
            await self._forget_staged()
        return outcome

    async def _nothing(self) -> Outcome:
        return Outcome.DONE

    async def _verify(self) -> Outcome:
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
        if trust.check_version(verified, installed, kept.floor) == "already_installed":
            raise AlreadyInstalled
        records.check_quarantine(kept.failures, self._job.id, manifest.sha256)
        self._facts = records.seen_root(root, kept.now)
        return Outcome.DONE

    def _products(self, installed: Installed | None) -> dict[str, str]:
        own = {"camera-agent": self._around.agent_version}
        return own | ({installed.name: installed.version} if installed else {})

    async def _preflight(self) -> Outcome:
        manifest, around = self.manifest, self._around
        await to_end(discard_others, around.downloads_dir, manifest.sha256)
        staged = await to_end(self._installer.probe, manifest.sha256) in ("staged", "active")
        have = await to_end(bytes_on_disk, around.downloads_dir, manifest.sha256)
        need = {around.downloads_dir: max(0, manifest.size - have)}
        place = self._installer.free_space()
        need[place] = need.get(place, 0) + (0 if staged else manifest.installed_size)
        await to_end(check_space, need)
        return Outcome.DONE

    async def _download(self) -> Outcome:
        manifest, around = self.manifest, self._around
        told = time.monotonic()
        saves: set[asyncio.Task[None]] = set()

        def tell(done: int) -> None:
            nonlocal told
            if time.monotonic() - told >= PROGRESS_EVERY_S and not saves:
                told = time.monotonic()
                words = f"downloaded {100 * done // manifest.size} % of {manifest.size} bytes"
                save = asyncio.create_task(self._job.save(copy.deepcopy(self._progress), words))
                saves.add(save)
                save.add_done_callback(saves.discard)

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
            )
        finally:
            if saves:
                await asyncio.wait(saves)
        return Outcome.DONE

    async def _check_digest(self) -> Outcome:
        path = self._around.downloads_dir / self.manifest.sha256
        with contextlib.suppress(FileNotFoundError):
            if await to_end(digest_of, path) == self.manifest.sha256:
                return Outcome.DONE
        await to_end(path.unlink, missing_ok=True)
        self._reason("digest_mismatch", "the downloaded file was damaged on this camera's disk, twice")
        return Outcome.AGAIN

    async def _lock(self) -> Outcome:
        if not self._holds_lock:
            await self._around.mutation_lock.acquire()
            self._holds_lock = True
        return Outcome.DONE

    async def _install(self) -> Outcome:
        if await to_end(self._installer.probe, self.manifest.sha256) in ("absent", "partial"):
            artifact = self._around.downloads_dir / self.manifest.sha256
            await to_end(self._installer.install, artifact, self.manifest)
        return Outcome.DONE

    async def _arm(self) -> Outcome:
        await to_end(self._installer.arm, self.manifest.sha256)
        return Outcome.DONE

    async def _restart(self) -> Outcome:
        if self.manifest.restart != "none":
            await restart_target(self._target, self._around.units)
        return Outcome.DONE

    async def _trial(self) -> Outcome:
        if not await to_end(self._installer.verify_running, self.manifest.sha256):
            self._reason("fell_back", f"{self._target_words()} is not on the new version any more")
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
        self._reason(verdict.code, "; ".join(verdict.reasons))
        return Outcome.FAILED

    def _tell_look(self, verdict: Verdict) -> None:
        self._on_state(State.TRIAL, "; ".join(verdict.reasons))

    async def _commit(self) -> Outcome:
        """The decision is made; what goes wrong in tidying up can't change it."""
        manifest = self.manifest
        record = asdict(Installed(manifest.name, manifest.version, manifest.sha256, manifest.security_counter))
        try:
            await to_end(self._installer.commit, manifest.sha256, self._progress.get("from"), record)
            await to_end(discard_others, self._around.downloads_dir, "-")
        except (AgentError, OSError) as error:
            log.warning("tidying up after an update failed", target=self._name, reason=str(error))
        return Outcome.DONE

    async def _roll_back(self) -> Outcome:
        """Back to what was before, and see that it runs. Without a version before, a restart may well fail."""
        before = self._progress.get("from")
        await to_end(self._installer.roll_back, before)
        restarts = self.manifest.restart != "none" and "RESTARTING" in self._progress["attempts"]
        if before is None:
            with contextlib.suppress(FailedError):
                await self._restart()
        elif restarts:
            await self._restart()
            verdict = await self._old_runs()
            if not verdict.passed:
                self._rollback_failed("; ".join(verdict.reasons))
                return Outcome.FAILED
        await to_end(self._installer.clean_up, frozenset({before} if before else ()))
        await to_end(discard_others, self._around.downloads_dir, "-")
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

    async def _forget_staged(self) -> None:
        """Remove what an update that ends before the switch has staged."""
        try:
            await to_end(self._installer.forget, self.manifest.sha256)
        except (AgentError, OSError) as error:
            log.warning("tidying up failed", target=self._name, reason=str(error))

    async def _take_back_unrecorded(self) -> None:
        """The store can't be written, so no decision can be kept: what runs must be what the last one said."""
        state = self._progress.get("state")
        if state in (State.ARMED, State.RESTARTING, State.TRIAL, State.ROLLING_BACK):
            log.error("state.db can't be written in the middle of an update, going back", target=self._name)
            with contextlib.suppress(AgentError, OSError):
                await to_end(self._installer.roll_back, self._progress.get("from"))
                await self._restart()

    async def _unless_cancelled(self, act: Coroutine[Any, Any, T]) -> T:
        """The act's result; when the job is cancelled first, the act is stopped. Raises FailedError cancelled."""
        work = asyncio.ensure_future(act)
        cancel = asyncio.ensure_future(self._job.cancelled.wait())
        try:
            await asyncio.wait({work, cancel}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            cancel.cancel()
            if not work.done():
                work.cancel()
            await asyncio.wait({work, cancel})
        if work.cancelled() or (self._job.cancelled.is_set() and not work.exception()):
            raise FailedError("cancelled", "the job was cancelled, nothing was changed")
        return work.result()

    def _seen(self, state: State, slot: Slot = "absent") -> Seen:
        progress = self._progress
        return Seen(
            slot=slot,
            attempts=progress.get("attempts", {}).get(state, 1),
            entries=progress.get("entries", 1),
            boots=progress.get("boots", 0),
            boot_changed=progress.get("boot_id", boot_id()) != boot_id(),
            cancelled=self._job.cancelled.is_set(),
        )

    def _reason(self, code: str, message: str, hint: str = "") -> None:
        self._progress["reason"] = {"code": code, "message": message, "hint": hint}

    def _failed(self, state: State, code: str, message: str, hint: str = "") -> None:
        if state is State.ROLLING_BACK:
            self._rollback_failed(message)
        else:
            self._reason(code, message, hint)

    def _rollback_failed(self, why: str) -> None:
        first = self._progress.get("reason", {}).get("message", "the update failed")
        self._reason(
            "rollback_failed", f"{first}; going back failed too: {why}", "look at the camera; a new update can mend it"
        )

    def _target_words(self) -> str:
        return f"target {self._name}"

    def _message(self, state: State) -> str:
        words = MESSAGES[state]
        if state in (State.ROLLING_BACK, State.FAILED):
            words = f"{words}: {self._progress['reason']['message']}"
        return f"{self.manifest.name} {self.manifest.version}: {words}"

    def _end(self, state: State) -> dict[str, str]:
        """The terminal status that a final state stands for."""
        manifest, progress = self.manifest, self._progress
        if state is State.COMMITTED:
            words = f"{manifest.name} {manifest.version} runs on {self._name}; {progress.get('gate', 'proven')}"
            return {"reason_code": "updated", "message": words, "version": manifest.version}
        reason = progress["reason"]
        message = reason["message"]
        if state is State.ROLLED_BACK:
            before = progress.get("from_version") or ("the version before" if progress.get("from") else "nothing")
            message = f"{message}; taken back to {before}"
        raise FailedError(reason["code"], message, reason["hint"])
