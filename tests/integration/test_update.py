"""The update from its document to its one true end, cut at every saved state, with real files, store and HTTP."""

import asyncio
import base64
import json
import sys
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from agent.errors import FailedError, RefusedError, StoreError
from agent.host import clock
from agent.settings import UpdateTarget
from agent.store import Store
from agent.updates import gate as gates
from agent.updates.fetch import Limits
from agent.updates.gate import Gate
from agent.updates.installers.app import App
from agent.updates.manifest import digest_of
from agent.updates.packages import Packages
from agent.updates.restarts import Restarter
from agent.updates.states import State
from agent.updates.update import Update
from tests.fakes_updates import (
    EMERGENCY,
    RELEASE,
    STRANGER,
    FakeCapture,
    FakeJob,
    FakeUnits,
    PowerCutError,
    Server,
    archive,
    member,
    root_payload,
    serving,
    signed_manifest,
    signed_root,
)
from tests.unit.test_reference import Camera as PictureSource
from tests.unit.test_reference import measures

BOOT = clock.boot_id()
UNIT = "capture-pipeline.service"
GATE = {"stable_for_s": 0.1, "deadline_s": 60}
HOPELESS = {"stable_for_s": 0.1, "deadline_s": 0.3}
"""For updates that can never pass, so that the deadline decides."""


class Camera:
    """A camera with a target `pipeline`; `start` is the agent starting anew."""

    def __init__(self, folder, store, base, server, **target):
        self.folder, self.store, self.base, self.server = folder, store, base, server
        self.root = folder / "pipeline"
        self.target = UpdateTarget(installer="app", root=self.root, **({"unit": UNIT} | target))
        self.capture = FakeCapture()
        self.units = FakeUnits(self.root / "current", self.capture)
        self.cloud = True
        self.lock = asyncio.Lock()
        self.machine = {"boot_id": BOOT}
        self.options = {}
        (folder / "keys").mkdir()
        self.trust(signed_root(root_payload()))
        self.start()

    def trust(self, root, name="root.json"):
        (self.folder / "keys" / name).write_text(json.dumps(root))

    def start(self):
        self.lock = asyncio.Lock()
        self.update = Update(
            {"pipeline": self.target},
            installers={"pipeline": App(self.root)} if self.target.installer == "app" else {},
            keys_dir=self.folder / "keys",
            downloads_dir=self.folder / "downloads",
            store=self.store,
            restarter=Restarter(self.units, **self.machine),
            capture=self.capture,
            cloud_ok=lambda: self.cloud,
            mutation_lock=self.lock,
            agent_version="0.1.0",
            patience_s=5,
            limits=Limits(first_wait_s=0.001, longest_wait_s=0.01),
            settle_s=0.05,
            settle_deadline_s=60,
            **({"offline_patience_s": 0.2} | self.options),
        )

    def document(self, version, *files, keys=(RELEASE,), **changes):
        path = archive(
            self.folder / f"{version}.tar.gz", member("version", version.encode()), *(member(f, b"1") for f in files)
        )
        self.server.content = path.read_bytes()
        described = {
            "version": version,
            "sha256": digest_of(path),
            "size": path.stat().st_size,
            "installed_size": 100,
            "gate": HOPELESS if files else GATE,
            "security_counter": int(version.split(".")[0]),
            **changes,
        }
        return {
            "version": "1.0",
            "operation": "update",
            "target": "pipeline",
            "manifest": signed_manifest(*keys, **described),
            "urls": [f"{self.base}/{version}?X-Amz-Signature=canary"],
        }

    async def run(self, document, progress=None):
        job = FakeJob(document, self.store, progress)
        return await self.update.run(job)

    async def fact(self, key):
        return await self.store.read(lambda t: t.fact(key))

    @property
    def runs(self):
        current = self.root / "current"
        return (current / "version").read_text() if current.is_symlink() else None

    def slots(self):
        return sorted(p.name for p in (self.root / "slots").iterdir() if p.is_dir())


@asynccontextmanager
async def camera_at(folder, **target):
    folder.mkdir(exist_ok=True)
    store = await Store.open(folder / "state.db")
    server = Server(b"")
    try:
        async with serving(server) as base:
            yield Camera(folder, store, base, server, **target)
    finally:
        await store.close()


@pytest.fixture
async def camera(tmp_path):
    async with camera_at(tmp_path / "camera") as camera:
        yield camera


