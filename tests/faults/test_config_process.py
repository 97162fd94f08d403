"""The real agent is configured by its shadow and by jobs, wrongly and well, while it is killed, and the cloud is away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

from PIL import Image

from tests.faults.agent_process import AgentProcess
from tests.faults.agent_unit import AgentUnit
from tests.faults.scene import Scene, scene, together
from tests.faults.test_update_process import Pipeline as Updated
from tests.faults.test_update_process import camera
from tests.integration.http_proxy import HttpProxy
from tests.integration.mqtt_peer import CONNECT

LIMIT_S = 90.0
REACH_S = 6
QUICK = {"trial_s": 1, "connectivity_trial_s": REACH_S}
PATIENT = {"trial_s": 1, "connectivity_trial_s": 120}


async def seen(look: Callable[[], Any], what: str, s: Scene | None = None) -> Any:
    """Wait until `look`, called in a thread, gives something true; that."""
    until = time.monotonic() + LIMIT_S
    while not (found := await asyncio.to_thread(look)):
        assert time.monotonic() < until, f"not seen: {what}\n{s.tail() if s else ''}"
        await asyncio.sleep(0.02)
    return found


def at(pointer: str, code: str, status: Mapping[str, Any]) -> str:
    """The one error in the status of the shadow is this; its message."""
    (error,) = status["errors"]
    assert (error["pointer"], error["code"]) == (pointer, code), error
    return str(error["message"])


# ---- the network


@contextlib.contextmanager
def nobody_listens() -> Iterator[str]:
    """The URL of a proxy that refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def through(proxy_url: str) -> dict[str, Any]:
    return {"cloud": {"proxy_url": proxy_url}}


async def is_taken_back_without_the_cloud(s: Scene, proxy_url: str, interfere: Callable[[Scene], Any] | None) -> str:
    """A proxy that does not lead to the cloud is taken back while nothing else leads there either; why, in words."""
    reverted = len(s.agent.logged("configuration reverted"))
    version = s.cloud.config.want({"agent": through(proxy_url)})
    await s.cloud.peer.until(lambda: not s.cloud.peer.connections, LIMIT_S)
    await s.relay.unplug()
    if interfere:
        await interfere(s)
    line = await s.agent.logs("configuration reverted", reverted + 1)
    assert s.cloud.config.status.get("desired_version", 0) < version or s.cloud.config.status["state"] == "trial"
    await s.relay.plug()
    status = await s.told("reverted", version)
    assert s.cloud.config.cloud.reported["agent"]["cloud"]["proxy_url"] == ""
    assert status["errors"] == line["errors"]
    code = line["errors"][0]["code"]
    return at("/agent/cloud/proxy_url" if code == "unreachable" else "", code, status)


async def wrong_proxies_one_after_the_other(folder: Path) -> None:
    async with HttpProxy(("camera", "secret")) as asking, HttpProxy() as falling, scene(folder, config=QUICK) as s:
        await s.agent.start()
        await s.agent.online()
        falling.behaviour = "silent"
        with nobody_listens() as refused:
            for url in (refused, asking.url(), falling.url()):
                words = await is_taken_back_without_the_cloud(s, url, None)
                assert words == f"the cloud was not reached over the new settings within {REACH_S} s"
        assert asking.asked
        assert falling.asked
        stated = await s.config()
        assert (stated["state"], stated["desired"]["agent"]) == ("reverted", through(falling.url()))
        said = await s.agent.ctl("config", "show")
        assert "the cloud was not reached" in said.out.replace("\n#", ""), said.out
        s.calm()


async def frozen(s: Scene) -> None:
    s.agent.freeze()
    await asyncio.sleep(REACH_S + 1)  # longer than the cloud may take to be reached
    s.agent.thaw()


async def stopped(s: Scene) -> None:
    await s.agent.stop()
    await s.agent.start()


async def killed(s: Scene) -> None:
    await s.agent.kill(group=True)
    await s.agent.start()


async def killed_twice(s: Scene) -> None:
    lives = len(s.agent.logged("a configuration trial was interrupted"))
    await killed(s)
    await s.agent.logs("a configuration trial was interrupted", lives + 1)
    await killed(s)


