"""An update by a job, done by the agent's own parts: engine, operation, gate, installer and state.db, over HTTP from a real server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from agent import logs
from agent.errors import FailedError
from agent.host import clock
from agent.jobs import conversation
from agent.jobs import engine as engines
from agent.jobs.engine import Engine
from agent.jobs.machine import Phase, Record
from agent.settings import UpdateTarget
from agent.store import Store
from agent.updates import gate, records
from agent.updates.fetch import Limits
from agent.updates.installers.agent import AgentInstaller, Started
from agent.updates.installers.app import App
from agent.updates.restarts import Restarter
from agent.updates.states import FORWARD, State
from agent.updates.update import Update
from tests.fakes_updates import FakeCapture, FakeUnitState, Images, root_payload, signed_root
from tests.faults.powercut.acts import look_at_slots
from tests.faults.powercut.artifacts import Artifact
from tests.faults.powercut.place import LastingJobs, Place, World

UNIT = "capture-pipeline.service"
PASSING = {"stable_for_s": 0.1, "deadline_s": 60}
HOPELESS = {"stable_for_s": 0.1, "deadline_s": 0.3}
"""For what can never pass, so that the deadline decides."""
CHUNK, BLOCK = 8192, 2048
JOB = "job-2"
LOADER = Path(__file__).parents[3] / "packaging" / "loader" / "camera-agent-loader"
STARTS = 12

# Arguments: version, what `run` does.
PROGRAM = """#!/bin/sh
case $1 in
  --version) echo "camera-agent {0}" ;;
  check-config) test -s "$2" ;;
  run) {1}; echo "{0} $CAMERA_AGENT_SLOT" ;;
