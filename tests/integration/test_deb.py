"""Installer `deb` against the real dpkg in a private tree: kept, installed, taken back; dpkg's traps; packages that are no good."""

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from agent.errors import FailedError, RefusedError
from agent.updates.installers import deb as deb_module
from agent.updates.installers.deb import Deb, Direct
from agent.updates.installers.deb_store import Staged, State
from agent.updates.installers.dpkg import Dpkg, unpacked_size
from agent.updates.trust import Installed
from tests.debs import (
    FAILING,
    PACKAGE,
    Camera,
    assemble,
    build,
    dpkg,
    killable,
    needs_dpkg,
    refused,
    state_of,
)
from tests.fakes_updates import EMERGENCY, RELEASE, STRANGER, member, root_payload, signed_root

pytestmark = needs_dpkg


@pytest.fixture
def camera(tmp_path):
    return Camera(tmp_path / "camera")


async def test_a_package_comes_is_updated_and_goes_back_after_a_commit(camera):
    one, two = (camera.offer(version, terms={"security_counter": 4}) for version in ("1.0", "2.0"))
    deb = camera.deb
    assert await deb.running() == (None, None)
    assert await deb.probe(one.manifest) == "absent"
    await deb.check(one.manifest)
    await camera.stage(one)
    assert await deb.probe(one.manifest) == "staged"
    assert state_of(camera.root) == ""
    assert await deb.running() == (None, None)
    await deb.arm(one.manifest)
    assert await deb.probe(one.manifest) == "active"
    assert camera.has("1.0")
    await deb.commit(one.manifest, None)
    await deb.check(two.manifest)
    assert await camera.bring(two) == f"{PACKAGE}=1.0"
    assert camera.has("2.0")
    name, installed = await deb.running()
    assert name == f"{PACKAGE}=2.0"
    assert installed == Installed("pipe", "2.0", two.manifest.sha256, 4)
    assert (await asyncio.to_thread(camera.store.trust)).floors == {"pipe": 4}
    assert camera.debs() == {one.manifest.sha256, two.manifest.sha256}
    assert await deb.previous() == (f"{PACKAGE}=1.0", Installed("pipe", "1.0", one.manifest.sha256, 4))
    await deb.roll_back(f"{PACKAGE}=1.0")
    await deb.roll_back(f"{PACKAGE}=1.0")
    assert camera.has("1.0")
    assert await deb.previous() == (f"{PACKAGE}=2.0", Installed("pipe", "2.0", two.manifest.sha256, 4))
    assert (await deb.running())[1] == Installed("pipe", "1.0", one.manifest.sha256, 4)
    assert await deb.probe(two.manifest) == "absent"
    assert camera.debs() == {one.manifest.sha256, two.manifest.sha256}
    with refused("counter_too_low"):
        await camera.stage(camera.offer("1.5", terms={"security_counter": 3}))
    await camera.bring(camera.offer("3.0", terms={"security_counter": 4}))
    assert camera.has("3.0")


async def test_what_was_gone_back_from_by_hand_can_come_back(camera):
    """The version before turns out not to run: what ran is installed again."""
    one, two = camera.offer("1.0"), camera.offer("2.0")
    await camera.bring(one)
    await camera.bring(two)
    for version in ("1.0", "2.0", "1.0", "2.0"):
        await camera.deb.step_back(f"{PACKAGE}={version}")
        await camera.deb.stay()
        assert camera.has(version)
        assert camera.debs() == {one.manifest.sha256, two.manifest.sha256}
    assert (await camera.deb.running())[1] == Installed("pipe", "2.0", two.manifest.sha256, 1)


