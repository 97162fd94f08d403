"""Why there is no connection to AWS IoT, in words a technician can act on, and how long to wait. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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

HANGUP = "AWS_ERROR_MQTT_UNEXPECTED_HANGUP"
"""The other side closed after the TLS handshake; before its end the error is AWS_IO_SOCKET_CLOSED."""
CONNACK_REFUSED = "AWS_ERROR_MQTT5_CONNACK_CONNECTION_REFUSED"
TLS_TIMEOUT = "AWS_IO_TLS_NEGOTIATION_TIMEOUT"
SUBSCRIBE_UNANSWERED, PUBLISH_UNANSWERED = "SUBSCRIBE_UNANSWERED", "PUBLISH_UNANSWERED"
"""Failures that we find ourselves: the connection stands and is of no use."""
SILENCE = ("TIMEOUT", "UNANSWERED")
ON_THE_WAY = ("DNS", "SOCKET", "HTTP", "CONNECT_UNANSWERED", TLS_TIMEOUT)
"""In the errors that come before TLS stands; with a proxy it is the proxy's doing."""

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
BLAMING_REASON_CODES = {0x80, 0x81, 0x82, 0x83, 0x87, 0x90, 0x93, 0x94, 0x95, 0x97, 0x99, 0x9B}
PASSING_REASON_CODES = {0x80, 0x83, 0x88, 0x89, 0x8B, 0x91, 0x93, 0x96, 0x97, 0x98}


@dataclass(frozen=True)
class Link:
    """The connection as a person wants to know it.

    `connected`: usable, every declared subscription answered (`code` is `subscription_refused` when the policy denied
    some). `connecting`: first attempt, or subscribing. `offline`: between attempts; `code`, `reason`, `hint` say why.
    """

    state: Literal["connected", "connecting", "offline", "stopped"] = "stopped"
    since: float = 0.0
    """Since when it has been connected, or not connected, seconds since the epoch."""
    code: str = ""
    reason: str = ""
    hint: str = ""
    session_present: bool = False
    """Whether AWS IoT still had our session at the last connect."""
    connects: int = 0
    """Successful CONNECTs of this process."""
    since_monotonic: float = 0.0
    """`since` on the monotonic clock, which nobody sets."""
    via: str = ""
    """Port and proxy, without credentials, of the connection or of the last attempt at one."""


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
    proxy: str = ""
    """Name and port of the HTTP proxy, without credentials; empty when there is none."""


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
            refusals=(0 if settled else self.refusals) + 1 if failure.reason_code == NOT_AUTHORISED else 0,
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
    where, error = f"{facts.endpoint}:{facts.port}", failure.error
    if failure.reason_code is not None and failure.reason_code >= REFUSED:
        return _diagnose_reason_code(failure, history, facts)
    if failure.was_connected:
        return _diagnose_loss(failure, where)
    hung_up = _hung_up(failure)
    tls_failed = "_TLS_" in error and error != TLS_TIMEOUT
    if tls_failed or (hung_up and invalid_certificate(facts)):
        return invalid_certificate(facts) or _diagnose_tls(facts, where)
    if "PROXY" in error or (facts.proxy and not hung_up and any(word in error for word in ON_THE_WAY)):
        return _diagnose_proxy(error, facts, where)
    if "DNS" in error:
        return Diagnosis(
            "dns",
            f"the name {facts.endpoint} can't be resolved",
            "check cloud.endpoint, the network cable and the DNS server of this network",
        )
    if hung_up and history.hangups >= HANGUPS_UNTIL_NOT_AUTHORISED:
        return _refused(
            f"{where} closed {history.hangups} connections in a row before answering, as AWS IoT does with a "
            f"certificate or policy it does not accept, and a firewall with a port {facts.port} it does not let through",
            facts,
        )
    if hung_up:
        return Diagnosis("closed", f"{where} closed the connection before answering", "it is tried again by itself")
    if "SOCKET" in error:
        refused = "refused the connection" if "REFUSED" in error else "can't be reached"
        return Diagnosis("tcp", f"{where} {refused}", f"check that the firewall lets TCP port {facts.port} out")
    if any(word in error for word in SILENCE):
        return Diagnosis(
            "no_answer",
            f"{where} takes connections but does not answer",
            "check the quality of the network, and whether a firewall holds the connection back",
        )
    if error == CONNACK_REFUSED:
        return Diagnosis("refused", f"{where} refused with a reason that MQTT 5 does not know", "check cloud.endpoint")
    if "DECODE" in error:
        return Diagnosis("refused", f"{where} does not speak MQTT 5", "check cloud.endpoint and cloud.port")
    return Diagnosis("unknown", f"the connection to {where} failed: {error}", "see the log of the agent")


def refused_before_connack(failure: Failure) -> bool:
    """Whether AWS IoT may have ended the attempt because of what the CONNECT asked for, and not for a passing reason."""
    if failure.was_connected:
        return False
    code = failure.reason_code
    return (
        failure.error == HANGUP if code is None else code >= REFUSED and code not in PASSING_REASON_CODES - {0x80, 0x83}
    )


def blames_a_message(failure: Failure) -> bool:
    """Whether the connection may have been closed over what was in flight: not when it was lost, taken over or moved."""
    if not failure.was_connected:
        return False
    return _hung_up(failure) if failure.reason_code is None else failure.reason_code in BLAMING_REASON_CODES


