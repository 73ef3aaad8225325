"""What this host can do for the engine, found by doing it: a kernel version or a configuration file says less.

What changes the state of a process is tried in a forked child, in namespaces of its own where it would be seen.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import mmap
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .network import bpf, ingress
from .network.ingress import BPF_FS, Method
from .syscalls import NR

_libc = ctypes.CDLL(None, use_errno=True)

Weight: TypeAlias = Literal["required", "improves"]

# Bits of /proc/self/status CapEff (capability.h) that the engine uses, with what each is for.
CAPABILITIES = {
    "CHOWN": (0, "give restored files their owners"),
    "DAC_OVERRIDE": (1, "read and write files of any owner"),
    "FOWNER": (3, "set modes of restored files"),
    "KILL": (5, "stop a copy"),
    "SETGID": (6, "restore groups"),
    "SETUID": (7, "restore users"),
    "SETPCAP": (8, "restore capability sets"),
    "NET_ADMIN": (12, "TCP repair, moving addresses, holding packets"),
    "NET_RAW": (13, "restore raw sockets"),
    "IPC_LOCK": (14, "restore locked memory"),
    "SYS_CHROOT": (18, "restore roots"),
    "SYS_PTRACE": (19, "stop and read processes"),
    "SYS_ADMIN": (21, "namespaces, cgroups, seccomp"),
    "SYS_NICE": (23, "restore priorities"),
    "BPF": (39, "hold packets"),
}


@dataclass(frozen=True)
class Probe:
    """One answer. `detail` says what was found, `needed_for` what depends on it, `advice` what would change it.

    Without a `required` ability nothing moves; what `improves` has a fallback, or matters to some programs only.
    """

    name: str
    ok: bool
    weight: Weight
    detail: str
    needed_for: str
    advice: str = ""


def probe_all() -> list[Probe]:
    """Ask everything; about 50 ms."""
    return [probe() for probe in _probes]


_probes: list[Callable[[], Probe]] = []


def _probe(function: Callable[[], Probe]) -> Callable[[], Probe]:
    _probes.append(function)
    return function


def _verdict(
    name: str, error: int, needed_for: str, advice: str, *, weight: Weight = "required", found: str = "works"
) -> Probe:
    """A probe from an errno, 0 meaning that it worked."""
    detail = found if not error else f"{errno.errorcode.get(error, error)}: {os.strerror(error)}"
    return Probe(name, not error, weight, detail, needed_for, "" if not error else advice)


def _syscall(nr: NR, *args: object) -> int:
    """The raw system call: its result, or OSError."""
    result = int(_libc.syscall(ctypes.c_long(nr), *args))
    if result == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _error_of(action: Callable[[], object]) -> int:
    """0, or the errno that the action fails with."""
    try:
        action()
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _in_child(action: Callable[[], object], flags: int = 0) -> int:
    """The errno that the action fails with in a forked child, after unshare(flags) there; 0 if it works."""
    pid = os.fork()
    if pid == 0:
        code = 255
        try:
            code = _error_of(lambda: _unshare(flags)) if flags else 0
            code = code or _error_of(action)
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    return os.WEXITSTATUS(status) if os.WIFEXITED(status) else errno.EFAULT


_CLONE_NEWTIME, _CLONE_NEWNET, _CLONE_NEWNS = 0x80, 0x40000000, 0x20000


def _unshare(flags: int) -> None:
    if _libc.unshare(flags):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


@_probe
def kernel() -> Probe:
    """Debian 12's kernel is the oldest."""
    release = os.uname().release
    major, minor = (int("".join(filter(str.isdigit, part)) or 0) for part in release.split(".")[:2])
    ok = (major, minor) >= (6, 1)
    return Probe("kernel", ok, "required", release, "everything", "" if ok else "run Linux 6.1 or newer")


@_probe
def architecture() -> Probe:
    """The engine's register, vDSO and system call code is written for one architecture so far."""
    ok = os.uname().machine == "x86_64" and sys.maxsize > 2**32
    advice = "" if ok else "phaul runs on x86-64 only"
    return Probe("architecture", ok, "required", os.uname().machine, "everything", advice)


