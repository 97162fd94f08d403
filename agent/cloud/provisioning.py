"""Fleet provisioning by claim: with a claim certificate, a key made here and a template the camera becomes a thing.

Nothing is kept before the thing is registered: a power cut in between means starting over with a new key.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from typing import Any

from agent.cloud import identity, topics
from agent.cloud.replies import Rejected
from agent.cloud.session import Session
from agent.errors import CloudError
from agent.logs import get_logger
from agent.settings import Settings

CONNECT_TIMEOUT_S = 60.0
ANSWER_TIMEOUT_S = 30.0
LOOK_AGAIN_S = 30.0
REFUSED_RETRY_S = 300.0
RETRY_S = (5.0, 300.0)

log = get_logger("cloud.provisioning")


async def provision(
    settings: Settings, *, connect_timeout_s: float = CONNECT_TIMEOUT_S, answer_timeout_s: float = ANSWER_TIMEOUT_S
) -> str:
    """Get a device certificate through the claim, register the thing, keep both; the thing's name.

    Raises CloudError: `retryable` for throttling, time-outs and a bad network; not so when claim, template or parameters
    have to be mended first. Then the old identity, if any, is untouched. See retry_s() for when to try again.
    """
    template, claim = settings.provisioning.template, settings.provisioning
    if not template or claim.claim_certificate_file is None or claim.claim_private_key_file is None:
        raise CloudError(
            "not_configured",
            "there is no device certificate and no provisioning template with a claim",
            "set provisioning.template and the claim's files, or put a certificate to cloud.certificate_file",
        )
    create, register = topics.certificate_from_csr(), topics.register_thing(template)
    session = Session(
        client_id=f"provisioning-{uuid.uuid4().hex}",
        cloud=settings.cloud.model_copy(update={"session_expiry_s": 0}),
        certificate_file=claim.claim_certificate_file,
        private_key_file=claim.claim_private_key_file,
    )
    exchange = _Exchange(session, create, register, answer_timeout_s)
    key, request = await asyncio.to_thread(identity.make_key_and_request, _common_name(settings))
    generation = await asyncio.to_thread(identity.stage, settings.certificate_file, key)
    running = asyncio.create_task(session.run())
    try:
        await _connected(session, running, connect_timeout_s)
        created = await exchange.ask(create, {"certificateSigningRequest": request.decode()})
        certificate = _text(created, "certificatePem", create)
        answer = await exchange.ask(
            register,
            {
                "certificateOwnershipToken": _text(created, "certificateOwnershipToken", create),
                "parameters": dict(claim.parameters),
            },
        )
        thing = _text(answer, "thingName", register)
        await asyncio.to_thread(
            identity.switch,
            generation,
            certificate.encode(),
            thing,
            settings.certificate_file,
            settings.private_key_file,
        )
        log.info("provisioned", thing=thing, certificate_id=identity.certificate_id(certificate.encode()))
        return thing
    except BaseException:
        await asyncio.to_thread(identity.discard, generation)
        raise
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError, CloudError):
            await running


def retry_s(error: CloudError, attempt: int, chance: float) -> float:
    """Seconds until provisioning is worth another try; `attempt` counts from 1, `chance` is uniform in 0…1."""
    if error.code == "not_configured":
        return LOOK_AGAIN_S  # costs nobody anything; the files may be put there any moment
    if not error.retryable:
        return REFUSED_RETRY_S * (1 + chance)
    ceiling = min(RETRY_S[1], RETRY_S[0] * 2.0 ** min(attempt, 20))
    return RETRY_S[0] + chance * (ceiling - RETRY_S[0])


def as_cloud_error(error: CloudError | OSError) -> CloudError:
    """What keeps the camera from its identity, also when it is a file that can't be read or written."""
    if isinstance(error, CloudError):
        return error
    return CloudError(
        "identity_unreadable",
        f"the identity can't be read or kept: {error.filename or ''}: {error.strerror}",
        "check owner, mode and free space of the identity's folder",
        retryable=True,
    )


class _Exchange:
    """Requests without a clientToken: one at a time, the answer is the next message on its accepted or rejected topic."""

    def __init__(self, session: Session, create: str, register: str, timeout_s: float) -> None:
        self._session = session
        self._timeout_s = timeout_s
        self._waiting: dict[str, asyncio.Future[dict[str, Any]]] = {}
        for request in (create, register):
            session.subscribe(topics.accepted(request), self._take)
            session.subscribe(topics.rejected(request), self._take)

    async def ask(self, topic: str, body: dict[str, Any]) -> dict[str, Any]:
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[topic] = answer
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._session.publish(topic, json.dumps(body).encode(), timeout_s=self._timeout_s)
                return await answer
        except TimeoutError:
            link = self._session.link
            raise CloudError(
                link.code or "no_answer",
                link.reason or f"AWS IoT did not answer on {topic} within {self._timeout_s:g} s",
                "check that the claim's policy allows publishing, subscribing and receiving on this topic",
                retryable=True,
            ) from None
        finally:
            del self._waiting[topic]
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)

    def _take(self, topic: str, payload: bytes) -> None:
        request, _, outcome = topic.rpartition("/")
        answer = self._waiting.get(request)
        if answer is None or answer.done():
            return
        try:
            body = json.loads(payload)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            log.warning("ignored an answer that is not a JSON object", topic=topic, bytes=len(payload))
        elif outcome == "accepted":
            answer.set_result(body)
        else:
            answer.set_exception(_rejection(request, body))


async def _connected(session: Session, running: asyncio.Task[None], timeout_s: float) -> None:
    waiting = asyncio.create_task(session.wait_connected())
    try:
        await asyncio.wait({waiting, running}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
        if not waiting.done():
            link = session.link
            raise CloudError(
                link.code or "no_answer",
                f"no connection with the claim certificate within {timeout_s:g} s: {link.reason or 'no answer'}",
                link.hint,
                retryable=True,
            )
    finally:
        waiting.cancel()
    if session.link.code:
        raise CloudError(session.link.code, session.link.reason, "let the claim's policy allow these topics")


def _rejection(topic: str, body: dict[str, Any]) -> Rejected:
    status = body.get("statusCode")
    status = status if isinstance(status, int) else 500
    code = str(body.get("errorCode") or status)
    passing = status >= 500 or status == 429
    if passing:
        hint = "it is tried again by itself"
    elif status in (401, 403):
        hint = "check the claim certificate, the template's state and its pre-provisioning hook, and the serial number"
    else:
        hint = "check the provisioning template and provisioning.parameters in agent.toml"
    message = f"AWS IoT refused provisioning ({topic}): {status} {code} {body.get('errorMessage', '')}".rstrip()
    return Rejected(code, message, hint, retryable=passing, details={"statusCode": status})


def _text(answer: dict[str, Any], key: str, topic: str) -> str:
    value = answer.get(key)
    if not isinstance(value, str) or not value:
        raise CloudError("malformed_reply", f"the answer on {topic} has no {key}", retryable=True)
    return value


def _common_name(settings: Settings) -> str:
    return settings.thing_name or settings.provisioning.parameters.get("SerialNumber", "camera")