def messages_held(held: Sequence[str], certificate_id: str) -> Diagnosis:
    """What topics mean whose messages are held back because connections end over them."""
    return Diagnosis(
        "messages_held",
        f"AWS IoT seems to close the connection over messages to {', '.join(held)}; they are sent seldom now, and those of no two such topics at once",
        f"check that the policy of certificate {certificate_id} allows iot:Publish on them",
    )


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


def _diagnose_loss(failure: Failure, where: str) -> Diagnosis:
    if failure.error == SUBSCRIBE_UNANSWERED:
        return Diagnosis(
            "no_answer",
            f"{where} takes the connection and does not answer the subscriptions",
            "check that the certificate's policy allows iot:Subscribe; it is tried again by itself",
        )
    if failure.error == PUBLISH_UNANSWERED:
        return Diagnosis("no_answer", f"{where} acknowledges no messages any more", "it is connected again by itself")
    if any(word in failure.error for word in SILENCE):
        return Diagnosis(
            "no_answer",
            f"{where} stopped answering",
            "check the quality of the network; a lower cloud.keep_alive_s notices it sooner",
        )
    return Diagnosis("lost", f"the connection to {where} broke off", "it is made again by itself")


def _diagnose_reason_code(failure: Failure, history: History, facts: Facts) -> Diagnosis:
    code = failure.reason_code or 0
    ended = "closed the connection" if failure.was_connected else "refused"
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
    if code == 0x8D:
        return Diagnosis(
            "no_answer",
            "AWS IoT heard nothing of this camera for too long",
            "check the quality of the network; a lower cloud.keep_alive_s keeps the connection busier",
        )
    if code in (0x96, 0x97):
        return Diagnosis("throttled", f"AWS IoT {ended}: {reason_name(code)}", "check the account's AWS IoT quotas")
    if code in (0x88, 0x89, 0x8B, 0x98):
        return Diagnosis("closed", f"AWS IoT {ended}: {reason_name(code)}", "it is made again by itself")
    return Diagnosis("refused", f"AWS IoT {ended}: {reason_name(code)}", "see the log of the agent")


PROXY_PROBLEMS = {
    "PROXY_DNS": ("its name can't be resolved", "check cloud.proxy_url and the DNS server of this network"),
    "PROXY_UNREACHABLE": ("it can't be reached", "check cloud.proxy_url and the network"),
    "PROXY_SILENT": ("it does not answer", "check that the proxy works, and that cloud.proxy_url is a proxy for HTTP"),
    "PROXY_CLOSED": ("it closed the connection without an answer", "check what the proxy allows, and its log"),
    "PROXY_NOT_HTTP": ("it does not answer as an HTTP proxy does", "check name and port in cloud.proxy_url"),
    "PROXY_STATUS_407": ("it does not accept the credentials", "check user and password in cloud.proxy_url"),
}


def _diagnose_proxy(error: str, facts: Facts, where: str) -> Diagnosis:
    tells = f"the HTTP proxy {facts.proxy} opens no way to {where}: "
    if error in PROXY_PROBLEMS:
        problem, hint = PROXY_PROBLEMS[error]
        return Diagnosis("proxy", tells + problem, hint)
    if error.startswith("PROXY_STATUS_"):
        other = " or use 443 as cloud.port, which most proxies allow," if facts.port != 443 else ""
        return Diagnosis(
            "proxy",
            f"{tells}it answers with status {error.removeprefix('PROXY_STATUS_')}",
            f"let the proxy connect to {where}{other} and look at its log",
        )
    if error == TLS_TIMEOUT:
        return Diagnosis(
            "proxy",
            f"the HTTP proxy {facts.proxy} opened a way to {where}, but nothing comes back through it",
            "check what the proxy allows, and its log",
        )
    problem = "it does not answer" if any(word in error for word in SILENCE) else error
    return Diagnosis("proxy", tells + problem, "check cloud.proxy_url and the proxy")


def _refused(reason: str, facts: Facts) -> Diagnosis:
    return invalid_certificate(facts) or Diagnosis(
        "not_authorised",
        reason,
        f"check in AWS IoT that certificate {facts.certificate_id or 'of this camera'} is ACTIVE, attached to the thing, "
        f"and that its policy allows iot:Connect as client/{facts.client_id}",
    )


def invalid_certificate(facts: Facts) -> Diagnosis | None:
    """What is wrong when the clock is outside of the certificate's validity; None when it is inside or not known."""
    if facts.certificate_from is not None and facts.now < facts.certificate_from:
        return Diagnosis(
            "clock",
            "the certificate of this camera is not valid yet: the clock is behind",
            "let the camera reach an NTP server, then check the date",
        )
    if facts.certificate_until is None or facts.now <= facts.certificate_until:
        return None
    if facts.clock_synchronised is False:
        return Diagnosis(
            "clock",
            "the certificate looks expired, but the clock of this camera is not synchronised",
            "let the camera reach an NTP server, then check the date",
        )
    return Diagnosis("certificate", "the certificate of this camera has expired", "provision the camera anew")


def _diagnose_tls(facts: Facts, where: str) -> Diagnosis:
    doubt = "; the clock is not synchronised, check the date too" if facts.clock_synchronised is False else ""
    return Diagnosis(
        "tls",
        f"no trusted TLS connection to {where}: its certificate does not fit ca_file or the name, "
        "or something on the way intercepts TLS",
        f"check cloud.ca_file and cloud.endpoint, and whether a firewall inspects TLS{doubt}",
    )
