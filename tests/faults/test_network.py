"""The real agent on bad networks: cut, silent, slow, refused. Whatever happens, every job ends once, with the truth."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from tests.faults.relay import DIRECTIONS, Direction
from tests.faults.scene import scene, started, together
from tests.integration.mqtt_peer import CONNECT, PINGREQ

CUTS_PER_CAMERA = 2
CAMERAS_AT_ONCE = 12
STEP_BYTES = 199


@pytest.mark.conformance("C-CONN-06", "C-CONN-26")
async def test_a_connection_may_be_cut_at_any_byte(tmp_path):
    async with scene(tmp_path / "whole", "cam-whole") as s:
        s.offer()
        await s.agent.start()
        await s.ends_well()
        length = s.relay.crossings[0].passed
    every = [(way, at) for way in DIRECTIONS for at in range(0, length[way], STEP_BYTES)]
    order = random.Random(3)
    order.shuffle(every)
    shares = [every[i : i + CUTS_PER_CAMERA] for i in range(0, len(every), CUTS_PER_CAMERA)]
    room = asyncio.Semaphore(CAMERAS_AT_ONCE)
    codes: Counter[str] = Counter()
    await together(*(_cut_camera(tmp_path / str(n), f"cam-{n}", share, room, codes) for n, share in enumerate(shares)))
    print(f"{len(every)} cuts tried in {sum(length.values())} bytes, shown as {dict(codes)}")
    assert set(codes) <= {"lost", "closed"}


async def _cut_camera(
    folder: Path, thing: str, cuts: list[tuple[Direction, int]], room: asyncio.Semaphore, codes: Counter[str]
) -> None:
    """One camera whose first connections are cut where `cuts` say, with a job offered for each of them."""
    async with room, scene(folder, thing) as s:
        for way, at in cuts:
            s.relay.cut_after(at, way)
        s.offer()
        await s.agent.start()
        for number in range(len(cuts)):
            await s.relay.until(lambda at_least=number + 2: len(s.relay.crossings) >= at_least, 120)
            s.offer("note")
        await s.ends_well(120)
        assert [crossing.cut for crossing in s.relay.crossings[: len(cuts)]] == cuts
        codes.update(line["code"] for line in s.offline_lines())


@pytest.mark.conformance("C-CONN-26")
async def test_a_server_that_goes_away_under_a_running_job_costs_a_reconnect_only(tmp_path):
    def hang_up(s):
        for client in list(s.cloud.peer._live.values()):
            client.writer.close()

    ends = [
        (lambda s: s.cloud.peer.disconnect(0x8B), "closed"),
        (lambda s: s.cloud.peer.disconnect(0x98), "closed"),
        (hang_up, "lost"),
        (lambda s: s.relay.cut(), "lost"),
    ]

    async def one(number, end, code):
        async with scene(tmp_path / str(number), f"cam-{number}") as s:
            await s.agent.start()
            await s.ran_once(s.offer("slow"))
            end(s)
            await s.shows(code, hint="by itself")
            s.offer("bad")
            await s.ends_well()
            assert len(s.cloud.peer.of(CONNECT)) == 2

    await together(*(one(number, *end) for number, end in enumerate(ends)))
    print(f"{len(ends)} ends tried")


async def test_cuts_at_random_moments(tmp_path):
    cuts = 2

    async def one(seed):
        chance = random.Random(seed)
        async with scene(tmp_path / str(seed), f"cam-{seed}") as s:
            await s.agent.start()
            for number in range(cuts):
                await s.relay.until(lambda at_least=number + 1: len(s.relay.crossings) >= at_least, 60)
                for handler in ("note", "bad", "note"):
                    s.offer(handler)
                await asyncio.sleep(chance.uniform(0, 0.6))  # the moment of the cut is the fault
                s.relay.cut()
            await s.ends_well()

    await together(*(one(seed) for seed in range(6)))
    print(f"{6 * cuts} cuts tried")


# ---- silence -------------------------------------------------------------------------------------------------------


@pytest.mark.conformance("C-CONN-04")
async def test_a_black_hole_is_noticed_and_costs_nothing(tmp_path):
    """What is sent into it is lost, or arrives when it ends, after its connection has long been given up."""
    kinds: list[set[Direction]] = [{"up"}, {"down"}, {"up", "down"}]
    holes = [(hole, late) for hole in kinds for late in (False, True)]
    await together(
        *(_black_hole(tmp_path / str(n), f"cam-{n}", *hole) for n, hole in enumerate(holes)),
        _black_hole_at_first(tmp_path / "first", "cam-first"),
        _pause(tmp_path / "pause", "cam-pause"),
    )
    print(f"{len(holes) + 2} black holes tried")


async def _black_hole(folder: Path, thing: str, hole: set[Direction], late: bool) -> None:
    async with scene(folder, thing) as s:
        s.cloud.peer.connack_properties["server_keep_alive"] = 5
        await s.ran_once((await started(s)).offer("slow"))
        assert s.cloud.peer.of(CONNECT)[0].keep_alive == 45
        s.relay.blackhole = hole
        s.offer("bad")
        s.offer("note")
        await s.shows("no_answer", hint="network")
        assert s.cloud.peer.of(PINGREQ) or "up" in hole
        s.relay.blackhole = set()
        if not late:
            s.relay.cut()
        await s.ends_well()


async def _black_hole_at_first(folder: Path, thing: str) -> None:
    """In the middle of the TLS handshake; not to be taken for a server that can't be trusted."""
    async with scene(folder, thing) as s:
        s.relay.blackhole = {"down"}
        s.offer()
        await s.agent.start()
        await s.shows("no_answer", hint="network")
        s.relay.blackhole = set()
        await s.ends_well()


