"""Power cuts on real file systems: before every call that changes something, the agent's own code, ext4 and xfs.

A sample that covers every state of an update and of a configuration; with `--exhaustive` every call × each mode, and some cut a second time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.powercut.disk import KINDS, Control
from tests.places import own_folder

HERE = Path(__file__).parent
PROJECT = HERE.parents[2]
LIMIT_S = 240.0
EXHAUSTIVE_LIMIT_S = 6 * 3600.0
SCENARIOS = {
    "app, success": "updates:Updating:success",
    "app, gate fails": "updates:Updating:gate",
    "app, roll-back fails": "updates:Updating:lost",
    "agent, success": "updates:AgentUpdating:success",
    "agent, gate fails": "updates:AgentUpdating:gate",
    "agent, does not start": "updates:AgentUpdating:dead",
    "agent, roll-back fails": "updates:AgentUpdating:lost",
    "journal": "journal:Journal",
    "acts, commit": "acts:Acts:commit",
    "acts, roll back": "acts:Acts:roll_back",
    "configuration, success": "configuration:Configuring:success",
    "configuration, images get dark": "configuration:Configuring:dark",
    "configuration, cloud unreachable": "configuration:Configuring:unreachable",
    "configuration, revert fails": "configuration:Configuring:dark+stuck",
    "configuration, reboot": "configuration:Configuring:reboot",
    "configuration, reboot and back": "configuration:Configuring:reboot+dark",
    "configuration, job": "configuration:Configuring:job",
    "configuration, job taken back": "configuration:Configuring:job+dark",
    "configuration, from the fleet's to the site's own": "configuration:Configuring:own",
}
PER_LABEL = {
    "journal": 4,
    "configuration, success": 3,
    "configuration, job": 3,
    "configuration, job taken back": 2,
    "configuration, from the fleet's to the site's own": 3,
}
"""How many points of each state the sample has, where it is not one."""
SABOTAGE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "files are not synced": ("acts:Acts:commit", "ext4", {"sabotage": 1, "per_label": 4}),
    "the link is deleted and made": (
        "acts:Acts:anew", "ext4", {"only": [(n, "log flushed", "arm") for n in range(1, 5)]},
    ),
    "a target's file is not synced": ("configuration:Configuring:unsynced", "xfs", {"per_label": 2}),
    "a configuration is applied before it is kept": ("configuration:Configuring:hasty", "ext4", {"per_label": 2}),
}  # fmt: skip


def _missing() -> str:
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root: only root can mount a file system and shut it down"
    if not Path("/dev/loop-control").exists():
        return "needs loop devices: there is no /dev/loop-control"
    for program in ("gcc", *(make[0] for _, make in KINDS.values())):
        if not shutil.which(program):
            return f"needs {program}: install gcc, e2fsprogs and xfsprogs"
    return ""


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing() or "-")


@dataclass
class Result:
    """What a runner told."""

    calls: int = 0
    labels: dict[str, int] = field(default_factory=dict)
    cuts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def violations(self) -> list[str]:
        return [
            f"call {cut['number']} ({cut['call']}), {cut['mode']}, in {cut['label']}"
            + (f", second cut at {cut['second']}" if cut["second"] else "")
            + f": {words}"
            for cut in self.cuts
            for words in cut["violations"]
        ]


@pytest.fixture(scope="module")
def cutter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("cutter") / "cutter.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-o", built, HERE / "cutter.c"], check=True, timeout=60)
    return built


@pytest.fixture
def cut(cutter: Path) -> Iterator[Any]:
    """Runs a plan to its end in a process of its own; what it mounts vanishes with that process."""
    running: list[subprocess.Popen[str]] = []

    def run(limit_s: float, **plan: Any) -> Result:
        with (
            own_folder() as handlers,
            tempfile.TemporaryDirectory(prefix="powercut-", ignore_cleanup_errors=True) as name,
        ):
            control = Path(name) / "control"
            control.touch()
            os.truncate(control, Control.size())
            environment = {
                **os.environ,
                "LD_PRELOAD": str(cutter),
                "POWERCUT_CONTROL": str(control),
                "POWERCUT_HANDLERS": str(handlers),
            }
            words = json.dumps({"folder": name, "control": str(control), "seconds": limit_s, **plan})
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.powercut.runner", words],
                cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            running.append(process)
            out, err = process.communicate(timeout=limit_s + 120)
            assert process.returncode == 0, err[-4000:]
        return _read(out)

    yield run
    for process in running:
        if process.poll() is None:
            process.kill()
            process.wait()


def _read(out: str) -> Result:
    result = Result()
    told = [json.loads(line) for line in out.splitlines()]
    for words in told:
        if "calls" in words:
            result.calls, result.labels = words["calls"], words["labels"]
        elif "number" in words:
            result.cuts.append(words)
    assert "tried" in told[-1], told[-1]
    assert not any("stopped" in words for words in told), "there was not time for all"
    return result


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_power_cut_leaves_anything_but_one_whole_version_and_one_true_end(cut, scenario, request):
    exhaustive = request.config.getoption("--exhaustive", default=False)
    limit_s = EXHAUSTIVE_LIMIT_S if exhaustive else LIMIT_S

    def enumerate_on(kind: str) -> Result:
        sample = {} if exhaustive else {"per_label": PER_LABEL.get(scenario, 1), "share": list(KINDS).index(kind)}
        return cut(limit_s, scenario=SCENARIOS[scenario], kind=kind, again=7, **sample)

    with ThreadPoolExecutor(len(KINDS)) as pool:
        results = dict(zip(KINDS, pool.map(enumerate_on, KINDS), strict=True))
    for kind, result in results.items():
        modes = Counter(cut["mode"] for cut in result.cuts if cut["happened"])
        twice = sum(1 for cut in result.cuts if cut["second"])
        print(
            f"{modes.total()} power cuts tried on {kind}, {scenario}: "
            + ", ".join(f"{mode} {tried}" for mode, tried in sorted(modes.items()))
            + f"; {twice} were cut again; {result.calls} calls change something; violations {len(result.violations)}"
        )
    assert [words for result in results.values() for words in result.violations] == []
    reached = {cut["label"] for result in results.values() for cut in result.cuts if cut["happened"]}
    expected = {label for result in results.values() for label in result.labels}
    assert expected <= reached, f"not cut in {expected - reached}"


@pytest.mark.parametrize("fault", SABOTAGE)
def test_cuts_find_what_is_not_durable(cut, fault):
    scenario, kind, points = SABOTAGE[fault]
    result = cut(LIMIT_S, scenario=scenario, kind=kind, **points)
    tried = sum(cut["happened"] for cut in result.cuts)
    print(f"{tried} power cuts tried where {fault}: {len(result.violations)} violations found")
    assert result.violations
