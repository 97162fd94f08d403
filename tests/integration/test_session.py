"""The session against a scripted MQTT 5 server: connect, subscribe, publish, ask, lose the connection, be refused."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import operator
from collections.abc import Iterator

import pytest

from agent.cloud.offline import Pace
from agent.cloud.session import Rejected, Session
from agent.errors import CloudError
from agent.settings import Cloud
from tests.certificates import Pair
from tests.integration import connected
from tests.integration import mqtt_peer as mqtt
from tests.integration.connected import child, link_where, running
from tests.integration.mqtt_peer import MqttPeer

THING = "cam-7"
pytestmark = pytest.mark.usefixtures("readable_logs")


def make_session(cloud: Cloud, identity: Pair, *arguments, **options) -> Session:
    return connected.make_session(THING, cloud, identity, *arguments, **options)


def announce(nonce: str, alive: bool) -> tuple[str, bytes]:
    return "t/presence", json.dumps({"nonce": nonce, "alive": alive}).encode()


def echo(packet: mqtt.Packet) -> Iterator[tuple[str, dict]]:
    body = packet.json()
    yield f"{packet.topic}/accepted", {"got": body, "clientToken": body["clientToken"]}


class TestConnect:
    @pytest.mark.conformance("C-CONN-03")
    @pytest.mark.parametrize("port", [0, 443], ids=["8883", "443"])
    async def test_443_offers_the_alpn_that_aws_wants_and_other_ports_none(self, authority, identity, port):
        context = authority.server_context()
        context.set_alpn_protocols(["x-amzn-mqtt-ca"])
        try:
            peer = await MqttPeer(context, port).__aenter__()
        except OSError as error:
            pytest.skip(f"port {port} of localhost can't be listened on: {error.strerror}")
        try:
            cloud = Cloud(endpoint="localhost", port=peer.port, ca_file=authority.ca_file)
            async with running(make_session(cloud, identity)):
                assert peer.alpn == ["x-amzn-mqtt-ca" if port == 443 else None]
        finally:
            await peer.__aexit__()

    @pytest.mark.conformance("C-CONN-01", "C-CONN-25")
    async def test_connects_as_the_thing_with_a_lasting_session(self, peer, cloud, identity):
        session = make_session(cloud, identity, announce=announce)
        async with running(session):
            [connect] = peer.of(mqtt.CONNECT)
            assert connect.client_id == THING
            assert connect.keep_alive == cloud.keep_alive_s
            assert connect.properties["session_expiry_interval"] == 3600
            assert not connect.clean_start
            assert connect.username is None  # no metrics
            assert connect.will
            assert session.link.state == "connected"
            assert session.link.connects == 1
            assert not session.link.session_present

    @pytest.mark.conformance("C-CONN-19", "C-SDK-03")
    async def test_a_clean_stop_says_goodbye_and_keeps_the_will_back(self, peer, cloud, identity):
        session = make_session(cloud, identity, announce=announce)
        async with running(session):
            pass
        await peer.until(lambda: peer.of(mqtt.DISCONNECT) and not peer.connections)
        assert peer.of(mqtt.DISCONNECT)[0].reason == 0
        assert peer.wills == []
        assert session.link.state == "stopped"
        with pytest.raises(CloudError) as caught:
            await session.publish("t", b"")
        assert caught.value.code == "offline"

    @pytest.mark.conformance("C-CONN-04")
    async def test_the_keep_alive_that_the_server_wants_is_kept(self, peer, session):
        peer.connack_properties["server_keep_alive"] = 1
        async with running(session):
            await peer.until(lambda: len(peer.of(mqtt.PINGREQ)) >= 2)

    async def test_a_cut_publishes_the_will(self, peer, cloud, identity):
        async with running(make_session(cloud, identity, announce=announce)):
            peer.cut()
            await peer.until(lambda: peer.wills)

    async def test_without_files_run_raises(self, cloud, tmp_path):
        missing = Pair(tmp_path / "none.pem", tmp_path / "none-key.pem")
        with pytest.raises(CloudError, match=r"none\.pem") as caught:
            await make_session(cloud, missing).run()
        assert caught.value.code == "certificate"

    async def test_with_a_malformed_certificate_run_raises_and_the_link_says_so(self, cloud, identity, tmp_path):
        broken = Pair(tmp_path / "broken.pem", identity.private_key_file)
        broken.certificate_file.write_text("no certificate")
        session = make_session(cloud, broken)
        with pytest.raises(CloudError):
            await session.run()
        assert (session.link.state, session.link.code) == ("stopped", "certificate")

    async def test_without_an_endpoint_run_raises(self, cloud, identity):
        with pytest.raises(CloudError) as caught:
            await make_session(cloud.model_copy(update={"endpoint": ""}), identity).run()
        assert caught.value.code == "not_configured"


class TestSubscriptions:
    @pytest.mark.conformance("C-CONN-13", "C-CONN-15")
    async def test_groups_of_eight_are_acknowledged_before_ready(self, peer, session):
        for number in range(19):
            session.subscribe(f"t/{number}", lambda *_: None)
        seen = []

        async def ready() -> None:
            seen.append([p.filters for p in peer.of(mqtt.SUBSCRIBE)])

        session.on_ready(ready)
        async with running(session):
            await peer.until(lambda: seen)
        assert [len(filters) for filters in seen[0]] == [8, 8, 3]
        assert sorted(functools.reduce(operator.iadd, seen[0], [])) == sorted(f"t/{n}" for n in range(19))
        assert all(p.qos == 1 and not p.properties for p in peer.of(mqtt.SUBSCRIBE))

    async def test_callbacks_run_in_order_and_one_that_fails_harms_nobody(self, peer, session):
        calls = []

        async def broken() -> None:
            calls.append("broken")
            raise ZeroDivisionError

        async def fine() -> None:
            calls.append("fine")

        session.on_ready(broken)
        session.on_ready(fine)
        async with running(session):
            await session.publish("t", b"")
            assert calls == ["broken", "fine"]

    async def test_a_message_reaches_every_matching_handler_also_after_one_that_fails(self, peer, session):
        arrived: asyncio.Queue[tuple] = asyncio.Queue()

        def broken(*_) -> None:
            raise ZeroDivisionError

        session.subscribe("t/+/a", broken)
        session.subscribe("t/1/a", lambda *message: arrived.put_nowait(message))
        async with running(session):
            assert peer.send("t/1/a", b"\xff\x00") == 1
            async with asyncio.timeout(10):
                assert await arrived.get() == ("t/1/a", b"\xff\x00")
            await peer.until(lambda: peer.of(mqtt.PUBACK))

    @pytest.mark.conformance("C-CONN-09")
    async def test_after_a_lost_session_all_is_subscribed_again(self, peer, session):
        session.subscribe("t/a", lambda *_: None)
        ready = asyncio.Event()

        async def on_ready() -> None:
            ready.set()

        session.on_ready(on_ready)
        async with running(session):
            ready.clear()
            peer.forget_sessions()
            peer.cut()
            async with asyncio.timeout(20):
                await ready.wait()
        assert [p.filters for p in peer.of(mqtt.SUBSCRIBE)] == [["t/a"], ["t/a"]]

    async def test_a_resumed_session_is_not_subscribed_again_but_ready_is_called(self, peer, session):
        session.subscribe("t/a", lambda *_: None)
        calls = []

        async def on_ready() -> None:
            calls.append(session.link.session_present)
            await session.publish("t/ready", b"")

        session.on_ready(on_ready)
        async with running(session):
            await peer.until(lambda: peer.of(mqtt.PUBLISH, topic="t/ready"))
            peer.cut()
            await peer.until(lambda: len(peer.of(mqtt.PUBLISH, topic="t/ready")) == 2)
        assert calls == [False, True]
        assert len(peer.of(mqtt.SUBSCRIBE)) == 1

    async def test_a_session_resumed_by_a_new_process_is_subscribed_once_more(self, peer, session):
        peer.remember_session(THING, ["t/old"])
        session.subscribe("t/a", lambda *_: None)
        async with running(session):
            assert session.link.session_present
        assert [p.filters for p in peer.of(mqtt.SUBSCRIBE)] == [["t/a"]]

    @pytest.mark.conformance("C-CONN-10")
    async def test_messages_sent_right_behind_the_connack_are_handled(self, peer, session):
        peer.remember_session(THING, ["t/a"], [("t/a", {"n": n}) for n in range(50)])
        arrived = []
        session.subscribe("t/a", lambda _, payload: arrived.append(json.loads(payload)["n"]))
        async with running(session):
            await peer.until(lambda: len(arrived) == 50 and len(peer.of(mqtt.PUBACK)) == 50)
        assert sorted(arrived) == list(range(50))

    @pytest.mark.conformance("C-CONN-11")
    async def test_a_refused_subscription_degrades_and_is_tried_again(self, peer, session, monkeypatch):
        monkeypatch.setattr("agent.cloud.session.SUBSCRIBE_AGAIN_S", (0.05, 0.1))
        peer.refuse_filters["t/secret"] = 0x87
        session.subscribe("t/secret", lambda *_: None)
        session.subscribe("t/open", lambda *_: None)
        calls = []

        async def on_ready() -> None:
            calls.append(session.link.code)

        session.on_ready(on_ready)
        async with running(session):
            assert session.link.state == "connected"
            assert session.link.code == "subscription_refused"
            assert "t/secret" in session.link.reason
            await peer.until(lambda: len(peer.of(mqtt.SUBSCRIBE)) >= 3)
            assert peer.of(mqtt.SUBSCRIBE)[-1].filters == ["t/secret"]
            peer.refuse_filters.clear()
            await link_where(session, lambda link: not link.code)
            await session.publish("t", b"")
        assert calls == ["subscription_refused", ""]

    async def test_a_subscription_declared_later_is_made_at_once(self, peer, session):
        async with running(session):
            session.subscribe("t/late", lambda *_: None)
            async with asyncio.timeout(10):
                await session.wait_connected()
            assert [p.filters for p in peer.of(mqtt.SUBSCRIBE)] == [["t/late"]]

    async def test_a_server_that_answers_no_subscribe_is_left(self, peer, session, monkeypatch):
        monkeypatch.setattr("agent.cloud.connection.ACK_TIMEOUT_S", 1)
        peer.silent_kinds = {mqtt.SUBSCRIBE}
        session.subscribe("t/a", lambda *_: None)
        async with running(session, connected=False):
            await link_where(session, lambda link: link.state == "offline")
            assert session.link.code == "no_answer"
            peer.silent_kinds = set()
            async with asyncio.timeout(20):
                await session.wait_connected()


class TestPublish:
    async def test_returns_once_acknowledged(self, peer, session):
        async with running(session):
            await session.publish("t/a", b"payload")
        [packet] = peer.of(mqtt.PUBLISH)
        assert (packet.topic, packet.payload, packet.qos, packet.retain) == ("t/a", b"payload", 1, False)

    @pytest.mark.conformance("C-CONN-12")
    @pytest.mark.parametrize(
        ("reason", "code", "retryable"),
        [(0x87, "not_authorised", False), (0x97, "quota_exceeded", True), (0x90, "topic_name_not_valid", False)],
    )
    async def test_a_refusal_raises(self, peer, session, reason, code, retryable):
        peer.refuse_topics["t/a"] = reason
        async with running(session):
            with pytest.raises(CloudError) as caught:
                await session.publish("t/a", b"")
            assert (caught.value.code, caught.value.retryable) == (code, retryable)
            await session.publish("t/b", b"")

    @pytest.mark.conformance("C-CONN-14")
    @pytest.mark.parametrize("topic", ["", "a/+", "a/#", "a" * 257, "/".join("123456789"), "$aws/rules/r"])
    async def test_a_topic_that_aws_would_not_take_is_never_sent(self, peer, session, topic):
        async with running(session):
            with pytest.raises(CloudError) as caught:
                await session.publish(topic, b"")
            assert (caught.value.code, caught.value.retryable) == ("topic_not_valid", False)
        assert not peer.of(mqtt.PUBLISH)

    @pytest.mark.conformance("C-CONN-16")
    async def test_the_largest_payload_goes_and_a_larger_one_does_not(self, peer, session):
        async with running(session):
            await session.publish("t", bytes(128 * 1024))
            with pytest.raises(CloudError) as caught:
                await session.publish("t", bytes(128 * 1024 + 1))
            assert caught.value.code == "packet_too_large"
        assert [len(p.payload) for p in peer.of(mqtt.PUBLISH)] == [128 * 1024]

    @pytest.mark.conformance("C-SDK-04")
    async def test_no_more_than_twenty_are_in_flight_and_a_cut_ends_them_all(self, peer, session):
        peer.silent_kinds = {mqtt.PUBLISH}
        async with running(session):
            sending = [asyncio.create_task(session.publish("t", b"%d" % n)) for n in range(50)]
            await peer.until(lambda: len(peer.of(mqtt.PUBLISH)) == 20)
            sending[0].cancel()  # a caller that gives up does not free the slot: the message is still under way
            with pytest.raises(asyncio.CancelledError):
                await sending[0]
            assert len(peer.of(mqtt.PUBLISH)) == 20
            peer.silent_kinds = set()
            peer.cut()
            outcomes = await asyncio.gather(*sending[1:], return_exceptions=True)
            assert all(isinstance(o, CloudError) and o.retryable for o in outcomes)
            assert [o.code for o in outcomes[:19]] == ["connection_lost"] * 19
            assert {o.code for o in outcomes[19:]} == {"offline"}
            async with asyncio.timeout(20):
                await session.wait_connected()
            await asyncio.gather(*(session.publish("t/after", b"") for _ in range(50)))
        assert len(peer.of(mqtt.PUBLISH, topic="t")) == 20  # nothing is sent again behind our back

    async def test_without_acknowledgement_it_times_out(self, peer, session):
        peer.silent_kinds = {mqtt.PUBLISH}
        async with running(session):
            with pytest.raises(CloudError) as caught:
                await session.publish("t", b"", timeout_s=0.2)
            assert (caught.value.code, caught.value.retryable) == ("no_answer", True)

    async def test_a_publish_that_makes_the_server_close_ends_and_is_not_repeated(self, peer, session):
        peer.disconnect_topics["t/poison"] = 0x87
        async with running(session):
            with pytest.raises(CloudError) as caught:
                await session.publish("t/poison", b"")
            assert caught.value.code == "connection_lost"
            async with asyncio.timeout(20):
                await session.wait_connected()
            await session.publish("t/fine", b"")
        assert len(peer.of(mqtt.PUBLISH, topic="t/poison")) == 1


class TestRequest:
    async def test_the_answer_is_matched_by_token(self, peer, session):
        peer.serve("svc/get", echo)
        session.subscribe_replies("svc/get/+")
        async with running(session):
            replies = await asyncio.gather(*(session.request("svc/get", {"n": n}) for n in range(30)))
        assert [reply["got"]["n"] for reply in replies] == list(range(30))
        assert len(session._replies) == 0

    @pytest.mark.conformance("C-JOBS-03")
    async def test_foreign_malformed_and_misplaced_answers_are_ignored(self, peer, session):
        def service(packet):
            token = packet.json()["clientToken"]
            yield "svc/get/accepted", b"{not json"
            yield "svc/get/accepted", b"[1]"
            yield "svc/get/accepted", {"clientToken": "somebody else's"}
            yield "svc/get/accepted", {"clientToken": ["x"]}
            yield "svc/get/rejected", {"code": "InvalidJson"}
            yield "svc/other/accepted", {"clientToken": token, "wrong": True}
            yield "svc/get/accepted", {"clientToken": token, "right": True}
            yield "svc/get/accepted", {"clientToken": token, "twice": True}

        peer.serve("svc/get", service)
        session.subscribe_replies("svc/+/+")
        async with running(session):
            assert (await session.request("svc/get", {})).get("right")

    async def test_a_rejection_carries_the_services_words(self, peer, session):
        def service(packet):
            state = {"status": "CANCELED", "versionNumber": 4}
            body = {"code": "InvalidStateTransition", "message": "no", "executionState": state}
            yield "svc/get/rejected", {**body, "clientToken": packet.json()["clientToken"]}

        peer.serve("svc/get", service)
        session.subscribe_replies("svc/get/+")
        async with running(session):
            with pytest.raises(Rejected) as caught:
                await session.request("svc/get", {})
        assert caught.value.code == "InvalidStateTransition"
        assert caught.value.details["executionState"]["status"] == "CANCELED"
        assert not caught.value.retryable

    @pytest.mark.conformance("C-SDK-06")
    async def test_no_answer_times_out_without_leaving_an_entry(self, peer, session):
        peer.drop_replies = True
        peer.serve("svc/get", echo)
        session.subscribe_replies("svc/get/+")
        async with running(session):
            with pytest.raises(CloudError) as caught:
                await session.request("svc/get", {}, timeout_s=0.2)
            assert (caught.value.code, caught.value.retryable) == ("no_answer", True)
            assert len(session._replies) == 0

    async def test_an_answer_counts_though_the_acknowledgement_is_lost(self, peer, session):
        peer.silent_kinds = {mqtt.PUBLISH}
        peer.serve("svc/get", echo)
        session.subscribe_replies("svc/get/+")
        async with running(session):
            assert (await session.request("svc/get", {}))["got"]

    async def test_a_lost_connection_ends_it_at_once(self, peer, session):
        session.subscribe_replies("svc/get/+")
        async with running(session):
            asking = asyncio.create_task(session.request("svc/get", {}))
            await peer.until(lambda: peer.of(mqtt.PUBLISH))
            peer.cut()
            with pytest.raises(CloudError) as caught:
                await asking
            assert caught.value.code == "connection_lost"

    async def test_a_refused_reply_subscription_is_named(self, peer, session):
        peer.refuse_filters["svc/get/+"] = 0x87
        session.subscribe_replies("svc/get/+")
        async with running(session):
            with pytest.raises(CloudError) as caught:
                await session.request("svc/get", {}, timeout_s=0.2)
            assert caught.value.code == "subscription_refused"


class TestOffline:
    @pytest.mark.conformance("C-CONN-07")
    async def test_a_refused_connect_is_explained_and_tried_again(self, peer, session):
        peer.connack_reasons = [0x87, 0x87]
        async with running(session, connected=False):
            link = await link_where(session, lambda link: link.state == "offline")
            assert link.code == "not_authorised"
            assert session.certificate_id in link.hint
            async with asyncio.timeout(20):
                await session.wait_connected()
        assert len(peer.of(mqtt.CONNECT)) == 3

    @pytest.mark.conformance("C-CONN-07")
    async def test_repeated_closing_before_the_connack_is_not_authorised(self, peer, session):
        peer.connack_reason = -1
        async with running(session, connected=False):
            await link_where(session, lambda link: link.code == "not_authorised")
        assert len(peer.of(mqtt.CONNECT)) <= 5

    @pytest.mark.conformance("C-CONN-08")
    async def test_taken_over_three_times_it_stops_trying(self, peer, session):
        async with running(session):
            for _ in range(3):
                async with asyncio.timeout(20):
                    await session.wait_connected()
                peer.disconnect(0x8E)
                await link_where(session, lambda link: link.state == "offline")
            assert session.link.code == "taken_over"
            assert "3 times" in session.link.reason
            with pytest.raises(TimeoutError):
                await peer.until(lambda: len(peer.of(mqtt.CONNECT)) > 3, timeout_s=1)

    async def test_nobody_listening_is_told_from_no_such_name(self, peer, cloud, identity, unused_port):
        session = make_session(cloud.model_copy(update={"port": unused_port}), identity)
        async with running(session, connected=False):
            await link_where(session, lambda link: link.code == "tcp")
        session = make_session(cloud.model_copy(update={"endpoint": "no-such-host.invalid"}), identity)
        async with running(session, connected=False):
            await link_where(session, lambda link: link.code == "dns")

    @pytest.mark.conformance("C-CONN-06")
    async def test_connects_are_at_least_a_second_apart(self, peer, cloud, identity):
        session = make_session(cloud, identity, Pace())
        async with running(session):
            peer.cut()
            await peer.until(lambda: len(peer.of(mqtt.CONNECT)) == 2)
            await session.wait_connected()
            await session.restart_with(cloud.model_copy(update={"keep_alive_s": 77}))
            await peer.until(lambda: len(peer.of(mqtt.CONNECT)) == 3)
        times = [p.at for p in peer.of(mqtt.CONNECT)]
        assert all(later - earlier >= 0.95 for earlier, later in itertools.pairwise(times))

    async def test_restart_with_leaves_cleanly_and_uses_the_new_settings(self, peer, cloud, session, authority):
        session.subscribe("t/a", lambda *_: None)
        async with MqttPeer(authority.server_context()) as other, running(session):
            await session.restart_with(cloud.model_copy(update={"port": other.port, "keep_alive_s": 77}))
            assert session.link.state == "connecting"
            async with asyncio.timeout(20):
                await session.wait_connected()
            assert other.of(mqtt.CONNECT)[0].keep_alive == 77
            assert other.of(mqtt.SUBSCRIBE)[0].filters == ["t/a"]
            await peer.until(lambda: peer.of(mqtt.DISCONNECT))

    async def test_restart_with_ends_a_hold_off(self, peer, cloud, session):
        async with running(session):
            for _ in range(3):
                async with asyncio.timeout(20):
                    await session.wait_connected()
                peer.disconnect(0x8E)
                await link_where(session, lambda link: link.state == "offline")
            await session.restart_with(cloud.model_copy(update={"keep_alive_s": 77}))
            async with asyncio.timeout(20):
                await session.wait_connected()

    async def test_a_certificate_replaced_on_disk_is_used_at_the_next_connect(self, peer, cloud, authority, tmp_path):
        first, second = authority.client("first"), authority.client("second")
        pair = Pair(tmp_path / "certificate.pem", tmp_path / "key.pem")
        copy(first, pair)
        session = make_session(cloud, pair)
        async with running(session):
            before = session.certificate_id
            copy(second, pair)
            peer.cut()
            await peer.until(lambda: len(peer.of(mqtt.CONNECT)) == 2)
            assert session.certificate_id != before


@pytest.fixture
async def unused_port() -> int:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    return port


def copy(source: Pair, target: Pair) -> None:
    target.certificate_file.write_bytes(source.certificate_file.read_bytes())
    target.private_key_file.write_bytes(source.private_key_file.read_bytes())


@pytest.mark.parametrize("ending", ["clean", "abandoned"])
async def test_the_process_ends_without_hanging(peer, cloud, identity, ending):
    script = """
        async def main():
            session = make_session()
            task = asyncio.create_task(session.run())
            await session.wait_connected()
            await session.publish("t", b"up")
            if arguments == ["abandoned"]:
                sys.exit(3)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        asyncio.run(main())
    """
    async with child(script, cloud, identity, ending) as process, asyncio.timeout(60):
        output, _ = await process.communicate()
        assert (process.returncode, b"Traceback" in output, b"ignored" in output) == (
            3 if ending == "abandoned" else 0,
            False,
            False,
        ), output.decode()
