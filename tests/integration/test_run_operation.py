"""Operation `run`: real programs, the local policy, and truthful ends."""

import asyncio
import errno
import itertools
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.errors import FailedError, RefusedError
from agent.jobs.operations.policy import CAPABILITIES, split_command
from tests.integration.steps import Handlers, Job, alive, command, document, kill, operation, run, step, written
from tests.places import own_folder

ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only root can run a step as another user")


@pytest.fixture
def handlers():
    with own_folder() as folder:
        (folder / "handlers").mkdir(mode=0o755)
        yield Handlers(folder / "handlers")


@pytest.mark.conformance("C-DOC-03")
async def test_steps_in_order_with_the_user_as_first_argument(handlers, tmp_path):
    handlers("note.sh", f'echo "[$1] $2" >> {tmp_path}/log; echo out-$2\n')
    details = await run(
        handlers,
        document(step("note.sh", "a"), step("note.sh", "b"), finalStep=step("note.sh", "last"), includeStdOut="true"),
    )
    assert (tmp_path / "log").read_text() == "[] a\n[] b\n[] last\n"
    assert details["stdout"] == "out-last"
    assert details["exit_code"] == "0"


@pytest.mark.conformance("C-DOC-03")
async def test_the_first_failure_ends_it_unless_ignored(handlers, tmp_path):
    handlers("fail.sh", "echo why >&2; exit 3\n")
    handlers("ok.sh", f"touch {tmp_path}/ran\n")
    with pytest.raises(FailedError) as caught:
        await run(handlers, document(step("fail.sh", name="first"), step("ok.sh"), finalStep=step("ok.sh")))
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
    job = Job(document(step("sleep.sh"), step("sleep.sh")))
    task = asyncio.create_task(operation(handlers).run(job))
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


@pytest.mark.conformance("C-DOC-05")
@pytest.mark.parametrize(
    "name", ["../x.sh", "..", "sub/h.sh", "../handlers/h.sh", "/bin/sh", "-x", ".", "h.sh/", "h sh"]
)
async def test_handlers_come_from_the_folder_only(handlers, name):
    handlers("h.sh", "true\n")
    (handlers.folder / "sub").mkdir()
    (handlers.folder / "sub/h.sh").symlink_to(handlers.folder / "h.sh")
    with pytest.raises(RefusedError, match="is not the name of a handler") as caught:
        await run(handlers, document(step(name)))
    assert caught.value.code == "handler_denied"
    assert caught.value.hint


@pytest.mark.conformance("C-DOC-05")
async def test_other_folders_are_refused(handlers):
    handlers("h.sh", "true\n")
    for path in ("/bin", str(handlers.folder.parent), f"{handlers.folder}/../handlers", "handlers", "/"):
        doc = document(step("h.sh"))
        doc["steps"][0]["action"]["input"]["path"] = path
        with pytest.raises(RefusedError, match="handlers are taken from"):
            await run(handlers, doc)
    for path in ("", "default", str(handlers.folder), f"{handlers.folder}/"):
        doc["steps"][0]["action"]["input"]["path"] = path
        await run(handlers, doc)


async def test_a_missing_handler_is_refused(handlers):
    (handlers.folder / "folder").mkdir(mode=0o755)
    (handlers.folder / "loop").symlink_to("loop")
    (handlers.folder / "nowhere").symlink_to("/no/such/file")
    for name in ("absent.sh", "folder", "loop", "nowhere"):
        with pytest.raises(RefusedError) as caught:
            await run(handlers, document(step(name)))
        assert (caught.value.code, bool(caught.value.hint)) == ("handler_missing", True)


async def test_unsafe_handlers_are_refused(handlers):
    path = handlers("h.sh", "true\n", mode=0o755)
    places = [path, handlers.folder, handlers.folder.parent]
    tried = 0
    for place in places:
        for mode in (0o777, 0o775, 0o757, 0o1777):
            place.chmod(mode)
            with pytest.raises(RefusedError, match=f"{place} can be changed by others") as caught:
                await run(handlers, document(step("h.sh")))
            assert caught.value.code == "handler_unsafe"
            assert f"chmod go-w {place}" in caught.value.hint
            tried += 1
        place.chmod(0o755)
    path.chmod(0o644)
    with pytest.raises(RefusedError, match="not executable"):
        await run(handlers, document(step("h.sh")))
    path.chmod(0o755)
    await run(handlers, document(step("h.sh")))
    print(f"{tried} unsafe modes of a handler and the folders above it tried")


