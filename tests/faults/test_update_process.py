"""The real agent updates itself through its loader, and others, while versions are broken, it is killed, and the cloud is away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from aiohttp import web

from agent.updates.manifest import digest_of
from tests.fakes_updates import RELEASE, Server, archive, member, root_payload, serving, signed_manifest, signed_root
from tests.faults.agent_process import AgentProcess
from tests.faults.agent_unit import PACKAGED, AgentUnit
from tests.faults.cloud import Cloud
from tests.faults.relay import Relay

GATE = {"stable_for_s": 0.5, "deadline_s": 60}
LONG = {"stable_for_s": 3, "deadline_s": 120}
HOPELESS = {"stable_for_s": 0.2, "deadline_s": 1}
LIMIT_S = 60.0
LOOK_S = 0.001
TRIES = 6
"""A state that is over in milliseconds is not always hit."""


class Files:
    """Artifacts over HTTP by their names; one that is in `held` begins and then waits."""

    def __init__(self) -> None:
        self.servers: dict[str, Server] = {}
        self.held: set[str] = set()
        self.begun: set[str] = set()
        self.changed = asyncio.Condition()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["path"]
        if name in self.held:
            await self._begin(name, request)
        try:
            return await self.servers[name].handle(request)
        except ConnectionResetError:  # the agent was killed meanwhile
            return web.Response(status=400)

    async def release(self, name: str) -> None:
        async with self.changed:
            self.held.discard(name)
            self.changed.notify_all()

    async def asked_for(self, name: str) -> None:
        async with asyncio.timeout(LIMIT_S), self.changed:
            await self.changed.wait_for(lambda: name in self.begun)

    async def _begin(self, name: str, request: web.Request) -> None:
        async with self.changed:
            self.begun.add(name)
            self.changed.notify_all()
            await self.changed.wait_for(lambda: name not in self.held)


@dataclass
class Camera:
    """An agent, its cloud behind a relay, and where its artifacts are."""

    agent: Any
    cloud: Cloud
    relay: Relay
    files: Files
    base: str
    offered: list[str] = field(default_factory=list)

    def offer(self, version: str, path: Path, target: str = "agent", **manifest: Any) -> str:
        """Create the job of an update; its id. Blocks."""
        product = ("agent", "camera-agent") if target == "agent" else ("app", "pipe")
        described = {
            "target": target,
            "installer": product[0],
            "name": product[1],
            "version": version,
            "sha256": digest_of(path),
            "size": path.stat().st_size,
            "installed_size": 1_000_000,
            "restart": "unit",
            "gate": GATE,
            **manifest,
        }
        job_id = f"job-{len(self.offered) + 1}"
        self.offered.append(job_id)
        self.files.servers[path.name] = Server(path.read_bytes())
        document = {"version": "1.0", "operation": "update", "target": target, "urls": [f"{self.base}/{path.name}"]}
        self.cloud.jobs.create(job_id, {**document, "manifest": signed_manifest(RELEASE, **described)})
        return job_id

    def record(self, job_id: str) -> dict[str, Any]:
        """The job's record in state.db, {} when there is none. Blocks."""
        found = [record for (name, _), record in self.agent.journal().items() if name == job_id]
        return found[0] if found else {}

    async def reaches(self, job_id: str, state: str) -> dict[str, Any]:
        """Wait until state.db says that the update is in `state`; its progress."""
        return await self.sees(lambda: self._in(job_id, state), f"{job_id} in {state}")

    async def sees(self, look: Callable[[], Any], what: str) -> Any:
        """Wait until `look`, called in a thread, gives something true; that."""
        until = time.monotonic() + LIMIT_S
        while not (found := await asyncio.to_thread(look)):
            assert time.monotonic() < until, f"not seen: {what}\n{self.agent.tail()}"
            await asyncio.sleep(0.02)
        return found

    def _in(self, job_id: str, state: str) -> Any:
        with contextlib.suppress(sqlite3.OperationalError):
            progress = self.record(job_id).get("progress") or {}
            return progress if progress.get("state") == state else None

    async def ends(self, job_id: str, status: str, code: str) -> str:
        """Wait for the one end of the job, which must be this, in the cloud and in state.db; its message."""
        try:
            end = await self.cloud.jobs.ended(job_id, LIMIT_S)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.agent.tail()}") from None
        assert (end.status, end.details["reason_code"]) == (status, code), f"{end.details}\n{self.agent.tail()}"
        await self.sees(lambda: self.record(job_id).get("phase") == "closed", f"{job_id} closed")
        record = await asyncio.to_thread(self.record, job_id)
        assert (record["status"], record["superseded"]) == (status, None), record
        self.told_once(job_id, status)
        return str(end.details["message"])

    def told_once(self, job_id: str, status: str) -> None:
        """Nothing but this end was ever told, and it was accepted once."""
        ends = self.cloud.jobs.terminal_updates(job_id)
        assert [(end.status, end.by) for end in ends] == [(status, "device")], ends
        told = {ending.status for ending, _ in self.cloud.jobs.attempts if ending.job_id == job_id}
        assert told == {status}, self.cloud.jobs.attempts

    async def updates(self, target: str = "") -> dict[str, Any]:
        """What `agentctl update --json` says, of one target when named."""
        said = await self.agent.ctl("update", "--json")
        assert said.code == 0, said
        return said.json()["targets"][target] if target else said.json()

    async def waits(self, target: str, words: str) -> str:
        """Wait until agentctl says that the target's update is WAITING with such words; all of them."""
        async with asyncio.timeout(LIMIT_S):
            while True:
                said = await self.agent.ctl("update", "--json")
                status = said.json()["targets"].get(target, {}) if said.code == 0 else {}
                if status.get("state") == "WAITING" and words in status["waits_for"]:
                    return str(status["waits_for"])
                await asyncio.sleep(0.3)

    async def runs(self, version: str, before: str | None = None) -> None:
        """The agent is on-line as `version`, says so everywhere, and a restart does not change it."""
        await self.online()
        said = (await self.agent.ctl("status", "--json")).json()
        assert (said["agent"]["version"], said["updates"]["agent"]["version"]) == (version, version), said
        status = await self.updates("agent")
        assert (status["version"], status["state"]) == (version, "idle"), status
        if before:
            assert status["previous"] == before, status
        unit: AgentUnit = self.agent
        assert unit.lives()[-1] == version
        assert not (unit.root / "trial").exists()

    async def killed_in(self, state: str, offer: Callable[[], str]) -> str:
        """Kill the agent in this state of an update, and let it come again; the job. Misses end as they may."""
        for _ in range(TRIES):
            job_id = offer()
            if await self.freeze_in(job_id, state):
                await self.agent.kill(group=True)
                if isinstance(self.agent, AgentUnit):
                    return job_id
                left = await asyncio.to_thread(self._in, job_id, state)  # the next may have been on its way to the disk
                await self.agent.start()
                if left is not None:
                    return job_id
            await self.cloud.jobs.ended(job_id, LIMIT_S)
        raise AssertionError(f"{state} was always over before the agent stood still, {TRIES} times")

    async def online(self) -> None:
        """Wait until the agent says that it is connected; agentctl is asked only when the log says so, it costs more."""

        def connected() -> bool:
            words = [line.get("event") for line in self.agent.lines()]
            return [word for word in words if word in ("started", "connected", "off-line")][-1:] == ["connected"]

        await self.sees(connected, "connected")
        await self.agent.online(LIMIT_S)

    async def freeze_in(self, job_id: str, state: str) -> bool:
        """Stop the process (SIGSTOP) as soon as state.db says `state`; False when that was over before it stood still."""
        frozen, pid = await asyncio.to_thread(self._freeze_in, job_id, state)
        if not frozen and pid:
            os.kill(pid, signal.SIGCONT)
        return frozen

    def _freeze_in(self, job_id: str, state: str) -> tuple[bool, int]:
        until = time.monotonic() + LIMIT_S
        database = sqlite3.connect(self.agent.state_dir / "state.db", isolation_level=None, timeout=10)
        query = "SELECT json_extract(record, '$.progress.state'), json_extract(record, '$.phase') FROM jobs WHERE job_id = ?"

        def now() -> tuple[str, str]:
            return database.execute(query, (job_id,)).fetchone() or ("", "")

        with contextlib.closing(database):
            while (seen := now())[0] != state:
                if seen[1] == "closed":
                    return False, 0
                assert time.monotonic() < until, f"{job_id} is {seen}\n{self.agent.tail()}"
                time.sleep(LOOK_S)
            pid = self.agent.pid
            os.kill(pid, signal.SIGSTOP)
            while not _stands_still(pid):
                time.sleep(LOOK_S)
            return now()[0] == state, pid


