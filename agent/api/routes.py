"""The local API on one page: every path, who may use it, and what answers it. Knows nothing of HTTP libraries or sockets.

`read` is whoever may connect to the socket; `write` is root, the agent's own user and the group camera-admins.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol
from urllib.parse import unquote

from agent.api.openmetrics import CONTENT_TYPE, Metric, render
from agent.errors import RefusedError

Json = dict[str, Any]
MAX_JOBS = 200


class Agent(Protocol):
    """What the daemon answers for; every dict is JSON, times are epoch seconds."""

    async def status(self) -> Json:
        """Everything at a glance: agent, health, cloud, capture, config, updates, jobs, outbox."""
        ...

    async def jobs(self, limit: int) -> list[Json]:
        """The journal's records of the latest job executions, the newest first."""
        ...

    async def job(self, job_id: str) -> Json | None:
        """The record of a job's latest execution, None when this camera knows no such job."""
        ...

    async def cancel_job(self, job_id: str, actor: str) -> None:
        """Ask a running job to end; `actor` says who wants it. Raises RefusedError when it can't be cancelled any more."""
        ...

    async def plan_job(self, document: Any) -> Json:
        """What would become of a job with this document: `accepted`, `operation`, `code`, `message`, `hint`, `steps`.

        Nothing is touched. Raises RefusedError while the camera can't tell.
        """
        ...

    def config(self) -> Json:
        """`file`, the `effective` keys, and the `shadow`: `state`, `desired_version`, `errors` and the document `desired`.

        `effective` has dotted keys, each with `value`, `origin`, `since` and whether it is `remote`.
        """
        ...

    def explain(self, key: str) -> Json:
        """Value, origin, default, unit and description of one dotted key. Raises RefusedError `unknown_key`."""
        ...

    def capture(self) -> Json:
        """`sources` by name, as they are now, and the `conditions` that are set."""
        ...

    def stream(self) -> AsyncIterator[Json]:
        """What `capture` returns, once a second, until closed."""
        ...

    async def metrics(self) -> list[Metric]:
        """The agent's, the machine's and the capture's measurements now."""
        ...


@dataclass(frozen=True)
class Request:
    """What a handler gets: parts of the path in braces, the query, who asks (`local:<user>`), and the body."""

    path: Mapping[str, str]
    query: Mapping[str, str]
    actor: str
    body: bytes = b""


@dataclass(frozen=True)
class Text:
    """A reply that isn't JSON."""

    body: str
    content_type: str


Reply = Json | Text | AsyncIterator[Json]
"""One JSON object, a text, or one JSON object a line for as long as both sides want."""


@dataclass(frozen=True)
class Route:
    """A method and path, who may use it, and what answers it."""

    method: Literal["GET", "POST"]
    path: str
    access: Literal["read", "write"]
    handler: Callable[[Agent, Request], Awaitable[Reply]]


async def _status(agent: Agent, _: Request) -> Reply:
    return await agent.status()


JOB_KEYS = (
    "job_id",
    "execution_number",
    "operation",
    "phase",
    "status",
    "message",
    "details",
    "received_at",
    "ended_at",
    "cancelled",
    "superseded",
)


def public_job(record: Mapping[str, Any]) -> Json:
    """What of a job's journal record is shown in lists: how it stands, not how the agent works on it."""
    return {key: record.get(key) for key in JOB_KEYS}


async def _jobs(agent: Agent, request: Request) -> Reply:
    text = request.query.get("limit", "20")
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= MAX_JOBS):
        raise RefusedError("bad_request", f"limit must be a number from 1 to {MAX_JOBS}, not {text!r:.40}")
    return {"jobs": [public_job(record) for record in await agent.jobs(int(text))]}


async def _job(agent: Agent, request: Request) -> Reply:
    job_id = request.path["id"]
    job = await agent.job(job_id)
    if job is None:
        raise RefusedError("no_such_job", f"this camera knows no job {job_id!r}", "list them: agentctl jobs")
    return {"job": {**public_job(job), "document": job.get("document")}}


async def _cancel_job(agent: Agent, request: Request) -> Reply:
    await _job(agent, request)
    await agent.cancel_job(request.path["id"], request.actor)
    return await _job(agent, request)


async def _plan_job(agent: Agent, request: Request) -> Reply:
    return {"plan": await agent.plan_job(_json_of(request.body))}


def _json_of(body: bytes) -> Any:
    """The JSON value in `body`. Raises RefusedError."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number in JSON")

    try:
        return json.loads(body, parse_constant=refuse)
    except RecursionError:
        why = "it is nested too deep"
    except ValueError as error:
        why = str(error) if body.strip() else "it is empty"
    raise RefusedError("bad_request", f"the body is not JSON: {why:.200}", "send the job document as it is")


async def _config(agent: Agent, _: Request) -> Reply:
    return agent.config()


async def _explain(agent: Agent, request: Request) -> Reply:
    key = request.query.get("key", "")
    if not key:
        raise RefusedError("bad_request", "the query needs key=, such as key=telemetry.interval_s")
    return agent.explain(key)


async def _capture(agent: Agent, _: Request) -> Reply:
    return agent.capture()


async def _stream(agent: Agent, _: Request) -> Reply:
    return agent.stream()


async def _metrics(agent: Agent, _: Request) -> Reply:
    return Text(render(await agent.metrics()), CONTENT_TYPE)


async def _metrics_json(agent: Agent, _: Request) -> Reply:
    return {
        "metrics": [
            {
                "name": name,
                "unit": unit,
                "type": type_,
                "help": help_,
                "samples": [{"labels": dict(labels), "value": value} for labels, value in samples],
            }
            for name, unit, type_, help_, samples in await agent.metrics()
        ]
    }


ROUTES = (
    Route("GET", "/v1/status", "read", _status),
    Route("GET", "/v1/jobs", "read", _jobs),
    Route("POST", "/v1/jobs/plan", "read", _plan_job),
    Route("GET", "/v1/jobs/{id}", "read", _job),
    Route("POST", "/v1/jobs/{id}/cancel", "write", _cancel_job),
    Route("GET", "/v1/config", "read", _config),
    Route("GET", "/v1/config/explain", "read", _explain),
    Route("GET", "/v1/capture", "read", _capture),
    Route("GET", "/v1/capture/stream", "read", _stream),
    Route("GET", "/v1/metrics", "read", _metrics_json),
    Route("GET", "/metrics", "read", _metrics),
)


def match(method: str, path: str) -> tuple[Route | None, dict[str, str], list[str]]:
    """The route of a request, the values of its braces, and the methods that `path` knows (empty: no such path).

    `path` is percent-encoded, so that a slash within a name doesn't part it.
    """
    methods: list[str] = []
    for route in ROUTES:
        values = _fit(route.path.split("/"), path.split("/"))
        if values is None:
            continue
        if route.method == method:
            return route, values, [method]
        methods.append(route.method)
    return None, {}, methods


def _fit(pattern: list[str], parts: list[str]) -> dict[str, str] | None:
    if len(pattern) != len(parts):
        return None
    values = {}
    for wanted, part in zip(pattern, parts, strict=True):
        if wanted.startswith("{"):
            if not part:
                return None
            values[wanted.strip("{}")] = unquote(part)
        elif wanted != part:
            return None
    return values
