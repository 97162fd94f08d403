"""Why the session is off-line, met for real: each fault must leave the right code, reason and hint, and pass by itself."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from structlog.testing import capture_logs

from agent.cloud.offline import Pace
from agent.settings import Cloud
from tests.certificates import Authority, Pair
from tests.integration import mqtt_peer as mqtt
from tests.integration.connected import child, line_of, link_where, make_session, running
from tests.integration.mqtt_peer import MqttPeer

THING = "cam-7"
pytestmark = pytest.mark.usefixtures("readable_logs")
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


def dated(authority: Authority, name: str, start_days: float, end_days: float, server_name: str = "") -> Pair:
    """A certificate that is valid from and until so many days from now."""
    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        .issuer_name(authority._name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + dt.timedelta(days=start_days))
        .not_valid_after(now + dt.timedelta(days=end_days))
    )
    if server_name:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(server_name)]), critical=False)
    pair = Pair(authority.folder / f"{name}.pem", authority.folder / f"{name}-key.pem")
    pair.certificate_file.write_bytes(builder.sign(authority._key, SHA256()).public_bytes(Encoding.PEM))
    pair.private_key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return pair


@contextlib.contextmanager
def full_backlog() -> Iterator[int]:
    """The port of a socket whose queue of connections is full: a SYN gets no answer."""
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(socket.socket())
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        yield listening.getsockname()[1]


@contextlib.asynccontextmanager
async def silent_server() -> AsyncIterator[int]:
    """The port of a server that takes connections and says nothing."""
    over = asyncio.Event()

    async def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.transport.abort()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
        over.set()


async def offline(cloud: Cloud, pair: Pair, *, code: str, said: str, remedy: str, timeout_s: float = 60) -> None:
    """Run a session until it is off-line; that must be for `code`."""
    session = make_session(THING, cloud, pair)
    async with running(session, connected=False):
        link = await link_where(session, lambda link: link.state == "offline", timeout_s)
    assert link.code == code, link
    assert said in link.reason
    assert remedy in link.hint
    assert link.connects == 0


class TestOnTheWay:
    async def test_dns_and_tcp(self, peer, cloud, identity):
        def to(**changes) -> Cloud:
            return cloud.model_copy(update=changes)

        with socket.socket() as unused, full_backlog() as deaf:
            unused.bind(("127.0.0.1", 0))
            closed = unused.getsockname()[1]
            async with silent_server() as silent:
                await asyncio.gather(
                    offline(
                        to(endpoint="no-such-host.invalid"), identity, code="dns", said="no-such-host", remedy="DNS"
                    ),
                    offline(to(port=closed), identity, code="tcp", said="refused", remedy=f"TCP port {closed}"),
                    offline(to(port=deaf), identity, code="tcp", said="can't be reached", remedy="firewall"),
                    offline(to(port=silent), identity, code="no_answer", said="does not answer", remedy="network"),
                )
        assert not peer.packets
        print("4 faults before TLS tried")


class TestTls:
    @pytest.mark.conformance("C-CONN-02")
    async def test_no_connect_is_sent_to_a_server_that_is_not_who_it_should_be(
        self, peer, cloud, identity, authority, tmp_path
    ):
        stranger = Authority(tmp_path / "other", "another authority")
        pairs = {
            "name": authority.server("elsewhere.example"),
            "expired": dated(authority, "server-expired", -9, -1, "localhost"),
            "future": dated(authority, "server-future", 1, 9, "localhost"),
        }
        async with contextlib.AsyncExitStack() as stack:
            peers = {
                name: await stack.enter_async_context(MqttPeer(authority.server_context(pair)))
                for name, pair in pairs.items()
            }
            clouds = [cloud.model_copy(update={"port": other.port}) for other in peers.values()]
            clouds.append(cloud.model_copy(update={"ca_file": stranger.ca_file}))
            # awscrt reports it up to 30 s late, against timing attacks
            await asyncio.gather(
                *(offline(each, identity, code="tls", said="no trusted TLS", remedy="cloud.ca_file") for each in clouds)
            )
            assert not [packet for each in (peer, *peers.values()) for packet in each.packets]
        print("4 untrusted servers tried")

    @pytest.mark.conformance("C-CONN-02")
    async def test_the_name_of_the_endpoint_is_asked_for(self, authority, identity):
        context, asked = authority.server_context(), []
        context.sni_callback = lambda _socket, name, _context: asked.append(name)
        async with MqttPeer(context) as peer:
            cloud = Cloud(endpoint="localhost", port=peer.port, ca_file=authority.ca_file)
            async with running(make_session(THING, cloud, identity)):
                pass
        assert asked == ["localhost"]

    async def test_a_certificate_outside_of_its_time_explains_the_refusal(self, peer, cloud, authority, monkeypatch):
        monkeypatch.setattr("agent.cloud.connection.clock_synchronised", lambda: True)
        expired, future = dated(authority, "client-expired", -9, -1), dated(authority, "client-future", 1, 9)
        await offline(cloud, expired, code="certificate", said="expired", remedy="provision")
        await offline(cloud, future, code="clock", said="not valid yet", remedy="NTP")
        monkeypatch.setattr("agent.cloud.connection.clock_synchronised", lambda: False)
        await offline(cloud, expired, code="clock", said="looks expired", remedy="NTP")
        assert not peer.packets

    async def test_it_keeps_trying_until_the_certificate_is_valid(self, peer, cloud, authority, identity, tmp_path):
        pair = Pair(tmp_path / "certificate.pem", tmp_path / "key.pem")

        def put(source: Pair) -> None:
            shutil.copy(source.certificate_file, pair.certificate_file)
            shutil.copy(source.private_key_file, pair.private_key_file)

        put(dated(authority, "client-future", 1, 9))
        session = make_session(THING, cloud, pair)
        async with running(session, connected=False):
            attempts = 0

            def count(link) -> None:
                nonlocal attempts
                attempts += link.state == "offline"

            session.on_link(count)
            await link_where(session, lambda link: link.code == "clock")
            put(identity)
            async with asyncio.timeout(20):
                await session.wait_connected()
            assert session.link.code == ""

    @pytest.mark.skipif(FAKETIME is None, reason="needs libfaketime")
    async def test_a_clock_that_is_years_behind_is_survived_and_its_correction_noticed(
        self, peer, cloud, identity, tmp_path
    ):
        clock = tmp_path / "clock"
        clock.write_text("-3650d\n")
        script = """
            from agent.cloud.offline import Pace

            async def main():
                session = make_session(pace=Pace(shortest_s=0.2, longest_s=0.5))
                session.on_link(lambda link: tell("link", link.state, link.code, link.hint))
                task = asyncio.create_task(session.run())
                await session.wait_connected()
                await session.publish("t", b"in time")
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

            tell("year", time.gmtime().tm_year)
            asyncio.run(main())
        """
        env = {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
        async with child(script, cloud, identity, env=env) as process:
            assert int((await line_of(process, "year")).split()[1]) < dt.datetime.now(dt.UTC).year - 5
            assert "NTP" in await line_of(process, "link offline clock", timeout_s=90)
            clock.write_text("+0d\n")
            await line_of(process, "link connected", timeout_s=90)
            await peer.until(lambda: peer.of(mqtt.PUBLISH))


class TestRefused:
    @pytest.mark.parametrize(
        ("reason", "code", "said", "remedy"),
        [
            (0x87, "not_authorised", "connect as cam-7", "ACTIVE"),
            (0x85, "not_authorised", "0x85", "thing_name"),
            (0x97, "throttled", "0x97", "quotas"),
            (0x88, "closed", "0x88", "by itself"),
            (0x8B, "refused", "does not know", "endpoint"),
            (0x80, "refused", "0x80", "log"),
            (-1, "closed", "before answering", "by itself"),
        ],
    )
    async def test_every_connack_is_explained_and_tried_again(self, peer, cloud, identity, reason, code, said, remedy):
        peer.connack_reasons = [reason]
        session = make_session(THING, cloud, identity)
        async with running(session, connected=False):
            link = await link_where(session, lambda link: link.state == "offline")
            assert link.code == code
            assert said in link.reason
            assert remedy in link.hint
            async with asyncio.timeout(20):
                await session.wait_connected()
        assert len(peer.of(mqtt.CONNECT)) == 2

    @pytest.mark.conformance("C-CONN-07")
    @pytest.mark.parametrize("reason", [0x87, -1])
    async def test_not_authorised_is_logged_with_certificate_and_endpoint_and_tried_slowly_for_ever(
        self, peer, cloud, identity, reason
    ):
        peer.connack_reason = reason
        pace = Pace(shortest_s=0.01, longest_s=0.02, refused_s=0.5, between_connects_s=0)
        session = make_session(THING, cloud, identity, pace)
        with capture_logs() as lines:
            async with running(session, connected=False):
                await peer.until(lambda: len(peer.of(mqtt.CONNECT)) == 8)
                told = [line for line in lines if line["event"] == "off-line"]
                peer.connack_reason = 0
                async with asyncio.timeout(20):
                    await session.wait_connected()
        assert "not_authorised" in [line["code"] for line in told[:5]]
        for line in told:
            assert line["certificate_id"] == session.certificate_id
            assert line["endpoint"] == f"localhost:{cloud.port}"
        assert all(line["next_s"] >= 0.5 for line in told[4:])
        assert Pace().refused_s >= 60

    async def test_no_answer_to_the_connect(self, peer, cloud, identity, monkeypatch):
        monkeypatch.setattr("agent.cloud.session.CONNECT_TIMEOUT_S", 1)
        peer.connack_gate.clear()
        session = make_session(THING, cloud, identity)
        async with running(session, connected=False):
            link = await link_where(session, lambda link: link.state == "offline")
            assert link.code == "no_answer"
            peer.connack_gate.set()
            async with asyncio.timeout(20):
                await session.wait_connected()


class TestDisconnected:
    @pytest.mark.conformance("C-CONN-26")
    @pytest.mark.parametrize(
        ("reason", "code"),
        [(0x8B, "closed"), (0x98, "closed"), (0x97, "throttled"), (0x8D, "no_answer"), (0x87, "not_authorised")],
    )
    async def test_a_disconnect_of_the_server_is_explained_and_the_connection_made_again(
        self, peer, cloud, identity, reason, code
    ):
        session = make_session(THING, cloud, identity)
        async with running(session):
            peer.disconnect(reason)
            link = await link_where(session, lambda link: link.state == "offline")
            assert link.code == code
            assert link.reason
            assert link.hint
            await link_where(session, lambda link: link.state == "connected")
            assert session.link.connects == 2
            await session.publish("t", b"")

    async def test_taken_over_once_it_comes_back_at_once(self, peer, cloud, identity):
        session = make_session(THING, cloud, identity)
        async with running(session):
            peer.disconnect(0x8E)
            link = await link_where(session, lambda link: link.state == "offline")
            assert (link.code, "times" in link.reason) == ("taken_over", False)
            async with asyncio.timeout(20):
                await session.wait_connected()

    @pytest.mark.conformance("C-CONN-08")
    async def test_two_cameras_of_one_name_stop_kicking_each_other_out(self, peer, cloud, identity):
        pace = Pace(shortest_s=0.02, longest_s=0.05, taken_over_s=1.5, between_connects_s=0)
        one, other = (make_session(THING, cloud, identity, pace) for _ in range(2))
        with capture_logs() as lines:
            async with running(one), running(other, connected=False):
                first = await link_where(one, lambda link: "3 times" in link.reason)
                assert first.code == "taken_over"
                assert "second device" in first.hint
                count = len(peer.of(mqtt.CONNECT))
                async with asyncio.timeout(20):
                    await other.wait_connected()
                assert len(peer.of(mqtt.CONNECT)) <= count + 1  # the twin stays alone for the time of the hold-off
                await peer.until(lambda: len(peer.of(mqtt.CONNECT)) > count + 1)  # then it is tried again
        held_off = [line["next_s"] for line in lines if "3 times" in line.get("reason", "")]
        assert held_off
        assert min(held_off) >= 1.5
        assert Pace().taken_over_s >= 300


async def test_a_server_that_acknowledges_nothing_any_more_is_left(peer, cloud, identity, monkeypatch):
    monkeypatch.setattr("agent.cloud.connection.ACK_TIMEOUT_S", 1)
    session = make_session(THING, cloud, identity)
    async with running(session):
        peer.silent_kinds = {mqtt.PUBLISH}
        results = await asyncio.gather(*(session.publish("t", b"") for _ in range(3)), return_exceptions=True)
        assert [result.code for result in results] == ["no_answer"] * 3
        link = await link_where(session, lambda link: link.code == "no_answer")
        assert "acknowledges no messages" in link.reason
        peer.silent_kinds = set()
        async with asyncio.timeout(20):
            await session.wait_connected()
        await session.publish("t", b"")


async def test_subscriptions_that_are_never_answered_make_it_wait_longer_and_longer(peer, cloud, identity, monkeypatch):
    """A CONNACK alone is no connection: neither does the back-off begin anew, nor the time off-line."""
    monkeypatch.setattr("agent.cloud.connection.ACK_TIMEOUT_S", 1)
    pace = Pace(shortest_s=0.01, longest_s=60, settled_s=0.5, between_connects_s=0)
    peer.silent_kinds = {mqtt.SUBSCRIBE}
    session = make_session(THING, cloud, identity, pace)
    session.subscribe("a/b", lambda *_: None)
    since = session.link.since
    async with running(session, connected=False):
        for _ in range(3):
            link = await link_where(session, lambda link: link.state == "offline")
            assert link.code == "no_answer"
            assert "iot:Subscribe" in link.hint
            assert link.since == since
            attempts = session._pacing.history.attempts
            link = await link_where(session, lambda link: link.state == "connecting")
            assert link.code == "no_answer"
            await link_where(session, lambda link: link.state == "offline")
            assert session._pacing.history.attempts == attempts + 1
        peer.silent_kinds = set()
        async with asyncio.timeout(20):
            await session.wait_connected()
        assert session.link.code == ""
        assert session.link.since > since
