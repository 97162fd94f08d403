"""The real agent as a process that a test starts, kills, starts again and asks; its folder outlives every one of its lives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from tests.faults.cloud import authority

PROJECT = Path(__file__).resolve().parents[2]
SOCKET_PATH_LIMIT = 107
STOP_LIMIT_S = 40.0
SELDOM_S = 2.0
MARK = "CAMERA_AGENT_TEST_FOLDER"
"""In the environment of the agent and of what it starts: whose they are."""


@dataclass(frozen=True)
class Said:
    """What `agentctl` answered."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        """Its standard output as JSON."""
        return json.loads(self.out)


class AgentProcess:
    """`async with AgentProcess(folder, cloud.port, "cam-1") as agent`, then `start`, `kill`, `start`, …

    `overrides` are tables of agent.toml whose keys add to or replace the ones written here: `telemetry={"interval_s": 5}`.
    The process is always ended on exit, and so are handlers that it left.
    """

    def __init__(self, folder: Path, cloud_port: int, thing: str, **overrides: Mapping[str, Any]) -> None:
        self.folder = folder
        self.thing = thing
        self.state_dir = folder / "state"
        self.runtime_dir = folder / "run"
        self.handler_dir = folder / "handlers"
        self.config_file = folder / "agent.toml"
        self.log = folder / "agent.log"
        self.starts = 0
        self._process: asyncio.subprocess.Process | None = None
        self._short: Path | None = None
        if len(os.fsencode(self.runtime_dir / "api.sock")) > SOCKET_PATH_LIMIT:
            self._short = self.runtime_dir = Path(tempfile.mkdtemp(prefix="camera-agent-"))
        for place in (folder, self.state_dir, self.runtime_dir):
            place.mkdir(parents=True, exist_ok=True)
        self.handler_dir.mkdir(exist_ok=True)
        self.handler_dir.chmod(0o755)
        pair = authority().client(thing)
        tables: dict[str, dict[str, Any]] = {
            "cloud": {
                "endpoint": "localhost",
                "port": cloud_port,
                "ca_file": str(authority().ca_file),
                "certificate_file": str(pair.certificate_file),
                "private_key_file": str(pair.private_key_file),
            },
            "paths": {"state_dir": str(self.state_dir), "runtime_dir": str(self.runtime_dir)},
            "jobs": {"handler_dir": str(self.handler_dir)},
            "telemetry": {"interval_s": 1},
        }
        for name, table in overrides.items():
            tables[name] = {**tables.get(name, {}), **table}
        self.config_file.write_text(_toml({"thing_name": thing, **tables}), encoding="utf-8")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.running:
            await self.kill()
        for process in await asyncio.to_thread(self.left_processes):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        if self._short:
            await asyncio.to_thread(shutil.rmtree, self._short, ignore_errors=True)

    @property
    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """Process id of the running agent."""
        assert self._process is not None
        return self._process.pid

    @property
    def socket(self) -> Path:
        """The local API."""
        return self.runtime_dir / "api.sock"

    def handler(self, name: str, script: str) -> None:
        """Install a handler; `script` with its first line. It gets the user as first argument, then the step's own."""
        path = self.handler_dir / name
        path.write_text(script, encoding="utf-8")
        path.chmod(0o755)

    async def start(self) -> None:
        """Start the agent; returns at once. It ends with this process at the latest."""
        assert not self.running
        command = [sys.executable, "-m", "agent", "run", "--config", str(self.config_file), "--log-format", "json"]
        if tied := shutil.which("setpriv"):
            command = [tied, "--pdeathsig", "KILL", *command]
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**_environment(), MARK: str(self.folder)},
                start_new_session=True,
            )
        self.starts += 1

    async def kill(self, *, group: bool = False) -> None:
        """SIGKILL, and reap it; with `group` its handlers too, as systemd does with all that is left of a unit."""
        process = self._process
        assert process is not None
        assert process.returncode is None, f"the agent ended by itself with {process.returncode}\n{self.tail()}"
        children: list[psutil.Process] = []
        if group:
            process.send_signal(signal.SIGSTOP)  # it starts nothing more while its children are counted
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        await process.wait()
        assert process.returncode == -signal.SIGKILL, self.tail()

    async def stop(self) -> None:
        """SIGTERM; the agent must end with 0."""
        process = self._process
        assert process is not None
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_LIMIT_S):
                code = await process.wait()
        except TimeoutError:
            raise AssertionError(f"the agent does not stop\n{self.tail()}") from None
        assert code == 0, f"the agent ended with {code}\n{self.tail()}"

    async def wait(self) -> int:
        """Wait for the agent to end by itself; its exit status."""
        assert self._process is not None
        return await self._process.wait()

    async def ctl(self, *argv: str) -> Said:
        """Run `agentctl` with these arguments against this agent."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "agent.ctl", *argv),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**_environment(), "AGENTCTL_SOCKET": str(self.socket)},
        )
        out, err = await process.communicate()
        return Said(process.returncode or 0, out.decode(), err.decode())

    async def online(self, timeout_s: float = 60) -> None:
        """Wait until the agent says that it is connected; agentctl is asked when the log says so, and seldom before: it costs more."""
        last, asked = Said(3, "", ""), time.monotonic()
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if await asyncio.to_thread(self._logs_connected) or time.monotonic() - asked >= SELDOM_S:
                        last, asked = await self.ctl("status", "--json"), time.monotonic()
                        if last.code == 0 and last.json()["cloud"]["state"] == "connected":
                            return
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"not connected after {timeout_s:g} s: {last}\n{self.tail()}") from None

    def _logs_connected(self) -> bool:
        words = [line.get("event") for line in self.lines()] if self.log.exists() else []
        return [word for word in words if word in ("started", "connected", "off-line")][-1:] == ["connected"]

    def journal(self) -> dict[tuple[str, int], dict[str, Any]]:
        """The job records in state.db by job id and execution number. Blocks.

        What a killed agent left is read from a copy: taking up its state again is the next one's work.
        """
        database = self.state_dir / "state.db"
        if self.running:
            return _records(database)
        with tempfile.TemporaryDirectory() as folder:
            for suffix in ("", "-wal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(f"{database}{suffix}", f"{folder}/state.db{suffix}")
            return _records(Path(folder) / "state.db")

    def freeze(self) -> None:
        """SIGSTOP: the process stands still until `thaw`, or is killed."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    async def logs(self, event: str, count: int = 1, timeout_s: float = 60) -> dict[str, Any]:
        """Wait until the log, that of all lives, has `count` lines of this event; the last of them."""
        until = time.monotonic() + timeout_s
        while len(found := await asyncio.to_thread(self.logged, event)) < count:
            assert time.monotonic() < until, f"{event!r} was logged {len(found)} times, not {count}\n{self.tail()}"
            await asyncio.sleep(0.05)
        return found[count - 1]

    def logged(self, event: str) -> list[dict[str, Any]]:
        """The log's lines of this event. Blocks."""
        return [line for line in self.lines() if line.get("event") == event]

    def lines(self) -> list[dict[str, Any]]:
        """The log's lines that are JSON. Blocks."""
        found = []
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]

    def tail(self, lines: int = 40) -> str:
        """The end of the log. Blocks."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else "(no log)"
        return "\n".join(text.splitlines()[-lines:])

    def left_processes(self) -> list[psutil.Process]:
        """This agent's handlers that still live, and what they started. Blocks."""
        handlers, mark, found = str(self.handler_dir) + os.sep, str(self.folder), []
        own = self._process.pid if self._process is not None and self.running else None
        for process in psutil.process_iter(["cmdline", "environ", "status"]):
            command, environment = process.info["cmdline"] or [], process.info["environ"] or {}
            ours = environment.get(MARK) == mark or any(word.startswith(handlers) for word in command)
            if ours and process.pid != own and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    async def none_left(self, timeout_s: float) -> list[str]:
        """Wait until no handler lives; the command lines of those that do after `timeout_s`."""
        until = time.monotonic() + timeout_s
        while (left := await asyncio.to_thread(self.left_processes)) and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return [" ".join(process.info["cmdline"]) for process in left]


def _records(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    if not path.exists():
        return {}
    with contextlib.closing(sqlite3.connect(path)) as database:
        try:
            rows = database.execute("SELECT job_id, execution_number, record FROM jobs").fetchall()
        except sqlite3.OperationalError:  # killed before the tables were made
            return {}
    return {(job_id, number): json.loads(record) for job_id, number, record in rows}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": "1"}


def _toml(document: Mapping[str, Any]) -> str:
    """TOML of nested tables; strings, numbers, booleans and lists are written alike in JSON."""
    plain = [f"{key} = {json.dumps(value)}" for key, value in document.items() if not isinstance(value, Mapping)]
    lines = ["\n".join(plain)]

    def table(path: str, values: Mapping[str, Any]) -> None:
        own = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, Mapping)]
        lines.append("\n".join([f"[{path}]", *own]))
        for key, value in values.items():
            if isinstance(value, Mapping):
                table(f"{path}.{key}", value)

    for key, value in document.items():
        if isinstance(value, Mapping):
            table(key, value)
    return "\n\n".join(lines) + "\n"
