"""A camera, its cloud and the network between them; what was asked of it, and whether everything ended with the truth."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.faults.agent_process import MARK, AgentProcess, Said, _environment
from tests.faults.cloud import Cloud
from tests.faults.relay import Relay
from tests.integration.mqtt_peer import CONNECT

NOTE = '#!/bin/sh\necho "$2" >> "{ran}"\n'
SLOW = '#!/bin/sh\necho "$2" >> "{ran}"\nsleep 2\n'
BAD = '#!/bin/sh\necho "$2" >> "{ran}"\nexit 3\n'
EXPECTED = {"note": "SUCCEEDED", "slow": "SUCCEEDED", "bad": "FAILED"}


class WrappedAgent(AgentProcess):
    """The agent started by another command, which must become it, or with more in its environment."""

    prefix: Sequence[str] = ()
    more_environment: Mapping[str, str] = {}

    async def start(self) -> None:
        assert not self.running
        command = [sys.executable, "-m", "agent", "run", "--config", str(self.config_file), "--log-format", "json"]
        tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *(*tied, *self.prefix, *command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**_environment(), MARK: str(self.folder), **self.more_environment},
                start_new_session=True,
            )
        self.starts += 1

    async def ctl(self, *argv: str) -> Said:
        """agentctl sees the same clock and the same network as the agent."""
        process = await asyncio.create_subprocess_exec(
            *(*self.prefix, sys.executable, "-m", "agent.ctl", *argv),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**_environment(), "AGENTCTL_SOCKET": str(self.socket), **self.more_environment},
        )
        out, err = await process.communicate()
        return Said(process.returncode or 0, out.decode(), err.decode())


class Scene:
    """Made by scene()."""

    def __init__(self, cloud: Cloud, relay: Relay, agent: AgentProcess) -> None:
        self.cloud, self.relay, self.agent = cloud, relay, agent
        self.offered: dict[str, str] = {}
        """Job id to the handler that it runs."""
        self._ran = agent.folder / "ran"
        for name, script in (("note", NOTE), ("slow", SLOW), ("bad", BAD)):
            agent.handler(name, script.format(ran=self._ran))

    def offer(self, handler: str = "note", job_id: str = "") -> str:
        """Create a job that runs `handler`, which appends the job's id to a file; its id."""
        job_id = job_id or f"job-{len(self.offered) + 1}"
        self.offered[job_id] = handler
        action = {"name": job_id, "type": "runHandler", "input": {"handler": handler, "args": [job_id]}}
        self.cloud.jobs.create(job_id, {"version": "1.0", "steps": [{"action": action}]})
        return job_id

    def ran(self) -> Counter[str]:
        """How often each job's handler was started."""
        return Counter(self._ran.read_text(encoding="utf-8").split() if self._ran.exists() else [])

    async def ran_once(self, job_id: str, timeout_s: float = 60) -> None:
        """Wait until the job's handler has been started."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self.ran()[job_id]:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise AssertionError(f"{job_id} did not run within {timeout_s:g} s\n{self.tail()}") from None

    async def told(self, state: str, version: int, timeout_s: float = 90) -> dict[str, Any]:
        """Wait until the shadow `config` says `state` of this version of `desired`, or a later one; its status."""
        config = self.cloud.config
        try:
            await config.until(
                lambda: config.status.get("state") == state and config.status["desired_version"] >= version, timeout_s
            )
        except TimeoutError:
            raise AssertionError(f"not {state} at {version}: {config.cloud.reported}\n{self.tail()}") from None
        return config.status

    async def wants(self, state: str, **desired: Any) -> dict[str, Any]:
        """Set `desired` of the shadow `config` to this, and wait until it says `state` of it; its status."""
        return await self.told(state, self.cloud.config.want(desired))

    async def config(self) -> dict[str, Any]:
        """How the configuration stands, as agentctl says."""
        said = await self.agent.ctl("config", "show", "--json")
        assert said.code == 0, said
        return dict(said.json()["shadow"])

    async def status(self) -> dict[str, Any]:
        """`agentctl status --json`; {} while the agent does not answer."""
        said = await self.agent.ctl("status", "--json")
        return said.json() if said.code == 0 else {}

    async def shows(self, *codes: str, state: str = "offline", hint: str = "", timeout_s: float = 60) -> dict[str, Any]:
        """Wait until agentctl shows one of `codes` in `state` with a hint that contains `hint`; the cloud's part.

        A state that has passed before agentctl could look is taken from the log, which has the same words.
        """
        seen: list[tuple[str, str]] = []
        before = len(await asyncio.to_thread(self.agent.lines))
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    cloud = (await self.status()).get("cloud", {})
                    if cloud and (cloud["state"], cloud["code"]) not in seen[-1:]:
                        seen.append((cloud["state"], cloud["code"]))
                    lines = (await asyncio.to_thread(self.agent.lines))[before:] if state == "offline" else []
                    logged = [line for line in lines if line.get("event") == "off-line" and line.get("code") in codes]
                    if logged and (cloud.get("state"), cloud.get("code")) != (state, logged[-1]["code"]):
                        cloud = {"state": state, **logged[-1]}
                    if cloud and cloud["state"] == state and cloud["code"] in codes:
                        assert not cloud["code"] or (cloud["reason"] and cloud["hint"]), cloud
                        assert hint in cloud["hint"], cloud
                        return cloud
                    await asyncio.sleep(0.25)
        except TimeoutError:
            raise AssertionError(f"not {state} {codes} within {timeout_s:g} s, seen {seen}\n{self.tail()}") from None

    async def said(self, *codes: str, count: int = 1, timeout_s: float = 60) -> list[dict[str, Any]]:
        """Wait until the log has `count` lines of being off-line with one of `codes`; those lines."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    found = [line for line in self.offline_lines() if line["code"] in codes]
                    if len(found) >= count:
                        return found
                    await asyncio.sleep(0.1)
        except TimeoutError:
            raise AssertionError(f"{codes} was not logged {count} times\n{self.tail()}") from None

    async def queues_more_than(self, messages: int, timeout_s: float = 30) -> None:
        """Wait until more than `messages` wait in the outbox."""
        async with asyncio.timeout(timeout_s):
            while (await self.status())["outbox"]["messages"] <= messages:
                await asyncio.sleep(0.2)

    def offline_lines(self) -> list[dict[str, Any]]:
        """Each time that the agent said that it was off-line, and why."""
        return [line for line in self.agent.lines() if line.get("event") == "off-line"]

    async def all_end(self, timeout_s: float = 60) -> None:
        """Wait until all jobs have ended; each ended once, with what really happened, and ran at most once."""
        try:
            async with asyncio.timeout(timeout_s):
                for job_id in self.offered:
                    await self.cloud.jobs.ended(job_id, timeout_s)
        except (TimeoutError, AssertionError):
            states = {job_id: self.cloud.jobs.status(job_id) for job_id in self.offered}
            raise AssertionError(f"after {timeout_s:g} s: {states}\n{self.tail()}") from None
        self.truth()

    def truth(self) -> None:
        """Every job that was offered has one end, and it is what happened."""
        ran = self.ran()
        for job_id, handler in self.offered.items():
            ends = self.cloud.jobs.terminal_updates(job_id)
            assert [(end.status, end.by) for end in ends] == [(EXPECTED[handler], "device")], (job_id, ends)
            assert ran[job_id] == 1, (job_id, ran)
            sent = {e.status for e, _ in self.cloud.jobs.attempts if e.job_id == job_id}
            assert sent == {EXPECTED[handler]}, (job_id, self.cloud.jobs.attempts)
        assert not set(ran) - set(self.offered)

    async def reports_complete(self, timeout_s: float = 60) -> int:
        """Wait until every report up to one made from now on has arrived; how many came more than once."""
        now = time.time()
        reports = self.cloud.reports

        def complete() -> bool:
            seqs = {report["seq"] for report in reports}
            newest = max((report["seq"] for report in reports if report["end"] >= now), default=0)
            return bool(newest) and seqs >= set(range(1, newest + 1))

        try:
            await self.cloud.peer.until(complete, timeout_s)
        except TimeoutError:
            seqs = {report["seq"] for report in reports}
            missing = sorted(set(range(1, max(seqs, default=1))) - seqs)
            raise AssertionError(f"missing {missing}, newest {max(seqs, default=0)}\n{self.tail()}") from None
        return same_under_one_number(reports) + same_under_one_number(self.cloud.events)

    def calm(self) -> int:
        """Never two CONNECTs within a second; how many there were."""
        # A later connection follows from the end of the one before, so the relay's order of things is exact; what it
        # writes into the clock's time is late by at most what the first of two was late.
        accepted = [crossing.at for crossing in self.relay.crossings]
        connects = [packet.at for packet in self.cloud.peer.of(CONNECT)]
        for times, least_s in ((accepted, 0.99), (connects, 0.9)):
            gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
            assert all(gap >= least_s for gap in gaps), gaps
        return len(connects)

    async def ends_well(self, timeout_s: float = 60) -> None:
        """Jobs, reports, and the pace of CONNECTs: all as it must be."""
        await self.all_end(timeout_s)
        await self.reports_complete(timeout_s)
        self.calm()

    def tail(self) -> str:
        return self.agent.tail(30)


