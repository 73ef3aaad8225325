"""The few netlink dumps that the auditor needs, without a tool that may not be installed.

rtnetlink(7); linux/netfilter/nf_tables.h; bpf(2) for what TCX has.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator

NETLINK_NETFILTER = 12
NLM_F_REQUEST_DUMP = 0x301
NLMSG_ERROR = 2
NLMSG_DONE = 3
RTM_GETLINK = 18
RTM_GETQDISC = 38
RTM_GETTFILTER = 46
CLSACT_SIDES = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
TCA_OPTIONS, TCA_BPF_NAME = 2, 7
NFT_MSG_GETTABLE = 10 << 8 | 1
IFLA_IFNAME = 3
TCA_KIND = 1
NFTA_TABLE_NAME = 1
SYS_BPF = 321
BPF_PROG_QUERY = 16
TCX_ATTACH_TYPES = {"ingress": 46, "egress": 47}


def _dump(protocol: int, kind: int, header: bytes) -> Iterator[bytes]:
    """The bodies of the answers to a dump request, family header included."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as channel:
        channel.settimeout(5)
        channel.send(struct.pack("=IHHII", 16 + len(header), kind, NLM_F_REQUEST_DUMP, 1, 0) + header)
        while True:
            data = channel.recv(1 << 17)
            while data:
                length, answer, _, _, _ = struct.unpack_from("=IHHII", data)
                if answer == NLMSG_DONE:
                    return
                if answer == NLMSG_ERROR:
                    code = -struct.unpack_from("=i", data, 16)[0]
                    raise OSError(code, os.strerror(code))
                yield data[16:length]
                data = data[(length + 3) & ~3 :]


def _attribute(body: bytes, wanted: int) -> bytes:
    """The value of an attribute in `body`, empty without it."""
    while len(body) >= 4:
        length, kind = struct.unpack_from("=HH", body)
        if kind & 0x3FFF == wanted:
            return body[4:length]
        body = body[(length + 3) & ~3 :]
    return b""


def links() -> dict[int, str]:
    """Index -> name of every link of this network namespace."""
    found = {}
    for body in _dump(socket.NETLINK_ROUTE, RTM_GETLINK, struct.pack("=BxHiII", 0, 0, 0, 0, 0)):
        (index,) = struct.unpack_from("=i", body, 4)
        found[index] = _attribute(body[16:], IFLA_IFNAME).rstrip(b"\0").decode()
    return found


def ingress_qdiscs() -> list[int]:
    """Indices of the links with an ingress or clsact qdisc: where tc filters hang."""
    bodies = _dump(socket.NETLINK_ROUTE, RTM_GETQDISC, struct.pack("=BxxxiIII", 0, 0, 0, 0, 0))
    kinds = (b"ingress\0", b"clsact\0")
    return [struct.unpack_from("=i", body, 4)[0] for body in bodies if _attribute(body[20:], TCA_KIND) in kinds]


def filters(index: int) -> list[str]:
    """The filters at the ingress or clsact qdisc of a link: "ingress: bpf NAME"."""
    found = []
    for side, parent in CLSACT_SIDES.items():
        for body in _dump(socket.NETLINK_ROUTE, RTM_GETTFILTER, struct.pack("=BxxxiIII", 0, index, 0, parent, 0)):
            if struct.unpack_from("=I", body, 8)[0]:  # a filter, and not the head of a list of them
                kind = _attribute(body[20:], TCA_KIND).rstrip(b"\0").decode()
                name = _attribute(_attribute(body[20:], TCA_OPTIONS), TCA_BPF_NAME).rstrip(b"\0").decode()
                found.append(f"{side}: {kind} {name}".rstrip())
    return found


def nft_tables() -> list[str]:
    """Names of the nftables tables of this network namespace; none where the kernel has no nftables."""
    try:
        bodies = list(_dump(NETLINK_NETFILTER, NFT_MSG_GETTABLE, struct.pack("=BBH", 0, 0, 0)))
    except OSError as error:
        if error.errno in (errno.EPROTONOSUPPORT, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOENT):
            return []
        raise
    return [_attribute(body[4:], NFTA_TABLE_NAME).rstrip(b"\0").decode() for body in bodies]


def tcx_programs(index: int) -> list[str]:
    """Where TCX programs are attached on a link: "ingress: 2 programs"; none where the kernel has no TCX."""
    libc = ctypes.CDLL(None, use_errno=True)
    found = []
    for name, kind in TCX_ATTACH_TYPES.items():
        ids = (ctypes.c_uint32 * 64)()
        attr = bytearray(struct.pack("=IIIIQI", index, kind, 0, 0, ctypes.addressof(ids), 64).ljust(64, b"\0"))
        buffer = (ctypes.c_char * len(attr)).from_buffer(attr)
        if libc.syscall(SYS_BPF, BPF_PROG_QUERY, buffer, len(attr)) == 0:
            count = struct.unpack_from("=I", attr, 24)[0]
            if count:
                found.append(f"{name}: {count} programs")
        elif ctypes.get_errno() not in (errno.EINVAL, errno.ENODEV, errno.ENOENT, errno.EPERM):  # or the link is gone
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return found
