"""AWS IoT as one thing sees it, over real TLS: the Jobs service at the level of messages, shadows, and telemetry as it arrives.

Everything that a device or an operator did is kept, so that a test can tell afterwards what was true.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import json
import re
import shutil
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.certificates import Authority
from tests.fakes_shadow import WiredShadow
from tests.integration.mqtt_peer import MqttPeer, Packet

TOPIC_PREFIX = "$aws/rules/camera_fleet/cameras"
TERMINAL = frozenset({"SUCCEEDED", "FAILED", "REJECTED", "TIMED_OUT", "CANCELED", "REMOVED"})
DEVICE_STATUSES = ("IN_PROGRESS", "SUCCEEDED", "FAILED", "REJECTED")
HELD_BACK_S = 0.05

Answer = tuple[str, dict[str, Any]]
"""`accepted` or `rejected`, and the body."""


@functools.cache
def authority() -> Authority:
    """The authority that this test process's clouds and agents trust; its files vanish with the process."""
    folder = Path(tempfile.mkdtemp(prefix="camera-agent-authority-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Authority(folder)


@dataclass(frozen=True)
class Ending:
    """How an execution got its terminal status: `by` the device or the operator, at wall-clock time `at`."""

    job_id: str
    execution_number: int
    status: str
    details: dict[str, str]
    by: str
    at: float


@dataclass
class Execution:
    """One job execution as the service keeps it."""

    job_id: str
    number: int
    document: Any
    queued_at: int
    order: int
    """Position in the order of creation, which whole seconds don't tell."""
    status: str = "QUEUED"
    version: int = 1
    details: dict[str, str] = field(default_factory=dict)
    started_at: int | None = None
    updated_at: int = 0
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def state(self) -> dict[str, Any]:
        return {"status": self.status, "statusDetails": dict(self.details), "versionNumber": self.version}

    def summary(self) -> dict[str, Any]:
        started = {} if self.started_at is None else {"startedAt": self.started_at}
        return {
            "jobId": self.job_id,
            "queuedAt": self.queued_at,
            **started,
            "lastUpdatedAt": self.updated_at,
            "versionNumber": self.version,
            "executionNumber": self.number,
        }

    def whole(self, *, document: bool) -> dict[str, Any]:
        more: dict[str, Any] = {"status": self.status}
        if self.details:
            more["statusDetails"] = dict(self.details)
        if document:
            more["jobDocument"] = self.document
        return {**self.summary(), **more}


class RefusedError(Exception):
    """What the service answers on `rejected`."""

    def __init__(self, code: str, message: str, execution: Execution | None = None) -> None:
        super().__init__(message)
        self.body: dict[str, Any] = {"code": code, "message": message}
        if execution is not None:
            self.body["executionState"] = execution.state


class Jobs:
    """AWS IoT Jobs for one thing: executions, versions, transitions, notifications; and its faults.

    `throttle`, `lose_request`, `lose_answer`, `lose_notification` count down: so many of the next are refused with
    RequestThrottled, do not arrive, are carried out without an answer, are not sent. With `duplicate_notifications` each
    notification is sent twice; with `reorder` messages to the device change places in pairs.
    """

    def __init__(self, thing: str, peer: MqttPeer) -> None:
        self._prefix = f"$aws/things/{thing}/jobs"
        self._peer = peer
        self.executions: dict[tuple[str, int], Execution] = {}
        self.removed: dict[tuple[str, int], Execution] = {}
        """Executions of deleted jobs."""
        self.endings: list[Ending] = []
        """Every terminal status that was accepted, in order."""
        self.attempts: list[tuple[Ending, str]] = []
        """Every terminal update that arrived from the device with how it was answered: `accepted`, or a code."""
        self.updates: list[dict[str, Any]] = []
        """Every accepted update of the device as it was asked for, with jobId, executionNumber, what it led to, and `at`."""
        self.throttle = 0
        self.lose_request = 0
        self.lose_answer = 0
        self.lose_notification = 0
        self.duplicate_notifications = False
        self.reorder = False
        self._created = 0
        self._head: tuple[str, int] | None = None
        self._held: Callable[[], None] | None = None
        for operation in ("get", "update"):
            peer.serve(f"{self._prefix}/+/{operation}", self._serve)

    # ---- what an operator does ------------------------------------------------------------------------------------

    def create(self, job_id: str, document: Any) -> None:
        """Queue a job for the thing."""
        assert all(key[0] != job_id for key in self.executions), f"job {job_id} exists"
        self._queue(job_id, 1, document)

    def retry(self, job_id: str) -> int:
        """Queue a failed or timed out job again, as retry criteria do; its new execution number."""
        last = self.execution(job_id)
        assert last.status in ("FAILED", "TIMED_OUT"), last.status
        self._queue(job_id, last.number + 1, last.document)
        return last.number + 1

    def cancel(self, job_id: str, force: bool = True) -> bool:
        """Cancel the job's execution; without `force` only a queued one. Whether it was cancelled."""
        return self._end_by_operator(job_id, "CANCELED", ("QUEUED", "IN_PROGRESS") if force else ("QUEUED",))

    def time_out(self, job_id: str) -> bool:
        """End an execution in progress as its timer does; whether it was in progress."""
        return self._end_by_operator(job_id, "TIMED_OUT", ("IN_PROGRESS",))

    def delete(self, job_id: str) -> None:
        """Delete the job by force: the service knows nothing of it any more."""
        self._end_by_operator(job_id, "REMOVED", ("QUEUED", "IN_PROGRESS"), notify=False)
        for key in [key for key in self.executions if key[0] == job_id]:
            self.removed[key] = self.executions.pop(key)
        self._list_changed()

    def touch(self, job_id: str) -> None:
        """An operator's change that raises the version of the execution and nothing else."""
        execution = self.execution(job_id)
        assert execution.status not in TERMINAL, execution.status
        execution.version += 1
        execution.updated_at = int(time.time())

    # ---- what a test asks -----------------------------------------------------------------------------------------

    def execution(self, job_id: str, number: int | None = None) -> Execution:
        """The job's execution with this number, by default the latest; also of a deleted job."""
        known = {**self.removed, **self.executions}
        found = [e for key, e in known.items() if key[0] == job_id and number in (None, key[1])]
        return max(found, key=lambda execution: execution.number)

    def status(self, job_id: str) -> str:
        """The status of the latest execution; REMOVED after a delete."""
        return self.execution(job_id).status

    def details(self, job_id: str) -> dict[str, str]:
        """The status details of the latest execution."""
        return self.execution(job_id).details

    def terminal_updates(self, job_id: str, number: int | None = None) -> list[Ending]:
        """Every terminal status that was accepted for the job, of all its executions or of one."""
        return [e for e in self.endings if e.job_id == job_id and number in (None, e.execution_number)]

    def pending(self) -> list[Execution]:
        """What has not ended, in the order in which the service offers it."""
        waiting = [e for e in self.executions.values() if e.status not in TERMINAL]
        return sorted(waiting, key=lambda e: (e.status != "IN_PROGRESS", e.order))

    async def ended(self, job_id: str, timeout_s: float = 60) -> Execution:
        """Wait for the end of the job's latest execution; the execution."""
        execution = self.execution(job_id)
        try:
            async with asyncio.timeout(timeout_s):
                await execution.over.wait()
        except TimeoutError:
            raise AssertionError(f"job {job_id} is {execution.status} after {timeout_s:g} s") from None
        return execution

    # ---- the wire -------------------------------------------------------------------------------------------------

    def _serve(self, packet: Packet) -> Iterable[tuple[str, Any]]:
        if self.lose_request > 0:
            self.lose_request -= 1
            return ()
        outcome, body = self._answer(packet)
        if self.lose_answer > 0 and outcome == "accepted":
            self.lose_answer -= 1
            return ()
        if not self._peer.drop_replies:
            self._emit(functools.partial(self._reply, packet.connection, f"{packet.topic}/{outcome}", body))
        return ()

    def _answer(self, packet: Packet) -> Answer:
        stamp: dict[str, Any] = {"timestamp": int(time.time())}
        try:
            request = json.loads(packet.payload or b"{}")
            if not isinstance(request, dict):
                raise ValueError(request)  # noqa: TRY004
        except ValueError:
            return "rejected", {"code": "InvalidJson", "message": "not a JSON object", **stamp}
        if "clientToken" in request:
            stamp["clientToken"] = request["clientToken"]
        job_id, operation = packet.topic.removeprefix(self._prefix + "/").split("/")
        try:
            if self.throttle > 0:
                self.throttle -= 1
                raise RefusedError("RequestThrottled", "too many requests")
            body = self._describe(job_id, request) if operation == "get" else self._update(job_id, request)
        except RefusedError as refused:
            return "rejected", {**refused.body, **stamp}
        return "accepted", {**body, **stamp}

    def _describe(self, job_id: str, request: dict[str, Any]) -> dict[str, Any]:
        document = request.get("includeJobDocument", True)
        if job_id == "$next":
            pending = self.pending()
            return {"execution": pending[0].whole(document=document)} if pending else {}
        execution = self._find(job_id, request)
        if execution.status in TERMINAL:
            raise RefusedError("TerminalStateReached", "the execution has ended")
        return {"execution": execution.whole(document=document)}

    def _update(self, job_id: str, request: dict[str, Any]) -> dict[str, Any]:
        execution = self._find(job_id, request)
        status, details = request.get("status"), request.get("statusDetails")
        try:
            _check_update(status, details, request.get("stepTimeoutInMinutes"))
            if execution.status in TERMINAL or (execution.status == "QUEUED" and status in ("SUCCEEDED", "FAILED")):
                raise RefusedError("InvalidStateTransition", f"{execution.status} → {status}", execution)
            if request.get("expectedVersion", execution.version) != execution.version:
                raise RefusedError("VersionMismatch", f"the version is {execution.version}", execution)
        except RefusedError as refused:
            if status in TERMINAL:
                self.attempts.append((self._ending(execution, "device", status, details), refused.body["code"]))
            raise
        execution.status = status
        execution.version += 1
        execution.details = execution.details if details is None else details
        execution.updated_at = int(time.time())
        execution.started_at = execution.started_at or execution.updated_at
        about = {"jobId": job_id, "executionNumber": execution.number, "at": time.time()}
        self.updates.append({**request, **about, **execution.state})
        if status in TERMINAL:
            self.attempts.append((self._ending(execution, "device"), "accepted"))
            self._end(execution, "device")
            self._list_changed()
        elif self._head_key() != self._head:
            self._head_changed()
        answer: dict[str, Any] = {}
        if request.get("includeJobExecutionState"):
            answer["executionState"] = execution.state
        if request.get("includeJobDocument"):
            answer["jobDocument"] = execution.document
        return answer

    def _find(self, job_id: str, request: dict[str, Any]) -> Execution:
        number = request.get("executionNumber")
        found = [e for key, e in self.executions.items() if key[0] == job_id and number in (None, key[1])]
        if not found:
            raise RefusedError("ResourceNotFound", f"no execution {number or ''} of job {job_id}")
        return max(found, key=lambda execution: execution.number)

    def _queue(self, job_id: str, number: int, document: Any) -> None:
        self._created += 1
        now = int(time.time())
        self.executions[(job_id, number)] = Execution(job_id, number, document, now, self._created, updated_at=now)
        self._list_changed()

    def _end_by_operator(self, job_id: str, status: str, before: tuple[str, ...], *, notify: bool = True) -> bool:
        execution = self.execution(job_id)
        if execution.status not in before:
            return False
        execution.status = status
        execution.version += 1
        self._end(execution, "operator")
        if notify:
            self._list_changed()
        return True

    def _end(self, execution: Execution, by: str) -> None:
        execution.updated_at = int(time.time())
        self.endings.append(self._ending(execution, by))
        execution.over.set()

    def _ending(self, execution: Execution, by: str, status: str = "", details: Any = None) -> Ending:
        return Ending(
            execution.job_id,
            execution.number,
            status or execution.status,
            dict(execution.details if details is None else details),
            by,
            time.time(),
        )

    # ---- notifications --------------------------------------------------------------------------------------------

    def _head_key(self) -> tuple[str, int] | None:
        pending = self.pending()
        return (pending[0].job_id, pending[0].number) if pending else None

    def _list_changed(self) -> None:
        jobs: dict[str, list[dict[str, Any]]] = {}
        for execution in self.pending()[:15]:
            jobs.setdefault(execution.status, []).append(execution.summary())
        self._notify("notify", {"timestamp": int(time.time()), "jobs": jobs})
        if self._head_key() != self._head:
            self._head_changed()

    def _head_changed(self) -> None:
        self._head = self._head_key()
        message: dict[str, Any] = {"timestamp": int(time.time())}
        if self._head:
            message["execution"] = self.executions[self._head].whole(document=True)
        self._notify("notify-next", message)

    def _notify(self, name: str, message: dict[str, Any]) -> None:
        if self.lose_notification > 0:
            self.lose_notification -= 1
            return
        for _ in range(2 if self.duplicate_notifications else 1):
            self._emit(lambda: self._peer.send(f"{self._prefix}/{name}", message))

    def _reply(self, connection: int, topic: str, body: dict[str, Any]) -> None:
        if client := self._peer._live.get(connection):
            client.publish(topic, json.dumps(body).encode(), 1)

    def _emit(self, send: Callable[[], object]) -> None:
        """Send now; with `reorder` after the next message, or after a moment when there is none."""
        if self._held is not None:
            send()
            self._release()
        elif self.reorder:
            self._held = lambda: (send(), None)[1]
            asyncio.get_running_loop().call_later(HELD_BACK_S, self._release)
        else:
            send()

    def _release(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held()


class ConfigShadow(WiredShadow):
    """The shadow `config`, with all the rules of AWS IoT; `want` and `delete` are an operator."""

    @property
    def status(self) -> dict[str, Any]:
        """What is reported of how it stands, {} when nothing is."""
        return dict(self.cloud.reported.get("status", {}))

    async def until(self, met: Callable[[], Any], timeout_s: float = 60) -> Any:
        """Wait until `met()` is true, looking again after each accepted change; its value."""
        async with asyncio.timeout(timeout_s):
            while not (value := met()):
                self.cloud.changed.clear()
                await self.cloud.changed.wait()
        return value


class Shadows:
    """Named shadows but `config`: none at first, then what was written to them. `documents` maps names to `state` and `version`."""

    def __init__(self, thing: str, peer: MqttPeer) -> None:
        self._prefix = f"$aws/things/{thing}/shadow/name/"
        self._peer = peer
        self.documents: dict[str, dict[str, Any]] = {}
        for operation in ("get", "update"):
            peer.serve(f"{self._prefix}+/{operation}", self._serve)

    def desire(self, name: str, desired: dict[str, Any]) -> None:
        """What an operator wants; the device hears of it."""
        document = self._merge(name, {"desired": desired})
        reported = document["state"].get("reported", {})
        delta = {k: v for k, v in document["state"]["desired"].items() if reported.get(k) != v}
        if delta:
            message = {"version": document["version"], "timestamp": int(time.time()), "state": delta}
            self._peer.send(f"{self._prefix}{name}/update/delta", message)

    def _serve(self, packet: Packet) -> Iterable[tuple[str, Any]]:
        name, operation = packet.topic.removeprefix(self._prefix).split("/")
        if name == "config":
            return []
        request = json.loads(packet.payload or b"{}")
        stamp = {"timestamp": int(time.time())} | {k: v for k, v in request.items() if k == "clientToken"}
        if operation == "update":
            document = self._merge(name, request["state"])
            answer = {"state": request["state"], "metadata": {}, "version": document["version"]}
            return [(f"{packet.topic}/accepted", answer | stamp)]
        if name not in self.documents:
            refusal = {"code": 404, "message": f"No shadow exists with name: '{name}'"}
            return [(f"{packet.topic}/rejected", refusal | stamp)]
        return [(f"{packet.topic}/accepted", {**self.documents[name], "metadata": {}, **stamp})]

    def _merge(self, name: str, changes: dict[str, Any]) -> dict[str, Any]:
        document = self.documents.setdefault(name, {"state": {}, "version": 0})
        document["state"] = _merged(document["state"], changes)
        document["version"] += 1
        return document


class Cloud:
    """`async with Cloud("cam-1") as cloud`: listens on `cloud.port` of localhost.

    `reports` and `events` hold every telemetry message in the order of arrival, duplicates included.
    """

    def __init__(self, thing: str, topic_prefix: str = TOPIC_PREFIX) -> None:
        self.thing = thing
        self.peer = MqttPeer(authority().server_context())
        self.jobs = Jobs(thing, self.peer)
        self.shadows = Shadows(thing, self.peer)
        self.config = ConfigShadow(self.peer, thing)
        self.reports: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        for name, arrived in (("report", self.reports), ("event", self.events)):
            self.peer.serve(f"{topic_prefix}/{thing}/{name}", functools.partial(_collect, arrived))

    async def __aenter__(self) -> Self:
        await self.peer.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.peer.__aexit__(*error)

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.peer.port


def _collect(arrived: list[dict[str, Any]], packet: Packet) -> Iterable[tuple[str, Any]]:
    arrived.append(packet.json())
    return ()


def _check_update(status: Any, details: Any, step_timeout: Any) -> None:
    """Raises RefusedError for what the service's model does not allow."""
    wrong = ""
    if status not in DEVICE_STATUSES:
        wrong = f"status {status!r}"
    elif details is not None and not _is_details(details):
        wrong = f"statusDetails {details!r}"
    elif step_timeout is not None and step_timeout != -1 and not 1 <= step_timeout <= 10080:
        wrong = f"stepTimeoutInMinutes {step_timeout!r}"
    if wrong:
        raise RefusedError("InvalidRequest", wrong)


def _is_details(details: Any) -> bool:
    return (
        isinstance(details, dict)
        and len(details) <= 10
        and all(
            re.fullmatch(r"[a-zA-Z0-9:_-]{1,128}", key)
            and isinstance(value, str)
            and 1 <= len(value) <= 1024
            and not any(unicodedata.category(character).startswith("C") for character in value)
            for key, value in details.items()
        )
    )


def _merged(old: Any, changes: Any) -> Any:
    """A shadow's rule: objects are merged, null removes, anything else replaces."""
    if not isinstance(changes, dict):
        return changes
    result = dict(old) if isinstance(old, dict) else {}
    for key, value in changes.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = _merged(result.get(key), value)
    return result
