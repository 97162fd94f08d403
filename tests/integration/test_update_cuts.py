"""An update and a going back by hand, cut around every write to the store and every act of an installer, in any two lives.

What runs after a cut is what was really started, whatever has been switched since: by a boot where the target needs one,
by the loader where it is the agent. The end must be what then really runs.
"""

import asyncio
import itertools
import json
import shutil
import sqlite3
import time
import uuid
from collections import Counter
from contextlib import asynccontextmanager, closing
from functools import partial

import pytest

from agent.errors import FailedError, StoreError
from agent.host import rauc as host_rauc
from agent.settings import UpdateTarget
from agent.updates import acts, by_hand, flow, gate
from agent.updates.fetch import Limits
from agent.updates.installers import agent as agent_installer
from agent.updates.installers import app as app_installer
from agent.updates.installers import rauc as rauc_installer
from agent.updates.manifest import digest_of
from agent.updates.restarts import Restarter
from agent.updates.update import Update
from tests.fakes_updates import (
    FakeCapture,
    FakeJob,
    FakeRauc,
    FakeUnitState,
    Images,
    PointedStore,
    Points,
    PowerCutError,
    Server,
    archive,
    member,
    root_payload,
    serving,
    signed_manifest,
    signed_root,
    to_end_past_points,
)
from tests.integration import supervisor

UNIT = "capture-pipeline.service"
PROGRAM = """#!/bin/sh
[ "$1" = run ] || exit 0
if [ -e "${0%/*}/../broken" ]; then exit 1; fi
echo "$CAMERA_AGENT_SLOT"
"""
PASSING, FAILING = {"stable_for_s": 0.1, "deadline_s": 3600}, {"stable_for_s": 0.1, "deadline_s": 0.2}
FASTER = 20
"""How much faster the clock of trials goes: their deadline can't be under 0.2 s."""
TOGETHER = 6
"""So many cameras live at the same time: most of the time each waits for its disk."""


class Faster:
    """Stands in for the module `time`."""

    time = staticmethod(time.time)

    @staticmethod
    def monotonic():
        return FASTER * time.monotonic()


