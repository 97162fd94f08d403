"""Building jobs of steps and running them with the real operation, without an engine."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from agent.jobs.document import parse
from agent.jobs.operations.run import Run
from agent.settings import Jobs


class Job:
    """An execution whose progress is kept in memory; `history` is all that was saved, in order."""

    def __init__(self, document, progress=None):
        self.id = "job-1"
        self.document = parse(document)[1]
        self.progress = progress or {}
        self.cancelled = asyncio.Event()
        self.messages = []
        self.history = []
        self.saved = asyncio.Event()

    async def save(self, progress, message):
        self.progress = progress
        self.history.append(progress)
        self.messages.append(message)
        self.saved.set()


class Machine:
    """Something that can be asked for a reboot: `asked` is set when it was; with `error` it refuses."""

    def __init__(self, error=None):
        self.asked = asyncio.Event()
        self.times = 0
        self.error = error

    async def reboot(self):
        self.times += 1
        self.asked.set()
        if self.error:
            raise self.error


class Handlers:
    """A handler folder."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self, name, script, mode=0o755, *, interpreter="/bin/sh"):
        path = self.folder / name
        path.write_text(f"#!{interpreter}\n{script}")
        path.chmod(mode)
        return path


def operation(handlers, *, boot_id="boot-1", machine=None, lock=None, **policy):
    return Run(
        Jobs(handler_dir=handlers.folder, **policy),
        boot_id=boot_id,
        reboot=(machine or Machine()).reboot,
        mutation_lock=lock or asyncio.Lock(),
    )


def step(handler, *args, name=None, **changes):
    action = {
        "name": name or handler,
        "type": "runHandler",
        "input": {"handler": handler, "args": list(args)},
        **changes,
    }
    return {"action": action}


def command(text, **changes):
    return {"action": {"name": "c", "type": "runCommand", "input": {"command": text}, **changes}}


def document(*steps, **changes):
    return {"version": "1.0", "steps": list(steps), **changes}


async def run(handlers, doc, progress=None, **changes):
    """Check and run a document; its status details."""
    run = operation(handlers, **changes)
    job = Job(doc, progress)
    await asyncio.to_thread(run.check, job.document)
    return await run.run(job)


def alive(pid):
    """Whether a process runs; one that has ended and was not yet reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def written(path):
    """The text of a file once it is there and ends with a newline."""

    def read():
        return path.read_text() if path.exists() else ""

    while not (text := await asyncio.to_thread(read)).endswith("\n"):
        await asyncio.sleep(0.01)
    return text


def kill(pid, number=9):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
