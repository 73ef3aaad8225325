"""Connections with systemd's journal: what a service's standard output and error are (systemd-journald.service(8)).

The other end is journald's, which does not move. It has written down of each stream what that began with, so the same
can be said to the journal of the destination: who writes, for which unit, with which priority. What was written before
the freeze is in journald's own queue at the source, and is logged there.

Only the destination decides for which unit lines are logged (`UNIT`): the images come from another host.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import suppress

from phaul_engine.errors import ImageError, RebuildError
from phaul_engine.images.pb import sk_unix_pb2

from .base import Collection, Restoration

PEER = "/run/systemd/journal/stdout"
UNIT = "journal unit"
"""Option of a restoration: the unit for which the tree may log."""

_STREAMS = "/run/systemd/journal/streams"
_SCRATCH = "journal streams"
_LINE = re.compile(rb"[^\n\0]*")
_MAX = 4096  # bytes of a line


def collect(peer: int, usk: sk_unix_pb2.unix_sk_entry, collection: Collection) -> bool:
    """Note what a stream began with, whose other end is the socket with inode `peer`, outside of the tree. False if
    that is not the journal of this host."""
    if usk.type != socket.SOCK_STREAM:
        return False
    known: dict[int, sk_unix_pb2.phaul_journal_entry] = collection.memory.setdefault(_SCRATCH, {})
    if peer not in known:
        found = next(_notes(peer), None)
        if found is None:
            return False
        known[peer] = found
    usk.phaul_journal.CopyFrom(known[peer])
    return True


def connect(usk: sk_unix_pb2.unix_sk_entry, restoration: Restoration) -> socket.socket:
    """A stream that begins in the same way. journald believes root what it says of a unit, and takes from each line
    who has written it."""
    entry = usk.phaul_journal
    ours = bool(entry.unit) and os.fsdecode(entry.unit) == restoration.options.get(UNIT)
    header = _header(entry, ours=ours)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(PEER)
        sock.shutdown(socket.SHUT_RD)
        sock.sendall(header, socket.MSG_DONTWAIT)
    except OSError as error:
        sock.close()
        what = f"the journal of this host takes no output of a program: {PEER}: {error.strerror}"
        raise RebuildError(what, advice="start systemd-journald here, or redirect the program's output") from error
    return sock


def _header(entry: sk_unix_pb2.phaul_journal_entry, *, ours: bool) -> bytes:
    if not all(_LINE.fullmatch(text) and len(text) <= _MAX for text in (entry.identifier, entry.unit)):
        raise ImageError("a journal stream has an impossible identifier or unit")
    flags = (entry.to_syslog, entry.to_kmsg, entry.to_console)
    words = (
        entry.identifier,
        entry.unit if ours else b"",
        b"%d" % (entry.priority & 0x3FF),
        b"%d" % entry.level_prefix,
        *(b"%d" % (flag and ours) for flag in flags),
    )
    return b"".join(word + b"\n" for word in words)


def _notes(peer: int) -> Iterator[sk_unix_pb2.phaul_journal_entry]:
    """What journald has written down of the stream whose end it has."""
    with suppress(FileNotFoundError), os.scandir(_STREAMS) as files:
        for file in files:  # DEVICE:INODE
            if file.name.rpartition(":")[2] == str(peer) and stat.S_ISREG(file.stat(follow_symlinks=False).st_mode):
                with open(file.path, "rb") as opened:
                    yield _parse(opened.read())


def _parse(text: bytes) -> sk_unix_pb2.phaul_journal_entry:
    """An environment file (`IDENTIFIER=web`); values may be quoted, with backslashes."""
    values = dict(line.split(b"=", 1) for line in text.splitlines() if b"=" in line and line[:1] != b"#")
    return sk_unix_pb2.phaul_journal_entry(
        identifier=_unquoted(values.get(b"IDENTIFIER", b"")),
        unit=_unquoted(values.get(b"UNIT", b"")),
        priority=int(values.get(b"PRIORITY", b"6")),
        level_prefix=values.get(b"LEVEL_PREFIX") == b"1",
        to_syslog=values.get(b"FORWARD_TO_SYSLOG") == b"1",
        to_kmsg=values.get(b"FORWARD_TO_KMSG") == b"1",
        to_console=values.get(b"FORWARD_TO_CONSOLE") == b"1",
    )


def _unquoted(value: bytes) -> bytes:
    if len(value) > 1 and value[:1] == value[-1:] and value[:1] in (b'"', b"'"):
        value = value[1:-1]
    return re.sub(rb"\\(.)", rb"\1", value)
