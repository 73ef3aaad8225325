"""Words for what no module carries: which kind of object a descriptor is, why it stays, and what to do about it."""

from __future__ import annotations

import os
import socket
import stat
from dataclasses import dataclass

from .base import Collection, Descriptor


@dataclass(frozen=True)
class _Words:
    kind: str
    why: str
    advice: str


_CLOSE = "let the program close it before it moves"
_ANONYMOUS = {
    "[io_uring]": _Words(
        "an io_uring instance",
        "the kernel has no way to read its requests and registered buffers",
        "run the program without io_uring (most have a switch), or sysctl kernel.io_uring_disabled=2 before its start",
    ),
    "[userfaultfd]": _Words("a userfaultfd", "the pages it answers for are supplied by the program itself", _CLOSE),
    "[fanotify]": _Words("a fanotify group", "its permission events and marks on mounts belong to this host", _CLOSE),
    "[perf_event]": _Words("a perf event", "hardware counters do not move between hosts", _CLOSE),
    "bpf-map": _Words("a BPF map", "programs in this host's kernel may use it", _CLOSE),
    "bpf-prog": _Words("a BPF program", "it is loaded into this host's kernel", _CLOSE),
    "bpf_link": _Words("a BPF link", "it is attached to this host's kernel", _CLOSE),
    "bpf-link": _Words("a BPF link", "it is attached to this host's kernel", _CLOSE),
    "btf": _Words("BPF type information", "it is loaded into this host's kernel", _CLOSE),
    "kvm-vm": _Words(
        "a KVM virtual machine", "its state is in this host's kernel", "migrate the guest from within qemu"
    ),
    "kvm-vcpu": _Words("a KVM processor", "its state is in this host's kernel", "migrate the guest from within qemu"),
    "[landlock-ruleset]": _Words("a Landlock rule set", "the kernel does not tell the rules of one", _CLOSE),
    "seccomp notify": _Words("a seccomp listener", "requests of other processes wait in it", _CLOSE),
    "[fscontext]": _Words("a mount being prepared", "the kernel does not tell its options", _CLOSE),
    "[secretmem]": _Words("a secret memory file", "the kernel gives its pages to nobody", _CLOSE),
    "dmabuf": _Words("a DMA buffer", "it belongs to a device of this host", _CLOSE),
    "sync_file": _Words("a fence of a device", "it belongs to a device of this host", _CLOSE),
    "[vfio-device]": _Words("a VFIO device", "it belongs to this host", _CLOSE),
}
_LINKS = {
    "/secretmem": _ANONYMOUS["[secretmem]"],
    "/dmabuf": _ANONYMOUS["dmabuf"],
}
_DEVICES = {
    (10, 232): _Words("the KVM device", "its virtual machines are in this host's kernel", "migrate from within qemu"),
    (10, 229): _Words("a FUSE connection", "the file system it serves is mounted on this host", _CLOSE),
    (1, 1): _Words("this host's physical memory", "the other host has another", _CLOSE),
    (1, 11): _Words("this host's kernel log", "the other host has another", _CLOSE),
    (10, 183): _Words("the hardware random generator", "it belongs to this host", "use /dev/urandom"),
}
_MAJORS = {
    195: _Words("an NVIDIA device", "memory and contexts of a GPU are not carried", _CLOSE),
    226: _Words("a graphics device", "memory and contexts of a GPU are not carried", _CLOSE),
    116: _Words("a sound device", "it belongs to this host", _CLOSE),
    13: _Words("an input device", "it belongs to this host", _CLOSE),
    4: _Words("a console or serial line", "it belongs to this host", "start the program without a terminal"),
    5: _Words("a terminal", "it belongs to a session outside of the tree", "start the program with setsid or nohup"),
}
_PACKETS = _Words("a packet socket", "it takes frames from this host's network devices", "end the capture first")
_IPPROTO_SCTP = 132
_FAMILIES = {
    15: _Words("a key management socket (PF_KEY)", "it configures IPsec in this host's kernel", _CLOSE),
    17: _Words(
        "a packet socket", "it takes frames from this host's network devices", "end the capture, or let it close"
    ),
    29: _Words("a CAN socket", "it belongs to a bus of this host", _CLOSE),
    31: _Words("a Bluetooth socket", "it belongs to a device of this host", _CLOSE),
    38: _Words("a socket of the kernel's cryptography", "keys and state cannot be read back", _CLOSE),
    40: _Words("a socket to a virtual machine or its host (AF_VSOCK)", "the other end does not move", _CLOSE),
    41: _Words("a kernel connection multiplexor (AF_KCM)", "a BPF program of this host's kernel serves it", _CLOSE),
    43: _Words("an SMC socket", "its buffers belong to an RDMA device of this host", _CLOSE),
    44: _Words("an XDP socket", "it shares memory with a network device of this host", _CLOSE),
}
_FILES_OF_AREAS = {
    "/[aio]": _Words(
        "the ring of an asynchronous I/O context (io_setup)",
        "its requests are in this host's kernel",
        "start the program without native AIO (InnoDB: innodb_use_native_aio=0, nginx: aio off)",
    ),
    "/anon_hugepage": _Words(
        "memory of huge pages (MAP_HUGETLB)",
        "their number is a reserve of this host, and they are not carried",
        "start the program without them (PostgreSQL: huge_pages=off, Java: -XX:-UseLargePages)",
    ),
    "/dev/zero": _Words(
        "a private mapping of shared anonymous memory", "what is still shared in it cannot be told", "start it again"
    ),
    "/SYSV": _Words(
        "a private mapping of System V shared memory", "what is still shared in it cannot be told", "start it again"
    ),
    "socket:": _Words(
        "the ring of a packet socket", "it takes frames from this host's network devices", "end the capture"
    ),
    "anon_inode:[io_uring]": _ANONYMOUS["[io_uring]"],
    "anon_inode:[perf_event]": _ANONYMOUS["[perf_event]"],
    "anon_inode:bpf-map": _ANONYMOUS["bpf-map"],
    "anon_inode:kvm-vcpu": _ANONYMOUS["kvm-vcpu"],
}
# A terminal whose other side stays: kind, why, advice.
TERMINAL = (
    "a terminal",
    "its other side is in a program that stays",
    "start the program with setsid and its descriptors 0 to 2 redirected, or move what holds the terminal too",
)


