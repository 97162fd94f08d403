"""A configuration that takes effect by a reboot: the reboot is part of its trial, and part of taking it back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes_shadow import ShadowCloud
from tests.integration.test_configuration import OWN, Camera, Cut, Site


class Machine:
    """A camera that boots: each boot has its id, and what programs run with is what the file held when it booted."""

    def __init__(self, folder: Path, reasons: Callable[[bytes], list[str]]) -> None:
        self.site = Site(folder, schema=False)
        target = self.site.document["config"]["targets"]["pipeline"]
        del target["unit"]
        target["apply"] = "reboot"
        self.cloud = ShadowCloud()
        self.reasons = reasons
        self.boots = 0
        self.boot()

    def boot(self) -> None:
        self.boots += 1
        self.booted_with = self.site.pipeline.read_bytes()

    async def live(self, *, cut_at: int = 0, until: Callable[[], bool]) -> str:
        """One life of the agent: ended by a reboot, by a cut, or because `until` holds."""
        camera = Camera(self.site, self.cloud, cut_at=cut_at, verdict=lambda: self.reasons(self.booted_with))
        camera.boot_id = f"boot {self.boots}"
        await camera.start()
        done = asyncio.create_task(self.cloud.until(until))
        rebooting = asyncio.create_task(camera.rebooting.wait())
        try:
            await asyncio.wait({done, rebooting, camera.task}, return_when=asyncio.FIRST_COMPLETED)
            if camera.task.done():
                assert isinstance(camera.task.exception(), Cut), camera.task.exception()
                return "cut"
            return "reboot" if rebooting.done() else "done"
        finally:
            for task in (done, rebooting):
                task.cancel()
            await asyncio.wait({done, rebooting})
            await camera.stop()

    async def settle(self, state: str) -> None:
        """Live, and boot as asked for, until the shadow reports `state` for what it wants."""

        def done() -> bool:
            status = self.cloud.reported.get("status", {})
            return status.get("state") == state and (state != "applied" or not self.cloud.delta)

        while await self.live(until=done) != "done":
            self.boot()
            assert self.boots < 8, "it boots for ever"


def dark(loaded: bytes) -> list[str]:
    return ["front: the images are dark"] if b"bad" in loaded else []


async def test_it_stays_when_the_images_are_well_after_the_reboot(tmp_path: Path) -> None:
    machine = Machine(tmp_path, dark)
    machine.cloud.want({"targets": {"pipeline": {"mode": "good"}}})
    await machine.settle("applied")
    assert json.loads(machine.booted_with) == {"mode": "good"}
    assert machine.boots == 2


async def test_it_is_taken_back_by_another_reboot(tmp_path: Path) -> None:
    machine = Machine(tmp_path, dark)
    machine.cloud.want({"targets": {"pipeline": {"mode": "bad"}}})
    await machine.settle("reverted")
    assert machine.booted_with == machine.site.pipeline.read_bytes() == OWN
    assert machine.boots == 3
    (error,) = machine.cloud.reported["status"]["errors"]
    assert error["message"] == "front: the images are dark"
    await machine.settle("reverted")
    assert machine.boots == 3


@pytest.mark.parametrize("mode", ["good", "bad"])
@pytest.mark.parametrize("boots_by_itself", [True, False], ids=["power cut", "kill"])
async def test_a_cut_anywhere_ends_with_what_the_camera_booted_with(
    mode: str, boots_by_itself: bool, tmp_path: Path
) -> None:
    """The power goes, or the agent is killed, at every step of every life."""
    tried = 0
    for life in range(3):
        for cut_at in range(1, 100):
            folder = tmp_path / f"{life}-{cut_at}"
            folder.mkdir()
            machine = Machine(folder, dark)
            machine.cloud.want({"targets": {"pipeline": {"mode": mode}}})

            def ended(machine: Machine = machine) -> bool:
                return machine.cloud.reported.get("status", {}).get("state") in ("applied", "reverted")

            for _ in range(life):
                if await machine.live(until=ended) == "reboot":
                    machine.boot()
            how = await machine.live(cut_at=cut_at, until=ended)
            if how == "cut" and not boots_by_itself:
                how = "killed"
            elif how in ("cut", "reboot"):
                machine.boot()
            state = ""
            while state not in ("applied", "reverted"):
                if await machine.live(until=ended) == "reboot":
                    machine.boot()
                state = machine.cloud.reported.get("status", {}).get("state", "")
                assert machine.boots < 9, "it boots for ever"
            held = machine.site.pipeline.read_bytes()
            assert machine.booted_with == held, (how, life, cut_at, state)
            assert (state == "applied") == (held != OWN), (how, life, cut_at, state)
            assert mode == "good" or state == "reverted"
            tried += 1
            if how not in ("cut", "killed"):
                break
    print(f"{tried} {'power cuts' if boots_by_itself else 'kills'} around a reboot for a {mode} configuration tried")
    assert tried > 10
