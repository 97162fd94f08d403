"""Root's own program for Debian packages: what it does for the agent, and what it does not believe."""

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent.errors import FailedError
from agent.updates import privileged
from agent.updates.installers import deb as deb_module
from agent.updates.installers.deb import Deb, ThroughUnit
from agent.updates.installers.deb_store import open_plain
from agent.updates.installers.deb_work import check_believed
from tests.debs import (
    PACKAGE,
    Camera,
    needs_dpkg,
    refused,
    state_of,
)
from tests.fakes_updates import STRANGER, signed_manifest

pytestmark = needs_dpkg


PROJECT = Path(__file__).resolve().parents[2]


class Machine(Camera):
    """A camera with agent.toml, whose root part is the real program in a process of its own."""

    def __init__(self, home):
        super().__init__(home)
        self.state_dir, self.results = home / "agent", home / "results"
        self.state_dir.mkdir(exist_ok=True)
        self.config = home / "agent.toml"
        self.config.write_text(
            f'thing_name = "cam"\n[paths]\nstate_dir = "{self.state_dir}"\n[updates]\nkeys_dir = "{self.keys}"\n'
            f'[updates.targets.pipeline]\ninstaller = "deb"\npackage = "{PACKAGE}"\n'
            '[updates.targets.pro-gram]\ninstaller = "app"\nroot = "/opt/x"\n'
        )
        self.config.chmod(0o644)
        self.units = ProcessUnits(self)
        self.deb = Deb(
            "pipeline",
            PACKAGE,
            ThroughUnit(self.units, self.state_dir, self.results),
            store=self.store,
            dpkg=self.dpkg,
        )

    def command(self, request):
        return [
            sys.executable,
            "-m",
            "agent.updates.privileged",
            f"--config={self.config}",
            f"--store={self.home / 'store'}",
            f"--results={self.results}",
            f"--root={self.root}",
            request,
        ]

    def ask(self, verb, request, target="pipeline", number=1):
        """The exit status and the result of one request, the agent's file being `request`."""
        folder = self.state_dir / privileged.REQUESTS
        folder.mkdir(exist_ok=True)
        name = f"{number:016x}"
        if isinstance(request, dict):
            (folder / f"{name}.json").write_text(json.dumps(request))
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = privileged.main(self.command(f"{verb}_{name}_{target}")[3:])
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code, privileged.read_result(self.results / f"{name}.json")


class ProcessUnits:
    """systemd, as far as starting camera-agent-deb@.service goes: its program is started as the unit's ExecStart would."""

    def __init__(self, machine):
        self.machine = machine
        self.started = []
        self.fails = None

    async def restart(self, unit, *, timeout_s=0):
        request = re.fullmatch(r"camera-agent-deb@(.*)\.service", unit)[1]
        self.started.append(request)
        if self.fails:
            raise self.fails
        process = await asyncio.create_subprocess_exec(
            *self.machine.command(request), cwd=PROJECT, stderr=asyncio.subprocess.PIPE
        )
        _, said = await process.communicate()
        if process.returncode:
            raise FailedError("unit_failed", said.decode()[-500:])

    async def state(self, unit):
        raise FailedError("unit_not_found", unit)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "machine")


async def test_through_a_unit_of_roots_own(machine):
    one, two = machine.offer("1.0"), machine.offer("2.0")
    await machine.bring(one)
    before = await machine.bring(two, commit=False)
    await machine.deb.roll_back(before)
    assert machine.has("1.0")
    assert [request.split("_")[0] for request in machine.units.started] == [
        "keep", "install", "commit", "keep", "install", "restore",
    ]  # fmt: skip
    rules = (PROJECT / "systemd/52-camera-agent-deb.rules").read_text()
    allowed = re.compile(re.search(r"/(\^.*\$)/\.test", rules)[1])
    assert all(allowed.match(f"camera-agent-deb@{request}.service") for request in machine.units.started)
    assert list((machine.state_dir / privileged.REQUESTS).iterdir()) == []
    with refused("not_kept"):
        await machine.deb.roll_back(f"{PACKAGE}=0.1")
    with refused("not_kept"):
        await machine.deb.roll_back("openssh-server=1.0")


