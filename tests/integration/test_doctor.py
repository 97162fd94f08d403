"""Doctor against real servers: TLS that is right and wrong in each way, a proxy, and a daemon on a Unix socket."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from agent.health.probes import Finding, Site, run_checks

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
CLOUD = ["config", "clock", "identity", "certificate", "key", "link", "route", "dns", "tcp", "tls"]
Serve = Callable[[socket.socket], None]


@dataclass(frozen=True)
class Authority:
    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()

    def issue(self, folder: Path, name: str, *, days: int = 365) -> tuple[Path, Path]:
        """Certificate and key files of `name`, valid for `days` from now; negative: it expired that long ago."""
        key = ec.generate_private_key(ec.SECP256R1())
        end = NOW + days * DAY
        alternative: x509.GeneralName = x509.DNSName(name)
        if name[0].isdigit():
            alternative = x509.IPAddress(ip_address(name))
        built = (
            x509.CertificateBuilder()
            .subject_name(_name(name))
            .issuer_name(self.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(NOW, end) - DAY)
            .not_valid_after(end)
            .add_extension(x509.SubjectAlternativeName([alternative]), critical=False)
            .sign(self.key, hashes.SHA256())
        )
        folder.mkdir(parents=True, exist_ok=True)
        files = folder / "certificate.pem", folder / "private-key.pem"
        files[0].write_bytes(built.public_bytes(serialization.Encoding.PEM))
        files[1].touch(mode=0o600)
        files[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return files


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])


def authority(name: str) -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(_name(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - 400 * DAY)
        .not_valid_after(NOW + 3650 * DAY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Authority(key, certificate)


ROOT = authority("the cloud's root")
OTHER = authority("another root")


@contextmanager
def serving(handle: Serve, listener: socket.socket) -> Iterator[None]:
    """`handle` on a thread for each connection that `listener` takes."""
    stopping = threading.Event()
    threads: list[threading.Thread] = []

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(10)
            handle(connection)

    def accept() -> None:
        while True:
            connection, _ = listener.accept()
            if stopping.is_set():
                connection.close()
                return
            threads.append(threading.Thread(target=answer, args=(connection,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    try:
        yield
    finally:
        stopping.set()
        with socket.socket(listener.family) as waker:
            waker.connect(listener.getsockname())
        for thread in [accepting, *threads]:
            thread.join(10)
        listener.close()


def tls(certificate: tuple[Path, Path], *, clients: Authority = ROOT, alpn: str = "") -> Serve:
    """A TLS server that wants a client certificate of `clients` and then waits for the client to speak."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=clients.pem)
    if alpn:
        context.set_alpn_protocols([alpn])

    def handle(connection: socket.socket) -> None:
        try:
            with context.wrap_socket(connection, server_side=True) as secured:
                secured.recv(1)
        except OSError:
            pass

    return handle


def listen() -> tuple[socket.socket, int]:
    listener = socket.create_server(("127.0.0.1", 0))
    return listener, listener.getsockname()[1]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    ROOT.issue(tmp_path / "state/identity", "cam-0412")
    (tmp_path / "root.pem").write_text(ROOT.pem)
    (tmp_path / "run").mkdir()
    return Site(tmp_path / "agent.toml", clock_synchronised=lambda: True)


def configure(site: Site, port: int, *, host: str = "localhost", more: str = "") -> None:
    folder = site.config_path.parent
    site.config_path.write_text(
        f"""
        [cloud]
        endpoint = "{host}"
        port = {port}
        ca_file = "{folder}/root.pem"
        {more}
        [paths]
        state_dir = "{folder}/state"
        runtime_dir = "{folder}/run"
        """
    )


def failures(findings: list[Finding]) -> list[str]:
    return [finding.code for finding in findings if finding.status == "fail"]


def finding(findings: list[Finding], code: str) -> Finding:
    return next(finding for finding in findings if finding.code == code)


