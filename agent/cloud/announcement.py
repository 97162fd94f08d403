"""Last will and birth message of each connection, with the same nonce, so that a late will can be told from a new one.

AWS IoT refuses a CONNECT whose will the policy does not allow, and may close a connection over the birth. Neither ever
keeps the camera out: after such an end the next attempt does without.
"""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable

from agent.cloud import topics
from agent.cloud.offline import NOT_AUTHORISED, Failure, blames_a_message, refused_before_connack
from agent.errors import CloudError
from agent.logs import get_logger

BIRTHS_LOST = 3

Announce = Callable[[str, bool], tuple[str, bytes]]
"""From a connection's nonce and whether it stands to the topic and the payload that say so."""

log = get_logger("cloud")


class Announcement:
    """Asked for a will before every CONNECT, and told how the attempt and the connection went."""

    def __init__(self, announce: Announce | None) -> None:
        self._announce = announce
        self._nonce = ""
        self._carried = False
        """Whether the CONNECT made last had a will."""
        self._without = False
        """Whether the next CONNECT goes without."""
        self._settled = False
        """Whether it is certain that only CONNECTs without a will are let in."""
        self._refused_with = self._refused_without = 0
        self._explicit = False
        """Whether one of the refusals since the last success was a CONNACK, not a mere close."""
        self._suspicions = 0
        self._birth_under_way = False
        self._births_lost = 0
        self._births_off = False

    def will(self) -> tuple[str, bytes] | None:
        """Topic and payload of the will for the next CONNECT, with a fresh nonce; None when it goes without."""
        self._nonce, self._birth_under_way = uuid.uuid4().hex, False
        will = None if self._without else self._message(alive=False)
        self._carried = will is not None
        return will

    def connected(self) -> None:
        """The CONNECT was accepted."""
        if self._carried:
            self._suspicions = 0
        elif self._without and not self._settled:
            proven = bool(self._refused_with and not self._refused_without)
            self._settled = self._without = proven and (self._explicit or self._suspicions > 0)
            self._suspicions += proven
            if self._settled:
                log.warning(
                    "AWS IoT lets the camera in without its last will only; it does without until the next start",
                    hint="let the certificate's policy allow iot:Publish on the event topic",
                )
        self._refused_with = self._refused_without = 0
        self._explicit = False

    def ended(self, failure: Failure) -> None:
        """An attempt failed, or the connection was lost."""
        if failure.was_connected:
            self._judge_birth(failure)
        elif self._carried and refused_before_connack(failure):
            self._refused_with += 1
            self._explicit = self._explicit or failure.reason_code is not None
            self._without = True
            log.info("the CONNECT was refused; the next one goes without the last will, which may be the cause")
        elif self._without and not self._settled and refused_before_connack(failure):
            self._refused_without += 1
            self._without = False
            log.info("the CONNECT was refused without a last will too; the next one has it again")

    async def publish_birth(self, publish: Callable[[str, bytes], Awaitable[None]]) -> None:
        """Say that the connection stands, once; a failure is logged only."""
        birth = None if self._births_off else self._message(alive=True)
        if birth is None:
            return
        self._birth_under_way = True
        try:
            await publish(*birth)
        except CloudError as error:
            log.warning("the birth message was not published", code=error.code, reason=error.message)
            self._births_off = not error.retryable
            self._birth_under_way = error.code in ("connection_lost", "connection_ended")
        except Exception:
            log.exception("publishing the birth message failed")
            self._birth_under_way = False
        else:
            self._birth_under_way, self._births_lost = False, 0

    def _judge_birth(self, failure: Failure) -> None:
        if not self._birth_under_way or not blames_a_message(failure):
            return
        self._births_lost += 1
        if failure.reason_code == NOT_AUTHORISED or self._births_lost >= BIRTHS_LOST:
            self._births_off = True
            log.warning(
                "the connection ended over the birth message; it is left out until the next start",
                hint="let the certificate's policy allow iot:Publish on the event topic",
            )

    def _message(self, *, alive: bool) -> tuple[str, bytes] | None:
        if self._announce is None:
            return None
        try:
            topic, payload = self._announce(self._nonce, alive)
        except Exception:
            log.exception("making the announcement failed", alive=alive)
            return None
        wrong = topics.problem(topic)
        if wrong:
            log.warning("the announcement can't be published", topic=topic[:300], alive=alive, reason=wrong)
            return None
        return topic, payload
