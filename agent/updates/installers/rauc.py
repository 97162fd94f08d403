"""Installer `rauc`: a whole system, written by RAUC to the slot that does not run.

What a slot holds is kept in records of our own, durable before and after each installation, and believed only while
nobody else has written to the slot. Which slot runs and which comes next is asked of the boot loader, through RAUC.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from agent.errors import FailedError, RefusedError
from agent.host import rauc
from agent.host.files import lock
from agent.host.rauc import Bundle, RaucSlot, Service, Situation
from agent.host.threads import to_end
from agent.logs import get_logger
from agent.updates.installers.rauc_records import Book, Known, Records, group_stamps
from agent.updates.manifest import Manifest
from agent.updates.states import Slot
from agent.updates.trust import Installed

log = get_logger("updates")

NEEDED = ({"InstallBundle", "Install"}, {"InspectBundle", "Info"}, {"Mark"}, {"GetSlotStatus"}, {"GetPrimary"})
"""Of each set RAUC must have one method; before the comma is the newer one."""


class Rauc:
    """The two slots of the system. `folder` is where the records of target `name` are kept, for the agent alone.

    An installation without progress for `stall_s` seconds is given up.
    """

    restarts = frozenset({"reboot"})

    def __init__(self, folder: Path, name: str, stall_s: float = rauc.STALL_S) -> None:
        self._records = Records(folder / f"rauc-{name}.json")
        self._lock_file = folder / "rauc.lock"
        self._stall_s = stall_s

    async def check(self, manifest: Manifest) -> None:
        try:
            async with rauc.connected() as service:
                await _check(service, manifest)
        except FailedError as error:
            if error.code != "rauc_busy":  # by the time of installing it may have ended
                raise RefusedError(error.code, error.message, error.hint) from None

    async def probe(self, manifest: Manifest) -> Slot:
        """`active` is what was started, `staged` what was installed to its end and not taken back since."""
        known = await to_end(self._records.read)
        if not known.of(manifest.sha256):
            return "absent"
        async with rauc.connected() as service:
            booted, known = await self._view(service)
        for slot, entry in known.of(manifest.sha256):
            if slot == booted and entry.whole:
                return "active"
            if entry.state in ("installed", "good"):
                return "staged"
            if entry.state == "installing":
                return "partial"
        return "absent"

    async def running(self) -> tuple[str | None, Installed | None]:
        async with rauc.connected() as service:
            booted, known = await self._view(service)
        return booted, known.software(booted)

    async def previous(self) -> tuple[str | None, Installed | None]:
        """The other slot, when it ran well before."""
        async with rauc.connected() as service:
            booted, known = await self._view(service)
        for name, entry in known.slots.items():
            if name != booted and entry.state == "good":
                return name, entry.software
        return None, None

    async def install(
        self,
        artifact: Path,
        manifest: Manifest,
        envelope: Mapping[str, Any],  # noqa: ARG002
        tell: Callable[[str], None],
    ) -> None:
        """Write the bundle to the other slot. When this is cancelled RAUC goes on; `forget`, or `install`, waits for it.

        Raises FailedError: rauc_busy, rauc_unavailable, rauc_died, rauc_stalled, bundle_refused, bundle_differs,
        not_compatible, install_failed, boot_loader_failed, rauc_slots.
        """
        async with self._alone(), rauc.connected() as service:
            methods = await service.methods()
            await self._own_end(service, tell)
            situation = await service.situation()
            if situation.installing:
                raise rauc.busy()
            booted, other = _pair(await service.slots())
            _compare(await service.inspect(artifact.absolute(), methods), situation, manifest)
            await _make_primary(service, booted.name)
            known = await to_end(self._records.read)
            entry = Known("installing", _installed(manifest), {}, situation.instance)
            known = replace(known.having(other.name, entry), boot_slot=situation.boot_slot, booted=booted.name)
            await to_end(self._records.write, known)
            await service.install(artifact.absolute(), methods, tell, self._stall_s)
            await _make_primary(service, booted.name)
            stamps = group_stamps(await service.slots(), other.name)
            await to_end(
                self._records.write, known.having(other.name, replace(entry, state="installed", stamps=stamps))
            )

    async def arm(self, manifest: Manifest) -> None:
        async with rauc.connected() as service:
            _, known = await self._view(service)
            for slot, entry in known.of(manifest.sha256):
                if entry.whole:
                    await service.mark("active", slot)
                    await _make_primary(service, slot)
                    return
        raise FailedError("slot_missing", "no slot holds this version any more", "start the job again")

    async def verify_running(self, manifest: Manifest) -> bool:
        _, installed = await self.running()
        return installed is not None and installed.sha256 == manifest.sha256

    async def why_not_running(self) -> str:
        return "the boot loader has started the other slot"

    async def count_anew(self, manifest: Manifest) -> None:
        """The boot loader's tries are not ours to give again before the version is kept."""

    async def commit(self, manifest: Manifest, previous: str | None) -> None:
        """Mark what runs good. The slot before is kept as one to go back to, also when it came from the factory."""
        async with rauc.connected() as service:
            slots = await service.slots()
            booted, other = _pair(slots)
            known = (await to_end(self._records.read)).believed(slots)
            entry = known.slots.get(booted.name)
            if not entry or not entry.whole or not entry.holds(manifest.sha256):
                raise FailedError(
                    "fell_back", f"{booted.name} runs, which does not hold this version", "start a new job"
                )
            await service.mark("good", "booted")
            await _make_primary(service, booted.name)
            known = known.having(booted.name, replace(entry, state="good"))
            if previous == other.name and other.name not in known.slots:
                known = known.having(other.name, Known("good", None, group_stamps(slots, other.name)))
            await to_end(self._records.write, known)

    async def roll_back(self, previous: str | None) -> None:
        """Start `previous` next, and never again by itself the other slot."""
        async with rauc.connected() as service:
            await self._own_end(service, _silent)
            slots = await service.slots()
            pair = _pair(slots)
            back = next((slot for slot in pair if slot.name == previous), None)
            if back is None:
                raise FailedError(
                    "slot_missing", f"RAUC has no slot {previous}", "compare system.conf with the update before"
                )
            away = pair[1] if back is pair[0] else pair[0]
            await service.mark("active", back.name)
            await _make_primary(service, back.name)
            try:
                await service.mark("bad", away.name)
            except FailedError as error:
                if error.code != "rauc_refused":
                    raise
                log.warning("the slot that was left could not be marked bad", slot=away.name, reason=error.message)
            known = (await to_end(self._records.read)).taken_back(away.name, for_good=back.name)
            await to_end(self._records.write, known)

    async def step_back(self, previous: str) -> None:
        await self.roll_back(previous)

    async def stay(self) -> None:
        """The boot loader stops counting its starts."""
        async with rauc.connected() as service:
            await service.mark("good", "booted")

    async def clean_up(self, keep: frozenset[str]) -> None:
        """Drop the records of other slots; what is in the slots stays."""
        async with rauc.connected() as service:
            booted, _ = await self._view(service)
        known = await to_end(self._records.read)
        await to_end(self._records.write, known.only(keep | {booted}))

    async def forget(self, manifest: Manifest) -> None:
        """Drop the record, and see to it that what runs is started next: RAUC may have gone on, and activated it."""
        known = await to_end(self._records.read)
        if not known.of(manifest.sha256):
            return
        async with rauc.connected() as service:
            await self._own_end(service, _silent)
            booted, _ = _pair(await service.slots())
            if booted.name in {slot for slot, entry in known.of(manifest.sha256) if entry.whole}:
                return
            await _make_primary(service, booted.name)
            dropped = {slot for slot, entry in known.of(manifest.sha256) if entry.state != "good"}
            await to_end(self._records.write, known.only(known.slots.keys() - dropped))

    def needs(self, manifest: Manifest) -> Mapping[Path, int]:  # noqa: ARG002
        """Nothing: RAUC writes to slots, which have their size."""
        return {}

    async def _view(self, service: Service) -> tuple[str, Book]:
        """The slot that runs and the records that can be believed, also while RAUC works at an installation of ours."""
        known = await to_end(self._records.read)
        try:
            slots = await service.slots()
        except FailedError as error:
            if (
                error.code != "rauc_busy"
                or (await service.situation()).boot_slot != known.boot_slot
                or not known.booted
            ):
                raise
            return known.booted, known
        booted, _ = _pair(slots)
        return booted.name, known.believed(slots)

    async def _own_end(self, service: Service, tell: Callable[[str], None]) -> None:
        """Wait for the end of an installation that an earlier process of ours began and RAUC may still be at."""
        known = await to_end(self._records.read)
        for entry in known.slots.values():
            if entry.state == "installing" and entry.instance:
                await service.wait_for_end(entry.instance, tell, self._stall_s)

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        held: list[IO[bytes] | None] = []
        try:
            await to_end(lambda: held.append(lock(self._lock_file)))
            if held == [None]:
                raise rauc.busy()
            yield
        finally:
            for file in held:
                if file:
                    file.close()


