"""The apply locks, over the real API: who may, for how long, what restarts keep, and hostile requests."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.api.server import Server
from agent.errors import FailedError, RefusedError
from agent.maintenance import Maintenance
from agent.settings import Maintenance as MaintenanceSettings
from agent.settings import Settings
from agent.updates.apply_lock import MAX_HOLDER, MAX_LOCKS, MAX_REASON, ApplyLocks
from agent.updates.holds import Holds
from agent.views import Parts, View

NOBODY = 65534
ME = pwd.getpwuid(os.getuid()).pw_name
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: only root can act as another user")


@dataclass
class Boot:
    """A boot of a camera: its id, the seconds since it began, and what is being switched."""

    id: str = "boot-1"
    now: float = 500.0
    switching: str = ""

    def locks(self, file: Path, max_s: float = 3600) -> ApplyLocks:
        return ApplyLocks(file, max_s, switching=lambda: self.switching, now=lambda: self.now, boot=lambda: self.id)


@dataclass
class Camera:
    boot: Boot
    locks: ApplyLocks
    path: Path
    http: aiohttp.ClientSession
    server: Server
    parts: Parts = field(repr=False)

    async def ask(self, method: str, target: str, body: object = None) -> tuple[int, dict[str, Any]]:
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        async with self.http.request(method, f"http://agent{target}", data=data) as reply:
            return reply.status, await reply.json()

    async def take(self, **wanted: object) -> tuple[int, dict[str, Any]]:
        return await self.ask("POST", "/v1/updates/lock", wanted)

    async def held(self) -> list[dict[str, Any]]:
        status, answer = await self.ask("GET", "/v1/updates/lock")
        assert (status, answer["max_s"]) == (200, 3600)
        return list(answer["locks"])


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where the socket is; not in pytest's own folders, because other users can't get into those."""
    with tempfile.TemporaryDirectory(prefix="camera-agent-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextlib.asynccontextmanager
async def running(folder: Path, lock_users: list[str]) -> AsyncIterator[Camera]:
    boot = Boot()
    locks = boot.locks(folder / "apply-locks.json")
    parts = Parts(Settings(), Path("/nonexistent"), "0.1.0", time.time(), locks=locks)
    server = Server(View(parts), folder / "api.sock", lock_users)
    await server.open()
    task = asyncio.create_task(server.run())
    connector = aiohttp.UnixConnector(path=str(folder / "api.sock"))
    try:
        async with aiohttp.ClientSession(connector=connector) as http:
            yield Camera(boot, locks, folder / "api.sock", http, server, parts)
    finally:
        task.cancel()
        await asyncio.wait({task})


@pytest.fixture
async def camera(folder: Path) -> AsyncIterator[Camera]:
    async with running(folder, ["pipeline", "nobody"]) as found:
        yield found


# ---- taking, renewing, releasing --------------------------------------------------------------------------------------


async def test_a_lock_is_taken_listed_renewed_and_released(camera: Camera):
    told: list[str] = []
    camera.locks.on_change(lambda: told.append("released"))
    status, answer = await camera.take(holder="capture-pipeline", seconds=300, reason="finishing a recording")
    expected = {"holder": "capture-pipeline", "reason": "finishing a recording", "by": f"local:{ME}"}
    assert (status, answer["lock"]) == (200, expected | {"expires_in_s": 300.0})
    camera.boot.now += 200
    assert await camera.held() == [expected | {"expires_in_s": 100.0}]
    assert (await camera.take(holder="capture-pipeline", seconds=300, reason="another"))[0] == 200
    assert [(lock["reason"], lock["expires_in_s"]) for lock in await camera.held()] == [("another", 300.0)]
    assert (await camera.take(holder="capture-pipeline", seconds=5))[0] == 200, "also for a shorter time"
    assert [lock["expires_in_s"] for lock in await camera.held()] == [5.0]
    status, answer = await camera.ask("POST", "/v1/updates/unlock", {"holder": "capture-pipeline"})
    assert (status, answer["locks"]) == (200, [])
    assert told == ["released"]
    assert (await camera.ask("POST", "/v1/updates/unlock", {"holder": "capture-pipeline"}))[0] == 404


async def test_each_holder_has_its_own(camera: Camera):
    await camera.take(holder="one", seconds=100)
    await camera.take(holder="two", seconds=50)
    assert [lock["holder"] for lock in await camera.held()] == ["two", "one"], "the first to end first"
    await camera.ask("POST", "/v1/updates/unlock", {"holder": "two"})
    assert [lock["holder"] for lock in await camera.held()] == ["one"]


async def test_without_a_holder_it_is_the_users_own(camera: Camera):
    assert (await camera.take(seconds=10))[1]["lock"]["holder"] == ME
    assert (await camera.ask("POST", "/v1/updates/unlock"))[1]["locks"] == []


async def test_a_lock_ends_by_itself_to_the_second(camera: Camera):
    await camera.take(holder="pipeline", seconds=300)
    camera.boot.now += 299.999
    assert len(await camera.held()) == 1
    camera.boot.now += 0.001
    assert await camera.held() == []
    assert (await camera.ask("POST", "/v1/updates/unlock", {"holder": "pipeline"}))[0] == 404


async def test_there_are_not_more_than_can_be_shown(camera: Camera):
    for number in range(MAX_LOCKS):
        assert (await camera.take(holder=f"h{number}", seconds=100 + number))[0] == 200
    status, answer = await camera.take(holder="one-more", seconds=10)
    assert (status, answer["error"]["code"]) == (409, "too_many_locks")
    assert (await camera.take(holder="h0", seconds=200))[0] == 200, "renewing one is no new one"
    camera.boot.now += 101.5
    assert (await camera.take(holder="one-more", seconds=10))[0] == 200, "one has ended"


# ---- a switch that is under way ---------------------------------------------------------------------------------------


async def test_a_lock_that_comes_too_late_is_told_so(camera: Camera):
    camera.boot.switching = "pipeline is TRIAL"
    status, answer = await camera.take(holder="capture-pipeline", seconds=300)
    assert (status, answer["error"]["code"]) == (409, "switching")
    assert "pipeline is TRIAL" in answer["error"]["message"]
    assert answer["error"]["hint"]
    assert await camera.held() == []
    camera.boot.switching = ""
    assert (await camera.take(holder="capture-pipeline", seconds=300))[0] == 200


async def test_a_switch_that_begins_while_the_lock_is_written_refuses_it_too(tmp_path: Path):
    """The answer must not be that the lock is held when the switch has begun before it."""
    answers = iter(["", "pipeline is ARMED"])
    locks = ApplyLocks(tmp_path / "locks.json", 3600, switching=lambda: next(answers), boot=lambda: "b")
    told: list[str] = []
    locks.on_change(lambda: told.append("put back"))
    with pytest.raises(RefusedError) as caught:
        await locks.take("pipeline", 300, "", by="local:root")
    assert caught.value.code == "switching"
    assert locks.held() == []
    assert told == ["put back"], "who has seen it meanwhile looks again"
    again = ApplyLocks(tmp_path / "locks.json", 3600, boot=lambda: "b")
    await again.load()
    assert again.held() == []


async def test_a_lock_counts_before_it_is_written(tmp_path: Path):
    """An update that asks while the file is being written must see it."""
    seen = []

    def boot() -> str:  # is asked for while the file is written
        seen.append([lock.holder for lock, _ in locks.held()])
        return "b"

    locks = ApplyLocks(tmp_path / "locks.json", 3600, boot=boot)
    await locks.take("pipeline", 300, "", by="local:root")
    assert seen == [["pipeline"]]


async def test_a_renewal_that_comes_too_late_leaves_the_lock_as_it_was(tmp_path: Path):
    for before, after in (("pipeline is ARMED", ""), ("", "pipeline is ARMED")):  # already, or while it is written
        answers = iter(["", "", before, after])
        locks = ApplyLocks(
            tmp_path / "locks.json", 3600, switching=lambda: next(answers), now=lambda: 0, boot=lambda: "b"
        )
        await locks.take("pipeline", 300, "first", by="local:root")
        with pytest.raises(RefusedError):
            await locks.take("pipeline", 3000, "second", by="local:root")
        assert [(lock.reason, left) for lock, left in locks.held()] == [("first", 300)]
        assert json.loads((tmp_path / "locks.json").read_bytes())["locks"][0]["reason"] == "first"


# ---- restarts, reboots, damage ----------------------------------------------------------------------------------------


async def test_a_restart_of_the_agent_keeps_locks_and_a_reboot_does_not(tmp_path: Path):
    boot, file = Boot(), tmp_path / "locks.json"
    await boot.locks(file).take("pipeline", 300, "recording", by="local:pipeline")
    boot.now += 100
    restarted = boot.locks(file)
    await restarted.load()
    assert restarted.listing() == [
        {"holder": "pipeline", "reason": "recording", "by": "local:pipeline", "expires_in_s": 200.0}
    ]
    await restarted.release("pipeline", by="local:pipeline")
    once_more = boot.locks(file)
    await once_more.load()
    assert once_more.held() == [], "what was released stays so"
    await once_more.take("pipeline", 300, "", by="local:pipeline")
    rebooted = Boot("boot-2", now=20.0).locks(file)
    await rebooted.load()
    assert rebooted.held() == []


async def test_the_most_that_can_be_held_is_kept(tmp_path: Path):
    boot = Boot()
    locks = boot.locks(tmp_path / "locks.json")
    for number in range(MAX_LOCKS):
        holder = f"{number:02}" + "\U0001f4f7" * (MAX_HOLDER - 2)
        await locks.take(holder, 3600, "\U0001f4f7" * MAX_REASON, by="local:" + "x" * 32)
    restarted = boot.locks(tmp_path / "locks.json")
    await restarted.load()
    assert restarted.listing() == locks.listing()
    assert len(restarted.held()) == MAX_LOCKS


GOOD = {"holder": "a", "reason": "", "by": "local:root", "expires": 600.0}
DAMAGED = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"x"',
    b"\xff\xfe",
    b"[" * 100_000,
    json.dumps({"boot_id": "boot-1"}).encode(),
    json.dumps({"boot_id": "boot-1", "locks": 5}).encode(),
    json.dumps({"boot_id": "boot-1", "locks": [5]}).encode(),
    json.dumps({"boot_id": "boot-1", "locks": [{}]}).encode(),
    json.dumps({"boot_id": "boot-1", "locks": [{**GOOD, "expires": "soon"}]}).encode(),
    json.dumps({"boot_id": "boot-1", "locks": [{**GOOD, "expires": None}]}).encode(),
    json.dumps({"boot_id": "boot-1", "locks": [{**GOOD, "expires": float("nan")}]}).encode(),
    json.dumps({"boot_id": "boot-1", "locks": [{**GOOD, "expires": float("inf")}]}).encode(),
    json.dumps({"boot_id": "boot-1", "locks": [GOOD]}).encode()[:-1],
]


