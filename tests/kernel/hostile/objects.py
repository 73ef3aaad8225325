"""Hostile kernel objects and sockets."""

from __future__ import annotations

import os
from typing import Any

from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import (
    fdinfo_pb2,
    tcp_stream_pb2,
)

from tests.kernel.hostile.breaking import (
    CANNOT_OPEN,
    HUGE32,
    HUGE64,
    OTHER_TYPE,
    UNKNOWN,
    Break,
    add_file,
    data,
    datagrams,
    epolls,
    file,
    inotify,
    listener,
    named,
    option,
    packet,
    pair,
    unix,
    wait_at_each_other,
    watch,
    watch_each_other,
)

OBJECTS: dict[str, tuple[str, Break]] = {
    "pipe that is over-full": ("cannot be made again here|holds less", lambda c: overfull(c)),
    "pipe of four gigabytes": ("has pipe .* of 4294967295 bytes", lambda c: setattr(pipe_data(c), "size", HUGE32)),
    "pipe of two gigabytes": ("cannot make a pipe", lambda c: setattr(pipe_data(c), "size", 1 << 31)),
    "packets that do not add up": ("do not add up", lambda c: pipe_data(c).phaul_packets.extend([1, 2])),
    "empty packet": ("empty packets", lambda c: pipe_data(c).phaul_packets.extend([11, 0])),
    "data of no pipe": ("which nobody has open", lambda c: setattr(pipe_data(c), "pipe_id", UNKNOWN)),
    "fifo that is a file": (OTHER_TYPE, lambda c: setattr(file(c, "fifo").fifo, "regf_id", data(c).id)),
    "fifo that is a device": (OTHER_TYPE, lambda c: (setattr(named(c, b"/fifo"), "name", b"/dev/null"),)),
    "fifo without a name": ("refers to file 4000000", lambda c: setattr(file(c, "fifo").fifo, "regf_id", UNKNOWN)),
    "counter beyond its limit": ("impossible counter", lambda c: setattr(file(c, "efd").efd, "counter", HUGE64)),
    "timer on no clock": ("unknown clock 77", lambda c: setattr(file(c, "tfd").tfd, "clockid", 77)),
    "timer that overflows": ("impossible time", lambda c: setattr(file(c, "tfd").tfd, "vsec", HUGE64)),
    "timer with a billion nanoseconds": ("impossible time", lambda c: setattr(file(c, "tfd").tfd, "insec", 10**9)),
    "epoll that watches nothing": ("no file 4000000", lambda c: watch(c, 60, UNKNOWN)),
    "epoll that watches itself": ("cannot be made again here", lambda c: watch(c, 60, epolls(c)[0].id)),
    "epolls that watch each other": ("cannot be made again here", watch_each_other),
    "epoll that watches a file": ("cannot be made again here", lambda c: watch(c, 60, data(c).id)),
    "epoll that watches descriptor two billion": (
        "watches descriptor 2000000000",
        lambda c: watch(c, 2_000_000_000, data(c).id),
    ),
    "epoll that watches twice": (
        "watches 60 twice",
        lambda c: (watch(c, 60, file(c, "efd").id), watch(c, 60, file(c, "efd").id)),
    ),
    "inotify watch 0": ("with watch number", lambda c: setattr(inotify(c).wd[0], "wd", 0)),
    "inotify watch two billion": (
        "with watch number 2000000000",
        lambda c: setattr(inotify(c).wd[0], "wd", 2_000_000_000),
    ),
    "inotify watch twice": ("impossible watch number", lambda c: inotify(c).wd.append(inotify(c).wd[0])),
    "inotify watches beyond patience": (
        "to be counted through",
        lambda c: [inotify_instance(c, number) for number in range(3)],
    ),
    "inotify watch without a path": ("tells no path", lambda c: inotify(c).wd[0].f_handle.ClearField("path")),
    "inotify watch of nothing": (CANNOT_OPEN, lambda c: setattr(inotify(c).wd[0].f_handle, "path", b"no/such/file")),
    "inotify watch through a link of /proc": (
        CANNOT_OPEN,
        lambda c: setattr(inotify(c).wd[0].f_handle, "path", b"proc/self/root/tmp"),
    ),
    "inotify watch of no event": ("cannot be made again here", lambda c: setattr(inotify(c).wd[0], "mask", 0)),
    "pid descriptor of a stranger": ("which is not there", lambda c: setattr(file(c, "pidfd").pidfd, "nspid", 1)),
    "pid descriptor of process -5": ("which is not there", lambda c: setattr(file(c, "pidfd").pidfd, "nspid", -5)),
    "terminal that is not there": (
        "not in tty-info.img",
        lambda c: add_file(c, fdinfo_pb2.TTY, "tty", tty_info_id=UNKNOWN),
    ),
}


def pipe_data(c: Checkpoint) -> Any:
    return c.records("pipes-data")[0].message


def overfull(c: Checkpoint) -> None:
    record = c.records("pipes-data")[0]
    record.payload = bytes(1 << 20)
    record.message.bytes, record.message.size = 1 << 20, 65536


def inotify_instance(c: Checkpoint, number: int) -> None:
    entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.INOTIFY, id=9100 + number)
    entry.ify.CopyFrom(inotify(c))
    entry.ify.id, entry.ify.wd[0].wd = 9100 + number, 1 << 19
    c.put("files", None, entry)


