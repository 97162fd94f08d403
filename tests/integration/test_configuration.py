from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from agent import setting_keys as schema
from agent import settings_file
from agent.config import records
from agent.config.configuration import Configuration
from agent.config.deliveries import Deliveries
from agent.errors import CloudError, FailedError, RefusedError, StoreError
from agent.maintenance import Hold
from agent.settings import Remote, Settings
from agent.store import Store
from tests.fakes_shadow import ShadowCloud

OWN = b'{"fps": 1, "by": "the site"}\n'
A = {"agent": {"telemetry": {"interval_s": 10}}, "targets": {"pipeline": {"fps": 2}, "lens": {"focus": 1.5}}}
B = {"agent": {"telemetry": {"interval_s": 20}}, "targets": {"pipeline": {"fps": 3}}}
FINAL = ("applied", "rejected", "reverted")


class Cut(BaseException):
    """The power goes."""


@dataclass
class Steps:
    """Counts the points at which the power may go, and cuts it at one of them."""

    cut_at: int = 0
    count: int = 0

    def __call__(self) -> None:
        self.count += 1
        if self.count == self.cut_at:
            raise Cut


class CutStore:
    """A Store whose writes have a cut point before and after."""

    def __init__(self, store: Store, step: Steps, full: Callable[[], bool]) -> None:
        self._store, self._step, self.full = store, step, full
        self.read = store.read

    async def write(self, change: Any) -> Any:
        if self.full():
            raise StoreError("disk_full", "no space left on device")
        self._step()
        result = await self._store.write(change)
        self._step()
        return result


@dataclass
class UnitState:
    active: str = "active"
    sub: str = "running"
    restarts: int = 0


class Site:
    """What survives on a camera's disk, and the programs beside the agent."""

    def __init__(self, folder: Path, check: list[str] | None = None, *, schema: bool = True) -> None:
        self.folder = folder
        self.pipeline, self.lens = folder / "pipeline.json", folder / "lens.toml"
        self.loaded: dict[str, bytes | None] = {}
        self.unit = UnitState()
        self.pipeline.write_bytes(OWN)
        self.pipeline.chmod(0o640)
        self.reload_fails_for = b"never"
        schema_file = folder / "pipeline.schema.json"
        fps = {"type": "number", "maximum": 30}
        schema_file.write_text(json.dumps({"properties": {"fps": fps}, "additionalProperties": False}))
        self.document: dict[str, Any] = {
            "telemetry": {"interval_s": 60},
            "capture": {"sources": {"front": {"directory": str(folder)}}},
            "config": {
                "trial_s": 5,
                "connectivity_trial_s": 1,
                "targets": {
                    "pipeline": {
                        "path": str(self.pipeline),
                        **({"schema_file": str(schema_file)} if schema else {}),
                        "apply": "reload",
                        "unit": "pipeline.service",
                        **({"check": check} if check else {}),
                    },
                    "lens": {"path": str(self.lens), "format": "toml"},
                },
            },
        }

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.folder.iterdir() if path.suffix in (".json", ".toml")}


