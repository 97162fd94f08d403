"""One update from its job document to its one true end: every state is saved before its act, and a restart goes on from there."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from agent.errors import AgentError, FailedError, RefusedError, StoreError
from agent.host.clock import boot_id
from agent.host.threads import to_end
from agent.logs import get_logger
from agent.settings import UpdateTarget
from agent.updates import records
from agent.updates.acts import Acts, AlreadyInstalled, Job, Surroundings
from agent.updates.installers import Installer
from agent.updates.states import FINAL, UNTOUCHED, Outcome, Seen, Slot, State, following, rebuild, resume

T = TypeVar("T")
log = get_logger("updates")

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
        self._progress: dict[str, Any] = {}
        self._acts = Acts(job, name, target, installer, around, self._progress, on_state)
        self.manifest = self._acts.manifest
        self._boot = ""
        self._floor = 0
        self._failures: dict[str, Any] = {}
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
            if self._has_staged():
                await self._acts.forget_staged()
            raise
        except StoreError:
            await self._take_back_unrecorded()
            raise
        finally:
            if self._holds_lock:
                self._around.mutation_lock.release()

    async def _first_state(self) -> tuple[State, bool]:
        """Where to begin or go on, and whether that has yet to be saved."""
        self._boot = await to_end(boot_id)
        kept = await records.read(self._around.store, self._name, self.manifest)
        self._floor, self._failures = kept.floor, kept.failures
        slot = await to_end(self._installer.probe, self.manifest.sha256)
        if not self._job.progress:
            return State.RECEIVED, True
        try:
            self._progress.update(copy.deepcopy(self._job.progress))
            state = State(self._progress["state"])
            after = resume(state, self._seen(state, slot))
        except (KeyError, ValueError, TypeError, AttributeError):
            log.exception("the record of an update can't be read, going by what is there", job_id=self._job.id)
            self._progress.clear()
            self._progress["from"] = f"slots/{kept.installed.sha256}" if kept.installed else None
            state = after = rebuild(
                slot, committed=bool(kept.installed and kept.installed.sha256 == self.manifest.sha256)
            )
            self._acts.reason("interrupted", "the record of this update can't be read")
        log.info("going on with an update", job_id=self._job.id, saved=state, state=after, slot=slot)
        if after is not state and "reason" not in self._progress:
            fell_back = state in (State.TRIAL, State.RESTARTING) and slot != "active"
            if self._job.cancelled.is_set() and after is State.FAILED:
                self._acts.reason("cancelled", "the job was cancelled, nothing was changed")
            elif fell_back:
                self._acts.reason("fell_back", f"{self._acts.target_words()} is not on the new version any more")
            else:
                self._acts.reason("interrupted", f"the update was interrupted too often in {state}")
            if after not in (State.ROLLING_BACK, State.FAILED):
                del self._progress["reason"]
        if after is State.FAILED and state is State.ROLLING_BACK:
            self._acts.rollback_failed("it was interrupted too often")
        if after in UNTOUCHED and after is not State.RECEIVED:
            await self._acts.verify()
        if after not in FINAL and (after not in UNTOUCHED or after is State.INSTALLING):
            await self._lock()
        return after, not (after in FINAL and after is state)

    async def _enter(self, state: State) -> None:
        """Make `state` durable with what its act needs; only then the act may begin."""
        progress = self._progress
        if state is State.ARMED and "baseline" not in progress:
            await self._acts.note_what_runs()
        progress["schema"], progress["state"] = 1, str(state)
        attempts = progress.setdefault("attempts", {})
        attempts[state] = attempts.get(state, 0) + 1
        if state not in (State.DOWNLOADING, State.WAITING):
            progress["entries"] = progress.get("entries", 0) + 1
        facts, self._acts.facts = self._acts.facts, {}
        if state is State.DOWNLOADING:
            progress.pop("reason", None)
        if state in (State.ROLLING_BACK, State.FAILED) and "reason" not in progress:
            self._acts.reason("interrupted", "the update began again too often")
        if state is State.RESTARTING:
            progress["boot_id"] = self._boot
        if state is State.TRIAL:
            progress["boots"] = progress.get("boots", 0) + 1
            if progress.get("trial", {}).get("boot_id") != self._boot:
                progress["trial"] = {"since": time.monotonic(), "boot_id": self._boot}
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
            State.RECEIVED: self._acts.verify,
            State.VERIFIED: self._nothing,
            State.PREFLIGHT: self._acts.preflight,
            State.DOWNLOADING: self._acts.download,
            State.DOWNLOADED: self._acts.check_digest,
            State.WAITING: self._lock,
            State.INSTALLING: self._acts.install,
            State.ARMED: self._acts.arm,
            State.RESTARTING: self._acts.restart,
            State.TRIAL: self._acts.trial,
            State.COMMITTING: self._acts.commit,
            State.ROLLING_BACK: self._acts.roll_back,
        }
        try:
            if state in UNTOUCHED:
                outcome = await self._unless_cancelled(acts[state](), "nothing was changed")
            elif state is State.TRIAL:
                outcome = await self._unless_cancelled(acts[state](), "the version before comes back")
            else:
                outcome = await acts[state]()
        except (AlreadyInstalled, RefusedError, StoreError):
            raise
        except AgentError as error:
            self._failed(state, error.code, error.message, error.hint)
            outcome = Outcome.FAILED
        except OSError as error:
            self._failed(state, "io_error", f"{type(error).__name__}: {error.filename or ''} {error.strerror}")
            outcome = Outcome.FAILED
        except Exception as error:  # an error of ours must not leave an unproven version running
            log.exception("an act of an update broke", job_id=self._job.id, state=state)
            self._failed(state, "internal_error", f"{type(error).__name__}: {error}")
            outcome = Outcome.FAILED
        if outcome is Outcome.FAILED and state in UNTOUCHED and self._has_staged():
            await self._acts.forget_staged()
        return outcome

    def _has_staged(self) -> bool:
        """Whether this execution may have staged a slot: what others have staged is not its to remove."""
        return State.INSTALLING in self._progress.get("attempts", {})

    async def _nothing(self) -> Outcome:
        return Outcome.DONE

    async def _lock(self) -> Outcome:
        if not self._holds_lock:
            await self._around.mutation_lock.acquire()
            self._holds_lock = True
        return Outcome.DONE

    async def _take_back_unrecorded(self) -> None:
        """The store can't be written, so no decision can be kept: what runs must be what the last one said."""
        state = self._job.progress.get("state")
        if state in (State.ARMED, State.RESTARTING, State.TRIAL, State.ROLLING_BACK):
            log.error("state.db can't be written in the middle of an update, going back", target=self._name)
            with contextlib.suppress(AgentError, OSError):
                await to_end(self._installer.roll_back, self._progress.get("from"))
                await self._acts.restart()

    async def _unless_cancelled(self, act: Coroutine[Any, Any, T], then: str) -> T:
        """The act's result; when the job is cancelled first, the act is stopped. Raises FailedError cancelled, with what follows."""
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
            raise FailedError("cancelled", f"the job was cancelled, {then}")
        return work.result()

    def _seen(self, state: State, slot: Slot = "absent") -> Seen:
        progress = self._progress
        return Seen(
            slot=slot,
            attempts=progress.get("attempts", {}).get(state, 1),
            entries=progress.get("entries", 1),
            boots=progress.get("boots", 0),
            boot_changed=progress.get("boot_id", self._boot) != self._boot,
            cancelled=self._job.cancelled.is_set(),
        )

    def _failed(self, state: State, code: str, message: str, hint: str = "") -> None:
        if state is State.ROLLING_BACK:
            self._acts.rollback_failed(message)
        else:
            self._acts.reason(code, message, hint)

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
