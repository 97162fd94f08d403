"""AWS on this machine: IoT Core with its MQTT broker, S3, SQS and IAM, on loopback, without an account and without root.

It is a child process that ends when this process ends, however that happens. Everything it keeps is below one folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

REGION = "eu-west-1"
ACCOUNT = "000000000000"
ACCESS_KEY = "test"
START_LIMIT_S = 60.0
STOP_LIMIT_S = 15.0
PACKAGE_PARENT = Path(__file__).resolve().parents[2]


class Aws:
    """A local AWS whose state and log are in `folder`; ports of 0 are chosen at the first start and then kept.

    IoT and IAM policies are enforced. All methods block; `async with` starts and stops it in a thread.
    """

    def __init__(self, folder: Path, *, http_port: int = 0, mqtt_port: int = 0) -> None:
        self.folder = folder
        self.http_port = http_port
        self.mqtt_port = mqtt_port
        self.log_file = folder / "aws.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._clients: dict[str, Any] = {}

    @property
    def endpoint_url(self) -> str:
        """What boto3 and the aws CLI need as endpoint URL."""
        return f"http://localhost:{self.http_port}"

    @property
    def pid(self) -> int | None:
        """The child process, None when it is not started."""
        return self._process.pid if self._process else None

    @property
    def environment(self) -> dict[str, str]:
        """The variables that point the aws CLI, or any SDK, at this AWS."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": ACCESS_KEY,
            "AWS_DEFAULT_REGION": REGION,
        }

    def start(self) -> None:
        """Start it and return when HTTP and MQTT answer. Raises RuntimeError with the end of its log when it can't."""
        if self._process is not None:
            raise RuntimeError("this AWS is started already")
        for name in ("state", "s3", "tmp"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        with _bound(self.http_port) as http, _bound(self.mqtt_port) as mqtt, self.log_file.open("ab") as log:
            self.http_port, self.mqtt_port = http.getsockname()[1], mqtt.getsockname()[1]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "agent.sandbox.aws_server", str(http.fileno()), str(mqtt.fileno())],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(http.fileno(), mqtt.fileno()),
                env=self._child_environment(),
                start_new_session=True,
            )
        try:
            self._wait_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop it and wait until it is gone; what it keeps is there again at the next start."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin
        process.stdin.close()
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def client(self, service: str) -> Any:
        """The boto3 client of `service` (`iot`, `iot-data`, `s3`, …); one of each is made and kept."""
        if service not in self._clients:
            import boto3
            from botocore.config import Config

            self._clients[service] = boto3.session.Session().client(
                service,  # type: ignore[call-overload]  # any service name, the stubs list only some
                endpoint_url=self.endpoint_url,
                region_name=REGION,
                aws_access_key_id=ACCESS_KEY,
                aws_secret_access_key=ACCESS_KEY,
                config=Config(retries={"total_max_attempts": 2}, s3={"addressing_style": "path"}),
            )
        return self._clients[service]

    def ca_pem(self) -> str:
        """The certificate, in PEM, that device and server certificates are signed with."""
        return self._get("/_ministack/iot/ca.pem").decode("ascii")

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=10) as response:
            body: bytes = response.read()
        return body

    def _wait_ready(self) -> None:
        assert self._process
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"the local AWS ended at once ({self.log_file}): {self._log_tail()}")
            try:
                self._get("/_ministack/ready")
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
            else:
                return
        raise RuntimeError(
            f"the local AWS did not answer in {START_LIMIT_S:.0f} s ({self.log_file}): {self._log_tail()}"
        )

    def _log_tail(self) -> str:
        return self.log_file.read_bytes()[-2000:].decode("utf-8", "replace").strip()

    def _child_environment(self) -> dict[str, str]:
        kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TZ") if key in os.environ}
        return kept | {
            "PYTHONPATH": str(PACKAGE_PARENT),
            "MINISTACK_HOST": "localhost",
            "MINISTACK_REGION": REGION,
            "MINISTACK_ACCOUNT_ID": ACCOUNT,
            "AUTH": "true",
            "PERSIST_STATE": "1",
            "STATE_DIR": str(self.folder / "state"),
            "S3_PERSIST": "1",
            "S3_DATA_DIR": str(self.folder / "s3"),
            "TMPDIR": str(self.folder / "tmp"),
            "SFTP_ENABLED": "0",
            "DOCKER_HOST": f"unix://{self.folder}/no-docker.sock",
            "PYTHONWARNINGS": "ignore",
        }

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    async def __aenter__(self) -> Self:
        starting = asyncio.create_task(asyncio.to_thread(self.start))
        try:
            await asyncio.shield(starting)
        except asyncio.CancelledError:
            with contextlib.suppress(RuntimeError, OSError):
                await starting
            await asyncio.to_thread(self.stop)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop)


def _bound(port: int) -> socket.socket:
    """A loopback socket that has its port but does not listen yet."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(("127.0.0.1", port))
    except OSError:
        bound.close()
        raise
    return bound
