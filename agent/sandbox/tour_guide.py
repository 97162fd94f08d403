"""What every step of the tour works with: waiting with a time-out, plain boto3, the real agentctl, and what was reported."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from agent.sandbox import seed
from agent.sandbox.camera import Camera
from agent.sandbox.fleet import Sandbox
from agent.sandbox.playing import agentctl

T = TypeVar("T")
Json = dict[str, Any]

LIMIT_S = 90.0
POLL_S = 0.4
COMMAND_LIMIT_S = 60.0
WIDTH = 96
INDENT = " " * 8
TERMINAL = {"SUCCEEDED", "FAILED", "REJECTED", "TIMED_OUT", "REMOVED", "CANCELED"}


class UnexpectedError(Exception):
    """A step saw something else than it should."""


class NotYet(Exception):  # noqa: N818  not an error: the question is asked again
    """What is awaited is not there yet; says how far it is."""


@dataclass(frozen=True)
class Answer:
    """What an agentctl command printed, and its exit status."""

    status: int
    text: str

    def json(self) -> Json:
        document: Json = json.loads(self.text)
        return document


def say(*lines: str) -> None:
    """Print lines below the step's title."""
    for line in lines:
        print(f"{INDENT}{line}".rstrip(), flush=True)


def show(document: Any) -> None:
    """Print JSON below the step's title; what fits on a line is on one."""
    say(*_json_lines(document))


def _json_lines(value: Any, start: str = "", end: str = "") -> list[str]:
    line = f"{start}{json.dumps(value, ensure_ascii=False)}{end}"
    if len(line) <= WIDTH or not isinstance(value, dict):
        return [line]
    lines = [f"{start}{{"]
    for number, (key, below) in enumerate(value.items(), 1):
        comma = "," if number < len(value) else ""
        inner = _json_lines(below, f"{json.dumps(key, ensure_ascii=False)}: ", comma)
        lines += [f"  {inner_line}" for inner_line in inner]
    return [*lines, f"}}{end}"]


def check(good: bool, otherwise: str) -> None:
    """Raises UnexpectedError."""
    if not good:
        raise UnexpectedError(otherwise)


def part(document: Mapping[str, Any], *keys: str) -> Json:
    """Those of the keys that are there."""
    return {key: document[key] for key in keys if key in document}


async def until(words: str, ask: Callable[[], Awaitable[T]], *, limit_s: float = LIMIT_S) -> T:
    """Ask again and again until it no longer raises NotYet; says on one line what is awaited, how far it is and how long.

    Raises UnexpectedError after `limit_s` seconds.
    """
    line = _Line(words)
    try:
        async with asyncio.timeout(limit_s):
            while True:
                try:
                    return await ask()
                except NotYet as not_yet:
                    line.show(str(not_yet))
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise UnexpectedError(f"not within {limit_s:.0f} s: {words} ({line.detail or 'no answer'})") from None
    finally:
        line.end()