async def _check(service: Service, manifest: Manifest) -> None:
    methods = await service.methods()
    missing = [" or ".join(sorted(any_of)) for any_of in NEEDED if not any_of & methods]
    if missing:
        raise FailedError(
            "rauc_too_old", f"RAUC's D-Bus interface lacks {', '.join(missing)}", "install RAUC 1.8 or later"
        )
    situation = await service.situation()
    if not situation.compatible:
        raise FailedError("rauc_not_set_up", "RAUC says no compatible", "set `compatible` in /etc/rauc/system.conf")
    if manifest.compatible and situation.compatible not in manifest.compatible:
        raise FailedError(
            "not_compatible",
            f"it is for {', '.join(manifest.compatible)}, RAUC's compatible is {situation.compatible}",
            "name the compatible of system.conf in the manifest, or sign the right bundle",
        )
    _pair(await service.slots())
    try:
        await service.primary()
    except FailedError as error:
        if error.code == "rauc_refused":
            raise FailedError(
                "boot_loader_failed", f"the boot loader can't be asked: {error.message}", error.hint
            ) from None
        raise


def _compare(bundle: Bundle, situation: Situation, manifest: Manifest) -> None:
    """That the bundle is the one which the manifest describes, for this camera."""
    if bundle.version != manifest.version:
        raise FailedError(
            "bundle_differs",
            f"the bundle is version {bundle.version or '(none)'}, its manifest says {manifest.version}",
            "sign a manifest with the version in manifest.raucm",
        )
    if bundle.compatible != situation.compatible or (
        manifest.compatible and bundle.compatible not in manifest.compatible
    ):
        wanted = ", ".join(manifest.compatible) or situation.compatible
        raise FailedError(
            "not_compatible",
            f"the bundle is for {bundle.compatible}, RAUC's compatible is {situation.compatible}, the manifest's {wanted}",
            "build the bundle for this camera",
        )


