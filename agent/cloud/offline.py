"""Why there is no connection to AWS IoT, in words a technician can act on, and how long to wait. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from agent.errors import CloudError

NOT_AUTHORISED = 0x87
TAKEN_OVER = 0x8E
TAKEN_OVER_WINDOW_S = 120.0
TAKEN_OVER_TIMES = 3
HANGUPS_UNTIL_NOT_AUTHORISED = 3
REFUSALS_UNTIL_SLOW = 5
REFUSED = 0x80

REASON_CODES = {
    0x80: "unspecified error",
    0x81: "malformed packet",
    0x82: "protocol error",
    0x83: "implementation-specific error",
    0x85: "client id not valid",
    0x86: "bad user name or password",
    0x87: "not authorised",
    0x88: "server unavailable",
    0x89: "server busy",
    0x8B: "server shutting down",
    0x8D: "keep-alive timeout",
    0x8E: "session taken over",
    0x8F: "topic filter not valid",
    0x90: "topic name not valid",
    0x91: "packet identifier in use",
    0x93: "receive maximum exceeded",
    0x94: "topic alias not valid",
    0x95: "packet too large",
    0x96: "message rate too high",
    0x97: "quota exceeded",
    0x98: "administrative action",
    0x99: "payload format not valid",
    0x9B: "QoS not supported",
    0xA1: "subscription identifiers not supported",
}
PASSING_REASON_CODES = {0x80, 0x83, 0x88, 0x89, 0x8B, 0x91, 0x93, 0x96, 0x97, 0x98}


@dataclass(frozen=True)
class Link:
    """The connection as a person wants to know it.

    `connected`: usable, every declared subscription answered (`code` is `subscription_refused` when the policy denied
    some). `connecting`: first attempt, or subscribing. `offline`: between attempts; `code`, `reason`, `hint` say why.
    """

    state: Literal["connected", "connecting", "offline", "stopped"] = "stopped"
    since: float = 0.0
    """When the state began, seconds since the epoch."""
    code: str = ""
    reason: str = ""
    hint: str = ""
    session_present: bool = False
    """Whether AWS IoT still had our session at the last connect."""
    connects: int = 0
    """Successful CONNECTs of this process."""


@dataclass(frozen=True)
class Pace:
    """How fast to reconnect; seconds."""

    shortest_s: float = 1.0
    longest_s: float = 120.0
    refused_s: float = 60.0
    """Least wait once it is clear that AWS IoT does not let this certificate in."""
    taken_over_s: float = 300.0
    """Least wait when another client uses the same client id."""
    settled_s: float = 30.0
    """A connection that lasted so long starts the back-off anew."""
    between_connects_s: float = 1.0
    """Least time between two CONNECTs, whatever asks for them."""


@dataclass(frozen=True)
class Failure:
    """One failed attempt or lost connection."""

    error: str
    """awscrt's name of the error, such as AWS_IO_DNS_QUERY_FAILED."""
    reason_code: int | None = None
    """Of the CONNACK or of the server's DISCONNECT, None when there was none."""
    was_connected: bool = False
    """Whether a CONNACK with success had come."""


@dataclass(frozen=True)
class Facts:
    """What the machine knows about itself; times in seconds since the epoch, None where unknown."""

    endpoint: str = ""
    port: int = 8883
    client_id: str = ""
    certificate_id: str = ""
    certificate_from: float | None = None
    certificate_until: float | None = None
    clock_synchronised: bool | None = None
    now: float = 0.0


@dataclass(frozen=True)
class History:
    """What happened until now; `attempts` since a connection last held, the others in a row."""

    attempts: int = 0
    hangups: int = 0
    refusals: int = 0
    takeovers: tuple[float, ...] = ()

    def after(self, failure: Failure, now: float, connected_s: float, pace: Pace) -> History:
        """The history including `failure` at monotonic time `now`, after a connection of `connected_s` seconds."""
        settled = failure.was_connected and connected_s >= pace.settled_s
        hangup = not failure.was_connected and _hung_up(failure)
        takeovers = tuple(at for at in self.takeovers if now - at < TAKEN_OVER_WINDOW_S)
        if failure.reason_code == TAKEN_OVER:
            takeovers = (*takeovers, now)
        return replace(
            self,
            attempts=1 if settled else self.attempts + 1,
            hangups=self.hangups + 1 if hangup else 0,
            refusals=self.refusals + 1 if failure.reason_code == NOT_AUTHORISED else 0,
            takeovers=takeovers,
        )