async def test_a_damaged_file_is_no_lock_and_no_trouble(tmp_path: Path):
    file = tmp_path / "locks.json"
    for content in DAMAGED:
        file.write_bytes(content)
        locks = Boot().locks(file)
        await locks.load()
        assert locks.held() == [], content
        await locks.take("pipeline", 300, "", by="local:root")
        assert json.loads(file.read_bytes())["locks"][0]["holder"] == "pipeline"
    file.unlink()
    file.mkdir()
    locks = Boot().locks(file)
    await locks.load()
    assert locks.held() == []
    print(f"{len(DAMAGED) + 1} damaged files tried")


async def test_no_kept_lock_lasts_longer_than_one_can_be_taken(tmp_path: Path):
    boot, file = Boot(), tmp_path / "locks.json"
    file.write_text(json.dumps({"boot_id": "boot-1", "locks": [{**GOOD, "expires": 1e300}]}))
    locks = boot.locks(file)
    await locks.load()
    assert [left for _, left in locks.held()] == [3600]


async def test_a_lock_that_a_restart_would_forget_is_not_given(tmp_path: Path):
    boot = Boot()
    locks = boot.locks(tmp_path / "gone" / "locks.json")
    with pytest.raises(FailedError) as caught:
        await locks.take("pipeline", 300, "", by="local:root")
    assert caught.value.code == "apply_lock_failed"
    assert locks.held() == []
    (tmp_path / "gone").mkdir()
    await locks.take("pipeline", 300, "", by="local:root")
    shutil.rmtree(tmp_path / "gone")
    await locks.release("pipeline", by="local:root")
    assert locks.held() == [], "releasing works all the same"


