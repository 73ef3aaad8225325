"""Network namespaces as a kind of namespace.

At the destination everything is made early, while the source runs, and speaks to nobody: outer ends of veth pairs are
plugged into nothing until the tree goes on.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

from phaul_engine import catching
from phaul_engine.errors import RebuildError
from phaul_engine.namespaces.base import NamespaceKind, NamespaceView, NewNamespace, namespace_kind
from phaul_engine.objects.base import Collection, Restoration

from . import device, plug
from .device import Making, nsid_of
from .netlink import Namespace
from .reader import Reader
from .state import Builder, State, from_images, to_images

_SELF = "/proc/self/ns/net"
_READERS, _BUILDERS, _SEEN = "network namespace readers", "network namespaces", "network namespaces seen"


@dataclass
class _Built:
    """A namespace at the destination, and the images it was made by."""

    builder: Builder
    state: State
    pid: int  # of a task that is in it
    stack: ExitStack = field(default_factory=ExitStack)
    plugs: list[plug.Plug] = field(default_factory=list)

    def plan(self) -> None:
        """Lay out what is done in the end."""
        self.unplan()
        self.plugs = plug.prepare(self.builder.making, self.state)

    def unplan(self) -> None:
        """The opposite."""
        while self.plugs:
            self.plugs.pop().close()


@namespace_kind
class Net(NamespaceKind):
    """Devices and all that is set about them."""

    name: ClassVar = "net"
    flag: ClassVar = 0x40000000

    def collect(self, view: NamespaceView, collection: Collection) -> None:
        readers: dict[int, Reader] = collection.memory.setdefault(_READERS, {})
        if view.number not in readers:
            home = os.open(_SELF, os.O_RDONLY | os.O_CLOEXEC)
            readers[view.number] = Reader(os.dup(view.owner.net), home, view.number)
        reader = readers[view.number]
        state = reader.read(collection)
        seen: dict[int, tuple[Reader, State]] = collection.scratch.setdefault(_SEEN, {})
        for number, (other, its) in seen.items():
            _pair(reader, state, number, other)
            _pair(other, its, view.number, reader)
        seen[view.number] = reader, state
        to_images(state, view.number, collection.checkpoint)  # its entries of devices may still be changed

    def rebuild(self, place: NewNamespace, restoration: Restoration) -> None:
        built: dict[int, _Built] = restoration.scratch.setdefault(_BUILDERS, {})
        state = from_images(restoration.checkpoint, place.number)
        stack = ExitStack()
        home = Namespace(os.open(_SELF, os.O_RDONLY | os.O_CLOEXEC))
        stack.callback(os.close, home.net)
        stack.callback(home.close)
        namespace = Namespace(place.descriptor)
        stack.callback(namespace.close)
        others = {number: one.builder.making.namespace for number, one in built.items()}
        making = Making(namespace, home, place.number, device.externals(restoration.options), others)
        making.ports.update(restoration.options.get(catching.PORTS, {}))
        builder = Builder(making)
        stack.callback(builder.close)
        one = built[place.number] = _Built(builder, state, place.task.pid, stack)
        stack.callback(one.unplan)
        builder.build(state)
        one.plan()
        for number, other in built.items():
            if number != place.number:
                other.builder.making.others[place.number] = namespace
                if other.builder.pending:
                    other.builder.build(other.state)

    def settle(self, place: NewNamespace, restoration: Restoration) -> None:
        one: _Built = restoration.scratch[_BUILDERS][place.number]
        before, one.state = one.state, from_images(restoration.checkpoint, place.number)
        one.builder.build(one.state)
        if before.addresses != one.state.addresses or before.devices != one.state.devices:
            one.plan()
        if one.builder.pending:
            names = ", ".join(os.fsdecode(entry.name) for entry in one.builder.pending)
            raise RebuildError(f"the other ends of {names} are in a network namespace that is not there")

    def release(self, place: NewNamespace, restoration: Restoration) -> None:
        one: _Built = restoration.scratch[_BUILDERS].pop(place.number)
        restoration.later.push(one.stack)  # the kernel takes 5 ms to close a socket that hears packets
        for pair in one.plugs:
            pair.do(one.builder.making.home)

    def discard(self, place: NewNamespace, restoration: Restoration) -> None:
        one: _Built | None = restoration.scratch.get(_BUILDERS, {}).pop(place.number, None)
        if one is not None:
            one.stack.close()


def plug_entries(restoration: Restoration) -> list[dict[str, Any]]:
    """What the journal must hold of what is done when the tree goes on: nobody else knows it."""
    built: dict[int, _Built] = restoration.scratch.get(_BUILDERS, {})
    return [pair.entry(f"/proc/{one.pid}/ns/net") for one in built.values() for pair in one.plugs]


def heard_at(restoration: Restoration) -> tuple[str, str] | None:
    """A device of the tree at which packets come in from outside, and a path of its namespace; None if it has none."""
    built: dict[int, _Built] = restoration.scratch.get(_BUILDERS, {})
    found = ((pair.inner, f"/proc/{one.pid}/ns/net") for one in built.values() for pair in one.plugs if pair.announcer)
    return next(found, None)


def number_of(collection: Collection, net: int) -> int | None:
    """What a network namespace (a descriptor) is called in the images; None if it is none of the tree's."""
    readers: dict[int, Reader] = collection.memory.get(_READERS, {})
    wanted = os.fstat(net).st_ino
    return next((number for number, one in readers.items() if os.fstat(one.namespace.net).st_ino == wanted), None)


def made(restoration: Restoration, number: int) -> Namespace | None:
    """The namespace of that number, if it has been made."""
    one: _Built | None = restoration.scratch.get(_BUILDERS, {}).get(number)
    return one.builder.making.namespace if one is not None else None


def close(memory: dict[str, Any]) -> None:
    """Close what was kept open between passes, with the memory of them. Until then the namespaces live."""
    for reader in memory.pop(_READERS, {}).values():
        reader.close()


def _pair(reader: Reader, state: State, number: int, other: Reader) -> None:
    """Note which of a namespace's devices have their other end in another one of the tree."""
    nsid = nsid_of(reader.namespace, other.namespace.net)
    if nsid is None:
        return
    for entry in state.devices:
        if state.outside.get(entry.ifindex) == nsid:
            entry.peer_nsid = number
            for name in ("outer_name", "outer_bridge", "outer_mtu"):
                entry.ClearField(name)