async def test_below_a_folder_like_tmp_only_a_private_folder_is_safe(handlers):
    """Where everybody may write but only owners remove: others could have made what is there, or look into it."""
    top, folder = handlers.folder.parent, handlers.folder.parent / "mine"
    (folder / "handlers").mkdir(parents=True, mode=0o755)
    below = Handlers(folder / "handlers")
    below("h.sh", "true\n")
    top.chmod(0o1777)
    for mode in (0o755, 0o711, 0o750, 0o710, 0o701):
        folder.chmod(mode)
        with pytest.raises(RefusedError, match=f"{top} can be changed by others"):
            await run(below, document(step("h.sh")))
    folder.chmod(0o700)
    await run(below, document(step("h.sh")))
    (top / "link").symlink_to("mine")
    with pytest.raises(RefusedError, match=f"{top} can be changed by others"):
        await run(Handlers(top / "link/handlers"), document(step("h.sh")))
    top.chmod(0o777)
    with pytest.raises(RefusedError, match=f"{top} can be changed by others"):
        await run(below, document(step("h.sh")))


async def test_links_are_followed_and_their_whole_way_is_judged(handlers):
    with own_folder() as elsewhere:
        (elsewhere / "real").mkdir(mode=0o755)
        target = Handlers(elsewhere / "real")("target.sh", "echo linked\n")
        (elsewhere / "hop").symlink_to("real/../real")
        (handlers.folder / "h.sh").symlink_to(elsewhere / "hop/target.sh")
        assert (await run(handlers, document(step("h.sh"), includeStdOut=True)))["stdout"] == "linked"
        for place in (target, elsewhere / "real", elsewhere):
            place.chmod(0o777)
            with pytest.raises(RefusedError, match=f"{place} can be changed by others"):
                await run(handlers, document(step("h.sh")))
            place.chmod(0o755)
        (handlers.folder / "h.sh").unlink()
        (elsewhere / "open").mkdir()
        (elsewhere / "open").chmod(0o777)
        (elsewhere / "open/link").symlink_to(target)
        (handlers.folder / "h.sh").symlink_to(elsewhere / "open/link")
        with pytest.raises(RefusedError, match="open can be changed by others"):
            await run(handlers, document(step("h.sh")))


@ROOT_ONLY
async def test_what_belongs_to_another_user_is_refused(handlers):
    path = handlers("h.sh", "true\n")
    for place in (path, handlers.folder, handlers.folder.parent):
        os.chown(place, 65534, 65534)
        with pytest.raises(RefusedError, match=f"{place} can be changed by others") as caught:
            await run(handlers, document(step("h.sh")))
        assert "chown root" in caught.value.hint
        os.chown(place, 0, 0)


async def test_a_handler_is_judged_again_before_its_step_starts(handlers, tmp_path):
    later = handlers("later.sh", f"touch {tmp_path}/ran\n")
    handlers("first.sh", f"chmod 777 {later}\n")
    with pytest.raises(FailedError) as caught:
        await run(handlers, document(step("first.sh"), step("later.sh", ignoreStepFailure=True)))
    assert caught.value.code == "handler_unsafe"
    assert caught.value.details == {"step": "later.sh"}
    assert not (tmp_path / "ran").exists()


async def test_users(handlers):
    handlers("who.sh", "id -un\n")
    me = pwd.getpwuid(os.geteuid()).pw_name
    details = await run(handlers, document(step("who.sh", runAsUser=me), includeStdOut=True))
    assert details["stdout"] == me
    details = await run(handlers, document(step("who.sh", runAsUser=""), includeStdOut=True))
    assert details["stdout"] == me
    other = "nobody" if me != "nobody" else "daemon"
    for user, code in (("no-such-user", "unknown_user"), ("0", "unknown_user"), (other, "user_denied")):
        with pytest.raises(RefusedError) as caught:
            await run(handlers, document(step("who.sh", runAsUser=user)), run_as=["no-such-user", "0"])
        assert (caught.value.code, bool(caught.value.hint)) == (code, True)