def test_a_healthy_way_to_the_cloud(site: Site, tmp_path: Path) -> None:
    listener, port = listen()
    configure(site, port)
    with serving(tls(ROOT.issue(tmp_path / "server", "localhost")), listener):
        findings = run_checks(site.config_path, CLOUD, site=site)
    assert failures(findings) == []
    assert finding(findings, "tls").seen == "TLSv1.3, chain and name are right, our certificate is taken"


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (lambda folder: OTHER.issue(folder, "localhost"), "does not end in ca_file"),
        (lambda folder: ROOT.issue(folder, "elsewhere.example"), "for another name"),
        (lambda folder: ROOT.issue(folder, "localhost", days=-2), "expired"),
    ],
)
def test_a_server_that_is_not_to_be_trusted(
    site: Site, tmp_path: Path, server: Callable[[Path], tuple[Path, Path]], words: str
) -> None:
    listener, port = listen()
    configure(site, port)
    with serving(tls(server(tmp_path / "server")), listener):
        findings = run_checks(site.config_path, CLOUD, site=site)
    assert failures(findings) == ["tls"]
    assert words in finding(findings, "tls").meaning
    assert finding(findings, "tls").remedy


def test_a_refused_certificate(site: Site, tmp_path: Path) -> None:
    listener, port = listen()
    configure(site, port)
    with serving(tls(ROOT.issue(tmp_path / "server", "localhost"), clients=OTHER), listener):
        findings = run_checks(site.config_path, CLOUD, site=site)
    assert failures(findings) == ["tls"]
    assert "closed the connection after our certificate" in finding(findings, "tls").seen


def test_our_certificate_has_expired(site: Site, tmp_path: Path) -> None:
    ROOT.issue(tmp_path / "state/identity", "cam-0412", days=-3)
    listener, port = listen()
    configure(site, port)
    with serving(tls(ROOT.issue(tmp_path / "server", "localhost")), listener):
        findings = run_checks(site.config_path, CLOUD, site=site)
    assert failures(findings) == ["certificate"]
    assert finding(findings, "tls").because == "certificate"


def test_nothing_listens(site: Site) -> None:
    listener, port = listen()
    listener.close()
    configure(site, port)
    findings = run_checks(site.config_path, [*CLOUD, "mqtt"], site=site)
    assert failures(findings) == ["tcp", "daemon"]
    assert finding(findings, "tcp").meaning == "nothing listens there"
    assert finding(findings, "tls").because == "tcp"
    assert finding(findings, "mqtt").because == "daemon"


def test_a_root_certificate_that_is_not_there(site: Site, tmp_path: Path) -> None:
    listener, port = listen()
    configure(site, port)
    (tmp_path / "root.pem").unlink()
    with serving(tls(ROOT.issue(tmp_path / "server", "localhost")), listener):
        findings = run_checks(site.config_path, CLOUD, site=site)
    assert failures(findings) == ["tls"]
    assert "AmazonRootCA1.pem" in finding(findings, "tls").remedy


def test_a_silent_server_ends_in_time(site: Site) -> None:
    listener, port = listen()
    configure(site, port)
    started = time.monotonic()
    with serving(lambda connection: connection.recv(4096) and connection.recv(1), listener):
        findings = run_checks(site.config_path, CLOUD, site=site)
    assert failures(findings) == ["tls"]
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("answer", ["200 Connection established", "407 Proxy Authentication Required"])
def test_by_a_proxy(site: Site, tmp_path: Path, answer: str) -> None:
    seen: list[str] = []
    server = tls(ROOT.issue(tmp_path / "server", "cloud.example"))

    def proxy(connection: socket.socket) -> None:
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            byte = connection.recv(1)
            if not byte:
                return
            request += byte
        seen.append(request.decode())
        connection.sendall(f"HTTP/1.1 {answer}\r\n\r\n".encode())
        if answer.startswith("200"):
            server(connection)

    listener, port = listen()
    configure(site, 8883, host="cloud.example", more=f'proxy_url = "http://user:p%40ss@127.0.0.1:{port}"')
    with serving(proxy, listener):
        findings = run_checks(site.config_path, CLOUD, site=site)
    assert seen[0].startswith("CONNECT cloud.example:8883 HTTP/1.1\r\n")
    assert "Proxy-Authorization: Basic dXNlcjpwQHNz\r\n" in seen[0]
    if answer.startswith("200"):
        assert failures(findings) == []
    else:
        assert failures(findings) == ["tls"]
        assert "407" in finding(findings, "tls").seen


