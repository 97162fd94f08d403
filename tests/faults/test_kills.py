"""`kill -9` at random moments, again and again, during a stream of jobs: each job ends once, with the truth, and nothing is lost.

`CAMERA_AGENT_KILLS` sets how many (200), `CAMERA_AGENT_KILLS_SEED` repeats a run's choices (the moments stay the machine's).
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import json
import os
import random
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.faults.agent_process import AgentProcess
from tests.faults.cloud import TERMINAL, Cloud, Ending
from tests.integration.mqtt_peer import CONNECT, SUBSCRIBE, Packet

KILLS = int(os.environ.get("CAMERA_AGENT_KILLS", "200"))
SEED = int(os.environ.get("CAMERA_AGENT_KILLS_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
CAMERAS = 2
LIMIT_S = 120 + 4 * KILLS
PENDING = 3
"""So many jobs wait for the agent at any time."""
SEEN_WITHIN_S = 4.0
"""Longest wait for what a kill shall follow; then it comes anyway."""
LOST = {"interrupted", "restarted_too_often"}
"""Reasons that a kill, and nothing else, gives to a job."""

# Arguments: user, job, step, seconds. A line goes to the disk before and after the work.
HANDLER = """#!/bin/sh
note() {{ echo "$1 $2 $3 $(date +%s.%N)" | dd of={lines} oflag=append conv=notrunc,fsync 2>/dev/null; }}
note begin "$2" "$3"
{act}
note end "$2" "$3"
"""
ACTS = {"work": 'sleep "$4"', "fail": "exit 3", "die": "kill -9 $$", "endless": "sleep 600"}

DOCUMENTS_TO_REFUSE = (
    {"version": "1.0", "operation": "explode"},
    {"version": "1.0", "operation": "restart", "target": "kettle"},
    {"version": "1.0", "steps": []},
    {"version": "1.0", "steps": [{"action": {"name": "a", "type": "runHandler", "input": {"handler": "../work"}}}]},
    {"version": "1.0", "steps": [{"action": {"name": "a", "type": "runHandler", "input": {"handler": "missing"}}}]},
    {"version": "1.0", "steps": [{"action": {"name": "a", "type": "runCommand", "input": {"command": "true"}}}]},
    {"version": "1.0", "operation": "restart", "target": "${aws:iot:parameter:x}"},
)

MOMENTS: dict[str, tuple[int, Callable[[Packet], bool]]] = {
    "connect": (1, lambda p: p.kind == CONNECT),
    "subscribe": (1, lambda p: p.kind == SUBSCRIBE),
    "ask": (1, lambda p: p.topic.endswith("/jobs/$next/get")),
    "announce": (3, lambda p: p.topic.endswith("/update") and b'"IN_PROGRESS"' in p.payload),
    "begin": (3, lambda p: False),  # a handler's line, no packet
    "end": (5, lambda p: p.topic.endswith("/update") and any(f'"{s}"'.encode() in p.payload for s in TERMINAL)),
    "event": (2, lambda p: p.topic.endswith("/event")),
    "report": (2, lambda p: p.topic.endswith("/report")),
}
"""What a kill waits for, with its weight, and by which packet it is known."""


@dataclass
class Job:
    """What was asked for: the handlers of its steps in order; none for a restart or a document to refuse."""

    kind: str
    steps: list[str] = field(default_factory=list)
    ignored: int | None = None
    """The step whose failure is ignored as asked."""


class Line(NamedTuple):
    """What a handler wrote: `begin` or `end` of a job's step, at wall-clock time `at`."""

    what: str
    job_id: str
    step: str
    at: str


