"""What the agent has subscribed to: declared once, made again whenever AWS IoT does not have it, and who gets a message."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from agent.cloud import topics
from agent.cloud.offline import REFUSED, reason_name
from agent.cloud.seldom import Seldom
from agent.errors import CloudError
from agent.logs import get_logger

log = get_logger("cloud")

Handler = Callable[[str, bytes], None]


class Subscriptions:
    """Permanent QoS 1 subscriptions with their handlers; `refused` holds the SUBACK reason codes of those denied."""

    def __init__(self) -> None:
        self.declared = asyncio.Event()
        """Set when something was declared that is not subscribed yet; make() clears it."""
        self.refused: dict[str, int] = {}
        self._handlers: dict[str, list[Handler]] = {}
        self._accepted: set[str] = set()
        self._seldom = Seldom(log)

    def __contains__(self, topic_filter: str) -> bool:
        return topic_filter in self._handlers

    def declare(self, topic_filter: str, handler: Handler) -> bool:
        """Add a handler; whether the filter has yet to be subscribed. Raises CloudError for one AWS IoT would not take."""
        wrong = topics.filter_problem(topic_filter)
        if wrong:
            raise CloudError("filter_not_valid", f"can't subscribe to {topic_filter[:300]!r}: {wrong}")
        if topic_filter not in self._handlers and len(self._handlers) >= topics.MAX_SUBSCRIPTIONS:
            raise CloudError(
                "too_many_subscriptions",
                f"can't subscribe to {topic_filter}: AWS IoT takes {topics.MAX_SUBSCRIPTIONS} subscriptions per connection",
            )
        self._handlers.setdefault(topic_filter, []).append(handler)
        if topic_filter in self._accepted:
            return False
        self.declared.set()
        return True

    def forget(self) -> None:
        """AWS IoT has lost the session: everything has to be subscribed again."""
        self._accepted.clear()

    async def make(self, subscribe: Callable[[Sequence[str]], Awaitable[list[int]]]) -> bool:
        """Subscribe to what is missing, by groups; whether something was accepted that had been refused before."""
        self.declared.clear()
        before = set(self.refused)
        missing = [topic_filter for topic_filter in self._handlers if topic_filter not in self._accepted]
        for start in range(0, len(missing), topics.MAX_FILTERS_PER_SUBSCRIBE):
            group = missing[start : start + topics.MAX_FILTERS_PER_SUBSCRIBE]
            for topic_filter, code in zip(group, await subscribe(group), strict=True):
                if code < REFUSED:
                    self._accepted.add(topic_filter)
                    self.refused.pop(topic_filter, None)
                    continue
                self.refused[topic_filter] = code
                log.warning("subscription refused", filter=topic_filter, reason=reason_name(code))
        return bool(before - set(self.refused))

    def refused_for(self, topic: str) -> str:
        """The refused filter that messages on `topic` would have come by; empty when there is none."""
        return next((name for name in self.refused if topics.matches(name, topic)), "")

    def unanswered(self, topic: str, timeout_s: float, certificate_id: str) -> CloudError:
        """The error for a request on `topic` that was not answered in time."""
        refused = self.refused_for(topics.accepted(topic))
        if refused:
            return CloudError(
                "subscription_refused",
                f"no answer on {topic}: AWS IoT refused the subscription to {refused}",
                f"check that the policy of certificate {certificate_id} allows iot:Subscribe on it",
                retryable=True,
            )
        return CloudError("no_answer", f"AWS IoT did not answer on {topic} within {timeout_s:g} s", retryable=True)

    def dispatch(self, topic: str, payload: bytes) -> None:
        """Give a message to every handler that wants it; one that fails keeps it from no other."""
        handlers = [h for pattern, known in self._handlers.items() if topics.matches(pattern, topic) for h in known]
        if not handlers:
            self._seldom.warning("ignored a message that no subscription matches", topic=topic, bytes=len(payload))
        for handler in handlers:
            try:
                handler(topic, payload)
            except Exception:  # noqa: BLE001  whatever a handler does wrong, the next message must come through
                self._seldom.warning("handling a message failed", topic=topic, bytes=len(payload), exc_info=True)
