"""What jobs set for a group of cameras: a layer under the shadow, tried and taken back like it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent.errors import FailedError, RefusedError, StoreError
from agent.jobs.document import parse
from agent.jobs.operations.configure import Configure
from agent.maintenance import Hold
from tests.fakes_shadow import ShadowCloud
from tests.integration.test_configuration import OWN, Camera, Site, assert_old, running


@dataclass
class Job:
    """An execution, as the engine hands it to an operation."""

    document: dict[str, Any]
    id: str = "J-1"
    execution_number: int = 1
    progress: dict[str, Any] = field(default_factory=dict)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    told: list[str] = field(default_factory=list)

    async def save(self, progress: dict[str, Any], message: str) -> None:
        self.progress = progress
        self.told.append(message)


def job(number: int = 1, **document: Any) -> Job:
    return Job(parse({"version": "1.0", "operation": "configure", **document})[1], id=f"J-{number}")


def operation(camera: Camera) -> Configure:
    return Configure(camera.configuration.set_fleet, camera.configuration.judge_fleet)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path, schema=False)


def document(site: Site) -> Any:
    return json.loads(site.pipeline.read_bytes())


async def test_a_job_sets_what_the_shadow_leaves_open_and_what_it_sets_goes_before(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        run = operation(camera).run
        patch = {"agent": {"telemetry": {"interval_s": 300}}, "targets": {"pipeline": {"fps": 5, "gain": 2}}}
        said = await run(job(1, **patch))
        assert said == {"message": "the configuration is in force and has proven itself"}
        assert (document(site), camera.interval_s, camera.watched) == ({"fps": 5, "gain": 2}, 300, 1)
        await camera.quiet()
        version = cloud.want({"targets": {"pipeline": {"fps": 9}}})
        await camera.until("applied", version=version)
        assert document(site) == {"fps": 9, "gain": 2}
        told = (await run(job(2, targets={"pipeline": {"fps": 6, "gain": 3}})))["message"]
        assert told.endswith("but for /targets/pipeline/fps: the camera's own shadow sets it otherwise")
        assert document(site) == {"fps": 9, "gain": 3}
        told = camera.configuration.explain("targets.pipeline.fps")
        assert (told["value"], told["origin"]) == (9, f"shadow version {version}")
        assert told["overrides"][0] == {"origin": "job J-2", "value": 6}
        assert camera.configuration.explain("targets.pipeline.gain")["origin"] == "job J-2"
        interval = camera.configuration.explain("telemetry.interval_s")
        assert (interval["origin"], interval["value"], interval["applies"]) == ("job J-1", 300, "live")
        assert interval["overrides"] == [{"origin": "site file", "value": 60}, {"origin": "default", "value": 60.0}]
        await camera.quiet()
        version = cloud.want({})
        await camera.until("applied", version=version)
        assert document(site) == {"fps": 6, "gain": 3}
        assert cloud.desired == {}
    async with running(site, cloud) as camera:
        await camera.quiet()
        assert (document(site), camera.interval_s, camera.watched) == ({"fps": 6, "gain": 3}, 300, 0)
        await operation(camera).run(job(3, agent={"telemetry": None}, targets={"pipeline": {"gain": None}}))
        assert (document(site), camera.interval_s) == ({"fps": 6}, 60)
        await operation(camera).run(job(4, targets={"pipeline": None}))
        assert site.pipeline.read_bytes() == OWN
        await operation(camera).run(job(5, targets={"lens": {"focus": 1}}))
        await operation(camera).run(job(6, agent={"log": {"level": "debug"}}, replace=True))
        assert not site.lens.exists()
        assert camera.configuration.explain("log.level")["origin"] == "job J-6"


async def test_what_is_wrong_with_it_is_rejected_and_nothing_is_touched(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        await camera.until("applied")
        for wrong, code, words in (
            ({"agent": {"cloud": {"endpoint": "evil"}}}, "local_only", "/agent/cloud/endpoint"),
            ({"agent": {"jobs": {"commands": "allow"}}}, "local_only", "/agent/jobs/commands"),
            ({"agent": {"telemetry": {"interval_s": "60"}}}, "wrong_type", "/agent/telemetry/interval_s"),
            ({"targets": {"nope": {}}}, "unknown_target", "/targets/nope"),
            ({"targets": {"lens": {"a": [1, {"b": None}, None]}}}, "not_json", "/targets/lens/a"),
            ({"agent": {"labels": {"site": "x" * 9000}}}, "too_large", "9"),
        ):
            with pytest.raises(RefusedError) as refused:
                await operation(camera).run(job(9, **wrong))
            assert refused.value.code == code, refused.value
            assert words in refused.value.message
            with pytest.raises(RefusedError):
                await operation(camera).plan(job(9, **wrong).document)
        assert_old(site, camera)
        assert camera.watched == camera.references == 0
        assert (await camera.until("applied"))["errors"] == []
        words = await operation(camera).plan(job(9, targets={"pipeline": {"fps": 2}}).document)
        assert "give target pipeline its new document" in words
        assert_old(site, camera)


async def test_what_spoils_the_images_is_taken_back_and_the_shadow_goes_on_as_before(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        await camera.quiet()
        version = cloud.want({"agent": {"telemetry": {"interval_s": 20}}})
        await camera.until("applied", version=version)
        camera.verdict = lambda: ["front: the images are dark"]
        with pytest.raises(FailedError) as failed:
            await operation(camera).run(job(targets={"pipeline": {"fps": 2}}))
        assert failed.value.code == "trial_failed"
        assert "taken back: /targets/pipeline: front: the images are dark" in failed.value.message
        assert (site.pipeline.read_bytes(), camera.interval_s) == (OWN, 20)
        status = await camera.until("applied", version=version)
        assert status["errors"] == []
        actions = [(entry["actor"], entry["action"]) for entry in await camera.store.read(lambda t: t.audit())]
        assert actions[0] == ("job J-1/1", "config.reverted")


async def test_a_part_that_can_not_be_taken_back_is_said(site: Site) -> None:
    async with running(site, ShadowCloud()) as camera:
        camera.verdict = lambda: ["dark"]
        site.reload_fails_for = OWN[:10]
        with pytest.raises(FailedError) as failed:
            await operation(camera).run(job(targets={"pipeline": {"fps": 2}}))
        assert failed.value.code == "rollback_failed"
        assert site.pipeline.read_bytes() == OWN


async def test_cancelled_before_and_on_trial(site: Site) -> None:
    async with running(site, ShadowCloud()) as camera:
        await camera.until("applied")
        camera.hold = Hold("window", "the configuration window opens Mon 22:00 UTC, in 3 h", 600)
        waiting = job(1, targets={"pipeline": {"fps": 2}})
        task = asyncio.create_task(operation(camera).run(waiting))
        await _until(lambda: "waits_for" in camera.configuration.state())
        assert camera.hold_asked[-1] == "job J-1/1"
        assert not camera.lock.locked()
        waiting.cancelled.set()
        with pytest.raises(FailedError, match="nothing was changed"):
            await task
        assert camera.references == 0
        camera.hold = None

        camera.release = asyncio.Event()
        tried = job(2, targets={"pipeline": {"fps": 2}})
        task = asyncio.create_task(operation(camera).run(tried))
        await camera.watching.wait()
        assert camera.configuration.state()["job"] == "J-2/1"
        tried.cancelled.set()
        with pytest.raises(FailedError) as failed:
            await task
        assert failed.value.code == "cancelled"
        assert "taken back" in failed.value.message
        assert_old(site, camera)
        assert not camera.lock.locked()
        camera.release = None
        await operation(camera).run(job(3, targets={"pipeline": {"fps": 2}}))
        assert document(site) == {"fps": 2}


async def test_the_shadow_is_followed_while_a_job_waits_for_its_window(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        camera.hold = Hold("window", "the configuration window opens Mon 22:00 UTC, in 3 h", 600)
        task = asyncio.create_task(operation(camera).run(job(targets={"pipeline": {"fps": 2}})))
        await _until(lambda: "waits_for" in camera.configuration.state())
        cloud.want({"agent": {"log": {"level": "debug"}}})
        await _until(lambda: camera.applied and camera.applied[-1].log.level == "debug")
        assert not task.done()
        camera.hold = None
        cloud.want({"agent": {"log": {"level": "info"}}})
        await task
        assert document(site) == {"fps": 2}


@pytest.mark.parametrize("reasons", [[], ["dark"]], ids=["good", "bad"])
async def test_a_cut_anywhere_leaves_one_true_end(reasons: list[str], tmp_path: Path) -> None:
    """The power goes at every step of a job's change; the job is run again after the restart, as the engine does."""
    tried = 0
    for cut_at in range(1, 200):
        folder = tmp_path / str(cut_at)
        folder.mkdir()
        site, cloud = Site(folder, schema=False), ShadowCloud()
        asked = job(targets={"pipeline": {"fps": 2}, "lens": {"focus": 1.5}})
        async with running(site, cloud, cut_at=cut_at, verdict=lambda: reasons) as camera:
            running_job = asyncio.create_task(operation(camera).run(asked))
            await asyncio.wait({running_job, camera.task}, return_when=asyncio.FIRST_COMPLETED)
            if was_whole := running_job.done():
                await _ended(running_job)
            running_job.cancel()
            await asyncio.wait({running_job})
        async with running(site, cloud, verdict=lambda: reasons) as camera:
            end = await _ended(asyncio.create_task(operation(camera).run(asked)))
            if reasons:
                assert end == "trial_failed", end
                assert_old(site, camera)
            elif end == "done":
                assert (document(site), site.lens.read_bytes()) == ({"fps": 2}, b"focus = 1.5\n")
            else:
                assert_old(site, camera)
        if was_whole:
            break
        tried += 1
    print(f"{tried} cuts of a job's change tried, images {reasons or 'well'}")
    assert tried > 5


