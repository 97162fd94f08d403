"""What daemon.py joins, seen from the cloud: the real process asks, judges, tells, and goes on when its parts are broken."""

import asyncio
import contextlib
import hashlib
import json
import sys
from collections import Counter

import pytest

from agent.__main__ import VERSION
from tests.fakes_updates import RELEASE, Server, archive, member, root_payload, serving, signed_manifest, signed_root
from tests.faults.agent_process import AgentProcess
from tests.faults.cloud import Cloud
from tests.faults.scene import WrappedAgent
from tests.integration.mqtt_peer import PUBLISH

AT_REST_S = 1.0
"""How long a test looks whether something happens that must not."""
SAY = '#!/bin/sh\necho "$2" >> "{ran}"\n'
NEXT = "$aws/things/cam-1/jobs/$next/get"
AGENT = {"camera-agent": {"version": VERSION, "attributes": {}}}


def say(job_id, *conditions):
    """A job that writes its name down."""
    action = {"name": "s", "type": "runHandler", "input": {"handler": "say.sh", "args": [job_id]}}
    return {"version": "1.0", "conditions": list(conditions), "steps": [{"action": action}]}


@contextlib.asynccontextmanager
async def online(folder, kind=AgentProcess, **tables):
    """A cloud and the agent, connected."""
    async with Cloud("cam-1") as cloud, kind(folder, cloud.port, "cam-1", **tables) as agent:
        agent.handler("say.sh", SAY.format(ran=folder / "ran"))
        await agent.start()
        await AgentProcess.online(agent)
        yield cloud, agent
        await agent.stop()


def ran(folder):
    return (folder / "ran").read_text().split() if (folder / "ran").exists() else []


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


@pytest.mark.conformance("C-JOBS-02", "F-10")
async def test_the_agent_asks_once_for_its_next_job_after_every_connect(tmp_path):
    async with online(tmp_path / "a") as (cloud, _):

        async def asks_once(connect):
            def asked():
                return sum(p.connection == connect and p.topic == NEXT for p in cloud.peer.of(PUBLISH))

            await until(asked)
            await asyncio.sleep(AT_REST_S)
            assert asked() == 1

        await asks_once(1)
        cloud.peer.cut()
        await asks_once(2)
        cloud.jobs.lose_notification = 1_000
        cloud.jobs.create("untold", say("untold"))
        cloud.peer.forget_sessions()
        cloud.peer.cut()
        await cloud.jobs.ended("untold")
    assert ran(tmp_path / "a") == ["untold"]


@pytest.mark.conformance("C-DOC-10", "F-07")
async def test_the_agent_judges_the_conditions_of_a_job_by_what_it_is(tmp_path):
    def condition(key, value, kind="stringEqual"):
        return {"key": key, "value": value, "type": kind}

    this = condition("thing.name", "cam-1")
    jobs = {
        "this": ([this, condition("agent.version", VERSION), condition("site", "Graz")], "SUCCEEDED", "ok"),
        "other": ([this, condition("thing.name", "cam-2")], "REJECTED", "condition_not_met"),
        "elsewhere": ([condition("site", "Linz")], "REJECTED", "condition_not_met"),
        "unknown": ([this, condition("colour", "red")], "REJECTED", "condition_unknown"),
        "odd": ([condition("thing.name", "cam-1", "numericEquals")], "REJECTED", "condition_unknown"),
    }
    async with online(tmp_path / "a", jobs={"facts": {"site": "Graz"}}) as (cloud, _):
        for job_id, (conditions, status, code) in jobs.items():
            cloud.jobs.create(job_id, say(job_id, *conditions))
            end = await cloud.jobs.ended(job_id)
            assert (end.status, end.details["reason_code"]) == (status, code), end
    assert ran(tmp_path / "a") == ["this"]


