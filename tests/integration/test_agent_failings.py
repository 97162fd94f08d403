"""Where other agents fail, seen from outside: the real process ended, booted without a network, at rest; and the unit file."""

import asyncio
import configparser
import random
from pathlib import Path

import psutil
import pytest

from agent import settings
from tests.certificates import Authority
from tests.faults.agent_process import AgentProcess
from tests.faults.cloud import Cloud
from tests.integration.connected import make_session, running
from tests.integration.mqtt_peer import MqttPeer

UNIT = Path(__file__).parents[2] / "systemd" / "camera-agent.service"
DOCUMENT = {
    "version": "1.0",
    "steps": [{"action": {"name": "s", "type": "runHandler", "input": {"handler": "say.sh"}}}],
}
STOPS = 10
AT_REST_S = 10
MOST_AT_REST = 0.025


@pytest.mark.conformance("F-11")
async def test_sigterm_at_any_moment_ends_it_cleanly(tmp_path):
    async with Cloud("cam-1") as cloud, AgentProcess(tmp_path / "agent", cloud.port, "cam-1") as agent:
        agent.handler("say.sh", "#!/bin/sh\nsleep 0.3\necho done\n")
        moments = random.Random(11)
        for number in range(STOPS):
            cloud.jobs.create(f"job-{number}", DOCUMENT)
            agent.socket.unlink(missing_ok=True)
            await agent.start()
            async with asyncio.timeout(60):
                while not agent.socket.exists():
                    await asyncio.sleep(0.01)
            await asyncio.sleep(moments.random())
            await agent.stop()
        await agent.start()
        for number in range(STOPS):
            await cloud.jobs.ended(f"job-{number}")
        await agent.stop()
        print(f"{STOPS + 1} SIGTERMs tried")


@pytest.mark.conformance("F-15", "F-16")
async def test_booted_without_a_network_it_works_off_line_and_connects_when_there_is_one(tmp_path):
    async with Cloud("cam-1") as cloud:
        port = cloud.port
    async with AgentProcess(tmp_path / "agent", port, "cam-1", cloud={"port": port}) as agent:
        await agent.start()
        async with asyncio.timeout(60):
            while True:
                said = await agent.ctl("status", "--json")
                if said.code == 0 and said.json()["cloud"]["state"] == "offline":
                    break
                await asyncio.sleep(0.2)
        assert said.json()["cloud"]["code"]
        cloud.peer.port = port
        async with cloud:
            await agent.online(120)
            await cloud.peer.until(lambda: len(cloud.reports) >= 2, 60)
        await agent.stop()
    numbers = [report["seq"] for report in cloud.reports]
    assert min(numbers) <= 1, "what was reported before there was a network was kept"


@pytest.mark.conformance("F-23")
async def test_a_new_certificate_is_used_at_the_next_connect(tmp_path):
    authority = Authority(tmp_path / "certificates")
    async with MqttPeer(authority.server_context()) as peer:
        pair = authority.client("cam-1")
        session = make_session(
            "cam-1", settings.Cloud(endpoint="localhost", port=peer.port, ca_file=authority.ca_file), pair
        )
        async with running(session):
            before = session.certificate_id
            assert authority.client("cam-1") == pair  # other contents in the same files
            peer.cut()
            async with asyncio.timeout(20):
                while session.link.connects < 2:
                    await asyncio.sleep(0.01)
            assert session.certificate_id != before


@pytest.mark.conformance("F-26")
def test_the_unit_is_not_root_is_sandboxed_watched_and_started_again():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read_string("\n".join(line for line in UNIT.read_text().splitlines() if not line.startswith("#")))
    service = unit["Service"]
    assert service["User"] not in ("", "root", "0")
    assert service["Restart"] in ("on-failure", "always")
    assert service["Type"] == "notify"
    assert int(service["WatchdogSec"]) > 0
    assert service["CapabilityBoundingSet"] == ""
    assert service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert "SystemCallFilter" in service


@pytest.mark.conformance("F-27")
async def test_at_rest_it_takes_next_to_nothing(tmp_path):
    """CPU time does not depend on how busy the machine is as wall time does; the bound is wide."""
    seldom = {"telemetry": {"interval_s": 60}}
    async with Cloud("cam-1") as cloud, AgentProcess(tmp_path / "agent", cloud.port, "cam-1", **seldom) as agent:
        await agent.start()
        await agent.online()
        process = psutil.Process(agent._process.pid)
        await asyncio.sleep(2)
        before = process.cpu_times()
        await asyncio.sleep(AT_REST_S)
        after = process.cpu_times()
        await agent.stop()
    share = (after.user + after.system - before.user - before.system) / AT_REST_S
    print(f"{share:.2%} of a core at rest, over {AT_REST_S} s tried")
    assert share < MOST_AT_REST