@pytest.fixture
async def running(camera):
    """A camera that runs version 1.0."""
    await camera.run(camera.document("1.0"))
    camera.units.restarted.clear()
    return camera


async def failing(awaitable, kind=FailedError):
    with pytest.raises(kind) as error:
        await awaitable
    return error.value


async def test_first_install_and_an_update(camera):
    await camera.update.load()
    assert camera.update.status()["pipeline"]["version"] is None
    details = await camera.run(camera.document("1.0"))
    assert details["reason_code"] == "updated"
    job = FakeJob(camera.document("2.0"), camera.store)
    details = await camera.update.run(job)
    assert details["version"] == "2.0"
    assert "images" in details["message"]
    assert job.states == [s for s in State if s not in ("ROLLING_BACK", "ROLLED_BACK", "FAILED")]
    assert camera.runs == "2.0"
    assert len(camera.slots()) == 2
    assert await camera.fact("updates.floor.pipe") == 2
    assert (await camera.fact("updates.installed.pipeline"))["version"] == "2.0"
    assert camera.units.restarted == [UNIT, UNIT]
    status = camera.update.status()["pipeline"]
    assert (status["version"], status["state"]) == ("2.0", "idle")
    assert status["slot"] == (camera.root / "current").readlink().name[:12]
    assert list((camera.folder / "downloads").iterdir()) == []
    await camera.run(camera.document("3.0"))
    assert len(camera.slots()) == 2


@pytest.mark.conformance("C-JOBS-30")
async def test_what_runs_is_told_at_the_start_after_each_update_and_after_a_roll_back(camera):
    told = []

    async def report(packages):
        told.append(packages)
        return len(told)

    async def online():
        return

    def start():
        camera.start()
        return asyncio.create_task(
            Packages(
                camera.store,
                versions=camera.update.versions,
                changed=camera.update.changed,
                report=report,
                wait_online=online,
            ).run()
        )

    async def says(**versions):
        expected = {"camera-agent": "0.1.0", **versions}
        async with asyncio.timeout(20):
            while not told or told[-1] != {name: {"version": v, "attributes": {}} for name, v in expected.items()}:
                await asyncio.sleep(0.001)
        assert camera.update.versions() == expected
        told.clear()

    task = start()
    await says()
    for version in ("1.0", "2.0"):
        await camera.run(camera.document(version))
        await says(pipe=version)
    for broken in ("blurry", "broken"):
        await failing(camera.run(camera.document("3.0", broken)))
        await says(pipe="2.0")
    task.cancel()
    await asyncio.wait({task})
    task = start()
    await camera.update.load()
    await says(pipe="2.0")
    task.cancel()
    await asyncio.wait({task})


async def test_renamed_envelope_keys_are_understood(running):
    document = running.document("2.0")
    document["manifest"]["payload_type"] = document["manifest"].pop("payloadType")
    assert (await running.run(document))["version"] == "2.0"


async def test_spoilt_images_are_taken_back(running):
    error = await failing(running.run(running.document("2.0", "blurry")))
    assert error.code == "capture_worse"
    assert "front: blurred in 9 of 15 pictures" in error.message
    assert "taken back to 1.0" in error.message
    assert running.runs == "1.0"
    assert len(running.slots()) == 1
    assert await running.fact("updates.floor.pipe") == 1
    assert running.units.restarted == [UNIT, UNIT]
    assert running.capture.verdict.ok


class Judging(FakeCapture):
    """Images judged by the real reference, in a time of their own: what the running version delivers between two looks."""

    def __init__(self):
        super().__init__()
        self.images = PictureSource()
        self.images.deliver(60)
        self.delivers = {}
        self.changed_at = 0.0

    def reference(self):
        self.changed_at = self.images.now
        return self.images.reference()

    def compare(self, reference, since, least_share=0.8):
        if self.verdict.ok:
            self.images.deliver(12)
        elif not self.delivers:
            self.images.now += 60
        else:
            self.images.deliver(12, **self.delivers)
        return self.images.compare(reference, self.changed_at)