async def test_many_at_once_are_all_kept(tmp_path: Path):
    boot = Boot()
    locks = boot.locks(tmp_path / "locks.json")
    await asyncio.gather(*(locks.take(f"h{number}", 100, "", by="local:root") for number in range(MAX_LOCKS)))
    await asyncio.gather(*(locks.release(f"h{number}", by="local:root") for number in range(0, MAX_LOCKS, 2)))
    restarted = boot.locks(tmp_path / "locks.json")
    await restarted.load()
    assert {lock.holder for lock, _ in restarted.held()} == {f"h{number}" for number in range(1, MAX_LOCKS, 2)}


# ---- who may ----------------------------------------------------------------------------------------------------------

ASK_AS = """
import socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
body = sys.argv[4].encode()
s.sendall(f"{sys.argv[2]} {sys.argv[3]} HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n"
          f"Content-Length: {len(body)}\\r\\n\\r\\n".encode() + body)
print(s.makefile().read())
"""


async def ask_as_nobody(camera: Camera, method: str, target: str, body: object = "") -> tuple[int, dict[str, Any]]:
    """The answer that a process of the user nobody gets."""
    camera.path.chmod(0o666)
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
    text = body if isinstance(body, str) else json.dumps(body)
    done = await asyncio.to_thread(
        subprocess.run,
        [python, "-I", "-c", ASK_AS, str(camera.path), method, target, text],
        user=NOBODY,
        group=NOBODY,
        extra_groups=[],
        capture_output=True,
        text=True,
        cwd="/",
        check=True,
    )
    head, _, answer = done.stdout.partition("\n\n")
    return int(head.split()[1]), json.loads(answer)