def same_under_one_number(messages: Iterable[Mapping[str, Any]]) -> int:
    """How many messages came again; what comes under the same (boot_id, seq) is the same."""
    known: dict[tuple[str, int], Mapping[str, Any]] = {}
    again = 0
    for message in messages:
        if "seq" not in message:
            continue  # a last will can't have one
        key = (message["boot_id"], message["seq"])
        again += key in known
        assert known.setdefault(key, message) == message
    return again


@contextlib.asynccontextmanager
async def scene(
    folder: Path,
    thing: str = "cam-1",
    *,
    host: str = "127.0.0.1",
    wrap: Callable[[WrappedAgent], None] | None = None,
    prepare: Callable[[Cloud], None] | None = None,
    **overrides: Mapping[str, Any],
) -> AsyncIterator[Scene]:
    """A cloud, a relay that listens on `host`, and an agent that is not started yet; all gone at the end.

    `prepare` changes the cloud before it listens, `wrap` the agent; `overrides` are tables of agent.toml.
    """
    cloud = Cloud(thing)
    if prepare:
        prepare(cloud)
    async with cloud, Relay(cloud.port, host) as relay:
        kind = WrappedAgent if wrap else AgentProcess
        async with kind(folder, relay.port, thing, **overrides) as agent:
            if wrap:
                assert isinstance(agent, WrappedAgent)
                wrap(agent)
            yield Scene(cloud, relay, agent)
            if agent.running:
                await agent.stop()


async def together(*scenes: Coroutine[Any, Any, None]) -> None:
    """Several cameras at once: most of the time each of them waits."""
    async with asyncio.TaskGroup() as group:
        for one in scenes:
            group.create_task(one)


async def started(s: Scene) -> Scene:
    """The agent is connected and its first job done."""
    s.offer()
    await s.agent.start()
    await s.all_end()
    return s