@pytest.mark.conformance("F-19")
@pytest.mark.parametrize(
    ("delivers", "said"),
    [
        ({}, "no image since the change"),
        ({"repeated": True}, "repeat the one before"),
        ({"broken": True}, "broken files"),
        ({"picture": measures(sharpness=0.1)}, "blurred"),
        ({"every_s": 8.0}, "images a second"),
    ],
    ids=["stop", "repeat", "break", "blur", "slow"],
)
async def test_a_change_after_which_pictures_stop_or_repeat_is_taken_back(running, delivers, said):
    running.capture = running.units.capture = Judging()
    running.capture.delivers = delivers
    running.start()
    error = await failing(running.run(running.document("2.0", "blurry")))
    assert error.code == "capture_worse"
    assert said in error.message
    assert "taken back to 1.0" in error.message
    assert running.runs == "1.0"
    assert running.units.restarted == [UNIT, UNIT]
    assert (await running.run(running.document("3.0")))["reason_code"] == "updated"


async def test_a_unit_that_does_not_start_is_taken_back(running):
    error = await failing(running.run(running.document("2.0", "broken")))
    assert error.code == "unit_failed"
    assert running.runs == "1.0"


async def test_the_cloud_must_be_reached_again_if_it_was_before(running):
    job = FakeJob(running.document("2.0", gate=HOPELESS), running.store)

    async def lose_it(progress, message, **kwargs):
        running.cloud = progress["state"] not in ("TRIAL", "ROLLING_BACK")
        await FakeJob.save(job, progress, message, **kwargs)

    job.save = lose_it
    error = await failing(running.update.run(job))
    assert error.code == "cloud_lost"
    running.cloud = False
    assert (await running.run(running.document("2.0")))["reason_code"] == "updated"


async def test_rolling_back_that_fails_too_says_so(running):
    (running.root / "current" / "broken").touch()
    error = await failing(running.run(running.document("2.0", "broken")))
    assert error.code == "rollback_failed"
    assert running.runs == "1.0"


async def test_a_failed_first_install_leaves_nothing(camera):
    error = await failing(camera.run(camera.document("1.0", "blurry")))
    assert error.code == "capture_worse"
    assert camera.runs is None
    assert camera.slots() == []


async def test_probe_and_restart_command(tmp_path):
    probe = [sys.executable, "-Sc", "import sys; sys.exit('sick')"]
    restart = ["sh", "-c", f"echo >> {tmp_path}/restarts"]
    async with camera_at(tmp_path / "a", unit="", restart=restart, probe=probe) as camera:
        error = await failing(camera.run(camera.document("1.0", gate=HOPELESS)))
        assert error.code == "probe_failed"
        assert "exit status 1: sick" in error.message
    assert len((tmp_path / "restarts").read_text()) == 2
    async with camera_at(tmp_path / "b", unit="", restart=["false"]) as camera:
        error = await failing(camera.run(camera.document("1.0")))
        assert error.code == "restart_failed"
        assert camera.runs is None


async def refusal(camera, document):
    before = sorted(p for p in camera.root.rglob("*") if camera.root.exists())
    error = await failing(camera.run(document), RefusedError)
    assert sorted(p for p in camera.root.rglob("*") if camera.root.exists()) == before
    assert camera.server.requests == []
    assert camera.units.restarted == []
    assert error.message
    return error.code


async def test_what_is_refused_touches_nothing(running):
    running.server.requests.clear()
    document = running.document
    assert await refusal(running, document("2.0", keys=(STRANGER,))) == "signature_unknown"
    assert await refusal(running, {**document("2.0"), "target": "other"}) == "unknown_target"
    assert await refusal(running, document("2.0", target="other")) == "wrong_target"
    assert await refusal(running, document("2.0", installer="rauc")) == "wrong_installer"
    assert await refusal(running, {**document("2.0"), "urls": []}) == "url_invalid"
    assert await refusal(running, {**document("2.0"), "urls": ["${aws:iot:x}"]}) == "url_invalid"
    assert await refusal(running, {**document("2.0"), "manifest": {}}) == "manifest_malformed"
    assert await refusal(running, {**document("2.0"), "manifest": None}) == "manifest_malformed"
    assert await refusal(running, document("2.0", security_counter=0)) == "counter_too_low"
    assert await refusal(running, document("0.9", security_counter=1)) == "version_not_newer"
    assert await refusal(running, document("2.0", arch="armv7l")) == "not_compatible"
    assert await refusal(running, document("2.0", compatible=["other-camera"])) == "not_compatible"
    assert await refusal(running, document("2.0", requires={"camera-agent": "0.2"})) == "requirement_missing"
    assert await refusal(running, document("2.0", requires={"lens": "1"})) == "requirement_missing"
    assert await refusal(running, document("2.0", requires={"pipe": "1.1"})) == "requirement_missing"
    assert await refusal(running, document("2.0", installed_size=2**42)) == "no_space"
    (running.folder / "keys" / "root.json").unlink()
    assert await refusal(running, document("2.0")) == "no_update_keys"


