"""Socket options, all of them: read in one call, written where they differ from what a new socket has.

Those that CRIU's format has fields for stand in `sk_opts_entry`'s fields; all others stand in its `phaul_options` as
setsockopt(2) takes them, so that a new option is one line in the table below. Values are carried even where they are
the host's defaults (keep-alive times, congestion control): the destination's may be others.

Reading all of them costs 50 us a socket, which thousands of connections cannot pay inside a freeze. So the final pass
reads again, of a connection that the survey has read in full, only those that servers set on living connections
(marked `*` in the table: they cost 20 us); the rest is as it was seconds before.

Sources: socket(7), ip(7), ipv6(7), tcp(7), udp(7), unix(7), linux/net/core/sock.c.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import os
import socket
import struct
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from phaul_engine._native import ffi, lib
from phaul_engine.errors import ImageError, RebuildError
from phaul_engine.images.pb import sk_opts_pb2

SOL_SOCKET, SOL_IP, SOL_TCP, SOL_UDP, SOL_IPV6, SOL_RAW = 1, 0, 6, 17, 41, 255
SOL_ICMPV6, SOL_PACKET, SOL_NETLINK = 58, 263, 270

SO_REUSEADDR, SO_SNDBUF, SO_RCVBUF, SO_SNDBUFFORCE, SO_RCVBUFFORCE = 2, 7, 8, 32, 33
SO_ATTACH_FILTER, SO_DETACH_FILTER, SO_LOCK_FILTER, SO_PEEK_OFF, SO_BUF_LOCK, SO_BINDTODEVICE = 26, 27, 44, 42, 72, 25
SO_LINGER, SO_RCVTIMEO, SO_SNDTIMEO = 13, 20, 21
IP_TRANSPARENT, IPV6_TRANSPARENT, IPV6_V6ONLY = 19, 75, 26
TCP_MAXSEG, TCP_WINDOW_CLAMP, TCP_ULP, TCP_CONGESTION = 2, 10, 31, 13
_SIOCGIFNAME, _SIOCGIFINDEX = 0x8910, 0x8933
MCAST_JOIN_GROUP = 42  # at the level of IP or IPv6: see multicast.py
_JOINED = 16 + 128  # bytes of its value in images


@dataclass(frozen=True)
class Option:
    """One option. `field` is its field in `sk_opts_entry`, if CRIU has one; `size` the room a value needs.
    `interface` marks values that are interface numbers: they travel as names. `live` are those read again at last."""

    level: int
    name: int
    label: str
    size: int = 4
    field: str = ""
    interface: bool = False
    live: bool = False


def _options(level: int, text: str) -> list[Option]:
    """`LABEL=name[:size][@field][!][*]`, blank-separated; `!` is an interface number, `*` a live option."""
    made = []
    for word in text.split():
        plain, _, field = word.rstrip("!*").partition("@")
        label, _, numbers = plain.partition("=")
        name, _, size = numbers.partition(":")
        made.append(Option(level, int(name), label, int(size or 4), field, "!" in word, "*" in word))
    return made


# The order is the order of writing: SO_PRIORITY after IP_TOS, SO_BUF_LOCK after the buffer sizes, SO_LOCK_FILTER last.
_COMMON = _options(
    SOL_SOCKET,
    """SO_DEBUG=1 SO_REUSEADDR=2@reuseaddr* SO_REUSEPORT=15@so_reuseport SO_DONTROUTE=5@so_dontroute
    SO_BROADCAST=6@so_broadcast SO_SNDBUF=7@so_sndbuf* SO_RCVBUF=8@so_rcvbuf* SO_KEEPALIVE=9@so_keepalive*
    SO_OOBINLINE=10@so_oobinline* SO_NO_CHECK=11@so_no_check SO_LINGER=13:8* SO_PASSCRED=16@so_passcred
    SO_RCVLOWAT=18@so_rcvlowat* SO_RCVTIMEO=20:16* SO_SNDTIMEO=21:16* SO_BINDTODEVICE=25:16@so_bound_dev
    SO_TIMESTAMP=29 SO_PASSSEC=34@so_passsec SO_TIMESTAMPNS=35 SO_MARK=36@so_mark* SO_TIMESTAMPING=37:8* SO_RXQ_OVFL=40
    SO_WIFI_STATUS=41 SO_PEEK_OFF=42* SO_NOFCS=43 SO_SELECT_ERR_QUEUE=45 SO_BUSY_POLL=46 SO_MAX_PACING_RATE=47:8*
    SO_ZEROCOPY=60* SO_TXTIME=61:8 SO_PREFER_BUSY_POLL=69 SO_RESERVE_MEM=73 SO_TXREHASH=74 SO_RCVMARK=75 SO_PASSPIDFD=76
    SO_RCVPRIORITY=82 SO_PASSRIGHTS=83 SO_INQ=84""",
)
_LAST = _options(SOL_SOCKET, "SO_PRIORITY=12@so_priority* SO_BUF_LOCK=72@so_buf_lock* SO_LOCK_FILTER=44*")
_IP = _options(
    SOL_IP,
    """IP_TOS=1* IP_TTL=2 IP_OPTIONS=4:40 IP_RECVOPTS=6 IP_RETOPTS=7 IP_PKTINFO=8 IP_MTU_DISCOVER=10 IP_RECVERR=11
    IP_RECVTTL=12 IP_RECVTOS=13 IP_FREEBIND=15 IP_PASSSEC=18 IP_TRANSPARENT=19 IP_RECVORIGDSTADDR=20 IP_MINTTL=21
    IP_CHECKSUM=23 IP_BIND_ADDRESS_NO_PORT=24 IP_RECVFRAGSIZE=25 IP_RECVERR_RFC4884=26 IP_MULTICAST_IF=32
    IP_MULTICAST_TTL=33 IP_MULTICAST_LOOP=34 IP_MULTICAST_ALL=49 IP_UNICAST_IF=50! IP_LOCAL_PORT_RANGE=51""",
)
_IPV6 = _options(
    SOL_IPV6,
    """IPV6_V6ONLY=26 IPV6_FLOWINFO=11 IPV6_UNICAST_HOPS=16 IPV6_MULTICAST_IF=17! IPV6_MULTICAST_HOPS=18
    IPV6_MULTICAST_LOOP=19 IPV6_MTU_DISCOVER=23 IPV6_RECVERR=25 IPV6_MULTICAST_ALL=29 IPV6_RECVERR_RFC4884=31
    IPV6_FLOWINFO_SEND=33 IPV6_RECVPKTINFO=49 IPV6_RECVHOPLIMIT=51 IPV6_RECVHOPOPTS=53 IPV6_RECVRTHDR=56
    IPV6_RECVDSTOPTS=58 IPV6_RECVPATHMTU=60 IPV6_DONTFRAG=62 IPV6_RECVTCLASS=66 IPV6_TCLASS=67* IPV6_AUTOFLOWLABEL=70
    IPV6_ADDR_PREFERENCES=72 IPV6_MINHOPCOUNT=73 IPV6_RECVORIGDSTADDR=74 IPV6_TRANSPARENT=75 IPV6_UNICAST_IF=76!
    IPV6_RECVFRAGSIZE=77 IPV6_FREEBIND=78""",
)
_TCP = _options(
    SOL_TCP,
    """TCP_NODELAY=1* TCP_MAXSEG=2 TCP_CORK=3* TCP_KEEPIDLE=4@tcp_keepidle* TCP_KEEPINTVL=5@tcp_keepintvl*
    TCP_KEEPCNT=6@tcp_keepcnt* TCP_SYNCNT=7 TCP_LINGER2=8 TCP_DEFER_ACCEPT=9 TCP_WINDOW_CLAMP=10 TCP_CONGESTION=13:16*
    TCP_THIN_LINEAR_TIMEOUTS=16 TCP_USER_TIMEOUT=18* TCP_FASTOPEN=23 TCP_NOTSENT_LOWAT=25* TCP_SAVE_SYN=27
    TCP_FASTOPEN_CONNECT=30 TCP_ULP=31:16* TCP_FASTOPEN_NO_COOKIE=34 TCP_INQ=36* TCP_TX_DELAY=37 TCP_RTO_MAX_MS=44
    TCP_RTO_MIN_US=45 TCP_DELACK_MAX_US=46""",
)
_UDP = _options(
    SOL_UDP, "UDP_CORK=1* UDP_ENCAP=100 UDP_NO_CHECK6_TX=101 UDP_NO_CHECK6_RX=102 UDP_SEGMENT=103 UDP_GRO=104"
)
_RAW = _options(SOL_IP, "IP_HDRINCL=3 IP_NODEFRAG=22") + _options(SOL_RAW, "ICMP_FILTER=1")
_RAW6 = (
    _options(SOL_IPV6, "IPV6_CHECKSUM=7 IPV6_HDRINCL=36")
    + _options(SOL_RAW, "IPV6_RAW_CHECKSUM=7")
    + _options(SOL_ICMPV6, "ICMPV6_FILTER=1:32")
)
_NETLINK = _options(
    SOL_NETLINK,
    """NETLINK_PKTINFO=3 NETLINK_BROADCAST_ERROR=4 NETLINK_NO_ENOBUFS=5 NETLINK_LISTEN_ALL_NSID=8 NETLINK_CAP_ACK=10
    NETLINK_EXT_ACK=11 NETLINK_GET_STRICT_CHK=12""",
)
_PACKET = _options(
    SOL_PACKET,
    """PACKET_COPY_THRESH=7 PACKET_AUXDATA=8 PACKET_ORIGDEV=9 PACKET_VERSION=10 PACKET_RESERVE=12 PACKET_LOSS=14
    PACKET_VNET_HDR=15 PACKET_TIMESTAMP=17 PACKET_QDISC_BYPASS=20 PACKET_IGNORE_OUTGOING=23""",
)
_FILTER = Option(SOL_SOCKET, SO_ATTACH_FILTER, "SO_ATTACH_FILTER", 0)  # read, it tells the number of instructions
_NOT_ASKED_FOR = {
    (SOL_SOCKET, SO_PEEK_OFF): -1,  # of TCP since Linux 6.9
    (SOL_SOCKET, 83): 1,  # SO_PASSRIGHTS
    (SOL_TCP, 44): 120_000,  # TCP_RTO_MAX_MS
    (SOL_TCP, 45): 200_000,  # TCP_RTO_MIN_US
    (SOL_TCP, 46): 200_000,  # TCP_DELACK_MAX_US
}
"""What options that Linux 6.1 does not know read when nobody has set them; all others read 0."""
_BOOLEANS = frozenset(
    name for name, field in sk_opts_pb2.sk_opts_entry.DESCRIPTOR.fields_by_name.items() if field.type == field.TYPE_BOOL
)
_LABELS = {(o.level, o.name): o.label for group in (_COMMON, _LAST, _IP, _IPV6, _TCP, _UDP) for o in group}

Key = tuple[int, int]
Values = dict[Key, bytes]


class _Table:
    """The options that one sort of socket has, laid out for one native call."""

    def __init__(self, options: list[Option]) -> None:
        self.options = [*options, _FILTER]
        self.live = self if all(option.live for option in options) else _Table([o for o in options if o.live])
        self.by_key = {(option.level, option.name): option for option in self.options}
        self.order = {key: index for index, key in enumerate(self.by_key)}
        self._native = ffi.new("struct ph_sockopt[]", len(self.options))
        offset = 0
        for native, option in zip(self._native, self.options, strict=True):
            native.level, native.name, native.offset, native.size = option.level, option.name, offset, option.size
            offset += -(-option.size // 8) * 8
        self._room = offset
        self._values = ffi.new("uint8_t[]", offset)
        self._lengths = ffi.new("int32_t[]", len(self.options))
        self._zeros = bytes(offset)
        self._decoded: dict[tuple[bytes, bytes], tuple[Options, int]] = {}

    def read(self, fd: int) -> tuple[Options, int]:
        """All values, and the number of instructions of the socket's filter (negative: -errno). Equal answers are the
        same object."""
        ffi.memmove(self._values, self._zeros, self._room)
        lib.ph_sockopts_read(fd, self._native, len(self.options), self._values, self._lengths)
        key = (ffi.buffer(self._values)[:], ffi.buffer(self._lengths)[:])
        found = self._decoded.get(key)
        if found is None:
            if len(self._decoded) > 64:  # the sockets of a server have few different sets of options
                self._decoded.clear()
            values, instructions = self._decode(*key)
            found = self._decoded[key] = (Options(values), instructions)
        return found

    def _decode(self, values: bytes, lengths: bytes) -> tuple[Values, int]:
        made: Values = {}
        filter_length = 0
        for native, option, length in zip(
            self._native, self.options, ffi.from_buffer("int32_t[]", lengths), strict=True
        ):
            if option is _FILTER:
                filter_length = int(length)
            elif length >= 0:
                made[option.level, option.name] = values[native.offset : native.offset + length]
        return made, filter_length


@functools.cache
def _table(family: int, kind: int, protocol: int) -> _Table:
    options = list(_COMMON)
    if family in (socket.AF_INET, socket.AF_INET6):
        options += _IP
        if family == socket.AF_INET6:
            options += _IPV6
        if kind == socket.SOCK_RAW:
            options += _RAW6 if family == socket.AF_INET6 else _RAW
        elif kind == socket.SOCK_STREAM:
            # The kernel keeps facts of the handshake where a connection's multicast options would be.
            options = [option for option in options if "_MULTICAST_" not in option.label] + _TCP
        elif protocol in (0, socket.IPPROTO_UDP, 136):
            options += _UDP
    elif family == socket.AF_NETLINK:
        options += _NETLINK
    elif family == socket.AF_PACKET:
        options += _PACKET
    return _Table(options + _LAST)


@dataclass(eq=False)
class Options:
    """The options of one socket: values as setsockopt takes them, and its classic filter. Never changed once made:
    sockets with the same options share the object, and what was worked out for one is there for all."""

    values: Values
    filter: bytes = b""
    unreadable_filter: bool = False  # an eBPF program, which cannot be had back
    encoded: sk_opts_pb2.sk_opts_entry | None = None
    live: Options | None = None  # the same as far as they are live, when they were read again

    def integer(self, level: int, name: int, default: int = 0) -> int:
        """An option that is an int."""
        value = self.values.get((level, name), b"")
        return int(struct.unpack("i", value)[0]) if len(value) == 4 else default


def read(sock: socket.socket, before: Options | None = None) -> Options:
    """All options of a socket. Nothing is changed: SO_ERROR is not asked for. With `before`, what the same socket had
    a little earlier, only the live ones are asked for again."""
    table = _table(sock.family, sock.type, sock.proto)
    if before is not None:
        table = table.live
    fd = sock.fileno()
    found, instructions = table.read(fd)
    if before is not None and found.values.items() <= before.values.items():
        found = before
    named = [option for option in table.options if option.interface and _int(found.values, option)]
    if instructions == 0 and not named and not found.filter and (before is None or found is before):
        return found
    values = dict(found.values) if before is None else {**before.values, **found.values}
    for option in named:
        values[option.level, option.name] = _interface_name(fd, option, values[option.level, option.name])
    return Options(values, _read_filter(fd, instructions), instructions == -errno.EACCES)


def asked(fd: int, level: int, name: int, size: int) -> bytes | None:
    """What getsockopt(2) answers to a value of so many zeros; None if it refuses."""
    native = ffi.new("struct ph_sockopt *", [level, name, 0, size])
    values, length = ffi.new("uint8_t[]", size), ffi.new("int32_t *")
    lib.ph_sockopts_read(fd, native, 1, values, length)
    return bytes(ffi.buffer(values, length[0])) if length[0] >= 0 else None


def unchanged(fd: int, sort: tuple[int, int, int], before: Options) -> bool:
    """Whether a socket's live options are what they were, and it has no filter now as then."""
    found, instructions = _table(*sort).live.read(fd)
    if instructions or before.filter:
        return False
    if before.live is not found:
        if not found.values.items() <= before.values.items():
            return False
        before.live = found
    return True


