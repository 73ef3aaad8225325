"""Page streams between hosts without SSH: who may connect, and how.

Both sides show certificates of one authority (as CRIU's --tls), or the stream is plain and stays on this host.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from phaul_engine.images.directory import ImageDirectory
from phaul_engine.images.pages import PageImages
from phaul_engine.page_client import RemoteStore
from phaul_engine.page_server import PageServer
from phaul_engine.page_store import Stored
from phaul_engine.page_wire import PlainWire, TlsWire, Wire

from phaul.errors import AuthenticationError, ConnectError, PhaulError, UsageError

_CONNECT_SECONDS = 10.0
_HANDSHAKE_SECONDS = 10.0


@dataclass(frozen=True)
class Credentials:
    """Files with our certificate, its key, and the authority that the other side's must be of."""

    certificate: Path
    key: Path
    authority: Path

    @classmethod
    def of(cls, certificate: Path | None, key: Path | None, authority: Path | None) -> Credentials | None:
        """All three, or None if none is given."""
        given = (certificate, key, authority)
        if not any(given):
            return None
        if certificate is None or key is None or authority is None:
            raise UsageError("--tls-cert, --tls-key and --tls-ca belong together")
        return cls(certificate, key, authority)

    def context(self, *, server: bool) -> ssl.SSLContext:
        """Settings of TLS with which both sides must show a certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_cert_chain(self.certificate, self.key)
            context.load_verify_locations(self.authority)
        except (ssl.SSLError, OSError) as error:
            raise UsageError(f"the TLS files cannot be used: {error}") from error
        return context


@dataclass(frozen=True)
class Address:
    """Host and port."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """HOST:PORT, an IPv6 address in brackets."""
        host, _, port = text.rpartition(":")
        host = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not host or not port.isdecimal() or int(port) > 65535:
            raise UsageError(f"{text!r} is not HOST:PORT")
        return cls(host, int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def must_be_here(self) -> None:
        """UsageError unless it is this host's own: what is not encrypted may not leave it."""
        try:
            here = ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            here = self.host == "localhost"
        if not here:
            raise UsageError(
                f"pages would go to {self} without encryption",
                advice="give --tls-cert, --tls-key and --tls-ca, or use a loopback address (through a tunnel of yours)",
            )


@contextlib.contextmanager
def connect(address: Address, credentials: Credentials | None) -> Iterator[RemoteStore]:
    """A store that sends pages to a page server."""
    if credentials is None:
        address.must_be_here()
    try:
        sock = socket.create_connection((address.host, address.port), timeout=_CONNECT_SECONDS)
    except OSError as error:
        raise ConnectError(f"no page server was reached at {address}: {error.strerror or error}") from error
    with contextlib.ExitStack() as stack:
        stack.callback(sock.close)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        wire = _wire(sock, credentials, None if credentials is None else address.host)
        store = RemoteStore(wire)
        stack.pop_all()
    try:
        yield store
    finally:
        store.close()


def serve(
    address: Address,
    directory: ImageDirectory,
    credentials: Credentials | None,
    *,
    listening: Callable[[Address], None] = lambda address: None,
) -> Stored:
    """Take the pages of one dump. Whoever cannot show a certificate is turned away, and the next one waited for.

    `listening` is called with the address when clients may connect: with the port that was chosen, for port 0.
    """
    if credentials is None:
        address.must_be_here()
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        try:
            listener = stack.enter_context(socket.create_server((address.host, address.port), family=family, backlog=8))
        except OSError as error:
            raise PhaulError(f"cannot listen at {address}: {error.strerror}") from error
        listening(Address(address.host, listener.getsockname()[1]))
        parent = directory.parent()
        if parent is not None:
            stack.callback(parent.close)
        pages = stack.enter_context(PageImages(parent)) if parent is not None else None
        wire = _accept(listener, credentials)
        stack.callback(wire.close)
        listener.close()
        server = PageServer(wire, directory, pages)
        server.serve()
        return server.stored


def _accept(listener: socket.socket, credentials: Credentials | None) -> Wire:
    while True:
        sock, _ = listener.accept()
        try:
            return _wire(sock, credentials)
        except (AuthenticationError, ConnectError):
            sock.close()
        except BaseException:
            sock.close()
            raise


def _wire(sock: socket.socket, credentials: Credentials | None, peer: str | None = None) -> Wire:
    """The connection, encrypted if there are credentials: as client of `peer`, or as server."""
    if credentials is None:
        sock.settimeout(None)
        return PlainWire(sock)
    context = credentials.context(server=peer is None)
    sock.settimeout(_HANDSHAKE_SECONDS)
    try:
        tls = context.wrap_socket(sock, server_side=peer is None, server_hostname=peer)
    except ssl.SSLError as error:
        raise AuthenticationError(f"no trusted page stream: {error.reason or error}") from error
    except OSError as error:
        raise ConnectError(f"the page stream was not set up: {error}") from error
    tls.settimeout(None)
    return TlsWire(tls)