async def test_root_does_not_go_back_below_its_floor(camera):
    """Not to what was kept before the floor rose; a trial is taken back all the same."""
    one, two, three = (camera.offer(f"{n}.0", terms={"security_counter": n}) for n in (1, 2, 3))
    await camera.bring(one)
    await camera.bring(two)
    with refused("counter_too_low"):
        await camera.deb.roll_back(f"{PACKAGE}=1.0")
    await camera.stage(three)
    with refused("counter_too_low"):
        await camera.deb.roll_back(f"{PACKAGE}=1.0")
    assert camera.has("2.0")
    before = await camera.bring(three, commit=False)
    with refused("counter_too_low"):
        await camera.deb.roll_back(f"{PACKAGE}=1.0")
    await asyncio.to_thread(camera.store.raise_floor, "pipe", 3)
    await camera.deb.roll_back(before)
    assert camera.has("2.0")


async def test_every_act_may_be_done_twice(camera):
    await camera.bring(camera.offer("1.0"))
    two = camera.offer("2.0")
    for act in (
        lambda: camera.stage(two),
        lambda: camera.deb.arm(two.manifest),
        lambda: camera.stage(two),
        lambda: camera.deb.arm(two.manifest),
        lambda: camera.deb.commit(two.manifest, f"{PACKAGE}=1.0"),
        lambda: camera.deb.arm(two.manifest),
        lambda: camera.deb.forget(two.manifest),
        lambda: camera.deb.clean_up(frozenset({f"{PACKAGE}=2.0"})),
    ):
        await act()
        await act()
    assert camera.has("2.0")
    assert await camera.deb.probe(two.manifest) == "active"


async def test_a_trial_that_fails_brings_the_version_before_back(camera):
    one, two = camera.offer("1.0"), camera.offer("2.0", scripts=killable("2.0"))
    await camera.bring(one)
    before = await camera.bring(two, commit=False)
    await camera.deb.roll_back(before)
    assert camera.has("1.0")
    assert (await asyncio.to_thread(camera.store.trust)).floors == {"pipe": 1}
    assert camera.debs() == {one.manifest.sha256}
    await camera.deb.roll_back(before)
    await camera.deb.forget(two.manifest)
    assert camera.has("1.0")
    assert await camera.deb.probe(two.manifest) == "absent"


async def test_a_first_version_that_fails_is_removed_and_its_configuration_stays(camera):
    one = camera.offer("1.0", conffiles={"etc/pipe.conf": "theirs"})
    assert await camera.bring(one, commit=False) is None
    await camera.deb.roll_back(None)
    assert camera.has(None)
    assert (camera.root / "etc/pipe.conf").read_text() == "theirs"
    assert await camera.deb.running() == (None, None)
    await camera.deb.roll_back(None)
    await camera.bring(camera.offer("1.1"))
    with refused("not_kept"):
        await camera.deb.roll_back(None)
    assert camera.has("1.1")


async def test_forgetting_what_is_only_staged_leaves_no_trace(camera):
    one, two = camera.offer("1.0"), camera.offer("2.0")
    await camera.bring(one)
    await camera.stage(two)
    await camera.deb.forget(two.manifest)
    assert await camera.deb.probe(two.manifest) == "absent"
    assert camera.debs() == {one.manifest.sha256}
    with refused("not_staged"):
        await camera.deb.arm(two.manifest)
    assert camera.has("1.0")


# ---- The version before, where it was not installed by an update


@pytest.mark.parametrize("place", ["seed", "apt", "nowhere", "wrong version", "a link"])
async def test_the_package_of_the_version_before_must_be_to_be_had(camera, tmp_path, place):
    (tmp_path / "elsewhere").mkdir()
    old = build(tmp_path / "elsewhere", PACKAGE, "1.0")
    dpkg(camera.root, "-i", old)
    two = camera.offer("2.0")
    seed, archives = camera.home / "store" / "seed", camera.home / "archives"
    seed.mkdir(parents=True)
    archives.mkdir()
    if place == "seed":
        shutil.copy(old, seed / f"{PACKAGE}_whatever.deb")
    if place == "apt":
        shutil.copy(old, archives)
    if place == "wrong version":
        shutil.copy(build(tmp_path / "elsewhere", PACKAGE, "0.9"), seed / f"{PACKAGE}_1.0_all.deb")
    if place == "a link":
        (seed / f"{PACKAGE}_1.0_all.deb").symlink_to(old)
    if place in ("nowhere", "wrong version"):
        with pytest.raises(RefusedError) as error:
            await camera.deb.check(two.manifest)
        assert error.value.code == "old_package_missing"
        assert "apt-get download" in error.value.hint
    if place not in ("seed", "apt"):
        with pytest.raises((FailedError, OSError)):
            await camera.stage(two)
        with refused("not_staged"):
            await camera.deb.arm(two.manifest)
        assert camera.has("1.0")
        return
    await camera.deb.check(two.manifest)
    before = await camera.bring(two, commit=False)
    shutil.rmtree(seed)
    shutil.rmtree(archives)
    await camera.deb.roll_back(before)
    assert camera.has("1.0")


