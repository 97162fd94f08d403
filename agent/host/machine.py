"""Readings of the machine as plain dicts; what it has no sensor for is absent, never zero. Blocking: call in a thread.

Owner of psutil. What psutil leaves out is read from `proc` and `sys`, which tests replace by a folder.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

# File systems that are read-only by design; that says nothing about the health of the disk.
READ_ONLY_BY_DESIGN = {"squashfs", "erofs", "iso9660", "cramfs"}


class Machine:
    """The machine the agent runs on. CPU shares are measured between two calls, so the first call gives none."""

    def __init__(self, *, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> None:
        self._proc = proc
        self._sys = sys
        self._process = psutil.Process()
        self._cpu_before: Any = None
        self._own_before: tuple[float, float] | None = None

    def cpu(self) -> dict[str, float]:
        """`count` of logical processors; `utilization`, the busy share 0-1 of all of them since the last call."""
        times = psutil.cpu_times()
        before, self._cpu_before = self._cpu_before, times
        reading: dict[str, float] = {"count": psutil.cpu_count() or 1}
        if before:
            # guest time is part of user time.
            spent = [max(now - then, 0) for now, then in zip(times[:8], before[:8], strict=True)]
            idle = max(times.idle - before.idle, 0) + max(times.iowait - before.iowait, 0)
            if sum(spent) > 0:
                reading["utilization"] = 1 - idle / sum(spent)
        return reading

    def load(self) -> dict[str, float]:
        """Processes running or waiting, averaged over `1m`, `5m`, `15m`."""
        return dict(zip(("1m", "5m", "15m"), os.getloadavg(), strict=True))

    def memory(self) -> dict[str, int]:
        """Bytes: `total`, `available` without swapping, `used`, `free`, `cached`, `buffers`."""
        memory = psutil.virtual_memory()
        return {name: getattr(memory, name) for name in ("total", "available", "used", "free", "cached", "buffers")}

    def swap(self) -> dict[str, int]:
        """Bytes: `total`, `used`, `free`; empty without swap."""
        swap = psutil.swap_memory()
        return {"total": swap.total, "used": swap.used, "free": swap.free} if swap.total else {}

    def disks(self, folders: Iterable[Path]) -> dict[str, dict[str, Any]]:
        """The file systems that hold `folders`, each once, by mount point.

        Bytes `total`, `free` (for ordinary users), `used`; `inodes` and `inodes_free` where the file system counts them;
        `read_only`: the file system itself, not only this service's view of it, refuses writes.
        """
        disks: dict[str, dict[str, Any]] = {}
        seen: set[int] = set()
        mounts = list(self._mounts())
        for folder in folders:
            with contextlib.suppress(OSError):
                place = _nearest_existing(folder)
                device = place.stat().st_dev
                if device in seen:
                    continue
                seen.add(device)
                mount, kind, options = _mount_of(place, mounts)
                usage = os.statvfs(place)
                disk: dict[str, Any] = {
                    "total": usage.f_blocks * usage.f_frsize,
                    "free": usage.f_bavail * usage.f_frsize,
                    "used": (usage.f_blocks - usage.f_bfree) * usage.f_frsize,
                    # ext4 of newer kernels marks an error as emergency_ro and leaves the ro flag alone.
                    "read_only": bool(options & {"ro", "emergency_ro", "shutdown"}) and kind not in READ_ONLY_BY_DESIGN,
                }
                if usage.f_files:
                    disk |= {"inodes": usage.f_files, "inodes_free": usage.f_favail}
                disks[mount] = disk
        return disks

    def temperatures(self) -> dict[str, float]:
        """Degrees Celsius by sensor: the kernel's thermal zones, and the chips under hwmon that are no zone."""
        found: dict[str, float] = {}
        for zone in sorted(self._sys.glob("class/thermal/thermal_zone*")):
            _add_temperature(found, _text(zone / "type"), zone / "temp")
        zones = {name.replace("-", "_") for name in found}
        for chip in sorted(self._sys.glob("class/hwmon/hwmon*")):
            name = _text(chip / "name")
            if name.replace("-", "_") in zones:
                continue
            for reading in sorted(chip.glob("temp*_input")):
                label = _text(reading.with_name(reading.name.replace("_input", "_label")))
                _add_temperature(found, f"{name} {label}".strip(), reading)
        return found

    def pressure(self) -> dict[str, dict[str, float]]:
        """Share 0-1 of the last minute in which `some` or all (`full`) tasks stood still for `cpu`, `memory`, `io`; empty where the kernel has no PSI."""
        found: dict[str, dict[str, float]] = {}
        for resource in ("cpu", "memory", "io"):
            for line in _text(self._proc / "pressure" / resource).splitlines():
                kind, *fields = line.split()
                values = dict(field.split("=", 1) for field in fields)
                with contextlib.suppress(KeyError, ValueError):
                    found.setdefault(resource, {})[kind] = float(values["avg60"]) / 100
        return found

    def network(self) -> dict[str, dict[str, Any]]:
        """By interface: `up` (link), bytes, packets, errors and dropped, each `_in` and `_out`. Without loopback and unused virtual interfaces."""
        counters = psutil.net_io_counters(pernic=True)
        states = psutil.net_if_stats()
        return {
            name: {
                "up": states[name].isup and "running" in states[name].flags.split(","),
                "bytes_in": counter.bytes_recv,
                "bytes_out": counter.bytes_sent,
                "packets_in": counter.packets_recv,
                "packets_out": counter.packets_sent,
                "errors_in": counter.errin,
                "errors_out": counter.errout,
                "dropped_in": counter.dropin,
                "dropped_out": counter.dropout,
            }
            for name, counter in counters.items()
            if name in states
            and "loopback" not in states[name].flags.split(",")
            and (counter.bytes_recv or counter.bytes_sent or (self._sys / "class/net" / name / "device").exists())
        }

    def uptime(self) -> dict[str, float]:
        """`uptime_s` since boot, sleep included; `booted_at` in epoch seconds by the present wall clock."""
        uptime = time.clock_gettime(time.CLOCK_BOOTTIME)
        return {"uptime_s": uptime, "booted_at": time.time() - uptime}

    def own_process(self) -> dict[str, float]:
        """The agent itself: `rss` in bytes, `cpu_time_s`, `threads`, `descriptors`, and `cpu` as share of one core since the last call."""
        with self._process.oneshot():
            spent = self._process.cpu_times()
            reading: dict[str, float] = {
                "rss": self._process.memory_info().rss,
                "cpu_time_s": spent.user + spent.system,
                "threads": self._process.num_threads(),
                "descriptors": self._process.num_fds(),
            }
        now = time.monotonic()
        if self._own_before and now > self._own_before[0]:
            reading["cpu"] = (reading["cpu_time_s"] - self._own_before[1]) / (now - self._own_before[0])
        self._own_before = (now, reading["cpu_time_s"])
        return reading

    def _mounts(self) -> Iterator[tuple[Path, str, set[str]]]:
        """(mount point, file system type, options of the file system itself), later mounts hide earlier ones."""
        for line in _text(self._proc / "self" / "mountinfo").splitlines():
            before, _, after = line.partition(" - ")
            kind, _, options = after.split(" ", 2)
            point = before.split(" ")[4].encode().decode("unicode_escape")
            yield Path(point), kind, set(options.split(","))


def _mount_of(path: Path, mounts: list[tuple[Path, str, set[str]]]) -> tuple[str, str, set[str]]:
    path = path.resolve()
    best = (Path("/"), "", set[str]())
    for mount in mounts:
        if path.is_relative_to(mount[0]) and len(mount[0].parts) >= len(best[0].parts):
            best = mount
    return str(best[0]), best[1], best[2]


def _nearest_existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _add_temperature(found: dict[str, float], name: str, file: Path) -> None:
    try:
        celsius = int(_text(file)) / 1000
    except ValueError:
        return
    # Sensors that are switched off answer 0 K, or values no silicon survives.
    if -60 < celsius < 200 and name:
        unique, number = name, 2
        while unique in found:
            unique, number = f"{name} {number}", number + 1
        found[unique] = celsius


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