async def interrupted_on_a_wrong_proxy(folder: Path, config: Mapping[str, Any], *ways: Callable[[Scene], Any]) -> None:
    async with HttpProxy() as proxy, scene(folder, config=config) as s:
        proxy.behaviour = "swallow"
        await s.agent.start()
        await s.agent.online()
        for number, way in enumerate(ways):
            proxy.behaviour = ("swallow", "silent", "close")[number % 3]
            credentials = f"try-{number}:x"  # another document, or it would not be tried again
            words = await is_taken_back_without_the_cloud(s, proxy.url(credentials), way)
            once = "not reached over the new settings within"
            assert ("for the second time" if way is killed_twice else once) in words, (way, words)
        s.calm()


async def good_proxy(folder: Path) -> None:
    async with HttpProxy() as proxy, scene(folder, config=PATIENT) as s:
        proxy.target = ("127.0.0.1", s.relay.port)
        await s.agent.start()
        await s.agent.online()
        direct = len(s.relay.crossings)

        async def connected(times: int) -> None:
            """MQTT has connected so often, and what came to the cloud after the first time came through the proxy."""
            await s.cloud.peer.until(lambda: len(s.cloud.peer.of(CONNECT)) == times, LIMIT_S)
            assert len(s.relay.crossings) == direct + len(proxy.asked)  # awscrt opens a tunnel on trial before each one

        await s.wants("applied", agent=through(proxy.url()))
        await connected(2)
        await killed(s)
        await connected(3)
        await s.agent.online()
        stated = (await s.status())["cloud"]
        assert str(proxy.port) in stated["via"], stated
        tunnels = len(proxy.asked)
        s.cloud.config.delete()
        await s.agent.logs("configuration applied", 2)
        assert len(s.cloud.peer.of(CONNECT)) == 4
        assert len(proxy.asked) == tunnels  # nobody wants the proxy any more
        assert len(s.relay.crossings) == direct + tunnels + 1


# ---- images

PICTURES = """
import json, os, sys, time
folder = sys.argv[1]
parent = os.getppid()
def place(path, content):
    with open(path + ".part", "wb") as file:
        file.write(content)
    os.replace(path + ".part", path)
config = json.load(open(folder + "/config.json"))
place(folder + "/running", json.dumps({"pid": os.getpid(), **config}).encode())
number = 0
while os.getppid() == parent:
    if config.get("images", True):
        with open(folder + "/pictures/%s-%d.jpg" % (config.get("picture", "bright"), number % 8), "rb") as file:
            content = file.read()
        place(folder + "/images/%d.jpg" % (number % 30), content)
    number += 1
    time.sleep(config["interval_s"])
"""
AGAIN = """#!/bin/sh
pid() { sed 's/.*"pid": \\([0-9]*\\).*/\\1/' running; }
cd "$1"
old=$(pid)
kill "$old"
while [ "$(pid)" = "$old" ]; do sleep 0.02; done
"""
SCHEMA = {
    "type": "object",
    "properties": {
        "interval_s": {"type": "number", "minimum": 0.05},
        "picture": {"enum": ["bright", "dark"]},
        "images": {"type": "boolean"},
        "note": {"type": "string"},
    },
    "required": ["interval_s"],
    "additionalProperties": False,
}
USUAL = {"interval_s": 0.2, "picture": "bright"}
GOOD = {"interval_s": 0.15, "picture": "bright", "note": "better"}
AT_THE_IMAGES = "/targets/pipeline"


def draw(folder: Path) -> None:
    """Eight bright pictures and eight dark ones."""
    folder.mkdir(parents=True)
    noise = random.Random(1)
    for number in range(8):
        coarse = bytes(noise.randrange(40, 220) for _ in range(80 * 60))
        scenery = Image.frombytes("L", (80, 60), coarse).resize((320, 240), Image.Resampling.NEAREST)
        for name, share in (("bright", 1.0), ("dark", 0.04)):
            scenery.point([round(share * level) for level in range(256)]).save(
                folder / f"{name}-{number}.jpg", quality=80
            )