class Machine:
    """A camera with a target `pipeline`; `runs` is what its last boot, or the start of the agent, has really started.

    All of it is below `folder`, so that a copy made at one of its `points` is the camera as a cut leaves it there.
    """

    kind = ""
    product, restart_by = "pipe", "reboot"

    def __init__(self, folder, store, base, server):
        self.folder, self.store, self.base, self.server = folder, store, base, server
        self.root = folder / "opt"
        self.versions = {}
        self.spoils, self.unwell = set(), set()
        """Versions that spoil the images, and those whose unit fails."""
        self.boots, self.runs = 0, None
        self.wants = ""
        """How the life that has just ended wants to go on: `boot` or `start`."""
        kept = folder / "machine.json"
        if kept.exists():
            vars(self).update(json.loads(kept.read_text()))

    @property
    def version(self):
        """The one that really runs; none in a slot: the packaged one of an agent."""
        return self.versions[self.runs.rpartition("/")[2]] if self.runs else None

    def keep(self, copy):
        """Copy the camera as it is. Blocks."""
        (self.folder / "machine.json").write_text(json.dumps({"boots": self.boots, "runs": self.runs}))
        shutil.copytree(self.folder, copy, symlinks=True)

    # Its kind

    async def booted(self):
        """The camera has its power again; sets `runs`, unless that is the agent itself."""

    async def started(self):
        """The agent is started; sets `runs` where that is the target."""

    def installer(self):
        raise NotImplementedError

    def artifact(self, version):
        path = self.folder / f"{version}.tar.gz"
        program = member("bin/camera-agent", PROGRAM.encode(), mode=0o755)
        return archive(path, member("version", version.encode()), program)

    # Its lives

    async def begin(self, how):
        """The next life: as the last one wanted, else after a cut."""
        how, self.wants = self.wants or how, ""
        if how == "boot":
            self.boots += 1
            await self.booted()
        await self.started()
        spoilt, capture = self.version in self.spoils, FakeCapture()
        capture.verdict = Images(ok=not spoilt, reasons=["blurred"] if spoilt else [])
        self.update = Update(
            {"pipeline": UpdateTarget(installer=self.kind, root=self.root, unit=UNIT)},
            installers={"pipeline": self.installer()},
            keys_dir=self.folder / "keys",
            downloads_dir=self.folder / "downloads",
            store=self.store,
            restarter=Restarter(
                self,
                f"boot {self.boots}",
                uuid.uuid4().hex,
                reboot=self.reboot,
                restart_agent=partial(self.end, "start"),
                uptime_s=lambda: 10_000.0,
            ),
            capture=capture,
            cloud_ok=lambda: True,
            mutation_lock=asyncio.Lock(),
            agent_version="0.1.0",
            patience_s=5,
            limits=Limits(first_wait_s=0.001, longest_wait_s=0.01),
            settle_s=0.1,
            settle_deadline_s=0.2 if self.version in self.unwell else 3600,
        )

    def end(self, wants):
        self.wants = wants
        raise PowerCutError

    async def reboot(self):
        self.end("boot")

    async def restart(self, unit):
        raise AssertionError(f"{unit} is not what is to be restarted")

    async def state(self, unit):
        return FakeUnitState("failed", "failed") if self.version in self.unwell else FakeUnitState()

    # Updates

    def document(self, version):
        path = self.artifact(version)
        self.server.content = path.read_bytes()
        self.versions[digest_of(path)] = version
        described = {
            "installer": self.kind,
            "name": self.product,
            "restart": self.restart_by,
            "version": version,
            "sha256": digest_of(path),
            "size": path.stat().st_size,
            "installed_size": 1000,
            "gate": FAILING if version in self.spoils else PASSING,
            "security_counter": 1,
        }
        return {
            "version": "1.0",
            "operation": "update",
            "target": "pipeline",
            "manifest": signed_manifest(**described),
            "urls": [f"{self.base}/{version}"],
        }

    async def updates(self, document, how="boot", job_id="job-1"):
        """An update through all its lives: how its last job ends and in which state."""
        for _ in range(20):
            record = await self.store.read(lambda t: t.job(job_id))
            job = FakeJob(document, self.store, record and record["progress"])
            job.id = job_id
            try:
                details = await self.update.run(job)
            except PowerCutError:
                await self.begin(how)
            except FailedError as error:
                return job.progress["state"], error.code, error.message
            else:
                return job.progress["state"], details["reason_code"], details["message"]
        raise AssertionError(f"no end: {job.progress}")

    async def goes_back_by_hand(self, how="boot"):
        """What was asked for by hand through all its lives: the outcome that is kept."""
        for _ in range(20):
            task = asyncio.create_task(self.update.serve())
            while not task.done() and await self.fact(by_hand.fact_key("pipeline")):
                await asyncio.sleep(0.002)
            task.cancel()
            await asyncio.wait({task})
            if task.cancelled():
                return await self.fact("updates.outcome.pipeline")
            assert isinstance(task.exception(), PowerCutError), task.exception()
            await self.begin(how)
        raise AssertionError("no end")

    async def fact(self, key):
        return await self.store.read(lambda t: t.fact(key))


class AppMachine(Machine):
    kind = "app"

    async def booted(self):
        current = self.root / "current"
        self.runs = str(current.readlink()) if current.is_symlink() else None

    def installer(self):
        return app_installer.App(self.root)


class RaucMachine(Machine):
    kind = "rauc"

    def __init__(self, *args):
        super().__init__(*args)
        self.rauc = FakeRauc(self.folder / "slots.json")
        FakeRauc.current.set(self.rauc)

    def artifact(self, version):
        path = self.folder / f"{version}.raucb"
        path.write_text(version)
        return path

    async def booted(self):
        self.rauc.boot()
        self.runs = self.rauc.holds[self.rauc.booted]

    def installer(self):
        return rauc_installer.Rauc(self.folder / "state", "pipeline")


