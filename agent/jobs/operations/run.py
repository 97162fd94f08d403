"""Operation `run`: the steps of AWS's managed job templates, each a handler from the camera's own folder or a command."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import secrets
import shlex
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.errors import FailedError, RefusedError
from agent.host import processes
from agent.jobs.operations import policy as rules
from agent.jobs.operations.execution import Job, alone
from agent.jobs.operations.reboot import next_attempt, wait_until_down
from agent.logs import redact
from agent.settings import Jobs

REBOOT_STATUS = 194
"""A handler that ends with it has done its part, and asks for a reboot before the next step."""
KEPT_BYTES = 16384
"""Of each output; far more than is shown, for control characters and secrets are taken out before it is cut."""
SHOWN_CHARACTERS = 1024
OF_OUR_SERVICE = frozenset({
    *("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "JOURNAL_STREAM", "INVOCATION_ID", "SYSTEMD_EXEC_PID"),
    *("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "CREDENTIALS_DIRECTORY", "MEMORY_PRESSURE_WATCH"),
    *("RUNTIME_DIRECTORY", "STATE_DIRECTORY", "CONFIGURATION_DIRECTORY", "MEMORY_PRESSURE_WRITE", "MAINPID"),
})  # fmt: skip


class StepFailedError(FailedError):
    """A step failed; `details` tell which, how it ended and what it printed last.

    `ignorable` tells whether `ignoreStepFailure` may go on after it.
    """

    def __init__(
        self, code: str, message: str, details: dict[str, str], hint: str = "", *, ignorable: bool = True
    ) -> None:
        super().__init__(code, message, hint)
        self.details = details
        self.ignorable = ignorable


@dataclass
class Course:
    """How far a job has come; it is kept over a reboot that a step asked for. `deadline` is of the monotonic clock."""

    number: int
    deadline: float
    remarks: list[str] = field(default_factory=list)
    details: dict[str, str] = field(default_factory=dict)

    def left_s(self) -> float | None:
        """Seconds of the job's time limit that are left; None without a limit."""
        left = self.deadline - time.monotonic()
        return left if left < float("inf") else None

    def to_json(self) -> dict[str, Any]:
        return {"step": self.number, "left_s": self.left_s(), "remarks": self.remarks}

    @classmethod
    def begin(cls, number: int, left_s: float | None, *more: Any) -> Course:
        return cls(number, time.monotonic() + (float("inf") if left_s is None else left_s), *more)