def _int(values: Values, option: Option) -> int:
    value = values.get((option.level, option.name), b"")
    return int(struct.unpack("i", value)[0]) if len(value) == 4 else 0


def _interface_name(fd: int, option: Option, value: bytes) -> bytes:
    index = struct.unpack(">i" if option.label == "IP_UNICAST_IF" else "i", value)[0]
    request = fcntl.ioctl(fd, _SIOCGIFNAME, struct.pack("16si20x", b"", index))
    return request[:16].rstrip(b"\0")


def _interface_index(fd: int, option: Option, name: bytes) -> bytes:
    try:
        request = fcntl.ioctl(fd, _SIOCGIFINDEX, struct.pack("16s24x", name))
    except OSError as error:
        raise RebuildError(f"{option.label} names the interface {name.decode()}, which is not here") from error
    index = struct.unpack_from("i", request, 16)[0]
    return struct.pack(">i" if option.label in ("IP_UNICAST_IF", "IPV6_UNICAST_IF") else "i", index)


def _read_filter(fd: int, instructions: int) -> bytes:
    if instructions <= 0:
        return b""
    native = ffi.new("struct ph_sockopt *", [SOL_SOCKET, SO_ATTACH_FILTER, 0, instructions])
    values, length = ffi.new("uint8_t[]", instructions * 8), ffi.new("int32_t *")
    lib.ph_sockopts_read(fd, native, 1, values, length)
    return bytes(ffi.buffer(values)) if length[0] == instructions else b""


