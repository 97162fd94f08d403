"""systemd, when it is there: readiness and watchdog messages to it, units restarted, reloaded and looked at, and reboots.

Owner of systemd-python's `daemon`. A restart or reload returns only when systemd says the job is done.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agent.errors import FailedError
from agent.host import bus, processes
from agent.host.bus import BusError, Connection
from agent.logs import get_logger

log = get_logger("systemd")

SYSTEMD = "org.freedesktop.systemd1"
MANAGER_PATH = "/org/freedesktop/systemd1"
MANAGER = f"{SYSTEMD}.Manager"
LOGIND = "org.freedesktop.login1"
JOB_TIMEOUT_S = 120.0
REPLY_TIMEOUT_S = 25.0
REBOOT_COMMAND_TIMEOUT_S = 60.0

UNKNOWN_UNIT = (f"{SYSTEMD}.NoSuchUnit",)
UNAVAILABLE = ("bus_unavailable", "bus_lost", "no_answer", "service_absent")
GOING_DOWN = (f"{LOGIND}.OperationInProgress", *bus.NO_ANSWER)
"""Answers after which the machine may be on its way down."""
RESULTS = {
    "canceled": "another job took its place",
    "timeout": "it did not start or stop within its own time limit",
    "failed": "the unit failed",
    "dependency": "a unit it needs failed",
    "skipped": "systemd skipped it, a condition of the unit does not hold",
}


class Notifier:
    """Messages to the service manager (sd_notify).

    `active` is whether they go anywhere, decided once: NOTIFY_SOCKET is set and systemd-python is installed. Otherwise
    every call does nothing. `watchdog_interval_s` is how often `watchdog` must be called, half the unit's WatchdogSec;
    None when systemd expects nothing from this process.
    """

    def __init__(self, environ: Mapping[str, str] = os.environ) -> None:
        self._send = _notify_function() if environ.get("NOTIFY_SOCKET") else None
        self.active = self._send is not None
        self.watchdog_interval_s = _watchdog_interval(environ) if self.active else None

    def ready(self) -> None:
        """The service has started."""
        self._notify("READY=1")

    def status(self, text: str) -> None:
        """One line shown by `systemctl status`."""
        self._notify("STATUS=" + " ".join(text.split()))

    def watchdog(self) -> None:
        """The service is alive; to be called every `watchdog_interval_s`."""
        self._notify("WATCHDOG=1")

    def stopping(self) -> None:
        """The service has begun to stop."""
        self._notify("STOPPING=1")

    def _notify(self, message: str) -> None:
        if self._send:
            try:
                self._send(message)
            except OSError as error:
                log.warning("systemd could not be notified", message=message, error=str(error))


def _notify_function() -> Callable[[str], Any] | None:
    try:
        from systemd import daemon
    except ImportError:
        log.warning("NOTIFY_SOCKET is set but systemd-python is not installed, systemd will not be notified")
        return None
    notify: Callable[[str], Any] = daemon.notify
    return notify


def _watchdog_interval(environ: Mapping[str, str]) -> float | None:
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        interval = int(environ.get("WATCHDOG_USEC", "")) / 2e6
    except ValueError:
        return None
    return interval if interval > 0 else None


@dataclass(frozen=True)
class UnitState:
    """What systemd says of a unit: `active` (active, activating, failed, inactive, …), `sub` (running, dead, …) and how often it restarted by itself."""

    active: str
    sub: str
    restarts: int


class Units:
    """systemd's units over D-Bus; one connection, made when first needed and again after it was lost.

    Every method raises FailedError: `unit_not_found`, `unit_failed`, `permission` (polkit said no), or
    `systemd_unavailable` (no D-Bus, no systemd, no answer).
    """

    def __init__(self) -> None:
        self._bus: Connection | None = None
        self._connecting = asyncio.Lock()

    async def restart(self, unit: str, *, timeout_s: float = JOB_TIMEOUT_S) -> None:
        """Restart `unit`, or start it; returns when systemd's job is done."""
        await self._job("RestartUnit", "restart", unit, timeout_s)

    async def reload(self, unit: str, *, timeout_s: float = JOB_TIMEOUT_S) -> None:
        """Make `unit` read its configuration again; returns when systemd's job is done."""
        await self._job("ReloadUnit", "reload", unit, timeout_s)

    async def state(self, unit: str) -> UnitState:
        """The state of `unit`."""
        path = (await self._call("LoadUnit", "s", [unit], unit=unit))[0]
        load = await self._property(path, "Unit", "LoadState", unit)
        if load == "not-found":
            raise _not_found(unit)
        active = await self._property(path, "Unit", "ActiveState", unit)
        sub = await self._property(path, "Unit", "SubState", unit)
        restarts = await self._property(path, "Service", "NRestarts", unit) if unit.endswith(".service") else 0
        return UnitState(str(active), str(sub), int(restarts))

    async def close(self) -> None:
        """Close the connection; the next call makes a new one."""
        connection, self._bus = self._bus, None
        if connection:
            await connection.close()

    async def _job(self, method: str, verb: str, unit: str, timeout_s: float) -> None:
        result = None
        connection = await self._connected()
        with connection.signals() as signals:  # from before the job is made: its end may arrive with the reply
            try:
                async with asyncio.timeout(timeout_s):
                    job = (await self._call(method, "ss", [unit, "replace"], unit=unit))[0]
                    while result is None:
                        signal = await signals.next()
                        if signal.member == "JobRemoved" and signal.body[1] == job:
                            result = signal.body[3]
            except TimeoutError:
                raise FailedError(
                    "unit_failed",
                    f"systemd did not finish the {verb} of {unit} within {timeout_s:g} s",
                    f"see `systemctl status {unit}` and `systemctl list-jobs`",
                ) from None
            except BusError:
                raise _unavailable("the connection to D-Bus was lost while waiting for systemd") from None
        if result != "done":
            raise FailedError(
                "unit_failed",
                f"the {verb} of {unit} ended with result {result}: {RESULTS.get(result, 'it was not carried out')}",
                f"see `systemctl status {unit}` and `journalctl -u {unit} -n 50`",
            )

    async def _property(self, path: str, interface: str, name: str, unit: str) -> Any:
        body = await self._call(
            "Get", "ss", [f"{SYSTEMD}.{interface}", name], unit=unit, path=path, interface=f"{bus.BUS}.Properties"
        )
        return bus.plain(body[0])

    async def _call(
        self,
        member: str,
        signature: str,
        body: list[Any],
        *,
        unit: str,
        path: str = MANAGER_PATH,
        interface: str = MANAGER,
    ) -> list[Any]:
        connection = await self._connected()
        try:
            reply = await connection.call(SYSTEMD, path, interface, member, signature, body, timeout_s=REPLY_TIMEOUT_S)
        except BusError as error:
            raise _refusal(error, member, unit) from None
        return reply.body

    async def _connected(self) -> Connection:
        async with self._connecting:
            if self._bus and self._bus.alive:
                return self._bus
            try:
                connection = await bus.connect(REPLY_TIMEOUT_S)
            except BusError as error:
                raise _unavailable(error.message) from None
            try:
                # Without Subscribe systemd sends no JobRemoved, without the match the bus keeps it back.
                await connection.match(f"type='signal',sender='{SYSTEMD}',interface='{MANAGER}',member='JobRemoved'")
                await connection.call(SYSTEMD, MANAGER_PATH, MANAGER, "Subscribe", timeout_s=REPLY_TIMEOUT_S)
            except BusError as error:
                await connection.close()
                raise _refusal(error, "Subscribe", "") from None
            except BaseException:
                await connection.close()
                raise
            self._bus = connection
            return connection


