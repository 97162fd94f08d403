"""Running real programs: how they end, time limits, whole groups, and output without bounds."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from agent.host import processes
from agent.host.processes import MARK, NotStartedError, Output, Result, User, end_marked, run


def shell(script: str) -> list[str]:
    return ["/bin/sh", "-c", script]


async def gone(pid: int) -> bool:
    """Whether the process is dead (reaped or a zombie of a parent that is not ours) within five seconds."""

    def dead() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    for _ in range(500):
        if await asyncio.to_thread(dead):
            return True
        await asyncio.sleep(0.01)
    return False


async def read_pid(file: Path) -> int:
    while True:
        text = await asyncio.to_thread(lambda: file.read_text() if file.exists() else "")
        if text.endswith("\n"):
            return int(text)
        await asyncio.sleep(0.01)


async def test_success() -> None:
    result = await run(shell("echo out; echo err >&2"), timeout_s=30)
    assert result.succeeded
    assert (result.exit_code, result.signal, result.timed_out) == (0, None, False)
    assert (result.stdout, result.stderr) == (Output("out\n", 0, 1), Output("err\n", 0, 1))


async def test_an_exit_code_is_not_a_signal() -> None:
    result = await run(shell("exit 1"), timeout_s=30)
    assert (result.exit_code, result.signal) == (1, None)
    assert not result.succeeded
    assert result.describe() == "exit status 1"


async def test_a_signal_is_not_success() -> None:
    result = await run(shell("kill -SEGV $$"), timeout_s=30)
    assert (result.exit_code, result.signal) == (None, signal.SIGSEGV)
    assert not result.succeeded
    assert result.describe() == "killed by SIGSEGV"


async def test_a_program_that_does_not_exist() -> None:
    with pytest.raises(NotStartedError, match=r"No such file or directory: '/nowhere/program'") as caught:
        await run(["/nowhere/program"], timeout_s=30)
    assert caught.value.errno == errno.ENOENT


async def test_a_failure_after_the_start_is_not_told_as_one_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with no file descriptor left to list /proc: the program itself is killed all the same."""

    def find(*_: object) -> dict[int, bool]:
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(processes, "_find", find)
    monkeypatch.setattr(os, "killpg", lambda *_: None)
    started: list[int] = []
    monkeypatch.setattr(processes, "_end", record_pid(started, processes._end))
    with pytest.raises(OSError, match="too many") as caught:
        await run(["sleep", "300"], timeout_s=0.1)
    assert not isinstance(caught.value, NotStartedError)
    assert await gone(started[0])


def record_pid(
    pids: list[int], end: Callable[..., Coroutine[Any, Any, int]]
) -> Callable[..., Coroutine[Any, Any, int]]:
    def recorded(pid: int, *more: Any) -> Coroutine[Any, Any, int]:
        pids.append(pid)
        return end(pid, *more)

    return recorded


async def test_the_time_limit_ends_the_whole_group(tmp_path: Path) -> None:
    script = f"(sleep 300 & echo $! > {tmp_path}/grandchild; wait) & wait"
    result = await run(shell(script), timeout_s=1)
    assert result.timed_out
    assert not result.succeeded
    assert result.signal == signal.SIGTERM
    assert result.describe() == "no end within 1 s"
    assert await gone(await read_pid(tmp_path / "grandchild"))


async def test_an_end_with_0_after_the_time_limit_is_no_success() -> None:
    result = await run(shell("trap 'exit 0' TERM; while :; do sleep 0.05; done"), timeout_s=1)
    assert (result.exit_code, result.timed_out, result.succeeded) == (0, True, False)


async def test_who_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "TERMINATION_GRACE_S", 0.2)
    script = f"trap '' TERM; sleep 300 & echo $! > {tmp_path}/child; while :; do wait; done"
    result = await run(shell(script), timeout_s=0.5)
    assert result.signal == signal.SIGKILL
    assert await gone(await read_pid(tmp_path / "child"))
    assert result.duration_s >= 0.7
    assert result.describe() == "no end within 0.5 s", "the limit, without the time that ending it took"


async def test_cancelling_ends_the_whole_group(tmp_path: Path) -> None:
    script = f"sleep 300 & echo $! > {tmp_path}/child; wait"
    task = asyncio.create_task(run(shell(script), timeout_s=300))
    child = await read_pid(tmp_path / "child")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await gone(child)


