"""systemd: messages to a real datagram socket, units over a real dbus-daemon with a stand-in for systemd behind it, and the shipped unit files."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated

import pytest
from dbus_fast import BusType, DBusError, PropertyAccess
from dbus_fast.aio import MessageBus
from dbus_fast.annotations import DBusBool, DBusObjectPath, DBusSignature, DBusStr, DBusUInt32
from dbus_fast.service import ServiceInterface, dbus_method, dbus_property, dbus_signal

from agent.errors import FailedError
from agent.host import systemd as systemd_module
from agent.host.systemd import Notifier, Units, UnitState, reboot

REPOSITORY = Path(__file__).parents[2]
UNIT_FILES = REPOSITORY / "systemd"

needs_systemd_python = pytest.mark.skipif(
    importlib.util.find_spec("systemd") is None or importlib.util.find_spec("systemd.daemon") is None,
    reason="systemd-python is not installed",
)


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"{tool} is not installed")


# ---- Notifier


@pytest.fixture
def notify_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "notify"))
        receiver.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield receiver


@needs_systemd_python
def test_messages_reach_the_service_manager(notify_socket: socket.socket) -> None:
    notifier = Notifier()
    assert notifier.active
    notifier.ready()
    assert notify_socket.recv(4096) == b"READY=1"
    notifier.status("connected,\n2 sources")
    assert notify_socket.recv(4096) == b"STATUS=connected, 2 sources"
    notifier.watchdog()
    assert notify_socket.recv(4096) == b"WATCHDOG=1"
    notifier.stopping()
    assert notify_socket.recv(4096) == b"STOPPING=1"


@needs_systemd_python
def test_a_vanished_service_manager_does_no_harm(notify_socket: socket.socket) -> None:
    notifier = Notifier()
    notify_socket.close()
    notifier.watchdog()


@needs_systemd_python
@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({"WATCHDOG_USEC": "60000000"}, 30.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())}, 30.0),
        ({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({}, None),
    ],
)
def test_watchdog_interval(environ: dict[str, str], interval: float | None) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/nowhere", **environ}).watchdog_interval_s == interval


def test_without_a_service_manager_every_message_does_nothing() -> None:
    notifier = Notifier({"WATCHDOG_USEC": "60000000"})
    assert not notifier.active
    assert notifier.watchdog_interval_s is None
    notifier.ready()
    notifier.status("connected")
    notifier.watchdog()
    notifier.stopping()


# ---- Units: the production code on a real bus, talking to a stand-in for systemd

JobResult = Annotated[tuple[int, str, str, str], DBusSignature("uoss")]

BUS_CONFIGURATION = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path={socket}</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_type="method_call"/><allow send_type="signal"/>
<allow send_type="method_return"/><allow send_type="error"/><allow receive_type="method_call"/>
<allow receive_type="method_return"/><allow receive_type="error"/><allow receive_type="signal"/></policy>
</busconfig>"""


class FakeUnit(ServiceInterface):
    def __init__(self, load: str, active: str, sub: str) -> None:
        super().__init__("org.freedesktop.systemd1.Unit")
        self.load, self.active, self.sub = load, active, sub

    @dbus_property(access=PropertyAccess.READ)
    def LoadState(self) -> DBusStr:
        return self.load

    @dbus_property(access=PropertyAccess.READ)
    def ActiveState(self) -> DBusStr:
        return self.active

    @dbus_property(access=PropertyAccess.READ)
    def SubState(self) -> DBusStr:
        return self.sub


class FakeService(ServiceInterface):
    def __init__(self, restarts: int) -> None:
        super().__init__("org.freedesktop.systemd1.Service")
        self.restarts = restarts

    @dbus_property(access=PropertyAccess.READ)
    def NRestarts(self) -> DBusUInt32:
        return self.restarts


UNITS = {
    "capture-pipeline.service": ("loaded", "active", "running"),
    "broken.service": ("loaded", "failed", "failed"),
    "data.mount": ("loaded", "active", "mounted"),
    "gone.service": ("not-found", "inactive", "dead"),
}


