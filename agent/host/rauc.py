"""RAUC over D-Bus, any version from 1.3 on: its slots, its marks, what is in a bundle, and installing one.

The end of an installation is the signal Completed that RAUC sent after it took the call; nothing else is believed,
`Operation` least of all: RAUC calls itself idle when it refuses a second installation, while the first goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.errors import FailedError
from agent.host import bus
from agent.host.bus import BUS, BusError, Connection, Signal, Signals, plain

RAUC = "de.pengutronix.rauc"
PATH = "/"
INSTALLER = f"{RAUC}.Installer"
BOOT_LOADER_TIMEOUT_S = 120.0
"""For calls that run the boot loader's tools."""
BUNDLE_TIMEOUT_S = 1200.0
"""For reading a bundle: RAUC hashes all of a plain one before it answers anybody."""
STALL_S = 1800.0
"""Without progress for so long, an installation is given up. RAUC tells nothing while it copies one image."""
JOURNAL_HINT = "see `journalctl -u rauc`"


@dataclass(frozen=True)
class RaucSlot:
    """One of RAUC's slots. `bootname` is empty when it can't be booted, `parent` when it is the first of its group.

    `stamp` is when and how often RAUC says that something was written to it; None where RAUC does not know.
    """

    name: str
    kind: str
    bootname: str
    parent: str
    booted: bool
    stamp: tuple[str, int] | None


@dataclass(frozen=True)
class Bundle:
    """What a bundle says of itself; RAUC has checked its signature."""

    compatible: str
    version: str


@dataclass(frozen=True)
class Situation:
    """What RAUC says without asking the boot loader. `instance` is another one after each start of RAUC."""

    instance: str
    compatible: str
    boot_slot: str
    installing: bool


class Service:
    """RAUC's service, over one connection. Raises FailedError.

    `rauc_unavailable` (no bus, no RAUC, no answer), `rauc_busy` (it is installing), `permission`, `rauc_refused`.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def methods(self) -> frozenset[str]:
        """Names of the methods that this version of RAUC has."""
        try:
            return await self._connection.methods(RAUC, PATH, INSTALLER)
        except BusError as error:
            raise _failed(error) from None

    async def situation(self) -> Situation:
        try:
            operation = await self._connection.get(RAUC, PATH, INSTALLER, "Operation")
            compatible = await self._connection.get(RAUC, PATH, INSTALLER, "Compatible")
            boot_slot = await self._connection.get(RAUC, PATH, INSTALLER, "BootSlot")
        except BusError as error:
            raise _failed(error) from None
        return Situation(
            operation.sender, str(compatible.body[0]), str(boot_slot.body[0]), operation.body[0] == "installing"
        )

    async def slots(self) -> tuple[RaucSlot, ...]:
        """All slots, by name."""
        array = (await self._call("GetSlotStatus", timeout_s=BOOT_LOADER_TIMEOUT_S))[0]
        return tuple(sorted((_slot(name, plain(values)) for name, values in array), key=lambda slot: slot.name))

    async def primary(self) -> str:
        """Name of the slot that the boot loader starts next."""
        return str((await self._call("GetPrimary", timeout_s=BOOT_LOADER_TIMEOUT_S))[0])

    async def mark(self, state: str, slot: str) -> None:
        """Mark a slot `good`, `bad` or `active`, which is what the boot loader starts next."""
        await self._call("Mark", "ss", [state, slot], timeout_s=BOOT_LOADER_TIMEOUT_S)

    async def inspect(self, bundle: Path, methods: frozenset[str]) -> Bundle:
        """What the bundle says of itself. Raises FailedError bundle_refused when RAUC does not accept it."""
        try:
            if "InspectBundle" in methods:
                answer = await self._call("InspectBundle", "sa{sv}", [str(bundle), {}], timeout_s=BUNDLE_TIMEOUT_S)
                update = plain(answer[0]).get("update", {})
                return Bundle(str(update.get("compatible", "")), str(update.get("version", "")))
            compatible, version = await self._call("Info", "s", [str(bundle)], timeout_s=BUNDLE_TIMEOUT_S)
            return Bundle(str(compatible), str(version))
        except FailedError as error:
            if error.code != "rauc_refused":
                raise
            raise FailedError(
                "bundle_refused",
                f"RAUC does not accept the bundle, its signature, format or content: {error.message}",
                f"{JOURNAL_HINT}, and compare `rauc info` with the keyring of system.conf",
            ) from None

    async def install(
        self, bundle: Path, methods: frozenset[str], tell: Callable[[str], None], stall_s: float = STALL_S
    ) -> None:
        """Install a bundle; returns when RAUC has said that it succeeded. RAUC goes on when this is cancelled.

        Raises FailedError: rauc_busy when RAUC is installing already, rauc_died, rauc_stalled, install_failed, with
        RAUC's words.
        """
        with self._connection.signals() as signals:
            await self._listen()
            if "InstallBundle" in methods:
                reply = await self._reply("InstallBundle", "sa{sv}", [str(bundle), {}])
            else:
                reply = await self._reply("Install", "s", [str(bundle)])
            result = await _end(signals, reply.sender, reply.serial, tell, stall_s)
        if result != 0:
            raise FailedError("install_failed", f"RAUC could not install the bundle: {await self._why()}", JOURNAL_HINT)

    async def wait_for_end(self, instance: str, tell: Callable[[str], None], stall_s: float = STALL_S) -> None:
        """Wait until an installation that `instance` of RAUC may be at is over, however it ends."""
        with self._connection.signals() as signals:
            await self._listen()
            situation = await self.situation()
            if situation.instance != instance:
                return
            with contextlib.suppress(_DiedError):
                while await self._busy():
                    await _end(signals, instance, 0, tell, stall_s)

    async def _busy(self) -> bool:
        try:
            await self.primary()
        except FailedError as error:
            if error.code == "rauc_busy":
                return True
            if error.code != "rauc_refused":
                raise
        return False

    async def _why(self) -> str:
        try:
            words = str((await self._connection.get(RAUC, PATH, INSTALLER, "LastError")).body[0])
        except BusError as error:
            words = error.message
        return " ".join(words.split()) or "it does not say why"

    async def _listen(self) -> None:
        try:
            await self._connection.match(f"type='signal',sender='{RAUC}',path='{PATH}'")
            await self._connection.match(
                f"type='signal',sender='{BUS}',interface='{BUS}',member='NameOwnerChanged',arg0='{RAUC}'"
            )
        except BusError as error:
            raise _failed(error) from None

    async def _call(
        self, member: str, signature: str = "", body: list[Any] | None = None, *, timeout_s: float
    ) -> list[Any]:
        return (await self._reply(member, signature, body, timeout_s=timeout_s)).body

    async def _reply(
        self,
        member: str,
        signature: str = "",
        body: list[Any] | None = None,
        *,
        timeout_s: float = BOOT_LOADER_TIMEOUT_S,
    ) -> bus.Reply:
        try:
            return await self._connection.call(
                RAUC, PATH, INSTALLER, member, signature, body or [], timeout_s=timeout_s
            )
        except BusError as error:
            raise _failed(error) from None


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[Service]:
    """RAUC's service over a connection of its own. Raises FailedError rauc_unavailable when there is no bus."""
    try:
        connection = await bus.connect()
    except BusError as error:
        raise _failed(error) from None
    try:
        yield Service(connection)
    finally:
        await connection.close()


