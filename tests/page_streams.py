"""Pairs of authenticated channels inside one process, over socket pairs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

from phaul_engine.memory.sink import PageSink
from phaul_engine.memory.source import Codec, PageSource
from phaul_engine.memory.stream import Channel, Role, StreamHello
from phaul_engine.native import check, lib, new_error
from phaul_engine.syscalls import NR

from phaul.transport.pages import Identity, make_identity

MIGRATION = bytes(range(32))
TIMEOUT = 100.0
_USER_MODE_ONLY = 1  # of userfaultfd(2)
_libc = ctypes.CDLL(None, use_errno=True)


@functools.cache
def identities() -> tuple[Identity, Identity]:
    """The source's and the destination's, made once a run."""
    return make_identity(), make_identity()


def channel_pair(hello: StreamHello) -> tuple[Channel, Channel]:
    """A connector and the listener that admitted it."""
    ours, theirs = identities()
    near, far = socket.socketpair()
    with ThreadPoolExecutor(1) as pool:
        client = ours.context(server=False, pin=theirs.fingerprint)
        server = theirs.context(server=True, pin=ours.fingerprint)
        connecting = pool.submit(Channel.connect, client, near.detach(), hello, TIMEOUT)
        accepted, said = Channel.accept(server, far.detach(), TIMEOUT)
        assert said == hello
        accepted.admit(True, TIMEOUT)
        return connecting.result(), accepted


def control_pair() -> tuple[Channel, Channel]:
    """Two ends that exchange messages."""
    return channel_pair(StreamHello(MIGRATION, Role.CONTROL))


def page_pair(
    streams: int, codec: Codec = Codec.RAW, *, checksum: bool = True, level: int = 1
) -> tuple[PageSource, PageSink]:
    """A source and a sink, connected by that many streams."""
    pairs = [channel_pair(StreamHello(MIGRATION, Role.PAGES, number, streams)) for number in range(streams)]
    with contextlib.ExitStack() as stack:
        source = PageSource([near for near, _ in pairs], codec=codec, checksum=checksum, level=level)
        stack.callback(source.close)
        sink = PageSink([far for _, far in pairs])
        stack.pop_all()
    return source, sink


def run_round(source: PageSource, sink: PageSink, number: int, timeout: float = TIMEOUT) -> None:
    """End a round, let it be applied, and wait for both sides."""
    sink.allow(number)
    source.end(number)
    source.wait(number, timeout)
    sink.wait(number, timeout)


def userfaultfd() -> int:
    """A userfaultfd of this process, ready to have areas registered."""
    uffd = int(_libc.syscall(NR.userfaultfd, os.O_CLOEXEC | _USER_MODE_ONLY))
    if uffd < 0:
        raise OSError(ctypes.get_errno(), "make a userfaultfd")
    err = new_error()
    check(lib.ph_uffd_enable(uffd, err), err)
    return uffd


def descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


def threads() -> int:
    """How many threads this process has, native ones too."""
    return len(os.listdir("/proc/self/task")) - threading.active_count()
