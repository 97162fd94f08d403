"""What the tests of the session share: an authority, the scripted server, and a session of the camera `cam-7` with it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from agent import logs
from agent.cloud.session import Session
from agent.settings import Cloud
from tests.certificates import Authority, Pair
from tests.integration.connected import make_session
from tests.integration.mqtt_peer import MqttPeer

THING = "cam-7"


@pytest.fixture
def readable_logs() -> None:
    logs.configure("console")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def identity(authority: Authority) -> Pair:
    return authority.client(THING)


@pytest.fixture
async def peer(authority: Authority) -> AsyncIterator[MqttPeer]:
    async with MqttPeer(authority.server_context()) as running:
        yield running


@pytest.fixture
def cloud(authority: Authority, peer: MqttPeer) -> Cloud:
    return Cloud(endpoint="localhost", port=peer.port, ca_file=authority.ca_file)


@pytest.fixture
def session(cloud: Cloud, identity: Pair) -> Session:
    return make_session(THING, cloud, identity)
