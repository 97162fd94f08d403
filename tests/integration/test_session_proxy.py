"""The session through an HTTP proxy: with and without credentials, and proxies that open no way."""

from __future__ import annotations

import asyncio
import socket

import pytest

from agent.settings import Cloud
from tests.integration import mqtt_peer as mqtt
from tests.integration.connected import link_where, make_session, running
from tests.integration.http_proxy import HttpProxy

THING = "cam-7"
pytestmark = pytest.mark.usefixtures("readable_logs")


def proxied(cloud: Cloud, url: str, **changes) -> Cloud:
    """As agent.toml would say it, checked as such."""
    return Cloud(**{**cloud.model_dump(), "proxy_url": url, **changes})


@pytest.mark.parametrize(("credentials", "given"), [(None, ""), (("cam", "p:w @%"), "cam:p%3Aw%20%40%25")])
async def test_through_a_proxy(peer, cloud, identity, credentials, given):
    async with HttpProxy(credentials) as proxy:
        session = make_session(THING, proxied(cloud, proxy.url(given)), identity)
        async with running(session):
            await session.publish("t", b"through")
            peer.cut()
            await peer.until(lambda: len(peer.of(mqtt.CONNECT)) == 2)
        assert {address for address, _ in proxy.asked} == {f"localhost:{peer.port}"}
        assert peer.of(mqtt.PUBLISH)[0].payload == b"through"


@pytest.mark.conformance("C-CONN-03")
async def test_443_through_a_proxy_offers_the_alpn_that_aws_wants(peer, cloud, identity):
    async with HttpProxy() as proxy:
        proxy.target = ("127.0.0.1", peer.port)
        async with running(make_session(THING, proxied(cloud, proxy.url(), port=443), identity)):
            assert peer.alpn == ["x-amzn-mqtt-ca"]
        assert proxy.asked[0][0] == "localhost:443"


@pytest.mark.parametrize(
    ("behaviour", "given", "said", "remedy"),
    [
        ("tunnel", "", "credentials", "user and password"),
        ("tunnel", "cam:wrong", "credentials", "user and password"),
        ("refuse", "cam:right", "403", "443 as cloud.port"),
        ("close", "cam:right", "closed", "log"),
        ("silent", "cam:right", "does not answer", "proxy works"),
    ],
)
async def test_a_proxy_that_opens_no_way_is_told_with_the_remedy(
    peer, cloud, identity, monkeypatch, behaviour, given, said, remedy
):
    monkeypatch.setattr("agent.cloud.proxy.ANSWER_TIMEOUT_S", 0.3)
    async with HttpProxy(("cam", "right")) as proxy:
        proxy.behaviour = behaviour
        session = make_session(THING, proxied(cloud, proxy.url(given)), identity)
        async with running(session, connected=False):
            link = await link_where(session, lambda link: link.state == "offline")
            assert link.code == "proxy"
            assert f"127.0.0.1:{proxy.port}" in link.reason
            assert said in link.reason
            assert remedy in link.hint
            assert "right" not in link.reason + link.hint
            assert not peer.packets
            proxy.behaviour, proxy.credentials = "tunnel", None
            async with asyncio.timeout(20):
                await session.wait_connected()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://127.0.0.1:{unused}", "can't be reached"),
        ("http://no-such-proxy.invalid:3128", "can't be resolved"),
        ("http://127.0.0.1:{broker}", "closed"),
    ],
)
async def test_a_wrong_address_of_the_proxy_is_told(peer, cloud, identity, url, said):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # taken, but nobody listens
        url = url.format(unused=unused.getsockname()[1], broker=peer.port)
        session = make_session(THING, proxied(cloud, url), identity)
        async with running(session, connected=False):
            link = await link_where(session, lambda link: link.state == "offline")
    assert link.code == "proxy"
    assert said in link.reason


async def test_a_proxy_that_lets_nothing_through_is_told(peer, cloud, identity):
    async with HttpProxy() as proxy:
        proxy.behaviour = "swallow"
        session = make_session(THING, proxied(cloud, proxy.url()), identity)
        async with running(session, connected=False):
            link = await link_where(session, lambda link: link.state == "offline", timeout_s=60)
        assert link.code == "proxy"
        assert "nothing comes back" in link.reason


async def test_a_proxy_that_falls_silent_for_awscrt_only_does_not_hold_the_session_for_ever(
    peer, cloud, identity, monkeypatch
):
    async def opens(*_) -> None:
        return None

    monkeypatch.setattr("agent.cloud.proxy.refusal", opens)  # it answered a moment ago
    monkeypatch.setattr("agent.cloud.session.CONNECT_TIMEOUT_S", 1)
    async with HttpProxy() as proxy:
        proxy.behaviour = "silent"
        session = make_session(THING, proxied(cloud, proxy.url()), identity)
        async with running(session, connected=False):
            link = await link_where(session, lambda link: link.state == "offline")
            assert (link.code, "does not answer" in link.reason) == ("proxy", True)
            proxy.behaviour = "tunnel"
            async with asyncio.timeout(20):
                await session.wait_connected()


async def test_a_proxy_that_never_ends_its_answer_costs_no_connection(peer, cloud, identity, monkeypatch):
    monkeypatch.setattr("agent.cloud.proxy.ANSWER_TIMEOUT_S", 0.3)
    async with HttpProxy() as proxy:
        proxy.behaviour = "half"
        session = make_session(THING, proxied(cloud, proxy.url()), identity)
        async with running(session, connected=False):
            link = await link_where(session, lambda link: link.code == "proxy")
            assert "answer" in link.reason
            async with asyncio.timeout(20):
                while len(proxy.asked) < 5:
                    await asyncio.sleep(0.05)
            assert len(proxy._tasks) <= 1
            proxy.behaviour = "tunnel"
            async with asyncio.timeout(20):
                await session.wait_connected()
