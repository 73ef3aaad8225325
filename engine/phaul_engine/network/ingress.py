"""Running a BPF program on all that comes in at an interface, and finding it again when whoever did it has died.

Two methods. TCX (Linux 6.6): a link, pinned in a bpf file system under a name that begins with the migration's. Before
that, a direct-action filter (tc-bpf(8)) of that name at the first place of a clsact qdisc. Such a qdisc is made where
there is none and removed with the last filter; one that was there stays. Either way the program runs until `detach`.
Sources: bpf(2), linux/net/sched/{cls_bpf,sch_ingress,cls_api}.c, linux/include/uapi/linux/{pkt_sched,pkt_cls}.h.
"""

from __future__ import annotations

import enum
import errno
import functools
import glob
import os
import socket
import struct
from collections.abc import Container, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass

from phaul_engine.errors import EngineError
from phaul_engine.objects import places

from . import bpf, rtnetlink
from .rtnetlink import Route, attribute, attributes

BPF_FS = "/sys/fs/bpf"
_BPF_FS_MAGIC = 0xCAFE4A11
_RTM_NEWQDISC, _RTM_DELQDISC, _RTM_GETQDISC = 36, 37, 38
_RTM_NEWTFILTER, _RTM_DELTFILTER, _RTM_GETTFILTER = 44, 45, 46
_MESSAGE = struct.Struct("=BxxxiIII")  # struct tcmsg: family, interface, handle, parent, info
_QDISC, _QDISC_PARENT = 0xFFFF0000, 0xFFFFFFF1  # TC_H_CLSACT
_INGRESS, _EGRESS = 0xFFFFFFF2, 0xFFFFFFF3  # TC_H_MAKE (TC_H_CLSACT, TC_H_MIN_INGRESS, ..._EGRESS)
_FIRST = 1 << 16 | socket.htons(0x0003)  # priority, and ETH_P_ALL
_TCA_KIND, _TCA_OPTIONS = 1, 2
_TCA_BPF_FD, _TCA_BPF_NAME, _TCA_BPF_FLAGS = 6, 7, 8
_DIRECT_ACTION = 1  # TCA_BPF_FLAG_ACT_DIRECT
_KINDS = (b"clsact\0", b"ingress\0")


class Method(enum.Enum):
    """How a program is attached."""

    TCX = "TCX"
    CLSACT = "clsact"


@functools.cache
def choose() -> Method:
    """What this kernel has."""
    return Method.TCX if bpf.has_tcx() else Method.CLSACT


@dataclass(frozen=True)
class Filter:
    """A filter at an interface. `name` is a BPF program's, empty for filters of another sort."""

    interface: int
    parent: int
    handle: int
    info: int
    name: str


def attach(method: Method, program: int, interface: int, name: str, *, leaving: bool = False) -> None:
    """Run `program` on what comes in at `interface` (its number), or leaves there, before whatever else does, until
    `detach` of `name`. Raises `OSError`, and `EngineError` if something else stands at the first place."""
    if method is Method.TCX:
        _mount_bpf()
        link = bpf.attach(program, interface, bpf.TCX_EGRESS if leaving else bpf.TCX_INGRESS)
        try:
            bpf.pin(link, f"{BPF_FS}/{name}-{interface}{'-out' if leaving else ''}")
        finally:
            os.close(link)
        return
    with closing(Route()) as route:
        place = _MESSAGE.pack(socket.AF_UNSPEC, interface, _QDISC, _QDISC_PARENT, 0)
        with suppress(FileExistsError):
            flags = rtnetlink.CREATE | rtnetlink.EXCL
            route.request(_RTM_NEWQDISC, flags, place + attribute(_TCA_KIND, b"clsact\0"))
        _add_filter(route, program, interface, name, _EGRESS if leaving else _INGRESS)


