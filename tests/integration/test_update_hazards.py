"""What has once gone wrong around an update: long waits, full disks, wishes that come too late, facts that are none."""

import asyncio

import pytest

from agent.errors import FailedError, RefusedError, StoreError
from agent.settings import UpdateTarget
from agent.updates import acts, case, flow
from agent.updates.by_hand import fact_key
from agent.updates.states import State
from tests.fakes_updates import (
    EMERGENCY,
    STRANGER,
    FakeJob,
    PowerCutError,
    root_payload,
    signed_root,
)
from tests.integration.test_update import HOPELESS, camera_at, failing
from tests.integration.test_update_by_hand import served
from tests.integration.test_update_restarts import Held, Lives


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for module, name in ((case, "SAVE_AGAIN_S"), (acts, "AGAIN_S"), (flow, "OBSERVE_AGAIN_S")):
        monkeypatch.setattr(module, name, 0.001)


@pytest.fixture
async def lives(tmp_path):
    async with camera_at(tmp_path / "camera") as camera:
        await camera.run(camera.document("1.0"))
        yield Lives(camera)


async def state_is(camera, state):
    async with asyncio.timeout(30):
        while camera.update.status()["pipeline"]["state"] != state:
            await asyncio.sleep(0.002)


async def test_a_wish_to_go_back_does_not_outlive_the_version_it_was_about(lives):
    camera = lives.camera
    await camera.run(camera.document("2.0", security_counter=1))
    await camera.update.roll_back("pipeline")
    assert (await camera.update.roll_back("pipeline"))["message"] == "pipeline goes back from 2.0 to 1.0"  # asked twice
    await camera.run(camera.document("3.0"))
    await served(camera)
    assert camera.runs == "3.0"
    assert (await camera.fact("updates.outcome.pipeline"))["code"] == "superseded"
    assert await camera.fact(fact_key("pipeline")) is None


async def test_a_wish_for_a_target_that_is_gone_is_forgotten(lives):
    camera = lives.camera
    for record in ({"to": "x"}, [], "x", None):
        await camera.store.write(lambda t, record=record: t.set_fact(fact_key("gone"), record))
        await camera.store.write(lambda t, record=record: t.set_fact(fact_key("pipeline"), record))
        lives.start()
        task = asyncio.create_task(camera.update.serve())
        async with asyncio.timeout(30):
            while await camera.store.read(lambda t: fact_key("gone") in t.facts("updates.by_hand.")):
                await asyncio.sleep(0.002)
        assert not task.done()
        task.cancel()
        await asyncio.wait({task})
    assert camera.runs == "1.0"


async def test_going_back_by_hand_reboots_where_the_update_did(lives):
    camera = lives.camera
    await lives.run(camera.document("2.0", restart="reboot", security_counter=1))
    reboots = lives.reboots
    await camera.update.roll_back("pipeline")
    assert await served(camera)
    lives.next_life(boot=True)
    await served(camera)
    assert (lives.reboots - reboots, camera.runs) == (1, "1.0")
    assert (await camera.fact("updates.outcome.pipeline"))["code"] == "by_hand"


async def test_keys_are_looked_at_again_after_a_wait(lives):
    camera, held = lives.camera, Held()
    camera.options = {"holds": held}
    lives.start()
    held.words["switch"] = "the window opens in 3 h"
    job = FakeJob(camera.document("2.0"), camera.store)
    task = asyncio.create_task(camera.update.run(job))
    await state_is(camera, "WAITING")
    payload = root_payload(version=2, release=(STRANGER,))
    camera.trust(signed_root(payload, EMERGENCY), "2.root.json")
    held.words.clear()
    held.changed.set()
    assert (await failing(task, RefusedError)).code == "signature_unknown"
    assert (camera.runs, len(camera.slots())) == ("1.0", 1)
    (camera.folder / "keys" / "2.root.json").unlink()  # what it revoked stays revoked
    assert (await failing(camera.run(camera.document("2.0")), RefusedError)).code == "signature_unknown"


def failing_at(job, state, code, times):
    """`job`, whose save of `state` fails so many times."""
    save, left = job.save, times

    async def fail(progress, message, **kwargs):
        nonlocal left
        if progress["state"] == state and left:
            left -= 1
            raise StoreError(code, "no space left on device")
        await save(progress, message, **kwargs)

    job.save = fail
    return job


@pytest.mark.parametrize("state", ["ARMED", "RESTARTING", "TRIAL", "COMMITTING", "COMMITTED"])
async def test_a_disk_that_is_full_for_a_moment_decides_nothing(lives, state):
    job = failing_at(FakeJob(lives.camera.document("2.0"), lives.camera.store), state, "store_full", 3)
    assert (await lives.camera.update.run(job))["reason_code"] == "updated"
    assert lives.camera.runs == "2.0"


@pytest.mark.parametrize("state", ["RESTARTING", "TRIAL", "COMMITTING", "COMMITTED"])
@pytest.mark.parametrize("restart", ["unit", "reboot"])
async def test_what_can_t_be_recorded_does_not_run(lives, state, restart):
    camera = lives.camera
    document = camera.document("2.0", restart=restart)
    progress, error = None, None
    for _ in range(4):
        job = failing_at(FakeJob(document, camera.store, progress), state, "store_full", 10_000)
        try:
            await camera.update.run(job)
        except PowerCutError:
            progress = job.progress
            lives.next_life(boot=True)
            if camera.runs == "1.0":
                break
        except StoreError as raised:
            error = raised
            break
    assert camera.runs == "1.0"
    assert await camera.fact("updates.floor.pipe") == 1
    assert error or lives.reboots >= 1