class AgentMachine(Machine):
    """Started by the real loader."""

    kind = "agent"
    product, restart_by = "camera-agent", "unit"

    def __init__(self, *args):
        super().__init__(*args)
        self.unit = supervisor.Camera(self.folder)
        program = self.unit.packaged / "bin" / "camera-agent"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(PROGRAM)
        program.chmod(0o755)

    async def booted(self):
        await asyncio.to_thread(shutil.rmtree, self.unit.runtime)
        await asyncio.to_thread(self.unit.runtime.mkdir)

    async def started(self):
        self.runs = await asyncio.to_thread(self.load)

    def load(self):
        for _ in range(10):
            result = self.unit.loader("run")
            if result.returncode == 0:
                return result.stdout.strip() or None
            self.unit.loader("stopped", SERVICE_RESULT="exit-code", EXIT_CODE="exited", EXIT_STATUS="1")
        raise AssertionError("no version of the agent starts")

    def installer(self):
        started = agent_installer.Started(self.root, self.runs)
        config_file = self.folder / "agent.toml"
        return agent_installer.AgentInstaller(self.root, config_file=config_file, version="0.1.0", started=started)


MACHINES = {"app": AppMachine, "rauc": RaucMachine, "agent": AgentMachine}


class Cuts:
    """Cameras of a kind in folders below `folder`, and the copies of them that cuts leave."""

    def __init__(self, kind, folder, place, exhaustive):
        self.kind, self.folder, self.place, self.exhaustive = kind, folder, place, exhaustive
        self.hows = ("start",) if kind == "agent" and not exhaustive else ("boot", "start")
        """A boot is for the agent no more than a start that is easier to see."""
        self.together = asyncio.Semaphore(TOGETHER)
        self.numbers = itertools.count()
        self.tried = self.twice = 0
        self.states = Counter()

    @asynccontextmanager
    async def machine(self, folder=None, how="boot", **settings):
        """A camera that was just booted, or started as `how` says, with what is in the folder, which goes with it."""
        if not folder:
            folder = self.folder / "new"
            await asyncio.to_thread((folder / "keys").mkdir, parents=True)
            await asyncio.to_thread((folder / "keys" / "root.json").write_text, json.dumps(signed_root(root_payload())))
        store = await PointedStore.open(folder / "state.db")
        try:
            Points.current.set(Points())
            machine = MACHINES[self.kind](folder, store, *self.place)
            vars(machine).update(settings)
            for version in ("1.0", "2.0"):
                machine.document(version)
            await machine.begin(how)
            yield machine
        finally:
            await store.close()
            await asyncio.to_thread(shutil.rmtree, folder)

    async def prepare(self, *versions, ask=False):
        """A camera that has kept these versions, one after the other; with `ask`, going back is asked for."""
        copy = self.folder / "prepared"
        async with self.machine() as machine:
            for number, version in enumerate(versions):
                state, code, _ = await machine.updates(machine.document(version), job_id=f"before-{number}")
                assert (state, code, machine.version) == ("COMMITTED", "updated", version)
            if ask:
                await machine.update.roll_back("pipeline")
            await asyncio.to_thread(machine.keep, copy)
        return copy

    async def copy_when(self, start, act, holds, **settings):
        """A copy of what `act` leaves at the first point where `holds(its folder)`."""
        copies = []

        def keep():
            if not copies and holds(machine.folder):
                copies.append(self.folder / f"cut-{next(self.numbers)}")
                machine.keep(copies[0])

        async with self.machine(start, **settings) as machine:
            Points.current.get().at_point = keep
            await act(machine)
        return copies[0]

    async def enumerate(self, start, act, check, *, share=lambda _: 1, pairs=lambda _: 0, **settings):
        """Let `act` come to its end from the camera in `start`, and again from what each cut leaves of it; `check` all the ends.

        Of the cuts in a state every `share(state)`-th is tried, and every `pairs(state)`-th of those that follow on one in it.
        """

        async def life(folder, how, every, first=0):
            """From a cut in `folder` to the end; the cuts in it of which `every(state)` chooses, with their states and numbers."""
            cuts, numbers = [], itertools.count(first + 1)

            def keep():
                number, state = next(numbers), state_in(machine.folder)
                share = every(state)
                for choice, how in enumerate(self.hows):
                    if share and (number + choice) % share == 0:
                        cuts.append((self.folder / f"cut-{next(self.numbers)}", how, state, number))
                        machine.keep(cuts[-1][0])

            async with self.together, self.machine(folder, how, **settings) as machine:
                points = Points.current.get()
                points.at_point = keep
                end = await act(machine, how)
                points.at_point = None
                await check(machine, end)
            return cuts

        async def once(folder, how, state, number):
            self.states[state] += 1
            again = await life(folder, how, lambda _: pairs(state), number)
            self.twice += len(again)
            await asyncio.gather(*(asyncio.create_task(life(*cut[:2], lambda _: 0)) for cut in again))

        cuts = await asyncio.create_task(life(start, "boot", share))
        await asyncio.gather(*(once(*cut) for cut in cuts))
        self.tried = len(cuts)


