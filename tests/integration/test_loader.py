"""The agent's loader as systemd runs it, with shell scripts as versions: what starts, what is taken back, and power cuts at every step."""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.integration.supervisor import LOADER, SHELLS, Camera, Life, shims

OLD, NEW, THIRD = "a" * 64, "b" * 64, "c" * 64
MUTATING = ("ln", "mv", "sync", "rm", "tee")
MAX_STARTS = 3
UNIT = Path(__file__).resolve().parents[2] / "systemd" / "camera-agent.service"


def available(shell: str) -> object:
    missing = shutil.which(SHELLS[shell][0]) is None
    return pytest.param(shell, marks=pytest.mark.skipif(missing, reason=f"{shell} is not installed"))


@pytest.fixture(params=[available(shell) for shell in SHELLS])
def camera(request: pytest.FixtureRequest, tmp_path: Path) -> Camera:
    camera = Camera(tmp_path / "camera", request.param)
    if request.param == "busybox":
        for name in ("id", "stat"):
            (camera.folder / "applets" / name).symlink_to("/bin/busybox")
    return camera


def armed(camera: Camera, behaviour: str, *, before: str | None = OLD) -> tuple[str, str]:
    """A camera switched to a version of this behaviour, from a good one in a slot or (None) the packaged one."""
    camera.version("packaged", "good", packaged=True)
    old = camera.version(before, "good") if before else ""
    new = camera.version(NEW, behaviour)
    camera.trial(old, new)
    camera.point(new)
    return old, new


def test_it_is_a_plain_shell_script() -> None:
    assert LOADER.read_text().startswith("#!/bin/sh\n")
    assert os.access(LOADER, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing() -> None:
    subprocess.run(["shellcheck", "--shell=sh", LOADER], check=True)


def test_without_slots_the_packaged_version_runs(camera: Camera) -> None:
    camera.version("packaged", "good", packaged=True)
    assert camera.live() == Life("packaged", "stays", ready=True)
    assert camera.log.read_text() == "packaged  run --config agent.toml\n"


def test_the_current_version_runs_with_the_arguments_and_knows_what_it_is(camera: Camera) -> None:
    camera.version("packaged", "good", packaged=True)
    camera.point(camera.version(OLD, "good"))
    assert camera.live() == Life(OLD, "stays", ready=True)
    assert camera.log.read_text() == f"{OLD} slots/{OLD} run --config agent.toml\n"


def test_a_good_version_on_trial_runs_and_is_counted(camera: Camera) -> None:
    old, new = armed(camera, "good")
    assert camera.live() == Life(NEW, "stays", ready=True)
    assert (camera.root / "trial").read_text() == f"from={old}\nto={new}\nstarts=1\n"
    assert camera.fell_back() == {}


BAD = {
    "exits at once": (MAX_STARTS, "failed_starts"),
    "refuses agent.toml": (MAX_STARTS, "failed_starts"),
    "crashes after READY": (MAX_STARTS, "failed_starts"),
    "ends well after READY": (MAX_STARTS, "failed_starts"),
    "hangs after READY": (1, "watchdog"),
    "its Python is missing": (1, "not_executable"),
    "not executable": (0, "not_executable"),
    "missing interpreter": (0, "not_executable"),
    "empty": (0, "not_executable"),
}


@pytest.mark.parametrize("before", [OLD, None], ids=["from a slot", "from the package"])
@pytest.mark.parametrize("behaviour", BAD)
def test_what_does_not_start_is_taken_back(camera: Camera, behaviour: str, before: str | None) -> None:
    old, new = armed(camera, behaviour, before=before)
    starts, why = BAD[behaviour]
    lives = camera.lives(8)
    assert lives[-1] == Life(before or "packaged", "stays", ready=True)
    assert camera.started() == [NEW] * starts + [before or "packaged"]
    assert camera.current == old
    assert camera.fell_back() == {"slot": new, "starts": str(starts), "why": why}
    assert not (camera.root / "trial").exists()
    assert camera.live() == lives[-1]


def test_what_never_gets_ready_is_taken_back_at_once(camera: Camera) -> None:
    old, new = armed(camera, "never READY")
    assert camera.live(start_limit_s=0.5).result == "timeout"
    assert camera.current == old
    assert camera.live() == Life(OLD, "stays", ready=True)
    assert camera.fell_back() == {"slot": new, "starts": "1", "why": "not_ready_in_time"}


def test_an_old_version_that_is_late_or_hangs_is_not_taken_back(camera: Camera) -> None:
    camera.version(OLD, "never READY")
    new = camera.version(NEW, "hangs after READY")
    camera.point(new)
    assert camera.live().result == "watchdog"
    camera.trial(new, f"slots/{OLD}")  # noted, not switched to yet
    assert camera.live().result == "watchdog"
    assert camera.current == new
    assert camera.fell_back() == {}


def test_before_the_switch_and_after_going_back_nothing_is_counted(camera: Camera) -> None:
    old, new = armed(camera, "exits at once")
    camera.point(old)
    for _ in range(MAX_STARTS + 2):
        camera.loader("stopped", SERVICE_RESULT="timeout")
        assert camera.live() == Life(OLD, "stays", ready=True)
    assert (camera.root / "trial").read_text() == f"from={old}\nto={new}\nstarts=0\n"


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "\0" * 40,
        "from",
        "from=slots/",
        "from=../opt/slots/old\nto=x\n",
        f"to=slots/{NEW}\n",
        "starts=1\n",
        "x" * 9000,
    ],
    ids=repr,
)
def test_a_damaged_trial_without_a_way_back_is_dropped(camera: Camera, damage: str) -> None:
    armed(camera, "good")
    (camera.root / "trial").write_text(damage)
    assert camera.live() == Life(NEW, "stays", ready=True)
    assert not (camera.root / "trial").exists()
    assert camera.fell_back() == {}