@_probe
def capabilities() -> Probe:
    """All at once, naming those that lack and what they are for."""
    held = _effective()
    lacking = [name for name, (bit, _) in CAPABILITIES.items() if not held >> bit & 1]
    text = "; ".join(f"CAP_{name} ({CAPABILITIES[name][1]})" for name in lacking)
    advice = "run as root, in the initial user namespace" if lacking else ""
    return Probe("capabilities", not lacking, "required", f"lacking {text}" if text else "all", "everything", advice)


@_probe
def resources() -> Probe:
    """CAP_SYS_RESOURCE is often withheld in containers."""
    ok = bool(_effective() >> 24 & 1)
    return Probe(
        "CAP_SYS_RESOURCE",
        ok,
        "improves",
        "held" if ok else "not held",
        "raising hard limits, a lowered oom_score_adj, pipes over 1 MiB",
        "" if ok else "grant the capability where a program needs one of these",
    )


def _effective() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))


@_probe
def ptrace_scope() -> Probe:
    """Yama can forbid ptrace even to root (Documentation/admin-guide/LSM/Yama.rst)."""
    try:
        with open("/proc/sys/kernel/yama/ptrace_scope") as file:
            scope = int(file.read())
    except FileNotFoundError:
        return Probe("ptrace", True, "required", "Yama is not active", "stopping programs")
    advice = "" if scope < 3 else "boot with kernel.yama.ptrace_scope below 3; it cannot be lowered at run time"
    return Probe("ptrace", scope < 3, "required", f"Yama's ptrace_scope is {scope}", "stopping programs", advice)


@_probe
def checkpoint_restore() -> Probe:
    """CONFIG_CHECKPOINT_RESTORE: PR_GET_TID_ADDRESS (40 in prctl.h) exists only with it."""
    address = ctypes.c_void_p()
    error = 0 if _libc.prctl(40, ctypes.byref(address)) == 0 else ctypes.get_errno()
    advice = "use a kernel with CONFIG_CHECKPOINT_RESTORE (every distribution's)"
    return _verdict("checkpoint-restore", error, "reading and rebuilding processes", advice)


@_probe
def cgroup2() -> Probe:
    """The freezer of a cgroup v2 holds the tree. It may be mounted anywhere, or privately by us."""

    def mount() -> None:
        if _libc.mount(None, b"/", None, 0x44000, None):  # MS_REC | MS_PRIVATE: nothing leaves this namespace
            raise OSError(ctypes.get_errno(), "mount")
        if _libc.mount(b"none", b"/tmp", b"cgroup2", 0, None):
            raise OSError(ctypes.get_errno(), "mount")

    error = _in_child(mount, _CLONE_NEWNS)
    return _verdict(
        "cgroup2", error, "holding the program still", "use a kernel with cgroup v2, in its host's namespace"
    )


@_probe
def pidfd_getfd() -> Probe:
    """Duplicates of a program's descriptors, from outside."""

    def take() -> None:
        pidfd = os.pidfd_open(os.getpid())
        try:
            os.close(_syscall(NR.pidfd_getfd, pidfd, pidfd, 0))
        finally:
            os.close(pidfd)

    return _verdict("pidfd_getfd", _error_of(take), "reading descriptors", "seccomp of a container may forbid it")


class _CloneArgs(ctypes.Structure):
    """struct clone_args (linux/sched.h) up to set_tid_size, its second published size."""

    _fields_ = (
        ("unused", ctypes.c_uint64 * 4),  # flags, pidfd, child_tid, parent_tid
        ("exit_signal", ctypes.c_uint64),
        ("stack", ctypes.c_uint64 * 3),  # stack, stack_size, tls
        ("set_tid", ctypes.c_uint64),
        ("set_tid_size", ctypes.c_uint64),
    )


