"""What a failure to connect means, for every error that awscrt gives; and how long to wait then."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cloud.offline import (
    REASON_CODES,
    Diagnosis,
    Facts,
    Failure,
    History,
    Pace,
    diagnose,
    publish_refused,
    reason_name,
    reason_slug,
    refused_before_connack,
    wait_s,
)

FACTS = Facts("x.iot.example", 8883, "cam-7", "ab" * 32, 1000.0, 2000.0, True, 1500.0)
PROXIED = {"proxy": "proxy.example:3128"}
REFUSED = "AWS_ERROR_MQTT5_CONNACK_CONNECTION_REFUSED"
DISCONNECTED = "AWS_ERROR_MQTT5_DISCONNECT_RECEIVED"
HANGUP = "AWS_ERROR_MQTT_UNEXPECTED_HANGUP"

# Each error that awscrt 0.36 was seen to give: the code before the CONNACK, the same through a proxy, and after it.
ERRORS = {
    "AWS_IO_DNS_INVALID_NAME": ("dns", "proxy", "lost"),
    "AWS_IO_DNS_QUERY_FAILED": ("dns", "proxy", "lost"),
    "AWS_IO_DNS_QUERY_AGAIN": ("dns", "proxy", "lost"),
    "AWS_IO_DNS_NO_ADDRESS_FOR_HOST": ("dns", "proxy", "lost"),
    "AWS_IO_SOCKET_CONNECTION_REFUSED": ("tcp", "proxy", "lost"),
    "AWS_IO_SOCKET_NO_ROUTE_TO_HOST": ("tcp", "proxy", "lost"),
    "AWS_IO_SOCKET_NETWORK_DOWN": ("tcp", "proxy", "lost"),
    "AWS_IO_SOCKET_TIMEOUT": ("tcp", "proxy", "no_answer"),
    "AWS_IO_SOCKET_CLOSED": ("closed", "closed", "lost"),
    "AWS_IO_BROKEN_PIPE": ("closed", "closed", "lost"),
    "AWS_IO_TLS_ERROR_NEGOTIATION_FAILURE": ("tls", "tls", "lost"),
    "AWS_IO_TLS_ERROR_ALERT_RECEIVED": ("tls", "tls", "lost"),
    "AWS_IO_TLS_NEGOTIATION_TIMEOUT": ("no_answer", "proxy", "no_answer"),
    "AWS_ERROR_HTTP_PROXY_CONNECT_FAILED": ("proxy", "proxy", "lost"),
    "AWS_ERROR_HTTP_CONNECTION_CLOSED": ("closed", "closed", "lost"),
    HANGUP: ("closed", "closed", "lost"),
    "AWS_ERROR_MQTT5_CONNACK_TIMEOUT": ("no_answer", "no_answer", "no_answer"),
    "AWS_ERROR_MQTT5_PING_RESPONSE_TIMEOUT": ("no_answer", "no_answer", "no_answer"),
    "AWS_ERROR_MQTT_TIMEOUT": ("no_answer", "no_answer", "no_answer"),
    "AWS_ERROR_MQTT5_DECODE_PROTOCOL_ERROR": ("refused", "refused", "lost"),
    REFUSED: ("refused", "refused", "lost"),
    "CONNECT_UNANSWERED": ("no_answer", "proxy", "no_answer"),
    "SUBSCRIBE_UNANSWERED": ("no_answer", "no_answer", "no_answer"),
    "SOMETHING_NEW": ("unknown", "unknown", "lost"),
}
# Each reason code that AWS IoT gives: the code for it in a CONNACK and in a DISCONNECT.
REASONS = {
    0x80: ("refused", "refused"),
    0x81: ("refused", "refused"),
    0x82: ("refused", "refused"),
    0x85: ("not_authorised", "not_authorised"),
    0x86: ("not_authorised", "not_authorised"),
    0x87: ("not_authorised", "not_authorised"),
    0x88: ("closed", "closed"),
    0x89: ("closed", "closed"),
    0x8B: ("closed", "closed"),
    0x8D: ("no_answer", "no_answer"),
    0x8E: ("taken_over", "taken_over"),
    0x8F: ("refused", "refused"),
    0x90: ("refused", "refused"),
    0x93: ("refused", "refused"),
    0x94: ("refused", "refused"),
    0x95: ("refused", "refused"),
    0x96: ("throttled", "throttled"),
    0x97: ("throttled", "throttled"),
    0x98: ("closed", "closed"),
    0x9B: ("refused", "refused"),
    0xA1: ("refused", "refused"),
    0xFE: ("refused", "refused"),
}


def explained(failure: Failure, **changes) -> Diagnosis:
    facts = Facts(**{**FACTS.__dict__, **changes})
    diagnosis = diagnose(failure, History().after(failure, 0.0, 0.0, Pace()), facts)
    assert diagnosis.reason
    assert diagnosis.hint
    return diagnosis


def test_every_error_before_and_after_the_connack_with_and_without_a_proxy():
    tried = 0
    for error, (before, proxied, after) in ERRORS.items():
        for expected, was_connected, changes in (
            (before, False, {}),
            (proxied, False, PROXIED),
            (after, True, {}),
            (after, True, PROXIED),
        ):
            diagnosis = explained(Failure(error, None, was_connected), **changes)
            assert diagnosis.code == expected, (error, was_connected, changes, diagnosis)
            tried += 1
    print(f"{tried} failures without a reason code tried")


def test_every_reason_code_in_connack_and_disconnect():
    tried = 0
    for code, expected in REASONS.items():
        for was_connected, changes in itertools.product((False, True), ({}, PROXIED)):
            failure = Failure(DISCONNECTED if was_connected else REFUSED, code, was_connected)
            diagnosis = explained(failure, **changes)
            assert diagnosis.code == expected[was_connected], (code, was_connected, diagnosis)
            tried += 1
    print(f"{tried} failures with a reason code tried")


@pytest.mark.parametrize("error", ["AWS_IO_TLS_ERROR_NEGOTIATION_FAILURE", "AWS_IO_SOCKET_CLOSED", HANGUP])
@pytest.mark.parametrize("changes", [{}, PROXIED], ids=["direct", "proxied"])
@pytest.mark.parametrize(
    ("now", "synchronised", "code"),
    [(2001.0, True, "certificate"), (2001.0, None, "certificate"), (2001.0, False, "clock"), (999.0, True, "clock")],
)
def test_a_clock_outside_of_the_certificates_validity_explains_it(error, changes, now, synchronised, code):
    diagnosis = explained(Failure(error), now=now, clock_synchronised=synchronised, **changes)
    assert diagnosis.code == code
    assert explained(Failure(REFUSED, 0x87), now=now, clock_synchronised=synchronised, **changes).code == code
    assert explained(Failure("AWS_IO_DNS_QUERY_FAILED"), now=now).code == "dns"


def test_a_doubtful_clock_is_named_beside_a_tls_failure():
    assert "date" in explained(Failure("AWS_IO_TLS_ERROR_NEGOTIATION_FAILURE"), clock_synchronised=False).hint


@pytest.mark.parametrize(
    ("error", "said", "remedy"),
    [
        ("PROXY_DNS", "name can't be resolved", "cloud.proxy_url"),
        ("PROXY_UNREACHABLE", "can't be reached", "cloud.proxy_url"),
        ("PROXY_SILENT", "does not answer", "proxy works"),
        ("PROXY_CLOSED", "closed", "log"),
        ("PROXY_NOT_HTTP", "not answer as an HTTP proxy", "cloud.proxy_url"),
        ("PROXY_STATUS_407", "credentials", "user and password"),
        ("PROXY_STATUS_403", "status 403", "443 as cloud.port"),
        ("PROXY_STATUS_502", "status 502", "x.iot.example:8883"),
        ("AWS_IO_SOCKET_TIMEOUT", "does not answer", "cloud.proxy_url"),
        ("AWS_IO_TLS_NEGOTIATION_TIMEOUT", "nothing comes back", "allows"),
    ],
)
def test_what_is_wrong_with_a_proxy_is_told_with_the_remedy(error, said, remedy):
    diagnosis = explained(Failure(error), **PROXIED)
    assert diagnosis.code == "proxy"
    assert "proxy.example:3128" in diagnosis.reason
    assert said in diagnosis.reason
    assert remedy in diagnosis.hint
    assert "443" not in explained(Failure("PROXY_STATUS_403"), **PROXIED, port=443).hint.replace(":443", "")


@pytest.mark.conformance("C-CONN-07")
def test_repeated_closes_before_the_connack_mean_not_authorised():
    for error in (HANGUP, "AWS_IO_SOCKET_CLOSED"):
        history, codes = History(), []
        for _ in range(5):
            failure = Failure(error)
            history = history.after(failure, 0.0, 0.0, Pace())
            codes.append(diagnose(failure, history, FACTS).code)
        assert codes == ["closed", "closed", "not_authorised", "not_authorised", "not_authorised"]


def test_which_ends_may_be_the_wills_fault():
    suspected = [code for code in REASON_CODES if refused_before_connack(Failure(REFUSED, code))]
    assert {0x80, 0x85, 0x86, 0x87, 0x90, 0x95, 0x9B} <= set(suspected)
    assert not {0x88, 0x89, 0x8B, 0x96, 0x97, 0x98} & set(suspected)
    assert refused_before_connack(Failure(HANGUP))
    for error in ERRORS.keys() - {HANGUP, REFUSED}:
        assert not refused_before_connack(Failure(error))
    assert not refused_before_connack(Failure(DISCONNECTED, 0x87, True))


def test_reason_codes_in_words_and_as_error_codes():
    assert reason_name(0x87) == "not authorised (0x87)"
    assert reason_name(0xFE) == "unknown reason (0xFE)"
    assert (reason_slug(0x97), reason_slug(0xFE)) == ("quota_exceeded", "reason_fe")


@pytest.mark.conformance("C-CONN-12")
def test_a_refused_publish_tells_whether_to_try_again():
    refusals = {code: publish_refused("t", code, "ab") for code in REASON_CODES}
    assert {code for code, error in refusals.items() if error.retryable} == {
        *(0x80, 0x83, 0x88, 0x89, 0x8B, 0x91, 0x93, 0x96, 0x97, 0x98)
    }
    assert "ab" in refusals[0x87].hint


def waits(failure: Failure, times: int, chance: float, every_s: float = 10.0, lasted_s: float = 0.0) -> list[float]:
    history, found = History(), []
    for number in range(times):
        history = history.after(failure, number * every_s, lasted_s, Pace())
        found.append(wait_s(diagnose(failure, history, FACTS), history, Pace(), chance))
    return found


@pytest.mark.conformance("C-CONN-06")
def test_the_back_off_doubles_to_two_minutes_with_full_jitter():
    failure = Failure("AWS_IO_SOCKET_TIMEOUT")
    assert waits(failure, 9, 1.0) == [2, 4, 8, 16, 32, 64, 120, 120, 120]
    assert waits(failure, 9, 0.5) == [1.5, 2.5, 4.5, 8.5, 16.5, 32.5, 60.5, 60.5, 60.5]
    assert waits(failure, 9, 0.0) == [1] * 9


def test_a_connection_that_held_starts_the_back_off_anew():
    assert waits(Failure(HANGUP, None, True), 4, 1.0, lasted_s=31) == [2, 2, 2, 2]
    assert waits(Failure(HANGUP, None, True), 4, 1.0, lasted_s=3) == [2, 4, 8, 16]


@pytest.mark.conformance("C-CONN-07")
@pytest.mark.parametrize("failure", [Failure(REFUSED, 0x87), Failure(HANGUP), Failure("AWS_IO_SOCKET_CLOSED")])
def test_refused_for_long_it_slows_down_but_never_gives_up(failure):
    found = waits(failure, 30, 0.0)
    assert found[:4] == [1, 1, 1, 1]
    assert all(60 <= wait <= 180 for wait in found[4:])


def test_closed_over_a_publish_now_and_then_it_does_not_slow_down():
    assert max(waits(Failure(DISCONNECTED, 0x87, True), 30, 0.0, lasted_s=3600)) == 1


@pytest.mark.conformance("C-CONN-08")
def test_taken_over_three_times_in_two_minutes_waits_five_minutes():
    failure = Failure(DISCONNECTED, 0x8E, True)
    found = waits(failure, 3, 0.5, lasted_s=31)
    assert max(found[:2]) < 5
    assert found[2] >= 300
    assert max(waits(failure, 20, 0.5, every_s=61, lasted_s=31)) < 5


CODES = st.sampled_from(["tcp", "closed", "not_authorised", "certificate", "taken_over", "proxy", "throttled"])
HISTORIES = st.builds(
    History,
    attempts=st.integers(0, 10**9),
    hangups=st.integers(0, 100),
    refusals=st.integers(0, 100),
    takeovers=st.lists(st.floats(0, 120), max_size=5).map(tuple),
)


@pytest.mark.conformance("C-CONN-06")
@given(HISTORIES, st.floats(0, 1), CODES)
def test_waits_stay_between_a_second_and_seven_minutes(history, chance, code):
    wait = wait_s(Diagnosis(code, "", ""), history, Pace(), chance)
    assert 1 <= wait <= 420


@pytest.mark.conformance("C-CONN-06")
@given(st.integers(1, 10**9), st.floats(0, 1), st.floats(0, 1))
def test_the_jitter_is_full_and_the_cap_at_least_a_minute(attempts, one, other):
    history, tcp = History(attempts=attempts), Diagnosis("tcp", "", "")
    low, high = sorted(wait_s(tcp, history, Pace(), chance) for chance in (one, other))
    least, most = (wait_s(tcp, history, Pace(), chance) for chance in (0.0, 1.0))
    assert least <= low <= high <= most
    assert least == Pace().shortest_s
    assert most == min(Pace().longest_s, 2.0 ** min(attempts, 20))
    assert Pace().longest_s >= 60
    assert wait_s(tcp, history, Pace(), 0.5) == pytest.approx((least + most) / 2)


@given(
    st.floats(0.01, 10),
    st.floats(0.01, 1000),
    st.integers(0, 10**6),
    st.floats(0, 1),
)
def test_any_pace_keeps_its_bounds(shortest, longest, attempts, chance):
    pace = Pace(shortest_s=shortest, longest_s=longest)
    wait = wait_s(Diagnosis("tcp", "", ""), History(attempts=attempts), pace, chance)
    assert shortest <= wait <= max(shortest, longest) * 1.0000001


@given(st.lists(st.tuples(st.sampled_from([*ERRORS]), st.sampled_from([None, *REASONS]), st.booleans()), max_size=30))
def test_any_row_of_failures_is_explained_and_waited_for(row):
    history = History()
    for number, (error, code, was_connected) in enumerate(row):
        failure = Failure(error, code, was_connected)
        history = history.after(failure, number * 7.0, 3.0, Pace())
        diagnosis = diagnose(failure, history, FACTS)
        assert diagnosis.code
        assert diagnosis.reason
        assert diagnosis.hint
        assert 1 <= wait_s(diagnosis, history, Pace(), 0.3) <= 420
    assert history.attempts == len(row)