async def test_without_a_way_back_only_what_was_signed_so_goes_on(camera):
    dpkg(camera.root, "-i", build(camera.downloads, PACKAGE, "1.0"))
    two = camera.offer("2.0", terms={"rollback": "no"})
    await camera.deb.check(two.manifest)
    before = await camera.bring(two, commit=False)
    with refused("old_package_missing"):
        await camera.deb.roll_back(before)
    assert camera.has("2.0")
    assert await camera.deb.probe(two.manifest) == "active"
    await camera.deb.commit(two.manifest, before)
    assert await camera.deb.previous() == (None, None)


async def test_the_agents_own_package_is_refused(camera):
    for package in ("camera-agent", "camera-agent-extras"):
        own = Deb("self", package, Direct(camera.work), store=camera.store, dpkg=camera.dpkg)
        with refused("package_is_agent"):
            await own.check(camera.offer("2.0").manifest)


# ---- dpkg's traps


async def test_dpkg_itself_would_go_back_without_asking_and_refuse_without_saying(camera):
    """What the versions are compared for, and why dpkg's exit status is not believed."""
    one, two = build(camera.downloads, PACKAGE, "1.0"), build(camera.downloads, PACKAGE, "2.0")
    dpkg(camera.root, "-i", two)
    dpkg(camera.root, "--refuse-downgrade", "-i", one)
    assert state_of(camera.root) == "ii 2.0"
    dpkg(camera.root, "-i", one)
    assert state_of(camera.root) == "ii 1.0"


@pytest.mark.parametrize(
    ("version", "signers", "downgrade", "code"),
    [
        ("0.9", (RELEASE,), False, "version_not_newer"),
        ("1.0~rc1", (RELEASE,), True, "version_not_newer"),
        ("0.9", (EMERGENCY,), False, "version_not_newer"),
        ("1.0", (RELEASE,), False, "version_not_newer"),
        ("0.9", (RELEASE, EMERGENCY), True, None),
    ],
)
async def test_downgrades_need_the_emergency_role_by_roots_own_judgement(camera, version, signers, downgrade, code):
    await camera.bring(camera.offer("1.0"))
    other = camera.offer(
        version,
        *signers,
        terms={"allow_downgrade": downgrade},
        files={"opt/capture-pipeline/data": version * 1000},
        fields="Homepage: http://example.com\n",
    )
    if code:
        with refused(code):
            await camera.stage(other)
        assert camera.has("1.0")
        return
    before = await camera.bring(other, commit=False)
    assert camera.has(version)
    await camera.deb.roll_back(before)
    assert camera.has("1.0")


@pytest.mark.parametrize("version", ["1:1.0", "3." + "0" * 140])
async def test_the_installed_version_may_be_one_that_only_dpkg_can_order(camera, version):
    dpkg(camera.root, "-i", build(camera.downloads, PACKAGE, version))
    with refused("version_not_newer"):
        await camera.stage(camera.offer("2.0", terms={"rollback": "no"}))


async def test_the_agent_is_told_nothing_that_it_can_not_order(camera):
    """What only dpkg can order has come back from the seed: root knows it, the agent can't compare it."""
    version = "1." + "0" * 150
    known = Installed("pipe", version, "0" * 64)
    dpkg(camera.root, "-i", build(camera.home, PACKAGE, version))
    await asyncio.to_thread(camera.store.save, "pipeline", State(installed=known))
    assert await camera.deb.running() == (f"{PACKAGE}={version}", None)


