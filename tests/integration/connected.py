"""Sessions for tests: against the scripted server or a local AWS, and waiting until they are where they should be."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

from agent.cloud.offline import Pace
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
        with contextlib.suppress(asyncio.CancelledError):
            await task


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
