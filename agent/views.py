"""What the daemon tells about itself: the answers of the local API, from the parts that are there at the moment."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.api.openmetrics import Metric, Type
from agent.api.routes import public_job
from agent.capture.capture import Capture
from agent.cloud.session import Link, Session
from agent.config.configuration import Configuration
from agent.config.deliveries import Deliveries
from agent.errors import AgentError, RefusedError
from agent.health.conditions import health_state
from agent.health.health import Health
from agent.health.metrics import METRICS, split_key
from agent.host import clock
from agent.jobs.engine import Engine
from agent.maintenance import Maintenance
from agent.settings import Settings
from agent.settings_file import Site
from agent.store import Store
from agent.telemetry.outbox import Outbox
from agent.telemetry.reports import Reports
from agent.updates.apply_lock import ApplyLocks
from agent.updates.holds import Holds
from agent.updates.update import Update

Json = dict[str, Any]
OFFLINE_AFTER_S = 60.0
WORDS = {"healthy": "healthy", "degraded": "needs attention", "unhealthy": "bad"}


@dataclass
class Parts:
    """What the daemon is made of; those that need an identity are None until the camera has one."""

    settings: Settings
    """In force now: agent.toml and what the shadow has set."""
    config_file: Path
    version: str
    started_at: float
    started: float = field(default_factory=time.monotonic)
    store: Store | None = None
    thing_name: str | None = None
    site: Site | None = None
    """agent.toml, or the copy of it that the agent runs with."""
    identity_error: AgentError | None = None
    session: Session | None = None
    capture: Capture | None = None
    health: Health | None = None
    engine: Engine | None = None
    locks: ApplyLocks | None = None
    maintenance: Maintenance | None = None
    holds: Holds | None = None
    updates: Update | None = None
    configuration: Configuration | None = None
    deliveries: Deliveries | None = None
    outbox: Outbox | None = None
    reports: Reports | None = None

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self.started

    @property
    def link(self) -> Link:
        """The connection; before there is an identity, why there is none."""
        if self.session:
            return self.session.link
        if self.identity_error:
            error = self.identity_error
            return Link("offline", self.started_at, error.code, error.message, error.hint, since_monotonic=self.started)
        return Link("connecting", self.started_at, since_monotonic=self.started)

    def conditions(self) -> list[Json]:
        """Every condition that is set, of the machine, the capture and the connection."""
        found = [
            *(self.health.conditions() if self.health else []),
            *(self.capture.conditions() if self.capture else []),
        ]
        link = self.link
        offline_for = time.monotonic() - link.since_monotonic
        if self.store and self.store.quarantined:
            found.append(
                {
                    "condition": "state.lost",
                    "source": "",
                    "severity": "warning",
                    "message": "state.db was damaged and a new one begun; jobs and reports that were in it are lost",
                    "remedy": f"look at the disk; the old file is {self.store.quarantined}",
                    "since": self.started_at,
                }
            )
        if self.site and self.site.problem:
            kept = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(self.site.kept_at))
            found.append(
                {
                    "condition": "settings.invalid",
                    "source": "",
                    "severity": "warning",
                    "message": f"agent.toml can't be used, the agent runs with its copy of {kept}: {self.site.problem}",
                    "remedy": f"mend {self.config_file}, try camera-agent check-config, then restart the agent",
                    "since": self.started_at,
                }
            )
        if link.state != "connected" and (offline_for > OFFLINE_AFTER_S or link.code == "taken_over"):
            found.append(
                {
                    "condition": "cloud.taken_over" if link.code == "taken_over" else "cloud.offline",
                    "source": "",
                    "severity": "warning",
                    "message": link.reason or "not connected to AWS IoT",
                    "remedy": link.hint or "agentctl doctor",
                    "since": link.since,
                }
            )
        for name, target in (self.updates.status() if self.updates else {}).items():
            last = target["last"] or {}
            if last.get("code") == "rollback_failed":
                found.append(
                    {
                        "condition": "update.rollback_failed",
                        "source": name,
                        "severity": "critical",
                        "message": last.get("message", "going back failed"),
                        "remedy": "look at the camera's images and unit; a new update can mend it",
                        "since": last.get("at"),
                    }
                )
        if link.state == "connected" and link.code:
            found.append(
                {
                    "condition": "cloud.fallback" if link.code == "fallback" else "cloud.refused",
                    "source": "",
                    "severity": "warning",
                    "message": link.reason,
                    "remedy": link.hint,
                    "since": link.since,
                }
            )
        return found

    def too_hot(self) -> str:
        """What is too hot, in words; empty when nothing is."""
        found = self.health.conditions() if self.health else []
        return "; ".join(c["message"] for c in found if c["condition"] == "temperature.high")

    def switching(self) -> str:
        """What is just being switched to or on trial, in words; empty when nothing is."""
        if self.configuration and self.configuration.state()["state"] == "trial":
            return "a configuration is on trial"
        return self.updates.switching() if self.updates else ""

    def one_line(self) -> str:
        """The state in a few words, for `systemctl status`."""
        link = self.link
        cloud = link.state if link.state == "connected" else f"{link.state} {link.code}".strip()
        return f"{WORDS[health_state(self.conditions())]}, {cloud}"


class View:
    """Implements `agent.api.routes.Agent`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def status(self) -> Json:
        parts, link, conditions = self._parts, self._parts.link, self._parts.conditions()
        cloud = parts.settings.cloud
        return {
            "schema": 1,
            "agent": {
                "version": parts.version,
                "thing_name": parts.thing_name,
                "pid": os.getpid(),
                "started_at": parts.started_at,
                "uptime_s": parts.uptime_s,
                "boot_id": clock.boot_id(),
                "config_file": str(parts.config_file),
            },
            "health": {"state": health_state(conditions), "conditions": conditions},
            "cloud": {
                "state": link.state,
                "endpoint": cloud.endpoint,
                "port": cloud.port,
                "via": link.via,
                "since": link.since,
                "code": link.code,
                "reason": link.reason,
                "hint": link.hint,
            },
            "capture": parts.capture.live() if parts.capture else {},
            "config": self._config_state(),
            "updates": parts.updates.status() if parts.updates else {},
            "jobs": await self._jobs(),
            "outbox": await parts.outbox.status() if parts.outbox else {},
        }

    async def snapshot(self, *, running: bool) -> bytes:
        """The status as kept on disk; `running` is False in the last one of an orderly stop."""
        return json.dumps({**await self.status(), "at": time.time(), "running": running}, default=str).encode()

    async def jobs(self, limit: int) -> list[Json]:
        store = self._parts.store
        return await store.read(lambda t: t.jobs(limit=limit)) if store else []

    async def job(self, job_id: str) -> Json | None:
        store = self._parts.store
        return await store.read(lambda t: t.job(job_id)) if store else None

    async def cancel_job(self, job_id: str, actor: str) -> None:
        engine, store = self._parts.engine, self._parts.store
        if engine is None or store is None or not await engine.cancel(job_id):
            raise RefusedError("job_not_running", f"job {job_id} is not running", "see agentctl jobs")
        await store.write(lambda t: t.add_audit(actor, "job.cancel", {"job_id": job_id}))

    async def plan_job(self, document: Any) -> Json:
        if self._parts.engine is None:
            raise RefusedError("not_ready", "no job can be judged until the camera has its identity", "agentctl doctor")
        return await self._parts.engine.plan(document)

    def config(self) -> Json:
        configuration = self._parts.configuration
        if configuration is None:
            return {"file": str(self._parts.config_file), "effective": {}, "shadow": self._config_state()}
        return {
            "file": str(self._parts.config_file),
            "effective": configuration.effective(),
            "shadow": {**self._config_state(), "desired": configuration.wanted()},
        }

    def explain(self, key: str) -> Json:
        if self._parts.configuration is None:
            raise RefusedError("not_ready", "the configuration is not known until the camera has its identity")
        return self._parts.configuration.explain(key)

    def config_targets(self) -> Json:
        return self._deliveries().listing()

    def config_target(self, name: str) -> Json:
        return self._deliveries().current(name)

    def follow_config_target(self, name: str) -> AsyncIterator[Json]:
        return self._deliveries().follow(name)

    def confirm_config_target(self, name: str, digest: str, *, accepted: bool, message: str) -> None:
        self._deliveries().confirm(name, digest, accepted=accepted, message=message)

    def _deliveries(self) -> Deliveries:
        if self._parts.deliveries is None:
            raise RefusedError("not_ready", "the configuration is not known yet", "try again")
        return self._parts.deliveries

    def capture(self) -> Json:
        capture = self._parts.capture
        if capture is None:
            return {"sources": {}, "conditions": []}
        return {"sources": capture.live(), "conditions": capture.conditions()}

    async def updates(self) -> Json:
        parts = self._parts
        return {
            "targets": parts.updates.status() if parts.updates else {},
            "window": await parts.holds.window() if parts.holds else None,
            "locks": parts.locks.listing() if parts.locks else [],
        }

    async def roll_back(self, target: str, actor: str) -> Json:
        parts = self._parts
        if parts.updates is None or parts.store is None:
            raise RefusedError(
                "not_ready", "nothing can be taken back until the camera has its identity", "agentctl doctor"
            )
        begun = await parts.updates.roll_back(target)
        await parts.store.write(lambda t: t.add_audit(actor, "update.rollback_asked", {"target": target, **begun}))
        return begun

    def apply_locks(self) -> Json:
        locks = self._locks()
        return {"locks": locks.listing(), "max_s": locks.max_s}

    async def take_apply_lock(self, holder: str, seconds: float, reason: str, actor: str, *, admin: bool) -> Json:
        return await self._locks().take(holder, seconds, reason, by=actor, admin=admin)

    async def release_apply_lock(self, holder: str, actor: str, *, admin: bool) -> None:
        await self._locks().release(holder, by=actor, admin=admin)

    def _locks(self) -> ApplyLocks:
        if self._parts.locks is None:
            raise RefusedError("not_ready", "the agent is only starting", "try again")
        return self._parts.locks

    async def stream(self) -> AsyncIterator[Json]:
        while True:
            yield self.capture()
            await asyncio.sleep(1)

    async def metrics(self) -> list[Metric]:
        parts = self._parts
        families = [
            Metric(
                "camera_agent",
                "",
                "info",
                "the agent",
                [({"version": parts.version, "thing": parts.thing_name or ""}, 1)],
            ),
            Metric(
                "camera_agent.connected", "", "gauge", "1 while connected", [({}, int(parts.link.state == "connected"))]
            ),
            Metric(
                "camera_agent.condition",
                "",
                "gauge",
                "1 for each condition that is set",
                [({"condition": c["condition"], "source": c["source"]}, 1) for c in parts.conditions()],
            ),
        ]
        if parts.outbox:
            size = await parts.outbox.status()
            dropped = [({"reason": reason}, count) for reason, count in size["dropped_by_reason"].items()]
            families += [
                Metric("camera_agent.outbox.messages", "", "gauge", "messages that wait", [({}, size["messages"])]),
                Metric(
                    "camera_agent.outbox.quarantined",
                    "",
                    "gauge",
                    "messages that seem to end the connection and are sent seldom",
                    [({}, size["quarantined"])],
                ),
                Metric("camera_agent.outbox.dropped", "", "counter", "messages that were dropped", dropped),
            ]
        return [*families, *self._host_metrics(), *self._capture_metrics()]

    def _host_metrics(self) -> list[Metric]:
        values = self._parts.health.values if self._parts.health else {}
        samples: dict[str, list[tuple[dict[str, str], float]]] = {}
        for key, value in values.items():
            name, labels = split_key(key)
            samples.setdefault(name, []).append((labels, value))
        return [
            Metric(name, METRICS[name].unit, METRICS[name].kind, METRICS[name].description, found)
            for name, found in samples.items()
            if name in METRICS
        ]

    def _capture_metrics(self) -> list[Metric]:
        live = self._parts.capture.live() if self._parts.capture else {}
        families: list[Metric] = []
        kinds: tuple[tuple[str, str, str, Type, str], ...] = (
            ("images_total", "capture.images", "", "counter", "images seen since the agent started"),
            ("corrupt_total", "capture.corrupt", "", "counter", "images that were broken"),
            ("rate_hz", "capture.rate", "Hz", "gauge", "images a second"),
            ("last_image_age_s", "capture.last_image.age", "s", "gauge", "age of the newest image"),
            ("luma", "capture.luma", "", "gauge", "mean brightness of the last analysed image, 0-255"),
            ("sharpness", "capture.sharpness", "", "gauge", "sharpness of the last analysed image, log ratio"),
        )
        for key, name, unit, kind, words in kinds:
            found = [({"source": source}, state[key]) for source, state in live.items() if state.get(key) is not None]
            if found:
                families.append(Metric(name, unit, kind, words, found))
        return families

    def _config_state(self) -> Json:
        configuration = self._parts.configuration
        return configuration.state() if configuration else {"state": "none", "desired_version": None, "errors": []}

    async def _jobs(self) -> Json:
        current = self._parts.engine.current if self._parts.engine else None
        finished = await self._parts.store.read(lambda t: t.jobs(finished=True, limit=1)) if self._parts.store else []
        return {
            "current": public_job(current.to_json()) if current else None,
            "last": public_job(finished[0]) if finished else None,
        }
