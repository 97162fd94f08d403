"""A request that makes the server hang up must not keep the camera off-line, nor take others with it."""

import asyncio
import contextlib

import pytest

from agent.cloud import suspects
from agent.errors import CloudError
from agent.settings import Cloud
from tests.certificates import Authority
from tests.integration.connected import make_session, running
from tests.integration.mqtt_peer import PUBLISH, MqttPeer

BAD, GOOD = "$aws/things/cam-1/shadow/name/config/get", "$aws/things/cam-1/jobs/$next/get"


async def keep_asking(session, topic, heard):
    """Ask again and again, as the features do after each connect."""
    while True:
        try:
            heard.append(await session.request(topic, {}, timeout_s=5))
        except CloudError as error:
            heard.append(error.code)
        await asyncio.sleep(0.02)


@pytest.mark.conformance("C-CONN-18")
@pytest.mark.parametrize("reason", [0x87, -1], ids=["DISCONNECT 0x87", "a mere close"])
async def test_a_request_that_the_server_hangs_up_on_is_held_back_and_others_get_through(tmp_path, monkeypatch, reason):
    monkeypatch.setattr(suspects, "ALONE_S", 0.5)
    monkeypatch.setattr(suspects, "HELD_S", (1.0, 3600.0))
    authority = Authority(tmp_path)
    async with MqttPeer(authority.server_context()) as peer:
        peer.disconnect_topics[BAD] = reason
        peer.serve(GOOD, lambda request: [(GOOD + "/accepted", request.json())])
        cloud = Cloud(endpoint="localhost", port=peer.port, ca_file=authority.ca_file)
        session = make_session("cam-1", cloud, authority.client("cam-1"))
        session.subscribe_replies(BAD + "/+", GOOD + "/+")
        bad, good = [], []
        async with running(session, connected=False):
            asking = [asyncio.create_task(keep_asking(session, *it)) for it in ((BAD, bad), (GOOD, good))]
            try:
                async with asyncio.timeout(60):
                    while bad.count("messages_held") < 5 or not all_answered(good[-50:]):
                        await asyncio.sleep(0.05)
                assert session.link.code in ("messages_held", "connecting", "not_authorised", "closed")
                assert len(peer.of(PUBLISH, topic=BAD)) <= suspects.TIMES + 6
            finally:
                for task in asking:
                    task.cancel()
                await asyncio.wait(asking)


def all_answered(answers):
    return len(answers) == 50 and all(isinstance(answer, dict) for answer in answers)


async def test_an_answer_clears_it(tmp_path, monkeypatch):
    monkeypatch.setattr(suspects, "HELD_S", (0.5, 1.0))
    authority = Authority(tmp_path)
    async with MqttPeer(authority.server_context()) as peer:
        peer.disconnect_topics[BAD] = 0x87
        peer.serve(BAD, lambda request: [(BAD + "/accepted", request.json())])
        cloud = Cloud(endpoint="localhost", port=peer.port, ca_file=authority.ca_file)
        session = make_session("cam-1", cloud, authority.client("cam-1"))
        session.subscribe_replies(BAD + "/+")
        heard = []
        async with running(session, connected=False):
            asking = asyncio.create_task(keep_asking(session, BAD, heard))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(60):
                    while "messages_held" not in heard:
                        await asyncio.sleep(0.05)
            peer.disconnect_topics.clear()
            async with asyncio.timeout(30):
                while not isinstance(heard[-1], dict):
                    await asyncio.sleep(0.05)
            assert session.link.code == ""
            asking.cancel()
            await asyncio.wait({asking})
