"""A device shadow service in memory, with the rules of AWS IoT: merging, null, versions, deltas, the size limit."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.errors import CloudError

LIMIT_BYTES = 8192


@dataclass(frozen=True)
class Shadow:
    version: int
    desired: dict[str, Any]
    reported: dict[str, Any]
    delta: dict[str, Any]


class ShadowCloud:
    """The service's side; `want` is an operator, `client()` a camera. Counts what the camera asks for."""

    def __init__(self) -> None:
        self.version = 0
        self.exists = False
        self.desired: dict[str, Any] = {}
        self.reported: dict[str, Any] = {}
        self.online = True
        self.refuse_next: list[CloudError] = []
        self.reports: list[dict[str, Any]] = []
        self.gets = 0
        self.changed = asyncio.Event()
        self.on_desired: Callable[[], None] = lambda: None
        """What a camera does on an `update/accepted` that holds desired."""
        self._listeners: list[Callable[[int, dict[str, Any]], None]] = []

    def want(self, desired: dict[str, Any] | None) -> int:
        """Replace the whole of desired, as an operator does."""
        self.desired = _merge({}, desired or {})
        asyncio.get_running_loop().call_soon(self.on_desired)
        return self._accept()

    def delete(self, *, forget_version: bool = False) -> None:
        self.exists, self.desired, self.reported = False, {}, {}
        if forget_version:
            self.version = 0

    def reconnect(self) -> Client:
        """A camera's new connection; the old one hears nothing any more."""
        self._listeners.clear()
        return Client(self)

    def deliver(self, version: int, state: dict[str, Any]) -> None:
        """A delta message, possibly old or repeated."""
        for listener in self._listeners:
            listener(version, state)

    @property
    def delta(self) -> dict[str, Any]:
        return _difference(self.desired, self.reported)

    async def until(self, done: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not done():
                self.changed.clear()
                await self.changed.wait()

    def _accept(self) -> int:
        self.exists = True
        self.version += 1
        self.changed.set()
        if self.delta:
            loop = asyncio.get_running_loop()
            loop.call_soon(self.deliver, self.version, copy.deepcopy(self.delta))
        return self.version


class Client:
    """What the agent sees of the service."""

    def __init__(self, cloud: ShadowCloud) -> None:
        self._cloud = cloud

    def on_delta(self, callback: Callable[[int, dict[str, Any]], None]) -> None:
        self._cloud._listeners.append(callback)

    async def get(self) -> Shadow | None:
        await self._arrive()
        cloud = self._cloud
        cloud.gets += 1
        cloud.changed.set()
        if not cloud.exists:
            return None
        return Shadow(cloud.version, *(copy.deepcopy(part) for part in (cloud.desired, cloud.reported, cloud.delta)))

    async def report(self, reported: dict[str, Any]) -> int:
        await self._arrive()
        cloud = self._cloud
        if cloud.refuse_next:
            raise cloud.refuse_next.pop(0)
        if "null" in json.dumps(list(_arrays(reported))):
            raise CloudError("400", "State contains an invalid node")
        merged = _merge(cloud.reported, reported)
        if len(json.dumps([merged, cloud.desired], separators=(",", ":"))) > LIMIT_BYTES:
            raise CloudError("413", "The payload exceeds the maximum size allowed")
        cloud.reported = merged
        cloud.reports.append(copy.deepcopy(reported))
        return cloud._accept()

    async def _arrive(self) -> None:
        await asyncio.sleep(0)
        if not self._cloud.online:
            raise CloudError("offline", "no connection to the cloud", retryable=True)


def _merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(old)
    for key, value in new.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            before = merged.get(key)
            below = _merge(before if isinstance(before, dict) else {}, value)
            merged[key] = below
            if not below:
                del merged[key]
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def _difference(desired: dict[str, Any], reported: dict[str, Any]) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    for key, value in desired.items():
        there = reported.get(key)
        if isinstance(value, dict) and isinstance(there, dict):
            below = _difference(value, there)
            if below:
                delta[key] = below
        elif key not in reported or there != value or isinstance(there, bool) != isinstance(value, bool):
            delta[key] = value
    return delta


def _arrays(tree: Any) -> Any:
    if isinstance(tree, dict):
        for value in tree.values():
            yield from _arrays(value)
    elif isinstance(tree, list):
        yield tree