@pytest.mark.parametrize(
    "damage",
    [
        "from={old}\n",
        "from={old}\nto=slots/bb",
        "from={old}\nto={new}\n",
        "from={old}\nto={new}\nstarts=many\n",
        "x\nfrom={old}\n",
    ],
    ids=repr,
)
def test_a_damaged_trial_with_a_way_back_is_ended(camera: Camera, damage: str) -> None:
    old, new = armed(camera, "good")
    (camera.root / "trial").write_text(damage.format(old=old, new=new))
    assert camera.live() == Life(OLD, "stays", ready=True)
    assert camera.fell_back() == {"slot": new, "starts": "0", "why": "trial_damaged"}


def test_a_trial_cut_at_every_byte(tmp_path: Path) -> None:
    """Whatever is left of the file, a whole version runs, and no half of a name is taken for the packaged version."""
    text = f"from=slots/{OLD}\nto=slots/{NEW}\nstarts=1\n"
    for length in range(len(text)):
        camera = Camera(tmp_path / str(length))
        armed(camera, "exits at once", before=None)
        camera.version(OLD, "exits at once")
        (camera.root / "trial").write_text(text[:length])
        camera.loader("run")
        knows_from = length > text.index("\n")
        assert camera.started() == [OLD if knows_from else NEW], text[:length]
    print(f"{len(text)} lengths of a damaged trial tried")


@pytest.mark.parametrize("behaviour", ["not executable", "missing interpreter", "empty", "gone"])
def test_a_version_that_can_not_start_is_replaced_also_without_a_trial(camera: Camera, behaviour: str) -> None:
    camera.version("packaged", "good", packaged=True)
    link = f"slots/{NEW}" if behaviour == "gone" else camera.version(NEW, behaviour)
    camera.point(link)
    assert camera.live() == Life("packaged", "stays", ready=True)
    camera.version(f"{OLD}.tmp", "good")
    camera.version(OLD, "good")
    assert camera.live() == Life(OLD, "stays", ready=True)
    assert camera.current == link  # left for who looks into it


def test_a_version_whose_python_is_gone_runs_again_only_after_the_next_boot(camera: Camera) -> None:
    """As after an update of the operating system brought another Python."""
    camera.version("packaged", "good", packaged=True)
    link = camera.version(OLD, "its Python is missing")
    camera.point(link)
    assert camera.lives(3) == [Life(OLD, "exit-code", ready=False), Life("packaged", "stays", ready=True)]
    assert camera.live().version == "packaged"
    for path in camera.runtime.iterdir():
        path.unlink()
    assert camera.live().version == OLD


def test_the_way_back_is_gone(camera: Camera) -> None:
    old, new = armed(camera, "exits at once")
    camera.version(THIRD, "good")
    shutil.rmtree(camera.root / old)
    assert camera.lives(8)[-1] == Life(THIRD, "stays", ready=True)
    assert camera.started() == [NEW] * MAX_STARTS + [THIRD]
    assert camera.current == f"slots/{THIRD}"
    assert camera.fell_back()["slot"] == new