async def reboot(command: Sequence[str] | None = None) -> None:
    """Ask for a reboot of the machine: systemd-logind, or `command` where one is given; returns when asked.

    Whether it comes shows only in the machine going down: no answer, and a command that is killed, may well be its
    beginning. Raises FailedError: `reboot_failed` when it was refused, `systemd_unavailable` when nobody is there to ask.
    """
    log.warning("asking for a reboot of the machine", command=list(command) if command else "systemd-logind")
    await (_reboot_by_command(command) if command else _reboot_by_logind())


async def _reboot_by_command(command: Sequence[str]) -> None:
    try:
        result = await processes.run(command, timeout_s=REBOOT_COMMAND_TIMEOUT_S)
    except OSError as error:
        raise FailedError(
            "reboot_failed", f"the reboot command {command[0]} can't be started: {error.strerror}", "mend jobs.reboot"
        ) from None
    if result.signal is not None and not result.timed_out:
        log.warning("the reboot command was ended, perhaps by the reboot", how=result.describe())
    elif not result.succeeded:
        said = " ".join((result.stderr.text or result.stdout.text).split())[-300:]
        raise FailedError(
            "reboot_failed", f"the reboot command {command[0]}: {result.describe()}: {said}", "mend jobs.reboot"
        )


async def _reboot_by_logind() -> None:
    try:
        connection = await bus.connect(REPLY_TIMEOUT_S)
    except BusError as error:
        raise _no_logind(error.message) from None
    try:
        await connection.call(
            LOGIND,
            "/org/freedesktop/login1",
            f"{LOGIND}.Manager",
            "Reboot",
            "b",
            [False],
            timeout_s=REPLY_TIMEOUT_S,
        )
    except BusError as error:
        if error.code == "service_absent":
            raise _no_logind(f"systemd-logind is not on the D-Bus: {error.words}") from None
        if not error.name:
            log.warning("systemd-logind did not answer", reason=error.message)
        elif error.name in GOING_DOWN:
            log.warning("systemd-logind is already at it", reason=error.words)
        else:
            raise FailedError(
                "reboot_failed",
                f"systemd-logind refused the reboot: {error.words}",
                "put 50-camera-agent.rules into /etc/polkit-1/rules.d, see `systemd-inhibit --list`, or set jobs.reboot",
            ) from None
    finally:
        await connection.close()


def _no_logind(why: str) -> FailedError:
    return FailedError("systemd_unavailable", why, "where there is no systemd, set jobs.reboot to a command")


def _refusal(error: BusError, member: str, unit: str) -> FailedError:
    if error.name in UNKNOWN_UNIT:
        return _not_found(unit)
    if error.code == "permission":
        return FailedError(
            "permission",
            f"systemd refused {member} of {unit or 'its manager'}: {error.words}",
            f"allow it in /etc/polkit-1/rules.d for the agent's user and {unit or 'the unit'}",
        )
    if error.code in UNAVAILABLE:
        return _unavailable(error.message)
    return FailedError(
        "unit_failed", f"systemd refused {member} of {unit}: {error.words}", f"see `systemctl status {unit}`"
    )


def _not_found(unit: str) -> FailedError:
    return FailedError(
        "unit_not_found", f"systemd knows no unit {unit}", "install it, or correct its name in agent.toml"
    )


def _unavailable(why: str) -> FailedError:
    return FailedError(
        "systemd_unavailable", why, "where there is no systemd, configure a restart command instead of a unit"
    )