class Pipeline:
    """A capture pipeline that is started again whenever it ends; the file decides what its images are like."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        draw(folder / "pictures")
        (folder / "images").mkdir()
        (folder / "program").write_text(PICTURES)
        (folder / "again").write_text(AGAIN)
        (folder / "schema.json").write_text(json.dumps(SCHEMA))
        self.file = folder / "config.json"
        self.file.write_text(json.dumps(USUAL))
        self.target = {
            "path": str(self.file),
            "schema_file": str(folder / "schema.json"),
            "apply": ["sh", str(folder / "again"), str(folder)],
        }
        self.tables = {
            "config": {**QUICK, "targets": {"pipeline": self.target}},
            "capture": {"sources": {"front": {"directory": str(folder / "images"), "interval_s": 0.2}}},
        }

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        command = 'while :; do "$0" -IS "$1" "$2"; done'
        process = await asyncio.create_subprocess_exec(
            *(*tied, "sh", "-c", command, sys.executable, str(self.folder / "program"), str(self.folder)),
            start_new_session=True,
            stderr=asyncio.subprocess.DEVNULL,  # it says so when one was killed
        )
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()

    def runs(self) -> dict[str, Any]:
        """What it was started with."""
        return {key: value for key, value in json.loads((self.folder / "running").read_text()).items() if key != "pid"}

    async def flows(self) -> None:
        """New images come."""
        begun = time.time()
        images = self.folder / "images"
        await seen(lambda: sum(f.stat().st_mtime > begun for f in images.glob("*.jpg")) >= 3, "new images")


@contextlib.asynccontextmanager
async def with_images(folder: Path) -> AsyncIterator[tuple[Scene, Pipeline]]:
    """A camera whose images flow."""
    pipeline = await asyncio.to_thread(Pipeline, folder / "p")
    async with pipeline.running(), scene(folder / "a", **pipeline.tables) as s:
        await pipeline.flows()
        await s.agent.start()
        await s.agent.online()
        yield s, pipeline


async def images_stop(folder: Path) -> None:
    async with with_images(folder) as (s, pipeline):
        status = await s.wants("reverted", targets={"pipeline": {**USUAL, "images": False}})
        assert "front: no image since the change" in at(AT_THE_IMAGES, "trial_failed", status), status
        assert pipeline.runs() == json.loads(pipeline.file.read_text()) == USUAL
        assert s.cloud.config.cloud.delta["targets"]["pipeline"] == {**USUAL, "images": False}
        await pipeline.flows()


async def images_are_dark(folder: Path) -> None:
    """A good configuration stays, a bad one is taken back and what was good comes again; without any the site's own does."""
    async with with_images(folder) as (s, pipeline):
        await s.wants("applied", targets={"pipeline": GOOD})
        assert pipeline.runs() == GOOD
        status = await s.wants("reverted", targets={"pipeline": {**GOOD, "picture": "dark"}})
        assert "front: dark in" in at(AT_THE_IMAGES, "trial_failed", status), status
        assert pipeline.runs() == json.loads(pipeline.file.read_text()) == GOOD
        assert s.cloud.config.cloud.reported["targets"] == {"pipeline": GOOD}
        assert s.cloud.config.cloud.delta["targets"]["pipeline"] == {"picture": "dark"}
        await pipeline.flows()
        s.cloud.config.delete()
        await s.agent.logs("configuration applied", 2)
        assert pipeline.runs() == json.loads(pipeline.file.read_text()) == USUAL


def configure(s: Scene, job_id: str, **document: Any) -> None:
    s.cloud.jobs.create(job_id, {"version": "1.0", "operation": "configure", **document})


async def ends(s: Scene, job_id: str, status: str, code: str = "") -> str:
    """Wait for the one end of the job, which nothing else was ever told of; its message."""
    try:
        end = await s.cloud.jobs.ended(job_id, LIMIT_S)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{s.tail()}") from None
    assert (end.status, code or end.details["reason_code"]) == (status, end.details["reason_code"]), end.details
    assert {e.status for e, _ in s.cloud.jobs.attempts if e.job_id == job_id} == {status}
    assert len(s.cloud.jobs.terminal_updates(job_id)) == 1
    return str(end.details["message"])


