"""Throughput of a round: page source to page sink, against one TLS connection of Python's ssl.

Two processes on loopback TCP, the same way for both. The reference sends a buffer with sendall and reads it with
recv_into; the page stream reads pages of a process, looks for zero ones, encrypts, decrypts and writes each to its
address in another process, into memory that nobody has touched. `python -m benchmarks.page_stream [MiB]` prints JSON.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import socket
import ssl
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from phaul_engine.memory.extents import PAGE_SIZE, Extents, Place
from phaul_engine.memory.sink import PageSink
from phaul_engine.memory.source import Codec, PageSource
from phaul_engine.memory.stream import Channel, Role, StreamHello
from phaul_engine.native import check, lib, new_error

from phaul.transport.pages import Identity, make_identity
from tests.page_streams import userfaultfd

Address = tuple[str, int]

_ID = bytes(32)
_CHUNK = 1 << 20
_REPEATS = 5
_TIMEOUT = 120.0
_START = 0x5B0000000000  # where both processes have the memory
_FIXED_NOREPLACE = 0x100000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]


def _map(size: int) -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _FIXED_NOREPLACE
    if _libc.mmap(_START, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != _START:
        raise OSError(ctypes.get_errno(), "map the benchmark's memory")


def _userfaultfd(size: int) -> int:
    """As skeleton tasks have one of their areas until the first round is in."""
    uffd, err = userfaultfd(), new_error()
    check(lib.ph_uffd_track(uffd, _START, _START + size, err), err)
    return uffd


def _receive_tls(port: socket.socket, us: Identity, size: int) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        pem = Path(folder, "pem")
        pem.write_text(us.certificate + us.key)
        context.load_cert_chain(pem)
    buffer = bytearray(_CHUNK)
    with context.wrap_socket(port.accept()[0], server_side=True) as tls:
        left = size
        while left:
            left -= tls.recv_into(buffer)
        tls.sendall(b"k")


def _send_tls(address: Address, size: int) -> float:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    chunk = os.urandom(_CHUNK)
    with context.wrap_socket(socket.create_connection(address)) as tls:
        started = time.perf_counter()
        for _ in range(size // _CHUNK):
            tls.sendall(chunk)
        tls.recv(1)
        return time.perf_counter() - started


def _receive_pages(port: socket.socket, us: Identity, them: Identity, size: int, streams: int) -> None:
    tls = us.context(server=True, pin=them.fingerprint)
    _map(size)
    channels: list[Channel] = []
    for _ in range(streams + 1):
        channel, _ = Channel.accept(tls, port.accept()[0].detach(), _TIMEOUT)
        channel.admit(True, _TIMEOUT)
        channels.append(channel)
    control = channels.pop()
    with control, PageSink(channels) as sink:
        sink.add(1, Place(os.getpid(), -1))
        sink.fill(1, _userfaultfd(size))
        sink.allow(0)
        sink.wait(0, _TIMEOUT)
        control.send(b"done", _TIMEOUT)


def _send_pages(address: Address, us: Identity, them: Identity, size: int, streams: int, codec: Codec) -> float:
    tls = us.context(server=False, pin=them.fingerprint)
    hellos = [StreamHello(_ID, Role.PAGES, number, streams) for number in range(streams)]
    channels = [
        Channel.connect(tls, socket.create_connection(address).detach(), hello, _TIMEOUT)
        for hello in (*hellos, StreamHello(_ID, Role.CONTROL))
    ]
    control = channels.pop()
    _map(size)
    noise = os.urandom(_CHUNK)
    for at in range(_START, _START + size, _CHUNK):
        ctypes.memmove(at, noise, _CHUNK)
    with control, PageSource(channels, codec=codec) as source:
        source.add(1, Place(os.getpid(), -1))
        started = time.perf_counter()
        source.send(1, Extents.whole(_START, _START + size))
        source.end(0)
        if control.receive(_TIMEOUT) != b"done":
            raise RuntimeError("the receiver says something else")
        elapsed = time.perf_counter() - started
        if source.statistics().pages_data != size // PAGE_SIZE:
            raise RuntimeError("not all pages were sent")
        return elapsed


def _in_children(receive: Callable[[socket.socket], None], send: Callable[[Address], float]) -> float:
    """Run both in processes of their own; what `send` returns, in seconds."""
    read_end, write_end = os.pipe()
    with socket.create_server(("127.0.0.1", 0), backlog=16) as port:
        address = port.getsockname()
        children = [_fork(lambda: receive(port)), _fork(lambda: _tell(write_end, send(address)))]
    os.close(write_end)
    with open(read_end) as answer:
        text = answer.read()
    failed = [status for _, status in (os.waitpid(child, 0) for child in children) if status]
    if failed:
        raise RuntimeError(f"a benchmark process failed: {failed}")
    return float(text)


def _tell(fd: int, value: float) -> None:
    os.write(fd, str(value).encode())


def _fork(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def measure(size: int, repeats: int = _REPEATS) -> dict[str, float]:
    """Medians in bytes a second, taken in turns, and the ratio to the reference."""
    source, destination = make_identity(), make_identity()
    runs: dict[str, Callable[[], float]] = {
        "python_ssl": lambda: _in_children(
            lambda port: _receive_tls(port, destination, size), lambda address: _send_tls(address, size)
        )
    }
    for streams in (1, 2, 4):
        for codec in (Codec.RAW, Codec.AUTO):
            runs[f"pages_{codec.name.lower()}_{streams}"] = partial(
                _in_children,
                partial(_receive_pages, us=destination, them=source, size=size, streams=streams),
                partial(_send_pages, us=source, them=destination, size=size, streams=streams, codec=codec),
            )
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(run())
    rates = {name: size / statistics.median(values) for name, values in seconds.items()}
    ratios = {f"{name}_ratio": rate / rates["python_ssl"] for name, rate in rates.items() if name != "python_ssl"}
    return {**rates, **ratios}


def main() -> None:
    """Print the results."""
    size = int(sys.argv[1] if len(sys.argv) > 1 else 256) << 20
    print(json.dumps(measure(size), indent=1))


if __name__ == "__main__":
    main()
