"""A day without a network, on an accelerated clock: the real outbox, reports and file, with a cloud that keeps a record."""

import asyncio
import itertools
import json
import random
from collections import Counter, defaultdict
from dataclasses import dataclass

import pytest

import agent.store
from agent.errors import CloudError
from agent.settings import Telemetry
from agent.store import Store
from agent.telemetry import outbox as outbox_module
from agent.telemetry import reports as reports_module
from agent.telemetry.outbox import Outbox
from agent.telemetry.reports import Reports, Sources
from tests.virtual_time import EPOCH, virtual_time

HOUR = 3600.0
ROUND_TRIP_S = 0.08
CUTS = 10
TOPICS = {"report": "t/report", "event": "t/event"}


@dataclass(frozen=True)
class Arrival:
    at: float
    kind: str
    seq: int
    body: dict


class Cloud:
    """Keeps what arrives. When the connection ends, what is under way is lost: half of it before it arrived."""

    def __init__(self):
        self.online = asyncio.Event()
        self.arrivals = []
        self.unacknowledged = Counter()
        """How often a message arrived whose acknowledgement was lost."""
        self.disturbed = set()
        """What was under way when the connection ended."""
        self.connects, self.cuts = [], []
        self._ended = asyncio.Event()
        self._busy = asyncio.Event()

    async def publish(self, topic, payload):
        if not self.online.is_set():
            raise CloudError("offline", "not connected", retryable=True)
        body = json.loads(payload)
        key = (topic.removeprefix("t/"), body["seq"])
        arrival = Arrival(asyncio.get_running_loop().time(), *key, body)
        self._busy.set()
        try:
            async with asyncio.timeout(ROUND_TRIP_S):
                await self._ended.wait()
        except TimeoutError:
            self.arrivals.append(arrival)
            return
        self.disturbed.add(key)
        if len(self.disturbed) % 2:
            self.arrivals.append(arrival)
            self.unacknowledged[key] += 1
        raise CloudError("connection_lost", "cut", retryable=True)

    def connect(self):
        self._ended = asyncio.Event()
        self.connects.append(asyncio.get_running_loop().time())
        self.online.set()

    async def cut(self, *, busy=False):
        """End the connection; when `busy`, while something is under way."""
        if busy:
            self._busy.clear()
            await self._busy.wait()
            await asyncio.sleep(ROUND_TRIP_S / 2)
        self.online.clear()
        self.cuts.append(asyncio.get_running_loop().time())
        self._ended.set()
        await asyncio.sleep(0.05)


class Camera:
    """The agent's telemetry: `start` and `stop` are those of its process."""

    def __init__(self, path, cloud, clock, **settings):
        self.path, self.cloud, self.clock = path, cloud, clock
        self.settings = Telemetry(**settings)
        self.boot = "boot-1"

    async def start(self):
        self.store = await Store.open(self.path)
        self.outbox = Outbox(self.store, self.settings, publish=self.cloud.publish, wait_online=self.cloud.online.wait)
        sources = Sources(
            host=lambda: {f"system.value.number{n}": n / 7 for n in range(12)},
            capture=lambda: {"front": {"images": 60, "rate_hz": 0.998, "delivered_ratio": 1.0}},
            conditions=list,
        )
        self.reports = Reports(
            self.outbox, sources, thing_name="cam", boot_id=self.boot, topics=TOPICS, agent={"version": "1"},
            interval_s=60, labels={},
        )  # fmt: skip
        self._tasks = {asyncio.create_task(self.outbox.run()), asyncio.create_task(self.reports.run())}

    async def stop(self):
        for task in self._tasks:
            task.cancel()
        done, _ = await asyncio.wait(self._tasks)
        assert all(task.cancelled() for task in done)
        await self.store.close()

    async def restart(self):
        await self.stop()
        await self.start()

    async def connect(self):
        self.cloud.connect()
        await asyncio.sleep(0.05)  # the session subscribes and asks for jobs before the outbox is told
        await self.outbox.connected()

    async def numbers(self):
        """The last number given to reports and events."""
        return await self.store.read(lambda t: {k: t.fact(f"telemetry.seq.{k}", 0) for k in TOPICS})

    async def empty(self):
        async with asyncio.timeout(24 * HOUR):
            while (await self.outbox.status())["messages"]:
                await asyncio.sleep(1)


