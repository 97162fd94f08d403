"""An update whose job the cloud ends while it is under way: through the real engine, what runs afterwards and what was sent."""

import asyncio

import pytest

from agent.jobs import conversation
from agent.jobs import engine as engine_module
from agent.jobs.engine import Engine
from tests.fakes import JobsService
from tests.integration.test_update import UNIT, camera_at


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, value in {"HEARTBEAT_S": 0.02, "NEWS_INTERVAL_S": 0.0, "POLL_S": 0.05}.items():
        monkeypatch.setattr(engine_module, name, value)
    monkeypatch.setattr(conversation, "RETRY_S", (0.01, 0.05))


@pytest.fixture
async def running(tmp_path):
    """A camera that runs version 1.0."""
    async with camera_at(tmp_path / "camera") as camera:
        await camera.run(camera.document("1.0"))
        await camera.store.write(lambda t: t.put_job("job-1", 1, {}, finished=True))
        camera.units.restarted.clear()
        yield camera


class Listening(JobsService):
    """Keeps what the camera tries to tell, also what is refused."""

    def __init__(self):
        super().__init__()
        self.told = []

    async def update(self, job_id, **request):
        self.told.append(request["status"])
        return await super().update(job_id, **request)


async def ended_in(camera, state, end, **changes):
    """Offer an update to 2.0 and end it in the cloud as soon as `state` is journalled: its record, and what was told since."""
    cloud = Listening()
    cloud.create("a", camera.document("2.0", **changes))
    engine = Engine(store=camera.store, jobs=cloud, operations={"update": camera.update}, allow=["update"])
    task = asyncio.create_task(engine.run())

    async def record(found):
        async with asyncio.timeout(60):
            while True:
                kept = await camera.store.read(lambda t: t.job("a", 1))
                if kept and found(kept):
                    return kept
                await asyncio.sleep(0.002)

    try:
        await record(lambda kept: kept["progress"].get("state") == state)
        cloud.end("a", end)
        before = len(cloud.told)
        closed = await record(lambda kept: kept["phase"] == "closed")
        await asyncio.sleep(0.3)  # long enough for many times what is sent while a job runs
        return closed, cloud.told[before:]
    finally:
        task.cancel()
        await asyncio.wait({task})


@pytest.mark.conformance("C-JOBS-18")
@pytest.mark.parametrize("end", ["CANCELED", "TIMED_OUT", "REMOVED"])
async def test_while_it_downloads_the_update_stops_and_leaves_nothing(running, end):
    async def hang(server, request):
        await asyncio.sleep(3600)

    running.server.faults = [hang]
    record, told = await ended_in(running, "DOWNLOADING", end)
    assert (record["status"], record["details"]["reason_code"], record["superseded"]) == ("FAILED", "cancelled", end)
    assert told in ([], ["IN_PROGRESS"]), "at most the heartbeat that was refused"
    assert (running.runs, len(running.slots()), running.units.restarted) == ("1.0", 1, [])
    assert not running.lock.locked()


@pytest.mark.conformance("C-JOBS-18")
@pytest.mark.parametrize("end", ["CANCELED", "TIMED_OUT", "REMOVED"])
async def test_on_trial_the_update_is_taken_back(running, end):
    record, told = await ended_in(running, "TRIAL", end, gate={"stable_for_s": 2, "deadline_s": 60})
    assert told in ([], ["IN_PROGRESS"]), "at most the heartbeat that was refused"
    assert (running.runs, running.units.restarted) == ("1.0", [UNIT, UNIT])
    assert (record["status"], record["details"]["reason_code"], record["superseded"]) == ("FAILED", "cancelled", end)
    assert not running.lock.locked()