def _add_filter(route: Route, program: int, interface: int, name: str, parent: int) -> None:
    options = (
        attribute(_TCA_BPF_FD, struct.pack("=I", program))
        + attribute(_TCA_BPF_NAME, name.encode() + b"\0")
        + attribute(_TCA_BPF_FLAGS, struct.pack("=I", _DIRECT_ACTION))
    )
    body = _MESSAGE.pack(socket.AF_UNSPEC, interface, 0, parent, _FIRST)
    body += attribute(_TCA_KIND, b"bpf\0") + attribute(_TCA_OPTIONS, options)
    try:
        route.request(_RTM_NEWTFILTER, rtnetlink.CREATE | rtnetlink.EXCL, body)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EEXIST):
            raise
        device, where = socket.if_indextoname(interface), "ingress" if parent == _INGRESS else "egress"
        raise EngineError(
            f"another filter stands first at the {where} of {device}",
            advice=f"give it a lower priority (tc filter show dev {device} {where})",
        ) from error


def bare(interfaces: Iterable[int]) -> list[int]:
    """Which of these have no qdisc for filters, or one that a migration made: it is to go with our last filter."""
    with closing(Route()) as route:
        equipped = _equipped(route)
        return [one for one in interfaces if one not in equipped or _only_ours(route, one)]


def _only_ours(route: Route, interface: int) -> bool:
    filters = list(_filters(route, interface))
    return bool(filters) and all(one.name.startswith("phaul-") for one in filters)


def unpin(name: str) -> None:
    """Take away what was attached as `name` by TCX, in whatever network namespace; twice does no harm."""
    for path in glob.glob(f"{BPF_FS}/{glob.escape(name)}-*"):
        with suppress(FileNotFoundError):
            with suppress(OSError):  # its interface is gone
                bpf.detach(path)
            os.unlink(path)


def detach(name: str, bare: Container[int]) -> None:
    """Take away what was attached as `name` by clsact in this network namespace; twice does no harm.

    `bare` are the interfaces whose qdisc is removed if nothing else has come to use it.
    """
    with closing(Route()) as route:
        for interface in sorted(_equipped(route)):
            filters = list(_filters(route, interface))
            for one in filters:
                if one.name == name:
                    _delete_filter(route, one)
            if interface in bare and all(one.name == name for one in filters):
                _delete_qdisc(route, interface)


def _equipped(route: Route) -> set[int]:
    """The interfaces with a qdisc at which ingress filters can be."""
    bodies = route.dump(_RTM_GETQDISC, _MESSAGE.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
    return {_MESSAGE.unpack_from(one)[1] for one in bodies if _kind(one) in _KINDS}


def _kind(body: bytes) -> bytes:
    return attributes(body[_MESSAGE.size :]).get(_TCA_KIND, b"")


def _filters(route: Route, interface: int) -> Iterator[Filter]:
    for parent in (_INGRESS, _EGRESS):
        question = _MESSAGE.pack(socket.AF_UNSPEC, interface, 0, parent, 0)
        for body in list(route.dump(_RTM_GETTFILTER, question)):
            _, index, handle, _, info = _MESSAGE.unpack_from(body)
            if not handle:  # the head of a list of filters, told beside them
                continue
            found = attributes(body[_MESSAGE.size :])
            name = b""
            if found.get(_TCA_KIND) == b"bpf\0":
                name = attributes(found.get(_TCA_OPTIONS, b"")).get(_TCA_BPF_NAME, b"")
            yield Filter(index, parent, handle, info, name.rstrip(b"\0").decode(errors="replace"))


def _delete_filter(route: Route, one: Filter) -> None:
    body = _MESSAGE.pack(socket.AF_UNSPEC, one.interface, one.handle, one.parent, one.info)
    with suppress(FileNotFoundError):
        route.request(_RTM_DELTFILTER, 0, body + attribute(_TCA_KIND, b"bpf\0"))


def _delete_qdisc(route: Route, interface: int) -> None:
    with suppress(FileNotFoundError):
        route.request(_RTM_DELQDISC, 0, _MESSAGE.pack(socket.AF_UNSPEC, interface, _QDISC, _QDISC_PARENT, 0))


def _mount_bpf() -> None:
    if bpf.file_system_type(BPF_FS) != _BPF_FS_MAGIC:
        places.mount("bpf", BPF_FS, "bpf")