@dataclass(frozen=True)
class Diagnosis:
    """A failure in plain words: stable code, what happened, what to do."""

    code: str
    reason: str
    hint: str


def diagnose(failure: Failure, history: History, facts: Facts) -> Diagnosis:
    """What most likely keeps the camera off-line. `history` already counts `failure`."""
    where = f"{facts.endpoint}:{facts.port}"
    error, reason_code = failure.error, failure.reason_code
    if reason_code is not None and reason_code >= REFUSED:
        return _diagnose_reason_code(failure, history, facts)
    if "DNS" in error:
        return Diagnosis(
            "dns",
            f"the name {facts.endpoint} can't be resolved",
            "check cloud.endpoint, the network cable and the DNS server of this network",
        )
    if "PROXY" in error:
        return Diagnosis(
            "proxy", f"the HTTP proxy did not open a way to {where}", "check cloud.proxy_url and the proxy"
        )
    if "TLS" in error:
        return _diagnose_tls(facts, where)
    if not failure.was_connected and _hung_up(failure):
        if history.hangups >= HANGUPS_UNTIL_NOT_AUTHORISED:
            return _refused(
                f"{where} closed {history.hangups} connections in a row before answering, as AWS IoT does with a "
                "certificate or policy it does not accept",
                facts,
            )
        return Diagnosis("closed", f"{where} closed the connection before answering", "it is tried again by itself")
    if "SOCKET" in error:
        refused = "refused the connection" if "REFUSED" in error else "can't be reached"
        return Diagnosis("tcp", f"{where} {refused}", f"check that the firewall lets TCP port {facts.port} out")
    if any(word in error for word in ("TIMEOUT", "UNANSWERED")):
        return Diagnosis(
            "no_answer",
            f"{where} stopped answering",
            "check the quality of the network; a lower cloud.keep_alive_s notices it sooner",
        )
    if failure.was_connected:
        return Diagnosis("lost", f"the connection to {where} broke off", "it is made again by itself")
    return Diagnosis("unknown", f"the connection to {where} failed: {error}", "see the log of the agent")


def wait_s(diagnosis: Diagnosis, history: History, pace: Pace, chance: float) -> float:
    """Seconds until the next attempt; `chance` is uniform in 0…1. Doubling with full jitter between the pace's bounds."""
    exponent = min(max(history.attempts, 1), 20)
    ceiling = min(pace.longest_s, pace.shortest_s * math.ldexp(1.0, exponent))
    wait = pace.shortest_s + chance * max(0.0, ceiling - pace.shortest_s)
    if diagnosis.code == "taken_over" and len(history.takeovers) >= TAKEN_OVER_TIMES:
        return pace.taken_over_s + wait
    lasting = max(history.refusals, history.hangups) >= REFUSALS_UNTIL_SLOW
    if diagnosis.code in ("not_authorised", "certificate") and lasting:
        return pace.refused_s + wait
    return wait


def reason_name(code: int) -> str:
    """An MQTT 5 reason code in words with its number."""
    return f"{REASON_CODES.get(code, 'unknown reason')} (0x{code:02X})"


def reason_slug(code: int) -> str:
    """An MQTT 5 reason code as an error code in snake_case."""
    return REASON_CODES.get(code, f"reason_{code:02x}").replace(" ", "_").replace("-", "_").lower()


def publish_refused(topic: str, code: int, certificate_id: str) -> CloudError:
    """The error for a PUBACK with a reason code of refusal."""
    return CloudError(
        reason_slug(code),
        f"AWS IoT refused a message to {topic}: {reason_name(code)}",
        f"check that the policy of certificate {certificate_id} allows it" if code == NOT_AUTHORISED else "",
        retryable=code in PASSING_REASON_CODES,
    )


