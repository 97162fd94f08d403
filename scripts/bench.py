"""The idle agent's memory, CPU and threads with one source at one image a second, and the CPU of `agentctl`, in one run."""

from __future__ import annotations

import asyncio
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from agent.sandbox.fleet import Sandbox, running

RUNS = 15
WARM_UP_S = 30
AGENTCTL = Path(sys.executable).with_name("agentctl")


def cpu_ms(*argv: str, **environment: str) -> float:
    """CPU time, user and system, of a whole process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, **environment}, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return 1000 * (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def memory(pid: int) -> dict[str, float]:
    """RSS, PSS and private dirty memory in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    sizes = {name.rstrip(":"): int(rest[0]) / 1024 for name, *rest in (line.split() for line in lines[1:])}
    return {name: sizes[name] for name in ("Rss", "Pss", "Private_Dirty")}


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def idle(sandbox: Sandbox, seconds: float) -> int:
    """Restart the agent, so that it no longer holds what provisioning needed, and measure it."""
    camera = sandbox.cameras[0]
    await asyncio.sleep(10)
    await sandbox.stop_agent(camera)
    await sandbox.start_agent(camera)
    pid = sandbox.agents[camera.thing].pid
    await asyncio.sleep(WARM_UP_S)
    samples, begin = [], cpu_s(pid)
    for _ in range(6):
        await asyncio.sleep(seconds / 6)
        samples.append(memory(pid))
    used = cpu_s(pid) - begin
    medians = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
    threads = len(list(Path(f"/proc/{pid}/task").iterdir()))
    print(f"agent, connected, 1 image/s, median of {len(samples)} samples over {seconds:.0f} s after {WARM_UP_S} s:")
    print("  " + "  ".join(f"{name} {value:.1f} MiB" for name, value in medians.items()), end="")
    print(f"  CPU {100 * used / seconds:.2f} % of a core  threads {threads}")
    return pid


def commands(socket: str) -> None:
    print(f"CPU ms, user + system, median of {RUNS} runs:")
    candidates = {
        "python3 -I -c pass": (sys.executable, "-I", "-c", "pass"),
        "agentctl status": (str(AGENTCTL), "status"),
        "agentctl --help": (str(AGENTCTL), "--help"),
        "agentctl doctor --list": (str(AGENTCTL), "doctor", "--list"),
    }
    for name, argv in candidates.items():
        figures = [cpu_ms(*argv, AGENTCTL_SOCKET=socket) for _ in range(RUNS + 1)][1:]
        print(f"  {name:24} {statistics.median(figures):6.1f}  (min {min(figures):.1f}, max {max(figures):.1f})")


async def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 120
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        async with running(Path(folder)) as sandbox:
            pid = await idle(sandbox, seconds)
            await asyncio.to_thread(commands, str(sandbox.cameras[0].socket))
            after = memory(pid)
            print(f"agent after the API was used: Rss {after['Rss']:.1f} MiB  Pss {after['Pss']:.1f} MiB")


asyncio.run(main())