@pytest.mark.parametrize("raised", [OSError(5, "no answer"), KeyError("x")])
async def test_nobody_is_run_as_somebody_else_because_a_look_up_failed(handlers, tmp_path, monkeypatch, raised):
    handlers("touch.sh", f"touch {tmp_path}/ran\n")

    def fail(*_):
        raise raised

    for function in ("pwd.getpwnam", "os.getgrouplist"):
        with monkeypatch.context() as patch:
            patch.setattr(function, fail)
            with pytest.raises(RefusedError) as caught:
                await run(handlers, document(step("touch.sh", runAsUser="nobody")), run_as=["nobody"])
        assert caught.value.code in ("user_lookup_failed", "unknown_user")
    assert not (tmp_path / "ran").exists()


async def test_root_by_another_name_needs_root_in_the_list(handlers, monkeypatch):
    handlers("who.sh", "true\n")
    monkeypatch.setattr("pwd.getpwnam", lambda name: pwd.struct_passwd((name, "x", 0, 0, "", "/root", "/bin/sh")))
    monkeypatch.setattr("os.getgrouplist", lambda *_: [0])
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    steps = operation(handlers, run_as=["toor"])
    with pytest.raises(RefusedError, match="root by another name") as caught:
        steps.check(Job(document(step("who.sh", runAsUser="toor"))).document)
    assert caught.value.code == "user_denied"


@ROOT_ONLY
async def test_an_allowed_user_runs_the_step_with_its_own_groups_and_nothing_of_ours(handlers):
    handlers("who.sh", "id -un; id -Gn; echo $HOME $USER $1; umask; pwd; ls /proc/self/fd | wc -l; cat | wc -c\n")
    before = os.getgroups()
    try:
        os.setgroups([0, 4])  # the agent's own, here adm: none of the step's business
        details = await run(
            handlers, document(step("who.sh", runAsUser="nobody"), includeStdOut=True), run_as=["nobody"]
        )
    finally:
        os.setgroups(before)
    home = pwd.getpwnam("nobody").pw_dir
    assert details["stdout"].split() == ["nobody", "nogroup", home, "nobody", "nobody", "0022", "/", "4", "0"]


AGENT = """
import asyncio, ctypes, json, os, struct, sys
from pathlib import Path
from agent.errors import AgentError
from agent.host import processes
from tests.integration.steps import Handlers, run

folder, capabilities, documents = json.loads(sys.argv[1])
if os.geteuid() == 0:
    libc = ctypes.CDLL(None)
    libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
    os.setgroups([]); os.setresgid(64999, 64999, 64999); os.setresuid(64999, 64999, 64999)
    mask = sum(1 << number for number in capabilities)
    assert libc.capset(struct.pack("Ii", 0x20080522, 0), struct.pack("6I", mask, mask, mask, 0, 0, 0)) == 0
    assert not any(libc.prctl(47, 2, number, 0, 0) for number in capabilities)  # PR_CAP_AMBIENT_RAISE
processes.TERMINATION_GRACE_S = 0.5

async def ends():
    for document in documents:
        try:
            yield await run(Handlers(Path(folder)), document, run_as=["root", "nobody"])
        except AgentError as error:
            yield {"code": error.code, "message": error.message, "hint": error.hint}

async def main():
    print(json.dumps([end async for end in ends()]))

asyncio.run(main())
"""
"""An agent that runs documents as user 64999 with capabilities as systemd gives them, or, when we aren't root, as our own user."""
CAP_DAC_READ_SEARCH, CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_PTRACE = 2, 5, 6, 7, 19


async def ends_of_an_agent(handlers, capabilities, *documents):
    """How each document ends: its details, or code, message and hint. The agent can read the interpreter's files in any case."""
    arguments = json.dumps([str(handlers.folder), [CAP_DAC_READ_SEARCH, *capabilities], documents])
    agent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", AGENT, arguments),
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = await agent.communicate()
    assert not err, err.decode()
    return json.loads(out)