def block(descriptor: Descriptor, collection: Collection) -> None:
    """Note the blocker for a descriptor that no kind claims."""
    words = _words(descriptor)
    collection.block(descriptor, words.kind, words.why, words.advice)


def block_area(where: str, path: str, collection: Collection) -> None:
    """Note the blocker for an area of a file that is no ordinary one."""
    known = next((words for prefix, words in _FILES_OF_AREAS.items() if path.startswith(prefix)), None)
    words = known or _Words(f"a mapping of {path}", "such memory cannot be carried", "let the program unmap it")
    collection.block(where, words.kind, words.why, words.advice)


def _words(descriptor: Descriptor) -> _Words:
    link, status = descriptor.link, descriptor.status
    kind, _, name = link.partition(":")
    if kind == "anon_inode":
        known = _ANONYMOUS.get(name) or next(
            (words for prefix, words in _ANONYMOUS.items() if name.startswith(prefix)), None
        )
        return known or _Words(f"a kernel object called {name}", "phaul does not know this kind", _CLOSE)
    for prefix, words in _LINKS.items():
        if link.startswith(prefix):
            return words
    if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        return _device(link, status.st_mode, status.st_rdev)
    if stat.S_ISSOCK(status.st_mode):
        with socket.socket(fileno=os.dup(descriptor.own)) as sock:
            family, sort, protocol = int(sock.family), int(sock.type), int(sock.proto)
        if protocol == _IPPROTO_SCTP and family in (socket.AF_INET, socket.AF_INET6):
            return _Words("an SCTP socket", "the kernel cannot rebuild associations", _CLOSE)
        return _FAMILIES.get(family) or _Words(
            f"a socket of family {family}, type {sort} and protocol {protocol} ({link})",
            "phaul does not carry such sockets",
            _CLOSE,
        )
    if link.startswith("/dev/mqueue/"):
        return _Words("a POSIX message queue", "its messages are not carried", _CLOSE)
    if not link.startswith("/"):
        return _Words(f"a handle of a kernel object ({link})", "phaul does not know this kind", _CLOSE)
    return _Words(f"a file of an unknown type ({link})", "phaul does not know this kind", _CLOSE)


def _device(link: str, mode: int, rdev: int) -> _Words:
    major, minor = os.major(rdev), os.minor(rdev)
    if stat.S_ISCHR(mode):
        if 136 <= major <= 143:
            return _Words(*TERMINAL)
        known = _DEVICES.get((major, minor)) or _MAJORS.get(major)
        if known:
            return known
    word = "character" if stat.S_ISCHR(mode) else "block"
    return _Words(
        f"the {word} device {link} ({major}:{minor})", "it belongs to this host and has state in its driver", _CLOSE
    )
