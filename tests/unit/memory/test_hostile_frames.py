"""What a page sink does with frames that no source sends: a typed error each, and nothing applied."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import ssl
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from phaul_engine.errors import EngineError
from phaul_engine.memory.extents import PAGE_SIZE, Place
from phaul_engine.memory.sink import PageSink
from phaul_engine.memory.stream import Channel, ProtocolError, Role

from tests.page_frames import CHUNK, HEADER, OBJECT, compress, frame, mark
from tests.page_streams import MIGRATION, TIMEOUT, identities

_HEAD = HEADER.size

PAGE = b"p" * PAGE_SIZE
GOOD = frame([(0, 1, 0)], PAGE)


@contextmanager
def connection(folder: Path) -> Iterator[tuple[ssl.SSLSocket, PageSink, int]]:
    """A sink of one stream that is fed by Python's own TLS."""
    ours, theirs = identities()
    near, far = socket.socketpair()
    near.settimeout(TIMEOUT)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    (folder / "pem").write_text(ours.certificate + ours.key)
    context.load_cert_chain(folder / "pem")

    def dial() -> ssl.SSLSocket:
        tls = context.wrap_socket(near)
        tls.sendall(b"PHAUL\0\0\1" + struct.pack("4B32s", Role.PAGES, 0, 1, 0, MIGRATION))
        tls.recv(16)
        return tls

    fd = os.memfd_create("target")
    try:
        with ThreadPoolExecutor(1) as pool:
            dialing = pool.submit(dial)
            channel, _ = Channel.accept(theirs.context(server=True, pin=ours.fingerprint), far.detach(), TIMEOUT)
            channel.admit(True, TIMEOUT)
            with dialing.result() as tls, PageSink([channel]) as sink:
                sink.add(OBJECT, Place(0, fd))
                sink.allow(3)
                yield tls, sink, fd
    finally:
        os.close(fd)


def test_a_good_frame_is_applied(tmp_path: Path) -> None:
    with connection(tmp_path) as (tls, sink, fd):
        tls.sendall(GOOD + mark(0))
        sink.wait(0, TIMEOUT)
        assert os.pread(fd, PAGE_SIZE + 1, 0) == PAGE


_HOSTILE = {
    "magic": frame([(0, 1, 0)], PAGE, magic=1),
    "type": frame([(0, 1, 0)], PAGE, kind=3),
    "codec": frame([(0, 1, 0)], PAGE, codec=2),
    "flags": frame([(0, 1, 0)], PAGE, flags=2),
    "no extents": frame([]),
    "too many extents": frame([], count=1025),
    "billions of extents": frame([], count=0xFFFFFFFF),
    "too long": frame([(0, 256, 0)], raw=CHUNK + PAGE_SIZE, wire=CHUNK + PAGE_SIZE),
    "far too long": frame([(0, 256, 0)], raw=0xFFFFF000, wire=0xFFFFF000),
    "half a page": frame([(0, 1, 0)], b"x" * 100),
    "raw that is shorter on the wire": frame([(0, 1, 0)], PAGE, wire=100),
    "compressed that is not shorter": frame([(0, 1, 0)], PAGE, codec=1),
    "compressed to nothing": frame([(0, 1, 0)], b"", codec=1, raw=PAGE_SIZE),
    "not compressed at all": frame([(0, 1, 0)], b"x" * 100, codec=1, raw=PAGE_SIZE),
    "extents without their pages": frame([(0, 2, 0)], PAGE),
    "pages without extents": frame([(0, 1, 1)], PAGE),
    "extent of no pages": frame([(0, 0, 1), (0, 1, 0)], PAGE),
    "extent across chunks": frame([(CHUNK - PAGE_SIZE, 2, 1), (0, 1, 0)], PAGE),
    "endless extent": frame([(0, 0xFFFFFFFF, 1), (0, 1, 0)], PAGE),
    "extent within a page": frame([(17, 1, 0)], PAGE),
    "extent of a source's kind": frame([(0, 1, 2)], PAGE),
    "wrong checksum": frame([(0, 1, 0)], PAGE, flags=1, checksum=1),
    "mark with contents": frame([(0, 1, 0)], PAGE, kind=2),
    "a round that is over": mark(1) + frame([(0, 1, 0)], PAGE, number=1),
    "a mark twice": mark(1) + mark(1),
    "a mark of an earlier round": mark(2) + mark(1),
    "an unknown object": frame([(0, 1, 0)], PAGE, owner=77),
    "object -1": frame([(0, 1, 0)], PAGE, owner=(1 << 64) - 1),
    "extent at the end of all addresses": frame([((1 << 64) - PAGE_SIZE, 1, 0)], PAGE),
    "extent across the end of all addresses": frame([((1 << 64) - PAGE_SIZE, 2, 1), (0, 1, 0)], PAGE),
    "extents that add up to another chunk": frame([(0, 256, 0), (0, 1, 1)], PAGE, raw=CHUNK + PAGE_SIZE),
    "drop without an end": frame([(0, 0xFFFFFFFF, 1)]),
    "length that wraps": frame([(0, 1, 0)], PAGE, raw=0xFFFFF000, wire=0xFFFFF000),
    "more on the wire than pages": frame([(0, 1, 0)], PAGE + PAGE, raw=PAGE_SIZE, codec=1),
    "compressed pages of another length": frame([(0, 2, 0)], compress(PAGE * 3), codec=1, raw=2 * PAGE_SIZE),
    "compressed pages cut short": frame([(0, 2, 0)], compress(PAGE * 2)[:-3], codec=1, raw=2 * PAGE_SIZE),
    "compressed pages with noise behind": frame([(0, 2, 0)], compress(PAGE * 2) + b"x", codec=1, raw=2 * PAGE_SIZE),
    "a window of two gigabytes": frame([(0, 2, 0)], b"\x28\xb5\x2f\xfd\x00\xa8" + bytes(9), codec=1, raw=2 * PAGE_SIZE),
    "a dictionary that nobody has": frame(
        [(0, 2, 0)], b"\x28\xb5\x2f\xfd\x23\xff\xff\xff\xff\x10" + bytes(9), codec=1, raw=8192
    ),
    "a bomb": frame([(0, 256, 0)], compress(bytes(64 << 20), 19), codec=1, raw=CHUNK),
    "a mark with a codec": frame([], kind=2, codec=9),
    "a mark with flags": frame([], kind=2, flags=0x8000),
    "a mark with extents": frame([(0, 1, 1)], kind=2),
    "text": b"GET / HTTP/1.1\r\nHost: example.org\r\n\r\n" * 3,
}

