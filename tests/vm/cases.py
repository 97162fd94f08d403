"""What is shown in the virtual machine: each case drives the camera and returns what was seen, in words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.vm.drive import Camera, Result, Unexpected, require
from tests.vm.image import Images

TO_THE_END = (
    "half downloaded", "written 40 %", "before save ARMED", "before set-primary", "after set-primary", "going down",
    "after save TRIAL", "before set-state good", "after save COMMITTED",
)  # fmt: skip
IN_BETWEEN = (
    "after save VERIFIED", "after save WAITING", "after save INSTALLING", "after save ARMED", "before save RESTARTING",
    "after save RESTARTING", "starting", "before save COMMITTING", "after set-state good", "before save COMMITTED",
)  # fmt: skip
TWICE = ("written 20 %", "written 70 %")
GOING_BACK = ("after save ROLLING_BACK", "after set-state bad", "before save ROLLED_BACK")


@dataclass
class Bench:
    """The camera, and which version it is to run now."""

    camera: Camera
    images: Images
    version: int = 1
    last: int = 1

    def begin_anew(self) -> None:
        """A new camera, after one that did what it must not do."""
        self.camera.replace()
        self.version = 1

    def next(self) -> str:
        self.last += 1
        return str(self.last)

    def slot(self) -> str:
        return str(self.camera.up.get("slot", "A"))

    def check(self, *, moved: bool, result: Result, state: str) -> None:
        """What runs, what starts next and what is recorded must be one and the same."""
        end, variables = result.end, self.camera.variables()
        require(str(self.version) == self.camera.up["version"], f"version {self.camera.up['version']} runs")
        require(end["state"] == state, f"ended in {end['state']}: {end['words']}")
        require(variables.order[0] == self.slot(), f"slot {self.slot()} runs, {variables.words()}")
        require(variables.slots[self.slot()] == "good", f"what runs is not marked good: {variables.words()}")
        installed = end["facts"].get("updates.installed.system")
        if moved:
            require(installed and installed["version"] == str(self.version), f"recorded as installed: {installed}")
        seen = end["now"]["version"]
        require(seen in (None, str(self.version)), f"the agent says that {seen} runs")


def install(bench: Bench, *cuts: str) -> Result:
    """A good version to the end; it runs and is proven."""
    version = bench.next()
    bundle = bench.images.bundle(version)
    result = bench.camera.update(bench.camera.document(bundle, version), *cuts)
    bundle.unlink()
    require(result.code == "updated", f"{result.code}: {result.end['words']}")
    bench.version = int(version)
    bench.check(moved=True, result=result, state="COMMITTED")
    return result


def update(bench: Bench, _: bool) -> str:
    before = bench.version
    result = install(bench)
    return (
        f"{before} → {bench.version} in slot {bench.slot()}, {result.starts} starts, {bench.camera.variables().words()}"
    )


def refused(change: Callable[[Path], None], why: str, form: str = "verity") -> Callable[[Bench, bool], str]:
    def case(bench: Bench, _: bool) -> str:
        version, slot = bench.next(), bench.slot()
        bundle = bench.images.bundle(version, form=form)
        change(bundle)
        result = bench.camera.update(bench.camera.document(bundle, version))
        bundle.unlink()
        require(result.end["status"] in ("FAILED", "REJECTED"), f"it was accepted: {result.code}")
        said = re.search(why, f"{result.end['words']}\n{result.end['rauc']}", re.IGNORECASE)
        require(said, f"RAUC did not refuse it for {why}: {' | '.join(result.end['rauc'].splitlines()[-4:])}")
        require(bench.slot() == slot, f"slot {bench.slot()} runs now")
        bench.check(moved=False, result=result, state="FAILED")
        return f"{result.code}, RAUC: {said and said[0]}; {slot} runs, {bench.camera.variables().words()}"

    return case


def flip(position: Callable[[int], int]) -> Callable[[Path], None]:
    """One byte, at `position` of the bundle's size."""

    def change(bundle: Path) -> None:
        with bundle.open("r+b") as file:
            at = position(bundle.stat().st_size)
            file.seek(at)
            old = file.read(1)
            file.seek(at)
            file.write(bytes([old[0] ^ 0x10]))

    return change


def nothing(_: Path) -> None:
    pass


def cuts_to_the_end(bench: Bench, everything: bool) -> str:
    done = install(bench, *TO_THE_END).cuts
    if everything:
        done += install(bench, *IN_BETWEEN).cuts
    return f"{len(done)} cuts, version {bench.version} runs and is recorded"


def cut_twice(bench: Bench, _: bool) -> str:
    version = bench.next()
    bundle = bench.images.bundle(version)
    result = bench.camera.update(bench.camera.document(bundle, version), *TWICE)
    bundle.unlink()
    bench.check(moved=False, result=result, state="FAILED")
    return f"{result.code}, {bench.version} runs: {short(result)}"


def broken(how: str, *cuts: str, watchdog_s: float = 180) -> Callable[[Bench, bool], str]:
    def case(bench: Bench, everything: bool) -> str:
        version, slot = bench.next(), bench.slot()
        other = "B" if slot == "A" else "A"
        bundle = bench.images.bundle(version, broken=how)
        document = bench.camera.document(bundle, version, deadline_s=10)
        result = bench.camera.update(document, *(cuts if everything else cuts[:1]), watchdog_s=watchdog_s)
        bundle.unlink()
        require(result.end["status"] == "FAILED", f"it ended with {result.code}")
        require(bench.slot() == slot, f"slot {bench.slot()} runs now")
        bench.check(moved=False, result=result, state="ROLLED_BACK")
        require(bench.camera.variables().slots[other] == "0", f"{other} is not bad: {bench.camera.variables().words()}")
        with_cuts = f", {len(result.cuts)} cuts" if result.cuts else ""
        return f"{result.code}, {result.starts} starts{with_cuts}, {bench.camera.variables().words()}: {short(result)}"

    return case


def short(result: Result) -> str:
    words = str(result.end["words"])
    return words if len(words) <= 100 else f"{words[:97]}…"


@dataclass(frozen=True)
class Case:
    name: str
    words: str
    run: Callable[[Bench, bool], str]
    always: bool = False
    more: bool = False


CASES = (
    Case("update", "verity bundle installed, armed, started, committed", update, always=True),
    Case(
        "payload",
        "verity bundle with one bit of its payload flipped",
        refused(flip(lambda size: size // 2), "input/output error"),
    ),
    Case(
        "signature",
        "verity bundle with one bit of its signature flipped",
        refused(flip(lambda size: size - 100), "signature verification failed"),
    ),
    Case(
        "plain",
        "plain bundle where bundle-formats=-plain",
        refused(nothing, "bundle format 'plain' not allowed", "plain"),
    ),
    Case("cuts", "power cut from the download to the commit", cuts_to_the_end),
    Case("twice", "power cut twice while RAUC writes", cut_twice),
    Case("boot", "new slot that does not boot", broken("boot")),
    Case("probe", "new slot that boots and fails its trial", broken("probe", *GOING_BACK)),
    Case("agent", "new slot whose agent never starts, with a watchdog", broken("agent", watchdog_s=45), more=True),
    Case("after", "another update after all this", update),
)

__all__ = ["CASES", "Bench", "Case", "Unexpected"]