class FakeSystemd(ServiceInterface):
    """The manager object; like systemd it sends JobRemoved only to subscribers, and for every job on the machine."""

    def __init__(self) -> None:
        super().__init__("org.freedesktop.systemd1.Manager")
        self.subscribed = False
        self.calls: list[tuple[str, str]] = []
        self.results: dict[str, str | None] = {}
        self.jobs = 0

    @dbus_method()
    def Subscribe(self):
        self.subscribed = True

    @dbus_method()
    def LoadUnit(self, name: DBusStr) -> DBusObjectPath:
        return unit_path(name)

    @dbus_method()
    def RestartUnit(self, name: DBusStr, mode: DBusStr) -> DBusObjectPath:
        return self.begin("restart", name, mode)

    @dbus_method()
    def ReloadUnit(self, name: DBusStr, mode: DBusStr) -> DBusObjectPath:
        return self.begin("reload", name, mode)

    @dbus_signal()
    def JobRemoved(self, job: int, path: str, unit: str, result: str) -> JobResult:
        return (job, path, unit, result)

    def begin(self, verb: str, name: str, mode: str) -> str:
        assert mode == "replace"
        if name == "forbidden.service":
            raise DBusError("org.freedesktop.DBus.Error.InteractiveAuthorizationRequired", "authentication required")
        if name == "masked.service":
            raise DBusError("org.freedesktop.systemd1.UnitMasked", "Unit masked.service is masked.")
        if name not in UNITS or UNITS[name][0] == "not-found":
            raise DBusError("org.freedesktop.systemd1.NoSuchUnit", f"Unit {name} not found.")
        self.calls.append((verb, name))
        self.jobs += 1
        result = self.results.get(name, "done")
        if self.subscribed and result:
            loop = asyncio.get_running_loop()
            loop.call_soon(self.JobRemoved, 9000, job_path(9000), "other.service", "failed")
            loop.call_soon(self.JobRemoved, self.jobs, job_path(self.jobs), name, result)
        return job_path(self.jobs)


def unit_path(name: str) -> str:
    escaped = "".join(c if c.isascii() and c.isalnum() else f"_{ord(c):02x}" for c in name)
    return f"/org/freedesktop/systemd1/unit/{escaped}"


def job_path(number: int) -> str:
    return f"/org/freedesktop/systemd1/job/{number}"


def start_bus(folder: Path) -> subprocess.Popen[bytes]:
    configuration = folder / "bus.conf"
    configuration.write_text(BUS_CONFIGURATION.format(socket=folder / "bus.sock"))
    daemon = subprocess.Popen(
        ["dbus-daemon", f"--config-file={configuration}", "--nofork", "--nopidfile", "--print-address"],
        stdout=subprocess.PIPE,
    )
    assert daemon.stdout
    assert daemon.stdout.readline().startswith(b"unix:path=")
    return daemon