@pytest.mark.parametrize("installer", ["deb", "rauc", "agent"])
async def test_a_target_without_its_installer_is_refused(tmp_path, installer):
    async with camera_at(tmp_path / "c") as camera:
        camera.target = UpdateTarget(installer=installer, root=camera.root, package="pipe")
        camera.start()
        assert await refusal(camera, camera.document("1.0", installer=installer)) == "installer_not_supported"
        await camera.update.load()


async def test_already_installed(running):
    running.server.requests.clear()
    details = await running.run(running.document("1.0"))
    assert details["reason_code"] == "already_installed"
    assert running.server.requests == []
    await running.store.write(lambda t: t.delete_fact("updates.installed.pipeline"))
    assert (await running.run(running.document("1.0")))["reason_code"] == "updated"  # in place, but never proven


async def test_a_permitted_downgrade_does_not_lower_the_floor(running):
    await running.run(running.document("2.0"))
    old = {"allow_downgrade": True, "security_counter": 2}
    assert (await failing(running.run(running.document("1.0", **old)), RefusedError)).code == "version_not_newer"
    await running.run(running.document("1.0", keys=(RELEASE, EMERGENCY), **old))
    assert running.runs == "1.0"
    assert await running.fact("updates.floor.pipe") == 2


async def test_the_trusted_root_is_kept(running):
    assert (await running.fact("updates.root"))["payload"] == signed_root(root_payload())["payload"]
    running.trust(signed_root(root_payload(release=(STRANGER,))))
    assert (await failing(running.run(running.document("2.0")), RefusedError)).code == "keys_rejected"


async def test_hostile_archives_fail_and_change_nothing(running):
    document = running.document("2.0", "../evil")
    assert (await failing(running.run(document))).code == "archive_refused"
    assert running.runs == "1.0"
    assert len(running.slots()) == 1
    assert running.units.restarted == []


async def test_a_digest_is_tried_twice_by_one_job(running):
    document = running.document("2.0", "blurry")
    for _ in range(2):
        await failing(running.run(document))
    assert (await failing(running.run(document), RefusedError)).code == "quarantined"
    job = FakeJob(document, running.store)
    job.id = "job-2"
    assert (await failing(running.update.run(job))).code == "capture_worse"


class Reissued(FakeJob):
    """A job whose document has another address each time that it is asked for anew."""

    asked = 0

    async def fresh_document(self):
        self.asked += 1
        return {**self.document, "urls": [f"{self.document['urls'][0].partition('?')[0]}/fresh-{self.asked}"]}


@pytest.mark.conformance("C-JOBS-24")
@pytest.mark.parametrize("expired", [0, 1, 3, 1000])
async def test_a_refused_address_is_asked_for_anew_three_times_at_most(running, expired):
    async def forbidden(server, request):
        return web.Response(status=403)

    running.server.requests.clear()
    running.server.faults = [forbidden] * expired
    job = Reissued(running.document("2.0"), running.store)
    if expired <= 3:
        assert (await running.update.run(job))["version"] == "2.0"
    else:
        assert (await failing(running.update.run(job))).code == "download_refused"
        assert (running.runs, len(running.slots())) == ("1.0", 1)
    assert job.asked == min(expired, 3)
    fresh = [f"/2.0/fresh-{number}" for number in range(1, job.asked + 1)]
    assert [request.path for request in running.server.requests] == ["/2.0", *fresh]


async def test_a_cancel_while_downloading_changes_nothing(running):
    document = running.document("2.0")
    job = FakeJob(document, running.store)

    async def hang(server, request):
        job.cancelled.set()
        await asyncio.sleep(3600)

    running.server.faults = [hang]
    assert (await failing(running.update.run(job))).code == "cancelled"
    assert job.states[-1] == "FAILED"
    assert (running.runs, len(running.slots())) == ("1.0", 1)
    assert not running.lock.locked()


async def test_a_cancel_while_waiting(running):
    job = FakeJob(running.document("2.0"), running.store)
    async with running.lock:
        task = asyncio.create_task(running.update.run(job))
        while "WAITING" not in job.states:
            await asyncio.sleep(0.01)
        assert running.update.status()["pipeline"]["state"] == "WAITING"
        assert not task.done()
        job.cancelled.set()
        assert (await failing(task)).code == "cancelled"
        assert running.lock.locked()
    assert running.runs == "1.0"


