"""AWS IoT Jobs on the wire: describe, update, and the notification that the next job changed."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.cloud import topics
from agent.cloud.seldom import Seldom
from agent.cloud.session import Session
from agent.errors import CloudError
from agent.logs import get_logger, redact

MAX_DETAILS = 10
MAX_DETAIL_KEY = 128
MAX_DETAIL_VALUE = 1024
MILLISECONDS_FROM = 100_000_000_000
LARGEST_NUMBER = 2**53

log = get_logger("cloud.jobs")
seldom = Seldom(log)


@dataclass(frozen=True)
class Execution:
    """One attempt of a job on this thing; (job_id, execution_number) identifies it."""

    job_id: str
    execution_number: int
    version_number: int
    """Raised by every accepted update; the next one's expected version."""
    status: str
    document: dict[str, Any] | None = None
    """None when the service sent none or it is no JSON object."""
    details: dict[str, str] = field(default_factory=dict)
    queued_at: float | None = None
    """Seconds since the epoch."""


class JobsClient:
    """The jobs of one thing. Requests raise Rejected (with `details["executionState"]`) and CloudError."""

    def __init__(self, session: Session, thing: str) -> None:
        self._session = session
        self._thing = thing
        session.subscribe_replies(*topics.job_replies(thing))

    def on_notify_next(self, callback: Callable[[Execution | None], None]) -> None:
        """Call `callback` on the event loop with the next pending execution, None when there is none.

        A notification may be lost, late, repeated, about the job at work, or not readable (then None): treat it as a hint
        to describe.
        """

        def handle(_: str, payload: bytes) -> None:
            try:
                execution = parse_execution(json.loads(payload).get("execution"))
            except (ValueError, AttributeError, RecursionError):
                seldom.warning("can't read a job notification, asking", bytes=len(payload))
                execution = None
            callback(execution)

        self._session.subscribe(topics.jobs_notify_next(self._thing), handle)

    async def describe_next(self) -> Execution | None:
        """The execution to work on, in progress before queued; None when nothing is pending."""
        return await self._describe(topics.NEXT_JOB, None)

    async def describe(self, job_id: str, execution_number: int | None = None) -> Execution:
        """One execution, by default the latest, with its document freshly made (new presigned URLs)."""
        execution = await self._describe(job_id, execution_number)
        if execution is None or execution.job_id != job_id:
            raise _malformed(f"the description of job {job_id}")
        return execution

    async def update(
        self,
        job_id: str,
        *,
        execution_number: int | None = None,
        status: str,
        details: Mapping[str, str] | None = None,
        expected_version: int | None = None,
        step_timeout_minutes: int | None = None,
    ) -> int:
        """Set `status` and replace the details by sanitise(details); the execution's new version number.

        `step_timeout_minutes` 1–10080 restarts the step timer, -1 removes it, None leaves it.
        """
        body: dict[str, Any] = {"status": status, "includeJobExecutionState": True}
        if details is not None:
            body["statusDetails"] = sanitise(details)
        if expected_version is not None:
            body["expectedVersion"] = expected_version
        if execution_number is not None:
            body["executionNumber"] = execution_number
        if step_timeout_minutes is not None:
            body["stepTimeoutInMinutes"] = step_timeout_minutes
        reply = await self._session.request(topics.job_update(self._thing, job_id), body)
        state = reply.get("executionState")
        version = state.get("versionNumber") if isinstance(state, dict) else None
        if isinstance(version, int):
            return version
        return expected_version + 1 if expected_version is not None else 0

    async def _describe(self, job_id: str, execution_number: int | None) -> Execution | None:
        body: dict[str, Any] = {"includeJobDocument": True}
        if execution_number is not None:
            body["executionNumber"] = execution_number
        reply = await self._session.request(topics.job_get(self._thing, job_id), body)
        try:
            return parse_execution(reply.get("execution"))
        except ValueError as error:
            raise _malformed(f"the description of job {job_id}: {error}") from error


def parse_execution(value: Any) -> Execution | None:
    """An execution as AWS IoT sends it; None for an absent or empty one. Raises ValueError when it is malformed."""
    if value is None or value == {}:
        return None
    if not isinstance(value, dict):
        raise ValueError("the execution is no object")  # noqa: TRY004  one error type for malformed input
    job_id, status = value.get("jobId"), value.get("status")
    if not isinstance(job_id, str) or not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", job_id) or not isinstance(status, str):
        raise ValueError("the execution has no valid jobId or status")
    document = value.get("jobDocument")
    if isinstance(document, str):
        try:
            document = json.loads(document)
        except (ValueError, RecursionError):
            document = None
    details = value.get("statusDetails")
    return Execution(
        job_id=job_id,
        execution_number=_integer(value, "executionNumber"),
        version_number=_integer(value, "versionNumber"),
        status=status,
        document=document if isinstance(document, dict) else None,
        details={str(key): str(detail) for key, detail in details.items()} if isinstance(details, dict) else {},
        queued_at=seconds(value.get("queuedAt")),
    )


def sanitise(details: Mapping[str, Any]) -> dict[str, str]:
    """Status details that AWS IoT accepts: the first ten keys in its alphabet, values of 1–1024 printable characters.

    Line breaks and tabs become spaces, other control and unassigned characters vanish, an empty value becomes `-`, of a
    longer one the end stays of what a program printed, the beginning of anything else. Secrets are redacted.
    """
    accepted: dict[str, str] = {}
    for key, value in details.items():
        name = re.sub(r"[^a-zA-Z0-9:_-]", "_", str(key))[:MAX_DETAIL_KEY]
        if not name:
            continue
        text = "".join(_printable(character) for character in redact(str(value))).strip()
        part = text[-MAX_DETAIL_VALUE:] if name in ("stdout", "stderr") else text[:MAX_DETAIL_VALUE]
        accepted[name] = part.strip() or "-"
        if len(accepted) == MAX_DETAILS:
            break
    return accepted


def seconds(value: Any) -> float | None:
    """A time as seconds since the epoch, given in seconds or in milliseconds; None when it is neither."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > LARGEST_NUMBER:
        return None
    return value / 1000 if value >= MILLISECONDS_FROM else float(value)


def _integer(value: Mapping[str, Any], key: str) -> int:
    number = value.get(key, 1)
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= LARGEST_NUMBER:
        raise ValueError(f"{key} is no number that can count")
    return number


def _printable(character: str) -> str:
    if character in "\n\r\t\v\f\u2028\u2029":
        return " "
    return "" if unicodedata.category(character).startswith("C") else character


def _malformed(what: str) -> CloudError:
    return CloudError("malformed_reply", f"AWS IoT sent something unexpected for {what}", retryable=True)