esac
"""


class WatchedEngine(Engine):
    """Says which state is durable."""

    label: Callable[[str], None]

    async def keep_progress(self, progress: dict[str, Any], message: str, facts: Any) -> None:
        await super().keep_progress(progress, message, facts)
        self.label(progress.get("state") or f"step {progress.get('step')}")

    async def _keep(self, record: Record) -> None:
        await super()._keep(record)
        if record.phase is not Phase.RUNNING or not record.progress:
            self.label(record.phase)


class Updating:
    """The target `pipeline` by installer `app`.

    `way`: `success`; `gate`, the new version's images are spoilt; `lost`, and the old version does not come well again.
    """

    target_name = "pipeline"
    product = "pipe"

    def __init__(self, way: str) -> None:
        logs.configure("json", os.environ.get("POWERCUT_LOG", "critical"))
        self.way = way
        self.old = self.artifact("1.0", PASSING)
        self.new = self.artifact("2.0", PASSING if way == "success" else HOPELESS)
        self.ends = {
            "success": ("SUCCEEDED", "updated"),
            "gate": ("FAILED", "capture_worse"),
            "lost": ("FAILED", "rollback_failed"),
        }[way]
        for name, value in {"RETRY_S": (0.01, 0.05), "NEWS_INTERVAL_S": 0.05, "POLL_S": 0.05, "NOTICES_S": 0.0}.items():
            setattr(engines, name, value)
        conversation.RETRY_S = (0.01, 0.05)
        gate.WAIT_LOOK_S = 0.02

    def artifact(self, version: str, terms: dict[str, Any]) -> Artifact:
        marks = {"blurry": (0o644, b"1")} if version == "2.0" and self.way != "success" else {}
        return Artifact(version, marks, gate=terms)

    # What the scenario is made of

    def prepare(self, place: Place) -> None:
        (place.folder / "keys").mkdir()
        (place.folder / "keys" / "root.json").write_text(json.dumps(signed_root(root_payload())))
        asyncio.run(self._prepare(place))

    async def _prepare(self, place: Place) -> None:
        world = World(place)
        cloud = LastingJobs(world)
        cloud.create("job-1", self.document(place, self.old))
        cloud.keep()
        await self.live(place, world)
        place.expect(cloud_of(world).ends("job-1") == ["SUCCEEDED"], f"preparing: {cloud_of(world).said}")
        cloud = cloud_of(world)
        cloud.create(JOB, self.document(place, self.new))
        cloud.keep()

    def boot(self, place: Place) -> None:
        asyncio.run(self._boot(place))

    async def _boot(self, place: Place) -> None:
        world = World(place)
        await self.live(place, world)
        await asyncio.to_thread(self.look_at_the_end, place, world)

    def document(self, place: Place, artifact: Artifact) -> dict[str, Any]:
        port = place.listener.getsockname()[1]
        return {
            "version": "1.0",
            "operation": "update",
            "target": self.target_name,
            "manifest": artifact.envelope(),
            "urls": [f"http://127.0.0.1:{port}/{artifact.name}"],
        }

    async def live(self, place: Place, world: World) -> None:
        """From the boot until nothing is left to do."""
        root = place.folder / "pipeline"
        first = not root.exists()
        found = None if first else await asyncio.to_thread(self.look, place, root)
        units = Pipeline(root / "current", world, fragile=self.way == "lost")
        await units.boot()
        async with self.store(place) as store:
            if found:
                await self.look_at_journal(place, store, cloud_of(world), found)
            restarter = Restarter(units, await asyncio.to_thread(clock.boot_id), uuid.uuid4().hex)
            target = UpdateTarget(installer="app", root=root, unit=UNIT)
            update = self.update(place, store, restarter, units.capture, target, cloud_ok=lambda: True)
            await self.work(place, store, update, cloud_of(world))
            await self.look_at_facts(place, store)
            runs = units.runs
        link = (root / "current").readlink().name
        place.expect(runs == link, f"{runs} runs, but current points to {link}")

    @contextlib.asynccontextmanager
    async def store(self, place: Place) -> AsyncIterator[Store]:
        store = await Store.open(place.folder / "state.db")
        place.expect(store.quarantined is None, "state.db was quarantined")
        yield store
        await store.close()

    def update(
        self, place: Place, store: Store, restarter: Restarter, capture: Any, target: UpdateTarget, **more: Any
    ) -> Update:
        return Update(
            {self.target_name: target},
            keys_dir=place.folder / "keys",
            downloads_dir=place.folder / "downloads",
            store=store,
            restarter=restarter,
            capture=capture,
            mutation_lock=asyncio.Lock(),
            agent_version="1.0",
            patience_s=30,
            limits=Limits(chunk_bytes=CHUNK, first_wait_s=0.001, longest_wait_s=0.01),
            settle_s=0.03,
            settle_deadline_s=20 if self.way != "lost" else 0.3,
            **({"installers": {self.target_name: App(target.root)}} | more),
        )

    async def work(
        self, place: Place, store: Store, update: Update, cloud: LastingJobs, stop: asyncio.Event | None = None
    ) -> None:
        """Let the engine work until all jobs are closed, or `stop` is set."""
        engine = WatchedEngine(store=store, jobs=cloud, operations={"update": update}, allow=["update"])
        engine.label = place.label
        async with serving(place, [self.old, self.new]):
            task = asyncio.create_task(engine.run())
            engine.wake()
            try:
                while not task.done() and not (stop and stop.is_set()):
                    if cloud.all_ended() and not await store.read(lambda t: t.jobs(finished=False)):
                        break
                    await asyncio.sleep(0.01)
            finally:
                task.cancel()
                await asyncio.wait({task})
            if not task.cancelled():
                await task

    # What must hold

    def look(self, place: Place, root: Path) -> Artifact | None:
        return look_at_slots(place, root, [self.old, self.new])

    async def look_at_journal(self, place: Place, store: Store, cloud: LastingJobs, current: Artifact) -> None:
        """The first look after the boot: what the journal says is what is there."""
        raw = await store.read(lambda t: t.job(JOB))
        floor = await store.read(lambda t: t.fact(records.floor_key(self.product), 0))
        place.expect(floor <= current.counter, f"the floor is {floor}, {current.version} is bootable no more")
        status = cloud.status(JOB)
        if raw is None:
            place.expect(status == "QUEUED", f"the cloud has {status}, the journal knows nothing")
            return
        record = Record.from_json(raw)
        state = record.progress.get("state", "")
        place.expect(status in ("QUEUED", "IN_PROGRESS", record.status), f"the cloud has {status} of {record.status}")
        place.expect(floor == 1 or state == State.COMMITTED, f"the floor is {floor} in state {state}")
        before_switch = not state or state in FORWARD[: FORWARD.index(State.ARMED)]
        place.expect(not before_switch or current is self.old, f"{current.version} is current in state {state}")
        if state in (State.RESTARTING, State.TRIAL, State.COMMITTING, State.COMMITTED):
            place.expect(
                self.may_be_back(state) or current is self.new, f"{current.version} is current in state {state}"
            )
        if state == State.ROLLED_BACK:
            place.expect(current is self.old, f"{current.version} is current in state {state}")

    def may_be_back(self, state: str) -> bool:
        """Whether something else than the agent may have taken the version back in this state."""
        return False

    async def look_at_facts(self, place: Place, store: Store) -> None:
        cloud = cloud_of(World(place))
        if (JOB, 1) not in cloud.executions:
            return
        ended = cloud.status(JOB)
        floor = await store.read(lambda t: t.fact(records.floor_key(self.product), 0))
        installed = await store.read(lambda t: t.fact(records.installed_key(self.target_name)))
        wanted = self.new if ended == "SUCCEEDED" else self.old
        place.expect(floor == wanted.counter, f"the floor is {floor} after {ended}")
        place.expect(installed["sha256"] == wanted.sha256, f"{installed} is noted as installed after {ended}")
        record = Record.from_json((await store.read(lambda t: t.job(JOB))) or {})
        place.expect(record.phase is Phase.CLOSED and record.superseded is None, f"the journal ends with {record}")
        place.expect(record.status == ended, f"the journal has {record.status}, the cloud {ended}")

    def look_at_the_end(self, place: Place, world: World) -> None:
        cloud = cloud_of(world)
        ends, said = cloud.ends(JOB), {(status, code) for job, status, code in cloud.said if job == JOB}
        place.expect(len(ends) == 1, f"terminal statuses: {ends}")
        place.expect(len(said) == 1, f"different ends were told: {sorted(said)}")
        ended = next(iter(said), ("", ""))
        allowed = {self.ends}
        if place.cuts > 1:
            allowed.add(("FAILED", "interrupted"))  # two cuts while installing are too many
        place.expect(ended in allowed, f"it ended as {ended}, not as {self.ends}")
        place.expect(cloud.all_ended(), "a job is still offered")
        root = place.folder / self.target_name
        current = self.look(place, root)
        wanted = self.new if ended[0] == "SUCCEEDED" else self.old
        place.expect(current is wanted, f"{current and current.version} is current after {ended}")
        kept = {wanted, self.old} if ended[1] != "rollback_failed" else {self.old, self.new}
        names = {name for artifact in kept for name in (artifact.sha256, f"{artifact.sha256}.json")}
        left = {path.name for path in (root / "slots").iterdir()} ^ names
        downloaded = {path.name for path in (place.folder / "downloads").iterdir()}
        left |= downloaded - ({self.new.sha256} if ended[1] == "interrupted" else set())  # a new job goes on with it
        left |= {path.name for path in root.iterdir()} - {"slots", "current"}
        left |= {path.name for path in place.folder.iterdir()} - {"downloads", "keys", "state.db", self.target_name}
        place.expect(not left, f"left over or missing after {ended}: {sorted(left)}")


class AgentUpdating(Updating):
    """The agent itself: the loader chooses what starts, and each start is a life of its own.

    `way` is also `dead`: the new version passes its try but does not start.
    """

    target_name = "agent"
    product = "camera-agent"

    def __init__(self, way: str) -> None:
        super().__init__({"dead": "gate"}.get(way, way))
        self.dead = way == "dead"
        if self.dead:
            self.new = self.artifact("2.0", PASSING)
        self.ends = {
            "success": ("SUCCEEDED", "updated"),
            "gate": ("FAILED", "cloud_lost"),
            "lost": ("FAILED", "rollback_failed"),
            "dead": ("FAILED", "fell_back"),
        }[way]

    def artifact(self, version: str, terms: dict[str, Any]) -> Artifact:
        act = "exit 1" if version == "2.0" and getattr(self, "dead", False) else ":"
        program = {"bin/camera-agent": (0o755, PROGRAM.format(version, act).encode())}
        return Artifact(version, program, gate=terms, target="agent", installer="agent", name="camera-agent")

    def prepare(self, place: Place) -> None:
        (place.world / "agent.toml").write_text("# nothing\n")
        packaged = place.world / "packaged" / "bin"
        packaged.mkdir(parents=True)
        (packaged / "camera-agent").write_text(PROGRAM.format("0.9", ":"))
        (packaged / "camera-agent").chmod(0o755)
        super().prepare(place)

    async def live(self, place: Place, world: World) -> None:
        root = place.folder / "agent"
        await asyncio.to_thread(shutil.rmtree, place.world / "runtime", ignore_errors=True)
        if root.exists():
            await asyncio.to_thread(self.look, place, root)
        for _ in range(STARTS):
            started = await asyncio.to_thread(self.start, place, world, root)
            if started is None:
                continue
            version, slot = started
            place.expect(slot is not None or not world.get("settled"), "the packaged version was started")
            found = next((a for a in (self.old, self.new) if slot == f"slots/{a.sha256}"), None)
            async with self.store(place) as store:
                if found and world.get("settled"):
                    await self.look_at_journal(place, store, cloud_of(world), found)
                if await self.one_life(place, world, store, version, Started(root, slot)):
                    continue
                await self.look_at_facts(place, store)
            link = (root / "current").readlink()
            place.expect(str(link) == slot, f"{slot} runs, but current points to {link}")
            world.save(settled=True)
            return
        place.expect(False, f"no end after {STARTS} starts")

    def start(self, place: Place, world: World, root: Path) -> tuple[str, str | None] | None:
        """What systemd does: the loader, and what it starts; None when that ended badly."""
        runtime = place.world / "runtime"
        runtime.mkdir(exist_ok=True)
        environment = {
            **os.environ,
            "CAMERA_AGENT_ROOT": str(root),
            "CAMERA_AGENT_FALLBACK": str(place.world / "packaged"),
            "RUNTIME_DIRECTORY": str(runtime),
        }
        place.label(place.state, "loader")
        result = subprocess.run([LOADER, "run"], env=environment, capture_output=True, text=True, timeout=50)
        place.label(place.state, "start")
        if result.returncode == 0:
            version, _, slot = result.stdout.strip().partition(" ")
            if version == "2.0" and self.way == "lost":
                (place.world / "spoilt").touch()
            return version, slot or None
        ended = {"SERVICE_RESULT": "exit-code", "EXIT_CODE": "exited", "EXIT_STATUS": str(result.returncode)}
        place.label(place.state, "loader")
        subprocess.run([LOADER, "stopped"], env=environment | ended, check=True, timeout=50)
        return None

    async def one_life(self, place: Place, world: World, store: Store, version: str, started: Started) -> bool:
        """The agent from its start to its end; whether it wants to be started again."""
        again = asyncio.Event()
        restarter = Restarter(None, await asyncio.to_thread(clock.boot_id), uuid.uuid4().hex, restart_agent=again.set)
        target = UpdateTarget(
            installer="agent", root=started.root, probe=["test", "!", "-e", str(place.world / "spoilt")]
        )
        installer = AgentInstaller(
            started.root, config_file=place.world / "agent.toml", version=version, started=started
        )
        cloud_ok = version != "2.0" or self.way != "gate"
        update = self.update(
            place, store, restarter, None, target, cloud_ok=lambda: cloud_ok, installers={"agent": installer}
        )
        await self.work(place, store, update, cloud_of(world), again)
        return again.is_set()

    def may_be_back(self, state: str) -> bool:
        return self.dead or state == State.RESTARTING


class Pipeline:
    """A pipeline under systemd; it runs what `current` pointed to when it was started last.

    `blurry` in a slot spoils the images. When it is `fragile` the old version does not start once the new one has.
    """

    def __init__(self, current: Path, world: World, *, fragile: bool) -> None:
        self.current = current
        self.capture = FakeCapture()
        self.unit = FakeUnitState()
        self.runs: str | None = None
        self._world = world
        self._fragile = fragile

    async def boot(self) -> None:
        with contextlib.suppress(FailedError):
            await self.restart(UNIT)

    async def restart(self, unit: str) -> None:
        self.runs, version, marks = await asyncio.to_thread(self._look)
        blurry = "blurry" in marks
        self.capture.verdict = Images(ok=not blurry, reasons=["front: blurred in 9 of 15 pictures"] if blurry else [])
        if version == "2.0":
            self._world.save(spoilt=True)
        if version is None or (version == "1.0" and self._fragile and self._world.get("spoilt")):
            self.unit = FakeUnitState("failed", "failed")
            raise FailedError("unit_failed", f"{unit} failed to start")
        self.unit = FakeUnitState()

    async def state(self, unit: str) -> FakeUnitState:
        return self.unit

    def _look(self) -> tuple[str | None, str | None, set[str]]:
        try:
            slot = self.current.resolve(strict=True)
            return slot.name, (slot / "version").read_text(), {path.name for path in slot.iterdir()}
        except OSError:
            return None, None, set()


def cloud_of(world: World) -> LastingJobs:
    """The Jobs service as the world has it."""
    if "cloud" not in vars(world):
        world.cloud = LastingJobs(world)  # type: ignore[attr-defined]
    found: LastingJobs = world.cloud  # type: ignore[attr-defined]
    return found


@contextlib.asynccontextmanager
async def serving(place: Place, artifacts: list[Artifact]) -> AsyncIterator[None]:
    """The artifacts on the listener of the place, in small blocks."""
    contents = {f"/{artifact.name}": artifact.content for artifact in artifacts}

    async def answer(request: web.Request) -> web.StreamResponse:
        content = contents[request.path]
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        response = web.StreamResponse(status=206 if start else 200, headers={"ETag": '"one"'})
        if start:
            response.headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        response.content_length = len(content) - start
        await response.prepare(request)
        for position in range(start, len(content), BLOCK):
            await response.write(content[position : position + BLOCK])
            await asyncio.sleep(0)
        return response

    app = web.Application()
    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.SockSite(runner, place.listener.dup()).start()
    try:
        yield
    finally:
        await runner.cleanup()
