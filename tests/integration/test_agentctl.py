"""agentctl as people run it: a process of its own, against the real API server in another process, or against none."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent.ctl.client import Client
from agent.ctl.exits import DAEMON_DOWN, ERROR, TIMED_OUT, Failure
from tests.integration.fake_daemon import healthy_state

ROOT = Path(__file__).parents[2]
AGENTCTL = [sys.executable, "-m", "agent.ctl"]
ESCAPE = "\x1b"
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")


@dataclass
class Camera:
    """A folder with a daemon's socket in it, or not, and agentctl pointed at it."""

    folder: Path
    state: dict[str, Any]
    daemon: subprocess.Popen[str] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def socket(self) -> Path:
        return self.folder / "api.sock"

    def write(self) -> None:
        new = self.folder / "state.new"
        new.write_text(json.dumps(self.state))
        new.rename(self.folder / "state.json")

    def start(self) -> None:
        self.write()
        self.daemon = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.fake_daemon", str(self.folder), str(self.folder / "state.json")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.daemon.stdout
        assert self.daemon.stdout.readline().startswith("listening")

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.daemon:
            self.daemon.send_signal(number)
            self.daemon.wait(10)
            assert self.daemon.stdout
            self.daemon.stdout.close()
            self.daemon = None

    def env(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("AGENTCTL", "CAMERA_AGENT"))}
        kept.pop("NO_COLOR", None)
        return {**kept, "AGENTCTL_SOCKET": str(self.socket), "TZ": "UTC", **self.environment}

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*AGENTCTL, *words], cwd=ROOT, env=self.env(), capture_output=True, text=True, timeout=60, **options
        )

    def json(self, *words: str) -> tuple[int, dict[str, Any]]:
        done = self.run(*words, "--json")
        assert done.stderr == ""
        document = json.loads(done.stdout)
        assert document["schema"] == 1
        return done.returncode, document


@pytest.fixture
def down() -> Iterator[Camera]:
    """A camera without a daemon; not in pytest's own folders, because other users can't get into those."""
    with tempfile.TemporaryDirectory(prefix="camera-agent-") as name:
        camera = Camera(Path(name), healthy_state(time.time()))
        camera.folder.chmod(0o755)
        yield camera
        camera.stop()


@pytest.fixture
def camera(down: Camera) -> Camera:
    down.start()
    return down


def make_sick(camera: Camera, state: str = "unhealthy") -> None:
    now = time.time()
    camera.state["status"]["health"] = {
        "state": state,
        "conditions": [
            {
                "condition": "capture.stopped",
                "source": "front",
                "severity": "critical",
                "message": "the last image is 4 min old \x1b[31m",
                "remedy": "systemctl restart capture-pipeline",
                "since": now - 240,
            }
        ],
    }
    camera.state["capture"]["conditions"] = camera.state["status"]["health"]["conditions"]
    camera.state["status"]["cloud"] |= {
        "state": "offline",
        "code": "dns_failed",
        "reason": "the endpoint's name can't be resolved",
        "hint": "resolvectl status",
    }
    camera.write()


READING = [
    ["status"],
    ["jobs"],
    ["jobs", "list", "--limit", "5"],
    ["jobs", "show", "update-17"],
    ["jobs", "watch", "update-17"],
    ["config"],
    ["config", "show", "--changed"],
    ["config", "get", "telemetry.interval_s"],
    ["config", "explain", "telemetry.interval_s"],
    ["config", "explain", "cloud.endpoint"],
    ["config", "diff"],
    ["config", "target"],
    ["config", "target", "pipeline"],
    ["config", "target", "lights"],
    ["update"],
    ["update", "status"],
    ["capture"],
    ["metrics"],
]


@pytest.mark.parametrize("words", READING, ids=" ".join)
def test_answers_exit_0_in_both_formats(camera: Camera, words: list[str]):
    done = camera.run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
    assert ESCAPE not in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    code, document = camera.json(*words)
    assert code == 0
    assert "error" not in document


@pytest.mark.parametrize("words", [w for w in READING if w != ["config", "check"]], ids=" ".join)
def test_daemon_down_exits_3_in_both_formats(down: Camera, words: list[str]):
    done = down.run(*words)
    assert done.returncode == 3
    assert "camera-agent is not running" in done.stderr
    assert "camera-agent run" in done.stderr or "systemctl start" in done.stderr
    code, document = down.json(*words)
    assert (code, document["error"]["code"]) == (3, "daemon_down")
    assert "last_known" not in document


# ---- status -----------------------------------------------------------------------------------------------------------


def test_status_begins_with_the_state(camera: Camera):
    lines = camera.run("status").stdout.splitlines()
    assert lines[0] == "cam-0412: healthy"
    assert "connected" in next(line for line in lines if line.startswith("Cloud"))
    assert "1.00 of 1.00/s" in next(line for line in lines if line.startswith("Capture"))


def test_status_says_why_and_what_to_do(camera: Camera):
    make_sick(camera)
    done = camera.run("status")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "cam-0412: bad, not connected to the cloud"
    top = "\n".join(lines[:12])
    for words in (
        "the endpoint's name",
        "resolvectl status",
        "capture.stopped front",
        "systemctl restart capture-pipe",
    ):
        assert words in top
    assert ESCAPE not in done.stdout


@pytest.mark.parametrize(("state", "code"), [("healthy", 0), ("degraded", 10), ("unhealthy", 11)])
def test_check_tells_by_its_exit_status(camera: Camera, state: str, code: int):
    if state != "healthy":
        make_sick(camera, state)
    assert camera.run("status", "--check").returncode == code
    assert camera.json("status", "--check")[0] == code
    assert camera.run("status").returncode == 0