@pytest.fixture
async def cuts(tmp_path, monkeypatch, request):
    for module in (app_installer, rauc_installer, agent_installer):
        monkeypatch.setattr(module, "to_end", to_end_past_points)
    for module in (acts, by_hand, flow, gate):
        monkeypatch.setattr(module, "time", Faster())
    monkeypatch.setattr(host_rauc, "connected", FakeRauc.connected)
    server = Server(b"")
    async with serving(server) as base:
        exhaustive = request.config.getoption("--exhaustive", default=False)
        yield lambda kind: Cuts(kind, tmp_path, (base, server), exhaustive)


def state_in(copy):
    """The saved state of the update in the copy of a camera; empty where it has not begun. Blocks."""
    query = "SELECT json_extract(record, '$.progress.state') FROM jobs WHERE job_id = 'job-1'"
    with closing(sqlite3.connect(copy / "state.db")) as database:
        row = database.execute(query).fetchone()
    return row[0] if row else ""


async def an_update(cuts, before, code, right, **settings):
    """Cut an update from `before` to 2.0 that ends with `code` and `right` running."""
    start = await cuts.prepare(*before)
    end_state = "COMMITTED" if code == "updated" else "ROLLED_BACK"

    async def act(machine, how):
        return await machine.updates(machine.document("2.0"), how)

    async def check(machine, end):
        told, runs = (end_state, code), right
        if cuts.kind == "rauc" and "what was only being installed" in end[2]:
            told, runs = ("ROLLED_BACK", "interrupted"), before[0] if before else None
        assert (*end[:2], machine.version) == (*told, runs), end[2]
        await machine.begin("boot")
        assert machine.version == runs

    await cuts.enumerate(start, act, check, **settings)
    states = ", ".join(f"{state or 'before it'} {tried}" for state, tried in cuts.states.items())
    print(f"{cuts.tried} cuts of an update of {cuts.kind} tried, and {cuts.twice} pairs of cuts: {states}")


BEFORE = {"from a version": ("1.0",), "from nothing": ()}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("kind", MACHINES)
async def test_an_update_that_is_spoilt_is_taken_back(cuts, kind, before):
    made = cuts(kind)

    def share(state):
        if made.exhaustive or (state == "ROLLING_BACK" and (before == "from a version" or kind == "agent")):
            return 1
        return 2 if state == "ROLLING_BACK" or before == "from a version" else 9

    def pairs(state):
        return 0 if state != "ROLLING_BACK" else 1 if made.exhaustive else 41

    right = (*BEFORE[before], None)[0]
    await an_update(made, BEFORE[before], "capture_worse", right, share=share, pairs=pairs, spoils={"2.0"})
    assert made.states["ROLLING_BACK"] > 10
    assert made.twice >= 5


