"""Collectors and the machine's readings: the real machine, and a made /proc and /sys."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.health.collectors import Collectors
from agent.health.metrics import METRICS, metric_key, split_key
from agent.host.machine import Machine


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_round_on_this_machine(tmp_path: Path) -> None:
    collectors = Collectors(tmp_path)
    first = collectors.collect()
    values = collectors.collect()
    assert "process.cpu.utilization" not in first
    assert {split_key(key)[0] for key in values} <= set(METRICS)
    assert values["system.memory.limit"] >= values["system.linux.memory.available"] > 0
    assert values["process.memory.usage"] > 1_000_000
    assert values["system.uptime"] > 0
    assert any(key.startswith("system.filesystem.usage{") for key in values)
    assert all(isinstance(value, (int, float)) for value in values.values())


def test_cpu_is_measured_between_calls() -> None:
    machine = Machine()
    assert "utilization" not in machine.cpu()
    while "utilization" not in (reading := machine.cpu()):
        sum(range(100_000))
    assert 0 <= reading["utilization"] <= 1


def test_a_missing_sensor_is_absent(tmp_path: Path) -> None:
    machine = Machine(proc=tmp_path, sys=tmp_path)
    assert machine.temperatures() == {}
    assert machine.pressure() == {}
    values = Collectors(tmp_path, machine=machine).collect()
    assert not [key for key in values if key.startswith(("hw.temperature", "system.pressure"))]


def test_a_broken_collector_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    monkeypatch.setattr(machine, "memory", lambda: {}["total"])
    values = Collectors(tmp_path, machine=machine).collect()
    assert "system.memory.limit" not in values
    assert "system.uptime" in values


def test_temperatures(tmp_path: Path) -> None:
    sys = tree(
        tmp_path,
        {
            "class/thermal/thermal_zone0/type": "cpu-thermal\n",
            "class/thermal/thermal_zone0/temp": "61234\n",
            "class/thermal/thermal_zone1/type": "modem\n",
            "class/thermal/thermal_zone1/temp": "-274000\n",
            "class/thermal/thermal_zone2/type": "gpu\n",
            "class/hwmon/hwmon0/name": "cpu_thermal\n",
            "class/hwmon/hwmon0/temp1_input": "61234\n",
            "class/hwmon/hwmon1/name": "nvme\n",
            "class/hwmon/hwmon1/temp1_input": "40000\n",
            "class/hwmon/hwmon1/temp1_label": "Composite\n",
            "class/hwmon/hwmon1/temp2_input": "broken\n",
        },
    )
    assert Machine(sys=sys).temperatures() == {"cpu-thermal": 61.234, "nvme Composite": 40.0}


def test_pressure(tmp_path: Path) -> None:
    proc = tree(
        tmp_path,
        {
            "pressure/cpu": "some avg10=1.00 avg60=12.50 avg300=0.00 total=1\n",
            "pressure/io": "some avg10=0.00 avg60=3.00 avg300=0.00 total=1\nfull avg10=0 avg60=2.00 avg300=0 total=1\n",
        },
    )
    assert Machine(proc=proc).pressure() == {"cpu": {"some": 0.125}, "io": {"some": 0.03, "full": 0.02}}


@pytest.mark.parametrize(
    ("line", "read_only"),
    [
        ("36 25 0:31 / {place} rw,relatime - ext4 /dev/mmcblk0p2 rw", False),
        # What ProtectSystem=strict makes of a healthy disk: only this service's view of it is read-only.
        ("36 25 0:31 / {place} ro,relatime - ext4 /dev/mmcblk0p2 rw", False),
        ("36 25 0:31 / {place} rw,relatime shared:1 - ext4 /dev/mmcblk0p2 ro,errors=remount-ro", True),
        ("36 25 0:31 / {place} rw,relatime - ext4 /dev/mmcblk0p2 rw,emergency_ro", True),
        ("36 25 0:31 / {place} ro,relatime - squashfs /dev/loop0 ro", False),
    ],
)
def test_read_only_is_the_file_systems_own_state(tmp_path: Path, line: str, read_only: bool) -> None:
    place = tmp_path / "my data"
    place.mkdir()
    escaped = str(place).replace(" ", r"\040")
    mounts = "1 0 0:1 / / rw - ext4 /dev/root rw\n" + line.format(place=escaped) + "\n"
    proc = tree(tmp_path / "proc", {"self/mountinfo": mounts})
    disks = Machine(proc=proc).disks([place / "not" / "yet"])
    assert list(disks) == [str(place)]
    assert disks[str(place)]["read_only"] is read_only


def test_each_file_system_is_listed_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    disks = Machine().disks([tmp_path / "a", tmp_path])
    (disk,) = disks.values()
    assert disk["total"] >= disk["free"] > 0
    usage = os.statvfs(tmp_path)
    assert disk["total"] == usage.f_blocks * usage.f_frsize


def test_own_process_counts_descriptors(tmp_path: Path) -> None:
    machine = Machine()
    before = machine.own_process()["descriptors"]
    with (tmp_path / "file").open("w"):
        assert machine.own_process()["descriptors"] == before + 1


@given(st.dictionaries(st.sampled_from(["state", "mountpoint", "sensor"]), st.text(min_size=1), max_size=3))
def test_keys_are_unambiguous(attributes: dict[str, str]) -> None:
    key = metric_key("system.memory.usage", **attributes)
    name, found = split_key(key)
    assert name == "system.memory.usage"
    assert set(found) == set(attributes)
    assert metric_key(name, **found) == key


def test_every_metric_has_a_unit_and_a_meaning() -> None:
    for name, metric in METRICS.items():
        assert re.fullmatch(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)+", name)
        assert metric.unit
        assert metric.description
