"""The real agent with a wrong clock: it says so, loses nothing, and goes on when the clock is set right."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from tests.faults.scene import Scene, scene, started, together
from tests.integration.mqtt_peer import CONNECT

LIBRARY = next(
    (path for folder in ("x86_64-linux-gnu", "aarch64-linux-gnu", "arm-linux-gnueabihf")
     if (path := Path("/usr/lib") / folder / "faketime" / "libfaketimeMT.so.1").exists()),
    None,
)  # fmt: skip
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="needs libfaketime: package faketime")
DAY_S = 86400


class Clock:
    """The wall clock of an agent, to be set while it runs; the monotonic clock is left alone."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "clock"

    def shift(self, seconds: float) -> None:
        """Let it be `seconds` from the true time."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+.0f}\n", encoding="ascii")
        new.replace(self._file)

    def set(self, at: float) -> None:
        """Let it be `at`, seconds since the epoch, and go on from there."""
        self.shift(at - time.time())

    def wrap(self, agent) -> None:
        agent.more_environment = {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_CACHE_DURATION": "1",  # s; to look at the file at every call costs a third of a core
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }


@contextlib.asynccontextmanager
async def wrong_clock(folder: Path):
    """A scene and its agent's clock."""
    clock = Clock(folder)
    clock.shift(0)
    async with scene(folder / "camera", wrap=clock.wrap) as s:
        yield s, clock


async def test_a_wrong_clock_at_boot(tmp_path):
    """TLS fails, and that is told only after ten to thirty seconds, in which the peer is to learn nothing."""

    async def booted(year):
        async with wrong_clock(tmp_path / str(year)) as (s, clock):
            clock.set((year - 1970) * 365.25 * DAY_S + 60)
            s.offer()
            await s.agent.start()
            shown = await s.shows("clock", "tls", "certificate", hint="date")
            assert "clock" in shown["reason"] + shown["hint"]
            assert (await s.status())["outbox"]["messages"] > 1
            assert not s.cloud.peer.of(CONNECT)
            clock.shift(0)
            await s.ends_well(90)
            assert min(report["end"] for report in s.cloud.reports) < time.time() - 300 * DAY_S
            await nothing_dropped(s)
            await s.shows("", state="connected")

    await together(booted(1970), booted(2015))
    print("2 wrong clocks tried")


async def nothing_dropped(s: Scene) -> None:
    assert (await s.status())["outbox"]["dropped"] == 0


async def test_jumps_of_the_clock_in_operation(tmp_path):
    """Back a day, and forward ten years, and to the truth again, under a running job."""
    async with wrong_clock(tmp_path) as (s, clock):
        await started(s)
        jumps = [-DAY_S, 0, 3650 * DAY_S, 0]
        for jump in jumps:
            await s.ran_once(s.offer("slow"))
            clock.shift(jump)
            s.offer("bad")
            await s.all_end()
        await s.reports_complete()
        await nothing_dropped(s)
        assert len(s.cloud.peer.of(CONNECT)) == 1
        print(f"{len(jumps)} jumps tried")


async def test_jumps_of_the_clock_while_offline(tmp_path):
    """What waits meanwhile is not taken for ten years old."""
    async with wrong_clock(tmp_path) as (s, clock):
        await started(s)
        s.relay.refuse = True
        s.relay.cut()
        await s.said("lost", "closed")
        jumps = [-DAY_S, 3650 * DAY_S, 0]
        for jump in jumps:
            clock.shift(jump)
            waiting = (await s.status())["outbox"]["messages"]
            await s.queues_more_than(waiting + 1)
        s.relay.refuse = False
        s.offer("bad")
        await s.ends_well()
        await nothing_dropped(s)
        print(f"{len(jumps)} jumps tried")
