"""Installer `agent` with the real loader: versions are tried, switched to, kept or taken back, with cuts at every call."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agent.errors import FailedError, RefusedError
from agent.updates.archive import installed_size
from agent.updates.installers.agent import AgentInstaller, Started, started_by_loader
from agent.updates.manifest import Manifest, digest_of
from tests.fakes_updates import archive, manifest, member
from tests.faults.agent_process import AgentProcess
from tests.faults.cloud import Cloud
from tests.integration.supervisor import LOADER, Camera

PROJECT = Path(__file__).resolve().parents[2]
FIT = '#!/bin/sh\ncase $1 in --version) echo "camera-agent {version}" ;; check-config) exit 0 ;;\n*) echo "{version} $CAMERA_AGENT_SLOT" >>"{log}" ;; esac\n'


class Place:
    """A camera with a packaged version, and versions to install on it."""

    def __init__(self, folder: Path) -> None:
        self.camera = Camera(folder)
        self.root = self.camera.root
        self.config_file = folder / "agent.toml"
        self.config_file.write_text("")
        packaged = self.camera.packaged / "bin" / "camera-agent"
        packaged.parent.mkdir(parents=True)
        packaged.write_text(FIT.format(version="packaged", log=self.camera.log))
        packaged.chmod(0o755)

    def build(self, version: str, program: str = FIT, mode: int = 0o755) -> tuple[Path, Manifest]:
        text = program.format(version=version, log=self.camera.log).encode()
        artifact = archive(self.camera.folder / f"{version}.tar.gz", member("bin/camera-agent", text, mode=mode))
        return artifact, described(artifact, version=version)

    def installer(self, slot: str | None) -> AgentInstaller:
        """As the process that the loader started from `slot` has it."""
        started = Started(self.root, slot)
        return AgentInstaller(self.root, config_file=self.config_file, version="0.1", started=started)

    def boot(self) -> AgentInstaller:
        """Start the agent by the loader; the installer of the process that this became."""
        self.camera.loader("run", "--config", str(self.config_file))
        slot = self.camera.log.read_text().splitlines()[-1].partition(" ")[2]
        return self.installer(slot or None)

    def run_first(self, version: str = "1") -> Manifest:
        """Make `version` the one that is kept and runs."""
        artifact, first = self.build(version)

        async def act() -> None:
            installer = self.boot()
            await install(installer, artifact, first)
            await installer.arm(first)
            await self.boot().commit(first, None)

        asyncio.run(act())
        return first


def described(artifact: Path, **changes: object) -> Manifest:
    size = {"size": artifact.stat().st_size, "installed_size": installed_size(artifact)}
    return Manifest.model_validate(
        manifest(installer="agent", target="agent", name="camera-agent", sha256=digest_of(artifact), **size, **changes)
    )


def slot_of(described_as: Manifest) -> str:
    return f"slots/{described_as.sha256}"


async def install(installer: AgentInstaller, artifact: Path, described_as: Manifest) -> None:
    await installer.install(artifact, described_as, {}, lambda _: None)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "camera")


async def test_from_the_packaged_version_to_a_slot_and_to_the_next(place: Place) -> None:
    before: str | None = None
    names: list[Manifest] = []
    for version in ("1", "2", "3"):
        artifact, wanted = await asyncio.to_thread(place.build, version)
        installer = await asyncio.to_thread(place.boot)
        link, installed = await installer.running()
        assert link == before
        assert installed
        assert (installed.name, installed.version) == ("camera-agent", names[-1].version if names else "0.1")
        assert await installer.probe(wanted) == "absent"
        for _ in range(2):
            await install(installer, artifact, wanted)
        assert await installer.probe(wanted) == "staged"
        for _ in range(2):
            await installer.arm(wanted)
        assert (place.root / "trial").read_text() == f"from={before or ''}\nto={slot_of(wanted)}\nstarts=0\n"
        assert not await installer.verify_running(wanted)  # this process is still the version before
        assert await installer.probe(wanted) == "staged"
        with pytest.raises(FailedError, match="this is not"):
            await installer.commit(wanted, before)
        installer = await asyncio.to_thread(place.boot)
        assert await installer.verify_running(wanted)
        assert await installer.probe(wanted) == "active"
        await installer.arm(wanted)  # cut before it was noted as done: what is counted stays counted
        assert (place.root / "trial").read_text().endswith("starts=1\n")
        await installer.count_anew(wanted)
        assert (place.root / "trial").read_text() == f"from={before or ''}\nto={slot_of(wanted)}\nstarts=0\n"
        for _ in range(2):
            await installer.commit(wanted, before)
        assert not (place.root / "trial").exists()
        assert (await installer.previous())[0] == before
        installed = (await installer.running())[1]
        assert installed
        assert installed.version == version
        names.append(wanted)
        before = slot_of(wanted)
    assert [await installer.probe(wanted) for wanted in names] == ["absent", "staged", "active"]


@pytest.mark.parametrize("from_slot", [True, False])
async def test_what_the_loader_took_back_is_told(place: Place, from_slot: bool) -> None:
    first = await asyncio.to_thread(place.run_first) if from_slot else None
    before = slot_of(first) if first else None
    artifact, wanted = await asyncio.to_thread(place.build, "2")
    installer = await asyncio.to_thread(place.boot)
    await install(installer, artifact, wanted)
    await installer.arm(wanted)
    for _ in range(3):
        installer = await asyncio.to_thread(place.boot)
        assert await installer.verify_running(wanted)
        assert await installer.why_not_running() == ""
    installer = await asyncio.to_thread(place.boot)
    assert (await installer.running())[0] == before
    assert not await installer.verify_running(wanted)
    assert await installer.probe(wanted) == "staged"
    assert await installer.why_not_running() == (
        "the loader went back to the version before: it was started 3 times and did not last"
    )
    for _ in range(2):
        await installer.roll_back(before)
        await installer.clean_up(frozenset({before} if before else ()))
    assert await installer.why_not_running() == ""
    assert await installer.probe(wanted) == "absent"
    assert not (place.root / "trial").exists()


@pytest.mark.parametrize(
    "why", ["failed_starts", "not_ready_in_time", "watchdog", "not_executable", "trial_damaged", "\0"]
)
async def test_every_reason_of_the_loader_has_words(place: Place, why: str) -> None:
    (place.root / "fell_back").write_text(f"slot=slots/x\nstarts=2\nwhy={why}\n")
    words = await place.installer(None).why_not_running()
    assert words.startswith("the loader went back to the version before: ")
    assert "{" not in words
    if why in LOADER.read_text():
        assert "could not keep" not in words


UNFIT = {
    "no program": ("", 0o755, "can be started"),
    "not executable": (FIT, 0o644, "can be started"),
    "missing interpreter": ("#!/no/such\n", 0o755, "can be started"),
    "does not start": ("#!/bin/sh\necho no library >&2; exit 1\n", 0o755, "no library"),
    "refuses agent.toml": (
        "#!/bin/sh\n[ $1 = --version ] || {{ echo unknown key $2 >&2; exit 2; }}\n",
        0o755,
        "does not accept",
    ),
}


@pytest.mark.parametrize("kind", UNFIT)
async def test_what_is_unfit_is_not_switched_to(place: Place, kind: str) -> None:
    program, mode, words = UNFIT[kind]
    artifact, wanted = await asyncio.to_thread(place.build, "2", program, mode)
    if kind == "no program":
        artifact = await asyncio.to_thread(archive, artifact, member("bin/other", b"x"))
        wanted = await asyncio.to_thread(described, artifact, version="2")
    installer = await asyncio.to_thread(place.boot)
    with pytest.raises(FailedError) as error:
        await install(installer, artifact, wanted)
    assert error.value.code == "agent_unfit"
    assert words in error.value.message
    assert await installer.probe(wanted) == "absent"
    assert not (place.root / "trial").exists()


async def test_what_was_staged_by_a_process_that_was_cut_is_tried_before_the_switch(place: Place) -> None:
    artifact, wanted = await asyncio.to_thread(place.build, "2", "#!/bin/sh\nexit 1\n")
    installer = await asyncio.to_thread(place.boot)
    await asyncio.to_thread(installer.slots.install, artifact, wanted)
    with pytest.raises(FailedError) as error:
        await place.installer(None).arm(wanted)
    assert error.value.code == "agent_unfit"
    assert place.camera.current == ""


async def test_the_new_version_is_told_nothing_that_is_meant_for_this_one(place: Place, monkeypatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nowhere")
    monkeypatch.setenv("WATCHDOG_USEC", "1")
    artifact, wanted = await asyncio.to_thread(
        place.build, "2", '#!/bin/sh\n[ -z "${{NOTIFY_SOCKET:-}}${{WATCHDOG_USEC:-}}" ]\n'
    )
    await install(place.installer(None), artifact, wanted)


async def test_without_the_loader_or_with_another_nothing_is_begun(place: Place) -> None:
    _, wanted = await asyncio.to_thread(place.build, "2")
    await place.installer(None).check(wanted)
    for started, code in ((None, "no_loader"), (Started(Path("/opt/other"), None), "loader_elsewhere")):
        installer = AgentInstaller(place.root, config_file=place.config_file, version="0.1", started=started)
        with pytest.raises(RefusedError) as error:
            await installer.check(wanted)
        assert error.value.code == code


def test_how_the_loader_says_what_it_started() -> None:
    assert started_by_loader({}) is None
    environ = {"CAMERA_AGENT_LOADER": "/l", "CAMERA_AGENT_ROOT": "/opt/x", "CAMERA_AGENT_SLOT": ""}
    assert started_by_loader(environ) == Started(Path("/opt/x"), None)
    assert started_by_loader(environ | {"CAMERA_AGENT_SLOT": "slots/a"}) == Started(Path("/opt/x"), "slots/a")


# ---- cuts: the process ends at each of its mutating calls, the loader starts what is there, the saved act is done again

COUNTED = ("mkdir", "rename", "symlink", "unlink", "fsync", "open", "link", "rmdir", "chmod", "fchmod", "write")


def killed_at(act: Callable[[], Awaitable[None]], number: int) -> bool:
    """Do `act` in a forked process that ends at its n-th mutating call; whether it did end there."""
    child = os.fork()
    if child == 0:
        calls = [0]

        def counting(real: Callable[..., object]) -> Callable[..., object]:
            def call(*arguments: object, **keywords: object) -> object:
                calls[0] += 1
                if calls[0] == number:
                    os._exit(9)
                return real(*arguments, **keywords)

            return call

        code = 1
        try:

            async def counted() -> None:
                for name in COUNTED:
                    setattr(os, name, counting(getattr(os, name)))
                await act()

            asyncio.run(counted())
            code = 0
        finally:
            os._exit(code)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ended in (0, 9)
    return ended == 9


class Course:
    """An update from its switch on, as the flow does it: `saved` is the state that is durable, its act is done again after a cut."""

    def __init__(self, folder: Path, *, passes: bool, from_slot: bool) -> None:
        self.place = Place(folder)
        first = self.place.run_first() if from_slot else None
        self.before = slot_of(first) if first else None
        artifact, self.wanted = self.place.build("2")
        asyncio.run(install(self.place.boot(), artifact, self.wanted))
        self.passes = passes
        self.saved = "ARMED"
        self.reason = ""
        self.process = self.place.boot()

    async def act(self) -> None:
        process, wanted = self.process, self.wanted
        if self.saved == "ARMED":
            await process.arm(wanted)
        elif self.saved == "COMMITTING":
            if await process.verify_running(wanted):
                await process.commit(wanted, self.before)
            else:
                await process.arm(wanted)
        elif self.saved == "ROLLING_BACK":
            await process.roll_back(self.before)
        elif self.saved == "GONE_BACK":
            await process.clean_up(frozenset({self.before} if self.before else ()))

    def advance(self) -> None:
        """After the act: the next state, with the restart that is part of it."""
        if self.saved == "ARMED":
            self.restart()
            new_runs = asyncio.run(self.process.verify_running(self.wanted))
            self.saved = "COMMITTING" if self.passes and new_runs else "ROLLING_BACK"
        elif self.saved == "COMMITTING":
            self.restart()
            if not (self.place.root / "trial").exists():
                self.saved = "COMMITTED"
        elif self.saved == "ROLLING_BACK":
            self.restart()
            self.saved = "GONE_BACK"
        else:
            self.saved = "ROLLED_BACK"

    def restart(self) -> None:
        self.process = self.place.boot()

    def to_the_end(self) -> None:
        for _ in range(12):
            if self.saved in ("COMMITTED", "ROLLED_BACK"):
                break
            asyncio.run(self.act())
            self.advance()
        self.check()

    def check_protected(self) -> None:
        """While it is not decided that the new version stays, it is never started without a trial."""
        if self.saved != "COMMITTING" and self.place.camera.current == slot_of(self.wanted):
            assert f"\nto={slot_of(self.wanted)}\n" in (self.place.root / "trial").read_text()

    def check(self) -> None:
        """What is saved is what runs, and nothing of the trial is left."""
        assert self.saved == ("COMMITTED" if self.passes else "ROLLED_BACK")
        right = slot_of(self.wanted) if self.passes else self.before
        for _ in range(5):
            assert asyncio.run(self.place.boot().running())[0] == right
        left = {path.name for path in self.place.root.iterdir() if not path.name.startswith(".")}
        assert left <= {"slots", "current"}, left
        slots = {path.name for path in (self.place.root / "slots").iterdir() if path.is_dir()}
        assert slots == {Path(name).name for name in (self.before, slot_of(self.wanted)) if name} - (
            set() if self.passes else {self.wanted.sha256}
        )


@pytest.mark.parametrize("passes", [True, False], ids=["kept", "taken back"])
@pytest.mark.parametrize("from_slot", [True, False], ids=["from a slot", "from the package"])
def test_killed_at_every_call(request: pytest.FixtureRequest, tmp_path: Path, passes: bool, from_slot: bool) -> None:
    """Each act is cut at each of its calls; further starts by power cuts, up to those that make the loader go back."""
    every = request.config.getoption("--exhaustive", default=False)
    points = 0
    for cut_in in ["ARMED", "COMMITTING"] if passes else ["ARMED", "ROLLING_BACK", "GONE_BACK"]:
        course = Course(tmp_path / cut_in, passes=passes, from_slot=from_slot)
        while course.saved != cut_in:
            asyncio.run(course.act())
            course.advance()
        prepared, process = tmp_path / f"{cut_in}-prepared", course.process
        shutil.copytree(tmp_path / cut_in, prepared, symlinks=True)
        for number in itertools.count(1):
            for more_starts in (0, 1, 2, 3) if every else (3 * (number % 2),):
                shutil.rmtree(tmp_path / cut_in)
                shutil.copytree(prepared, tmp_path / cut_in, symlinks=True)
                course.saved, course.process = cut_in, process
                cut = killed_at(course.act, number)
                course.check_protected()
                for _ in range(more_starts + 1):
                    course.restart()
                course.to_the_end()
                points += 1
            if not cut:
                break
    assert points > 20
    print(f"killed at {points} calls, and started again")


# ---- the real agent


def slot_of_this_checkout(folder: Path) -> None:
    """A version that is this checkout, with the Python and the libraries of the tests."""
    for name, module in (("camera-agent", "agent"), ("agentctl", "agent.ctl")):
        program = folder / "bin" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f'#!/bin/sh\nPYTHONPATH={PROJECT} exec {sys.executable} -m {module} "$@"\n')
        program.chmod(0o755)


async def test_the_agent_starts_itself_again_by_the_loader(tmp_path: Path, monkeypatch) -> None:
    """With the same process id, its arguments, and the version that `current` leads to by then."""
    root, new = tmp_path / "opt", tmp_path / "opt" / "slots" / ("b" * 64)
    slot_of_this_checkout(tmp_path / "packaged")
    slot_of_this_checkout(new)
    monkeypatch.setenv("CAMERA_AGENT_LOADER", str(LOADER))
    monkeypatch.setenv("CAMERA_AGENT_ROOT", str(root))
    monkeypatch.setenv("CAMERA_AGENT_FALLBACK", str(tmp_path / "packaged"))
    async with Cloud("cam-1") as cloud, AgentProcess(tmp_path / "agent", cloud.port, "cam-1") as agent:
        await agent.start()
        await agent.online()
        pid = agent.pid
        assert "CAMERA_AGENT_SLOT" not in environment_of(pid)
        (root / "trial").write_text(f"from=\nto=slots/{new.name}\nstarts=0\n")
        (root / "current").symlink_to(f"slots/{new.name}")
        cloud.jobs.create("again", {"version": "1.0", "operation": "restart"})
        assert (await cloud.jobs.ended("again")).status == "SUCCEEDED"
        assert agent.running
        assert agent.pid == pid
        assert environment_of(pid)["CAMERA_AGENT_SLOT"] == f"slots/{new.name}"
        assert (root / "trial").read_text().endswith("starts=1\n")
        await agent.online()
        await agent.stop()


def environment_of(pid: int) -> dict[str, str]:
    entries = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


async def test_a_slot_of_make_agent_slot_is_installed_and_answers(tmp_path: Path) -> None:
    artifact = tmp_path / "slot.tar.gz"
    await asyncio.to_thread(
        subprocess.run, [PROJECT / "scripts" / "make-agent-slot", "--without-systemd", artifact], check=True
    )
    with tempfile.TemporaryDirectory(prefix="slot-") as short:
        folder = Path(short)
        config = folder / "agent.toml"
        config.write_text(
            f'thing_name = "cam-1"\n[paths]\nstate_dir = "{folder / "state"}"\nruntime_dir = "{folder / "run"}"\n'
        )
        (folder / "run").mkdir()
        root = folder / "opt"
        wanted = await asyncio.to_thread(described, artifact, version="0.1.0")
        installer = AgentInstaller(root, config_file=config, version="0", started=Started(root, None))
        await install(installer, artifact, wanted)
        await installer.arm(wanted)
        process = await asyncio.create_subprocess_exec(
            *(LOADER, "run", "--config", config),
            env={"PATH": os.environ["PATH"], "CAMERA_AGENT_ROOT": str(root), "CAMERA_AGENT_FALLBACK": "/nowhere"},
            cwd="/",
        )
        try:
            async with asyncio.timeout(60):
                while (status := await ask(root / "current" / "bin" / "agentctl", folder)) is None:
                    await asyncio.sleep(0.1)
            assert status["agent"]["version"] == "0.1.0"
            slot = environment_of(process.pid)["CAMERA_AGENT_SLOT"]
            started = AgentInstaller(root, config_file=config, version="0.1.0", started=Started(root, slot))
            assert await started.verify_running(wanted)
            await started.commit(wanted, None)
        finally:
            process.terminate()
            assert await process.wait() == 0


async def ask(agentctl: Path, folder: Path) -> dict | None:
    """`agentctl status`, None while nobody answers."""
    process = await asyncio.create_subprocess_exec(
        *(agentctl, "status", "--json"),
        env={"PATH": os.environ["PATH"], "AGENTCTL_SOCKET": str(folder / "run" / "api.sock")},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    out, _ = await process.communicate()
    with contextlib.suppress(ValueError):
        return json.loads(out) if process.returncode == 0 else None
    return None