async def test_going_back_that_is_asked_for_before_a_reboot_is_not_forgotten(lives):
    camera = lives.camera
    waits = asyncio.Event()

    async def reboot():
        waits.set()
        await asyncio.Event().wait()

    camera.machine["reboot"] = reboot
    camera.start()
    job = FakeJob(camera.document("2.0", restart="reboot"), camera.store)
    task = asyncio.create_task(camera.update.run(job))
    async with asyncio.timeout(30):
        await waits.wait()
    assert (await camera.update.roll_back("pipeline"))["state"] == "cancelling"
    task.cancel()
    await asyncio.wait({task})
    lives.next_life(boot=True)
    progress = job.progress
    for _ in range(3):
        again = FakeJob(job.document, camera.store, progress)
        try:
            await camera.update.run(again)
        except PowerCutError:
            progress = again.progress
            lives.next_life(boot=True)
        except FailedError as error:
            assert error.code == "cancelled"
            break
    assert camera.runs == "1.0"


async def test_what_can_t_be_seen_after_a_restart_is_looked_at_again(lives):
    camera = lives.camera
    job = FakeJob(camera.document("2.0"), camera.store)
    job.cut_after = list(State).index(State.TRIAL)
    with pytest.raises(PowerCutError):
        await camera.update.run(job)
    assert job.states[-1] == "TRIAL"
    lives.next_life(boot=False)
    installer = camera.update._installers["pipeline"]
    probe, asked = installer.probe, 0

    async def not_yet(manifest):
        nonlocal asked
        asked += 1
        if asked < 5:
            assert camera.update.status()["pipeline"]["state"] == "TRIAL"
            assert camera.update.switching()
            assert camera.lock.locked()
            raise ValueError("a bug of ours")
        return await probe(manifest)

    installer.probe = not_yet
    assert (await camera.update.run(FakeJob(job.document, camera.store, job.progress)))["reason_code"] == "updated"

    async def never(manifest):
        raise FailedError("rauc_unavailable", "RAUC does not answer")

    job = FakeJob(camera.document("3.0"), camera.store)
    installer.probe = probe
    job.cut_after = list(State).index(State.TRIAL)
    with pytest.raises(PowerCutError):
        await camera.update.run(job)
    lives.next_life(boot=False)
    installer = camera.update._installers["pipeline"]
    installer.probe = never
    error = await failing(camera.update.run(FakeJob(job.document, camera.store, job.progress)))
    assert "can't be seen what runs: RAUC does not answer" in error.message
    assert camera.runs == "2.0"


async def test_one_failure_to_keep_it_does_not_throw_a_proven_version_away(lives):
    installer = lives.camera.update._installers["pipeline"]
    commit, failures = installer.commit, 2

    async def sometimes(manifest, previous):
        nonlocal failures
        if failures:
            failures -= 1
            raise FailedError("rauc_unavailable", "RAUC does not answer")
        await commit(manifest, previous)

    installer.commit = sometimes
    assert (await lives.camera.run(lives.camera.document("2.0")))["reason_code"] == "updated"


async def test_a_blip_in_the_day_off_line_is_no_verdict(lives, monkeypatch):
    monkeypatch.setattr(acts, "OFFLINE_SAVE_S", 0.2)
    camera = lives.camera
    camera.cloud = False
    camera.options = {"offline_patience_s": 3600}
    lives.start()
    job = FakeJob(camera.document("2.0"), camera.store)
    task = asyncio.create_task(camera.update.run(job))
    async with asyncio.timeout(60):
        while job.states.count("TRIAL") < 4:  # saved once more with each slice
            camera.units.unit.active = "activating" if job.states.count("TRIAL") == 3 else "active"
            await asyncio.sleep(0.002)
        camera.units.unit.active = "active"
        camera.cloud = True
        assert (await task)["reason_code"] == "updated"


async def test_a_target_that_is_gone_is_told_by_what_runs(lives):
    camera = lives.camera
    job = FakeJob(camera.document("2.0", "blurry", gate=HOPELESS), camera.store)
    job.cut_after = list(State).index(State.TRIAL)
    with pytest.raises(PowerCutError):
        await camera.update.run(job)
    camera.target = UpdateTarget(installer="rauc")
    lives.next_life(boot=False)
    error = await failing(camera.update.run(FakeJob(job.document, camera.store, job.progress)))
    assert error.code == "rollback_failed"  # 2.0 runs on


async def test_facts_that_are_none_end_nothing(lives):
    camera, manifest = lives.camera, "ab" * 32
    odd = ([], "x", None, {"count": None}, {"count": "x", "target": "pipeline"}, 7, {"job": 1})
    names = (
        "failures." + manifest,
        "installed.pipeline",
        "outcome.pipeline",
        "last_time",
        "floor.pipe",
        "restart.pipeline",
        "reboot",
    )
    tried = 0
    for value in odd:
        for name in names:
            await camera.store.write(lambda t, n=name, v=value: t.set_fact(f"updates.{n}", v))
            lives.start()
            await camera.update.load()
            tried += 1
        await camera.run(camera.document(f"{2 + odd.index(value)}.0"))
    print(f"{tried} facts of another form tried")