async def test_a_job_can_open_the_window_that_the_shadow_waits_for(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        await camera.quiet()
        camera.hold = Hold("window", "the configuration window opens Mon 22:00 UTC, in 3 h", 600)
        cloud.want({"targets": {"pipeline": {"fps": 2}}})
        await _until(lambda: "waits_for" in camera.configuration.state())
        await operation(camera).run(job(agent={"maintenance": {"windows": []}, "log": {"level": "debug"}}))
        assert camera.applied[-1].log.level == "debug"
        camera.hold = None
        await _until(lambda: document(site) == {"fps": 2})


async def _ended(task: asyncio.Task[Any]) -> str:
    try:
        async with asyncio.timeout(20):
            await task
    except (FailedError, RefusedError) as error:
        return error.code
    return "done"


async def _until(true: Any) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.01)


# ---- agent.toml, the disk and the clock in the way


async def test_a_slip_in_agent_toml_costs_the_fleet_nothing(site: Site) -> None:
    """A source is renamed for one start, and named as before again."""
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        patch = {"telemetry": {"interval_s": 300}, "capture": {"sources": {"front": {"interval_s": 2}}}}
        await operation(camera).run(job(1, agent=patch))
    sources = site.document["capture"]["sources"]
    sources["back"] = sources.pop("front")
    async with running(site, cloud) as camera:
        await camera.quiet()
        assert camera.interval_s == 300, "what goes with agent.toml stays"
        (error,) = camera.configuration.state()["errors"]
        assert error["pointer"] == "/agent/capture/sources/front/interval_s"
        assert "set by job J-1" in error["message"]
        await operation(camera).run(job(2, agent={"log": {"level": "debug"}}))
        cloud.want({"targets": {"pipeline": {"fps": 3}}})
        await _until(lambda: document(site) == {"fps": 3})
    sources["front"] = sources.pop("back")
    async with running(site, cloud) as camera:
        await camera.quiet()  # what was on trial may be so still
        await _until(lambda: camera.configuration.state()["state"] == "applied")
        await _until(lambda: camera.applied[-1].capture.sources["front"].interval_s == 2)
        assert (camera.interval_s, camera.applied[-1].log.level) == (300, "debug")
        assert camera.configuration.state()["errors"] == []


