"""A device shadow service with the rules of AWS IoT: merging, null, versions, deltas, the limits of size and depth.

ShadowCloud is in memory; WiredShadow is the same behind the scripted MQTT server.
"""

from __future__ import annotations

import asyncio
import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from agent.errors import CloudError
from tests.integration.mqtt_peer import PUBLISH, MqttPeer, Packet

LIMIT_BYTES = 8192
LIMIT_LEVELS = 8


@dataclass(frozen=True)
class Shadow:
    version: int
    desired: dict[str, Any]
    reported: dict[str, Any]
    delta: dict[str, Any]


class ShadowCloud:
    """The service's side; `want` is an operator, `reconnect()` gives a camera. Counts what the camera asks for."""

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
        """Replace the whole of desired, as an operator does. Raises CloudError where both no longer fit."""
        desired = merge({}, desired or {})
        _check_size(desired, self.reported)
        self.desired = desired
        asyncio.get_running_loop().call_soon(self.on_desired)
        return self._accept()

    def delete(self, *, forget_version: bool = False) -> None:
        """`forget_version`: as AWS IoT does 48 h later."""
        self.exists, self.desired, self.reported = False, {}, {}
        if forget_version:
            self.version = 0
        asyncio.get_running_loop().call_soon(self.deliver, 0, {})

    def reconnect(self) -> Client:
        """A camera's new connection; the old one hears nothing any more."""
        self._listeners.clear()
        return Client(self)

    def deliver(self, version: int, state: dict[str, Any]) -> None:
        """A delta message, possibly old or repeated."""
        for listener in self._listeners:
            listener(version, state)

    def take(self, reported: dict[str, Any]) -> int:
        """A camera's update; the new version. Raises CloudError with AWS IoT's code."""
        if self.refuse_next:
            raise self.refuse_next.pop(0)
        if any(None in array for array in _arrays(reported)):
            raise CloudError("400", "State contains an invalid node")
        if _depth(reported) > LIMIT_LEVELS:
            raise CloudError("400", "JSON contains too many levels of nesting; maximum is 6")
        merged = merge(self.reported, reported)
        _check_size(self.desired, merged)
        self.reported = merged
        self.reports.append(copy.deepcopy(reported))
        return self._accept()

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
        return self._cloud.take(reported)

    async def _arrive(self) -> None:
        await asyncio.sleep(0)
        if not self._cloud.online:
            raise CloudError("offline", "no connection to the cloud", retryable=True)


class WiredShadow:
    """ShadowCloud as the named shadow `name` of `thing` on `peer`. `swallow` counts requests that get no answer."""

    def __init__(self, peer: MqttPeer, thing: str, name: str = "config") -> None:
        self.cloud, self.peer = ShadowCloud(), peer
        self.prefix = f"$aws/things/{thing}/shadow/name/{name}"
        self.swallow = 0
        self.answers: list[dict[str, Any]] = []
        """What the next get/accepted hold, instead of the shadow."""
        self.told: list[dict[str, Any]] = []
        """Deltas that were sent."""
        peer.serve(f"{self.prefix}/get", self._get)
        peer.serve(f"{self.prefix}/update", self._update)
        self.cloud._listeners.append(self._tell)

    @property
    def updates(self) -> list[dict[str, Any]]:
        """The bodies of all updates that came, accepted or not, without their tokens."""
        bodies = [packet.json() for packet in self.peer.of(PUBLISH, topic=f"{self.prefix}/update")]
        return [{key: value for key, value in body.items() if key != "clientToken"} for body in bodies]

    @property
    def gets(self) -> int:
        """How many gets came."""
        return len(self.peer.of(PUBLISH, topic=f"{self.prefix}/get"))

    def want(self, desired: dict[str, Any] | None) -> int:
        """As ShadowCloud.want, told by update/accepted too."""
        version = self.cloud.want(desired)
        body = {"state": {"desired": desired}, "metadata": {}, "version": version, "timestamp": int(time.time())}
        self.peer.send(f"{self.prefix}/update/accepted", body)
        return version

    def delete(self, *, forget_version: bool = False) -> None:
        """An operator deletes the shadow."""
        version = self.cloud.version
        self.cloud.delete(forget_version=forget_version)
        self.peer.send(f"{self.prefix}/delete/accepted", {"version": version, "timestamp": int(time.time())})

    def _tell(self, version: int, state: dict[str, Any]) -> None:
        if version:
            self.told.append(state)
            body = {"version": version, "timestamp": int(time.time()), "state": state, "metadata": {}}
            self.peer.send(f"{self.prefix}/update/delta", body)

    def _get(self, packet: Packet) -> Iterator[tuple[str, Any]]:
        cloud = self.cloud
        if self._swallowed():
            return
        if self.answers:
            yield f"{packet.topic}/accepted", self._stamped(packet, self.answers.pop(0))
        elif not cloud.exists:
            refusal = {"code": 404, "message": "No shadow exists with name: 'config'"}
            yield f"{packet.topic}/rejected", self._stamped(packet, refusal)
        else:
            sections = {"desired": cloud.desired, "reported": cloud.reported, "delta": cloud.delta}
            state = {name: section for name, section in sections.items() if section}
            body = {"state": state, "metadata": {}, "version": cloud.version}
            yield f"{packet.topic}/accepted", self._stamped(packet, body)

    def _update(self, packet: Packet) -> Iterator[tuple[str, Any]]:
        if self._swallowed():
            return
        state = packet.json()["state"]
        try:
            version = self.cloud.take(state["reported"])
        except CloudError as error:
            refusal = {"code": int(error.code), "message": error.message}
            yield f"{packet.topic}/rejected", self._stamped(packet, refusal)
        else:
            yield f"{packet.topic}/accepted", self._stamped(packet, {"state": state, "version": version})

    def _swallowed(self) -> bool:
        self.swallow -= 1
        return self.swallow >= 0

    def _stamped(self, packet: Packet, body: dict[str, Any]) -> dict[str, Any]:
        return {**body, "timestamp": int(time.time()), "clientToken": packet.json()["clientToken"]}


def merge(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` merged into the section `old`: objects recursively, null removes, arrays whole, empty objects vanish."""
    merged = copy.deepcopy(old)
    for key, value in new.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            before = merged.get(key)
            below = merge(before if isinstance(before, dict) else {}, value)
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


def _check_size(desired: dict[str, Any], reported: dict[str, Any]) -> None:
    document = {"desired": desired, "reported": reported}
    if len(json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()) > LIMIT_BYTES:
        raise CloudError("413", "The payload exceeds the maximum size allowed")


def _depth(tree: Any) -> int:
    below = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ()
    return max((isinstance(tree, dict) + _depth(each) for each in below), default=0)


def _arrays(tree: Any) -> Iterator[list[Any]]:
    if isinstance(tree, list):
        yield tree
    for each in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        yield from _arrays(each)
