"""Unix sockets: pairs, listeners, connections and datagram sockets, with their queues.

Who is connected to whom is told by sock_diag. Both ends of a connection inside the tree are made together; an end that
is outside cannot be carried and is a blocker, except for datagram sockets, which are connected again to the same name
(/dev/log), and streams to the journal (journal_stream.py). A peer that is gone is made and closed again, so that what
it left behind can be read first.

Listeners listen early: their files are hidden until `release` publishes them (unix_names.py). An abstract name that is
free at the destination is taken early, since nothing else would reserve it.
"""

from __future__ import annotations

import fcntl
import functools
import os
import re
import select
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, cast

from phaul_engine.errors import RebuildError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import fdinfo_pb2, sk_opts_pb2, sk_unix_pb2
from phaul_engine.proc.sock_diag import DiagSocket, UnixSocket
from phaul_engine.program import Program

from . import (
    inet,
    journal_stream,
    mounted,
    pipe,
    socket_options,
    socket_queue,
    staged,
    unix_credentials,
    unix_names,
    unix_outsiders,
)
from .base import Collection, Descriptor, DescriptorKind, Owner, Restoration, SkeletonTask, descriptor_kind
from .description import settle_status, signal_owner, status_flags
from .tcp_stream import State

_SIOCOUTQ = 0x5411
_HOLDS = re.compile(r"^scm_fds:\s*[1-9]", re.MULTILINE)  # fdinfo: descriptors wait in its queue


@dataclass
class _Notes:
    """Of one pass over the source."""

    tables: dict[int, dict[int, UnixSocket]] = field(default_factory=dict)  # by network namespace
    found: dict[int, tuple[Descriptor, sk_unix_pb2.unix_sk_entry, UnixSocket]] = field(default_factory=dict)  # by inode


@dataclass
class _Index:
    """The unix sockets of a checkpoint."""

    checkpoint: Checkpoint
    by_inode: dict[int, sk_unix_pb2.unix_sk_entry]
    listeners: dict[bytes, sk_unix_pb2.unix_sk_entry]
    ids: set[int]


@dataclass
class _Made:
    """What there is at the destination."""

    spare: dict[int, socket.socket] = field(default_factory=dict)  # ends made with their peer, by inode
    dead_peers: dict[int, socket.socket] = field(default_factory=dict)  # to be closed, by their peer's image id
    staged: list[staged.Staged] = field(default_factory=list)
    options: dict[int, socket_options.Options] = field(default_factory=dict)
    settled: set[int] = field(default_factory=set)
    index: _Index | None = None
    queues_known: bool = False


