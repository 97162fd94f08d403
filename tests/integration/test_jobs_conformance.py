"""Statements about jobs on the real wire: session, jobs client, engine and journal against a scripted Jobs service."""

import asyncio
import contextlib
import hashlib
import json
import time
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from agent import logs
from agent.cloud import session as session_module
from agent.cloud.jobs import JobsClient
from agent.cloud.session import Rejected, Session
from agent.errors import CloudError, FailedError
from agent.jobs import conversation
from agent.jobs import engine as engine_module
from agent.jobs.engine import Engine
from agent.settings import Cloud
from agent.store import Store
from agent.updates.fetch import Limits, fetch
from tests.certificates import Authority
from tests.fakes import TERMINAL, JobsService
from tests.integration import mqtt_peer as mqtt
from tests.integration.connected import make_session, running
from tests.integration.mqtt_peer import MqttPeer

THING = "cam-7"
JOBS = f"$aws/things/{THING}/jobs"
NOTIFY_NEXT = f"{JOBS}/notify-next"
DOCUMENT = {"version": "1.0", "operation": "restart"}
AT_REST_S = 0.2
"""How long a test looks whether something happens that must not."""


class HeldBack(MqttPeer):
    """Gives no SUBACK until `release` is set."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.release = asyncio.Event()
        self._held = []

    def _handle(self, client, packet, answered):
        if packet.kind == mqtt.SUBSCRIBE and not self.release.is_set():
            self._held.append((client, packet))
            return True
        return super()._handle(client, packet, answered)

    def let_go(self):
        self.release.set()
        for client, packet in self._held:
            super()._handle(client, packet, True)


class WireJobs:
    """The model of the Jobs service behind the scripted server: requests, answers and refusals as AWS IoT writes them."""

    def __init__(self, peer: MqttPeer):
        self.peer, self.model = peer, JobsService()
        self.refuse: list[tuple[str, dict]] = []
        """Codes, with what else the refusal says, of the next updates."""
        self.before_answer: list[tuple[str, object]] = []
        """Messages put before the next answer to a describe of $next; {token} is replaced."""
        self.hold_updates: asyncio.Event | None = None
        self.queued_at = 1767225600
        peer.serve(f"{JOBS}/+/get", self.describe)
        peer.serve(f"{JOBS}/+/update", self.update)

    def describe(self, packet):
        job_id, body = packet.topic.split("/")[-2], packet.json()
        if job_id == "$next":
            for topic, message in self.before_answer:
                yield topic, json.loads(json.dumps(message).replace("{token}", body["clientToken"]))
            self.before_answer = []
            call = self.model.describe_next()
        else:
            call = self.model.describe(job_id, body.get("executionNumber"))
        yield from self.answer(packet, call, lambda e: {"execution": self.execution(e)} if e else {})

    def update(self, packet):
        job_id, body = packet.topic.split("/")[-2], packet.json()
        if self.refuse:
            code, more = self.refuse.pop(0)
            if code != "(lost)":
                yield f"{packet.topic}/rejected", self.stamped(packet, code=code, message="as told", **more)
            return
        call = self.model.update(
            job_id,
            execution_number=body.get("executionNumber"),
            status=body["status"],
            details=body["statusDetails"],
            expected_version=body.get("expectedVersion"),
        )
        state = {"status": body["status"], "statusDetails": body["statusDetails"]}
        yield from self.answer(packet, call, lambda version: {"executionState": {**state, "versionNumber": version}})

    def answer(self, packet, call, shape):
        try:
            call.send(None)
        except StopIteration as done:
            yield f"{packet.topic}/accepted", self.stamped(packet, **shape(done.value))
        except Rejected as refusal:
            state = {key: value for key, value in refusal.details.items() if key == "executionState"}
            yield f"{packet.topic}/rejected", self.stamped(packet, code=refusal.code, message="no", **state)
        except CloudError:
            pass  # lost

    def stamped(self, packet, **body):
        return {**body, "timestamp": int(time.time()), "clientToken": packet.json()["clientToken"]}

    def execution(self, execution):
        document = execution.document() if callable(execution.document) else execution.document
        return {
            "jobId": execution.job_id,
            "executionNumber": execution.execution_number,
            "versionNumber": execution.version_number,
            "status": execution.status,
            "statusDetails": execution.details,
            "queuedAt": self.queued_at,
            "lastUpdatedAt": self.queued_at,
            "jobDocument": document,
        }

    def notify(self, execution=None):
        self.peer.send(NOTIFY_NEXT, {"timestamp": 1, **({"execution": execution} if execution is not None else {})})

    def create(self, job_id, document=DOCUMENT, **options):
        """Create an execution and tell of it."""
        self.model.create(job_id, document, **options)
        self.notify(
            {"jobId": job_id, "executionNumber": options.get("number", 1), "versionNumber": 1, "status": "QUEUED"}
        )

    def sent(self, what="", job_id="+"):
        """The bodies of the requests that arrived: `get` or `update`, of one job."""
        packets = [p for p in self.peer.of(mqtt.PUBLISH) if p.topic.startswith(JOBS)]
        return [p.json() for p in packets if p.topic.endswith(what) and job_id in ("+", p.topic.split("/")[-2])]

    async def until_ended(self, job_id, number=1):
        key = (job_id, number)
        await self.peer.until(lambda: key in self.model.executions and self.model.status(*key) in TERMINAL)


class Work:
    """An operation that does what the test tells it."""

    name = "restart"

    def __init__(self, act=None):
        self.act = act
        self.runs = []
        self.begun = asyncio.Event()

    def check(self, document):
        pass

    async def run(self, job):
        self.runs.append((job.id, job.execution_number))
        self.begun.set()
        return await self.act(job) if self.act else {"message": "done"}


class Waiting(Work):
    """Runs until it is released or cancelled."""

    def __init__(self):
        super().__init__(self.wait)
        self.release = asyncio.Event()

    async def wait(self, job):
        released, cancelled = (asyncio.create_task(event.wait()) for event in (self.release, job.cancelled))
        try:
            await asyncio.wait({released, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            released.cancel()
            cancelled.cancel()
        if job.cancelled.is_set():
            raise FailedError("cancelled", "stopped and taken back")
        return {"message": "done"}


@dataclass
class Agent:
    """Session, client, engine and journal, joined as the daemon joins them."""

    session: Session
    store: Store
    work: Work
    operations: dict = field(default_factory=dict)
    facts: dict = field(default_factory=dict)

    def __post_init__(self):
        client = JobsClient(self.session, THING)
        self.engine = Engine(
            store=self.store,
            jobs=client,
            operations=self.operations or {"restart": self.work},
            allow=list(self.operations or ["restart"]),
            facts=lambda: self.facts,
        )
        client.on_notify_next(lambda _: self.engine.wake())

        async def ready():
            self.engine.wake()

        self.session.on_ready(ready)

    @contextlib.asynccontextmanager
    async def running(self, *, connected=True):
        task = asyncio.create_task(self.engine.run())
        try:
            async with running(self.session, connected=connected):
                yield self
        finally:
            task.cancel()
            await asyncio.wait({task})

    async def closed(self, job_id, number=1):
        async with asyncio.timeout(20):
            while True:
                record = await self.store.read(lambda t: t.job(job_id, number))
                if record and record["phase"] == "closed":
                    return record
                await asyncio.sleep(0.005)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    logs.configure("console", "debug")
    for name, value in {"RETRY_S": (0.01, 0.05), "NEWS_INTERVAL_S": 0.0}.items():
        monkeypatch.setattr(engine_module, name, value)
    monkeypatch.setattr(conversation, "RETRY_S", (0.01, 0.05))


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
async def peer(authority):
    async with MqttPeer(authority.server_context()) as server:
        yield server


@pytest.fixture
async def store(tmp_path):
    opened = await Store.open(tmp_path / "state.db")
    yield opened
    await opened.close()


@pytest.fixture
def service(peer):
    return WireJobs(peer)


@pytest.fixture
def agent_for(authority, store):
    """Makes an agent that talks to a server, with an operation."""

    def make(server, work, *, before=None, **operations):
        """`before` gets notifications before the engine does."""
        cloud = Cloud(endpoint="localhost", port=server.port, ca_file=authority.ca_file)
        session = make_session(THING, cloud, authority.client(THING))
        if before:
            session.subscribe(NOTIFY_NEXT, before)
        return Agent(session, store, work, operations)

    return make


@pytest.mark.conformance("C-JOBS-01")
async def test_nothing_is_asked_before_every_subscription_is_answered(authority, agent_for):
    async with HeldBack(authority.server_context()) as peer:
        service = WireJobs(peer)
        service.model.create("a", DOCUMENT)
        agent = agent_for(peer, Work())
        async with agent.running(connected=False):
            await peer.until(lambda: peer.of(mqtt.SUBSCRIBE))
            await asyncio.sleep(AT_REST_S)
            assert peer.of(mqtt.PUBLISH) == []
            peer.let_go()
            await service.until_ended("a")
        filters = {name for packet in peer.of(mqtt.SUBSCRIBE) for name in packet.filters}
        assert filters == {NOTIFY_NEXT, f"{JOBS}/+/get/+", f"{JOBS}/+/update/+"}


@pytest.mark.conformance("C-JOBS-02", "F-10")
@pytest.mark.parametrize("forgotten", [False, True], ids=["session kept", "session lost"])
async def test_after_every_connect_the_next_job_is_asked_for_once(peer, service, agent_for, forgotten):
    agent = agent_for(peer, Work())
    async with agent.running():
        for connect in range(1, 4):
            await peer.until(lambda: len(service.sent("$next/get")) == connect)
            await asyncio.sleep(AT_REST_S)
            if forgotten:
                peer.forget_sessions()
            peer.cut()
        service.model.create("a", DOCUMENT)  # and nobody says so
        await service.until_ended("a")
    by_connection = [p.connection for p in peer.of(mqtt.PUBLISH) if p.topic.endswith("$next/get")]
    assert [by_connection.count(n) for n in (1, 2, 3)] == [1, 1, 1]
    again = [p.connection for p in peer.of(mqtt.SUBSCRIBE)]
    assert set(again) == ({1, 2, 3, 4} if forgotten else {1})


@pytest.mark.conformance("C-JOBS-03")
async def test_answers_to_others_and_of_others_are_ignored(peer, service, agent_for):
    evil = service.execution(await_now(model_with("evil").describe_next()))
    other = "$aws/things/other/jobs/$next/get/accepted"
    service.before_answer = [
        (f"{JOBS}/$next/get/accepted", {"execution": evil}),
        (f"{JOBS}/$next/get/accepted", {"execution": evil, "clientToken": "somebody-elses"}),
        (f"{JOBS}/evil/get/accepted", {"execution": evil, "clientToken": "{token}"}),
        (other, {"execution": evil, "clientToken": "{token}"}),
    ]
    service.model.create("good", DOCUMENT)
    agent = agent_for(peer, Work())
    async with agent.running():
        await service.until_ended("good")
    assert agent.work.runs == [("good", 1)]
    assert service.sent("update", "evil") == []


@pytest.mark.conformance("C-JOBS-04")
@pytest.mark.parametrize("execution", [{}, None, "absent"])
async def test_no_execution_means_nothing_to_do(peer, agent_for, execution):
    def idle(packet):
        body = {} if execution == "absent" else {"execution": execution}
        yield f"{packet.topic}/accepted", {**body, "clientToken": packet.json()["clientToken"]}

    peer.serve(f"{JOBS}/$next/get", idle)
    agent = agent_for(peer, Work())
    async with agent.running():
        await peer.until(lambda: peer.of(mqtt.PUBLISH))
        await asyncio.sleep(AT_REST_S)
        assert [p.topic for p in peer.of(mqtt.PUBLISH)] == [f"{JOBS}/$next/get"]
        assert agent.engine.current is None
        assert agent.work.runs == []


@pytest.mark.conformance("C-JOBS-05", "C-JOBS-23")
async def test_in_progress_is_taken_at_the_received_version_before_anything_is_touched(peer, service, agent_for):
    service.model.create("a", DOCUMENT)
    service.model.executions["a", 1]["version"] = 4
    service.refuse = [("(lost)", {})]
    agent = agent_for(peer, Work())
    async with agent.running():
        await peer.until(lambda: service.sent("update"))
        await asyncio.sleep(AT_REST_S)
        assert agent.work.runs == [], "it is not known yet whether the cloud takes it"
        [body] = service.sent("update")
        assert (body["status"], body["expectedVersion"], body["executionNumber"]) == ("IN_PROGRESS", 4, 1)
        assert 1 <= body["stepTimeoutInMinutes"] <= 10080
        peer.cut()  # the answer will never come
        await service.until_ended("a")
    assert agent.work.runs == [("a", 1)]


REFUSALS = {
    "cancelled": ("InvalidStateTransition", {"executionState": {"status": "CANCELED", "versionNumber": 2}}),
    "timed out": ("VersionMismatch", {"executionState": {"status": "TIMED_OUT", "versionNumber": 2}}),
    "deleted": ("ResourceNotFound", {}),
    "over": ("TerminalStateReached", {}),
}


@pytest.mark.conformance("C-JOBS-06")
@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
async def test_when_in_progress_is_refused_nothing_is_touched(peer, service, agent_for, refusal):
    service.model.create("a", DOCUMENT)
    service.refuse = [refusal]
    agent = agent_for(peer, Work())
    async with agent.running():
        await peer.until(lambda: service.sent("update"))
        service.model.end("a", "CANCELED")
        await agent.closed("a")
        service.create("b")
        await service.until_ended("b")
    assert agent.work.runs == [("b", 1)]
    assert len(service.sent("update", "a")) == 1


@pytest.mark.conformance("C-JOBS-09", "C-JOBS-10", "C-CONN-22", "F-17")
async def test_notifications_during_a_job_change_nothing_about_it(peer, service, agent_for):
    service.model.create("a", DOCUMENT)
    work = Waiting()
    agent = agent_for(peer, work)
    async with agent.running():
        async with asyncio.timeout(20):
            await work.begun.wait()
        running_a = {"jobId": "a", "executionNumber": 1, "versionNumber": 2, "status": "IN_PROGRESS"}
        for _ in range(5):
            service.notify(running_a)
        service.create("b")
        await peer.until(lambda: len(service.sent("update", "a")) >= 2)
        assert agent.engine.current.key == ("a", 1)
        assert work.runs == [("a", 1)]
        work.release.set()
        await service.until_ended("b")
        service.model.executions["a", 1]["status"] = "FAILED"  # and retried by the service
        service.create("a", number=2)
        await service.until_ended("a", 2)
    assert work.runs == [("a", 1), ("b", 1), ("a", 2)]
    assert {(body["status"], body["executionNumber"]) for body in service.sent("update", "a")} == {
        ("IN_PROGRESS", 1),
        ("SUCCEEDED", 1),
        ("IN_PROGRESS", 2),
        ("SUCCEEDED", 2),
    }
    last = [status for name, status, _ in service.model.updates if status in TERMINAL]
    assert last == ["SUCCEEDED"] * 3


@pytest.mark.conformance("C-JOBS-09", "C-CONN-29")
async def test_a_notification_that_comes_late_and_out_of_order_brings_nothing_back(peer, service, agent_for):
    agent = agent_for(peer, Work())
    async with agent.running():
        service.create("a")
        await agent.closed("a")
        service.create("b")
        for status, version in (("IN_PROGRESS", 2), ("QUEUED", 1)):
            old = {"jobId": "a", "executionNumber": 1, "versionNumber": version, "status": status}
            service.notify({**old, "jobDocument": DOCUMENT, "queuedAt": service.queued_at})
        await agent.closed("b")
        asked = len(service.sent("$next/get"))
        service.notify({"jobId": "a", "executionNumber": 1, "versionNumber": 1, "status": "QUEUED", "queuedAt": 1})
        await peer.until(lambda: len(service.sent("$next/get")) > asked)
    assert agent.work.runs == [("a", 1), ("b", 1)]
    assert [status for name, status, _ in service.model.updates if name == "a"] == ["IN_PROGRESS", "SUCCEEDED"]


@pytest.mark.conformance("C-CONN-23", "F-14")
async def test_an_exception_in_one_handler_keeps_the_message_from_no_other(peer, service, agent_for):
    def broken(topic, payload):
        raise ZeroDivisionError("a bug in a feature")

    agent = agent_for(peer, Work(), before=broken)
    async with agent.running():
        await peer.until(lambda: service.sent("$next/get"))
        service.create("a")
        await service.until_ended("a")
    assert agent.work.runs == [("a", 1)]


@pytest.mark.conformance("C-JOBS-27", "C-CONN-27")
async def test_empty_and_senseless_notifications_leave_the_running_job_alone(peer, service, agent_for):
    service.model.create("a", DOCUMENT)
    work = Waiting()
    agent = agent_for(peer, work)
    async with agent.running():
        async with asyncio.timeout(20):
            await work.begun.wait()
        service.notify()
        service.notify({})
        for payload in (b"", b"nonsense", b"[]", b'{"execution": 7}', b'{"execution": {"jobId": "../x"}}', b"\xff"):
            peer.send(NOTIFY_NEXT, payload)
        peer.send(f"{JOBS}/unheard-of", {"execution": {}})
        await peer.until(lambda: len(service.sent("update", "a")) >= 2)
        assert agent.engine.current.key == ("a", 1)
        work.release.set()
        await service.until_ended("a")
    assert service.model.status("a") == "SUCCEEDED"
    assert work.runs == [("a", 1)]


@pytest.mark.conformance("C-JOBS-13")
@pytest.mark.parametrize("place", ["target", "operation"])
async def test_a_placeholder_that_the_service_left_is_told(peer, service, agent_for, place):
    document = {**DOCUMENT, place: "${aws:iot:parameter:what}"}
    service.model.create("a", document)
    agent = agent_for(peer, Work())
    async with agent.running():
        await service.until_ended("a")
    assert service.model.status("a") == "REJECTED"
    assert "${aws:iot:" in service.model.details("a")["message"]
    assert agent.work.runs == []


def is_debian(value="debian", key="os.id", kind="stringEqual"):
    return {"key": key, "value": value, "type": kind}


CONDITIONS = {
    "met": ([is_debian(), is_debian(["0.2", "0.1"], "agent.version", "versionAtLeast")], "SUCCEEDED", "ok"),
    "not met": ([is_debian("ubuntu")], "REJECTED", "condition_not_met"),
    "one of two": ([is_debian(), is_debian("9", "agent.version", "versionAtLeast")], "REJECTED", "condition_not_met"),
    "without a value": ([is_debian("1.0", "target.x.version", "stringNotEqual")], "REJECTED", "condition_not_met"),
    "unknown key": ([is_debian(), is_debian("red", "colour")], "REJECTED", "condition_unknown"),
    "unknown type": ([is_debian(kind="numericEquals")], "REJECTED", "condition_unknown"),
    "not a version": ([is_debian("newest", "agent.version", "versionBelow")], "REJECTED", "condition_unknown"),
    "not a condition": ([{"key": "os.id"}], "REJECTED", "bad_document"),
}


@pytest.mark.conformance("C-DOC-10", "F-07")
@pytest.mark.parametrize(("conditions", "status", "code"), CONDITIONS.values(), ids=CONDITIONS)
async def test_a_job_runs_only_where_its_conditions_hold(peer, service, agent_for, conditions, status, code):
    service.model.create("a", {**DOCUMENT, "conditions": conditions})
    agent = agent_for(peer, Work())
    agent.facts |= {"os.id": "debian", "agent.version": "0.1.0", "target.x.version": ""}
    async with agent.running():
        await service.until_ended("a")
        await agent.closed("a")
    assert (service.model.status("a"), service.model.details("a")["reason_code"]) == (status, code)
    assert agent.work.runs == ([("a", 1)] if status == "SUCCEEDED" else [])
    assert [body["status"] for body in service.sent("update")] == (["IN_PROGRESS"] * (status == "SUCCEEDED")) + [status]


@pytest.mark.conformance("C-JOBS-14")
@pytest.mark.parametrize(
    ("sent", "status"), [(DOCUMENT, "SUCCEEDED"), (json.dumps(DOCUMENT), "SUCCEEDED"), ("{half", "REJECTED")]
)
async def test_a_document_is_an_object_or_text_with_one(peer, service, agent_for, sent, status):
    service.model.create("a", sent)
    agent = agent_for(peer, Work())
    async with agent.running():
        await service.until_ended("a")
    assert service.model.status("a") == status


@pytest.mark.conformance("C-JOBS-15", "C-JOBS-16")
async def test_every_update_carries_all_its_details_in_the_form_that_is_taken(peer, service, agent_for):
    nasty = {f"key {n}": "x" * 3000 for n in range(20)}

    async def act(job):
        await job.save({"n": 1}, "first\nline \x1b[31m red")
        await peer.until(lambda: len(service.sent("update", "a")) >= 2)
        return {"message": "", "stdout": "\0\x07" + "a\tb\n" * 900, **nasty}

    service.model.create("a", DOCUMENT)
    agent = agent_for(peer, Work(act))
    async with agent.running():
        await service.until_ended("a")
    bodies = service.sent("update", "a")
    assert (bodies[0]["status"], bodies[-1]["status"]) == ("IN_PROGRESS", "SUCCEEDED")
    for body in bodies:
        details = body["statusDetails"]
        assert {"reason_code", "message"} <= details.keys()
        assert len(details) <= 10
        assert all(0 < len(value) <= 1024 and value.isprintable() for value in details.values())
        assert all(key.replace("_", "").isalnum() for key in details)
    assert bodies[-1]["statusDetails"]["message"] == "-"


@pytest.mark.conformance("C-JOBS-17")
@pytest.mark.parametrize("phase", ["announcing", "running", "reporting"])
@pytest.mark.parametrize("cloud_says", ["same", "CANCELED"])
async def test_a_stale_version_goes_on_or_stops_by_the_state_in_the_refusal(
    peer, service, agent_for, phase, cloud_says
):
    def meddle():
        entry = service.model.executions["a", 1]
        entry["version"] += 5
        if cloud_says != "same":
            entry["status"] = cloud_says

    async def act(job):
        if phase == "running":
            before = len(service.sent("update", "a"))
            meddle()
            await job.save({"n": 1}, "half way")
            await peer.until(lambda: len(service.sent("update", "a")) > before)
            if cloud_says == "CANCELED":
                await job.cancelled.wait()
                raise FailedError("cancelled", "stopped")
        if phase == "reporting":
            meddle()
        return {"message": "done"}

    service.model.create("a", DOCUMENT)
    if phase == "announcing":
        state = {"status": "QUEUED", "versionNumber": 9} if cloud_says == "same" else {"status": "CANCELED"}
        service.refuse = [("VersionMismatch", {"executionState": state})]
        service.model.executions["a", 1]["version"] = 9
    agent = agent_for(peer, Work(act))
    async with agent.running():
        if phase == "announcing" and cloud_says == "CANCELED":
            await peer.until(lambda: service.sent("update"))
            service.model.end("a", "CANCELED")
        record = await agent.closed("a")
    assert service.model.status("a") == ("SUCCEEDED" if cloud_says == "same" else "CANCELED")
    assert record["superseded"] == (None if cloud_says == "same" else "CANCELED")
    assert len(agent.work.runs) == (0 if (phase, cloud_says) == ("announcing", "CANCELED") else 1)
    if phase == "announcing" and cloud_says == "same":
        assert [body["expectedVersion"] for body in service.sent("update", "a")][:2] == [9, 9]


@pytest.mark.conformance("C-JOBS-18", "C-JOBS-19", "F-09")
@pytest.mark.parametrize("end", ["CANCELED", "TIMED_OUT", "REMOVED"])
async def test_a_forced_end_is_noticed_stops_the_work_and_is_not_reported_over(
    peer, service, agent_for, monkeypatch, end
):
    assert engine_module.HEARTBEAT_S <= 60
    monkeypatch.setattr(engine_module, "HEARTBEAT_S", 0.05)
    service.model.create("a", DOCUMENT)
    work = Waiting()
    agent = agent_for(peer, work)
    async with agent.running():
        async with asyncio.timeout(20):
            await work.begun.wait()
        service.model.end("a", end)  # nobody tells the camera
        record = await agent.closed("a")
        told = len(service.sent("update", "a"))
        service.create("b")
        await peer.until(lambda: ("b", 1) in work.runs)
        work.release.set()
        await service.until_ended("b")
    assert (record["status"], record["superseded"]) == ("FAILED", end)
    assert len(service.sent("update", "a")) == told
    assert all(body["status"] == "IN_PROGRESS" for body in service.sent("update", "a"))


@pytest.mark.conformance("C-JOBS-20", "C-JOBS-21", "C-SDK-06")
async def test_what_has_no_definite_answer_is_sent_again_as_it_was_with_a_new_token(
    peer, service, agent_for, monkeypatch
):
    monkeypatch.setattr(session_module, "LONGEST_REQUEST_S", 2.0)

    async def act(job):
        service.refuse = [("RequestThrottled", {}), ("InternalError", {}), ("(lost)", {}), ("RequestThrottled", {})]
        return {"message": "done"}

    service.model.create("a", DOCUMENT)
    agent = agent_for(peer, Work(act))
    async with agent.running():
        await agent.closed("a")
        await peer.until(lambda: len(agent.session._replies) == 0)
    ends = [body for body in service.sent("update", "a") if body["status"] == "SUCCEEDED"]
    assert len(ends) >= 5
    tokens = {body.pop("clientToken") for body in ends}
    assert len(tokens) == len(ends)
    assert all(body == ends[0] for body in ends)


@pytest.mark.conformance("C-JOBS-21")
async def test_an_end_that_was_taken_although_its_answer_was_lost_is_a_success(peer, service, agent_for, monkeypatch):
    monkeypatch.setattr(session_module, "LONGEST_REQUEST_S", 2.0)

    async def act(job):
        service.model.lose_answer = 1
        return {"message": "done"}

    service.model.create("a", DOCUMENT)
    agent = agent_for(peer, Work(act))
    async with agent.running():
        record = await agent.closed("a")
    assert (record["status"], record["superseded"], service.model.status("a")) == ("SUCCEEDED", None, "SUCCEEDED")
    assert [status for _, status, _ in service.model.updates] == ["IN_PROGRESS", "SUCCEEDED"]
    assert agent.work.runs == [("a", 1)]


@pytest.mark.conformance("C-JOBS-22", "C-JOBS-31", "C-CONN-26")
@pytest.mark.parametrize("reason", [0x8B, 0x98, None], ids=["0x8B", "0x98", "closed"])
async def test_an_end_decided_off_line_is_told_after_the_next_connect(peer, service, agent_for, reason):
    async def act(job):
        peer.connack_reason = 0x88
        peer.disconnect(reason) if reason else peer.cut()
        async with asyncio.timeout(20):
            while agent.session.link.state == "connected":
                await asyncio.sleep(0.005)
        return {"message": "done without a network"}

    service.model.create("a", DOCUMENT)
    service.model.create("b", DOCUMENT)
    agent = agent_for(peer, Work(act))
    async with agent.running():
        async with asyncio.timeout(20):
            while not (agent.engine.current and agent.engine.current.phase == "ended"):
                await asyncio.sleep(0.005)
        agent.work.act = None
        service.model.end("b", "REMOVED")
        peer.connack_reason = 0
        await service.until_ended("a")
        await agent.closed("a")
    assert service.model.details("a")["message"] == "done without a network"
    assert agent.work.runs == [("a", 1)], "and the job removed meanwhile never ran"


@pytest.mark.conformance("C-JOBS-31")
@pytest.mark.parametrize("restarted", [False, True], ids=["kept running", "restarted"])
async def test_a_job_removed_off_line_is_stopped_at_the_next_connect_and_stays_so(peer, service, agent_for, restarted):
    service.model.create("a", DOCUMENT)
    agent = agent_for(peer, Waiting())
    async with agent.running():
        async with asyncio.timeout(20):
            await agent.work.begun.wait()
        peer.connack_reason = 0x88
        peer.cut()
        service.model.end("a", "REMOVED")
        told = len(service.sent("update", "a"))
        if not restarted:
            peer.connack_reason = 0
            record = await agent.closed("a")
    peer.connack_reason = 0
    again = agent_for(peer, Waiting())
    async with again.running():
        record = await again.closed("a")
        service.create("b")
        await peer.until(lambda: ("b", 1) in again.work.runs)
    assert (record["status"], record["superseded"]) == ("FAILED", "REMOVED")
    assert again.work.runs == [("a", 1), ("b", 1)][0 if restarted else 1 :]
    assert len(service.sent("update", "a")) <= told + 1, "one question, which was refused"


@pytest.mark.conformance("C-JOBS-28")
@pytest.mark.parametrize("queued_at", [1767225600, 1767225600123, 1767225600.5, "soon", None, True])
async def test_times_of_any_form_do_not_harm(peer, service, agent_for, queued_at):
    service.queued_at = queued_at
    service.model.create("a", DOCUMENT)
    agent = agent_for(peer, Work())
    async with agent.running():
        record = await agent.closed("a")
    assert service.model.status("a") == "SUCCEEDED"
    known = isinstance(queued_at, (int, float)) and not isinstance(queued_at, bool)
    assert (record["queued_at"] is not None) == known
    if known:
        assert int(record["queued_at"]) == 1767225600


@pytest.mark.conformance("C-JOBS-29", "F-13")
async def test_job_after_job_without_a_single_notification(peer, service, agent_for):
    for number in range(10):
        service.model.create(f"job-{number}", DOCUMENT)
    agent = agent_for(peer, Work())
    async with agent.running():
        began = time.monotonic()
        await service.until_ended("job-9")
        assert time.monotonic() - began < 10
    assert agent.work.runs == [(f"job-{number}", 1) for number in range(10)]


CANARY = "X-Amz-Signature=canary-4711"
CONTENT = bytes(range(256)) * 40


class Downloading(Work):
    """Fetches the artifact of its document as an update does, with fresh addresses from the cloud."""

    name = "update"

    def __init__(self, folder):
        super().__init__(self.download)
        self.folder = folder

    async def download(self, job):
        async def fresh():
            return (await job.fresh_document())["urls"]

        path = await fetch(
            job.document["urls"],
            sha256=hashlib.sha256(CONTENT).hexdigest(),
            size=len(CONTENT),
            folder=self.folder,
            patience_s=60,
            fresh_urls=fresh,
            limits=Limits(first_wait_s=0.01, longest_wait_s=0.02),
        )
        await job.save({"path": str(path)}, f"downloaded from {job.document['urls'][0]}")
        return {"message": f"came from {job.document['urls'][0]}", "urls": " ".join(job.document["urls"])}


def signed_document(base, minted):
    """An update whose address is signed anew each time it is delivered, as the service does."""

    def mint():
        minted.append(f"{base}/artifact?expires={len(minted)}&{CANARY}")
        signature = {"keyid": "k", "sig": "c2ln"}
        manifest = {"payloadType": "application/json", "payload": "e30=", "signatures": [signature]}
        return {"version": "1.0", "operation": "update", "target": "x", "manifest": manifest, "urls": [minted[-1]]}

    return mint


@pytest.mark.conformance("C-JOBS-24", "C-JOBS-25")
@pytest.mark.parametrize("expired", [0, 1, 3, 1000])
async def test_an_expired_address_is_asked_for_anew_and_no_signature_is_told(
    peer, service, agent_for, tmp_path, capfd, expired
):
    minted, asked = [], []

    async def serve(request):
        asked.append(request.query["expires"])
        if len(asked) <= expired:
            return web.Response(status=403, text=f"<Error>expired {CANARY}</Error>")
        return web.Response(body=CONTENT)

    async with web_server(serve) as base:
        service.model.create("a", signed_document(base, minted))
        work = Downloading(tmp_path / "downloads")
        agent = agent_for(peer, work, update=work)
        async with agent.running():
            await service.until_ended("a")
    described_anew = len(service.sent("get", "a"))
    assert described_anew == min(expired, 3)
    assert len(asked) == described_anew + 1
    assert len(set(asked)) == len(asked), "each time a fresh one"
    assert service.model.status("a") == ("SUCCEEDED" if expired <= 3 else "FAILED")
    if expired > 3:
        assert service.model.details("a")["reason_code"] == "download_refused"
    printed = capfd.readouterr()
    told = json.dumps([body["statusDetails"] for body in service.sent("update", "a")])
    assert "canary" not in printed.out + printed.err + told


@contextlib.asynccontextmanager
async def web_server(handler):
    application = web.Application()
    application.router.add_get("/{name}", handler)
    runner = web.AppRunner(application)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
    finally:
        await runner.cleanup()


def await_now(coroutine):
    """The result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


def model_with(job_id):
    model = JobsService()
    model.create(job_id, DOCUMENT)
    return model