async def test_a_unit_that_may_not_be_started_or_leaves_no_result(machine, monkeypatch):
    one = machine.offer("1.0")
    machine.units.fails = FailedError("permission", "no")
    with pytest.raises(FailedError) as error:
        await machine.stage(one)
    assert error.value.code == "permission"
    assert "52-camera-agent-deb.rules" in error.value.hint
    machine.units.fails = FailedError("unit_failed", "it was killed")
    with pytest.raises(FailedError) as error:
        await machine.stage(one)
    assert error.value.code == "deb_no_result"
    assert "it was killed" in error.value.message
    monkeypatch.setattr(deb_module, "POLL_S", 0)
    looks = []

    async def still_at_it(unit):
        """D-Bus was lost; the unit goes on, and comes to its end while it is watched."""
        looks.append(unit)
        if len(looks) == 3:
            machine.units.fails = None
            with contextlib.suppress(FailedError):
                await machine.units.restart(unit)
        return SimpleNamespace(active="activating")

    machine.units.state = still_at_it
    machine.units.fails = FailedError("systemd_unavailable", "the connection to D-Bus was lost")
    await machine.stage(one)
    assert await machine.deb.probe(one.manifest) == "staged"
    assert len(looks) == 3


def test_requests_that_root_does_not_follow(machine):
    one = machine.offer("1.0")
    good = {"envelope": one.envelope, "artifact": str(one.artifact), "sha256": one.manifest.sha256}
    folder = machine.state_dir / privileged.REQUESTS
    folder.mkdir()
    tried = 0

    def no(code, verb="keep", request=good, target="pipeline"):
        nonlocal tried
        tried += 1
        status, result = machine.ask(verb, request, target, tried)
        assert (status, result["code"]) == ({"refused": 2, "failed": 1}[result["status"]], code), result
        return result["message"]

    no("unknown_target", target="other")
    no("unknown_target", target="pro-gram")
    no("wrong_target", request={**good, "envelope": signed_manifest(target="pipeline", installer="app")})
    no("signature_unknown", request={**good, "envelope": machine.offer("1.0", STRANGER, deb=one.artifact).envelope})
    no("manifest_malformed", request={})
    no("not_staged", verb="install")
    no("not_staged", verb="commit")
    no("not_kept", verb="restore", request={"version": "1.0"})
    secret_folder = machine.home / "folder"
    (secret_folder / "there").mkdir(parents=True)
    (machine.home / "loop").symlink_to("loop")
    places = ("/etc/nothing", "relative", "/dev/zero", "/dev/tty", "a\0b", "\ud800", "x" * 5000)
    places += tuple(str(machine.home / name) for name in ("folder/there", "folder/gone", "loop", "loop/x"))
    assert len({no("artifact_refused", request={**good, "artifact": place}) for place in places}) == 1
    secret = machine.home / "secret"
    secret.write_text('{"top": secret')
    (folder / f"{tried + 1:016x}.json").symlink_to(secret)
    no("artifact_refused", request=None)
    (folder / f"{tried + 1:016x}.json").write_text(secret.read_text())
    assert "secret" not in no("request_malformed", request=None)
    (folder / f"{tried + 1:016x}.json").write_text("[" * 100_000)
    no("request_malformed", request=None)
    (folder / f"{tried + 1:016x}.json").write_bytes(b"x" * 300_000)
    no("request_malformed", request=None)
    no("artifact_refused", request=None)
    for mode, place in ((0o666, machine.config), (0o777, machine.home)):
        before = place.stat().st_mode
        place.chmod(mode)
        no("not_trusted")
        place.chmod(before)
    machine.config.write_text("nonsense = 1")
    no("settings_invalid")
    print(f"{tried} requests tried")
    for words in ("remove_0000000000000001_pipeline", "keep_1_pipeline", "keep_0000000000000001_../x", "--help_", ""):
        try:
            assert privileged.main(machine.command(words)[3:]) == 2
        except SystemExit as error:
            assert error.code == 2
    assert state_of(machine.root) == ""


def test_what_is_not_plain_is_not_even_opened(machine, monkeypatch):
    """Opening a device or a pipe does something by itself."""
    pipe = machine.home / "pipe"
    os.mkfifo(pipe)
    opened = []
    real = os.open

    def watched(path, flags, *rest, **more):
        opened.append((str(path), flags))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", watched)
    with refused("artifact_refused"), open_plain(pipe, frozenset({os.geteuid()})):
        pass
    assert [flags & os.O_PATH for _, flags in opened] == [os.O_PATH]