@_probe
def set_tid() -> Probe:
    """A process born with a chosen PID. Tried on one that was free a moment ago."""

    def clone() -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        wanted = ctypes.c_int32(pid)
        args = _CloneArgs(exit_signal=signal.SIGCHLD, set_tid=ctypes.addressof(wanted), set_tid_size=1)
        child = _syscall(NR.clone3, ctypes.byref(args), ctypes.sizeof(args))
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)

    error = _in_child(clone)
    error = 0 if error == errno.EEXIST else error  # somebody was faster; being asked is all we wanted
    return _verdict("clone3 set_tid", error, "processes that keep their PIDs", "needs CAP_CHECKPOINT_RESTORE")


@_probe
def time_namespaces() -> Probe:
    """CLOCK_MONOTONIC and CLOCK_BOOTTIME that go on (time_namespaces(7))."""

    def shift() -> None:
        with open("/proc/self/timens_offsets", "w") as file:
            file.write("monotonic 3600 0\nboottime 3600 0\n")

    error = _in_child(shift, _CLONE_NEWTIME)
    return _verdict("time namespaces", error, "clocks that go on", "use a kernel with CONFIG_TIME_NS")


@_probe
def dirty_tracking() -> Probe:
    """Pre-copy needs one of the two; without, every migration is --stop-copy."""
    asynchronous, soft = _wp_async(), _soft_dirty()
    names = [name for name, error in (("userfaultfd WP_ASYNC", asynchronous), ("soft-dirty", soft)) if not error]
    reason = f"userfaultfd WP_ASYNC: {os.strerror(asynchronous)}; soft-dirty: {os.strerror(soft)}"
    return Probe(
        "dirty tracking",
        bool(names),
        "required",
        " and ".join(names) or reason,
        "sending memory while the program runs",
        "" if names else "use Linux 6.7 or newer, or a kernel with CONFIG_MEM_SOFT_DIRTY",
    )


_UFFDIO_API, _UFFD_API, _WP_ASYNC_FEATURES = 0xC018AA3F, 0xAA, 1 << 15 | 1 << 13  # WP_ASYNC, WP_UNPOPULATED
_PAGEMAP_SCAN = 0xC0606610


def _wp_async() -> int:
    def ask() -> None:
        uffd = _syscall(NR.userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK | 1)  # 1: UFFD_USER_MODE_ONLY
        try:
            fcntl.ioctl(uffd, _UFFDIO_API, struct.pack("QQQ", _UFFD_API, _WP_ASYNC_FEATURES, 0))
        finally:
            os.close(uffd)
        # struct pm_scan_arg (fs.h) over an empty range: ENOTTY where the ioctl does not exist
        with open("/proc/self/pagemap", "rb") as pagemap:
            fcntl.ioctl(pagemap, _PAGEMAP_SCAN, struct.pack("12Q", 96, *[0] * 11))

    return _error_of(ask)


def _soft_dirty() -> int:
    """clear_refs accepts 4 without the feature, too: only a page that was written and then is marked proves it."""

    def marked(address: int) -> bool:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(address // mmap.PAGESIZE * 8)
            return bool(struct.unpack("Q", pagemap.read(8))[0] >> 55 & 1)

    def try_page() -> None:
        with mmap.mmap(-1, mmap.PAGESIZE) as page:
            page[0] = 1
            address = ctypes.addressof(ctypes.c_char.from_buffer(page))
            with open("/proc/self/clear_refs", "w") as file:
                file.write("4")
            before = marked(address)
            page[0] = 2
            after = marked(address)
            os._exit(0 if after and not before else errno.EOPNOTSUPP)

    return _in_child(try_page)


_TCP_REPAIR, _TCP_ULP = 19, 31


@_probe
def tcp_repair() -> Probe:
    """Established connections are read and rebuilt in this mode."""

    def repair() -> None:
        with socket.socket() as sock:
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, -1)

    return _verdict("TCP_REPAIR", _error_of(repair), "moving TCP connections", "needs CAP_NET_ADMIN")


