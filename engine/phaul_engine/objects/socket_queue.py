"""What waits in the receive queue of a unix socket: read without taking it out, and sent again.

Peeking goes through the queue with SO_PEEK_OFF (socket(7)); the socket's own offset is put back. Descriptors on their
way (SCM_RIGHTS, unix(7)) come out as duplicates, and are registered like any other description of the tree.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import dataclass, field

from phaul_engine.errors import EngineError, RebuildError
from phaul_engine.images.pb import sk_packet_pb2

from .base import Collection, Descriptor, Restoration
from .socket_options import SO_BUF_LOCK, SO_PEEK_OFF, SO_SNDBUF, SOL_SOCKET, set_buffer

_SIOCINQ = 0x541B
_SCM_RIGHTS, _SCM_CREDENTIALS = 1, 2
_LARGEST = 1 << 20
_ANCILLARY = 4096  # 253 descriptors, credentials and what else there is


@dataclass
class Message:
    """A datagram, or a piece of a stream that one recvmsg(2) would give. `rights` are image ids."""

    content: bytes
    address: bytes = b""
    rights: list[int] = field(default_factory=list)
    credentials: tuple[int, int, int] | None = None  # pid, uid, gid


def peek(sock: socket.socket, descriptor: Descriptor, collection: Collection) -> list[Message]:
    """All messages in the queue. Pids in credentials become the tree's own numbers, 0 for strangers.

    A stream is read no further than it goes: behind its end an error may wait, which a read would take.
    """
    left = struct.unpack("i", fcntl.ioctl(sock, _SIOCINQ, bytes(4)))[0] if sock.type != socket.SOCK_DGRAM else 0
    before = sock.getsockopt(SOL_SOCKET, SO_PEEK_OFF)
    room = bytearray(_LARGEST)
    messages: list[Message] = []
    sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, 0)
    try:
        while left > 0 or sock.type == socket.SOCK_DGRAM:
            flags = socket.MSG_PEEK | socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            try:
                length, ancillary, got, address = sock.recvmsg_into([room], _ANCILLARY, flags)
            except BlockingIOError:
                break
            if got & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                raise EngineError(f"a message in the queue of {descriptor} is larger than {_LARGEST} bytes")
            if not length and not ancillary and sock.type != socket.SOCK_DGRAM:
                break  # the end of the stream
            left -= length
            message = Message(bytes(room[:length]), _bytes(address))
            messages.append(message)
            for level, kind, content in ancillary:
                if level == SOL_SOCKET:
                    _add_ancillary(message, kind, content, descriptor, collection)
    finally:
        sock.setsockopt(SOL_SOCKET, SO_PEEK_OFF, before)
    return messages


def _bytes(address: object) -> bytes:
    return address if isinstance(address, bytes) else os.fsencode(address) if isinstance(address, str) else b""


def _add_ancillary(message: Message, kind: int, content: bytes, descriptor: Descriptor, collection: Collection) -> None:
    if kind == _SCM_RIGHTS:
        for own in struct.unpack(f"{len(content) // 4}i", content[: len(content) // 4 * 4]):
            message.rights.append(
                collection.register(own, descriptor.owner, f"a descriptor in the queue of {descriptor}")
            )
    elif kind == _SCM_CREDENTIALS:
        pid, uid, gid = struct.unpack("iII", content)
        ids = collection.ids
        message.credentials = collection.inner_pids.get(pid, 0), ids.uid_inside(uid), ids.gid_inside(gid)
    elif kind == getattr(socket, "SCM_PIDFD", 4):
        os.close(struct.unpack("i", content)[0])  # the receiver gets a new one for the same sender


def put(collection: Collection, file_id: int, messages: list[Message]) -> None:
    """Into the image."""
    for message in messages:
        packet = sk_packet_pb2.sk_packet_entry(id_for=file_id, length=len(message.content))
        if message.rights:
            packet.scm.add(type=_SCM_RIGHTS, rights=message.rights)
        if message.credentials:
            pid, uid, gid = message.credentials
            packet.ucred.pid, packet.ucred.uid, packet.ucred.gid = pid, uid, gid
        if message.address:
            packet.phaul_address = message.address
        collection.checkpoint.put("sk-queues", None, packet, message.content)


def taken(restoration: Restoration) -> dict[int, list[Message]]:
    """All queues of the image, by the id of the socket whose they are."""
    queues: dict[int, list[Message]] = {}
    for record in restoration.checkpoint.records("sk-queues"):
        packet = record.message
        message = Message(record.payload, packet.phaul_address)
        for scm in packet.scm:
            if scm.type == _SCM_RIGHTS:
                message.rights.extend(scm.rights)
        if packet.HasField("ucred"):
            message.credentials = packet.ucred.pid, packet.ucred.uid, packet.ucred.gid
        queues.setdefault(packet.id_for, []).append(message)
    return queues


def send(
    sock: socket.socket, messages: list[Message], restoration: Restoration, what: str, address: bytes | None = None
) -> None:
    """Send messages through the other end, or to `address`, so that they stand in the queue as they did."""
    size = sock.getsockopt(SOL_SOCKET, SO_SNDBUF)
    total = sum(len(message.content) + 2048 for message in messages)
    lock = sock.getsockopt(SOL_SOCKET, SO_BUF_LOCK, 4)
    if total * 2 > size:
        set_buffer(sock, SO_SNDBUF, total * 4)
    for message in messages:
        ancillary: list[tuple[int, int, bytes]] = []
        if message.rights:
            fds = [restoration.description(file_id) for file_id in message.rights]
            ancillary.append((SOL_SOCKET, _SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds)))
        if message.credentials:
            inner, uid, gid = message.credentials
            pid = restoration.pid(inner) or os.getpid()
            ids = restoration.ids
            word = struct.pack("iII", pid, ids.uid_here(uid), ids.gid_here(gid))
            ancillary.append((SOL_SOCKET, _SCM_CREDENTIALS, word))
        try:
            sent = sock.sendmsg([message.content], ancillary, socket.MSG_DONTWAIT, *([address] if address else []))
        except OSError as error:
            raise RebuildError(f"cannot fill the queue of {what}: {error.strerror}") from error
        if sent != len(message.content):
            raise RebuildError(f"cannot fill the queue of {what}: there is no room for {len(message.content)} bytes")
    if total * 2 > size:
        set_buffer(sock, SO_SNDBUF, size)
        sock.setsockopt(SOL_SOCKET, SO_BUF_LOCK, lock)
