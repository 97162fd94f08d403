"""Installer `rauc` with a real RAUC on a real bus: whole updates, RAUC or the agent killed on the way, and what must be refused."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated

import pytest
from dbus_fast import BusType, Message, PropertyAccess, Variant
from dbus_fast.aio import MessageBus
from dbus_fast.annotations import DBusDict, DBusInt32, DBusSignature, DBusStr
from dbus_fast.service import ServiceInterface, dbus_method, dbus_property, dbus_signal

from agent.errors import FailedError, RefusedError
from agent.host import bus as bus_module
from agent.host import rauc as rauc_client
from agent.updates.installers import rauc_records
from agent.updates.installers.rauc import Rauc
from agent.updates.manifest import Manifest
from tests import rauc_service
from tests.places import own_folder
from tests.rauc_service import Camera, Signer, describe

WHY_NOT = rauc_service.missing()
pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "RAUC is here")

SMALL, BIG = 300_000, 24 * 2**20
LIMIT_S = 60.0


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer(tmp_path_factory.mktemp("signer") / "keys")


class Release:
    """A bundle, the image in it, and its manifest."""

    def __init__(self, folder: Path, signer: Signer, version: str, size: int = SMALL, **changes: str) -> None:
        self.image = os.urandom(size)
        self.bundle = signer.bundle(folder / f"{version}-{size}.raucb", version, self.image, **changes)
        self.manifest = describe(self.bundle, version)


@pytest.fixture(scope="module")
def two(signer: Signer, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return Release(tmp_path_factory.mktemp("two"), signer, "2.0")


@pytest.fixture(scope="module")
def three(signer: Signer, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return Release(tmp_path_factory.mktemp("three"), signer, "3.0")


@pytest.fixture(scope="module")
def big(signer: Signer, tmp_path_factory: pytest.TempPathFactory) -> Release:
    return Release(tmp_path_factory.mktemp("big"), signer, "2.0", BIG)


@pytest.fixture
def dbus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/bus.sock")
    with rauc_service.bus(tmp_path) as daemon:
        yield daemon


@pytest.fixture
def camera(dbus: subprocess.Popen[bytes], tmp_path: Path, signer: Signer) -> Iterator[Camera]:
    with running_camera(tmp_path, signer) as camera:
        yield camera


@contextmanager
def running_camera(bus_folder: Path, signer: Signer, name: str = "camera", **settings: bool | int) -> Iterator[Camera]:
    camera = Camera(bus_folder, name, signer, **settings)
    camera.start()
    try:
        yield camera
    finally:
        camera.let_go()
        camera.stop()


def silent(_: str) -> None:
    pass


def installer_of(camera: Camera, **settings: float) -> Rauc:
    return Rauc(camera.folder / "state", "system", **settings)


async def install(camera: Camera, release: Release) -> None:
    await installer_of(camera).install(release.bundle, release.manifest, {}, silent)


async def bring_to(camera: Camera, release: Release) -> None:
    """A whole update by a new process: as far as it is not done."""
    installer = installer_of(camera)
    if await installer.probe(release.manifest) in ("absent", "partial"):
        await install(camera, release)
    await installer.arm(release.manifest)
    await asyncio.to_thread(camera.reboot)
    assert await installer.verify_running(release.manifest)


async def held(camera: Camera) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not camera.held:
            await asyncio.sleep(0.01)


# ---- whole updates


@pytest.mark.parametrize("activate", [True, False], ids=["RAUC activates", "RAUC does not activate"])
async def test_updates_from_slot_to_slot(dbus, tmp_path, signer, two, three, activate: bool) -> None:
    with running_camera(tmp_path, signer, activate=activate) as camera:
        installer = installer_of(camera)
        assert await installer.running() == ("rootfs.0", None)
        assert await installer.previous() == (None, None)
        for release, slot, other in ((two, "B", "A"), (three, "A", "B")):
            manifest, told = release.manifest, []
            before, _ = await installer.running()
            await installer.check(manifest)
            assert await installer.probe(manifest) == "absent"
            for _ in range(2):
                await installer.install(release.bundle, manifest, {}, told.append)
                assert camera.holds(slot, release.image)
                assert camera.boot()["PRIMARY"] == other, "a cut before it is armed must start what is proven"
                assert await installer.probe(manifest) == "staged"
                assert not await installer.verify_running(manifest)
            assert any("Copying image" in words for words in told)
            for _ in range(2):
                await installer.arm(manifest)
                assert camera.boot()["PRIMARY"] == slot
                assert await installer.probe(manifest) == "staged"
            assert await asyncio.to_thread(camera.reboot) == slot
            assert await installer.probe(manifest) == "active"
            assert await installer.verify_running(manifest)
            for _ in range(2):
                await installer.commit(manifest, before)
            assert camera.boot() == {"PRIMARY": slot, f"STATE_{slot}": "good", "CURRENT": slot} | {
                f"STATE_{other}": camera.boot()[f"STATE_{other}"]
            }
            name, installed = await installer.running()
            assert (name, installed.version) == (rauc_service.SLOTS[slot], manifest.version)
        name, installed = await installer.previous()
        assert (name, installed.sha256) == ("rootfs.1", two.manifest.sha256)
        assert await installer.probe(two.manifest) == "staged"


async def test_what_came_from_the_factory_can_be_gone_back_to_once_it_was_left(camera, two) -> None:
    installer = installer_of(camera)
    await bring_to(camera, two)
    assert await installer.previous() == (None, None)
    await installer.commit(two.manifest, "rootfs.0")
    assert await installer.previous() == ("rootfs.0", None)


async def test_going_back_after_a_start_into_a_bad_slot(camera, two) -> None:
    installer = installer_of(camera)
    await bring_to(camera, two)
    for _ in range(2):
        await installer.roll_back("rootfs.0")
        assert (camera.boot()["PRIMARY"], camera.boot()["STATE_B"]) == ("A", "bad")
    assert await installer.running() == ("rootfs.1", (await installer.running())[1])
    assert await asyncio.to_thread(camera.reboot) == "A"
    await installer.roll_back("rootfs.0")
    await installer.clean_up(frozenset({"rootfs.0"}))
    assert await installer.running() == ("rootfs.0", None)
    assert await installer.previous() == (None, None)
    assert await installer.probe(two.manifest) == "absent", "what was taken back is written anew, not started again"
    with pytest.raises(FailedError) as error:
        await installer.arm(two.manifest)
    assert error.value.code == "slot_missing"
    await bring_to(camera, two)
    await installer.commit(two.manifest, "rootfs.0")


async def test_going_back_by_hand_and_returning(camera, two) -> None:
    installer = installer_of(camera)
    await bring_to(camera, two)
    await installer.commit(two.manifest, "rootfs.0")
    await installer.roll_back("rootfs.0")
    assert await asyncio.to_thread(camera.reboot) == "A"
    assert await installer.previous() == (None, None)
    await installer.roll_back("rootfs.1")
    assert await asyncio.to_thread(camera.reboot) == "B"
    assert (await installer.running())[1].version == "2.0"
    with pytest.raises(FailedError) as error:
        await installer.roll_back("rootfs.7")
    assert error.value.code == "slot_missing"


async def test_the_record_goes_back_before_what_a_broken_boot_loader_did_not_do(camera, two) -> None:
    installer = installer_of(camera)
    await install(camera, two)
    (camera.folder / "boot.broken").touch()
    with pytest.raises(RefusedError) as refused:
        await installer.check(two.manifest)
    assert refused.value.code == "boot_loader_failed"
    for act in (installer.arm(two.manifest), installer.roll_back("rootfs.0")):
        with pytest.raises(FailedError) as error:
            await act
        assert error.value.code == "rauc_refused"
    assert camera.boot()["PRIMARY"] == "A"
    (camera.folder / "boot.broken").unlink()
    await installer.arm(two.manifest)


async def test_a_boot_loader_that_forgets_is_found_out(camera, two) -> None:
    await install(camera, two)
    script = camera.folder / "boot-loader"
    script.write_text(script.read_text().replace("set-primary) PRIMARY=$2;", "set-primary) "))
    with pytest.raises(FailedError, match=r"would start rootfs.0 next, not rootfs.1") as error:
        await installer_of(camera).arm(two.manifest)
    assert error.value.code == "boot_loader_failed"


# ---- somebody else


async def test_a_second_caller_does_not_end_our_installation(camera, two) -> None:
    """RAUC refuses the second, calls itself idle, and goes on with ours; a third of our own is refused here."""
    camera.hold_back()
    await asyncio.to_thread(camera.reboot)
    ours = asyncio.create_task(install(camera, two))
    await held(camera)
    second = await asyncio.to_thread(camera.client, "install", str(two.bundle))
    assert second.returncode != 0
    assert b"Already processing" in second.stderr
    async with bus_module.connected() as connection:
        operation = await connection.get("de.pengutronix.rauc", "/", "de.pengutronix.rauc.Installer", "Operation")
    assert operation.body == ["idle"], "the trap is gone"
    with pytest.raises(FailedError) as error:
        async with asyncio.timeout(LIMIT_S):
            await install(camera, two)
    assert error.value.code == "rauc_busy"
    assert not ours.done()
    assert await installer_of(camera).running() == ("rootfs.0", None)
    assert await installer_of(camera).probe(two.manifest) == "partial"
    camera.let_go()
    await ours
    assert await installer_of(camera).probe(two.manifest) == "staged"
    assert camera.holds("B", two.image)


@pytest.mark.parametrize("disguised", [False, True])
async def test_an_installation_of_somebody_else_is_left_alone(camera, two, three, disguised: bool) -> None:
    """Also when RAUC calls itself idle in the middle of it."""
    camera.hold_back()
    await asyncio.to_thread(camera.reboot)
    foreign = asyncio.create_task(asyncio.to_thread(camera.client, "install", str(three.bundle)))
    await held(camera)
    if disguised:
        await asyncio.to_thread(camera.client, "install", str(three.bundle))
    installer = installer_of(camera)
    await installer.check(two.manifest)
    for act in (install(camera, two), installer.running(), installer.roll_back("rootfs.0")):
        with pytest.raises(FailedError) as error:
            await act
        assert error.value.code == "rauc_busy"
    camera.let_go()
    assert (await foreign).returncode == 0
    await install(camera, two)
    assert camera.holds("B", two.image)
    assert camera.boot()["PRIMARY"] == "A", "the other one has activated its slot"


async def test_a_slot_that_somebody_else_wrote_to_is_not_ours_any_more(camera, two, three) -> None:
    installer = installer_of(camera)
    await install(camera, two)
    assert (await asyncio.to_thread(camera.client, "install", str(three.bundle))).returncode == 0
    assert await installer.probe(two.manifest) == "absent"
    with pytest.raises(FailedError) as error:
        await installer.arm(two.manifest)
    assert error.value.code == "slot_missing"
    assert await asyncio.to_thread(camera.reboot) == "B"
    assert await installer.running() == ("rootfs.1", None)
    with pytest.raises(FailedError) as error:
        await installer.commit(two.manifest, "rootfs.0")
    assert error.value.code == "fell_back"


async def test_a_lost_status_file_of_rauc_changes_nothing(camera, two) -> None:
    await install(camera, two)
    (camera.folder / "rauc.status").unlink()
    await asyncio.to_thread(camera.reboot)
    assert await installer_of(camera).probe(two.manifest) == "staged"


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b'{"schema": 2}', b'{"schema": 1, "slots": {"rootfs.1": {}}, "boot_slot": "", "booted": ""}'],
)
async def test_a_record_that_cant_be_read_means_that_nothing_is_known(camera, two, damage: bytes) -> None:
    await install(camera, two)
    record = camera.folder / "state/rauc-system.json"
    await asyncio.to_thread(record.write_bytes, damage)
    installer = installer_of(camera)
    assert await installer.probe(two.manifest) == "absent"
    assert record.with_name("rauc-system.json.unreadable").read_bytes() == damage
    assert await installer.running() == ("rootfs.0", None)
    await bring_to(camera, two)


# ---- RAUC does not end


async def test_cancelled_and_forgotten(camera, two) -> None:
    """RAUC can't be stopped over D-Bus; when it is done, and has activated the slot, that is taken back."""
    camera.hold_back("post-install")
    await asyncio.to_thread(camera.reboot)
    ours = asyncio.create_task(install(camera, two))
    await held(camera)
    ours.cancel()
    await asyncio.wait({ours})
    assert camera.boot()["PRIMARY"] == "B", "RAUC activates before its post-install handler"
    forgetting = asyncio.create_task(installer_of(camera).forget(two.manifest))
    await asyncio.sleep(0)
    camera.let_go()
    await forgetting
    assert camera.boot()["PRIMARY"] == "A"
    assert await installer_of(camera).probe(two.manifest) == "absent"