def test_waiting_for_online_ends_when_it_is(camera: Camera):
    make_sick(camera)
    waiting = subprocess.Popen(
        [*AGENTCTL, "status", "--wait", "online"], cwd=ROOT, env=camera.env(), stdout=subprocess.PIPE, text=True
    )
    assert waiting.poll() is None
    camera.state = healthy_state(time.time())
    camera.write()
    output, _ = waiting.communicate(timeout=30)
    assert waiting.returncode == 0
    assert output.startswith("cam-0412: healthy\n")


def test_waiting_for_online_times_out_with_the_reason(camera: Camera):
    make_sick(camera)
    camera.run("status")  # the first client waits for the daemon's imports
    done = camera.run("status", "--wait", "online", "--timeout", "0.1")
    assert done.returncode == 6
    assert "can't be resolved" in done.stderr
    assert "Last known" not in done.stdout, "the agent answers, what it wrote down earlier is of no use"
    code, document = camera.json("status", "--wait", "online", "--timeout", "0.1")
    assert (code, document["error"]["code"]) == (6, "not_online")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_last_known_state_outlives_the_daemon(camera: Camera, number: int):
    camera.stop(number)
    assert camera.socket.exists() == (number == signal.SIGKILL)
    past = time.time() - 600
    os.utime(camera.folder / "status.json", (past, past))
    done = camera.run("status")
    assert done.returncode == 3
    assert done.stderr.startswith("agentctl: camera-agent is not running")
    assert "Last known state, 10 min old" in done.stdout
    ends = ("It was stopped in good order at ", "It did not stop by itself: it was killed")
    assert [end in done.stdout for end in ends] == [number == signal.SIGTERM, number == signal.SIGKILL]
    assert "cam-0412: healthy" in done.stdout
    code, document = camera.json("status")
    assert code == 3
    assert document["last_known"]["status"]["agent"]["thing_name"] == "cam-0412"
    assert 599 < document["last_known"]["age_s"] < 700
    assert camera.json("capture")[1]["last_known"]["at"] == pytest.approx(past, abs=1)
    camera.start()
    assert camera.run("status").returncode == 0


@pytest.mark.parametrize("kept", ['{"health": [], "cloud": 1}', "[" * 100_000, '{"agent"', "{}"])
def test_a_strange_last_known_state_does_not_change_the_exit_status(down: Camera, kept: str):
    (down.folder / "status.json").write_text(kept)
    done = down.run("status")
    assert (done.returncode, "Traceback" in done.stderr) == (3, False)
    assert down.json("status")[0] == 3


def test_a_daemon_that_hangs_does_not_answer_in_time(camera: Camera):
    camera.run("status")
    assert camera.daemon
    camera.daemon.send_signal(signal.SIGSTOP)
    try:
        begun = time.monotonic()
        done = camera.run("status", "--wait", "online", "--timeout", "1.5")
        assert time.monotonic() - begun < 8, "less than one answer may take"
    finally:
        camera.daemon.send_signal(signal.SIGCONT)
    assert done.returncode == 6
    assert done.stderr.startswith("agentctl: not online after 1.5 s: camera-agent does not answer")
    assert done.stdout == ""


def test_a_damaged_last_known_state_is_no_trouble(down: Camera):
    (down.folder / "status.json").write_text('{"agent"')
    done = down.run("status")
    assert (done.returncode, done.stdout) == (3, "")


# ---- jobs -------------------------------------------------------------------------------------------------------------


def job(**fields: Any) -> dict[str, Any]:
    return {
        "job_id": "long",
        "execution_number": 1,
        "operation": "update",
        "phase": "running",
        "status": None,
        "message": "downloading",
        "details": {},
        "received_at": time.time() - 5,
        "ended_at": None,
        "superseded": None,
    } | fields


def test_no_such_job_exits_5(camera: Camera):
    for words in (["jobs", "show", "x y/z"], ["jobs", "watch", "unknown"], ["jobs", "cancel", "unknown"]):
        done = camera.run(*words)
        assert done.returncode == 5
        assert "knows no job" in done.stderr
        assert camera.json(*words)[1]["error"]["code"] == "no_such_job"


def test_jobs_are_listed_with_their_reasons(camera: Camera):
    failed = {"reason_code": "gate_images_worse", "message": "rolled back: sharpness fell from 0.42 to 0.11"}
    camera.state["jobs"] = [job(), job(job_id="7" * 64, status="FAILED", details=failed), *camera.state["jobs"]]
    camera.write()
    shown = camera.run("jobs").stdout
    assert re.search(r"^IN_PROGRESS .*UTC  update +long\n    downloading$", shown, re.MULTILINE)
    assert re.search(r"^FAILED .* update\n    7{64}\n    rolled back: sharpness fell", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ({"status": "SUCCEEDED"}, 0),
        ({"status": "FAILED"}, 11),
        ({"status": "REJECTED"}, 11),
        ({"superseded": "CANCELED"}, 11),
        ({"status": "SUCCEEDED", "superseded": "TIMED_OUT"}, 11),
    ],
)
def test_watching_follows_a_job_to_its_end(camera: Camera, end: dict[str, str], code: int):
    camera.state["jobs"] = [job()]
    camera.write()
    watching = subprocess.Popen(
        [*AGENTCTL, "jobs", "watch", "long", "--json"], cwd=ROOT, env=camera.env(), stdout=subprocess.PIPE, text=True
    )
    assert watching.stdout
    first = json.loads(watching.stdout.readline())
    assert (first["schema"], first["job"]["message"]) == (1, "downloading")
    camera.state["jobs"] = [job(phase="ended", message="", details={"message": "it is over"}, **end)]
    camera.write()
    last = json.loads(watching.stdout.readline())
    assert last["job"]["details"]["message"] == "it is over"
    assert watching.wait(30) == code
    watching.stdout.close()
    assert camera.run("jobs", "watch", "long").returncode == code


