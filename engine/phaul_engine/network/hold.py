"""Holding the packets of the moving sockets while they are in no state to receive.

A program on every interface's ingress (TCX, or a filter of clsact: `ingress`) looks each packet up in a table of what
moves: an address, a port of it, a connection. What is found there is redirected into a TAP and read by us; nothing is
dropped, no sender's timer has to run out. Switching on or off is one write to a map, however many sockets there are.

The migration's own channels stand in the same table as exceptions. The programs stay attached and the TAP is
persistent when we die: then the packets go into a TAP that nobody reads, which is a drop, and never to a socket in
repair mode, which would acknowledge bytes that nobody carries over. `undo` takes it all away, whoever calls it.
"""

from __future__ import annotations

import enum
import os
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from phaul_engine.errors import EngineError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.objects import inet, places

from . import bpf, ingress, interfaces
from .ingress import Method
from .interfaces import Interface, Tap

Result = TypeVar("Result")

_ETH_P_IP, _ETH_P_IPV6 = socket.htons(0x0800), socket.htons(0x86DD)
_MAPPED = 0xFFFF0000  # the third word of ::ffff:a.b.c.d as it lies in memory
_KEY = struct.Struct("<BxHHxx16s16s")  # protocol, local port, remote port (network order), local, remote address
STEAL, _PASS = b"\1\0\0\0", b"\2\0\0\0"  # values of the table
SWITCH = bytes(4)  # the key of the one entry of the switch
_SHOT = 2  # TC_ACT_SHOT, and TCX_DROP
_PACKET_PROTOCOL = 16  # offset in struct __sk_buff
_ETHER = 14
_ENTRIES = 1 << 17
_STREAM = socket.SOCK_STREAM
_WILDCARDS = ("0.0.0.0", "::")


class Stage(enum.IntEnum):
    """What is held."""

    OFF = 0
    SYN = 1  # requests for new connections only: the accept queues run empty
    ALL = 2
    MUTE = 3  # all, and nothing leaves the namespace: its addresses are elsewhere now


@dataclass(frozen=True)
class Match:
    """Packets: to a local address, a port of it, or from one remote end to it. What is None matches everything.

    `protocol` None stands for TCP and UDP together, and needs an address without ports.
    """

    protocol: int | None
    address: str | None
    port: int | None = None
    remote: tuple[str, int] | None = None

    def key(self) -> bytes:
        """As in the table."""
        remote, remote_port = self.remote or (None, 0)
        ports = socket.htons(self.port or 0), socket.htons(remote_port)
        return _KEY.pack(self.protocol or 0, *ports, _packed(self.address), _packed(remote))


def _packed(address: str | None) -> bytes:
    if address is None:
        return bytes(16)
    if ":" in address:
        return socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
    return bytes(10) + b"\xff\xff" + socket.inet_pton(socket.AF_INET, address)


def matches(checkpoint: Checkpoint, *, connections: bool = False) -> Iterator[Match]:
    """What packets belong to the internet sockets of images; of TCP connections only, if wanted."""
    for record in checkpoint.records("files"):
        entry = record.message.isk if record.message.HasField("isk") else None
        if entry is None or not entry.src_port or (connections and not (entry.dst_port and entry.type == _STREAM)):
            continue
        local = inet.text(list(entry.src_addr), entry.family)
        remote = (inet.text(list(entry.dst_addr), entry.family), entry.dst_port) if entry.dst_port else None
        yield Match(entry.proto, None if local in _WILDCARDS else local, entry.src_port, remote)