async def live(camera, chance, seconds, *, conditions=True):
    """Let time pass; events, and now and then the end of a job, come at random moments."""
    end = asyncio.get_running_loop().time() + seconds
    while conditions:
        pause = chance.expovariate(1 / 300)
        if asyncio.get_running_loop().time() + pause > end:
            break
        await asyncio.sleep(pause)
        if chance.random() < 0.1:
            facts = {"id": "job", "status": "SUCCEEDED", "ended_at": camera.clock.time()}
            await camera.store.write(lambda t, facts=facts: camera.reports.job_ended(t, facts))
            camera.outbox.announce_fresh()
        else:
            camera.reports.note({"condition": "capture.slow", "state": "set", "at": camera.clock.time()})
    await asyncio.sleep(max(0.0, end - asyncio.get_running_loop().time()))


@dataclass
class Outcome:
    cloud: Cloud
    made: dict
    waited: dict
    """The last numbers from before the connect that ended the outage, and from before the outage."""
    before: dict
    connected_at: float
    drained_s: float
    status: dict


async def outage(camera, chance, monkeypatch, *, hours=24.0, jumps=()):
    """An hour with a connection, the outage with three restarts in it (one of the machine), the drain with ten cuts."""
    loop = asyncio.get_running_loop()
    await camera.start()
    await camera.connect()
    await live(camera, chance, HOUR)
    await camera.cloud.cut()
    before = await camera.numbers()
    for stage in range(4):
        await live(camera, chance, hours * HOUR / 4)
        for at, offset in jumps:
            if at == stage:
                camera.clock.offset = offset
        if stage == 1 and not jumps:
            camera.boot = "boot-2"
            monkeypatch.setattr(agent.store, "boot_id", lambda: "boot-2")
        if stage < 3:
            await camera.restart()
    waited, connected_at = await camera.numbers(), loop.time()
    for _ in range(CUTS):
        await camera.connect()
        await asyncio.sleep(chance.uniform(0, 20))
        await camera.cloud.cut(busy=True)
        await asyncio.sleep(chance.uniform(1, 30))
    await camera.connect()
    backlog = sum(waited.values()) - sum(before.values())
    await live(camera, chance, 4 * HOUR)
    await camera.empty()
    done = Outcome(camera.cloud, await camera.numbers(), waited, before, connected_at, 0, await camera.outbox.status())
    last = max(a.at for a in done.cloud.arrivals if before[a.kind] < a.seq <= waited[a.kind])
    done.drained_s = last - connected_at
    await camera.stop()
    assert backlog > hours * 60
    return done


def of_backlog(done):
    """What arrived of the outage, first arrivals and others."""
    return [a for a in done.cloud.arrivals if done.before[a.kind] < a.seq <= done.waited[a.kind]]


def missing(done):
    got = {(a.kind, a.seq) for a in done.cloud.arrivals}
    return [(kind, seq) for kind in TOPICS for seq in range(1, done.made[kind] + 1) if (kind, seq) not in got]


def unconfirmed(done):
    """What arrived without any acknowledgement coming back: the outbox can't know, and may have dropped it later."""
    counts = Counter((a.kind, a.seq) for a in done.cloud.arrivals)
    return {key for key, n in counts.items() if n == done.cloud.unacknowledged[key]}