class Camera:
    """One run of the agent's process on a site: the real store, files and commands; the gate's verdict is given."""

    def __init__(
        self, site: Site, cloud: ShadowCloud, *, cut_at: int = 0, verdict: Callable[[], list[str]] = list
    ) -> None:
        self.site, self.cloud, self.verdict = site, cloud, verdict
        self.step = Steps(cut_at)
        self.lock = asyncio.Lock()
        self.interval_s = site.document["telemetry"]["interval_s"]
        self.watching = asyncio.Event()
        self.release: asyncio.Event | None = None
        self.references = self.watched = 0
        self.may_settle = asyncio.Event()
        self.may_settle.set()
        self.applied: list[Settings] = []
        self.agent_error: Exception | None = None
        self.remote = schema.remote
        self.hears_desired = True
        self.refresh_s = 3600.0
        self.boot_id = "one"
        self.hold: Hold | None = None
        self.hold_asked: list[str] = []
        self.rebooting = asyncio.Event()
        self.reconnects = 0
        self.full = False

    async def start(self) -> None:
        self.store = await Store.open(self.site.folder / "state.db")
        self.deliveries = Deliveries(self.site.document["config"]["targets"])
        self.configuration = Configuration(
            site=self.site.document,
            settings=settings_file.validate(self.site.document, "site"),
            store=CutStore(self.store, self.step, lambda: self.full),
            shadow=self.cloud.reconnect(),
            units=self,
            gate=self,
            apply_agent=self.apply_agent,
            mutation_lock=self.lock,
            online=lambda: self.cloud.online,
            on_change=self.cloud.changed.set,
            settle_s=0,
            refresh_s=self.refresh_s,
            remote=self.remote,
            boot_id=self.boot_id,
            deliveries=self.deliveries,
            hold=self.held,
            reboot=self.reboot,
            reconnect=self.reconnect,
        )
        self.cloud.on_desired = self.configuration.look_again if self.hears_desired else lambda: None
        self.task = asyncio.create_task(self.configuration.run())
        await self.configuration.on_ready()

    async def stop(self) -> None:
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Cut):
            await self.task
        await self.store.close()

    async def until(self, *states: str, version: int | None = None) -> dict[str, Any]:
        """The reported status, once it has one of `states` for the desired version."""

        def status() -> dict[str, Any]:
            return self.cloud.reported.get("status", {})

        def done() -> bool:
            return status().get("state") in states and version in (None, status()["desired_version"])

        waiting = asyncio.create_task(self.cloud.until(done))
        await asyncio.wait([waiting, self.task], return_when=asyncio.FIRST_COMPLETED)
        if not waiting.done():
            waiting.cancel()
            await self.task
        await waiting
        return status()

    async def quiet(self) -> None:
        """Until the agent waits: for news of the shadow with all it knew of dealt with, or for the lock."""
        wake = self.configuration._wake
        async with asyncio.timeout(10):
            for _ in range(3):
                while not (self.lock._waiters or (wake._waiters and not wake.is_set())):
                    await asyncio.sleep(0.001)
                await asyncio.sleep(0)

    async def apply_agent(self, settings: Settings) -> None:
        self.step()
        if self.agent_error and settings.telemetry.interval_s != 60:
            raise self.agent_error
        self.applied.append(settings)
        self.interval_s = settings.telemetry.interval_s
        self.step()

    async def reload(self, unit: str) -> None:
        self.step()
        content = await asyncio.to_thread(lambda: self.site.files().get("pipeline.json"))
        if content and self.site.reload_fails_for in content:
            raise FailedError("unit_failed", f"{unit}: reload failed")
        self.site.loaded[unit] = content
        self.step()

    async def restart(self, unit: str) -> None:
        raise AssertionError(unit)

    async def held(self, subject: str) -> Hold | None:
        self.hold_asked.append(subject)
        return self.hold

    async def reboot(self) -> None:
        self.rebooting.set()
        await asyncio.Event().wait()

    async def reconnect(self) -> None:
        self.reconnects += 1

    async def state(self, unit: str) -> UnitState:
        return self.site.unit

    async def settled(self) -> None:
        await self.may_settle.wait()

    async def reference(self) -> dict[str, Any]:
        self.references += 1
        self.step()
        return {"front": {"rate": 1.0}}

    def judging_s(self, reference: Any, intervals: Any) -> float:
        return max(intervals, default=0.0)

    async def watch(self, reference: Any, *, stable_for_s: float, deadline_s: float) -> tuple[bool, list[str]]:
        assert reference == {"front": {"rate": 1.0}}
        assert 0 < stable_for_s <= deadline_s
        self.watched += 1
        self.watching.set()
        self.step()
        if self.release:
            await self.release.wait()
        reasons = self.verdict()
        self.step()
        return not reasons, reasons


@contextlib.asynccontextmanager
async def running(site: Site, cloud: ShadowCloud, **options: Any) -> AsyncIterator[Camera]:
    camera = Camera(site, cloud, **options)
    await camera.start()
    try:
        yield camera
    finally:
        await camera.stop()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def assert_old(site: Site, camera: Camera) -> None:
    files = site.files()
    assert files["pipeline.json"] == OWN
    assert "lens.toml" not in files
    assert site.loaded.get("pipeline.service", OWN) == OWN
    assert camera.interval_s == 60


