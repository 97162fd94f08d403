"""Updates of a Debian package cut anywhere: dpkg, its scripts, root's part and the agent; one whole version is there afterwards."""

import asyncio
import contextlib
import os
import re
import shutil
import signal

import pytest

from agent.errors import FailedError
from agent.updates.installers.dpkg import Dpkg
from tests.debs import (
    FAILING,
    PACKAGE,
    Camera,
    killable,
    needs_dpkg,
    needs_strace,
    state_of,
)

pytestmark = needs_dpkg


MUTATING = ("rename", "unlink", "rmdir", "mkdir", "link", "symlink", "fsync", "fdatasync", "ftruncate", "fchmod", "fchown", "chmod", "utimensat", "sync_file_range", "vfork", "clone", "wait4")  # fmt: skip


def killing(folder, call, number):
    """A dpkg that is killed at its n-th such system call, and its starter with it, as by a power cut."""
    program = folder / "dpkg"
    program.write_text(
        '#!/bin/sh\ncase " $* " in *" -i "*|*" --unpack "*|*" --remove "*|*" --configure "*) ;; *) exec dpkg "$@";; esac\n'
        f'strace -qq -o {folder}/trace -e trace={call} -e inject={call}:signal=SIGKILL:when={number} dpkg "$@"\n'
        "code=$?\n[ $code = 137 ] && { kill -9 $PPID; kill -9 0; }\nexit $code\n"
    )
    program.chmod(0o755)
    return (str(program),)


def in_a_child(act):
    """Whether `act` came to its end, in a process of its own that may be killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        except FailedError:
            code = 3
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 3, -signal.SIGKILL), code
    return code != -signal.SIGKILL


def calls_of(camera, verb, request):
    """The mutating calls of dpkg doing this, each as (name, how many of its kind before it + 1), in their order.

    Beside them those that put a file of the package in its place.
    """
    trace = camera.home / "calls"
    names = ",".join(f"?{name}" for name in MUTATING)
    traced = Camera(camera.home, ("strace", "-qq", "-o", str(trace), "-e", f"trace={names}", "dpkg"))
    with contextlib.suppress(FailedError):
        traced.work.do(verb, "pipeline", PACKAGE, request)
    seen: dict[str, int] = {}
    points, placing = [], []
    for line in trace.read_text().splitlines():
        if match := re.match(r"([a-z0-9_]+)\(", line):
            seen[match[1]] = seen.get(match[1], 0) + 1
            points.append((match[1], seen[match[1]]))
            if match[1] == "rename" and f"/opt/{PACKAGE}/" in line:
                placing.append(points[-1])
    return points, placing


BROKEN = {**killable("2.0"), "postinst": FAILING}
CUTS = {
    "an update": (
        {"scripts": killable("2.0"), "conffiles": {"etc/pipe.conf": "two"}},
        "install",
        ("install", "restore"),
    ),
    "an update whose script fails": ({"scripts": BROKEN}, "install", ("restore",)),
    "a roll-back": ({"scripts": killable("2.0"), "conffiles": {"etc/pipe.conf": "two"}}, "restore", ("restore",)),
    "a roll-back after a script failed": ({"scripts": BROKEN}, "restore", ("restore",)),
    "a first installation": ({"scripts": killable("2.0")}, "install", ("install", "restore")),
    "the removal of a first installation": ({"scripts": killable("2.0")}, "restore", ("restore",)),
}


@needs_strace
@pytest.mark.parametrize("what", CUTS)
def test_dpkg_is_killed_at_its_system_calls(tmp_path, request, what):
    """Afterwards, doing it again or going back leaves exactly one whole version."""
    built, verb, ways_on = CUTS[what]
    exhaustive = request.config.getoption("--exhaustive", default=False)
    base = Camera(tmp_path / "base")
    first = "first" in what
    if not first:
        asyncio.run(base.bring(base.offer("1.0", scripts=killable("1.0"), conffiles={"etc/pipe.conf": "one"})))
    two = base.offer("2.0", **built)
    asyncio.run(base.stage(two))
    requests = {"install": {"sha256": two.manifest.sha256}, "restore": {"version": None if first else "1.0"}}
    if verb == "restore":
        with contextlib.suppress(FailedError):
            base.work.do("install", "pipeline", PACKAGE, requests["install"])
    points, placing = calls_of(base.copy(tmp_path / "traced"), verb, requests[verb])
    assert len(points) > 20
    chosen = points if exhaustive else points[:: len(points) // 3] + placing[2:3]
    killed, states = 0, set()
    for number, point in enumerate(chosen):
        cut = base.copy(tmp_path / "cut", killing(tmp_path, *point))
        if in_a_child(lambda cut=cut: cut.work.do(verb, "pipeline", PACKAGE, requests[verb])):
            shutil.rmtree(cut.home)
            continue
        killed += 1
        states.add(state_of(cut.root)[:2])
        for way in ways_on if exhaustive else [ways_on[-1 - number % len(ways_on)]]:
            camera = cut.copy(tmp_path / "again")
            camera.work.do(way, "pipeline", PACKAGE, requests[way])
            assert camera.has("2.0" if way == "install" else requests["restore"]["version"]), (point, way)
            shutil.rmtree(camera.home)
        shutil.rmtree(cut.home)
    print(f"{killed} of {len(points)} system calls of {what} tried, leaving {', '.join(sorted(states))}")
    assert killed >= len(chosen) * 3 // 4


async def scripts_run_by(camera, two):
    """Every (script, version, argument) that an update and its roll-back run."""
    await camera.bring(two, commit=False)
    await camera.deb.roll_back(f"{PACKAGE}=1.0")
    return [line.split()[:3] for line in (camera.root / "scripts.log").read_text().splitlines()]


async def test_dpkg_is_killed_in_every_maintainer_script(tmp_path, request):
    """A script that ends its dpkg, at each of its calls in an update and a roll-back."""
    exhaustive = request.config.getoption("--exhaustive", default=False)
    base = Camera(tmp_path / "base")
    await base.bring(base.offer("1.0", scripts=killable("1.0")))
    (base.root / "scripts.log").unlink()
    two = base.offer("2.0", scripts=killable("2.0"))
    await base.stage(two)
    calls = await scripts_run_by(base.copy(tmp_path / "traced"), two)
    states = []
    for number, (script, version, argument) in enumerate(calls):
        for way in ("again", "back") if exhaustive else (("again", "back")[number % 2],):
            camera = base.copy(tmp_path / f"{number}{way}")
            (camera.root / f"kill.{script}.{version}.{argument}").touch()
            try:
                await camera.deb.arm(two.manifest)
            except FailedError as error:
                assert "killed by signal 9" in error.message
                states.append(state_of(camera.root))
                if way == "again":
                    await camera.deb.arm(two.manifest)
                    assert camera.has("2.0")
            await camera.deb.roll_back(f"{PACKAGE}=1.0")  # what is killed in here goes on by itself
            assert camera.has("1.0")
            assert not list(camera.root.glob("kill.*"))
    assert {"iF 2.0", "iHR 1.0"} <= set(states), states
    print(f"{len(calls)} calls of maintainer scripts tried, leaving {', '.join(sorted(set(states)))}")


class CutError(BaseException):
    """The agent, or root's part, ends here."""


