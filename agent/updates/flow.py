"""One update from its job document to its one true end: every state is saved before its act, and a restart goes on from there."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from agent.errors import AgentError, FailedError, RefusedError, StoreError
from agent.logs import get_logger
from agent.updates import records
from agent.updates.acts import Acts, AlreadyInstalled
from agent.updates.case import Case
from agent.updates.states import FINAL, UNTOUCHED, Outcome, Seen, Slot, State, following, rebuild, resume

OBSERVE_TRIES = 30
OBSERVE_AGAIN_S = 10.0
T = TypeVar("T")
log = get_logger("updates")

MESSAGES = {
    State.RECEIVED: "verifying the manifest",
    State.VERIFIED: "the manifest is signed by keys this camera trusts",
    State.PREFLIGHT: "checking space",
    State.DOWNLOADING: "downloading",
    State.DOWNLOADED: "checking the digest",
    State.WAITING: "waiting for its time",
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

    def __init__(self, case: Case) -> None:
        self._case = case
        self._job = case.job
        self._progress = case.progress
        self._installer = case.installer
        self._around = case.around
        self._acts = Acts(case)
        self._floor = 0
        self._failures: dict[str, Any] = {}
        self._holds_lock = False
        self._unseen = ""

    async def run(self) -> dict[str, str]:
        """Returns the details of SUCCEEDED. Raises RefusedError, FailedError."""
        manifest = self._case.manifest
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
            words = f"{manifest.name} {manifest.version} is installed already"
            return {"reason_code": "already_installed", "message": words, "version": manifest.version}
        except RefusedError:
            if self._has_staged():
                await self._acts.forget_staged()
            raise
        except StoreError:
            await self._take_back_unrecorded()
            raise
        finally:
            self._unlock()

    async def _first_state(self) -> tuple[State, bool]:
        """Where to begin or go on, and whether that has yet to be saved."""
        case, manifest = self._case, self._case.manifest
        kept = await records.read(self._around.store, case.name, manifest)
        self._floor, self._failures = kept.floor, kept.failures
        if not self._job.progress:
            return State.RECEIVED, True
        await self._take_up()
        slot, running = await self._observe()
        try:
            self._progress.update(copy.deepcopy(self._job.progress))
            state = State(self._progress["state"])
            after = resume(state, self._seen(state, slot, running))
        except (KeyError, ValueError, TypeError, AttributeError):
            log.exception("the record of an update can't be read, going by what is there", job_id=self._job.id)
            self._progress.clear()
            self._progress["from"] = await self._before()
            committed = bool(kept.installed and kept.installed.sha256 == manifest.sha256)
            state = after = rebuild(slot, committed=committed)
            case.reason("interrupted", "the record of this update can't be read")
        log.info("going on with an update", job_id=self._job.id, saved=state, state=after, slot=slot)
        await self._explain(state, after, slot)
        if after in UNTOUCHED and after is not State.RECEIVED:
            await self._acts.verify()
        if after is State.FAILED and state in UNTOUCHED and self._has_staged():
            await self._acts.forget_staged()
        if after not in FINAL and (after not in UNTOUCHED or after is State.INSTALLING):
            await self._lock()
        return after, not (after in FINAL and after is state)

    async def _take_up(self) -> None:
        """Say what is gone on with, and keep others away, before anything is looked at: that may take its time."""
        try:
            saved = State(self._job.progress.get("state", ""))
        except (ValueError, TypeError, AttributeError):
            return
        if saved in FINAL:
            return
        if self._job.progress.get("stop"):
            self._job.cancelled.set()
        self._case.on_state(saved, f"{self._case.manifest.name}: going on after a restart")
        if saved not in UNTOUCHED:
            self._case.switching = True
            await self._lock()

    async def _observe(self) -> tuple[Slot, str | None]:
        """What the installer says is there; after a start it may take a while until it can be asked."""
        for left in reversed(range(OBSERVE_TRIES)):
            try:
                slot = await self._installer.probe(self._case.manifest)
                running, _ = await self._installer.running()
            except Exception as error:
                log.exception("what is installed can't be seen yet", target=self._case.name)
                self._unseen = str(error) or type(error).__name__
                if left:
                    await asyncio.sleep(OBSERVE_AGAIN_S)
            else:
                self._unseen = ""
                return slot, running
        return "absent", None

    async def _before(self) -> str | None:
        """What there is to go back to, where the record that says it is lost."""
        try:
            return (await self._installer.previous())[0]
        except (AgentError, OSError) as error:
            log.warning("the version before can't be told", target=self._case.name, reason=str(error))
            return None

    async def _explain(self, state: State, after: State, slot: Slot) -> None:
        """The reason, where the restart itself is why the update does not go on as it was."""
        case = self._case
        if after is not state and "reason" not in self._progress and after in (State.ROLLING_BACK, State.FAILED):
            if self._unseen:
                case.reason("interrupted", f"after a restart it can't be seen what runs: {self._unseen}")
            elif self._job.cancelled.is_set() and after is State.FAILED:
                case.reason("cancelled", "the job was cancelled, nothing was changed")
            elif state in (State.TRIAL, State.RESTARTING) and slot != "active":
                case.reason("fell_back", await self._acts.fell_back_words())
            elif state is State.INSTALLING and after is State.ROLLING_BACK:
                case.reason("interrupted", "the camera started what was only being installed")
            else:
                case.reason("interrupted", f"the update was interrupted too often in {state}")
        if after is State.FAILED and state is State.ROLLING_BACK:
            case.rollback_failed("it was interrupted too often")

    async def _enter(self, state: State) -> None:
        """Make `state` durable with what its act needs; only then the act may begin."""
        case, progress = self._case, self._progress
        if state is State.INSTALLING and "from" not in progress:
            await self._acts.note_what_runs()
        if state is State.ARMED and "baseline" not in progress:
            await self._acts.note_how_things_are()
        progress["schema"], progress["state"] = 1, str(state)
        attempts = progress.setdefault("attempts", {})
        attempts[state] = attempts.get(state, 0) + 1
        if state not in (State.DOWNLOADING, State.WAITING):
            progress["entries"] = progress.get("entries", 0) + 1
        if state is State.DOWNLOADING:
            progress.pop("reason", None)
        if state in (State.ROLLING_BACK, State.FAILED) and "reason" not in progress:
            case.reason("interrupted", "the update began again too often")
        if state is State.RESTARTING:
            progress["restart"] = self._acts.restarts.now()
        if state is State.TRIAL:
            self._note_trial()
        if state is State.COMMITTED:
            case.facts |= records.committed(case.name, case.manifest, self._floor)
        if state in (State.ROLLED_BACK, State.FAILED) and State.INSTALLING in attempts:
            case.facts |= records.failed(case.name, case.manifest, self._job.id, self._failures, progress["reason"])
        message = self._message(state)
        await case.save(message)
        case.on_state(state, message)
        log.info("update", job_id=self._job.id, target=case.name, version=case.manifest.version, state=state)

    def _note_trial(self) -> None:
        """Another boot of the trial; its time begins anew with each, as the monotonic clock does."""
        progress, boot_id = self._progress, self._around.restarter.boot_id
        progress["boots"] = progress.get("boots", 0) + 1
        if progress.get("trial", {}).get("boot_id") != boot_id:
            progress["trial"] = {"since": time.monotonic(), "boot_id": boot_id}

    async def _attempt(self, state: State) -> Outcome:
        """Do the act of `state`; whatever goes wrong is kept as the reason."""
        try:
            outcome = await self._act(state)
        except (AlreadyInstalled, StoreError):
            raise
        except AgentError as error:
            if isinstance(error, RefusedError) and state in UNTOUCHED:
                raise
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

    async def _act(self, state: State) -> Outcome:
        acts: dict[State, Callable[[], Coroutine[Any, Any, Outcome]]] = {
            State.RECEIVED: self._acts.verify,
            State.VERIFIED: self._nothing,
            State.PREFLIGHT: self._acts.preflight,
            State.DOWNLOADING: self._acts.download,
            State.DOWNLOADED: self._acts.check_digest,
            State.WAITING: self._permission,
            State.INSTALLING: self._acts.install,
            State.ARMED: self._acts.arm,
            State.RESTARTING: self._acts.restart,
            State.TRIAL: self._acts.trial,
            State.COMMITTING: self._acts.commit,
            State.ROLLING_BACK: self._acts.roll_back,
        }
        if state is State.TRIAL:
            return await self._unless_cancelled(acts[state](), "the version before comes back")
        if state is State.INSTALLING:  # an installer is not stopped half-way
            await acts[state]()
            return await self._unless_cancelled(self._ready_to_switch(), "nothing was changed")
        if state in UNTOUCHED:
            return await self._unless_cancelled(acts[state](), "nothing was changed")
        return await acts[state]()

    def _has_staged(self) -> bool:
        """Whether this execution may have staged a slot: what others have staged is not its to remove."""
        return State.INSTALLING in self._progress.get("attempts", {})

    async def _nothing(self) -> Outcome:
        return Outcome.DONE

    async def _ready_to_switch(self) -> Outcome:
        """Nothing is taken for granted after a wait that may have lasted days: keys, floors and what runs are looked at again."""
        self._unlock()
        await self._acts.settle()
        while True:
            await self._permission()
            await self._acts.verify()
            self._case.switching = True  # from here on no lock is given, so one more look sees all there are
            if not await self._acts.is_held("switch"):
                return Outcome.DONE
            self._case.switching = False
            self._unlock()

    async def _permission(self) -> Outcome:
        """Return with the lock against other changes once nothing else holds the update; never keep it while waiting."""
        while await self._acts.is_held("switch"):
            self._unlock()
            await self._acts.held("switch")
            await self._lock()
        await self._lock()
        return Outcome.DONE

    async def _lock(self) -> None:
        if not self._holds_lock:
            if self._around.mutation_lock.locked():
                state = State(self._progress.get("state") or self._job.progress["state"])
                self._case.on_state(state, f"{self._case.manifest.name}: waits until another change has ended")
            await self._around.mutation_lock.acquire()
            self._holds_lock = True

    def _unlock(self) -> None:
        if self._holds_lock:
            self._around.mutation_lock.release()
            self._holds_lock = False

    async def _take_back_unrecorded(self) -> None:
        """The store can't be written, so no decision can be kept: what runs must be what the last one said."""
        state = self._job.progress.get("state")
        if state in (State.ARMED, State.RESTARTING, State.TRIAL, State.COMMITTING, State.ROLLING_BACK):
            log.error("state.db can't be written in the middle of an update, going back", target=self._case.name)
            with contextlib.suppress(AgentError, OSError):
                running, _ = await self._installer.running()
                await self._installer.roll_back(self._progress.get("from"))
                undone, restarts = self._progress.get("undone"), self._acts.restarts
                due = bool(undone) and not restarts.happened(undone)  # switched back by now, and not restarted since
                if due or running != self._progress.get("from") or not restarts.ends_process:
                    await self._acts.restarts.restart(recorded=False)

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

    def _seen(self, state: State, slot: Slot = "absent", running: str | None = None) -> Seen:
        progress = self._progress
        return Seen(
            slot=slot,
            attempts=progress.get("attempts", {}).get(state, 1),
            entries=progress.get("entries", 1),
            boots=progress.get("boots", 0),
            restarted=self._acts.restarts.happened(progress.get("restart")),
            moved="from" in progress and not self._unseen and running != progress["from"],
            cancelled=self._job.cancelled.is_set(),
        )

    def _failed(self, state: State, code: str, message: str, hint: str = "") -> None:
        if state is State.ROLLING_BACK:
            self._case.rollback_failed(message)
        else:
            self._case.reason(code, message, hint)

    def _message(self, state: State) -> str:
        words = MESSAGES[state]
        if state in (State.ROLLING_BACK, State.FAILED):
            words = f"{words}: {self._progress['reason']['message']}"
        return f"{self._case.manifest.name} {self._case.manifest.version}: {words}"

    def _end(self, state: State) -> dict[str, str]:
        """The terminal status that a final state stands for."""
        manifest, progress = self._case.manifest, self._progress
        if state is State.COMMITTED:
            words = f"{manifest.name} {manifest.version} runs on {self._case.name}; {progress.get('gate', 'proven')}"
            return {"reason_code": "updated", "message": words, "version": manifest.version}
        reason = progress["reason"]
        message = reason["message"]
        if state is State.ROLLED_BACK:
            before = progress.get("from_version") or ("the version before" if progress.get("from") else "nothing")
            message = f"{message}; taken back to {before}"
        raise FailedError(reason["code"], message, reason["hint"])
