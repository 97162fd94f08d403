"""Last will and birth: the will alternates after refusals until it is known what AWS IoT takes; it never locks out."""

from __future__ import annotations

import itertools
import json

import pytest

from agent.cloud.announcement import Announcement
from agent.cloud.offline import Failure
from agent.errors import CloudError

REFUSED = Failure("AWS_ERROR_MQTT5_CONNACK_CONNECTION_REFUSED", 0x87)
HANGUP = Failure("AWS_ERROR_MQTT_UNEXPECTED_HANGUP")
QUOTA = Failure("AWS_ERROR_MQTT5_CONNACK_CONNECTION_REFUSED", 0x97)
NETWORK = Failure("AWS_IO_SOCKET_TIMEOUT")
LOST = Failure("AWS_IO_SOCKET_CLOSED", None, True)


def announce(nonce: str, alive: bool) -> tuple[str, bytes]:
    return "t/presence", json.dumps({"nonce": nonce, "alive": alive}).encode()


def attempts(announcement: Announcement, *outcomes: Failure | None) -> list[bool]:
    """Whether each CONNECT had a will; None is success, and then the connection is lost."""
    had = []
    for outcome in outcomes:
        had.append(announcement.will() is not None)
        if outcome:
            announcement.ended(outcome)
        else:
            announcement.connected()
            announcement.ended(LOST)
    return had


def test_every_connect_has_a_will_with_a_fresh_nonce():
    announcement = Announcement(announce)
    wills = [announcement.will() for _ in range(5)]
    nonces = {json.loads(will[1])["nonce"] for will in wills if will}
    assert len(nonces) == 5
    assert all(len(nonce) == 32 for nonce in nonces)


@pytest.mark.parametrize("failure", [QUOTA, NETWORK, Failure("AWS_IO_TLS_ERROR_NEGOTIATION_FAILURE"), LOST])
def test_other_failures_leave_the_will_in(failure):
    assert all(attempts(Announcement(announce), *[failure] * 6, None, failure, None))


@pytest.mark.parametrize("failure", [REFUSED, HANGUP])
def test_refused_it_alternates_without_end(failure):
    assert attempts(Announcement(announce), *[failure] * 7) == [True, False] * 3 + [True]


def test_what_works_is_remembered():
    assert attempts(Announcement(announce), REFUSED, None, None, NETWORK, None, REFUSED, None) == [True] + [False] * 6


def test_a_mere_close_proves_it_the_second_time_only():
    assert attempts(Announcement(announce), HANGUP, None, None) == [True, False, True]
    assert attempts(Announcement(announce), HANGUP, None, HANGUP, None, None) == [True, False, True, False, False]
    had = attempts(Announcement(announce), HANGUP, None, None, HANGUP, None, None)
    assert had == [True, False, True, True, False, True]  # once with a will in between: it was not the will


def test_refused_without_a_will_too_it_was_not_the_will():
    assert attempts(Announcement(announce), REFUSED, REFUSED, REFUSED, None, None) == [True, False, True, False, True]
    assert attempts(Announcement(announce), REFUSED, REFUSED, None, None) == [True, False, True, True]


def test_after_any_row_of_ends_a_forbidden_will_costs_one_attempt_at_most():
    tried = 0
    for outcomes in itertools.product([REFUSED, HANGUP, QUOTA, NETWORK, None], repeat=6):
        announcement, refused_with_will = Announcement(announce), False
        for outcome in outcomes:
            will = announcement.will()
            assert not (refused_with_will and will), outcomes
            # None: AWS IoT would let it in, if only it had no will
            failure = REFUSED if outcome is None and will else outcome
            if failure:
                announcement.ended(failure)
                refused_with_will = bool(will) and failure in (REFUSED, HANGUP)
            else:
                announcement.connected()
                announcement.ended(LOST)
                refused_with_will = False
        if announcement.will():
            announcement.ended(REFUSED)
        assert announcement.will() is None
        tried += 1
    print(f"{tried} rows of ends tried")


class Sent:
    def __init__(self, error: Exception | None = None) -> None:
        self.messages: list[tuple[str, dict]] = []
        self.error = error

    async def __call__(self, topic: str, payload: bytes) -> None:
        self.messages.append((topic, json.loads(payload)))
        if self.error:
            raise self.error


@pytest.mark.conformance("C-CONN-20")
async def test_birth_and_will_have_the_same_nonce():
    announcement, sent = Announcement(announce), Sent()
    for _ in range(3):
        will = announcement.will()
        assert will
        announcement.connected()
        await announcement.publish_birth(sent)
        assert json.loads(will[1]) == {"nonce": sent.messages[-1][1]["nonce"], "alive": False}
        assert sent.messages[-1][1]["alive"] is True
    assert len({message["nonce"] for _, message in sent.messages}) == 3


@pytest.mark.parametrize(
    ("error", "births"),
    [
        (CloudError("not_authorised", "no"), 1),
        (CloudError("quota_exceeded", "later", retryable=True), 6),
        (CloudError("no_answer", "silence", retryable=True), 6),
        (CloudError("offline", "gone", retryable=True), 6),
        (CloudError("connection_lost", "gone", retryable=True), 3),
        (ZeroDivisionError(), 6),
    ],
)
async def test_a_birth_that_fails_is_never_fatal_and_what_ends_connections_is_left_out(error, births):
    announcement, sent = Announcement(announce), Sent(error)
    for _ in range(6):
        announcement.will()
        announcement.connected()
        await announcement.publish_birth(sent)
        announcement.ended(LOST)
    assert len(sent.messages) == births


async def test_a_connection_closed_as_not_authorised_over_a_birth_has_no_successor():
    announcement, sent = Announcement(announce), Sent(CloudError("connection_lost", "gone", retryable=True))
    for _ in range(3):
        announcement.will()
        announcement.connected()
        await announcement.publish_birth(sent)
        announcement.ended(Failure("AWS_ERROR_MQTT5_DISCONNECT_RECEIVED", 0x87, True))
    assert len(sent.messages) == 1


@pytest.mark.parametrize("broken", [lambda *_: 1 / 0, lambda *_: ("a/+", b""), lambda *_: ("a" * 300, b"")])
async def test_a_broken_announcement_is_left_out(broken):
    announcement, sent = Announcement(broken), Sent()
    assert announcement.will() is None
    announcement.connected()
    await announcement.publish_birth(sent)
    assert sent.messages == []


async def test_without_announce_there_is_neither():
    announcement, sent = Announcement(None), Sent()
    assert attempts(announcement, REFUSED, None, HANGUP) == [False] * 3
    await announcement.publish_birth(sent)
    assert sent.messages == []
