"""The whole sandbox as one thing: AWS, a proxy before its broker, cameras and their agents, started in order and all stopped."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent.sandbox import seed
from agent.sandbox.aws import PACKAGE_PARENT, Aws
from agent.sandbox.camera import Camera, make_camera
from agent.sandbox.proxy import Proxy

SIGN_UPDATE = PACKAGE_PARENT / "scripts" / "sign-update"
AGENT_STOP_LIMIT_S = 20.0


@dataclass
class Sandbox:
    """What runs. `keys` is the folder of the keys that updates are signed with."""

    folder: Path
    aws: Aws
    fleet: seed.Fleet
    proxy: Proxy
    keys: Path
    cameras: list[Camera] = field(default_factory=list)
    agents: dict[str, asyncio.subprocess.Process] = field(default_factory=dict)

    async def start_agent(self, camera: Camera) -> None:
        """Start the camera's agent; it logs to `agent.log` in the camera's folder and ends when this process does."""
        command = [sys.executable, "-m", "agent", "run", "--config", str(camera.config_file)]
        if tied := shutil.which("setpriv"):
            command = [tied, "--pdeathsig", "TERM", *command]
        with await asyncio.to_thread((camera.folder / "agent.log").open, "ab") as log:
            self.agents[camera.thing] = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=_environment(),
                start_new_session=True,
            )

    async def stop_agent(self, camera: Camera, how: signal.Signals = signal.SIGTERM) -> int | None:
        """Send it a signal and wait for its end; returns its exit status, None when it did not run."""
        process = self.agents.pop(camera.thing, None)
        if process is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(how)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(AGENT_STOP_LIMIT_S):
                return await process.wait()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        return await process.wait()

    async def add_camera(self, serial: str, **options: Any) -> Camera:
        """One more camera with a running pipeline, behind the proxy; `options` are those of `make_camera`."""
        making = asyncio.create_task(
            asyncio.to_thread(
                make_camera,
                self.folder / f"cam-{serial}",
                self.aws,
                self.fleet,
                serial=serial,
                mqtt_port=self.proxy.port,
                **options,
            )
        )
        try:
            camera = await asyncio.shield(making)
        except asyncio.CancelledError:
            await asyncio.to_thread((await making).close)  # the thread goes on; its pipeline must not outlive us
            raise
        self.cameras.append(camera)
        root = self.keys / "root.json"
        if await asyncio.to_thread(root.exists):
            await asyncio.to_thread(camera.use_keys, root)
        return camera

    async def close(self) -> None:
        """Stop agents and pipelines."""
        await asyncio.gather(*(self.stop_agent(camera) for camera in self.cameras))
        for camera in self.cameras:
            await asyncio.to_thread(camera.close)


@contextlib.asynccontextmanager
async def running(
    folder: Path, *, cameras: int = 1, agents: bool = True, settings: Mapping[str, Mapping[str, Any]] | None = None
) -> AsyncIterator[Sandbox]:
    """A sandbox in the empty `folder`: cameras `cam-0001`, … with pipelines, and with their agents unless told not to.

    `settings` adds to every camera's agent.toml. Everything is stopped at the end, also when something fails.
    """
    async with Aws(folder / "aws") as aws, Proxy(aws.mqtt_port) as proxy:
        fleet = await asyncio.to_thread(seed.seed, aws)
        sandbox = Sandbox(folder, aws, fleet, proxy, folder / "signing-keys")
        try:
            await asyncio.to_thread(make_keys, sandbox.keys)
            for number in range(1, cameras + 1):
                camera = await sandbox.add_camera(f"{number:04d}", settings=settings)
                if agents:
                    await sandbox.start_agent(camera)
            yield sandbox
        finally:
            await asyncio.shield(sandbox.close())


def make_keys(folder: Path) -> None:
    """Make the keys that updates are signed with, and the `root.json` that cameras trust. Blocks."""
    _sign_update("keys", str(folder))


def update_document(
    sandbox: Sandbox,
    artifact: Path,
    version: str,
    *,
    counter: int = 1,
    stable_for_s: float = 20,
    deadline_s: float = 120,
    target: str = "pipeline",
) -> dict[str, Any]:
    """Upload an artifact and sign it: the document of the job that updates cameras to it. Blocks."""
    url = seed.presigned(seed.upload(sandbox.aws, artifact))
    printed = _sign_update(
        *("job", "--keys", str(sandbox.keys), "--target", target, "--installer", "app", "--name", "capture-pipeline"),
        *("--version", version, "--counter", str(counter), "--stable-for", f"{stable_for_s:g}"),
        *("--deadline", f"{deadline_s:g}", "--url", url, str(artifact)),
    )
    document: dict[str, Any] = json.loads(printed)
    return document


def _sign_update(*arguments: str) -> str:
    done = subprocess.run(
        [str(SIGN_UPDATE), *arguments], env=_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"sign-update {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def _environment() -> dict[str, str]:
    """Ours, with this Python first and this package to be found."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(PACKAGE_PARENT)}
