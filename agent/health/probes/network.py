"""Checks of the way to the cloud: link, route, DNS, TCP, TLS, the daemon and its MQTT session."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING, Any

from agent.health.probes.model import Outcome, Site, is_address, is_loopback

if TYPE_CHECKING:
    import ssl

CONNECT_TIMEOUT_S = 2.5
# TLS 1.3 servers refuse a client certificate only after the handshake; one that accepts it says nothing until CONNECT.
REFUSAL_WAIT_S = 0.5
SIOCGIFADDR = 0x8915
ROUTE_UP = 0x1
NO_ENDPOINT = Outcome("skip", "no cloud.endpoint is configured")


def check_link(site: Site) -> Outcome:
    """An interface with a link and an address."""
    if is_loopback(site.first_hop[0]):
        return Outcome("skip", "the cloud's endpoint is on this machine")
    seen = []
    for interface in sorted((site.sys / "class" / "net").glob("*")):
        if interface.name == "lo":
            continue
        state = _read(interface / "operstate")
        # Tunnels and modems have no carrier and say unknown while they work.
        linked = state in ("up", "unknown") and _read(interface / "carrier") != "0"
        address = _has_address(site, interface.name) if linked else False
        if linked and address:
            return Outcome("pass", f"{interface.name} is up with an address")
        seen.append(f"{interface.name} {'has no address' if linked else 'is ' + (state or 'down')}")
    return Outcome(
        "fail",
        ", ".join(seen) or "there is no network interface",
        "the camera is not connected to any network",
        "plug in the cable or modem, then see `ip -br address` and `journalctl -b -u NetworkManager -u systemd-networkd`",
    )


def _has_address(site: Site, name: str) -> bool:
    import fcntl

    for line in _read(site.proc / "net" / "if_inet6").splitlines():
        fields = line.split()
        # Scope 20 is link-local, which reaches no router's other side.
        if len(fields) >= 6 and fields[5] == name and fields[3] != "20":
            return True
    if any(line.split()[:1] == [name] for line in _read(site.proc / "net" / "route").splitlines()):
        return True
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return False
    return True


def check_route(site: Site) -> Outcome:
    """A default route."""
    if is_loopback(site.first_hop[0]):
        return Outcome("skip", "the cloud's endpoint is on this machine")
    for line in _read(site.proc / "net" / "route").splitlines()[1:]:
        fields = line.split()
        if len(fields) >= 8 and fields[1] == "00000000" and fields[7] == "00000000" and int(fields[3], 16) & ROUTE_UP:
            return Outcome("pass", f"by {fields[0]}")
    for line in _read(site.proc / "net" / "ipv6_route").splitlines():
        fields = line.split()
        if len(fields) >= 10 and fields[0] == "0" * 32 and fields[1] == "00" and fields[9] != "lo":
            return Outcome("pass", f"by {fields[9]} (IPv6)")
    return Outcome(
        "fail",
        "no default route",
        "nothing outside the local network can be reached",
        "check the router's DHCP or the gateway in the network settings: `ip route`",
    )


def check_dns(site: Site) -> Outcome:
    """The name of the endpoint, or of the proxy, has an address."""
    host, port = site.first_hop
    if not host:
        return NO_ENDPOINT
    if is_address(host):
        return Outcome("pass", f"{host} is an address")
    try:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        unknown = isinstance(error, socket.gaierror) and error.errno in (socket.EAI_NONAME, socket.EAI_NODATA)
        return Outcome(
            "fail",
            f"{host}: {getattr(error, 'strerror', None) or error}",
            "the name does not exist or no name server answers" if unknown else "no name server answers",
            f"try `getent ahosts {host}`; check cloud.endpoint and the name servers in /etc/resolv.conf",
        )
    return Outcome("pass", f"{host} is {', '.join(sorted({str(answer[4][0]) for answer in answers})[:3])}")


def check_tcp(site: Site) -> Outcome:
    """The endpoint's port, or the proxy's, accepts connections."""
    host, port = site.first_hop
    if not host:
        return NO_ENDPOINT
    try:
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        refused = isinstance(error, ConnectionRefusedError)
        meaning = "nothing listens there" if refused else "a firewall drops the packets, or the network is cut off"
        other = 443 if port == 8883 else 8883
        remedy = (
            f"allow outgoing TCP {port} to {host} in the firewall, or set cloud.port = {other} in {site.config_path}"
        )
        return Outcome("fail", f"{host} port {port}: {_words(error)}", meaning, remedy)
    return Outcome("pass", f"{host} port {port} answers")


def check_tls(site: Site) -> Outcome:
    """The server's chain and name against ca_file, ALPN on 443, and that it takes our certificate."""
    import ssl

    host, port = site.endpoint
    if not host:
        return NO_ENDPOINT
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(site.ca_file)
    except (OSError, ssl.SSLError) as error:
        return Outcome(
            "fail",
            f"{site.ca_file}: {_words(error)}",
            "the server can't be verified without its root certificate",
            f"install Amazon Root CA 1: `curl -o {site.ca_file} https://www.amazontrust.com/repository/AmazonRootCA1.pem`",
        )
    with_certificate = _load_identity(context, site)
    if port == 443:
        context.set_alpn_protocols(["x-amzn-mqtt-ca"])
    try:
        with _connect(site) as plain, context.wrap_socket(plain, server_hostname=host) as secured:
            if port == 443 and secured.selected_alpn_protocol() != "x-amzn-mqtt-ca":
                return Outcome(
                    "fail",
                    f"{host} did not choose ALPN x-amzn-mqtt-ca",
                    "on port 443 it takes the connection for HTTPS; a proxy that opens TLS does that too",
                    f"exempt {host} from TLS inspection, or set cloud.port = 8883 in {site.config_path}",
                )
            refusal = _refusal(secured) if with_certificate else ""
            if refusal:
                return Outcome(
                    "fail",
                    f"{host} closed the connection after our certificate: {refusal}",
                    "the certificate is revoked, inactive, or of another account",
                    "look at it in AWS IoT: `aws iot describe-certificate`, activate it or provision again: `camera-agent provision`",
                )
            version = secured.version()
    except ssl.SSLCertVerificationError as error:
        return _untrusted(error, host, site)
    except OSError as error:
        return Outcome(
            "fail",
            f"{host}: {_words(error)}",
            "the TLS handshake did not succeed",
            f"try `openssl s_client -connect {host}:{port} -servername {host} -CAfile {site.ca_file}`",
        )
    ours = "our certificate is taken" if with_certificate else "without our certificate, which may not be read"
    return Outcome("pass", f"{version}, chain and name are right, {ours}")