@pytest.mark.parametrize("kind", MACHINES)
async def test_an_update_that_is_well_stays(cuts, kind):
    made = cuts(kind)
    await an_update(made, ("1.0",), "updated", "2.0", share=lambda _: 1 if made.exhaustive else 2)


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("app", "well"),
        ("app", "unwell"),
        ("rauc", "well"),
        ("rauc", "unwell"),
        ("agent", "well"),
        ("agent", "unwell"),
        ("agent", "broken"),
    ],
)
async def test_going_back_by_hand(cuts, kind, way):
    """`broken`: the version before does not start any more, so that the loader returns from it."""
    made = cuts(kind)
    start = await made.prepare("1.0", "2.0", ask=True)
    if way == "broken":
        (start / "opt" / "slots" / digest_of(start / "1.0.tar.gz") / "broken").touch()
    code, right = ("by_hand", "1.0") if way == "well" else ("rollback_failed", "2.0")
    words = {"well": "", "unwell": "has failed", "broken": "it was started 3 times and did not last"}[way]

    async def check(machine, outcome):
        assert (outcome["code"], machine.version) == (code, right), outcome
        assert words in outcome["message"], outcome
        assert way == "well" or outcome["message"].endswith("; 2.0 runs again"), outcome
        await machine.begin("boot")
        assert machine.version == right

    pairs = 1 if made.exhaustive else 23 if way == "unwell" else 11
    unwell = {"1.0"} if way == "unwell" else set()
    await made.enumerate(start, Machine.goes_back_by_hand, check, pairs=lambda _: pairs, unwell=unwell)
    print(f"{made.tried} cuts of going back by hand of {kind} tried, and {made.twice} pairs of cuts")


# ---- and where something else goes wrong besides


def update_to_2(machine, how="boot"):
    return machine.updates(machine.document("2.0"), how)


def leads_to(version):
    """Whether the link `current` in the folder of a camera leads to this version."""
    return lambda folder: (folder / "opt" / "current").resolve().name == digest_of(folder / f"{version}.tar.gz")


async def test_what_is_switched_back_is_restarted_also_when_that_can_t_be_recorded(cuts):
    made = cuts("app")

    async def refuse(change):
        raise StoreError("store_failed", "the disk is broken")

    def break_disk_once_back():
        if machine.version == "2.0" and leads_to("1.0")(machine.folder):
            machine.store.write = refuse

    async with made.machine(await made.prepare("1.0"), spoils={"2.0"}) as machine:
        Points.current.get().at_point = break_disk_once_back
        with pytest.raises(StoreError):
            await update_to_2(machine)
        assert machine.version == "1.0"


async def test_where_the_packaged_agent_is_gone_it_is_not_said_that_it_runs_again(cuts):
    made = cuts("agent")
    async with made.machine(await made.prepare(), spoils={"2.0"}) as machine:
        (machine.unit.packaged / "bin" / "camera-agent").unlink()
        state, code, words = await update_to_2(machine)
        assert (state, code, machine.version) == ("FAILED", "rollback_failed", "2.0"), words


async def test_the_loader_never_goes_back_to_what_it_comes_from(cuts):
    """Cut after the switch, the version before runs when going back is done again."""
    made = cuts("agent")
    trials = set()

    def read_trial():
        if (trial := machine.root / "trial").exists():
            trials.add(trial.read_text().rpartition("starts")[0])

    start = await made.prepare("1.0", "2.0", ask=True)
    copy = await made.copy_when(start, Machine.goes_back_by_hand, leads_to("1.0"))
    async with made.machine(copy, "start") as machine:
        assert machine.version == "1.0"
        Points.current.get().at_point = read_trial
        await machine.goes_back_by_hand()
        sha256 = {version: digest for digest, version in machine.versions.items()}
    assert trials == {f"from=slots/{sha256['2.0']}\nto=slots/{sha256['1.0']}\n"}


async def test_a_kept_version_that_was_taken_away_runs_in_the_end(cuts):
    """As by a hand at the camera, or a file system that lost the switch."""
    made = cuts("app")
    start = await made.copy_when(await made.prepare("1.0"), update_to_2, lambda f: state_in(f) == "COMMITTING")
    (start / "opt" / "current").unlink()
    (start / "opt" / "current").symlink_to(f"slots/{digest_of(start / '1.0.tar.gz')}")

    async def check(machine, end):
        assert (*end[:2], machine.version) == ("COMMITTED", "updated", "2.0"), end

    await made.enumerate(start, update_to_2, check)
    print(f"{made.tried} cuts of switching to a kept version once more tried")
