"""Operation `update`: brings a target to the version a signed manifest names and keeps it only when it is proven."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from agent.errors import AgentError, FailedError, RefusedError
from agent.host.threads import to_end
from agent.logs import get_logger
from agent.settings import UpdateTarget
from agent.store import Store
from agent.updates import records
from agent.updates.acts import Acts, AlreadyInstalled, Job, Surroundings
from agent.updates.fetch import DEFAULT_LIMITS, Limits, check_urls
from agent.updates.flow import Flow
from agent.updates.gate import Capture, Gate, Units
from agent.updates.installers import SUPPORTED, Installer
from agent.updates.installers.app import App
from agent.updates.manifest import parse_envelope, parse_manifest
from agent.updates.preflight import envelope_of
from agent.updates.states import FINAL, FORWARD, State

log = get_logger("updates")


class Update:
    """The operation; `gate` is the gate it uses, for others who change something.

    `changed` is set whenever `status` may say something else about what is installed.
    """

    name = "update"

    def __init__(
        self,
        targets: Mapping[str, UpdateTarget],
        *,
        keys_dir: Path,
        downloads_dir: Path,
        store: Store,
        units: Units | None,
        capture: Capture | None,
        cloud_ok: Callable[[], bool],
        mutation_lock: asyncio.Lock,
        agent_version: str = "",
        compatible: Collection[str] = (),
        patience_s: float = 86_400,
        limits: Limits = DEFAULT_LIMITS,
        settle_s: float = 5,
        settle_deadline_s: float = 60,
    ) -> None:
        """`compatible` are the kinds of camera this one is; `patience_s` is the time for a download.

        After a roll-back the old version must run for `settle_s` before `settle_deadline_s`.
        """
        self.gate = Gate(units, capture, cloud_ok)
        self._targets = targets
        self._installers: dict[str, Installer] = {
            name: App(target.root) for name, target in targets.items() if target.installer == "app" and target.root
        }
        self._around = Surroundings(
            keys_dir=keys_dir,
            downloads_dir=downloads_dir,
            store=store,
            units=units,
            gate=self.gate,
            mutation_lock=mutation_lock,
            agent_version=agent_version,
            compatible=frozenset(compatible),
            patience_s=patience_s,
            limits=limits,
            settle_s=settle_s,
            settle_deadline_s=settle_deadline_s,
        )
        self._status = {name: _idle() for name in targets}
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
        if target.installer not in SUPPORTED:
            raise RefusedError(
                "installer_not_supported",
                f"target {name} is installed by {target.installer}, which this agent can't do yet",
                "update the agent first",
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
        target, installer = self._targets[name], self._installers[name]
        acts = Acts(_Planned(document), name, target, installer, self._around, {}, lambda *_: None)
        manifest = acts.manifest
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
        return [
            f"download {manifest.size} bytes from {hosts}, resumed after every break, and check their digest",
            f"unpack {manifest.name} {manifest.version} beside {now} in {target.root}",
            f"switch to it, and restart: {target.unit or ' '.join(target.restart or []) or 'nothing'}",
            trial,
            f"keep it, or go back to {now}",
        ]

    async def run(self, job: Job) -> dict[str, str]:
        """Do the update, or go on with it, to its end. Raises RefusedError (nothing was touched) or FailedError."""
        name = job.document["target"]
        if not job.progress:
            self.check(job.document)
        elif name not in self._installers:
            raise FailedError("target_gone", f"target {name} was taken out of agent.toml in the middle of its update")

        def on_state(state: State, words: str) -> None:
            follows = "" if state in FINAL or state not in FORWARD else FORWARD[FORWARD.index(state) + 1]
            self._status[name] |= {"state": str(state), "waits_for": words, "next": str(follows)}

        flow = Flow(job, name, self._targets[name], self._installers[name], self._around, on_state)
        try:
            return await flow.run()
        finally:
            await self._look(name)

    def status(self) -> dict[str, dict[str, Any]]:
        """Per target: version, name, slot (first digits of its digest), state, what it waits for, the next state."""
        return {name: dict(status) for name, status in self._status.items()}

    def versions(self) -> dict[str, str]:
        """What runs: product → version, the agent included."""
        running = {status["name"]: status["version"] for status in self._status.values() if status["name"]}
        return {**running, "camera-agent": self._around.agent_version}

    async def _look(self, name: str) -> None:
        status, installer = _idle(), self._installers.get(name)
        try:
            kept, outcome = await self._around.store.read(
                lambda t: (t.fact(records.installed_key(name)), t.fact(records.outcome_key(name)))
            )
            if installer:
                link, seen = await to_end(installer.running)
                installed = records.as_installed(kept)
                if seen is None and installed and link and Path(link).name == installed.sha256:
                    seen = installed
                status["slot"] = Path(link).name[:12] if link else None
                status["name"], status["version"] = (seen.name, seen.version) if seen else (None, None)
            status["last"] = outcome
        except (AgentError, OSError) as error:
            status["state"], status["waits_for"] = "unknown", str(error)
        self._status[name] = status
        self.changed.set()


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
        "state": "idle",
        "waits_for": "",
        "next": "",
        "last": None,
    }