@ROOT_ONLY
async def test_an_agent_that_can_not_become_others_or_end_them_refuses_them_before_anything_runs(handlers):
    handlers("who.sh", "id -un\n")
    needed, tried = {CAP_KILL: "CAP_KILL", CAP_SETGID: "CAP_SETGID", CAP_SETUID: "CAP_SETUID"}, 0
    doc = document(step("who.sh", runAsUser="nobody"), includeStdOut=True)
    for count in range(len(needed)):
        for held in itertools.combinations(needed, count):
            [end] = await ends_of_an_agent(handlers, held, doc)
            missing = " ".join(name for number, name in needed.items() if number not in held)
            assert end["code"] == "user_unavailable"
            assert end["message"].endswith(f"it has not {missing}")
            assert 'docs/jobs.md, "Steps as another user"' in end["hint"]
            tried += 1
    print(f"{tried} sets of capabilities that are too small for another user tried")


@ROOT_ONLY
async def test_no_step_inherits_the_capabilities_of_the_agent(handlers):
    handlers("who.sh", "id -u; grep -c 'Cap[PEA].*:.0000000000000000' /proc/self/status\n")
    ends = await ends_of_an_agent(
        handlers,
        [CAP_KILL, CAP_SETGID, CAP_SETUID],
        document(step("who.sh", runAsUser="nobody"), includeStdOut=True),
        document(step("who.sh"), includeStdOut=True),
    )
    assert [end["stdout"] for end in ends] == ["65534 3", "64999 3"], "neither permitted nor effective nor ambient"


@ROOT_ONLY
async def test_an_agent_with_capabilities_alone_ends_a_step_of_another_user_with_all_it_has_started(handlers):
    stubborn = "sh -c 'trap \"\" TERM; while :; do sleep 1; done' steps-of-nobody"
    handlers("slow.sh", f"{stubborn} & setsid {stubborn} & sleep 1000\n")
    capabilities = [CAP_KILL, CAP_SETGID, CAP_SETUID, CAP_SYS_PTRACE]
    doc = document(step("slow.sh", runAsUser="nobody", timeoutSeconds=1))
    [end] = await ends_of_an_agent(handlers, capabilities, doc)
    assert (end["code"], end["message"]) == ("step_timed_out", "step 'slow.sh': no end within 1 s")
    left = await asyncio.create_subprocess_exec("pgrep", "-u", "nobody", "-f", "steps-of-nobody", stdout=-3)
    assert await left.wait() == 1


@ROOT_ONLY
async def test_where_the_kernel_forbids_another_user_all_the_same_it_says_what_to_do(handlers, monkeypatch):
    """As a unit with the capabilities, whose system call filter has no @setuid."""

    def forbidden():
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("agent.host.processes._keep_capabilities", forbidden)
    handlers("h.sh", "true\n")
    with pytest.raises(FailedError) as caught:
        await run(handlers, document(step("h.sh", runAsUser="nobody")), run_as=["nobody"])
    assert (caught.value.code, "docs/jobs.md" in caught.value.hint) == ("not_started", True)


