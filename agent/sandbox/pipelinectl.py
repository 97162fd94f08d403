"""`pipelinectl.py ROOT start|stop|restart|reload|status`: what systemd does for a capture pipeline, where there is none.

Starts `ROOT/current/pipeline` in a session of its own and keeps its process id in `ROOT/run/pipeline.pid`. Standard
library only, and run by path, so that it works from anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STOP_LIMIT_S = 5.0


def start(root: Path) -> None:
    """Start it unless it runs. Raises OSError when `ROOT/current/pipeline` can't be executed."""
    if running(root):
        return
    pid_file = root / "run" / "pipeline.pid"
    pid_file.parent.mkdir(parents=True, exist_ok=True)
    with (root / "run" / "pipeline.log").open("ab") as log:
        process = subprocess.Popen(
            [str(root / "current" / "pipeline")],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=root,
            start_new_session=True,
        )
    write_pid_file(pid_file, process.pid)
    process.returncode = 0  # it is meant to outlive us: nobody waits for it here


def stop(root: Path) -> None:
    """End it, with SIGKILL after five seconds, and return when it is gone."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        if (pid := running(root)) is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, kind)
        deadline = time.monotonic() + STOP_LIMIT_S
        while running(root) is not None and time.monotonic() < deadline:
            time.sleep(0.02)


def reload(root: Path) -> bool:
    """Make it read its configuration again; False when it does not run."""
    pid = running(root)
    if pid is not None:
        os.kill(pid, signal.SIGHUP)
    return pid is not None


def running(root: Path) -> int | None:
    """Its process id, None when it does not run."""
    return process_of(root / "run" / "pipeline.pid")


def write_pid_file(path: Path, pid: int) -> None:
    """Note a process, with its start time so that a later process of the same number is not taken for it."""
    candidate = path.with_suffix(".new")
    candidate.write_text(f"{pid} {_start_time(pid)}\n", encoding="ascii")
    candidate.rename(path)


def process_of(path: Path) -> int | None:
    """The process that a pid file names, None when it is gone or there is no such file."""
    try:
        pid, started = path.read_text(encoding="ascii").split()
        return int(pid) if _start_time(int(pid)) == started else None
    except (OSError, ValueError):
        return None


def _start_time(pid: int) -> str:
    """Start of the process in ticks since boot; empty when there is none or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def main() -> int:
    """Exit status: 0 done or running, 1 could not, 2 wrong usage, 3 (status, reload) not running."""
    parser = argparse.ArgumentParser(prog="pipelinectl", description="Start and stop the capture pipeline of a folder.")
    parser.add_argument("root", type=Path, metavar="ROOT", help="folder with current/, config.json, run/")
    parser.add_argument("verb", choices=["start", "stop", "restart", "reload", "status"])
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    try:
        if arguments.verb in ("stop", "restart"):
            stop(root)
        if arguments.verb in ("start", "restart"):
            start(root)
        if arguments.verb == "reload" and not reload(root):
            print("not running")
            return 3
    except OSError as error:
        print(f"pipelinectl: {error}", file=sys.stderr)
        return 1
    if arguments.verb == "status":
        pid = running(root)
        print(f"running, process {pid}" if pid else "not running")
        return 0 if pid else 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
