"""The session is moved to other settings and back: at once, cleanly, without a loss, and proven over the new connection."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from agent.cloud import fallback, pacing
from agent.cloud.connection import Connection, abandoned
from agent.cloud.offline import Diagnosis, Link, Pace
from agent.cloud.pacing import Pacing
from agent.cloud.session import Session
from agent.errors import CloudError
from agent.settings import Cloud
from tests.faults.relay import Relay
from tests.integration import mqtt_peer as mqtt
from tests.integration.connected import QUICK, link_where, make_session, running
from tests.integration.http_proxy import HttpProxy
from tests.integration.mqtt_peer import MqttPeer

THING = "cam-7"
MOVES, MOMENTS_TRIED = 200, 30
pytestmark = pytest.mark.usefixtures("readable_logs")


def announce(nonce: str, alive: bool) -> tuple[str, bytes]:
    return "t/presence", f"{nonce} {alive}".encode()


def changed(cloud: Cloud, **changes) -> Cloud:
    """As the shadow would set it, checked as such."""
    return Cloud(**{**cloud.model_dump(), **changes})


@pytest.fixture
async def unused_port() -> int:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


@pytest.fixture
async def relay(peer: MqttPeer) -> AsyncIterator[Relay]:
    async with Relay(peer.port) as relay:
        yield relay


async def connected(session: Session) -> None:
    async with asyncio.timeout(40):
        await session.wait_connected()


@contextlib.asynccontextmanager
async def listener(answer: bytes = b"") -> AsyncIterator[int]:
    """The port of a server that takes connections, says `answer`, and nothing more."""
    tasks: set[asyncio.Task] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            writer.write(answer)
            await reader.read()
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class LastingPeer(MqttPeer):
    """Sends again what was not acknowledged when the session is resumed, as AWS IoT does."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.unacknowledged: dict[tuple[int, int], tuple[str, bytes]] = {}

    def _greet(self, client, connect) -> bool:
        publish = client.publish

        def tracked(topic: str, payload: bytes, qos: int) -> None:
            publish(topic, payload, qos)
            self.unacknowledged[client.number, client._packet_id] = (topic, payload)

        client.publish = tracked
        stored = self._sessions.get(connect.client_id)
        if stored and not connect.clean_start:
            stored.waiting[:0] = self.unacknowledged.values()
        self.unacknowledged.clear()
        return super()._greet(client, connect)

    def _handle(self, client, packet, answered) -> bool:
        if packet.kind == mqtt.PUBACK:
            self.unacknowledged.pop((client.number, packet.packet_id), None)
        return super()._handle(client, packet, answered)


