"""One named shadow of the thing on the wire: get, report, and what is desired but not yet reported.

All requests keep to a pace below what AWS IoT allows, whoever asks for them and however often.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from agent.cloud import topics
from agent.cloud.seldom import Seldom
from agent.cloud.session import Rejected, Session
from agent.errors import CloudError
from agent.logs import get_logger

IN_FLIGHT = 5
PER_SECOND = 10
"""Half of what AWS IoT takes of one connection and for one thing: operators ask too."""
BETWEEN_REPORTS_S = 1.0

log = get_logger("cloud.shadow")
seldom = Seldom(log)


@dataclass(frozen=True)
class Shadow:
    """A shadow document; `delta` holds what is desired and differs from what is reported."""

    version: int
    desired: Any
    """An object; anything else is handed on as it came, for whoever judges it."""
    reported: dict[str, Any]
    delta: dict[str, Any]


class Rate:
    """At most `most` events in any `per_s` seconds. Pure."""

    def __init__(self, most: int, per_s: float) -> None:
        self._per_s = per_s
        self._last = deque([float("-inf")] * most, maxlen=most)

    def book(self, now: float) -> float:
        """Book the next place, at `now` (monotonic seconds) or later; the seconds to wait for it."""
        at = max(now, self._last[0] + self._per_s)
        self._last.append(at)
        return at - now


class Pace:
    """What the shadows of one thing share: IN_FLIGHT requests unanswered at most, PER_SECOND begun in any second."""

    def __init__(self) -> None:
        self._free = asyncio.Semaphore(IN_FLIGHT)
        self._rate = Rate(PER_SECOND, 1.0)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until a request may begin; it is under way within the block."""
        async with self._free:
            await asyncio.sleep(self._rate.book(time.monotonic()))
            yield


class ShadowClient:
    """The shadow `name` of `thing`; writes only `reported`, and not twice within BETWEEN_REPORTS_S."""

    def __init__(self, session: Session, thing: str, name: str, pace: Pace | None = None) -> None:
        self._session = session
        self._pace = pace or Pace()
        self._reports = Rate(1, BETWEEN_REPORTS_S)
        self._get = topics.shadow_get(thing, name)
        self._update = topics.shadow_update(thing, name)
        self._delta = topics.shadow_delta(thing, name)
        self._deleted = topics.accepted(topics.shadow(thing, name) + "/delete")
        self._newest = 0
        self._reporting = 0
        self._later: tuple[int, dict[str, Any]] | None = None
        self._look: Callable[[], None] = lambda: None
        for request in (self._get, self._update):
            session.subscribe_replies(topics.accepted(request), topics.rejected(request))

    def on_delta(self, callback: Callable[[int, dict[str, Any]], None]) -> None:
        """Call `callback(version, state)` on the event loop with all outstanding differences.

        Deltas not newer than what was seen already are left out, and those that a report of ours brings about; to know
        them, one that comes while a report is under way is looked at after its answer. The same difference may come again
        under a newer version. A deleted shadow is told as version 0 without differences; one made anew may count from the
        start. After every connect a get() is needed too, since a message may have been missed, and after a version that is
        lower than expected.
        """

        def handle(_: str, payload: bytes) -> None:
            try:
                message = json.loads(payload)
                version, state = _version(message), message["state"]
            except (ValueError, KeyError, TypeError, RecursionError):
                version = state = None
            if version is None or not isinstance(state, dict):
                seldom.warning("ignored a malformed delta", topic=self._delta, bytes=len(payload))
            elif version <= max(self._newest, self._later[0] if self._later else 0):
                log.debug("ignored an old delta", topic=self._delta, version=version, newest=self._newest)
            else:
                self._later = version, state
                look()

        def look() -> None:
            if not self._reporting and self._later:
                (version, state), self._later = self._later, None
                if version > self._newest:
                    self._newest = version
                    callback(version, state)

        def deleted(_topic: str, _payload: bytes) -> None:
            self._newest, self._later = 0, None
            callback(0, {})

        self._look = look

        self._session.subscribe(self._delta, handle)
        self._session.subscribe(self._deleted, deleted)

    async def get(self) -> Shadow | None:
        """The whole shadow, None when there is none yet. Raises Rejected, CloudError."""
        try:
            reply = await self._request(self._get, {})
        except Rejected as error:
            if error.code != "404":
                raise
            self._newest = 0
            return None
        state, version = reply.get("state") or {}, _version(reply)
        if not isinstance(state, dict) or version is None:
            raise CloudError("malformed_reply", f"AWS IoT sent no shadow on {self._get}", retryable=True)
        self._newest = version
        desired = state.get("desired")
        reported, delta = (part if isinstance(part := state.get(key), dict) else {} for key in ("reported", "delta"))
        return Shadow(version, {} if desired is None else desired, reported, delta)

    async def report(self, reported: dict[str, Any]) -> int:
        """Merge `reported` into the shadow (None removes a key); its new version. Raises Rejected, CloudError.

        Waits where the last report was less than BETWEEN_REPORTS_S ago.
        """
        await asyncio.sleep(self._reports.book(time.monotonic()))
        self._reporting += 1
        try:
            reply = await self._request(self._update, {"state": {"reported": reported}})
            version = _version(reply)
            if version is None:
                raise CloudError("malformed_reply", f"AWS IoT sent no version on {self._update}", retryable=True)
            if version == self._newest + 1:  # nobody else has written in between
                self._newest = version
            return version
        finally:
            self._reporting -= 1
            self._look()

    async def _request(self, topic: str, body: Mapping[str, Any]) -> dict[str, Any]:
        async with self._pace.turn():
            return await self._session.request(topic, body)


def _version(message: Mapping[str, Any]) -> int | None:
    version = message.get("version")
    return version if isinstance(version, int) and not isinstance(version, bool) else None
