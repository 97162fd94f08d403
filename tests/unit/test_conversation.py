"""What is told of a job and what its answers mean: pauses on a clock that jumps, the form of details, times."""

import asyncio
import itertools
import json
import random
import re
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.cloud.jobs import MAX_DETAIL_KEY, MAX_DETAIL_VALUE, MAX_DETAILS, parse_execution, sanitise, seconds
from agent.cloud.session import Rejected
from agent.errors import CloudError
from agent.jobs.conversation import RETRY_S, STEP_TIMEOUT_MINUTES, Conversation
from agent.jobs.machine import Gone, Phase, Record, Seen, Took, Unclear
from tests import skipping_loop

RECORD = Record("a", 2, 7, Phase.ENDED, "run", {}, 0.0, status="FAILED", details={"reason_code": "x", "message": "why"})
LOST = CloudError("no_answer", "no answer within 20 s", retryable=True)
TIMES = 12


def refusal(code, state=None, *, retryable=False):
    details = {"code": code, **({"executionState": state} if state is not None else {})}
    return Rejected(code, "no", retryable=retryable, details=details)


THROTTLED = refusal("RequestThrottled", retryable=True)
BROKEN = refusal("InternalError", retryable=True)


class Service:
    """Gives the answers that it was made with, one after the other, and notes the requests."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []
        self.times = []

    async def update(self, job_id, **options):
        return await self.answer((job_id, options))

    async def describe(self, job_id, number):
        return await self.answer((job_id, number))

    async def describe_next(self):
        return await self.answer("next")

    async def answer(self, request):
        self.requests.append(request)
        self.times.append(asyncio.get_running_loop().time())
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    @property
    def pauses(self):
        return [later - earlier for earlier, later in itertools.pairwise(self.times)]


def execution(status="IN_PROGRESS", version=9):
    return parse_execution({"jobId": "a", "status": status, "executionNumber": 2, "versionNumber": version})


ASKING = {
    "tell": (lambda c: c.tell(RECORD, "FAILED", RECORD.details), 8),
    "ask": (lambda c: c.ask(RECORD), execution()),
    "next": (lambda c: c.next(), execution()),
}


@pytest.mark.conformance("C-JOBS-20")
@pytest.mark.parametrize("error", [THROTTLED, BROKEN, LOST], ids=lambda error: error.code)
@pytest.mark.parametrize("what", ASKING)
def test_what_was_not_answered_is_sent_again_after_growing_jittered_pauses(what, error):
    request, answer = ASKING[what]

    def ratios(seed):
        random.seed(seed)
        service = Service(*[error] * TIMES, answer)
        skipping_loop.run(request(Conversation(service)))
        assert len(service.requests) == TIMES + 1
        assert all(body == service.requests[0] for body in service.requests), "the same content"
        full = [min(RETRY_S[0] * 2**n, RETRY_S[1]) for n in range(TIMES)]
        found = [pause / whole for pause, whole in zip(service.pauses, full, strict=True)]
        assert all(0.5 <= ratio <= 1.001 for ratio in found)
        return found

    first, second = ratios(1), ratios(2)
    assert max(first) - min(first) > 0.1, "jitter within a row"
    assert [round(r, 3) for r in first] != [round(r, 3) for r in second], "and from camera to camera"


@pytest.mark.conformance("C-JOBS-17", "C-JOBS-18", "C-JOBS-21")
@pytest.mark.parametrize(
    ("answer", "event"),
    [
        (8, Took(8)),
        (refusal("VersionMismatch", {"status": "IN_PROGRESS", "versionNumber": 9}), Seen("IN_PROGRESS", 9)),
        (refusal("VersionMismatch", {"status": "CANCELED", "versionNumber": 9}), Seen("CANCELED", 9)),
        (refusal("InvalidStateTransition", {"status": "FAILED", "versionNumber": 8}), Seen("FAILED", 8)),
        (refusal("InvalidStateTransition", {"status": "TIMED_OUT"}), Seen("TIMED_OUT", 0)),
        (refusal("InvalidStateTransition"), Unclear()),
        (refusal("VersionMismatch", {}), Unclear()),
        (refusal("ResourceNotFound"), Gone()),
        (refusal("TerminalStateReached"), Gone()),
    ],
)
def test_a_definite_answer_is_taken_at_once(answer, event):
    service = Service(answer)
    assert skipping_loop.run(Conversation(service).tell(RECORD, "FAILED", RECORD.details)) == event
    [(job_id, options)] = service.requests
    assert (job_id, options["execution_number"], options["expected_version"]) == ("a", 2, 7)
    assert (options["status"], options["details"]) == ("FAILED", RECORD.details)


@pytest.mark.conformance("C-JOBS-21")
@pytest.mark.parametrize("state", ["IN_PROGRESS", "FAILED", "CANCELED"])
def test_asked_after_a_lost_answer_the_cloud_says_what_it_has(state):
    service = Service(LOST, execution(state, 9))
    assert skipping_loop.run(Conversation(service).ask(RECORD)) == Seen(state, 9)
    assert service.requests == [("a", 2)] * 2


@pytest.mark.conformance("C-JOBS-23")
@pytest.mark.parametrize(("status", "timer"), [("IN_PROGRESS", STEP_TIMEOUT_MINUTES), ("SUCCEEDED", None)])
def test_the_step_timer_goes_with_in_progress_only(status, timer):
    service = Service(8)
    skipping_loop.run(Conversation(service).tell(RECORD, status, {}))
    assert service.requests[0][1]["step_timeout_minutes"] == timer
    assert 1 <= STEP_TIMEOUT_MINUTES <= 10080


@pytest.mark.conformance("F-21")
def test_an_end_that_is_never_taken_as_valid_is_given_up_after_it_was_sent_with_less():
    service = Service(*[refusal("InvalidRequest")] * 3)
    assert skipping_loop.run(Conversation(service).tell(RECORD, "FAILED", RECORD.details)) == Gone()
    assert service.requests[0][1]["details"] == RECORD.details
    assert service.requests[-1][1]["details"].keys() < RECORD.details.keys()


ANYTHING = st.text(alphabet=st.characters(codec=None), max_size=3000) | st.text(
    "\0\n\t \x1b\u200b\ud800\x80é界", max_size=40
)


@pytest.mark.conformance("C-JOBS-15")
@given(st.dictionaries(ANYTHING, ANYTHING | st.integers() | st.none(), max_size=14))
def test_any_details_become_such_that_aws_takes_them(details):
    clean = sanitise(details)
    assert len(clean) <= MAX_DETAILS <= 10
    assert MAX_DETAIL_KEY <= 128
    assert MAX_DETAIL_VALUE <= 1024
    for key, value in clean.items():
        assert re.fullmatch(r"[a-zA-Z0-9:_-]{1,128}", key)
        assert 1 <= len(value) <= 1024
        assert not any(unicodedata.category(character).startswith("C") for character in value)
    assert sanitise(clean) == clean
    if any(details):
        assert clean


@pytest.mark.conformance("C-JOBS-25")
@given(st.sampled_from(["message", "stdout", "stderr", "url"]), st.text(max_size=1100), st.text(max_size=1100))
def test_what_signs_an_address_never_gets_into_the_details(key, before, after):
    address = "https://bucket.s3.amazonaws.com/key?X-Amz-Signature=canary4711&X-Amz-Security-Token=canary4712"
    assert "canary471" not in sanitise({key: f"{before} {address} {after}"}).get(key, "")


@pytest.mark.conformance("C-JOBS-28")
@pytest.mark.parametrize(
    ("given_time", "epoch_s"),
    [(1767225600, 1767225600.0), (1767225600123, 1767225600.123), (1767225600.25, 1767225600.25), (0, 0.0)],
)
def test_times_are_seconds_and_milliseconds_are_seen_as_such(given_time, epoch_s):
    assert seconds(given_time) == epoch_s
    assert parse_execution({"jobId": "a", "status": "QUEUED", "queuedAt": given_time}).queued_at == epoch_s


NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, -(2**70), 10**400])
SCALARS = st.none() | st.booleans() | st.text(max_size=5) | NUMBERS
VALUES = SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS, max_size=2)


@pytest.mark.conformance("C-JOBS-28")
@given(VALUES)
@example(10**400)
def test_no_time_does_harm(value):
    assert seconds(value) is None or isinstance(seconds(value), float)


@pytest.mark.conformance("C-CONN-27", "F-08")
@given(
    st.fixed_dictionaries(
        {"jobId": st.just("a") | VALUES, "status": st.just("QUEUED") | VALUES},
        optional=dict.fromkeys(
            ("executionNumber", "versionNumber", "statusDetails", "queuedAt", "jobDocument", "surprise"), VALUES
        ),
    )
    | VALUES
)
@example({"jobId": "a", "status": "QUEUED", "executionNumber": 2**70})
def test_whatever_comes_as_an_execution_is_one_or_none_or_malformed(value):
    try:
        execution = parse_execution(value)
    except ValueError:
        return
    if execution:
        assert execution.document is None or isinstance(execution.document, dict)
        assert abs(execution.execution_number) < 2**63, "the journal takes 64 bits"
        json.dumps([execution.version_number, execution.details, execution.queued_at])
