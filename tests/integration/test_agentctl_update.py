"""`agentctl update` as people run it: what it tells of updates, going back by hand, and the locks against switching."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.fake_daemon import healthy_state
from tests.integration.test_agentctl import AGENTCTL, ESCAPE, ROOT, Camera

DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


@pytest.fixture
def camera() -> Iterator[Camera]:
    with tempfile.TemporaryDirectory(prefix="camera-agent-") as name:
        found = Camera(Path(name), healthy_state(time.time()))
        found.start()
        yield found
        found.stop()


def target(camera: Camera) -> dict[str, Any]:
    found: dict[str, Any] = camera.state["updates"]["targets"]["pipeline"]
    return found


def let_wait(camera: Camera) -> None:
    """An update that waits for its window, with all that can be told about a target."""
    now = time.time()
    target(camera).update(
        state="WAITING",
        since=now - 7500,
        waits_for="pipeline 1.5.0: the update window opens Sat 22:00 CET, in 3 h 0 min",
        next="INSTALLING",
        percent=None,
        last={
            "state": "FAILED",
            "version": "1.4.9",
            "code": "capture_worse",
            "message": "front: sharpness fell",
            "at": now - 90000,
        },
        quarantined=[{"sha256": DIGEST, "version": "1.4.9", "code": "capture_worse"}],
    )
    camera.state["updates"]["window"] = {
        "windows": ["22:00-04:00", "sat,sun 00:00-24:00"],
        "time_zone": "Europe/Madrid",
        "state": "closed",
        "words": "the update window opens Sat 22:00 CET, in 3 h 0 min",
        "opens_at": now + 10800,
        "closes_at": None,
    }
    camera.state["updates"]["locks"] = [
        {"holder": "capture-pipeline", "reason": "finishing a recording", "by": "local:pipeline", "expires_in_s": 240.0}
    ]
    camera.write()


def outcome(state: str, code: str = "by_hand", **more: Any) -> dict[str, Any]:
    last = {"state": state, "version": "1.4.1", "code": code, "message": "in words", "at": time.time(), **more}
    return {"name": "pipeline", "version": "1.4.1", "slot": "a", "previous": "1.4.0", "state": "idle", "last": last}


# ---- status -----------------------------------------------------------------------------------------------------------


def test_all_that_is_known_is_told(camera: Camera):
    let_wait(camera)
    done = camera.run("update")
    assert (done.returncode, done.stderr) == (0, "")
    told = re.sub(r"\s+", " ", done.stdout)
    for words in (
        "pipeline 1.4.2, slot 3f2a9c81d0aa",
        "before 1.4.1, there to go back to",
        "now WAITING for 2 h ",
        "pipeline 1.5.0: the update window opens Sat 22:00 CET, in 3 h 0 min",
        "next install beside what runs",
        "last FAILED 1.4.9 at",
        "(capture_worse)",
        "front: sharpness fell",
        "refused 1.4.9 (9f86d081884c), taken back twice: capture_worse",
        "Window 22:00-04:00, sat,sun 00:00-24:00 Europe/Madrid: the update window opens Sat",
        "Lock capture-pipeline holds off changes for 4 min more: finishing a recording",
        "SUCCEEDED",
    ):
        assert words in told, words
    assert all(len(line) <= 80 for line in done.stdout.splitlines())


def test_a_download_tells_its_percent(camera: Camera):
    target(camera).update(state="DOWNLOADING", since=time.time() - 30, percent=37, next="DOWNLOADED")
    camera.state["status"]["updates"] = camera.state["updates"]["targets"]
    camera.write()
    assert re.search(r"\n  now +DOWNLOADING for \d+ s, 37 %\n", camera.run("update").stdout)
    assert "DOWNLOADING" in camera.run("status").stdout


def test_json_is_the_daemons_answer(camera: Camera):
    let_wait(camera)
    code, document = camera.json("update", "status")
    assert code == 0
    assert document["targets"]["pipeline"]["quarantined"][0]["sha256"] == DIGEST
    assert document["window"]["state"] == "closed"
    assert document["locks"][0]["holder"] == "capture-pipeline"
    assert [job["job_id"] for job in document["jobs"]] == ["update-17"]


def test_one_target(camera: Camera):
    camera.state["updates"]["targets"]["os"] = {"version": "12.4", "state": "idle"}
    camera.write()
    assert list(camera.json("update", "status", "os")[1]["targets"]) == ["os"]
    done = camera.run("update", "status", "ox")
    assert (done.returncode, done.stdout) == (5, "")
    assert "its targets: pipeline, os" in done.stderr
    assert camera.json("update", "status", "ox")[1]["error"]["code"] == "no_such_target"


def test_a_camera_without_targets_says_so(camera: Camera):
    camera.state["updates"]["targets"] = {}
    camera.write()
    assert "no update target is set" in camera.run("update").stdout


def test_fields_that_are_not_there_yet_are_no_trouble(camera: Camera):
    camera.state["updates"] = {"targets": {"pipeline": {}}, "window": None, "locks": []}
    camera.write()
    done = camera.run("update")
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing installed by an update yet" in done.stdout


def test_what_others_wrote_plays_no_tricks_on_a_terminal(camera: Camera):
    let_wait(camera)
    trick = f"a{ESCAPE}[31m\nb\u202ec"
    target(camera).update(version=trick, waits_for=trick, previous=trick, next=trick)
    target(camera)["last"] |= {"message": trick, "code": trick}
    camera.state["updates"]["locks"][0] |= {"holder": trick, "reason": trick}
    camera.write()
    done = camera.run("update")
    assert done.returncode == 0
    assert ESCAPE not in done.stdout
    assert "\u202e" not in done.stdout


def test_an_answer_of_another_shape_is_one_line(camera: Camera):
    for strange in (
        {"targets": {"pipeline": 5}, "locks": []},
        {"targets": {"pipeline": {"since": "x", "state": "TRIAL"}}, "locks": []},
        {"targets": {"pipeline": {}}, "locks": [{}]},
        {"targets": {"pipeline": {}}, "locks": [], "window": {"closes_at": "x"}},
    ):
        camera.state["updates"] = strange
        camera.write()
        done = camera.run("update")
        assert (done.returncode, done.stdout) == (1, ""), strange
        assert done.stderr.startswith("agentctl: camera-agent's answer can't be understood: ")


def test_watching_tells_every_change_and_outlives_a_restart(camera: Camera):
    watching = subprocess.Popen(
        [*AGENTCTL, "update", "--watch"], cwd=ROOT, env=camera.env(), stdout=subprocess.PIPE, text=True
    )
    assert watching.stdout
    seen = [json.loads(watching.stdout.readline())]
    camera.stop()
    target(camera).update(state="TRIAL", waits_for="images flow")
    camera.start()
    seen.append(json.loads(watching.stdout.readline()))
    watching.send_signal(signal.SIGINT)
    assert watching.wait(30) == 0
    watching.stdout.close()
    assert [document["targets"]["pipeline"]["state"] for document in seen] == ["idle", "TRIAL"]
    assert all(document["schema"] == 1 for document in seen)


def test_watching_what_is_not_there_ends_at_once(camera: Camera):
    assert camera.run("update", "status", "ox", "--watch").returncode == 5
    camera.stop()
    assert camera.run("update", "--watch").returncode == 3


# ---- going back -------------------------------------------------------------------------------------------------------


def plan(camera: Camera, *then: dict[str, Any]) -> None:
    camera.state["rollback"] = {"then": list(then)}
    camera.write()


GOING = {
    "name": "pipeline",
    "version": "1.4.2",
    "state": "ROLLING_BACK",
    "waits_for": "going back by hand",
    "last": None,
}


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        (outcome("ROLLED_BACK"), 0, "it went back"),
        (outcome("FAILED", "cancelled"), 0, "it went back"),
        (outcome("FAILED", "rollback_failed"), 11, "it did not go back"),
        (outcome("COMMITTED", ""), 11, "it did not go back"),
    ],
)
def test_it_is_followed_to_its_end(camera: Camera, end: dict[str, Any], code: int, words: str):
    plan(camera, GOING, end)
    done = camera.run("update", "rollback", "pipeline", "--yes")
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.startswith("pipeline goes back\n")
    assert "going back by hand" in done.stdout
    assert f"\n{words}\n" in done.stdout
    assert "in words" in done.stdout
    plan(camera, end | {"last": end["last"] | {"at": time.time() + 1}})
    status, document = camera.json("update", "rollback", "pipeline", "--yes")
    assert status == code
    assert document["went_back"] is (code == 0)
    assert document["outcome"]["state"] == end["last"]["state"]


def test_an_old_outcome_is_not_taken_for_the_end(camera: Camera):
    plan(camera, target(camera))
    done = camera.run("update", "rollback", "pipeline", "--yes", "--timeout", "0.1")
    assert done.returncode == 6
    assert "has not gone back after 0.1 s" in done.stderr
    assert (
        camera.json("update", "rollback", "pipeline", "--yes", "--timeout", "0")[1]["error"]["code"] == "still_running"
    )


def test_it_outlives_a_restart_of_the_agent(camera: Camera):
    plan(camera, GOING)
    following = subprocess.Popen(
        [*AGENTCTL, "update", "rollback", "pipeline", "--yes"],
        cwd=ROOT,
        env=camera.env(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert following.stdout
    assert following.stdout.readline() == "pipeline goes back\n"
    camera.stop(signal.SIGKILL)
    while "is away" not in following.stdout.readline():
        assert following.poll() is None
    camera.state["updates"]["targets"]["pipeline"] = outcome("ROLLED_BACK")
    camera.start()
    rest, _ = following.communicate(timeout=30)
    assert following.returncode == 0
    assert "it went back" in rest


def test_nobody_there_and_no_yes_changes_nothing(camera: Camera):
    plan(camera, outcome("ROLLED_BACK"))
    for stdin in (subprocess.DEVNULL, subprocess.PIPE):
        done = camera.run("update", "rollback", "pipeline", stdin=stdin)
        assert (done.returncode, done.stdout) == (2, "")
        assert "pipeline goes back from 1.4.2 to 1.4.1" in re.sub(r"\s+", " ", done.stderr)
        assert "--yes" in done.stderr
    assert camera.json("update")[1]["targets"]["pipeline"]["version"] == "1.4.2"


def test_what_can_not_be_gone_back_is_told(camera: Camera):
    assert camera.run("update", "rollback", "ox", "--yes").returncode == 5
    camera.state["rollback"] = {"refused": ["update_under_way", "an update of pipeline is under way", "cancel its job"]}
    camera.write()
    done = camera.run("update", "rollback", "pipeline", "--yes")
    assert (done.returncode, done.stdout) == (1, "")
    assert "cancel its job" in done.stderr
    target(camera)["previous"] = None
    camera.write()
    code, document = camera.json("update", "rollback", "pipeline", "--yes")
    assert (code, document["error"]["code"]) == (1, "nothing_before")


def answered(camera: Camera, answer: str) -> tuple[int, str]:
    """The exit status and what is shown when a person on a terminal gives this answer."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [*AGENTCTL, "update", "rollback", "pipeline"],
        cwd=ROOT,
        env={**camera.env(), "TERM": "dumb"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(controller, 65536):
            if b"[y/N]" in piece:
                os.write(controller, answer.encode())
            shown += piece
    except OSError:  # the other end is closed
        pass
    os.close(controller)
    return process.wait(30), re.sub(r"\s+", " ", shown.decode())


def test_a_person_may_say_no(camera: Camera):
    plan(camera, outcome("ROLLED_BACK"))
    for answer in ("n\n", "\n", "yesterday\n", "\x04"):
        code, shown = answered(camera, answer)
        assert code == 1
        assert "nothing was changed" in shown
    assert camera.json("update")[1]["targets"]["pipeline"]["version"] == "1.4.2"


def test_a_person_is_told_what_will_happen_and_may_say_yes(camera: Camera):
    let_wait(camera)
    plan(camera, outcome("ROLLED_BACK"))
    code, shown = answered(camera, "y\n")
    assert code == 0
    assert "pipeline goes back from 1.4.2 to 1.4.1. What runs it is restarted" in shown
    assert "it does not wait for this: capture-pipeline holds off changes for 4 min more" in shown
    assert "it went back" in shown


def test_an_update_on_trial_is_ended(camera: Camera):
    target(camera).update(state="TRIAL", previous=None)
    plan(camera, outcome("FAILED", "cancelled"))
    code, shown = answered(camera, "yes\n")
    assert code == 0
    assert "the update of pipeline that is on trial is ended, and 1.4.2 comes back" in shown


# ---- locks ------------------------------------------------------------------------------------------------------------


def test_a_lock_is_taken_seen_and_released(camera: Camera):
    done = camera.run("update", "lock", "--for", "300", "--holder", "calibration", "--reason", "focus")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("calibration holds off changes for 5 min more: focus\nuntil ")
    assert "calibration holds off" in camera.run("update").stdout
    code, document = camera.json("update", "lock", "--for", "60")
    assert code == 0
    assert 50 < document["lock"]["expires_in_s"] <= 60
    done = camera.run("update", "unlock")
    assert (done.returncode, done.stdout.startswith("released\ncalibration holds")) == (0, True)
    assert camera.json("update", "unlock", "--holder", "calibration")[1]["locks"] == []
    assert camera.run("update", "unlock", "--holder", "calibration").returncode == 5


def test_a_lock_outlives_a_killed_agent(camera: Camera):
    """The file is there from the moment of the answer; reading it is for the agent's start."""
    camera.run("update", "lock", "--for", "300", "--holder", "calibration")
    camera.stop(signal.SIGKILL)
    kept = json.loads((camera.folder / "apply-locks.json").read_text())
    assert [lock["holder"] for lock in kept["locks"]] == ["calibration"]


def test_a_lock_that_can_not_be_had_is_told(camera: Camera):
    camera.state["switching"] = "pipeline is TRIAL"
    camera.write()
    done = camera.run("update", "lock", "--for", "300")
    assert (done.returncode, done.stdout) == (1, "")
    assert "comes too late" in done.stderr
    code, document = camera.json("update", "lock", "--for", "300")
    assert (code, document["error"]["code"]) == (1, "switching")
    assert camera.run("update", "lock", "--for", "4000").returncode == 1
    assert "3600" in camera.run("update", "lock", "--for", "4000").stderr


def test_wrong_usage_exits_2(camera: Camera):
    for words in (["lock"], ["lock", "--for", "soon"], ["rollback"], ["unlock", "--holder", " "], ["x"]):
        assert camera.run("update", *words).returncode == 2
    code, document = camera.json("update", "lock", "--for", "-1")
    assert (code, document["error"]["code"]) == (2, "usage")


def test_it_imports_nothing_heavy(camera: Camera):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "agent.ctl", "update"],
        cwd=ROOT,
        env=camera.env(),
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    heavy = ("aiohttp", "pydantic", "structlog", "awscrt", "asyncio", "http", "dataclasses", "pathlib", "logging")
    assert "agent.ctl.jobs" in imported
    assert not [name for name in imported if name.split(".")[0] in heavy]
    assert not [name for name in imported if name.startswith("agent.") and not name.startswith("agent.ctl")]
