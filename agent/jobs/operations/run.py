"""Operation `run`: the steps of AWS's managed job templates, each a handler from the camera's own folder or a command."""

from __future__ import annotations

import asyncio
import os
import re
import stat
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from agent.errors import FailedError, RefusedError
from agent.host import processes
from agent.logs import redact
from agent.settings import Jobs


class Job(Protocol):
    """What this operation needs of an execution."""

    @property
    def document(self) -> Mapping[str, Any]: ...
    @property
    def progress(self) -> dict[str, Any]: ...
    @property
    def cancelled(self) -> asyncio.Event: ...
    async def save(self, progress: dict[str, Any], message: str) -> None: ...


class StepFailedError(FailedError):
    """A step failed; `details` tell which, how it ended and what it printed last."""

    def __init__(self, code: str, message: str, details: dict[str, str]) -> None:
        super().__init__(code, message)
        self.details = details


class Run:
    """Runs steps in order under the local policy. A step that was started is never started a second time."""

    name = "run"

    def __init__(self, policy: Jobs) -> None:
        self._policy = policy

    def check(self, document: Mapping[str, Any]) -> None:
        if document["conditions"]:
            raise RefusedError(
                "condition_unknown", "conditions: this camera can't evaluate any", "remove them, or target a group"
            )
        for action in _actions(document):
            self._check_user(action["run_as_user"])
            if action["type"] == "runCommand":
                if self._policy.commands != "allow":
                    raise RefusedError(
                        "commands_denied",
                        f"step {action['name']!r}: runCommand is not allowed on this camera",
                        'use a handler, or set jobs.commands = "allow" in agent.toml',
                    )
            else:
                self._handler(action)

    async def run(self, job: Job) -> dict[str, str]:
        actions = _actions(job.document)
        if "step" in job.progress:
            step = job.progress["step"]
            raise StepFailedError(
                "interrupted",
                f"the agent was restarted while step {actions[step]['name']!r} ran; it is not run a second time",
                {"step": actions[step]["name"]},
            )
        deadline = time.monotonic() + (job.document["timeout_s"] or float("inf"))
        ignored: list[str] = []
        details: dict[str, str] = {}
        for number, action in enumerate(actions):
            await job.save({"step": number}, f"step {number + 1} of {len(actions)}: {action['name']}")
            try:
                details = await self._step(action, job, deadline, with_output=job.document["include_std_out"])
            except StepFailedError as error:
                if not action["ignore_step_failure"] or error.code in ("cancelled", "deadline"):
                    raise
                ignored.append(f"{action['name']} ({error.message})")
        message = f"{len(actions)} of {len(actions)} steps done"
        if ignored:
            message += "; failures ignored as asked: " + ", ".join(ignored)
        return {**details, "message": message}

    async def _step(self, action: Mapping[str, Any], job: Job, deadline: float, *, with_output: bool) -> dict[str, str]:
        limit = action["timeout_s"] or self._policy.step_timeout_s
        left = deadline - time.monotonic()
        if job.cancelled.is_set():
            raise StepFailedError("cancelled", "the job was cancelled", {"step": action["name"]})
        if left <= 0:
            raise StepFailedError("deadline", "the job's time limit is over", {"step": action["name"]})
        if action["type"] == "runHandler":
            handler = await asyncio.to_thread(self._handler, action)
            argv = [str(handler), action["run_as_user"], *action["input"]["args"]]
        else:
            argv = split_command(action["input"]["command"])
        program = asyncio.create_task(
            processes.run(argv, timeout_s=min(limit, left), user=action["run_as_user"] or None, keep_bytes=4096)
        )
        cancelled = asyncio.create_task(job.cancelled.wait())
        try:
            await asyncio.wait({program, cancelled}, return_when=asyncio.FIRST_COMPLETED)
            if not program.done():
                raise StepFailedError("cancelled", "the job was cancelled", {"step": action["name"]})
            result = program.result()
        except OSError as error:
            raise StepFailedError("not_started", f"{argv[0]}: {error.strerror}", {"step": action["name"]}) from None
        finally:
            cancelled.cancel()
            program.cancel()
            await asyncio.wait({program})
        return _judge(action, result, with_output=with_output, job_expired=result.timed_out and left < limit)

    def _check_user(self, user: str) -> None:
        if not user:
            return
        import pwd

        try:
            wanted = pwd.getpwnam(user)
        except (KeyError, ValueError):
            raise RefusedError("unknown_user", f"runAsUser: there is no user {user!r} on this camera") from None
        if wanted.pw_uid != os.geteuid() and user not in self._policy.run_as:
            raise RefusedError(
                "user_denied", f"runAsUser: {user} is not allowed on this camera", "add it to jobs.run_as in agent.toml"
            )

    def _handler(self, action: Mapping[str, Any]) -> Path:
        """The handler's file, when it may be run. Raises RefusedError."""
        name, folder = action["input"]["handler"], self._policy.handler_dir
        where = f"step {action['name']!r}"
        if action["input"]["path"] not in ("", "default", str(folder)):
            raise RefusedError(
                "handler_denied", f"{where}: handlers are taken from {folder} only", 'use path "default" or none'
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise RefusedError("handler_denied", f"{where}: {name!r} is not the name of a handler")
        path: Path = folder / name
        for part in (folder, path):
            try:
                status = part.stat()
            except OSError as error:
                raise RefusedError(
                    "handler_missing", f"{where}: {part}: {error.strerror}", "install it first"
                ) from None
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) or status.st_uid not in (0, os.geteuid()):
                raise RefusedError("handler_unsafe", f"{where}: {part} can be changed by others", f"chmod go-w {part}")
        if not os.access(path, os.X_OK):
            raise RefusedError("handler_missing", f"{where}: {path} is not executable", f"chmod +x {path}")
        return path


def split_command(command: str) -> list[str]:
    r"""The words of a `runCommand`: separated by commas, `\,` is a comma, blanks around a word are dropped."""
    return [word.replace("\\,", ",").strip() for word in re.split(r"(?<!\\),", command)]


def _actions(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    steps = [*document["steps"], *([document["final_step"]] if document["final_step"] else [])]
    return [step["action"] for step in steps]


def _judge(
    action: Mapping[str, Any], result: processes.Result, *, with_output: bool, job_expired: bool
) -> dict[str, str]:
    """The details of a step that succeeded. Raises StepFailedError for one that did not."""
    details = {"step": action["name"], "duration_ms": str(round(result.duration_s * 1000))}
    if result.signal is not None:
        details["signal"] = str(result.signal)
    elif result.exit_code is not None:
        details["exit_code"] = str(result.exit_code)
    for name, output in (("stdout", result.stdout), ("stderr", result.stderr)):
        if output.text.strip() and (name == "stderr" or with_output or not result.succeeded):
            details[name] = _last_part(output)
    lines = result.stderr.lines
    allowed = action["allow_std_err"]
    if job_expired:
        raise StepFailedError("deadline", f"step {action['name']!r}: the job's time limit is over", details)
    if not result.succeeded:
        code = "step_timed_out" if result.timed_out else "step_failed"
        raise StepFailedError(code, f"step {action['name']!r}: {result.describe()}", details)
    if allowed is not None and lines > allowed:
        message = f"step {action['name']!r}: {lines} lines on standard error, {allowed} allowed"
        raise StepFailedError("step_failed", message, details)
    return details


def _last_part(output: processes.Output) -> str:
    """At most 1024 characters, the end of the output; says how many bytes before it were left out."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", redact(output.text)).strip()
    left_out = output.left_out + max(len(text) - 980, 0)
    return f"[{left_out} bytes left out] {text[-980:]}" if left_out else text
