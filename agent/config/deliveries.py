"""What the program of each config target should run with now, for programs that ask the local API and confirm what they got.

Only the newest offer of a target counts: a slow reader gets it next, whatever it missed, and a confirmation is for it alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from agent.config.desired import Problem, digest, pointer
from agent.errors import RefusedError
from agent.logs import get_logger

log = get_logger("config")

Json = dict[str, Any]

HEARTBEAT_S = 30.0
MAX_WORDS = 500


@dataclass(frozen=True)
class _Offer:
    document: Json | None
    digest: str
    state: Literal["trial", "applied"]


@dataclass
class _Target:
    """The present offer, None before the first, and what the program said to it."""

    name: str
    offer: _Offer | None = None
    accepted: bool | None = None
    message: str = ""
    asked: bool = False
    """Whether anybody got the present offer."""
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set, and replaced by another, with each offer and each answer."""

    def wake(self) -> None:
        self.changed.set()
        self.changed = asyncio.Event()

    def status(self) -> Json:
        offer = self.offer
        return {
            "digest": offer.digest if offer else None,
            "state": offer.state if offer else "unknown",
            "confirmed": self.accepted is True,
            "refused": self.message if self.accepted is False else None,
        }


class Deliveries:
    """The present offer of each of the targets `names`; nothing of it is durable, so it is offered anew after a restart.

    All of it is used on the event loop. Every method raises RefusedError `unknown_target` for another name.
    """

    def __init__(self, names: Iterable[str], *, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._targets = {name: _Target(name) for name in names}
        self._heartbeat_s = heartbeat_s

    def offer(self, name: str, document: Json | None, state: Literal["trial", "applied"]) -> None:
        """Put `document` out; None: the fleet sets nothing, the program uses its own. The same one again changes nothing.

        What the program said to a document stays while only the state changes.
        """
        target = self._target(name)
        new = _Offer(copy.deepcopy(document), "" if document is None else digest(document), state)
        old = target.offer
        if old and (old.digest, old.state) == (new.digest, new.state):
            return
        target.offer = new
        if old is None or old.digest != new.digest:
            target.accepted, target.message, target.asked = None, "", False
        target.wake()

    def listing(self) -> dict[str, Json]:
        """Each target's `digest` and `state` (null and `unknown` before the first offer), `confirmed`, and `refused`.

        `refused` is why the program refused the present offer, in its words; None unless it did.
        """
        return {name: target.status() for name, target in self._targets.items()}

    def current(self, name: str) -> Json:
        """The present offer: `target`, `document`, and what `listing` has. Raises RefusedError `not_ready` before the first."""
        target = self._target(name)
        if target.offer is None:
            raise _not_ready(name)
        target.asked = True
        return {"target": name, "document": target.offer.document, **target.status()}

    def follow(self, name: str) -> AsyncIterator[Json]:
        """The present offer at once, each newer one as soon as it is asked for, and `heartbeat` while there is none.

        What the program answers is no new offer. Before the first offer there are heartbeats alone.
        """
        return self._follow(self._target(name))

    async def _follow(self, target: _Target) -> AsyncIterator[Json]:
        clock = asyncio.get_running_loop().time
        seen, beat_at = None, clock() + self._heartbeat_s
        while True:
            changed = target.changed
            if target.offer is not seen:
                seen = target.offer
                yield self.current(target.name)
                beat_at = clock() + self._heartbeat_s
                continue
            try:
                async with asyncio.timeout_at(beat_at):
                    await changed.wait()
            except TimeoutError:
                yield {"heartbeat": True}
                beat_at = clock() + self._heartbeat_s

    def confirm(self, name: str, digest: str, *, accepted: bool, message: str) -> None:
        """The program's word on the document of this digest: it runs with it, or refuses it, with a message; the last counts.

        Raises RefusedError: `outdated` when another document is offered by now, `not_ready` when none is yet.
        """
        target = self._target(name)
        if target.offer is None:
            raise _not_ready(name)
        if digest != target.offer.digest:
            words = f"another configuration than this is offered to {name} by now"
            raise RefusedError("outdated", words, "ask again and confirm what you got")
        words = _tidy(message)
        if (target.accepted, target.message) == (accepted, words):
            return
        target.accepted, target.message = accepted, words
        target.wake()
        say = log.info if accepted else log.warning
        event = "a program runs with its configuration" if accepted else "a program refuses its configuration"
        say(event, target=name, digest=digest[:12], words=words)

    async def confirmed(self, name: str, timeout_s: float) -> Problem | None:
        """Wait for the program's word on the present offer: None when it accepts, else why the offer can't stay."""
        target = self._target(name)
        wanted = target.offer and target.offer.digest

        def replaced() -> bool:
            return target.offer is None or target.offer.digest != wanted

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while target.accepted is None and not replaced():
                    await target.changed.wait()
        code = "not_confirmed"
        if replaced():
            words = "another configuration was offered before the program confirmed this one"
        elif target.accepted is None:
            words = f"the program did not confirm it within {timeout_s:g} s" + (
                "" if target.asked else "; nobody asked the local API for it: is the program running?"
            )
        elif target.accepted:
            return None
        else:
            code, words = "refused_by_program", f"the program refuses it: {target.message or 'it does not say why'}"
        return Problem(pointer("targets", name), words, code)

    def _target(self, name: str) -> _Target:
        if name not in self._targets:
            known = ", ".join(self._targets) or "none"
            raise RefusedError(
                "unknown_target", f"this camera has no config target {name!r:.40}", f"its targets: {known}"
            )
        return self._targets[name]


def _not_ready(name: str) -> RefusedError:
    words = f"what {name} should run with is not known yet"
    return RefusedError("not_ready", words, "the agent is only starting: try again, and run with what you had last")


def _tidy(message: str) -> str:
    """A program's words on one line of at most MAX_WORDS printable characters."""
    text = "".join(c if c.isprintable() else "?" for c in " ".join(message[: 8 * MAX_WORDS].split()))
    return text if len(text) <= MAX_WORDS else text[: MAX_WORDS - 1] + "…"