class Site:
    """A folder with update keys and a target `pipeline`, whose probe fails as long as there is a file `bad`; artifacts over HTTP."""

    def __init__(self, folder, base, server):
        self.folder, self.base, self.server = folder, base, server
        self.keys = folder / "keys"
        self.root = folder / "pipeline"
        self.keys.mkdir()
        (self.keys / "root.json").write_text(json.dumps(signed_root(root_payload())))
        probe = ["sh", "-c", f"! test -e {self.root}/current/bad"]
        target = {"installer": "app", "root": str(self.root), "restart": ["true"], "probe": probe}
        self.tables = {"updates": {"keys_dir": str(self.keys), "targets": {"pipeline": target}}}

    def update(self, version, *files, **changes):
        path = archive(self.folder / f"{version}.tar.gz", member("version", version.encode()), *map(member, files))
        self.server.content = path.read_bytes()
        described = {
            "version": version,
            "sha256": path_digest(path),
            "size": path.stat().st_size,
            "gate": {"stable_for_s": 0.1, "deadline_s": 0.5 if files else 60},
            **changes,
        }
        return {
            "version": "1.0",
            "operation": "update",
            "target": "pipeline",
            "manifest": signed_manifest(RELEASE, **described),
            "urls": [f"{self.base}/{version}"],
        }


def path_digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.conformance("C-JOBS-30")
async def test_the_agent_tells_what_runs_at_boot_after_an_update_and_after_a_roll_back(tmp_path):
    server = Server(b"")
    async with serving(server) as base, Cloud("cam-1") as cloud:
        site = Site(tmp_path, base, server)

        def shadow():
            return cloud.shadows.documents.get("$package", {}).get("state")

        async def tells(**versions):
            expected = AGENT | {name: {"version": version, "attributes": {}} for name, version in versions.items()}
            await until(lambda: shadow() == {"reported": expected})

        def say_otherwise():
            """What AWS would write on its own, or somebody did."""
            cloud.shadows.documents["$package"]["state"]["reported"]["pipe"] = {"version": "9", "attributes": {}}

        async with AgentProcess(tmp_path / "a", cloud.port, "cam-1", **site.tables) as agent:
            await agent.start()
            await tells()
            for version in ("1.0", "2.0"):
                job_id = f"to-{version[0]}"
                cloud.jobs.create(job_id, site.update(version))
                end = await cloud.jobs.ended(job_id)
                assert end.status == "SUCCEEDED", end
                await tells(pipe=version)
            say_otherwise()
            cloud.jobs.create("to-3", site.update("3.0", "bad"))
            end = await cloud.jobs.ended("to-3")
            assert (end.status, end.details["reason_code"]) == ("FAILED", "probe_failed"), end
            await tells(pipe="2.0")
            await agent.stop()
            say_otherwise()
            await agent.start()
            await tells(pipe="2.0")
            await agent.stop()


BREAKS = """
import runpy, sys

from agent.capture.capture import Capture
from agent.config.configuration import Configuration
from agent.daemon import Daemon
from agent.health.health import Health
from agent.telemetry.outbox import Outbox
from agent.telemetry.reports import Reports
from agent.updates.packages import Packages

async def broken(*_):
    raise ZeroDivisionError("a bug")

for feature in (Capture, Configuration, Health, Outbox, Packages, Reports):
    feature.run = broken
Daemon._keep_snapshots = broken
sys.argv = sys.argv[3:]
runpy.run_module("agent", run_name="__main__", alter_sys=True)
"""
BROKEN = {"capture", "configuration", "health", "outbox", "packages", "reports", "snapshot"}


class Breaking(WrappedAgent):
    """The agent with a bug in each feature that jobs don't need."""

    prefix = (sys.executable, "-c", BREAKS)


@pytest.mark.conformance("F-14")
async def test_with_every_other_feature_broken_jobs_run_and_the_agent_lives(tmp_path):
    async with Cloud("cam-1") as cloud, Breaking(tmp_path / "a", cloud.port, "cam-1") as agent:
        agent.handler("say.sh", SAY.format(ran=tmp_path / "a" / "ran"))

        def failed():
            return Counter(
                line["task"] for line in agent.lines() if line["event"] == "a task failed, starting it again"
            )

        await agent.start()
        cloud.jobs.create("before", say("before"))
        assert (await cloud.jobs.ended("before")).status == "SUCCEEDED"
        await until(lambda: not agent.running or (failed().keys() == BROKEN and min(failed().values()) >= 2))
        assert agent.running, agent.tail()
        cloud.jobs.create("after", say("after"))
        assert (await cloud.jobs.ended("after")).status == "SUCCEEDED"
        said = await AgentProcess.ctl(agent, "status", "--json")
        assert said.json()["cloud"]["state"] == "connected"
        await agent.stop()
    assert ran(tmp_path / "a") == ["before", "after"]
    print(f"{len(BROKEN)} broken features tried")
