"""The local API over its real Unix socket, spoken to by aiohttp's client, raw bytes, and processes of other users."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
import pytest
import structlog.testing

from agent.api import server as server_module
from agent.api.openmetrics import CONTENT_TYPE
from agent.api.routes import ROUTES
from agent.api.server import BODY_LIMIT, Server
from agent.api.sockets import Peer
from agent.errors import AgentError, RefusedError
from agent.settings import Settings
from agent.views import Parts, View
from tests.integration.fake_daemon import EXPLAINED, FakeAgent, healthy_state

NOBODY = 65534
ROOT = Path(__file__).parents[2]
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can act as another user")


@dataclass
class Running:
    agent: FakeAgent
    server: Server
    path: Path
    http: aiohttp.ClientSession

    async def get(self, target: str) -> tuple[int, dict]:
        async with self.http.get(f"http://agent{target}") as reply:
            return reply.status, await reply.json()

    async def post(self, target: str, data: object = None) -> tuple[int, dict]:
        async with self.http.post(f"http://agent{target}", data=data) as reply:
            return reply.status, await reply.json()


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the socket is; not in pytest's own folders, because other users can't get into those."""
    with tempfile.TemporaryDirectory(prefix="camera-agent-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[tuple[FakeAgent, Server]]:
    agent = FakeAgent(healthy_state(time.time()))
    server = Server(agent, path)
    await server.open()
    task = asyncio.create_task(server.run())
    try:
        yield agent, server
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def api(folder: Path) -> AsyncIterator[Running]:
    path = folder / "api.sock"
    async with (
        serving(path) as (agent, server),
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(path=str(path))) as http,
    ):
        yield Running(agent, server, path, http)


