"""Files of other programs, with real files, FIFOs, devices, processes and schemas that mean no good."""

from __future__ import annotations

import asyncio
import functools
import itertools
import json
import os
import re
import shutil
import signal
import socket
import stat
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agent.config import targets
from agent.config.desired import Problem
from agent.errors import FailedError
from agent.settings import ConfigTarget

NOBODY = 65534
NEEDS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: owners and devices")
HANGS_AFTER_S = 60


def target(path: Path | None, **more: Any) -> ConfigTarget:
    return ConfigTarget.model_validate({"path": str(path) if path else None, **more})


@dataclass
class State:
    active: str = "active"
    restarts: int = 0


@dataclass
class Units:
    """systemd, as far as targets ask it: what was asked for, in order."""

    asked: list[str] = field(default_factory=list)

    async def restart(self, unit: str) -> None:
        self.asked.append(f"restart {unit}")

    async def reload(self, unit: str) -> None:
        self.asked.append(f"reload {unit}")

    async def state(self, unit: str) -> State:
        raise AssertionError(unit)


async def judged(one: ConfigTarget, document: dict[str, Any] | None = None, **limits: float) -> list[Problem]:
    async with asyncio.timeout(HANGS_AFTER_S):
        return await targets.judge("p", one, {"fps": 5} if document is None else document, **limits)


async def code(one: ConfigTarget, document: dict[str, Any] | None = None, **limits: float) -> tuple[str, str]:
    (problem,) = await judged(one, document, **limits)
    return problem.code, problem.message


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in a folder: its type and mode, and what is in regular files."""
    return {one.name: (one.lstat().st_mode, one.read_bytes() if one.is_file() else b"") for one in folder.iterdir()}


# ---- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o755, 0o4755, 0o2750])
async def test_a_file_keeps_its_mode_and_a_new_one_can_be_read_by_all(tmp_path: Path, mode: int) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(b"old")
    file.chmod(mode)
    await targets.put(target(file), b"new")
    assert (file.read_bytes(), stat.S_IMODE(file.stat().st_mode)) == (b"new", mode)
    await targets.put(target(file), None)
    await targets.put(target(file), None)
    assert list(tmp_path.iterdir()) == []
    before = os.umask(0o077)
    try:
        await targets.put(target(file), b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


@NEEDS_ROOT
async def test_a_file_keeps_its_owner_and_group_also_while_it_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(b"old")
    os.chown(file, 1234, 2345)
    file.chmod(0o640)
    seen = tmp_path / "seen"
    check = ["sh", "-c", 'stat -c "%u %g %a" "$1" >"$2"', "sh", "{path}", str(seen)]
    assert await judged(target(file, check=check)) == []
    assert seen.read_text() == "1234 2345 640\n"
    await targets.put(target(file), b"new")
    found = file.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 2345, 0o640)


async def test_a_linked_file_is_replaced_where_it_is(tmp_path: Path) -> None:
    real = tmp_path / "data"
    real.mkdir()
    (real / "p.json").write_bytes(b"old")
    link = tmp_path / "p.json"
    link.symlink_to("data/p.json")
    assert await judged(target(link, check=["test", "-f", "{path}"])) == []
    await targets.put(target(link), b"new")
    assert (link.is_symlink(), (real / "p.json").read_bytes(), len(list(real.iterdir()))) == (True, b"new", 1)
    assert await targets.read(target(link)) == b"new"
    await targets.put(target(link), None)
    assert (link.is_symlink(), list(real.iterdir())) == (True, [])
    assert await targets.read(target(link)) is None
    await targets.put(target(link), b"again")
    assert (link.is_symlink(), (real / "p.json").read_bytes()) == (True, b"again")


OTHER = 1234
"""A user who may write to the folder, and who is neither root nor the agent."""


@dataclass
class Key:
    """What the agent alone may read, in a folder of its own, under the name of the target's file."""

    folder: Path

    def __post_init__(self) -> None:
        self.folder.mkdir(mode=0o700)
        (self.folder / "p.json").write_bytes(b"PRIVATE")
        (self.folder / "p.json").chmod(0o600)

    @property
    def state(self) -> dict[str, tuple[int, int, bytes]]:
        all_of_it = (self.folder, *self.folder.iterdir())
        return {
            one.name: (one.stat().st_mode, one.stat().st_uid, one.read_bytes() if one.is_file() else b"")
            for one in all_of_it
        }


