"""No process outlives its sandbox: orphans below this process become its children, and at the end what is left is ended."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from pathlib import Path

PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 3.0
POLL_S = 0.05


def adopt() -> None:
    """From now on a process below this one whose parent ends becomes a child of this one, instead of being lost to init."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> dict[int, str]:
    """Every living process below this one, as process id and command line."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            if fields[0] not in "ZX":
                parents[int(folder.name)] = int(fields[1])
    below = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= more
    return {pid: _command(pid) for pid in sorted(below - {os.getpid()})}


def end_all() -> list[str]:
    """End what does not end by itself in three seconds; returns its command lines, so that none means all was well.

    To be called when this process waits for no child any more. Blocks.
    """
    left = _await_none()
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in descendants():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if not _await_none():
            break
    return list(left.values())


def _await_none() -> dict[int, str]:
    deadline = time.monotonic() + GRACE_S
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if not (left := descendants()) or time.monotonic() > deadline:
            return left
        time.sleep(POLL_S)


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
    return ""