def _stands_still(pid: int) -> bool:
    """Whether every thread of the process has been stopped, so that nothing is written any more."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return all(stat.rpartition(")")[2].split()[0] in "TtZ" for stat in stats)


@contextlib.asynccontextmanager
async def camera(
    folder: Path, kind: type[AgentProcess] = AgentUnit, maintenance: Mapping[str, Any] | None = None, **updates: Any
) -> AsyncIterator[Camera]:
    """An agent that is on-line, with update keys."""
    tables = {"updates": {"keys_dir": str(folder / "keys"), **updates}, "maintenance": maintenance or {}}
    keys, files, thing = folder / "keys", Files(), "cam-1"
    keys.mkdir(parents=True)
    (keys / "root.json").write_text(json.dumps(signed_root(root_payload())))
    async with (
        serving(files) as base,
        Cloud(thing) as cloud,
        Relay(cloud.port) as relay,
        kind(folder / "a", relay.port, thing, **tables) as agent,
    ):
        made = Camera(agent, cloud, relay, files, base)
        await agent.start()
        await made.online()
        yield made
        await agent.stop()


async def together(*parts: Coroutine[Any, Any, Any]) -> None:
    async with asyncio.TaskGroup() as group:
        for part in parts:
            group.create_task(part)


# ---- the agent itself


async def test_the_agent_becomes_a_new_version_of_itself_and_stays_it(tmp_path):
    async with camera(tmp_path) as c:
        unit: AgentUnit = c.agent
        pid = unit.pid
        message = await c.ends(c.offer("0.2.0", unit.slot("0.2.0")), "SUCCEEDED", "updated")
        assert message.startswith("camera-agent 0.2.0 runs on agent; held for 0.5 s: cloud"), message
        await c.runs("0.2.0")
        assert (unit.lives(), unit.pid) == ([PACKAGED, "0.2.0"], pid)  # one process, so systemd saw no end
        await unit.kill()
        await c.sees(lambda: len(unit.lives()) == 3, "the next life")
        await c.runs("0.2.0")
        await c.ends(c.offer("0.3.0", unit.slot("0.3.0")), "SUCCEEDED", "updated")
        await c.runs("0.3.0", before="0.2.0")
        again = await c.ends(c.offer("0.3.0", unit.slot("0.3.0")), "SUCCEEDED", "already_installed")
        assert "installed already" in again
        said = await unit.ctl("update", "rollback", "agent", "--yes", "--json", "--timeout", "60")
        assert (said.code, said.json()["went_back"]) == (0, True), said
        await c.runs("0.2.0", before="0.3.0")
        assert unit.lives() == [PACKAGED, "0.2.0", "0.2.0", "0.3.0", "0.2.0"]
    print("4 switches of the agent to another version of itself tried, one of them by hand")


BROKEN = {
    "exits at run": (3, "fell_back", "it was started 3 times and did not last"),
    "exits after READY": (3, "fell_back", "it was started 3 times and did not last"),
    "hangs before READY": (1, "fell_back", "it hung and was ended by the watchdog"),
    "hangs, is killed and hangs again": (2, "fell_back", "it was not ready in time"),
    "never gets on-line": (1, "cloud_lost", "the cloud is not reached again"),
    "refuses agent.toml": (0, "agent_unfit", "does not accept"),
}
"""How often it is started, and what the one FAILED says."""


async def is_taken_back(c: Camera, version: str, behaviour: str, before: str) -> None:
    unit: AgentUnit = c.agent
    starts, code, words = BROKEN[behaviour]
    lived, twice = len(unit.lives()), "again" in behaviour
    path = unit.slot(version, "hangs before READY" if twice else behaviour)
    job_id = c.offer(version, path, gate=HOPELESS if code == "cloud_lost" else GATE)
    if "hangs" in behaviour:
        await c.sees(lambda: unit.lives()[lived:] == [version], f"{version} started")
        if twice:
            await unit.kill()
            await c.sees(lambda: unit.lives()[lived:] == [version] * 2, f"{version} started again")
        await unit.times_out()
    message = await c.ends(job_id, "FAILED", code)
    assert words in message, message
    await c.runs(before)
    assert unit.lives()[lived:] == [version] * starts + [before] * (starts > 0), unit.lives()
    assert not (unit.root / "fell_back").exists()
    assert {path.name.partition(".")[0] for path in (unit.root / "slots").iterdir()} <= {Path(unit.current).name}


async def test_a_broken_version_of_the_agent_is_taken_back_with_one_true_reason(tmp_path):
    async def from_the_package(*behaviours: str) -> None:
        async with camera(tmp_path / "p") as c:
            for behaviour in behaviours:
                await is_taken_back(c, "0.2.0", behaviour, PACKAGED)

    async def from_a_slot(*behaviours: str) -> None:
        async with camera(tmp_path / "s") as c:
            await c.ends(c.offer("0.2.0", c.agent.slot("0.2.0")), "SUCCEEDED", "updated")
            for behaviour in behaviours:
                await is_taken_back(c, "0.3.0", behaviour, "0.2.0")

    half = len(BROKEN) // 2
    await together(from_the_package(*list(BROKEN)[:half]), from_a_slot(*list(BROKEN)[half:]))
    print(f"{len(BROKEN)} ways of being broken tried: {', '.join(BROKEN)}")


async def killed_in_its_own_update(folder: Path, states: Sequence[str]) -> None:
    async with camera(folder) as c:
        unit: AgentUnit = c.agent
        number, running = 1, PACKAGED

        def good() -> str:
            nonlocal number
            number += 1
            return c.offer(f"0.{number}.0", unit.slot(f"0.{number}.0"))

        def bad() -> str:
            nonlocal number
            number += 1
            return c.offer(f"0.{number}.0", unit.slot(f"0.{number}.0", "never gets on-line"), gate=HOPELESS)

        for state in states:
            job_id = await c.killed_in(state, bad if state == "ROLLING_BACK" else good)
            if state == "ROLLING_BACK":
                message = await c.ends(job_id, "FAILED", "cloud_lost")
                assert message.endswith(f"taken back to {running}"), message
            else:
                await c.ends(job_id, "SUCCEEDED", "updated")
                running = f"0.{number}.0"
            await c.runs(running)
        assert unit.results == ["signal"] * len(states)


async def test_a_version_of_the_agent_that_is_killed_on_each_of_its_starts_is_taken_back(tmp_path):
    async with camera(tmp_path) as c:
        unit: AgentUnit = c.agent
        job_id = c.offer("0.2.0", unit.slot("0.2.0"), gate={"stable_for_s": 60, "deadline_s": 600})
        for start in range(1, 4):
            await c.sees(lambda n=start: unit.lives()[1:] == ["0.2.0"] * n, f"start {start}")
            if start < 3:  # also before it knows that it is on trial
                await c.sees(lambda n=start: c.record(job_id)["progress"].get("boots") == n, f"boot {start}")
            await unit.kill()
        message = await c.ends(job_id, "FAILED", "fell_back")
        assert "it was started 3 times and did not last" in message, message
        await c.runs(PACKAGED)
        assert unit.lives() == [PACKAGED, *["0.2.0"] * 3, PACKAGED]


async def test_going_back_by_hand_ends_the_trial_of_the_agent(tmp_path):
    async with camera(tmp_path) as c:
        unit: AgentUnit = c.agent
        job_id = c.offer("0.2.0", unit.slot("0.2.0"), gate={"stable_for_s": 60, "deadline_s": 600})
        await c.reaches(job_id, "TRIAL")
        await c.online()
        said = await unit.ctl("update", "rollback", "agent", "--yes", "--json", "--timeout", "60")
        assert (said.code, said.json()["went_back"]) == (0, True), said
        await c.ends(job_id, "FAILED", "cancelled")
        await c.runs(PACKAGED)


async def test_going_back_by_hand_to_an_agent_that_does_not_start_any_more_returns(tmp_path):
    async with camera(tmp_path) as c:
        unit: AgentUnit = c.agent
        for version in ("0.2.0", "0.3.0"):
            await c.ends(c.offer(version, unit.slot(version)), "SUCCEEDED", "updated")
        await c.runs("0.3.0", before="0.2.0")
        (slot,) = set((unit.root / "slots").glob("?" * 64)) - {unit.root / unit.current}
        program = slot / "bin" / "camera-agent"
        program.write_text(program.read_text().replace("\n  :\n", "\n  exit 1\n", 1))
        await unit.ctl("update", "rollback", "agent", "--yes", "--json", "--timeout", "2")
        starts = 1 + 4
        await c.sees(lambda: unit.lives().count("0.2.0") > starts or unit.lives()[3:].count("0.3.0"), "either of them")
        assert unit.lives()[-1] == "0.3.0", unit.lives()
        await c.online()
        async with asyncio.timeout(LIMIT_S):
            while (status := await c.updates("agent"))["state"] != "idle":
                await asyncio.sleep(0.3)
        assert status["last"]["code"] == "rollback_failed"
        assert "0.3.0 runs again" in status["last"]["message"]
        await c.runs("0.3.0")


# ---- other programs


RESTART = """#!/bin/sh
set -eu
cd "{folder}"
while [ -e hold ]; do sleep 0.02; done
version=nothing
if [ -e root/current ]; then version=$(cat root/current/version); fi
echo "$version" >>running
"""


class Pipeline:
    """A program without systemd: the restart command notes which version it started. While `hold` is there, it takes its time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        restart = folder / "restart"
        restart.write_text(RESTART.format(folder=folder))
        restart.chmod(0o755)
        self.hold = folder / "hold"
        probe = ["sh", "-c", f"! test -e {folder}/root/current/bad"]
        self.target = {"installer": "app", "root": str(folder / "root"), "restart": [str(restart)], "probe": probe}

    def version(self, version: str, *, bad: bool = False) -> Path:
        """An artifact; one that is bad fails its probe. Blocks."""
        members = [member("version", version.encode()), *(member(f"part-{n}", b"1") for n in range(20))]
        return archive(self.folder / f"pipe-{version}.tar.gz", *members, *([member("bad")] if bad else []))

    def runs(self) -> str:
        """The version that was started last."""
        running = self.folder / "running"
        return running.read_text().split()[-1] if running.exists() else ""

    def is_whole(self, version: str) -> bool:
        """This version runs, would run after a boot, and there is nothing half."""
        root = self.folder / "root"
        left = [path.name for path in (root / "slots").iterdir() if path.name.endswith((".tmp", ".new"))]
        return self.runs() == (root / "current" / "version").read_text() == version and not left