async def raw(path: Path, data: bytes) -> bytes:
    """What the server answers to these bytes until it closes."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(data)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


async def until(condition) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


STREAMS_AND_TEXT = ("/metrics", "/v1/capture/stream", "/v1/config/targets/{name}/follow")
PLAIN = [route.path for route in ROUTES if route.method == "GET" and route.path not in STREAMS_AND_TEXT]


@pytest.mark.parametrize("path", PLAIN)
async def test_every_reply_is_json_with_its_schema(api: Running, path: str):
    path = (
        path.replace("{id}", "update-17")
        .replace("{name}", "pipeline")
        .replace("explain", "explain?key=telemetry.interval_s")
    )
    status, document = await api.get(path)
    assert status == 200
    assert document["schema"] == 1
    assert len(document) > 1


async def test_status_is_the_agents(api: Running):
    _, document = await api.get("/v1/status")
    del api.agent.state["status"]["jobs"]["last"]["document"], document["jobs"]["last"]["document"]  # has secrets
    assert document == {"schema": 1, **json.loads(json.dumps(await api.agent.status()))}


async def test_jobs_are_limited(api: Running):
    api.agent.state["jobs"] *= 30
    assert len((await api.get("/v1/jobs"))[1]["jobs"]) == 20
    assert len((await api.get("/v1/jobs?limit=3"))[1]["jobs"]) == 3


@pytest.mark.parametrize("limit", ["0", "-1", "x", "201", "٣", "9" * 5000, ""])
async def test_a_bad_limit_is_the_clients_fault(api: Running, limit: str):
    status, document = await api.get(f"/v1/jobs?limit={limit}")
    assert status == 400
    assert document["error"]["code"] == "bad_request"


@pytest.mark.parametrize(
    ("target", "status", "code"),
    [
        ("/", 404, "no_such_path"),
        ("/v1/nothing", 404, "no_such_path"),
        ("/v1/jobs/", 404, "no_such_path"),
        ("/v1/jobs/unknown", 404, "no_such_job"),
        ("/v1/config/explain", 400, "bad_request"),
        ("/v1/config/explain?key=x", 404, "unknown_key"),
        ("/v1/jobs/update-17/cancel", 405, "bad_method"),
        ("/v1/jobs/off-line", 503, "timed_out"),
        ("/v1/jobs/broken", 500, "internal"),
    ],
)
async def test_errors_say_what_and_are_json(api: Running, target: str, status: int, code: str):
    answered, document = await api.get(target)
    assert (answered, document["schema"], document["error"]["code"]) == (status, 1, code)
    assert set(document["error"]) == {"code", "message", "hint"}
    assert document["error"]["message"]


async def test_an_exceptions_text_stays_in_the_log(api: Running):
    with structlog.testing.capture_logs() as logged:
        _, document = await api.get("/v1/jobs/broken")
    assert "nobody's business" not in json.dumps(document)
    assert [type(entry["exc_info"]) for entry in logged if entry["event"] == "request failed"] == [ZeroDivisionError]


async def test_a_wrong_method_names_the_right_one(api: Running):
    async with api.http.post("http://agent/v1/status") as reply:
        assert reply.status == 405
        assert reply.headers["Allow"] == "GET"


async def test_head_has_no_body(api: Running):
    async with api.http.head("http://agent/v1/status") as reply:
        assert reply.status == 200
        assert await reply.read() == b""


async def test_secrets_and_impossible_numbers_do_not_leave(api: Running):
    api.agent.state["status"]["cloud"]["latency_s"] = math.nan
    status, document = await api.get("/v1/status")
    assert (status, document["cloud"]["latency_s"]) == (200, None)
    for target in ("/v1/config", "/v1/jobs/update-17", "/v1/jobs"):
        assert "secret" not in json.dumps((await api.get(target))[1])


async def test_values_of_secrets_do_not_leave_in_any_form(api: Running):
    config = api.agent.state["config"]
    config["shadow"]["desired"]["targets"]["pipeline"] |= {"wifi": {"psk": "hunter2"}, "tokens": ["hunter2"]}
    secret = {"value": "hunter2", "origin": "shadow version 12", "since": 1.0, "remote": True}
    config["effective"] |= {"targets.pipeline.wifi.psk": secret, "targets.pipeline.credentials.0": secret}
    EXPLAINED["targets.pipeline.wifi.psk"] = {
        **EXPLAINED["telemetry.interval_s"],
        "value": "hunter2",
        "overrides": [{"origin": "default", "value": "hunter2"}],
        "default": 12345678,
    }
    try:
        replies = [(await api.get(f"/v1/config{more}"))[1] for more in ("", "/explain?key=targets.pipeline.wifi.psk")]
    finally:
        del EXPLAINED["targets.pipeline.wifi.psk"]
    assert "hunter2" not in json.dumps(replies)
    assert replies[0]["effective"]["targets.pipeline.wifi.psk"] == {**secret, "value": "[redacted]"}
    assert (replies[1]["overrides"], replies[1]["default"], replies[1]["unit"]) == (
        [{"origin": "default", "value": "[redacted]"}],
        "[redacted]",
        "s",
    )


@pytest.mark.parametrize("path", PLAIN)
async def test_of_ordinary_replies_nothing_is_redacted_but_urls(api: Running, path: str):
    path = path.replace("{id}", "update-17").replace("{name}", "pipeline")
    answer = json.dumps((await api.get(path.replace("explain", "explain?key=cloud.endpoint")))[1])
    for url in ("https://bucket.s3.amazonaws.com/a?[redacted]", "http://[redacted]@proxy", "rtsp://[redacted]@10."):
        answer = answer.replace(url, "")
    assert "[redacted]" not in answer


async def test_the_words_about_a_setting_come_whole(api: Running):
    words = "HTTP proxy, `http://[user:password@]host:port`. Empty: none."
    EXPLAINED["cloud.proxy_url"] = {**EXPLAINED["cloud.endpoint"], "description": words}
    try:
        assert (await api.get("/v1/config/explain?key=cloud.proxy_url"))[1]["description"] == words
    finally:
        del EXPLAINED["cloud.proxy_url"]


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_large_body_is_refused(api: Running, chunked: bool):
    async def pieces():
        for _ in range(3):
            yield b"x" * (BODY_LIMIT // 2)

    status, document = await api.post("/v1/jobs/update-17/cancel", pieces() if chunked else b"x" * (BODY_LIMIT + 1))
    assert (status, document["error"]["code"]) == (413, "body_too_large")
    assert (await api.get("/v1/status"))[0] == 200


async def test_a_body_that_never_comes_does_not_wait_for_ever(api: Running, monkeypatch):
    monkeypatch.setattr(server_module, "BODY_TIMEOUT_S", 0.05)
    reader, writer = await asyncio.open_unix_connection(str(api.path))
    writer.write(b"POST /v1/jobs/update-17/cancel HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n")
    answer = await reader.readuntil(b"}}")
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_too_slow" in answer
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"GET /v1/status HTTP/9.9\r\n\r\n",
        b"GET /" + b"x" * 20000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/jobs/update-17/cancel HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    ],
)
async def test_what_is_not_http_is_answered_in_json(api: Running, data: bytes):
    head, _, body = (await raw(api.path, data)).partition(b"\r\n\r\n")
    assert head.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert json.loads(body)["error"]["code"] == "bad_request"
    assert (await api.get("/v1/status"))[0] == 200


async def test_a_broken_chunk_is_the_clients_fault(api: Running):
    request = b"POST /v1/jobs/update-17/cancel HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    assert b" 400 " in (await raw(api.path, request)).splitlines()[0]


async def test_metrics_are_openmetrics(api: Running):
    async with api.http.get("http://agent/metrics") as reply:
        assert reply.headers["Content-Type"] == CONTENT_TYPE
        assert (await reply.text()).endswith("# EOF\n")


async def test_the_stream_is_a_line_an_object_and_ends_with_its_client(api: Running):
    async with api.http.get("http://agent/v1/capture/stream") as reply:
        assert reply.headers["Content-Type"] == "application/x-ndjson"
        for _ in range(3):
            line = json.loads(await reply.content.readline())
            assert (line["schema"], line["sources"].keys()) == (1, {"front"})
        assert api.agent.streams_open == 1
    await until(lambda: api.agent.streams_open == 0)


async def test_the_end_of_the_server_ends_streams_and_removes_the_socket(tmp_path: Path):
    path = tmp_path / "api.sock"
    async with serving(path) as (agent, _):
        reader, writer = await asyncio.open_unix_connection(str(path))
        writer.write(b"GET /v1/capture/stream HTTP/1.1\r\nHost: x\r\n\r\n")
        await reader.readuntil(b"front")
    assert agent.streams_open == 0
    assert not path.exists()
    await reader.read()
    writer.close()


async def test_cancelling_names_who(api: Running):
    api.agent.state["jobs"] = [{"job_id": "long", "status": None, "phase": "running"}]
    status, document = await api.post("/v1/jobs/long/cancel")
    assert (status, document["job"]["job_id"]) == (200, "long")
    import pwd

    assert api.agent.cancelled == [("long", f"local:{pwd.getpwuid(os.getuid()).pw_name}")]


async def test_what_can_not_be_cancelled_is_a_conflict(api: Running):
    status, document = await api.post("/v1/jobs/update-17/cancel")
    assert (status, document["error"]["code"]) == (409, "job_ended")
    assert (await api.post("/v1/jobs/unknown/cancel"))[0] == 404


REBOOT = '{"version": "1.0", "operation": "reboot"}'


async def test_a_document_is_judged_and_nothing_is_said_of_it_in_the_log(api: Running):
    secret = '{"version": "1.0", "operation": "restart", "target": "very-secret"}'
    with structlog.testing.capture_logs() as logged:
        status, document = await api.post("/v1/jobs/plan", REBOOT)
        refused = await api.post("/v1/jobs/plan", '{"version": "2.0", "operation": "reboot"}')
        await api.post("/v1/jobs/plan", secret)
    assert status == 200
    assert document["schema"] == 1
    assert (document["plan"]["accepted"], document["plan"]["operation"], document["plan"]["code"]) == (
        True,
        "reboot",
        "ok",
    )
    assert len(document["plan"]["steps"]) == 2
    assert refused[0] == 200
    assert (refused[1]["plan"]["accepted"], refused[1]["plan"]["code"]) == (False, "unknown_version")
    assert refused[1]["plan"]["hint"]
    assert len(api.agent.planned) == 3
    assert "secret" not in json.dumps([entry for entry in logged if entry["log_level"] != "debug"])


@pytest.mark.parametrize("body", ["[1]", '"x"', "7", "null"])
async def test_a_document_that_is_no_object_is_refused_by_the_camera(api: Running, body: str):
    status, document = await api.post("/v1/jobs/plan", body)
    assert (status, document["plan"]["accepted"], document["plan"]["code"]) == (200, False, "bad_document")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"{", "line 1 column 2"),
        (b'{"a": NaN}', "NaN is no number in JSON"),
        (b'{"a": -Infinity}', "-Infinity is no number in JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b"[" * 60_000, "nested too deep"),
        (b"\xff\xfe\xfd", "codec"),
    ],
)
async def test_a_body_that_is_no_json_is_the_clients_fault(api: Running, body: bytes, said: str):
    status, document = await api.post("/v1/jobs/plan", body)
    assert (status, document["error"]["code"]) == (400, "bad_request")
    assert said in document["error"]["message"]
    assert len(document["error"]["message"]) < 300
    assert api.agent.planned == []


async def test_before_the_camera_has_its_identity_nothing_is_judged():
    class Engine:
        async def plan(self, document):
            return {"accepted": True, "operation": document["operation"]}

    parts = Parts(Settings(), Path("/etc/camera-agent/agent.toml"), "0.2.0", time.time())
    with pytest.raises(RefusedError) as caught:
        await View(parts).plan_job({"operation": "reboot"})
    assert (caught.value.code, caught.value.hint) == ("not_ready", "agentctl doctor")
    assert (await View(replace(parts, engine=Engine())).plan_job({"operation": "reboot"}))["operation"] == "reboot"


async def test_a_document_beyond_all_measure_is_not_read(api: Running):
    status, document = await api.post("/v1/jobs/plan", b" " * (BODY_LIMIT + 1))
    assert (status, document["error"]["code"]) == (413, "body_too_large")
    document = (await api.post("/v1/jobs/plan", '{"a": "%s"}' % ("x" * (BODY_LIMIT - 9))))[1]
    assert (document["plan"]["accepted"], document["plan"]["code"]) == (False, "bad_document")
    assert "larger than" in document["plan"]["message"]


ASK_AS = """
import socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
s.sendall(f"{sys.argv[2]} {sys.argv[3]} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n".encode())
print(s.makefile().read())
"""


async def ask_as(path: Path, groups: list[int], method: str, target: str) -> str:
    """The answer that a process of another user gets."""
    path.chmod(0o666)
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    done = await asyncio.to_thread(
        subprocess.run,
        [python, "-I", "-c", ASK_AS, str(path), method, target],
        user=NOBODY,
        group=NOBODY,
        extra_groups=groups,
        capture_output=True,
        text=True,
        cwd="/",
        check=True,
    )
    return done.stdout.splitlines()[0]


@needs_root
async def test_others_may_look_and_not_change(api: Running):
    api.agent.state["jobs"] = [{"job_id": "long", "status": None, "phase": "running"}]
    assert " 200 " in await ask_as(api.path, [], "GET", "/v1/status")
    assert " 400 " in await ask_as(api.path, [], "POST", "/v1/jobs/plan")  # may ask, and sends nothing
    assert " 403 " in await ask_as(api.path, [], "POST", "/v1/jobs/long/cancel")
    assert api.agent.cancelled == []


@needs_root
async def test_members_of_the_admins_group_may_change(api: Running):
    api.agent.state["jobs"] = [{"job_id": "long", "status": None, "phase": "running"}]
    assert api.server._listener
    api.server._listener = replace(api.server._listener, admins=54321)
    assert " 403 " in await ask_as(api.path, [54320], "POST", "/v1/jobs/long/cancel")
    assert " 200 " in await ask_as(api.path, [54320, 54321], "POST", "/v1/jobs/long/cancel")
    assert [job for job, _ in api.agent.cancelled] == ["long"]


async def test_only_owner_and_group_may_connect(api: Running):
    assert stat.S_IMODE(api.path.stat().st_mode) == 0o660


async def test_a_killed_daemons_socket_is_replaced(tmp_path: Path):
    path = tmp_path / "api.sock"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    async with serving(path):
        assert (await raw(path, b"GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")).startswith(
            b"HTTP/1.1 200"
        )


async def test_a_live_daemons_socket_is_left_alone(api: Running):
    with pytest.raises(AgentError, match="another camera-agent") as caught:
        await Server(api.agent, api.path).open()
    assert caught.value.code == "already_running"
    assert (await api.get("/v1/status"))[0] == 200


async def test_another_file_is_left_alone(tmp_path: Path):
    (tmp_path / "api.sock").write_text("notes")
    with pytest.raises(AgentError, match="not a socket"):
        await Server(FakeAgent({}), tmp_path / "api.sock").open()
    assert (tmp_path / "api.sock").read_text() == "notes"


async def test_a_path_that_is_too_long_is_explained(tmp_path: Path):
    with pytest.raises(AgentError, match="too long"):
        await Server(FakeAgent({}), tmp_path / ("x" * 120) / "api.sock").open()


async def test_a_flood_of_clients_is_answered_busy(api: Running, monkeypatch):
    monkeypatch.setattr(server_module, "CONNECTION_LIMIT", 4)
    request = b"GET /v1/capture/stream HTTP/1.1\r\nHost: x\r\n\r\n"
    held = []
    for _ in range(2):
        reader, writer = await asyncio.open_unix_connection(str(api.path))
        writer.write(request)
        await reader.readuntil(b"front")
        held.append(writer)
    answer = await raw(api.path, b"")
    assert answer.startswith(b"HTTP/1.1 503")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "busy"
    for writer in held:
        writer.close()
        await writer.wait_closed()
    await until(lambda: api.agent.streams_open == 0)
    assert (await api.get("/v1/status"))[0] == 200


def test_aiohttp_waits_for_the_first_client(tmp_path: Path):
    script = """
