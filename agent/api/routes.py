"""The local API on one page: every path, who may use it, and what answers it. Knows nothing of HTTP libraries or sockets.

`read` is whoever may connect to the socket; `write` is root, the agent's own user and the group camera-admins; `lock` and
`target` are these and the users that a key of agent.toml names, see USERS.
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

    def config_targets(self) -> Json:
        """By name `digest`, `state`, `confirmed` and `refused` of what each target's program should run with."""
        ...

    def config_target(self, name: str) -> Json:
        """The same of one, with its `target` and `document`, which is null when the fleet sets none. Raises RefusedError."""
        ...

    def follow_config_target(self, name: str) -> AsyncIterator[Json]:
        """What `config_target` returns, now and whenever it changes, and heartbeats, until closed. Raises RefusedError."""
        ...

    def confirm_config_target(self, name: str, digest: str, *, accepted: bool, message: str) -> None:
        """The program's word that it runs with the document of this digest, or refuses it. Raises RefusedError."""
        ...

    def capture(self) -> Json:
        """`sources` by name, as they are now, and the `conditions` that are set."""
        ...

    async def updates(self) -> Json:
        """`targets` by name with what is installed and how an update stands, the `window`, and the apply `locks`."""
        ...

    async def roll_back(self, target: str, actor: str) -> Json:
        """Go back to the version before: `state` and `message`, once begun. Raises RefusedError."""
        ...

    def apply_locks(self) -> Json:
        """`locks`, each with `holder`, `reason`, `by` and `expires_in_s`, and the longest time for one, `max_s`."""
        ...

    async def take_apply_lock(self, holder: str, seconds: float, reason: str, actor: str, *, admin: bool) -> Json:
        """Hold off switches for a time, or for longer; the lock as in `apply_locks`. Raises RefusedError."""
        ...

    async def release_apply_lock(self, holder: str, actor: str, *, admin: bool) -> None:
        """End a lock before its time. Raises RefusedError."""
        ...

    def stream(self) -> AsyncIterator[Json]:
        """What `capture` returns, once a second, until closed."""
        ...

    async def metrics(self) -> list[Metric]:
        """The agent's, the machine's and the capture's measurements now."""
        ...


@dataclass(frozen=True)
class Request:
    """What a handler gets: parts of the path in braces, the query, who asks (`local:<user>`, for reading `local:<uid>`), and
    the body; `admin` is who may use everything.
    """

    path: Mapping[str, str]
    query: Mapping[str, str]
    actor: str
    body: bytes = b""
    admin: bool = False


@dataclass(frozen=True)
class Text:
    """A reply that isn't JSON."""

    body: str
    content_type: str


Reply = Json | Text | AsyncIterator[Json]
"""One JSON object, a text, or one JSON object a line for as long as both sides want."""


Access = Literal["read", "write", "lock", "target"]
USERS: Mapping[Access, str] = {"lock": "updates.apply_lock_users", "target": "config.targets.{name}.users"}
"""The key of agent.toml with further users, after what the braces of the path stand for."""


@dataclass(frozen=True)
class Route:
    """A method and path, who may use it, and what answers it.

    `whole`: those who have this access too get the reply as it is; for the others secrets are left out of it, as of any.
    """

    method: Literal["GET", "POST"]
    path: str
    access: Access
    handler: Callable[[Agent, Request], Awaitable[Reply]]
    whole: Access | None = None


def users_key(access: Access, values: Mapping[str, str]) -> str:
    """The key of agent.toml that names further users with this access; empty where there is none."""
    return USERS.get(access, "").format(**values)


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
    return {"plan": await agent.plan_job(_json_of(request.body, "send the job document as it is"))}


