"""The machine's conditions: from one round of metrics to observations. Pure; thresholds in one place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from agent.health.conditions import Observation, Rule, Verdict
from agent.health.metrics import metric_key, split_key

MIB = 2**20
GIB = 2**30

MACHINE_RULES = (
    Rule("disk.read_only", "critical", "look at `dmesg | grep -i ext4`, check the file system, replace the card if it is worn"),
    Rule("disk.filling", "warning", "see what grows with `du -xh --max-depth=2 MOUNT | sort -h | tail`, and delete or move it",
         depends_on=("disk.read_only",)),
    Rule("memory.low", "warning", "see `systemctl status` and `ps aux --sort=-rss | head` for the program that grew, and restart it",
         hold_s=60, clear_hold_s=60),
    Rule("temperature.high", "warning", "check sun shield, ventilation and load of the camera", hold_s=60, clear_hold_s=120),
    Rule("clock.unsynchronised", "warning", "see `timedatectl timesync-status`; NTP needs UDP port 123 to its server",
         hold_s=900),
    Rule("certificate.expired", "critical", "provision the camera again: `camera-agent provision`"),
    Rule("certificate.expiring", "warning", "put a new certificate and key in place; they are used at the next connect", depends_on=("certificate.expired",)),
)  # fmt: skip


def observe_machine(
    values: Mapping[str, float], *, at: float, certificate_not_after: float | None = None
) -> Iterator[Observation]:
    """What `values` (flat keys) say at `at`, epoch seconds; `certificate_not_after` likewise."""
    for key in values:
        name, attributes = split_key(key)
        if name == "system.filesystem.limit":
            yield from _observe_disk(values, attributes["mountpoint"])
        elif name == "hw.temperature":
            celsius, sensor = values[key], attributes["sensor"]
            verdict = _above(celsius, bad=85, good=78)
            yield Observation("temperature.high", sensor, verdict, f"{sensor} is at {celsius:.0f} °C")
    available, limit = values.get("system.linux.memory.available"), values.get("system.memory.limit")
    if available is not None and limit:
        share = available / limit
        words = f"{_size(available)} of {_size(limit)} memory available ({share:.0%})"
        yield Observation("memory.low", "", _below(share, bad=0.07, good=0.12), words)
    synchronised = values.get("system.clock.synchronized")
    if synchronised is not None:
        words = "the clock is synchronised" if synchronised else "the kernel's clock is not disciplined by NTP"
        yield Observation("clock.unsynchronised", "", "good" if synchronised else "bad", words)
    if certificate_not_after is not None:
        days = (certificate_not_after - at) / 86400
        words = f"the device certificate {f'expires in {days:.0f} days' if days > 0 else 'has expired'}"
        yield Observation("certificate.expiring", "", _below(days, bad=30, good=31), words)
        yield Observation("certificate.expired", "", "bad" if days <= 0 else "good", words)


def _observe_disk(values: Mapping[str, float], mount: str) -> Iterator[Observation]:
    limit = values[metric_key("system.filesystem.limit", mountpoint=mount)]
    free = values.get(metric_key("system.filesystem.usage", mountpoint=mount, state="free"))
    if free is not None and limit:
        share = free / limit
        verdicts = [_below(share, bad=0.10, good=0.12)]
        # On a small partition a fixed number of bytes would always alarm.
        if limit >= GIB:
            verdicts.append(_below(free, bad=256 * MIB, good=320 * MIB))
        inodes = values.get(metric_key("system.filesystem.inodes.limit", mountpoint=mount))
        inodes_free = values.get(metric_key("system.filesystem.inodes.usage", mountpoint=mount, state="free"))
        words = f"{_size(free)} of {_size(limit)} free on {mount} ({share:.0%})"
        if inodes and inodes_free is not None:
            verdicts.append(_below(inodes_free / inodes, bad=0.05, good=0.07))
            if verdicts[-1] == "bad":
                words += f", {inodes_free:.0f} inodes left"
        worst: Verdict = "bad" if "bad" in verdicts else "unclear" if "unclear" in verdicts else "good"
        yield Observation("disk.filling", mount, worst, words)
    read_only = values.get(metric_key("system.filesystem.read_only", mountpoint=mount))
    if read_only is not None:
        words = f"{mount} is {'read-only' if read_only else 'writable'}"
        yield Observation("disk.read_only", mount, "bad" if read_only else "good", words)


def _below(value: float, *, bad: float, good: float) -> Verdict:
    return "bad" if value < bad else "good" if value > good else "unclear"


def _above(value: float, *, bad: float, good: float) -> Verdict:
    return "bad" if value > bad else "good" if value < good else "unclear"


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"