@descriptor_kind
class Unix(DescriptorKind):
    """A unix socket."""

    name = "unix socket"
    types = (fdinfo_pb2.UNIXSK,)

    def claims(self, descriptor: Descriptor) -> bool:
        sort = inet.sort_of(descriptor)
        return sort is not None and sort[0] == socket.AF_UNIX

    def collect(self, descriptor: Descriptor, file_id: int, collection: Collection) -> fdinfo_pb2.file_entry:
        notes = _notes(collection)
        if collection.survey and _HOLDS.search(descriptor.info.raw):
            pipe.in_flight(collection)
        inode = descriptor.status.st_ino
        diag = _table(notes, descriptor).get(inode)
        entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.UNIXSK, id=file_id)
        usk = entry.usk
        usk.id, usk.ino, usk.type = file_id, inode, cast("inet.Sort", inet.sort_of(descriptor))[1]
        usk.state, usk.flags, usk.uflags, usk.backlog, usk.peer, usk.name = 0, status_flags(descriptor), 0, 0, 0, b""
        usk.fown.CopyFrom(signal_owner(descriptor, collection))
        with inet.borrowed(descriptor.own, (socket.AF_UNIX, usk.type, 0)) as sock:
            options = socket_options.read(sock)
            socket_options.encode(options, usk.opts)
            if options.unreadable_filter:
                collection.block(descriptor, "a socket with an eBPF filter", "the kernel does not give it back")
            if diag is None:
                collection.block(
                    descriptor, "a unix socket of another network namespace", "its process is not in that namespace"
                )
                return entry
            notes.found[inode] = (descriptor, usk, diag)
            usk.state, usk.name = diag.state, diag.name or b""
            if diag.shutdown:
                usk.shutdown = cast("sk_opts_pb2.sk_shutdown", diag.shutdown)
            if diag.state == State.LISTEN:
                usk.backlog = diag.send_queue
            unix_credentials.collect(sock, usk, collection)
            if usk.name and usk.name[0]:
                _place(sock, usk, descriptor.owner, collection)
            if usk.type == socket.SOCK_DGRAM and not diag.peer:
                _lost_peer(sock, usk)
            if diag.state == State.ESTABLISHED and _poll(sock) & select.POLLERR:
                usk.phaul_reset = True
            if not collection.survey and diag.state != State.LISTEN and (diag.receive_queue or _poll(sock)):
                socket_queue.put(collection, file_id, socket_queue.peek(sock, descriptor, collection))
        return entry

    def finish(self, collection: Collection) -> None:
        notes = _notes(collection)
        for descriptor, usk, diag in notes.found.values():
            if diag.state == State.ESTABLISHED and _lent(diag, _table(notes, descriptor)):
                usk.deleted = True
            if diag.state == State.LISTEN:
                self._waiting(descriptor, usk, diag, notes, collection)
            elif diag.peer and diag.peer in notes.found:
                usk.peer = diag.peer
            elif diag.peer and journal_stream.collect(diag.peer, usk, collection):
                continue
            elif diag.peer and not pipe.waits(collection):
                unix_outsiders.collect(descriptor, usk, diag.peer, collection)
            elif diag.state == State.ESTABLISHED and usk.type != socket.SOCK_DGRAM and not _waits_or_over(usk, notes):
                why = "it waits to be accepted by a program that does not move"
                collection.block(descriptor, "a connected unix socket", why)

    def _waiting(
        self,
        descriptor: Descriptor,
        usk: sk_unix_pb2.unix_sk_entry,
        diag: UnixSocket,
        notes: _Notes,
        collection: Collection,
    ) -> None:
        for inode in diag.waiting:
            if inode in notes.found:
                client, entry, _ = notes.found[inode]
                entry.phaul_waits_at = usk.ino
                unsent = _unread_by_peer(client)
                if unsent and not collection.survey:
                    why = f"it has sent {unsent} bytes and waits to be accepted"
                    collection.block(
                        client, "a connected unix socket", why, "try again when it is accepted", passing=True
                    )
            elif not collection.survey:
                why = "a program that does not move waits to be accepted"
                collection.block(
                    descriptor, f"a listening unix socket ({_spell(usk.name)})", why, "try again", passing=True
                )

    def settles(self, early: fdinfo_pb2.file_entry, final: fdinfo_pb2.file_entry) -> bool:
        return _relation(early.usk) == _relation(final.usk)

    def rebuild(self, entry: fdinfo_pb2.file_entry, restoration: Restoration) -> int:
        made = _made(restoration)
        usk = entry.usk
        sock = made.spare.pop(usk.ino, None)
        if sock is None:
            sock = self._make(usk, made, restoration)
        wanted = socket_options.decode(usk.opts)
        sort = (socket.AF_UNIX, usk.type, 0)
        try:
            socket_options.write(sock, wanted, present=inet.fresh_options(sock, sort, restoration))
        except BaseException:
            sock.close()
            raise
        made.options[entry.id] = wanted
        return sock.detach()

    def _make(self, usk: sk_unix_pb2.unix_sk_entry, made: _Made, restoration: Restoration) -> socket.socket:
        sort = (socket.AF_UNIX, usk.type, 0)
        if usk.state == State.LISTEN:
            sock = inet.make(sort, restoration)
            _bind(sock, usk, made, restoration)
            unix_credentials.acting(usk, restoration, lambda: sock.listen(usk.backlog))
            return sock
        if usk.phaul_waits_at:
            return _connect_to(usk, usk.phaul_waits_at, restoration)
        if usk.HasField("phaul_journal"):
            return journal_stream.connect(usk, restoration)
        peer = _entry_by_inode(usk.peer, restoration) if usk.peer else None
        nameless = usk.phaul_peer_gone and not usk.phaul_peer_name  # of a pair, then
        if usk.type == socket.SOCK_DGRAM and not nameless and not _paired(usk, peer):
            sock = inet.make(sort, restoration)
            _bind(sock, usk, made, restoration)
            if usk.phaul_peer_name and not usk.phaul_peer_gone:
                _find_by_name(usk, restoration)
            return sock
        if usk.state != State.ESTABLISHED and peer is None and not nameless:
            sock = inet.make(sort, restoration)
            _bind(sock, usk, made, restoration)
            return sock
        return _make_pair(usk, peer, made, restoration)

    def attach(
        self, entry: fdinfo_pb2.file_entry, fd: int, task: SkeletonTask, program: Program, restoration: Restoration
    ) -> None:
        if entry.usk.state == State.LISTEN:
            unix_credentials.listen_again(entry.usk, fd, task.inner_pid, program, restoration)

    def settle(self, entry: fdinfo_pb2.file_entry, fd: int, restoration: Restoration) -> None:
        made = _made(restoration)
        usk = entry.usk
        if not made.queues_known:  # what is only in a queue stands in no table, and is made now
            made.queues_known = True
            for messages in socket_queue.taken(restoration).values():
                for message in messages:
                    for file_id in message.rights:
                        restoration.description(file_id)
        settle_status(fd, usk.flags, usk.fown, restoration)
        wanted = socket_options.decode(usk.opts)
        if wanted is not made.options[entry.id]:
            with inet.borrowed(fd, (socket.AF_UNIX, usk.type, 0)) as sock:
                if usk.state == State.LISTEN:
                    sock.listen(usk.backlog)
                socket_options.write(sock, wanted, present=made.options[entry.id])
            made.options[entry.id] = wanted
        made.settled.add(entry.id)
        index = _index(restoration)
        if made.settled >= index.ids:  # queues need both ends, and neither shut down
            self._settle_all(list(index.by_inode.values()), made, restoration)

    def _settle_all(self, entries: list[sk_unix_pb2.unix_sk_entry], made: _Made, restoration: Restoration) -> None:
        queues = socket_queue.taken(restoration)
        by_inode = {usk.ino: usk for usk in entries}
        for usk in entries:
            if messages := queues.get(usk.id):
                _fill(usk, by_inode.get(usk.peer), messages, made, restoration)
        for usk in entries:  # a datagram socket that is connected takes nothing from others
            if usk.type == socket.SOCK_DGRAM:
                _connect_datagrams(usk, by_inode.get(usk.peer), restoration)
        for usk in entries:
            fd = restoration.made[usk.id]
            dead = made.dead_peers.pop(usk.id, None)
            with inet.borrowed(fd, (socket.AF_UNIX, usk.type, 0)) as sock:
                if dead is not None:
                    if usk.phaul_reset:
                        sock.send(b"\0", socket.MSG_DONTWAIT)  # never read by the peer: so it resets
                    dead.close()
                if usk.shutdown and (dead is None or usk.type == socket.SOCK_DGRAM):
                    sock.shutdown(usk.shutdown - 1)
                socket_options.write(sock, made.options[usk.id])

    def release(self, restoration: Restoration) -> None:
        made = _made(restoration)

        def publish(maker: tuple[int, int] | None) -> None:
            for one in [one for one in made.staged if one.maker == maker]:
                one.publish()

        for maker in {one.maker for one in made.staged}:  # all at once: it may take a thread
            restoration.filing(functools.partial(publish, maker), maker)
        made.staged.clear()
        unix_names.close_hidden(restoration)

    def discard(self, restoration: Restoration) -> None:
        """The tree will not run here: remove what was made beside its final place."""
        made = _made(restoration)
        while made.staged:
            one = made.staged.pop()
            restoration.filing(one.discard, one.maker)
        unix_names.close_hidden(restoration)


