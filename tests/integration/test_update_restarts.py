"""Updates whose restart ends this process: the camera's or the agent's; and what goes on in the next life."""

import asyncio

import pytest

from agent.errors import FailedError
from agent.updates import restarts
from agent.updates.acts import MAX_COMMITS
from agent.updates.states import State
from tests.fakes_updates import FakeJob, Images, PowerCutError
from tests.integration.test_update import HOPELESS, Camera, camera_at, failing


class Lives:
    """A camera in its lives: `next_life` boots it, or starts the agent anew."""

    def __init__(self, camera: Camera) -> None:
        self.camera = camera
        self.reboots = self.agent_restarts = 0
        self.uptime = 10_000.0
        self.boot = self.instance = 0
        self.start()

    def start(self) -> None:
        async def reboot() -> None:
            self.reboots += 1
            raise PowerCutError

        def restart_agent() -> None:
            self.agent_restarts += 1
            raise PowerCutError

        self.camera.machine = {
            "boot_id": f"boot {self.boot}",
            "instance": f"instance {self.instance}",
            "reboot": reboot,
            "restart_agent": restart_agent,
            "uptime_s": lambda: self.uptime,
        }
        self.camera.start()

    def next_life(self, *, boot: bool) -> None:
        self.boot += boot
        if boot:
            blurry = (self.camera.root / "current" / "blurry").exists()
            self.camera.capture.verdict = Images(ok=not blurry, reasons=["blurred"] if blurry else [])
        self.instance += 1
        self.start()

    async def run(self, document, *, boot=True, lives=10, cut_after=None):
        """The update through as many lives as it needs: its last job and its reason code."""
        progress, states = None, []
        for _ in range(lives):
            job = FakeJob(document, self.camera.store, progress)
            job.cut_after, cut_after = cut_after, None
            try:
                end = (await self.camera.update.run(job))["reason_code"]
            except PowerCutError:
                progress = job.progress
                states += [*job.states, "|"]
                self.next_life(boot=boot)
                continue
            except FailedError as error:
                end = error.code
            return [*states, *job.states], end, job
        raise AssertionError(f"no end in {lives} lives: {states}")


@pytest.fixture
async def lives(tmp_path):
    async with camera_at(tmp_path / "camera") as camera:
        await camera.run(camera.document("1.0"))
        yield Lives(camera)


async def test_a_reboot_is_proven_by_another_boot(lives):
    states, end, _ = await lives.run(lives.camera.document("2.0", restart="reboot"))
    assert end == "updated"
    assert lives.reboots == 1
    assert states[states.index("RESTARTING") :] == ["RESTARTING", "|", "TRIAL", "COMMITTING", "COMMITTED"]
    assert lives.camera.runs == "2.0"


async def test_a_reboot_that_does_not_come_is_asked_for_three_times(lives):
    document = lives.camera.document("2.0", restart="reboot")
    states, end, _ = await lives.run(document, boot=False)
    assert end == "rollback_failed"  # going back would need a reboot, too
    assert states.count("RESTARTING") == 3
    assert lives.camera.runs == "1.0"


async def test_a_failed_trial_goes_back_by_another_reboot(lives):
    states, end, _ = await lives.run(lives.camera.document("2.0", "blurry", restart="reboot", gate=HOPELESS))
    assert (end, lives.camera.runs) == ("capture_worse", "1.0")
    assert lives.reboots == 2
    assert states[states.index("TRIAL") :] == [
        "TRIAL",
        "ROLLING_BACK",
        "ROLLING_BACK",
        "|",
        "ROLLING_BACK",
        "ROLLED_BACK",
    ]
    assert lives.camera.slots() == [lives.camera.root.joinpath("current").readlink().name]


async def test_one_reboot_of_ours_in_ten_minutes(lives, monkeypatch):
    await lives.run(lives.camera.document("2.0", restart="reboot"))
    lives.uptime = 100.0
    waits = []
    sleep = asyncio.sleep

    async def soon(seconds, *rest):
        if seconds >= 1:
            waits.append(seconds)
            lives.uptime += seconds
        await sleep(0, *rest)

    job = FakeJob(lives.camera.document("3.0", restart="reboot"), lives.camera.store)
    task = asyncio.create_task(lives.camera.update.run(job))
    async with asyncio.timeout(30):
        while not any("may come in 500 s" in message for message in job.messages):
            await sleep(0.01)
    assert lives.camera.update.status()["pipeline"]["state"] == "WAITING"
    assert lives.camera.runs == "2.0"
    assert not lives.camera.lock.locked()
    task.cancel()
    await asyncio.wait({task})
    lives.uptime = 100.0
    monkeypatch.setattr(asyncio, "sleep", soon)
    by = lives.camera.update._around.restarter
    made = restarts.Restarts("reboot", lives.camera.target, by, lives.camera.store, lambda _: None)
    with pytest.raises(PowerCutError):
        await made.restart()
    assert sum(waits) == 500.0