def assert_a(site: Site, camera: Camera) -> None:
    files = site.files()
    assert json.loads(files["pipeline.json"]) == {"fps": 2}
    assert files["lens.toml"] == b"focus = 1.5\n"
    assert site.loaded["pipeline.service"] == files["pipeline.json"]
    assert camera.interval_s == 10


def assert_b(site: Site, camera: Camera) -> None:
    files = site.files()
    assert json.loads(files["pipeline.json"]) == {"fps": 3}
    assert "lens.toml" not in files
    assert site.loaded["pipeline.service"] == files["pipeline.json"]
    assert camera.interval_s == 20


async def test_a_camera_without_a_shadow_reports_and_writes_nothing_else(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        assert await camera.until("applied") == {"state": "applied", "desired_version": 0, "errors": []}
        assert_old(site, camera)
        assert cloud.desired == {}
        await camera.quiet()
        assert len(cloud.reports) == 1


async def test_a_good_document_is_tried_and_stays(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        await camera.until("applied")
        version = cloud.want(A)
        camera.release = asyncio.Event()
        status = await camera.until("trial")
        assert camera.lock.locked()
        assert status["desired_version"] == version
        camera.release.set()
        await camera.until("applied", version=version)
        assert_a(site, camera)
        assert site.pipeline.stat().st_mode & 0o777 == 0o640
        assert site.lens.stat().st_mode & 0o777 == 0o644
        assert cloud.delta == {}
        assert cloud.desired == A
        assert camera.configuration.explain("telemetry.interval_s")["origin"] == f"shadow version {version}"
        assert camera.configuration.effective()["targets.pipeline.fps"]["value"] == 2
        assert not camera.lock.locked()
        assert (await camera.store.read(lambda t: t.audit()))[0]["action"] == "config.applied"
    async with running(site, cloud) as again:
        await again.quiet()
        assert again.watched == 0
        assert_a(site, again)


async def test_the_wait_for_a_reference_locks_nothing_and_ends_when_something_else_is_wanted(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        camera.may_settle.clear()
        cloud.want({"targets": {"pipeline": {"fps": 2}}})
        async with asyncio.timeout(20):
            while "waits_for" not in camera.configuration.state():
                await asyncio.sleep(0.01)
        assert not camera.lock.locked()
        assert camera.references == 0
        edited = json.dumps({"fps": 7}).encode()
        await asyncio.to_thread(site.pipeline.write_bytes, edited)
        cloud.want({"targets": {"pipeline": {"fps": 3}}})
        camera.may_settle.set()
        camera.verdict = lambda: ["the images are dark"]
        await camera.until("reverted")
        assert camera.references == 1
        assert await asyncio.to_thread(site.pipeline.read_bytes) == edited, "what was edited meanwhile is put back"


async def test_log_level_and_telemetry_apply_live_without_a_trial(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        version = cloud.want({"agent": {"log": {"level": "debug"}, "telemetry": {"interval_s": 5}}})
        await camera.until("applied", version=version)
        assert camera.applied[-1].log.level == "debug"
        assert (camera.references, camera.watched) == (0, 0)
        assert cloud.delta == {}


async def test_bad_images_take_it_back_and_it_is_not_tried_again(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud, verdict=lambda: ["front: images are blurred"]) as camera:
        version = cloud.want(A)
        status = await camera.until("reverted", version=version)
        assert [(e["code"], e["message"]) for e in status["errors"]] == [("trial_failed", "front: images are blurred")]
        assert_old(site, camera)
        assert cloud.delta["targets"] == A["targets"]
        assert cloud.reported["agent"] == {"telemetry": {"interval_s": 60}}
        await camera.configuration.on_ready()
        await camera.quiet()
        assert camera.watched == 1
        reports = len(cloud.reports)
    async with running(site, cloud) as again:
        await again.quiet()
        assert again.configuration.state()["state"] == "reverted"
        assert again.watched == 0
        assert len(cloud.reports) == reports
        await again.until("applied", version=cloud.want(B))
        assert_b(site, again)


async def test_removing_what_was_set_brings_back_the_sites_own_files(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        await camera.until("applied", version=cloud.want(A))
        await camera.until("applied", version=cloud.want(B))
        assert_b(site, camera)
        await camera.until("applied", version=cloud.want(None))
        assert_old(site, camera)
        assert cloud.reported.keys() == {"status"}
        assert await camera.store.read(lambda t: t.fact(records.ORIGINALS)) == {}


async def test_a_removal_that_no_message_tells_is_noticed_by_looking(site: Site) -> None:
    cloud = ShadowCloud()
    camera = Camera(site, cloud)
    camera.hears_desired, camera.refresh_s = False, 0.01
    await camera.start()
    try:
        await camera.until("applied", version=cloud.want(A))
        await camera.until("applied", version=cloud.want(None))
        assert_old(site, camera)
    finally:
        await camera.stop()


async def test_everything_wrong_is_said_at_once_and_nothing_is_touched(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        first = cloud.want(
            {"agent": {"cloud": {"endpoint": "x"}, "log": {"levle": "x"}}, "targets": {"nope": {"x": 1}}}
        )
        errors = (await camera.until("rejected", version=first))["errors"]
        assert sorted(error["pointer"] for error in errors) == [
            "/agent/cloud/endpoint",
            "/agent/log/levle",
            "/targets/nope",
        ]
        second = cloud.want({"agent": {"log": {"level": "debug"}}, "targets": {"pipeline": {"fps": 99, "x": 1}}})
        errors = (await camera.until("rejected", version=second))["errors"]
        assert {(error["pointer"], error["code"]) for error in errors} == {
            ("/targets/pipeline/fps", "schema_violation"),
            ("/targets/pipeline", "schema_violation"),
        }
        assert_old(site, camera)
        assert camera.applied == []
        assert cloud.delta["agent"] == {"log": {"level": "debug"}}
        await camera.quiet()
        assert len(cloud.reports) <= 3


async def test_the_check_command_sees_the_candidate_and_its_words_are_reported(tmp_path: Path) -> None:
    script = 'test "$(cat "$1")" != "$(cat ' + str(tmp_path / "pipeline.json") + ')" || exit 9; '
    script += 'if grep -q 7 "$1"; then echo "hint: try 6" >&2; echo "fps 7 flickers" >&2; exit 3; fi'
    site = Site(tmp_path, check=["sh", "-c", script, "check", "{path}"])
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        status = await camera.until("rejected", version=cloud.want({"targets": {"pipeline": {"fps": 7}}}))
        message = "refused by its check: exit status 3: fps 7 flickers"
        assert status["errors"] == [{"pointer": "/targets/pipeline", "message": message, "code": "check_failed"}]
        assert_old(site, camera)
        await camera.until("applied", version=cloud.want({"targets": {"pipeline": {"fps": 6}}}))
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "No such file"), ("{", "not valid JSON"), ('{"type": 5}', "not a JSON Schema"),
     ('{"$ref": "http://127.0.0.1:9/x.json"}', "not found")],
)  # fmt: skip
async def test_an_unusable_schema_is_said_and_tried_again_after_a_restart(site: Site, content: str, words: str) -> None:
    file = Path(site.document["config"]["targets"]["pipeline"]["schema_file"])
    good = file.read_text()
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        version = cloud.want(A)
        (error,) = (await camera.until("rejected", version=version))["errors"]
        assert error["code"] == "schema_unusable"
        assert words in error["message"]
    file.write_text(good)
    async with running(site, cloud) as again:
        await again.until("applied")
        assert_a(site, again)


async def test_a_check_that_can_not_start_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    site = Site(tmp_path, check=["/no/such/check"])
    site.document["config"]["targets"]["lens"]["path"] = str(tmp_path / "gone" / "lens.toml")
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        errors = (await camera.until("rejected", version=cloud.want(A)))["errors"]
        assert {error["code"] for error in errors} == {"check_unusable", "target_unwritable"}
        assert_old(site, camera)


@pytest.mark.parametrize("failing", ["reload", "agent", "bug", "unit"])
async def test_a_component_that_does_not_take_it_takes_all_of_it_back(site: Site, failing: str) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        if failing == "reload":
            site.reload_fails_for = b'"fps": 2'
        elif failing == "agent":
            camera.agent_error = FailedError("capture_busy", "capture can't be changed now")
        elif failing == "bug":
            camera.agent_error = ZeroDivisionError("oops")
        else:
            camera.verdict = lambda: setattr(site.unit, "restarts", 2) or []
        status = await camera.until("reverted", version=cloud.want(A))
        code = {"reload": "unit_failed", "agent": "capture_busy", "bug": "internal_error", "unit": "trial_failed"}[
            failing
        ]
        assert [error["code"] for error in status["errors"]] == [code]
        assert_old(site, camera)


async def test_a_command_applies_and_may_fail(site: Site) -> None:
    copy = site.folder / "copy.txt"
    target = site.document["config"]["targets"]["lens"]
    target["apply"] = ["sh", "-c", f"cp {site.lens} {copy} || exit 4; ! grep -q 9 {copy}"]
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        await camera.until("applied", version=cloud.want({"targets": {"lens": {"focus": 1}}}))
        assert copy.read_bytes() == b"focus = 1\n"
        await camera.until("reverted", version=cloud.want({"targets": {"lens": {"focus": 9}}}))
        assert copy.read_bytes() == site.lens.read_bytes() == b"focus = 1\n"


async def test_repeated_and_old_deltas_change_nothing(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud, verdict=lambda: ["dark"]) as camera:
        version = cloud.want(A)
        await camera.until("reverted", version=version)
        await camera.quiet()
        reports, gets = len(cloud.reports), cloud.gets
        for _ in range(3):
            cloud.deliver(cloud.version, A)
            await camera.quiet()
        assert cloud.gets == gets
        cloud.deliver(1, {"agent": {"log": {"level": "debug"}}})
        await camera.quiet()
        assert (len(cloud.reports), camera.watched) == (reports, 1)


async def test_many_wishes_in_a_row_end_with_the_last(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        for fps in range(1, 30):
            version = cloud.want({"targets": {"pipeline": {"fps": fps}}})
        await camera.until("applied", version=version)
        assert camera.watched == 1
        assert json.loads(site.pipeline.read_bytes()) == {"fps": 29}


async def test_what_is_newer_when_the_lock_is_free_is_what_is_applied(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        await camera.until("applied")
        await camera.lock.acquire()
        cloud.want(A)
        await camera.quiet()
        assert_old(site, camera)
        assert "another change" in camera.configuration.state()["waits_for"]
        cloud.want(B)
        await camera.quiet()
        camera.lock.release()
        await camera.watching.wait()
        await camera.quiet()
        assert_b(site, camera)
        assert camera.watched == 1


async def test_a_shadow_that_was_deleted_and_made_anew_is_followed(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        for document in (A, B, A):
            await camera.until("applied", version=cloud.want(document))
        cloud.delete(forget_version=True)
        version = cloud.want(B)
        await camera.until("applied", version=version)
        assert version < 3
        assert_b(site, camera)


async def test_off_line_the_stored_configuration_holds_and_the_end_is_reported_later(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        version = cloud.want(A)
        camera.release = asyncio.Event()
        await camera.until("trial")
        cloud.online = False
        camera.release.set()
        async with asyncio.timeout(10):
            while camera.configuration.state()["state"] != "applied":
                cloud.changed.clear()
                await cloud.changed.wait()
        assert cloud.reported["status"]["state"] == "trial"
    async with running(site, cloud) as camera:
        await camera.quiet()
        assert_a(site, camera)
        cloud.online = True
        await camera.configuration.on_ready()
        await camera.until("applied", version=version)
        assert cloud.delta == {}


async def test_a_passing_fault_is_retried_and_a_refusal_is_not_repeated(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.config.configuration.LONGEST_BACK_OFF_S", 0.01)
    cloud = ShadowCloud()
    cloud.refuse_next = [CloudError("429", "slow down", retryable=True), CloudError("500", "sorry", retryable=True)]
    async with running(site, cloud) as camera:
        await camera.until("applied")
        cloud.refuse_next = [CloudError("400", "State contains an invalid node")]
        cloud.want({"agent": {"log": {"level": "debug"}}})
        await camera.quiet()
        async with asyncio.timeout(10):
            while cloud.refuse_next:
                await asyncio.sleep(0)
        await camera.quiet()
        assert len(cloud.reports) == 1
        assert camera.configuration.state()["state"] == "applied"


async def test_a_document_too_large_to_mirror_is_applied_and_its_state_reported(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        version = cloud.want({"targets": {"lens": {"note": "n" * 6000}}})
        status = await camera.until("applied", version=version)
        assert status["left_out"] == ["/targets/lens"]
        await camera.quiet()
        reports = len(cloud.reports)
        cloud.deliver(cloud.version + 1, {})
        await camera.quiet()
        assert len(cloud.reports) == reports


async def test_413_leaves_the_state(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud, verdict=lambda: ["dark " * 100]) as camera:
        await camera.until("applied")
        camera.release = asyncio.Event()
        cloud.want(A)
        await camera.until("trial")
        cloud.refuse_next = [CloudError("413", "The payload exceeds the maximum size allowed")]
        camera.release.set()
        status = await camera.until("reverted")
        assert 1 < len(status["errors"][0]["message"]) <= 120


@pytest.mark.parametrize("reached", [True, False])
async def test_a_change_of_the_connection_has_to_reach_the_cloud(site: Site, reached: bool) -> None:
    def marks(path: tuple[str, ...]) -> Remote | None:
        return Remote("connectivity") if path == ("cloud", "keep_alive_s") else schema.remote(path)

    cloud = ShadowCloud()
    camera = Camera(site, cloud)
    camera.remote = marks
    apply = camera.apply_agent

    async def apply_agent(settings: Settings) -> None:
        await apply(settings)
        cloud.online = reached or settings.cloud.keep_alive_s == 45

    camera.apply_agent = apply_agent
    await camera.start()
    try:
        version = cloud.want({"agent": {"cloud": {"keep_alive_s": 600}}})
        if reached:
            await camera.until("applied", version=version)
            assert camera.watched == 1
        else:
            async with asyncio.timeout(10):
                while camera.configuration.state()["state"] != "reverted":
                    cloud.changed.clear()
                    await cloud.changed.wait()
            await camera.configuration.on_ready()
            status = await camera.until("reverted", version=version)
            assert [error["code"] for error in status["errors"]] == ["unreachable"]
            assert camera.applied[-1].cloud.keep_alive_s == 45
    finally:
        await camera.stop()


async def test_a_stored_configuration_that_no_longer_fits_agent_toml_gives_way(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        wanted = {"agent": {"capture": {"sources": {"front": {"interval_s": 2}}}}}
        await camera.until("applied", version=cloud.want(wanted))
    sources = site.document["capture"]["sources"]
    sources["back"] = sources.pop("front")
    async with running(site, cloud) as camera:
        await camera.quiet()
        (error,) = camera.cloud.reported["status"]["errors"]
        assert error["pointer"] == "/agent/capture/sources/front/interval_s"
        assert "set by shadow version" in error["message"]
        assert camera.applied == []
    sources["front"] = sources.pop("back")
    async with running(site, cloud) as camera:
        await camera.quiet()
        assert camera.applied[-1].capture.sources["front"].interval_s == 2


async def test_records_that_can_not_be_read_do_not_stop_the_agent(site: Site) -> None:
    cloud = ShadowCloud()
    async with running(site, cloud) as camera:
        await camera.until("applied", version=cloud.want(A))

        def damage(tables: Any) -> None:
            for key in (records.GOOD, records.TRIAL, records.REFUSED, records.PLACED):
                tables.set_fact(key, {"something": "else"})

        await camera.store.write(damage)
    async with running(site, cloud) as camera:
        await camera.watching.wait()
        await camera.quiet()
        await camera.until("applied")
        assert_a(site, camera)


async def test_explain_refuses_an_unknown_key(site: Site) -> None:
    async with running(site, ShadowCloud()) as camera:
        with pytest.raises(RefusedError) as caught:
            camera.configuration.explain("telemetry.intervall_s")
        assert caught.value.hint == "did you mean interval_s?"


async def test_a_decision_to_take_it_back_holds_across_a_restart(tmp_path: Path) -> None:
    decided = 0
    for cut_at in range(1, 100):
        folder = tmp_path / str(cut_at)
        folder.mkdir()
        site, cloud = Site(folder, schema=False), ShadowCloud()
        version = cloud.want(A)
        async with running(site, cloud, cut_at=cut_at, verdict=lambda: ["dark"]) as camera:
            try:
                await camera.until(*FINAL, version=version)
                break
            except Cut:
                record = await camera.store.read(lambda t: t.fact(records.TRIAL))
        async with running(site, cloud) as camera:
            status = await camera.until(*FINAL, version=version)
            if record and record["phase"] == "reverting":
                decided += 1
                assert (status["state"], status["errors"][0]["message"]) == ("reverted", "dark")
                assert_old(site, camera)
    assert decided > 3


Flow = tuple[dict[str, Any] | None, dict[str, Any] | None, list[str], Callable[..., None], Callable[..., None] | None]
BAD = {"agent": {"telemetry": {"interval_s": 20}}, "targets": {"pipeline": {"fps": 99}}}
FLOWS: dict[str, Flow] = {
    "from the site's own to A": (None, A, [], assert_old, assert_a),
    "from A to B": (A, B, [], assert_a, assert_b),
    "from A to nothing": (A, None, [], assert_a, assert_old),
    "from the site's own to A, images get dark": (None, A, ["dark"], assert_old, None),
    "from A to B, images get dark": (A, B, ["dark"], assert_a, None),
    "from A to what the schema refuses": (A, BAD, [], assert_a, None),
}


@pytest.mark.parametrize("name", FLOWS)
async def test_any_two_cuts_leave_the_old_or_the_new_whole(name: str, tmp_path: Path, request: Any) -> None:
    """The power goes at every step of a flow, and again after the restart, at every third step unless `--exhaustive`."""
    stride = 1 if request.config.getoption("--exhaustive", default=False) else 3
    before, after, reasons, old, new = FLOWS[name]
    tried = ends_old = ends_new = 0

    async def one(first: int, second: int) -> tuple[bool, bool]:
        nonlocal tried, ends_old, ends_new
        folder = tmp_path / f"{first}-{second}"
        folder.mkdir()
        site, cloud = Site(folder, schema=after is BAD), ShadowCloud()  # looking at a schema takes a process
        if before:
            async with running(site, cloud) as camera:
                await camera.until("applied", version=cloud.want(before))
        version = cloud.want(after)
        was_cut = []
        for cut_at in (first, second):
            async with running(site, cloud, cut_at=cut_at, verdict=lambda: reasons) as camera:
                try:
                    await camera.until(*FINAL, version=version)
                except Cut:
                    was_cut.append(True)
                else:
                    was_cut.append(False)
        async with running(site, cloud, verdict=lambda: reasons) as camera:
            status = await camera.until(*FINAL, version=version)
            await camera.quiet()
            assert camera.configuration.state()["state"] == status["state"]
            if status["state"] == "applied":
                assert new
                new(site, camera)
                assert cloud.delta == {}
                assert status["errors"] == []
                ends_new += 1
            else:
                old(site, camera)
                assert status["errors"]
                assert cloud.delta or not after
                ends_old += 1
            assert await camera.store.read(lambda t: t.fact(records.TRIAL)) is None
            assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
        assert cloud.desired == (after or {})
        tried += 1
        return was_cut[0], was_cut[1]

    first = 1
    while True:
        second = 1 + first % stride
        while True:
            cut_first, cut_second = await one(first, second)
            if not cut_second:
                break
            second += stride
        if not cut_first:
            break
        first += 1
    print(f"{name}: {tried} pairs of cuts tried, {ends_new} ended with the new, {ends_old} with the old")
    assert tried > 5
    assert (ends_new > 0) == (new is not None)