@pytest.mark.conformance("C-DOC-04")
async def test_an_empty_or_unfilled_user_is_the_agent_s_own_and_nobody_else(handlers):
    """For an agent that could become root, and whose policy allows that."""
    handlers("who.sh", 'echo "$(id -u) [$1]"\n')
    empty = ({}, {"runAsUser": ""}, {"runAsUser": "${aws:iot:parameter:runAsUser}"})
    docs = [document(step("who.sh", **user), includeStdOut=True) for user in empty]
    for doc in docs:
        doc["steps"][0]["action"]["input"]["path"] = "${aws:iot:parameter:path}"
    own = os.geteuid() or 64999
    ends = await ends_of_an_agent(handlers, [CAP_KILL, CAP_SETGID, CAP_SETUID], *docs)
    assert [end.get("stdout", end) for end in ends] == [f"{own} []"] * 3


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_documented_drop_in_gives_the_unit_what_the_policy_asks_for(tmp_path):
    repository = Path(__file__).parents[2]
    section = (repository / "docs/jobs.md").read_text().partition("\n## Steps as another user\n")[2]
    drop_in = section.partition("```ini\n")[2].partition("```")[0]
    for key in ("CapabilityBoundingSet", "AmbientCapabilities"):
        [given] = re.findall(rf"^{key}=(.*)$", drop_in, re.MULTILINE)
        assert set(CAPABILITIES) < set(given.split())
    shipped = (repository / "systemd/camera-agent.service").read_text()
    (tmp_path / "camera-agent.service").write_text(
        shipped.replace("/usr/libexec/camera-agent/camera-agent-loader", "/bin/true")
    )
    (tmp_path / "camera-agent.service.d").mkdir()
    (tmp_path / "camera-agent.service.d/override.conf").write_text(drop_in)
    argv = ["systemd-analyze", "verify", "--man=no", tmp_path / "camera-agent.service"]
    result = subprocess.run(argv, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


async def test_the_plan_names_what_would_run_and_runs_nothing(handlers, tmp_path):
    handlers("a.sh", f"touch {tmp_path}/ran\n")
    me = pwd.getpwuid(os.geteuid()).pw_name
    doc = document(
        step("a.sh", "x y", "https://h/k?X-Amz-Signature=SECRET", name="first", ignoreStepFailure=True),
        command("echo,b", runAsUser=me, timeoutSeconds=7),
        finalStep=step("a.sh"),
        timeoutSeconds=90,
    )
    job = Job(doc)
    handler, own = f"{handlers.folder}/a.sh", "the agent's own user"
    assert await operation(handlers, commands="allow", step_timeout_s=60).plan(job.document) == [
        "end the whole job after 90 s",
        f"step 1 of 2 'first': run {handler} '' 'x y' 'https://h/k?[redacted]' as {own}, at most 60 s, go on if it fails",
        f"step 2 of 2 'c': run echo b as {me}, at most 7 s",
        f"final step 'a.sh': run {handler} '' as {own}, at most 60 s",
    ]
    assert not (tmp_path / "ran").exists()
    with pytest.raises(RefusedError):
        await operation(handlers).plan(job.document)


async def test_a_step_knows_its_job_and_nothing_of_our_service(handlers, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    monkeypatch.setenv("WATCHDOG_USEC", "60000000")
    handlers("env.sh", "echo $CAMERA_AGENT_JOB_ID,$CAMERA_AGENT_STEP,$CAMERA_AGENT_RUN,$NOTIFY_SOCKET$WATCHDOG_USEC\n")
    steps, job = operation(handlers), Job(document(step("env.sh", name="look around"), includeStdOut=True))
    details = await steps.run(job)
    assert details["stdout"] == f"job-1,look around,{job.history[0]['run']},"
    assert len(job.history[0]["run"]) == 32


@pytest.mark.conformance("C-DOC-06")
async def test_commands_are_denied_unless_allowed_and_need_no_shell(handlers):
    with pytest.raises(RefusedError, match="runCommand is not allowed"):
        await run(handlers, document(command("echo,hello")))
    details = await run(handlers, document(command("echo, hello , a\\,b, $HOME"), includeStdOut=True), commands="allow")
    assert details["stdout"] == "hello a,b $HOME"
    with pytest.raises(FailedError) as caught:
        await run(handlers, document(command("/no/such/program")), commands="allow")
    assert caught.value.code == "not_started"


async def test_a_failure_after_the_start_is_not_told_as_a_step_that_was_not_started(handlers, tmp_path, monkeypatch):
    handlers("slow.sh", f"touch {tmp_path}/ran; exec sleep 1000\n")

    def find(*_):
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr("agent.host.processes._find", find)
    with pytest.raises(OSError, match="too many"):
        await run(handlers, document(step("slow.sh", timeoutSeconds=0.5)))
    assert (tmp_path / "ran").exists()


def test_splitting_commands():
    assert split_command(r"a, b\,c ,d") == ["a", "b,c", "d"]
    assert split_command("one") == ["one"]


async def test_a_step_is_not_begun_once_the_job_is_cancelled(handlers, tmp_path):
    handlers("mark.sh", f"echo x >> {tmp_path}/ran\n")
    steps = operation(handlers)
    for _ in range(10):
        job = Job(document(step("mark.sh")))
        job.cancelled.set()
        with pytest.raises(FailedError) as caught:
            await steps.run(job)
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
    job = Job(document(step("h.sh")))
    job.document["steps"][0]["action"]["run_as_user"] = user
    with pytest.raises(RefusedError):
        operation(handlers).check(job.document)


# ---- what a step leaves running

ESCAPE = "setsid sh -c 'trap \"\" TERM; echo $$ > {0}/escaped; while :; do sleep 1; done' & "


async def test_what_escaped_the_group_is_ended_with_a_step_that_is_too_slow(handlers, tmp_path, monkeypatch):
    monkeypatch.setattr("agent.host.processes.TERMINATION_GRACE_S", 0.3)
    handlers(
        "slow.sh", ESCAPE.format(tmp_path) + f"while [ ! -s {tmp_path}/escaped ]; do sleep 0.05; done; sleep 1000\n"
    )
    with pytest.raises(FailedError) as caught:
        await run(handlers, document(step("slow.sh", timeoutSeconds=3)))
    assert caught.value.code == "step_timed_out"
    assert not alive(int(await written(tmp_path / "escaped")))


async def test_what_escaped_the_group_is_ended_with_a_cancelled_job(handlers, tmp_path, monkeypatch):
    monkeypatch.setattr("agent.host.processes.TERMINATION_GRACE_S", 0.3)
    handlers("slow.sh", ESCAPE.format(tmp_path) + "sleep 1000\n")
    job = Job(document(step("slow.sh")))
    task = asyncio.create_task(operation(handlers).run(job))
    pid = int(await written(tmp_path / "escaped"))
    job.cancelled.set()
    with pytest.raises(FailedError):
        await task
    assert not alive(pid)


async def test_a_daemon_that_a_good_step_has_started_stays_when_a_later_step_is_ended(handlers, tmp_path):
    handlers("start.sh", f"setsid sleep 1000 > /dev/null 2>&1 < /dev/null & echo $! > {tmp_path}/daemon\n")
    handlers("slow.sh", "sleep 1000\n")
    with pytest.raises(FailedError) as caught:
        await run(handlers, document(step("start.sh"), step("slow.sh", timeoutSeconds=0.3)))
    assert caught.value.code == "step_timed_out"
    pid = int(await written(tmp_path / "daemon"))
    assert alive(pid)
    kill(pid)


KILLED_AGENT = """
import asyncio, json, sys
from pathlib import Path
from tests.integration.steps import Handlers, Job, document, operation, step

class Kept(Job):
    async def save(self, progress, message):
        Path(sys.argv[2]).write_text(json.dumps(progress) + "\\n")

asyncio.run(operation(Handlers(Path(sys.argv[1]))).run(Kept(document(step("slow.sh"), step("slow.sh")))))
"""


async def test_what_a_killed_agent_has_left_is_ended_before_the_job_is_and_no_step_runs_twice(handlers, tmp_path):
    """kill -9 while a step runs that has a child in its group and one in a session of its own, which ignores SIGTERM."""
    handlers(
        "slow.sh",
        f"echo x >> {tmp_path}/count; " + ESCAPE.format(tmp_path) + f"sleep 1000 & echo $! > {tmp_path}/c; wait\n",
    )
    arguments = [sys.executable, "-c", KILLED_AGENT, str(handlers.folder), str(tmp_path / "progress")]
    agent = await asyncio.create_subprocess_exec(*arguments, cwd=Path(__file__).parents[2])
    pids = [int(await written(tmp_path / name)) for name in ("escaped", "c")]
    agent.kill()
    await agent.wait()
    assert all(alive(pid) for pid in pids)
    progress = json.loads(await written(tmp_path / "progress"))
    with pytest.raises(FailedError) as caught:
        await run(handlers, document(step("slow.sh"), step("slow.sh")), progress)
    assert caught.value.code == "interrupted"
    assert "of its processes that were left were ended" in caught.value.message
    assert not any(alive(pid) for pid in pids)
    assert (tmp_path / "count").read_text() == "x\n"


async def test_after_a_reboot_of_the_camera_nothing_of_the_step_is_looked_for(handlers, tmp_path):
    handlers("h.sh", f"touch {tmp_path}/ran\n")
    progress = {"step": 0, "run": "0" * 32, "boot_id": "boot-0", "left_s": None, "remarks": []}
    with pytest.raises(FailedError, match=r"the camera was restarted while step 'h\.sh' ran") as caught:
        await run(handlers, document(step("h.sh")), progress)
    assert caught.value.code == "interrupted"
    assert "194" in caught.value.hint
    assert not (tmp_path / "ran").exists()