def stop_bus(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    daemon.wait(10)
    assert daemon.stdout
    daemon.stdout.close()


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    if shutil.which("dbus-daemon") is None:
        pytest.skip("dbus-daemon is not installed")
    daemon = start_bus(tmp_path)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/bus.sock")
    yield tmp_path
    stop_bus(daemon)


async def serve_systemd() -> tuple[MessageBus, FakeSystemd]:
    connection = await MessageBus(bus_type=BusType.SYSTEM).connect()
    systemd = FakeSystemd()
    connection.export("/org/freedesktop/systemd1", systemd)
    for name, (load, active, sub) in UNITS.items():
        connection.export(unit_path(name), FakeUnit(load, active, sub))
        if name.endswith(".service"):
            connection.export(unit_path(name), FakeService(3))
    await connection.request_name("org.freedesktop.systemd1")
    return connection, systemd


@pytest.fixture
async def systemd(bus: Path) -> AsyncIterator[FakeSystemd]:
    connection, systemd = await serve_systemd()
    yield systemd
    connection.disconnect()
    await connection.wait_for_disconnect()


@pytest.fixture
async def units() -> AsyncIterator[Units]:
    units = Units()
    yield units
    await units.close()


async def test_restart_and_reload_wait_for_the_result(systemd: FakeSystemd, units: Units) -> None:
    await units.restart("capture-pipeline.service")
    await units.reload("capture-pipeline.service")
    assert systemd.calls == [("restart", "capture-pipeline.service"), ("reload", "capture-pipeline.service")]


async def test_jobs_at_the_same_time_get_each_its_own_result(systemd: FakeSystemd, units: Units) -> None:
    systemd.results["broken.service"] = "failed"
    good, bad = await asyncio.gather(
        units.restart("capture-pipeline.service"), units.restart("broken.service"), return_exceptions=True
    )
    assert good is None
    assert isinstance(bad, FailedError)
    assert bad.code == "unit_failed"


@pytest.mark.parametrize("result", ["failed", "timeout", "canceled", "dependency", "skipped"])
async def test_a_job_that_is_not_done_is_an_error(systemd: FakeSystemd, units: Units, result: str) -> None:
    systemd.results["broken.service"] = result
    with pytest.raises(FailedError, match=f"restart of broken.service ended with result {result}") as error:
        await units.restart("broken.service")
    assert error.value.code == "unit_failed"
    assert "journalctl -u broken.service" in error.value.hint


async def test_a_job_without_end_is_given_up(systemd: FakeSystemd, units: Units) -> None:
    systemd.results["capture-pipeline.service"] = None
    with pytest.raises(FailedError, match=r"within 0\.2 s") as error:
        await units.restart("capture-pipeline.service", timeout_s=0.2)
    assert error.value.code == "unit_failed"


@pytest.mark.parametrize(
    ("unit", "code"),
    [
        ("nosuch.service", "unit_not_found"),
        ("forbidden.service", "permission"),
        ("masked.service", "unit_failed"),
    ],
)
async def test_refusals(systemd: FakeSystemd, units: Units, unit: str, code: str) -> None:
    with pytest.raises(FailedError) as error:
        await units.restart(unit)
    assert error.value.code == code
    assert unit in error.value.message


async def test_state(systemd: FakeSystemd, units: Units) -> None:
    assert await units.state("capture-pipeline.service") == UnitState("active", "running", 3)
    assert await units.state("broken.service") == UnitState("failed", "failed", 3)
    assert await units.state("data.mount") == UnitState("active", "mounted", 0)
    with pytest.raises(FailedError) as error:
        await units.state("gone.service")
    assert error.value.code == "unit_not_found"


async def test_no_systemd_on_the_bus(bus: Path, units: Units) -> None:
    with pytest.raises(FailedError) as error:
        await units.state("capture-pipeline.service")
    assert error.value.code == "systemd_unavailable"


async def test_no_bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: Units) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/nothing")
    with pytest.raises(FailedError) as error:
        await units.restart("capture-pipeline.service")
    assert error.value.code == "systemd_unavailable"


@needs("dbus-daemon")
async def test_a_lost_connection_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, units: Units) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/bus.sock")
    daemon = await asyncio.to_thread(start_bus, tmp_path)
    server, systemd = await serve_systemd()
    systemd.results["capture-pipeline.service"] = None
    waiting = asyncio.create_task(units.restart("capture-pipeline.service"))
    while not systemd.calls:
        await asyncio.sleep(0.01)
    await asyncio.to_thread(stop_bus, daemon)
    with pytest.raises(FailedError) as error:
        await waiting
    assert error.value.code == "systemd_unavailable"
    with pytest.raises(Exception):
        await server.wait_for_disconnect()

    daemon = await asyncio.to_thread(start_bus, tmp_path)
    server, systemd = await serve_systemd()
    await units.restart("capture-pipeline.service")
    assert systemd.calls == [("restart", "capture-pipeline.service")]
    await units.close()
    server.disconnect()
    await server.wait_for_disconnect()
    await asyncio.to_thread(stop_bus, daemon)


async def test_one_connection_serves_many_calls(systemd: FakeSystemd, units: Units) -> None:
    await units.state("capture-pipeline.service")
    first = units._bus
    await asyncio.gather(*(units.state("capture-pipeline.service") for _ in range(10)))
    assert units._bus is first