@pytest.mark.parametrize("cut_after", range(len(State)))
async def test_a_power_cut_after_any_save_of_an_update_with_a_reboot(lives, cut_after):
    _, end, _ = await lives.run(lives.camera.document("2.0", restart="reboot"), cut_after=cut_after)
    assert (end, lives.camera.runs) == ("updated", "2.0")
    assert lives.reboots <= 2


async def test_what_runs_unproven_after_a_cut_while_installing_is_taken_back(lives):
    """RAUC may activate what it has installed; a cut then boots it before it was switched to."""
    job = FakeJob(lives.camera.document("2.0", restart="reboot"), lives.camera.store)
    job.cut_after = list(State).index(State.INSTALLING)
    with pytest.raises(PowerCutError):
        await lives.camera.update.run(job)
    artifact = lives.camera.folder / "downloads" / job.progress["sha"] if "sha" in job.progress else None
    assert artifact is None
    installer = lives.camera.update._installers["pipeline"]
    from agent.updates.manifest import parse_envelope, parse_manifest

    manifest = parse_manifest(parse_envelope(job.document["manifest"]).payload)
    await installer.install(lives.camera.folder / "downloads" / manifest.sha256, manifest, {}, print)
    await installer.arm(manifest)
    lives.next_life(boot=True)
    progress = job.progress
    for _ in range(5):
        again = FakeJob(job.document, lives.camera.store, progress)
        try:
            await lives.camera.update.run(again)
        except PowerCutError:
            progress = again.progress
            lives.next_life(boot=True)
        except FailedError as error:
            assert error.code == "interrupted"
            break
    assert again.states[-1] == "ROLLED_BACK"
    assert lives.camera.runs == "1.0"


async def test_a_kept_version_that_does_not_stay_is_taken_back_and_its_floor_does_not_rise(lives):
    job = FakeJob(lives.camera.document("2.0", restart="reboot"), lives.camera.store)
    progress = None
    document = job.document
    link = (lives.camera.root / "current").readlink()
    committing = 0
    for _ in range(12):
        job = FakeJob(document, lives.camera.store, progress)
        save = job.save

        async def cut_when_kept(progress, message, save=save, **kwargs):
            await save(progress, message, **kwargs)
            if progress["state"] == "COMMITTING" and not committing:
                raise PowerCutError

        job.save = cut_when_kept
        try:
            await lives.camera.update.run(job)
        except PowerCutError:
            progress = job.progress
            committing += job.states[-1:] == ["COMMITTING"]
            lives.next_life(boot=True)
            if committing:
                candidate = lives.camera.root / "current.new"
                candidate.symlink_to(link)  # the boot loader has chosen the other
                candidate.rename(lives.camera.root / "current")
        except FailedError as error:
            assert error.code == "fell_back"
            break
    else:
        raise AssertionError("no end")
    assert committing == MAX_COMMITS
    assert lives.camera.runs == "1.0"
    assert await lives.camera.fact("updates.floor.pipe") == 1


async def test_rollback_no_says_that_there_is_no_way_back(lives):
    error = await failing(lives.camera.run(lives.camera.document("2.0", "blurry", rollback="no")))
    assert error.code == "rollback_failed"
    assert "rollback = no" in error.message
    assert lives.camera.runs == "2.0"
    assert "no way back" in (await lives.camera.update.plan(lives.camera.document("3.0", rollback="no")))[-1]
    assert (await lives.camera.run(lives.camera.document("3.0")))["reason_code"] == "updated"