async def by_jobs(folder: Path) -> None:
    async with with_images(folder) as (s, pipeline):
        configure(s, "good", targets={"pipeline": GOOD})
        await ends(s, "good", "SUCCEEDED")
        assert pipeline.runs() == GOOD
        configure(s, "wrong", targets={"pipeline": {"picture": "blue"}})
        words = await ends(s, "wrong", "REJECTED", "schema_violation")
        assert "/targets/pipeline/picture" in words, words
        trials = len(s.agent.logged("configuration on trial"))
        configure(s, "dark", targets={"pipeline": {"picture": "dark"}})
        await s.agent.logs("configuration on trial", trials + 1)
        await seen(lambda: pipeline.runs().get("picture") == "dark", "dark pictures", s)
        await s.agent.kill(group=True)
        await s.agent.start()
        words = await ends(s, "dark", "FAILED", "trial_failed")
        assert "/targets/pipeline: front: dark in" in words, words
        assert pipeline.runs() == json.loads(pipeline.file.read_text()) == GOOD


# ---- killed while a job configures

PLACE = """#!/bin/sh
cd "$1"
echo "$(cat config.json)" >> begun
sleep 0.1
if grep -q unfit config.json; then echo "it does not start" >&2; exit 3; fi
cp config.json running.part && mv running.part running
"""
CHECK = """#!/bin/sh
if grep -q wrong "$1"; then echo "that is wrong" >&2; exit 1; fi
"""


class Program:
    """A program without images that takes its file by a command; one with `unfit` makes it fail, one with `wrong` is refused."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        for name, script in (("place", PLACE), ("check", CHECK)):
            (folder / name).write_text(script)
        self.file, self.running = folder / "config.json", folder / "running"
        for path in (self.file, self.running):
            path.write_text('{"n": 0}')
        self.target = {
            "path": str(self.file),
            "check": ["sh", str(folder / "check"), "{path}"],
            "apply": ["sh", str(folder / "place"), str(folder)],
        }

    def has(self) -> Any:
        """What its file holds, which is always whole."""
        return json.loads(self.file.read_text())

    def begun(self) -> int:
        """How often it was told to take its file."""
        path = self.folder / "begun"
        return len(path.read_text().splitlines()) if path.exists() else 0


MOMENTS: Mapping[str, Callable[[Scene, Program, int, str], Any]] = {
    "created": lambda s, p, begun, job: True,
    "announced": lambda s, p, begun, job: s.cloud.jobs.status(job) != "QUEUED",
    "written": lambda s, p, begun, job: job in p.file.read_text(),
    "applied": lambda s, p, begun, job: p.begun() > begun,
    "running": lambda s, p, begun, job: job in p.running.read_text(),
    "ended": lambda s, p, begun, job: (
        s.agent.lines()[-1].get("event") in ("configuration applied", "configuration reverted")
    ),
    "told": lambda s, p, begun, job: s.cloud.jobs.execution(job).over.is_set(),
}
"""What is seen before a kill."""
KINDS: Mapping[str, tuple[dict[str, Any], str]] = {
    "good": ({}, "SUCCEEDED"),
    "unfit": ({"unfit": True}, "FAILED"),
    "wrong": ({"wrong": True}, "REJECTED"),
}


async def killed_while_configured(folder: Path, plan: Sequence[tuple[str, str]], counts: Counter[str]) -> None:
    program = await asyncio.to_thread(Program, folder / "p")
    async with scene(folder / "a", config={**QUICK, "targets": {"program": program.target}}) as s:
        await s.agent.start()
        await s.agent.online()
        for number, (kind, moment) in enumerate(plan):
            before, begun, job = (
                await asyncio.to_thread(program.has),
                await asyncio.to_thread(program.begun),
                f"{kind}-{number}",
            )
            more, expected = KINDS[kind]
            wanted = {"n": number, "job": job, **more}
            configure(s, job, targets={"program": wanted}, replace=True)
            over = s.cloud.jobs.execution(job).over

            def reached(moment=moment, begun=begun, job=job, over=over) -> bool:
                return over.is_set() or MOMENTS[moment](s, program, begun, job)

            await seen(reached, f"{job} {moment}", s)
            await asyncio.sleep(random.choice((0, 0.01, 0.05, 0.4)))
            await s.agent.kill()
            counts[moment] += 1
            now = await asyncio.to_thread(program.has)
            assert now in (before, wanted), now
            await s.agent.start()
            await ends(s, job, expected)
            has, runs = await asyncio.to_thread(lambda: (program.has(), json.loads(program.running.read_text())))
            assert has == runs == (wanted if expected == "SUCCEEDED" else before), (job, moment, has, runs)
        await s.agent.online()


async def killed_twice_while_configured(folder: Path) -> None:
    """The second kill in a trial takes it back, and the job says so."""
    program = await asyncio.to_thread(Program, folder / "p")
    async with scene(folder / "a", config={"trial_s": 30, "targets": {"program": program.target}}) as s:
        await s.agent.start()
        configure(s, "good", targets={"program": {"n": 1}})
        for _ in range(2):
            begun = program.begun()
            await seen(
                lambda begun=begun: program.begun() > begun and program.running.read_text() != '{"n": 0}', "trial", s
            )
            await s.agent.kill()
            await s.agent.start()
        words = await ends(s, "good", "FAILED", "trial_interrupted")
        assert "for the second time" in words, words
        assert program.has() == json.loads(program.running.read_text()) == {"n": 0}


async def test_what_breaks_the_network_or_the_images_is_taken_back_and_a_killed_job_tells_the_truth(tmp_path, request):
    counts: Counter[str] = Counter()
    plan = [("good", moment) for moment in MOMENTS]
    plan += [("unfit", "applied"), ("unfit", "ended"), ("wrong", "announced")]
    if request.config.getoption("--exhaustive", default=False):
        plan = [(kind, moment) for kind in KINDS for moment in MOMENTS] * 10
    await together(
        images_stop(tmp_path / "a"),
        images_are_dark(tmp_path / "b"),
        by_jobs(tmp_path / "c"),
        wrong_proxies_one_after_the_other(tmp_path / "d"),
        interrupted_on_a_wrong_proxy(tmp_path / "e", QUICK, frozen, killed, stopped),
        interrupted_on_a_wrong_proxy(tmp_path / "f", PATIENT, killed_twice),
        good_proxy(tmp_path / "g"),
        killed_while_configured(tmp_path / "h", plan[::2], counts),
        killed_while_configured(tmp_path / "i", plan[1::2], counts),
        killed_twice_while_configured(tmp_path / "j"),
    )
    print(
        "7 proxies that lead nowhere tried: refused, asks for a password, silent; frozen, stopped, killed, killed twice"
    )
    print("3 configurations that spoil the images tried: none, dark, dark and killed")
    print(
        f"{counts.total() + 2} kills while a job configures tried: {', '.join(f'{n} {m}' for m, n in counts.items())}"
    )


# ---- a program that asks the local API

ASKING = """
import http.client, json, os, socket, sys, time
folder, path = sys.argv[1:]
def note(name, words):
    with open(folder + "/" + name, "a") as file:
        file.write(json.dumps(words) + "\\n")