class _Line:
    """One line about a wait; redrawn on a terminal, and never more than one line elsewhere."""

    def __init__(self, words: str) -> None:
        self._words = words
        self._began = time.monotonic()
        self._redrawn = sys.stdout.isatty()
        self.detail = ""
        if not self._redrawn:
            print(f"{INDENT}… {words}", end="", flush=True)

    def show(self, detail: str) -> None:
        self.detail = detail
        if self._redrawn:
            text = f"{INDENT}… {self._words}: {self._seconds()}{', ' if detail else ''}{detail}"
            print(f"\r\033[K{text[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)

    def end(self) -> None:
        start = f"\r\033[K{INDENT}… {self._words}" if self._redrawn else ""
        print(f"{start}: {self._seconds()}", flush=True)

    def _seconds(self) -> str:
        return f"{time.monotonic() - self._began:.1f} s"


@dataclass
class Guide:
    """One camera of a running sandbox. `messages` is all that came through the rule's queue so far, as it came."""

    sandbox: Sandbox
    camera: Camera
    messages: list[Json] = field(default_factory=list)
    exit_codes: dict[str, int] = field(default_factory=dict)

    @property
    def thing(self) -> str:
        return self.camera.thing

    async def aws(self, service: str, operation: str, **parameters: Any) -> Json:
        """One call of plain boto3."""
        call = getattr(self.sandbox.aws.client(service), operation)
        answer: Json = await asyncio.to_thread(call, **parameters)
        return answer

    async def agentctl(self, *words: str, expect: int | None = 0) -> Answer:
        """Run the real command to its end. Raises UnexpectedError for another exit status than `expect`; None: any."""
        command = agentctl()
        process = await asyncio.create_subprocess_exec(
            *command,
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "CAMERA_AGENT_CONFIG": str(self.camera.config_file)},
        )
        try:
            async with asyncio.timeout(COMMAND_LIMIT_S):
                printed, _ = await process.communicate()
        except TimeoutError:
            raise UnexpectedError(f"agentctl {' '.join(words)} did not end within {COMMAND_LIMIT_S:.0f} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        answer = Answer(process.returncode or 0, printed.decode("utf-8", "replace"))
        if expect is not None:
            what = f"agentctl {' '.join(words)}: exit status {answer.status}, {expect} was expected"
            check(answer.status == expect, f"{what}: {answer.text.strip()[:300]}")
        return answer

    async def show_agentctl(self, *words: str, expect: int = 0, why: str = "") -> Answer:
        """The same, printed, and remembered among the exit codes as `why`."""
        answer = await self.agentctl(*words, expect=expect)
        say("", f"$ agentctl {' '.join(words)}", *answer.text.splitlines())
        say(f"(exit status {answer.status}{f': {why}' if why else ''})", "")
        if why:
            self.exit_codes[why] = answer.status
        return answer

    async def status(self) -> Json:
        """`agentctl status --json`. Raises NotYet while the agent does not answer."""
        answer = await self.agentctl("status", "--json", expect=None)
        if answer.status:
            raise NotYet(f"agentctl status: exit status {answer.status}")
        return answer.json()

    async def live(self) -> Json:
        """How the images of the source `front` are doing, by `agentctl capture --json`."""
        live: Json = (await self.agentctl("capture", "--json")).json()["sources"]["front"]
        return live

    async def reports(self, kind: str = "report") -> list[Json]:
        """All reports (or events) until now, in the order of their arrival."""
        self.messages += await asyncio.to_thread(seed.take_messages, self.sandbox.aws, self.sandbox.fleet)
        return [m["body"] for m in self.messages if m["thing"] == self.thing and m["kind"] == kind]

    async def set_desired(self, desired: Mapping[str, Any]) -> int:
        """Merge into `desired` of the shadow `config`; returns the shadow's version."""
        return await asyncio.to_thread(seed.set_desired, self.sandbox.aws, self.thing, desired)

    async def reported(self, version: int, *states: str, limit_s: float = LIMIT_S) -> tuple[Json, list[str]]:
        """Wait until `reported` is about `version` in the first of `states`; returns it and the states seen on the way.

        Another state than the given ones is unexpected, except those that an earlier version left.
        """
        passed: list[str] = []

        async def ask() -> Json:
            shadow = await asyncio.to_thread(seed.shadow_state, self.sandbox.aws, self.thing)
            reported: Json = shadow.get("reported", {})
            status = reported.get("status", {})
            if status.get("desired_version") != version:
                raise NotYet("the camera has not answered")
            passed.extend({status["state"]}.difference(passed))
            if status["state"] == states[0]:
                return reported
            check(status["state"] in states, f"reported state {status['state']}: {status.get('errors')}")
            raise NotYet(status["state"])

        words = f"reported in the shadow: version {version} {states[0]}"
        return await until(words, ask, limit_s=limit_s), passed

    async def create_job(self, job_id: str, document: Mapping[str, Any]) -> None:
        """Create a job for the thing group."""
        fleet = self.sandbox.fleet
        await self.aws(
            "iot",
            "create_job",
            jobId=job_id,
            targets=[fleet.group_arn],
            document=json.dumps(document),
            targetSelection="SNAPSHOT",
            presignedUrlConfig={"roleArn": fleet.presign_role_arn, "expiresInSec": 3600},
        )
        say(f"create_job(jobId={job_id!r}, targets=[thing group {fleet.group}])")

    async def job_end(self, job_id: str, wanted: str, *, limit_s: float = 2 * LIMIT_S, images: bool = False) -> Json:
        """Wait for the job's end on this camera; returns its status details. Raises UnexpectedError for another end."""

        async def ask() -> Json:
            execution = await self.aws("iot", "describe_job_execution", jobId=job_id, thingName=self.thing)
            execution = execution["execution"]
            details = execution.get("statusDetails", {}).get("detailsMap", {})
            if execution["status"] not in TERMINAL:
                sharp = f", sharpness {(await self.live()).get('sharpness')}" if images else ""
                raise NotYet(f"{execution['status']} {details.get('message', '')}{sharp}")
            return {"status": execution["status"], "statusDetails": details}

        end = await until(f"job {job_id}: {wanted}", ask, limit_s=limit_s)
        show(end)
        check(end["status"] == wanted, f"job {job_id} is {end['status']}: {end['statusDetails'].get('message')}")
        return dict(end["statusDetails"])

    async def slot(self) -> str:
        """The digest of the slot that the link `current` names."""
        return (await asyncio.to_thread((self.camera.pipeline_root / "current").readlink)).name

    async def read(self, path: Path) -> bytes:
        return await asyncio.to_thread(path.read_bytes)