def lay_link(place: Path, leads_to: Path | str) -> None:
    place.symlink_to(leads_to)
    os.lchown(place, OTHER, OTHER)


@NEEDS_ROOT
@pytest.mark.parametrize("on_the_way", [False, True], ids=["the file", "a folder on the way"])
@pytest.mark.parametrize("agents_too", [False, True], ids=["directly", "over a link of the agent"])
async def test_a_link_that_another_user_made_leads_nowhere(
    tmp_path: Path, *, on_the_way: bool, agents_too: bool
) -> None:
    key = Key(tmp_path / "state")
    before = key.state
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, OTHER, OTHER)
    place = home / "conf" / "p.json"
    if on_the_way:
        lay_link(place.parent, "../state")
    else:
        place.parent.mkdir()
        lay_link(place, key.folder / "p.json")
    if agents_too:
        (tmp_path / "etc").symlink_to(place.parent)
        place = tmp_path / "etc" / "p.json"
    one = target(place, check=["sh", "-c", f'touch "{tmp_path}/checked"'])
    kind, message = await code(one)
    assert (kind, "is a link that another user made" in message) == ("target_unwritable", True), message
    with pytest.raises(FailedError, match="is a link that another user made"):
        await targets.read(one)
    for content in (b"new", None):
        with pytest.raises(FailedError, match="is a link that another user made") as caught:
            await targets.put(one, content)
        assert caught.value.code == "target_unwritable"
    assert key.state == before
    assert not (tmp_path / "checked").exists()


async def test_links_lead_anywhere_when_the_agent_made_them(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "p.json").write_bytes(b"old")
    (tmp_path / "up").symlink_to("a/b/..")
    (tmp_path / "a" / "absolute").symlink_to(tmp_path / "up" / "b")
    (tmp_path / "a" / "p.json").symlink_to("absolute/./../b//p.json")
    for place in (
        tmp_path / "up" / "p.json",
        tmp_path / "a" / "absolute" / "p.json",
        tmp_path / "a" / ".." / "up" / "b" / "p.json",
    ):
        assert await targets.read(target(place)) == b"old"
    assert await judged(target(tmp_path / "up" / "p.json", check=["test", "-f", "{path}"])) == []
    await targets.put(target(tmp_path / "up" / "p.json"), b"new")
    assert (tmp_path / "a" / "b" / "p.json").read_bytes() == b"new"
    (tmp_path / "a" / "folder.json").symlink_to("..")
    assert "is a directory" in (await code(target(tmp_path / "a" / "folder.json")))[1]


@dataclass
class Enemy:
    """Another user, who does `trick` at the `moment`-th time, from 0, that the agent does anything to files."""

    moment: int
    trick: Callable[[], None]
    seen: int = 0


AT_WORK: list[Enemy] = []


@functools.cache
def watch_the_agent() -> None:
    """Let the enemy at work look on; such a hook can't be removed."""

    def look(event: str, _: tuple[Any, ...]) -> None:
        if AT_WORK and (event == "open" or event.startswith("os.")):
            enemy = AT_WORK.pop()
            if enemy.seen == enemy.moment:
                enemy.trick()
            enemy.seen += 1
            AT_WORK.append(enemy)

    sys.addaudithook(look)


def swap_in_a_link(place: Path, leads_to: Path) -> None:
    if place.is_file() or place.is_symlink():
        place.unlink()
    elif place.exists():
        place.rename(f"{place}.aside")
    lay_link(place, leads_to)


@NEEDS_ROOT
@pytest.mark.parametrize("what", ["p.json", ".candidate-p.json", ".p.json.new", "folder"])
async def test_a_link_that_is_swapped_in_at_any_moment_costs_the_agent_nothing(tmp_path: Path, what: str) -> None:
    key = Key(tmp_path / "state")
    before = key.state
    watch_the_agent()
    for moment in itertools.count():
        home = tmp_path / f"home{moment}"
        home.mkdir()
        (home / "p.json").write_bytes(b"old")
        (home / "p.json").chmod(0o777)
        for one in (home, home / "p.json"):
            os.chown(one, OTHER, OTHER)
        place, leads_to = (home, key.folder) if what == "folder" else (home / what, key.folder / "p.json")
        enemy = Enemy(moment, lambda place=place, leads_to=leads_to: swap_in_a_link(place, leads_to))
        one = target(home / "p.json")
        AT_WORK.append(enemy)
        try:
            await judged(one)
            with suppress(FailedError):
                assert await targets.read(one) != b"PRIVATE"
            with suppress(FailedError):
                await targets.put(one, b"new")
        finally:
            AT_WORK.clear()
        assert key.state == before, moment
        if enemy.seen <= moment:
            break
    assert moment > 10
    print(f"{moment} moments to swap in {what} tried")