def ask(method, where, body=None):
    agent = http.client.HTTPConnection("agent")
    agent.sock = socket.socket(socket.AF_UNIX)
    agent.sock.settimeout(90)
    agent.sock.connect(path)
    agent.request(method, "/v1/config/targets/pipeline" + where, body)
    return agent.getresponse()
def use(document):
    if document and "refuse" in document:
        return document["refuse"]
    while document and "slow" in document and not os.path.exists(folder + "/go"):
        time.sleep(0.02)
    note("runs", document)
    return ""
digest, trouble = None, ""
while True:
    try:
        for offer in map(json.loads, ask("GET", "/follow")):
            if offer.get("digest", digest) != digest:
                note("offers", offer)
                digest, trouble = offer["digest"], use(offer["document"])
            if offer.get("confirmed") is False:
                answer = {"digest": digest, "accepted": not trouble, "message": trouble}
                ask("POST", "/confirm", json.dumps(answer)).read()
    except (OSError, ValueError, http.client.HTTPException):
        pass
    time.sleep(0.1)
"""


class Asking:
    """A program that has no file and asks the agent; what has `slow` it takes only once there is a file `go`."""

    def __init__(self, folder: Path, path: Path) -> None:
        self.folder, self._path = folder, path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "program").write_text(ASKING)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        program = (sys.executable, "-I", str(self.folder / "program"), str(self.folder), str(self._path))
        process = await asyncio.create_subprocess_exec(*tied, *program)
        try:
            yield
        finally:
            process.kill()
            await process.wait()

    def noted(self, name: str) -> list[Any]:
        path = self.folder / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def asked_over_the_local_api(folder: Path) -> None:
    config = {"trial_s": 3, "targets": {"pipeline": {"apply": "api"}}}
    async with scene(folder / "a", config=config) as s:
        program = Asking(folder / "p", s.agent.socket)

        async def offered() -> dict[str, Any]:
            said = await s.agent.ctl("config", "target", "pipeline", "--json")
            assert said.code == 0, said
            return dict(said.json())

        await s.agent.start()
        await s.agent.online()
        async with program.running():
            await seen(lambda: program.noted("runs") == [None], "its own configuration", s)
            await s.wants("applied", targets={"pipeline": {"fps": 5}})
            assert program.noted("runs")[-1] == {"fps": 5}
            status = await s.wants("reverted", targets={"pipeline": {"fps": 50, "refuse": "no such lens"}})
            assert at(AT_THE_IMAGES, "refused_by_program", status) == "the program refuses it: no such lens"
            assert program.noted("runs")[-1] == {"fps": 5}
            shown = await offered()
            assert (shown["document"], shown["confirmed"], shown["state"]) == ({"fps": 5}, True, "applied"), shown

            slow = {"fps": 7, "slow": True}
            version = s.cloud.config.want({"targets": {"pipeline": slow}})
            await seen(lambda: program.noted("offers")[-1]["document"] == slow, "the offer", s)
            await s.agent.kill()
            (program.folder / "go").touch()
            await s.agent.start()
            await s.told("applied", version)
            assert program.noted("runs")[-1] == slow
        version = s.cloud.config.want({"targets": {"pipeline": {"fps": 8}}})
        for state in ("trial", "applied"):
            while (await s.agent.ctl("config", "target", "--json")).json()["targets"]["pipeline"]["state"] != state:
                await asyncio.sleep(0.2)
        (program.folder / "go").touch()
        async with program.running():  # or it would be told that the old one is not confirmed either
            words = at(AT_THE_IMAGES, "not_confirmed", await s.told("reverted", version))
            assert "nobody asked the local API" in words, words
            assert program.noted("runs")[-1] == slow


# ---- agent.toml spoilt


async def spoilt_settings(folder: Path) -> None:
    def knows_its_folder(agent: Any) -> None:
        agent.more_environment = {"STATE_DIRECTORY": str(agent.state_dir)}  # systemd says it

    async with scene(folder, wrap=knows_its_folder, telemetry={"interval_s": 1}) as s:
        good = await asyncio.to_thread(s.agent.config_file.read_text)
        half = good[: good.index("private_key_file") + 25]
        wrong = good.replace("[telemetry]\ninterval_s", "[telemetry]\nintervall_s")
        assert wrong != good
        await asyncio.to_thread(s.agent.config_file.write_text, half)
        await s.agent.start()
        assert await s.agent.wait() == 2  # there is no copy yet
        assert "not valid TOML" in s.tail()
        await asyncio.to_thread(s.agent.config_file.write_text, good)
        await s.agent.start()
        await s.agent.online()
        await seen(lambda: (s.agent.state_dir / "agent.toml.good").exists(), "the copy", s)
        for number, (text, words) in enumerate(((half, "not valid TOML"), (wrong, "telemetry.intervall_s")), start=1):
            await asyncio.to_thread(s.agent.config_file.write_text, text)
            await s.agent.kill()
            await s.agent.start()
            line = await s.agent.logs("agent.toml can't be used, running with the copy that worked", number)
            assert words in line["reason"], line
            await s.agent.online()
            (condition,) = [
                c for c in (await s.status())["health"]["conditions"] if c["condition"] == "settings.invalid"
            ]
            assert words in condition["message"], condition
            assert (await s.agent.ctl("status", "--check")).code == 10
        assert (s.agent.state_dir / "agent.toml.good").read_text() == good
        await s.wants("applied", agent={"labels": {"lane": "1"}})  # it can still be configured
        await asyncio.to_thread(s.agent.config_file.write_text, good)
        await s.agent.kill()
        await s.agent.start()
        await s.agent.online()
        assert "settings.invalid" not in [c["condition"] for c in (await s.status())["health"]["conditions"]]


# ---- the shadow deleted, labels


def labels(message: Mapping[str, Any]) -> Any:
    return message["labels"]


async def deleted_and_made_again(folder: Path) -> None:
    async with scene(folder, labels={"site": "north", "lane": "1"}) as s:
        config = s.cloud.config
        reports = s.cloud.reports

        async def labelled(wanted: Mapping[str, str]) -> None:
            """Reports say so, and the event of a job's end."""
            begun = len(reports)
            await s.cloud.peer.until(lambda: any(labels(r) == wanted for r in reports[begun:]), LIMIT_S)
            job = s.offer()
            await s.cloud.jobs.ended(job, LIMIT_S)
            await s.cloud.peer.until(
                lambda: any(e.get("job", {}).get("job_id") == job for e in s.cloud.events), LIMIT_S
            )
            (event,) = [e for e in s.cloud.events if e.get("job", {}).get("job_id") == job]
            assert labels(event) == wanted, event

        await s.agent.start()
        await s.agent.online()
        await labelled({"site": "north", "lane": "1"})
        await s.wants("applied", agent={"labels": {"lane": "2"}})
        await labelled({"site": "north", "lane": "2"})
        config.delete()
        await labelled({"site": "north", "lane": "1"})
        config.delete(forget_version=True)  # and made again, with versions that begin anew
        await s.wants("applied", agent={"labels": {"lane": "3"}})
        await labelled({"site": "north", "lane": "3"})

        await s.relay.unplug()
        await s.shows("tcp", "lost", "closed")
        config.delete()
        await s.relay.plug()
        await labelled({"site": "north", "lane": "1"})
        await s.wants("applied", agent={"labels": {"lane": "4"}})
        await s.relay.unplug()
        await s.said("tcp", "lost", "closed", count=2)
        config.delete(forget_version=True)
        version = config.want({"agent": {"labels": {"lane": "5"}}})
        await killed(s)
        await s.relay.plug()
        await s.told("applied", version)
        await labelled({"site": "north", "lane": "5"})
        await s.all_end()