def test_watching_gives_up_in_time(camera: Camera):
    camera.state["jobs"] = [job()]
    camera.write()
    done = camera.run("jobs", "watch", "long", "--timeout", "0.1")
    assert done.returncode == 6
    assert "has not ended" in done.stderr


def test_cancelling(camera: Camera):
    camera.state["jobs"] = [job()]
    camera.write()
    done = camera.run("jobs", "cancel", "long")
    assert (done.returncode, done.stdout) == (0, "long: asked to stop; follow it: agentctl jobs watch long\n")
    camera.state["jobs"] = [job(status="SUCCEEDED")]
    camera.write()
    code, document = camera.json("jobs", "cancel", "long")
    assert (code, document["error"]["code"]) == (1, "job_ended")


DOCUMENTS = {
    "reboot": '{"version": "1.0", "operation": "reboot"}',
    "new": '{"version": "2.0", "operation": "reboot"}',
    "steps": '{"_comment": "sample", "operation": "echo", "args": ["Hello"]}',
    "list": "[]",
}


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        (
            "reboot",
            0,
            "reboot: this camera would take it\n  1. wait for the end of other changes\n  2. reboot ?[31m the",
        ),
        (
            "new",
            11,
            'this camera would refuse it (unknown_version)\n  version: "2.0" is not known here\n  what to do: use',
        ),
        ("steps", 11, "(handler_missing)\n  echo: No such file or directory\n  what to do: install it first\n"),
        ("list", 11, "(bad_document)"),
    ],
)
@pytest.mark.parametrize("way", ["file", "standard input"])
def test_a_document_is_tried(camera: Camera, name: str, code: int, said: str, way: str):
    file = camera.folder / "job.json"
    file.write_text(DOCUMENTS[name])
    given: dict[str, Any] = {} if way == "file" else {"input": DOCUMENTS[name]}
    words = ["jobs", "plan", str(file) if way == "file" else "-"]
    done = camera.run(*words, **given)
    assert (done.returncode, done.stderr) == (code, "")
    assert said in done.stdout
    assert ESCAPE not in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines())
    done = camera.run(*words, "--json", **given)
    plan = json.loads(done.stdout)["plan"]
    assert (done.returncode, plan["accepted"]) == (code, code == 0)
    assert plan.keys() == {"accepted", "operation", "code", "message", "hint", "steps"}


@pytest.mark.parametrize(
    ("data", "code", "said"),
    [
        (None, "document_unreadable", "No such file or directory"),
        (b"", "document_not_json", "it is empty"),
        (b'{"version": "1.0",}', "document_not_json", "line 1 column"),
        (b'{"timeoutSeconds": NaN}', "document_not_json", "NaN is no number"),
        (b"[" * 50_000, "document_not_json", "nested too deep"),
        (b"\xff\xfe\xfd", "document_not_json", "codec"),
        (b" " * 131_073, "document_too_large", "larger than 131072 bytes"),
    ],
)
def test_what_is_no_document_is_told_before_anything_is_asked(down: Camera, data: bytes | None, code: str, said: str):
    file = down.folder / "job.json"
    if data is not None:
        file.write_bytes(data)
    exit_code, document = down.json("jobs", "plan", str(file))
    assert (exit_code, document["error"]["code"]) == (1, code)
    assert said in document["error"]["message"]
    done = down.run("jobs", "plan", str(file))
    assert (done.returncode, done.stdout) == (1, "")
    assert str(file) in done.stderr.replace("\n", " ")


def test_what_can_not_be_read_as_a_document(down: Camera):
    for path, said in ((str(down.folder), "Is a directory"), ("a\udcff.json", "No such file"), ("/dev/zero", "larger")):
        done = down.run("jobs", "plan", path)
        assert (done.returncode, done.stdout) == (1, "")
        assert said in done.stderr.replace("\n", " ")


def test_planning_without_the_daemon(down: Camera):
    assert down.run("jobs", "plan", "-", input=DOCUMENTS["reboot"]).returncode == 3


def test_a_document_of_the_largest_size_arrives(camera: Camera):
    text = '{"version": "1.0", "_comment": "%s"}' % ("x" * 65_000)
    done = camera.run("jobs", "plan", "-", "--json", input=text)
    assert (done.returncode, json.loads(done.stdout)["plan"]["code"]) == (11, "bad_document")


@needs_root
def test_an_operator_may_try_a_document(camera: Camera):
    file = camera.folder / "job.json"
    file.write_text(DOCUMENTS["reboot"])
    with as_nobody(camera, 0o666) as run:
        assert run("jobs", "plan", str(file)).returncode == 0


# ---- config -----------------------------------------------------------------------------------------------------------


def test_config_shows_values_with_their_origins(camera: Camera):
    shown = camera.run("config").stdout
    assert shown.startswith("# /etc/camera-agent/agent.toml; the cloud wants version 12: applied\n")
    assert re.search(r"^\[telemetry\]\ninterval_s = 30.0 +# shadow version 12$", shown, re.MULTILINE)
    assert "8883" in shown
    assert "secret" not in shown
    assert "8883" not in camera.run("config", "show", "--changed").stdout


def test_config_get_prints_the_value_alone(camera: Camera):
    assert camera.run("config", "get", "telemetry.interval_s").stdout == "30.0\n"
    assert camera.run("config", "get", "thing_name").stdout == "cam-0412\n"
    assert json.loads(camera.run("config", "get", "targets.pipeline").stdout) == {"gain": 2}
    assert camera.json("config", "get", "thing_name")[1] == {
        "schema": 1,
        "key": "thing_name",
        "value": "cam-0412",
        "origin": "site file",
    }


