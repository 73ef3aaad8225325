"""A real etcd with certificates of its own, on loopback or on one of the test hosts."""

from __future__ import annotations

import datetime
import ipaddress
import shutil
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_DAY = datetime.timedelta(days=1)


def missing() -> str:
    """Why there can be no etcd here; empty if there can."""
    return "" if shutil.which("etcd") else "etcd is not installed (Debian: etcd-server)"


@dataclass
class Certificates:
    """Files in a directory: ca.pem, and NAME.pem with NAME.key for the server and a client."""

    directory: Path

    @classmethod
    def make(cls, directory: Path, address: str) -> Certificates:
        """A new authority, a server at `address`, and a client."""
        authority = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority of the tests")])
        own = _builder(name, name, authority.public_key())
        own = own.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        (directory / "ca.pem").write_bytes(_pem(own.sign(authority, hashes.SHA256())))
        for who in ("server", "client"):
            key = ec.generate_private_key(ec.SECP256R1())
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, who)])
            names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
            uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
            builder = _builder(subject, name, key.public_key()).add_extension(names, critical=False)
            certificate = builder.add_extension(uses, critical=False).sign(authority, hashes.SHA256())
            (directory / f"{who}.pem").write_bytes(_pem(certificate))
            private = key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
            (directory / f"{who}.key").write_bytes(private)
        return cls(directory)

    def server(self, address: str, port: int, data: str) -> list[str]:
        """The command that serves there, to who has a client's certificate."""
        peers = f"http://127.0.0.1:{port + 1}"
        return [
            *("etcd", "--data-dir", data, "--logger", "zap", "--log-level", "error"),
            *("--listen-client-urls", f"https://{address}:{port}"),
            *("--advertise-client-urls", f"https://{address}:{port}"),
            *(
                "--listen-peer-urls",
                peers,
                "--initial-advertise-peer-urls",
                peers,
                "--initial-cluster",
                f"default={peers}",
            ),
            *("--cert-file", f"{self.directory}/server.pem", "--key-file", f"{self.directory}/server.key"),
            *("--client-cert-auth", "--trusted-ca-file", f"{self.directory}/ca.pem"),
        ]

    def settings(self, *endpoints: str) -> dict[str, object]:
        """What [arbiter] says then."""
        files = {"ca": "ca.pem", "certificate": "client.pem", "key": "client.key"}
        return {"endpoints": list(endpoints)} | {name: f"{self.directory}/{file}" for name, file in files.items()}


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key)
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - 400 * _DAY).not_valid_after(now + 400 * _DAY)


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)