async def test_an_off_line_camera_waits_for_the_cloud_and_then_follows_the_policy(lives):
    camera = lives.camera
    camera.cloud = False
    camera.options = {"offline_patience_s": 3600}
    lives.start()
    job = FakeJob(camera.document("2.0"), camera.store)
    task = asyncio.create_task(camera.update.run(job))
    async with asyncio.timeout(30):
        while not any("all is well but for the cloud" in message for message in job.messages):
            await asyncio.sleep(0.01)
    assert job.progress["boots"] == 0
    camera.cloud = True
    assert (await task)["reason_code"] == "updated"
    for policy, patience, end in (("commit", 0.2, "updated"), ("roll_back", 0.2, "cloud_lost")):
        camera.cloud = False
        camera.options = {"offline_patience_s": patience}
        lives.start()
        gate = {"stable_for_s": 0.1, "deadline_s": 60, "offline_policy": policy}
        version = {"commit": "3.0", "roll_back": "4.0"}[policy]
        try:
            details = await camera.run(camera.document(version, gate=gate))
        except FailedError as error:
            assert error.code == end
        else:
            assert details["reason_code"] == end
            assert "the cloud was not reached before nor after" in details["message"]
    assert camera.runs == "3.0"


async def test_the_machine_must_not_get_worse(lives):
    camera = lives.camera
    conditions = {"memory.low", "cloud.offline"}
    camera.options = {"conditions": lambda: conditions}
    lives.start()
    assert (await camera.run(camera.document("2.0")))["reason_code"] == "updated"  # set before, too
    conditions.clear()
    job = FakeJob(camera.document("3.0", gate=HOPELESS), camera.store)
    save = job.save

    async def hot(progress, message, **kwargs):
        conditions.update({"temperature.high"} if progress["state"] == "TRIAL" else ())
        await save(progress, message, **kwargs)

    job.save = hot
    error = await failing(camera.update.run(job))
    assert error.code == "machine_worse"
    assert "temperature.high" in error.message
    assert camera.runs == "2.0"


async def test_the_least_image_rate_is_the_manifest_s(lives):
    asked = []
    compare = lives.camera.capture.compare

    def note(reference, since, least_share):
        asked.append(least_share)
        return compare(reference, since, least_share)

    lives.camera.capture.compare = note
    gate = {"stable_for_s": 0.1, "deadline_s": 60, "min_capture_ratio": 0.5}
    await lives.camera.run(lives.camera.document("2.0", gate=gate))
    assert set(asked) == {0.5}


class Held:
    """Holds that a test sets."""

    def __init__(self):
        self.changed = asyncio.Event()
        self.words = {}
        self.asked = []

    async def hold(self, before, job_id):
        self.asked.append((before, job_id))
        return (
            type("Hold", (), {"words": self.words[before], "look_again_s": 3600.0})() if before in self.words else None
        )


async def test_what_holds_an_update_is_told_and_waited_for(lives):
    camera, held = lives.camera, Held()
    held.words = {"download": "its turn comes in 20 s", "switch": "the window opens in 3 h"}
    camera.options = {"holds": held}
    lives.start()
    camera.server.requests.clear()
    job = FakeJob(camera.document("2.0"), camera.store)
    task = asyncio.create_task(camera.update.run(job))

    async def told(words):
        async with asyncio.timeout(30):
            while words not in camera.update.status()["pipeline"]["waits_for"]:
                await asyncio.sleep(0.005)

    await told("its turn comes")
    assert camera.server.requests == []
    del held.words["download"]
    held.changed.set()
    await told("the window opens in 3 h")
    assert camera.update.status()["pipeline"]["state"] == "WAITING"
    assert not camera.lock.locked()
    del held.words["switch"]
    held.changed.set()
    assert (await task)["version"] == "2.0"
    assert held.asked[0] == ("download", "job-1")


async def test_a_hold_that_comes_while_the_images_are_watched_is_heeded(lives):
    camera, held = lives.camera, Held()
    camera.options = {"holds": held}
    camera.capture.lacks = ["front: 5 of 16 pictures measured"]
    lives.start()
    job = FakeJob(camera.document("2.0"), camera.store)
    camera.capture.asked.clear()
    task = asyncio.create_task(camera.update.run(job))
    async with asyncio.timeout(30):
        await camera.capture.asked.wait()
        assert not camera.lock.locked()  # what may last an hour keeps nobody else from changing something
        held.words["switch"] = "capture holds the lock"
        camera.capture.lacks = []
        while "capture holds" not in camera.update.status()["pipeline"]["waits_for"]:
            await asyncio.sleep(0.01)
        assert not camera.lock.locked()
    assert camera.update.status()["pipeline"]["state"] == "INSTALLING"
    job.cancelled.set()
    assert (await failing(task)).code == "cancelled"
    assert camera.runs == "1.0"
