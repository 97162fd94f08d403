"""One named shadow of the thing on the wire: get, report, and what is desired but not yet reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.cloud import topics
from agent.cloud.seldom import Seldom
from agent.cloud.session import Rejected, Session
from agent.errors import CloudError
from agent.logs import get_logger

log = get_logger("cloud.shadow")
seldom = Seldom(log)


@dataclass(frozen=True)
class Shadow:
    """A shadow document; `delta` holds what is desired and differs from what is reported."""

    version: int
    desired: dict[str, Any]
    reported: dict[str, Any]
    delta: dict[str, Any]


class ShadowClient:
    """The shadow `name` of `thing`; writes only `reported`."""

    def __init__(self, session: Session, thing: str, name: str) -> None:
        self._session = session
        self._get = topics.shadow_get(thing, name)
        self._update = topics.shadow_update(thing, name)
        self._delta = topics.shadow_delta(thing, name)
        self._newest = 0
        for request in (self._get, self._update):
            session.subscribe_replies(topics.accepted(request), topics.rejected(request))

    def on_delta(self, callback: Callable[[int, dict[str, Any]], None]) -> None:
        """Call `callback(version, state)` on the event loop with all outstanding differences.

        Deltas older than what was seen already are left out. The same difference may come again under a newer version.
        After every connect a get() is needed too, since a message may have been missed.
        """

        def handle(_: str, payload: bytes) -> None:
            try:
                message = json.loads(payload)
                version, state = message["version"], message["state"]
            except (ValueError, KeyError, TypeError, RecursionError):
                version = state = None
            if not isinstance(version, int) or not isinstance(state, dict):
                seldom.warning("ignored a malformed delta", topic=self._delta, bytes=len(payload))
            elif version <= self._newest:
                log.debug("ignored an old delta", topic=self._delta, version=version, newest=self._newest)
            else:
                self._newest = version
                callback(version, state)

        self._session.subscribe(self._delta, handle)

    async def get(self) -> Shadow | None:
        """The whole shadow, None when there is none yet. Raises Rejected, CloudError."""
        try:
            reply = await self._session.request(self._get, {})
        except Rejected as error:
            if error.code != "404":
                raise
            self._newest = 0
            return None
        state, version = reply.get("state"), reply.get("version")
        if not isinstance(state, dict) or not isinstance(version, int):
            raise CloudError("malformed_reply", f"AWS IoT sent no shadow on {self._get}", retryable=True)
        self._newest = version
        parts = [part if isinstance(part := state.get(key), dict) else {} for key in ("desired", "reported", "delta")]
        return Shadow(version, *parts)

    async def report(self, reported: dict[str, Any]) -> int:
        """Merge `reported` into the shadow (None removes a key); its new version. Raises Rejected, CloudError."""
        reply = await self._session.request(self._update, {"state": {"reported": reported}})
        version = reply.get("version")
        if not isinstance(version, int):
            raise CloudError("malformed_reply", f"AWS IoT sent no version on {self._update}", retryable=True)
        return version