def test_no_such_key_exits_5(camera: Camera):
    assert camera.run("config", "get", "telemetry.intervals").returncode == 5
    done = camera.run("config", "explain", "telemetry.intervals")
    assert done.returncode == 5
    assert "did you mean" in done.stderr
    assert camera.json("config", "explain", "x")[1]["error"]["code"] == "unknown_key"


def test_a_table_is_explained_by_its_keys(camera: Camera):
    done = camera.run("config", "explain", "capture.sources")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.match(r"capture.sources is a table; .*\n  capture.sources.front.pattern  \"\*.jpg\"\n$", done.stdout)
    assert camera.json("config", "explain", "capture")[1] == {
        "schema": 1,
        "key": "capture",
        "keys": ["capture.sources.front.pattern"],
    }
    assert camera.run("config", "explain", "capture.source").returncode == 5


def test_config_diff_exits_10_when_it_differs(camera: Camera):
    assert camera.run("config", "diff").stdout == "all that the cloud wants is in force\n"
    camera.state["config"]["shadow"] |= {
        "state": "rejected",
        "desired_version": 13,
        "errors": [{"pointer": "/agent/telemetry/interval_s", "message": "must be 1 or more", "code": "bad"}],
        "desired": {"agent": {"telemetry": {"interval_s": 0}}},
    }
    camera.write()
    done = camera.run("config", "diff")
    assert done.returncode == 10
    assert "/agent/telemetry/interval_s" in done.stdout
    assert "must be 1 or more" in done.stdout
    code, document = camera.json("config", "diff")
    assert code == 10
    assert document["differences"] == [
        {
            "pointer": "/agent/telemetry/interval_s",
            "wanted": 0,
            "in_force": 30.0,
            "origin": "shadow version 12",
        }
    ]


def test_config_diff_exits_10_also_on_trial_and_when_something_is_refused(camera: Camera):
    shadow = camera.state["config"]["shadow"]
    shadow |= {"state": "trial", "desired_version": 13, "job": "J-1/2"}
    camera.write()
    done = camera.run("config", "diff")
    words = "version 13 from the cloud is on trial for job J-1: in force, and taken back"
    assert (done.returncode, done.stdout.splitlines()[0]) == (10, words)
    code, document = camera.json("config", "diff")
    assert (code, document["differences"], document["state"], document["job"]) == (10, [], "trial", "J-1/2")
    assert "version 13: on trial for job J-1\n" in camera.run("config").stdout
    del shadow["job"]
    shadow |= {"waits_for": "the end of an update of pipeline"}
    camera.write()
    done = camera.run("config", "diff")
    assert done.returncode == 10
    assert done.stdout.startswith("version 13 from the cloud is on trial: ")
    assert "waits for: the end of an update of pipeline" in done.stdout
    shown = camera.run("config").stdout
    assert "version 13: on trial\n# waits for: the end of an update of pipeline\n" in shown
    shadow |= {
        "state": "rejected",
        "waits_for": "",
        "errors": [{"pointer": "/x", "message": "no such key", "code": "c"}],
    }
    camera.write()
    done = camera.run("config", "diff")
    assert (done.returncode, "is rejected\n" in done.stdout, "why: /x no such key" in done.stdout) == (10, True, True)
    shadow |= {"state": "applied", "errors": [], "waits_for": "images"}
    camera.write()
    done = camera.run("config", "diff")
    assert (done.returncode, "waits for: images" in done.stdout, "all that" in done.stdout) == (10, True, False)


@pytest.mark.parametrize(
    "words",
    [["config"], ["config", "diff"], ["config", "explain", "targets.p"], ["config", "target"], ["jobs"], ["status"]],
    ids=" ".join,
)
def test_no_line_is_wider_than_80_columns(camera: Camera, words: list[str]):
    long = "x" * 100
    job, config = camera.state["jobs"][0], camera.state["config"]
    job |= {"job_id": "J" * 64, "operation": "o" * 40, "status": "FAILED", "details": {"message": long}}
    error = {"pointer": f"/targets/{long}", "message": long, "code": "c"}
    config["shadow"] |= {"state": "rejected", "waits_for": long, "errors": [error]}
    config["shadow"]["desired"]["targets"]["p"] = {long: long, "short": "new"}
    origin = f"job {'J' * 64}"
    config["effective"] |= {
        f"targets.p.{long}": {"value": [long], "origin": origin, "since": None, "remote": True},
        f"{long}.{long}.short": {"value": long, "origin": long, "since": None, "remote": True},
        "targets.p.short": {"value": "old", "origin": origin, "since": None, "remote": True},
    }
    camera.state["offers"][f"t{long}"] = [{long: long, "fps": 5}, "applied"]
    camera.stop()
    camera.start()
    done = camera.run(*words)
    assert done.stdout
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []


def test_json_has_escapes_for_what_plays_tricks_on_terminals(camera: Camera):
    text = "caf\u00e9 \u009b31m \u202e \u200b \x7f \U000e0041 \u2028 \U0001f600"
    camera.state["config"]["effective"]["targets.pipeline.names"] = {"value": [text], "origin": "site file"}
    camera.write()
    for shown in (
        camera.run("config", "--json").stdout,
        on_a_terminal(camera, "config", "--json"),
        camera.run("config", "get", "targets.pipeline.names").stdout,
        camera.run("config").stdout,
    ):
        assert [character for character in shown if not (character.isprintable() or character == "\n")] == []
        assert {"caf\u00e9", "\U0001f600"} <= {word.strip('"[],') for word in shown.split()}
    assert camera.json("config")[1]["effective"]["targets.pipeline.names"]["value"] == [text]


