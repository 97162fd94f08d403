"""What runs in the virtual camera: the agent's updates by RAUC, told what to do by the host and cut where it says.

Each start goes on with the job that has no end yet, or asks the host for one. Everything of interest goes to the host
over the second serial port, a line of JSON each.
"""

import asyncio
import copy
import json
import os
import platform
import re
import subprocess
import sys
import time
import traceback
import urllib.request
from pathlib import Path

from agent.errors import AgentError, FailedError, RefusedError
from agent.host import systemd
from agent.host.clock import boot_id
from agent.logs import configure
from agent.settings import UpdateTarget
from agent.store import Store
from agent.updates.installers.rauc import Rauc
from agent.updates.restarts import Restarter
from agent.updates.update import Update

DATA = Path("/data")
CUT = Path("/run/camera-vm-cut")
SECTOR = 512
JOB = "camera-vm.job"
SERIAL = os.open("/dev/ttyS1", os.O_WRONLY | os.O_NOCTTY)
COMMAND_LINE = Path("/proc/cmdline").read_text()
SLOT = re.search(r"rauc\.slot=([AB])", COMMAND_LINE)[1]
HOST = f"http://10.0.2.2:{re.search(r'vm.port=([0-9]+)', COMMAND_LINE)[1]}"
OTHER_DISK = Path("/sys/block/nvme0n2" if SLOT == "A" else "/sys/block/nvme0n1")


def tell(event, **facts):
    os.write(SERIAL, b"@@" + json.dumps({"event": event, **facts}).encode() + b"\n")


def cut_here(point):
    """When the host wants to cut here: say so, and do nothing more."""
    if CUT.exists() and CUT.read_text() == point:
        tell("cut_here", point=point)
        time.sleep(600)


class Job:
    """A job execution that is kept in the agent's store, as the job engine keeps it."""

    execution_number = 1

    def __init__(self, store, kept):
        self.id, self.document, self.progress = kept["id"], kept["document"], kept["progress"]
        self.cancelled = asyncio.Event()
        self._store = store

    async def save(self, progress, message, *, facts=None):
        state = progress["state"]
        if state != self.progress.get("state"):
            cut_here(f"before save {state}")
        kept = {"id": self.id, "document": self.document, "progress": copy.deepcopy(progress), "end": None}
        await self._store.write(
            lambda t: [t.set_fact(key, value) for key, value in {**(facts or {}), JOB: kept}.items()]
        )
        changed = state != self.progress.get("state")
        self.progress = kept["progress"]
        tell("state", state=state, words=message)
        if changed:
            cut_here(f"after save {state}")

    async def fresh_document(self):
        return self.document


async def watch_writing():
    """Cut while RAUC writes the other slot, when as much of it is written as the host wants."""
    match = re.fullmatch(r"written ([0-9]+) %", CUT.read_text() if CUT.exists() else "")
    if not match:
        return
    size = int((OTHER_DISK / "size").read_text())

    def written():
        return int((OTHER_DISK / "stat").read_text().split()[6])

    before = written()
    while (written() - before) * 100 < size * max(1, int(match[1])):
        await asyncio.sleep(0.02)
    cut_here(match[0])


async def reboot():
    tell("rebooting")
    await systemd.reboot()


async def follow(job, update, store):
    """The update to its end, which is kept."""
    began, writing = time.time(), asyncio.create_task(watch_writing())
    try:
        details = await update.run(job)
        end = {"status": "SUCCEEDED", "code": details["reason_code"], "words": details["message"]}
    except RefusedError as error:
        end = {"status": "REJECTED", "code": error.code, "words": error.message}
    except FailedError as error:
        end = {"status": "FAILED", "code": error.code, "words": error.message}
    finally:
        writing.cancel()
        await asyncio.wait({writing})
    state = job.progress.get("state")
    said = await asyncio.to_thread(rauc_said, began) if end["status"] != "SUCCEEDED" else ""
    await store.write(lambda t: t.set_fact(JOB, {"id": job.id, "document": {}, "progress": {}, "end": end}))
    facts = await store.read(lambda t: t.facts("updates."))
    tell("end", id=job.id, state=state, facts=facts, rauc=said, now=update.status()["system"], **end)


def rauc_said(since):
    """The last lines of RAUC's journal since then."""
    command = ["journalctl", "--unit=rauc", f"--since=@{since:.0f}", "--output=cat", "--lines=20", "--no-pager"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def orders():
    with urllib.request.urlopen(f"{HOST}/orders", timeout=900) as answer:
        return json.load(answer)


async def main():
    configure("json", "info")
    target = UpdateTarget(installer="rauc", probe=["/usr/lib/camera-vm/probe"])
    rauc = subprocess.run(["rauc", "--version"], capture_output=True, text=True, check=False).stdout.split()[-1]
    tell(
        "up",
        slot=SLOT,
        version=Path("/etc/image-version").read_text().strip(),
        kernel=platform.release(),
        rauc=rauc,
        boot_s=round(time.clock_gettime(time.CLOCK_BOOTTIME), 1),
    )
    store = await Store.open(DATA / "state.db")
    try:
        while True:
            order = await asyncio.to_thread(orders)
            CUT.write_text(order["cut"])
            kept = await store.read(lambda t: t.fact(JOB))
            if kept is None or kept["end"] is not None:
                if order["job"] is None:
                    tell("idle", last=kept and kept["end"])
                    continue
                kept = {**order["job"], "progress": {}, "end": None}
            update = Update(
                {"system": target},
                keys_dir=Path("/etc/camera-agent/update-keys"),
                downloads_dir=DATA / "downloads",
                store=store,
                restarter=Restarter(units=None, boot_id=boot_id(), reboot=reboot, uptime_s=lambda: 3600.0),
                capture=None,
                cloud_ok=lambda: True,
                mutation_lock=asyncio.Lock(),
                installers={"system": Rauc(DATA / "rauc", "system")},
                agent_version="0.1.0",
                compatible=["camera-vm"],
                settle_s=1,
                settle_deadline_s=60,
            )
            await update.load()
            await follow(Job(store, kept), update, store)
    finally:
        await store.close()


try:
    asyncio.run(main())
except (AgentError, OSError) as error:
    tell("broken", words="".join(traceback.format_exception(error))[-3000:])
    sys.exit(1)
except Exception:
    tell("broken", words=traceback.format_exc()[-3000:])
    raise