class TestMoving:
    async def test_the_same_settings_again_change_nothing(self, peer, cloud, session):
        async with running(session):
            states: list[Link] = []
            session.on_link(states.append)
            for _ in range(3):
                await session.restart_with(changed(cloud))
            await session.publish("t", b"still there")
            assert session.connected_with(cloud)
        assert len(peer.of(mqtt.CONNECT)) == 1
        assert [link.state for link in states] == ["stopped"]

    async def test_before_and_after_run_the_settings_are_only_taken(self, peer, cloud, identity, authority):
        session = make_session(THING, changed(cloud, port=1), identity)
        await session.restart_with(changed(cloud, port=2))
        await session.restart_with(cloud)
        assert session.link.state == "stopped"
        assert not session.connected_with(cloud)
        async with running(session):
            assert session.connected_with(cloud)
            assert session.link.via == f"port {peer.port}"
        assert len(peer.of(mqtt.CONNECT)) == 1
        async with MqttPeer(authority.server_context()) as other:
            await session.restart_with(changed(cloud, port=other.port))
            assert session.link.state == "stopped"
            async with running(session):
                assert len(other.of(mqtt.CONNECT)) == 1
                assert session.link.via == f"port {other.port}"
        assert len(peer.of(mqtt.CONNECT)) == 1

    async def test_what_is_in_flight_fails_at_once_and_may_be_repeated(self, peer, cloud, session, authority):
        peer.silent_kinds = {mqtt.PUBLISH}
        session.subscribe_replies("svc/+/+")
        async with MqttPeer(authority.server_context()) as other, running(session):
            sending = [asyncio.create_task(session.publish("t", b"%d" % number)) for number in range(40)]
            asking = [asyncio.create_task(session.request(f"svc/{number}", {})) for number in range(10)]
            await peer.until(lambda: len(peer.of(mqtt.PUBLISH)) >= 20)
            await session.restart_with(changed(cloud, port=other.port))
            results = await asyncio.gather(*sending, *asking, return_exceptions=True)
            assert all(isinstance(result, CloudError) and result.retryable for result in results)
            # Had one waited for its time to run out, it would be `no_answer`.
            assert {result.code for result in results} <= {"connection_ended", "connection_lost", "offline"}
            with pytest.raises(CloudError, match="no connection"):
                await session.publish("t", b"")
            await connected(session)
            assert not session._replies
            await session.publish("t", b"again")
            assert [packet.payload for packet in other.of(mqtt.PUBLISH)] == [b"again"]
        print(f"{len(results)} messages and requests in flight tried")

    @pytest.mark.conformance("C-CONN-05", "C-CONN-19")
    @pytest.mark.parametrize("held", [False, True], ids=["connected", "connecting"])
    async def test_a_move_publishes_no_will(self, peer, cloud, identity, authority, held):
        session = make_session(THING, cloud, identity, announce=announce, pace=Pace(between_connects_s=1))
        async with MqttPeer(authority.server_context()) as other:
            if held:
                peer.connack_gate.clear()
            async with running(session, connected=not held):
                await peer.until(lambda: peer.of(mqtt.CONNECT))
                await session.restart_with(changed(cloud, port=other.port))
                peer.connack_gate.set()
                await connected(session)
                await peer.until(lambda: peer.of(mqtt.DISCONNECT) and not peer.connections)
        assert [packet.reason for packet in peer.of(mqtt.DISCONNECT)] == [0]
        assert not peer.wills
        assert not peer.early  # no goodbye before the CONNACK
        assert peer.of(mqtt.CONNECT)[0].will != other.of(mqtt.CONNECT)[0].will

    @pytest.mark.conformance("C-CONN-06")
    async def test_moves_in_a_loop_keep_connects_apart(self, peer, cloud, identity):
        least, moves = 0.1, 100
        session = make_session(THING, cloud, identity, pace=Pace(shortest_s=0.001, between_connects_s=least))
        chance = random.Random(6)
        async with running(session):
            for number in range(moves):
                await session.restart_with(changed(cloud, keep_alive_s=46 + number))
                await asyncio.sleep(chance.choice((0, 0, 0, least / 10, least)))
            await connected(session)
        times = [packet.at for packet in peer.of(mqtt.CONNECT)]
        assert peer.of(mqtt.CONNECT)[-1].keep_alive == 46 + moves - 1
        assert min(later - earlier for earlier, later in itertools.pairwise(times)) >= least
        print(f"{moves} moves in a loop tried, {len(times)} CONNECTs")


