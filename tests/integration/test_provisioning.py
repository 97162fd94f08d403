"""Fleet provisioning against the scripted server and against a local AWS."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from agent import logs
from agent.cloud import identity
from agent.cloud.provisioning import provision, retry_s
from agent.errors import CloudError
from agent.settings import Cloud, Paths, Provisioning, Settings
from tests.certificates import Authority
from tests.integration import mqtt_peer as mqtt
from tests.integration.connected import local_aws, make_session, running
from tests.integration.mqtt_peer import MqttPeer

CREATE = "$aws/certificates/create-from-csr/json"
REGISTER = "$aws/provisioning-templates/fleet/provision/json"


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
def settings(peer, authority, tmp_path) -> Settings:
    claim = authority.client("claim")
    return Settings(
        cloud=Cloud(endpoint="localhost", port=peer.port, ca_file=authority.ca_file),
        provisioning=Provisioning(
            template="fleet",
            claim_certificate_file=claim.certificate_file,
            claim_private_key_file=claim.private_key_file,
            parameters={"SerialNumber": "0412"},
        ),
        paths=Paths(state_dir=tmp_path / "state"),
    )


def certify(authority: Authority):
    def service(packet):
        pem = authority.sign(packet.json()["certificateSigningRequest"])
        yield f"{CREATE}/accepted", {"certificateId": "x", "certificatePem": pem, "certificateOwnershipToken": "secret"}

    return service


def register(packet):
    yield f"{REGISTER}/accepted", {"thingName": "cam-" + packet.json()["parameters"]["SerialNumber"]}


def leftovers(settings: Settings) -> list[str]:
    folder = settings.paths.state_dir / "identity"
    return [path.name for path in folder.iterdir()] if folder.exists() else []


class TestWire:
    async def test_a_camera_becomes_a_thing(self, peer, settings, authority):
        peer.serve(CREATE, certify(authority))
        peer.serve(REGISTER, register)
        assert await provision(settings) == "cam-0412"
        assert await asyncio.to_thread(identity.thing_name, settings) == "cam-0412"
        assert identity.key_matches(settings.certificate_file.read_bytes(), settings.private_key_file.read_bytes())
        kinds = [p.kind for p in peer.packets if p.kind != mqtt.PUBACK]
        assert kinds == [mqtt.CONNECT, mqtt.SUBSCRIBE, mqtt.PUBLISH, mqtt.PUBLISH, mqtt.DISCONNECT]
        assert peer.packets[0].client_id.startswith("provisioning-")
        assert peer.packets[0].clean_start
        assert set(peer.packets[1].filters) == {
            f"{t}/{o}" for t in (CREATE, REGISTER) for o in ("accepted", "rejected")
        }
        assert peer.of(mqtt.PUBLISH, topic=REGISTER)[0].json()["certificateOwnershipToken"] == "secret"
        assert "PRIVATE" not in json.dumps([p.payload.decode() for p in peer.of(mqtt.PUBLISH)])

    async def test_client_ids_differ(self, peer, settings, authority):
        peer.serve(CREATE, certify(authority))
        peer.serve(REGISTER, register)
        await provision(settings)
        await provision(settings)
        assert len({p.client_id for p in peer.of(mqtt.CONNECT)}) == 2

    @pytest.mark.parametrize(
        ("status", "retryable"), [(400, False), (403, False), (404, False), (429, True), (500, True), (None, True)]
    )
    async def test_a_refused_registration_keeps_nothing(self, peer, settings, authority, status, retryable):
        peer.serve(CREATE, certify(authority))
        body = {"statusCode": status, "errorCode": "Because", "errorMessage": "no"}
        peer.serve(REGISTER, lambda _: [(f"{REGISTER}/rejected", body)])
        with pytest.raises(CloudError) as caught:
            await provision(settings)
        assert (caught.value.code, caught.value.retryable) == ("Because", retryable)
        assert caught.value.hint
        assert leftovers(settings) == []

    async def test_no_answer_is_retryable_and_keeps_nothing(self, peer, settings, authority):
        with pytest.raises(CloudError) as caught:
            await provision(settings, answer_timeout_s=0.3)
        assert (caught.value.code, caught.value.retryable) == ("no_answer", True)
        assert leftovers(settings) == []

    async def test_a_certificate_for_another_key_is_not_kept(self, peer, settings, authority):
        foreign = authority.client("foreign").certificate_file.read_text()
        body = {"certificatePem": foreign, "certificateOwnershipToken": "t"}
        peer.serve(CREATE, lambda _: [(f"{CREATE}/accepted", body)])
        peer.serve(REGISTER, register)
        with pytest.raises(CloudError):
            await provision(settings)
        assert leftovers(settings) == []

    async def test_a_claim_that_is_not_let_in(self, peer, settings):
        peer.connack_reason = 0x87
        with pytest.raises(CloudError) as caught:
            await provision(settings, connect_timeout_s=1.0)
        assert (caught.value.code, caught.value.retryable) == ("not_authorised", True)

    async def test_a_claim_without_subscribe_rights(self, peer, settings):
        peer.refuse_filters[f"{CREATE}/accepted"] = 0x87
        with pytest.raises(CloudError) as caught:
            await provision(settings)
        assert (caught.value.code, caught.value.retryable) == ("subscription_refused", False)

    async def test_no_template_or_a_missing_claim_is_told(self, settings, tmp_path):
        for changes in ({"template": ""}, {"claim_certificate_file": tmp_path / "none.pem"}):
            changed = settings.provisioning.model_copy(update=changes)
            with pytest.raises(CloudError) as caught:
                await provision(settings.model_copy(update={"provisioning": changed}))
            assert not caught.value.retryable
            assert leftovers(settings) == []


def test_configuration_errors_are_retried_slowly_and_others_with_back_off():
    assert min(retry_s(CloudError("x", ""), n, 0.0) for n in range(1, 30)) >= 300
    passing = CloudError("x", "", retryable=True)
    assert [retry_s(passing, n, 1.0) for n in range(1, 9)] == [10, 20, 40, 80, 160, 300, 300, 300]
    assert retry_s(passing, 20, 0.0) == 5


async def test_a_claim_becomes_a_camera_of_a_local_aws(tmp_path):
    entered = local_aws(tmp_path)
    local = await asyncio.to_thread(entered.__enter__)
    try:
        claim = local.keep("claim", local.fleet.claim)
        settings = Settings(
            cloud=local.cloud,
            provisioning=Provisioning(
                template=local.fleet.template,
                claim_certificate_file=claim.certificate_file,
                claim_private_key_file=claim.private_key_file,
                parameters={"SerialNumber": "0412"},
            ),
            paths=Paths(state_dir=tmp_path / "state"),
        )
        thing = await provision(settings)
        assert thing == "cam-0412"
        session = make_session(thing, local.cloud, settings)
        async with running(session):
            await session.publish(f"$aws/rules/camera_fleet/cameras/{thing}/event", b"{}")
        wrong = settings.provisioning.model_copy(update={"parameters": {}})
        with pytest.raises(CloudError) as caught:
            await provision(settings.model_copy(update={"provisioning": wrong}))
        assert not caught.value.retryable
        assert await asyncio.to_thread(identity.thing_name, settings) == thing
    finally:
        await asyncio.to_thread(entered.__exit__, None, None, None)
