"""Sends messages over the connection of the moment, and holds back those that connections end over."""

from __future__ import annotations

import asyncio
import time

from agent.cloud.connection import Connection
from agent.cloud.offline import blames_a_message, messages_held
from agent.cloud.suspects import Suspects
from agent.errors import CloudError


class Outgoing:
    """See Suspects for what is held back."""

    def __init__(self) -> None:
        self._suspects = Suspects()

    def held(self) -> list[str]:
        """The topics that are held back."""
        return self._suspects.held(time.monotonic())

    def forget(self) -> None:
        """What has happened so far is held against no topic."""
        self._suspects = Suspects()

    async def send(
        self, connection: Connection, number: int, topic: str, payload: bytes, timeout_s: float, certificate_id: str
    ) -> tuple[int, bool]:
        """Publish over `connection`, the `number`th; PUBACK's reason code, and whether the topic had been held back.

        Raises CloudError as Session.publish().
        """
        held_s = self._suspects.wait_s(topic, time.monotonic())
        if held_s:
            held = messages_held([topic], certificate_id)
            raise CloudError(held.code, f"{held.reason}, next in {held_s:.0f} s", held.hint, retryable=True)
        try:
            async with asyncio.timeout(timeout_s):
                code = await connection.publish(topic, payload)
        except TimeoutError:
            raise CloudError(
                "no_answer", f"AWS IoT did not acknowledge a message to {topic} within {timeout_s:g} s", retryable=True
            ) from None
        except CloudError as error:
            if error.code != "connection_lost":
                raise
            if not (connection.ended.done() and blames_a_message(connection.ended.result())):
                raise CloudError("connection_ended", error.message, retryable=True) from None
            self._suspects.lost(topic, number, time.monotonic())
            raise
        return code, self._suspects.answered(topic)