# ---- windows; an update and a configuration at the same time


class ConfiguredUnit(AgentUnit):
    """With a program to configure, on a camera whose clock is synchronised."""

    packaged_as = "believes the clock"

    def __init__(self, folder: Path, cloud_port: int, thing: str, **overrides: Mapping[str, Any]) -> None:
        self.program = Program(folder / "program")
        config = {"trial_s": 1, "targets": {"program": self.program.target}}
        super().__init__(folder, cloud_port, thing, config=config, **overrides)


class ConfiguredAgent(AgentProcess):
    """With a program to configure."""

    def __init__(self, folder: Path, cloud_port: int, thing: str, **overrides: Mapping[str, Any]) -> None:
        self.program = Program(folder / "program")
        config = {"trial_s": 3, "targets": {"program": self.program.target}}
        super().__init__(folder, cloud_port, thing, config=config, **overrides)


async def held_by_a_window(folder: Path) -> None:
    updated = Updated(folder / "p")
    opens = (datetime.now(UTC) + timedelta(hours=3)).replace(minute=30, second=0, microsecond=0)
    closed = [f"{opens:%H:%M}-{opens + timedelta(minutes=10):%H:%M}"]
    async with camera(folder / "c", ConfiguredUnit, targets={"pipeline": updated.target}) as c:
        s = Scene(c.cloud, c.relay, c.agent)
        program: Program = c.agent.program
        await s.wants("applied", agent={"maintenance": {"windows": closed}})
        configure(s, "job-1", targets={"program": {"n": 1}})
        words = f"the configuration window opens {opens:%a %H:%M} UTC, in "
        await s.cloud.peer.until(lambda: words in s.cloud.jobs.details("job-1").get("message", ""), LIMIT_S)
        assert words in (await s.config())["waits_for"]
        assert (program.has(), program.begun()) == ({"n": 0}, 0)
        await s.wants("applied", agent={"maintenance": {"windows": ["00:00-24:00"]}})
        await ends(s, "job-1", "SUCCEEDED")
        assert program.has() == json.loads(program.running.read_text()) == {"n": 1}

        await s.wants("applied", agent={"maintenance": {"windows": closed}})
        c.offered.append("job-1")
        job = c.offer("1.0", updated.version("1.0"), "pipeline")
        await c.waits("pipeline", "the update window opens")
        assert updated.runs() == ""
        await s.wants("applied", agent={"maintenance": {"windows": []}})
        await c.ends(job, "SUCCEEDED", "updated")
        assert updated.is_whole("1.0")


