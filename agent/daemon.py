"""The daemon: the one place where everything is built, joined, started and stopped."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import IO, Any

from agent import settings_file
from agent.api.server import Server
from agent.assembly import Assembly
from agent.capture.capture import Capture
from agent.cloud import identity, provisioning, topics
from agent.cloud.jobs import JobsClient
from agent.cloud.session import Session
from agent.config.deliveries import Deliveries
from agent.config.records import offer_stored
from agent.errors import AgentError, CloudError
from agent.health.health import Health
from agent.health.probes.certificates import validity
from agent.host import clock, files
from agent.host.facts import host_facts
from agent.host.systemd import Notifier, Units
from agent.logs import get_logger
from agent.maintenance import Maintenance
from agent.settings_file import Site
from agent.store import Store, Tables
from agent.supervise import VitalTaskError, restarting, vital
from agent.telemetry.outbox import Outbox
from agent.telemetry.report import presence
from agent.updates.apply_lock import ApplyLocks
from agent.views import Parts, View

SESSION_RETRY_S = 30.0
SNAPSHOT_S = 15.0
UNREACHED, UNREACHED_S = "cloud.unreached_s", 300.0
NOTED_EARLY = 1000
"""Changes of conditions kept for reporting while the camera has no name yet."""
log = get_logger("daemon")


class Daemon:
    """One camera's agent; `site` is agent.toml, or the copy of it to run with, `config_file` where it is."""

    def __init__(self, site: Site, config_file: Path, version: str) -> None:
        self._site = site
        settings = self._settings = site.settings
        self._version = version
        self._instance = uuid.uuid4().hex
        self._stop = asyncio.Event()
        self._restart = False
        self._notifier = Notifier()
        self._units = Units()
        self._mutation_lock = asyncio.Lock()
        self._parts = Parts(settings, config_file, version, started_at=time.time(), site=site)
        self._certificate_not_after: float | None = None
        self._noted_early: deque[dict[str, Any]] = deque(maxlen=NOTED_EARLY)
        self._store: Store
        self._lock: IO[bytes] | None

    async def run(self) -> bool:
        """Run until SIGTERM or SIGINT; whether the process should start itself again. Raises AgentError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        state_dir = self._settings.paths.state_dir
        try:
            self._lock = await asyncio.to_thread(files.lock, state_dir / "lock")
        except OSError as error:
            raise AgentError("state_dir_failed", f"{state_dir}: {error.strerror}", "check [paths] state_dir") from error
        if self._lock is None:
            raise AgentError(
                "already_running", f"another camera-agent works on {state_dir}", "stop it, or use another state_dir"
            )
        self._store = self._parts.store = await Store.open(state_dir / "state.db")
        try:
            await self._serve()
        finally:
            if not self._restart:  # the process goes on as its successor, and systemd must not take it for ending
                self._notifier.stopping()
            await self._units.close()
            await self._store.close()
        return self._restart

    async def _serve(self) -> None:
        view = View(self._parts)
        updates, parts = self._settings.updates, self._parts
        locks = self._settings.paths.runtime_dir / "apply-locks.json"
        parts.locks = ApplyLocks(locks, updates.apply_lock_max_s, switching=parts.switching)
        await parts.locks.load()
        targets = self._settings.config.targets
        parts.deliveries = Deliveries(targets)
        await offer_stored(
            self._store, parts.deliveries, targets
        )  # programs need not wait for the cloud, nor for an identity
        users = {name: target.users for name, target in targets.items()}
        server = Server(view, self._settings.api_socket, updates.apply_lock_users, users)
        await server.open()
        tasks = asyncio.create_task(self._tasks(server, view), name="tasks")
        stop = asyncio.create_task(self._stop.wait(), name="stop")
        log.info("started", version=self._version, instance=self._instance)
        if self._site.problem:
            log.error("agent.toml can't be used, running with the copy that worked", reason=self._site.problem)
        self._notifier.ready()
        try:
            await asyncio.wait({tasks, stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (tasks, stop):
                task.cancel()
            await asyncio.wait({tasks, stop})
            with contextlib.suppress(AgentError):
                await self._keep_snapshot(view, running=False)
        if not tasks.cancelled() and (error := tasks.exception()):
            raise _first_cause(error)
        log.info("stopped", restart=self._restart)

    async def _tasks(self, server: Server, view: View) -> None:
        """Every long-running task, in one list."""
        settings, parts = self._settings, self._parts
        folders = [source.directory for source in settings.capture.sources.values()]
        parts.capture = Capture(settings.capture.sources, settings.capture, on_event=self._note, store=self._store)
        parts.health = Health(
            settings.paths.state_dir,
            folders,
            certificate_not_after=lambda: self._certificate_not_after,
            on_event=self._note,
        )
        async with asyncio.TaskGroup() as group:
            start = partial(_start, group)
            start("local API", vital, server.run)
            start("capture", restarting, parts.capture.run)
            start("health", restarting, parts.health.run)
            start("snapshot", restarting, partial(self._keep_snapshots, view))
            start("watchdog", vital, self._feed_watchdog)
            start("cloud", vital, self._cloud)

    async def _cloud(self) -> None:
        """What needs the camera's name: from here on it has one."""
        thing = self._parts.thing_name = await self._obtain_name()
        settings, parts, store = self._settings, self._parts, self._store
        build = Assembly(
            parts,
            self._site,
            store,
            self._units,
            self._mutation_lock,
            instance=self._instance,
            version=self._version,
            restart_agent=self._restart_agent,
        )
        session = parts.session = Session(
            client_id=thing,
            cloud=settings.cloud,
            certificate_file=settings.certificate_file,
            private_key_file=settings.private_key_file,
            announce=partial(_announce, settings.telemetry.topic_prefix, thing) if settings.cloud.announce else None,
            unreached_s=await store.read(lambda t: t.fact(UNREACHED, 0.0)),
        )
        outbox = parts.outbox = Outbox(
            store, settings.telemetry, publish=session.publish, wait_online=session.wait_connected
        )
        reports = parts.reports = build.reports(thing, outbox)
        while self._noted_early:
            reports.note(self._noted_early.popleft())
        parts.maintenance = Maintenance(settings.maintenance, thing)
        update = parts.updates = build.update(thing, session)
        await update.load()
        jobs = JobsClient(session, thing)
        configuration = parts.configuration = build.configuration(thing, session, update)
        await configuration.load()
        engine = parts.engine = build.engine(jobs, update, configuration, await asyncio.to_thread(host_facts))
        jobs.on_notify_next(lambda _: engine.wake())

        def on_update(_: str, payload: bytes) -> None:
            if b'"desired"' in payload:
                configuration.look_again()  # a key that is only removed makes no delta

        session.subscribe(topics.accepted(topics.shadow_update(thing, "config")), on_update)

        async def ask_for_jobs() -> None:
            engine.wake()

        async def look_at_certificate() -> None:
            self._certificate_not_after = await asyncio.to_thread(_expiry, settings.certificate_file)

        async def keep_site() -> None:
            if not self._site.problem:
                await asyncio.to_thread(settings_file.keep, self._site)

        for ready in (ask_for_jobs, outbox.connected, configuration.on_ready, look_at_certificate, keep_site):
            session.on_ready(ready)
        async with asyncio.TaskGroup() as group:
            start = partial(_start, group)
            start("session", vital, partial(self._stay_connected, session))
            start("unreached", restarting, partial(self._keep_unreached, session))
            start("jobs", vital, engine.run)
            start("configuration", restarting, configuration.run)
            start("outbox", restarting, outbox.run)
            start("reports", restarting, reports.run)
            start("updates", restarting, update.serve)
            if settings.updates.package_shadow:
                start("packages", restarting, build.packages(thing, session, update).run)

    def _restart_agent(self) -> None:
        self._restart = True
        self._stop.set()

    async def _obtain_name(self) -> str:
        """The thing name, provisioning the camera first where it has no certificate; tries until it succeeds."""
        attempt = 0
        while True:
            attempt += 1
            try:
                if not await asyncio.to_thread(identity.exists, self._settings):
                    await provisioning.provision(self._settings)
                name = await asyncio.to_thread(identity.thing_name, self._settings)
                self._certificate_not_after = await asyncio.to_thread(_expiry, self._settings.certificate_file)
            except (CloudError, OSError) as raised:
                error = self._parts.identity_error = provisioning.as_cloud_error(raised)
                pause = provisioning.retry_s(error, attempt, random.random())  # noqa: S311  jitter
                log.error(
                    "no identity yet", code=error.code, reason=error.message, hint=error.hint, retry_s=round(pause)
                )
                await asyncio.sleep(pause)
            else:
                self._parts.identity_error = None
                return name

    async def _stay_connected(self, session: Session) -> None:
        """The session; what makes it give up (unreadable files, no endpoint) is logged, shown, and tried again."""
        while True:
            try:
                await session.run()
            except CloudError as error:
                log.error("can't connect", code=error.code, reason=error.message, hint=error.hint)
            await asyncio.sleep(SESSION_RETRY_S)

    async def _keep_unreached(self, session: Session) -> None:
        """Keep how long the cloud has not been reached, so that reboots don't put off the fallback to agent.toml's own settings."""
        kept = await self._store.read(lambda t: t.fact(UNREACHED, 0.0))
        while True:
            await asyncio.sleep(UNREACHED_S)
            now = session.unreached_s
            if now != kept:
                await self._store.write(partial(Tables.set_fact, key=UNREACHED, value=now))
                kept = now

    async def _feed_watchdog(self) -> None:
        """Feed systemd's watchdog while the loop turns and the store answers; being off-line is not being sick."""
        interval = self._notifier.watchdog_interval_s or 30.0
        while True:
            async with asyncio.timeout(interval):
                await self._store.read(lambda t: t.fact("alive"))
            self._notifier.watchdog()
            self._notifier.status(self._parts.one_line())
            await asyncio.sleep(interval / 2)

    async def _keep_snapshots(self, view: View) -> None:
        while True:
            await self._keep_snapshot(view, running=True)
            await asyncio.sleep(SNAPSHOT_S)

    async def _keep_snapshot(self, view: View, *, running: bool) -> None:
        """The last status beside the socket, for agentctl when the daemon is down."""
        snapshot = await view.snapshot(running=running)
        with contextlib.suppress(OSError):
            await asyncio.to_thread(
                files.write_atomic, self._settings.paths.runtime_dir / "status.json", snapshot, 0o640
            )

    def _note(self, change: dict[str, Any]) -> None:
        level = log.info if change["state"] == "clear" or change["severity"] == "info" else log.warning
        level("condition", **{key: change[key] for key in ("condition", "state", "source", "message")})
        if self._parts.reports:
            self._parts.reports.note(change)
        else:
            self._noted_early.append(change)


def _announce(prefix: str, thing: str, session: str, connected: bool) -> tuple[str, bytes]:
    """Topic and payload of the birth message, or of the last will, of the connection with the nonce `session`."""
    payload = presence(thing_name=thing, boot_id=clock.boot_id(), session=session, connected=connected)
    return topics.event(prefix, thing), payload


def _start(
    group: asyncio.TaskGroup,
    name: str,
    supervise: Callable[[str, Callable[[], Awaitable[None]]], Awaitable[None]],
    run: Callable[[], Awaitable[None]],
) -> None:
    async def task() -> None:
        await supervise(name, run)

    group.create_task(task(), name=name)


def _expiry(certificate_file: Path) -> float | None:
    """When the certificate ends, epoch seconds; None for one that can't be read, which the session will complain about."""
    try:
        return validity(certificate_file.read_text(encoding="ascii"))[1]
    except (OSError, ValueError):
        return None


def _first_cause(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, VitalTaskError):
        return AgentError("vital_task_failed", f"the agent can't go on without its task {error}", "its log says why")
    return error