class Camera:
    """One cloud and one agent's folder; kills, creates jobs, and keeps what is needed to judge them."""

    def __init__(self, folder: Path, cloud: Cloud, agent: AgentProcess, seed: int, *, as_systemd: bool) -> None:
        self.cloud, self.agent = cloud, agent
        self.random = random.Random(seed)
        self.as_systemd = as_systemd
        self.lines_file = folder / "lines"
        self.lines_file.touch()
        for name, act in ACTS.items():
            agent.handler(name, HANDLER.format(lines=self.lines_file, act=act))
        self.jobs: dict[str, Job] = {}
        self.journal: dict[tuple[str, int], dict[str, Any]] = {}
        self.killed_in: Counter[str] = Counter()
        self._until_asking_s = 0.8
        self._judged = 0
        self._operators: set[asyncio.Task[None]] = set()

    # ---- jobs -----------------------------------------------------------------------------------------------------

    async def keep_busy(self) -> None:
        """Create jobs whenever too few wait, and do what operators do to some of them."""
        while True:
            while len(self.cloud.jobs.pending()) < PENDING:
                self._create()
            self._retry_some()
            await asyncio.sleep(0.02)

    def _create(self, kind: str = "") -> None:
        kinds = {"work": 9, "fail": 3, "die": 2, "ignore": 2, "refuse": 3, "restart": 1, "cancel": 2, "delete": 1}
        kind = kind or self.random.choices(list(kinds), list(kinds.values()))[0]
        job_id = f"job-{len(self.jobs) + 1}-{kind}"
        if kind in ("refuse", "restart"):
            self.jobs[job_id] = Job(kind)
            document = {"version": "1.0", "operation": "restart"}
            self.cloud.jobs.create(job_id, self.random.choice(DOCUMENTS_TO_REFUSE) if kind == "refuse" else document)
            return
        steps = ["work"] * self.random.randint(1, 4)
        job = self.jobs[job_id] = Job(kind, steps)
        place = self.random.randrange(len(steps))
        if kind in ("fail", "die"):
            steps[place] = kind
        elif kind == "ignore":
            steps[place], job.ignored = "fail", place
        elif kind in ("cancel", "delete"):
            steps[place] = "endless"
        self.cloud.jobs.create(
            job_id, {"version": "1.0", "steps": [self._step(job_id, n, job) for n in range(len(steps))]}
        )
        if kind in ("cancel", "delete"):
            task = asyncio.create_task(self._operate(job_id, kind))
            self._operators.add(task)
            task.add_done_callback(self._operators.discard)

    def _step(self, job_id: str, number: int, job: Job) -> dict[str, Any]:
        arguments = [job_id, str(number), f"{self.random.uniform(0, 0.06):.3f}"]
        action: dict[str, Any] = {
            "name": f"step {number}",
            "type": "runHandler",
            "input": {"handler": job.steps[number], "args": arguments},
        }
        if job.ignored == number:
            action["ignoreStepFailure"] = "true"
        return {"action": action}

    async def _operate(self, job_id: str, what: str) -> None:
        """Cancel or delete by force a little after the job went in progress, sometimes before."""
        execution = self.cloud.jobs.execution(job_id)
        early = self.random.random() < 0.1
        while execution.status == "QUEUED" and not early:
            await asyncio.sleep(0.01)
        await asyncio.sleep(self.random.uniform(0, 0.2))
        if execution.status in TERMINAL:
            return
        if what == "cancel":
            self.cloud.jobs.cancel(job_id)
        else:
            self.cloud.jobs.delete(job_id)

    def _retry_some(self) -> None:
        """Some of what failed is queued again, as an operator's retry criteria do."""
        fresh, self._judged = self.cloud.jobs.endings[self._judged :], len(self.cloud.jobs.endings)
        for ending in fresh:
            if ending.status == "FAILED" and ending.execution_number < 3 and self.random.random() < 0.2:
                self.cloud.jobs.retry(ending.job_id)

    # ---- kills ----------------------------------------------------------------------------------------------------

    async def live_and_be_killed(self, number: int) -> None:
        """One life: half of them end at a moment of the clock, half a few milliseconds after something was seen."""
        begun, packets = time.monotonic(), len(self.cloud.peer.packets)
        await self.agent.start()
        if number % 2:
            await asyncio.sleep(self.random.uniform(0, 1.6 * self._until_asking_s))
        else:
            weights = [weight for weight, _ in MOMENTS.values()]
            moment = self.random.choices(list(MOMENTS), weights)[0]
            await self._see(moment, packets)
            await asyncio.sleep(self.random.choice((0, self.random.uniform(0, 0.01), self.random.uniform(0, 0.06))))
        await self.agent.kill(group=self.as_systemd)
        asked = [p.at for p in self.cloud.peer.packets[packets:] if p.topic.endswith("/$next/get")]
        if asked:
            self._until_asking_s = 0.8 * self._until_asking_s + 0.2 * (asked[0] - begun)
        await self._take_journal(connected=len(self.cloud.peer.packets) > packets)

    async def _see(self, moment: str, packets: int) -> None:
        """Wait for something of this life; not for ever, since nothing may wait to begin or to be refused."""
        seen = MOMENTS[moment][1]
        written = self.lines_file.stat().st_size
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SEEN_WITHIN_S):
                while not (moment == "begin" and self.lines_file.stat().st_size > written):
                    if any(seen(packet) for packet in self.cloud.peer.packets[packets:]):
                        return
                    packets = len(self.cloud.peer.packets)
                    await asyncio.sleep(0.002)

    async def _take_journal(self, *, connected: bool) -> None:
        """Add what the journal holds to what is known; it forgets old jobs."""
        records = await asyncio.to_thread(self.agent.journal)
        self.journal.update(records)
        phases = {record["phase"] for record in records.values()} - {"closed"}
        assert len(phases) <= 1, f"more than one job is under way: {records}"
        phase = phases.pop() if phases else "between jobs"
        self.killed_in[phase if connected else "start-up"] += 1

    async def settle(self) -> None:
        """A last life that nobody ends: all that waits is done, told and acknowledged."""
        await self.agent.start()
        for kind in ("cancel", "delete", "cancel"):
            self._create(kind)
        await asyncio.gather(*self._operators)
        for key, execution in sorted(self.cloud.jobs.executions.items(), key=lambda item: item[1].order):
            await self.cloud.jobs.ended(key[0], 120)
            assert execution.status in TERMINAL, execution
        async with asyncio.timeout(60):
            while any(r["phase"] != "closed" for r in (await asyncio.to_thread(self.agent.journal)).values()):
                await asyncio.sleep(0.1)
        arrived = len(self.cloud.reports)
        await self.cloud.peer.until(lambda: len(self.cloud.reports) >= arrived + 2, 60)
        left = await self.agent.none_left(5)
        await self.agent.stop()
        self.journal.update(await asyncio.to_thread(self.agent.journal))
        assert not left, f"handlers without an agent: {left}"

    # ---- judging --------------------------------------------------------------------------------------------------

    def judge(self) -> Counter[str]:
        """Everything that must be true of every job; how often each terminal status was seen."""
        statuses: Counter[str] = Counter()
        lines = [Line(*line.split()) for line in self.lines_file.read_text().splitlines()]
        executions = {**self.cloud.jobs.executions, **self.cloud.jobs.removed}
        assert {key[0] for key in executions} == set(self.jobs)
        spells = Counter(job_id for job_id, _ in groupby(lines, lambda line: line.job_id))
        begun_at = {(u["jobId"], u["executionNumber"]): u["at"] for u in reversed(self.cloud.jobs.updates)}
        for job_id, job in self.jobs.items():
            ends = [self._one_end(key) for key in sorted(executions) if key[0] == job_id]
            statuses.update(end.status for end in ends)
            written = [line for line in lines if line.job_id == job_id]
            try:
                judge_runs(job, ends, written)
                assert spells[job_id] <= len(ends), "another job ran at the same time"
                assert not written or begun_at[(job_id, 1)] < float(written[0].at), (
                    "it was begun before it was announced"
                )
            except AssertionError as error:
                raise AssertionError(f"{job_id}: {error}\n{ends}\n{written}") from error
        return statuses

    def _one_end(self, key: tuple[str, int]) -> Ending:
        """The only end of an execution: at the cloud, in every attempt to tell it, and in the journal."""
        ends = self.cloud.jobs.terminal_updates(*key)
        assert len(ends) == 1, f"{key} ended {len(ends)} times: {ends}"
        told = {
            ending.status for ending, _ in self.cloud.jobs.attempts if (ending.job_id, ending.execution_number) == key
        }
        assert len(told) <= 1, f"{key}: the agent told different ends: {told}"
        record = self.journal.get(key)
        if record is None:
            assert ends[0].by == "operator", f"{key}: the journal does not know what the agent reported: {ends}"
            return ends[0]
        assert record["phase"] == "closed", f"{key} is not closed in the journal: {record}"
        kept = record["superseded"] or record["status"]
        assert kept == ends[0].status, f"{key}: {kept} in the journal, {ends[0].status} in the cloud: {record}"
        return ends[0]

    def judge_messages(self, kind: str, arrived: list[dict[str, Any]]) -> tuple[int, int]:
        """No message is missing and none is two; how many there are, and how many duplicates arrived."""
        with contextlib.closing(sqlite3.connect(self.agent.state_dir / "state.db")) as database:
            (last,) = database.execute("SELECT value FROM facts WHERE key = ?", (f"telemetry.seq.{kind}",)).fetchone()
            rows = database.execute("SELECT payload FROM outbox WHERE topic LIKE ?", (f"%/{kind}",)).fetchall()
            dropped = database.execute("SELECT value FROM facts WHERE key = 'outbox.dropped'").fetchone()
        assert dropped is None
        known: dict[tuple[str, int], dict[str, Any]] = {}
        for message in [*arrived, *(json.loads(row[0]) for row in rows)]:
            first = known.setdefault((message["boot_id"], message["seq"]), message)
            assert first == message, f"two {kind}s with one number: {first} and {message}"
        numbers = sorted(seq for _, seq in known)
        assert numbers == list(range(1, int(last) + 1)), f"{kind}: {missing(numbers, int(last))} are missing"
        assert len(rows) <= 2, f"{len(rows)} {kind}s were not sent at the end"
        return len(known), len(arrived) - len({(m["boot_id"], m["seq"]) for m in arrived})

    def judge_told_ends(self) -> int:
        """Each end that the agent decided was told once as an event, with the status that it then reported."""
        unique = {event["seq"]: event["job"] for event in self.cloud.events if "job" in event}
        told = Counter((job["job_id"], job["execution"]) for job in unique.values())
        twice = [key for key, count in told.items() if count > 1]
        assert not twice, f"told twice: {twice}"
        statuses = {(job["job_id"], job["execution"]): job["status"] for job in unique.values()}
        decided = {key: record["status"] for key, record in self.journal.items() if record["status"]}
        assert statuses == decided, {k: (statuses.get(k), v) for k, v in decided.items()}
        return len(unique)