@_probe
def sock_diag() -> Probe:
    """What sockets are connected to (sock_diag(7))."""

    def ask() -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 4) as sock:  # NETLINK_SOCK_DIAG
            sock.settimeout(1)
            sock.bind((0, 0))
            # struct nlmsghdr with NLM_F_REQUEST | NLM_F_DUMP, then struct unix_diag_req
            request = struct.pack("=BBHIII2I", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, 0, 0, 0)
            sock.send(struct.pack("=IHHII", 16 + len(request), 20, 0x301, 1, 0) + request)
            kind, _, _, _, code = struct.unpack_from("=HHIIi", sock.recv(65536), 4)
            if kind == 2:  # NLMSG_ERROR
                raise OSError(-code, os.strerror(-code))

    advice = "load the modules unix_diag, tcp_diag and udp_diag"
    return _verdict("sock_diag", _error_of(ask), "moving sockets", advice)


@_probe
def tun() -> Probe:
    """Packets that arrive in the freeze are caught in a TAP device and injected by one at the destination."""

    def tap() -> None:
        fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", b"probe", 0x1002))  # TUNSETIFF, IFF_TAP | IFF_NO_PI

    error = _in_child(tap, _CLONE_NEWNET)
    advice = "load the module tun; in a container allow the device /dev/net/tun"
    return _verdict("TAP devices", error, "losing no packet in the freeze", advice, weight="improves")


@_probe
def steal() -> Probe:
    """What takes the packets of the moving sockets aside (network/ingress.py), tried on lo in a child."""
    ways = {method: _in_child(functools.partial(_steal, method), _CLONE_NEWNET | _CLONE_NEWNS) for method in Method}
    works = next((method for method, error in ways.items() if not error), None)
    reasons = "; ".join(f"{method.value}: {os.strerror(error)}" for method, error in ways.items() if error)
    return Probe(
        "packet hold",
        works is not None,
        "improves",
        f"by {works.value}" + (f" ({reasons})" if reasons and works is not Method.TCX else "") if works else reasons,
        "moving sockets whose packets must not be dropped",
        "" if works else "allow bpf(2); load the modules cls_bpf and sch_ingress, or use Linux 6.6 or newer",
    )


def _steal(method: Method) -> None:
    """Attach a program as a hold does. The mount namespace and its bpf file system are this child's."""
    if _libc.mount(None, b"/", None, 0x44000, None) or _libc.mount(b"bpf", BPF_FS.encode(), b"bpf", 0, None):
        raise OSError(ctypes.get_errno(), "mount")
    code = bpf.Assembler()
    code.set(0, bpf.NEXT)
    code.exit()
    ingress.attach(method, bpf.load(code.assemble(), "phaul_probe"), socket.if_nametoindex("lo"), "phaul-probe")


@_probe
def bpffs() -> Probe:
    """The steal is pinned there, so that an agent's death leaves a drop and never an open socket."""

    def find() -> None:
        with open("/proc/self/mountinfo") as file:
            if not any(" - bpf " in line for line in file):
                raise OSError(errno.ENOENT, "")

    advice = "mount -t bpf bpf /sys/fs/bpf"
    return _verdict(
        "bpffs", _error_of(find), "a hold that outlives a crash", advice, weight="improves", found="mounted"
    )


@_probe
def ktls() -> Probe:
    """ENOTCONN for an unconnected socket where the kernel has it, ENOENT where not."""

    def attach() -> None:
        with socket.socket() as sock:
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_ULP, b"tls")

    error = _error_of(attach)
    error = 0 if error == errno.ENOTCONN else error
    return _verdict("kTLS", error, "a cheaper page stream", "load the module tls", weight="improves")


@_probe
def kcmp() -> Probe:
    """Tells which descriptors are one description; asked here about the address space (KCMP_VM, 1)."""
    pid = os.getpid()
    error = _error_of(lambda: _syscall(NR.kcmp, pid, pid, 1, 0, 0))
    return _verdict("kcmp", error, "sharing as it was", "use a kernel with CONFIG_KCMP")