class TestProof:
    """What arrives over the old connection after the move proves nothing."""

    async def test_late_answers_of_the_old_connection_count_for_nothing(self, peer, cloud, session, authority):
        session.subscribe_replies("svc/+/+")
        peer.silent_kinds = {mqtt.PUBLISH}
        async with MqttPeer(authority.server_context()) as other, running(session):
            other.silent_kinds = {mqtt.PUBLISH}
            for number in range(1, 11):
                old, new = (peer, other) if number % 2 else (other, peer)
                before = len(old.of(mqtt.PUBLISH))
                sending = asyncio.create_task(session.publish("t", b"old"))
                asking = asyncio.create_task(session.request("svc/a", {"of": "old"}))
                await old.until(lambda old=old, before=before: len(old.of(mqtt.PUBLISH)) == before + 2)
                await session.restart_with(changed(cloud, port=new.port))
                late(old)  # before the session has done anything about the old connection
                for outcome in await asyncio.gather(sending, asking, return_exceptions=True):
                    assert isinstance(outcome, CloudError)
                    assert outcome.retryable
                with pytest.raises(CloudError, match="no connection"):
                    await session.request("svc/a", {})
                assert not session.connected_with(changed(cloud, port=new.port))
                await connected(session)
                assert session.connected_with(changed(cloud, port=new.port))
                assert len(old.of(mqtt.PUBLISH)) == before + 2
                asking = asyncio.create_task(session.request("svc/a", {"of": "new"}))
                count = len(new.of(mqtt.PUBLISH))
                await new.until(lambda new=new, count=count: len(new.of(mqtt.PUBLISH)) > count)
                assert not asking.done()
                late(new)
                assert (await asking)["of"] == "new"
        print(f"{number} moves with late answers tried")

    async def test_subscriptions_answered_late_are_no_connection(self, peer, cloud, session, authority):
        session.subscribe("t/a", lambda *_: None)
        peer.silent_kinds = {mqtt.SUBSCRIBE}
        async with MqttPeer(authority.server_context()) as other, running(session, connected=False):
            other.connack_gate.clear()
            await peer.until(lambda: peer.of(mqtt.SUBSCRIBE))
            await session.restart_with(changed(cloud, port=other.port))
            late(peer)
            await other.until(lambda: other._count)
            assert session.link.state == "connecting"
            assert not session._ready.is_set()
            other.connack_gate.set()
            await connected(session)
            assert other.of(mqtt.SUBSCRIBE)

    async def test_an_answer_taken_just_before_the_move_is_no_connection_either(
        self, peer, cloud, session, authority, monkeypatch
    ):
        finish = Connection._finish

        def and_move(self, outcome, operation) -> None:
            finish(self, outcome, operation)
            if operation.result() and peer.of(mqtt.SUBSCRIBE) and not other.packets:
                with pytest.raises(StopIteration):  # it has run: before the one who waited for the answer could
                    session.restart_with(new).send(None)

        monkeypatch.setattr(Connection, "_finish", and_move)
        session.subscribe("t/a", lambda *_: None)
        async with MqttPeer(authority.server_context()) as other:
            new = changed(cloud, port=other.port)
            other.connack_gate.clear()
            states: list[Link] = []
            session.on_link(states.append)
            async with running(session, connected=False):
                await other.until(lambda: other._count)
                assert not session._ready.is_set()
                assert [link.state for link in states if link.state == "connected"] == []
                other.connack_gate.set()
                await connected(session)
                assert session.connected_with(new)

    async def test_at_every_moment_of_connecting_a_move_leads_to_the_new_settings_only(
        self, peer, cloud, identity, authority
    ):
        """The old connection is left so many turns of the event loop after its CONNACK went out."""
        async with MqttPeer(authority.server_context()) as other:
            for turns in range(0, MOMENTS_TRIED, 2):
                session = make_session(THING, cloud, identity)
                session.subscribe("t/a", lambda *_: None)
                before = len(peer.of(mqtt.CONNECT))
                new = changed(cloud, port=other.port)
                wrong: list[Link] = []
                async with running(session, connected=False):
                    await peer.until(lambda before=before: len(peer.of(mqtt.CONNECT)) > before)
                    for _ in range(turns):
                        await asyncio.sleep(0.0001)
                    await session.restart_with(new)
                    session.on_link(
                        lambda link, session=session, new=new, wrong=wrong: (
                            wrong.append(link)
                            if link.state == "connected" and not session.connected_with(new)
                            else None
                        )
                    )
                    await connected(session)
                    assert session.connected_with(new)
                assert not wrong
        print(f"{MOMENTS_TRIED // 2} moments tried")