async def test_a_target_that_moves_gets_its_document_at_its_new_place_and_the_old_one_its_own_file(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        await operation(camera).run(job(1, targets={"pipeline": {"fps": 2}}))
    target = site.document["config"]["targets"]["pipeline"]
    new = site.folder / "elsewhere.json"
    new.write_bytes(b'{"new": "place"}\n')
    target["path"] = str(new)
    async with running(site, cloud) as camera:
        await _until(lambda: json.loads(new.read_bytes()) == {"fps": 2})
        assert site.pipeline.read_bytes() == OWN
        await camera.quiet()
        await operation(camera).run(job(2, targets={"pipeline": None}))
        assert new.read_bytes() == b'{"new": "place"}\n'
        assert site.pipeline.read_bytes() == OWN
    target.update(path=str(site.pipeline))
    async with running(site, cloud) as camera:
        await operation(camera).run(job(3, targets={"pipeline": {"fps": 4}}))
    site.document["config"]["targets"].pop("pipeline")
    async with running(site, cloud) as camera:
        await camera.quiet()
        assert site.pipeline.read_bytes() == OWN
        assert camera.configuration.state()["errors"][0]["code"] == "unknown_target"
        await operation(camera).run(job(4, targets={"lens": {"focus": 2}}))
        assert "targets.pipeline.fps" not in camera.configuration.effective()


@pytest.mark.parametrize("becomes", ["api", "another file", "gone"])
async def test_a_target_that_is_changed_in_agent_toml_during_its_trial_is_taken_back(becomes: str, site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        camera.release = asyncio.Event()
        cloud.want({"targets": {"pipeline": {"fps": 2}}})
        await camera.watching.wait()
        assert document(site) == {"fps": 2}
    targets = site.document["config"]["targets"]
    if becomes == "gone":
        targets.pop("pipeline")
    elif becomes == "api":
        targets["pipeline"] = {"apply": "api"}
    else:
        targets["pipeline"]["path"] = str(site.folder / "other.json")
    async with running(site, cloud, verdict=lambda: ["dark"]) as camera:
        await camera.quiet()
        assert site.pipeline.read_bytes() == OWN
        assert await camera.store.read(lambda t: t.fact("config.trial")) is None
        assert cloud.reported["status"]["state"] in ("reverted", "rejected")


@pytest.mark.parametrize("by", ["shadow", "job"])
@pytest.mark.parametrize("reasons", [["dark"], []], ids=["bad", "good"])
async def test_a_disk_that_is_full_during_a_trial_leaves_what_was_proven(
    by: str, reasons: list[str], site: Site
) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        await camera.until("applied")
        camera.release = asyncio.Event()
        change = {"agent": {"telemetry": {"interval_s": 10}}, "targets": {"pipeline": {"fps": 2}}}
        if by == "job":
            task = asyncio.create_task(operation(camera).run(job(**change)))
        else:
            cloud.want(change)
        await camera.watching.wait()
        assert (document(site), camera.interval_s) == ({"fps": 2}, 10)
        camera.verdict = lambda: reasons
        camera.full = True
        camera.release.set()
        await asyncio.wait({camera.task})
        assert isinstance(camera.task.exception(), StoreError)
        assert (site.pipeline.read_bytes(), camera.interval_s) == (OWN, 60)
        for _ in range(3):  # as the supervisor does
            with pytest.raises(StoreError):
                await camera.configuration.run()
            assert (site.pipeline.read_bytes(), camera.interval_s) == (OWN, 60)
        camera.verdict = lambda: ["dark"]
        camera.full = False
        camera.task = asyncio.create_task(camera.configuration.run())
        if by == "job":
            assert await _ended(task) in ("trial_failed", "trial_interrupted")
        else:
            await camera.until("reverted")
        assert site.pipeline.read_bytes() == OWN


async def test_what_could_not_be_put_back_is_put_back_later_and_said_until_then(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        camera.verdict = lambda: ["dark"]
        site.reload_fails_for = OWN[:10]
        cloud.want({"targets": {"pipeline": {"fps": 2}}})
        status = await camera.until("reverted")
        assert [error["code"] for error in status["errors"]] == ["trial_failed", "revert_failed"]
        cloud.want({})
        await _until(lambda: camera.cloud.reported["status"]["state"] == "applied")
        assert camera.cloud.reported["status"]["errors"][0]["code"] == "revert_failed"
    site.loaded.clear()
    site.reload_fails_for = b"never"
    async with running(site, cloud) as camera:
        await camera.quiet()
        await _until(lambda: not camera.configuration.state()["errors"])
        assert site.loaded["pipeline.service"] == OWN


async def test_another_job_of_the_same_name_is_another_job(site: Site) -> None:
    async with running(site, ShadowCloud()) as camera:
        await operation(camera).run(job(1, targets={"pipeline": {"fps": 2}}))
        await operation(camera).run(job(1, targets={"pipeline": {"fps": 7}}))
        assert document(site) == {"fps": 7}


@pytest.mark.parametrize("moment", ["hold", "reference", "write"])
async def test_a_cancel_at_the_last_moment_before_the_trial_is_not_lost(moment: str, site: Site) -> None:
    async with running(site, ShadowCloud()) as camera:
        await camera.until("applied")
        asked = job(targets={"pipeline": {"fps": 2}})
        held, reference, keep = camera.held, camera.reference, camera.configuration._keeper.keep

        async def late(subject: str) -> Any:
            if len(camera.hold_asked) == 1 and moment == "hold":
                asked.cancelled.set()
            return await held(subject)

        async def refer() -> Any:
            if moment == "reference":
                asked.cancelled.set()
            return await reference()

        async def write(kept: Any, note: Any = None) -> None:
            if moment == "write":
                asked.cancelled.set()
            await keep(kept, note)

        camera.configuration._hold = camera.configuration._patience._hold = late
        object.__setattr__(camera.configuration._changes._camera, "gate", camera)
        camera.reference = refer
        camera.configuration._keeper.keep = write
        assert await _ended(asyncio.create_task(operation(camera).run(asked))) == "cancelled"
        assert_old(site, camera)