async def test_the_lock_is_waited_for_and_held(running):
    job = FakeJob(running.document("2.0"), running.store)
    held = []
    save = job.save

    async def look(progress, message, **kwargs):
        held.append((progress["state"], running.lock.locked()))
        await save(progress, message, **kwargs)

    job.save = look
    await running.update.run(job)
    assert {state for state, locked in held if locked} == {
        "INSTALLING", "ARMED", "RESTARTING", "TRIAL", "COMMITTING", "COMMITTED",
    }  # fmt: skip
    assert not running.lock.locked()


async def test_the_switch_waits_for_a_reference_says_so_and_can_be_cancelled(running):
    running.capture.lacks = ["front: 5 of 16 pictures measured"]
    job = FakeJob(running.document("2.0"), running.store)
    running.capture.asked.clear()
    task = asyncio.create_task(running.update.run(job))
    async with asyncio.timeout(30):
        await running.capture.asked.wait()
        while "watching the images" not in job.messages[-1]:
            await asyncio.sleep(0.01)
    assert running.update.status()["pipeline"]["state"] == "INSTALLING"
    assert "5 of 16" in running.update.status()["pipeline"]["waits_for"]
    assert running.runs == "1.0"
    job.cancelled.set()
    assert (await failing(task)).code == "cancelled"
    assert len(running.slots()) == 1


async def test_the_wait_for_a_reference_goes_on_after_a_cut(running, monkeypatch):
    monkeypatch.setattr(gates, "WAIT_LOOK_S", 0.001)
    running.capture.lacks = ["front: no image seen yet"]
    job = FakeJob(running.document("2.0"), running.store)
    job.cut_after = list(State).index(State.INSTALLING) + 1
    with pytest.raises(PowerCutError):
        await running.update.run(job)
    running.start()
    again = FakeJob(job.document, running.store, job.progress)
    running.capture.asked.clear()
    task = asyncio.create_task(running.update.run(again))
    await running.capture.asked.wait()
    assert not task.done()
    assert "baseline" not in again.progress
    running.capture.lacks = []
    assert (await task)["version"] == "2.0"
    assert again.progress["baseline"]["capture"] is not None


async def test_a_cancel_during_the_wait_counts_after_a_cut_too(running, monkeypatch):
    monkeypatch.setattr(gates, "WAIT_LOOK_S", 0.001)
    running.capture.lacks = ["front: no image seen yet"]
    job = FakeJob(running.document("2.0"), running.store)
    job.cut_after = list(State).index(State.INSTALLING) + 1
    with pytest.raises(PowerCutError):
        await running.update.run(job)
    running.start()
    again = FakeJob(job.document, running.store, job.progress)
    running.capture.asked.clear()
    task = asyncio.create_task(running.update.run(again))
    await running.capture.asked.wait()
    again.cancelled.set()
    assert (await failing(task)).code == "cancelled"
    assert len(running.slots()) == 1


async def test_a_job_cancelled_on_trial_is_taken_back(running):
    job = FakeJob(running.document("2.0"), running.store)
    save = job.save

    async def cancel(progress, message, **kwargs):
        if progress["state"] == "TRIAL":
            job.cancelled.set()
        await save(progress, message, **kwargs)

    job.save = cancel
    error = await failing(running.update.run(job))
    assert error.code == "cancelled"
    assert "the version before comes back" in error.message
    assert running.runs == "1.0"
    assert not running.lock.locked()


async def test_a_bug_in_a_trial_does_not_leave_an_unproven_version(running):
    before = running.root.joinpath("current").readlink()

    def broken(reference, since, least_share):
        raise ValueError("a bug of ours")

    compare, running.capture.compare = running.capture.compare, broken
    job = FakeJob(running.document("2.0"), running.store)
    assert (await failing(running.update.run(job))).code == "internal_error"
    assert running.root.joinpath("current").readlink() == before
    running.capture.compare = compare
    assert (await running.update.run(FakeJob(running.document("2.0"), running.store)))["reason_code"] == "updated"


