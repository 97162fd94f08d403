"""The process that is AWS: ministack on two sockets handed over by its parent, for as long as its standard input is open.

Beside what ministack does it answers CreateCertificateFromCsr over MQTT, and binds its MQTT listener to loopback only.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from typing import Any

MINISTACK_VERSION = "1.5.33"
CSR_TOPIC = "$aws/certificates/create-from-csr/json"
CSR_OPERATION = "create-from-csr"
CSR_MAX_CHARACTERS = 4096
SHUTDOWN_LIMIT_S = 10.0


def main() -> None:
    """`python -m agent.sandbox.aws_server HTTP_FD MQTT_FD`: serve until standard input ends or SIGTERM."""
    http, mqtt = (socket.socket(fileno=int(argument)) for argument in sys.argv[1:3])
    os.environ["GATEWAY_PORT"] = str(http.getsockname()[1])
    os.environ["IOT_MTLS_PORT"] = str(mqtt.getsockname()[1])
    installed = importlib.metadata.version("ministack")
    if installed != MINISTACK_VERSION:
        sys.exit(f"ministack {MINISTACK_VERSION} is needed, {installed} is installed: pip install -e '.[sandbox]'")
    threading.Thread(target=_end_with_parent, daemon=True).start()

    from hypercorn.asyncio import serve
    from hypercorn.config import Config
    from ministack import app
    from ministack.services import iot

    _listen_on(iot, mqtt)
    _answer_csr(iot)
    config = Config()
    config.bind = [f"fd://{http.detach()}"]
    config.keep_alive_timeout = 75
    config.graceful_timeout = 0.5
    asyncio.run(serve(app.app, config))


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SHUTDOWN_LIMIT_S)
    os._exit(1)


def _listen_on(iot: Any, listener: socket.socket) -> None:
    """Make ministack's MQTT listener use `listener`; it would bind to every interface by itself."""

    async def start() -> None:
        if iot._mtls_server is None:  # noqa: SLF001  ministack has no public way to choose the address
            loop = asyncio.get_running_loop()
            iot._mtls_server = await loop.create_server(iot._MtlsAcceptor, sock=listener.dup())  # noqa: SLF001
            iot._mtls_loop = loop  # noqa: SLF001

    iot._mtls_start_locked = start  # noqa: SLF001


def _answer_csr(iot: Any) -> None:
    """Add the request topic of CreateCertificateFromCsr to ministack's fleet provisioning."""
    parse, reply = iot._parse_fleet_provisioning_topic, iot._fleet_provisioning_reply  # noqa: SLF001

    def parse_topic(topic: str) -> Any:
        return (CSR_OPERATION, None) if topic == CSR_TOPIC else parse(topic)

    async def answer(
        account: str, region: str, operation: str, template: str | None, payload: bytes, connection: dict[str, Any]
    ) -> Any:
        if operation == CSR_OPERATION:
            return await asyncio.to_thread(_certificate_from_csr, iot, account, region, payload)
        return await reply(account, region, operation, template, payload, connection)

    iot._parse_fleet_provisioning_topic = parse_topic  # noqa: SLF001
    iot._fleet_provisioning_reply = answer  # noqa: SLF001


def _certificate_from_csr(iot: Any, account: str, region: str, payload: bytes) -> tuple[str, dict[str, Any]]:
    """Sign the request with ministack's CA; the certificate waits for RegisterThing with its ownership token."""
    try:
        csr = json.loads(payload)["certificateSigningRequest"]
        if not isinstance(csr, str) or len(csr) > CSR_MAX_CHARACTERS:
            return _rejected("CSR violates constraints")
        certificate = iot.sign_certificate_request(*iot._ensure_ca(), csr)  # noqa: SLF001
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError):
        return _rejected("certificateSigningRequest is missing or the message cannot be parsed")
    except ValueError:
        return _rejected("CSR violates constraints")
    certificate_id = iot.get_certificate_id(certificate)
    token = secrets.token_urlsafe(48)
    with iot.request_scope(account, region):
        iot._certificates[certificate_id] = iot._certificate_record(  # noqa: SLF001
            certificate_id, certificate, "PENDING_ACTIVATION"
        )
        iot._drop_expired(iot._ownership_tokens)  # noqa: SLF001
        iot._ownership_tokens[token] = {  # noqa: SLF001
            "certificateId": certificate_id,
            "expiration": time.time() + iot._OWNERSHIP_TOKEN_SECONDS,  # noqa: SLF001
        }
    return "accepted", {
        "certificateId": certificate_id,
        "certificatePem": certificate,
        "certificateOwnershipToken": token,
    }


def _rejected(message: str) -> tuple[str, dict[str, Any]]:
    return "rejected", {"statusCode": 400, "errorCode": "InvalidParameters", "errorMessage": message}


if __name__ == "__main__":
    main()