class Overlap:
    """Looks into state.db all the time for an update and a configuration that are under way at once."""

    SWITCHED = frozenset({"ARMED", "RESTARTING", "TRIAL", "COMMITTING", "ROLLING_BACK"})
    QUERY = """SELECT EXISTS (SELECT 1 FROM facts WHERE key = 'config.trial'),
        (SELECT group_concat(json_extract(record, '$.progress.state')) FROM jobs WHERE json_extract(record, '$.phase') != 'closed')"""

    def __init__(self, database: Path) -> None:
        self._database = database
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.looks = Counter[tuple[bool, str]]()
        """How often each pair was seen: whether a configuration is on trial, and the state of the update."""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        with contextlib.closing(sqlite3.connect(self._database, isolation_level=None, timeout=10)) as database:
            while not self._done.wait(0.005):
                trial, states = database.execute(self.QUERY).fetchone()
                self.looks[(bool(trial), states or "")] += 1

    def never_both(self) -> None:
        both = {
            pair: times for pair, times in self.looks.items() if pair[0] and self.SWITCHED & set(pair[1].split(","))
        }
        assert not both, self.looks
        assert any(pair[0] for pair in self.looks), self.looks
        assert any(self.SWITCHED & set(pair[1].split(",")) for pair in self.looks), self.looks