def check_order_and_pace(done, per_s):
    """In order within its class, never above its rate; live messages do not wait for it; duplicates are accounted for."""
    first = {}
    for arrival in done.cloud.arrivals:
        first.setdefault((arrival.kind, arrival.seq), arrival)
    in_order = defaultdict(list)
    for key, arrival in first.items():
        if key not in done.cloud.disturbed and done.before[key[0]] < key[1] <= done.waited[key[0]]:
            in_order[arrival.kind].append(arrival.seq)
    assert all(numbers == sorted(numbers) for numbers in in_order.values())
    assert max(first["event", n].at for n in in_order["event"]) < min(first["report", n].at for n in in_order["report"])
    starts = sorted(a.at for a in of_backlog(done))
    assert all(b - a >= 1 / per_s - 1e-6 for a, b in itertools.pairwise(starts)), "the rate is a bound"
    counts, lost = Counter((a.kind, a.seq) for a in done.cloud.arrivals), done.cloud.unacknowledged
    assert set(counts.values()) <= {1, 2}
    assert all(n == lost[key] + (key not in unconfirmed(done)) for key, n in counts.items()), "no other duplicates"
    assert done.cloud.unacknowledged.total() >= CUTS / 2
    slowest = max(late for seq, late in first_delays(done, first).items())
    assert slowest < 1, "a live report does not wait for the backlog"


def first_delays(done, first):
    """Seconds from the making of a report to its sending, of those that were made while there was a connection."""
    delays = {}
    for (kind, seq), arrival in first.items():
        made_at = arrival.body.get("end", 0) - EPOCH
        up = [t for t in done.cloud.connects if t + 0.1 < made_at]
        down = [t for t in done.cloud.cuts if t < made_at]
        if kind == "report" and up and len(up) > len(down) and (kind, seq) not in done.cloud.disturbed:
            delays[seq] = arrival.at - made_at
    assert len(delays) > 4 * 60
    return delays


@pytest.fixture
def world(monkeypatch, tmp_path):
    monkeypatch.setattr(outbox_module, "clock_synchronised", lambda: True)
    monkeypatch.setattr(agent.store, "boot_id", lambda: "boot-1")
    with virtual_time(monkeypatch, agent.store, reports_module) as (runner, clock):
        chance = random.Random(20)

        async def build(**settings):
            return Camera(tmp_path / "state.db", Cloud(), clock, **settings)

        def run(*, jumps=(), **settings):
            async def main():
                camera = await build(**settings)
                return await outage(camera, chance, monkeypatch, jumps=jumps)

            return runner.run(main())

        yield run


def tell(title, done):
    print(
        f"{title}: {done.made['report']} reports and {done.made['event']} events tried, {len(of_backlog(done))} sent as backlog"
        f" in {done.drained_s:.0f} s, {sum(done.cloud.unacknowledged.values())} duplicates, {done.status['dropped']} dropped"
    )


@pytest.mark.conformance("C-CONN-21")
def test_a_day_off_line_loses_nothing(world):
    done = world(backlog_per_s=5)
    assert missing(done) == []
    assert not unconfirmed(done)
    assert done.status["dropped"] == 0
    check_order_and_pace(done, 5)
    tell("a day off-line", done)


@pytest.mark.conformance("C-CONN-21")
def test_a_day_off_line_with_a_small_outbox_loses_the_oldest_reports_and_counts_them(world):
    done = world(backlog_per_s=5, outbox_max_bytes=400_000)
    lost = missing(done)
    assert done.status["dropped"] == done.status["dropped_by_reason"]["size"] > 100
    assert len(lost) == done.status["dropped"] - len(unconfirmed(done)), "exactly what was counted is missing"
    assert {kind for kind, _ in lost} == {"report"}
    kept = [a.seq for a in of_backlog(done) if a.kind == "report"]
    assert max(seq for _, seq in lost) < min(kept), "the oldest went"
    check_order_and_pace(done, 5)
    tell("with a small outbox", done)


def test_a_clock_that_jumps_loses_nothing_of_this_boot(world):
    thirty_years = 30 * 365 * 24 * HOUR
    done = world(backlog_per_s=5, jumps=((0, 0.0), (1, EPOCH + thirty_years), (2, EPOCH)))
    assert missing(done) == []
    assert not unconfirmed(done)
    assert done.status["dropped"] == 0
    check_order_and_pace(done, 5)
    tell("with a clock that jumps to 1970 and 30 years ahead", done)