# ---- reboots: logind on the same bus, and a command instead


class FakeLogind(ServiceInterface):
    """logind's manager object; `answer` is how it answers a reboot."""

    def __init__(self) -> None:
        super().__init__("org.freedesktop.login1.Manager")
        self.calls: list[bool] = []
        self.error: DBusError | None = None

    @dbus_method()
    def Reboot(self, interactive: DBusBool):
        self.calls.append(interactive)
        if self.error:
            raise self.error


@pytest.fixture
async def logind(bus: Path) -> AsyncIterator[FakeLogind]:
    connection = await MessageBus(bus_type=BusType.SYSTEM).connect()
    logind = FakeLogind()
    connection.export("/org/freedesktop/login1", logind)
    await connection.request_name("org.freedesktop.login1")
    yield logind
    connection.disconnect()
    await connection.wait_for_disconnect()


async def test_logind_is_asked_for_a_reboot(logind: FakeLogind) -> None:
    await reboot()
    assert logind.calls == [False]


@pytest.mark.parametrize(
    "name",
    ["org.freedesktop.DBus.Error.AccessDenied", "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired", "a.b.c"],
)
async def test_a_reboot_that_logind_refuses(logind: FakeLogind, name: str) -> None:
    logind.error = DBusError(name, "not you")
    with pytest.raises(FailedError, match="not you") as error:
        await reboot()
    assert error.value.code == "reboot_failed"
    assert "polkit" in error.value.hint


@pytest.mark.parametrize("name", ["login1.OperationInProgress", "DBus.Error.NoReply", "DBus.Error.Disconnected"])
async def test_a_reboot_that_may_be_under_way_is_no_failure(logind: FakeLogind, name: str) -> None:
    logind.error = DBusError(f"org.freedesktop.{name}", "going down")
    await reboot()


