"""What arrives: twice, swapped, malformed, unknown, or while a handler fails. Messages are hints that are asked about again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Iterator

import pytest
from structlog.testing import capture_logs

from agent.cloud.jobs import Execution, JobsClient
from agent.cloud.session import Session
from agent.cloud.shadow import ShadowClient
from agent.jobs import conversation
from agent.jobs import engine as engine_module
from agent.jobs.engine import Engine
from agent.store import Store
from tests.integration import mqtt_peer as mqtt
from tests.integration.connected import link_where, running
from tests.integration.mqtt_peer import MqttPeer, Packet

THING = "cam-7"
pytestmark = pytest.mark.usefixtures("readable_logs")
JOBS = f"$aws/things/{THING}/jobs"
SHADOW = f"$aws/things/{THING}/shadow/name/config"


@pytest.fixture
async def store(tmp_path) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "state.db")
    yield opened
    await opened.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "RETRY_S", (0.05, 0.2))
    monkeypatch.setattr(conversation, "RETRY_S", (0.05, 0.2))


class OneJob:
    """AWS IoT Jobs with one execution: versions and transitions, asked over MQTT; every answer may come twice."""

    def __init__(self, peer: MqttPeer, *, twice: bool = False) -> None:
        self.status, self.version, self.describes = "QUEUED", 1, 0
        self.updates: list[str] = []
        self._twice = twice
        peer.serve(f"{JOBS}/+/get", self._get)
        peer.serve(f"{JOBS}/+/update", self._update)

    @property
    def execution(self) -> dict:
        """As AWS IoT sends it; empty when it has ended."""
        if self.status == "SUCCEEDED":
            return {}
        document = {"version": "1.0", "operation": "restart"}
        known = {"jobId": "j1", "executionNumber": 1, "versionNumber": self.version, "status": self.status}
        return {**known, "queuedAt": 1767225600, "jobDocument": document}

    def _get(self, packet: Packet) -> Iterator[tuple[str, dict]]:
        self.describes += 1
        yield from self._answer(packet, {"execution": self.execution, "timestamp": 1767225600})

    def _update(self, packet: Packet) -> Iterator[tuple[str, dict]]:
        self.status = packet.json()["status"]
        self.version += 1
        self.updates.append(self.status)
        state = {"status": self.status, "versionNumber": self.version}
        yield from self._answer(packet, {"executionState": state, "timestamp": 1767225600})

    def _answer(self, packet: Packet, body: dict) -> Iterator[tuple[str, dict]]:
        for _ in range(2 if self._twice else 1):
            yield f"{packet.topic}/accepted", {**body, "clientToken": packet.json()["clientToken"]}


class Work:
    """An operation that counts its runs and lasts until it may end."""

    name = "restart"

    def __init__(self) -> None:
        self.runs = 0
        self.may_end = asyncio.Event()

    def check(self, _: object) -> None: ...

    async def run(self, _: object) -> dict[str, str]:
        self.runs += 1
        await self.may_end.wait()
        return {"message": "done"}


@contextlib.asynccontextmanager
async def working(session: Session, store: Store, work: Work, notify=None) -> AsyncIterator[Engine]:
    """The session with a job engine, joined as in the agent."""
    jobs = JobsClient(session, THING)
    engine = Engine(store=store, jobs=jobs, operations={"restart": work}, allow=["restart"])
    jobs.on_notify_next(notify or (lambda _: engine.wake()))

    async def ready() -> None:
        engine.wake()

    session.on_ready(ready)
    async with running(session):
        task = asyncio.create_task(engine.run())
        try:
            yield engine
        finally:
            task.cancel()
            await asyncio.wait({task})


@pytest.mark.conformance("C-CONN-11")
@pytest.mark.parametrize("reason", [0x80, 0x87, 0x8F, 0x97])
async def test_a_refused_filter_among_others_is_named_and_tried_again(peer, session, monkeypatch, reason):
    monkeypatch.setattr("agent.cloud.session.SUBSCRIBE_AGAIN_S", (0.1, 0.4))
    peer.refuse_filters["t/7"] = reason
    arrived: list[str] = []
    for number in range(12):
        session.subscribe(f"t/{number}", lambda topic, _: arrived.append(topic))
    with capture_logs() as lines:
        async with running(session):
            assert (session.link.state, session.link.code) == ("connected", "subscription_refused")
            assert "t/7" in session.link.reason
            assert "t/6" not in session.link.reason
            for number in (6, 8):
                peer.send(f"t/{number}", b"")
            await peer.until(lambda: len(peer.of(mqtt.SUBSCRIBE)) == 6)
            peer.refuse_filters.clear()
            await link_where(session, lambda link: not link.code)
            peer.send("t/7", b"")
            await peer.until(lambda: len(peer.of(mqtt.PUBACK)) == 3)
            await session.publish("t", b"")
    assert arrived == ["t/6", "t/8", "t/7"]
    refusals = [line for line in lines if line["event"] == "subscription refused"]
    assert {line["filter"] for line in refusals} == {"t/7"}
    assert all(f"0x{reason:02X}" in line["reason"] for line in refusals)
    assert all(packet.filters == ["t/7"] for packet in peer.of(mqtt.SUBSCRIBE)[2:])


@pytest.mark.conformance("C-CONN-22")
async def test_messages_delivered_twice_have_the_effect_of_one(peer, session, store):
    job, work = OneJob(peer, twice=True), Work()
    async with working(session, store, work):
        for _ in range(5):
            peer.send(f"{JOBS}/notify-next", {"execution": job.execution, "timestamp": 1767225600})
        await peer.until(lambda: job.status == "IN_PROGRESS")
        for _ in range(5):
            peer.send(f"{JOBS}/notify-next", {"execution": job.execution, "timestamp": 1767225600})
        work.may_end.set()
        await peer.until(lambda: job.status == "SUCCEEDED")
        peer.send(f"{JOBS}/notify-next", {"execution": {**job.execution}, "timestamp": 1767225600})
        describes = job.describes
        await peer.until(lambda: job.describes > describes)
    assert work.runs == 1
    assert job.updates.count("SUCCEEDED") == 1
    print("11 repeated notifications and every answer twice tried")


@pytest.mark.conformance("C-CONN-23")
async def test_a_handler_that_fails_loses_no_job(peer, session, store):
    """The notification was acknowledged and is gone; the next describe brings the job all the same."""
    job, work = OneJob(peer), Work()
    job.status = "SUCCEEDED"  # nothing to do at the connect
    work.may_end.set()
    failed = asyncio.Event()

    def broken(_: Execution | None) -> None:
        failed.set()
        raise ZeroDivisionError

    with capture_logs() as lines:
        async with working(session, store, work, notify=broken):
            await peer.until(lambda: job.describes)
            job.status = "QUEUED"
            peer.send(f"{JOBS}/notify-next", {"execution": job.execution, "timestamp": 1767225600})
            async with asyncio.timeout(10):
                await failed.wait()
            await peer.until(lambda: peer.of(mqtt.PUBACK))
            assert work.runs == 0
            peer.cut()
            await peer.until(lambda: job.status == "SUCCEEDED")
    assert work.runs == 1
    assert [line for line in lines if line["event"] == "handling a message failed" and line.get("exc_info")]


@pytest.mark.conformance("C-CONN-26")
async def test_no_end_of_the_connection_costs_a_job(peer, session, store):
    job, work = OneJob(peer), Work()
    ends = [
        lambda: peer.disconnect(0x8B),
        lambda: peer.disconnect(0x98),
        peer.close,
        peer.cut,
        lambda: peer.disconnect(0x8B),
    ]
    async with working(session, store, work):
        await peer.until(lambda: work.runs)
        for number, end in enumerate(ends, 2):
            async with asyncio.timeout(20):
                await session.wait_connected()
            end()
            await peer.until(lambda: len(peer.of(mqtt.CONNECT)) == number)
        work.may_end.set()
        await peer.until(lambda: job.status == "SUCCEEDED")
    assert work.runs == 1
    assert set(job.updates) == {"IN_PROGRESS", "SUCCEEDED"}
    assert job.updates.count("SUCCEEDED") == 1
    print(f"{len(ends)} ends of the connection within one job tried")


@pytest.mark.conformance("C-CONN-29")
async def test_in_whatever_order_states_of_one_topic_come_the_newest_stands(peer, session):
    shadow, arrived = ShadowClient(session, THING, "config"), []
    shadow.on_delta(lambda version, state: arrived.append((version, state["v"])))
    tried = 0
    async with running(session):
        for round_number, order in enumerate(itertools.permutations(range(1, 5))):
            base = round_number * 10
            arrived.clear()
            acknowledged = len(peer.of(mqtt.PUBACK))
            for number in order:
                peer.send(f"{SHADOW}/update/delta", {"version": base + number, "state": {"v": base + number}})
            await peer.until(lambda: len(peer.of(mqtt.PUBACK)) == acknowledged + len(order))
            await session.publish("t/after", b"")  # what came before its acknowledgement has been handled
            versions = [version for version, _ in arrived]
            assert versions == sorted(versions)
            assert arrived[-1] == (base + 4, base + 4)
            tried += 1
    print(f"{tried} orders of four deltas tried")


@pytest.mark.conformance("C-CONN-27")
async def test_a_flood_of_the_unknown_and_malformed_is_ignored_and_seldom_logged(peer, session):
    peer.remember_session(THING, ["t/forgotten", "svc/get/+"])
    heard: list[bytes] = []

    def picky(_: str, payload: bytes) -> None:
        heard.append(payload)
        payload.decode()

    session.subscribe_replies("svc/get/+")
    session.subscribe("t/picky", picky)
    odd = [b"", b"\xff\xfe", b"{", b"[]", b"null", b'"x"', b"[" * 5000, b'{"clientToken": 7}', b"\x00" * 1000]
    with capture_logs() as lines:
        async with running(session):
            for payload in odd * 20:
                for topic in ("t/forgotten", "svc/get/accepted", "t/picky"):
                    peer.send(topic, payload)
            await peer.until(lambda: len(peer.of(mqtt.PUBACK)) == 60 * len(odd), timeout_s=60)
            await session.publish("t/still", b"alive")
            assert len(peer.of(mqtt.CONNECT)) == 1
    assert len(heard) == 20 * len(odd)
    events = [line["event"] for line in lines if line["log_level"] in ("warning", "error")]
    assert sorted(events) == [
        "handling a message failed",
        "ignored a message that no subscription matches",
        "ignored an answer that is not a JSON object",
    ]
    print(f"{60 * len(odd)} odd messages tried, {len(events)} lines logged")