async def test_forget_keeps_what_runs_and_what_ran_well(camera, two) -> None:
    installer = installer_of(camera)
    await installer.forget(two.manifest)
    await install(camera, two)
    await installer.arm(two.manifest)
    await installer.forget(two.manifest)
    assert (await installer.probe(two.manifest), camera.boot()["PRIMARY"]) == ("absent", "A")
    await bring_to(camera, two)
    await installer.forget(two.manifest)
    assert await installer.probe(two.manifest) == "active"
    await installer.commit(two.manifest, "rootfs.0")
    await installer.clean_up(frozenset())
    assert (await installer.running())[1].version == "2.0"
    assert await installer.previous() == (None, None)


async def test_no_progress_is_given_up_and_waited_for_the_next_time(camera, two) -> None:
    camera.hold_back()
    await asyncio.to_thread(camera.reboot)
    with pytest.raises(FailedError) as error:
        await installer_of(camera, stall_s=0.3).install(two.bundle, two.manifest, {}, silent)
    assert error.value.code == "rauc_stalled"
    assert await installer_of(camera).probe(two.manifest) == "partial"
    again = asyncio.create_task(install(camera, two))
    await asyncio.sleep(0)
    camera.let_go()
    await again
    assert await installer_of(camera).probe(two.manifest) == "staged"
    assert camera.holds("B", two.image)


