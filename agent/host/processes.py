"""Running other programs: in their own process group, with a time limit, and with bounded memory for what they print."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TERMINATION_GRACE_S = 5.0


@dataclass(frozen=True)
class Output:
    """The last part of what a program printed, how many bytes before it were left out, and how many lines it was in all."""

    text: str
    left_out: int
    lines: int = 0


@dataclass(frozen=True)
class Result:
    """How a program ended: `exit_code`, or the number of the `signal` that killed it; never both."""

    exit_code: int | None
    signal: int | None
    timed_out: bool
    duration_s: float
    stdout: Output
    stderr: Output

    @property
    def succeeded(self) -> bool:
        return self.exit_code == 0 and not self.timed_out

    def describe(self) -> str:
        """The end in words: `exit status 3`, `killed by SIGSEGV`, `no end within 60 s`."""
        if self.timed_out:
            return f"no end within {self.duration_s:.0f} s"
        if self.signal is not None:
            return f"killed by {_signal_name(self.signal)}"
        return f"exit status {self.exit_code}"


async def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    user: str | None = None,
    keep_bytes: int = 8192,
) -> Result:
    """Run a program to its end and return how it ended.

    Its output is read without pause and all but the last `keep_bytes` of each stream is thrown away. At `timeout_s`, or
    when the caller is cancelled, the whole process group gets SIGTERM and, after five seconds, SIGKILL; it is gone when
    this returns. A program that ends by itself may leave others running. Raises OSError when it can't be started.
    """
    started = time.monotonic()
    transport, output = await asyncio.get_running_loop().subprocess_exec(
        lambda: _Output(keep_bytes),
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=cwd,
        env=dict(env) if env is not None else None,
        user=user,
        group=None if user is None else _primary_group(user),
        extra_groups=None if user is None else [],
        start_new_session=True,
    )
    timed_out = False
    try:
        async with asyncio.timeout(timeout_s):
            await output.exited.wait()
    except TimeoutError:
        timed_out = True
    finally:
        if not output.exited.is_set():
            await asyncio.shield(_end_group(transport.get_pid(), output.exited))
        # What it left running may hold the pipes open for ever; what was printed until now is enough.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await output.closed.wait()
        transport.close()
    code = transport.get_returncode() or 0
    return Result(
        exit_code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        timed_out=timed_out,
        duration_s=time.monotonic() - started,
        stdout=output.of(1),
        stderr=output.of(2),
    )


class _Output(asyncio.SubprocessProtocol):
    """Keeps the last bytes of standard output (1) and standard error (2)."""

    def __init__(self, keep: int) -> None:
        self.exited = asyncio.Event()
        self.closed = asyncio.Event()
        self._keep = keep
        self._kept = {1: b"", 2: b""}
        self._total = {1: 0, 2: 0}
        self._lines = {1: 0, 2: 0}
        self._open = {1, 2}

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._total[fd] += len(data)
        self._lines[fd] += data.count(b"\n")
        self._kept[fd] = (self._kept[fd] + data)[-self._keep :]

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002
        self._open.discard(fd)
        if not self._open:
            self.closed.set()

    def process_exited(self) -> None:
        self.exited.set()

    def of(self, fd: int) -> Output:
        kept = self._kept[fd]
        unfinished = bool(kept) and not kept.endswith(b"\n")
        return Output(kept.decode("utf-8", "replace"), self._total[fd] - len(kept), self._lines[fd] + unfinished)


async def _end_group(pid: int, exited: asyncio.Event) -> None:
    """SIGTERM, then SIGKILL, to the whole group; returns when its leader is reaped."""
    # PermissionError: the leader became another user's (a setuid program); what may be ended is ended.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGTERM)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(TERMINATION_GRACE_S):
            await exited.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    await exited.wait()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _primary_group(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_gid