def _untrusted(error: ssl.SSLCertVerificationError, host: str, site: Site) -> Outcome:
    known = {
        10: ("the server's certificate has expired, or this camera's clock is ahead", "compare `date -u` with the true time"),
        9: ("the server's certificate is not valid yet, so this camera's clock is behind", "compare `date -u` with the true time"),
        62: ("the server's certificate is for another name", f"correct cloud.endpoint in {site.config_path}"),
    }  # fmt: skip
    meaning, remedy = known.get(
        error.verify_code,
        (
            "its chain does not end in ca_file: the file is of another authority, or something in between opens TLS",
            f"`openssl s_client -connect {host}:{site.endpoint[1]} -showcerts` shows the issuer; install the right root as {site.ca_file}",
        ),
    )
    return Outcome("fail", f"{host}: {error.verify_message}", meaning, remedy)


def _load_identity(context: ssl.SSLContext, site: Site) -> bool:
    try:
        context.load_cert_chain(site.certificate_file, site.private_key_file)
    except OSError:
        return False
    return True


def _refusal(secured: ssl.SSLSocket) -> str:
    secured.settimeout(REFUSAL_WAIT_S)
    try:
        return "" if secured.recv(1) else "end of connection"
    except TimeoutError:
        return ""
    except OSError as error:
        return _words(error)


