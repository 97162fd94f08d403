"""What programs should run with, over the real API: following, confirming, who may, hostile clients, and the examples of the docs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from agent.api import server as server_module
from agent.api.server import BODY_LIMIT, Server
from agent.config.deliveries import MAX_WORDS, Deliveries
from agent.config.desired import digest
from agent.errors import RefusedError
from agent.settings import Settings
from agent.views import Parts, View

NOBODY = 65534
ME = pwd.getpwuid(os.getuid()).pw_name
DOCS = Path(__file__).parents[2] / "docs" / "pipeline-configuration.md"
SOCKET = "/run/camera-agent/api.sock"
A, B = {"fps": 5, "exposure": "auto"}, {"fps": 7}
FOLLOW, CONFIRM = "/v1/config/targets/pipeline/follow", "/v1/config/targets/pipeline/confirm"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only root can act as another user")


@dataclass
class Camera:
    deliveries: Deliveries
    path: Path
    http: aiohttp.ClientSession
    server: Server = field(repr=False)

    async def ask(self, method: str, target: str, body: object = None) -> tuple[int, dict[str, Any]]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.request(method, f"http://agent{target}", data=data) as reply:
            return reply.status, await reply.json()

    async def confirm(self, **body: object) -> tuple[int, dict[str, Any]]:
        return await self.ask("POST", CONFIRM, body)

    @contextlib.asynccontextmanager
    async def follower(self) -> AsyncIterator[aiohttp.StreamReader]:
        async with self.http.get(f"http://agent{FOLLOW}", timeout=aiohttp.ClientTimeout(total=60)) as reply:
            assert (reply.status, reply.content_type) == (200, "application/x-ndjson")
            yield reply.content


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the socket is; not in pytest's own folders, because other users can't get into those."""
    with tempfile.TemporaryDirectory(prefix="camera-agent-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextlib.asynccontextmanager
async def running(
    folder: Path, heartbeat_s: float = 30.0, users: tuple[str, ...] = ("nobody",)
) -> AsyncIterator[Camera]:
    """An agent with two targets, of which the users may confirm one."""
    deliveries = Deliveries(["pipeline", "lights"], heartbeat_s=heartbeat_s)
    parts = Parts(Settings(), Path("/nonexistent"), "0.1.0", time.time(), deliveries=deliveries)
    server = Server(View(parts), folder / "api.sock", (), {"pipeline": users, "lights": []})
    await server.open()
    task = asyncio.create_task(server.run())
    try:
        connector = aiohttp.UnixConnector(path=str(folder / "api.sock"), limit=200)
        async with aiohttp.ClientSession(connector=connector) as http:
            yield Camera(deliveries, folder / "api.sock", http, server)
    finally:
        task.cancel()
        await asyncio.wait({task})


@pytest.fixture
async def camera(folder: Path) -> AsyncIterator[Camera]:
    async with running(folder) as found:
        found.deliveries.offer("pipeline", A, "applied")
        found.deliveries.offer("lights", None, "applied")
        yield found


async def next_of(stream: aiohttp.StreamReader) -> dict[str, Any]:
    line = await stream.readline()
    assert line.endswith(b"\n"), line
    return dict(json.loads(line))


async def until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


# ---- asking -----------------------------------------------------------------------------------------------------------


async def test_what_is_offered_is_told(camera: Camera):
    status, answer = await camera.ask("GET", "/v1/config/targets")
    about = {"state": "applied", "confirmed": False, "refused": None}
    assert (status, answer["targets"]) == (
        200,
        {"pipeline": {"digest": digest(A), **about}, "lights": {"digest": "", **about}},
    )
    status, answer = await camera.ask("GET", "/v1/config/targets/pipeline")
    assert (status, answer) == (200, {"schema": 1, "target": "pipeline", "document": A, "digest": digest(A), **about})
    assert (await camera.ask("GET", "/v1/config/targets/lights"))[1]["document"] is None


@pytest.mark.parametrize("target", ["", "/follow"])
async def test_an_unknown_target_is_answered_with_those_there_are(camera: Camera, target: str):
    status, answer = await camera.ask("GET", f"/v1/config/targets/pipelin%65s{target}")
    assert (status, answer["error"]["code"]) == (404, "unknown_target")
    assert "pipeline, lights" in answer["error"]["hint"]


async def test_before_the_first_offer_nobody_is_told_to_use_its_own(folder: Path):
    """Or each restart of the agent would make the pipeline go back to its own configuration for a moment."""
    async with running(folder, heartbeat_s=0.02) as camera:
        assert (await camera.ask("GET", "/v1/config/targets/pipeline"))[1]["error"]["code"] == "not_ready"
        assert (await camera.confirm(digest="", accepted=True))[1]["error"]["code"] == "not_ready"
        assert (await camera.ask("GET", "/v1/config/targets"))[1]["targets"]["pipeline"]["state"] == "unknown"
        async with camera.follower() as stream:
            assert await next_of(stream) == {"schema": 1, "heartbeat": True}
            camera.deliveries.offer("pipeline", A, "trial")
            while "heartbeat" in (offer := await next_of(stream)):
                pass
            assert (offer["document"], offer["state"]) == (A, "trial")


async def test_without_a_configuration_it_is_not_ready(folder: Path):
    parts = Parts(Settings(), Path("/nonexistent"), "0.1.0", time.time())
    for ask in (View(parts).config_targets, lambda: View(parts).follow_config_target("pipeline")):
        with pytest.raises(RefusedError) as caught:
            ask()
        assert caught.value.code == "not_ready"


async def test_what_is_offered_is_not_changed_behind_its_back(camera: Camera):
    document: dict[str, Any] = {"a": {"b": 1}}
    camera.deliveries.offer("pipeline", document, "trial")
    document["a"]["b"] = 2
    assert (await camera.ask("GET", "/v1/config/targets/pipeline"))[1]["document"] == {"a": {"b": 1}}


# ---- following --------------------------------------------------------------------------------------------------------


async def test_two_followers_are_told_of_each_change(camera: Camera):
    async with camera.follower() as one, camera.follower() as two:
        for stream in (one, two):
            assert (await next_of(stream))["document"] == A
        for document, state in ((B, "trial"), (B, "applied"), (None, "applied"), (A, "trial")):
            camera.deliveries.offer("pipeline", document, state)
            camera.deliveries.offer("pipeline", document, state)
            camera.deliveries.offer("lights", {"not": "theirs"}, state)
            for stream in (one, two):
                offer = await next_of(stream)
                assert (offer["target"], offer["document"], offer["state"]) == ("pipeline", document, state)


async def test_what_is_offered_again_is_told_once(folder: Path):
    async with running(folder, heartbeat_s=0.05) as camera:
        camera.deliveries.offer("pipeline", A, "applied")
        async with camera.follower() as stream:
            assert (await next_of(stream))["document"] == A
            camera.deliveries.offer("pipeline", dict(reversed(A.items())), "applied")
            assert "heartbeat" in await next_of(stream)


async def test_of_a_burst_the_newest_counts(camera: Camera):
    async with camera.follower() as stream:
        await next_of(stream)
        for number in range(100):
            camera.deliveries.offer("pipeline", {"number": number}, "trial")
        assert (await next_of(stream))["document"] == {"number": 99}
        seen = []
        for number in range(100, 200):
            camera.deliveries.offer("pipeline", {"number": number}, "trial")
            await asyncio.sleep(0)
        while not seen or seen[-1] != 199:
            seen.append((await next_of(stream))["document"]["number"])
        assert seen == sorted(set(seen))
    print("200 changes in bursts tried")


async def test_a_change_that_is_taken_back_unseen_asks_for_a_confirmation_again(camera: Camera):
    async with camera.follower() as stream:
        await next_of(stream)
        await camera.confirm(digest=digest(A), accepted=True)
        camera.deliveries.offer("pipeline", B, "trial")
        camera.deliveries.offer("pipeline", A, "applied")
        offer = await next_of(stream)
        assert (offer["document"], offer["confirmed"]) == (A, False)


async def test_heartbeats_come_also_while_the_program_talks(folder: Path):
    async with running(folder, heartbeat_s=0.2) as camera:
        camera.deliveries.offer("pipeline", A, "applied")
        async with camera.follower() as stream:
            await next_of(stream)

            async def talk() -> None:
                for number in itertools.count():
                    camera.deliveries.confirm("pipeline", digest(A), accepted=False, message=str(number))
                    await asyncio.sleep(0.01)

            talking = asyncio.create_task(talk())
            for _ in range(3):
                assert await next_of(stream) == {"schema": 1, "heartbeat": True}
            talking.cancel()
            await asyncio.wait({talking})


async def test_a_follower_that_never_reads_is_dropped_and_costs_little(camera: Camera, monkeypatch):
    monkeypatch.setattr(server_module, "SEND_TIMEOUT_S", 1.0)
    most, number = 0, 0
    async with camera.follower() as stream:
        await next_of(stream)
        reader = next(iter(camera.server._users))
        with socket.socket(socket.AF_UNIX) as deaf:
            deaf.setblocking(False)
            deaf.connect(str(camera.path))
            deaf.send(f"GET {FOLLOW} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            await until(lambda: len(camera.server._users) == 2)
            tracemalloc.start()
            try:
                before = tracemalloc.get_traced_memory()[0]
                async with asyncio.timeout(60):
                    while len(camera.server._users) == 2:
                        number += 1
                        camera.deliveries.offer("pipeline", {"number": number, "large": "x" * 8000}, "trial")
                        assert (await next_of(stream))["document"]["number"] == number
                        others = [c for c in camera.server._users if c is not reader]
                        most = max([most, *(c.transport.get_write_buffer_size() for c in others if c.transport)])
                grown = tracemalloc.get_traced_memory()[0] - before
            finally:
                tracemalloc.stop()
        assert list(camera.server._users) == [reader]
        assert number > 20, "it was given a chance"
        assert most < 256 * 1024
        assert grown < 2**20
    print(f"{number} changes before a deaf follower was dropped tried, {most} bytes waited for it at most")


async def test_a_follower_that_goes_away_leaves_nothing(camera: Camera):
    tasks = len(asyncio.all_tasks())
    for _ in range(20):
        async with camera.follower() as stream:
            await next_of(stream)
    await until(lambda: not camera.server._users and len(asyncio.all_tasks()) <= tasks)
    camera.deliveries.offer("pipeline", B, "trial")
    assert (await camera.ask("GET", "/v1/config/targets/pipeline"))[1]["document"] == B


async def test_the_end_of_the_agent_ends_streams_in_good_order(folder: Path):
    async with contextlib.AsyncExitStack() as stack:
        camera = await stack.enter_async_context(running(folder))
        camera.deliveries.offer("pipeline", A, "applied")
        connector = aiohttp.UnixConnector(path=str(camera.path))
        async with aiohttp.ClientSession(connector=connector) as http, http.get(f"http://agent{FOLLOW}") as reply:
            assert (await next_of(reply.content))["document"] == A
            await stack.aclose()
            assert await reply.content.read() == b"", "and not cut off"


# ---- confirming -------------------------------------------------------------------------------------------------------


async def test_a_confirmation_is_shown_and_may_be_said_again(camera: Camera):
    for _ in range(2):
        status, answer = await camera.confirm(digest=digest(A), accepted=True, message="at 5 fps")
        assert (status, answer["target"], answer["confirmed"], answer["refused"]) == (200, "pipeline", True, None)
    status, answer = await camera.confirm(
        digest=digest(A), accepted=False, message="no\n such\x1b[31m sensor" + "x" * 900
    )
    assert (status, answer["confirmed"], answer["refused"][:22]) == (200, False, "no such?[31m sensorxxx")
    assert len(answer["refused"]) == MAX_WORDS
    assert (await camera.confirm(digest=digest(A), accepted=False))[1]["refused"] == ""
    assert (await camera.ask("POST", "/v1/config/targets/lights/confirm", {"digest": "", "accepted": True}))[0] == 200


async def test_another_digest_is_outdated(camera: Camera):
    camera.deliveries.offer("pipeline", B, "trial")
    for wrong in (digest(A), "", digest(B).upper(), digest(B)[:12], "x" * 10_000, "\ud800"):
        status, answer = await camera.confirm(digest=wrong, accepted=True)
        assert (status, answer["error"]["code"]) == (409, "outdated")
        assert "ask again" in answer["error"]["hint"]
    assert camera.deliveries.listing()["pipeline"]["confirmed"] is False


BAD_BODIES = [
    (b"", "it is empty"),
    (b"{", "line 1"),
    (b"[]", "not a JSON object"),
    (b"{}", "digest is missing"),
    (b'{"digest": "x"}', "accepted is missing"),
    (b'{"accepted": true}', "digest is missing"),
    (b'{"digest": 5, "accepted": true}', "digest must be a text"),
    (b'{"digest": null, "accepted": true}', "digest must be a text"),
    (b'{"digest": "x", "accepted": 1}', "accepted must be true or false"),
    (b'{"digest": "x", "accepted": "true"}', "accepted must be true or false"),
    (b'{"digest": "x", "accepted": true, "message": false}', "message must be a text"),
    (b'{"digest": "x", "accepted": true, "messages": ""}', "there is no key 'messages'"),
    (b'{"digest": NaN, "accepted": true}', "NaN is no number"),
    (b"[" * 60_000, "nested too deep"),
    (b"\xff\xfe\xfd", "codec"),
]


@pytest.mark.parametrize(("body", "said"), BAD_BODIES, ids=[said for _, said in BAD_BODIES])
async def test_a_bad_body_is_explained(camera: Camera, body: bytes, said: str):
    status, answer = await camera.ask("POST", CONFIRM, body)
    assert (status, answer["error"]["code"]) == (400, "bad_request")
    assert said in answer["error"]["message"]
    assert len(answer["error"]["message"]) < 300
    assert '"accepted"' in answer["error"]["hint"]


async def test_a_large_body_is_read_up_to_the_limit_alone(camera: Camera):
    status, answer = await camera.ask("POST", CONFIRM, b" " * (BODY_LIMIT + 1))
    assert (status, answer["error"]["code"]) == (413, "body_too_large")
    long = "é" * (BODY_LIMIT // 6 - 100)
    status, answer = await camera.confirm(digest=digest(A), accepted=False, message=long)
    assert (status, answer["refused"]) == (200, "é" * (MAX_WORDS - 1) + "…")


def test_every_sequence_of_offers_and_words():
    """Against the rule itself: a word counts while the document it was said of is offered without a break."""
    offers = [(A, "trial"), (A, "applied"), (B, "trial"), (None, "applied")]
    said = [(A, True), (A, False), (B, True), (None, True)]
    steps: list[Any] = [("offer", *o) for o in offers] + [("say", *s) for s in said]
    tried = 0
    for sequence in itertools.product(steps, repeat=4):
        deliveries, now, word = Deliveries(["p"]), ("nothing", None), None
        for act, document, value in sequence:
            if act == "offer":
                word = word if document == now[0] else None
                now = (document, value)
                deliveries.offer("p", document, value)
                continue
            name = "" if document is None else digest(document)
            try:
                deliveries.confirm("p", name, accepted=value, message="")
            except RefusedError as error:
                assert error.code == ("not_ready" if now[0] == "nothing" else "outdated")
                assert document != now[0]
            else:
                assert document == now[0]
                word = value
        tried += 1
        status = deliveries.listing()["p"]
        assert (status["confirmed"], status["refused"] is not None) == (word is True, word is False)
        assert status["state"] == (now[1] or "unknown")
    print(f"{tried} sequences of offers and confirmations tried")


# ---- waiting for the confirmation -------------------------------------------------------------------------------------


async def test_waiting_ends_with_the_programs_word(camera: Camera):
    wait = camera.deliveries.confirmed
    waiting = asyncio.create_task(wait("pipeline", 60))
    await asyncio.sleep(0)
    await camera.confirm(digest=digest(A), accepted=True)
    assert await waiting is None
    assert await wait("pipeline", 60) is None, "it was said already"
    camera.deliveries.offer("pipeline", B, "trial")
    waiting = asyncio.create_task(wait("pipeline", 60))
    await camera.confirm(digest=digest(B), accepted=False, message="7 fps is more than the sensor can")
    problem = await waiting
    assert problem
    assert (problem.pointer, problem.code) == ("/targets/pipeline", "refused_by_program")
    assert "7 fps is more than the sensor can" in problem.message
    await camera.confirm(digest=digest(B), accepted=False)
    assert "does not say why" in str(await wait("pipeline", 60))


async def test_waiting_ends_when_nobody_says_anything(camera: Camera):
    problem = await camera.deliveries.confirmed("pipeline", 0.05)
    assert problem
    assert (problem.pointer, problem.code) == ("/targets/pipeline", "not_confirmed")
    assert "is the program running?" in problem.message
    await camera.ask("GET", "/v1/config/targets/pipeline")
    problem = await camera.deliveries.confirmed("pipeline", 0.05)
    assert problem
    assert problem.message == "the program did not confirm it within 0.05 s"


async def test_waiting_ends_when_another_is_offered(camera: Camera):
    waiting = asyncio.create_task(camera.deliveries.confirmed("pipeline", 60))
    await asyncio.sleep(0)
    camera.deliveries.offer("pipeline", A, "trial")
    camera.deliveries.offer("pipeline", A, "applied")
    await asyncio.sleep(0)
    assert not waiting.done(), "only the state changed"
    camera.deliveries.offer("pipeline", B, "trial")
    async with asyncio.timeout(30):
        problem = await waiting
    assert problem
    assert (problem.code, "another configuration" in problem.message) == ("not_confirmed", True)


# ---- who may ----------------------------------------------------------------------------------------------------------

ASK_AS = """
import socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
body = sys.argv[4].encode()
head = f"{sys.argv[2]} {sys.argv[3]} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n"
s.sendall(head.encode() + body)
with s.makefile() as answer:
    while line := answer.readline():
        print(line, end="")
        if "pipeline" in line and "/follow" in sys.argv[3]:
            break
"""


async def ask_as_nobody(path: Path, method: str, target: str, body: object = None) -> tuple[int, dict[str, Any]]:
    """The answer that a process of another user gets; of a stream its first object."""
    path.chmod(0o666)
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    text = "" if body is None else json.dumps(body)
    done = await asyncio.to_thread(
        subprocess.run,
        [python, "-I", "-c", ASK_AS, str(path), method, target, text],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        cwd="/",
        check=True,
        timeout=60,
    )
    lines = done.stdout.splitlines()
    return int(lines[0].split()[1]), json.loads(next(line for line in lines if line.startswith("{")))


SECRET = {"camera": "rtsp://joe:hunter2@10.0.0.7/live", "upload": ["https://bucket/x?X-Amz-Signature=hunter2"]}
NAMED = {"wifi": {"ssid": "north", "psk": "hunter2", "password": "hunter2"}, "api_key": "hunter2", "pass": "hunter2"}
BELOW = {
    "credentials": {"admin": {"of": ["hunter2"]}},
    "cameras": [{"rtspPassword": "hunter2"}],
    "passphrase": "hunter2",
}


@needs_root
async def test_a_named_user_confirms_its_own_target_alone(camera: Camera):
    wanted = {"digest": digest(A), "accepted": True}
    status, answer = await ask_as_nobody(camera.path, "POST", CONFIRM, wanted)
    assert (status, answer["confirmed"]) == (200, True)
    status, answer = await ask_as_nobody(camera.path, "POST", "/v1/config/targets/lights/confirm", wanted)
    assert (status, answer["error"]["code"]) == (403, "forbidden")
    assert "config.targets.lights.users of agent.toml" in answer["error"]["hint"]
    assert (await ask_as_nobody(camera.path, "POST", "/v1/updates/lock", {"seconds": 1}))[0] == 403


@needs_root
async def test_an_outsider_confirms_nothing_and_learns_no_secrets(folder: Path):
    async with running(folder, users=("capture",)) as camera:
        camera.deliveries.offer("pipeline", SECRET, "trial")
        for target in (CONFIRM, "/v1/config/targets/none/confirm", "/v1/config/targets/%7Bname%7D.x%0a/confirm"):
            status, answer = await ask_as_nobody(
                camera.path, "POST", target, {"digest": digest(SECRET), "accepted": True}
            )
            assert (status, answer["error"]["code"]) == (403, "forbidden"), "whether there is such a target or not"
        assert camera.deliveries.listing()["pipeline"]["confirmed"] is False
        for document in (SECRET, NAMED, BELOW, {"password": "hunter2"}):
            camera.deliveries.offer("pipeline", document, "trial")
            for target in ("/v1/config/targets", "/v1/config/targets/pipeline", FOLLOW):
                status, answer = await ask_as_nobody(camera.path, "GET", target)
                assert status == 200
                assert "hunter2" not in json.dumps(answer)
                assert answer.get("redacted", False) is (target != "/v1/config/targets")
                assert answer.get("digest", digest(document)) == digest(document)


@needs_root
async def test_what_is_no_secret_is_told_to_an_outsider(folder: Path):
    document = {"wifi": {"ssid": "north", "psk": "hunter2"}, "private_key_file": "/etc/p.pem", "tokens": 5, "pin": 4}
    async with running(folder, users=("capture",)) as camera:
        camera.deliveries.offer("pipeline", document, "applied")
        answer = (await ask_as_nobody(camera.path, "GET", "/v1/config/targets/pipeline"))[1]
        assert answer["document"] == {**document, "wifi": {"ssid": "north", "psk": "[redacted]"}}


@needs_root
async def test_who_may_confirm_gets_the_document_as_it_is(camera: Camera):
    for document in (NAMED, SECRET):
        camera.deliveries.offer("pipeline", document, "trial")
        for target in ("/v1/config/targets/pipeline", FOLLOW):
            status, answer = await ask_as_nobody(camera.path, "GET", target)
            assert (status, answer["document"], "redacted" in answer) == (200, document, False)
            assert digest(answer["document"]) == answer["digest"]
    camera.deliveries.offer("lights", SECRET, "trial")
    assert (await ask_as_nobody(camera.path, "GET", "/v1/config/targets/lights"))[1]["redacted"] is True
    async with camera.follower() as stream:
        assert (await next_of(stream))["document"] == SECRET


@needs_root
async def test_an_outsider_sees_nothing_redacted_where_nothing_is(folder: Path):
    async with running(folder, users=()) as camera:
        camera.deliveries.offer("pipeline", A, "applied")
        assert "redacted" not in (await ask_as_nobody(camera.path, "GET", "/v1/config/targets/pipeline"))[1]


# ---- the docs' examples -----------------------------------------------------------------------------------------------

PIPELINE = """
import json, pathlib
def use(document):
    with pathlib.Path("used").open("a") as file:
        print(json.dumps(document), file=file)
    return "too fast" if document and document.get("fps", 0) > 30 else ""
"""


def example(language: str, number: int = 0) -> str:
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)[number]


def test_the_docs_settings_are_valid():
    target = Settings.model_validate(tomllib.loads(example("toml"))).config.targets["pipeline"]
    assert (target.apply, target.users) == ("api", ["capture"])


@contextlib.asynccontextmanager
async def pipeline(folder: Path) -> AsyncIterator[Path]:
    """The docs' Python example as a process; the file of what it was given."""
    (folder / "my_pipeline.py").write_text(PIPELINE)
    program = example("python").replace(SOCKET, str(folder / "api.sock")).replace("time.sleep(2)", "time.sleep(0.05)")
    assert program.count("api.sock") == 1
    (folder / "program.py").write_text(program)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "program.py"), cwd=folder, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        yield folder / "used"
        assert process.returncode is None, "it still runs"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def test_the_docs_program_takes_refuses_and_outlives_restarts_of_the_agent(folder: Path):
    async with contextlib.AsyncExitStack() as stack:
        used = await stack.enter_async_context(pipeline(folder))

        def was_used() -> list[Any]:
            return [json.loads(line) for line in used.read_text().splitlines()]

        async with running(folder) as camera:
            camera.deliveries.offer("pipeline", A, "applied")
            assert await camera.deliveries.confirmed("pipeline", 60) is None
            camera.deliveries.offer("pipeline", {"fps": 99}, "trial")
            problem = await camera.deliveries.confirmed("pipeline", 60)
            assert problem
            assert (problem.code, "too fast" in problem.message) == ("refused_by_program", True)
            camera.deliveries.offer("pipeline", A, "applied")
            assert await camera.deliveries.confirmed("pipeline", 60) is None
            assert await asyncio.to_thread(was_used) == [A, {"fps": 99}, A]
        for present, expected in ((A, [A, {"fps": 99}, A]), (None, [A, {"fps": 99}, A, None])):
            async with running(folder) as camera:
                camera.deliveries.offer("pipeline", present, "applied")
                assert await camera.deliveries.confirmed("pipeline", 60) is None, "it came back by itself"
                assert await asyncio.to_thread(was_used) == expected, "what it runs with is not taken anew"


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
async def test_the_docs_curl_commands_work(camera: Camera):
    follow, confirm = example("sh").replace(SOCKET, str(camera.path)).split("\ncurl", 1)
    following = await asyncio.create_subprocess_shell(f"exec {follow}", stdout=asyncio.subprocess.PIPE)
    assert following.stdout
    try:
        for document in (A, B):
            camera.deliveries.offer("pipeline", document, "trial")
            async with asyncio.timeout(60):
                while (offer := json.loads(await following.stdout.readline()))["document"] != document:
                    pass
            command = f"curl {confirm}".replace("DIGEST", offer["digest"])
            done = await asyncio.to_thread(subprocess.run, command, shell=True, capture_output=True, check=True)
            assert json.loads(done.stdout)["confirmed"] is True
            assert await camera.deliveries.confirmed("pipeline", 0) is None
    finally:
        following.terminate()
        await following.communicate()


@pytest.mark.skipif(not shutil.which("jq"), reason="needs jq")
async def test_the_docs_shell_script_takes_and_refuses(folder: Path):
    take = '#!/bin/sh\ncat "$1" >>used; ! grep -q 99 "$1" || { echo "too fast" >&2; exit 1; }\n'
    agentctl = f'#!/bin/sh\nexec {sys.executable} -m agent.ctl "$@"\n'
    for name, text in (("pipeline-take", take), ("agentctl", agentctl)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(DOCS.parents[1]),
        "AGENTCTL_SOCKET": str(folder / "api.sock"),
    }
    async with running(folder, heartbeat_s=0.2) as camera:
        camera.deliveries.offer("pipeline", A, "applied")
        script = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", example("sh", 1)),
            cwd=folder,
            env=environment,
            start_new_session=True,
            stdout=asyncio.subprocess.DEVNULL,
        )
        try:
            assert await camera.deliveries.confirmed("pipeline", 60) is None
            camera.deliveries.offer("pipeline", {"fps": 99}, "trial")
            problem = await camera.deliveries.confirmed("pipeline", 60)
            assert problem
            assert (problem.code, "too fast" in problem.message) == ("refused_by_program", True)
            camera.deliveries.offer("pipeline", None, "applied")
            assert await camera.deliveries.confirmed("pipeline", 60) is None
        finally:
            os.killpg(script.pid, 15)
            await script.wait()
