"""The jobs client against the scripted server and against a local AWS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import pytest

from agent import logs
from agent.cloud.jobs import Execution, JobsClient
from agent.cloud.session import Rejected
from agent.errors import CloudError
from agent.sandbox import seed
from tests.certificates import Authority
from tests.integration import mqtt_peer as mqtt
from tests.integration.connected import Cloud, LocalAws, local_aws, make_session, running
from tests.integration.mqtt_peer import MqttPeer

THING = "cam-7"
JOBS = f"$aws/things/{THING}/jobs"
EXECUTION = {"jobId": "j1", "executionNumber": 1, "versionNumber": 1, "status": "QUEUED", "queuedAt": 1767225600}


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


def answer(**body):
    def service(packet):
        yield f"{packet.topic}/accepted", {**body, "timestamp": 1, "clientToken": packet.json()["clientToken"]}

    return service


class TestWire:
    async def test_the_next_job_is_described_with_its_document(self, peer, session):
        peer.serve(f"{JOBS}/$next/get", answer(execution={**EXECUTION, "jobDocument": '{"operation": "restart"}'}))
        jobs = JobsClient(session, THING)
        async with running(session):
            execution = await jobs.describe_next()
        assert execution == Execution("j1", 1, 1, "QUEUED", {"operation": "restart"}, {}, 1767225600.0)
        [request] = peer.of(mqtt.PUBLISH)
        assert request.json()["includeJobDocument"] is True
        assert peer.of(mqtt.SUBSCRIBE)[0].filters == [f"{JOBS}/+/get/+", f"{JOBS}/+/update/+"]

    @pytest.mark.conformance("C-JOBS-04")
    @pytest.mark.parametrize("body", [{}, {"execution": {}}, {"execution": None}])
    async def test_nothing_pending_is_none(self, peer, session, body):
        peer.serve(f"{JOBS}/$next/get", answer(**body))
        jobs = JobsClient(session, THING)
        async with running(session):
            assert await jobs.describe_next() is None

    async def test_an_update_carries_all_that_aws_checks(self, peer, session):
        peer.serve(f"{JOBS}/j1/update", answer(executionState={"status": "IN_PROGRESS", "versionNumber": 6}))
        jobs = JobsClient(session, THING)
        async with running(session):
            version = await jobs.update(
                "j1",
                execution_number=2,
                status="IN_PROGRESS",
                details={"step": "download\n", "empty": ""},
                expected_version=5,
                step_timeout_minutes=30,
            )
        assert version == 6
        body = peer.of(mqtt.PUBLISH)[0].json()
        assert body.pop("clientToken")
        assert body == {
            "status": "IN_PROGRESS",
            "statusDetails": {"step": "download", "empty": "-"},
            "expectedVersion": 5,
            "executionNumber": 2,
            "includeJobExecutionState": True,
            "stepTimeoutInMinutes": 30,
        }

    async def test_a_job_other_than_asked_for_is_not_taken(self, peer, session):
        peer.serve(f"{JOBS}/j2/get", answer(execution=EXECUTION))
        jobs = JobsClient(session, THING)
        async with running(session):
            with pytest.raises(CloudError) as caught:
                await jobs.describe("j2")
        assert caught.value.code == "malformed_reply"

    async def test_notifications(self, peer, session):
        arrived: asyncio.Queue[Execution | None] = asyncio.Queue()
        jobs = JobsClient(session, THING)
        jobs.on_notify_next(arrived.put_nowait)
        async with running(session):
            for payload in (
                b"nonsense",
                b"[]",
                {"execution": {"jobId": 7}},
                {"timestamp": 1},
                {"execution": EXECUTION},
            ):
                peer.send(f"{JOBS}/notify-next", payload)
            async with asyncio.timeout(10):
                for _ in range(4):  # also for one that can't be read: it is a hint to ask
                    assert await arrived.get() is None
                execution = await arrived.get()
                assert execution
                assert execution.job_id == "j1"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalAws]:
    with local_aws(tmp_path_factory.mktemp("aws")) as started:
        yield started


class TestLocalAws:
    async def test_a_job_from_its_creation_to_its_end(self, local):
        pair = await asyncio.to_thread(local.camera, "cam-one")
        session = make_session("cam-one", local.cloud, pair)
        jobs = JobsClient(session, "cam-one")
        arrived: asyncio.Queue[Execution | None] = asyncio.Queue()
        jobs.on_notify_next(arrived.put_nowait)
        async with running(session), asyncio.timeout(30):
            assert await jobs.describe_next() is None
            document = {"version": "1.0", "operation": "restart"}
            await asyncio.to_thread(seed.create_job, local.aws, local.fleet, "job-1", document, things=["cam-one"])
            notified = await arrived.get()
            described = await jobs.describe_next()
            assert notified
            assert described
            assert notified.job_id == described.job_id == "job-1"
            assert described.document == document
            assert described.status == "QUEUED"
            version = await jobs.update(
                "job-1",
                execution_number=described.execution_number,
                status="IN_PROGRESS",
                details={"step": "one"},
                expected_version=described.version_number,
                step_timeout_minutes=10,
            )
            assert version == described.version_number + 1
            with pytest.raises(Rejected) as stale:
                await jobs.update("job-1", status="IN_PROGRESS", expected_version=described.version_number)
            assert stale.value.code == "VersionMismatch"
            assert stale.value.details["executionState"]["versionNumber"] == version
            again = await jobs.describe("job-1", described.execution_number)
            assert (again.status, again.version_number, again.details) == ("IN_PROGRESS", version, {"step": "one"})
            await jobs.update("job-1", status="SUCCEEDED", details={"message": "done"}, expected_version=version)
            with pytest.raises(Rejected) as ended:
                await jobs.update("job-1", status="FAILED")
            assert ended.value.code == "InvalidStateTransition"
            kept = await asyncio.to_thread(seed.job_execution, local.aws, "job-1", "cam-one")
            assert (kept["status"], kept["statusDetails"]) == ("SUCCEEDED", {"message": "done"})

    async def test_an_unknown_job_is_told(self, local):
        pair = await asyncio.to_thread(local.camera, "cam-two")
        session = make_session("cam-two", local.cloud, pair)
        jobs = JobsClient(session, "cam-two")
        async with running(session):
            with pytest.raises(Rejected) as caught:
                await jobs.describe("no-such-job")
            assert caught.value.code == "ResourceNotFound"

    async def test_another_things_topics_are_refused_by_policy(self, local):
        pair = await asyncio.to_thread(local.camera, "cam-three")
        session = make_session("cam-three", local.cloud, pair)
        JobsClient(session, "cam-one")
        async with running(session):
            assert session.link.code == "subscription_refused"
            with pytest.raises(CloudError) as caught:
                await session.publish("$aws/things/cam-one/jobs/$next/get", b"{}")
            assert caught.value.code in ("not_authorised", "connection_lost")

    async def test_an_unknown_certificate_is_not_authorised(self, local, tmp_path):
        made = await asyncio.to_thread(seed._new_identity, local.aws)
        session = make_session("cam-four", local.cloud, local.keep("cam-four", made))
        refused = asyncio.Event()
        session.on_link(lambda link: refused.set() if link.code == "not_authorised" else None)
        async with running(session, connected=False), asyncio.timeout(20):
            await refused.wait()