def _notes(collection: Collection) -> _Notes:
    return cast("_Notes", collection.scratch.setdefault("unix", _Notes()))


def _made(restoration: Restoration) -> _Made:
    return cast("_Made", restoration.scratch.setdefault("unix", _Made()))


def staged_entries(restoration: Restoration) -> list[dict[str, Any]]:
    """What the destination's journal must hold so that files of a discarded tree can be removed (staged.undo)."""
    return [one.entry() for one in _made(restoration).staged]


def _table(notes: _Notes, descriptor: Descriptor) -> dict[int, UnixSocket]:
    net = os.fstat(descriptor.owner.net).st_ino
    if net not in notes.tables:
        with DiagSocket(descriptor.owner.net) as diag:
            notes.tables[net] = diag.unix()
    return notes.tables[net]


def _poll(sock: socket.socket) -> int:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    found = poll.poll(0)
    return found[0][1] if found else 0


def _place(sock: socket.socket, usk: sk_unix_pb2.unix_sk_entry, owner: Owner, collection: Collection) -> None:
    """Where the file of a bound name is, and whose."""
    try:
        fd = fcntl.ioctl(sock, unix_names.SIOCUNIXFILE)
    except OSError:  # it has a name, and no file
        usk.deleted = True
        return
    try:
        status = os.fstat(fd)
        path = os.fsencode(os.readlink(f"/proc/self/fd/{fd}"))
        usk.mnt_id = mounted.number_at(fd, owner, collection)
    finally:
        os.close(fd)
    usk.deleted = not status.st_nlink
    path = path.removesuffix(b" (deleted)") if usk.deleted else path
    usk.phaul_path = path
    usk.file_perms.mode = status.st_mode
    ids = collection.ids
    usk.file_perms.uid, usk.file_perms.gid = ids.uid_inside(status.st_uid), ids.gid_inside(status.st_gid)
    name = _plain(usk)
    if name[:1] != b"/":
        usk.name_dir = path.removesuffix(b"/" + name) if path.endswith(b"/" + name) else os.path.dirname(path)