class Run:
    """Runs steps in order under the local policy. A step that was started is never started a second time.

    `boot_id` is the kernel's id of this boot. `reboot` asks for the reboot that a step wants, when nothing is on trial
    (`mutation_lock`); it returns when asked and raises FailedError.
    """

    name = "run"

    def __init__(
        self, policy: Jobs, *, boot_id: str, reboot: Callable[[], Awaitable[None]], mutation_lock: asyncio.Lock
    ) -> None:
        self._policy = policy
        self._boot_id = boot_id
        self._reboot_camera = reboot
        self._mutation_lock = mutation_lock

    def check(self, document: Mapping[str, Any]) -> None:
        for action in _actions(document):
            rules.user(self._policy, action["run_as_user"])
            rules.command(self._policy, action)

    async def plan(self, document: Mapping[str, Any]) -> list[str]:
        """What `run` would do, step by step, in words. Raises RefusedError like `check`."""
        return await asyncio.to_thread(self._plan, document)

    def _plan(self, document: Mapping[str, Any]) -> list[str]:
        limit = document["timeout_s"]
        lines = [f"end the whole job after {limit:g} s"] if limit else []
        for number, action in enumerate(_actions(document)):
            last = number == len(document["steps"])
            words = shlex.join(rules.command(self._policy, action))
            who = action["run_as_user"] or "the agent's own user"
            seconds = action["timeout_s"] or self._policy.step_timeout_s
            ignored = ", go on if it fails" if action["ignore_step_failure"] else ""
            title = "final step" if last else f"step {number + 1} of {len(document['steps'])}"
            lines.append(redact(f"{title} {action['name']!r}: run {words} as {who}, at most {seconds:g} s{ignored}"))
        return lines

    async def run(self, job: Job) -> dict[str, str]:
        actions = _actions(job.document)
        course, rebooting = await self._begin(job, actions)
        while course.number < len(actions):
            action = actions[course.number]
            try:
                if not rebooting:
                    course.details, rebooting = await self._step(action, job, course, len(actions))
                if rebooting:
                    await self._reboot(action, job, course)
            except StepFailedError as error:
                if not action["ignore_step_failure"] or not error.ignorable:
                    raise
                course.remarks.append(f"failure ignored as asked: {action['name']} ({error.message})")
            rebooting = False
            course.number += 1
        return {
            **course.details,
            "message": "; ".join([f"{len(actions)} of {len(actions)} steps done", *course.remarks]),
        }

    async def _begin(self, job: Job, actions: list[Mapping[str, Any]]) -> tuple[Course, bool]:
        """Where to go on, and whether with the reboot that the step has asked for. A step that was cut ends the job."""
        kept = job.progress
        if "step" not in kept:
            return Course.begin(0, job.document["timeout_s"]), False
        if kept.get("rebooting"):
            return Course.begin(kept["step"], kept["left_s"], kept["remarks"], kept["details"]), True
        name = actions[kept["step"]]["name"]
        what, left, hint = "the agent was restarted", "", ""
        if kept.get("boot_id", self._boot_id) != self._boot_id:
            what, hint = "the camera was restarted", f"a handler that wants a reboot ends with status {REBOOT_STATUS}"
        elif "run" in kept and (ended := await processes.end_marked(kept["run"])):
            left = f", and {ended} of its processes that were left were ended"
        raise StepFailedError(
            "interrupted",
            f"{what} while step {name!r} ran; it is not run a second time{left}",
            {"step": name},
            hint,
        )

    async def _step(
        self, action: Mapping[str, Any], job: Job, course: Course, count: int
    ) -> tuple[dict[str, str], bool]:
        """Run one step: its details, and whether it asks for a reboot. Raises StepFailedError; RefusedError in the first."""
        limit, left = action["timeout_s"] or self._policy.step_timeout_s, course.left_s()
        if job.cancelled.is_set():
            raise _cancelled(action)
        if left is not None and left <= 0:
            raise _too_late(action, {"step": action["name"]})
        mark = secrets.token_hex(16)
        started = {**course.to_json(), "run": mark, "boot_id": self._boot_id}
        await job.save(started, f"step {course.number + 1} of {count}: {action['name']}")
        try:
            user = await asyncio.to_thread(rules.user, self._policy, action["run_as_user"])
            argv = await asyncio.to_thread(rules.command, self._policy, action)
        except RefusedError as error:
            if course.number == 0:
                raise
            details = {"step": action["name"]}
            raise StepFailedError(error.code, error.message, details, error.hint, ignorable=False) from None
        seconds = limit if left is None else min(limit, left)
        result = await _execute(argv, job, action, user, timeout_s=seconds, mark=mark)
        expired = result.timed_out and seconds < limit
        details = _judge(action, result, with_output=job.document["include_std_out"], job_expired=expired)
        return details, details.get("exit_code") == str(REBOOT_STATUS)

    async def _reboot(self, action: Mapping[str, Any], job: Job, course: Course) -> None:
        """Reboot as the step asked; returns only when that has happened. Raises StepFailedError."""
        before = job.progress["boot_id"]
        if before != self._boot_id:
            course.remarks.append(f"the camera was rebooted after step {action['name']}")
            return
        details = course.details
        if "reboot" not in self._policy.allow:
            raise StepFailedError(
                "reboot_denied",
                f"step {action['name']!r} asks for a reboot, which is not allowed on this camera",
                details,
                "allow reboot in agent.toml: jobs.allow",
            )
        asked = False
        try:
            attempt = next_attempt(job.progress)
            kept = {**course.to_json(), "rebooting": True, "details": details, "boot_id": self._boot_id}
            await job.save({**kept, "attempt": attempt}, f"rebooting the camera after step {action['name']}")
            async with alone(job, self._mutation_lock, timeout_s=course.left_s()):
                await self._reboot_camera()
                asked = True
                await wait_until_down()
        except FailedError as error:
            # A camera that was asked may still go down at any moment: nothing may be begun.
            ignorable = not asked and error.code not in ("cancelled", "deadline")
            message = f"step {action['name']!r} asks for a reboot: {error.message}"
            raise StepFailedError(error.code, message, details, error.hint, ignorable=ignorable) from None


