"""The shadow client against the scripted server and against a local AWS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from agent import logs
from agent.cloud.session import Rejected
from agent.cloud.shadow import Shadow, ShadowClient
from agent.errors import CloudError
from agent.sandbox import seed
from tests.certificates import Authority
from tests.integration import mqtt_peer as mqtt
from tests.integration.connected import Cloud, LocalAws, local_aws, make_session, running
from tests.integration.mqtt_peer import MqttPeer

THING = "cam-7"
SHADOW = f"$aws/things/{THING}/shadow/name/config"


@pytest.fixture(autouse=True)
def _readable_logs() -> None:
    logs.configure("console")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
async def peer(authority: Authority) -> AsyncIterator[MqttPeer]:
    async with MqttPeer(authority.server_context()) as server:
        yield server


@pytest.fixture
def session(peer, authority):
    cloud = Cloud(endpoint="localhost", port=peer.port, ca_file=authority.ca_file)
    return make_session(THING, cloud, authority.client(THING))


def answer(outcome: str, **body):
    def service(packet):
        yield f"{packet.topic}/{outcome}", {**body, "clientToken": packet.json()["clientToken"]}

    return service


class TestWire:
    @pytest.mark.conformance("C-SHDW-01")
    async def test_only_exact_topics_are_subscribed(self, peer, session):
        ShadowClient(session, THING, "config").on_delta(lambda *_: None)
        async with running(session):
            pass
        subscribed = [name for packet in peer.of(mqtt.SUBSCRIBE) for name in packet.filters]
        assert subscribed == [
            f"{SHADOW}/{name}"
            for name in (
                *("get/accepted", "get/rejected", "update/accepted", "update/rejected"),
                *("update/delta", "delete/accepted"),
            )
        ]

    async def test_no_shadow_yet_is_none(self, peer, session):
        peer.serve(f"{SHADOW}/get", answer("rejected", code=404, message="No shadow exists with name: 'config'"))
        async with running(session):
            pass
        shadow = ShadowClient(session, THING, "config")
        async with running(session):
            assert await shadow.get() is None

    @pytest.mark.parametrize(
        ("code", "retryable"), [(409, False), (400, False), (413, False), (429, True), (500, True)]
    )
    async def test_a_rejection_tells_whether_to_try_again(self, peer, session, code, retryable):
        peer.serve(f"{SHADOW}/update", answer("rejected", code=code, message="no"))
        shadow = ShadowClient(session, THING, "config")
        async with running(session):
            with pytest.raises(Rejected) as caught:
                await shadow.report({"a": 1})
        assert (caught.value.code, caught.value.retryable) == (str(code), retryable)

    @pytest.mark.conformance("C-SHDW-07")
    async def test_only_reported_is_written_and_without_a_version(self, peer, session):
        peer.serve(f"{SHADOW}/update", answer("accepted", version=4, state={}))
        shadow = ShadowClient(session, THING, "config")
        async with running(session):
            assert await shadow.report({"a": 1, "b": None}) == 4
        body = peer.of(mqtt.PUBLISH)[0].json()
        assert body.pop("clientToken")
        assert body == {"state": {"reported": {"a": 1, "b": None}}}

    @pytest.mark.conformance("C-SHDW-04")
    async def test_old_repeated_and_malformed_deltas_are_left_out(self, peer, session):
        shadow = ShadowClient(session, THING, "config")
        arrived: asyncio.Queue[tuple] = asyncio.Queue()
        shadow.on_delta(lambda *delta: arrived.put_nowait(delta))
        async with running(session), asyncio.timeout(10):
            for payload in (b"x", b"[]", {"version": "5", "state": {}}, {"version": 5, "state": 1}, {"version": 1}):
                peer.send(f"{SHADOW}/update/delta", payload)
            for version in (5, 5, 4, 6):
                peer.send(f"{SHADOW}/update/delta", {"version": version, "state": {"v": version}})
            assert await arrived.get() == (5, {"v": 5})
            assert await arrived.get() == (6, {"v": 6})
            peer.serve(f"{SHADOW}/get", answer("rejected", code=404, message="gone"))
            assert await shadow.get() is None  # versions start anew
            peer.send(f"{SHADOW}/update/delta", {"version": 1, "state": {"v": 1}})
            assert await arrived.get() == (1, {"v": 1})

    @pytest.mark.parametrize(
        "body", [{"version": "x"}, {"state": {}}, {"version": True, "state": {}}, {"version": 1, "state": "x"}, {}]
    )
    async def test_a_reply_without_a_shadow_raises(self, peer, session, body):
        peer.serve(f"{SHADOW}/get", answer("accepted", **body))
        shadow = ShadowClient(session, THING, "config")
        async with running(session):
            with pytest.raises(CloudError) as caught:
                await shadow.get()
        assert (caught.value.code, caught.value.retryable) == ("malformed_reply", True)

    @pytest.mark.parametrize(
        ("state", "desired", "reported"),
        [
            (None, {}, {}),
            ({}, {}, {}),
            ({"desired": None, "reported": None}, {}, {}),
            ({"desired": [1], "reported": [1], "delta": [1]}, [1], {}),
            ({"desired": "x", "reported": "x"}, "x", {}),
            ({"desired": {"a": 1}, "reported": {"b": 1}}, {"a": 1}, {"b": 1}),
        ],
    )
    async def test_a_section_in_another_form_is_told_apart_from_none(self, peer, session, state, desired, reported):
        peer.serve(f"{SHADOW}/get", answer("accepted", version=3, metadata={}, state=state))
        shadow = ShadowClient(session, THING, "config")
        async with running(session):
            assert await shadow.get() == Shadow(3, desired, reported, {})

    async def test_a_delta_that_comes_while_a_report_is_under_way_is_told_after_its_answer(self, peer, session):
        """Whatever the order of the two, and also when the report fails: what an operator did is never left out."""
        shadow, arrived = ShadowClient(session, THING, "config"), []
        shadow.on_delta(lambda version, _: arrived.append(version))
        script: list[tuple[int, list[int]]] = [(2, [2]), (4, [3, 4]), (6, [6, 5]), (0, [8])]
        expected = [[], [4], [6], [8]]

        def service(packet):
            version, deltas = script.pop(0)
            for number in deltas:
                yield f"{SHADOW}/update/delta", {"version": number, "state": {"v": number}}
            body = {"version": version} if version else {"code": 400, "message": "no"}
            token = packet.json()["clientToken"]
            yield f"{packet.topic}/{'accepted' if version else 'rejected'}", {**body, "clientToken": token}

        peer.serve(f"{SHADOW}/update", service)
        peer.serve(f"{SHADOW}/get", answer("accepted", version=1, state={}))
        async with running(session):
            await shadow.get()
            for told in expected:
                arrived.clear()
                try:
                    await shadow.report({"a": 1})
                except Rejected as error:
                    assert error.code == "400"
                assert arrived == told


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalAws]:
    with local_aws(tmp_path_factory.mktemp("aws")) as started:
        yield started


async def test_desired_and_reported_against_a_local_aws(local):
    pair = await asyncio.to_thread(local.camera, "cam-one")
    session = make_session("cam-one", local.cloud, pair)
    shadow = ShadowClient(session, "cam-one", "config")
    arrived: asyncio.Queue[tuple] = asyncio.Queue()
    shadow.on_delta(lambda *delta: arrived.put_nowait(delta))
    async with running(session), asyncio.timeout(30):
        assert await shadow.get() is None
        first = await shadow.report({"agent": {"fps": 10, "old": 1}})
        version = await asyncio.to_thread(seed.set_desired, local.aws, "cam-one", {"agent": {"fps": 15}})
        assert version == first + 1
        assert await arrived.get() == (version, {"agent": {"fps": 15}})
        assert await shadow.get() == Shadow(
            version, {"agent": {"fps": 15}}, {"agent": {"fps": 10, "old": 1}}, {"agent": {"fps": 15}}
        )
        await shadow.report({"agent": {"fps": 15, "old": None}})
        state = await asyncio.to_thread(seed.shadow_state, local.aws, "cam-one")
        assert state == {"desired": {"agent": {"fps": 15}}, "reported": {"agent": {"fps": 15}}}
