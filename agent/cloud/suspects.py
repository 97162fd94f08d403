"""Topics whose messages seem to make AWS IoT close the connection, as it may do where a policy does not allow them. Pure.

Such a message, sent again at each connect, would keep the camera off-line for ever. So a topic that was in flight at three
losses in a row, without an answer in between, is held back; then it is tried again, one suspect at a time, so that a topic
that only happened to be in flight with the culprit is cleared at once.
"""

from __future__ import annotations

from dataclasses import dataclass

TIMES = 3
HELD_S = (60.0, 3600.0)
ALONE_S = 10.0
FORGOTTEN_S = 2 * HELD_S[1]


@dataclass(frozen=True)
class Suspect:
    """`losses` of connections in a row, the last one being `connection`; held back until monotonic time `until`."""

    losses: int = 0
    until: float = 0.0
    connection: int = 0


class Suspects:
    """Times are monotonic seconds."""

    def __init__(self) -> None:
        self._known: dict[str, Suspect] = {}
        self._probing = ""
        self._probing_until = float("-inf")

    def held(self, now: float) -> list[str]:
        """The topics that are held back, and were asked for lately."""
        self._forget(now)
        return sorted(topic for topic, known in self._known.items() if known.losses >= TIMES)

    def wait_s(self, topic: str, now: float) -> float:
        """0 when a message to `topic` may be sent now, which a suspect then is on probation for; else seconds to wait."""
        known = self._known.get(topic)
        if known is None or known.losses < TIMES:
            return 0.0
        wait = known.until - now
        if self._probing != topic:
            wait = max(wait, self._probing_until - now)
        if wait > 0:
            return wait
        self._probing, self._probing_until = topic, now + ALONE_S
        return 0.0

    def lost(self, topic: str, connection: int, now: float) -> bool:
        """The connection of this number ended while messages to `topic` were in flight; whether it is held back from now on."""
        self._forget(now)
        known = self._known.get(topic, Suspect())
        if known.connection == connection:
            return False
        losses = known.losses + 1
        doublings = min(max(losses - TIMES, 0), 16)
        pause = min(HELD_S[0] * 2**doublings, HELD_S[1]) if losses >= TIMES else 0.0
        self._known[topic] = Suspect(losses, now + pause, connection)
        self._release(topic)
        return losses == TIMES

    def answered(self, topic: str) -> bool:
        """AWS IoT answered a message to `topic`, whatever it said: it is no suspect. Whether it was held back."""
        known = self._known.pop(topic, None)
        self._release(topic)
        return known is not None and known.losses >= TIMES

    def _forget(self, now: float) -> None:
        """Topics that nobody has used for long, such as those of a job that has ended."""
        self._known = {topic: known for topic, known in self._known.items() if now - known.until < FORGOTTEN_S}

    def _release(self, topic: str) -> None:
        if self._probing == topic:
            self._probing, self._probing_until = "", float("-inf")
