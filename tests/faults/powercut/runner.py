"""The process that cuts: `python -m tests.faults.powercut.runner PLAN`, with the cutter preloaded; prints a line of JSON for each cut.

It imports everything once and forks each boot of the camera, so that a cut costs a fraction of a second. A boot is a child
that builds the agent's own parts on the file system and lets them work until nothing is left to do. The camera of a
scenario is prepared once and copied onto the file system before each cut.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
import traceback
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from tests.faults.powercut.disk import LIBC, MODES, Boots, Control, Disk, own_namespace
from tests.faults.powercut.place import Place, Scenario

BOOT_LIMIT_S = 60.0
CUT, FAILED = 2, 3
"""What the cutter says of a cut; 1: under way."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class Plan:
    """What to enumerate. `every` cuts are tried, or so many that each label has `per_label` of them in each mode."""

    scenario: str
    kind: str
    folder: str
    control: str
    modes: list[str] = field(default_factory=lambda: list(MODES))
    per_label: int | None = None
    """None: every call."""
    again: int = 0
    """So many of the points are cut a second time while the camera goes on."""
    sabotage: int = 0
    seconds: float = 3600.0
    only: list[tuple[Any, ...]] | None = None
    """Calls and modes to try, instead of an enumeration."""
    share: int | None = None
    """With `per_label`: one half of the labels, 0 or 1."""


class Point(NamedTuple):
    """The call before which the power goes: of all, or of those made under a label."""

    number: int
    mode: str
    label: str = ""


@dataclass
class Cut:
    """What became of one try."""

    number: int
    mode: str
    happened: bool = False
    label: str = ""
    call: str = ""
    second: str = ""
    violations: list[str] = field(default_factory=list)


