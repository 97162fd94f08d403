"""What the tests of updates stand on: keys and signatures, archives, a job, a pipeline's images, and units in memory."""

from __future__ import annotations

import asyncio
import base64
import copy
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from aiohttp import web
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent.errors import FailedError
from agent.host.rauc import Bundle, RaucSlot, Situation
from agent.host.threads import to_end
from agent.store import Store
from agent.updates.manifest import PAYLOAD_TYPE, pre_authentication_encoding
from agent.updates.trust import ROOT_PAYLOAD_TYPE, key_id

T = TypeVar("T")


def new_key(seed: int) -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(hashlib.sha256(b"test key %d" % seed).digest())


def keyid_of(key: Ed25519PrivateKey) -> str:
    return key_id(key.public_key().public_bytes_raw())


def sign(payload: bytes, keys: list[Ed25519PrivateKey], kind: str = PAYLOAD_TYPE) -> dict[str, Any]:
    signed = pre_authentication_encoding(kind, payload)
    return {
        "payloadType": kind,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": keyid_of(k), "sig": base64.b64encode(k.sign(signed)).decode()} for k in keys],
    }


RELEASE, EMERGENCY, STRANGER = new_key(1), new_key(2), new_key(3)


def root_payload(
    version: int = 1,
    release: tuple[Ed25519PrivateKey, ...] = (RELEASE,),
    emergency: tuple[Ed25519PrivateKey, ...] = (EMERGENCY,),
    thresholds: tuple[int, int] = (1, 1),
    expires: str = "2099-01-01T00:00:00Z",
) -> dict[str, Any]:
    return {
        "schema": 1,
        "version": version,
        "expires": expires,
        "keys": {
            keyid_of(k): {"keytype": "ed25519", "public": k.public_key().public_bytes_raw().hex()}
            for k in (*release, *emergency)
        },
        "roles": {
            "release": {"threshold": thresholds[0], "keyids": [keyid_of(k) for k in release]},
            "emergency": {"threshold": thresholds[1], "keyids": [keyid_of(k) for k in emergency]},
        },
    }


def signed_root(payload: dict[str, Any], *keys: Ed25519PrivateKey) -> dict[str, Any]:
    return sign(json.dumps(payload).encode(), list(keys or (EMERGENCY,)), ROOT_PAYLOAD_TYPE)


def manifest(**changes: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "id": "pipe-2.0",
        "target": "pipeline",
        "installer": "app",
        "name": "pipe",
        "version": "2.0",
        "security_counter": 5,
        "size": 10,
        "installed_size": 100,
        "sha256": "ab" * 32,
        "created": "2026-01-01T00:00:00Z",
        "expires": "2099-01-01T00:00:00Z",
        **changes,
    }


def signed_manifest(*keys: Ed25519PrivateKey, **changes: Any) -> dict[str, Any]:
    return sign(json.dumps(manifest(**changes)).encode(), list(keys or (RELEASE,)))


def member(name: str, content: bytes = b"", **attributes: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode = 0o644
    for key, value in attributes.items():
        setattr(info, key, value)
    return info, content


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes], compressed: bool = True) -> Path:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    path.write_bytes(gzip.compress(plain.getvalue(), mtime=0) if compressed else plain.getvalue())
    return path


class PowerCutError(BaseException):
    """The agent ends here, as if killed."""


ACTS = (
    *("install", "arm", "_arm", "commit", "roll_back", "clean_up", "forget", "write"),
    *("_drop", "_drop_settled", "_write_trial", "_count_anew"),
)
"""What installers do in a thread that changes something."""


class Points:
    """Tells `at_point`, called in a thread, of every point at which a cut makes a difference: around all that is made durable."""

    current: ClassVar[ContextVar[Points]] = ContextVar("points")
    """Those of the camera that a task works for."""

    def __init__(self) -> None:
        self.at_point: Callable[[], None] | None = None

    async def pass_one(self) -> None:
        if self.at_point:
            await to_end(self.at_point)