async def test_a_refused_job_does_not_touch_the_kept_slot_of_another_version(running):
    await running.update.run(FakeJob(running.document("2.0"), running.store))
    kept = running.slots()
    assert len(kept) == 2
    for version in ("1.0", "2.0"):
        document = running.document(version)
        manifest = next(value for value in document.values() if isinstance(value, dict) and "signatures" in value)
        manifest["signatures"][0]["sig"] = base64.b64encode(bytes(64)).decode()
        await failing(running.update.run(FakeJob(document, running.store)), RefusedError)
        assert running.slots() == kept


async def test_a_store_that_fails_on_trial_goes_back(running):
    job = FakeJob(running.document("2.0"), running.store)
    save = job.save

    async def full(progress, message, **kwargs):
        if progress["state"] == "COMMITTING":
            raise StoreError("store_failed", "disk full")
        await save(progress, message, **kwargs)

    job.save = full
    assert (await failing(running.update.run(job), StoreError)).code == "store_failed"
    assert running.runs == "1.0"
    assert await running.fact("updates.floor.pipe") == 1


async def test_an_unreadable_record_goes_by_what_is_there(running):
    document = running.document("2.0")
    assert (await running.run(document, {"state": "NOT A STATE"}))["version"] == "2.0"
    assert (await running.run(document, {"junk": 1}))["version"] == "2.0"
    third = running.document("3.0")
    job = FakeJob(third, running.store)
    job.cut_after = list(State).index(State.TRIAL)
    with pytest.raises(PowerCutError):
        await running.update.run(job)
    assert running.runs == "3.0"
    running.start()
    assert (await failing(running.run(third, {"state": 7}))).code == "interrupted"
    assert running.runs == "2.0"


async def test_three_restarts_on_trial_go_back(running):
    job = FakeJob(running.document("2.0"), running.store)
    job.cut_after = list(State).index(State.TRIAL)
    progress = None
    for _ in range(3):
        with pytest.raises(PowerCutError):
            await running.update.run(job)
        progress = job.progress
        running.start()
        job = FakeJob(job.document, running.store, progress)
        job.cut_after = 0
    assert progress["boots"] == 3
    job.cut_after = None
    assert (await failing(running.update.run(job))).code == "interrupted"
    assert running.runs == "1.0"


async def test_a_reboot_on_trial_starts_its_time_again(running, monkeypatch):
    job = FakeJob(running.document("2.0"), running.store)
    job.cut_after = list(State).index(State.TRIAL)
    with pytest.raises(PowerCutError):
        await running.update.run(job)
    progress = job.progress
    progress["restart"]["boot_id"] = progress["trial"]["boot_id"] = "the boot before"
    progress["trial"]["since"] = 1e12
    running.start()
    assert (await running.run(job.document, progress))["version"] == "2.0"
    assert clock.boot_id() != "the boot before"


class EndedIn(FakeJob):
    """A job whose agent ends each time that one of the states `ends_in` is saved."""

    ends_in = ()

    async def save(self, progress, message, **kwargs):
        await super().save(progress, message, **kwargs)
        if self.states[-1] in self.ends_in:
            raise PowerCutError


def after_a_reboot(progress):
    """What the record says when the camera was booted since it was written."""
    if "restart" in progress:
        progress["restart"]["boot_id"] = "the boot before"
    if "trial" in progress:
        progress["trial"] = {"since": 1e12, "boot_id": "the boot before"}
    return progress


@pytest.mark.conformance("F-24")
@pytest.mark.parametrize("rebooted", [False, True], ids=["agent", "camera"])
@pytest.mark.parametrize("state", ["DOWNLOADED", "INSTALLING", "ARMED", "RESTARTING", "TRIAL", "COMMITTING"])
async def test_an_update_goes_on_after_a_restart_where_it_was(running, state, rebooted):
    running.server.requests.clear()
    job = EndedIn(running.document("2.0"), running.store)
    job.ends_in = (state,)
    with pytest.raises(PowerCutError):
        await running.update.run(job)
    restarted = len(running.units.restarted)
    running.start()
    again = FakeJob(job.document, running.store, after_a_reboot(job.progress) if rebooted else job.progress)
    assert (await running.update.run(again))["reason_code"] == "updated"
    order = [str(one) for one in State]
    goes_on_from = "TRIAL" if (state, rebooted) == ("RESTARTING", True) else state
    assert again.states == order[order.index(goes_on_from) : order.index("COMMITTED") + 1]
    assert len(running.server.requests) == 1
    assert len(running.units.restarted) - restarted == ("RESTARTING" in again.states)