def judge_runs(job: Job, ends: list[Ending], lines: list[Line]) -> None:
    """What the handlers wrote must be what the ends of the job's executions say, no more and no less."""
    begun = Counter(int(line.step) for line in lines if line.what == "begin")
    done = Counter(int(line.step) for line in lines if line.what == "end")
    least, most = Counter[int](), Counter[int]()
    for end in ends:
        passed, at_most = steps_of(job, end)
        least.update(range(passed))
        most.update(range(at_most))
    for step, handler in enumerate(job.steps):
        assert least[step] <= begun[step] <= most[step], f"step {step} was begun {begun[step]} times"
        assert done[step] <= begun[step]
        assert handler != "work" or least[step] <= done[step], f"step {step} was passed without its end"
    if len(ends) == 1:
        order = [int(line.step) for line in lines if line.what == "begin"]
        assert order == sorted(order), "steps out of order"
    if lines and ends[-1].by == "device":
        assert max(float(line.at) for line in lines) < ends[-1].at, "something was done after the end was told"


def steps_of(job: Job, end: Ending) -> tuple[int, int]:
    """How many steps an execution with this end has passed, and how many it has begun at most."""
    count, code = len(job.steps), end.details.get("reason_code", "")
    breaks = next((n for n, handler in enumerate(job.steps) if handler != "work" and n != job.ignored), None)
    if end.by == "operator":
        assert (job.kind, end.status) in (("cancel", "CANCELED"), ("delete", "REMOVED"))
        return 0, count if breaks is None else breaks + 1
    if end.status == "REJECTED":
        assert job.kind == "refuse", f"refused with {code}"
        assert code
        assert end.details["message"]
        return 0, 0
    if end.status == "SUCCEEDED":
        assert job.kind in ("work", "ignore", "restart")
        return count, count
    assert end.status == "FAILED"
    if code in LOST:
        assert job.kind not in ("restart", "refuse"), f"{code}, although nothing was there to interrupt"
        at = int(end.details["step"].split()[1]) if "step" in end.details else 0
        return at, at + (code == "interrupted")
    assert code == "step_failed", code
    assert job.kind in ("fail", "die")
    assert breaks is not None
    how, what = ("signal", "9") if job.kind == "die" else ("exit_code", "3")
    assert end.details[how] == what
    return breaks + 1, breaks + 1


