"""Builds the parts of an agent that has its name, and joins them by plain callables: no feature knows another."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any

from agent.cloud import topics
from agent.cloud.file_stream import FileStreams
from agent.cloud.jobs import JobsClient
from agent.cloud.session import Session
from agent.cloud.shadow import Pace, ShadowClient
from agent.config.configuration import Configuration
from agent.errors import RefusedError, SettingsError
from agent.host import clock
from agent.host.systemd import Units, reboot
from agent.jobs import conditions
from agent.jobs.engine import Engine
from agent.jobs.operation import Operation
from agent.jobs.operations.configure import Configure
from agent.jobs.operations.reboot import Reboot
from agent.jobs.operations.restart import Restart
from agent.jobs.operations.run import Run
from agent.logs import set_level
from agent.reboots import Reboots
from agent.settings import Settings
from agent.settings_file import Site, load
from agent.store import Store, Tables
from agent.telemetry.outbox import Outbox
from agent.telemetry.reports import Reports, Sources
from agent.updates import packages
from agent.updates.apply_lock import changes_hold
from agent.updates.fetch import Limits
from agent.updates.gate import ConfigurationGate
from agent.updates.holds import Holds
from agent.updates.installers.build import build
from agent.updates.packages import Packages
from agent.updates.preflight import restart_target
from agent.updates.rate import cap_by_hour
from agent.updates.restarts import Restarter
from agent.updates.update import Update
from agent.views import Parts


class Assembly:
    """`instance` names this run of the agent; `restart_agent` makes it end and its successor begin."""

    def __init__(
        self,
        parts: Parts,
        site: Site,
        store: Store,
        units: Units,
        mutation_lock: asyncio.Lock,
        *,
        instance: str,
        version: str,
        restart_agent: Callable[[], None],
    ) -> None:
        self._parts, self._site, self._settings, self._store = parts, site, site.settings, store
        self._units, self._mutation_lock = units, mutation_lock
        self._instance, self._version, self._restart_agent = instance, version, restart_agent
        self._pace = Pace()  # AWS's limits count all shadows of a thing

    def reports(self, thing: str, outbox: Outbox) -> Reports:
        parts, prefix = self._parts, self._settings.telemetry.topic_prefix
        assert parts.health
        assert parts.capture
        health, capture = parts.health, parts.capture
        return Reports(
            outbox,
            Sources(
                host=lambda: health.values,
                capture=capture.close_window,
                conditions=lambda: sorted(self._conditions_set()),
            ),
            thing_name=thing,
            boot_id=clock.boot_id(),
            topics={"report": topics.report(prefix, thing), "event": topics.event(prefix, thing)},
            agent={"version": self._version},
            interval_s=self._settings.telemetry.interval_s,
            labels=self._settings.labels,
        )

    def update(self, thing: str, session: Session) -> Update:
        settings, parts, store = self._settings, self._parts, self._store
        assert parts.locks
        assert parts.maintenance

        async def received_at(job_id: str) -> float | None:
            job = await store.read(lambda t: t.job(job_id))
            return job.get("received_at") if job else None

        parts.holds = Holds(
            parts.maintenance,
            parts.locks,
            settings.updates.min_battery_percent,
            received_at=received_at,
            too_hot=parts.too_hot,
        )
        return Update(
            settings.updates.targets,
            installers=build(settings, config_file=parts.config_file, version=self._version, units=self._units),
            keys_dir=settings.updates.keys_dir,
            downloads_dir=settings.paths.state_dir / "downloads",
            store=self._store,
            restarter=Restarter(
                self._units,
                clock.boot_id(),
                self._instance,
                reboot=partial(reboot, settings.jobs.reboot),
                restart_agent=self._restart_agent,
            ),
            capture=self._parts.capture,
            cloud_ok=partial(is_connected, session),
            conditions=self._conditions_set,
            holds=parts.holds,
            mutation_lock=self._mutation_lock,
            agent_version=self._version,
            limits=Limits(
                proxy_url=lambda: session.cloud.proxy_url,
                streams=FileStreams(session, thing),
                bytes_per_s=cap_by_hour(lambda: parts.settings),
            ),
        )

    def engine(self, jobs: JobsClient, update: Update, configuration: Configuration, host: Mapping[str, str]) -> Engine:
        settings, parts, loop = self._settings, self._parts, asyncio.get_running_loop()
        assert parts.reports
        assert parts.outbox
        reports, outbox, thing = parts.reports, parts.outbox, parts.thing_name or ""
        boot_id, restart_camera = clock.boot_id(), partial(reboot, settings.jobs.reboot)
        operations: list[Operation] = [
            update,
            Configure(configuration.set_fleet, configuration.judge_fleet),
            self._restart_operation(),
            Reboot(boot_id, restart_camera, self._mutation_lock),
            Run(settings.jobs, boot_id=boot_id, reboot=restart_camera, mutation_lock=self._mutation_lock),
        ]

        def on_ended(tables: Tables, ended: Mapping[str, Any]) -> None:
            reports.job_ended(tables, ended)
            loop.call_soon_threadsafe(outbox.announce_fresh)  # it looks only after this transaction, on the same thread

        def facts() -> Mapping[str, str]:
            targets = {name: status["version"] for name, status in update.status().items()}
            return conditions.facts(
                host,
                agent_version=self._version,
                thing_name=thing,
                targets=targets,
                labels=parts.settings.labels,
                own=settings.jobs.facts,
            )

        return Engine(
            store=self._store,
            jobs=jobs,
            operations={operation.name: operation for operation in operations},
            allow=list(settings.jobs.allow),
            facts=facts,
            on_ended=on_ended,
        )

    def packages(self, thing: str, session: Session, update: Update) -> Packages:
        return Packages(
            self._store,
            versions=update.versions,
            changed=update.changed,
            report=ShadowClient(session, thing, packages.SHADOW, self._pace).report,
            wait_online=session.wait_connected,
        )

    def _restart_operation(self) -> Restart:
        targets: Mapping[str, Callable[[], Awaitable[None]]] = {
            name: partial(restart_target, target, self._units)
            for name, target in self._settings.updates.targets.items()
            if target.unit or target.restart
        }

        def check_settings() -> None:
            try:
                load(self._parts.config_file)
            except SettingsError as error:
                raise RefusedError(
                    "settings_invalid", f"the agent could not start again: {error.message}", "mend agent.toml first"
                ) from error

        return Restart(
            instance=self._instance,
            restart_agent=self._restart_agent,
            check_settings=check_settings,
            targets=targets,
            mutation_lock=self._mutation_lock,
        )

    def _conditions_set(self) -> set[str]:
        return {condition["condition"] for condition in self._parts.conditions()}

    def configuration(self, thing: str, session: Session, update: Update) -> Configuration:
        settings, parts = self._settings, self._parts
        assert parts.deliveries
        assert parts.locks
        assert parts.maintenance
        hold = partial(changes_hold, parts.maintenance, parts.locks, noun="configuration")
        reboots = Reboots(self._store, clock.boot_id(), partial(reboot, settings.jobs.reboot))
        return Configuration(
            site=self._site.document,
            settings=settings,
            store=self._store,
            shadow=ShadowClient(session, thing, "config", self._pace),
            units=self._units,
            gate=ConfigurationGate(update.gate),
            apply_agent=self._apply,
            mutation_lock=self._mutation_lock,
            online=partial(is_connected, session),
            deliveries=parts.deliveries,
            hold=hold,
            connected_with=lambda settings: session.connected_with(settings.cloud),
            reconnect=session.reconnect,
            reboot=reboots.reboot,
        )

    async def _apply(self, settings: Settings) -> None:
        """Put in force what the fleet may change of agent.toml."""
        parts = self._parts
        parts.settings = settings
        set_level(settings.log.level)
        if parts.capture:
            parts.capture.reconfigure(settings.capture)
        if parts.reports:
            parts.reports.reconfigure(settings.telemetry.interval_s, settings.labels)
        if parts.outbox:
            parts.outbox.reconfigure(settings.telemetry)
        if parts.maintenance:
            parts.maintenance.reconfigure(settings.maintenance)
        if parts.session:
            await parts.session.restart_with(settings.cloud)


def is_connected(session: Session) -> bool:
    return session.link.state == "connected"