async def test_a_floor_of_roots_own_outlives_the_agents_memory(camera):
    await camera.bring(camera.offer("1.0", terms={"security_counter": 7}))
    dpkg(camera.root, "--remove", PACKAGE)
    with refused("counter_too_low"):
        await camera.stage(camera.offer("2.0", terms={"security_counter": 6}))
    await camera.bring(camera.offer("2.0", terms={"security_counter": 7}))


async def test_what_changed_while_it_waited_for_its_window_is_judged_again(camera):
    await camera.bring(camera.offer("1.0"))
    two = camera.offer("2.0", terms={"security_counter": 5})
    await camera.stage(two)
    await asyncio.to_thread(camera.store.raise_floor, "pipe", 6)
    with refused("counter_too_low"):
        await camera.deb.arm(two.manifest)
    assert camera.has("1.0")
    two = camera.offer("2.0", terms={"security_counter": 6})
    await camera.stage(two)
    dpkg(camera.root, "-i", build(camera.downloads, PACKAGE, "2.5"))
    with refused("version_not_newer"):
        await camera.deb.arm(two.manifest)
    assert camera.has("2.5")


@pytest.mark.parametrize("script", ["preinst", "postinst"])
async def test_a_maintainer_script_that_fails(camera, script):
    await camera.bring(camera.offer("1.0"))
    two = camera.offer("2.0", scripts={script: FAILING})
    await camera.stage(two)
    before, _ = await camera.deb.running()
    with pytest.raises(FailedError) as error:
        await camera.deb.arm(two.manifest)
    assert error.value.code == "dpkg_failed"
    assert "the sensor is not there" in error.value.message
    assert state_of(camera.root) == {"preinst": "ii 1.0", "postinst": "iF 2.0"}[script]
    assert await camera.deb.running() == (
        before,
        Installed("pipe", "1.0", (await asyncio.to_thread(camera.store.state, "pipeline")).installed.sha256, 1),
    )
    assert not await camera.deb.verify_running(two.manifest)
    await camera.deb.roll_back(before)
    assert camera.has("1.0")


@pytest.mark.parametrize(
    "broken", [("postinst", "prerm"), ("prerm",), ("postrm",), ("postinst", "prerm", "postrm"), ("preinst", "postrm")]
)
@pytest.mark.parametrize("first", [False, True])
async def test_a_version_whose_own_scripts_would_keep_it_goes_all_the_same(camera, broken, first):
    """The old version's prerm and postrm have no mercy either: called as failed-upgrade, they fail as well."""
    unmerciful = "#!/bin/sh\n[ $1 != failed-upgrade ]\n"
    if not first:
        await camera.bring(camera.offer("1.0", scripts={"prerm": unmerciful, "postrm": unmerciful}))
    two = camera.offer("2.0", scripts=dict.fromkeys(broken, "#!/bin/sh\nexit 1\n"))
    await camera.stage(two)
    with contextlib.suppress(FailedError):
        await camera.deb.arm(two.manifest)
    await camera.deb.roll_back(None if first else f"{PACKAGE}=1.0")
    assert camera.has(None if first else "1.0")


async def test_a_script_that_hangs_is_ended_and_leaves_nothing_behind(camera):
    await camera.bring(camera.offer("1.0"))
    pid = camera.home / "pid"
    two = camera.offer("2.0", scripts={"postinst": f"#!/bin/sh\necho $$ > {pid}\nexec sleep 1000\n"})
    await camera.stage(two)
    patient, camera.dpkg._scripts_limit_s = camera.dpkg._scripts_limit_s, 1.0
    with refused("dpkg_hangs"):
        await camera.deb.arm(two.manifest)
    camera.dpkg._scripts_limit_s = patient
    process = Path("/proc") / pid.read_text().strip() / "stat"
    async with asyncio.timeout(60):
        while process.exists() and process.read_text().rpartition(")")[2].split()[0] not in "ZX":  # nobody may reap it
            await asyncio.sleep(0.01)
    await camera.deb.roll_back(f"{PACKAGE}=1.0")
    assert camera.has("1.0")