def _lost_peer(sock: socket.socket, usk: sk_unix_pb2.unix_sk_entry) -> None:
    """A datagram socket learns only when it sends that its peer is closed; until then it tells the peer's name."""
    with suppress(OSError):  # ENOTCONN: it has no peer
        name = sock.getpeername()
        usk.phaul_peer_name = name if isinstance(name, bytes) else os.fsencode(name)
        usk.phaul_peer_gone = True


def _lent(diag: UnixSocket, table: dict[int, UnixSocket]) -> bool:
    """Whether the file of a connection is that of the listener that accepted it."""
    if diag.vfs is None:
        return False
    return any(one.vfs == diag.vfs for one in table.values() if one.state == State.LISTEN)


def _unread_by_peer(descriptor: Descriptor) -> int:
    return int(struct.unpack("i", fcntl.ioctl(descriptor.own, _SIOCOUTQ, b"\0\0\0\0"))[0])


def _waits_or_over(usk: sk_unix_pb2.unix_sk_entry, notes: _Notes) -> bool:
    """Whether a connection without a visible peer waits at a listener of the tree, or its peer is gone."""
    return usk.shutdown == sk_opts_pb2.BOTH or any(usk.ino in diag.waiting for _, _, diag in notes.found.values())


def _plain(usk: sk_unix_pb2.unix_sk_entry) -> bytes:
    """The name as bind(2) takes it; sock_diag, and so the image, ends a path with a zero byte."""
    return bytes(usk.name) if usk.name[:1] == b"\0" else bytes(usk.name).rstrip(b"\0")


def _spell(name: bytes) -> str:
    return "@" + name[1:].decode(errors="replace") if name[:1] == b"\0" else os.fsdecode(name.rstrip(b"\0"))


def _relation(usk: sk_unix_pb2.unix_sk_entry) -> tuple[object, ...]:
    """What cannot be changed in a socket that is made."""
    return (
        *(usk.type, usk.state, usk.peer, usk.name, usk.deleted, usk.phaul_path),
        *(usk.phaul_peer_name, usk.phaul_peer_gone, usk.phaul_waits_at, usk.phaul_reset),
        usk.HasField("phaul_journal") and usk.phaul_journal.SerializeToString(deterministic=True),
        not usk.peer and usk.shutdown,
    )


def _index(restoration: Restoration) -> _Index:
    made = _made(restoration)
    if made.index is None or made.index.checkpoint is not restoration.checkpoint:
        found = [r.message.usk for r in restoration.checkpoint.records("files") if r.message.HasField("usk")]
        made.index = _Index(
            restoration.checkpoint,
            {usk.ino: usk for usk in found},
            {bytes(usk.name): usk for usk in found if usk.state == State.LISTEN},
            {usk.id for usk in found},
        )
    return made.index


def _entry_by_inode(inode: int, restoration: Restoration) -> sk_unix_pb2.unix_sk_entry | None:
    return _index(restoration).by_inode.get(inode)


def _paired(usk: sk_unix_pb2.unix_sk_entry, peer: sk_unix_pb2.unix_sk_entry | None) -> bool:
    """Whether two sockets are connected to each other. A datagram socket can be connected to itself."""
    return peer is not None and peer.peer == usk.ino != peer.ino


