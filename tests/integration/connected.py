"""Sessions for tests: against the scripted server or a local AWS, and waiting until they are where they should be."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.cloud.offline import Link, Pace
from agent.cloud.session import Session
from agent.sandbox import seed
from agent.sandbox.aws import Aws
from agent.settings import Cloud
from tests.certificates import Pair

QUICK = Pace(shortest_s=0.05, longest_s=0.1, refused_s=0.2, taken_over_s=600, settled_s=30, between_connects_s=0)


def make_session(client_id: str, cloud: Cloud, pair: Pair, pace: Pace = QUICK, **options) -> Session:
    return Session(
        client_id=client_id,
        cloud=cloud,
        certificate_file=pair.certificate_file,
        private_key_file=pair.private_key_file,
        pace=pace,
        **options,
    )


@contextlib.asynccontextmanager
async def running(session: Session, *, connected: bool = True) -> AsyncIterator[asyncio.Task[None]]:
    """Run the session for the time of the block; by default the block begins when it is connected."""
    task = asyncio.create_task(session.run())
    try:
        if connected:
            async with asyncio.timeout(20):
                await session.wait_connected()
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()


async def link_where(session: Session, met: Callable[[Link], bool], timeout_s: float = 20) -> Link:
    """The session's state as soon as `met`."""
    changed = asyncio.Event()
    session.on_link(lambda _: changed.set())
    async with asyncio.timeout(timeout_s):
        while not met(session.link):
            await changed.wait()
            changed.clear()
    return session.link


CHILD = """
import asyncio, sys, time
from pathlib import Path
from agent.cloud.session import Session
from agent.settings import Cloud

port, ca, certificate, key, *arguments = sys.argv[1:]

def make_session(**options):
    return Session(client_id="cam-7", cloud=Cloud(endpoint="localhost", port=int(port), ca_file=Path(ca)),
                   certificate_file=Path(certificate), private_key_file=Path(key), **options)

def tell(*words):
    print(*words, flush=True)
"""


@contextlib.asynccontextmanager
async def child(
    script: str,
    cloud: Cloud,
    pair: Pair,
    *arguments: str,
    env: dict[str, str] | None = None,
    stdin: bool = False,
) -> AsyncIterator[asyncio.subprocess.Process]:
    """A Python process with CHILD and `script`; it is killed at the end of the block if it still runs."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CHILD + textwrap.dedent(script)),
        *(str(cloud.port), str(cloud.ca_file), str(pair.certificate_file), str(pair.private_key_file), *arguments),
        cwd=Path(__file__).parents[2],
        env={**os.environ, **(env or {})},
        stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        async with asyncio.timeout(20):
            await process.communicate()


async def line_of(process: asyncio.subprocess.Process, word: str, timeout_s: float = 40) -> str:
    """The next line of the process's output that holds `word`."""
    assert process.stdout
    seen = []
    async with asyncio.timeout(timeout_s):
        while line := (await process.stdout.readline()).decode():
            if word in line:
                return line
            seen.append(line)
    raise AssertionError(f"the process ended without saying {word!r}:\n{''.join(seen)}")


@dataclass(frozen=True)
class LocalAws:
    """A local AWS with a seeded fleet; policies are enforced."""

    aws: Aws
    fleet: seed.Fleet
    folder: Path

    @property
    def cloud(self) -> Cloud:
        return Cloud(endpoint="localhost", port=self.aws.mqtt_port, ca_file=self.folder / "ca.pem")

    def camera(self, thing: str) -> Pair:
        """A registered camera's certificate and key."""
        return self.keep(thing, seed.register_camera(self.aws, thing))

    def keep(self, name: str, made: seed.Identity) -> Pair:
        pair = Pair(self.folder / f"{name}.pem", self.folder / f"{name}-key.pem")
        pair.certificate_file.write_text(made.certificate_pem)
        pair.private_key_file.write_text(made.private_key_pem)
        return pair


@contextlib.contextmanager
def local_aws(folder: Path) -> Iterator[LocalAws]:
    with Aws(folder / "aws") as aws:
        (folder / "ca.pem").write_text(aws.ca_pem())
        yield LocalAws(aws, seed.seed(aws), folder)