@pytest.mark.parametrize(("alpn", "failing"), [("x-amzn-mqtt-ca", []), ("http/1.1", ["tls"]), ("", ["tls"])])
def test_alpn_on_443(site: Site, tmp_path: Path, alpn: str, failing: list[str]) -> None:
    server = tls(ROOT.issue(tmp_path / "server", "cloud.example"), alpn=alpn)

    def proxy(connection: socket.socket) -> None:
        request = connection.recv(4096)
        if request:
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            server(connection)

    listener, port = listen()
    configure(site, 443, host="cloud.example", more=f'proxy_url = "http://127.0.0.1:{port}"')
    with serving(proxy, listener):
        findings = run_checks(site.config_path, CLOUD, site=site)
    assert failures(findings) == failing


def daemon(status: object) -> Serve:
    def handle(connection: socket.socket) -> None:
        if not connection.recv(65536).startswith(b"GET /v1/status HTTP/1.1\r\n"):
            return
        body = json.dumps(status).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)

    return handle


STATUS = {
    "schema": 1,
    "agent": {"version": "1.2.3", "pid": 42},
    "cloud": {"state": "connected", "endpoint": "localhost", "port": 8883, "code": "", "reason": "", "hint": ""},
}
REFUSED = STATUS | {
    "cloud": {"state": "offline", "code": "not_authorized", "reason": "the broker refused", "hint": "check the policy"}
}


@pytest.mark.parametrize(("status", "failing"), [(STATUS, []), (REFUSED, ["mqtt"])])
def test_with_the_daemon_up(site: Site, tmp_path: Path, status: object, failing: list[str]) -> None:
    listener, port = listen()
    configure(site, port)
    api = socket.socket(socket.AF_UNIX)
    api.bind(str(tmp_path / "run/api.sock"))
    api.listen()
    with serving(tls(ROOT.issue(tmp_path / "server", "localhost")), listener), serving(daemon(status), api):
        findings = run_checks(site.config_path, site=site)
    assert failures(findings) == failing
    assert finding(findings, "daemon").seen == "version 1.2.3, pid 42"
    if failing:
        assert finding(findings, "mqtt").seen == "offline: the broker refused"
        assert finding(findings, "mqtt").remedy == "check the policy"


def test_a_socket_left_behind_by_a_dead_daemon(site: Site, tmp_path: Path) -> None:
    configure(site, 8883)
    with socket.socket(socket.AF_UNIX) as api:
        api.bind(str(tmp_path / "run/api.sock"))
    findings = run_checks(site.config_path, ["daemon"], site=site)
    assert failures(findings) == ["daemon"]
    assert "nobody listens" in finding(findings, "daemon").seen


def test_a_daemon_that_answers_nonsense(site: Site, tmp_path: Path) -> None:
    configure(site, 8883)
    api = socket.socket(socket.AF_UNIX)
    api.bind(str(tmp_path / "run/api.sock"))
    api.listen()
    with serving(daemon(["what?"]), api):
        findings = run_checks(site.config_path, ["daemon"], site=site)
    assert failures(findings) == ["daemon"]


def test_naming_the_checks_loads_no_heavy_module() -> None:
    script = (
        "import sys; from agent.health import probes; probes.list_checks();"
        "print(*{'ssl', 'http.client', 'asyncio', 'pydantic', 'structlog', 'psutil'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