def _path(usk: sk_unix_pb2.unix_sk_entry) -> bytes:
    return bytes(usk.phaul_path or os.path.join(usk.name_dir, _plain(usk)))


def _bind(sock: socket.socket, usk: sk_unix_pb2.unix_sk_entry, made: _Made, restoration: Restoration) -> None:
    """Give a socket its name, if it has one."""
    if not usk.name:
        return
    if usk.name[:1] == b"\0":
        try:
            sock.bind(usk.name)
        except OSError as error:
            raise RebuildError(
                f"cannot bind a unix socket to {_spell(usk.name)} here: {error.strerror}",
                advice="stop the program on this host that has the name (ss -lxp)",
            ) from error
        return
    permissions = None
    if usk.HasField("file_perms"):
        permissions = unix_names.Permissions(usk.file_perms.mode, usk.file_perms.uid, usk.file_perms.gid)
    if usk.deleted:
        unix_names.bind_hidden(sock, _plain(usk), restoration)
        return
    place = unix_names.Place(_path(usk), usk.mnt_id)
    unix_names.check_free(place, restoration)
    made.staged.append(unix_names.bind(sock, _plain(usk), place, permissions, restoration))


def _make_pair(
    usk: sk_unix_pb2.unix_sk_entry, peer: sk_unix_pb2.unix_sk_entry | None, made: _Made, restoration: Restoration
) -> socket.socket:
    """Both ends of a connection; the other one waits until it is asked for, or is one of the dead."""
    accepted = next((one for one in (usk, peer) if one is not None and one.name[:1] == b"\0"), None)
    listener = _listener_named(accepted.name, restoration) if accepted is not None else None
    if accepted is not None and listener is not None:
        client, server = _accept_from(listener, accepted, restoration)
        here, there = (server, client) if accepted is usk else (client, server)
    else:
        asked = next((one for one in (usk, peer) if one is not None and one.name), usk)  # a server, where there is one
        here, there = unix_credentials.pair(asked, restoration)
    for one, sock in ((usk, here), (peer, there)):
        if one is not None and one.name and not (one is accepted and listener is not None):
            _bind_connected(sock, one, made, restoration)
    if peer is None:
        made.dead_peers[usk.id] = there
    else:
        made.spare[peer.ino] = there
    return here


def _bind_connected(sock: socket.socket, usk: sk_unix_pb2.unix_sk_entry, made: _Made, restoration: Restoration) -> None:
    """A connection's own name. Those that a listener accepted bear its name; the file stays the listener's."""
    shared = _listener_named(usk.name, restoration) is not None
    if shared and usk.name[:1] != b"\0":
        alias = sk_unix_pb2.unix_sk_entry()
        alias.CopyFrom(usk)
        alias.deleted = True
        usk = alias
    _bind(sock, usk, made, restoration)


def _listener_named(name: bytes, restoration: Restoration) -> sk_unix_pb2.unix_sk_entry | None:
    return _index(restoration).listeners.get(bytes(name))


def _connect_to(usk: sk_unix_pb2.unix_sk_entry, inode: int, restoration: Restoration) -> socket.socket:
    """A connection that waits at a listener of the tree."""
    listener = _entry_by_inode(inode, restoration)
    if listener is None:
        raise RebuildError(f"the image has no listener for the unix socket {usk.ino}")
    sock = inet.make((socket.AF_UNIX, usk.type, 0), restoration)
    with _address(listener, restoration) as address:
        sock.connect(address)
    return sock


def _accept_from(
    listener: sk_unix_pb2.unix_sk_entry, accepted: sk_unix_pb2.unix_sk_entry, restoration: Restoration
) -> tuple[socket.socket, socket.socket]:
    sort = (socket.AF_UNIX, accepted.type, 0)
    client = inet.make(sort, restoration)
    with _address(listener, restoration) as address:
        unix_credentials.acting(accepted, restoration, lambda: client.connect(address))
    with inet.borrowed(restoration.description(listener.id), sort) as sock:
        server, _ = sock.accept()
    return client, server