async def test_rauc_dies(camera, two) -> None:
    camera.hold_back()
    await asyncio.to_thread(camera.reboot)
    ours = asyncio.create_task(install(camera, two))
    await held(camera)
    await asyncio.to_thread(camera.stop)
    with pytest.raises(FailedError) as error:
        async with asyncio.timeout(LIMIT_S):
            await ours
    assert error.value.code == "rauc_died"
    camera.let_go()
    await asyncio.to_thread(camera.start)
    assert await installer_of(camera).probe(two.manifest) == "partial"
    await bring_to(camera, two)


async def test_the_bus_is_lost(tmp_path, signer, two, monkeypatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/bus.sock")
    with rauc_service.bus(tmp_path) as daemon, running_camera(tmp_path, signer) as camera:
        camera.hold_back()
        await asyncio.to_thread(camera.reboot)
        ours = asyncio.create_task(install(camera, two))
        await held(camera)
        daemon.kill()
        with pytest.raises(FailedError) as error:
            await ours
        assert error.value.code == "rauc_unavailable"
        for act in (installer_of(camera).running(), installer_of(camera).probe(two.manifest)):
            with pytest.raises(FailedError) as error:
                await act
            assert error.value.code == "rauc_unavailable"
        camera.let_go()
        await asyncio.to_thread(camera.stop)
        with rauc_service.bus(tmp_path):
            await asyncio.to_thread(camera.start)
            assert await installer_of(camera).probe(two.manifest) == "partial"
            await bring_to(camera, two)


async def test_no_bus_and_no_rauc(tmp_path, two, monkeypatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/bus.sock")
    installer = Rauc(tmp_path / "state", "system")
    with pytest.raises(RefusedError) as error:
        await installer.check(two.manifest)
    assert error.value.code == "rauc_unavailable"
    with rauc_service.bus(tmp_path):
        with pytest.raises(RefusedError, match="not on the D-Bus") as error:
            await installer.check(two.manifest)
        assert (error.value.code, error.value.hint) == ("rauc_unavailable", "see `systemctl status rauc`")
        with pytest.raises(FailedError) as failed:
            await installer.running()
        assert failed.value.code == "rauc_unavailable"
    assert await installer.probe(two.manifest) == "absent"


# ---- bundles that must not be installed


async def refused(camera: Camera, bundle: Path, manifest: Manifest) -> FailedError:
    """How the bundle is refused; the slot stays as it was."""
    marks = camera.marks()
    with pytest.raises(FailedError) as error:
        await installer_of(camera).install(bundle, manifest, {}, silent)
    assert camera.holds("B", b"factory")
    assert camera.boot()["PRIMARY"] == "A"
    assert camera.marks() == marks
    assert await installer_of(camera).probe(manifest) == "absent"
    return error.value


async def test_tampered_bundles(camera, two, tmp_path, request) -> None:
    data = await asyncio.to_thread(two.bundle.read_bytes)
    signature = len(data) - 8 - int.from_bytes(data[-8:], "big")
    every = 40 if request.config.getoption("--exhaustive", default=False) else 5
    places = {0, 40, 95, 96, signature - 1, signature, signature + 30, len(data) - 9, len(data) - 1, len(data) - 8}
    places |= {signature * i // every for i in range(every)}
    places |= {signature + (len(data) - 8 - signature) * i // every for i in range(every)}
    path = tmp_path / "tampered"
    accepted = []
    for place in sorted(places):
        flipped = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        await asyncio.to_thread(path.write_bytes, flipped)
        error = await refused(camera, path, two.manifest)
        if error.code != "bundle_refused":
            accepted.append((place, error.code))
    await asyncio.to_thread(path.write_bytes, data[:-1])
    assert (await refused(camera, path, two.manifest)).code == "bundle_refused"
    assert (await refused(camera, tmp_path / "missing", two.manifest)).code == "bundle_refused"
    assert accepted == []
    print(f"{len(places)} flipped bits of a bundle tried")


async def test_bundles_of_others(camera, two, tmp_path) -> None:
    stranger = Release(tmp_path, Signer(tmp_path / "strangers"), "2.0", 10_000)
    assert (await refused(camera, stranger.bundle, stranger.manifest)).code == "bundle_refused"
    other = Release(tmp_path, camera.signer, "2.1", 10_000, compatible="another-camera")
    error = await refused(camera, other.bundle, other.manifest)
    assert (error.code, "another-camera" in error.message) == ("not_compatible", True)
    error = await refused(camera, two.bundle, describe(two.bundle, "2.1"))
    assert (error.code, "2.0" in error.message, "2.1" in error.message) == ("bundle_differs", True, True)


async def test_the_reason_of_a_failure_is_raucs(camera, tmp_path) -> None:
    large = Release(tmp_path, camera.signer, "4.0", camera.slot_bytes + 4096)
    (camera.folder / "B.img").unlink()
    (camera.folder / "B.img").mkdir()
    with pytest.raises(FailedError, match=r"B\.img") as error:
        await install(camera, large)
    assert error.value.code == "install_failed"
    assert await installer_of(camera).probe(large.manifest) == "partial"
    assert camera.boot()["PRIMARY"] == "A"


async def test_what_check_refuses(camera, two) -> None:
    installer = installer_of(camera)
    await installer.check(two.manifest.model_copy(update={"compatible": ["x", rauc_service.COMPATIBLE]}))
    with pytest.raises(RefusedError, match="test-camera") as error:
        await installer.check(two.manifest.model_copy(update={"compatible": ["x"]}))
    assert error.value.code == "not_compatible"
    camera.set_up(extra=f"[slot.rootfs.2]\ndevice={camera.folder}/A.img\ntype=raw\nbootname=C\n")
    await asyncio.to_thread(camera.reboot)
    with pytest.raises(RefusedError, match="2 bootable slots beside") as error:
        await installer.check(two.manifest)
    camera.set_boot(**camera.boot() | {"CURRENT": "_external_"})
    camera.stop()
    await asyncio.to_thread(camera.start)
    with pytest.raises(RefusedError, match="from which of its slots") as error:
        await installer.check(two.manifest)
    assert error.value.code == "rauc_slots"
    assert installer.needs(two.manifest) == {}


# ---- kills


async def test_rauc_is_killed_at_any_time(dbus, tmp_path, signer, big, request) -> None:
    """Spread over the time that an installation takes: what is primary is whole, and the next attempt succeeds."""
    points = 48 if request.config.getoption("--exhaustive", default=False) else 12
    died = half = 0
    with running_camera(tmp_path, signer, "measured", slot_bytes=BIG) as camera:
        began = time.monotonic()
        await install(camera, big)
        duration = time.monotonic() - began
    for point in range(points):
        with running_camera(tmp_path, signer, f"camera{point}", slot_bytes=BIG) as camera:
            ours = asyncio.create_task(install(camera, big))
            await asyncio.sleep(duration * (point + 0.5) / points)
            await asyncio.to_thread(camera.stop)
            await asyncio.wait({ours})
            boot = camera.boot()
            assert boot["PRIMARY"] == "A" or camera.holds("B", big.image)
            assert camera.holds("A", b"factory")
            await asyncio.to_thread(camera.start)
            state = await installer_of(camera).probe(big.manifest)
            if error := ours.exception():
                assert isinstance(error, FailedError)
                assert error.code in ("rauc_died", "rauc_unavailable")
                assert state in ("absent", "partial")
                died += 1
                half += camera.holds("B", big.image[:4096]) and not camera.holds("B", big.image)
            else:
                assert state == "staged"
            await bring_to(camera, big)
            assert camera.holds("B", big.image)
            await installer_of(camera).commit(big.manifest, "rootfs.0")
            assert camera.boot()["STATE_B"] == "good"
    assert died >= points // 4
    print(f"{points} kills of RAUC in {duration:.2f} s tried, {died} before its end, {half} left half a slot")


def kill_when_written(camera: Camera, before: Release) -> None:
    while camera.holds("B", before.image[:4096]):
        pass
    camera.stop()


async def stamp_of_b() -> tuple[str, int] | None:
    async with rauc_client.connected() as service:
        return {slot.name: slot.stamp for slot in await service.slots()}["rootfs.1"]


async def test_a_half_written_slot_that_rauc_calls_ok(dbus, tmp_path, signer, two, big) -> None:
    """RAUC 1.8 keeps status=ok, and the version, of what was in the slot before; the agent does not believe it."""
    other = describe(big.bundle, "2.0")
    with running_camera(tmp_path, signer, slot_bytes=BIG) as camera:
        while camera.holds("B", b"factory") or camera.holds("B", big.image):  # until a kill comes in the middle
            await install(camera, two)
            before = await stamp_of_b()
            killing = asyncio.create_task(asyncio.to_thread(kill_when_written, camera, two))
            ours = asyncio.create_task(installer_of(camera).install(big.bundle, other, {}, silent))
            await asyncio.wait({ours, killing})
            await asyncio.to_thread(camera.start)
        assert isinstance(ours.exception(), FailedError)
        assert ours.exception().code in ("rauc_died", "rauc_unavailable")
        assert not camera.holds("B", two.image)
        assert await stamp_of_b() == before, "RAUC does not say that it began to write"
        assert await installer_of(camera).probe(two.manifest) == "absent"
        assert await installer_of(camera).probe(other) == "partial"
        for manifest in (two.manifest, other):
            with pytest.raises(FailedError) as error:
                await installer_of(camera).arm(manifest)
            assert error.value.code == "slot_missing"
        assert camera.boot()["PRIMARY"] == "A"


def forward(camera: Camera, release: Release):
    async def work() -> None:
        installer = installer_of(camera)
        await installer.check(release.manifest)
        if await installer.probe(release.manifest) in ("absent", "partial"):
            await install(camera, release)
        await installer.arm(release.manifest)

    return work


def keeping(camera: Camera, release: Release):
    async def work() -> None:
        assert await installer_of(camera).verify_running(release.manifest)
        await installer_of(camera).commit(release.manifest, "rootfs.0")

    return work


def leaving(camera: Camera, release: Release):
    async def work() -> None:
        await installer_of(camera).roll_back("rootfs.0")

    return work


def forked(work, die_after: int) -> int:
    """Do `work` in a child that ends, as by SIGKILL, just after its n-th call over D-Bus or write; 9, or 0 when it came to its end."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1
        if steps == die_after:
            os._exit(9)

    call, write = bus_module.Connection.call, rauc_records.write_atomic

    async def counted_call(*args, **kwargs):
        try:
            return await call(*args, **kwargs)
        finally:
            step()

    def counted_write(*args, **kwargs) -> None:
        write(*args, **kwargs)
        step()

    bus_module.Connection.call = counted_call
    rauc_records.write_atomic = counted_write
    try:
        asyncio.run(work())
    except BaseException:
        os._exit(1)
    os._exit(0)


def killed_everywhere(tmp_path: Path, signer: Signer, release: Release, phase, prepare, check, every: int = 1) -> int:
    """Kill the agent after each of its calls in a phase, each time on a new camera; how many there are."""
    point = 0
    while True:
        point += every
        with running_camera(tmp_path, signer, f"{phase.__name__}{point}") as camera:
            prepare(camera)
            ended = forked(phase(camera, release), point)
            boot = camera.boot()
            assert boot["PRIMARY"] == "A" or camera.holds("B", release.image)
            assert ended in (0, 9)
            asyncio.run(check(camera))
        if ended == 0:
            return point


def test_the_agent_is_killed_after_any_call_on_the_way_there(dbus, tmp_path, signer, two) -> None:
    async def goes_on(camera: Camera) -> None:
        await forward(camera, two)()
        assert camera.boot()["PRIMARY"] == "B"
        assert camera.holds("B", two.image)
        assert camera.holds("A", b"factory")
        assert await asyncio.to_thread(camera.reboot) == "B"
        await keeping(camera, two)()
        assert await installer_of(camera).previous() == ("rootfs.0", None)

    points = killed_everywhere(tmp_path, signer, two, forward, silent, goes_on)
    assert points > 15
    print(f"{points} kills of the agent while it installs and arms tried")


def test_the_agent_is_killed_after_any_call_of_the_decision(dbus, tmp_path, signer, two) -> None:
    def update(camera: Camera) -> None:
        asyncio.run(bring_to(camera, two))

    async def keeps(camera: Camera) -> None:
        await keeping(camera, two)()
        assert camera.boot() == {"PRIMARY": "B", "STATE_A": "good", "STATE_B": "good", "CURRENT": "B"}
        assert await installer_of(camera).previous() == ("rootfs.0", None)

    async def goes_back(camera: Camera) -> None:
        await leaving(camera, two)()
        assert (camera.boot()["PRIMARY"], camera.boot()["STATE_B"]) == ("A", "bad")
        assert await asyncio.to_thread(camera.reboot) == "A"
        assert await installer_of(camera).running() == ("rootfs.0", None)
        assert await installer_of(camera).probe(two.manifest) == "absent"

    points = killed_everywhere(tmp_path, signer, two, keeping, update, keeps)
    points += killed_everywhere(tmp_path, signer, two, leaving, update, goes_back)
    print(f"{points} kills of the agent while it commits or goes back tried")


async def test_rauc_gone_between_two_calls(camera, two) -> None:
    """After each of our calls RAUC is killed and started again: a clear failure or success, and the next attempt succeeds."""
    call, tried = bus_module.Connection.call, 0
    while True:
        tried += 1
        steps = 0

        async def counted(*args, **kwargs):
            nonlocal steps
            reply = await call(*args, **kwargs)
            steps += 1
            if steps == tried:
                await asyncio.to_thread(camera.stop)
                await asyncio.to_thread(camera.start)
            return reply

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bus_module.Connection, "call", counted)
            try:
                await install(camera, two)
            except FailedError as error:
                assert error.code in ("rauc_died", "rauc_unavailable")
        assert camera.boot()["PRIMARY"] == "A" or camera.holds("B", two.image)
        await install(camera, two)
        assert camera.boot()["PRIMARY"] == "A"
        if steps < tried:
            break
    print(f"{tried} restarts of RAUC between two calls tried")


# ---- other versions of RAUC, played by a stand-in on a real bus


class StandIn(ServiceInterface):
    """RAUC's interface with the methods of one version; the others are disabled. `ends` are the results it signals."""

    def __init__(self, *lacks: str) -> None:
        super().__init__("de.pengutronix.rauc.Installer")
        self.calls: list[str] = []
        self.primary = "rootfs.0"
        self.ends: list[int] = [0]
        self.update = Variant("v", Variant("a{sv}", {"compatible": Variant("s", "c"), "version": Variant("s", "2.0")}))
        for method in list(ServiceInterface._get_methods(self)):
            method.disabled = method.name in lacks  # dbus-fast keeps it with the class

    @dbus_method()
    def Install(self, source: DBusStr):
        self.calls.append("Install")
        self.finish()

    @dbus_method()
    def InstallBundle(self, source: DBusStr, args: DBusDict):
        self.calls.append("InstallBundle")
        self.finish()

    @dbus_method()
    def InspectBundle(self, source: DBusStr, args: DBusDict) -> DBusDict:
        self.calls.append("InspectBundle")
        return {"update": self.update, "bundle": Variant("v", Variant("a{sv}", {"format": Variant("s", "verity")}))}

    @dbus_method()
    def Info(self, bundle: DBusStr) -> Annotated[tuple[str, str], DBusSignature("ss")]:
        self.calls.append("Info")
        return ("c", "2.0")

    @dbus_method()
    def Mark(self, state: DBusStr, slot: DBusStr) -> Annotated[tuple[str, str], DBusSignature("ss")]:
        self.calls.append(f"Mark {state} {slot}")
        self.primary = slot if state == "active" else self.primary
        return (slot, "done")

    @dbus_method()
    def GetPrimary(self) -> DBusStr:
        return self.primary

    @dbus_method()
    def GetSlotStatus(self) -> Annotated[list[tuple[str, dict[str, Variant]]], DBusSignature("a(sa{sv})")]:
        return [
            [f"rootfs.{number}", {key: Variant("s", value) for key, value in values.items()}]
            for number, values in enumerate(
                (
                    {"class": "rootfs", "bootname": "A", "state": "booted"},
                    {"class": "rootfs", "bootname": "B", "state": "inactive"},
                )
            )
        ]

    @dbus_property(access=PropertyAccess.READ)
    def Operation(self) -> DBusStr:
        return "idle"

    @dbus_property(access=PropertyAccess.READ)
    def LastError(self) -> DBusStr:
        return "the disk\nis full"

    @dbus_property(access=PropertyAccess.READ)
    def Compatible(self) -> DBusStr:
        return "c"

    @dbus_property(access=PropertyAccess.READ)
    def BootSlot(self) -> DBusStr:
        return "A"

    @dbus_signal()
    def Completed(self, result: int) -> DBusInt32:
        return result

    def finish(self) -> None:
        """The end of somebody else's installation, before the answer to this call; its own after it."""
        before, *after = self.ends
        if after:
            self.Completed(before)
        loop = asyncio.get_running_loop()
        for result in after or [before]:
            loop.call_later(0.05, self.Completed, result)


@asynccontextmanager
async def standing_in(*lacks: str) -> AsyncIterator[StandIn]:
    connection = await MessageBus(bus_type=BusType.SYSTEM).connect()
    rauc = StandIn(*lacks)
    connection.export("/", rauc)
    await connection.request_name("de.pengutronix.rauc")
    try:
        yield rauc
    finally:
        connection.disconnect()
        await connection.wait_for_disconnect()


@pytest.mark.parametrize(
    ("lacks", "used"),
    [
        ((), ["InspectBundle", "InstallBundle"]),
        (("InspectBundle",), ["Info", "InstallBundle"]),
        (("InspectBundle", "InstallBundle"), ["Info", "Install"]),
    ],
    ids=["1.9", "1.8", "1.2"],
)
async def test_each_version_of_rauc_is_asked_in_its_way(dbus, tmp_path, two, lacks, used) -> None:
    async with standing_in(*lacks) as rauc:
        installer = Rauc(tmp_path / "state", "system")
        await installer.check(two.manifest)
        await installer.install(two.bundle, two.manifest, {}, silent)
        assert rauc.calls == used
        assert await installer.probe(two.manifest) == "staged"


@pytest.mark.parametrize("inner", ["a{sv}", "v"])
async def test_what_a_newer_rauc_says_of_a_bundle(dbus, tmp_path, two, inner) -> None:
    """1.9 and later wrap the part `update` once or twice; a bundle without a version is not the manifest's."""
    async with standing_in() as rauc:
        empty = Variant("a{sv}", {"compatible": Variant("s", "c")})
        rauc.update = empty if inner == "a{sv}" else Variant("v", empty)
        with pytest.raises(FailedError, match=r"\(none\)") as error:
            await Rauc(tmp_path / "state", "system").install(two.bundle, two.manifest, {}, silent)
        assert error.value.code == "bundle_differs"


@pytest.mark.parametrize(
    ("lacks", "words"),
    [
        (("InspectBundle", "Info"), "Info or InspectBundle"),
        (("GetPrimary",), "GetPrimary"),
        (("InstallBundle", "Install", "Mark"), "Install or InstallBundle, Mark"),
    ],
)
async def test_a_rauc_that_is_too_old(dbus, tmp_path, two, lacks, words) -> None:
    async with standing_in(*lacks):
        with pytest.raises(RefusedError, match=words) as error:
            await Rauc(tmp_path / "state", "system").check(two.manifest)
        assert (error.value.code, error.value.hint) == ("rauc_too_old", "install RAUC 1.8 or later")


@pytest.mark.parametrize(("ends", "code"), [([0, 1], "install_failed"), ([1, 0], "")])
async def test_the_end_of_another_installation_is_not_ours(dbus, tmp_path, two, ends, code) -> None:
    """Completed that RAUC sent before it took our call, and Completed that anybody else sends, say nothing."""
    async with standing_in() as rauc, bus_module.connected() as stranger:
        rauc.ends = ends
        fake = StandIn()
        stranger._bus.export("/", fake)
        asyncio.get_running_loop().call_later(0.02, fake.Completed, 1 - ends[1])
        installer = Rauc(tmp_path / "state", "system")
        if code:
            with pytest.raises(FailedError, match="the disk is full") as error:
                await installer.install(two.bundle, two.manifest, {}, silent)
            assert error.value.code == code
        else:
            await installer.install(two.bundle, two.manifest, {}, silent)
        assert await installer.probe(two.manifest) == ("partial" if code else "staged")


async def test_what_is_overwritten_is_not_started_next(dbus, tmp_path, two) -> None:
    """RAUC had activated the slot and the agent was killed: before it is written again, the running one comes first."""
    async with standing_in() as rauc:
        rauc.primary = "rootfs.1"
        await Rauc(tmp_path / "state", "system").install(two.bundle, two.manifest, {}, silent)
        assert rauc.calls == ["InspectBundle", "Mark active rootfs.0", "InstallBundle"]


# ---- who may ask RAUC

DEBIAN_POLICY = Path("/usr/share/dbus-1/system.d/de.pengutronix.rauc.conf")
AGENT, STRANGER = 65534, 1


def system_bus(folder: Path, ours: bool) -> str:
    """Debian's system.conf, with RAUC's policy from /usr/share and ours, if at all, from /etc, as it is on a camera."""
    configuration = Path("/usr/share/dbus-1/system.conf").read_text()
    etc = folder / "etc"
    etc.mkdir(exist_ok=True)
    if ours:
        policy = (Path(__file__).parents[2] / "systemd/de.pengutronix.rauc.camera-agent.conf").read_text()
        assert 'user="camera-agent"' in policy
        (etc / "rauc.conf").write_text(policy.replace('user="camera-agent"', f'user="{AGENT}"'))
    for old, new in (
        ("<user>messagebus</user>", ""),
        ("<fork/>", ""),
        ("<pidfile>/run/dbus/pid</pidfile>", ""),
        ("<standard_system_servicedirs/>", ""),
        ("<syslog/>", ""),
        ("unix:path=/run/dbus/system_bus_socket", f"unix:path={folder}/bus.sock"),
        ("<includedir>system.d</includedir>", f"<includedir>{DEBIAN_POLICY.parent}</includedir>"),
        ("<includedir>/etc/dbus-1/system.d</includedir>", f"<includedir>{etc}</includedir>"),
    ):
        assert old in configuration
        configuration = configuration.replace(old, new)
    return configuration


async def called(destination: str, interface: str, member: str, signature: str, *body: str) -> str:
    """How a call is answered: the last word of the error's name, or `answered`."""
    bus = await MessageBus(bus_type=BusType.SYSTEM).connect()

    async def ask(to: str, of: str | None, method: str, kind: str, arguments: list[object]) -> Message:
        message = Message(destination=to, path="/", interface=of, member=method, signature=kind, body=arguments)
        return await bus.call(message)

    if destination == "unique":
        owner = await ask("org.freedesktop.DBus", "org.freedesktop.DBus", "GetNameOwner", "s", ["de.pengutronix.rauc"])
        destination = owner.body[0]
    arguments = [{} if value == "{}" else value for value in body]
    reply = await ask(destination, interface or None, member, signature, arguments)
    bus.disconnect()
    await bus.wait_for_disconnect()
    return (reply.error_name or "answered").rpartition(".")[2]


def call_as(user: int, *arguments: str) -> str:
    """The answer to a call by somebody else, in a child of this process."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        answer = "the child failed"
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            answer = asyncio.run(called(*arguments))
        finally:
            os.write(writing, answer.encode())
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return file.read()


INSTALLER = "de.pengutronix.rauc.Installer"
READING = [
    ("org.freedesktop.DBus.Properties", "GetAll", "s", INSTALLER),
    ("org.freedesktop.DBus.Introspectable", "Introspect", ""),
]
ASKING = [
    (INSTALLER, "InstallBundle", "sa{sv}", "/no/such", "{}"),
    (INSTALLER, "Install", "s", "/no/such"),
    (INSTALLER, "Info", "s", "/no/such"),
    (INSTALLER, "Mark", "ss", "active", "rootfs.1"),
    (INSTALLER, "GetSlotStatus", ""),
    ("", "Mark", "ss", "active", "rootfs.1"),
]


@pytest.mark.skipif(not DEBIAN_POLICY.exists(), reason=f"{DEBIAN_POLICY} is not installed")
@pytest.mark.parametrize("ours", [True, False], ids=["with our policy", "with Debian's alone"])
def test_only_root_and_the_agent_may_ask_rauc(signer, monkeypatch, ours: bool) -> None:
    tried = 0
    with (
        own_folder() as folder,
        rauc_service.bus(folder, system_bus(folder, ours)),
        running_camera(folder, signer) as camera,
    ):
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", camera.address)
        for user in (0, AGENT, STRANGER):
            for destination in ("de.pengutronix.rauc", "unique"):
                for call in (*READING, *ASKING):
                    if ours is False and (user != STRANGER or call[1] != "Mark"):
                        continue
                    answer = call_as(user, destination, *call)
                    denied = answer == "AccessDenied"
                    assert denied == (ours and user == STRANGER and call in ASKING), (user, call, answer)
                    tried += 1
        expected = "B" if not ours else camera.boot()["PRIMARY"]
        assert camera.boot()["PRIMARY"] == expected
    print(f"{tried} calls of three users tried")


def test_dbus_fast_is_imported_when_first_needed() -> None:
    code = "import sys, agent.updates.installers.rauc, agent.host.systemd; sys.exit('dbus_fast' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
