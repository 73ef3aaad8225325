"""`phaul dump --page-server` over TLS: both sides show certificates of one authority, or nothing goes over."""

from __future__ import annotations

import datetime
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from phaul_engine.images.verify import verify


class Authority:
    """Signs certificates, into files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, directory.name)])
        self._write("ca", self._sign(self.name, self.key, authority=True), self.key)

    def issue(self, name: str) -> None:
        """A certificate for localhost."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        self._write(name, self._sign(subject, key, authority=False), key)

    def options(self, name: str) -> list[str]:
        """The command's options with a certificate of this authority."""
        files = self.directory / f"{name}.crt", self.directory / f"{name}.key", self.directory / "ca.crt"
        return [
            word for pair in zip(("--tls-cert", "--tls-key", "--tls-ca"), map(str, files), strict=True) for word in pair
        ]

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def _write(self, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        pem = serialization.Encoding.PEM
        (self.directory / f"{name}.crt").write_bytes(certificate.public_bytes(pem))
        plain = serialization.NoEncryption()
        (self.directory / f"{name}.key").write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """One, with certificates for both sides."""
    made = Authority(tmp_path / "authority")
    made.issue("server")
    made.issue("client")
    return made


@pytest.fixture
def program() -> Iterator[subprocess.Popen[bytes]]:
    """Something to store."""
    process = subprocess.Popen(["sleep", "1000"], stdin=subprocess.DEVNULL, start_new_session=True)
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def server(tmp_path: Path, authority: Authority) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A page server with TLS, and its port."""
    command = [sys.executable, "-m", "phaul", "page-server", "--images", str(tmp_path / "pages")]
    process = subprocess.Popen(
        [*command, "--listen", "127.0.0.1:0", *authority.options("server")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    yield process, process.stdout.readline().strip().rpartition(":")[2]
    process.kill()
    process.wait()
    process.stdout.close()


def dump(pid: int, images: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run `phaul dump`."""
    command = [sys.executable, "-m", "phaul", "dump", "--pid", str(pid), "--images", str(images), *more]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_pages_go_to_another_host(
    program: subprocess.Popen[bytes],
    server: tuple[subprocess.Popen[str], str],
    authority: Authority,
    tmp_path: Path,
) -> None:
    process, port = server
    images = tmp_path / "images"
    done = dump(program.pid, images, "--page-server", f"localhost:{port}", *authority.options("client"))
    assert done.returncode == 0, done.stderr
    assert process.wait(10) == 0
    assert program.wait(5) == -signal.SIGKILL
    assert not list(images.glob("pages-*")), "pages are only there"
    assert verify(images) != []
    for file in (tmp_path / "pages").iterdir():
        shutil.copy(file, images)
    assert verify(images) == []


def test_nobody_else_sends_pages(
    program: subprocess.Popen[bytes],
    server: tuple[subprocess.Popen[str], str],
    authority: Authority,
    tmp_path: Path,
) -> None:
    process, port = server
    stranger = Authority(tmp_path / "stranger")
    stranger.issue("client")
    mixed = stranger.options("client")
    mixed[-1] = authority.options("client")[-1]  # it takes the server for who it is, and is not taken for anybody
    for options in (stranger.options("client"), mixed):
        done = dump(program.pid, tmp_path / "refused", "--page-server", f"localhost:{port}", *options)
        assert done.returncode != 0
        assert program.poll() is None, "it runs on"
    plain = dump(program.pid, tmp_path / "plain", "--page-server", f"localhost:{port}")
    assert plain.returncode != 0
    assert process.poll() is None, "the server waits for one whom it can trust"
    done = dump(program.pid, tmp_path / "images", "--page-server", f"localhost:{port}", *authority.options("client"))
    assert done.returncode == 0, done.stderr
    assert process.wait(10) == 0


def test_without_tls_only_on_this_host(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "phaul", "page-server", "--images", str(tmp_path), "--listen"]
    for more in (["0.0.0.0:0", "--plain"], ["127.0.0.1:0"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False, timeout=20)
        assert done.returncode == 2, done.stderr