@dataclass
class Hold:
    """A hold in one network namespace. Make it with `prepare`, before the freeze."""

    identity: str
    netns: str
    tap: Tap
    table: bpf.Map
    switch: bpf.Map
    method: Method
    undoing: dict[str, Any]

    def set(self, stage: Stage) -> None:
        """Hold nothing, connection requests, or all."""
        self.switch[SWITCH] = struct.pack("<I", stage)

    @property
    def stage(self) -> Stage:
        """What is held now."""
        return Stage(struct.unpack("<I", self.switch[SWITCH])[0])

    def add(self, matches: Iterable[Match]) -> None:
        """These move."""
        for match in matches:
            self.table[match.key()] = STEAL

    def remove(self, matches: Iterable[Match]) -> None:
        """These don't any more."""
        for match in matches:
            with suppress(KeyError):
                del self.table[match.key()]

    def spare(self, matches: Iterable[Match]) -> None:
        """These stay though a wider match moves: the migration's own channels."""
        for match in matches:
            self.table[match.key()] = _PASS

    def entry(self) -> dict[str, Any]:
        """What the journal must hold for `undo`."""
        return self.undoing

    def close(self) -> None:
        """Take the hold away. What it holds and nobody has read is lost."""
        self.table.close()
        self.switch.close()
        self.tap.close()
        undo(self.entry()["data"])


def undo_entry(identity: str, netns: str = "") -> dict[str, Any]:
    """The journal's entry for a hold; to be made, and written, before the hold is prepared: it tells which interfaces
    had no qdisc before."""
    bare = inside(netns, lambda: ingress.bare(index for index, _ in socket.if_nameindex()))
    return {"kind": "hold", "data": {"id": identity, "netns": netns, "bare": bare}}


def outward(netns: str) -> bool:
    """Whether a network namespace has an interface that packets can come in at from elsewhere."""
    return inside(netns, lambda: any(not one.loopback for one in interfaces.ethernet_interfaces()))


def prepare(identity: str, netns: str = "", names: list[str] | None = None, *, method: Method | None = None) -> Hold:
    """Set up a hold, switched off, on these interfaces of a network namespace (all Ethernet ones and lo by default).

    `identity` is the migration's (it names TAP and pins; at most 12 characters count), `netns` a path like
    /proc/PID/ns/net, empty for the engine's own. `EngineError` says what the kernel lacks.
    """
    try:
        undoing = undo_entry(identity, netns)
        return inside(netns, lambda: _prepare(identity, netns, names, method or ingress.choose(), undoing))
    except OSError as error:
        raise EngineError(
            f"packets cannot be held here: {error.filename or ''} {error.strerror}",
            advice="a kernel with TUN and TCX (Linux 6.6) or CONFIG_NET_CLS_BPF can; the module may have to be loaded",
        ) from error


def _prepare(identity: str, netns: str, names: list[str] | None, method: Method, undoing: dict[str, Any]) -> Hold:
    held = [interface for interface in interfaces.ethernet_interfaces() if names is None or interface.name in names]
    tap = Tap.create(tap_name(identity), max(interface.mtu for interface in held if not interface.loopback or names))
    table, switch = maps()
    hold = Hold(identity, netns, tap, table, switch, method, undoing)
    try:
        program = bpf.load(steal_program(table.fd, switch.fd, tap.index), "phaul_steal")
        try:
            for interface in held:
                ingress.attach(method, program, interface.index, attached_name(identity))
        finally:
            os.close(program)
        if netns:
            _prepare_muting(hold, held)
        # What we write into the TAP comes in at the interface, so an abort can give held packets back.
        inject_at(next((one for one in held if not one.loopback), held[0]), identity, tap, method)
    except BaseException:
        hold.close()
        raise
    return hold


def _prepare_muting(hold: Hold, held: Iterable[Interface]) -> None:
    """In a namespace that moves as a whole."""
    program = bpf.load(_mute_program(hold.switch.fd), "phaul_mute")
    try:
        for interface in held:
            if not interface.loopback:
                ingress.attach(hold.method, program, interface.index, attached_name(hold.identity), leaving=True)
    finally:
        os.close(program)


def maps() -> tuple[bpf.Map, bpf.Map]:
    """The table of what moves, and the switch, which is off."""
    table = bpf.Map.create(bpf.MAP_HASH, _KEY.size, 4, _ENTRIES, "phaul_moving")
    return table, bpf.Map.create(bpf.MAP_ARRAY, 4, 4, 1, "phaul_switch")


def inject_at(interface: Interface, identity: str, tap: Tap, method: Method) -> None:
    """From now on what we write into the TAP comes in at the interface."""
    program = bpf.load(_inject_program(interface.index), "phaul_inject")
    try:
        ingress.attach(method, program, tap.index, attached_name(identity))
    finally:
        os.close(program)


