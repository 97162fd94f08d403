"""The shadow `$package` tells what runs: at each start, after each update, also after a roll-back, and nothing else."""

import asyncio
import contextlib

import pytest

from agent.cloud.shadow import ShadowClient
from agent.errors import CloudError
from agent.settings import Cloud
from agent.store import Store
from agent.updates import packages as packages_module
from agent.updates.packages import SHADOW, Packages, packages
from tests.certificates import Authority
from tests.integration.connected import make_session, running
from tests.integration.mqtt_peer import PUBLISH, MqttPeer


@pytest.fixture
async def store(tmp_path):
    opened = await Store.open(tmp_path / "state.db")
    yield opened
    await opened.close()


class Versions:
    def __init__(self, **versions):
        self.versions = versions
        self.changed = asyncio.Event()

    def set(self, **versions):
        self.versions = versions
        self.changed.set()


@contextlib.asynccontextmanager
async def reporting(store, versions, report, wait_online):
    part = Packages(
        store, versions=lambda: versions.versions, changed=versions.changed, report=report, wait_online=wait_online
    )
    task = asyncio.create_task(part.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def online():
    return


class Shadow:
    """Takes reports, or refuses as told."""

    def __init__(self):
        self.reports = asyncio.Queue()
        self.refuse = []

    async def report(self, reported):
        await self.reports.put(reported)
        if self.refuse:
            raise self.refuse.pop(0)
        return 1

    async def next(self):
        async with asyncio.timeout(10):
            return await self.reports.get()


@pytest.mark.conformance("C-JOBS-30")
async def test_the_shadow_says_what_runs_at_the_start_after_an_update_and_after_going_back(store, tmp_path):
    authority = Authority(tmp_path)
    versions = Versions(pipeline="1.0", **{"camera-agent": "0.1.0"})
    async with MqttPeer(authority.server_context()) as peer:
        base = "$aws/things/cam-1/shadow/name/$package/update"
        peer.serve(base, lambda request: [(base + "/accepted", {**request.json(), "version": 7})])
        cloud = Cloud(endpoint="localhost", port=peer.port, ca_file=authority.ca_file)
        session = make_session("cam-1", cloud, authority.client("cam-1"))
        shadow = ShadowClient(session, "cam-1", SHADOW)

        async def told(count):
            def sent():
                found = [p.json()["state"] for p in peer.packets if p.kind == PUBLISH and p.topic == base]
                return found if len(found) >= count else None

            return (await peer.until(sent))[-1]

        async with running(session), reporting(store, versions, shadow.report, session.wait_connected):
            assert await told(1) == {
                "reported": {
                    "pipeline": {"version": "1.0", "attributes": {}},
                    "camera-agent": {"version": "0.1.0", "attributes": {}},
                }
            }
            versions.set(pipeline="2.0")
            assert (await told(2))["reported"]["pipeline"] == {"version": "2.0", "attributes": {}}
            versions.set(pipeline="1.0")
            assert (await told(3))["reported"]["pipeline"] == {"version": "1.0", "attributes": {}}


async def test_a_package_that_is_gone_is_removed_also_across_a_restart(store):
    versions, shadow = Versions(old="1"), Shadow()
    async with reporting(store, versions, shadow.report, online):
        await shadow.next()
        versions.set(new="2")
        assert await shadow.next() == {"old": None, "new": {"version": "2", "attributes": {}}}
    versions = Versions(newer="3")
    async with reporting(store, versions, shadow.report, online):
        assert await shadow.next() == {"new": None, "newer": {"version": "3", "attributes": {}}}


async def test_a_lost_answer_is_told_again_and_a_refusal_waits_for_the_next_change(store, monkeypatch):
    monkeypatch.setattr(packages_module, "RETRY_S", (0.01, 0.02))
    versions, shadow = Versions(a="1"), Shadow()
    shadow.refuse = [CloudError("no_answer", "none", retryable=True), CloudError("400", "not allowed")]
    async with reporting(store, versions, shadow.report, online):
        assert await shadow.next() == await shadow.next()
        versions.set(a="2")
        assert await shadow.next() == {"a": {"version": "2", "attributes": {}}}
    assert shadow.reports.empty()


@pytest.mark.parametrize("name", ["", "a b", "a/b", "ä", "x" * 129])
def test_what_aws_would_not_take_is_left_out(name):
    assert packages({name: "1", "good": "1.0~rc1", "fine": "2.0-1_b"}) == {
        "fine": {"version": "2.0-1_b", "attributes": {}}
    }