def test_config_show_says_what_a_trial_waits_for_and_why_one_ended(camera: Camera):
    camera.state["config"]["shadow"] |= {
        "state": "trial",
        "waits_for": "the maintenance window 22:00-04:00 Europe/Berlin, which opens at 2026-11-23 22:00:00 CET",
        "errors": [{"pointer": "/targets/pipeline", "message": "too fast " * 12, "code": "refused_by_program"}],
    }
    job = "job " + "a" * 64
    camera.state["config"]["effective"] |= {
        "labels.site": {"value": "north " * 20, "origin": job, "since": None, "remote": True},
        "labels.lane": {"value": "7", "origin": job, "since": None, "remote": True},
        "log.level": {"value": "debug", "origin": "job raise-the-level", "since": None, "remote": True},
    }
    camera.write()
    shown = camera.run("config").stdout
    assert all(len(line) <= 80 for line in shown.splitlines())
    words = " ".join(line.lstrip("# ") for line in shown.splitlines() if line.startswith("#"))
    assert "waits for: the maintenance window 22:00-04:00 Europe/Berlin, which opens at 2026-11-23" in words
    assert "why: /targets/pipeline too fast too fast" in words
    assert f'\nlane = "7"\n    # {job}\n' in shown
    assert re.search(r'^level = "debug" +# job raise-the-level$', shown, re.MULTILINE)
    assert "the maintenance window" in camera.json("config")[1]["shadow"]["waits_for"]


def test_config_explain_names_the_class_and_all_that_is_overridden_in_order(camera: Camera):
    shown = camera.run("config", "explain", "telemetry.interval_s").stdout
    assert "class      live: the cloud may set it, in force at once" in shown
    layers = [line.split() for line in shown.splitlines() if "overrides" in line]
    assert [(layer[1], layer[3]) for layer in layers] == [("40", "job"), ("45", "site"), ("60", "default")]
    assert "local only: the cloud may not set it" in camera.run("config", "explain", "cloud.endpoint").stdout


# ---- config target ----------------------------------------------------------------------------------------------------

DIGESTS = {
    name: hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    for name, document in (("own", healthy_state(0)["offers"]["pipeline"][0]), ("new", {"gain": 3}))
}


def offer(camera: Camera, document: dict[str, Any] | None, state: str) -> None:
    camera.state["offers"]["pipeline"] = [document, state]
    camera.write()


def test_config_target_tells_what_a_program_should_run_with(camera: Camera):
    shown = camera.run("config", "target", "pipeline").stdout
    assert shown.startswith("pipeline: applied, not confirmed by the program\n")
    assert DIGESTS["own"] in shown
    assert re.search(r"^gain +2$", shown, re.MULTILINE)
    assert camera.json("config", "target", "pipeline")[1]["document"]["gain"] == 2
    assert "the program uses its own" in camera.run("config", "target", "lights").stdout
    lines = camera.run("config", "target").stdout.splitlines()
    assert lines[0].split()[:3] == ["pipeline", DIGESTS["own"][:12], "applied,"]
    assert lines[1].split()[:3] == ["lights", "-", "applied,"]
    assert camera.json("config", "target")[1]["targets"].keys() == {"pipeline", "lights"}