def encode(options: Options, entry: sk_opts_pb2.sk_opts_entry) -> None:
    """Put options into their (empty) image message."""
    if options.encoded is None:
        options.encoded = _encode(options)
    entry.CopyFrom(options.encoded)


def _encode(options: Options) -> sk_opts_pb2.sk_opts_entry:
    entry = sk_opts_pb2.sk_opts_entry()
    _zero_required(entry)
    for option in _every(options.values):
        value = options.values[option.level, option.name]
        if option.field:
            _set_field(entry, option.field, value)
        elif (option.level, option.name) in ((SOL_SOCKET, SO_RCVTIMEO), (SOL_SOCKET, SO_SNDTIMEO)):
            seconds, microseconds = struct.unpack("qq", value)
            stem = "so_rcv_tmo" if option.name == SO_RCVTIMEO else "so_snd_tmo"
            setattr(entry, f"{stem}_sec", seconds)
            setattr(entry, f"{stem}_usec", microseconds)
        else:
            entry.phaul_options.add(level=option.level, name=option.name, value=value)
            if (option.level, option.name) == (SOL_SOCKET, SO_LINGER):
                on, seconds = struct.unpack("ii", value)
                if on:
                    entry.so_linger = seconds
    entry.so_filter.extend(struct.unpack(f"<{len(options.filter) // 8}Q", options.filter))
    return entry