async def test_the_agent_ends_between_any_two_calls_and_root_between_any_two_writes(tmp_path, monkeypatch, request):
    """Cut before and after each durable write of root's part and each run of dpkg: done again, it comes to the same end."""
    every = 1 if request.config.getoption("--exhaustive", default=False) else 9
    base = Camera(tmp_path / "base")
    await base.bring(base.offer("1.0"))
    two, before = base.offer("2.0"), f"{PACKAGE}=1.0"
    left = [0]

    def counting(real):
        def call(*arguments, **keywords):
            left[0] -= 1
            if left[0] == 0:
                raise CutError
            result = real(*arguments, **keywords)
            left[0] -= 1
            if left[0] == 0:
                raise CutError
            return result

        return call

    for name in ("rename", "fsync", "unlink"):
        monkeypatch.setattr(os, name, counting(getattr(os, name)))
    monkeypatch.setattr(Dpkg, "install", counting(Dpkg.install))

    async def acts(camera, *, kept):
        """As the flow does them: what was decided once is not decided again."""
        await camera.stage(two)
        await camera.deb.arm(two.manifest)
        (camera.home / "decided").touch()
        await (camera.deb.commit(two.manifest, before) if kept else camera.deb.roll_back(before))

    points = 0
    for kept in (True, False):
        ended, number = False, 1
        while not ended:
            left[0] = 0
            camera = base.copy(tmp_path / f"{kept}{number}")
            left[0] = number
            try:
                await acts(camera, kept=kept)
                ended = True
            except CutError:
                points += 1
            left[0] = 0
            again = Camera(camera.home)
            if (again.home / "decided").exists():
                await (again.deb.commit(two.manifest, before) if kept else again.deb.roll_back(before))
            else:
                await acts(again, kept=kept)
            assert again.has("2.0" if kept else "1.0"), number
            assert not list((again.home / "store/pipeline").glob("*.new"))
            shutil.rmtree(camera.home)
            number += every
    print(f"{points} cuts of root's part tried")
    assert points >= 100 // every