@pytest.mark.conformance("F-24")
@pytest.mark.parametrize("rebooted", [False, True], ids=["agent", "camera"])
@pytest.mark.parametrize("state", ["RESTARTING", "TRIAL"])
async def test_an_update_that_always_ends_the_agent_is_taken_back_and_does_not_begin_again(running, state, rebooted):
    lives, progress = 0, None
    document = running.document("2.0")
    while lives < 20:
        lives += 1
        job = EndedIn(document, running.store, progress)
        job.ends_in = ("RESTARTING", "TRIAL") if rebooted else (state,)
        try:
            error = await failing(running.update.run(job))
        except PowerCutError:
            progress = after_a_reboot(job.progress) if rebooted else job.progress
            running.start()
        else:
            break
    assert lives <= 5
    assert error.code == "interrupted"
    assert running.runs == "1.0"
    assert running.capture.verdict.ok
    print(f"{lives} lives tried")


async def play(folder, files, place, cut):
    """One update, cut at the `cut`-th save (`place`: before or after it is durable); then the agent starts again.

    Returns the states, the end, what runs, and the floor.
    """
    async with camera_at(folder) as camera:
        await camera.run(camera.document("1.0"))
        if "both" in files:
            (camera.root / "current" / "broken").touch()
        document = camera.document("2.0", *(f for f in files if f != "both"))
        job = FakeJob(document, camera.store)
        setattr(job, f"cut_{place}", cut)
        states = job.states
        while True:
            try:
                end = (await camera.update.run(job))["reason_code"]
            except PowerCutError:
                camera.start()
                job = FakeJob(document, camera.store, job.progress)
                states = [*states, "|", *job.states]
                continue
            except FailedError as error:
                end = error.code
            break
        running = await camera.fact("updates.installed.pipeline")
        again = FakeJob(document, camera.store, job.progress)
        try:
            repeated = (await camera.update.run(again))["reason_code"]
        except FailedError as error:
            repeated = error.code
        assert repeated == end
        assert again.states == []
        assert running["version"] == ("2.0" if end == "updated" else "1.0")
        assert not camera.lock.locked()
        assert list((camera.folder / "downloads").iterdir()) == []
        return job, end, camera.runs, await camera.fact("updates.floor.pipe"), camera.slots()


@pytest.mark.parametrize("files", [(), ("blurry",), ("broken", "both")], ids=["good", "spoilt", "roll-back fails"])
async def test_cut_at_every_save(tmp_path, files):
    whole, *expected = await play(tmp_path / "whole", files, "before", None)
    assert expected[0] == {(): "updated", ("blurry",): "capture_worse"}.get(files, "rollback_failed")
    assert expected[1:3] == (["2.0", 2] if files == () else ["1.0", 1])
    cuts = [(place, number) for place in ("before", "after") for number in range(len(whole.states))]
    for place, number in cuts:
        _, *seen = await play(tmp_path / f"{place}{number}", files, place, number)
        assert seen == expected, (place, whole.states[number])
    print(f"{len(cuts)} cuts in {len(whole.states)} states, all with the same end: {expected[0]}")


async def test_gate_without_anything_to_ask():
    verdict = await Gate(None, None, lambda: False).watch(
        {}, since=asyncio.get_running_loop().time(), stable_for_s=0.1, deadline_s=1
    )
    assert verdict.passed
    assert "nothing to look at" in verdict.reasons[0]


async def test_a_plan_says_what_would_be_done_and_touches_nothing(camera):
    first = camera.document("1.0")
    steps = await camera.update.plan(first)
    assert [step.split()[0] for step in steps] == ["download", "install", "switch", "trial:", "keep"]
    assert "1.0" in steps[1]
    assert not camera.root.exists() or not list(camera.root.iterdir())
    assert await camera.fact("updates.installed.pipeline") is None
    await camera.run(first)
    assert (await camera.update.plan(first))[0].startswith("nothing: ")
    assert "or go back to 1.0" in (await camera.update.plan(camera.document("2.0")))[-1]


async def test_a_plan_refuses_what_the_update_would_refuse(camera):
    with pytest.raises(RefusedError) as refusal:
        await camera.update.plan(camera.document("1.0", keys=(STRANGER,)))
    assert refusal.value.code == "signature_unknown"
    with pytest.raises(RefusedError) as refusal:
        await camera.update.plan(camera.document("1.0", installed_size=2**42))
    assert refusal.value.code == "no_space"