@needs_root
async def test_a_named_user_may_lock_and_nothing_else(camera: Camera):
    status, answer = await ask_as_nobody(camera, "POST", "/v1/updates/lock", {"seconds": 60, "holder": "pipeline"})
    assert (status, answer["lock"]["by"]) == (200, "local:nobody")
    for target in ("/v1/updates/pipeline/rollback", "/v1/jobs/x/cancel"):
        status, answer = await ask_as_nobody(camera, "POST", target)
        assert (status, answer["error"]["code"]) == (403, "forbidden")
    status, answer = await ask_as_nobody(camera, "POST", "/v1/updates/unlock", {"holder": "pipeline"})
    assert (status, answer["locks"]) == (200, [])


@needs_root
async def test_others_may_only_look(folder: Path):
    async with running(folder, ["pipeline", "65534"]) as camera:
        await camera.take(holder="pipeline", seconds=60)
        status, answer = await ask_as_nobody(camera, "POST", "/v1/updates/lock", {"seconds": 60})
        assert (status, answer["error"]["code"]) == (403, "forbidden")
        assert "apply_lock_users" in answer["error"]["hint"]
        assert (await ask_as_nobody(camera, "POST", "/v1/updates/unlock", {"holder": "pipeline"}))[0] == 403
        status, answer = await ask_as_nobody(camera, "GET", "/v1/updates/lock")
        assert (status, [lock["holder"] for lock in answer["locks"]]) == (200, ["pipeline"])
        assert (await ask_as_nobody(camera, "GET", "/v1/updates"))[0] == 200


@needs_root
async def test_a_lock_is_its_takers_own_but_not_against_who_may_write(camera: Camera):
    await camera.take(holder="calibration", seconds=60)
    for target, body in (
        ("/v1/updates/lock", {"seconds": 1, "holder": "calibration"}),
        ("/v1/updates/unlock", {"holder": "calibration"}),
    ):
        status, answer = await ask_as_nobody(camera, "POST", target, body)
        assert (status, answer["error"]["code"]) == (409, "lock_of_another")
    assert [lock["expires_in_s"] for lock in await camera.held()] == [60.0]
    await ask_as_nobody(camera, "POST", "/v1/updates/lock", {"seconds": 60, "holder": "pipeline"})
    assert (await camera.take(holder="pipeline", seconds=90))[1]["lock"]["by"] == "local:nobody", "it stays theirs"
    assert (await camera.ask("POST", "/v1/updates/unlock", {"holder": "pipeline"}))[0] == 200


# ---- hostile requests -------------------------------------------------------------------------------------------------

BAD = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"300",
    b'"x"',
    b"\xff",
    b"[" * 50_000,
    b'{"seconds": NaN}',
    b'{"seconds": Infinity}',
    b'{"seconds": -Infinity}',
    b'{"seconds": 1e400}',
    b'{"seconds": ' + b"9" * 5000 + b"}",
    b'{"seconds": ' + b"9" * 400 + b"}",
    b'{"seconds": -1e-320}',
    *(
        json.dumps(body).encode()
        for body in (
            {},
            {"holder": "a"},
            {"seconds": None},
            {"seconds": True},
            {"seconds": "300"},
            {"seconds": [300]},
            {"seconds": 0},
            {"seconds": 0.99},
            {"seconds": -300},
            {"seconds": 3600.001},
            {"seconds": 300, "holder": ""},
            {"seconds": 300, "holder": "   "},
            {"seconds": 300, "holder": "a" * (MAX_HOLDER + 1)},
            {"seconds": 300, "holder": "a\nb"},
            {"seconds": 300, "holder": "\x1b[31mred"},
            {"seconds": 300, "holder": "a\0"},
            {"seconds": 300, "holder": "\ud800"},
            {"seconds": 300, "holder": "\u202egnp"},
            {"seconds": 300, "holder": None},
            {"seconds": 300, "holder": {"a": 1}},
            {"seconds": 300, "reason": 5},
            {"seconds": 300, "reason": "a\nb"},
            {"seconds": 300, "reason": "a" * (MAX_REASON + 1)},
            {"seconds": 300, "for": "ever"},
            {"seconds": 300, "admin": True},
        )
    ),
]


