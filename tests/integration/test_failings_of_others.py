"""How other agents fail at the steps of a job, each measured or reported there, and that this one does not."""

import asyncio
import os

import pytest

from agent.errors import FailedError, RefusedError
from tests.integration.steps import Handlers, Job, alive, command, document, operation, run, step, written
from tests.places import own_folder


@pytest.fixture
def handlers():
    with own_folder() as folder:
        (folder / "handlers").mkdir(mode=0o755)
        yield Handlers(folder / "handlers")


async def failure(handlers, doc, **policy):
    with pytest.raises(FailedError) as caught:
        await run(handlers, doc, **policy)
    return caught.value


@pytest.mark.conformance("F-01")
async def test_a_step_killed_by_a_signal_was_reported_as_succeeded(handlers):
    for name in ("SEGV", "KILL", "TERM", "ABRT"):
        handlers("die.sh", f"echo fine; kill -{name} $$\n")
        error = await failure(handlers, document(step("die.sh"), finalStep=step("die.sh")))
        assert (error.code, error.message) == ("step_failed", f"step 'die.sh': killed by SIG{name}")


@pytest.mark.conformance("F-02")
async def test_exit_status_1_was_reported_as_killed_by_signal_1(handlers):
    for code in (1, 2, 9, 15, 129, 255):
        handlers("exit.sh", f"exit {code}\n")
        error = await failure(handlers, document(step("exit.sh")))
        assert error.details["exit_code"] == str(code)
        assert "signal" not in error.details


@pytest.mark.conformance("F-03")
async def test_allow_std_err_hid_a_failing_exit_code(handlers):
    handlers("fail.sh", "echo one >&2; exit 3\n")
    for allowed in (0, 1, 10**6):
        error = await failure(handlers, document(step("fail.sh", allowStdErr=allowed)))
        assert (error.code, error.details["exit_code"]) == ("step_failed", "3")


@pytest.mark.conformance("F-04")
@pytest.mark.parametrize("size", [100_000, 1_000_000])
@pytest.mark.parametrize("stream", [1, 2])
async def test_100_kb_on_standard_error_hung_the_job_for_ever(handlers, size, stream):
    handlers("loud.sh", f"head -c {size} /dev/zero | tr '\\0' x >&{stream}; echo end >&{stream}\n")
    details = await run(handlers, document(step("loud.sh", timeoutSeconds=100), includeStdOut=True))
    shown = details["stdout" if stream == 1 else "stderr"]
    assert shown.endswith("xxxend")
    assert len(shown) <= 1024
    left_out = int(shown.removeprefix("[").split()[0])
    assert left_out + len(shown.partition("] ")[2]) == size + len("end\n")


@pytest.mark.conformance("F-05")
async def test_after_1000_lines_the_step_was_killed_and_reported_as_succeeded(handlers, tmp_path):
    handlers("lines.sh", f"yes line | head -n 20000; yes bad | head -n 20000 >&2; echo x > {tmp_path}/end; exit 5\n")
    error = await failure(handlers, document(step("lines.sh")))
    assert error.details["exit_code"] == "5"
    assert await written(tmp_path / "end") == "x\n"


@pytest.mark.conformance("F-06")
async def test_an_unknown_user_ran_as_root(handlers, tmp_path):
    handlers("touch.sh", f"touch {tmp_path}/ran\n")
    for user in ("no-such-user", "root ", "0", "#0", "-", "root\n"):
        with pytest.raises(RefusedError) as caught:
            await run(handlers, document(step("touch.sh", runAsUser=user)), run_as=["no-such-user", "0", "#0", "-"])
        assert caught.value.code == "unknown_user"
    assert not (tmp_path / "ran").exists()


@pytest.mark.conformance("F-09")
async def test_there_were_no_time_limits(handlers, tmp_path):
    handlers("sleep.sh", f"sleep 1000 & echo $! > {tmp_path}/child; wait\n")
    for doc, policy, code in (
        (document(step("sleep.sh", timeoutSeconds=0.3)), {}, "step_timed_out"),
        (document(step("sleep.sh"), timeoutSeconds=0.3), {}, "deadline"),
        (document(step("sleep.sh")), {"step_timeout_s": 1}, "step_timed_out"),
    ):
        assert (await failure(handlers, doc, **policy)).code == code
        assert not alive(int(await written(tmp_path / "child")))


@pytest.mark.conformance("F-09")
async def test_a_step_that_ignores_sigterm_stuck(handlers, monkeypatch):
    monkeypatch.setattr("agent.host.processes.TERMINATION_GRACE_S", 0.2)
    handlers("deaf.sh", "trap '' TERM HUP INT; while :; do sleep 1; done\n")
    error = await failure(handlers, document(step("deaf.sh", timeoutSeconds=0.3)))
    assert (error.code, error.details["signal"]) == ("step_timed_out", "9")


@pytest.mark.conformance("F-09")
async def test_a_job_could_not_be_cancelled(handlers, tmp_path):
    handlers("sleep.sh", f"sleep 1000 & echo $! > {tmp_path}/child; wait\n")
    job = Job(document(step("sleep.sh")))
    task = asyncio.create_task(operation(handlers).run(job))
    pid = int(await written(tmp_path / "child"))
    job.cancelled.set()
    with pytest.raises(FailedError) as caught:
        await task
    assert caught.value.code == "cancelled"
    assert not alive(pid)