_CUTS = {
    f"{name} of {size} bytes": GOOD[:size]
    for name, sizes in (
        ("head", range(1, _HEAD, 4)),
        ("extent", (_HEAD, _HEAD + 8)),
        ("pages", (_HEAD + 16, len(GOOD) - 1)),
    )
    for size in sizes
}


@pytest.mark.parametrize("hostile", _HOSTILE.values(), ids=_HOSTILE.keys())
def test_a_hostile_frame_ends_the_stream(tmp_path: Path, hostile: bytes) -> None:
    with connection(tmp_path) as (tls, sink, fd):
        with suppress(OSError):
            tls.sendall(hostile)
        with pytest.raises(ProtocolError):
            sink.wait(3, TIMEOUT)
        assert os.fstat(fd).st_size == 0


@pytest.mark.parametrize("cut", _CUTS.values(), ids=_CUTS.keys())
def test_a_frame_that_ends_early_is_as_if_it_had_not_come(tmp_path: Path, cut: bytes) -> None:
    with connection(tmp_path) as (tls, sink, fd):
        tls.sendall(cut)
        tls.shutdown(socket.SHUT_WR)
        with pytest.raises(EngineError):
            sink.wait(0, TIMEOUT)
        assert os.fstat(fd).st_size == 0


def test_pages_for_an_object_that_is_gone(tmp_path: Path) -> None:
    with connection(tmp_path) as (tls, sink, fd):
        sink.remove(OBJECT)
        tls.sendall(GOOD)
        with pytest.raises(ProtocolError):
            sink.wait(0, TIMEOUT)
        assert os.fstat(fd).st_size == 0


def test_pages_never_go_where_the_engine_works(tmp_path: Path) -> None:
    """A tree under construction has the engine's own memory in it, which pages of a stranger must not reach."""
    area = mmap.mmap(-1, 4 * PAGE_SIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    with connection(tmp_path) as (tls, sink, _), open("/proc/self/mem", "r+b", buffering=0) as mem:
        sink.add(9, Place(os.getpid(), mem.fileno()))
        sink.guard(start + PAGE_SIZE, start + 3 * PAGE_SIZE)
        tls.sendall(frame([(start, 1, 0)], PAGE, owner=9) + frame([(start + 3 * PAGE_SIZE, 1, 0)], PAGE, owner=9))
        tls.sendall(mark(0) + frame([(start + 2 * PAGE_SIZE, 1, 0)], PAGE, number=1, owner=9))
        sink.wait(0, TIMEOUT)
        with pytest.raises(ProtocolError):
            sink.wait(1, TIMEOUT)
    assert area[:] == PAGE + bytes(2 * PAGE_SIZE) + PAGE


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_frames_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    text = bytearray(frame([(0, 1, 0), (PAGE_SIZE, 3, 1)], PAGE) + mark(0) + GOOD + mark(1))
    for _ in range(data.draw(st.integers(1, 4))):
        text[data.draw(st.integers(0, HEADER.size + 32))] = data.draw(st.integers(0, 255))
    with connection(tmp_path) as (tls, sink, _):
        with suppress(OSError):
            tls.sendall(text)
            tls.shutdown(socket.SHUT_WR)
        sink.allow(0xFFFFFFFF)
        with pytest.raises(EngineError):
            sink.wait(0xFFFFFFFF, TIMEOUT)
        assert sink.statistics().pages_data <= 2