def _pair(slots: tuple[RaucSlot, ...]) -> tuple[RaucSlot, RaucSlot]:
    """The bootable slot that runs, and the other one of its kind."""
    hint = "define two slots of one class with a bootname in /etc/rauc/system.conf, and start from one of them"
    booted = [slot for slot in slots if slot.booted and slot.bootname and not slot.parent]
    if len(booted) != 1:
        raise FailedError("rauc_slots", "RAUC does not know from which of its slots the camera was started", hint)
    others = [slot for slot in slots if slot.kind == booted[0].kind and slot.bootname and not slot.parent]
    others.remove(booted[0])
    if len(others) != 1:
        raise FailedError("rauc_slots", f"RAUC has {len(others)} bootable slots beside {booted[0].name}", hint)
    return booted[0], others[0]


async def _make_primary(service: Service, slot: str) -> None:
    """Have the boot loader start `slot` next, and see that it will."""
    if await _primary(service) == slot:
        return
    await service.mark("active", slot)
    primary = await _primary(service)
    if primary != slot:
        raise FailedError(
            "boot_loader_failed",
            f"the boot loader would start {primary or 'nothing'} next, not {slot}",
            "check the boot loader's settings that RAUC changes, `rauc status`",
        )


async def _primary(service: Service) -> str:
    """Empty when the boot loader has none."""
    try:
        return await service.primary()
    except FailedError as error:
        if error.code != "rauc_refused":
            raise
        return ""


def _installed(manifest: Manifest) -> Installed:
    return Installed(manifest.name, manifest.version, manifest.sha256, manifest.security_counter)


def _silent(_: str) -> None:
    pass
