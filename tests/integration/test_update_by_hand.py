"""Going back by hand, outside any job: at once, over a reboot, through cuts, and when it must not be done."""

import asyncio

import pytest

from agent.errors import RefusedError
from agent.updates.by_hand import MAX_ATTEMPTS, fact_key
from tests.fakes_updates import FakeJob, PowerCutError
from tests.integration.test_update import camera_at, failing
from tests.integration.test_update_restarts import Lives


@pytest.fixture
async def camera(tmp_path):
    async with camera_at(tmp_path / "camera") as camera:
        await camera.run(camera.document("1.0"))
        await camera.run(camera.document("2.0", security_counter=1))
        yield camera


async def served(camera):
    """Let what was asked for by hand be carried out to its end, or to the end of this life."""
    task = asyncio.create_task(camera.update.serve())
    try:
        async with asyncio.timeout(30):
            while await camera.fact(fact_key("pipeline")) and not task.done():
                await asyncio.sleep(0.005)
            while not task.done() and camera.update.status()["pipeline"]["state"] != "idle":
                await asyncio.sleep(0.005)
    finally:
        task.cancel()
        await asyncio.wait({task})
    return not task.cancelled() and isinstance(task.exception(), PowerCutError)


async def test_back_and_forth(camera):
    await camera.update.load()
    assert camera.update.status()["pipeline"]["previous"] == "1.0"
    answer = await camera.update.roll_back("pipeline")
    assert answer["state"] == "going_back"
    assert "from 2.0 to 1.0" in answer["message"]
    await served(camera)
    status = camera.update.status()["pipeline"]
    assert (camera.runs, status["version"], status["previous"]) == ("1.0", "1.0", "2.0")
    assert (status["last"]["state"], status["last"]["code"]) == ("ROLLED_BACK", "by_hand")
    assert (await camera.fact("updates.installed.pipeline"))["version"] == "1.0"
    assert [entry["action"] for entry in await camera.store.read(lambda t: t.audit())] == ["update.rollback"]
    await camera.update.roll_back("pipeline")
    await served(camera)
    assert camera.runs == "2.0"
    assert (await camera.run(camera.document("3.0")))["reason_code"] == "updated"


async def test_what_can_t_be_gone_back_to(camera, tmp_path):
    assert (await failing(camera.update.roll_back("other"), RefusedError)).code == "unknown_target"
    await camera.run(camera.document("3.0"))  # its counter is 3, that of 2.0 below
    assert (await failing(camera.update.roll_back("pipeline"), RefusedError)).code == "counter_too_low"
    assert camera.runs == "3.0"
    async with camera_at(tmp_path / "new") as new:
        assert (await failing(new.update.roll_back("pipeline"), RefusedError)).code == "nothing_before"
        await new.run(new.document("1.0"))
        assert (await failing(new.update.roll_back("pipeline"), RefusedError)).code == "nothing_before"


async def test_an_update_on_trial_is_cancelled_and_one_that_is_not_is_left(camera):
    gate = {"stable_for_s": 50, "deadline_s": 60}
    job = FakeJob(camera.document("3.0", gate=gate), camera.store)
    async with camera.lock:
        task = asyncio.create_task(camera.update.run(job))
        async with asyncio.timeout(30):
            while camera.update.status()["pipeline"]["state"] != "WAITING":
                await asyncio.sleep(0.005)
        assert (await failing(camera.update.roll_back("pipeline"), RefusedError)).code == "update_under_way"
        assert camera.update.switching() == ""
    async with asyncio.timeout(30):
        while camera.update.status()["pipeline"]["state"] != "TRIAL":
            await asyncio.sleep(0.005)
    assert "pipeline is TRIAL" in camera.update.switching()
    assert (await camera.update.roll_back("pipeline"))["state"] == "cancelling"
    assert (await failing(task)).code == "cancelled"
    assert camera.runs == "2.0"


async def test_where_the_version_before_does_not_run_what_ran_comes_back(camera):
    before, _ = await camera.update._installers["pipeline"].previous()
    (camera.root / before / "broken").touch()
    await camera.update.roll_back("pipeline")
    await served(camera)
    last = camera.update.status()["pipeline"]["last"]
    assert (last["code"], camera.runs) == ("rollback_failed", "2.0")
    assert "2.0 runs again" in last["message"]
    (camera.root / "current" / "broken").touch()
    await camera.update.roll_back("pipeline")
    await served(camera)
    assert "failed too" in camera.update.status()["pipeline"]["last"]["message"]


async def test_it_goes_on_after_a_cut_and_not_for_ever(camera):
    lives = Lives(camera)
    restarts = 0

    async def cut(unit):
        nonlocal restarts
        restarts += 1
        raise PowerCutError

    restart = camera.units.restart
    await camera.update.roll_back("pipeline")
    camera.units.restart = cut
    while await served(camera):
        lives.next_life(boot=False)
    assert restarts == 2 * MAX_ATTEMPTS  # there, and back again
    lives.next_life(boot=False)
    assert (await camera.fact("updates.outcome.pipeline"))["code"] == "rollback_failed"
    camera.units.restart = restart
    await camera.update.load()
    await camera.update.roll_back("pipeline")
    camera.units.restart = cut
    assert await served(camera)
    lives.next_life(boot=False)
    camera.units.restart = restart
    await served(camera)
    assert (await camera.fact("updates.outcome.pipeline"))["code"] == "by_hand"
