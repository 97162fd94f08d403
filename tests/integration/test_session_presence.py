"""Last will and birth message of the session against the scripted server; what AWS IoT refuses of them locks nobody out."""

from __future__ import annotations

import asyncio
import json

import pytest

from agent.cloud.session import Session
from agent.settings import Cloud
from tests.certificates import Pair
from tests.integration import mqtt_peer as mqtt
from tests.integration.connected import child, line_of, link_where, make_session, running
from tests.integration.mqtt_peer import MqttPeer

THING, TOPIC = "cam-7", "t/presence"
pytestmark = pytest.mark.usefixtures("readable_logs")


@pytest.fixture
def session(cloud: Cloud, identity: Pair) -> Session:
    return make_session(THING, cloud, identity, announce=announce)


def announce(nonce: str, alive: bool) -> tuple[str, bytes]:
    return TOPIC, json.dumps({"nonce": nonce, "alive": alive}).encode()


def births(peer: MqttPeer) -> list[dict]:
    return [packet.json() for packet in peer.of(mqtt.PUBLISH, topic=TOPIC)]


def wills(peer: MqttPeer) -> list[dict | None]:
    return [json.loads(packet.will[1]) if packet.will else None for packet in peer.of(mqtt.CONNECT)]


@pytest.mark.conformance("C-CONN-20", "C-CONN-30")
async def test_each_connection_has_its_nonce_in_the_will_and_one_birth(peer, session):
    async with running(session):
        for number in range(1, 4):
            await peer.until(lambda: len(births(peer)) == number)
            peer.cut()
            await peer.until(lambda: len(peer.wills) == number)
        await peer.until(lambda: len(births(peer)) == 4)
    assert all(p.will_qos == 1 and not p.will_retain for p in peer.of(mqtt.CONNECT))
    assert all(p.qos == 1 and not p.retain for p in peer.of(mqtt.PUBLISH))
    assert [will and will["alive"] for will in wills(peer)] == [False] * 4
    assert all(birth["alive"] for birth in births(peer))
    nonces = [birth["nonce"] for birth in births(peer)]
    assert nonces == [will and will["nonce"] for will in wills(peer)]
    assert len(set(nonces)) == 4
    # What a late will of the first connection would be told by.
    assert [json.loads(payload)["nonce"] for _, payload in peer.wills] == nonces[:3]


async def test_the_birth_waits_for_the_subscriptions_and_delays_no_callback(peer, session):
    peer.silent_kinds = {mqtt.SUBSCRIBE, mqtt.PUBLISH}
    session.subscribe("t/a", lambda *_: None)
    called = asyncio.Event()

    async def ready() -> None:
        called.set()

    session.on_ready(ready)
    async with running(session, connected=False):
        await peer.until(lambda: peer.of(mqtt.SUBSCRIBE))
        await asyncio.sleep(0.2)
        assert not births(peer)
        peer.silent_kinds = {mqtt.PUBLISH}
        peer.cut()
        await peer.until(lambda: births(peer))  # it is never acknowledged …
        async with asyncio.timeout(10):
            await called.wait()  # … and nobody waits for it
            await session.wait_connected()


@pytest.mark.conformance("C-CONN-19")
async def test_a_clean_stop_leaves_no_will_and_a_kill_leaves_one(peer, cloud, identity):
    script = """
        async def main():
            task = asyncio.create_task(session.run())
            await session.wait_connected()
            tell("READY")
            await asyncio.sleep(60)

        session = make_session(announce=lambda nonce, alive: ("t/presence", nonce.encode()))
        asyncio.run(main())
    """
    async with child(script, cloud, identity) as process:
        await line_of(process, "READY")
        process.kill()
        await peer.until(lambda: peer.wills)
    connect = peer.of(mqtt.CONNECT)[0]
    assert peer.wills == [connect.will]
    assert not peer.of(mqtt.DISCONNECT)
    async with running(make_session(THING, cloud, identity, announce=announce)):
        pass
    await peer.until(lambda: peer.of(mqtt.DISCONNECT) and not peer.connections)
    assert peer.of(mqtt.DISCONNECT)[0].reason == 0
    assert len(peer.wills) == 1


@pytest.mark.parametrize("reason", [0x87, 0x90, 0x80, 0x9B])
async def test_a_forbidden_will_is_left_out_and_that_is_remembered(peer, session, reason):
    peer.refuse_wills[TOPIC] = reason
    async with running(session):
        peer.cut()
        await peer.until(lambda: len(peer.of(mqtt.CONNECT)) == 3 and peer.connections)
    assert [will is None for will in wills(peer)] == [False, True, True]
    assert {birth["alive"] for birth in births(peer)} <= {True}


async def test_a_will_that_closes_the_connection_is_left_out_too(peer, session):
    peer.refuse_wills[TOPIC] = -1
    async with running(session):
        for number in (4, 5):
            peer.cut()
            await peer.until(lambda: len(peer.of(mqtt.CONNECT)) == number and peer.connections)
    assert [will is None for will in wills(peer)] == [False, True, False, True, True]


async def test_when_the_will_was_not_the_cause_it_comes_back(peer, session):
    peer.connack_reasons = [0x87] * 3
    async with running(session):
        peer.cut()
        await peer.until(lambda: len(peer.of(mqtt.CONNECT)) == 5 and peer.connections)
    assert [will is None for will in wills(peer)] == [False, True, False, True, False]


async def test_other_settings_try_the_will_again(peer, cloud, session):
    peer.refuse_wills[TOPIC] = 0x87
    async with running(session):
        peer.refuse_wills.clear()
        await session.restart_with(cloud.model_copy(update={"keep_alive_s": 77}))
        async with asyncio.timeout(20):
            await session.wait_connected()
    assert [will is None for will in wills(peer)] == [False, True, False]


@pytest.mark.parametrize("reason", [0x87, 0x97, 0x90])
async def test_a_refused_birth_harms_nothing(peer, session, reason):
    peer.refuse_topics[TOPIC] = reason
    async with running(session):
        await peer.until(lambda: births(peer))
        await session.publish("t/other", b"")
        assert session.link.state == "connected"
    assert len(peer.of(mqtt.CONNECT)) == 1


async def test_a_birth_that_costs_the_connection_is_not_sent_again(peer, session):
    peer.disconnect_topics[TOPIC] = 0x87
    async with running(session, connected=False):
        await link_where(session, lambda link: link.code == "not_authorised")
        async with asyncio.timeout(20):
            await session.wait_connected()
        await session.publish("t/other", b"")
    assert len(peer.of(mqtt.CONNECT)) == 2
    assert len(births(peer)) == 1