KILLED_IN = ("DOWNLOADING", "INSTALLING", "ARMED", "RESTARTING", "TRIAL", "COMMITTING", "ROLLING_BACK")
BEFORE_IT = ("RECEIVED", "VERIFIED", "PREFLIGHT", "DOWNLOADED", "WAITING")
"""Killed in these with --exhaustive only: nothing is touched yet."""


async def killed_in_an_update(folder: Path, states: Sequence[str]) -> None:
    pipeline = Pipeline(folder / "p")
    async with camera(folder / "c", AgentProcess, targets={"pipeline": pipeline.target}) as c:
        number = 1

        def offer(*, bad: bool = False) -> str:
            nonlocal number
            number += 1
            gate = {"stable_for_s": 0.2, "deadline_s": 0.5} if bad else GATE
            return c.offer(f"{number}.0", pipeline.version(f"{number}.0", bad=bad), "pipeline", gate=gate)

        await c.ends(offer(), "SUCCEEDED", "updated")
        running = f"{number}.0"
        for state in states:
            if state == "DOWNLOADING":
                c.files.held.add(f"pipe-{number + 1}.0.tar.gz")
            if state == "RESTARTING":
                pipeline.hold.touch()
            job_id = await c.killed_in(state, lambda bad=state == "ROLLING_BACK": offer(bad=bad))
            await c.files.release(f"pipe-{number}.0.tar.gz")
            pipeline.hold.unlink(missing_ok=True)
            if state == "ROLLING_BACK":
                message = await c.ends(job_id, "FAILED", "probe_failed")
                assert message.endswith(f"taken back to {running}"), message
            else:
                await c.ends(job_id, "SUCCEEDED", "updated")
                running = f"{number}.0"
            assert pipeline.is_whole(running), (state, pipeline.runs())
            assert (await c.updates("pipeline"))["version"] == running