def late(peer: MqttPeer) -> None:
    """Acknowledge and answer at once, on all open connections, everything that was left unanswered."""
    for client in peer._live.values():
        for packet in [p for p in peer.packets if p.connection == client.number]:
            if packet.kind == mqtt.PUBLISH:
                client.send(mqtt.PUBACK, 0, packet.packet_id.to_bytes(2, "big"), b"\0\0")
                if packet.topic.startswith("svc/"):
                    client.publish(f"{packet.topic}/accepted", packet.payload, 1)
            elif packet.kind == mqtt.SUBSCRIBE:
                client.send(
                    mqtt.SUBACK, 0, packet.packet_id.to_bytes(2, "big"), b"\0", bytes([1] * len(packet.filters))
                )


class TestMessages:
    @pytest.mark.conformance("C-CONN-10")
    async def test_no_message_is_lost_over_moves(self, cloud, identity, authority):
        async with LastingPeer(authority.server_context()) as peer, HttpProxy() as proxy:
            direct = changed(cloud, port=peer.port)
            ways = [direct, changed(direct, proxy_url=proxy.url()), changed(direct, keep_alive_s=60)]
            session = make_session(THING, direct, identity, announce=announce)
            received: list[int] = []
            session.subscribe("t/a", lambda _, payload: received.append(int(payload)))
            sent = itertools.count()

            def send(count: int) -> None:
                for _ in range(count):
                    peer.send("t/a", b"%d" % next(sent))

            chance = random.Random(7)
            async with running(session):
                for number in range(1, 16):
                    send(5)
                    await asyncio.sleep(chance.choice((0, 0, 0.002, 0.01)))
                    before = set(peer._live)
                    await session.restart_with(ways[number % 3])
                    send(5)  # while it is still connected over the old way, or not at all any more
                    await peer.until(lambda before=before: not before & set(peer._live), 60)
                    send(5)
                    await connected(session)
                    assert session.link.session_present
                async with asyncio.timeout(20):
                    while set(received) != set(range(225)):
                        await asyncio.sleep(0.02)
            # Now and then awscrt hangs in an orderly end, and is cut after ten seconds.
            assert len(peer.wills) <= 1
            assert all(packet.reason == 0 for packet in peer.of(mqtt.DISCONNECT))
            assert {packet.properties.get("session_expiry_interval") for packet in peer.of(mqtt.CONNECT)} == {3600}
        print(f"15 moves with {next(sent)} messages tried, {len(received) - len(set(received))} came twice")


