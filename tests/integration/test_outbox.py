"""The outbox on a real file: order, numbering, losses of the connection, refusals, bounds, restarts, full disks."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import structlog.testing
from pydantic import ValidationError

import agent.store
from agent.errors import CloudError, StoreError
from agent.settings import Cloud as CloudSettings
from agent.settings import Telemetry
from agent.store import Store
from agent.telemetry import outbox as outbox_module
from agent.telemetry.outbox import EVENT, JOB, LOSSES, QUARANTINE_S, REPORT, Outbox
from agent.telemetry.reports import Reports, Sources
from tests.certificates import Authority
from tests.integration import connected
from tests.integration.mqtt_peer import PUBLISH, MqttPeer
from tests.virtual_time import EPOCH, virtual_time

HOUR = 3600.0


class Cloud:
    """Takes messages while on-line, and remembers them."""

    def __init__(self):
        self.got = []
        self.online = asyncio.Event()
        self.arrived = asyncio.Condition()
        self.refuse = set()
        self.lose_acknowledgements = False
        self.acknowledge = asyncio.Event()
        self.acknowledge.set()

    async def publish(self, topic, payload):
        if not self.online.is_set():
            raise CloudError("offline", "not connected", retryable=True)
        if payload in self.refuse:
            raise CloudError("0x87", "not authorised", retryable=False)
        async with self.arrived:
            self.got.append(payload)
            self.arrived.notify_all()
        await self.acknowledge.wait()
        if self.lose_acknowledgements:
            raise CloudError("timeout", "no PUBACK", retryable=True)

    async def wait_for(self, condition):
        async with asyncio.timeout(20), self.arrived:
            await self.arrived.wait_for(condition)


@pytest.fixture
async def store(tmp_path):
    opened = await Store.open(tmp_path / "state.db")
    yield opened
    await opened.close()


@contextlib.asynccontextmanager
async def running(outbox):
    task = asyncio.create_task(outbox.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def build(store, cloud, **settings):
    return Outbox(
        store, Telemetry(**{"backlog_per_s": 50, **settings}), publish=cloud.publish, wait_online=cloud.online.wait
    )


async def put(outbox, priority=REPORT, kind="report", pad=0):
    return await outbox.put(kind, priority, f"t/{kind}", lambda seq: f"{kind}{seq}".encode() + bytes(pad))


async def empty(store):
    async with asyncio.timeout(30):
        while (await store.read(lambda t: t.queue_size())).messages:
            await asyncio.sleep(0.01)


async def test_live_messages_are_sent_and_leave_the_queue(store):
    cloud = Cloud()
    outbox = build(store, cloud)
    cloud.online.set()
    async with running(outbox):
        await outbox.connected()
        for _ in range(40):
            await put(outbox)
        await cloud.wait_for(lambda: len(cloud.got) == 40)
        await empty(store)
    assert sorted(cloud.got) == sorted(f"report{n}".encode() for n in range(1, 41))


async def test_live_goes_before_the_backlog_and_events_before_reports(store):
    cloud = Cloud()
    outbox = build(store, cloud, backlog_per_s=20)
    for _ in range(5):
        await put(outbox)
    await put(outbox, EVENT, "event")
    await outbox.connected()
    await put(outbox)
    cloud.online.set()
    async with running(outbox):
        await cloud.wait_for(lambda: len(cloud.got) == 7)
    assert set(cloud.got[:2]) == {b"report6", b"event1"}, "the live report and the event do not wait for the backlog"
    assert cloud.got[2:] == [b"report1", b"report2", b"report3", b"report4", b"report5"]


async def test_what_waited_keeps_its_pace_though_the_session_is_up_before_the_outbox_is_told(store):
    cloud = Cloud()
    outbox = build(store, cloud, backlog_per_s=0.1)
    cloud.online.set()
    async with running(outbox):
        await outbox.connected()
        await put(outbox)
        await empty(store)
        cloud.online.clear()
        for _ in range(10):
            await put(outbox)
        cloud.online.set()
        await cloud.wait_for(lambda: len(cloud.got) == 2)
        for _ in range(10):
            await store.read(lambda t: t.queue_size())
        assert len(cloud.got) == 2, "nothing counts as live until it is known what waited"
        await outbox.connected()
        await put(outbox)
        await cloud.wait_for(lambda: len(cloud.got) == 3)
    assert cloud.got == [b"report1", b"report2", b"report12"]


async def test_what_is_in_flight_is_neither_sent_again_nor_dropped(store):
    cloud = Cloud()
    cloud.acknowledge.clear()
    outbox = build(store, cloud, outbox_max_bytes=65536)
    cloud.online.set()
    async with running(outbox):
        await outbox.connected()
        await put(outbox, pad=1000)
        await cloud.wait_for(lambda: len(cloud.got) == 1)
        await outbox.connected()  # as when a subscription is accepted later: what is in flight is no backlog now
        for _ in range(80):
            await put(outbox, pad=1000)
        assert [m.id for m in await store.read(lambda t: t.queued(limit=1))] == [1]
        assert len(cloud.got) == 1
        dropped = (await outbox.status())["dropped"]
        assert dropped > 0
        cloud.acknowledge.set()
        await empty(store)
    assert len(cloud.got) == len(set(cloud.got)) == 81 - dropped, "exactly what was counted is missing"


async def test_nothing_is_lost_over_a_cut_and_a_restart(store, tmp_path):
    cloud = Cloud()
    first = build(store, cloud)
    cloud.online.set()
    async with running(first):
        await first.connected()
        for _ in range(3):
            await put(first)
        await cloud.wait_for(lambda: len(cloud.got) == 3)
        cloud.online.clear()
        for _ in range(4):
            await put(first)
    again = build(store, cloud)
    await put(again)
    async with running(again):
        cloud.online.set()
        await again.connected()
        await cloud.wait_for(lambda: len(set(cloud.got)) == 8)
        await empty(store)
    assert {int(m.removeprefix(b"report")) for m in cloud.got} == set(range(1, 9)), "numbers go on over the restart"


async def test_a_lost_acknowledgement_means_a_duplicate_never_a_loss(store):
    cloud = Cloud()
    outbox = build(store, cloud)
    cloud.online.set()
    cloud.lose_acknowledgements = True
    async with running(outbox):
        await outbox.connected()
        await put(outbox)
        await cloud.wait_for(lambda: len(cloud.got) == 2)
        cloud.lose_acknowledgements = False
        await cloud.wait_for(lambda: len(cloud.got) == 3)
        await empty(store)
    assert set(cloud.got) == {b"report1"}


class Link:
    """A connection that ends, with all that is in flight on it, whenever the `poison` is sent; then it comes again."""

    def __init__(self, *, answers=None):
        self.online = asyncio.Event()
        self.poison = set()
        self.answers = answers or {}
        """Errors for payloads, as PUBACK would bring them."""
        self.sent, self.got, self.beside = [], [], []
        """(time, payload) of each attempt; payloads that were acknowledged; what was in flight when poison was sent."""
        self._ended = asyncio.Event()
        self._in_flight = []

    async def publish(self, _, payload):
        if not self.online.is_set():
            raise CloudError("offline", "not connected", retryable=True)
        self.sent.append((asyncio.get_running_loop().time(), payload))
        self._in_flight.append(payload)
        try:
            if payload in self.poison:
                await asyncio.sleep(0)
                self.beside.append([p for p in self._in_flight if p != payload])
                self.online.clear()
                self._ended.set()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await self._ended.wait()
            if self._ended.is_set():
                raise CloudError("connection_lost", "cut", retryable=True)
            if payload in self.answers:
                raise self.answers[payload]
            self.got.append(payload)
        finally:
            self._in_flight.remove(payload)

    async def keep_up(self, outbox):
        """The session: three seconds after the connection ended there is a new one."""
        while True:
            self._ended.clear()
            self.online.set()
            await outbox.connected()
            await self._ended.wait()
            await asyncio.sleep(3)


@contextlib.asynccontextmanager
async def linked(outbox, link):
    session = asyncio.create_task(link.keep_up(outbox))
    try:
        async with running(outbox):
            yield
    finally:
        session.cancel()
        await asyncio.wait({session})


@pytest.fixture
def virtual(monkeypatch, tmp_path):
    """Runs `main(path)` on an accelerated clock; `virtual.clock` is what the agent sees."""
    monkeypatch.setattr(outbox_module, "clock_synchronised", lambda: True)
    with virtual_time(monkeypatch, agent.store) as (runner, clock):

        def run(main):
            return runner.run(main(tmp_path / "state.db"))

        run.clock = clock
        yield run


@contextlib.asynccontextmanager
async def opened(path):
    store = await Store.open(path)
    try:
        yield store
    finally:
        await store.close()


async def drained(store, left=0):
    async with asyncio.timeout(HOUR):
        while (await store.read(lambda t: t.queue_size())).messages > left:
            await asyncio.sleep(0.5)


@pytest.mark.conformance("C-CONN-18")
def test_a_message_that_ends_the_connection_is_put_into_quarantine_and_the_others_flow(virtual):
    async def main(path):
        link = Link()
        link.poison = {b"report4"}
        async with opened(path) as store:
            outbox = build(store, link)
            for _ in range(12):
                await put(outbox)
            await put(outbox, EVENT, "event")
            with structlog.testing.capture_logs() as logged:
                async with linked(outbox, link):
                    await drained(store, left=1)
                    for _ in range(8):
                        await put(outbox)
                    await drained(store, left=1)
                    status = await outbox.status()
                    assert (status["messages"], status["quarantined"], status["dropped"]) == (1, 1, 0)
                    assert sorted(link.got) == sorted(
                        [b"event1", *(f"report{n}".encode() for n in range(1, 21) if n != 4)]
                    )
                    assert len(link.beside) == LOSSES, "three connections, not one more"
                    assert link.beside[1:] == [[], []], "a suspect is sent alone"
                    attempts = [payload for _, payload in link.sent]
                    assert attempts.index(b"report12") < attempts.index(b"report4", attempts.index(b"report4") + 1), (
                        "the others of its class go before a suspect is tried again"
                    )
                    await asyncio.sleep(8 * HOUR)
                    await put(outbox)
                    await drained(store, left=1)
            tries = [at for at, payload in link.sent if payload == b"report4"]
            pauses = [b - a for a, b in itertools.pairwise(tries)]
            assert [round(pause / HOUR) for pause in pauses] == [0, 0, 1, 2, 4], "it is tried again, ever more seldom"
            (line,) = [entry for entry in logged if "quarantine" in entry["event"]]
            assert (line["topic"], line["bytes"]) == ("t/report", 7)
            assert line["hint"]
            link.poison.clear()
            async with linked(outbox, link):
                await asyncio.sleep(8 * HOUR)
                await drained(store)
            assert (await outbox.status())["quarantined"] == 0
            assert link.got[-1] == b"report4", "in the end it may have been the policy, or bad luck"

    virtual(main)


@pytest.mark.conformance("C-CONN-18")
def test_messages_that_went_down_with_the_poison_are_cleared(virtual):
    async def main(path):
        link = Link()
        async with opened(path) as store:
            outbox = build(store, link)
            async with linked(outbox, link):
                await put(outbox)
                await asyncio.sleep(1)
                link.poison = {b"report9"}

                def together(tables):
                    for _ in range(10):
                        outbox.add(tables, "report", REPORT, "t/report", lambda seq: f"report{seq}".encode())

                await store.write(together)
                outbox.announce_fresh()
                await drained(store, left=1)
                await asyncio.sleep(HOUR / 2)
            assert len(link.beside[0]) == outbox_module.OF_TOPIC - 1, "several were in flight"
            assert link.beside[1:] == [[], []]
            assert sorted(link.got) == sorted(f"report{n}".encode() for n in range(1, 12) if n != 9)
            assert (await outbox.status())["quarantined"] == 1

    virtual(main)


@pytest.mark.conformance("C-CONN-18")
def test_a_suspect_is_alone_in_flight_though_there_is_always_something_live(virtual):
    async def main(path):
        link = Link()
        link.poison = {b"report1"}
        async with opened(path) as store:
            outbox = build(store, link)
            await put(outbox)
            async with linked(outbox, link):
                for _ in range(600):
                    await put(outbox, EVENT, "event")
                    await asyncio.sleep(0.02)
                await drained(store, left=1)
            assert len(link.beside) == LOSSES, "it comes to its turn"
            assert link.beside[1:] == [[], []]
            assert sorted(set(link.got)) == sorted(link.got) == sorted(f"event{n}".encode() for n in range(1, 601))

    virtual(main)


@pytest.mark.conformance("C-CONN-18")
def test_losses_are_remembered_over_restarts_and_a_quarantined_message_ages_like_the_rest(virtual):
    async def main(path):
        link = Link()
        link.poison = {b"report1"}
        async with opened(path) as store:
            await put(build(store, link))
        for _ in range(LOSSES):
            async with opened(path) as store:
                outbox = build(store, link)
                link._ended.clear()
                link.online.set()
                async with running(outbox):
                    await outbox.connected()
                    await link._ended.wait()
                    await asyncio.sleep(1)
        async with opened(path) as store:
            outbox = build(store, link, outbox_max_age_s=5 * 3600)
            assert (await outbox.status())["quarantined"] == 1
            async with linked(outbox, link):
                await asyncio.sleep(QUARANTINE_S / 2)
                assert len(link.sent) == LOSSES, "the pause goes on over a restart"
                await asyncio.sleep(QUARANTINE_S)
                assert len(link.sent) == LOSSES + 1
                await asyncio.sleep(5 * HOUR)
                await put(outbox)
                await drained(store)
            status = await outbox.status()
            assert (status["dropped"], status["dropped_by_reason"], status["quarantined"]) == (1, {"age": 1}, 0)

    virtual(main)


@pytest.mark.conformance("C-CONN-18")
async def test_poison_is_put_into_quarantine_with_a_real_session(store, tmp_path):
    authority = Authority(tmp_path)
    async with MqttPeer(authority.server_context()) as peer:
        peer.disconnect_topics = {"t/poison": 0x87}
        settings = CloudSettings(endpoint="localhost", port=peer.port, ca_file=authority.ca_file)
        session = connected.make_session("cam", settings, authority.client("cam"))
        outbox = build(store, Cloud())
        outbox._publish, outbox._wait_online = session.publish, session.wait_connected
        session.on_ready(outbox.connected)
        for _ in range(4):
            await put(outbox)
        await put(outbox, kind="poison")
        for _ in range(4):
            await put(outbox)
        async with (
            connected.running(session),
            running(outbox),
            asyncio.timeout(140),
        ):  # an unanswered message costs 60 s
            while (await outbox.status())["quarantined"] == 0 or (await outbox.status())["messages"] > 1:
                await asyncio.sleep(0.05)
            await session.wait_connected()
            await put(outbox)
            await peer.until(lambda: peer.of(PUBLISH, topic="t/report")[-1].payload == b"report9")
            while (await outbox.status())["messages"] > 1:
                await asyncio.sleep(0.05)
        assert len(peer.of(PUBLISH, topic="t/poison")) == LOSSES
        assert {p.payload for p in peer.of(PUBLISH, topic="t/report")} == {f"report{n}".encode() for n in range(1, 10)}


@pytest.mark.conformance("C-CONN-12")
def test_what_is_refused_for_good_is_given_up_and_what_is_refused_for_now_is_kept(virtual):
    async def main(path):
        link = Link(
            answers={
                b"report1": CloudError("not_authorised", "0x87"),
                b"report2": CloudError("quota_exceeded", "0x97", retryable=True),
            }
        )
        async with opened(path) as store:
            outbox = build(store, link)
            async with linked(outbox, link):
                await asyncio.sleep(1)
                for _ in range(4):
                    await put(outbox)
                await drained(store, left=2)
                assert sorted(link.got) == [b"report3", b"report4"], "the others flow"
                await asyncio.sleep(6 * HOUR)
                tries = {n: [at for at, p in link.sent if p == f"report{n}".encode()] for n in (1, 2)}
                assert len(tries[1]) == 1, "what is not allowed is not sent again"
                assert tries[2][1] - tries[2][0] >= 1
                assert len(tries[2]) < 6 * 3600 / 200, "ever more seldom"
                status = await outbox.status()
                assert (status["dropped"], status["dropped_by_reason"]) == (1, {"refused": 1})
                link.answers.clear()
                await drained(store)
            assert link.got[-1] == b"report2"
        async with opened(path) as store:
            assert (await build(store, link).status())["dropped_by_reason"] == {"refused": 1}, "the count is durable"

    virtual(main)


@pytest.mark.conformance("C-CONN-12")
def test_when_all_is_throttled_the_backlog_waits_in_order(virtual):
    async def main(path):
        link = Link(answers={})
        throttled = CloudError("quota_exceeded", "0x97", retryable=True)
        link.answers = {f"report{n}".encode(): throttled for n in range(1, 31)}
        async with opened(path) as store:
            outbox = build(store, link)
            for _ in range(30):
                await put(outbox)
            async with linked(outbox, link):
                await asyncio.sleep(25)
                assert len(link.sent) < 8, "no hot loop"
                link.answers.clear()
                await drained(store)
        probe, *others = link.got
        assert probe == b"report5", "the fifth attempt; each was with another message, for only one may be at fault"
        assert others == [f"report{n}".encode() for n in range(1, 31) if n != 5]

    virtual(main)


class Topics:
    """A connection that stays up and answers after a round trip; `dead` topics answer each message with an error instead."""

    def __init__(self, dead, round_trip_s=0.1):
        self.dead = dead
        self.round_trip_s = round_trip_s
        self.sent, self.got = [], []
        """(time, topic, payload) of each attempt, and of each that was acknowledged, at the time it was sent."""

    async def wait_online(self):
        pass

    async def publish(self, topic, payload):
        attempt = (asyncio.get_running_loop().time(), topic, payload)
        self.sent.append(attempt)
        error = self.dead.get(topic)
        if error and error.code == "messages_held":
            raise error
        await asyncio.sleep(60 if error and error.code == "no_answer" else self.round_trip_s)
        if error:
            raise error
        self.got.append(attempt)

    def of(self, topic):
        return [(at, payload) for at, to, payload in self.got if to == topic]

    def outbox(self, store, **settings):
        return Outbox(store, Telemetry(**settings), publish=self.publish, wait_online=self.wait_online)


async def put_many(store, outbox, count, priority, kind):
    def many(tables):
        for _ in range(count):
            outbox.add(tables, kind, priority, f"t/{kind}", lambda seq: f"{kind}{seq}".encode())

    await store.write(many)
    outbox.announce_fresh()


FAILINGS = {
    "over quota": CloudError("quota_exceeded", "0x97", retryable=True),
    "held by the session": CloudError("messages_held", "not sent", retryable=True),
    "refused for good": CloudError("not_authorised", "0x87"),
    "unanswered": CloudError("no_answer", "silent", retryable=True),
}


@pytest.mark.conformance("C-CONN-12")
@pytest.mark.parametrize("failing", FAILINGS)
@pytest.mark.parametrize("before", ["waited", "live"])
def test_two_thousand_messages_to_a_dead_topic_delay_no_other(virtual, failing, before):
    async def main(path):
        link = Topics({"t/event": FAILINGS[failing]})
        async with opened(path) as store:
            outbox = link.outbox(store, backlog_per_s=5)
            await put_many(store, outbox, 2000 if before == "waited" else 0, EVENT, "event")
            await put_many(store, outbox, 300, REPORT, "report")
            began = asyncio.get_running_loop().time()
            async with running(outbox):
                await outbox.connected()
                if before == "live":
                    await put_many(store, outbox, 2000, EVENT, "event")
                await asyncio.sleep(10)
                await put(outbox)
                while len(link.of("t/report")) < 301:
                    await asyncio.sleep(1)
                reports = link.of("t/report")
                assert len(reports) == 301
                probes = [at for at, topic, _ in link.sent if topic == "t/event" and at <= reports[-1][0]]
                assert reports[-1][0] - began <= (300 + len(probes)) / 5, "not a moment more than the rate allows"
                assert len(probes) < 8, "ever more seldom"
                live = [at for at, payload in reports if payload == b"report301"]
                assert live[0] - began <= 10.01, "what is live does not wait"
                await asyncio.sleep(HOUR)
                attempts = len([to for _, to, _ in link.sent if to == "t/event"])
                assert attempts < 30
                link.dead.clear()
                await drained(store)
                events = link.of("t/event")
                lost = (
                    attempts if failing == "refused for good" else 0
                )  # only the probes: what is not allowed goes once
                arrived = {payload for _, payload in events}
                assert arrived <= {f"event{n}".encode() for n in range(1, 2001)}
                assert len(arrived) == len(events) == 2000 - lost
                assert events[-1][0] - events[0][0] >= (len(events) - 1) / 5 - 0.01, (
                    "what waited keeps to the rate, too"
                )
                assert (await outbox.status())["dropped"] == lost

    virtual(main)


def test_what_the_session_holds_back_counts_no_failure_and_keeps_its_order(virtual):
    async def main(path):
        link = Topics({"t/report": FAILINGS["held by the session"]})
        async with opened(path) as store:
            outbox = link.outbox(store)
            await put_many(store, outbox, 50, REPORT, "report")
            async with running(outbox):
                await asyncio.sleep(HOUR)
                assert [m.failures for m in await store.read(lambda t: t.queued(limit=99))] == [0] * 50
                link.dead.clear()
                await drained(store)
        assert [payload for _, payload in link.of("t/report")] == [f"report{n}".encode() for n in range(1, 51)]

    virtual(main)


def test_a_topic_that_no_longer_exists_keeps_the_new_one_from_nothing_though_the_connection_ends_over_it(virtual):
    """As after the thing was renamed: the policy hangs up on the old name; the session then holds such messages back."""

    async def main(path):
        link = Topics({})

        async def publish(topic, payload):
            if topic == "t/old":
                attempts = [to for _, to, _ in link.sent].count("t/old")
                code = "connection_lost" if attempts < 3 else "messages_held"
                link.dead = {"t/old": CloudError(code, "cut", retryable=True)}
            await link.publish(topic, payload)

        async with opened(path) as store:
            outbox = Outbox(store, Telemetry(), publish=publish, wait_online=link.wait_online)
            await put_many(store, outbox, 40, REPORT, "old")
            await put_many(store, outbox, 100, REPORT, "report")
            async with running(outbox):
                await outbox.connected()
                began = asyncio.get_running_loop().time()
                await drained(store, left=40)
            assert asyncio.get_running_loop().time() - began < 30
            assert (await outbox.status())["quarantined"] == 0

    virtual(main)


@pytest.mark.parametrize("code", ["connection_ended", "offline"])
def test_an_end_of_the_connection_that_no_message_is_to_blame_for_counts_for_nothing(virtual, code):
    async def main(path):
        link = Topics({"t/report": CloudError(code, "over", retryable=True)})
        async with opened(path) as store:
            outbox = link.outbox(store)
            await put(outbox)
            async with running(outbox):
                await asyncio.sleep(20)
                assert 10 < len(link.sent) < 25, "again and again, but in no hot loop"
                (message,) = await store.read(lambda t: t.queued(limit=9))
                assert (message.losses, message.failures) == (0, 0)
                link.dead.clear()
                await asyncio.sleep(2)
                assert (await outbox.status())["messages"] == 0

    virtual(main)


def test_the_backlog_keeps_its_rate_on_a_slow_line_and_its_order(virtual):
    async def main(path):
        link = Topics({}, round_trip_s=1.2)
        async with opened(path) as store:
            outbox = link.outbox(store, backlog_per_s=5)
            await put_many(store, outbox, 200, REPORT, "report")
            async with running(outbox):
                await outbox.connected()
                await drained(store)
        starts = [at for at, _ in link.of("t/report")]
        assert [payload for _, payload in link.of("t/report")] == [f"report{n}".encode() for n in range(1, 201)]
        assert all(b - a >= 0.2 - 1e-6 for a, b in itertools.pairwise(starts))
        assert starts[-1] - starts[0] < 200 / 5 + 2

    virtual(main)


@pytest.mark.conformance("C-CONN-21")
async def test_bounds_drop_the_oldest_reports_and_count_them(store):
    outbox = build(store, Cloud(), outbox_max_bytes=65536)
    for _ in range(5):
        await put(outbox, EVENT, "event", pad=1000)
    await put(outbox, JOB, "job", pad=1000)
    for _ in range(80):
        await put(outbox, pad=1000)
    status = await outbox.status()
    assert status["bytes"] <= 65536
    assert status["messages"] + status["dropped"] == 86
    assert status["dropped_by_reason"] == {"size": status["dropped"]}
    kept = [m.payload.rstrip(b"\0") for m in await store.read(lambda t: t.queued(limit=100))]
    assert kept[:6] == [b"event1", b"event2", b"event3", b"event4", b"event5", b"job1"], "these outlive reports"
    assert kept[6:] == [f"report{n}".encode() for n in range(81 - len(kept[6:]), 81)], "the newest reports are kept"


@pytest.mark.conformance("C-CONN-21")
async def test_a_flood_of_events_takes_three_quarters_and_reports_keep_the_rest(store):
    outbox = build(store, Cloud(), outbox_max_bytes=65536)
    for _ in range(40):
        await put(outbox, pad=1000)
    for _ in range(200):
        await put(outbox, EVENT, "event", pad=1000)
    kept = [m.payload.rstrip(b"\0") for m in await store.read(lambda t: t.queued(limit=300))]
    events, reports = ([p for p in kept if p.startswith(kind)] for kind in (b"event", b"report"))
    assert events[-1] == b"event200"
    assert reports[-1] == b"report40"
    assert 0.7 < len(events) / len(kept) < 0.8
    assert (await outbox.status())["bytes"] <= 65536


@pytest.mark.conformance("C-CONN-21")
async def test_the_number_of_messages_is_bounded_too_and_so_is_the_file(store):
    outbox = build(store, Cloud(), outbox_max_bytes=65536)

    def many(tables):
        for _ in range(50):
            outbox.add(tables, "event", EVENT, "t", lambda _: b"")

    for _ in range(40):
        await store.write(many)
    status = await outbox.status()
    assert status["messages"] + status["dropped"] == 2000
    assert status["messages"] <= 65536 / 160
    pages = await store.read(lambda t: t._sql.execute("PRAGMA page_count").fetchone()[0])
    assert pages * 4096 < 3 * 65536


async def test_a_bound_that_the_disk_can_not_hold_is_the_disks_and_what_it_costs_is_counted(store, monkeypatch):
    outbox, disk = build(store, Cloud(), outbox_max_bytes=2**30), 400_000

    def small(_):
        """The file system as if it had `disk` bytes for state.db's queue."""
        size = store.path.stat().st_size
        return SimpleNamespace(f_bavail=max(0, disk - size), f_frsize=1)

    monkeypatch.setattr(os, "statvfs", small)
    for _ in range(400):
        await put(outbox, pad=1000)
    status = await outbox.status()
    assert 100_000 < status["bytes"] < 300_000
    assert status["dropped_by_reason"] == {"size": 400 - status["messages"]}