OWN = ("INSTALLING", "RESTARTING", "TRIAL", "COMMITTING", "ROLLING_BACK")


async def test_killed_in_any_state_of_an_update_it_ends_once_with_what_then_runs(tmp_path, request):
    states = (BEFORE_IT if request.config.getoption("--exhaustive", default=False) else ()) + KILLED_IN
    await together(
        killed_in_its_own_update(tmp_path / "own", OWN),
        killed_in_an_update(tmp_path / "a", states[::2]),
        killed_in_an_update(tmp_path / "b", states[1::2]),
    )
    print(f"{len(OWN)} states of the agent's own update tried: killed in {', '.join(OWN)}")
    print(f"{len(states)} states of a program's update tried: killed in {', '.join(states)}")


# ---- without the cloud


async def offline(c: Camera) -> None:
    """Take the cloud away, and wait until the agent knows."""
    await c.relay.unplug()

    def told() -> bool:
        return any(line.get("event") == "off-line" for line in c.agent.lines())

    await c.sees(told, "off-line")


async def awaits_the_cloud(c: Camera, job_id: str) -> None:
    def awaiting() -> bool:
        return "offline_s" in c.record(job_id).get("progress", {}) or "awaited" in c.record(job_id).get("message", "")

    await c.sees(awaiting, "waiting for the cloud")
    assert not c.cloud.jobs.terminal_updates(job_id)