async def _pause(folder: Path, thing: str) -> None:
    """A black hole that ends before anybody notices it."""
    async with scene(folder, thing) as s:
        await started(s)
        s.relay.blackhole = {"up", "down"}
        s.offer("slow")
        s.offer("bad")
        await asyncio.sleep(3)  # the length of the pause
        s.relay.blackhole = set()
        await s.ends_well()
        assert len(s.relay.crossings) == 1


@pytest.mark.conformance("C-JOBS-20", "C-JOBS-21", "C-SDK-06")
async def test_each_message_of_a_job_may_be_lost_or_throttled(tmp_path):
    """From the first question to the terminal status: the request lost, its answer lost, or refused as too many."""
    faults = [(fault, number) for fault in ("lose_request", "lose_answer", "throttle") for number in range(5)]
    room = asyncio.Semaphore(CAMERAS_AT_ONCE)
    await together(*(_lose(tmp_path / f"{fault}-{n}", f"cam-{fault}-{n}", fault, n, room) for fault, n in faults))
    print(f"{len(faults) + 2} lost or throttled messages tried")


async def _lose(folder: Path, thing: str, fault: str, number: int, room: asyncio.Semaphore) -> None:
    """`fault` befalls request `number` of the Jobs conversation."""
    async with scene(folder, thing) as s:
        asked: list[tuple[str, dict]] = []

        def count(packet):
            if len(asked) == number:
                setattr(s.cloud.jobs, fault, 1)
            asked.append((packet.topic, packet.json()))
            return ()

        s.cloud.peer._services.insert(0, ("$aws/things/+/jobs/+/+", count))  # before the service
        async with room:
            s.offer("slow")
            await s.agent.start()
            await s.ran_once("job-1", 90)
        await s.ends_well(90)
        tokens = [body["clientToken"] for _, body in asked]
        assert len(tokens) == len(set(tokens)), asked
        done = (await s.agent.ctl("jobs", "--json")).json()["jobs"]
        assert [(job["status"], job.get("superseded")) for job in done] == [("SUCCEEDED", None)], done


async def _lose_all(folder: Path, thing: str) -> None:
    """Every answer is lost from the handler's start until the terminal status has been sent."""
    async with scene(folder, thing) as s:
        await s.agent.start()
        await s.ran_once(s.offer("slow"))
        s.cloud.peer.drop_replies = True
        await s.cloud.peer.until(lambda: s.cloud.jobs.attempts, 60)
        s.cloud.peer.drop_replies = False
        s.offer("bad")
        await s.ends_well()


async def _throttle(folder: Path, thing: str) -> None:
    """Three times in a row."""
    async with scene(folder, thing) as s:
        await s.agent.start()
        await s.ran_once(s.offer("slow"))
        s.cloud.jobs.throttle = 3
        s.offer("bad")
        await s.ends_well()


# ---- slow ----------------------------------------------------------------------------------------------------------


async def test_slow_networks_are_only_slow(tmp_path):
    """Two seconds from question to answer, or 1.5 kB a second: nothing is given up, nothing is done twice."""

    async def slow(name, delay_s, bytes_per_s):
        async with scene(tmp_path / name, f"cam-{name}", telemetry={"interval_s": 4}) as s:
            s.relay.delay_s.update(delay_s)
            s.relay.throttle_bytes_per_s = bytes_per_s
            s.offer("bad")
            await s.agent.start()
            await s.ends_well(120)
            assert len(s.cloud.peer.of(CONNECT)) == 1

    await together(
        slow("down", {"down": 2.0}, None),
        slow("both", {"up": 1.0, "down": 1.0}, None),
        slow("thin", {}, 1500),
    )
    print("3 slow networks tried")