async def test_a_disk_that_does_not_say_what_is_free_stops_no_message(store, monkeypatch):
    outbox = build(store, Cloud())

    def broken(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "statvfs", broken)
    assert await put(outbox) == 1


def test_no_one_can_ask_for_a_terabyte():
    with pytest.raises(ValidationError):
        Telemetry(outbox_max_bytes=2**30 + 1)


async def test_bounds_hold_whatever_comes(store):
    chance = random.Random(3)
    outbox, made = build(store, Cloud(), outbox_max_bytes=65536), 0
    for _ in range(400):
        kind, priority = chance.choice((("event", EVENT), ("report", REPORT), ("report", REPORT)))
        before = await outbox.status()
        await put(outbox, priority, kind, pad=int(chance.expovariate(1 / 3000)))
        made += 1
        status = await outbox.status()
        assert status["bytes"] <= 65536
        assert status["messages"] + status["dropped"] == made
        if before["bytes"] < 50_000 and status["bytes"] < 60_000:
            assert status["messages"] >= before["messages"]
    print(f"{made} messages of random sizes tried against the bound")


@pytest.mark.conformance("C-CONN-21")
async def test_a_message_and_a_record_are_of_one_transaction(store):
    cloud = Cloud()
    outbox = build(store, cloud)
    reports = Reports(
        outbox,
        Sources(host=dict, capture=dict, conditions=list),
        thing_name="cam",
        boot_id="boot",
        topics={"report": "t/report", "event": "t/event"},
        agent={},
        interval_s=60,
        labels={},
    )

    def decide(tables):
        tables.put_job("job-1", 1, {"status": "FAILED"}, finished=False)
        reports.job_ended(tables, {"id": "job-1", "status": "FAILED", "ended_at": 1767225600.123})

    def fail(tables):
        decide(tables)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await store.write(fail)
    assert (await outbox.status())["messages"] == 0
    cloud.online.set()
    async with running(outbox):
        await outbox.connected()
        await store.write(decide)
        outbox.announce_fresh()
        await cloud.wait_for(lambda: cloud.got)
        await empty(store)
    job = {"id": "job-1", "status": "FAILED", "ended_at": 1767225600.123}
    assert json.loads(cloud.got[0]) == {"schema": 1, "thing": "cam", "boot_id": "boot", "seq": 1, "job": job}