async def test_cancelling_at_any_moment_of_the_start_ends_all() -> None:
    """With a grandchild that holds the output open, which must not be waited for."""
    for turns in range(40):
        mark = secrets.token_hex(16)
        task = asyncio.create_task(run(shell("sleep 300 & sleep 300"), timeout_s=300, mark=mark))
        for _ in range(turns):
            await asyncio.sleep(0)
        time.sleep(0.02)  # the loop stands still, the shell goes on
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(60):
                await task
        assert await asyncio.to_thread(processes._find, None, mark) == {}
    print("40 moments of a start at which it is cancelled tried")


async def test_what_a_program_leaves_running_does_not_hold_it_up(tmp_path: Path) -> None:
    open_files = []
    for _ in range(3):
        result = await run(shell(f"sleep 300 & echo $! > {tmp_path}/daemon; echo started"), timeout_s=60)
        pid = await read_pid(tmp_path / "daemon")
        os.kill(pid, signal.SIGKILL)
        assert await gone(pid)
        for _ in range(100):
            await asyncio.sleep(0)
        open_files.append(len(await asyncio.to_thread(os.listdir, "/proc/self/fd")))
        assert result.exit_code == 0
        assert result.duration_s < 30
        assert result.stdout.text == "started\n"
    assert open_files[2] <= open_files[1]  # the first run may open what the loop keeps


async def test_100_mb_of_output_are_bounded() -> None:
    script = "import sys; b = b'x' * 999_999 + b'\\n'\nfor _ in range(50): sys.stdout.buffer.write(b); sys.stderr.buffer.write(b)"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = await run([sys.executable, "-c", script], timeout_s=120, keep_bytes=1000)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert result.succeeded
    for stream in (result.stdout, result.stderr):
        assert len(stream.text) == 1000
        assert stream.text.endswith("x\n")
        assert stream.left_out == 50_000_000 - 1000
    assert after - before < 20_000


async def test_both_streams_at_once_are_bounded() -> None:
    """32 MiB on each stream at the same time, from two writers that would block if nobody read the other."""
    script = "head -c 33554432 /dev/zero & head -c 33554432 /dev/zero >&2; wait"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = await run(shell(script), timeout_s=120, keep_bytes=1000)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert result.succeeded
    assert [s.left_out for s in (result.stdout, result.stderr)] == [33554432 - 1000] * 2
    assert after - before < 20_000


async def test_a_character_that_the_bound_has_cut_is_left_out() -> None:
    for keep in range(5, 13):
        result = await run(["/usr/bin/printf", "ab" + "€" * 5], timeout_s=30, keep_bytes=keep)
        assert result.stdout.text == "€" * (keep // 3)
        assert result.stdout.left_out == 17 - keep


async def test_it_starts_without_input_or_open_files_in_the_root_with_a_sane_umask() -> None:
    read_end, write_end = os.pipe()
    os.write(write_end, b"our own input")
    before, stdin = os.umask(0o077), os.dup(0)
    try:
        os.dup2(read_end, 0)
        os.set_inheritable(write_end, True)
        result = await run(shell("ls /proc/self/fd | tr '\\n' ' '; wc -c; pwd; umask"), timeout_s=30)
    finally:
        os.umask(before)
        os.dup2(stdin, 0)
        for descriptor in (stdin, read_end, write_end):
            os.close(descriptor)
    assert result.stdout.text.split() == ["0", "1", "2", "3", "0", "/", "0022"]  # 3 is the folder that ls reads


IGNORANT_PARENT = """
import asyncio, os, signal, sys
from agent.host.processes import run
result = asyncio.run(run(["/bin/sh", "-c", "grep -E 'Sig(Blk|Ign)' /proc/self/status; exit 7"], timeout_s=30))
assert result.exit_code == 7, result
os.kill(os.getpid(), signal.SIGHUP)
print(result.stdout.text.split())
"""


async def test_signals_that_our_parent_had_us_ignore_or_block_are_not_handed_down() -> None:
    """As under nohup, or in the background of a shell; and how a child ended is known although SIGCHLD was ignored."""

    def ignore_and_block() -> None:
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGALRM])

    def start() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", IGNORANT_PARENT],
            preexec_fn=ignore_and_block,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    result = await asyncio.to_thread(start)
    assert result.stdout == str(["SigBlk:", "0" * 16, "SigIgn:", "0" * 16]) + "\n", result.stderr