def test_with_nothing_to_go_back_to_the_only_version_is_started_on_and_on(camera: Camera) -> None:
    new = camera.version(NEW, "exits at once")
    camera.trial("", new)
    camera.point(new)
    camera.lives(6)
    assert camera.started() == [NEW] * 6
    assert camera.current == new


def test_when_starts_can_not_be_counted_the_version_before_runs(tmp_path: Path) -> None:
    """The disk is full or can't be written: nothing is lost, and what is proven runs."""
    camera = Camera(tmp_path / "camera")
    _, new = armed(camera, "good")
    (tmp_path / "broken").mkdir()
    for name in MUTATING:
        shim = tmp_path / "broken" / name
        shim.write_text("#!/bin/sh\nexit 1\n")
        shim.chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'broken'}:{os.environ['PATH']}"}
    camera.version(THIRD, "good")
    old = camera.root / "slots" / OLD / "bin" / "camera-agent"
    old.write_text(f'#!/bin/sh\necho "{OLD}" "$CAMERA_AGENT_SLOT" >>"{camera.log}"\n')
    for starts in (0, MAX_STARTS):
        camera.trial(f"slots/{OLD}", new, starts)
        assert camera.loader("run", **environment).returncode == 0
        assert camera.log.read_text().splitlines()[-1] == f"{OLD} slots/{OLD}"
        assert camera.current == new


def test_exec_runs_other_programs_of_the_current_version_and_changes_nothing(camera: Camera) -> None:
    _, new = armed(camera, "exits at once")
    program = camera.root / new / "bin" / "agentctl"
    program.write_text('#!/bin/sh\necho "$0 $*"; exit 10\n')
    program.chmod(0o755)
    before = (camera.root / "trial").read_text()
    done = camera.loader("exec", "agentctl", "status", "--check")
    assert (done.returncode, done.stdout) == (10, f"{program} status --check\n")
    assert (camera.root / "trial").read_text() == before
    assert camera.loader("jump").returncode == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: the versions belong to another user")
def test_exec_by_another_user_than_the_owner_takes_the_packaged_program(camera: Camera) -> None:
    """`sudo agentctl` must not make root execute what the agent's user can write."""
    camera.version("packaged", "good", packaged=True)
    camera.point(camera.version(OLD, "good"))
    for folder in (camera.packaged, camera.root / "current"):
        program = folder / "bin" / "agentctl"
        program.write_text('#!/bin/sh\necho "$0"\n')
        program.chmod(0o755)
    assert camera.loader("exec", "agentctl").stdout == f"{camera.root}/slots/{OLD}/bin/agentctl\n"
    os.chown(camera.root, 65534, 65534)
    assert camera.loader("exec", "agentctl").stdout == f"{camera.packaged}/bin/agentctl\n"
    elsewhere = camera.folder / "elsewhere"
    elsewhere.symlink_to(camera.root)
    gone = camera.folder / "gone"
    for root in (elsewhere, gone):
        done = camera.loader("exec", "agentctl", CAMERA_AGENT_ROOT=str(root))
        assert done.stdout == f"{camera.packaged}/bin/agentctl\n"


MANY = 10


def ends(camera: Camera, result: str, status: int | None = None, times: int = 1) -> None:
    more = {} if status is None else {"EXIT_CODE": "exited", "EXIT_STATUS": str(status)}
    for _ in range(times):
        assert camera.loader("stopped", SERVICE_RESULT=result, **more).returncode == 0


@pytest.mark.parametrize(
    ("result", "status"), [("exit-code", 1), ("timeout", None), ("watchdog", None), ("core-dump", None)]
)
def test_a_version_that_always_ends_badly_is_left_until_the_next_boot(
    camera: Camera, result: str, status: int | None
) -> None:
    """A damaged library, say: there is no trial any more that would take it back."""
    camera.version("packaged", "", packaged=True, ends=True)
    camera.version(OLD, "", ends=True)
    camera.point(camera.version(NEW, "", ends=True))
    for version in (NEW, OLD):
        for _ in range(MANY):
            camera.loader("run")
            assert camera.started()[-1] == version
            ends(camera, result, status)
    for _ in range(MANY + 1):
        camera.loader("run")
        assert camera.started()[-1] == "packaged"
        ends(camera, result, status)
    assert camera.current == f"slots/{NEW}"
    for path in camera.runtime.iterdir():
        path.unlink()
    camera.loader("run")
    assert camera.started()[-1] == NEW