async def test_a_configuration_file_changed_by_hand_stays(camera):
    await camera.bring(camera.offer("1.0", conffiles={"etc/pipe.conf": "one", "etc/left.conf": "one"}))
    (camera.root / "etc/pipe.conf").write_text("by hand")
    before = await camera.bring(
        camera.offer("2.0", conffiles={"etc/pipe.conf": "two", "etc/left.conf": "two"}), commit=False
    )
    assert camera.has("2.0")
    assert [(camera.root / "etc" / name).read_text() for name in ("pipe.conf", "left.conf")] == ["by hand", "two"]
    await camera.deb.roll_back(before)
    assert camera.has("1.0")
    assert [(camera.root / "etc" / name).read_text() for name in ("pipe.conf", "left.conf")] == ["by hand", "one"]


async def test_a_package_that_is_held_back_from_apt_is_updated(camera):
    await camera.bring(camera.offer("1.0"))
    subprocess.run(
        ["dpkg", f"--root={camera.root}", "--force-not-root", "--set-selections"],
        input=f"{PACKAGE} hold\n".encode(),
        check=True,
    )
    before = await camera.bring(camera.offer("2.0"), commit=False)
    assert state_of(camera.root) == "hi 2.0"
    await camera.deb.roll_back(before)
    assert state_of(camera.root) == "hi 1.0"


async def test_what_a_cut_left_of_other_packages_is_finished_first(camera):
    await camera.bring(camera.offer("1.0"))
    for name, scripts in (
        ("alpha", {}),
        ("beta", {"postinst": FAILING}),
        ("gamma", {"postinst": "#!/bin/sh\nexit 1\n"}),
    ):
        dpkg(camera.root, "--unpack", build(camera.downloads, name, "1.0", scripts=scripts))
    status = camera.root / "var/lib/dpkg/status"
    dpkg(camera.root, "-i", build(camera.downloads, "delta", "1.0"))
    text = status.read_text()
    status.write_text(re.sub(r"(Package: delta\nStatus: install )ok installed", r"\1reinstreq half-installed", text))
    (camera.root / "mended").touch()
    before = await camera.bring(camera.offer("2.0"), commit=False)
    assert [state_of(camera.root, name) for name in ("alpha", "beta", "gamma", "delta")] == [
        "ii 1.0",
        "ii 1.0",
        "iF 1.0",
        "iHR 1.0",
    ]
    assert state_of(camera.root) == "ii 2.0"
    await camera.deb.roll_back(before)
    assert state_of(camera.root) == "ii 1.0"


async def test_dependencies_and_conflicts_are_seen_before_anything_changes(camera):
    await camera.bring(camera.offer("1.0"))
    dpkg(camera.root, "-i", build(camera.downloads, "libsensor", "1.0"))
    lacking = camera.offer("2.0", fields="Depends: libsensor (>= 2), libnothing | libnone\n")
    with pytest.raises(FailedError) as error:
        await camera.stage(lacking)
    assert error.value.code == "dependency_missing"
    assert "libsensor (>= 2)" in error.value.message
    with pytest.raises(FailedError) as error:
        await camera.stage(camera.offer("2.0", fields="Conflicts: libsensor\nReplaces: libsensor\n"))
    assert error.value.code == "package_conflicts"
    assert "libsensor" in error.value.message
    with pytest.raises(FailedError) as error:
        await camera.stage(camera.offer("2.0", fields="Breaks: libsensor (<< 2)\n"))
    assert error.value.code == "package_does_not_fit"
    assert camera.has("1.0")
    assert state_of(camera.root, "libsensor") == "ii 1.0"
    fitting = camera.offer("2.0", fields="Depends: libsensor (>= 1)\n")
    before = await camera.bring(fitting, commit=False)
    await camera.deb.roll_back(before)
    assert camera.has("1.0")