import asyncio, sys
from pathlib import Path
from agent.api.server import Server
from tests.integration.fake_daemon import EXPLAINED, FakeAgent, healthy_state

async def main():
    path = Path(sys.argv[1])
    server = Server(FakeAgent(healthy_state(0.0)), path)
    await server.open()
    task = asyncio.create_task(server.run())
    await asyncio.sleep(0)
    print("aiohttp" in sys.modules)
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(b"GET /v1/status HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
    print((await reader.read())[9:12].decode())
    print("aiohttp" in sys.modules)
    writer.close()
    task.cancel()
    await asyncio.wait([task])

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "api.sock")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "200", "True"]


# ---- odd texts, greedy and slow clients, a lost socket ----------------------------------------------------------------


@pytest.mark.parametrize("text", ["bad\udcff\udcfe.jpg", "\ud800", "\udfff\ud800 \U0001f600"])
async def test_any_text_can_be_told(api: Running, text: str):
    api.agent.state["status"]["capture"]["front"]["last_image"] = text
    api.agent.state["capture"]["sources"][text] = {"last_image": text}
    api.agent.state["jobs"][0]["document"] = {text: [text]}
    assert (await api.get("/v1/status"))[1]["capture"]["front"]["last_image"] == text
    assert (await api.get("/v1/capture"))[1]["sources"][text] == {"last_image": text}
    assert (await api.get("/v1/jobs/update-17"))[1]["job"]["document"] == {text: [text]}
    async with api.http.get("http://agent/v1/capture/stream") as reply:
        assert json.loads(await reply.content.readline())["sources"][text] == {"last_image": text}


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "rot13"])
async def test_an_encoded_body_is_refused(api: Running, encoding: str):
    request = f"POST /v1/jobs/update-17/cancel HTTP/1.1\r\nHost: x\r\nContent-Encoding: {encoding}\r\n"
    with structlog.testing.capture_logs() as logged:
        head, _, body = (
            await raw(api.path, f"{request}Content-Length: 3\r\nConnection: close\r\n\r\nabc".encode())
        ).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 415")
    assert json.loads(body)["error"]["code"] == "bad_encoding"
    assert logged == []


