"""The real agent with a wrong clock: it says so, loses nothing, and goes on when the clock is set right."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import pytest

from tests.faults.scene import Scene, scene, started
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
            "FAKETIME_NO_CACHE": "1",
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


async def nothing_lost(s: Scene) -> None:
    """Every report up to one made from now on arrives; its time may be wrong, its number not."""
    before = max((report["seq"] for report in s.cloud.reports), default=0)

    def complete() -> bool:
        seqs = {report["seq"] for report in s.cloud.reports}
        newest = max(seqs, default=0)
        return newest > before + 1 and seqs >= set(range(1, newest + 1))

    await s.cloud.peer.until(complete, 60)


@pytest.mark.parametrize("year", [1970, 2015])
async def test_a_wrong_clock_at_boot(tmp_path, year):
    async with wrong_clock(tmp_path) as (s, clock):
        clock.set((year - 1970) * 365.25 * DAY_S + 60)
        s.offer()
        await s.agent.start()
        shown = await s.shows("clock", "tls", "certificate")
        assert "clock" in shown["reason"] + shown["hint"]
        assert "date" in shown["hint"]
        queued = (await s.status())["outbox"]["messages"]
        assert not s.cloud.peer.of(CONNECT)
        clock.shift(0)
        await s.all_end()
        await nothing_lost(s)
        s.calm()
        outbox = (await s.status())["outbox"]
        assert outbox["dropped"] == 0
        assert len(s.cloud.reports) >= queued - 1
        await s.shows("", state="connected")


async def test_jumps_of_the_clock_in_operation(tmp_path):
    async with wrong_clock(tmp_path) as (s, clock):
        await started(s)
        jumps = [-DAY_S, 0, 3650 * DAY_S, 0, 45 * DAY_S, 0]
        for jump in jumps:
            await s.ran_once(s.offer("slow"))
            clock.shift(jump)
            s.offer("bad")
            await s.all_end()
            await nothing_lost(s)
        outbox = (await s.status())["outbox"]
        assert outbox["dropped"] == 0
        assert len(s.cloud.peer.of(CONNECT)) == 1
        print(f"{len(jumps)} jumps tried")


async def test_jumps_of_the_clock_while_offline(tmp_path):
    """Ten years forward and back: what waits is not taken for ten years old."""
    async with wrong_clock(tmp_path) as (s, clock):
        await started(s)
        s.relay.refuse = True
        s.relay.cut()
        await s.shows("closed", "lost", "not_authorised", "clock", "certificate")
        for jump in (-DAY_S, 3650 * DAY_S, 0):
            clock.shift(jump)
            before = (await s.status())["outbox"]["messages"]
            while (await s.status())["outbox"]["messages"] <= before:
                pass
        s.relay.refuse = False
        s.offer("bad")
        await s.all_end()
        await nothing_lost(s)
        s.calm()
        assert (await s.status())["outbox"]["dropped"] == 0