async def test_begun_and_finished_without_the_cloud_an_update_stays_once_the_cloud_is_back(tmp_path):
    pipeline = Pipeline(tmp_path / "p")
    async with camera(tmp_path / "c", AgentProcess, targets={"pipeline": pipeline.target}) as c:
        c.files.held.add("pipe-2.0.tar.gz")
        job_id = c.offer("2.0", pipeline.version("2.0"), "pipeline")
        await c.files.asked_for("pipe-2.0.tar.gz")
        await offline(c)
        await c.files.release("pipe-2.0.tar.gz")
        await awaits_the_cloud(c, job_id)
        assert pipeline.runs() == "2.0"
        await c.agent.kill(group=True)
        await c.agent.start()
        await c.sees(lambda: c.record(job_id)["progress"]["attempts"]["TRIAL"] == 2, "the trial of the next life")
        await c.relay.plug()
        await c.ends(job_id, "SUCCEEDED", "updated")
        assert pipeline.is_whole("2.0")


async def test_an_update_that_loses_the_cloud_is_taken_back_without_it_and_told_once_it_is_back(tmp_path):
    pipeline = Pipeline(tmp_path / "p")
    async with camera(tmp_path / "c", AgentProcess, targets={"pipeline": pipeline.target}) as c:
        await c.ends(c.offer("1.0", pipeline.version("1.0"), "pipeline"), "SUCCEEDED", "updated")
        pipeline.hold.touch()
        job_id = c.offer("2.0", pipeline.version("2.0"), "pipeline", gate=HOPELESS)
        await c.reaches(job_id, "RESTARTING")
        await offline(c)
        pipeline.hold.unlink()
        await c.sees(lambda: c.record(job_id)["status"] == "FAILED", "the decision without the cloud")
        assert pipeline.is_whole("1.0")
        assert not c.cloud.jobs.terminal_updates(job_id)
        await c.agent.kill(group=True)
        await c.agent.start()
        await c.relay.plug()
        message = await c.ends(job_id, "FAILED", "cloud_lost")
        assert message.endswith("taken back to 1.0"), message
        assert pipeline.is_whole("1.0")