async def _execute(
    argv: list[str], job: Job, action: Mapping[str, Any], user: processes.User | None, *, timeout_s: float, mark: str
) -> processes.Result:
    """Run a step's program until it ends, its time is over, or the job is cancelled. Raises StepFailedError."""
    program = asyncio.create_task(
        processes.run(
            argv, timeout_s=timeout_s, user=user, env=_environment(job, action, user), keep_bytes=KEPT_BYTES, mark=mark
        )
    )
    cancelled = asyncio.create_task(job.cancelled.wait())
    try:
        await asyncio.wait({program, cancelled}, return_when=asyncio.FIRST_COMPLETED)
        if not program.done():
            raise _cancelled(action)
        return program.result()
    except processes.NotStartedError as error:
        hint = "a script needs a first line such as #!/bin/sh" if error.errno == errno.ENOEXEC else ""
        if error.errno == errno.EPERM and user:
            hint = rules.UNIT_HINT
        message = f"step {action['name']!r} can't be started: {argv[0]}: {error.strerror}"
        raise StepFailedError("not_started", message, {"step": action["name"]}, hint) from None
    finally:
        cancelled.cancel()
        program.cancel()
        await asyncio.wait({program, cancelled})


def _environment(job: Job, action: Mapping[str, Any], user: processes.User | None) -> dict[str, str]:
    environment = {key: value for key, value in os.environ.items() if key not in OF_OUR_SERVICE}
    environment |= {"CAMERA_AGENT_JOB_ID": job.id, "CAMERA_AGENT_STEP": action["name"]}
    return environment | ({"HOME": user.home, "USER": user.name, "LOGNAME": user.name} if user else {})


def _cancelled(action: Mapping[str, Any]) -> StepFailedError:
    return StepFailedError("cancelled", "the job was cancelled", {"step": action["name"]}, ignorable=False)


def _too_late(action: Mapping[str, Any], details: dict[str, str]) -> StepFailedError:
    message = f"step {action['name']!r}: the job's time limit is over"
    return StepFailedError("deadline", message, details, ignorable=False)


def _actions(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    steps = [*document["steps"], *([document["final_step"]] if document["final_step"] else [])]
    return [step["action"] for step in steps]


def _judge(
    action: Mapping[str, Any], result: processes.Result, *, with_output: bool, job_expired: bool
) -> dict[str, str]:
    """The details of a step that succeeded, or has done so but for a reboot. Raises StepFailedError for one that did not."""
    wants_reboot = action["type"] == "runHandler" and result.exit_code == REBOOT_STATUS and not result.timed_out
    succeeded = result.succeeded or wants_reboot
    details = {"step": action["name"], "duration_ms": str(round(result.duration_s * 1000))}
    if result.signal is not None:
        details["signal"] = str(result.signal)
    elif result.exit_code is not None:
        details["exit_code"] = str(result.exit_code)
    for name, output in (("stdout", result.stdout), ("stderr", result.stderr)):
        if output.text.strip() and (name == "stderr" or with_output or not succeeded):
            details[name] = _last_part(output)
    lines = result.stderr.lines
    allowed = action["allow_std_err"]
    if job_expired:
        raise _too_late(action, details)
    if not succeeded:
        code = "step_timed_out" if result.timed_out else "step_failed"
        raise StepFailedError(code, f"step {action['name']!r}: {result.describe()}", details)
    if allowed is not None and lines > allowed:
        message = f"step {action['name']!r}: {lines} lines on standard error, {allowed} allowed"
        raise StepFailedError("step_failed", message, details)
    return details


def _last_part(output: processes.Output) -> str:
    """At most 1024 characters, the end of the output; says how many bytes before it were left out."""
    text = output.text
    if output.left_out and (cut := re.search(r"\s", text[:4096])):
        text = text[cut.start() :]  # the rest of a word may be half of a secret, which nobody would recognise
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", redact(text))
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text).strip()
    if not output.left_out and len(text) <= SHOWN_CHARACTERS:
        return text
    shown = text[-(SHOWN_CHARACTERS - len("[18446744073709551615 bytes left out] ")) :]
    left_out = output.left_out + len(output.text.encode()) - len(shown.encode())
    return f"[{left_out} bytes left out] {shown}"
