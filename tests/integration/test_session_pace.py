"""The session's pace: CONNECTs, publishes, pings, and what is never sent."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from pydantic import ValidationError

from agent.cloud.offline import Pace
from agent.errors import CloudError
from agent.settings import Cloud
from tests.integration import mqtt_peer as mqtt
from tests.integration.connected import make_session, running
from tests.integration.mqtt_peer import Packet

THING = "cam-7"
pytestmark = pytest.mark.usefixtures("readable_logs")


def most_in_a_second(packets: list[Packet], weight=lambda _: 1) -> int:
    """The most that any window of one second held."""
    most = held = begin = 0
    for packet in packets:
        held += weight(packet)
        while packet.at - packets[begin].at >= 1:
            held -= weight(packets[begin])
            begin += 1
        most = max(most, held)
    return most


@pytest.mark.conformance("C-CONN-06")
async def test_a_hundred_drops_of_every_kind_never_bring_two_connects_too_close(peer, cloud, identity):
    least = 0.1
    pace = Pace(shortest_s=0.001, longest_s=0.002, refused_s=0.001, taken_over_s=0.001, between_connects_s=least)
    session = make_session(THING, cloud, identity, pace)
    drops = [peer.cut, peer.close, lambda: peer.disconnect(0x8B), lambda: peer.disconnect(0x8E)]
    async with running(session):
        for number in range(1, 101):
            if number % 5 == 4:
                peer.connack_reasons = [0x87 if number % 2 else -1]
            before = len(peer.of(mqtt.CONNECT))
            if number % 10 == 0:
                await session.restart_with(cloud.model_copy(update={"keep_alive_s": 30 + number}))
            else:
                drops[number % 4]()
            await peer.until(lambda: len(peer.of(mqtt.CONNECT)) > before)
            async with asyncio.timeout(20):
                await session.wait_connected()
    times = [packet.at for packet in peer.of(mqtt.CONNECT)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(gaps) >= 100
    assert min(gaps) >= least
    assert Pace().between_connects_s >= 1
    assert Pace().longest_s >= 60
    print(f"{len(gaps)} reconnects tried, the closest {min(gaps) / least:.2f} times the least distance apart")


@pytest.mark.conformance("C-CONN-17")
async def test_a_burst_of_a_thousand_is_spread_out_and_all_of_it_taken(peer, session):
    async with running(session):
        await asyncio.gather(*(session.publish("t/burst", b"%d" % number) for number in range(1000)))
    packets = peer.of(mqtt.PUBLISH)
    assert sorted(int(packet.payload) for packet in packets) == list(range(1000))
    assert not any(packet.dup for packet in packets)
    most, lasted = most_in_a_second(packets), packets[-1].at - packets[0].at
    print(f"1000 publishes tried, {most} in the fullest second, {lasted:.1f} s in all")
    assert most <= 120  # at most 90 leave in a second; what a busy machine delays arrives together
    assert len(packets) / lasted < 100


@pytest.mark.conformance("C-CONN-17")
async def test_a_burst_of_large_messages_stays_below_the_throughput_that_aws_takes(peer, session):
    count, size = 40, 100 * 1024
    async with running(session):
        await asyncio.gather(*(session.publish("t/large", bytes(size)) for _ in range(count)))
    packets = peer.of(mqtt.PUBLISH)
    assert len(packets) == count
    most = most_in_a_second(packets, lambda packet: len(packet.payload))
    print(f"{count} messages of {size >> 10} KB tried, {most >> 10} KB in the fullest second")
    assert most <= 512 * 1024 + 2 * size  # a message counts when its last byte is in


@pytest.mark.conformance("C-CONN-04")
async def test_the_keep_alive_is_what_aws_takes_and_an_idle_connection_is_pinged(peer, cloud, identity):
    assert 30 <= Cloud().keep_alive_s <= 60
    for wrong in (0, 29, 1201):
        with pytest.raises(ValidationError):
            Cloud(keep_alive_s=wrong)
    async with running(make_session(THING, cloud.model_copy(update={"keep_alive_s": 31}), identity)):
        assert peer.of(mqtt.CONNECT)[0].keep_alive == 31
    peer.connack_properties["server_keep_alive"] = 2
    async with running(make_session(THING, cloud, identity)):
        await peer.until(lambda: len(peer.of(mqtt.PINGREQ)) >= 3)
    pings = [packet.at for packet in peer.of(mqtt.PINGREQ)]
    assert all(0.5 <= later - earlier <= 4 for earlier, later in itertools.pairwise(pings))


@pytest.mark.conformance("C-CONN-04")
async def test_without_an_answer_to_pings_the_connection_is_given_up(peer, cloud, identity):
    peer.connack_properties["server_keep_alive"] = 1
    peer.silent_kinds = {mqtt.PINGREQ}
    session = make_session(
        THING, cloud.model_copy(update={"keep_alive_s": 2}), identity
    )  # waits half of it for a PINGRESP
    codes: list[str] = []
    session.on_link(lambda link: codes.append(link.code))
    async with running(session):
        await peer.until(lambda: len(peer.of(mqtt.CONNECT)) == 2)
    assert "no_answer" in codes


@pytest.mark.conformance("C-CONN-05")
async def test_nothing_is_sent_before_the_connack(peer, session):
    peer.connack_gate.clear()
    session.subscribe("t/a", lambda *_: None)
    async with running(session, connected=False):
        await peer.until(lambda: peer.of(mqtt.CONNECT))
        with pytest.raises(CloudError) as caught:
            await session.publish("t/b", b"early")
        assert caught.value.code == "offline"
        with pytest.raises(CloudError) as caught:
            await session.request("t/c", {})
        assert caught.value.code == "offline"
        session.subscribe("t/d", lambda *_: None)
        await asyncio.sleep(1)  # long enough for anything that does not wait
        assert peer.early == []
        peer.connack_gate.set()
        async with asyncio.timeout(20):
            await session.wait_connected()
        await session.publish("t/b", b"late")
    assert [packet.kind for packet in peer.packets[:2]] == [mqtt.CONNECT, mqtt.SUBSCRIBE]
    assert peer.early == []


@pytest.mark.conformance("C-CONN-15", "C-CONN-30")
async def test_neither_retain_nor_qos_2_nor_subscription_identifiers_are_sent(peer, cloud, identity):
    session = make_session(THING, cloud, identity, announce=lambda nonce, alive: ("t/presence", nonce.encode()))
    peer.serve("svc/get", lambda packet: [("svc/get/accepted", {"clientToken": packet.json()["clientToken"]})])
    session.subscribe_replies("svc/get/+")
    session.subscribe(f"$aws/things/{THING}/jobs/notify-next", lambda *_: None)
    async with running(session):
        await session.request("svc/get", {})
        for topic in ("t/a", f"$aws/things/{THING}/shadow/name/config/get", "$aws/rules/fleet/t/report"):
            await session.publish(topic, b"{}")
        await peer.until(lambda: peer.of(mqtt.PUBLISH, topic="t/presence"))
    assert len(peer.of(mqtt.PUBLISH)) == 5
    assert all(packet.qos == 1 and not packet.retain and not packet.properties for packet in peer.of(mqtt.PUBLISH))
    assert all(packet.qos == 1 and not packet.properties for packet in peer.of(mqtt.SUBSCRIBE))
    assert not any(packet.will_retain or packet.will_qos == 2 for packet in peer.of(mqtt.CONNECT))


@pytest.mark.conformance("C-CONN-13")
async def test_the_fifty_first_subscription_is_refused_here(peer, session):
    for number in range(50):
        session.subscribe(f"t/{number}", lambda *_: None)
    session.subscribe("t/0", lambda *_: None)  # a second handler is no second subscription
    with pytest.raises(CloudError) as caught:
        session.subscribe("t/50", lambda *_: None)
    assert (caught.value.code, caught.value.retryable) == ("too_many_subscriptions", False)
    async with running(session):
        assert session.link.code == ""
    sent = [packet.filters for packet in peer.of(mqtt.SUBSCRIBE)]
    assert max(len(filters) for filters in sent) == 8
    assert sum(len(filters) for filters in sent) == 50


@pytest.mark.conformance("C-CONN-28")
@pytest.mark.parametrize(
    "topic_filter", ["$aws/rules/fleet/t", "$aws/rules/#", "$share/g/$aws/rules/r/a", "a/#/b", "a+", ""]
)
async def test_a_filter_that_aws_would_not_take_is_never_sent(peer, session, topic_filter):
    async with running(session):
        for declare in (
            lambda: session.subscribe(topic_filter, lambda *_: None),
            lambda: session.subscribe_replies(topic_filter),
        ):
            with pytest.raises(CloudError) as caught:
                declare()
            assert caught.value.code == "filter_not_valid"
        await session.publish("$aws/rules/fleet/t", b"published is fine")
    assert not peer.of(mqtt.SUBSCRIBE)


@pytest.mark.conformance("C-CONN-09")
async def test_after_a_lost_session_all_is_subscribed_before_anything_is_asked(peer, session):
    for number in range(20):
        session.subscribe(f"t/{number}", lambda *_: None)

    async def ask() -> None:
        await session.publish("svc/get", b"")

    session.on_ready(ask)
    async with running(session):
        await peer.until(lambda: peer.of(mqtt.PUBLISH))
        for number in range(2, 6):
            peer.forget_sessions()
            peer.cut()
            await peer.until(lambda: len(peer.of(mqtt.PUBLISH)) == number)
    for connection in range(1, 6):
        kinds = [
            p.kind for p in peer.packets if p.connection == connection and p.kind in (mqtt.SUBSCRIBE, mqtt.PUBLISH)
        ]
        assert kinds[:4] == [mqtt.SUBSCRIBE] * 3 + [mqtt.PUBLISH]
    print("5 new sessions tried")


@pytest.mark.conformance("C-CONN-25")
async def test_a_session_that_ended_earlier_than_asked_is_noticed(peer, cloud, session):
    assert cloud.session_expiry_s <= 3600
    peer.connack_properties["session_expiry_interval"] = 1
    session.subscribe("t/a", lambda *_: None)
    async with running(session):
        assert peer.of(mqtt.CONNECT)[0].properties["session_expiry_interval"] == 3600
        peer.cut()
        await peer.until(lambda: len(peer.of(mqtt.CONNECT)) == 2)
        async with asyncio.timeout(20):
            await session.wait_connected()
        assert session.link.session_present
        assert len(peer.of(mqtt.SUBSCRIBE)) == 1
        peer.forget_sessions()  # as the server said it would: nothing here counts on the hour that was asked for
        peer.cut()
        await peer.until(lambda: len(peer.of(mqtt.SUBSCRIBE)) == 2)
        async with asyncio.timeout(20):
            await session.wait_connected()
        assert not session.link.session_present