def test_config_target_confirms_and_refuses(camera: Camera):
    done = camera.run("config", "target", "pipeline", "--confirm", DIGESTS["own"])
    assert (done.returncode, done.stdout) == (0, "pipeline: confirmed\n")
    assert "the program runs with it" in camera.run("config", "target").stdout
    done = camera.run("config", "target", "pipeline", "--confirm", DIGESTS["own"], "--refuse", "too fast\nby far")
    assert (done.returncode, done.stdout) == (0, "pipeline: refused\n")
    assert "the program refuses it: too fast by far" in camera.run("config", "target", "pipeline").stdout
    assert camera.run("config", "target", "lights", "--confirm", "").returncode == 0
    code, document = camera.json("config", "target", "pipeline", "--confirm", DIGESTS["own"])
    assert (code, document["confirmed"], document["refused"]) == (0, True, None)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["pipeline", "--confirm", "x"], 1, "outdated"),
        (["pipe/../line"], 5, "unknown_target"),
        (["none", "--follow"], 5, "unknown_target"),
        (["none", "--confirm", "x"], 5, "unknown_target"),
        (["pipeline", "--refuse", "why"], 2, "usage"),
        (["pipeline", "--follow", "--confirm", "x"], 2, "usage"),
        (["--follow"], 2, "usage"),
        (["--confirm", "x"], 2, "usage"),
        ([""], 2, "usage"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_config_target_says_what_is_wrong(camera: Camera, words: list[str], code: int, said: str):
    returned, document = camera.json("config", "target", *words)
    assert (returned, document["error"]["code"]) == (code, said)


@needs_root
def test_config_target_is_not_confirmed_by_anybody(camera: Camera):
    camera.socket.chmod(0o666)
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--clear-groups", *AGENTCTL, "config", "target", "pipeline", "--confirm", "x"],
        cwd=ROOT,
        env=camera.env(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 4, done.stderr
    assert "config.targets.pipeline.users of agent.toml" in done.stderr


@contextmanager
def following(camera: Camera, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`agentctl config target pipeline --follow` into a pipe."""
    process = subprocess.Popen(
        [*AGENTCTL, "config", "target", "pipeline", "--follow", *options],
        cwd=ROOT,
        env=camera.env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def test_config_target_follows_changes_also_over_a_restart_of_the_agent(camera: Camera):
    with following(camera) as process:
        assert process.stdout
        first = json.loads(process.stdout.readline())
        assert (first["document"]["gain"], first["schema"]) == (2, 1)
        offer(camera, {"gain": 3}, "trial")
        assert json.loads(process.stdout.readline())["digest"] == DIGESTS["new"]
        camera.stop(signal.SIGKILL)
        camera.start()
        camera.run("config", "target")  # its first client loads what answers
        fds = Path(f"/proc/{process.pid}/fd")
        while not any("socket" in str(fd.readlink()) for fd in fds.iterdir()):
            time.sleep(0.05)
        time.sleep(0.5)  # so that it most likely has got again what it has shown
        offer(camera, None, "applied")
        assert json.loads(process.stdout.readline())["document"] is None, "what it has shown it does not show again"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == 0


def test_config_target_ends_when_nobody_reads_it_any_more(camera: Camera):
    with following(camera, "--json") as process:
        assert process.stdout
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(30) == 0, "noticed without a change"
        assert process.stderr
        assert process.stderr.read() == ""
        process.stdout = None


def test_config_target_on_a_terminal_is_for_people(camera: Camera):
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [*AGENTCTL, "config", "target", "pipeline", "--follow"], cwd=ROOT, env=camera.env(), stdout=follower
    )
    os.close(follower)
    shown = ""
    while "gain" not in shown or not shown.endswith("\n"):
        shown += os.read(leader, 4096).decode()
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    os.close(leader)
    assert "pipeline: applied, not confirmed by the program" in shown
    assert '{"' not in shown


# ---- capture and metrics ----------------------------------------------------------------------------------------------


def test_capture_in_a_pipe_is_one_object_a_line_until_its_reader_goes(camera: Camera):
    watching = subprocess.Popen(
        [*AGENTCTL, "capture", "--watch"],
        cwd=ROOT,
        env=camera.env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout
    assert watching.stderr
    for _ in range(3):
        assert json.loads(watching.stdout.readline())["sources"].keys() == {"front"}
    watching.stdout.close()
    assert watching.wait(30) == 0
    assert watching.stderr.read() == ""
    watching.stderr.close()


@pytest.mark.parametrize(
    ("words", "code"),
    [(["status", "--check"], 11), (["status", "--check", "--json"], 11), (["jobs"], 0), (["metrics"], 0)],
    ids=["check", "check json", "jobs", "metrics"],
)
def test_a_reader_that_goes_does_not_change_the_exit_status(camera: Camera, words: list[str], code: int):
    make_sick(camera)

    def run_unread() -> tuple[int, bytes]:
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [*AGENTCTL, *words], cwd=ROOT, env=camera.env(), stdout=writer, stderr=subprocess.PIPE, timeout=60
        )
        os.close(writer)
        return done.returncode, done.stderr

    assert run_unread() == (code, b"")
    camera.stop()
    assert run_unread()[0] == 3


def test_ctrl_c_ends_a_watch_well(camera: Camera):
    watching = subprocess.Popen(
        [*AGENTCTL, "capture", "--watch"], cwd=ROOT, env=camera.env(), stdout=subprocess.PIPE, text=True
    )
    assert watching.stdout
    watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    watching.communicate(timeout=30)
    assert watching.returncode == 0


def test_a_watch_notices_that_the_daemon_ends(camera: Camera):
    watching = subprocess.Popen(
        [*AGENTCTL, "capture", "--watch"],
        cwd=ROOT,
        env=camera.env(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert watching.stdout
    watching.stdout.readline()
    camera.stop(signal.SIGKILL)
    _, errors = watching.communicate(timeout=30)
    assert watching.returncode in (1, 3)
    assert errors.startswith("agentctl: camera-agent")


def test_metrics_are_the_agents_text(camera: Camera):
    shown = camera.run("metrics").stdout
    assert 'capture_images_total{source="front"} 60\n' in shown
    assert shown.endswith("# EOF\n")
    _, document = camera.json("metrics")
    assert document["metrics"][1]["samples"] == [{"labels": {"source": "front"}, "value": 60}]


# ---- doctor and config check ------------------------------------------------------------------------------------------


def write_settings(camera: Camera) -> Path:
    (camera.folder / "front").mkdir()
    (camera.folder / "front" / "1.jpg").write_bytes(b"x")
    path = camera.folder / "agent.toml"
    path.write_text(
        f'[paths]\nstate_dir = "{camera.folder}"\nruntime_dir = "{camera.folder}"\n'
        f'[capture.sources.front]\ndirectory = "{camera.folder}/front"\ninterval_s = 600\n'
    )
    return path


def test_doctor_lists_its_checks(down: Camera):
    assert re.search(r"^dns  ", down.run("doctor", "--list").stdout, re.MULTILINE)
    code, document = down.json("doctor", "--list")
    assert code == 0
    assert {"config", "dns", "tls", "daemon", "capture"} <= {check["code"] for check in document["checks"]}


def test_doctor_exits_by_what_it_finds(camera: Camera):
    settings = str(write_settings(camera))
    done = camera.run("doctor", "daemon", "capture", "--config", settings)
    assert done.returncode == 0, done.stdout
    code, document = camera.json("doctor", "config", "--strict", "--config", settings)
    assert (code, document["state"]) == (10, "attention")
    assert camera.run("doctor", "config", "--config", settings).returncode == 0
    camera.stop()
    done = camera.run("doctor", "daemon", "--config", settings)
    assert done.returncode == 11
    assert "begin with daemon" in done.stdout
    assert ESCAPE not in done.stdout
    code, document = camera.json("doctor", "daemon", "--config", settings)
    assert (code, document["state"]) == (11, "bad")


def test_doctor_says_itself_what_is_wrong_with_the_configuration(down: Camera):
    done = down.run("doctor", "--config", str(down.folder / "none.toml"))
    assert done.returncode == 11
    assert "begin with config" in done.stdout


def test_no_such_check_exits_5(down: Camera):
    assert down.run("doctor", "weather").returncode == 5
    assert down.json("doctor", "weather")[1]["error"]["code"] == "no_such_check"


def test_config_check_lets_the_agent_judge(down: Camera):
    settings = write_settings(down)
    assert down.run("config", "check", str(settings)).returncode == 0
    assert down.json("config", "check", str(settings))[1]["valid"] is True
    settings.write_text("[paths]\nstate_dri = 1\n")
    done = down.run("config", "check", str(settings))
    assert done.returncode == 2
    assert "state_dri" in done.stderr
    code, document = down.json("config", "check", str(settings))
    assert (code, document["error"]["code"]) == (2, "settings_invalid")


# ---- usage, permissions, odd servers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["frobnicate"],
        ["status", "--frob"],
        ["jobs", "show"],
        ["jobs", "plan"],
        ["jobs", "plan", ""],
        ["status", "--wait", "rain"],
        ["jobs", "list", "--limit", "x"],
        ["status", "--wait", "online", "--timeout", "nan"],
        ["status", "--wait", "online", "--timeout", "-1"],
        ["status", "--wait", "online", "--timeout", "inf"],
        ["jobs", "watch", "x", "--timeout", "-inf"],
        ["jobs", "show", ""],
        ["config", "explain", ""],
        ["config", "get", " "],
    ],
    ids=" ".join,
)
def test_usage_errors_exit_2(down: Camera, words: list[str]):
    done = down.run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("agentctl")
    code, document = down.json(*words)
    assert (code, document["error"]["code"]) == (2, "usage")


@contextmanager
def as_nobody(camera: Camera, mode: int) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """agentctl run by another user, from a copy of the package that this user can read."""
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    home = camera.folder / "package"
    shutil.copytree(ROOT / "agent" / "ctl", home / "agent" / "ctl")
    (home / "agent" / "__init__.py").touch()
    camera.socket.chmod(mode)
    yield lambda *words: subprocess.run(
        [python, "-m", "agent.ctl", *words],
        cwd=home,
        env=camera.env(),
        user=65534,
        group=65534,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=60,
    )


@needs_root
def test_without_the_group_the_answer_is_forbidden(camera: Camera):
    with as_nobody(camera, 0o660) as run:
        done = run("status")
        assert done.returncode == 4
        assert "camera-operators" in done.stderr
        done = run("status", "--json")
        assert (done.returncode, json.loads(done.stdout)["error"]["code"]) == (4, "forbidden")


@needs_root
def test_an_operator_may_look_and_not_cancel(camera: Camera):
    camera.state["jobs"] = [job()]
    camera.write()
    with as_nobody(camera, 0o666) as run:
        assert run("jobs").returncode == 0
        done = run("jobs", "cancel", "long")
        assert done.returncode == 4
        assert "camera-admins" in done.stderr


@contextmanager
def odd_server(path: Path, answer: bytes | None, connections: int = 1) -> Iterator[Client]:
    """Something that accepts connections and answers with these bytes, or never."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    held: list[socket.socket] = []

    def serve() -> None:
        for _ in range(connections):
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            if answer is not None:
                connection.recv(65536)
                connection.sendall(answer)
                connection.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield Client(str(path), timeout_s=0.3)
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for connection in held:
            connection.close()


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"SSH-2.0-OpenSSH\r\n", ERROR),
        (b"HTTP/1.1 200 OK\r\nContent-Le", ERROR),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n{}", ERROR),
        (b"HTTP/1.1 200 OK\r\nContent-Length: ten\r\n\r\n{}", ERROR),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n{}", ERROR),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", ERROR),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", ERROR),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n", ERROR),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 2\r\n\r\nhi", ERROR),
        (b'HTTP/1.1 500 Oops\r\nContent-Length: 11\r\n\r\n{"error":1}', ERROR),
        (b"", DAEMON_DOWN),
        (None, TIMED_OUT),
    ],
)
def test_odd_answers_are_explained(tmp_path: Path, answer: bytes | None, code: int):
    with odd_server(tmp_path / "s", answer) as client, pytest.raises(Failure) as caught:
        client.get("/v1/status")
    assert caught.value.exit_code == code
    assert caught.value.message