def missing(numbers: list[int], last: int) -> list[int]:
    return sorted(set(range(1, last + 1)) ^ set(numbers))


async def life_of_a_camera(folder: Path, thing: str, seed: int, kills: int, *, as_systemd: bool) -> Camera:
    settings = {"telemetry": {"interval_s": 1, "backlog_per_s": 50}}
    async with Cloud(thing) as cloud, AgentProcess(folder, cloud.port, thing, **settings) as agent:
        camera = Camera(folder, cloud, agent, seed, as_systemd=as_systemd)
        cloud.jobs.duplicate_notifications = True
        busy = asyncio.create_task(camera.keep_busy())
        try:
            for number in range(kills):
                await camera.live_and_be_killed(number)
                assert not busy.done(), busy.exception()
        finally:
            busy.cancel()
            await asyncio.wait({busy})
        await camera.settle()
        return camera


@pytest.mark.conformance("C-JOBS-05", "C-JOBS-07", "C-JOBS-09", "C-JOBS-11", "C-JOBS-12", "C-JOBS-22")
@pytest.mark.parametrize("as_systemd", [True, False], ids=["with its handlers", "the agent alone"])
async def test_killed_at_any_moment_each_job_ends_once_with_the_truth_and_no_report_is_lost(tmp_path, as_systemd):
    faulthandler.dump_traceback_later(LIMIT_S, exit=True, file=sys.__stderr__)  # instead of that for short tests
    kills, begun = KILLS // 2, time.monotonic()
    print(f"seed {SEED}")
    async with asyncio.TaskGroup() as group:
        lives = [
            life_of_a_camera(tmp_path / f"c{n}", f"cam-{n}", SEED + n, len(share), as_systemd=as_systemd)
            for n, share in enumerate(range(kills)[n::CAMERAS] for n in range(CAMERAS))
        ]
        tasks = [group.create_task(life) for life in lives]
    cameras = [task.result() for task in tasks]
    statuses, phases, counts = Counter[str](), Counter[str](), Counter[str]()
    for camera in cameras:
        statuses += camera.judge()
        phases += camera.killed_in
        events = [event for event in camera.cloud.events if "seq" in event]  # a birth or a will has no number
        for kind, arrived in (("reports", camera.cloud.reports), ("events", events)):
            messages, duplicates = camera.judge_messages(kind.removesuffix("s"), arrived)
            counts[kind] += messages
            counts["messages that came twice"] += duplicates
        counts["ends told as events"] += camera.judge_told_ends()
        counts["retried executions"] += sum(number > 1 for _, number in camera.cloud.jobs.executions)
        counts["ends sent again"] += sum(answer != "accepted" for _, answer in camera.cloud.jobs.attempts)
    jobs = sum(len(camera.jobs) for camera in cameras)
    assert sum(phases.values()) == kills
    print(f"{kills} kills tried during {jobs} jobs in {time.monotonic() - begun:.0f} s, seed {SEED}")
    print(f"killed at {listed(phases)}")
    print(f"{sum(statuses.values())} executions each ended once: {listed(statuses)}")
    print(f"{listed(counts)}; none missing")


def listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.most_common())