def busy() -> FailedError:
    """What it means that RAUC, or another installation of ours, is at it already."""
    return FailedError(
        "rauc_busy", "another installation by RAUC is under way", "wait for its end, then start a new job"
    )


class _DiedError(FailedError):
    """The process of RAUC that was installing is gone."""


async def _end(signals: Signals, instance: str, after: int, tell: Callable[[str], None], stall_s: float) -> int:
    """The result of the first Completed that `instance` sent after its message number `after`."""
    while True:
        try:
            async with asyncio.timeout(stall_s):
                signal = await _of_interest(signals, instance, after)
        except TimeoutError:
            raise FailedError(
                "rauc_stalled",
                f"RAUC made no progress for {stall_s:g} s",
                "look at the disk; a restart of RAUC ends it",
            ) from None
        except BusError as error:
            raise _failed(error) from None
        if signal.member == "NameOwnerChanged":
            raise _DiedError("rauc_died", "RAUC ended in the middle of the installation", JOURNAL_HINT)
        if signal.member == "Completed":
            return int(signal.body[0])
        progress = plain(signal.body[1]).get("Progress")
        if progress:
            tell(f"RAUC: {progress[0]} %, {progress[1]}")


async def _of_interest(signals: Signals, instance: str, after: int) -> Signal:
    while True:
        signal = await signals.next()
        if signal.member == "NameOwnerChanged" and signal.sender == BUS and signal.body[:2] == [RAUC, instance]:
            return signal
        if signal.sender == instance and signal.serial > after:
            progressed = signal.member == "PropertiesChanged" and "Progress" in signal.body[1]
            if progressed or (signal.interface == INSTALLER and signal.member == "Completed"):
                return signal


def _slot(name: str, values: dict[str, Any]) -> RaucSlot:
    written, times = values.get("installed.timestamp"), values.get("installed.count")
    return RaucSlot(
        str(name),
        str(values.get("class", "")),
        str(values.get("bootname", "")),
        str(values.get("parent", "")),
        values.get("state") == "booted",
        (str(written), int(times)) if written and times is not None else None,
    )


def _failed(error: BusError) -> FailedError:
    if error.code == "permission":
        return FailedError(
            "permission",
            f"the D-Bus policy keeps the agent from RAUC: {error.words}",
            "put de.pengutronix.rauc.camera-agent.conf into /etc/dbus-1/system.d",
        )
    if error.code != "call_failed":
        return FailedError("rauc_unavailable", f"RAUC can't be reached: {error.message}", "see `systemctl status rauc`")
    if "already processing a different method" in error.words.lower():
        return busy()
    return FailedError("rauc_refused", f"RAUC: {' '.join(error.words.split())}", JOURNAL_HINT)
