"""The real API server with a stand-in for the agent, for the tests of the API and of agentctl.

As a program, `python -m tests.integration.fake_daemon RUNTIME_DIR STATE_FILE`, it answers from STATE_FILE, read anew for
each request, and keeps status.json as the daemon does, until SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from agent.api.openmetrics import Metric
from agent.api.server import Server
from agent.config.deliveries import Deliveries
from agent.errors import CloudError, RefusedError
from agent.jobs.document import parse
from agent.updates.apply_lock import ApplyLocks


def entry(value: Any, origin: str = "default", *, since: float | None = None, remote: bool = False) -> dict[str, Any]:
    """A setting as the agent shows it."""
    return {"value": value, "origin": origin, "since": since, "remote": remote}


EXPLAINED: dict[str, dict[str, Any]] = {
    "telemetry.interval_s": {
        "value": 30.0,
        "origin": "shadow version 12",
        "overrides": [
            {"origin": "job lower-the-rate-of-reports-in-the-north-3", "value": 40},
            {"origin": "site file", "value": 45},
            {"origin": "default", "value": 60},
        ],
        "default": 60,
        "unit": "s",
        "remote": True,
        "applies": "live",
        "description": "Length of a report's window.",
    },
    "cloud.endpoint": {
        "value": "a1b2c3d4e5f6g7-ats.iot.eu-west-1.amazonaws.com",
        "origin": "site file",
        "overrides": [{"origin": "default", "value": None}],
        "default": None,
        "unit": None,
        "remote": False,
        "applies": None,
        "description": "Host name of AWS IoT.",
    },
}


def healthy_state(now: float) -> dict[str, Any]:
    """What a camera with nothing wrong answers."""
    live = {
        "rate_hz": 1.0,
        "interval_s": 1.0,
        "last_image_age_s": 0.8,
        "state": "watching",
        "images": 3600,
        "conditions": [],
        "corrupt": 0,
        "luma": 112.3,
        "sharpness": 0.42,
    }
    update = {
        "job_id": "update-17",
        "execution_number": 1,
        "operation": "update",
        "phase": "closed",
        "status": "SUCCEEDED",
        "message": "",
        "details": {"reason_code": "ok", "message": "pipeline 1.4.2 runs and images flow"},
        "document": {"urls": ["https://bucket.s3.amazonaws.com/a?X-Amz-Signature=secret"]},
        "received_at": now - 900,
        "ended_at": now - 700,
        "superseded": None,
    }
    return {
        "status": {
            "agent": {
                "version": "0.1.0",
                "thing_name": "cam-0412",
                "pid": 812,
                "started_at": now - 11520,
                "uptime_s": 11520,
                "boot_id": "b",
                "config_file": "/etc/camera-agent/agent.toml",
            },
            "health": {"state": "healthy", "conditions": []},
            "cloud": {
                "state": "connected",
                "endpoint": "a1b2c3d4e5f6g7-ats.iot.eu-west-1.amazonaws.com",
                "port": 8883,
                "since": now - 11500,
                "code": None,
                "reason": None,
                "hint": None,
            },
            "capture": {"front": live, "rear": {**live, "rate_hz": 0.5, "interval_s": 2.0}},
            "config": {"state": "applied", "desired_version": 12, "errors": []},
            "updates": {"pipeline": {"version": "1.4.2", "slot": "3f2a9c81d0aa", "state": "active"}},
            "jobs": {"current": None, "last": update},
            "outbox": {
                "messages": 0,
                "bytes": 0,
                "oldest_at": None,
                "quarantined": 0,
                "dropped": 0,
                "dropped_by_reason": {},
            },
        },
        "jobs": [update],
        "updates": {
            "targets": {
                "pipeline": {
                    "name": "pipeline",
                    "version": "1.4.2",
                    "slot": "3f2a9c81d0aa",
                    "previous": "1.4.1",
                    "state": "idle",
                    "since": None,
                    "waits_for": "",
                    "next": "",
                    "percent": None,
                    "last": {"state": "COMMITTED", "version": "1.4.2", "at": now - 700},
                    "quarantined": [],
                }
            },
            "window": {"windows": [], "time_zone": "UTC", "state": "always", "words": "no window is set"},
            "locks": [],
        },
        "config": {
            "file": "/etc/camera-agent/agent.toml",
            "effective": {
                "thing_name": entry("cam-0412", "site file"),
                "cloud.endpoint": entry("a1b2c3d4e5f6g7-ats.iot.eu-west-1.amazonaws.com", "site file"),
                "cloud.port": entry(8883),
                "cloud.proxy_url": entry("http://joe:secret@proxy:3128", "site file"),
                "telemetry.interval_s": entry(30.0, "shadow version 12", since=now - 3600, remote=True),
                "capture.sources.front.pattern": entry("*.jpg"),
                "targets.pipeline.gain": entry(2, "shadow version 12", since=now - 3600, remote=True),
            },
            "shadow": {
                "state": "applied",
                "desired_version": 12,
                "errors": [],
                "desired": {"agent": {"telemetry": {"interval_s": 30}}, "targets": {"pipeline": {"gain": 2}}},
            },
        },
        "capture": {"sources": {"front": live}, "conditions": []},
        "offers": {
            "pipeline": [{"gain": 2, "camera": "rtsp://joe:secret@10.0.0.7/live"}, "applied"],
            "lights": [None, "applied"],
        },
    }


class FakeAgent:
    """Answers from `state`; a job named `broken` raises, one named `off-line` can't reach the cloud.

    `rollback` of the state is {"refused": [code, message, hint]}, or {"then": [status, …]}: how the target stands at each
    look after it was taken back. `switching` is the target that is just being switched. `offers` has the document and the
    state of each config target, at the start; later ones go to `deliveries`.
    """

    def __init__(self, state: dict[str, Any], locks_file: Path = Path("/nonexistent/locks")) -> None:
        self._state = state
        self._locks = ApplyLocks(locks_file, 3600, switching=lambda: self.state.get("switching", ""))
        self.rolled_back: list[tuple[str, str]] = []
        self._then: list[dict[str, Any]] = []
        self.cancelled: list[tuple[str, str]] = []
        self.planned: list[Any] = []
        self.deliveries = Deliveries(self.state.get("offers", {}), heartbeat_s=0.5)
        self.put_out()
        self.streams_open = 0
        self.stream_interval_s = 0.02

    @property
    def state(self) -> dict[str, Any]:
        return self._state

    def put_out(self) -> None:
        """Offer what the state has."""
        for name, (document, state) in self.state.get("offers", {}).items():
            self.deliveries.offer(name, document, state)

    async def status(self) -> dict[str, Any]:
        return dict(self.state["status"])

    async def jobs(self, limit: int) -> list[dict[str, Any]]:
        return list(self.state["jobs"][:limit])

    async def job(self, job_id: str) -> dict[str, Any] | None:
        if job_id == "broken":
            raise ZeroDivisionError("the cause, which is nobody's business")
        if job_id == "off-line":
            raise CloudError("timed_out", "the cloud did not answer", "try again", retryable=True)
        return next((job for job in self.state["jobs"] if job["job_id"] == job_id), None)

    async def cancel_job(self, job_id: str, actor: str) -> None:
        job = await self.job(job_id)
        if job is None or job["status"]:
            raise RefusedError("job_ended", f"job {job_id} has ended", "nothing is left to cancel")
        self.cancelled.append((job_id, actor))

    async def plan_job(self, document: Any) -> dict[str, Any]:
        """The real judgement of the document's form; a camera without handlers, so that every step is refused."""
        self.planned.append(document)
        verdict: dict[str, Any] = {"operation": None, "code": "ok", "message": "", "hint": "", "steps": []}
        try:
            operation, normal = parse(document)
            if operation == "run":
                handler = normal["steps"][0]["action"]["input"].get("handler")
                raise RefusedError("handler_missing", f"{handler}: No such file or directory", "install it first")
        except RefusedError as error:
            return verdict | {"accepted": False, "code": error.code, "message": error.message, "hint": error.hint}
        steps = ["wait for the end of other changes", f"{operation} \x1b[31m the {'camera ' * 20}"]
        return verdict | {"accepted": True, "operation": operation, "steps": steps}

    def config(self) -> dict[str, Any]:
        return dict(self.state["config"])

    def explain(self, key: str) -> dict[str, Any]:
        if key not in EXPLAINED:
            raise RefusedError("unknown_key", f"{key} is no key of agent.toml", "did you mean telemetry.interval_s?")
        return {"key": key, "since": None, **EXPLAINED[key]}

    def config_targets(self) -> dict[str, Any]:
        return self.deliveries.listing()

    def config_target(self, name: str) -> dict[str, Any]:
        return self.deliveries.current(name)

    def follow_config_target(self, name: str) -> AsyncIterator[dict[str, Any]]:
        return self.deliveries.follow(name)

    def confirm_config_target(self, name: str, digest: str, *, accepted: bool, message: str) -> None:
        self.deliveries.confirm(name, digest, accepted=accepted, message=message)

    def capture(self) -> dict[str, Any]:
        return dict(self.state["capture"])

    async def updates(self) -> dict[str, Any]:
        answer = json.loads(json.dumps(self.state["updates"]))
        if self._then:
            answer["targets"]["pipeline"] = self._then.pop(0) if len(self._then) > 1 else self._then[0]
        return {**answer, "locks": [*answer["locks"], *self._locks.listing()]}

    async def roll_back(self, target: str, actor: str) -> dict[str, Any]:
        if target not in self.state["updates"]["targets"]:
            raise RefusedError("unknown_target", f"this camera has no update target {target}")
        plan = self.state.get("rollback", {})
        if "refused" in plan:
            raise RefusedError(*plan["refused"])
        self.rolled_back.append((target, actor))
        self._then = list(plan.get("then", []))
        return {"state": "going_back", "message": f"{target} goes back"}

    def apply_locks(self) -> dict[str, Any]:
        return {"locks": self._locks.listing(), "max_s": self._locks.max_s}

    async def take_apply_lock(
        self, holder: str, seconds: float, reason: str, actor: str, *, admin: bool
    ) -> dict[str, Any]:
        return await self._locks.take(holder, seconds, reason, by=actor, admin=admin)

    async def release_apply_lock(self, holder: str, actor: str, *, admin: bool) -> None:
        await self._locks.release(holder, by=actor, admin=admin)

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        self.streams_open += 1
        try:
            while True:
                yield self.capture()
                await asyncio.sleep(self.stream_interval_s)
        finally:
            self.streams_open -= 1

    async def metrics(self) -> list[Metric]:
        return [
            Metric("system.cpu.utilization", "1", "gauge", "Share of time not idle", [({}, 0.25)]),
            Metric("capture.images", "{image}", "counter", "Images seen", [({"source": "front"}, 60)]),
        ]


class FileAgent(FakeAgent):
    """Answers from a file that a test may rewrite at any time."""

    def __init__(self, state_file: Path) -> None:
        self._file = state_file
        super().__init__({}, state_file.with_name("apply-locks.json"))

    @property
    def state(self) -> dict[str, Any]:
        state = json.loads(self._file.read_text())
        assert isinstance(state, dict)
        return state


async def _keep_offering(agent: FileAgent) -> None:
    while True:
        await asyncio.sleep(0.05)
        agent.put_out()


async def _serve(runtime_dir: Path, state_file: Path) -> None:
    agent = FileAgent(state_file)
    server = Server(agent, runtime_dir / "api.sock")
    await server.open()

    async def keep(*, running: bool) -> None:
        kept = {"schema": 1, **await agent.status(), "at": time.time(), "running": running}
        (runtime_dir / "status.json").write_text(json.dumps(kept))

    await keep(running=True)
    task = asyncio.create_task(server.run())
    offering = asyncio.create_task(_keep_offering(agent))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    print("listening", time.time(), flush=True)
    await asyncio.wait({task, offering}, return_when=asyncio.FIRST_COMPLETED)
    offering.cancel()
    await keep(running=False)


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), Path(sys.argv[2])))
