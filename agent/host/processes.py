"""Running other programs: in their own process group, with a time limit, and with bounded memory for what they print."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import signal
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REAP_S = 5.0
TERMINATION_GRACE_S = 5.0
KILL_PATIENCE_S = 10.0
"""How long SIGKILL may take; a process that hangs in the kernel can't be waited for."""
POLL_S = 0.5
MARK = "CAMERA_AGENT_RUN"
"""The environment variable by which a program's descendants are found wherever they have gone."""
UMASK = 0o022
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4


class NotStartedError(OSError):
    """A program can't be started; nothing of it runs."""


@dataclass(frozen=True)
class User:
    """Whom a program runs as: with this user's own groups, and none of ours."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str

    @classmethod
    def named(cls, name: str) -> User:
        """The user of that name. Blocking; raises KeyError or ValueError when there is none, OSError when nobody knows."""
        import pwd

        found = pwd.getpwnam(name)
        groups = tuple(os.getgrouplist(name, found.pw_gid))
        return cls(name, found.pw_uid, found.pw_gid, groups, found.pw_dir)


@dataclass(frozen=True)
class Output:
    """The last part of what a program printed, how many bytes before it were left out, and how many lines it was in all."""

    text: str
    left_out: int
    lines: int = 0


@dataclass(frozen=True)
class Result:
    """How a program ended: `exit_code`, or the number of the `signal` that killed it; never both.

    Neither when it could not be killed after its time limit, because it hangs in the kernel or because the kernel doesn't
    allow it; then it has `timed_out`. `duration_s` is until nothing was left to be waited for, `limit_s` what was allowed.
    """

    exit_code: int | None
    signal: int | None
    timed_out: bool
    duration_s: float
    limit_s: float
    stdout: Output
    stderr: Output

    @property
    def succeeded(self) -> bool:
        return self.exit_code == 0 and not self.timed_out

    def describe(self) -> str:
        """The end in words: `exit status 3`, `killed by SIGSEGV`, `no end within 60 s`, with what is left if it can't be ended."""
        if self.timed_out:
            left = ", and it can't be ended: it may still run" if self.exit_code is None and self.signal is None else ""
            return f"no end within {f'{self.limit_s:.1f}'.removesuffix('.0')} s{left}"
        if self.signal is not None:
            return f"killed by {_signal_name(self.signal)}"
        return f"exit status {self.exit_code}"


async def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    cwd: Path = Path("/"),
    env: Mapping[str, str] | None = None,
    user: User | None = None,
    keep_bytes: int = 8192,
    mark: str = "",
) -> Result:
    """Run a program to its end and return how it ended.

    Its output is read without pause and all but the last `keep_bytes` of each stream is thrown away. It starts with no
    input, no open files of ours, no signal blocked or ignored, no capabilities that our unit gave us, and a umask of 022;
    `env` replaces our environment.

    At `timeout_s`, or when the caller is cancelled, the whole process group, and with `mark` whatever else descends from
    it, gets SIGTERM and, after five seconds, SIGKILL; it is gone when this returns. A program that ends by itself may
    leave others running; nobody reads what those print. Raises NotStartedError.
    """
    started = time.monotonic()
    if mark:
        env = {**(os.environ if env is None else env), MARK: mark}
    starting = asyncio.create_task(_start(argv, cwd, env, user, keep_bytes))
    try:
        await asyncio.wait({starting})
    except asyncio.CancelledError:
        await asyncio.shield(_abandon(starting, mark))
        raise
    transport, output = starting.result()
    timed_out = await _wait(transport, output, timeout_s, mark)
    code = transport.get_returncode()
    return Result(
        exit_code=code if code is not None and code >= 0 else None,
        signal=-code if code is not None and code < 0 else None,
        timed_out=timed_out,
        duration_s=time.monotonic() - started,
        limit_s=timeout_s,
        stdout=output.of(1),
        stderr=output.of(2),
    )


async def end_marked(mark: str) -> int:
    """End every process that was started with this `mark`, or descends from one that was; how many were ended.

    SIGTERM first and, after five seconds, SIGKILL. Only processes whose environment we may read are found: our own
    user's, and everybody's with CAP_SYS_PTRACE. One that has cleared its environment is not found.
    """
    return await _end(None, mark, None)


async def _start(
    argv: Sequence[str], cwd: Path, env: Mapping[str, str] | None, user: User | None, keep_bytes: int
) -> tuple[asyncio.SubprocessTransport, _Output]:
    _take_signals()
    try:
        _keep_capabilities()
        return await asyncio.get_running_loop().subprocess_exec(
            lambda: _Output(keep_bytes),
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=cwd,
            env=dict(env) if env is not None else None,
            user=user.uid if user else None,
            group=user.gid if user else None,
            extra_groups=list(user.groups) if user else None,
            umask=UMASK,
            start_new_session=True,
        )
    except OSError as error:
        raise NotStartedError(error.errno, error.strerror, error.filename) from None


async def _abandon(starting: asyncio.Task[tuple[asyncio.SubprocessTransport, _Output]], mark: str) -> None:
    """End a program that is being started. Its start is not cancelled: asyncio would then wait for who holds its output."""
    await asyncio.wait({starting})
    if not starting.cancelled() and starting.exception() is None:
        await _wait(*starting.result(), 0, mark)


