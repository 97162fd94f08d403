"""The outbox on a real file: order, numbering, losses of the connection, refusals, bounds, restarts."""

import asyncio
import contextlib

import pytest

from agent.errors import CloudError
from agent.settings import Telemetry
from agent.store import Store
from agent.telemetry.outbox import EVENT, REPORT, Outbox


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


async def test_what_waited_is_sent_once_though_the_session_is_up_before_the_outbox_is_told(store):
    cloud = Cloud()
    outbox = build(store, cloud)
    cloud.online.set()
    async with running(outbox):
        await outbox.connected()
        await put(outbox)
        await empty(store)
        cloud.online.clear()
        for _ in range(10):
            await put(outbox)
        cloud.acknowledge.clear()
        cloud.online.set()
        await cloud.wait_for(lambda: len(cloud.got) == 11)
        await outbox.connected()
        for _ in range(10):
            await store.read(lambda t: t.queue_size())
        cloud.acknowledge.set()
        await empty(store)
    assert sorted(cloud.got) == sorted(f"report{n}".encode() for n in range(1, 12))


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


async def test_a_message_the_cloud_refuses_for_good_does_not_stop_the_others(store):
    cloud = Cloud()
    cloud.refuse = {b"report1"}
    outbox = build(store, cloud)
    cloud.online.set()
    async with running(outbox):
        await outbox.connected()
        for _ in range(3):
            await put(outbox)
        await empty(store)
    assert sorted(cloud.got) == [b"report2", b"report3"]
    assert (await outbox.status())["dropped"] == 1


async def test_bounds_drop_the_oldest_reports_and_count_them(store):
    outbox = build(store, Cloud(), outbox_max_bytes=65536)
    await put(outbox, EVENT, "event", pad=1000)
    for _ in range(80):
        await put(outbox, pad=1000)
    status = await outbox.status()
    assert status["bytes"] <= 65536
    assert status["messages"] + status["dropped"] == 81
    kept = [m.payload.rstrip(b"\0") for m in await store.read(lambda t: t.queued(limit=100))]
    assert kept[0] == b"event1", "an event outlives reports"
    assert kept[-1] == b"report80"
