"""One whole configuration and then another, brought in force by the agent's own parts: configuration, targets, jobs and state.db.

The programs beside the agent are a model: what one has loaded is what its file held when it was started or reloaded. A boot,
by a cut or asked for, starts all of them with what is on the disk then.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import os
import signal
import sqlite3
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from agent import logs, settings_file
from agent.config import changes, records, targets, trial
from agent.config.configuration import Configuration
from agent.config.records import Kept
from agent.errors import FailedError
from agent.host import clock
from agent.host.files import write_atomic
from agent.jobs import conversation
from agent.jobs import engine as engines
from agent.jobs.engine import Engine
from agent.jobs.machine import Phase, Record
from agent.jobs.operations.configure import Configure
from agent.reboots import Reboots
from agent.settings import Settings
from agent.store import Store
from tests.fakes_shadow import ShadowCloud
from tests.faults.powercut.disk import BOOT_ID, LIBC
from tests.faults.powercut.place import LastingJobs, Place, World, tree
from tests.faults.powercut.runner import PR_SET_PDEATHSIG
from tests.faults.powercut.wholes import NAMES, OWN, SITE, A, B, Json, Whole, file_of, found_at, inodes, load, loaded_by

JOB = "job-2"
ENDED, REBOOTED = 0, 77
MOST_BOOTS = 6
"""In a row without a cut; more are a loop."""
MOST_ATTEMPTS = 2
OPEN_PORT, CLOSED_PORT = 8883, 8884
DARK = b'"exposure": "none"'
STICK = f".{NAMES['lens']}.new"
CHANGED = ("config.applied", "config.reverted", "config.rejected")


class Configuring:
    """`way` is made of words joined by `+`.

    `dark`: the new configuration spoils the images; `unreachable`: with it the cloud is out of reach; `stuck`: one file can't
    be put back, and a program does not take its old file again; `reboot`: one target takes effect by a reboot; `job`: it
    comes by a job; `own`: two targets are left to the site. Faults of the agent: `hasty`, the trial's record is not kept;
    `unsynced`, the targets' files are not synced.
    """

    def __init__(self, way: str) -> None:
        logs.configure("json", os.environ.get("POWERCUT_LOG", "critical"))
        self.way = frozenset(way.split("+"))
        self.old, self.new = copy.deepcopy((B, OWN) if "own" in self.way else (A, B))
        if "dark" in self.way:
            self.new.targets["pipeline"]["exposure"] = "none"
            self.new.contents["pipeline"] = (json.dumps(self.new.targets["pipeline"], indent=2) + "\n").encode()
        if "unreachable" in self.way:
            self.new.wanted["agent"]["cloud"] = {"port": CLOSED_PORT}
            changes.REACH_AGAIN_S = 0.02
            left_s = trial.time_left_s
            trial.time_left_s = lambda on_trial, now: min(0.1, left_s(on_trial, now))
        if "unsynced" in self.way:
            targets.write_atomic = write_unsynced
        self.code = "unreachable" if "unreachable" in self.way else "trial_failed" if "dark" in self.way else ""
        for name, value in {"RETRY_S": (0.01, 0.05), "NEWS_INTERVAL_S": 0.05, "POLL_S": 0.05, "NOTICES_S": 0.0}.items():
            setattr(engines, name, value)
        conversation.RETRY_S = (0.01, 0.05)

    # What the scenario is made of

    def prepare(self, place: Place) -> None:
        for folder in ("etc", "data"):
            (place.folder / folder).mkdir()
        (place.world / "loaded").mkdir()
        (place.folder / "etc" / NAMES["network"]).symlink_to(f"../data/{NAMES['network']}")
        for name, (content, mode, user, group) in SITE.items():
            if content is not None:
                path = file_of(place, name)
                path.write_bytes(content)
                path.chmod(mode)
                os.chown(path, user, group)
        self._want(World(place), "job-1", self.old)
        self._let_live(place, self.old)
        for name in NAMES:
            place.expect(found_at(place, name) == self.old.file(name), f"preparing: {name} is {found_at(place, name)}")
        self._want(World(place), JOB, self.new)

    def moved(self, template: Path, folder: Path) -> None:
        """The camera was prepared elsewhere, and remembers where its targets are."""
        with contextlib.closing(sqlite3.connect(template / "state.db")) as database, database:
            change = "UPDATE facts SET value = replace(value, ?, ?) WHERE key = 'config.placed'"
            database.execute(change, (str(template), str(folder)))

    def boot(self, place: Place) -> None:
        self._let_live(place, self.new)
        if place.saw:
            return
        before, seen = tree(place.folder), inodes(place)
        watched = World(place).get("watched")
        place.label("agent again")
        self._one_life(place, self.new)
        after = tree(place.folder)
        left = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)} - {"state.db"}
        same = inodes(place) == seen or "stuck" in self.way  # what could not be put back is tried again
        place.expect(not left and same, f"a restart of the agent changed {sorted(left) or 'files'}")
        place.expect(World(place).get("watched") == watched, "it was tried again after its end")
        self._look_at_the_end(place)

    def _want(self, world: World, job: str, whole: Whole) -> None:
        if "job" not in self.way:
            world.save(shadow={**world.get("shadow", {}), "desired": whole.wanted, "exists": True})
            world.save(asked_at=world.kept["shadow"].get("version", 0) + 1)
            world.save(shadow={**world.kept["shadow"], "version": world.kept["asked_at"]})
        else:
            jobs = LastingJobs(world)
            jobs.create(job, {"version": "1.0", "operation": "configure", **whole.wanted})
            jobs.keep()
        world.save(watched=0, tried=[], reboots=set(), audited_before=world.get("audited", []))

    def _let_live(self, place: Place, wanted: Whole) -> None:
        """From a boot until nothing is left to do, reboots that were asked for included."""
        for _ in range(MOST_BOOTS):
            self._power_on(place)
            if self._one_life(place, wanted) == ENDED:
                return
            Path(BOOT_ID).write_text(f"{uuid.uuid4()}\n", encoding="ascii")
            place.label("boot again")
        place.expect(False, f"no end after {MOST_BOOTS} boots")

    def _power_on(self, place: Place) -> None:
        """Every program starts with what its file holds."""
        if World(place).get("stuck"):
            stick(place)
        for name in ("lens", "network", "pipeline"):
            load(place, name)

    def _one_life(self, place: Place, wanted: Whole) -> int:
        """The agent from its start to its end, which may be that of its process; how it ended."""
        told = place.world / "saw.json"
        told.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
            try:
                asyncio.run(Life(self, place, wanted).run())
            except BaseException as error:
                place.saw.append("".join(traceback.format_exception(error)))
            _leave(place, ENDED)
        _, status = os.waitpid(child, 0)
        if not told.exists():
            place.saw.append(f"the agent ended with wait status {status}")
            return ENDED
        place.saw[:] = json.loads(told.read_text())
        return os.waitstatus_to_exitcode(status)

    # What must hold

    def may_end(self, cuts: int) -> set[tuple[str, str]]:
        """States with the code of the first error."""
        ends = {("reverted", self.code) if self.code else ("applied", "")}
        if cuts and "stuck" in self.way:
            ends.add(("reverted", "target_unwritable"))  # it can't be tried again
        if cuts > 1:
            ends.add(("reverted", "trial_interrupted"))  # two cuts on trial are too many
        return ends

    def look_at_boot(self, place: Place, kept: Kept, shadow: LastingShadow, jobs: LastingJobs) -> None:
        """Whatever was cut: each file is whole, and where nothing is on trial all are of the configuration in force."""
        found = {name: found_at(place, name) for name in NAMES}
        for name, file in found.items():
            whole = file in (self.old.file(name), self.new.file(name))
            place.expect(whole, f"{name} is neither the old nor the new: {file}")
        in_force = self._in_force(place, kept)
        if in_force and kept.trial is None:
            for name in found.keys() - set(stuck_of(kept)):
                as_kept = found[name] == in_force.file(name)
                place.expect(as_kept, f"{name} is {found[name]}, not what is in force, and nothing is on trial")
        said = shadow.reported.get("status", {})
        if said.get("state") in ("applied", "reverted") and said["desired_version"] >= shadow.asked_at > 0:
            place.expect(kept.trial is None, f"the shadow says {said}, but a trial is going on")
            truth = self.new if said["state"] == "applied" else self.old
            place.expect(in_force is truth, f"the shadow says {said}, and that is not in force")
            place.expect(shadow.reported.get("targets") == truth.targets, f"the shadow says {shadow.reported}")
        told = shadow.reported.get("targets")
        place.expect(told in (self.old.targets, self.new.targets), f"the shadow says {told}")
        for ended in jobs.ends(JOB):
            truth = self.new if ended == "SUCCEEDED" else self.old
            place.expect(
                in_force is truth and kept.trial is None, f"the job ended as {ended}, and that is not in force"
            )

    def _in_force(self, place: Place, kept: Kept) -> Whole | None:
        desired = kept.good.desired.as_json()
        found = next((whole for whole in (self.old, self.new) if whole.wanted == desired), None)
        place.expect(found is not None, f"{desired} is in force")
        return found

    def _look_at_the_end(self, place: Place) -> None:
        world = World(place)
        kept, end, settings = world.kept["end"]
        shadow, jobs = LastingShadow(world), LastingJobs(world)
        place.expect(end in self.may_end(place.cuts), f"it ended as {end}")
        in_force = self.new if end[0] == "applied" else self.old
        place.expect(self._in_force(place, kept) is in_force, f"it ended as {end}, and that is not in force")
        stuck = set(stuck_of(kept))
        place.expect(stuck == expected_stuck(world), f"it says that {stuck} could not be put back, not what could not")
        for name in NAMES:
            found, loaded = found_at(place, name), loaded_by(place, name)
            place.expect(name in stuck or found == in_force.file(name), f"{name} is {found} after {end}")
            content = found.content if name != "overlay" else None
            place.expect(name in stuck or loaded == content, f"{name} was loaded as {loaded}, its file is {content}")
        wants = (in_force.interval_s, OPEN_PORT)
        place.expect(settings == wants, f"the agent runs with {settings}, not {wants}")
        place.expect(world.kept["watched"] <= MOST_ATTEMPTS, f"it was watched {world.kept['watched']} times")
        attempts = len(world.kept["tried"]) - len(world.kept["reboots"])
        place.expect(attempts <= MOST_ATTEMPTS, f"{attempts} attempts")
        audited = world.kept["audited"][: -len(world.kept["audited_before"])]
        place.expect(audited == [f"config.{end[0]}"], f"the audit trail has {audited}")
        self._look_at_the_shadow(place, shadow, in_force, end)
        if "job" in self.way:
            self._look_at_the_job(place, world, jobs, end)
        left = set(tree(place.folder)) - {"etc", "data", "state.db", "data/network.env", "etc/network.env"}
        left ^= {
            f"etc/{NAMES[name]}" for name in NAMES if name != "network" and found_at(place, name).content is not None
        }
        left -= {f"etc/{STICK}"} if world.get("stuck") else set()
        place.expect(not left, f"left over or missing: {sorted(left)}")

    def _look_at_the_shadow(self, place: Place, shadow: LastingShadow, in_force: Whole, end: tuple[str, str]) -> None:
        by_shadow = "job" not in self.way
        place.expect(shadow.desired == (self.new.wanted if by_shadow else {}), f"desired became {shadow.desired}")
        agent: Json = {"telemetry": {"interval_s": in_force.interval_s}}
        if "unreachable" in self.way and by_shadow:
            agent["cloud"] = {"port": OPEN_PORT}
        reported = copy.deepcopy(shadow.reported)
        status = reported.pop("status", {})
        told = {"agent": agent, "targets": in_force.targets}
        place.expect(reported == told, f"the shadow says {reported}, in force is {told}")
        errors = status.get("errors", [])
        said = (status.get("state"), errors[0]["code"] if errors else "")
        place.expect(said == (end if by_shadow else ("applied", "")), f"the shadow says {said} after {end}")
        version = status.get("desired_version", -1)
        place.expect(shadow.asked_at <= version <= shadow.version, f"it says so of version {version}")

    def _look_at_the_job(self, place: Place, world: World, jobs: LastingJobs, end: tuple[str, str]) -> None:
        ends, said = jobs.ends(JOB), {(status, code) for job, status, code in jobs.said if job == JOB}
        place.expect(len(ends) == 1 and len(said) == 1, f"the job ended as {ends}, told were {sorted(said)}")
        truth = (
            ("SUCCEEDED", "ok")
            if end[0] == "applied"
            else ("FAILED", "rollback_failed" if world.get("stuck") else end[1])
        )
        place.expect(said == {truth}, f"the job ended as {sorted(said)}, the configuration as {end}")
        record = Record.from_json(world.kept["journal"])
        closed = record.phase is Phase.CLOSED and record.status == truth[0] and record.superseded is None
        place.expect(closed, f"the journal ends with {record}")


class LastingShadow(ShadowCloud):
    """The shadow of a camera whose power is cut; `asked_at` is the version at which the new configuration was asked for."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world
        self.asked_at: int = world.get("asked_at", 0)
        for name, value in world.get("shadow", {}).items():
            setattr(self, name, copy.deepcopy(value))

    def take(self, reported: Json) -> int:
        version = super().take(reported)
        self._world.save(shadow={name: getattr(self, name) for name in ("version", "exists", "desired", "reported")})
        return version


