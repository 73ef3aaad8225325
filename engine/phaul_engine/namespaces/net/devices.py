"""The devices of a network namespace: what all kinds have in common.

They are made in the order in which they stand on each other, down and without IPv6 addresses of the kernel's making,
so that nothing is said by them before they have the addresses that they had. `apply` changes what is there into what
is wanted, whether nothing is there yet or only the last difference is missing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from phaul_engine.errors import EngineError, RebuildError
from phaul_engine.images.pb import netdev_pb2

from . import bridge, link, plain, stacked, tun, veth
from .device import Making, Source, kind_of, kind_of_entry
from .link import Link
from .netlink import CREATE, EXCL, NESTED, attribute, attribute_list, attributes

__all__ = ["plain", "stacked", "tun", "veth"]

Entry = netdev_pb2.net_device_entry
_MADE_WITH = (link.TX_QUEUES, link.RX_QUEUES)  # cannot be changed later
_BRIDGED = "bridge"


def collect(source: Source) -> list[Entry]:
    """An entry for each device."""
    return [_describe(one, source) for one in source.links.values()]


def _describe(found: Link, source: Source) -> Entry:
    kind = kind_of(found)
    entry = Entry(
        type=kind.type if kind is not None else netdev_pb2.NAMED,
        ifindex=found.index,
        mtu=found.mtu,
        flags=found.flags,
        name=os.fsencode(found.name),
        peer_ifindex=found.lower or found.index,
        peer_nsid=source.number,
        attributes=found.carried,
        other_names=found.other_names,
    )
    if any(found.address):
        entry.address = found.address
    if found.master:
        entry.master = found.master
    if found.port_kind == _BRIDGED:
        entry.port = bridge.port_data(found)
    if kind is None:
        source.block(
            found.name,
            f"a device of kind {found.kind}",
            "this kind is not supported",
            "remove it (ip link del), and make it again there",
        )
        entry.kind = found.kind.encode()
        return entry
    if kind.type == netdev_pb2.NAMED:
        entry.kind = kind.kind.encode()
    entry.data = kind.data(found)
    kind.collect(found, entry, source)
    _judge(found, source)
    return entry


def _judge(found: Link, source: Source) -> None:
    if found.programmed:
        source.block(
            found.name,
            "a device with an XDP program",
            "the kernel does not give such a program back",
            "detach it (ip link set dev NAME xdp off)",
        )
    if found.port_kind not in ("", _BRIDGED, "vrf"):
        source.block(
            found.name,
            f"a port of a {found.port_kind}",
            "such devices are not supported",
            "take it out (ip link set dev NAME nomaster)",
        )


def apply(entries: Iterable[Entry], making: Making) -> list[Entry]:
    """Have these devices and no others, but down where they are new; `raise_up` comes later. Returned are those that
    cannot be made yet, since their other end's namespace is not there."""
    wanted = {entry.ifindex: entry for entry in entries}
    there = link.read_links(making.namespace)
    for index, found in there.items():
        if index not in wanted and not _of_kernel(found):
            link.delete(making.namespace, index)
    there = {index: found for index, found in there.items() if index in wanted}
    for index, found in list(there.items()):
        if _is_other(found, wanted[index], making):
            link.delete(making.namespace, index)
            del there[index]
    pending, made = [], []
    for entry in _in_order(wanted):
        if entry.ifindex in there:
            continue
        if kind_of_entry(entry).create(entry, making):
            made.append(entry)
        else:
            pending.append(entry)
    there = link.read_links(making.namespace)
    for entry in wanted.values():
        if entry.ifindex in there:
            _adjust(entry, there[entry.ifindex], making)
    for entry in made:
        kind_of_entry(entry).complete(entry, making)
    return pending


def _of_kernel(found: Link) -> bool:
    """Whether a device comes with every namespace: lo, and the first of each kind of tunnel."""
    return not found.kind or (found.name.endswith("0") and isinstance(kind_of(found), plain.Tunnel))


def _is_other(found: Link, entry: Entry, making: Making) -> bool:
    """Whether what has the index of a wanted device is something else, or cannot be changed into it."""
    kind = kind_of(found)
    if kind is None or kind is not kind_of_entry(entry):
        return True
    return bool(entry.data) and not found.flags & link.LOOPBACK and kind.data(found) != kind.restored_data(entry)