def a_directory(path: Path) -> None:
    path.mkdir()


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def a_device(path: Path) -> None:
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3))


def a_link_to_a_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("fifo"))
    path.symlink_to("fifo")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (a_directory, "is a directory, not a regular file"),
        (os.mkfifo, "is a FIFO, not a regular file"),
        (a_link_to_a_fifo, "is a FIFO, not a regular file"),
        (a_socket, "is a socket, not a regular file"),
        (a_link_to_itself, "Too many levels of symbolic links"),
        pytest.param(a_device, "is a device, not a regular file", marks=NEEDS_ROOT),
    ],
)
async def test_what_is_no_regular_file_is_refused_and_left_alone(
    tmp_path: Path, make: Callable[[Path], None], words: str
) -> None:
    make(tmp_path / "p.json")
    one = target(tmp_path / "p.json", check=["true"])
    before = contents(tmp_path)
    async with asyncio.timeout(HANGS_AFTER_S):
        kind, message = await code(one)
        assert kind == "target_unwritable"
        assert words in message
        with pytest.raises(FailedError, match=words) as reading:
            await targets.read(one)
        with pytest.raises(FailedError, match=words) as putting:
            await targets.put(one, b"new")
        with pytest.raises(FailedError, match=words):
            await targets.put(one, None)
    assert (reading.value.code, putting.value.code) == ("target_unreadable", "target_unwritable")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("check", [None, ["true"]])
async def test_a_folder_that_is_not_there_or_can_not_be_written_to_is_refused(
    tmp_path: Path, check: list[str] | None
) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path, words in (
        (tmp_path / "gone" / "p.json", "does not exist"),
        (tmp_path / "file" / "p.json", "does not exist"),
        (Path("/proc/camera-agent-test.json"), "can't be written to"),
    ):
        kind, message = await code(target(path, check=check))
        assert (kind, words in message) == ("target_unwritable", True), message
        with pytest.raises(FailedError):
            await targets.put(target(path), b"new")


async def test_a_file_above_one_mebibyte_is_refused_before_anything_is_changed(tmp_path: Path) -> None:
    file = tmp_path / "p.json"
    file.write_bytes(b" " * (2**20 + 1))
    assert (await code(target(file)))[0] == "target_unreadable"
    with pytest.raises(FailedError, match="above 1 MiB"):
        await targets.read(target(file))
    file.write_bytes(b" " * 2**20)
    assert await judged(target(file)) == []
    assert len(await targets.read(target(file)) or b"") == 2**20


@contextmanager
def as_user(uid: int, gid: int) -> Iterator[None]:
    os.setegid(gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@NEEDS_ROOT
@pytest.mark.parametrize(
    ("owner", "group", "mode", "fits"),
    [
        (1234, 2345, 0o644, True),
        (0, NOBODY, 0o640, True),
        (NOBODY, NOBODY, 0o600, True),
        (1234, NOBODY, 0o640, True),
        (NOBODY, 2345, 0o640, False),
    ],
)
async def test_an_agent_that_may_not_give_files_away_refuses_one_whose_readers_it_would_lock_out(
    owner: int, group: int, mode: int, fits: bool
) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        os.chown(folder, NOBODY, NOBODY)
        file = folder / "p.json"
        file.write_bytes(b"{}")
        os.chown(file, owner, group)
        file.chmod(mode)
        before = contents(folder)
        await judged(target(folder / "other.json"))  # whoever is nobody can't import any more
        with as_user(NOBODY, NOBODY):
            problems = await judged(target(file))
        words = "could not be read by its owner or group any more"
        assert [words in one.message for one in problems] == ([] if fits else [True])
        assert contents(folder) == before
    finally:
        shutil.rmtree(folder)


def test_leftovers_of_a_cut_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".candidate-p.json", "..candidate-p.json.new", ".p.json.new", "p.json", ".other"):
        (tmp_path / name).write_bytes(b"")
    targets.remove_leftovers(target(tmp_path / "p.json"))
    assert sorted(contents(tmp_path)) == [".other", "p.json"]
    targets.remove_leftovers(target(None, apply="api"))


# ---- formats and schemas ------------------------------------------------------------------------------------------