async def test_the_agent_becomes_another_version_without_the_cloud_and_is_not_blamed_for_boots_meanwhile(tmp_path):
    async with camera(tmp_path) as c:
        unit: AgentUnit = c.agent
        path = unit.slot("0.2.0")
        c.files.held.add(path.name)
        job_id = c.offer("0.2.0", path)
        await c.files.asked_for(path.name)
        await offline(c)
        await c.files.release(path.name)
        for lives in range(1, 5):
            await c.sees(lambda n=lives: unit.lives()[1:] == ["0.2.0"] * n, f"{lives} lives of 0.2.0")
            await c.sees(lambda: "starts=0\n" in (unit.root / "trial").read_text(), "starts counted anew")
            await awaits_the_cloud(c, job_id)
            if lives < 4:
                await unit.kill()
        await c.relay.plug()
        await c.ends(job_id, "SUCCEEDED", "updated")
        await c.runs("0.2.0")
        assert unit.lives() == [PACKAGED] + ["0.2.0"] * 4
    print("4 starts of a version on trial tried while the cloud was away")


# ---- held


async def test_a_lock_holds_an_update_through_a_kill_until_it_is_released_or_expires(tmp_path):
    pipeline = Pipeline(tmp_path / "p")
    async with camera(tmp_path / "c", AgentProcess, targets={"pipeline": pipeline.target}) as c:
        said = await c.agent.ctl("update", "lock", "--for", "600", "--reason", "recording", "--holder", "recorder")
        assert (said.code, said.err) == (0, ""), said
        job_id = c.offer("1.0", pipeline.version("1.0"), "pipeline")
        words = await c.waits("pipeline", "recorder holds the apply lock")
        assert words.endswith("recording"), words
        await c.agent.kill(group=True)
        await c.agent.start()
        await c.waits("pipeline", "recorder holds the apply lock")
        assert pipeline.runs() == ""
        assert (await c.agent.ctl("update", "unlock", "--holder", "recorder")).code == 0
        await c.ends(job_id, "SUCCEEDED", "updated")
        assert pipeline.is_whole("1.0")

        expires = time.monotonic() + 4
        assert (await c.agent.ctl("update", "lock", "--for", "4", "--holder", "recorder")).code == 0
        job_id = c.offer("2.0", pipeline.version("2.0"), "pipeline")
        await c.waits("pipeline", "recorder holds the apply lock")
        await c.ends(job_id, "SUCCEEDED", "updated")
        assert time.monotonic() >= expires
        assert (await c.updates())["locks"] == []

        said = await c.agent.ctl("update", "rollback", "pipeline", "--json")
        assert (said.code, pipeline.runs()) == (2, "2.0"), said  # nobody is there to be asked
        said = await c.agent.ctl("update", "rollback", "pipeline", "--yes", "--json")
        assert (said.code, said.json()["went_back"]) == (0, True), said
        assert pipeline.is_whole("1.0")
        status = await c.updates("pipeline")
        assert (status["version"], status["previous"], status["last"]["code"]) == ("1.0", "2.0", "by_hand")
        await c.ends(c.offer("3.0", pipeline.version("3.0"), "pipeline"), "SUCCEEDED", "updated")
        assert pipeline.is_whole("3.0")