async def test_bad_requests_are_the_clients_fault_and_take_nothing(camera: Camera):
    await camera.take(holder="a", seconds=60)
    for body in BAD:
        status, answer = await camera.ask("POST", "/v1/updates/lock", body)
        assert (status, answer["error"]["code"]) == (400, "bad_request"), body[:80]
        assert len(answer["error"]["message"]) < 300
    for body in (b"{", b"[]", b'{"holder": 5}', b'{"holder": "a", "seconds": 1}', b'{"holders": ["a"]}'):
        status, answer = await camera.ask("POST", "/v1/updates/unlock", body)
        assert (status, answer["error"]["code"]) == (400, "bad_request"), body
    assert [lock["holder"] for lock in await camera.held()] == ["a"]
    assert (await camera.ask("POST", "/v1/updates/unlock", {"holder": "\ud800"}))[0] == 404
    assert (await camera.ask("PUT", "/v1/updates/lock", {"seconds": 5}))[0] == 405
    print(f"{len(BAD) + 7} bad requests tried")


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(st.dictionaries(st.sampled_from(["holder", "seconds", "reason", "x"]), values))
def test_any_object_takes_a_lock_as_asked_or_is_refused(tmp_path_factory: pytest.TempPathFactory, body: dict[str, Any]):
    """Through the routes, without HTTP."""
    from agent.api import routes

    boot = Boot()
    folder = tmp_path_factory.getbasetemp()
    locks = boot.locks(folder / "any.json")
    view = View(Parts(Settings(), Path("/nonexistent"), "0.1.0", 0.0, locks=locks))
    route, _, _ = routes.match("POST", "/v1/updates/lock")
    assert route
    request = routes.Request({}, {}, "local:joe", json.dumps(body).encode())
    try:
        answer = asyncio.run(route.handler(view, request))  # type: ignore[arg-type]
    except RefusedError as error:
        assert error.code == "bad_request"
        assert locks.held() == []
    else:
        assert isinstance(answer, dict)
        assert answer["lock"]["expires_in_s"] == pytest.approx(body["seconds"])
        assert 1 <= body["seconds"] <= 3600
        assert [lock.holder for lock, _ in locks.held()] == [body.get("holder", "joe")]


# ---- the rest of what the API tells about updates ---------------------------------------------------------------------


async def test_before_anything_is_built_the_api_says_so(camera: Camera):
    assert (await camera.ask("GET", "/v1/updates"))[1] == {"schema": 1, "targets": {}, "window": None, "locks": []}
    status, answer = await camera.ask("POST", "/v1/updates/pipeline/rollback")
    assert (status, answer["error"]["code"]) == (409, "not_ready")
    camera.parts.locks = None
    assert (await camera.take(seconds=5))[1]["error"]["code"] == "not_ready"
    assert (await camera.ask("GET", "/v1/updates"))[1]["locks"] == []


async def test_what_holds_an_update_is_told_with_the_window(camera: Camera):
    async def received_at(_: str) -> float | None:
        return None

    maintenance = Maintenance(
        MaintenanceSettings(windows=["22:00-04:00"], jitter_s=60), "cam-0412", wall=lambda: 1_795_867_200.0
    )
    camera.parts.holds = Holds(maintenance, camera.locks, 30, received_at=received_at)
    await camera.take(holder="pipeline", seconds=60)
    _, answer = await camera.ask("GET", "/v1/updates")
    assert [lock["holder"] for lock in answer["locks"]] == ["pipeline"]
    assert list(answer["window"]) == ["windows", "time_zone", "jitter_s", "opens_at", "closes_at", "state", "words"]
    assert (answer["window"]["windows"], answer["window"]["jitter_s"]) == (["22:00-04:00"], 60)
    assert answer["window"]["state"] in ("closed", "unknown"), "by this machine's clock, or not believed"
    assert answer["window"]["words"]
    hold = await camera.parts.holds.hold("switch", "j")
    assert hold
    assert "pipeline holds the apply lock for 60 s more" in hold.words
    maintenance.reconfigure(MaintenanceSettings())
    assert (await camera.ask("GET", "/v1/updates"))[1]["window"]["state"] == "always"