async def test_a_document_that_its_format_can_not_hold_is_refused_at_the_key(tmp_path: Path) -> None:
    one = target(tmp_path / "p.ini", format="ini")
    (problem,) = await judged(one, {"lens": {"modes": ["a"]}})
    assert (problem.pointer, problem.code) == ("/targets/p/lens/modes", "target_format")
    assert "lens.modes can't be written as INI" in problem.message
    assert contents(tmp_path) == {}


def schema(folder: Path, content: Any) -> str:
    file = folder / "schema.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


async def test_violations_come_with_their_pointers_and_a_good_document_with_none(tmp_path: Path) -> None:
    rules = schema(tmp_path, {"properties": {"fps": {"maximum": 30}, "a/b": {"type": "string"}}})
    for one in (target(tmp_path / "p.json", schema_file=rules), target(None, apply="api", schema_file=rules)):
        problems = await judged(one, {"fps": 99, "a/b": 1})
        assert [(found.pointer, found.code) for found in problems] == [
            ("/targets/p/a~1b", "schema_violation"),
            ("/targets/p/fps", "schema_violation"),
        ]
        assert problems[1].message == "99 is greater than the maximum of 30"
        assert await judged(one, {"fps": 30, "a/b": "é😀\x00"}) == []
    assert await judged(target(None, apply="api")) == []


async def test_a_large_document_is_judged_like_any_other(tmp_path: Path) -> None:
    rules = schema(tmp_path, {"additionalProperties": {"maxLength": 10}})
    document = {f"{number:03}" + "é" * 300: "😀" * 11 for number in range(20)}
    problems = await judged(target(None, apply="api", schema_file=rules), document)
    assert [found.pointer[-301:] for found in problems] == [f"{number}" + "é" * 300 for number in range(10)]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "can't be read: No such file"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"type": 5}', "not a JSON Schema"),
        ('{"properties": {"fps": {"pattern": "("}}}', "not a JSON Schema"),
        ('{"$ref": "#/gone"}', "/gone', not found"),
        ('{"$ref": "#"}', "refers to itself without end"),
        (" " * (2**20 + 1), "above 1 MiB"),
    ],
)
async def test_an_unusable_schema_is_said(tmp_path: Path, content: str | None, words: str) -> None:
    file = schema(tmp_path, content) if content is not None else str(tmp_path / "gone.json")
    kind, message = await code(target(tmp_path / "p.json", schema_file=file))
    assert (kind, words in message) == ("schema_unusable", True), message


async def test_a_schema_that_is_a_fifo_or_a_directory_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        kind, message = await code(target(tmp_path / "p.json", schema_file=str(path)))
        assert kind == "schema_unusable"
        assert "can't be read" in message