def test_messages_from_a_boot_without_a_clock_are_not_taken_for_old(virtual, monkeypatch):
    async def main(path):
        link = Link()
        async with opened(path) as store:
            outbox = build(store, link)
            virtual.clock.offset = 0.0
            monkeypatch.setattr(outbox_module, "clock_synchronised", lambda: False)
            monkeypatch.setattr(agent.store, "boot_id", lambda: "boot-1")
            await put(outbox)
            virtual.clock.offset = EPOCH
            monkeypatch.setattr(outbox_module, "clock_synchronised", lambda: True)
            await put(outbox)
            monkeypatch.setattr(agent.store, "boot_id", lambda: "boot-2")
            await put(outbox)
            assert (await outbox.status())["messages"] == 3, "1970 is not long ago"
            await asyncio.sleep(8 * 24 * HOUR)
            await put(outbox)
            status = await outbox.status()
            assert (status["messages"], status["dropped_by_reason"]) == (2, {"age": 2})

    virtual(main)


@contextlib.contextmanager
def full_disk(path):
    """No file of this process may grow beyond the write-ahead log as it is now."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.with_name("state.db-wal").stat().st_size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_loses_nothing_that_is_queued_and_nothing_turns_in_circles(virtual):
    async def main(path):
        link = Link()
        async with opened(path) as store:
            outbox = build(store, link)
            for _ in range(6):
                await put(outbox)
            async with running(outbox):
                with full_disk(path), structlog.testing.capture_logs() as logged:
                    link.online.set()
                    await outbox.connected()
                    for _ in range(3):
                        with pytest.raises(StoreError) as caught:
                            await put(outbox)
                        assert caught.value.code == "store_full"
                    await asyncio.sleep(HOUR)
                    assert len(link.sent) == 1, "what can't be taken out of the queue is not sent again and again"
                    status = await outbox.status()
                    assert status["messages"] == 6
                    assert (status["dropped"], status["dropped_by_reason"]) == (3, {"not_kept": 3}), (
                        "told while it lasts"
                    )
                    assert len(logged) == 1, "a full disk is not filled with complaints"
                await drained(store)
                assert link.got == [f"report{n}".encode() for n in range(1, 7)], "each once, in order"
                assert await put(outbox) == 7, "numbers of what could not be kept are not used up"
                await drained(store)
            status = await outbox.status()
            assert (status["dropped"], status["dropped_by_reason"]) == (3, {"not_kept": 3})

    virtual(main)


async def test_an_agent_that_was_rolled_back_works_on_the_queue(store):
    """The statements of the first version, on the file of this one."""
    outbox = build(store, Cloud())
    await put(outbox)

    def as_before(tables):
        tables._sql.execute(
            "INSERT INTO outbox (priority, topic, payload, created_at, boot_id, uptime) VALUES (1, 't/report', ?, 1, 'b', 1)",
            (b"old",),
        )
        return tables._sql.execute("SELECT id, priority, topic, payload, created_at FROM outbox ORDER BY id").fetchall()

    assert [row[3] for row in await store.write(as_before)] == [b"report1", b"old"]
    assert (await store.read(lambda t: t.backlog(up_to=9))).payload == b"report1"


FRAME = 24 + 4096


@pytest.mark.conformance("C-CONN-21")
def test_a_power_cut_at_any_page_that_is_written_loses_nothing_that_was_promised(tmp_path):
    """The write-ahead log is cut at each of its pages, and in the middle of each: what is left must be enough."""
    asyncio.run(cut_power(tmp_path))


async def cut_power(tmp_path):
    path, promised, acknowledged = tmp_path / "state.db", [], []
    log = path.with_name("state.db-wal")
    store = await Store.open(path)
    cloud = Cloud()
    cloud.online.set()
    outbox = build(store, cloud)
    original = store.write

    async def write(change):
        acknowledged.append((log.stat().st_size, set(cloud.got)))
        return await original(change)

    store.write = write
    kinds = (("event", EVENT), ("report", REPORT))
    for _ in range(6):
        for kind, priority in kinds:
            promised.append((kind, await put(outbox, priority, kind, pad=3000), log.stat().st_size))
    async with running(outbox):
        await outbox.connected()
        for _ in range(6):
            for kind, priority in kinds:
                promised.append((kind, await put(outbox, priority, kind, pad=3000), log.stat().st_size))
        await empty(store)
    size = log.stat().st_size
    assert size < 1000 * FRAME, "the log was not begun anew"
    copy = tmp_path / "copy" / "state.db"
    copy.parent.mkdir()
    tried = 0
    for at in sorted({*range(32, size + 1, FRAME), *range(32 + FRAME // 2, size, FRAME), size}):
        shutil.copy(path, copy)
        copy.with_name("state.db-wal").write_bytes(log.read_bytes()[:at])
        copy.with_name("state.db-shm").unlink(missing_ok=True)
        again = await Store.open(copy)
        waiting = {m.payload.rstrip(b"\0").decode() for m in await again.read(lambda t: t.queued(limit=99))}
        waiting |= {p.rstrip(b"\0").decode() for begin, got in acknowledged if begin <= at for p in got}
        numbers = await again.read(lambda t: {kind: t.fact(f"telemetry.seq.{kind}", 0) for kind, _ in kinds})
        await again.close()
        assert again.quarantined is None
        due = [(kind, seq) for kind, seq, end in promised if end <= at]
        assert {f"{kind}{seq}" for kind, seq in due} <= waiting
        assert all(numbers[kind] >= seq for kind, seq in due), "no number is given twice"
        tried += 1
    await store.close()
    print(f"{tried} power cuts tried within {len(acknowledged)} transactions")


WRITER = """
import asyncio, sys
from pathlib import Path
from agent.settings import Telemetry
from agent.store import Store
from agent.telemetry.outbox import EVENT, REPORT, Outbox
async def main():
    store = await Store.open(Path(sys.argv[1]))
    online = asyncio.Event()
    async def publish(topic, payload):
        print("sent", payload.decode(), flush=True)
        await asyncio.sleep(0.001)
        print("acknowledged", payload.decode(), flush=True)
    outbox = Outbox(store, Telemetry(backlog_per_s=50), publish=publish, wait_online=online.wait)
    sending = asyncio.create_task(outbox.run())
    online.set()
    await outbox.connected()
    while True:
        seq = await outbox.put("report", REPORT, "t/report", lambda seq: b"report%d" % seq)
        print("put", f"report{seq}", flush=True)