class TestHanging:
    @pytest.mark.parametrize("behaviour", ["silent", "half", "swallow", "connack", "hole", "hold-off"])
    async def test_an_attempt_that_hangs_is_left_at_once(
        self, peer, cloud, identity, authority, monkeypatch, behaviour
    ):
        monkeypatch.setattr("agent.cloud.proxy.ANSWER_TIMEOUT_S", 600)
        async with HttpProxy() as proxy, listener() as hole, MqttPeer(authority.server_context()) as other:
            proxy.behaviour = behaviour if behaviour in ("silent", "half", "swallow") else "tunnel"
            first = changed(cloud, proxy_url=proxy.url()) if proxy.behaviour != "tunnel" else cloud
            if behaviour == "hole":
                first = changed(cloud, port=hole)
            if behaviour == "connack":
                peer.connack_gate.clear()
            session = make_session(
                THING, first, identity, pace=Pace(0.05, 0.1, taken_over_s=600, between_connects_s=0.05)
            )
            states: list[Link] = []
            async with running(session, connected=False):
                match behaviour:
                    case "connack":
                        await peer.until(lambda: peer._count)
                    case "hole":
                        await asyncio.sleep(0.3)
                    case "hold-off":
                        for _ in range(3):
                            await connected(session)
                            peer.disconnect(0x8E)
                            await link_where(session, lambda link: link.state == "offline")
                    case _:
                        async with asyncio.timeout(20):
                            while len(proxy.asked) < (2 if behaviour == "swallow" else 1):
                                await asyncio.sleep(0.02)
                await session.restart_with(changed(cloud, port=other.port))
                session.on_link(states.append)
                assert (session.link.state, session.link.reason) == ("connecting", "")
                await connected(session)
                assert session.link.via == f"port {other.port}"
                # The attempt was not waited for: neither its failure nor anything else came before the connection.
                assert "offline" not in [link.state for link in states]
                if behaviour == "hold-off":  # nor is what the old settings met with held against the new ones
                    other.disconnect(0x8E)
                    await other.until(lambda: len(other.of(mqtt.CONNECT)) == 2)

    async def test_wrong_proxies_are_told_and_the_way_back_is_open(
        self, peer, cloud, identity, monkeypatch, unused_port
    ):
        monkeypatch.setattr("agent.cloud.proxy.ANSWER_TIMEOUT_S", 0.3)
        async with (
            HttpProxy(("cam", "right")) as proxy,
            listener(b"220 smtp.example\r\n\r\n") as mail,
            listener() as hole,
        ):
            good = changed(cloud, proxy_url=proxy.url("cam:right"))
            wrong = {
                "can't be reached": f"http://cam:right@127.0.0.1:{unused_port}",
                "does not answer as an HTTP": f"http://cam:right@127.0.0.1:{mail}",
                "it does not answer": f"http://cam:right@127.0.0.1:{hole}",
                "credentials": proxy.url("cam:wrong"),
                "closed": f"http://cam:right@127.0.0.1:{peer.port}",
                "resolved": "http://cam:right@no-such-proxy.invalid:3128",
            }
            session = make_session(THING, cloud, identity)
            async with running(session):
                for back, (said, url) in zip(itertools.cycle((good, cloud)), wrong.items()):
                    await session.restart_with(changed(cloud, proxy_url=url))
                    link = await link_where(session, lambda link: link.state == "offline")
                    assert (link.code, said in link.reason) == ("proxy", True), link
                    assert link.via == f"port {peer.port}, proxy {url.rpartition('@')[2]}"
                    assert "right" not in str(link)
                    assert not session.connected_with(session.cloud)
                    await session.restart_with(back)
                    await connected(session)
                    assert session.connected_with(back)
                    await session.publish("t", b"over it")
        print(f"{len(wrong)} wrong proxies tried")

    async def test_a_connection_whose_network_is_gone_is_left(self, peer, cloud, identity, relay):
        session = make_session(THING, changed(cloud, port=relay.port), identity)
        async with running(session):
            relay.blackhole = {"up", "down"}
            sending = asyncio.create_task(session.publish("t", b"swallowed"))
            await asyncio.sleep(0.1)
            await session.restart_with(cloud)
            with pytest.raises(CloudError) as caught:
                await sending
            assert caught.value.retryable
            await connected(session)
            await session.publish("t", b"over it")
            assert session.connected_with(cloud)


