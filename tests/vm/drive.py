"""Drives the virtual camera through updates and power cuts, and checks after each start that what runs is whole."""

from __future__ import annotations

import json
import queue
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.vm import boot_loader
from tests.vm.image import REPOSITORY, Images, digest, run
from tests.vm.machine import Event, Host, Machine

BOOT_S = 180.0
JOB_S = 300.0


class Unexpected(Exception):
    """The camera did what it must not do."""


@dataclass
class Result:
    """How an update ended."""

    end: Event
    starts: int
    cuts: list[str] = field(default_factory=list)

    @property
    def code(self) -> str:
        return str(self.end["code"])


class Camera:
    """The virtual camera with its boot loader, and the clock of all this."""

    def __init__(self, images: Images, disks: Path, kernel: Path, *, verbose: bool) -> None:
        self.images = images
        self.up: Event = {}
        self.software = "nothing started"
        self.boots: list[float] = []
        self.cuts = self.lost = 0
        self._verbose = verbose
        self._events: queue.Queue[Event] = queue.Queue()
        self._host = Host(images.folder, self._events)
        self._machine = Machine(disks, kernel, self._host.port, self._events, images.folder / "console")
        self._boot_file = disks / "boot.img"
        self._jobs = 0
        self._started = 0.0
        self._ready = False
        self.replace()

    def close(self) -> None:
        self._machine.cut()
        self._host.close()

    def replace(self) -> None:
        """Put a new camera in place of this one: version 1 in slot A, nothing else."""
        self._machine.cut()
        self._drain()
        self.up, self._ready = {}, False
        self.images.disks(self._machine.disks)
        boot_loader.initial(self._boot_file)

    def document(self, bundle: Path, version: str, *, deadline_s: float = 120) -> Event:
        """The job document of a bundle, signed off-line as an engineer does it."""
        signed = run(sys.executable, REPOSITORY / "scripts" / "sign-update", "job", "--yes",
                     "--keys", self.images.folder / "keys", "--target", "system", "--installer", "rauc",
                     "--name", "camera-os", "--version", version, "--counter", "1", "--compatible", "camera-vm",
                     "--stable-for", "1", "--deadline", str(deadline_s),
                     "--url", f"http://10.0.2.2:{self._host.port}/{bundle.name}", bundle)  # fmt: skip
        document: Event = json.loads(signed)
        return document

    def variables(self) -> boot_loader.Variables:
        return boot_loader.read(self._boot_file)

    def update(self, document: Event, *cuts: str, watchdog_s: float = BOOT_S) -> Result:
        """Give the camera this job and follow it to its end, the power cut at each of `cuts`, in this order."""
        self._jobs += 1
        job = {"id": f"job-{self._jobs}", "document": document}
        before, waiting = self._machine.starts, list(cuts)
        done: list[str] = []
        size = self._size(document)
        deadline = time.monotonic() + JOB_S * (1 + len(cuts))
        if self._ready:
            self._order(job, waiting, size)
        while time.monotonic() < deadline:
            event = self._next(job, waiting, done, size, watchdog_s)
            if event["event"] == "cut_here" or (event["event"] == "rebooting" and waiting[:1] == ["going down"]):
                if event["event"] == "cut_here" and event["point"] != waiting[0]:
                    raise Unexpected(f"cut at {event['point']} instead of {waiting[0]}")
                if event["event"] == "rebooting":
                    time.sleep(0.5)
                self._cut(waiting, done)
            elif event["event"] == "end" and event["id"] == job["id"]:
                if waiting:
                    raise Unexpected(f"ended with {event['code']} before it came to: {', '.join(waiting)}")
                self._ready = True
                return Result(event, self._machine.starts - before, done)
        raise Unexpected(f"no end after {JOB_S * (1 + len(cuts)):g} s; cuts: {', '.join(done)}")

    def _next(self, job: Event, waiting: list[str], done: list[str], size: int, watchdog_s: float) -> Event:
        """The next event that matters; starts the machine when it is off."""
        if not self._machine.on:
            self._drain()
            self._start(waiting, done)
        try:
            event = self._events.get(timeout=watchdog_s if not self.up else JOB_S)
        except queue.Empty:
            self._say("the watchdog resets the camera")
            self._machine.cut()
            return {"event": "reset"}
        if event.get("start", self._machine.starts) != self._machine.starts:
            return {"event": "late"}
        self._say(json.dumps({key: value for key, value in event.items() if key not in ("start", "facts", "now")}))
        if event["event"] == "up":
            self._came_up(event)
            self._order(job, waiting, size)
        if event["event"] in ("broken", "garbled"):
            raise Unexpected(event["words"])
        return event

    def _start(self, waiting: list[str], done: list[str]) -> None:
        self.up, self._ready = {}, False
        while waiting[:1] == ["starting"]:
            self._power_on(" for a moment")
            time.sleep(3)
            self._cut(waiting, done)
            self._drain()
        self._started = time.monotonic()
        self._power_on()

    def _power_on(self, words: str = "") -> None:
        self._host.new_start()
        try:
            slot = self._machine.power_on()
        except ValueError as error:
            raise Unexpected(str(error)) from None
        self._say(f"slot {slot} starts{words}; {self.variables().words()}")

    def _came_up(self, event: Event) -> None:
        self.up = event
        self.software = f"RAUC {event['rauc']}, kernel {event['kernel']}"
        self.boots.append(time.monotonic() - self._started)
        slot = self._machine.slot
        if event["slot"] != slot:
            raise Unexpected(f"slot {slot} was started, {event['slot']} runs")
        if digest(self._machine.disks / f"{slot}.img") != self.images.digest(event["version"]):
            raise Unexpected(f"slot {slot} runs and is not a whole version {event['version']}")

    def _order(self, job: Event, waiting: list[str], size: int) -> None:
        self._host.cut_at = size // 2 if waiting[:1] == ["half downloaded"] else None
        cut = waiting[0] if waiting and waiting[0] not in ("half downloaded", "going down", "starting") else ""
        self._ready = False
        self._host.give({"job": job, "cut": cut})

    def _cut(self, waiting: list[str], done: list[str]) -> None:
        self.cuts += 1
        lost = self._machine.cut(lose=self.cuts % 2 == 1)
        count = sum(map(len, lost.values()))
        self.lost += count
        self._host.cut_at = None
        some = ", ".join(f"{name} {writes[:3]}" for name, writes in lost.items())
        self._say(f"POWER CUT: {waiting[0]}; {count} writes lost in the drives' caches {some}")
        done.append(waiting.pop(0))

    def _drain(self) -> None:
        while not self._events.empty():
            self._events.get()

    def _size(self, document: Event) -> int:
        return (self.images.folder / str(document["urls"][0]).rpartition("/")[2]).stat().st_size

    def _say(self, words: str) -> None:
        if self._verbose:
            print(f"   {time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)


def require(holds: Any, words: str) -> None:
    if not holds:
        raise Unexpected(words)