async def test_the_second_job_stuck(handlers):
    handlers("h.sh", "exec 0<&-; echo $2; setsid sleep 3 &\n")
    steps = operation(handlers)
    for number in range(3):
        details = await steps.run(Job(document(step("h.sh", str(number)), includeStdOut=True)))
        assert details["stdout"] == str(number)


async def test_a_step_that_waits_for_input_stuck(handlers):
    handlers("ask.sh", "read answer || echo nobody; cat; echo $answer\n")
    assert (await run(handlers, document(step("ask.sh"), includeStdOut=True)))["stdout"] == "nobody"


async def test_a_job_stuck_after_a_restart_or_ran_in_an_endless_loop(handlers, tmp_path):
    handlers("h.sh", f"echo x >> {tmp_path}/count\n")
    steps, job = operation(handlers), Job(document(step("h.sh"), step("h.sh")))
    await steps.run(job)
    for progress in job.history:
        with pytest.raises(FailedError) as caught:
            await steps.run(Job(document(step("h.sh"), step("h.sh")), progress))
        assert caught.value.code == "interrupted"
    assert (tmp_path / "count").read_text() == "x\nx\n"


async def test_what_can_not_be_started_ends_the_job_and_not_the_agent(handlers):
    handlers("bad.sh", "", interpreter="/no/such/interpreter")
    (handlers.folder / "empty.sh").write_text("true\n")
    (handlers.folder / "empty.sh").chmod(0o755)
    for doc in (
        document(step("bad.sh")),
        document(step("empty.sh")),
        document(command("/")),
        document(command("/etc/passwd")),
    ):
        error = await failure(handlers, doc, commands="allow")
        assert (error.code, error.details["step"] in error.message) == ("not_started", True)
    assert "#!" in (await failure(handlers, document(step("empty.sh")))).hint


@pytest.mark.conformance("C-DOC-08")
@pytest.mark.parametrize("stream", [1, 2])
async def test_what_is_shown_of_the_output_is_the_end_after_it_was_cleaned(handlers, stream):
    """Colours, progress bars, binary data, long characters: the last characters that can be read are shown, 1024 at most."""
    name = "stdout" if stream == 1 else "stderr"
    cases = {
        "colours": ("printf '\\033[31mred\\033[0m %.0s' $(seq 3000); printf last", "red red last"),
        "progress": ("for i in $(seq 100); do printf '%s %%\\r' $i; done; printf last", "99 % 100 % last"),
        "binary": ("head -c 50000 /dev/urandom; printf ' last'", " last"),
        "euro": ("printf '€%.0s' $(seq 5000); printf ' last'", "€€€ last"),
        "invalid": ("printf 'caf\\351 last'", "caf\ufffd last"),
        "blank": ("printf 'last'; printf ' \\n%.0s' $(seq 3000)", "last"),
    }
    for script, end in cases.values():
        handlers("print.sh", f"{{ {script}; }} >&{stream}\n", interpreter="/bin/bash")
        shown = (await run(handlers, document(step("print.sh"), includeStdOut=True)))[name]
        assert shown.endswith(end), script
        assert len(shown) <= 1024
        assert all(c.isprintable() or ord(c) > 0x9F for c in shown)
    handlers("print.sh", f"printf 'x%.0s' $(seq 1024) >&{stream}\n")
    assert (await run(handlers, document(step("print.sh"), includeStdOut=True)))[name] == "x" * 1024
    handlers("print.sh", f"printf 'a b\\001%.0s' $(seq 3000) >&{stream}\n", interpreter="/bin/bash")
    shown = (await run(handlers, document(step("print.sh"), includeStdOut=True)))[name]
    assert len(shown.partition("] ")[2]) > 950, "cleaned first, cut afterwards"


async def test_a_secret_that_the_bound_has_cut_is_not_shown(handlers):
    query = "X-Amz-Signature=" + "S" * 600
    for more in range(15_500, 16_500, 37):
        handlers("print.sh", f"printf 'https://h/k?{query} '; head -c {more} /dev/zero | tr '\\0' '\\1'; echo end\n")
        shown = (await run(handlers, document(step("print.sh"), includeStdOut=True)))["stdout"]
        assert "SSS" not in shown
        assert shown.endswith("end")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only root can run a step as another user")
async def test_steps_of_another_user_are_ended_too(handlers, tmp_path):
    handlers("sleep.sh", "setsid sleep 998 & sleep 999\n")
    task = asyncio.create_task(
        run(handlers, document(step("sleep.sh", runAsUser="nobody", timeoutSeconds=1)), run_as=["nobody"])
    )
    with pytest.raises(FailedError) as caught:
        await task
    assert caught.value.code == "step_timed_out"
    left = await asyncio.create_subprocess_exec("pgrep", "-u", "nobody", "-f", "sleep 99[89]", stdout=-3)
    assert await left.wait() == 1