async def _wait(transport: asyncio.SubprocessTransport, output: _Output, timeout_s: float, mark: str) -> bool:
    """Wait for the program's end, or bring it about; whether its time was over."""
    timed_out = False
    try:
        async with asyncio.timeout(timeout_s):
            await output.exited.wait()
    except TimeoutError:
        # We may have been late ourselves, stopped or asleep; then the program's own end counts.
        timed_out = not await _has_ended(transport.get_pid(), output.exited)
    finally:
        try:
            if not output.exited.is_set():
                await asyncio.shield(_end(transport.get_pid(), mark, output.exited))
            # What it left running may hold the pipes open for ever; what was printed until now is enough.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await output.closed.wait()
        finally:
            # It kills once more what has not ended, which may be another user's.
            with contextlib.suppress(PermissionError):
                transport.close()
    return timed_out


async def _has_ended(pid: int, exited: asyncio.Event) -> bool:
    """Whether the program has ended by itself, if only just; then it is reaped when this returns."""
    if not exited.is_set():
        with contextlib.suppress(ChildProcessError):  # it has been reaped, and we are about to hear of it
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:  # noqa: ASYNC222  WNOHANG
                return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REAP_S):
                await exited.wait()
    return exited.is_set()


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
        self._kept[fd] = (self._kept[fd] + data[-self._keep :])[-self._keep :]

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:  # noqa: ARG002
        self._open.discard(fd)
        if not self._open:
            self.closed.set()

    def process_exited(self) -> None:
        self.exited.set()

    def of(self, fd: int) -> Output:
        kept = self._kept[fd]
        left_out = self._total[fd] - len(kept)
        unfinished = bool(kept) and not kept.endswith(b"\n")
        return Output(
            _from_a_character(kept, left_out).decode("utf-8", "replace"), left_out, self._lines[fd] + unfinished
        )


def _from_a_character(kept: bytes, left_out: int) -> bytes:
    """`kept` without the rest of a UTF-8 character that was cut at its beginning."""
    rest = 0
    while left_out and rest < min(3, len(kept)) and kept[rest] & 0xC0 == 0x80:
        rest += 1
    return kept[rest:]


def _take_signals() -> None:
    """Ignore and block no signal any more, for children inherit that.

    One that our own parent had us ignore (nohup, a shell's background job) would stay ignored in the child, which then
    could not be ended with it. A handler that does nothing is as good for us, and is not inherited. With SIGCHLD
    ignored, the kernel would forget how a child ended. SIGPIPE and SIGXFSZ are reset by `subprocess`.
    """
    if threading.current_thread() is threading.main_thread():
        for number in signal.valid_signals() - {signal.SIGPIPE, signal.SIGXFSZ, signal.SIGKILL, signal.SIGSTOP}:
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGCHLD else lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _keep_capabilities() -> None:
    """Hand none of our capabilities down: those of `AmbientCapabilities=` would stay with a child, even as another user."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) and ctypes.get_errno() != errno.EINVAL:
        raise OSError(ctypes.get_errno(), "the agent's capabilities can't be kept from it")


async def _end(group: int | None, mark: str, exited: asyncio.Event | None) -> int:
    """SIGTERM, then SIGKILL, to a process group and to whatever carries the mark; how many processes were ended."""
    ended: set[int] = set()
    quiet = 0
    for number, patience in ((signal.SIGTERM, TERMINATION_GRACE_S), (signal.SIGKILL, KILL_PATIENCE_S)):
        told: set[int] = set()
        until, pause = time.monotonic() + patience, 0.01
        if group is not None and exited and not exited.is_set():
            # PermissionError: the leader became another user's (a setuid program); what may be ended is ended.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(group, number)
        while True:
            alive = await asyncio.to_thread(_find, group, mark)
            ended |= alive.keys()
            quiet = 0 if alive else quiet + 1
            # A process that is just executing a program shows no environment: the second look finds it.
            if quiet > 1 and (exited is None or exited.is_set()):
                return len(ended)
            if number == signal.SIGTERM:  # the group was told as one, and nobody is asked twice
                alive = {pid: False for pid, in_group in alive.items() if not in_group and pid not in told}
                told |= alive.keys()
            await asyncio.to_thread(_send, alive, number, group, mark)
            if time.monotonic() >= until:
                break
            await asyncio.sleep(pause := min(pause * 2, POLL_S))
    return len(ended - alive.keys())


def _find(group: int | None, mark: str) -> dict[int, bool]:
    """The processes of the group, and those that carry the mark: whether each is in the group. Zombies are not."""
    found = {}
    for name in (folder.name for folder in Path("/proc").iterdir()):
        if name.isdecimal() and int(name) != os.getpid():
            in_group = group is not None and _group_of(name) == group
            if in_group or (mark and _carries(name, mark)):
                found[int(name)] = in_group
    return found


def _send(pids: Iterable[int], number: int, group: int | None, mark: str) -> None:
    """Send a signal to each that is still what it was found to be; its number may be another's by now."""
    for pid in pids:
        with contextlib.suppress(OSError):
            try:
                descriptor = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            except OSError:  # a kernel before 5.3
                os.kill(pid, number)
                continue
            try:
                if (group is not None and _group_of(str(pid)) == group) or (mark and _carries(str(pid), mark)):
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)


def _group_of(pid: str) -> int | None:
    try:
        state, _, group = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[:3]
    except (OSError, ValueError):
        return None
    return int(group) if state not in (b"Z", b"X") else None


def _carries(pid: str, mark: str) -> bool:
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