def _in_order(wanted: dict[int, Entry]) -> Iterator[Entry]:
    """Each after what it stands on; masters anywhere."""
    done: set[int] = set()

    def visit(entry: Entry, above: tuple[int, ...]) -> Iterator[Entry]:
        if entry.ifindex in done:
            return
        if entry.ifindex in above:
            raise RebuildError(f"network device {os.fsdecode(entry.name)} stands on itself")
        lower = wanted.get(entry.peer_ifindex)
        if lower is not None and lower is not entry and entry.type != netdev_pb2.VETH and not entry.lower_outside:
            yield from visit(lower, (*above, entry.ifindex))
        done.add(entry.ifindex)
        yield entry

    for entry in wanted.values():
        yield from visit(entry, ())


def _adjust(entry: Entry, found: Link, making: Making) -> None:
    """Give a device what it is to have, where it differs; not whether it is up."""
    route, index = making.namespace.route, entry.ifindex
    name = os.fsdecode(entry.name)
    try:
        if found.name != name:
            route.request(link.SETLINK, 0, link.head(index) + attribute(link.NAME, entry.name + b"\0"))
        if entry.mtu != found.mtu:
            route.request(link.SETLINK, 0, link.head(index) + attribute(link.MTU, entry.mtu.to_bytes(4, "little")))
        if entry.address and entry.address != found.address:
            route.request(link.SETLINK, 0, link.head(index) + attribute(link.ADDRESS, entry.address))
        _adjust_attributes(entry, found, making)
        if entry.master != found.master:
            route.request(
                link.SETLINK, 0, link.head(index) + attribute(link.MASTER, entry.master.to_bytes(4, "little"))
            )
        if entry.port and entry.port != bridge.port_data(found):
            bridge.set_port(making.namespace, index, entry.port)
        _adjust_names(entry, found, making)
    except OSError as error:
        raise RebuildError(f"network device {name} cannot be made as it was: {error.strerror}") from error


def _adjust_attributes(entry: Entry, found: Link, making: Making) -> None:
    there = attributes(found.carried)
    for kind, value, _ in attribute_list(entry.attributes):
        if kind in _MADE_WITH or kind == link.AF_SPEC or there.get(kind) == value:
            continue
        body = link.head(entry.ifindex) + attribute(kind, value)
        making.namespace.route.request(link.SETLINK, 0, body)


def _adjust_names(entry: Entry, found: Link, making: Making) -> None:
    for act, names in (
        (link.DELETE_PROPERTIES, set(found.other_names) - set(entry.other_names)),
        (link.NEW_PROPERTIES, set(entry.other_names) - set(found.other_names)),
    ):
        if names:
            inner = b"".join(attribute(link.OTHER_NAME, name + b"\0") for name in sorted(names))
            flags = CREATE | EXCL if act == link.NEW_PROPERTIES else 0
            body = link.head(entry.ifindex) + attribute(link.PROPERTIES | NESTED, inner)
            making.namespace.route.request(act, flags, body)


def quiet(entries: Iterable[Entry], making: Making) -> None:
    """Before new devices come up: the kernel is to make no IPv6 addresses."""
    there = link.read_links(making.namespace)
    for entry in entries:
        found = there.get(entry.ifindex)
        if found is not None and not found.flags & link.UP and found.generation:
            body = link.head(entry.ifindex) + link.generate(link.GENERATE_NONE)
            making.namespace.route.request(link.SETLINK, 0, body)


def raise_up(entries: Iterable[Entry], making: Making) -> None:
    """Have devices up or down and with the other flags, as they were; what others stand on first."""
    there = link.read_links(making.namespace)
    for entry in _in_order({entry.ifindex: entry for entry in entries}):
        found = there.get(entry.ifindex)
        if found is None or not (found.flags ^ entry.flags) & link.SETTABLE_FLAGS:
            continue
        try:
            link.set_flags(making.namespace, entry.ifindex, entry.flags)
        except OSError as error:
            name = os.fsdecode(entry.name)
            raise RebuildError(f"network device {name} cannot be brought up: {error.strerror}") from error


def generate_addresses(entries: Iterable[Entry], making: Making) -> None:
    """When all addresses are there: the kernel makes IPv6 addresses again, as it was told to."""
    there = link.read_links(making.namespace)
    for entry in entries:
        found = there.get(entry.ifindex)
        told = attributes(entry.attributes).get(link.AF_SPEC)  # CRIU's images do not tell
        wanted = link.generate(link.GENERATE_USUAL) if told is None else attribute(link.AF_SPEC, told)
        if found is None or not found.generation or found.generation == wanted:
            continue
        body = link.head(entry.ifindex) + wanted
        try:
            making.namespace.route.request(link.SETLINK, 0, body)
        except OSError as error:
            raise EngineError(
                f"network device {os.fsdecode(entry.name)} cannot make IPv6 addresses as it did: {error.strerror}"
            ) from error