@pytest.mark.parametrize("name", ["lock-frontend", "lock"])
async def test_another_dpkg_is_waited_for_and_not_for_ever(camera, name):
    await camera.bring(camera.offer("1.0"))
    two = camera.offer("2.0")
    await camera.stage(two)
    program = "import fcntl,sys; f=open(sys.argv[1],'ab'); fcntl.lockf(f,fcntl.LOCK_EX); print(1,flush=True); sys.stdin.read()"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, camera.root / "var/lib/dpkg" / name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        await asyncio.to_thread(holder.stdout.readline)
        camera.dpkg._lock_wait_s = 0.3
        with refused("dpkg_locked"):
            await camera.deb.arm(two.manifest)
        assert state_of(camera.root) == "ii 1.0"
        camera.dpkg._lock_wait_s = 60
        threading.Timer(0.3, holder.stdin.close).start()
        await camera.deb.arm(two.manifest)
        assert camera.has("2.0")


async def test_while_it_works_apt_is_kept_out(camera):
    """A maintainer script sees that the frontend lock is taken by us all the time."""
    await camera.bring(camera.offer("1.0"))
    probe = (
        f"#!{sys.executable}\nimport fcntl, os\n"
        "f = open(os.environ['DPKG_ROOT'] + '/var/lib/dpkg/lock-frontend', 'ab')\n"
        "try:\n    fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)\nexcept OSError:\n"
        "    open(os.environ['DPKG_ROOT'] + '/taken', 'w')\n"
    )
    await camera.bring(camera.offer("2.0", scripts={"postinst": probe}))
    assert (camera.root / "taken").exists()


