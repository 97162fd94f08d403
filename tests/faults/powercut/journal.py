"""Jobs of steps, and reports beside them: engine, operation `run`, journal and outbox on one state.db."""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from pathlib import Path
from typing import Any

from agent import logs
from agent.host import clock
from agent.jobs import conversation
from agent.jobs import engine as engines
from agent.jobs.machine import Phase, Record
from agent.jobs.operations.run import Run
from agent.settings import Jobs, Telemetry
from agent.store import Store, Tables
from agent.telemetry.outbox import JOB, REPORT, Outbox
from tests.faults.powercut.place import LastingJobs, Place, World
from tests.faults.powercut.updates import WatchedEngine, cloud_of
from tests.integration.steps import document, step

JOBS = ("first", "second")
STEPS = 2
REPORTS = 6
HANDLER = '#!/bin/sh\necho "$2" >> "{log}"\n'


class Journal:
    """Two jobs of two steps each, while six reports are queued and sent."""

    def __init__(self) -> None:
        logs.configure("json", os.environ.get("POWERCUT_LOG", "critical"))
        for name, value in {"RETRY_S": (0.01, 0.05), "NEWS_INTERVAL_S": 0.0, "POLL_S": 0.05, "NOTICES_S": 0.0}.items():
            setattr(engines, name, value)
        conversation.RETRY_S = (0.01, 0.05)

    def prepare(self, place: Place) -> None:
        asyncio.run(self._prepare(place))

    async def _prepare(self, place: Place) -> None:
        store = await Store.open(place.folder / "state.db")
        await store.close()
        cloud = LastingJobs(World(place))
        for name in JOBS:
            steps = [step("note.sh", f"{name} {number}", name=str(number)) for number in range(STEPS)]
            cloud.create(name, document(*steps))
        cloud.keep()

    def boot(self, place: Place) -> None:
        asyncio.run(self._boot(place))

    async def _boot(self, place: Place) -> None:
        world = World(place)
        cloud = cloud_of(world)
        handlers = await asyncio.to_thread(self._handlers, place)
        store = await Store.open(place.folder / "state.db")
        place.expect(store.quarantined is None, "state.db was quarantined")
        await self._look(place, store, world, cloud)
        outbox = Outbox(store, Telemetry(backlog_per_s=50), publish=_Broker(world), wait_online=_online)

        def ended(tables: Tables, facts: Any) -> None:
            outbox.add(tables, "event", JOB, "event", lambda seq: json.dumps({"seq": seq, **facts}).encode())

        lock = asyncio.Lock()
        policy = Jobs(handler_dir=handlers)
        operation = Run(policy, boot_id=await asyncio.to_thread(clock.boot_id), reboot=_no_reboot, mutation_lock=lock)
        engine = WatchedEngine(store=store, jobs=cloud, operations={"run": operation}, allow=["run"], on_ended=ended)
        engine.label = place.label
        tasks = [asyncio.create_task(work) for work in (engine.run(), outbox.run(), self._report(outbox, world))]
        engine.wake()
        while not (await self._is_quiet(store, cloud) and tasks[2].done()):
            if any(task.done() and not task.cancelled() and task.exception() for task in tasks):
                break
            outbox.announce_fresh()
            await asyncio.sleep(0.005)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                await task
        await self._look_at_the_end(place, store, world, cloud)
        await store.close()

    async def _report(self, outbox: Outbox, world: World) -> None:
        while len(world.get("queued", [])) < REPORTS:
            mark = uuid.uuid4().hex
            seq = await outbox.put(
                "report", REPORT, "report", lambda seq, mark=mark: json.dumps({"seq": seq, "mark": mark}).encode()
            )
            world.save(queued=[*world.get("queued", []), (seq, mark)])
            await asyncio.sleep(0.005)

    async def _is_quiet(self, store: Store, cloud: LastingJobs) -> bool:
        def query(tables: Tables) -> bool:
            return not tables.jobs(finished=False) and tables.queue_size().messages == 0

        return cloud.all_ended() and await store.read(query)

    def _handlers(self, place: Place) -> Path:
        """A folder of handlers that nobody else can write to, above the world's, which is below /tmp."""
        folder = Path(os.environ["POWERCUT_HANDLERS"])
        (folder / "note.sh").write_text(HANDLER.format(log=place.world / "steps"))
        (folder / "note.sh").chmod(0o755)
        return folder

    async def _look(self, place: Place, store: Store, world: World, cloud: LastingJobs) -> None:
        """After the boot: what the cloud was told, and what the outbox promised to keep, is there."""
        for name in JOBS:
            raw = await store.read(lambda t, name=name: t.job(name))
            status = cloud.status(name)
            if raw is None:
                place.expect(status == "QUEUED", f"the cloud has {status} for {name}, the journal knows nothing")
                continue
            record = Record.from_json(raw)
            place.expect(
                status in ("QUEUED", "IN_PROGRESS", record.status),
                f"the cloud has {status} for {name}, the journal {record.status}",
            )
            place.expect(status != "QUEUED" or record.phase is Phase.RECEIVED, f"{name} is {record.phase}, unannounced")
        waiting = await store.read(lambda t: [json.loads(m.payload) for m in t.queued(limit=100)])
        there = {(m["seq"], m["mark"]) for m in waiting if "mark" in m} | set(world.get("got", {}).get("report", []))
        lost = set(world.get("queued", [])) - there
        place.expect(not lost, f"reports that were queued durably are lost: {sorted(lost)}")

    async def _look_at_the_end(self, place: Place, store: Store, world: World, cloud: LastingJobs) -> None:
        steps = place.world / "steps"
        ran = (await asyncio.to_thread(steps.read_text)).splitlines() if steps.exists() else []
        place.expect(len(ran) == len(set(ran)), f"a step ran twice: {ran}")
        got = world.get("got", {})
        interrupted = 0
        for name in JOBS:
            ends = cloud.ends(name)
            said = {(status, code) for job, status, code in cloud.said if job == name}
            place.expect(len(ends) == 1 and len(said) == 1, f"{name} ended as {ends}, told were {sorted(said)}")
            status, code = next(iter(said), ("", ""))
            interrupted += code == "interrupted"
            done = [line for line in ran if line.startswith(name)]
            if status == "SUCCEEDED":
                place.expect(len(done) == STEPS, f"{name} has succeeded, but only {done} ran")
            else:
                place.expect((status, code) == ("FAILED", "interrupted"), f"{name} ended as {status} {code}")
            truths = {
                (facts["status"], facts["reason_code"]) for facts in got.get("event", []) if facts["job_id"] == name
            }
            place.expect(
                truths == said, f"the event says {sorted(truths)} of {name}, the cloud was told {sorted(said)}"
            )
            record = Record.from_json((await store.read(lambda t, name=name: t.job(name))) or {})
            place.expect(record.phase is Phase.CLOSED and record.status == status, f"the journal ends with {record}")
        place.expect(interrupted <= place.cuts, f"{interrupted} jobs were interrupted by {place.cuts} cuts")
        marks: dict[int, set[str]] = {}
        for seq, mark in got.get("report", []):
            marks.setdefault(seq, set()).add(mark)
        place.expect(all(len(found) == 1 for found in marks.values()), f"a number was given twice: {marks}")
        place.expect(sorted(marks) == list(range(1, len(marks) + 1)), f"numbers are missing: {sorted(marks)}")
        place.expect(set(world.get("queued", [])) <= set(got.get("report", [])), "a report was never sent")
        numbers = {facts["seq"]: facts["job_id"] for facts in got.get("event", [])}
        place.expect(sorted(numbers) == [1, 2], f"events are numbered {numbers}")
        left = {path.name for path in place.folder.iterdir()} - {"state.db", "state.db-wal", "state.db-shm"}
        place.expect(not left, f"left over: {sorted(left)}")


class _Broker:
    """Takes every message."""

    def __init__(self, world: World) -> None:
        self._world = world

    async def __call__(self, topic: str, payload: bytes) -> None:
        content = json.loads(payload)
        got = {kind: list(messages) for kind, messages in self._world.get("got", {}).items()}
        got.setdefault(topic, []).append((content["seq"], content["mark"]) if topic == "report" else content)
        self._world.save(got=got)


async def _online() -> None:
    return


async def _no_reboot() -> None:
    raise AssertionError("nobody asks for a reboot")