def _zero_required(entry: sk_opts_pb2.sk_opts_entry) -> None:
    for name in ("so_sndbuf", "so_rcvbuf", "so_snd_tmo_sec", "so_snd_tmo_usec", "so_rcv_tmo_sec", "so_rcv_tmo_usec"):
        setattr(entry, name, 0)


def _every(values: Values) -> Iterator[Option]:
    known = {**_ALL}
    for level, name in values:
        yield known.get((level, name)) or Option(level, name, f"option {name} of level {level}")


def _set_field(entry: sk_opts_pb2.sk_opts_entry, field: str, value: bytes) -> None:
    if field == "so_bound_dev":
        if name := value.rstrip(b"\0"):
            entry.so_bound_dev = name.decode()
        return
    number = struct.unpack("i", value)[0]
    setattr(entry, field, bool(number) if field in _BOOLEANS else number & 0xFFFFFFFF)


def decode(entry: sk_opts_pb2.sk_opts_entry) -> Options:
    """The options of an image message, by whoever it was written. Equal messages give the same object."""
    return _decode(entry.SerializeToString(deterministic=True))


@functools.lru_cache(maxsize=1024)
def _decode(message: bytes) -> Options:
    entry = sk_opts_pb2.sk_opts_entry.FromString(message)
    values: Values = {}
    for option in (*_COMMON, *_TCP, *_LAST):
        if option.field and entry.HasField(option.field):
            if option.field == "so_bound_dev":
                values[option.level, option.name] = entry.so_bound_dev.encode()
            else:
                values[option.level, option.name] = struct.pack("I", int(getattr(entry, option.field)))
    values[SOL_SOCKET, SO_RCVTIMEO] = struct.pack("qq", entry.so_rcv_tmo_sec, entry.so_rcv_tmo_usec)
    values[SOL_SOCKET, SO_SNDTIMEO] = struct.pack("qq", entry.so_snd_tmo_sec, entry.so_snd_tmo_usec)
    if entry.HasField("so_linger"):
        values[SOL_SOCKET, SO_LINGER] = struct.pack("ii", 1, entry.so_linger)
    for raw in entry.phaul_options:
        known = _ALL.get((raw.level, raw.name))
        room = max(known.size, 16) if known else _JOINED if raw.name == MCAST_JOIN_GROUP else -1
        if len(raw.value) > room:  # others change more than a socket: filters, routes, what a program may
            raise ImageError(f"a socket with option {raw.name} of level {raw.level}, which is none that is carried")
        values[raw.level, raw.name] = raw.value
    return Options(values, struct.pack(f"<{len(entry.so_filter)}Q", *entry.so_filter))