def undo(data: dict[str, Any]) -> None:
    """Take away a hold that a journal entry names, by whatever is left of it. Doing it twice does no harm."""
    name = attached_name(data["id"])
    ingress.unpin(name)

    def take_away() -> None:
        ingress.detach(name, data["bare"])
        interfaces.remove_tap(tap_name(data["id"]))

    with suppress(FileNotFoundError, ProcessLookupError):  # the namespace is gone, and all that was in it
        inside(data["netns"], take_away)


def tap_name(identity: str) -> str:
    """The name of a migration's TAP."""
    return f"{interfaces.TAP_PREFIX}{identity[:12]}"


def attached_name(identity: str) -> str:
    """The name of a migration's programs."""
    return f"phaul-{identity}"


def inside(netns: str, act: Callable[[], Result]) -> Result:
    """Run `act` in the network namespace at path `netns`, empty for the engine's own."""
    if not netns:
        return act()
    fd = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return places.in_network(fd, act)
    finally:
        os.close(fd)


def _inject_program(interface: int) -> bytes:
    """For a TAP's ingress: all that comes in here comes in at `interface`."""
    code = bpf.Assembler()
    code.set(1, interface)
    code.set(2, bpf.F_INGRESS)
    code.call(bpf.HELPER_REDIRECT)
    code.exit()
    return code.assemble()


def _mute_program(switch: int) -> bytes:
    """For what leaves: dropped if the stage says so."""
    code = bpf.Assembler()
    code.store_value(10, -8, 0, 4)
    code.map(1, switch)
    code.move(2, 10)
    code.add(2, -8)
    code.call(bpf.HELPER_LOOKUP)
    code.jump_equal(0, 0, "pass")
    code.load(7, 0, 0, 4)
    code.jump_unequal(7, Stage.MUTE, "pass")
    code.set(0, _SHOT)
    code.exit()
    code.label("pass")
    code.set(0, bpf.NEXT)
    code.exit()
    return code.assemble()


# Stack of the steal program, from the frame pointer down.
_AT_KEY = -_KEY.size  # 40 bytes
_AT_PORTS, _AT_HEADER, _AT_INDEX = _AT_KEY - 8, _AT_KEY - 8 - 40, _AT_KEY - 8 - 40 - 8
_LOCAL, _REMOTE = _AT_KEY + 8, _AT_KEY + 24
# Registers: 6 the packet, 7 the stage, 8 the protocol, 9 where TCP or UDP begins.


def steal_program(table: int, switch: int, tap: int | None) -> bytes:
    """What is looked up in `table` and is to be held goes to the interface `tap`; without one it is dropped."""
    code = bpf.Assembler()
    code.move(6, 1)
    code.store_value(10, _AT_INDEX, 0, 4)
    code.map(1, switch)
    code.move(2, 10)
    code.add(2, _AT_INDEX)
    code.call(bpf.HELPER_LOOKUP)
    code.jump_equal(0, 0, "pass")
    code.load(7, 0, 0, 4)
    code.jump_equal(7, Stage.OFF, "pass")
    for offset in range(0, _KEY.size, 8):
        code.store_value(10, _AT_KEY + offset, 0, 8)
    code.load(1, 6, _PACKET_PROTOCOL, 4)
    code.jump_equal(1, _ETH_P_IP, "ipv4")
    code.jump_unequal(1, _ETH_P_IPV6, "pass")
    _read_ipv6(code)
    code.jump("ports")
    code.label("ipv4")
    _read_ipv4(code)
    code.label("ports")
    _read_ports(code)
    _look_up(code, table)
    code.label("steal")
    if tap is None:
        code.set(0, _SHOT)
    else:
        code.set(1, tap)
        code.set(2, 0)
        code.call(bpf.HELPER_REDIRECT)
    code.exit()
    code.label("pass")
    code.set(0, bpf.NEXT)
    code.exit()
    return code.assemble()


def _load_bytes(code: bpf.Assembler, to: int, size: int) -> None:
    """Copy from the packet at r2 to the stack; a packet that is too short passes."""
    code.move(1, 6)
    code.move(3, 10)
    code.add(3, to)
    code.set(4, size)
    code.call(bpf.HELPER_LOAD_BYTES)
    code.jump_unequal(0, 0, "pass")


