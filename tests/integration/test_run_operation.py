"""Operation `run`: real programs, the local policy, and truthful ends."""

import asyncio
import os
import pwd
import signal
import time
from pathlib import Path

import pytest

from agent.errors import FailedError, RefusedError
from agent.jobs.document import parse
from agent.jobs.operations.run import Run, split_command
from agent.settings import Jobs


class Job:
    def __init__(self, document, progress=None):
        self.document = parse(document)[1]
        self.progress = progress or {}
        self.cancelled = asyncio.Event()
        self.messages = []
        self.saved = asyncio.Event()

    async def save(self, progress, message):
        self.progress = progress
        self.messages.append(message)
        self.saved.set()


@pytest.fixture
def handlers(tmp_path):
    folder = tmp_path / "handlers"
    folder.mkdir(mode=0o755)

    def add(name, script, mode=0o755):
        path = folder / name
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(mode)
        return path

    add.folder = folder
    return add


def alive(pid):
    """Whether a process runs; one that has ended and was not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def step(handler, *args, name=None, **changes):
    action = {
        "name": name or handler,
        "type": "runHandler",
        "input": {"handler": handler, "args": list(args)},
        **changes,
    }
    return {"action": action}


def document(*steps, **changes):
    return {"version": "1.0", "steps": list(steps), **changes}


async def run(handlers, doc, progress=None, **policy):
    operation = Run(Jobs(handler_dir=handlers.folder, **policy))
    job = Job(doc, progress)
    await asyncio.to_thread(operation.check, job.document)
    return await operation.run(job)


async def test_steps_in_order_with_the_user_as_first_argument(handlers, tmp_path):
    handlers("note.sh", f'echo "[$1] $2" >> {tmp_path}/log; echo out-$2\n')
    details = await run(
        handlers,
        document(step("note.sh", "a"), step("note.sh", "b"), finalStep=step("note.sh", "last"), includeStdOut="true"),
    )
    assert (tmp_path / "log").read_text() == "[] a\n[] b\n[] last\n"
    assert details["stdout"] == "out-last"
    assert details["exit_code"] == "0"


async def test_the_first_failure_ends_it_unless_ignored(handlers, tmp_path):
    handlers("fail.sh", "echo why >&2; exit 3\n")
    handlers("ok.sh", f"touch {tmp_path}/ran\n")
    with pytest.raises(FailedError) as caught:
        await run(handlers, document(step("fail.sh", name="first"), step("ok.sh")))
    assert caught.value.code == "step_failed"
    assert caught.value.details == {"step": "first", "exit_code": "3", "stderr": "why"} | {
        "duration_ms": caught.value.details["duration_ms"]
    }
    assert not (tmp_path / "ran").exists()
    details = await run(handlers, document(step("fail.sh", ignoreStepFailure="true"), step("ok.sh")))
    assert "exit status 3" in details["message"]
    assert (tmp_path / "ran").exists()


async def test_a_signal_is_not_an_exit_code_and_not_a_success(handlers):
    handlers("die.sh", "kill -SEGV $$\n")
    with pytest.raises(FailedError, match="killed by SIGSEGV") as caught:
        await run(handlers, document(step("die.sh", allowStdErr=100)))
    assert caught.value.details["signal"] == str(int(signal.SIGSEGV))
    assert "exit_code" not in caught.value.details


async def test_standard_error_beyond_what_is_allowed_fails_and_a_bad_exit_always_does(handlers):
    handlers("noisy.sh", "echo 1 >&2; echo 2 >&2; exit ${2:-0}\n")
    await run(handlers, document(step("noisy.sh", allowStdErr=2)))
    await run(handlers, document(step("noisy.sh")))
    with pytest.raises(FailedError, match="2 lines on standard error, 1 allowed"):
        await run(handlers, document(step("noisy.sh", allowStdErr=1)))
    with pytest.raises(FailedError, match="exit status 5"):
        await run(handlers, document(step("noisy.sh", "5", allowStdErr=10)))


async def test_much_output_neither_blocks_nor_fills_the_details(handlers):
    handlers("flood.sh", "yes line | head -c 5000000; yes bad | head -c 5000000 >&2; echo the-end\n")
    details = await run(handlers, document(step("flood.sh"), includeStdOut=True))
    assert details["stdout"].endswith("the-end")
    assert "bytes left out" in details["stdout"]
    assert all(len(value) <= 1024 for value in details.values())


async def test_time_limits_end_the_whole_group(handlers, tmp_path):
    handlers("sleep.sh", f"sleep 1000 & echo $! > {tmp_path}/child; wait\n")
    with pytest.raises(FailedError, match="no end within") as caught:
        await run(handlers, document(step("sleep.sh", timeoutSeconds=0.3)))
    assert caught.value.code == "step_timed_out"
    assert not alive(int((tmp_path / "child").read_text()))
    with pytest.raises(FailedError) as caught:
        await run(handlers, document(step("sleep.sh", ignoreStepFailure=True), step("sleep.sh"), timeoutSeconds=0.3))
    assert caught.value.code == "deadline", "an ignored failure does not ignore the job's own limit"


async def test_cancel_ends_the_step(handlers, tmp_path):
    handlers("sleep.sh", f"touch {tmp_path}/ran; sleep 1000\n")
    operation = Run(Jobs(handler_dir=handlers.folder))
    job = Job(document(step("sleep.sh"), step("sleep.sh")))
    task = asyncio.create_task(operation.run(job))
    await job.saved.wait()
    job.cancelled.set()
    started = time.monotonic()
    with pytest.raises(FailedError) as caught:
        await task
    assert caught.value.code == "cancelled"
    assert time.monotonic() - started < 100
    assert len(job.messages) == 1


async def test_a_started_step_is_never_started_again(handlers, tmp_path):
    handlers("count.sh", f"echo x >> {tmp_path}/count\n")
    with pytest.raises(FailedError) as caught:
        await run(handlers, document(step("count.sh"), step("count.sh")), progress={"step": 1})
    assert caught.value.code == "interrupted"
    assert not (tmp_path / "count").exists()


@pytest.mark.parametrize("name", ["../x.sh", "a/b.sh", "/bin/sh", "-x", "", "."])
async def test_handlers_come_from_the_folder_only(handlers, name):
    with pytest.raises(RefusedError):
        await run(handlers, document(step(name or "x", name="s") if name else step("nothere")))


async def test_unsafe_handlers_are_refused(handlers, tmp_path):
    path = handlers("h.sh", "true\n", mode=0o777)
    with pytest.raises(RefusedError, match="can be changed by others"):
        await run(handlers, document(step("h.sh")))
    path.chmod(0o644)
    with pytest.raises(RefusedError, match="not executable"):
        await run(handlers, document(step("h.sh")))
    path.chmod(0o755)
    handlers.folder.chmod(0o777)
    with pytest.raises(RefusedError, match="can be changed by others"):
        await run(handlers, document(step("h.sh")))
    handlers.folder.chmod(0o755)
    with pytest.raises(RefusedError, match="handlers are taken from"):
        await run(
            handlers,
            {
                "version": "1.0",
                "steps": [
                    {"action": {"name": "a", "type": "runHandler", "input": {"handler": "h.sh", "path": str(tmp_path)}}}
                ],
            },
        )
    await run(handlers, document(step("h.sh")))


async def test_users(handlers):
    handlers("who.sh", "id -un\n")
    me = pwd.getpwuid(os.geteuid()).pw_name
    details = await run(handlers, document(step("who.sh", runAsUser=me), includeStdOut=True))
    assert details["stdout"] == me
    with pytest.raises(RefusedError, match="there is no user"):
        await run(handlers, document(step("who.sh", runAsUser="no-such-user")))
    other = "nobody" if me != "nobody" else "daemon"
    with pytest.raises(RefusedError, match="not allowed"):
        await run(handlers, document(step("who.sh", runAsUser=other)))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run a step as another user")
async def test_an_allowed_user_runs_the_step(handlers, tmp_path):
    handlers("who.sh", "id -un; id -Gn\n")
    for folder in (handlers.folder, *list(handlers.folder.parents)[:3]):
        folder.chmod(0o755)
    details = await run(handlers, document(step("who.sh", runAsUser="nobody"), includeStdOut=True), run_as=["nobody"])
    assert details["stdout"].split() == ["nobody", "nogroup"], "and has none of root's groups"


async def test_commands_are_denied_unless_allowed_and_need_no_shell(handlers, tmp_path):
    def command(text):
        return document({"action": {"name": "c", "type": "runCommand", "input": {"command": text}}}, includeStdOut=True)

    with pytest.raises(RefusedError, match="runCommand is not allowed"):
        await run(handlers, command("echo,hello"))
    details = await run(handlers, command("echo, hello , a\\,b, $HOME"), commands="allow")
    assert details["stdout"] == "hello a,b $HOME"
    with pytest.raises(FailedError) as caught:
        await run(handlers, command("/no/such/program"), commands="allow")
    assert caught.value.code == "not_started"


async def test_conditions_are_refused(handlers):
    handlers("h.sh", "true\n")
    with pytest.raises(RefusedError, match="conditions"):
        await run(handlers, document(step("h.sh"), conditions=[{"key": "os", "value": ["x"], "type": "stringEqual"}]))


def test_splitting_commands():
    assert split_command(r"a, b\,c ,d") == ["a", "b,c", "d"]
    assert split_command("one") == ["one"]


async def test_a_step_is_not_begun_once_the_job_is_cancelled(handlers, tmp_path):
    handlers("mark.sh", f"echo x >> {tmp_path}/ran\n")
    operation = Run(Jobs(handler_dir=handlers.folder))
    for _ in range(10):
        job = Job(document(step("mark.sh")))
        job.cancelled.set()
        with pytest.raises(FailedError) as caught:
            await operation.run(job)
        assert caught.value.code == "cancelled"
    assert not (tmp_path / "ran").exists()


async def test_lines_on_standard_error_are_counted_beyond_what_is_kept(handlers):
    handlers("lines.sh", "yes line | head -n 2000 >&2\n")
    with pytest.raises(FailedError, match="2000 lines on standard error, 1999 allowed"):
        await run(handlers, document(step("lines.sh", allowStdErr=1999)))
    await run(handlers, document(step("lines.sh", allowStdErr=2000)))


async def test_what_a_step_prints_is_redacted(handlers):
    handlers("print.sh", 'echo "get https://b.s3.amazonaws.com/k?X-Amz-Signature=SECRET done"\n')
    details = await run(handlers, document(step("print.sh"), includeStdOut=True))
    assert details["stdout"] == "get https://b.s3.amazonaws.com/k?[redacted] done"


@pytest.mark.parametrize("user", ["a\0b", "\ud800"])
async def test_a_user_that_can_not_be_a_name_is_refused(handlers, user):
    handlers("h.sh", "true\n")
    action = {
        "name": "a",
        "type": "runHandler",
        "input": {"handler": "h.sh", "args": [], "path": ""},
        "run_as_user": user,
    }
    with pytest.raises(RefusedError):
        Run(Jobs(handler_dir=handlers.folder)).check(
            {"conditions": [], "steps": [{"action": action}], "final_step": None}
        )