class TestLeaks:
    async def test_two_hundred_random_moves_end_where_the_last_good_one_leads(
        self, peer, cloud, identity, monkeypatch, unused_port
    ):
        monkeypatch.setattr("agent.cloud.proxy.ANSWER_TIMEOUT_S", 0.2)
        monkeypatch.setattr("agent.cloud.connection.ABANDON_TIMEOUT_S", 0.05)
        chance, tried = random.Random(2026), dict.fromkeys(("good", "bad"), 0)
        before = await resources()
        async with (
            HttpProxy() as proxy,
            HttpProxy(("cam", "pw")) as guarded,
            listener() as hole,
            listener(b"no\n\n") as junk,
        ):
            good = [
                cloud,
                changed(cloud, proxy_url=proxy.url()),
                changed(cloud, proxy_url=guarded.url("cam:pw")),
                changed(cloud, keep_alive_s=61, session_expiry_s=600),
            ]
            bad = [
                changed(cloud, port=unused_port),
                changed(cloud, port=hole),
                changed(cloud, proxy_url=guarded.url("cam:no")),
                *(
                    changed(cloud, proxy_url=f"http://127.0.0.1:{port}")
                    for port in (unused_port, hole, junk, peer.port)
                ),
            ]
            session = make_session(THING, cloud, identity, announce=announce)
            session.subscribe("t/a", lambda *_: None)
            wanted, wrong = cloud, []

            def look(link: Link) -> None:
                if link.state == "connected" and not session.connected_with(wanted):
                    wrong.append(link)

            session.on_link(look)
            async with running(session):
                for _ in range(MOVES):
                    kind = chance.choice(("good", "good", "bad"))
                    wanted = chance.choice(good if kind == "good" else bad)
                    await session.restart_with(wanted)
                    tried[kind] += 1
                    await chance.choice(MOMENTS)(session, wanted in good)
                wanted = good[1]
                await session.restart_with(wanted)
                await connected(session)
                assert session.connected_with(wanted)
                await session.publish("t", b"the end")
                assert len(asyncio.all_tasks()) < 40
            assert not wrong
        tasks, sockets, clients = before
        await settled((tasks, sockets + len(peer._tasks), clients))
        print(
            f"{tried['good']} moves to good and {tried['bad']} to bad settings tried, {len(peer.of(mqtt.CONNECT))} CONNECTs"
        )

    async def test_a_proxy_that_opens_no_way_leaves_no_native_client(self, peer, cloud, identity):
        async with HttpProxy() as proxy:
            proxy.behaviour = "refuse"
            before = abandoned()
            session = make_session(THING, changed(cloud, proxy_url=proxy.url()), identity)
            async with running(session, connected=False):
                async with asyncio.timeout(40):
                    while len(proxy.asked) < 20:
                        await asyncio.sleep(0.02)
                assert abandoned() == before
        print("20 refusals tried")

    async def test_a_half_dead_proxy_costs_one_native_client_a_move_and_soon_time(
        self, peer, cloud, identity, monkeypatch
    ):
        async def opens(*_) -> None:
            return None

        monkeypatch.setattr("agent.cloud.proxy.refusal", opens)  # it answered a moment ago
        monkeypatch.setattr("agent.cloud.connection.ABANDON_TIMEOUT_S", 0.05)
        before = abandoned()
        async with HttpProxy() as proxy:
            proxy.behaviour = "silent"
            session = make_session(THING, cloud, identity)
            async with running(session):
                for number in range(1, 11):
                    await session.restart_with(changed(cloud, proxy_url=proxy.url(), keep_alive_s=30 + number))
                    async with asyncio.timeout(20):
                        while len(proxy.asked) < number:
                            await asyncio.sleep(0.02)
                await session.restart_with(cloud)
                await connected(session)
                assert 0 < abandoned() - before <= 10
                print(f"10 moves by a half-dead proxy tried, {abandoned() - before} native clients hang in it")
        async with asyncio.timeout(40):
            while abandoned() > before:  # the proxy is gone, and with it what hung
                await asyncio.sleep(0.05)
        monkeypatch.setattr(pacing, "abandoned", lambda: pacing.MANY_ABANDONED)
        assert Pacing(QUICK).wait_s(Diagnosis("proxy", "", "")) == pacing.MANY_ABANDONED_WAIT_S


async def nothing(_: Session, __: bool) -> None:
    return


async def a_turn(_: Session, __: bool) -> None:
    await asyncio.sleep(0)


async def a_moment(_: Session, __: bool) -> None:
    await asyncio.sleep(0.02)


async def the_end(session: Session, good: bool) -> None:
    if good:
        await connected(session)
        await session.publish("t", b"over it")
    else:
        await asyncio.sleep(0.1)


MOMENTS: list[Callable[[Session, bool], Awaitable[None]]] = [nothing, a_turn, a_moment, the_end]