async def test_one_user_gets_half_of_the_places_and_readers_leave_some_to_admins(api: Running):
    places = server_module.CONNECTION_LIMIT

    def taken_by(uid: int) -> int:
        count = 0
        while api.server._has_place(Peer(1, uid, frozenset())):
            api.server._users[asyncio.Protocol()] = Peer(1, uid, frozenset())
            count += 1
        return count

    assert [taken_by(uid) for uid in (1001, 1002, 1003)] == [places // 2, places // 4, 0]
    assert taken_by(0) == places // 4
    api.server._users.clear()


HOLD = """
import socket, sys
held = []
for _ in range(int(sys.argv[2])):
    s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.send(b"GET /v1/status HTTP/1.1\\r\\nX: ")
    held.append(s)
print("held", flush=True)
sys.stdin.read()
"""


@needs_root
async def test_a_user_with_many_connections_does_not_shut_out_the_others(api: Running):
    api.path.chmod(0o666)
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    holder = await asyncio.create_subprocess_exec(
        *(python, "-I", "-c", HOLD, str(api.path), str(server_module.CONNECTION_LIMIT + 1)),
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        cwd="/",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert holder.stdout
    assert holder.stdin
    assert await holder.stdout.readline() == b"held\n"
    await until(lambda: len(api.server._users) == server_module.CONNECTION_LIMIT // 2)
    assert (await api.get("/v1/status"))[0] == 200
    holder.stdin.close()
    await holder.wait()
    await until(lambda: len(api.server._users) <= 1)


@pytest.mark.parametrize("before", [b"", b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["first", "next"])
async def test_a_head_that_does_not_come_ends_the_connection(api: Running, monkeypatch, before: bytes):
    monkeypatch.setattr(server_module, "HEAD_TIMEOUT_S", 0.3)
    reader, writer = await asyncio.open_unix_connection(str(api.path))
    writer.write(before)
    if before:
        await reader.readuntil(b"\r\n\r\n")

    async def trickle() -> None:
        while True:
            writer.write(b"G")
            await writer.drain()
            await asyncio.sleep(0.05)

    trickling = asyncio.create_task(trickle())
    async with asyncio.timeout(10):
        with contextlib.suppress(ConnectionError):
            while await reader.read(65536):
                pass
    trickling.cancel()
    await asyncio.wait({trickling})
    assert trickling.cancelled() or isinstance(trickling.exception(), ConnectionError)
    writer.close()
    await until(lambda: not api.server._users)


@pytest.mark.parametrize("target", ["/v1/status", "/v1/capture/stream"])
async def test_a_client_that_never_reads_loses_its_place(api: Running, monkeypatch, target: str):
    monkeypatch.setattr(server_module, "SEND_TIMEOUT_S", 0.1)
    api.agent.state["status"]["large"] = api.agent.state["capture"]["large"] = ["some words"] * 200_000
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        client.connect(str(api.path))
        client.send(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        await until(lambda: api.server._users)
        await until(lambda: not api.server._users)
    assert api.agent.streams_open == 0


async def test_a_socket_that_is_deleted_is_made_anew(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(server_module, "CHECK_EVERY_S", 0.01)
    path = tmp_path / "run" / "api.sock"
    request = b"GET /v1/status HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    async with serving(path) as (_, server):
        for lose in (path.unlink, lambda: shutil.rmtree(path.parent)):
            lost = server._listener
            lose()
            await until(lambda lost=lost: server._listener is not lost)
            assert stat.S_IMODE(path.stat().st_mode) == 0o660
            assert b" 200 " in (await raw(path, request)).splitlines()[0]
    assert not path.exists()


async def test_what_has_taken_the_sockets_place_is_left_alone(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(server_module, "CHECK_EVERY_S", 0.01)
    path = tmp_path / "api.sock"
    with structlog.testing.capture_logs() as logged:
        async with serving(path) as (_, server):
            first = server._listener
            path.unlink()
            path.write_text("notes")
            await until(lambda: logged)
            await asyncio.sleep(0.05)
            assert (path.read_text(), server._listener) == ("notes", first)
            assert [entry["code"] for entry in logged] == ["api_socket_failed"], "said once"
            path.unlink()
            await until(lambda: server._listener is not first)