class BelievesItsClock(AgentUnit):
    """On a camera whose clock is synchronised, which a test machine's need not be."""

    packaged_as = "believes the clock"


async def test_outside_its_window_an_update_waits_and_says_until_when(tmp_path):
    pipeline = Pipeline(tmp_path / "p")
    opens = (datetime.now(UTC) + timedelta(hours=3)).replace(minute=30, second=0, microsecond=0)
    window = f"{opens:%H:%M}-{opens + timedelta(minutes=10):%H:%M}"
    extra = {"maintenance": {"windows": [window]}, "targets": {"pipeline": pipeline.target}}
    async with camera(tmp_path / "c", BelievesItsClock, **extra) as c:
        job_id = c.offer("1.0", pipeline.version("1.0"), "pipeline")
        words = await c.waits("pipeline", "the update window opens")
        assert f"the update window opens {opens:%a %H:%M} UTC, in " in words, words
        told = (await c.updates())["window"]
        assert (told["state"], told["windows"]) == ("closed", [window]), told
        assert abs(told["opens_at"] - opens.timestamp()) < 1, (told, opens)
        assert "the update window opens" in (await c.agent.ctl("update")).out
        await c.agent.kill()
        await c.waits("pipeline", "the update window opens")
        assert (pipeline.runs(), c.cloud.jobs.status(job_id)) == ("", "IN_PROGRESS")
        file = c.agent.config_file
        file.write_text(file.read_text().replace(window, "00:00-24:00"))
        await c.agent.kill()
        await c.ends(job_id, "SUCCEEDED", "updated")
        assert pipeline.is_whole("1.0")
