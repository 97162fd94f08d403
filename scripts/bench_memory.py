"""How much the agent's memory grows: 1 GiB of output of a step, 10,000 queued reports, 1,000 jobs. Each on a fresh agent."""

from __future__ import annotations

import asyncio
import sqlite3
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.agent_process import AgentProcess
from tests.faults.cloud import Cloud

OUTPUT_BYTES = 2**30
REPORTS = 10_000
JOBS = 1_000
PRINTER = f"""#!{sys.executable}
import os
line = b"x" * 99 + b"\\n"
block = line * 10000
for _ in range({OUTPUT_BYTES} // len(block) + 1):
    os.write(1, block)
    os.write(2, block)
"""


def rss(agent: AgentProcess) -> float:
    """Resident memory of the agent in MiB."""
    return int(Path(f"/proc/{agent.pid}/statm").read_text(encoding="ascii").split()[1]) * 4096 / 2**20


def steps(*handlers: str) -> dict:
    actions = [{"name": h, "type": "runHandler", "input": {"handler": h}} for h in handlers]
    return {"version": "1.0", "includeStdOut": True, "steps": [{"action": action} for action in actions]}


async def settled(agent: AgentProcess) -> float:
    """The median of ten samples in five seconds."""
    samples = []
    for _ in range(10):
        await asyncio.sleep(0.5)
        samples.append(rss(agent))
    return statistics.median(samples)


async def output(folder: Path) -> None:
    async with (
        Cloud("cam-1") as cloud,
        AgentProcess(folder, cloud.port, "cam-1", jobs={"step_timeout_s": 600}) as agent,
    ):
        agent.handler("little.sh", "#!/bin/sh\necho done\n")
        agent.handler("much.py", PRINTER)
        await agent.start()
        cloud.jobs.create("warm", steps("little.sh"))
        await cloud.jobs.ended("warm")
        before, highest = await settled(agent), 0.0
        begun = time.monotonic()
        cloud.jobs.create("much", steps("much.py"))
        while cloud.jobs.status("much") in ("QUEUED", "IN_PROGRESS"):
            highest = max(highest, rss(agent))
            await asyncio.sleep(0.05)
        took, end = time.monotonic() - begun, cloud.jobs.execution("much")
        after = await settled(agent)
        print(
            f"a step prints 1 GiB on stdout and 1 GiB on stderr: {end.status} in {took:.1f} s; {end.details['stdout'][:40]}…"
        )
        print(f"  RSS before {before:.1f}, highest {highest:.1f} (+{highest - before:.1f}), after {after:.1f} MiB")


async def queue(folder: Path) -> None:
    async with Cloud("cam-1") as cloud, AgentProcess(folder, cloud.port, "cam-1") as agent:
        await agent.start()
        await agent.online()
        before = await settled(agent)
        await agent.stop()
        fill(agent.state_dir / "state.db", REPORTS)
        await agent.start()
        await agent.online()
        waiting, highest, begun = [], rss(agent), time.monotonic()
        while time.monotonic() - begun < 60:
            await asyncio.sleep(0.5)
            waiting.append(rss(agent))
            highest = max(highest, waiting[-1])
        left = (await agent.ctl("status", "--json")).json()["outbox"]["messages"]
        print(f"{REPORTS} reports of 1 KiB queued on disk, draining for 60 s ({left} left): ", end="")
        print(f"RSS before {before:.1f}, median {statistics.median(waiting):.1f}, highest {highest:.1f} MiB")


def fill(database: Path, count: int) -> None:
    """As many queued reports as if the camera had been off-line for a week."""
    with sqlite3.connect(database) as sql:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        topic, payload = "$aws/rules/camera_fleet/cameras/cam-1/report", b'{"schema":1,"filler":"' + b"x" * 1000 + b'"}'
        sql.executemany(
            "INSERT INTO outbox (priority, topic, payload, created_at, boot_id, uptime) VALUES (1, ?, ?, ?, ?, ?)",
            [(topic, payload, time.time(), boot, time.monotonic())] * count,
        )
    sql.close()


async def jobs(folder: Path) -> None:
    async with Cloud("cam-1") as cloud, AgentProcess(folder, cloud.port, "cam-1") as agent:
        agent.handler("little.sh", "#!/bin/sh\necho done\n")
        await agent.start()
        marks, begun = {}, time.monotonic()
        for number in range(1, JOBS + 1):
            cloud.jobs.create(f"j-{number}", steps("little.sh"))
            await cloud.jobs.ended(f"j-{number}")
            if number in (50, JOBS // 4, JOBS // 2, 3 * JOBS // 4, JOBS):
                marks[number] = rss(agent)
        took = time.monotonic() - begun
        good = sum(cloud.jobs.status(f"j-{n}") == "SUCCEEDED" for n in range(1, JOBS + 1))
        print(
            f"{JOBS} jobs one after the other, {good} SUCCEEDED, {1000 * took / JOBS:.0f} ms each; RSS after ", end=""
        )
        print(", ".join(f"{number}: {size:.1f}" for number, size in marks.items()), "MiB")


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for measure in (output, queue, jobs):
            place = Path(folder) / measure.__name__
            await measure(place)


if __name__ == "__main__":
    asyncio.run(main())