async def test_a_remote_reference_is_never_fetched(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/x.json"
        kind, message = await code(target(tmp_path / "p.json", schema_file=schema(tmp_path, {"$ref": address})))
        assert (kind, address in message) == ("schema_unusable", True)
        with pytest.raises(BlockingIOError):
            server.accept()


async def test_a_schema_that_would_take_for_ever_is_ended_while_the_agent_goes_on(tmp_path: Path) -> None:
    rules = schema(tmp_path, {"properties": {"name": {"pattern": "^(a+)+$"}}})
    one = target(tmp_path / "p.json", schema_file=rules)
    judging = asyncio.create_task(code(one, {"name": "a" * 60 + "!"}, schema_timeout_s=2))
    turns = 0
    while not judging.done():
        await asyncio.sleep(0.01)
        turns += 1
    assert turns > 5
    kind, message = judging.result()
    assert (kind, "takes too long for this document: no end within 2 s" in message) == ("schema_timeout", True)
    assert running_with(rules) == []
    assert await judged(one, {"name": "aaa"}) == []


async def test_a_schema_that_would_take_all_memory_is_ended(tmp_path: Path) -> None:
    levels = {f"l{n}": {"anyOf": [{"$ref": f"#/$defs/l{n + 1}"}] * 8} for n in range(30)}
    rules = schema(tmp_path, {"$defs": {**levels, "l30": {"type": "null"}}, "$ref": "#/$defs/l0"})
    kind, message = await code(target(tmp_path / "p.json", schema_file=rules), {"large": "x" * 8000})
    assert (kind, "needs more than 256 MiB" in message) == ("schema_unusable", True), message


def running_with(text: str) -> list[int]:
    """Processes with `text` in their command lines."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and int(folder.name) != os.getpid():
            try:
                if text.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


# ---- checks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p.json", "p.conf.ini", "pipeline", "10-lens.env", ".env"])
async def test_the_candidate_keeps_the_extension_and_stands_beside_the_file(tmp_path: Path, name: str) -> None:
    seen = tmp_path / "seen"
    one = target(tmp_path / name, check=["sh", "-c", 'echo "$1" >"$2" && cat "$1" >>"$2"', "sh", "{path}", str(seen)])
    assert await judged(one, {"fps": 5}) == []
    path, _, content = seen.read_text().partition("\n")
    assert Path(path).parent == tmp_path
    assert path.endswith(name)
    assert Path(path).name != name
    assert json.loads(content) == {"fps": 5}
    assert list(contents(tmp_path)) == ["seen"]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo one >&2; echo 'bad fps' >&2; echo out; exit 3", "exit status 3: bad fps"),
        ("echo out; exit 1", "exit status 1: out"),
        ("exit 7", "exit status 7"),
        ("kill -SEGV $$", "killed by SIGSEGV"),
        ("printf 'a\\0\\033[31mb\\n\\n' >&2; exit 1", "exit status 1: a  [31mb"),
        ("echo https://x/y?X-Amz-Signature=abc >&2; exit 1", "exit status 1: https://x/y?"),
    ],
)
async def test_a_check_that_refuses_has_the_last_word(tmp_path: Path, script: str, words: str) -> None:
    kind, message = await code(target(tmp_path / "p.json", check=["sh", "-c", script]))
    assert kind == "check_failed"
    assert message.startswith(f"refused by its check: {words}")
    assert "abc" not in message
    assert contents(tmp_path) == {}


async def test_a_check_that_can_not_start_is_said(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"no program")
    for program in ("/no/such/check", str(tmp_path / "data"), str(tmp_path)):
        kind, message = await code(target(tmp_path / "p.json", check=[program]))
        assert kind == "check_unusable"
        assert program in message
    assert list(contents(tmp_path)) == ["data"]


async def test_a_check_that_ignores_the_request_to_end_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    stubborn = 'trap "" TERM; while :; do sleep 1; done'
    script = f"trap '' TERM; setsid sh -c '{stubborn}' {tmp_path} & sh -c '{stubborn}' {tmp_path} & while :; do sleep 1; done"
    kind, message = await code(target(tmp_path / "p.json", check=["sh", "-c", script]), check_timeout_s=0.5)
    assert kind == "check_failed"
    assert "no end within 0.5 s" in message
    assert running_with(str(tmp_path)) == []
    assert contents(tmp_path) == {}


async def test_a_check_that_prints_a_gibibyte_is_survived(tmp_path: Path) -> None:
    script = "head -c 536870912 /dev/zero; { head -c 536870912 /dev/zero; echo; echo end; } >&2; exit 1"
    one = target(tmp_path / "p.json", check=["sh", "-c", script])
    assert await code(one) == ("check_failed", "refused by its check: exit status 1: end")


@pytest.mark.parametrize("status", [0, 1])
async def test_a_daemon_that_a_check_leaves_behind_is_ended(tmp_path: Path, status: int) -> None:
    script = f"setsid sh -c 'trap \"\" HUP; echo up >{tmp_path}/up; sleep 3600; :' {tmp_path} & while [ ! -e {tmp_path}/up ]; do sleep 0.01; done; exit {status}"
    problems = await judged(target(tmp_path / "p.json", check=["sh", "-c", script]))
    assert [found.code for found in problems] == ["check_failed"] * status
    assert running_with(str(tmp_path)) == []


@pytest.mark.parametrize(
    "script", ['rm "$1"', 'rm "$1"; mkdir "$1"', 'echo broken >"$1"', 'ln -sf /dev/null "$1"', 'rm -r "$2"']
)
async def test_a_check_may_do_to_the_candidate_what_it_wants(tmp_path: Path, script: str) -> None:
    folder = tmp_path / "etc"
    folder.mkdir()
    one = target(folder / "p.json", check=["sh", "-c", script, "sh", "{path}", str(folder)])
    assert await judged(one) == []
    folder.mkdir(exist_ok=True)
    for left in folder.iterdir():
        assert left.is_dir()
        assert (await code(one))[0] == "target_unwritable"
        left.rmdir()
    await targets.put(one, b"new")
    assert (folder / "p.json").read_bytes() == b"new"


async def test_a_judgement_that_is_cancelled_leaves_nothing(tmp_path: Path) -> None:
    one = target(tmp_path / "p.json", check=["sh", "-c", f"echo >{tmp_path}/up; sleep 3600; : {tmp_path}"])
    judging = asyncio.create_task(judged(one))
    while not (tmp_path / "up").exists():
        await asyncio.sleep(0.01)
    judging.cancel()
    await asyncio.wait({judging})
    assert judging.cancelled()
    assert list(contents(tmp_path)) == ["up"]
    assert running_with(str(tmp_path)) == []


# ---- putting it in force ------------------------------------------------------------------------------------------


async def test_apply_asks_the_unit_or_nobody(tmp_path: Path) -> None:
    units = Units()
    for apply in ("none", "reload", "restart", "reboot"):
        await targets.activate(target(tmp_path / "p", apply=apply, unit="p.service"), units)
    await targets.activate(target(None, apply="api"), units)
    assert units.asked == ["reload p.service", "restart p.service"]


async def test_a_command_applies_and_may_leave_a_program_running(tmp_path: Path) -> None:
    script = f"setsid sh -c 'echo $$ >{tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; sleep 3600; :' & while [ ! -e {tmp_path}/pid ]; do sleep 0.01; done"
    async with asyncio.timeout(HANGS_AFTER_S):
        await targets.activate(target(tmp_path / "p", apply=["sh", "-c", script]), Units())
    os.killpg(int((tmp_path / "pid").read_text()), signal.SIGKILL)


async def test_a_command_that_does_not_apply_has_the_last_word(tmp_path: Path) -> None:
    for command, words in (
        (["sh", "-c", "echo one; echo 'no device' >&2; exit 4"], "sh: exit status 4: no device"),
        (["/no/such/program"], "/no/such/program can't be started: No such file or directory"),
    ):
        with pytest.raises(FailedError) as caught:
            await targets.activate(target(tmp_path / "p", apply=command), Units())
        assert (caught.value.code, caught.value.message) == ("apply_failed", words)


async def test_a_command_without_end_is_ended_with_its_group(tmp_path: Path) -> None:
    script = f"sleep 3600 & sh -c 'sleep 3600; :' {tmp_path} & echo waiting; wait"
    one = target(tmp_path / "p", apply=["sh", "-c", script, "sh", str(tmp_path)])
    with pytest.raises(FailedError, match=r"sh: no end within 0\.5 s: waiting"):
        await targets.activate(one, Units(), timeout_s=0.5)
    assert running_with(str(tmp_path)) == []


# ---- the examples of docs/targets.md ------------------------------------------------------------------------------


def examples() -> list[tuple[str, str, str]]:
    """The blocks of docs/targets.md: language, what it is, text."""
    text = (Path(__file__).parents[2] / "docs" / "targets.md").read_text()
    return re.findall(r"^```(\w+) (\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_each_format_of_the_documentation_is_written_as_shown() -> None:
    shown = [(language, text) for language, kind, text in examples() if kind in ("document", "file")]
    pairs = list(zip(shown[::2], shown[1::2], strict=True))
    for (_, document), (language, file) in pairs:
        syntax = "env" if language == "sh" else language
        assert targets.render(json.loads(document), syntax).decode() == file
    assert [language for _, (language, _) in pairs] == ["toml", "ini", "sh"]


async def test_the_schema_and_the_check_of_the_documentation_do_what_it_says(tmp_path: Path) -> None:
    blocks = {kind: text for _, kind, text in examples()}
    (tmp_path / "check.py").write_text(blocks["check"])
    check = [sys.executable, str(tmp_path / "check.py"), "{path}"]
    shown = tomllib.loads(blocks["agent"])["config"]["targets"]["pipeline"]
    rules = schema(tmp_path, blocks["schema"])
    one = ConfigTarget.model_validate({**shown, "path": tmp_path / "p.json", "schema_file": rules, "check": check})
    assert await judged(one, {"fps": 5, "modes": ["night"]}) == []
    found = await judged(one, {"fps": 99, "speed": 1})
    assert [(problem.pointer, problem.code) for problem in found] == [
        ("/targets/p", "schema_violation"),
        ("/targets/p/fps", "schema_violation"),
    ]
    words = "refused by its check: exit status 1: fps above 10 leaves too little light for the mode night"
    assert await code(one, {"fps": 20, "modes": ["night"]}) == ("check_failed", words)