def _read_ipv6(code: bpf.Assembler) -> None:
    code.set(2, _ETHER)
    _load_bytes(code, _AT_HEADER, 40)
    code.load(8, 10, _AT_HEADER + 6, 1)
    code.set(9, _ETHER + 40)
    for word in (0, 8):
        code.load(1, 10, _AT_HEADER + 8 + word, 8)
        code.store(10, _REMOTE + word, 1, 8)
        code.load(1, 10, _AT_HEADER + 24 + word, 8)
        code.store(10, _LOCAL + word, 1, 8)


def _read_ipv4(code: bpf.Assembler) -> None:
    code.set(2, _ETHER)
    _load_bytes(code, _AT_HEADER, 20)
    code.load(8, 10, _AT_HEADER + 9, 1)
    code.load(9, 10, _AT_HEADER, 1)
    code.keep(9, 0x0F)
    code.shift_left(9, 2)
    code.add(9, _ETHER)
    for source, target in ((12, _REMOTE), (16, _LOCAL)):
        code.load(1, 10, _AT_HEADER + source, 4)
        code.store(10, target + 12, 1, 4)
        code.store_value(10, target + 8, _MAPPED - (1 << 32), 4)
    code.load(1, 10, _AT_HEADER + 6, 2)
    code.jump_any(1, socket.htons(0x1FFF), "fragment")  # a later fragment has no ports


def _read_ports(code: bpf.Assembler) -> None:
    code.jump_equal(8, socket.IPPROTO_TCP, "tcp")
    code.jump_unequal(8, socket.IPPROTO_UDP, "pass")
    code.jump_equal(7, Stage.SYN, "pass")
    code.jump("read ports")
    code.label("tcp")
    code.jump_unequal(7, Stage.SYN, "read ports")
    code.move(2, 9)
    code.add(2, 13)
    _load_bytes(code, _AT_PORTS, 1)
    code.load(1, 10, _AT_PORTS, 1)
    code.keep(1, 0x12)
    code.jump_unequal(1, 0x02, "pass")  # SYN and not ACK
    code.label("read ports")
    code.store(10, _AT_KEY, 8, 1)
    code.move(2, 9)
    _load_bytes(code, _AT_PORTS, 4)
    code.load(1, 10, _AT_PORTS, 2)
    code.store(10, _AT_KEY + 4, 1, 2)
    code.load(1, 10, _AT_PORTS + 2, 2)
    code.store(10, _AT_KEY + 2, 1, 2)


def _look_up(code: bpf.Assembler, table: int) -> None:
    """From the narrowest match to the widest; the first that is found decides."""

    def try_key(name: str, after: str) -> None:
        code.map(1, table)
        code.move(2, 10)
        code.add(2, _AT_KEY)
        code.call(bpf.HELPER_LOOKUP)
        code.jump_equal(0, 0, after)
        code.load(1, 0, 0, 4)
        code.jump_equal(1, STEAL[0], "steal")
        code.jump("pass")
        code.label(after)

    try_key("connection", "look up port")
    code.store_value(10, _AT_KEY + 4, 0, 2)
    for word in (0, 8):
        code.store_value(10, _REMOTE + word, 0, 8)
    try_key("port of an address", "look up port of any address")
    for word in (0, 8):  # keep the local address in registers' stead: the header's copy is still there
        code.load(1, 10, _LOCAL + word, 8)
        code.store(10, _AT_HEADER + word, 1, 8)
        code.store_value(10, _LOCAL + word, 0, 8)
    try_key("port of any address", "restore address")
    for word in (0, 8):
        code.load(1, 10, _AT_HEADER + word, 8)
        code.store(10, _LOCAL + word, 1, 8)
    code.jump("look up address")
    code.label("fragment")
    code.jump_equal(7, Stage.SYN, "pass")
    code.label("look up address")
    code.store_value(10, _AT_KEY, 0, 8)
    for word in (0, 8):
        code.store_value(10, _REMOTE + word, 0, 8)
    try_key("address", "not found")
    code.jump("pass")
