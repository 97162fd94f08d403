"""The real agent as camera-agent.service: the loader starts it, it says READY, what ends is told to the loader and started again.

Versions are slots of a few lines that run this checkout under another version number, whole or broken in a known way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.fakes_updates import archive, member
from tests.faults.agent_process import MARK, PROJECT, AgentProcess, _environment

LOADER = PROJECT / "packaging" / "loader" / "camera-agent-loader"
PACKAGED = "0.1.0"

PROGRAM = """#!/bin/sh
case "$1" in
run)
  echo "{version}" >>"{lives}"
  {run}
  ;;
check-config)
  {check}
  ;;
esac
PYTHONPATH={project} exec {python} -c {code} "$@"
"""
CLOCK_SET = """
from agent.maintenance import Maintenance
Maintenance.__init__.__kwdefaults__["clock_believed"] = lambda: True
"""
CODE = """import os, sys
import agent.__main__ as program
program.VERSION = "{version}"
{broken}
sys.exit(program.main())
"""
AFTER_READY = """
from agent.host.systemd import Notifier
ready = Notifier.ready
Notifier.ready = lambda self: (ready(self), os._exit(1))
"""
NOT_ONLINE = """
from agent import settings_file
read = settings_file.read_site
def wrong(path):
    site = read(path)
    document = {**site.document, "cloud": {**site.document["cloud"], "port": 9}}
    return settings_file.Site(site.text, document, settings_file.validate(document, str(path)))
settings_file.read_site = wrong
"""
VERSIONS: Mapping[str, Mapping[str, str]] = {
    "good": {},
    "believes the clock": {"broken": CLOCK_SET},
    "exits at run": {"run": "exit 1"},
    "exits after READY": {"broken": AFTER_READY},
    "hangs before READY": {"run": "exec sleep 600"},
    "never gets on-line": {"broken": NOT_ONLINE},
    "refuses agent.toml": {"check": 'echo "unknown key" >&2; exit 2', "run": "exit 2"},
}
"""How a version behaves: shell before the agent, or Python that breaks it."""


class AgentUnit(AgentProcess):
    """`start` begins the service, which from then on starts again whatever ends, until `stop`; `pid` is the main process's.

    The packaged version behaves as `packaged_as`. The target `agent` is in agent.toml. The limits of time that systemd has are up to the test: `times_out`.
    """

    packaged_as = "good"

    def __init__(self, folder: Path, cloud_port: int, thing: str, **overrides: Mapping[str, Any]) -> None:
        self.root = folder / "opt"
        self.packaged = folder / "packaged"
        self._lives = folder / "lives"
        updates = dict(overrides.pop("updates", {}))
        targets = {"agent": {"installer": "agent", "root": str(self.root)}, **updates.pop("targets", {})}
        super().__init__(folder, cloud_port, thing, updates={**updates, "targets": targets}, **overrides)
        self.results: list[str] = []
        """How each life ended, as SERVICE_RESULT."""
        self._result = ""
        self._ready = False
        self._stopping = False
        self._service: asyncio.Task[None] | None = None
        self._said: socket.socket | None = None
        self.root.mkdir(parents=True)
        program = self.packaged / "bin" / "camera-agent"
        program.parent.mkdir(parents=True)
        program.write_bytes(self._program(PACKAGED, self.packaged_as))
        program.chmod(0o755)

    async def __aexit__(self, *error: object) -> None:
        if self._service:
            self._service.cancel()
            await asyncio.wait({self._service})
        await super().__aexit__(*error)
        self._close()

    def slot(self, version: str, behaviour: str = "good") -> Path:
        """An artifact of the agent. Blocks."""
        program = member("bin/camera-agent", self._program(version, behaviour), mode=0o755)
        return archive(self.folder / f"camera-agent-{version}.tar.gz", program)

    def lives(self) -> list[str]:
        """The versions that were started, in order; one that was not even executed is none."""
        return self._lives.read_text().split() if self._lives.exists() else []

    @property
    def current(self) -> str:
        """What `current` leads to; empty: the packaged version."""
        link = self.root / "current"
        return str(link.readlink()) if link.is_symlink() else ""

    async def start(self) -> None:
        """Start the service; returns when its first process is there."""
        assert not self.running
        self._stopping = False
        address = self.runtime_dir / "notify"
        address.unlink(missing_ok=True)
        self._said = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._said.bind(str(address))
        self._said.setblocking(False)
        asyncio.get_running_loop().add_reader(self._said, self._hear)
        await self._spawn()
        self._service = asyncio.create_task(self._serve())

    async def stop(self) -> None:
        """SIGTERM as `systemctl stop`; the agent must end with 0."""
        self._stopping = True
        await super().stop()
        if self._service:
            await self._service
        self._close()

    async def times_out(self) -> None:
        """What systemd does when TimeoutStartSec is over, or after READY the time of the watchdog."""
        process = self._process
        assert process is not None
        self._result = "watchdog" if self._ready else "timeout"
        process.send_signal(signal.SIGABRT)
        await process.wait()

    async def _serve(self) -> None:
        while True:
            assert self._process is not None
            code = await self._process.wait()
            self._hear()
            if self._stopping:
                return
            result, how = _service_result(code, ready=self._ready)
            self.results.append(self._result or result)
            environment = {**self._environment(), "SERVICE_RESULT": self.results[-1], **how}
            stopped = await asyncio.create_subprocess_exec(LOADER, "stopped", env=environment)
            assert await stopped.wait() == 0
            await self._spawn()

    async def _spawn(self) -> None:
        self._ready, self._result = False, ""
        tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(*tied, LOADER, "run", "--config", str(self.config_file), "--log-format", "json"),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(),
                start_new_session=True,
            )
        self.starts += 1

    def _hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._said:
                self._ready |= b"READY=1" in self._said.recv(4096)

    def _close(self) -> None:
        if self._said:
            asyncio.get_running_loop().remove_reader(self._said)
            self._said.close()
            self._said = None

    def _environment(self) -> dict[str, str]:
        return {
            **_environment(),
            MARK: str(self.folder),
            "NOTIFY_SOCKET": str(self.runtime_dir / "notify"),
            "RUNTIME_DIRECTORY": str(self.runtime_dir),
            "CAMERA_AGENT_ROOT": str(self.root),
            "CAMERA_AGENT_FALLBACK": str(self.packaged),
        }

    def _program(self, version: str, behaviour: str) -> bytes:
        broken = VERSIONS[behaviour]
        code = CODE.format(version=version, broken=broken.get("broken", ""))
        text = PROGRAM.format(
            version=version,
            lives=self._lives,
            run=broken.get("run", ":"),
            check=broken.get("check", ":"),
            project=shlex.quote(str(PROJECT)),
            python=shlex.quote(sys.executable),
            code=shlex.quote(code),
        )
        return text.encode()


def _service_result(code: int, *, ready: bool) -> tuple[str, dict[str, str]]:
    """SERVICE_RESULT of a unit with Type=notify, and how its main process ended."""
    if code < 0:
        return "signal", {"EXIT_CODE": "killed", "EXIT_STATUS": signal.Signals(-code).name.removeprefix("SIG")}
    how = {"EXIT_CODE": "exited", "EXIT_STATUS": os.fsdecode(str(code))}
    if code:
        return "exit-code", how
    return ("success" if ready else "protocol"), how