asyncio.run(main())
"""


@pytest.mark.conformance("C-CONN-21")
async def test_kill_9_at_random_moments_loses_nothing_that_was_promised(tmp_path):
    path, chance, kills = tmp_path / "state.db", random.Random(9), 25
    promised, arrived, times = set(), [], 0
    for _ in range(kills):
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, str(path), stdout=asyncio.subprocess.PIPE
        )
        lines = [await child.stdout.readline() for _ in range(chance.randrange(1, 60))]
        await asyncio.sleep(chance.uniform(0, 0.01))
        child.send_signal(signal.SIGKILL)
        rest, _ = await child.communicate()
        for line in b"".join([*lines, rest]).split(b"\n")[:-1]:
            word, name = line.decode().split()
            promised |= {name} if word == "put" else set()
            arrived += [name] if word == "sent" else []
        store = await Store.open(path)
        assert store.quarantined is None
        waiting = {m.payload.decode() for m in await store.read(lambda t: t.queued(limit=10**6))}
        await store.close()
        assert promised <= waiting | set(arrived)
        times += 1
    again = len(arrived) - len(set(arrived))
    assert again <= kills * outbox_module.IN_FLIGHT, "only what was in flight is sent again"
    print(f"{times} kill -9 tried over {len(promised)} messages, {again} sent twice")
