"""The page server: both sizes of heads, rounds, and clients that say impossible things."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from phaul_engine.errors import EngineError, ImageError
from phaul_engine.images.directory import ImageDirectory
from phaul_engine.images.pages import PageImages
from phaul_engine.memory.extents import Extents, Place
from phaul_engine.page_client import RemoteStore
from phaul_engine.page_server import PageServer
from phaul_engine.page_wire import Command, PageStreamError, PlainWire, owner, whose

from phaul.errors import UsageError
from phaul.page_link import Address, Credentials

_PAGE = 4096
_TASK = whose("pagemap", 77)
_PRESENT, _PARENT = 4, 1


def large(command: int, flags: int = 0, pages: int = 0, address: int = 0, number: int = 0) -> bytes:
    """A head of CRIU 4.2."""
    return struct.pack("<IIQQQ", command | flags << 16, 0xDEAD, pages, address, number)


def small(command: int, flags: int = 0, pages: int = 0, address: int = 0, number: int = 0) -> bytes:
    """A head of CRIU before that."""
    return struct.pack("<IIQQ", command | flags << 16, pages, address, number)


def page(letter: bytes) -> bytes:
    """A page full of it."""
    return letter * _PAGE


def serve(directory: Path, client: Callable[[socket.socket], None], parent: Path | None = None) -> None:
    """Run a client against a server that writes into a directory; what the server raises is raised here."""
    ours, theirs = socket.socketpair()
    problems: list[BaseException] = []

    def run() -> None:
        wire = PlainWire(theirs)
        try:
            with ImageDirectory(directory) as images:
                if parent is None:
                    PageServer(wire, images).serve()
                else:
                    with PageImages(parent) as pages:
                        PageServer(wire, images, pages).serve()
        except BaseException as error:
            problems.append(error)
        finally:
            wire.close()

    thread = threading.Thread(target=run)
    thread.start()
    with ours:
        try:
            client(ours)
        except (ConnectionError, BrokenPipeError):
            pass
    thread.join(10)
    if problems:
        raise problems[0]


def contents(directory: Path, kind: str = "pagemap", ident: int = 77) -> dict[int, bytes]:
    """The first byte of every page, by address, through all rounds."""
    with PageImages(directory) as images:
        return {
            extent.vaddr + index * _PAGE: os.pread(extent.fd, 1, extent.offset + index * _PAGE)
            for extent in images.extents(kind, ident)
            for index in range(extent.pages)
        }


@pytest.mark.parametrize("form", [large, small])
def test_pages_of_either_kind_of_client(tmp_path: Path, form: Callable[..., bytes]) -> None:
    answers: list[bytes] = []

    def client(sock: socket.socket) -> None:
        sock.sendall(form(Command.OPEN2, number=_TASK))
        answers.append(sock.recv(1))
        sock.sendall(form(Command.ADD_F, _PRESENT, 2, 0x10000, _TASK) + page(b"a") + page(b"b"))
        sock.sendall(form(Command.ADD, 0, 1, 0x20000, _TASK) + page(b"c"))
        sock.sendall(form(Command.OPEN, number=whose("pagemap-shmem", 5)))
        sock.sendall(form(Command.ADD_F, _PRESENT, 1, 0, whose("pagemap-shmem", 5)) + page(b"s"))
        sock.sendall(form(Command.CLOSE))
        answers.append(sock.recv(4))

    serve(tmp_path, client)
    assert answers == [b"\0", bytes(4)]
    assert contents(tmp_path) == {0x10000: b"a", 0x11000: b"b", 0x20000: b"c"}
    assert contents(tmp_path, "pagemap-shmem", 5) == {0: b"s"}


def test_a_round_refers_to_the_one_before(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    (second / "parent").symlink_to("../first")

    def begin(sock: socket.socket) -> None:
        sock.sendall(large(Command.OPEN2, number=_TASK))
        sock.recv(1)
        sock.sendall(large(Command.ADD_F, _PRESENT, 3, 0x10000, _TASK) + page(b"a") * 3 + large(Command.CLOSE))
        sock.recv(4)

    answers: list[bytes] = []

    def go_on(sock: socket.socket) -> None:
        sock.sendall(large(Command.PARENT, number=_TASK))
        answers.append(sock.recv(4))
        sock.sendall(large(Command.PARENT, number=whose("pagemap", 78)))
        answers.append(sock.recv(4))
        sock.sendall(large(Command.OPEN2, number=_TASK))
        answers.append(sock.recv(1))
        sock.sendall(large(Command.ADD_F, _PARENT, 1, 0x10000, _TASK))
        sock.sendall(large(Command.ADD_F, _PRESENT, 1, 0x11000, _TASK) + page(b"b"))
        sock.sendall(large(Command.HOLE, 0, 1, 0x12000, _TASK) + large(Command.CLOSE))
        sock.recv(4)

    serve(first, begin)
    serve(second, go_on, first)
    assert answers == [struct.pack("<i", 1), struct.pack("<i", 0), b"\1"]
    assert contents(second) == {0x10000: b"a", 0x11000: b"b", 0x12000: b"a"}


_OPEN = large(Command.OPEN2, number=_TASK)
_ONE = large(Command.ADD_F, _PRESENT, 1, 0x10000, _TASK) + page(b"a")
HOSTILE = {
    "nothing at all": b"",
    "half a head": _OPEN[:20],
    "gone before the end": _OPEN + _ONE,
    "gone within pages": _OPEN + _ONE[:-1],
    "pages of nobody": large(Command.PARENT, number=_TASK) + _ONE,
    "more pages than there are": _OPEN + large(Command.ADD_F, _PRESENT, 1 << 62, 0x10000, _TASK),
    "pages beyond the end of memory": _OPEN + large(Command.ADD_F, _PRESENT, 16, (1 << 64) - _PAGE, _TASK),
    "no pages": _OPEN + large(Command.ADD_F, _PRESENT, 0, 0x10000, _TASK),
    "an address within a page": _OPEN + large(Command.ADD_F, _PRESENT, 1, 0x10001, _TASK) + page(b"a"),
    "pages twice": _OPEN + _ONE + _ONE,
    "pages out of order": _OPEN + _ONE + large(Command.ADD_F, _PRESENT, 1, 0x1000, _TASK) + page(b"a"),
    "a hole without a round before": _OPEN + large(Command.HOLE, 0, 1, 0x10000, _TASK),
    "strange flags": _OPEN + large(Command.ADD_F, 0x80, 1, 0x10000, _TASK),
    "a lazy client": _OPEN + large(Command.GET, 0, 1, 0x10000, 77),
    "no such command": _OPEN + large(0x77),
    "no such owner": large(Command.OPEN2, number=77 << 8 | 99),
    "an impossible pid": large(Command.OPEN2, number=1 << 50 | 1),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_client_may_not_say(tmp_path: Path, name: str) -> None:
    def client(sock: socket.socket) -> None:
        sock.sendall(HOSTILE[name])
        sock.shutdown(socket.SHUT_WR)
        while sock.recv(100):
            pass

    with pytest.raises((PageStreamError, ImageError)):
        serve(tmp_path, client)
    assert not (tmp_path / "pagemap-77.img").exists(), "what is not complete has no map"


def test_the_owners_that_old_versions_name() -> None:
    assert owner(77 << 8 | 10) == ("pagemap", 77)
    assert owner(77 << 8 | 30) == ("pagemap-shmem", 77)
    with pytest.raises(PageStreamError):
        owner(77 << 8 | 20)


def test_our_client_and_our_server(tmp_path: Path) -> None:
    memory = os.memfd_create("pages")
    total = 9000  # more than one batch
    for index in range(0, total, 3):
        os.pwrite(memory, page(bytes([1 + index % 200])), index * _PAGE)
    os.ftruncate(memory, total * _PAGE)

    def client(sock: socket.socket) -> None:
        store = RemoteStore(PlainWire(socket.socket(fileno=os.dup(sock.fileno()))))
        store.put("pagemap-shmem", 5, Place(0, memory), Extents.whole(0, total * _PAGE))
        store.finish()
        store.close()
        assert store.stored.pages == total // 3

    serve(tmp_path, client)
    os.close(memory)
    found = contents(tmp_path, "pagemap-shmem", 5)
    assert found == {index * _PAGE: bytes([1 + index % 200]) for index in range(0, total, 3)}


def test_a_server_that_goes_away_is_told(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    store = RemoteStore(PlainWire(ours))
    with pytest.raises((EngineError, OSError)):
        store.put("pagemap", 5, Place(0, -1), Extents())
    store.close()


def test_plain_pages_stay_on_this_host() -> None:
    for here in ("127.0.0.1:1", "[::1]:1", "localhost:1"):
        Address.parse(here).must_be_here()
    for away in ("0.0.0.0:1", "192.0.2.1:1", "[::]:1", "example.org:1"):
        with pytest.raises(UsageError):
            Address.parse(away).must_be_here()
    for nothing in ("127.0.0.1", ":1", "host:port", "host:70000"):
        with pytest.raises(UsageError):
            Address.parse(nothing)
    with pytest.raises(UsageError):
        Credentials.of(Path("cert"), None, None)