@contextmanager
def _address(usk: sk_unix_pb2.unix_sk_entry, restoration: Restoration) -> Iterator[bytes]:
    """An address by which a bound socket of ours can be reached, though its file is hidden still."""
    own = restoration.description(usk.id)
    if usk.name[:1] == b"\0":
        yield bytes(usk.name)
        return
    if not usk.name:
        raise RebuildError(f"the unix socket {usk.ino} has no name by which it can be reached")
    with inet.borrowed(own, (socket.AF_UNIX, usk.type, 0)) as sock, unix_names.address_of(sock) as address:
        yield address


def _find_by_name(usk: sk_unix_pb2.unix_sk_entry, restoration: Restoration) -> None:
    """Make sure that there is somebody with the name of a peer that does not move."""
    with inet.make((socket.AF_UNIX, usk.type, 0), restoration) as sock:
        _connect_by_name(sock, usk, restoration)


def _connect_by_name(sock: socket.socket, usk: sk_unix_pb2.unix_sk_entry, restoration: Restoration) -> None:
    name = bytes(usk.phaul_peer_name)
    try:
        unix_names.inside(restoration, lambda: sock.connect(name))
    except OSError as error:
        raise RebuildError(
            f"nobody takes datagrams at {_spell(name)} here: {error.strerror}",
            advice="start the program that does (a log daemon), or close the socket",
        ) from error


def _connect_to_dead(sock: socket.socket, usk: sk_unix_pb2.unix_sk_entry, restoration: Restoration) -> None:
    name = bytes(usk.phaul_peer_name)
    with inet.make((socket.AF_UNIX, usk.type, 0), restoration) as gone:
        if name[:1] == b"\0":
            gone.bind(name)
            sock.connect(name)
        else:
            unix_names.bind_hidden(gone, name, restoration)
            with unix_names.address_of(gone) as address:
                sock.connect(address)


def _connect_datagrams(
    usk: sk_unix_pb2.unix_sk_entry, peer: sk_unix_pb2.unix_sk_entry | None, restoration: Restoration
) -> None:
    """Connect a datagram socket that is no end of a pair."""
    sort = (socket.AF_UNIX, usk.type, 0)
    with inet.borrowed(restoration.made[usk.id], sort) as sock:
        if peer is not None and not _paired(usk, peer):
            with _address(peer, restoration) as address:
                sock.connect(address)
        elif usk.phaul_peer_gone and usk.phaul_peer_name:
            _connect_to_dead(sock, usk, restoration)
        elif usk.phaul_peer_name:
            _connect_by_name(sock, usk, restoration)


def _fill(
    usk: sk_unix_pb2.unix_sk_entry,
    peer: sk_unix_pb2.unix_sk_entry | None,
    messages: list[socket_queue.Message],
    made: _Made,
    restoration: Restoration,
) -> None:
    what = f"the unix socket {_spell(usk.name) or usk.ino}"
    sort = (socket.AF_UNIX, usk.type, 0)
    if usk.id in made.dead_peers:
        socket_queue.send(made.dead_peers[usk.id], messages, restoration, what)
        return
    if peer is not None and _paired(usk, peer):
        with inet.borrowed(restoration.made[peer.id], sort) as sender:
            socket_queue.send(sender, messages, restoration, what)
        return
    for message in messages:
        _send_datagram(usk, message, restoration, what)


def _send_datagram(
    usk: sk_unix_pb2.unix_sk_entry, message: socket_queue.Message, restoration: Restoration, what: str
) -> None:
    """A datagram from whoever sent it: a socket of the tree, or one that bears the sender's name for a moment."""
    sender = inet.make((socket.AF_UNIX, usk.type, 0), restoration)
    try:
        if message.address[:1] == b"\0":
            try:
                sender.bind(message.address)
            except OSError:  # its owner is here, moved with us
                sender.close()
                sender = _borrow_named(message.address, restoration)
        elif message.address:
            unix_names.bind_hidden(sender, message.address, restoration)
        with _address(usk, restoration) as address:
            socket_queue.send(sender, [message], restoration, what, address)
    finally:
        sender.close()


def _borrow_named(name: bytes, restoration: Restoration) -> socket.socket:
    for usk in _index(restoration).by_inode.values():
        if usk.name == name and not usk.peer:
            return socket.socket(socket.AF_UNIX, usk.type, 0, fileno=os.dup(restoration.made[usk.id]))
    raise RebuildError(f"a datagram's sender {_spell(name)} cannot be made here: the name is taken")