def _json_of(body: bytes, hint: str) -> Any:
    """The JSON value in `body`. Raises RefusedError."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number in JSON")

    try:
        return json.loads(body, parse_constant=refuse)
    except RecursionError:
        why = "it is nested too deep"
    except ValueError as error:
        why = str(error) if body.strip() else "it is empty"
    raise RefusedError("bad_request", f"the body is not JSON: {why:.200}", hint)


async def _updates(agent: Agent, _: Request) -> Reply:
    return await agent.updates()


async def _roll_back(agent: Agent, request: Request) -> Reply:
    return {"rollback": await agent.roll_back(request.path["target"], request.actor)}


LOCK_HINT = (
    'send {"seconds": 300, "holder": "capture-pipeline", "reason": "finishing a recording"}; only seconds must be'
)
UNLOCK_HINT = 'send {"holder": "capture-pipeline"}, or nothing for the lock of your own name'


async def _locks(agent: Agent, _: Request) -> Reply:
    return agent.apply_locks()


async def _take_lock(agent: Agent, request: Request) -> Reply:
    wanted = _fields(request.body, {"holder": str, "seconds": (int, float), "reason": str}, LOCK_HINT)
    if "seconds" not in wanted:
        raise RefusedError("bad_request", "seconds is missing", LOCK_HINT)
    holder, reason = wanted.get("holder", _own_name(request)), wanted.get("reason", "")
    lock = await agent.take_apply_lock(holder, wanted["seconds"], reason, request.actor, admin=request.admin)
    return {"lock": lock}


async def _release_lock(agent: Agent, request: Request) -> Reply:
    wanted = _fields(request.body, {"holder": str}, UNLOCK_HINT) if request.body else {}
    await agent.release_apply_lock(wanted.get("holder", _own_name(request)), request.actor, admin=request.admin)
    return agent.apply_locks()


def _own_name(request: Request) -> str:
    return request.actor.removeprefix("local:")


def _fields(body: bytes, types: Mapping[str, type | tuple[type, ...]], hint: str) -> Json:
    """The JSON object in `body`, which may have these keys, each of its type. Raises RefusedError."""
    found = _json_of(body, hint)
    if not isinstance(found, dict):
        raise RefusedError("bad_request", "the body is not a JSON object", hint)
    for key, value in found.items():
        if key not in types:
            raise RefusedError("bad_request", f"there is no key {key!r:.40}", hint)
        if not isinstance(value, types[key]) or (isinstance(value, bool) and types[key] is not bool):
            kind = "a text" if types[key] is str else "true or false" if types[key] is bool else "a number"
            raise RefusedError("bad_request", f"{key} must be {kind}", hint)
    return found


async def _config(agent: Agent, _: Request) -> Reply:
    return agent.config()


async def _explain(agent: Agent, request: Request) -> Reply:
    key = request.query.get("key", "")
    if not key:
        raise RefusedError("bad_request", "the query needs key=, such as key=telemetry.interval_s")
    return agent.explain(key)


CONFIRM_HINT = 'send {"digest": "…", "accepted": true}, or {"digest": "…", "accepted": false, "message": "why not"}'


async def _config_targets(agent: Agent, _: Request) -> Reply:
    return {"targets": agent.config_targets()}


async def _config_target(agent: Agent, request: Request) -> Reply:
    return agent.config_target(request.path["name"])


async def _follow_config_target(agent: Agent, request: Request) -> Reply:
    return agent.follow_config_target(request.path["name"])


async def _confirm_config_target(agent: Agent, request: Request) -> Reply:
    said = _fields(request.body, {"digest": str, "accepted": bool, "message": str}, CONFIRM_HINT)
    for key in ("digest", "accepted"):
        if key not in said:
            raise RefusedError("bad_request", f"{key} is missing", CONFIRM_HINT)
    name = request.path["name"]
    agent.confirm_config_target(name, said["digest"], accepted=said["accepted"], message=said.get("message", ""))
    return {"target": name, **agent.config_targets()[name]}


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
    Route("GET", "/v1/config/targets", "read", _config_targets),
    Route("GET", "/v1/config/targets/{name}", "read", _config_target, whole="target"),
    Route("GET", "/v1/config/targets/{name}/follow", "read", _follow_config_target, whole="target"),
    Route("POST", "/v1/config/targets/{name}/confirm", "target", _confirm_config_target, whole="target"),
    Route("GET", "/v1/updates", "read", _updates),
    Route("POST", "/v1/updates/{target}/rollback", "write", _roll_back),
    Route("GET", "/v1/updates/lock", "read", _locks),
    Route("POST", "/v1/updates/lock", "lock", _take_lock),
    Route("POST", "/v1/updates/unlock", "lock", _release_lock),
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