async def update_first(folder: Path, *, kill: bool) -> None:
    """What is wanted while an update is switched to waits for its end; also for the next life's, which goes on with it."""
    updated = Updated(folder / "p")
    async with camera(folder / "c", ConfiguredAgent, targets={"pipeline": updated.target}) as c:
        s, program = Scene(c.cloud, c.relay, c.agent), c.agent.program
        with Overlap(c.agent.state_dir / "state.db") as overlap:
            updated.hold.touch()
            gate = {"stable_for_s": 4 if kill else 1, "deadline_s": 60}
            job = c.offer("1.0", updated.version("1.0"), "pipeline", gate=gate)
            await c.reaches(job, "RESTARTING")
            gets = c.cloud.config.gets
            version = c.cloud.config.want({"targets": {"program": {"n": 1}}})
            await c.cloud.peer.until(lambda: c.cloud.config.gets > gets, LIMIT_S)
            await asyncio.sleep(1)
            assert (program.has(), program.begun()) == ({"n": 0}, 0)
            updated.hold.unlink()
            if kill:
                await c.reaches(job, "TRIAL")
                await c.agent.kill(group=True)
                assert c.record(job)["progress"]["state"] == "TRIAL"
                await c.agent.start()
            await c.ends(job, "SUCCEEDED", "updated")
            await s.told("applied", version)
        overlap.never_both()
        assert updated.is_whole("1.0")
        assert program.has() == {"n": 1}


async def configuration_first(folder: Path, *, kill: bool) -> None:
    """An update that comes while a configuration is on trial waits and says so; after a kill, too."""
    updated = Updated(folder / "p")
    async with camera(folder / "c", ConfiguredAgent, targets={"pipeline": updated.target}) as c:
        s, program = Scene(c.cloud, c.relay, c.agent), c.agent.program
        with Overlap(c.agent.state_dir / "state.db") as overlap:
            version = c.cloud.config.want({"targets": {"program": {"n": 1}}})
            await c.agent.logs("configuration on trial")
            job = c.offer("1.0", updated.version("1.0"), "pipeline")
            if kill:
                await c.reaches(job, "WAITING")
                await c.agent.kill(group=True)
                await c.agent.start()
            else:
                await c.waits("pipeline", "waits until another change has ended")
            await c.ends(job, "SUCCEEDED", "updated")
            await s.told("applied", version)
        overlap.never_both()
        assert updated.is_whole("1.0")
        assert program.has() == {"n": 1}


async def test_programs_that_ask_spoilt_settings_deleted_shadows_windows_and_updates_at_the_same_time(tmp_path):
    await together(
        asked_over_the_local_api(tmp_path / "a"),
        spoilt_settings(tmp_path / "b"),
        deleted_and_made_again(tmp_path / "c"),
        held_by_a_window(tmp_path / "d"),
        update_first(tmp_path / "e", kill=False),
        update_first(tmp_path / "f", kill=True),
        configuration_first(tmp_path / "g", kill=False),
        configuration_first(tmp_path / "h", kill=True),
    )
    print("2 ways to spoil agent.toml tried, with and without a copy")
    print("4 ways to delete the shadow tried, connected and not")
    print("4 meetings of an update and a configuration tried, 2 of them with a kill")