async def test_one_change_at_a_time_and_another_is_waited_for(camera, monkeypatch):
    await camera.bring(camera.offer("1.0"))
    two = camera.offer("2.0")
    await camera.stage(two)
    camera.work._lock_wait_s = 0.1
    monkeypatch.setattr(deb_module, "BUSY_POLL_S", 0)
    with (camera.home / "store/.lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with monkeypatch.context() as patched, refused("deb_busy"):
            patched.setattr(deb_module, "BUSY_LIMIT_S", 0)
            await camera.deb.arm(two.manifest)
        threading.Timer(0.5, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        await camera.deb.arm(two.manifest)
    assert camera.has("2.0")


async def test_nobody_else_can_hold_a_lock(camera):
    """Whoever can read a lock file can lock it, and block every update."""
    (camera.home / "store").mkdir(exist_ok=True)
    lock = camera.home / "store/.lock"
    lock.touch(mode=0o644)
    lock.chmod(0o644)
    for name in ("lock", "lock-frontend"):
        (camera.root / "var/lib/dpkg" / name).unlink()
    await camera.bring(camera.offer("1.0"))
    assert lock.stat().st_mode & 0o777 == 0o600
    for name in ("lock", "lock-frontend"):
        assert (camera.root / "var/lib/dpkg" / name).stat().st_mode & 0o777 == 0o640


# ---- Hostile and damaged packages

CONTROL = f"Package: {PACKAGE}\nVersion: 2.0\nArchitecture: all\nMaintainer: a <a@b>\nDescription: x\n"


def hostile(folder, kind):
    path = folder / "hostile.deb"
    foreign = "arm64" if Dpkg().architecture() != "arm64" else "amd64"
    controls = {
        "other package": CONTROL.replace(PACKAGE, "openssh-server"),
        "other version": CONTROL.replace("2.0", "2.0.1"),
        "epoch": CONTROL.replace("2.0", "1:2.0"),
        "other architecture": CONTROL.replace("all", foreign),
        "no version": CONTROL.replace("Version: 2.0\n", ""),
        "two packages": CONTROL + f"Package: {PACKAGE}\n",
        "huge control": CONTROL + "X-Much: " + "m" * 17 * 2**20 + "\n",
        "empty control": "",
        "option as a name": CONTROL.replace(PACKAGE, "--purge"),
        "path as a name": CONTROL.replace(PACKAGE, "../../etc"),
    }
    members = {
        "path out": [member("./../../evil", b"x")],
        "too big": [member("./opt/a", b"x" * 1_000_001)],
    }
    if kind in controls:
        return assemble(path, controls[kind].encode(), member("./opt/a", b"x"))
    if kind in members:
        return assemble(path, CONTROL.encode(), *members[kind])
    whole = build(folder, PACKAGE, "2.0").read_bytes()
    contents = {
        "not a deb": b"PK\x03\x04" + os.urandom(500),
        "one byte": b"!",
        "truncated": whole[: len(whole) * 2 // 3],
        "truncated in control": whole[:400],
    }
    if kind == "damaged data":
        return assemble(path, CONTROL.encode(), body=os.urandom(5000))
    path.write_bytes(contents[kind])
    return path


KINDS = {
    "other package": "wrong_package",
    "other version": "wrong_package",
    "epoch": "wrong_package",
    "other architecture": "wrong_package",
    "no version": "not_a_package",
    "two packages": "package_does_not_fit",
    "huge control": "not_a_package",
    "empty control": "not_a_package",
    "option as a name": None,
    "path as a name": None,
    "path out": "not_a_package",
    "too big": "package_too_large",
    "not a deb": "not_a_package",
    "one byte": "not_a_package",
    "truncated": "not_a_package",
    "truncated in control": "not_a_package",
    "damaged data": "not_a_package",
}


@pytest.mark.parametrize("kind", KINDS)
async def test_what_is_signed_but_no_good_changes_nothing(camera, kind):
    one = camera.offer("1.0")
    await camera.bring(one)
    bad = camera.offer("2.0", deb=await asyncio.to_thread(hostile, camera.downloads, kind))
    with pytest.raises(FailedError) as error:
        await camera.stage(bad)
    assert error.value.code == KINDS[kind] or (
        KINDS[kind] is None and error.value.code in ("not_a_package", "wrong_package")
    )
    assert camera.has("1.0")
    assert camera.debs() == {one.manifest.sha256}
    assert (await asyncio.to_thread(camera.store.state, "pipeline")).staged is None
    await camera.bring(camera.offer("2.0"))
    assert camera.has("2.0")


async def test_an_artifact_that_is_not_the_signed_one_is_not_even_opened(camera):
    one, two = camera.offer("1.0"), camera.offer("2.0")
    await camera.bring(one)
    genuine = two.artifact.read_bytes()
    tried = 0
    for content in (genuine[:-1], genuine + b"\n", genuine[:-1] + b"\1", b"", one.artifact.read_bytes()):
        two.artifact.write_bytes(content)
        with refused("digest_mismatch"):
            await camera.stage(two)
        tried += 1
    two.artifact.unlink()
    with refused("artifact_refused"):
        await camera.stage(two)
    two.artifact.symlink_to(one.artifact)
    with refused("artifact_refused"):
        await camera.stage(two)
    two.artifact.unlink()
    os.mkfifo(two.artifact)
    with refused("artifact_refused"):
        await camera.stage(two)
    assert camera.has("1.0")
    assert camera.debs() == {one.manifest.sha256}
    print(f"{tried + 3} false artifacts tried")


async def test_what_root_does_not_believe(camera):
    await camera.bring(camera.offer("1.0"))
    path = build(camera.downloads, PACKAGE, "2.0")
    for code, offer in (
        ("signature_unknown", camera.offer("2.0", STRANGER, deb=path)),
        ("wrong_target", camera.offer("2.0", deb=path, terms={"target": "other"})),
        (
            "manifest_expired",
            camera.offer("2.0", deb=path, terms={"created": "2020-01-01T00:00:00Z", "expires": "2020-01-02T00:00:00Z"}),
        ),
    ):
        camera_now = "agent.updates.installers.deb_work.clock_synchronised"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(camera_now, lambda: True)
            with refused(code):
                await camera.stage(offer)
    good = camera.offer("2.0", deb=path)
    for envelope in ({}, {**good.envelope, "signatures": []}, None):
        with pytest.raises(RefusedError):
            await asyncio.to_thread(
                camera.work.do, "keep", "pipeline", PACKAGE, {"envelope": envelope, "artifact": str(good.artifact)}
            )
    (camera.keys / "root.json").rename(camera.keys / "gone")
    with refused("no_update_keys"):
        await camera.stage(good)
    (camera.keys / "gone").rename(camera.keys / "root.json")
    for place in (camera.keys, camera.keys / "root.json"):
        mode = place.stat().st_mode
        place.chmod(0o777)
        with refused("not_trusted"):
            await camera.stage(good)
        place.chmod(mode)
    assert camera.has("1.0")
    assert (await asyncio.to_thread(camera.store.state, "pipeline")).staged is None


async def test_an_older_root_document_does_not_bring_old_keys_back(camera):
    await camera.bring(camera.offer("1.0"))
    second = root_payload(version=2, release=(STRANGER,))
    (camera.keys / "2.root.json").write_text(json.dumps(signed_root(second)))
    await camera.bring(camera.offer("2.0", STRANGER))
    (camera.keys / "2.root.json").unlink()
    with refused("signature_unknown"):
        await camera.stage(camera.offer("3.0", RELEASE))
    await camera.bring(camera.offer("3.0", STRANGER))


async def test_a_kept_package_that_was_damaged_on_disk_is_not_installed(camera):
    await camera.bring(camera.offer("1.0"))
    two = camera.offer("2.0")
    await camera.stage(two)
    kept = camera.store.deb("pipeline", two.manifest.sha256)
    kept.write_bytes(kept.read_bytes()[:-1] + b"\1")
    with refused("package_damaged"):
        await camera.deb.arm(two.manifest)
    await camera.deb.forget(two.manifest)
    await camera.bring(two)
    assert camera.has("2.0")


async def test_a_state_that_cannot_be_read_is_set_aside(camera):
    one = camera.offer("1.0")
    await camera.bring(one)
    (camera.home / "store/seed").mkdir()
    shutil.copy(one.artifact, camera.home / "store/seed")
    for content in (b"\0\0", b"[]", b'{"staged": {"new": 1}}', b'{"installed": {"x": 1}}'):
        (camera.home / "store/pipeline/state.json").write_bytes(content)
        assert await camera.deb.running() == (f"{PACKAGE}=1.0", None)
    (camera.home / "store/trust.json").write_bytes(b"{")
    await camera.bring(camera.offer("2.0"))
    assert camera.has("2.0")


def test_nothing_is_kept_of_what_is_not_known():
    one, two = Installed("p", "1", "a" * 64), Installed("p", "2", "b" * 64)
    unknown = Installed("p", "1", "")
    assert State().of_version("1") is None
    assert State().kept() == frozenset()
    for phase, expected in (("staged", None), ("armed", two), ("done", two), ("restoring", two)):
        state = State(staged=Staged(two, unknown, downgrade=False, held=False, envelope={}, phase=phase))
        assert state.of_version("2") == expected
        assert state.of_version("1") is None
        assert state.kept() == {two.sha256}
        same = State(
            staged=Staged(Installed("p", "1", "c" * 64), one, downgrade=False, held=False, envelope={}, phase=phase)
        )
        assert same.of_version("1") == (same.staged.new if phase == "done" else one)


def test_the_size_that_is_signed(tmp_path):
    deb = build(tmp_path, PACKAGE, "1.0", files={"opt/a": "12345"})
    assert unpacked_size(deb) == 3 + 3000 + 5
    link = tarfile.TarInfo("./opt/b")
    link.type, link.linkname = tarfile.SYMTYPE, "a"
    made = assemble(tmp_path / "made.deb", CONTROL.encode(), member("./opt/a", b"123"), (link, b""))
    assert unpacked_size(made) == 3
