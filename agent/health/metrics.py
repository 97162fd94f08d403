"""The machine's metrics by name: unit, kind and meaning of each, and how a name with attributes is written.

Names follow OpenTelemetry's conventions for hosts and processes. A value with attributes is one flat key,
`system.memory.usage{state=used}`: attributes sorted by name, without quotes; characters that would make the key ambiguous
are replaced by `_`. Reports carry these keys; /metrics takes them apart again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """What a metric is: `unit` in UCUM as OpenTelemetry writes it (By, s, 1, Cel, {count}); a counter only grows until a restart."""

    unit: str
    description: str
    kind: Literal["gauge", "counter"] = "gauge"


METRICS: dict[str, Metric] = {
    "system.cpu.utilization": Metric("1", "busy share of all processors since the reading before"),
    "system.cpu.logical.count": Metric("{cpu}", "logical processors"),
    "system.cpu.load_average.1m": Metric("{thread}", "tasks running or waiting, averaged over 1 minute"),
    "system.cpu.load_average.5m": Metric("{thread}", "tasks running or waiting, averaged over 5 minutes"),
    "system.cpu.load_average.15m": Metric("{thread}", "tasks running or waiting, averaged over 15 minutes"),
    "system.memory.limit": Metric("By", "memory of the machine"),
    "system.memory.usage": Metric("By", "memory by state: used, free, cached, buffers"),
    "system.linux.memory.available": Metric("By", "memory that programs can still get without swapping"),
    "system.paging.usage": Metric("By", "swap by state: used, free; absent without swap"),
    "system.pressure.stalled": Metric("1", "share of the last minute in which some or all (full) tasks waited for a resource"),
    "system.filesystem.limit": Metric("By", "size of the file system"),
    "system.filesystem.usage": Metric("By", "file system by state: used, free (for ordinary users)"),
    "system.filesystem.inodes.limit": Metric("{inode}", "inodes of the file system"),
    "system.filesystem.inodes.usage": Metric("{inode}", "inodes by state: used, free"),
    "system.filesystem.read_only": Metric("1", "1 when the file system refuses writes"),
    "system.network.io": Metric("By", "bytes by interface and direction", "counter"),
    "system.network.packets": Metric("{packet}", "packets by interface and direction", "counter"),
    "system.network.errors": Metric("{error}", "transmission errors by interface and direction", "counter"),
    "system.network.dropped": Metric("{packet}", "packets dropped by interface and direction", "counter"),
    "system.network.up": Metric("1", "1 when the interface has a link"),
    "hw.temperature": Metric("Cel", "temperature by sensor"),
    "system.uptime": Metric("s", "time since boot"),
    "system.clock.synchronized": Metric("1", "1 when the kernel's clock is disciplined by NTP"),
    "process.memory.usage": Metric("By", "resident memory of the agent"),
    "process.cpu.utilization": Metric("1", "share of one core that the agent used since the reading before"),
    "process.cpu.time": Metric("s", "processor time of the agent", "counter"),
    "process.thread.count": Metric("{thread}", "threads of the agent"),
    "process.unix.file_descriptor.count": Metric("{file_descriptor}", "open file descriptors of the agent"),
}  # fmt: skip


def metric_key(name: str, **attributes: str) -> str:
    """The flat key of `name` with `attributes`."""
    if not attributes:
        return name
    pairs = (f"{key}={re.sub(r'[{},=]|[^ -~]', '_', value)}" for key, value in sorted(attributes.items()))
    return f"{name}{{{','.join(pairs)}}}"


def split_key(key: str) -> tuple[str, dict[str, str]]:
    """Name and attributes of a flat key."""
    name, _, rest = key.partition("{")
    pairs = (pair.partition("=") for pair in rest.removesuffix("}").split(",") if pair)
    return name, {key: value for key, _, value in pairs}