def test_bad_ends_count_only_in_a_row(camera: Camera) -> None:
    camera.version("packaged", "", packaged=True, ends=True)
    camera.point(camera.version(OLD, "", ends=True))
    file = camera.runtime / "ends"

    def runs() -> str:
        camera.loader("run")
        return camera.started()[-1]

    ends(camera, "exit-code", 1, MANY - 1)
    ends(camera, "success", 0)
    ends(camera, "exit-code", 1, MANY - 1)
    ends(camera, "exit-code", 2, 3)  # agent.toml is bad: another version would not accept it either
    assert runs() == OLD
    link, number, at = file.read_text().split()
    assert (link, number) == (f"slots/{OLD}", str(MANY - 1))
    file.write_text(f"{link} {number} {int(at) - 700}\n")  # it had run for long since
    ends(camera, "watchdog", None, MANY - 1)
    assert runs() == OLD
    for damage in ("", "x", f"{link}", f"{link} 9", f"{link} 9 x", f"{link} nine 9\n", f"{link} 09999 1\n", "\0" * 40):
        file.write_text(damage)
        ends(camera, "exit-code", 1)
        assert file.read_text().split()[:2] == [link, "1"], damage
    ends(camera, "exit-code", 1, MANY - 1)
    assert runs() == "packaged"


def test_without_another_version_the_only_one_is_not_left(camera: Camera) -> None:
    camera.point(camera.version(OLD, "", ends=True))
    ends(camera, "exit-code", 1, MANY + 2)
    assert "no version can be started" not in camera.loader("run").stderr
    assert camera.started() == [OLD]


def test_bad_ends_on_trial_are_the_trials_own(camera: Camera) -> None:
    _, new = armed(camera, "exits at once")
    ends(camera, "exit-code", 1, MANY)
    assert list(camera.runtime.iterdir()) == []
    assert camera.current == new


def test_pipes_in_the_place_of_its_files_do_not_stop_it(camera: Camera) -> None:
    old, _ = armed(camera, "", before=OLD)
    for name in ("fell_back", ".trial.new", ".fell_back.new"):
        os.mkfifo(camera.root / name)
    for name in ("not-executable", "ends"):
        os.mkfifo(camera.runtime / name)
    for _ in range(MAX_STARTS):
        camera.loader("run")
    camera.loader("stopped", SERVICE_RESULT="timeout")
    assert camera.current == old
    ends(camera, "exit-code", 1)
    (camera.root / "trial").unlink(missing_ok=True)
    os.mkfifo(camera.root / "trial")
    assert camera.live() == Life(OLD, "stays", ready=True)


@pytest.mark.parametrize("first", [b"\x7fELF\2\1\1\n", b"touch", b"\n", b"#!/no/such\n"])
def test_what_is_not_a_script_is_not_executed(camera: Camera, first: bytes) -> None:
    """A shell may take the program of another machine for commands."""
    camera.version("packaged", "good", packaged=True)
    link = camera.version(NEW, "good")
    (camera.root / link / "bin" / "camera-agent").write_bytes(first + b" touch " + os.fsencode(camera.folder / "pw"))
    camera.point(link)
    assert camera.live() == Life("packaged", "stays", ready=True)
    assert not (camera.folder / "pw").exists()


# ---- power cuts


@dataclass(frozen=True)
class Scene:
    """What the loader finds, the arguments and environment of the run that is cut, and what must run in the end."""

    prepare: Callable[[Camera], None]
    finally_runs: str
    arguments: tuple[str, ...] = ("run",)
    environment: tuple[tuple[str, str], ...] = ()


def quick(camera: Camera, *, starts: int, before: str = f"slots/{OLD}", new: str = "exits at once") -> None:
    """Versions that only say that they were started; the new one is on trial."""
    camera.version("packaged", "", packaged=True, ends=True)
    for name in (OLD, THIRD):
        camera.version(name, "", ends=True)
    link = camera.version(NEW, new, ends=True)
    camera.trial(before, link, starts)
    camera.point(link)


def cut_flip(camera: Camera) -> None:
    quick(camera, starts=1)
    (camera.root / "fell_back").write_text(f"slot=slots/{NEW}\nstarts=1\nwhy=not_ready_in_time\n")