def test_only_the_newest_results_stay(machine):
    machine.results.mkdir()
    for number in range(100):
        path = machine.results / f"{number + 1000:016x}.json"
        path.write_text("{}")
        os.utime(path, (path.stat().st_mtime - 1000 + number,) * 2)
    machine.ask("commit", {}, number=1)
    left = sorted(int(path.stem, 16) for path in machine.results.glob("*.json"))
    assert left == [1, *range(1000 + 100 - 63, 1100)]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: files of another user")
def test_only_files_of_the_agents_own_user_are_read_for_it(machine):
    """The agent can put any link or name into its request: root must not read others' files for it, nor believe its."""
    one = machine.offer("1.0")
    request = {"envelope": one.envelope, "artifact": str(one.artifact)}
    os.chown(machine.state_dir, 65534, 65534)
    assert machine.ask("keep", request, number=1)[1]["code"] == "artifact_refused"
    os.chown(machine.state_dir / privileged.REQUESTS / f"{1:016x}.json", 65534, 65534)
    assert machine.ask("keep", None, number=1)[1]["code"] == "artifact_refused"
    os.chown(one.artifact, 65534, 65534)
    assert machine.ask("keep", None, number=1)[0] == 0
    seed = machine.home / "store/seed"
    seed.mkdir()
    os.chown(seed, 65534, 65534)
    with refused("not_trusted"):
        check_believed(seed)
    with refused("not_trusted"):
        check_believed(seed / ".." / "seed")


@pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root: it becomes another user, to show that dpkg's tree does not need root"
)
def test_all_of_it_works_without_root(tmp_path):
    home = Path(tempfile.mkdtemp())
    os.chown(home, 65534, 65534)

    def act(camera):
        asyncio.run(camera.bring(camera.offer("1.0")))
        before = asyncio.run(camera.bring(camera.offer("2.0"), commit=False))
        asyncio.run(camera.deb.roll_back(before))
        assert camera.has("1.0")

    act(Camera(tmp_path / "camera"))  # also imports what the other user may not be able to read
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            act(Camera(home / "camera"))
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        shutil.rmtree(home)


def test_a_stop_of_the_unit_lets_dpkg_end(machine):
    one = machine.offer(
        "1.0",
        scripts={"postinst": "#!/bin/sh\ntouch $DPKG_ROOT/at-it\nwhile [ ! -e $DPKG_ROOT/go ]; do sleep 0.05; done\n"},
    )
    assert machine.ask("keep", {"envelope": one.envelope, "artifact": str(one.artifact)})[0] == 0
    folder = machine.state_dir / privileged.REQUESTS
    (folder / f"{2:016x}.json").write_text(json.dumps({"sha256": one.manifest.sha256}))
    with subprocess.Popen(
        machine.command(f"install_{2:016x}_pipeline"), cwd=PROJECT, stderr=subprocess.DEVNULL
    ) as process:
        while not (machine.root / "at-it").exists():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        (machine.root / "go").touch()
        assert process.wait(60) == 0
    assert machine.has("1.0")


def test_the_unit_and_the_rules(tmp_path):
    unit = (PROJECT / "systemd/camera-agent-deb@.service").read_text()
    assert "ExecStart=/usr/lib/camera-agent/bin/python -I -m agent.updates.privileged %i" in unit
    assert "RuntimeDirectory=" + privileged.RESULTS.name in unit
    assert "StateDirectory=camera-agent-debs" in unit
    rules = (PROJECT / "systemd/52-camera-agent-deb.rules").read_text()
    allowed = re.compile(re.search(r"/(\^.*\$)/\.test", rules)[1].replace("\\.", "[.]"))
    good = "camera-agent-deb@install_0123456789abcdef_pipeline.service"
    assert allowed.match(good)
    assert 'subject.user === "camera-agent"' in rules
    for bad in (
        "ssh.service",
        good.replace("install", "purge"),
        good.replace("abcdef", "abcde"),
        good.replace("pipeline", "../x"),
        good + "\n",
        "x" + good,
        good.replace(".service", ".timer"),
    ):
        assert not re.fullmatch(allowed.pattern.rstrip("$"), bad)