@pytest.mark.parametrize("number", [1, 2, 3, 6, 8, 9, 11, 13, 15, 31, 34, 64])
async def test_every_signal_is_told_as_a_signal(number: int) -> None:
    result = await run(shell(f"kill -{number} $$"), timeout_s=30)
    assert (result.exit_code, result.signal, result.succeeded) == (None, number, False)


@pytest.mark.parametrize("code", [0, 1, 2, 9, 15, 127, 128, 137, 143, 194, 255])
async def test_every_exit_status_is_told_as_one(code: int) -> None:
    result = await run(shell(f"exit {code}"), timeout_s=30)
    assert (result.exit_code, result.signal, result.succeeded) == (code, None, code == 0)


async def test_who_has_escaped_the_group_is_found_by_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "TERMINATION_GRACE_S", 0.3)
    stubborn = f"trap '' TERM; echo $$ > {tmp_path}/stubborn; while :; do sleep 1; done"
    script = f'setsid sh -c "{stubborn.replace("$", chr(92) + "$")}" & setsid sleep 300 & echo $! > {tmp_path}/polite; sleep 300'
    for mark, ended in (("", False), (secrets.token_hex(16), True)):
        task = asyncio.create_task(run(shell(script), timeout_s=300, mark=mark))
        pids = [await read_pid(tmp_path / name) for name in ("stubborn", "polite")]
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        for pid in pids:
            if not ended:
                os.kill(pid, signal.SIGKILL)
            assert await gone(pid)
        for name in ("stubborn", "polite"):
            (tmp_path / name).unlink()


async def test_only_what_carries_the_very_mark_is_ended() -> None:
    mark = secrets.token_hex(16)
    marked, other = [
        await asyncio.create_subprocess_exec("sleep", "300", env={MARK: value}, start_new_session=True)
        for value in (mark, mark + "d")
    ]
    assert await end_marked(mark) == 1
    assert await marked.wait() == -signal.SIGTERM
    assert other.returncode is None
    assert await end_marked(mark[:-1]) == 0
    other.kill()
    await other.wait()


async def test_a_mark_on_ourselves_does_not_end_us() -> None:
    """The agent may have been started anew by a step that has marked it."""
    mark = secrets.token_hex(16)
    script = f"import asyncio; from agent.host.processes import end_marked; print(asyncio.run(end_marked('{mark}')))"

    def start() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", script],
            env={MARK: mark},
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )

    assert (await asyncio.to_thread(start)).stdout == "0\n"


async def test_the_group_may_clean_up_after_its_leader_has_gone(tmp_path: Path) -> None:
    script = (
        f"(trap 'sleep 0.5; echo clean > {tmp_path}/clean; exit' TERM; while :; do sleep 0.1; done) & exec sleep 300"
    )
    result = await run(shell(script), timeout_s=1)
    assert result.timed_out
    assert (tmp_path / "clean").read_text() == "clean\n"