async def resources() -> tuple[int, int, int]:
    """Tasks, sockets and native clients that are there."""
    return len(asyncio.all_tasks()), await asyncio.to_thread(_sockets), abandoned()


def _sockets() -> int:
    count = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            count += str(descriptor.readlink()).startswith("socket:")
    return count


async def settled(before: tuple[int, int, int]) -> None:
    """Wait until there is no more than before."""
    try:
        async with asyncio.timeout(60):
            while any(now > then for now, then in zip(await resources(), before, strict=True)):
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"tasks, sockets, clients: {await resources()}, at the beginning {before}") from None


class TestFallback:
    @pytest.fixture(autouse=True)
    def quick_turns(self, monkeypatch) -> None:
        monkeypatch.setattr(fallback, "FALLBACK_AFTER_S", 0.5)
        monkeypatch.setattr(fallback, "LONG_TURN_S", 0.4)
        monkeypatch.setattr(fallback, "SHORT_TURN_S", 0.4)

    async def test_settings_that_died_give_way_to_agent_tomls_own_and_come_back(self, peer, cloud, identity):
        async with HttpProxy() as proxy:
            own = changed(cloud, keep_alive_s=50)
            set_ones = changed(cloud, proxy_url=proxy.url("cam:secret"))
            session = make_session(THING, own, identity)
            await session.restart_with(set_ones)
            async with running(session):
                assert session.connected_with(set_ones)
                assert (session.fallback, session.link.code, session.unreached_s) == ("", "", 0)
                proxy.behaviour = "refuse"
                peer.cut()
                link = await link_where(session, lambda link: link.state == "offline" and link.code == "proxy")
                assert session.fallback == ""
                link = await link_where(session, lambda link: link.state == "connected")
                assert peer.of(mqtt.CONNECT)[-1].keep_alive == 50
                assert link.code == "fallback"
                assert link.reason == session.fallback
                assert f"127.0.0.1:{proxy.port}" in link.reason
                assert "secret" not in link.reason + link.hint
                assert link.via == f"port {peer.port}"
                assert session.connected_with(own)
                assert not session.connected_with(set_ones)
                assert session.cloud == own
                assert session.unreached_s == fallback.FALLBACK_AFTER_S
                await asyncio.sleep(1)  # whatever connects stays
                assert session.link.state == "connected"
                peer.cut()
                await link_where(session, lambda link: link.state == "offline")
                assert "agent.toml" in session.link.reason
                await connected(session)
                assert session.connected_with(own)
                await session.restart_with(set_ones)  # asked for already
                assert session.connected_with(own)
                await session.restart_with(own)
                assert not session.fallback
                await connected(session)
                assert session.connected_with(own)
                assert (session.fallback, session.link.code) == ("", "")

    async def test_the_settings_in_force_have_their_turns_too(self, peer, cloud, identity, unused_port):
        async with HttpProxy() as proxy:
            proxy.behaviour = "refuse"
            set_ones = changed(cloud, proxy_url=proxy.url())
            session = make_session(THING, set_ones, identity, own=changed(cloud, port=unused_port))
            vias: list[str] = []
            session.on_link(lambda link: vias.append(link.via))
            async with running(session, connected=False):
                async with asyncio.timeout(40):
                    while len([via for via, _ in itertools.groupby(filter(None, vias))]) < 4:
                        await asyncio.sleep(0.05)
                assert session.fallback
                proxy.behaviour = "tunnel"
                await connected(session)
                assert session.connected_with(set_ones)
                assert (session.fallback, session.link.code) == ("", "")
        print("4 turns tried")

    async def test_what_the_last_process_waited_counts(self, peer, cloud, identity, unused_port):
        session = make_session(THING, cloud, identity, unreached_s=fallback.FALLBACK_AFTER_S)
        await session.restart_with(changed(cloud, port=unused_port))
        async with running(session):
            assert session.link.code == "fallback"
            assert session.cloud == cloud