def write(
    sock: socket.socket,
    options: Options,
    without: AbstractSet[Key] = frozenset(),
    present: Options | None = None,
    *,
    filtering: bool = True,
) -> None:
    """Give a socket these options, as far as they differ from what it has. `without` are left alone, and so is the
    filter unless `filtering`; `present` is what the socket is known to have (asked of it otherwise)."""
    if options is present:
        return
    fd = sock.fileno()
    if present is None:
        present = read(sock)
    table = _table(sock.family, sock.type, sock.proto)
    differing = options.values.items() - present.values.items()
    changed = {key for key, value in differing if key not in without and not _same(value, present.values.get(key))}
    if changed & {(SOL_SOCKET, SO_SNDBUF), (SOL_SOCKET, SO_RCVBUF)}:
        changed.add((SOL_SOCKET, SO_BUF_LOCK))  # setting a size has locked it
    if filtering and options.filter != present.filter:
        write_filter(sock, options.filter)
    for key in sorted(changed, key=lambda key: table.order.get(key, len(table.order))):
        if key in options.values:
            _write_one(sock, fd, key, options.values[key], table.by_key.get(key))


def _same(wanted: bytes, present: bytes | None) -> bool:
    return present is not None and wanted.rstrip(b"\0") == present.rstrip(b"\0")