class WatchedEngine(Engine):
    """Says which phase is durable."""

    label: Callable[[str], None]

    async def _keep(self, record: Record) -> None:
        await super()._keep(record)
        self.label(f"job {record.phase}")


class UnitState(NamedTuple):
    """What systemd says about a unit."""

    active: str = "active"
    restarts: int = 0


class Life:
    """The agent's process, and how it sees the camera: its settings, the units, the images and the connection."""

    def __init__(self, scenario: Configuring, place: Place, wanted: Whole) -> None:
        self._scenario, self._place, self._wanted = scenario, place, wanted
        self._world = World(place)
        self._shadow, self._jobs = LastingShadow(self._world), LastingJobs(self._world)
        self._lock = asyncio.Lock()
        self._connecting: set[asyncio.Task[None]] = set()
        self._site = self._site_document()
        self.settings = settings_file.validate(self._site, "site")

    async def run(self) -> None:
        """Until nothing is left to do."""
        store = await Store.open(self._place.folder / "state.db")
        self._place.expect(store.quarantined is None, "state.db was quarantined")
        self._boot_id = clock.boot_id()
        await self._look_at_boot(store)
        self._configuration = self._made(store)
        if "hasty" in self._scenario.way:
            self._forget_trials(store)
        await self._configuration.load()
        tasks = [asyncio.create_task(self._configuration.run())]
        await self._configuration.on_ready()
        if "job" in self._scenario.way:
            tasks.append(asyncio.create_task(self._engine(store).run()))
        while not await self._is_quiet(store) and not any(task.done() for task in tasks):
            await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                await task
        await self._note_the_end(store)
        await store.close()

    async def _look_at_boot(self, store: Store) -> None:
        kept = await store.read(records.load)
        if self._wanted is self._scenario.new:
            self._scenario.look_at_boot(self._place, kept, self._shadow, self._jobs)
        if kept.trial and kept.trial.phase == "trial" and kept.trial.awaits_boot not in ("", self._boot_id):
            self._world.save(reboots={*self._world.kept["reboots"], kept.trial.awaits_boot})

    async def _note_the_end(self, store: Store) -> None:
        kept = await store.read(records.load)
        audited = await store.read(lambda t: [entry["action"] for entry in t.audit() if entry["action"] in CHANGED])
        settings = (self.settings.telemetry.interval_s, self.settings.cloud.port)
        journal = await store.read(lambda t: t.job(JOB))
        self._world.save(end=(kept, self._end(kept), settings), audited=audited, journal=journal)

    def _made(self, store: Store) -> Configuration:
        return Configuration(
            site=self._site,
            settings=self.settings,
            store=store,
            shadow=self._shadow.reconnect(),
            units=self,
            gate=self,
            apply_agent=self._apply_agent,
            mutation_lock=self._lock,
            online=lambda: self._shadow.online,
            on_change=self._label,
            reconnect=self._reconnect,
            reboot=Reboots(store, self._boot_id, self._go_down, uptime_s=lambda: 1e6).reboot,
            settle_s=0.0,
        )

    def _site_document(self) -> Json:
        loaded = self._place.world / "loaded" / "network"
        network = file_of(self._place, "network")
        connectivity = {"connectivity": True} if "unreachable" in self._scenario.way else {}
        programs: Json = {
            "pipeline": {
                "format": "json", "apply": "reload", "unit": "pipeline.service", "check": ["/bin/grep", "-q", "fps", "{path}"],
            },
            "lens": {"format": "toml", "apply": "restart", "unit": "lens.service"},
            "overlay": {"format": "ini"},
            "network": {
                "format": "env", "apply": ["/bin/cp", "--", str(network), str(loaded)], **connectivity,
            },
        }  # fmt: skip
        if "reboot" in self._scenario.way:
            programs["network"]["apply"] = "reboot"
        paths = {name: {"path": str(self._place.folder / "etc" / NAMES[name])} for name in programs}
        return {
            "telemetry": {"interval_s": 60},
            "capture": {"sources": {"front": {"directory": str(self._place.folder)}}},
            "config": {
                "trial_s": 1,
                "connectivity_trial_s": 1,
                "targets": {name: {**paths[name], **program} for name, program in programs.items()},
            },
        }

    def _engine(self, store: Store) -> WatchedEngine:
        operation = Configure(self._configuration.set_fleet, self._configuration.judge_fleet)
        engine = WatchedEngine(store=store, jobs=self._jobs, operations={"configure": operation}, allow=["configure"])
        engine.label = self._place.label
        engine.wake()
        return engine

    async def _is_quiet(self, store: Store) -> bool:
        """Whether the change has ended, everybody was told, and the configuration waits for news."""
        kept = await store.read(records.load)
        wake = self._configuration._wake
        if kept.trial or not self._end(kept)[0] or not wake._waiters or wake.is_set():
            return False
        if not self._shadow.gets or self._shadow.reported.get("status") != self._configuration.state():
            return False
        return self._jobs.all_ended() and not await store.read(lambda t: t.jobs(finished=False))

    def _end(self, kept: Kept) -> tuple[str, str]:
        """What became of the change, and the code of the first error; empty while it has not ended."""
        if "job" in self._scenario.way:
            job = JOB if self._wanted is self._scenario.new else "job-1"
            ended = kept.outcome if kept.outcome and kept.outcome.job.startswith(job) else None
        else:
            ended = kept.refused
        if ended:
            return ended.state, ended.problems[0].code if ended.problems else ""
        in_force = kept.good.desired.as_json() == self._wanted.wanted
        return ("applied" if in_force and "job" not in self._scenario.way else ""), ""

    def _label(self) -> None:
        kept = self._configuration._keeper.kept
        state = self._end(kept)[0] or "before"
        if kept.trial:
            on_trial = kept.trial
            boot = "rebooting" if on_trial.awaits_boot else on_trial.booted_with if on_trial.reboots else ""
            state = " ".join(filter(None, [on_trial.phase, str(on_trial.attempts), boot]))
        self._place.label(state)

    def _doing(self, what: str) -> None:
        if "job" not in self._scenario.way:  # there the journal is written at the same time, at one point or another
            self._place.label(self._place.state, what)

    def _forget_trials(self, store: Store) -> None:
        """The fault: what is on trial is not written before it has ended."""
        write = store.write

        async def late(change: Any) -> Any:
            return await write(change) if self._configuration._keeper.kept.trial else None

        store.write = late  # type: ignore[method-assign]

    # The agent and its connection

    async def _apply_agent(self, settings: Settings) -> None:
        before, self.settings = self.settings, settings
        on_trial = self._configuration._keeper.kept.trial
        if on_trial and on_trial.phase == "trial" and settings.telemetry.interval_s == self._scenario.new.interval_s:
            self._world.save(tried=[*self._world.get("tried", []), self._boot_id])
        self._doing("agent")
        if before.cloud.port != settings.cloud.port:
            await self._reconnect()

    async def _reconnect(self) -> None:
        self._shadow.online = self.settings.cloud.port == OPEN_PORT
        if self._shadow.online:
            task = asyncio.create_task(self._configuration.on_ready())
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _go_down(self) -> None:
        """A reboot: the process ends, the file system is kept."""
        _leave(self._place, REBOOTED)

    # Units

    async def reload(self, unit: str) -> None:
        await self.restart(unit)

    async def restart(self, unit: str) -> None:
        name = unit.removesuffix(".service")
        self._doing(name)
        wanted, loaded = found_at(self._place, name).content, loaded_by(self._place, name)
        if name == "pipeline" and "stuck" in self._scenario.way:
            self._world.save(unloaded=loaded == self._scenario.new.contents[name] != wanted)
            if self._world.get("unloaded"):
                raise FailedError("unit_failed", f"{unit} does not take its old file")
        load(self._place, name)

    async def state(self, unit: str) -> UnitState:
        return UnitState()

    # Images

    def judging_s(self, reference: Any, intervals: Any) -> float:
        return 0.0

    async def settled(self) -> None:
        return

    async def reference(self) -> Json:
        return {"front": {"rate": 1.0}}

    async def watch(self, reference: Json, *, stable_for_s: float, deadline_s: float) -> tuple[bool, list[str]]:
        self._place.expect(reference == {"front": {"rate": 1.0}}, f"the reference became {reference}")
        self._world.save(watched=self._world.get("watched", 0) + 1)
        self._doing("watched")
        if "stuck" in self._scenario.way and DARK in (loaded_by(self._place, "pipeline") or b""):
            self._world.save(stuck=True)
            stick(self._place)
        await asyncio.sleep(0.001)
        dark = DARK in (loaded_by(self._place, "pipeline") or b"")
        return not dark, ["front: dark in 9 of 15 pictures"] if dark else []


def stick(place: Place) -> None:
    """Nobody can write lens.toml from here on: where its candidate goes, there is a folder."""
    (place.folder / "etc" / STICK).mkdir(exist_ok=True)


def stuck_of(kept: Kept) -> list[str]:
    """The targets of which the agent says that it could not put them back."""
    return list(kept.owed)


def expected_stuck(world: World) -> set[str]:
    """The targets that could not be put back."""
    return {*(["lens"] if world.get("stuck") else []), *(["pipeline"] if world.get("unloaded") else [])}


def write_unsynced(path: Path, content: bytes, mode: int) -> None:
    """As write_atomic, without what makes it durable."""
    sync, os.fsync = os.fsync, lambda _: None
    try:
        write_atomic(path, content, mode)
    finally:
        os.fsync = sync


def _leave(place: Place, code: int) -> NoReturn:
    (place.world / "saw.json").write_text(json.dumps(place.saw))
    os._exit(code)