def _connect(site: Site) -> socket.socket:
    """A connection to the endpoint, by the proxy when one is set. Raises OSError."""
    connection = socket.create_connection(site.first_hop, CONNECT_TIMEOUT_S)
    if site.proxy_url:
        try:
            _open_tunnel(connection, site)
        except BaseException:
            connection.close()
            raise
    return connection


def _open_tunnel(connection: socket.socket, site: Site) -> None:
    import base64
    from urllib.parse import unquote, urlsplit

    host, port = site.endpoint
    url = urlsplit(site.proxy_url)
    request = f"CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n"
    if url.username is not None:
        secret = f"{unquote(url.username)}:{unquote(url.password or '')}".encode()
        request += f"Proxy-Authorization: Basic {base64.b64encode(secret).decode()}\r\n"
    connection.sendall(f"{request}\r\n".encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)
        if not byte or len(answer) > 8192:
            raise OSError("the proxy closed the connection")
        answer += byte
    status = answer.split(b"\r\n", 1)[0].decode("latin-1")
    if status.split(" ")[1:2] != ["200"]:
        raise OSError(f"the proxy refused: {status}")


def check_daemon(site: Site) -> Outcome:
    """The daemon answers on its socket."""
    import http.client
    import json

    class LocalConnection(http.client.HTTPConnection):
        def connect(self) -> None:
            self.sock = socket.socket(socket.AF_UNIX)
            self.sock.settimeout(self.timeout)
            self.sock.connect(str(site.socket_path))

    start = "sudo systemctl restart camera-agent.service; journalctl -u camera-agent.service -n 50"
    connection = LocalConnection("localhost", timeout=2.0)
    try:
        connection.request("GET", "/v1/status")
        reply: Any = json.loads(connection.getresponse().read())
        if not isinstance(reply, dict) or "agent" not in reply:
            raise ValueError("not a status")
    except PermissionError:
        return Outcome(
            "warn",
            f"{site.socket_path}: permission denied",
            "this user may not ask the daemon",
            "use sudo, or join the group: `sudo usermod -aG camera-operators $USER`",
        )
    except FileNotFoundError:
        return Outcome("fail", f"{site.socket_path} does not exist", "the daemon is not running", start)
    except ConnectionRefusedError:
        return Outcome("fail", f"nobody listens on {site.socket_path}", "the daemon ended without cleaning up", start)
    except (OSError, ValueError, http.client.HTTPException) as error:
        return Outcome("fail", f"{site.socket_path}: {_words(error)}", "the daemon hangs or answers nonsense", start)
    finally:
        connection.close()
    site.agent_status = reply
    agent = reply["agent"] if isinstance(reply["agent"], dict) else {}
    return Outcome("pass", f"version {agent.get('version', '?')}, pid {agent.get('pid', '?')}")


def check_mqtt(site: Site) -> Outcome:
    """The daemon's session with the cloud."""
    cloud = site.agent_status.get("cloud")
    if not isinstance(cloud, dict):
        return Outcome("skip", "the daemon could not be asked")
    if not site.endpoint[0]:
        return NO_ENDPOINT
    state = cloud.get("state")
    if state == "connected":
        return Outcome("pass", f"connected to {cloud.get('endpoint')} port {cloud.get('port')}")
    seen = ": ".join(str(part) for part in (state, cloud.get("reason") or cloud.get("code")) if part)
    if state == "connecting" and not cloud.get("code"):
        return Outcome("warn", seen, "the session is being made", "try again in a minute")
    return Outcome(
        "fail",
        seen,
        "the way is open but the broker does not accept the session",
        str(
            cloud.get("hint")
            or "check the certificate's policy in AWS IoT, and `journalctl -u camera-agent.service -n 50`"
        ),
    )


def _read(path: Any) -> str:
    try:
        return str(path.read_text(encoding="ascii", errors="replace")).strip()
    except OSError:
        return ""


def _words(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    reason = getattr(error, "reason", None) or getattr(error, "strerror", None)
    return str(reason or error or type(error).__name__)