def gone_back_trial_left(camera: Camera) -> None:
    quick(camera, starts=3)
    camera.point(f"slots/{OLD}")


def damaged(text: str) -> Callable[[Camera], None]:
    def prepare(camera: Camera) -> None:
        quick(camera, starts=1)
        (camera.root / "trial").write_text(text)

    return prepare


def way_back_gone(camera: Camera) -> None:
    quick(camera, starts=3)
    shutil.rmtree(camera.root / "slots" / OLD)


STOPPED = ("stopped",)
SCENES = {
    "counting": Scene(lambda c: quick(c, starts=0), OLD),
    "the last start": Scene(lambda c: quick(c, starts=2), OLD),
    "going back": Scene(lambda c: quick(c, starts=3), OLD),
    "going back to the package": Scene(lambda c: quick(c, starts=3, before=""), "packaged"),
    "not executable": Scene(lambda c: quick(c, starts=0, new="not executable"), OLD),
    "the way back is gone": Scene(way_back_gone, THIRD),
    "a cut flip": Scene(cut_flip, OLD),
    "gone back already": Scene(gone_back_trial_left, OLD),
    "damaged, way back known": Scene(damaged(f"from=slots/{OLD}\n"), OLD),
    "damaged": Scene(damaged("\0\0\0"), NEW),
    "not ready": Scene(lambda c: quick(c, starts=1), OLD, STOPPED, (("SERVICE_RESULT", "timeout"),)),
    "not ready, from the package": Scene(
        lambda c: quick(c, starts=1, before=""), "packaged", STOPPED, (("SERVICE_RESULT", "timeout"),)
    ),
}


def check_files(camera: Camera) -> None:
    """`current` leads to a whole version, and the loader's files are whole or not there."""
    assert camera.current in ("", *(f"slots/{name}" for name in (OLD, NEW, THIRD)))
    if camera.current:
        assert (camera.root / camera.current / "bin" / "camera-agent").exists()
    if (camera.root / "fell_back").exists():
        assert set(camera.fell_back()) == {"slot", "starts", "why"}


def check_end(camera: Camera, scene: Scene) -> None:
    """From here on: a whole version at every start, the new one at most three times, then the right one for good.

    A decision that was written down holds.
    """
    decided, until_now = bool(camera.fell_back()), len(camera.started())
    for _ in range(MAX_STARTS + 2):
        before = len(camera.started())
        camera.loader("run")
        assert len(camera.started()) == before + 1
        check_files(camera)
    started = camera.started()
    if scene.finally_runs != NEW:
        assert started.count(NEW) <= MAX_STARTS, started
        assert camera.fell_back() or camera.started().count(NEW) == 0
    if decided:
        assert NEW not in started[until_now:]
    assert started[-2:] == [scene.finally_runs] * 2, started
    settled = started[started.index(scene.finally_runs) :]
    assert set(settled) == {scene.finally_runs}, started


def cut_points(folder: Path, scene: Scene, make: Callable[[Path], Camera], after_cut: Callable[[Camera], None]) -> int:
    """Cut the scene's run before, within and after each of its commands, and at its end; how many points that were."""
    points = 0
    for number in itertools.count(1):
        cut = False
        for when in ("before", "within", "after"):
            place = folder / f"{number}-{when}"
            camera = make(place)
            scene.prepare(camera)
            count, environment = shims(place, MUTATING, camera.environment()["PATH"])
            count.write_text("0\n")
            environment = {**dict(scene.environment), **environment, "CUT_AT": str(number), "CUT_WHEN": when}
            done = camera.loader(*scene.arguments, **environment)
            if done.returncode != -signal.SIGKILL and (cut or when != "before"):
                continue  # only `tee` can be cut within
            cut = done.returncode == -signal.SIGKILL
            after_cut(camera)
            check_files(camera)
            check_end(camera, scene)
            points += 1
            if not cut:
                return points
    raise AssertionError


@pytest.mark.parametrize("name", SCENES)
def test_killed_at_every_command(request: pytest.FixtureRequest, tmp_path: Path, name: str) -> None:
    every = request.config.getoption("--exhaustive", default=False)
    points = 0
    for shell in SHELLS if every else ("dash",):
        if shutil.which(SHELLS[shell][0]):
            points += cut_points(
                tmp_path / shell, SCENES[name], lambda place, shell=shell: Camera(place, shell), lambda camera: None
            )
    assert points > 0
    print(f"killed at {points} commands in: {name}")