async def test_who_can_not_be_killed_is_not_waited_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process that hangs in the kernel: here one that no signal is sent to."""
    monkeypatch.setattr(processes, "TERMINATION_GRACE_S", 0.1)
    monkeypatch.setattr(processes, "KILL_PATIENCE_S", 0.1)
    with monkeypatch.context() as deaf:
        deaf.setattr(os, "killpg", lambda *_: None)
        deaf.setattr(processes, "_send", lambda *_: None)
        result = await run(["sleep", "300"], timeout_s=0.1)
    assert (result.exit_code, result.signal, result.timed_out, result.succeeded) == (None, None, True, False)
    assert result.describe() == "no end within 0.1 s, and it can't be ended: it may still run"
    while any(thread.name.startswith("waitpid") for thread in threading.enumerate()):
        await asyncio.sleep(0.01)
    await asyncio.sleep(0.01)  # its end is taken in by the loop


async def test_what_could_not_be_ended_is_not_counted_as_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "TERMINATION_GRACE_S", 0.1)
    monkeypatch.setattr(processes, "KILL_PATIENCE_S", 0.1)
    mark = secrets.token_hex(16)
    marked = await asyncio.create_subprocess_exec("sleep", "300", env={MARK: mark})
    with monkeypatch.context() as deaf:
        deaf.setattr(processes, "_send", lambda *_: None)
        assert await end_marked(mark) == 0
    assert await end_marked(mark) == 1
    await marked.wait()


WITHOUT_CAP_KILL = """
import asyncio
from agent.host import processes
processes.TERMINATION_GRACE_S = processes.KILL_PATIENCE_S = 0.2
somebody = processes.User("nobody", 65534, 65534, (65534,), "/")
result = asyncio.run(processes.run(["/bin/sh", "-c", "echo $$; exec sleep 300"], timeout_s=1, user=somebody))
print(result.stdout.text.strip(), result.describe(), sep=": ")
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only root can become another user")
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
async def test_another_users_program_that_may_not_be_killed_is_told_as_it_is() -> None:
    """With the capabilities to start it and not those to end it: no PermissionError, and no end that was not."""
    capabilities = "-all,+setuid,+setgid"
    argv = ["setpriv", f"--bounding-set={capabilities}", sys.executable, "-c", WITHOUT_CAP_KILL]
    result = await asyncio.to_thread(
        subprocess.run, argv, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    pid, _, told = result.stdout.partition(": ")
    assert told == "no end within 1 s, and it can't be ended: it may still run\n", result.stderr
    assert not result.stderr
    os.kill(int(pid), signal.SIGKILL)
    assert await gone(int(pid))


async def test_output_that_is_not_utf8() -> None:
    result = await run(shell(r"printf 'caf\351'"), timeout_s=30)
    assert result.stdout.text == "caf\ufffd"


async def test_environment_folder_and_input(tmp_path: Path) -> None:
    result = await run(shell("pwd; echo $KEY; cat"), timeout_s=30, cwd=tmp_path, env={"KEY": "value"})
    assert result.stdout.text == f"{tmp_path}\nvalue\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
async def test_as_another_user() -> None:
    user = await asyncio.to_thread(User.named, "nobody")
    result = await run(["/usr/bin/id", "-nu"], timeout_s=30, user=user)
    assert result.stdout.text == "nobody\n"
    groups = await run(["/usr/bin/id", "-G"], timeout_s=30, user=user)
    assert "0" not in groups.stdout.text.split()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only root can become another user")
async def test_another_user_has_all_of_its_groups_and_none_of_ours() -> None:
    before = os.getgroups()
    try:
        os.setgroups([0, 4])
        user = User("somebody", 65534, 65534, (65534, 20, 44), "/nonexistent")
        result = await run(["/usr/bin/id", "-G"], timeout_s=30, user=user)
    finally:
        os.setgroups(before)
    assert sorted(map(int, result.stdout.text.split())) == [20, 44, 65534]


def test_a_user_that_does_not_exist() -> None:
    with pytest.raises(KeyError):
        User.named("no-such-user")


async def test_duration() -> None:
    started = time.monotonic()
    result = await run(shell("sleep 0.2"), timeout_s=30)
    assert 0.2 <= result.duration_s <= time.monotonic() - started


def test_any_signal_has_a_name() -> None:
    nothing = Output("", 0)
    assert Result(None, 40, False, 1.0, 2.0, nothing, nothing).describe() == "killed by signal 40"
    assert Result(None, 9, False, 1.0, 2.0, nothing, nothing).describe() == "killed by SIGKILL"


@pytest.mark.parametrize(("limit", "told"), [(60, "60"), (0.25, "0.2"), (59.96, "60"), (2e6, "2000000"), (1, "1")])
def test_a_limit_in_words(limit: float, told: str) -> None:
    nothing = Output("", 0)
    assert Result(None, 15, True, limit + 5, limit, nothing, nothing).describe() == f"no end within {told} s"


async def test_a_program_that_ended_while_we_were_late_has_ended_in_its_time():
    """As after a suspended machine: its end and the time limit are found together."""
    running = asyncio.create_task(processes.run(["/bin/sh", "-c", "sleep 0.2; exit 3"], timeout_s=0.5))
    await asyncio.sleep(0.1)
    time.sleep(1.0)  # the whole loop stands still
    result = await running
    assert (result.timed_out, result.exit_code) == (False, 3)
