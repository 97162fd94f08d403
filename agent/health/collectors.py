"""One round of the machine's metrics, by the flat names of `health.metrics`; a sensor that is missing or fails is absent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from agent.health.metrics import metric_key as key
from agent.host.clock import clock_synchronised
from agent.host.machine import Machine
from agent.logs import get_logger

log = get_logger("health")

Readings = Iterator[tuple[str, float]]


class Collectors:
    """The machine's metrics.

    `state_dir` and `directories` (the sources' folders) say which file systems count; both must be writable on a healthy
    camera. A collector that raises is left out of the round and logged once, until it works again.
    """

    def __init__(self, state_dir: Path, directories: Iterable[Path] = (), *, machine: Machine | None = None) -> None:
        self._folders = [state_dir, *directories]
        self._machine = machine or Machine()
        self._failing: set[str] = set()
        self._collectors: Mapping[str, Callable[[], Readings]] = {
            "cpu": self._cpu,
            "memory": self._memory,
            "pressure": self._pressure,
            "filesystem": self._filesystem,
            "network": self._network,
            "temperature": self._temperature,
            "clock": self._clock,
            "process": self._process,
        }

    def collect(self) -> dict[str, float]:
        """Every metric that can be read now. Blocking: call in a thread, never twice at once."""
        values: dict[str, float] = {}
        for name, collector in self._collectors.items():
            try:
                values.update(collector())
                self._failing.discard(name)
            except Exception as error:  # noqa: BLE001  one broken sensor must not cost the others
                if name not in self._failing:
                    log.warning("collector failed", collector=name, error=f"{type(error).__name__}: {error}")
                self._failing.add(name)
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in values.items()}

    def _cpu(self) -> Readings:
        cpu = self._machine.cpu()
        yield "system.cpu.logical.count", cpu["count"]
        if "utilization" in cpu:
            yield "system.cpu.utilization", cpu["utilization"]
        for window, load in self._machine.load().items():
            yield f"system.cpu.load_average.{window}", load

    def _memory(self) -> Readings:
        memory = self._machine.memory()
        yield "system.memory.limit", memory["total"]
        yield "system.linux.memory.available", memory["available"]
        for state in ("used", "free", "cached", "buffers"):
            yield key("system.memory.usage", state=state), memory[state]
        swap = self._machine.swap()
        for state in ("used", "free"):
            if swap:
                yield key("system.paging.usage", state=state), swap[state]

    def _pressure(self) -> Readings:
        for resource, kinds in self._machine.pressure().items():
            for kind, share in kinds.items():
                yield key("system.pressure.stalled", resource=resource, kind=kind), share

    def _filesystem(self) -> Readings:
        for mount, disk in self._machine.disks(self._folders).items():
            yield key("system.filesystem.limit", mountpoint=mount), disk["total"]
            for state in ("used", "free"):
                yield key("system.filesystem.usage", mountpoint=mount, state=state), disk[state]
            if "inodes" in disk:
                yield key("system.filesystem.inodes.limit", mountpoint=mount), disk["inodes"]
                yield key("system.filesystem.inodes.usage", mountpoint=mount, state="free"), disk["inodes_free"]
            yield key("system.filesystem.read_only", mountpoint=mount), int(disk["read_only"])

    def _network(self) -> Readings:
        names = {"io": "bytes", "packets": "packets", "errors": "errors", "dropped": "dropped"}
        for interface, counters in self._machine.network().items():
            yield key("system.network.up", interface=interface), int(counters["up"])
            for metric, counter in names.items():
                for direction, suffix in (("receive", "in"), ("transmit", "out")):
                    flat = key(f"system.network.{metric}", interface=interface, direction=direction)
                    yield flat, counters[f"{counter}_{suffix}"]

    def _temperature(self) -> Readings:
        for sensor, celsius in self._machine.temperatures().items():
            yield key("hw.temperature", sensor=sensor), celsius

    def _clock(self) -> Readings:
        yield "system.uptime", self._machine.uptime()["uptime_s"]
        synchronised = clock_synchronised()
        if synchronised is not None:
            yield "system.clock.synchronized", int(synchronised)

    def _process(self) -> Readings:
        own = self._machine.own_process()
        yield "process.memory.usage", own["rss"]
        yield "process.cpu.time", own["cpu_time_s"]
        if "cpu" in own:
            yield "process.cpu.utilization", own["cpu"]
        yield "process.thread.count", own["threads"]
        yield "process.unix.file_descriptor.count", own["descriptors"]