def _write_one(sock: socket.socket, fd: int, key: Key, value: bytes, option: Option | None) -> None:
    level, name = key
    if option is not None and option.interface and value.strip(b"\0") and len(value) != 4:
        value = _interface_index(fd, option, value)
    try:
        if key == (SOL_SOCKET, SO_SNDBUF):
            set_buffer(sock, SO_SNDBUF, struct.unpack("i", value)[0])
        elif key == (SOL_SOCKET, SO_RCVBUF):
            set_buffer(sock, SO_RCVBUF, struct.unpack("i", value)[0])
        else:
            sock.setsockopt(level, name, value)
    except OSError as error:
        if error.errno in (errno.ENOPROTOOPT, errno.EOPNOTSUPP) and _is_not_asked_for(key, value):
            return
        label = _LABELS.get(key, f"option {name} of level {level}")
        text = value.rstrip(b"\0").decode() if level == SOL_TCP and name == TCP_CONGESTION else value.hex()
        advice = "load its module here (modprobe)" if error.errno == errno.ENOENT else ""
        raise RebuildError(
            f"{label} cannot be set to {text} on a socket here: {os.strerror(error.errno or 0)}", advice=advice
        ) from error


def _is_not_asked_for(key: Key, value: bytes) -> bool:
    """Whether an option has the value that every socket has: then a kernel need not know it."""
    unset = _NOT_ASKED_FOR.get(key, 0)
    return len(value) <= 4 and int.from_bytes(value.ljust(4, b"\0"), "little", signed=True) == unset


def set_buffer(sock: socket.socket, name: int, size: int) -> None:
    """Make SO_SNDBUF or SO_RCVBUF read `size`, beyond the sysctl limits too (the kernel doubles what it is given)."""
    force = SO_SNDBUFFORCE if name == SO_SNDBUF else SO_RCVBUFFORCE
    try:
        sock.setsockopt(SOL_SOCKET, force, size // 2)
    except PermissionError:
        sock.setsockopt(SOL_SOCKET, name, size // 2)


def write_filter(sock: socket.socket, program: bytes) -> None:
    """Attach a classic filter (struct sock_filter after struct sock_filter); empty: detach what there is."""
    if not program:
        sock.setsockopt(SOL_SOCKET, SO_DETACH_FILTER, 0)
        return
    room = ffi.from_buffer("uint8_t[]", program)
    fprog = struct.pack("HxxxxxxQ", len(program) // 8, int(ffi.cast("uintptr_t", room)))
    sock.setsockopt(SOL_SOCKET, SO_ATTACH_FILTER, fprog)


_ALL = {
    (option.level, option.name): option
    for group in (_COMMON, _IP, _IPV6, _TCP, _UDP, _RAW, _RAW6, _NETLINK, _PACKET, _LAST)
    for option in group
}