async def to_end_past_points(work: Callable[..., T], *args: Any) -> T:
    """Stands in for `agent.host.threads.to_end` in an installer: there are points around its acts."""
    if getattr(work, "__name__", "") not in ACTS:
        return await to_end(work, *args)
    points = Points.current.get()
    await points.pass_one()
    result = await to_end(work, *args)
    await points.pass_one()
    return result


class PointedStore(Store):
    """There are points around every write."""

    async def write(self, change: Callable[[Any], T]) -> T:
        points = Points.current.get()
        await points.pass_one()
        result = await super().write(change)
        await points.pass_one()
        return result


class FakeRauc:
    """RAUC with two slots and its boot loader, kept in `file`, with points around what it changes."""

    current: ClassVar[ContextVar[FakeRauc]] = ContextVar("rauc")
    """That of the camera that a task works for."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.holds = {"rootfs.0": "", "rootfs.1": ""}
        """Digest of what was installed to each slot."""
        self.booted = self.next = "rootfs.0"
        self.bad: list[str] = []
        self.installs = dict.fromkeys(self.holds, 0)
        if file.exists():
            vars(self).update(json.loads(file.read_text()))

    def boot(self) -> None:
        """What the boot loader does: it starts the slot that is next, unless that is bad."""
        self.booted = next(name for name in (self.next, *self.holds) if name not in self.bad)
        self._keep()

    @classmethod
    @asynccontextmanager
    async def connected(cls) -> AsyncIterator[FakeRauc]:
        """Stands in for `agent.host.rauc.connected`."""
        yield cls.current.get()

    async def methods(self) -> frozenset[str]:
        return frozenset({"InstallBundle", "InspectBundle", "Mark", "GetSlotStatus", "GetPrimary"})

    async def situation(self) -> Situation:
        return Situation("rauc", "test-camera", self.booted, False)

    async def slots(self) -> tuple[RaucSlot, ...]:
        return tuple(
            RaucSlot(name, "rootfs", name[-1], "", name == self.booted, (f"at {times}", times) if times else None)
            for name, times in self.installs.items()
        )

    async def primary(self) -> str:
        return self.next

    async def mark(self, state: str, slot: str) -> None:
        await Points.current.get().pass_one()
        name = self.booted if slot == "booted" else slot
        self.bad = [*(other for other in self.bad if other != name), *([name] if state == "bad" else [])]
        self.next = name if state == "active" else self.next
        await asyncio.to_thread(self._keep)
        await Points.current.get().pass_one()

    async def inspect(self, bundle: Path, *_: Any) -> Bundle:
        return Bundle("test-camera", await asyncio.to_thread(bundle.read_text))

    async def install(self, bundle: Path, *_: Any) -> None:
        """As RAUC does it, the slot becomes the next one."""
        await Points.current.get().pass_one()
        self.next = next(name for name in self.holds if name != self.booted)
        self.holds[self.next] = bundle.name
        self.installs[self.next] += 1
        self.bad = [name for name in self.bad if name != self.next]
        await asyncio.to_thread(self._keep)
        await Points.current.get().pass_one()

    async def wait_for_end(self, *_: Any) -> None:
        """It is never left at work."""

    def _keep(self) -> None:
        self._file.write_text(json.dumps({key: value for key, value in vars(self).items() if key[0] != "_"}))


class FakeJob:
    """A job execution whose saves land in the store with their facts; `cut` ends the agent before or after a save."""

    id = "job-1"
    execution_number = 1

    def __init__(self, document: Mapping[str, Any], store: Any, progress: dict[str, Any] | None = None) -> None:
        self.document = document
        self.progress = progress or {}
        self.cancelled = asyncio.Event()
        self.messages: list[str] = []
        self.states: list[str] = []
        self.fresh: list[Mapping[str, Any]] = []
        self.cut_before: int | None = None
        self.cut_after: int | None = None
        self._store = store

    async def save(self, progress: dict[str, Any], message: str, *, facts: Mapping[str, Any] | None = None) -> None:
        if self.cut_before == len(self.states):
            raise PowerCutError
        kept = json.loads(json.dumps(progress))

        def change(tables: Any) -> None:
            for key, value in (facts or {}).items():
                tables.set_fact(key, value)
            tables.put_job(self.id, self.execution_number, {"progress": kept}, finished=False)

        await self._store.write(change)
        self.progress = copy.deepcopy(kept)
        self.messages.append(message)
        self.states.append(kept["state"])
        if self.cut_after == len(self.states) - 1:
            raise PowerCutError

    async def fresh_document(self) -> Mapping[str, Any]:
        return self.fresh.pop(0) if self.fresh else self.document


@dataclass(frozen=True)
class Images:
    assessed: int = 16
    ok: bool = True
    waiting: bool = False
    reasons: list[str] = field(default_factory=list)
    judged: str = "pictures"


class FakeCapture:
    """Images that are as `verdict` says."""

    def __init__(self) -> None:
        self.verdict = Images()
        self.lacks: list[str] = []
        self.asked = asyncio.Event()

    def lacking(self) -> str:
        self.asked.set()
        return self.lacks[0] if self.lacks else ""

    def reference(self) -> dict[str, Any]:
        return {"front": {"rate_hz": 1.0}}

    def compare(self, reference: dict[str, Any], since: float, least_share: float = 0.8) -> Images:
        assert reference == self.reference()
        return self.verdict


@dataclass
class FakeUnitState:
    active: str = "active"
    sub: str = "running"
    restarts: int = 0


class FakeUnits:
    """A pipeline under systemd: what it does after a restart says a file in the slot that runs.

    `blurry` spoils the images, `broken` fails to start; so does no slot at all.
    """

    def __init__(self, current: Path, capture: FakeCapture) -> None:
        self.current = current
        self.capture = capture
        self.restarted: list[str] = []
        self.unit = FakeUnitState()

    async def restart(self, unit: str) -> None:
        files = await asyncio.to_thread(self._files)
        self.restarted.append(unit)
        blurry = files is not None and "blurry" in files
        self.capture.verdict = Images(ok=not blurry, reasons=["front: blurred in 9 of 15 pictures"] if blurry else [])
        if files is None or "broken" in files:
            self.unit = FakeUnitState("failed", "failed")
            raise FailedError("unit_failed", f"{unit} failed to start")
        self.unit = FakeUnitState()

    async def state(self, unit: str) -> FakeUnitState:
        return self.unit

    def _files(self) -> set[str] | None:
        return {path.name for path in self.current.iterdir()} if self.current.exists() else None


class Server:
    """Serves `content` with Range, unless `faults` has something for the request; counts the bytes it sent."""

    def __init__(self, content):
        self.content = content
        self.etag = '"one"'
        self.faults = []
        self.requests = []
        self.sent = 0

    async def handle(self, request):
        self.requests.append(request)
        fault = self.faults.pop(0) if self.faults else None
        if fault:
            answer = await fault(self, request)
            if answer is not None:
                return answer
        return await self.serve(request)

    async def serve(self, request, *, cut_after=None, ranges=True, status=None, headers=None):
        start, total = 0, len(self.content)
        wanted = request.headers.get("Range")
        if wanted and ranges and request.headers.get("If-Range", self.etag) == self.etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= total:
                return web.Response(status=416)
        body = self.content[start:]
        response = web.StreamResponse(status=status or (206 if start else 200))
        response.headers["ETag"] = self.etag
        if start:
            response.headers["Content-Range"] = f"bytes {start}-{total - 1}/{total}"
        response.content_length = len(body)
        response.headers.update(headers or {})
        await response.prepare(request)
        end = len(body) if cut_after is None else min(cut_after, len(body))
        for position in range(0, end, 16 * 1024):
            block = body[position : min(end, position + 16 * 1024)]
            await response.write(block)
            self.sent += len(block)
        if end < len(body):
            request.transport.close()
        return response


@asynccontextmanager
async def serving(server):
    app = web.Application()
    app.router.add_get("/{path:.*}", server.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()
