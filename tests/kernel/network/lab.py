"""Three network namespaces on one bridge: a source, a destination, a client; and a service address that moves."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from typing import TypeVar

from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.objects import places
from phaul_engine.objects.base import (
    Collection,
    Descriptor,
    DescriptorKind,
    Owner,
    Restoration,
    SkeletonTask,
    kind_of,
    kind_of_entry,
)
from phaul_engine.proc import access, fdinfo

Result = TypeVar("Result")

_REGISTERED = 10_000  # ids from here on are of descriptors that were on the way
SERVICE: dict[int, str] = {socket.AF_INET: "10.99.0.100", socket.AF_INET6: "fd99::100"}


def ip(*words: str, ns: str = "") -> str:
    """Run ip(8), in a namespace if one is given."""
    command = ["ip", *(["-n", ns] if ns else []), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Host:
    """A network namespace with one interface, e0."""

    def __init__(self, name: str, number: int) -> None:
        self.name, self.number = name, number
        ip("netns", "add", name)
        self.net = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        ip("link", "set", "lo", "up", ns=name)

    def inside(self, act: Callable[[], Result]) -> Result:
        """Run `act` in this namespace."""
        return places.in_network(self.net, act)

    def add(self, address: str, device: str = "e0") -> None:
        """Put an address on."""
        ip("addr", "add", address, "dev", device, *(["nodad"] if ":" in address else []), ns=self.name)

    def delete(self, address: str, device: str = "e0") -> None:
        """Take an address off."""
        ip("addr", "del", address, "dev", device, ns=self.name)

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        """A socket of this namespace."""
        return self.inside(lambda: socket.socket(family, kind, protocol))

    def remove(self) -> None:
        """Delete the namespace."""
        os.close(self.net)
        ip("netns", "del", self.name)


class Lab:
    """Source, destination and client, and the service address, which is at the source."""

    def __init__(self, tag: str) -> None:
        self.source, self.destination, self.client = (
            Host(f"{tag}-{role}", number) for number, role in ((1, "a"), (2, "b"), (9, "c"))
        )
        client = self.client
        ip("link", "add", "br0", "type", "bridge", ns=client.name)
        ip("link", "set", "br0", "up", ns=client.name)
        for host in (self.source, self.destination):
            port = f"p{host.number}"
            ip("link", "add", port, "type", "veth", "peer", "name", "e0", "netns", host.name, ns=client.name)
            ip("link", "set", port, "master", "br0", "up", ns=client.name)
            ip("link", "set", "e0", "up", ns=host.name)
        for host, device in ((self.source, "e0"), (self.destination, "e0"), (client, "br0")):
            host.add(f"10.99.0.{host.number}/24", device)
            host.add(f"fd99::{host.number}/64", device)
        self.source.add("10.99.0.100/24")
        self.source.add("fd99::100/64")

    def move_address(self, family: int) -> None:
        """Move the service address, as an operator's script would."""
        width = 24 if family == socket.AF_INET else 64
        self.source.delete(f"{SERVICE[family]}/{width}")
        self.destination.add(f"{SERVICE[family]}/{width}")
        ip("neigh", "flush", "dev", "br0", ns=self.client.name)

    def remove(self) -> None:
        """Delete all three."""
        for host in (self.source, self.destination, self.client):
            host.remove()


class Move:
    """The way of some sockets from the source to the destination, step by step, as a migration takes it."""

    def __init__(self, source: int, destination: int) -> None:
        self._destination = destination
        proc = access.open_process(os.getpid())
        self.owner = Owner(os.getpid(), 1, "subject", proc, os.open("/", os.O_PATH), os.dup(source))
        self.memory: dict[str, object] = {}
        self.restoration: Restoration | None = None
        self.checkpoint = Checkpoint()
        self.collection: Collection | None = None
        self.registered: list[int] = []

    def collect(self, sockets: list[socket.socket], survey: bool, **options: str) -> Collection:
        """One pass over the sockets at the source."""
        collection = Collection(Checkpoint(), survey=survey, options=dict(options), memory=self.memory)
        collection.inner_pids[os.getpid()] = 1
        kinds: list[DescriptorKind] = []

        def collect(descriptor: Descriptor, file_id: int) -> None:
            kind = kind_of(descriptor)
            assert kind is not None, descriptor.link
            collection.descriptors[file_id] = descriptor
            entry = kind.collect(descriptor, file_id, collection)
            collection.checkpoint.put("files", None, entry)
            if kind not in kinds:
                kinds.append(kind)

        def register(own: int, owner: Owner, where: str) -> int:
            collect(self.descriptor(own), file_id := _REGISTERED + own)
            self.registered.append(own)
            return file_id

        collection.register = register
        for file_id, sock in enumerate(sockets, 1):
            collect(self.descriptor(sock.fileno()), file_id)
        for kind in kinds:
            kind.finish(collection)
        if not survey:
            for kind in kinds:
                kind.seal(collection)
        self.checkpoint, self.collection = collection.checkpoint, collection
        return collection

    def descriptor(self, fd: int) -> Descriptor:
        """A descriptor of a process at the source."""
        link = os.readlink(f"/proc/self/fd/{fd}")
        return Descriptor(self.owner, fd, fd, link, fdinfo.read(self.owner.proc, fd), os.fstat(fd))

    def rebuild(self) -> Restoration:
        """Make everything of the last pass at the destination."""
        task = SkeletonTask(os.getpid(), 1, self.owner.proc, self.owner.root, self._destination)
        self.restoration = Restoration(self.checkpoint, tasks={1: task})
        for record in self.checkpoint.records("files"):
            self.restoration.description(record.message.id)
        return self.restoration

    def settle(self) -> None:
        """Give everything its final state, that of the last pass."""
        restoration = self.restoration
        assert restoration is not None
        early = {file_id: restoration.entry(file_id) for file_id in restoration.made}
        restoration.checkpoint = self.checkpoint
        restoration.renew()
        for record in self.checkpoint.records("files"):
            entry = record.message
            kind = kind_of_entry(entry)
            if entry.id in early and not kind.settles(early[entry.id], entry):
                restoration.discard(entry.id)
            fd = restoration.description(entry.id)
            kind.settle(entry, fd, restoration)

    def release(self) -> list[socket.socket]:
        """After the commit; the sockets as the program would go on with them."""
        restoration = self.restoration
        assert restoration is not None
        records = self.checkpoint.records("files")
        for kind in {id(kind): kind for kind in (kind_of_entry(r.message) for r in records)}.values():
            kind.release(restoration)
        made = [restoration.made[record.message.id] for record in records if record.message.id < _REGISTERED]
        return [socket.socket(fileno=fd) for fd in made]

    def close(self) -> None:
        """Give up what the move itself holds."""
        for fd in (*self.registered, self.owner.proc, self.owner.root, self.owner.net):
            os.close(fd)