async def test_no_answer_may_be_the_reboot(bus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody has logind's name and never answers; and the bus goes away before the answer."""
    monkeypatch.setattr(systemd_module, "REPLY_TIMEOUT_S", 1.0)
    connection = await MessageBus(bus_type=BusType.SYSTEM).connect()
    asked = asyncio.Event()

    def swallow(message: object) -> bool:
        if getattr(message, "member", "") == "Reboot":
            asked.set()
        return getattr(message, "member", "") == "Reboot"

    connection.add_message_handler(swallow)
    await connection.request_name("org.freedesktop.login1")
    await reboot()
    assert asked.is_set()
    asked.clear()
    monkeypatch.setattr(systemd_module, "REPLY_TIMEOUT_S", 60.0)
    task = asyncio.create_task(reboot())
    await asked.wait()
    connection.disconnect()
    await connection.wait_for_disconnect()
    await task


async def test_no_logind_on_the_bus(bus: Path) -> None:
    with pytest.raises(FailedError) as error:
        await reboot()
    assert error.value.code == "systemd_unavailable"
    assert "jobs.reboot" in error.value.hint


async def test_no_bus_for_a_reboot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/nothing")
    with pytest.raises(FailedError) as error:
        await reboot()
    assert error.value.code == "systemd_unavailable"


async def test_a_command_reboots_instead(bus: Path, tmp_path: Path) -> None:
    await reboot(["/bin/sh", "-c", f"echo down > {tmp_path}/asked"])
    assert (tmp_path / "asked").read_text() == "down\n"
    await reboot(["/bin/sh", "-c", "kill -TERM $$"])  # as the machine that goes down does
    for command, words in (
        (["/bin/sh", "-c", "echo no >&2; exit 4"], "exit status 4: no"),
        (["/no/such"], "No such file"),
    ):
        with pytest.raises(FailedError, match=words) as error:
            await reboot(command)
        assert (error.value.code, error.value.hint) == ("reboot_failed", "mend jobs.reboot")


RULES = """
const rules = [];
const polkit = {Result: {YES: "yes", NOT_HANDLED: "not handled"}, addRule: (rule) => rules.push(rule)};
%s
const judge = (id, user, details) =>
    rules.map((rule) => rule({id, lookup: (key) => details[key]}, {user})).find((said) => said !== "not handled") || "no";
for (const [id, user, details] of %s) console.log(judge(id, user, details));
"""


@needs("node")
def test_polkit_rules_allow_reboots_and_the_pipeline_to_the_agent_alone() -> None:
    restart = {"unit": "capture-pipeline.service", "verb": "restart"}
    manage, login = "org.freedesktop.systemd1.manage-units", "org.freedesktop.login1"
    cases = [
        (f"{login}.reboot", "camera-agent", {}, "yes"),
        (f"{login}.reboot-multiple-sessions", "camera-agent", {}, "yes"),
        (f"{login}.reboot-ignore-inhibit", "camera-agent", {}, "no"),
        (f"{login}.power-off", "camera-agent", {}, "no"),
        (f"{login}.reboot", "somebody", {}, "no"),
        (manage, "camera-agent", restart, "yes"),
        (manage, "camera-agent", {**restart, "verb": "kill"}, "no"),
        (manage, "camera-agent", {**restart, "unit": "ssh.service"}, "no"),
        (manage, "somebody", restart, "no"),
    ]
    script = RULES % ((UNIT_FILES / "50-camera-agent.rules").read_text(), json.dumps([case[:3] for case in cases]))
    result = subprocess.run(["node", "-e", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [case[3] for case in cases]


# ---- the shipped files, judged by systemd's own tools


def directives(file: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


@needs("systemd-analyze")
def test_unit_is_valid(tmp_path: Path) -> None:
    unit = tmp_path / "camera-agent.service"
    shipped = (UNIT_FILES / "camera-agent.service").read_text()
    unit.write_text(shipped.replace("/usr/libexec/camera-agent/camera-agent-loader", "/bin/true"))
    result = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


@needs("systemd-analyze")
def test_unit_is_hardened() -> None:
    result = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=20", UNIT_FILES / "camera-agent.service"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout


def test_unit_keeps_what_the_agent_needs() -> None:
    unit = directives(UNIT_FILES / "camera-agent.service")
    loader = "/usr/libexec/camera-agent/camera-agent-loader"
    assert unit["ExecStart"] == [f"{loader} run --config /etc/camera-agent/agent.toml"]
    assert unit["ExecStopPost"] == [f"-{loader} stopped"]
    assert unit["Restart"] == ["always"]
    assert unit["Type"] == ["notify"]
    assert unit["WatchdogSec"] == ["60"]
    # psutil reads /proc/stat; asking for the clock's state is denied by ProtectClock; status.json outlives a stop.
    assert "ProcSubset" not in unit
    assert "ProtectClock" not in unit
    assert unit["RuntimeDirectoryPreserve"] == ["yes"]
    # A limit that a crash loop reaches would leave the camera dead until somebody comes.
    loops = float(unit["StartLimitIntervalSec"][0]) / float(unit["RestartSec"][0])
    assert loops < float(unit["StartLimitBurst"][0])


@needs("systemd-sysusers")
@needs("systemd-tmpfiles")
@pytest.mark.skipif(os.geteuid() != 0, reason="making users and folders below another root needs root")
def test_users_and_folders(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    for tool, file in (("systemd-sysusers", "camera-agent.sysusers"), ("systemd-tmpfiles", "camera-agent.tmpfiles")):
        command = [tool, *(["--create"] if tool.endswith("tmpfiles") else []), f"--root={tmp_path}", UNIT_FILES / file]
        subprocess.run(command, check=True, capture_output=True)
    groups = dict(line.split(":", 1) for line in (tmp_path / "etc/group").read_text().splitlines())
    assert set(groups) == {"camera-agent", "camera-operators", "camera-admins"}
    assert groups["camera-operators"].endswith(":camera-agent")
    identity = (tmp_path / "var/lib/camera-agent/identity").stat()
    uid = int((tmp_path / "etc/passwd").read_text().split(":")[2])
    assert (identity.st_mode & 0o777, identity.st_uid) == (0o700, uid)