@pytest.mark.parametrize(
    "answer",
    [
        b'HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n{"a":1}',
        b'HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n3;x=y\r\n{"a\r\n4\r\n":1}\r\n0\r\n\r\n',
        b'HTTP/1.0 200 OK\r\n\r\n{"a":1}',
    ],
)
def test_every_framing_is_understood(tmp_path: Path, answer: bytes):
    with odd_server(tmp_path / "s", answer) as client:
        assert client.get("/v1/status") == {"a": 1}


STRANGE = {
    "agent": [],
    "health": {"conditions": [1, 2]},
    "cloud": None,
    "capture": {"x": 5},
    "jobs": [7],
    "outbox": "x",
    "sources": {"front": [1]},
    "metrics": 3,
    "effective": {"a": 4},
    "shadow": {},
    "updates": {"pipeline": 9},
}


@pytest.mark.parametrize("body", [json.dumps(STRANGE), "{}", "[" * 100_000], ids=["wrong types", "empty", "deep"])
@pytest.mark.parametrize("verb", ["status", "jobs", "capture", "config", "metrics", "update"])
def test_an_answer_of_the_wrong_shape_is_one_line(down: Camera, verb: str, body: str):
    answer = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    with odd_server(down.socket, answer, connections=2):
        done = down.run(verb)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("agentctl: camera-agent's answer can't be understood: ")
        assert len(done.stderr.splitlines()) <= 2