def subscriptions_refused(refused: Mapping[str, int], certificate_id: str) -> Diagnosis:
    """What refused SUBACKs, as filter to reason code, mean; an empty Diagnosis when there are none."""
    if not refused:
        return Diagnosis("", "", "")
    listed = ", ".join(f"{name}: {reason_name(code)}" for name, code in refused.items())
    return Diagnosis(
        "subscription_refused",
        f"AWS IoT refused subscriptions: {listed}",
        f"check that the policy of certificate {certificate_id} allows iot:Subscribe on them",
    )


def _hung_up(failure: Failure) -> bool:
    """Whether the other side ended a connection that stood, instead of refusing or losing it."""
    return failure.reason_code is None and any(
        word in failure.error for word in ("HANGUP", "SOCKET_CLOSED", "CONNECTION_CLOSED", "BROKEN_PIPE")
    )


def _diagnose_reason_code(failure: Failure, history: History, facts: Facts) -> Diagnosis:
    code = failure.reason_code or 0
    if code == NOT_AUTHORISED and not failure.was_connected:
        return _refused(f"AWS IoT does not let this certificate connect as {facts.client_id}", facts)
    if code == NOT_AUTHORISED:
        return Diagnosis(
            "not_authorised",
            "AWS IoT closed the connection over a publish or subscription that the policy does not allow, "
            "or because the certificate was deactivated",
            f"check the policies of certificate {facts.certificate_id}",
        )
    if code == TAKEN_OVER:
        times = f" {len(history.takeovers)} times within two minutes" if len(history.takeovers) > 1 else ""
        return Diagnosis(
            "taken_over",
            f"another client connected as {facts.client_id}{times}",
            "find the second device or program with this thing name or a copy of this identity",
        )
    if code in (0x85, 0x86):
        return Diagnosis("not_authorised", f"AWS IoT refused: {reason_name(code)}", "check thing_name and the policies")
    if code in (0x96, 0x97):
        return Diagnosis("throttled", f"AWS IoT refused: {reason_name(code)}", "check the account's AWS IoT quotas")
    if code in (0x88, 0x89, 0x8B, 0x98):
        return Diagnosis("closed", f"AWS IoT closed the connection: {reason_name(code)}", "it is made again by itself")
    return Diagnosis("refused", f"AWS IoT refused: {reason_name(code)}", "see the log of the agent")


def _refused(reason: str, facts: Facts) -> Diagnosis:
    if facts.certificate_until is not None and facts.now > facts.certificate_until:
        return _expired(facts)
    return Diagnosis(
        "not_authorised",
        reason,
        f"check in AWS IoT that certificate {facts.certificate_id or 'of this camera'} is ACTIVE, attached to the thing, "
        f"and that its policy allows iot:Connect as client/{facts.client_id}",
    )


def _expired(facts: Facts) -> Diagnosis:
    if facts.clock_synchronised is False:
        return Diagnosis(
            "clock",
            "the certificate looks expired, but the clock of this camera is not synchronised",
            "let the camera reach an NTP server, then check the date",
        )
    return Diagnosis("certificate", "the certificate of this camera has expired", "provision the camera anew")


def _diagnose_tls(facts: Facts, where: str) -> Diagnosis:
    if facts.certificate_until is not None and facts.now > facts.certificate_until:
        return _expired(facts)
    if facts.certificate_from is not None and facts.now < facts.certificate_from:
        return Diagnosis(
            "clock",
            "the certificate of this camera is not valid yet: the clock is behind",
            "let the camera reach an NTP server, then check the date",
        )
    doubt = "; the clock is not synchronised, check the date too" if facts.clock_synchronised is False else ""
    return Diagnosis(
        "tls",
        f"no trusted TLS connection to {where}: its certificate does not fit ca_file or the name, "
        "or something on the way intercepts TLS",
        f"check cloud.ca_file and cloud.endpoint, and whether a firewall inspects TLS{doubt}",
    )
