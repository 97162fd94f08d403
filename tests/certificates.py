"""Certificates made on the fly: an authority, a server for localhost, and clients; P-256, valid from yesterday on."""

from __future__ import annotations

import datetime as dt
import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat


@dataclass(frozen=True)
class Pair:
    """The files of a certificate and its key."""

    certificate_file: Path
    private_key_file: Path


class Authority:
    """A certificate authority that keeps everything it makes in `folder`."""

    def __init__(self, folder: Path, name: str = "test authority") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        self._key = ec.generate_private_key(ec.SECP256R1())
        certificate = (
            self._builder(self._name, self._key.public_key(), days=365)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .sign(self._key, SHA256())
        )
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(certificate.public_bytes(Encoding.PEM))

    def server(self, *names: str) -> Pair:
        """A server certificate for `names`; without any for localhost and 127.0.0.1."""
        return self._issue("server", list(names) or ["localhost", "127.0.0.1"], days=30)

    def client(self, common_name: str, *, days: float = 30) -> Pair:
        """A client certificate that is valid for `days`; negative: it has expired."""
        return self._issue(common_name, [], days=days)

    def sign(self, csr_pem: str) -> str:
        """A certificate for a signing request, PEM."""
        request = x509.load_pem_x509_csr(csr_pem.encode())
        assert request.is_signature_valid
        certificate = self._builder(request.subject, request.public_key(), days=30).sign(self._key, SHA256())
        return certificate.public_bytes(Encoding.PEM).decode()

    def server_context(self, pair: Pair | None = None) -> ssl.SSLContext:
        """TLS for a server that asks clients for a certificate of this authority."""
        pair = pair or self.server()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pair.certificate_file, pair.private_key_file)
        context.load_verify_locations(self.ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
        context.set_alpn_protocols(["x-amzn-mqtt-ca"])
        return context

    def _issue(self, common_name: str, names: list[str], days: float) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, common_name)])
        builder = self._builder(subject, key.public_key(), days)
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(n) for n in names]), False)
        certificate = builder.sign(self._key, SHA256())
        pair = Pair(self.folder / f"{common_name}.pem", self.folder / f"{common_name}-key.pem")
        pair.certificate_file.write_bytes(certificate.public_bytes(Encoding.PEM))
        pair.private_key_file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return pair

    def _builder(self, subject: x509.Name, key, days: float) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=60))
            .not_valid_after(now + dt.timedelta(days=days))
        )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