class Runner:
    """One scenario on one file system."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._folder = Path(plan.folder)
        self._control = Control(Path(plan.control))
        self._scenario: Scenario = _load(plan.scenario)
        self._template, self._template_world = self._folder / "template", self._folder / "template-world"
        listener = socket.create_server(("127.0.0.1", 0))
        self._place = Place(self._folder / "disk" / "camera", self._folder / "world", self._control.set_text, listener)
        self._broken = 0

    def run(self) -> None:
        LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        own_namespace()
        self._boots = Boots(self._folder)
        (self._folder / "disk").mkdir()
        self._disk = Disk(self._plan.kind, self._folder / "disk", self._control)
        self._disk.mount()
        self._prepare()
        calls = self._count()
        _say(calls=len(calls), labels=_counted(calls))
        end = time.monotonic() + self._plan.seconds
        tried = 0
        for index, point in enumerate(self._points(calls)):
            if time.monotonic() > end:
                _say(stopped=f"after {self._plan.seconds:g} s")
                break
            second = 1 + (index * 37) % 120 if self._plan.again and index % self._plan.again == 0 else 0
            cut = self._try(point, second)
            while not cut.happened and not cut.violations and point.label and point.number > 1:
                point = Point(point.number // 2, point.mode, point.label)  # there were fewer calls this time
                cut = self._try(point, second)
            tried += cut.happened
            _say(**dataclasses.asdict(cut))
        _say(tried=tried)

    def _prepare(self) -> None:
        """Let the scenario make its camera, on the host."""
        for folder in (self._template, self._template_world):
            folder.mkdir()
        place = dataclasses.replace(self._place, folder=self._template, world=self._template_world)
        self._control.disarm()
        _, saw = self._boot(place, prepare=True)
        if saw:
            raise RuntimeError("\n".join(saw))
        if moved := getattr(self._scenario, "moved", None):
            moved(self._template, self._place.folder)

    def _count(self) -> list[tuple[str, str]]:
        """A run without a cut: all that changed, with the labels."""
        self._reset()
        self._control.arm(trace=True, sabotage=self._plan.sabotage)
        _, saw = self._boot(self._place)
        calls = self._control.calls()
        self._control.disarm()
        if saw:
            raise RuntimeError("without a cut: " + "\n".join(saw))
        return calls

    def _points(self, calls: list[tuple[str, str]]) -> Iterator[Point]:
        if self._plan.only is not None:
            yield from (Point(*point) for point in self._plan.only)
            return
        if self._plan.per_label is None:
            for number in range(1, len(calls) + 1):
                for mode in self._plan.modes:
                    yield Point(number, mode)
            return
        for position, (label, made) in enumerate(_counted(calls).items()):
            if self._plan.share is not None and zlib.crc32(label.encode()) % 2 != self._plan.share:
                continue
            count = min(made, self._plan.per_label)
            for index in range(count):
                mode = self._plan.modes[(index + position // 2) % len(self._plan.modes)]
                yield Point((2 * index + 1) * made // (2 * count) + 1, mode, label)

    def _try(self, point: Point, second: int) -> Cut:
        mode = MODES[point.mode]
        cut = Cut(point.number, point.mode, label=point.label)
        self._reset()
        self._control.arm(cut_at=point.number, mode=mode, sabotage=self._plan.sabotage, label=point.label)
        was_cut, cut.violations = self._boot(self._place)
        if was_cut:
            cut.happened = True
            cut.label, cut.call = self._control.text("label_at_cut"), self._control.text("cut_call")
            self._power_up()
            if second:
                self._control.arm(cut_at=second, mode=mode, sabotage=self._plan.sabotage)
                was_cut, saw = self._boot(dataclasses.replace(self._place, cuts=1))
                cut.violations += saw
                if was_cut:
                    cut.second = f"{second} {self._control.text('label_at_cut')} {self._control.text('cut_call')}"
                    self._power_up()
            self._control.disarm()
            if not second or was_cut:
                was_cut, saw = self._boot(dataclasses.replace(self._place, cuts=2 if second else 1))
                cut.violations += saw + (["the last boot was cut as well"] if was_cut else [])
        self._control.disarm()
        return cut

    def _power_up(self) -> None:
        self._control.set(armed=0)
        if self._control.get("cut") == FAILED or self._disk.is_alive():
            raise RuntimeError("the file system could not be shut down")
        self._disk.unmount()
        self._disk.mount()
        self._boots.next()

    def _reset(self) -> None:
        """The camera as it was prepared, durable, and its world."""
        self._control.disarm()
        for source, target in ((self._template, self._place.folder), (self._template_world, self._place.world)):
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target, symlinks=True, copy_function=_copied)
        self._disk.sync()
        self._boots.next()

    def _boot(self, place: Place, *, prepare: bool = False) -> tuple[bool, list[str]]:
        """Whether its power was cut, and the violations that it saw."""
        report = self._folder / "violations.json"
        report.unlink(missing_ok=True)
        child = os.fork()
        if child == 0:
            _live(self._scenario, place, report, prepare=prepare)
        status = _ended(child, self._control)
        _end_all()
        if self._control.get("cut"):
            return True, []
        if status != 0:
            return False, [
                f"the boot ended with wait status {status}" if status >= 0 else "the boot did not end in time"
            ]
        return False, json.loads(report.read_text())


def _live(scenario: Scenario, place: Place, report: Path, *, prepare: bool) -> None:
    """The child: a camera from its boot to where nothing is left to do. Does not return."""
    LIBC.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    faulthandler.enable()
    try:
        if prepare:
            scenario.prepare(place)
        else:
            scenario.boot(place)
    except BaseException:
        place.saw.append(traceback.format_exc())
    report.write_text(json.dumps(place.saw))
    sys.stdout.flush()
    os._exit(0)


def _ended(child: int, control: Control) -> int:
    """Its wait status; -1 when it had to be killed because it took too long. Without power it ends at once."""
    end = time.monotonic() + BOOT_LIMIT_S
    pidfd = os.pidfd_open(child)
    try:
        while not select.select([pidfd], [], [], 0.02)[0]:
            if control.get("cut") == CUT:
                os.kill(child, signal.SIGKILL)
                break
            if time.monotonic() > end:
                os.kill(child, signal.SIGABRT)  # faulthandler tells where it hangs
                time.sleep(0.5)
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return -1
    finally:
        os.close(pidfd)
    return os.waitpid(child, 0)[1]


def _end_all() -> None:
    """End what a boot has left behind: with the power its processes go."""
    while left := _children():
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=5)


def _children() -> list[psutil.Process]:
    while True:
        with contextlib.suppress(psutil.NoSuchProcess):  # one ended while it was looked at
            return psutil.Process().children(recursive=True)


def _copied(source: str, target: str) -> None:
    """With times, mode and owner."""
    shutil.copy2(source, target)
    status = Path(source).stat()
    os.chown(target, status.st_uid, status.st_gid)


def _load(name: str) -> Scenario:
    module, _, rest = name.partition(":")
    kind, _, argument = rest.partition(":")
    made: Scenario = getattr(importlib.import_module(f"tests.faults.powercut.{module}"), kind)(
        *filter(None, [argument])
    )
    return made


def _counted(calls: list[tuple[str, str]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for label, _ in calls:
        counts[label] = counts.get(label, 0) + 1
    return counts


def _say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


if __name__ == "__main__":
    Runner(Plan(**json.loads(sys.argv[1]))).run()
