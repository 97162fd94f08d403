"""Operation `update`: brings a target to the version a signed manifest names and keeps it only when it is proven."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agent.errors import FailedError, RefusedError
from agent.logs import get_logger
from agent.settings import UpdateTarget
from agent.store import Store
from agent.updates import by_hand, records
from agent.updates.acts import Acts, AlreadyInstalled
from agent.updates.by_hand import ByHand
from agent.updates.case import Case, Holds, Job, Surroundings
from agent.updates.fetch import DEFAULT_LIMITS, Limits, check_urls
from agent.updates.flow import Flow
from agent.updates.gate import Capture, Gate
from agent.updates.installers import Installer
from agent.updates.manifest import parse_envelope, parse_manifest
from agent.updates.preflight import envelope_of
from agent.updates.restarts import Restarter
from agent.updates.states import FINAL, FORWARD, ON_TRIAL, UNTOUCHED, State

UNDER_CHANGE = (*ON_TRIAL, State.COMMITTING, State.ROLLING_BACK)
log = get_logger("updates")


class Update:
    """The operation; `gate` is the gate it uses, for others who change something.

    `changed` is set whenever `status` may say something else about what is installed.
    """

    name = "update"
    lasting = True
    """It may wait for days and limits its attempts itself, so that many starts of the agent are no sign of a loop."""

    def __init__(
        self,
        targets: Mapping[str, UpdateTarget],
        *,
        keys_dir: Path,
        downloads_dir: Path,
        store: Store,
        restarter: Restarter,
        capture: Capture | None,
        cloud_ok: Callable[[], bool],
        mutation_lock: asyncio.Lock,
        installers: Mapping[str, Installer],
        conditions: Callable[[], Collection[str]] = frozenset,
        holds: Holds | None = None,
        agent_version: str = "",
        compatible: Collection[str] = (),
        patience_s: float = 86_400,
        offline_patience_s: float = 86_400,
        limits: Limits = DEFAULT_LIMITS,
        settle_s: float = 5,
        settle_deadline_s: float = 60,
    ) -> None:
        """`installers` are those of the targets, by their names; `compatible` are the kinds of camera this one is.

        `patience_s` is the time for a download, `offline_patience_s` that for the cloud to come back to a camera that was
        off-line before. After a roll-back the old version must run for `settle_s` before `settle_deadline_s`.
        """
        self.gate = Gate(restarter.units, capture, cloud_ok, conditions)
        self._targets = targets
        self._installers = installers
        self._around = Surroundings(
            keys_dir=keys_dir,
            downloads_dir=downloads_dir,
            store=store,
            gate=self.gate,
            restarter=restarter,
            mutation_lock=mutation_lock,
            holds=holds,
            agent_version=agent_version,
            compatible=frozenset(compatible),
            patience_s=patience_s,
            offline_patience_s=offline_patience_s,
            limits=limits,
            settle_s=settle_s,
            settle_deadline_s=settle_deadline_s,
        )
        self._status = {name: _idle() for name in targets}
        self._running: dict[str, Case] = {}
        self._going_back: set[str] = set()
        self._asked = asyncio.Event()
        self.changed = asyncio.Event()

    async def load(self) -> None:
        """Fill `status` with what is installed; where the slot's record is missing, from the store."""
        for name in self._targets:
            await self._look(name)

    def check(self, document: Mapping[str, Any]) -> None:
        """Refuse what needs neither keys nor store to be refused. Raises RefusedError."""
        name = document.get("target")
        target = self._targets.get(name) if isinstance(name, str) else None
        if target is None:
            known = ", ".join(sorted(self._targets)) or "none"
            raise RefusedError(
                "unknown_target", f"this camera has no update target {name!r:.40}", f"its targets: {known}"
            )
        if name not in self._installers:
            raise RefusedError(
                "installer_not_supported",
                f"target {name} is installed by {target.installer}, which this camera can't do",
                "take the target out of agent.toml, or mend what is said at the agent's start",
            )
        manifest = parse_manifest(parse_envelope(envelope_of(document)).payload)
        if manifest.target != name:
            raise RefusedError(
                "wrong_target", f"the manifest is signed for target {manifest.target}, the job names {name}"
            )
        urls = document.get("urls")
        if not isinstance(urls, list) or not urls or not all(isinstance(url, str) for url in urls):
            raise RefusedError("url_invalid", "the job document has no list of urls", "give at least one")
        check_urls(urls)

    async def plan(self, document: Mapping[str, Any]) -> list[str]:
        """What run() would do, in words, once the manifest is verified as it would be. Raises RefusedError."""
        name = document["target"]
        target = self._targets[name]
        case = Case(_Planned(document), name, target, self._installers[name], self._around)
        acts, manifest = Acts(case), case.manifest
        try:
            await acts.verify()
        except AlreadyInstalled:
            return [f"nothing: {manifest.name} {manifest.version} is installed already"]
        await acts.check_room()
        now = self._status[name]["version"] or "nothing"
        hosts = ", ".join(dict.fromkeys(urlsplit(url).hostname or url for url in document["urls"]))
        probe = f", {' '.join(target.probe)} exits 0" if target.probe else ""
        terms = f"for {manifest.gate.stable_for_s:g} s within {manifest.gate.deadline_s:g} s"
        trial = f"trial: {terms} the unit runs{probe}, images flow as before, the cloud is reached again"
        what = {"reboot": "the camera", "agent": "the agent", "none": "nothing"}.get(acts.restarts.kind)
        where = f" in {target.root}" if target.root else f" by {target.installer}"
        return [
            f"download {manifest.size} bytes from {hosts}, resumed after every break, and check their digest",
            f"install {manifest.name} {manifest.version} beside {now}{where}",
            f"switch to it, and restart: {what or target.unit or ' '.join(target.restart or []) or 'nothing'}",
            trial,
            f"keep it, or go back to {now}" if manifest.rollback == "yes" else "keep it; there is no way back",
        ]

    async def run(self, job: Job) -> dict[str, str]:
        """Do the update, or go on with it, to its end. Raises RefusedError (nothing was touched) or FailedError."""
        name = job.document["target"]
        if not job.progress:
            self.check(job.document)
        elif name not in self._installers:
            switched = job.progress.get("state") not in UNTOUCHED
            raise FailedError(
                "rollback_failed" if switched else "target_gone",
                f"target {name} was taken out of agent.toml in the middle of its update",
                "put it back and send the update again" if switched else "",
            )
        case = Case(job, name, self._targets[name], self._installers[name], self._around)

        def on_state(state: State, words: str) -> None:
            self._tell(name, state, words, case.percent if state is State.DOWNLOADING else None)

        case.on_state = on_state
        self._running[name] = case
        try:
            return await Flow(case).run()
        finally:
            del self._running[name]
            await self._look(name)

    async def roll_back(self, name: str) -> dict[str, str]:
        """Go back to the version before, by hand: what was begun, in words. An update on trial is taken back.

        Raises RefusedError: unknown_target, update_under_way, nothing_before, counter_too_low.
        """
        if name not in self._installers:
            raise RefusedError(
                "unknown_target", f"this camera has no update target {name:.40}", "agentctl update status"
            )
        if name in self._running:
            if self._status[name]["state"] not in ON_TRIAL:
                raise RefusedError(
                    "update_under_way",
                    f"an update of {name} is under way, it is {self._status[name]['state']}",
                    "while nothing is switched yet, cancel its job: agentctl jobs cancel",
                )
            case = self._running[name]
            case.progress["stop"] = True
            await case.save(f"going back was asked for at the camera while {self._status[name]['state']}")
            case.job.cancelled.set()
            return {"state": "cancelling", "message": f"the update of {name} that is on trial is taken back"}
        hand = self._by_hand(name)
        if wanted := await hand.wanted():
            return {"state": "going_back", "message": hand.words(wanted)}
        words = await hand.ask()
        self._asked.set()
        return {"state": "going_back", "message": words}

    async def serve(self) -> None:
        """Carry out what was asked for by hand, also before a restart, until cancelled."""
        await self._around.store.write(lambda t: by_hand.drop_others(t, self._installers))
        while True:
            self._asked.clear()
            for name in self._installers:
                hand = self._by_hand(name)
                if record := await hand.wanted():
                    self._going_back.add(name)
                    try:
                        await hand.run(record)
                    finally:
                        self._going_back.discard(name)
                    await self._look(name)
            await self._asked.wait()

    def switching(self) -> str:
        """Which target is just being switched, on trial or taken back, in words; empty when none."""
        states = {name: status["state"] for name, status in self._status.items()}
        decided = {name for name, case in self._running.items() if case.switching}
        return ", ".join(f"{name} is {s}" for name, s in states.items() if s in UNDER_CHANGE or name in decided)

    def status(self) -> dict[str, dict[str, Any]]:
        """Per target: what runs (version, name, slot), the previous version, the update's state since when, what it waits
        for, the next state and percent downloaded, the last outcome, and quarantined digests.
        """
        return {name: dict(status) for name, status in self._status.items()}

    def versions(self) -> dict[str, str]:
        """What runs: product → version, the agent included."""
        running = {status["name"]: status["version"] for status in self._status.values() if status["name"]}
        return {**running, "camera-agent": self._around.agent_version}

    def _by_hand(self, name: str) -> ByHand:
        def tell(words: str) -> None:
            self._tell(name, State.ROLLING_BACK, words)

        return ByHand(name, self._targets[name], self._installers[name], self._around, tell)

    def _tell(self, name: str, state: State, words: str, percent: int | None = None) -> None:
        follows = "" if state in FINAL or state not in FORWARD else FORWARD[FORWARD.index(state) + 1]
        status = self._status[name]
        since = status["since"] if status["state"] == state else time.time()
        status |= {"state": str(state), "since": since, "waits_for": words, "next": str(follows), "percent": percent}

    async def _look(self, name: str) -> None:
        if name in self._going_back:
            return
        status, installer = _idle(), self._installers.get(name)
        try:
            kept, outcome, failures = await self._around.store.read(
                lambda t: (
                    t.fact(records.installed_key(name)),
                    t.fact(records.outcome_key(name)),
                    t.facts(records.failures_key("")),
                )
            )
            if installer:
                running, seen = await installer.running()
                installed = records.as_installed(kept)
                if seen is None and installed and running and Path(running).name == installed.sha256:
                    seen = installed
                status["slot"] = _short(running)
                status["name"], status["version"] = (seen.name, seen.version) if seen else (None, None)
                before, known = await installer.previous()
                status["previous"] = known.version if known else _short(before)
            status["last"] = outcome
            status["quarantined"] = records.quarantined(failures, name)
        except Exception as error:  # a look must not undo what was decided, nor end the agent
            log.exception("what is installed can't be seen", target=name)
            status["state"], status["waits_for"] = "unknown", str(error) or type(error).__name__
        self._status[name] = status
        self.changed.set()


def _short(running: str | None) -> str | None:
    """What runs, a digest by its first digits."""
    if running is None:
        return None
    last = Path(running).name
    return last[:12] if re.fullmatch(r"[0-9a-f]{64}", last) else last


class _Planned:
    """An update that is only planned: there is a document, and nothing has begun."""

    id = ""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self.progress: dict[str, Any] = {}
        self.cancelled = asyncio.Event()

    async def save(self, *_: Any, **__: Any) -> None:
        raise AssertionError("a plan changes nothing")

    async def fresh_document(self) -> Mapping[str, Any]:
        return self.document


def _idle() -> dict[str, Any]:
    return {
        "name": None,
        "version": None,
        "slot": None,
        "previous": None,
        "state": "idle",
        "since": None,
        "percent": None,
        "waits_for": "",
        "next": "",
        "last": None,
        "quarantined": [],
    }