def test_an_answer_that_trickles_is_given_up(tmp_path: Path):
    ended = threading.Event()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()

    def trickle() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not ended.wait(0.02):
                with contextlib.suppress(OSError):
                    connection.sendall(b" ")

    thread = threading.Thread(target=trickle)
    thread.start()
    try:
        with pytest.raises(Failure) as caught:
            Client(str(tmp_path / "s"), timeout_s=0.3).get("/v1/status")
    finally:
        ended.set()
        thread.join()
        listener.close()
    assert (caught.value.exit_code, caught.value.code) == (TIMED_OUT, "no_answer")


def test_any_text_can_be_shown(camera: Camera):
    text = "bad\udcff\ud800.jpg"
    camera.state["jobs"][0] |= {"document": {"arg": text}, "details": {"message": text}}
    camera.write()
    assert camera.json("jobs", "show", "update-17")[1]["job"]["document"] == {"arg": text}
    done = camera.run("jobs", "show", "update-17")
    assert (done.returncode, "bad??.jpg" in done.stdout) == (0, True)
    assert camera.run("jobs", "show", b"\xff\xfe".decode(errors="surrogateescape")).returncode == 5


@pytest.mark.parametrize(
    "words",
    [
        ["status"],
        ["status", "--json"],
        ["jobs"],
        ["metrics"],
        ["config", "get", "thing_name"],
        ["--help"],
        ["x", "--json"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("where", [">/dev/full", ">&-"])
def test_output_that_can_not_be_written_is_one_line(camera: Camera, words: list[str], where: str):
    done = subprocess.run(
        ["/bin/sh", "-c", f'"$@" {where}', "sh", *AGENTCTL, *words],
        cwd=ROOT,
        env=camera.env(),
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"agentctl: .*can't write the output: .*\n", done.stderr), done.stderr


@pytest.mark.parametrize("where", ["2>/dev/full", "2>&-"])
def test_errors_that_can_not_be_written_do_not_change_the_exit_status(down: Camera, where: str):
    for words, code in ((["status"], 3), (["frobnicate"], 2)):
        done = subprocess.run(
            ["/bin/sh", "-c", f'"$@" {where}', "sh", *AGENTCTL, *words],
            cwd=ROOT,
            env=down.env(),
            stdout=subprocess.PIPE,
            timeout=60,
        )
        assert (done.returncode, done.stdout) == (code, b"")


# ---- where the daemon is ----------------------------------------------------------------------------------------------


def test_the_socket_is_found(camera: Camera, tmp_path: Path):
    settings = tmp_path / "agent.toml"
    settings.write_text(f'[paths]\nruntime_dir = "{camera.folder}"\n')
    camera.environment = {"AGENTCTL_SOCKET": "/nowhere/a.sock"}
    assert camera.run("status").returncode == 3
    assert camera.run("status", "--socket", str(camera.socket)).returncode == 0
    assert camera.run("--config", str(settings), "status").returncode == 0
    camera.environment = {"AGENTCTL_SOCKET": "", "CAMERA_AGENT_CONFIG": str(settings)}
    assert camera.run("status").returncode == 0


def test_a_configuration_that_can_not_be_read_is_named(down: Camera, tmp_path: Path):
    done = down.run("status", "--config", str(tmp_path / "none.toml"))
    assert done.returncode == 1
    assert "none.toml: No such file" in done.stderr
    (tmp_path / "bad.toml").write_text("runtime_dir = [")
    assert "not valid TOML" in down.run("status", "--config", str(tmp_path / "bad.toml")).stderr


# ---- terminal and cost ------------------------------------------------------------------------------------------------


def on_a_terminal(camera: Camera, *words: str, **environment: str) -> str:
    """What agentctl writes when standard output is a terminal."""
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [*AGENTCTL, *words],
        cwd=ROOT,
        env={**camera.env(), "TERM": "xterm", **environment},
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=subprocess.DEVNULL,
    )
    os.close(terminal)
    shown = b""
    try:
        while piece := os.read(controller, 65536):
            shown += piece
            if "--watch" in words and shown.count(ESCAPE.encode() + b"[H") >= 2:
                process.send_signal(signal.SIGINT)
    except OSError:  # the other end is closed
        pass
    os.close(controller)
    assert process.wait(30) == 0
    return shown.decode().replace("\r\n", "\n")


def test_colours_are_for_terminals(camera: Camera):
    make_sick(camera)
    coloured = on_a_terminal(camera, "status")
    assert f"{ESCAPE}[31mbad{ESCAPE}[0m" in coloured
    assert re.sub(r"\x1b\[\d*m", "", coloured).splitlines()[0] == camera.run("status").stdout.splitlines()[0]
    assert ESCAPE not in on_a_terminal(camera, "status", NO_COLOR="1")
    assert ESCAPE not in on_a_terminal(camera, "status", TERM="dumb")
    assert ESCAPE not in on_a_terminal(camera, "status", "--json")


def test_a_watch_on_a_terminal_redraws(camera: Camera):
    shown = on_a_terminal(camera, "capture", "--watch")
    assert shown.startswith(f"{ESCAPE}[H")
    assert "front" in shown


def test_status_imports_nothing_heavy(camera: Camera):
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "agent.ctl", "status"],
        cwd=ROOT,
        env=camera.env(),
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "agent.ctl.conditions" in imported
    heavy = (
        "aiohttp",
        "pydantic",
        "structlog",
        "awscrt",
        "asyncio",
        "http",
        "dataclasses",
        "inspect",
        "pathlib",
        "logging",
    )
    assert not [name for name in imported if name.split(".")[0] in heavy]
    own = {name for name in imported if name.startswith("agent.")}
    assert not [name for name in own if not name.startswith("agent.ctl")]