FS_IOC_SHUTDOWN = 0x8004587D
MODES = {"synced": 0, "log flushed": 1, "log dropped": 2}
SYSTEMS = {"ext4": (192, ["mkfs.ext4", "-q", "-F", "-N", "40960"]), "xfs": (320, ["mkfs.xfs", "-q", "-f"])}


class Disk:
    """A file system in a file, at `mount`, that can lose its power.

    It goes on from a copy of the file: what was shut down can live on in mount namespaces of other processes.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        size, command = SYSTEMS[kind]
        self._options = "loop,nouuid" if kind == "xfs" else "loop"
        self._image = folder / "image"
        with self._image.open("wb") as file:
            file.truncate(size * 2**20)
        subprocess.run([*command, self._image], check=True)
        self.mount = folder / "disk"
        self.mount.mkdir()
        self._mount()

    def _mount(self) -> None:
        subprocess.run(["mount", "-o", self._options, self._image, self.mount], check=True)

    def end(self) -> None:
        subprocess.run(["umount", self.mount], check=True)

    def sync(self) -> None:
        subprocess.run(["sync", "-f", self.mount], check=True)

    def cut(self, mode: int) -> None:
        """What was not written durably is lost."""
        descriptor = os.open(self.mount, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, FS_IOC_SHUTDOWN, struct.pack("I", mode))
        finally:
            os.close(descriptor)
        self.end()
        copy = self._image.with_name("image.new")
        subprocess.run(["cp", "--sparse=always", self._image, copy], check=True)
        copy.rename(self._image)
        self._mount()


@pytest.fixture(params=SYSTEMS)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if os.geteuid() != 0:
        pytest.skip("needs root: a file system is mounted")
    if not Path("/dev/loop-control").exists() or shutil.which(SYSTEMS[request.param][1][0]) is None:
        pytest.skip(f"needs loop devices and {SYSTEMS[request.param][1][0]}")
    disk = Disk(tmp_path, request.param)
    try:
        yield disk
    finally:
        disk.end()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cut_mode" in metafunc.fixturenames:
        every = metafunc.config.getoption("--exhaustive", default=False)
        metafunc.parametrize("cut_mode", MODES if every else ["log dropped"])


def test_power_cut_at_every_command(request: pytest.FixtureRequest, tmp_path: Path, disk: Disk, cut_mode: str) -> None:
    """On real file systems, which lose what was not made durable."""
    every = request.config.getoption("--exhaustive", default=False)
    points = 0
    for name in SCENES if every else ("counting", "going back to the package"):
        place = tmp_path / name.replace(" ", "-")

        def make(folder: Path, place: Path = place) -> Camera:
            return Camera(folder, root=disk.mount / f"{place.name}-{folder.name}")

        def prepare(camera: Camera, scene: Scene = SCENES[name]) -> None:
            scene.prepare(camera)
            disk.sync()

        durable = dataclasses.replace(SCENES[name], prepare=prepare)
        points += cut_points(place, durable, make, lambda _: disk.cut(MODES[cut_mode]))
    assert points > 10
    print(f"power cut at {points} commands tried")


# ---- the unit


def test_the_unit_runs_the_loader_and_always_starts_again() -> None:
    """A new version that ends with 0, or with 2 for agent.toml, must come before the loader again."""
    lines = [line for line in UNIT.read_text().splitlines() if not line.startswith("#")]
    assert "ExecStart=/usr/libexec/camera-agent/camera-agent-loader run --config /etc/camera-agent/agent.toml" in lines
    assert "ExecStopPost=-/usr/libexec/camera-agent/camera-agent-loader stopped" in lines
    assert "Restart=always" in lines
    assert not [line for line in lines if line.startswith("RestartPreventExitStatus=")]
    assert "ReadWritePaths=-/opt/camera-agent" in lines
    assert "Environment=CAMERA_AGENT_ROOT=/opt/camera-agent CAMERA_AGENT_FALLBACK=/usr/lib/camera-agent" in lines


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_the_unit_is_valid(tmp_path: Path) -> None:
    unit = tmp_path / "camera-agent.service"
    unit.write_text(UNIT.read_text().replace("/usr/libexec/camera-agent/camera-agent-loader", str(LOADER)))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