SOCKETS: dict[str, tuple[str, Break]] = {
    "unix socket of type 77": ("unix socket .* of type 77", lambda c: setattr(unix(c), "type", 77)),
    "unix socket in state 55": ("in state 55", lambda c: setattr(unix(c), "state", 55)),
    "unix socket with a long name": ("with the name", lambda c: setattr(unix(c), "name", b"/" + b"n" * 200)),
    "unix socket with a zero byte in its path": ("with the name", lambda c: setattr(unix(c), "name", b"/tmp/a\0b")),
    "unix socket at a long path": (
        "has a unix socket named",
        lambda c: setattr(unix(c), "phaul_path", b"/" + b"p/" * 3000),
    ),
    "unix socket where nothing can be": (
        "cannot bind",
        lambda c: setattr(unix(c), "phaul_path", b"/etc/passwd/socket"),
    ),
    "unix socket in place of a file": (
        "is no socket here",
        lambda c: setattr(unix(c), "phaul_path", os.path.dirname(data(c).name) + b"/victim"),
    ),
    "unix socket in place of a directory": ("is no socket here", lambda c: setattr(unix(c), "phaul_path", b"/etc")),
    "unix socket without a peer": ("is not in the checkpoint", lambda c: setattr(pair(c), "peer", UNKNOWN)),
    "unix sockets that wait at each other": ("needs another file that needs it", wait_at_each_other),
    "unix socket that waits at itself": (
        "needs another file that needs it",
        lambda c: (
            setattr(pair(c), "phaul_waits_at", pair(c).ino),
            setattr(unix(c, lambda usk: usk.peer == pair(c).ino), "phaul_waits_at", unix(c).ino),
        ),
    ),
    "unix socket that waits nowhere": ("waits at a listener", lambda c: setattr(pair(c), "phaul_waits_at", UNKNOWN)),
    "message with a descriptor that is not there": (
        "carries file 4000000",
        lambda c: packet(c).scm[0].rights.append(UNKNOWN),
    ),
    "message with 300 descriptors": (
        "a message with 300 descriptors",
        lambda c: packet(c).scm[0].rights.extend([file(c, "efd").id] * 299),
    ),
    "message from a long address": (
        "from an address of 500 bytes",
        lambda c: setattr(packet(c), "phaul_address", b"a" * 500),
    ),
    "message for nobody": ("which nobody has open", lambda c: setattr(packet(c), "id_for", UNKNOWN)),
    "option that replaces the packet filter": ("none that is carried", lambda c: option(c, 0, 64, bytes(100))),
    "option that attaches a BPF program": ("none that is carried", lambda c: option(c, 1, 50, bytes(4))),
    "option of repair mode": ("none that is carried", lambda c: option(c, 6, 19, b"\1\0\0\0")),
    "option with a long value": ("none that is carried", lambda c: option(c, 1, 7, bytes(5000))),
    "group to join with a short value": (
        "cannot be made again here",
        lambda c: datagrams(c).opts.phaul_options.add(level=0, name=42, value=b"lo"),
    ),
    "filter of a hundred thousand instructions": (
        "a filter of 100000 instructions",
        lambda c: datagrams(c).opts.so_filter.extend([6] * 100_000),
    ),
    "interface that is not here": ("cannot be set", lambda c: setattr(listener(c).opts, "so_bound_dev", "nowhere0")),
    "linger beyond all times": (
        "cannot be made again here|impossible",
        lambda c: setattr(listener(c).opts, "so_linger", HUGE32),
    ),
    "time-out beyond all times": (
        "cannot be made again here|impossible",
        lambda c: setattr(listener(c).opts, "so_rcv_tmo_sec", HUGE64),
    ),
    "socket of family 99": ("of family 99", lambda c: setattr(listener(c), "family", 99)),
    "socket of type 77": ("type 77", lambda c: setattr(listener(c), "type", 77)),
    "socket in state 99": ("in state 99", lambda c: setattr(listener(c), "state", 99)),
    "socket in state 6": ("no TCP stream|in state 6", lambda c: setattr(listener(c), "state", 6)),
    "socket with three words of address": ("addresses of 3", lambda c: listener(c).src_addr.extend([0, 0])),
    "socket at port 70000": ("ports 70000", lambda c: setattr(listener(c), "src_port", 70_000)),
    "socket with a backlog of -1": ("in state 10", lambda c: setattr(listener(c), "backlog", HUGE32)),
    "connection without a stream": ("tcp-stream-[0-9a-f]+.img: is missing", lambda c: setattr(listener(c), "state", 1)),
    "connection with a stream of nonsense": ("cannot rebuild the connection|cannot be made", lambda c: nonsense(c)),
    "datagrams of protocol 250": ("cannot be made again here", lambda c: setattr(datagrams(c), "proto", 250)),
}


def nonsense(c: Checkpoint) -> None:
    one = listener(c)
    one.state = 1
    stream = tcp_stream_pb2.tcp_stream_entry(
        inq_len=0, inq_seq=1, outq_len=0, outq_seq=1, opt_mask=HUGE32, snd_wscale=HUGE32, mss_clamp=0, rcv_wscale=99
    )
    c.put("tcp-stream", one.ino, stream)
