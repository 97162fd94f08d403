"""systemd, when it is there: readiness and watchdog messages to it, units restarted, reloaded and looked at, and reboots.

Owner of systemd-python's `daemon` and of dbus-fast. A restart or reload returns only when systemd says the job is done.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent.errors import FailedError
from agent.host import processes
from agent.logs import get_logger

if TYPE_CHECKING:
    from dbus_fast import Message
    from dbus_fast.aio import MessageBus

log = get_logger("systemd")

SYSTEMD = "org.freedesktop.systemd1"
MANAGER_PATH = "/org/freedesktop/systemd1"
MANAGER = f"{SYSTEMD}.Manager"
LOGIND = "org.freedesktop.login1"
BUS = "org.freedesktop.DBus"
JOB_TIMEOUT_S = 120.0
REPLY_TIMEOUT_S = 25.0
REBOOT_COMMAND_TIMEOUT_S = 60.0

DENIED = (f"{BUS}.Error.AccessDenied", f"{BUS}.Error.InteractiveAuthorizationRequired", f"{BUS}.Error.AuthFailed")
UNKNOWN_UNIT = (f"{SYSTEMD}.NoSuchUnit",)
ABSENT = (
    f"{BUS}.Error.ServiceUnknown",
    f"{BUS}.Error.NameHasNoOwner",
    f"{BUS}.Error.NoReply",
    f"{BUS}.Error.Disconnected",
    f"{BUS}.Error.TimedOut",
)
GOING_DOWN = (
    f"{LOGIND}.OperationInProgress",
    *(f"{BUS}.Error.{name}" for name in ("NoReply", "Disconnected", "TimedOut")),
)
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
        self._bus: MessageBus | None = None
        self._lost: asyncio.Task[None] | None = None
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
        bus, lost = self._bus, self._lost
        self._bus = self._lost = None
        if bus and lost:
            bus.disconnect()
            await asyncio.wait({lost})

    async def _job(self, method: str, verb: str, unit: str, timeout_s: float) -> None:
        result = None
        async with self._job_results() as (finished, changed):
            try:
                async with asyncio.timeout(timeout_s):
                    job = (await self._call(method, "ss", [unit, "replace"], unit=unit))[0]
                    while (result := finished.get(job)) is None:
                        await self._next_change(changed)
            except TimeoutError:
                raise FailedError(
                    "unit_failed",
                    f"systemd did not finish the {verb} of {unit} within {timeout_s:g} s",
                    f"see `systemctl status {unit}` and `systemctl list-jobs`",
                ) from None
        if result != "done":
            raise FailedError(
                "unit_failed",
                f"the {verb} of {unit} ended with result {result}: {RESULTS.get(result, 'it was not carried out')}",
                f"see `systemctl status {unit}` and `journalctl -u {unit} -n 50`",
            )

    @contextlib.asynccontextmanager
    async def _job_results(self) -> AsyncIterator[tuple[dict[str, str], asyncio.Event]]:
        """Results of jobs by their path, kept from before the job is made: the signal may arrive with the reply."""
        from dbus_fast import MessageType

        bus = await self._connected()
        finished: dict[str, str] = {}
        changed = asyncio.Event()

        def listen(message: Message) -> None:
            if message.message_type is MessageType.SIGNAL and message.member == "JobRemoved":
                finished[message.body[1]] = message.body[3]
                changed.set()

        bus.add_message_handler(listen)
        try:
            yield finished, changed
        finally:
            bus.remove_message_handler(listen)

    async def _next_change(self, changed: asyncio.Event) -> None:
        lost = self._lost
        if lost is None or lost.done():
            raise _unavailable("the connection to D-Bus was lost while waiting for systemd")
        waiting = asyncio.create_task(changed.wait())
        try:
            await asyncio.wait({waiting, lost}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        changed.clear()

    async def _property(self, path: str, interface: str, name: str, unit: str) -> Any:
        body = await self._call(
            "Get", "ss", [f"{SYSTEMD}.{interface}", name], unit=unit, path=path, interface=f"{BUS}.Properties"
        )
        return body[0].value

    async def _call(
        self,
        member: str,
        signature: str,
        body: list[Any],
        *,
        unit: str = "",
        path: str = MANAGER_PATH,
        interface: str = MANAGER,
        destination: str = SYSTEMD,
    ) -> list[Any]:
        bus = await self._connected()
        return await _call_on(bus, destination, path, interface, member, signature, body, unit)

    async def _connected(self) -> MessageBus:
        async with self._connecting:
            if self._bus and self._lost and not self._lost.done():
                return self._bus
            from dbus_fast import BusType
            from dbus_fast.aio import MessageBus

            try:
                async with asyncio.timeout(REPLY_TIMEOUT_S):
                    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
            except TimeoutError:
                raise _unavailable(f"the system's D-Bus did not answer within {REPLY_TIMEOUT_S:g} s") from None
            except Exception as error:  # noqa: BLE001  dbus-fast raises OSError, AuthError and its own address errors
                raise _unavailable(f"the system's D-Bus can't be reached: {error}") from None
            lost = asyncio.create_task(_wait_until_lost(bus))
            try:
                # Without Subscribe systemd sends no JobRemoved, without the match the bus keeps it back.
                rule = f"type='signal',sender='{SYSTEMD}',interface='{MANAGER}',member='JobRemoved'"
                await _call_on(bus, BUS, "/org/freedesktop/DBus", BUS, "AddMatch", "s", [rule], "")
                await _call_on(bus, SYSTEMD, MANAGER_PATH, MANAGER, "Subscribe", "", [], "")
            except BaseException:
                bus.disconnect()
                await asyncio.wait({lost})
                raise
            self._bus, self._lost = bus, lost
            return bus


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
    from dbus_fast import BusType, Message, MessageType
    from dbus_fast.aio import MessageBus

    request = Message(
        destination=LOGIND,
        path="/org/freedesktop/login1",
        interface=f"{LOGIND}.Manager",
        member="Reboot",
        signature="b",
        body=[False],
    )
    try:
        async with asyncio.timeout(REPLY_TIMEOUT_S):
            bus = await MessageBus(bus_type=BusType.SYSTEM).connect()
    except Exception as error:  # noqa: BLE001  dbus-fast raises OSError, AuthError and its own address errors
        raise _no_logind(f"the system's D-Bus can't be reached: {error or type(error).__name__}") from None
    reply = None
    try:
        async with asyncio.timeout(REPLY_TIMEOUT_S):
            reply = await bus.call(request)
    except Exception as error:  # noqa: BLE001  dbus-fast raises OSError, EOFError and errors of its own when the connection ends
        log.warning("systemd-logind did not answer", reason=str(error) or type(error).__name__)
    finally:
        bus.disconnect()
        await _wait_until_lost(bus)
    if reply is None or reply.message_type is not MessageType.ERROR:
        return
    name, words = reply.error_name or "", str(reply.body[0]) if reply.body else ""
    if name in (f"{BUS}.Error.ServiceUnknown", f"{BUS}.Error.NameHasNoOwner") or name.startswith(f"{BUS}.Error.Spawn."):
        raise _no_logind(f"systemd-logind is not on the D-Bus: {words}")
    if name in GOING_DOWN:
        log.warning("systemd-logind is already at it", reason=words)
        return
    raise FailedError(
        "reboot_failed",
        f"systemd-logind refused the reboot: {words or name}",
        "put 50-camera-agent.rules into /etc/polkit-1/rules.d, see `systemd-inhibit --list`, or set jobs.reboot",
    )


def _no_logind(why: str) -> FailedError:
    return FailedError("systemd_unavailable", why, "where there is no systemd, set jobs.reboot to a command")


async def _call_on(
    bus: MessageBus,
    destination: str,
    path: str,
    interface: str,
    member: str,
    signature: str,
    body: list[Any],
    unit: str,
) -> list[Any]:
    from dbus_fast import Message, MessageType

    message = Message(
        destination=destination, path=path, interface=interface, member=member, signature=signature, body=body
    )
    try:
        async with asyncio.timeout(REPLY_TIMEOUT_S):
            reply = await bus.call(message)
    except TimeoutError:
        raise _unavailable(f"systemd did not answer {member} within {REPLY_TIMEOUT_S:g} s") from None
    except Exception as error:  # noqa: BLE001  dbus-fast raises OSError, EOFError and errors of its own when the connection ends
        raise _unavailable(f"the connection to D-Bus was lost: {error}") from None
    if reply is None:
        raise _unavailable("the connection to D-Bus was closed")
    if reply.message_type is MessageType.ERROR:
        raise _refusal(reply, member, unit)
    return list(reply.body)


def _refusal(reply: Message, member: str, unit: str) -> FailedError:
    name = reply.error_name or ""
    words = str(reply.body[0]) if reply.body else name
    if name in UNKNOWN_UNIT:
        return _not_found(unit)
    if name in DENIED:
        return FailedError(
            "permission",
            f"systemd refused {member} of {unit or 'its manager'}: {words}",
            f"allow it in /etc/polkit-1/rules.d for the agent's user and {unit or 'the unit'}",
        )
    if name in ABSENT or name.startswith(f"{BUS}.Error.Spawn."):
        return _unavailable(f"systemd is not on the D-Bus: {words}")
    return FailedError("unit_failed", f"systemd refused {member} of {unit}: {words}", f"see `systemctl status {unit}`")


def _not_found(unit: str) -> FailedError:
    return FailedError(
        "unit_not_found", f"systemd knows no unit {unit}", "install it, or correct its name in agent.toml"
    )


def _unavailable(why: str) -> FailedError:
    return FailedError(
        "systemd_unavailable", why, "where there is no systemd, configure a restart command instead of a unit"
    )


async def _wait_until_lost(bus: MessageBus) -> None:
    with contextlib.suppress(Exception):
        await bus.wait_for_disconnect()  # type: ignore[no-untyped-call]  # dbus-fast does not annotate it
