"""A whole update of 1 GiB by the real agent: how much its memory grows, and how many bytes it writes per byte of the artifact."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from agent.updates.manifest import digest_of
from scripts.bench_memory import rss, settled
from tests.fakes_updates import root_payload, signed_manifest, signed_root
from tests.faults.agent_process import AgentProcess
from tests.faults.cloud import Cloud

SIZE = int(os.environ.get("BENCH_UPDATE_MIB", "1024")) * 2**20
FILES = 64
"""Into which the artifact unpacks: random bytes, which nothing compresses."""


def artifact(folder: Path, name: str, size: int) -> Path:
    """A .tar.gz of random files, its compression a formality."""
    place = folder / f"{name}.tar.gz"
    content = folder / "content"
    with tarfile.open(place, "w:gz", compresslevel=1) as archive:
        for number in range(FILES):
            with content.open("wb") as file:
                for _ in range(size // FILES // 2**20):
                    file.write(os.urandom(2**20))
                file.write(os.urandom(size // FILES % 2**20))
            archive.add(content, f"{name}-{number}")
    content.unlink()
    return place


def document(path: Path, version: str, base: str) -> dict[str, Any]:
    described = {
        "version": version,
        "sha256": digest_of(path),
        "size": path.stat().st_size,
        "installed_size": path.stat().st_size + FILES * 4096,
        "gate": {"stable_for_s": 1, "deadline_s": 60},
        "restart": "none",
        "security_counter": 1,
    }
    return {
        "version": "1.0",
        "operation": "update",
        "target": "pipeline",
        "manifest": signed_manifest(**described),
        "urls": [f"{base}/{path.name}"],
    }


@asynccontextmanager
async def serving(folder: Path) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_static("/", folder)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


def written(agent: AgentProcess) -> int:
    """Bytes that the agent has made the kernel write to a disk, less what it took back in time."""
    lines = Path(f"/proc/{agent.pid}/io").read_text(encoding="ascii").splitlines()
    counts = {key: int(value) for key, value in (line.split(": ") for line in lines)}
    return counts["write_bytes"] - counts["cancelled_write_bytes"]


async def main() -> None:
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        served, keys = folder / "served", folder / "keys"
        served.mkdir()
        keys.mkdir()
        (keys / "root.json").write_text(json.dumps(signed_root(root_payload())))
        small, large = artifact(served, "small", 2**20), artifact(served, "large", SIZE)
        updates = {
            "keys_dir": str(keys),
            "targets": {"pipeline": {"installer": "app", "root": str(folder / "pipeline")}},
        }
        async with (
            serving(served) as base,
            Cloud("cam-1") as cloud,
            AgentProcess(folder / "agent", cloud.port, "cam-1", updates=updates) as agent,
        ):
            await agent.start()
            await agent.online()
            idle = await settled(agent)
            cloud.jobs.create("small", document(small, "1.0", base))
            await cloud.jobs.ended("small")
            before, wrote, highest, begun = await settled(agent), written(agent), 0.0, time.monotonic()
            cloud.jobs.create("large", document(large, "2.0", base))
            while cloud.jobs.status("large") in ("QUEUED", "IN_PROGRESS"):
                highest = max(highest, rss(agent))
                await asyncio.sleep(0.05)
            took, wrote = time.monotonic() - begun, written(agent) - wrote
            end = cloud.jobs.execution("large")
            print(
                f"an update of {large.stat().st_size / 2**20:.0f} MiB: {end.status} in {took:.1f} s {end.details['message']}"
            )
            print(
                f"  RSS idle {idle:.1f}, after an update of 1 MiB {before:.1f}, highest {highest:.1f} MiB (+{highest - before:.1f})"
            )
            print(
                f"  written to disk: {wrote / large.stat().st_size:.3f} bytes per byte of the artifact, unpacked included"
            )
            if end.status != "SUCCEEDED":
                sys.exit(1)


if __name__ == "__main__":
    asyncio.run(main())
