"""System calls that the engine makes on its own behalf and for which Python has no name.

Every function raises `OSError` when its call fails. Descriptors that come out are close-on-exec.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from phaul_engine.syscalls import NR

Result = TypeVar("Result")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

_PR_SCHED_CORE, _CORE_GET, _PIDTYPE_PID = 62, 0, 0
_KCMP_FILE = 0
KCMP_VM, KCMP_FILES, KCMP_FS, KCMP_SIGHAND = 1, 2, 3, 4
_KCMP_EPOLL_TFD = 7
_PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP = 28, 1 << 2
_CLONE_FILES = 0x400
_AT_EMPTY_PATH = 0x1000
_AT_STATX_FORCE_SYNC = 0x2000
_AT_NO_AUTOMOUNT = 0x800
_STATX_BASIC_STATS = 0x7FF
_STATX_SIZE = 256
_STATX_MNT_ID, _STATX_MNT_ID_AT = 0x1000, 0x90
_SPLICE_F_NONBLOCK = 2
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08
_RESOLVE_IN_ROOT = 0x10
_TFD_IOC_SET_TICKS = 0x40085400
_F_GETSIG = 11
_F_SETOWN_EX = 15
_F_GETOWN_EX = 16
_F_GETOWNER_UIDS = 17
_F_GET_SEALS = 1034
_F_ADD_SEALS = 1033
_MAX_HANDLE = 128
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2

_itimerspec = struct.Struct("<4q")
_epoll_event = struct.Struct("<IQ")  # packed on x86-64 (include/uapi/linux/eventpoll.h)


# The same function with whole numbers only, which ctypes passes several times faster.
_numbers = ctypes.CDLL(None, use_errno=True).syscall
_numbers.restype = ctypes.c_long
_numbers.argtypes = [ctypes.c_long] * 6


def _call_numbers(nr: NR, a: int, b: int, c: int = 0, d: int = 0, e: int = 0) -> int:
    result: int = _numbers(nr, a, b, c, d, e)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), nr.name)
    return result


def system_call(nr: NR, *args: int | bytes | ctypes.Array[ctypes.c_char] | None, what: str = "") -> int:
    """What a system call returns; OSError, with `what` it is about, if that is an error."""
    values = [ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args]
    result: int = _libc.syscall(ctypes.c_long(nr), *values)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), what or nr.name)
    return result


def pidfd_getfd(pidfd: int, fd: int) -> int:
    """A duplicate of descriptor `fd` of another process: the very same open file description (pidfd_getfd(2))."""
    return _call_numbers(NR.pidfd_getfd, pidfd, fd)


def kcmp(left: int, right: int, what: int) -> int:
    """0 if two tasks share the object `what` (KCMP_VM, ...), else 1 or 2: an order (kcmp(2))."""
    return _call_numbers(NR.kcmp, left, right, what)


def compare_descriptions(left: int, right: int) -> int:
    """-1, 0 or 1: an order of open file descriptions, 0 if two of our descriptors share one (kcmp(2), KCMP_FILE).

    The order is the kernel's and holds until the next boot.
    """
    me = os.getpid()
    return (0, -1, 1)[_call_numbers(NR.kcmp, me, me, _KCMP_FILE, left, right)]


def is_epoll_target(fd: int, epoll: int, tfd: int, index: int) -> bool:
    """Whether our `fd` is what `epoll` (ours) watches under number `tfd`, the `index`-th of that number.

    kcmp(2), KCMP_EPOLL_TFD. Several registrations may bear one number when it was closed and used again. One that is
    not there any more is of nothing.
    """
    me = os.getpid()
    slot = ctypes.create_string_buffer(struct.pack("<3I", epoll, tfd, index), 12)
    try:
        return system_call(NR.kcmp, me, me, _KCMP_EPOLL_TFD, fd, slot) == 0
    except FileNotFoundError:
        return False


def epoll_add(epoll: int, fd: int, events: int, data: int) -> None:
    """EPOLL_CTL_ADD with all 64 bits of data."""
    event = ctypes.create_string_buffer(_epoll_event.pack(events, data), _epoll_event.size)
    system_call(NR.epoll_ctl, epoll, 1, fd, event)


def epoll_collect(epoll: int, most: int) -> int:
    """Take up to `most` events that are ready now out of an epoll instance; their number."""
    room = ctypes.create_string_buffer(_epoll_event.size * most)
    return system_call(NR.epoll_wait, epoll, room, most, 0)


def epoll_modify(epoll: int, fd: int, events: int, data: int) -> None:
    """EPOLL_CTL_MOD with all 64 bits of data."""
    event = ctypes.create_string_buffer(_epoll_event.pack(events, data), _epoll_event.size)
    system_call(NR.epoll_ctl, epoll, 3, fd, event)


def epoll_delete(epoll: int, fd: int) -> None:
    """EPOLL_CTL_DEL of what our table has at `fd`."""
    system_call(NR.epoll_ctl, epoll, 2, fd, None)


def core_cookie(tid: int) -> int:
    """PR_SCHED_CORE_GET of a task (prctl(2)); 0 where the kernel has none."""
    cookie = ctypes.c_uint64()
    prctl: Any = _libc.prctl
    return int(cookie.value) if prctl(_PR_SCHED_CORE, _CORE_GET, tid, _PIDTYPE_PID, ctypes.byref(cookie)) == 0 else 0


def tee(source: int, target: int, size: int) -> int:
    """Duplicate up to `size` bytes from pipe to pipe without taking them out; the number of bytes (tee(2))."""
    return system_call(NR.tee, source, target, size, _SPLICE_F_NONBLOCK)


def signalfd(fd: int, mask: int, flags: int) -> int:
    """A signalfd for the signals of `mask` (bit N-1 is signal N): a new one if `fd` is -1, else `fd` changed."""
    return system_call(NR.signalfd4, fd, ctypes.create_string_buffer(struct.pack("<Q", mask), 8), 8, flags)


def timerfd_create(clock: int, flags: int) -> int:
    """A timerfd (timerfd_create(2))."""
    return system_call(NR.timerfd_create, clock, flags)


def timerfd_gettime(fd: int) -> tuple[int, int]:
    """Time left and interval, in nanoseconds. A periodic timer that has expired is set going again by this call."""
    room = ctypes.create_string_buffer(_itimerspec.size)
    system_call(NR.timerfd_gettime, fd, room)
    interval_s, interval_ns, value_s, value_ns = _itimerspec.unpack(room.raw)
    return value_s * 1_000_000_000 + value_ns, interval_s * 1_000_000_000 + interval_ns


def timerfd_settime(fd: int, flags: int, value: int, interval: int) -> None:
    """Arm a timerfd; nanoseconds, 0 disarms (timerfd_settime(2))."""
    spec = _itimerspec.pack(*divmod(interval, 1_000_000_000), *divmod(value, 1_000_000_000))
    system_call(NR.timerfd_settime, fd, flags, ctypes.create_string_buffer(spec, _itimerspec.size), None)


def timerfd_set_ticks(fd: int, ticks: int) -> None:
    """Make a timerfd hold `ticks` unread expirations, at least one."""
    fcntl.ioctl(fd, _TFD_IOC_SET_TICKS, struct.pack("<Q", ticks))


def inotify_init(flags: int) -> int:
    """An inotify instance."""
    return system_call(NR.inotify_init1, flags)


def inotify_add_watch(fd: int, path: str, mask: int) -> int:
    """Watch a path; the watch's number."""
    return system_call(NR.inotify_add_watch, fd, ctypes.create_string_buffer(os.fsencode(path)), mask)


def inotify_rm_watch(fd: int, wd: int) -> None:
    """Remove a watch; an IN_IGNORED event is queued."""
    system_call(NR.inotify_rm_watch, fd, wd)


def open_in_root(root: int, path: str, flags: int, mode: int = 0) -> int:
    """Open `path` as a process with root directory `root` would, never leaving it (openat2(2), RESOLVE_IN_ROOT)."""
    how = struct.pack("<3Q", flags | os.O_CLOEXEC, mode, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    name = ctypes.create_string_buffer(os.fsencode(path))
    return system_call(NR.openat2, root, name, ctypes.create_string_buffer(how, len(how)), len(how), what=path)


def open_beneath(directory: int, path: str, flags: int, mode: int = 0) -> int:
    """Open `path`, which is below a directory and leads there without any link (openat2(2), RESOLVE_BENEATH)."""
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS
    how = struct.pack("<3Q", flags | os.O_CLOEXEC, mode, resolve)
    name = ctypes.create_string_buffer(os.fsencode(path))
    return system_call(NR.openat2, directory, name, ctypes.create_string_buffer(how, len(how)), len(how), what=path)


def punch_hole(fd: int, offset: int, size: int) -> None:
    """Give back a part of a file, which is read as zeros then (fallocate(2), FALLOC_FL_PUNCH_HOLE)."""
    system_call(NR.fallocate, fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, size)


def link_descriptor(fd: int, directory: int, name: str) -> None:
    """Give the file that `fd` refers to another name (linkat(2), AT_EMPTY_PATH; it must have one already)."""
    system_call(NR.linkat, fd, b"", directory, os.fsencode(name), _AT_EMPTY_PATH, what=name)


def open_by_handle(mount: int, kind: int, handle: bytes, flags: int) -> int:
    """Open the file with this handle on the file system that `mount`, a descriptor, lies on."""
    if len(handle) > _MAX_HANDLE:
        raise ValueError(f"a file handle of {len(handle)} bytes")
    text = struct.pack("<Ii", len(handle), kind) + handle
    return system_call(NR.open_by_handle_at, mount, ctypes.create_string_buffer(text, len(text)), flags | os.O_CLOEXEC)


@dataclass(frozen=True)
class SignalOwner:
    """Who gets SIGIO for a description: `kind` is 0 thread, 1 process, 2 process group (F_SETOWN_EX in fcntl(2))."""

    kind: int
    pid: int
    uid: int
    euid: int


def get_owner(fd: int) -> SignalOwner:
    """The signal owner of a description; pid 0 if there is none or it has ended."""
    kind, pid = struct.unpack("<ii", fcntl.fcntl(fd, _F_GETOWN_EX, bytes(8)))
    if not pid:
        return SignalOwner(0, 0, 0, 0)
    uid, euid = struct.unpack("<II", fcntl.fcntl(fd, _F_GETOWNER_UIDS, bytes(8)))
    return SignalOwner(kind, pid, uid, euid)


def signal_state(fd: int) -> tuple[bytes, int]:
    """What a description's signals are set to, to be compared only: owner, and signal (F_GETSIG)."""
    return fcntl.fcntl(fd, _F_GETOWN_EX, bytes(8)), fcntl.fcntl(fd, _F_GETSIG)


def set_owner(fd: int, owner: SignalOwner) -> None:
    """Set the signal owner. The kernel notes the caller's user ids, so they are changed for the call, in a thread."""

    def act() -> None:
        if (owner.uid, owner.euid) != (os.getuid(), os.geteuid()):
            system_call(NR.setresuid, owner.uid, owner.euid, -1)  # the raw call changes the calling thread alone
        fcntl.fcntl(fd, _F_SETOWN_EX, struct.pack("<ii", owner.kind, owner.pid))

    apart(act)


def get_seals(fd: int) -> int:
    """A memory file's seals (F_GET_SEALS)."""
    return fcntl.fcntl(fd, _F_GET_SEALS)


def add_seals(fd: int, seals: int) -> None:
    """Seal a memory file (F_ADD_SEALS)."""
    fcntl.fcntl(fd, _F_ADD_SEALS, seals)


def apart(act: Callable[[], Result]) -> Result:
    """Run `act` in a thread with a descriptor table and credentials of its own; its result or its exception.

    The table begins as a copy of ours: `act` may put descriptors at any number, all of them are gone afterwards.
    """

    def run() -> Result:
        system_call(NR.unshare, _CLONE_FILES)
        return act()

    return in_thread(run)


def acting(uid: int, gid: int, act: Callable[[], Result]) -> Result:
    """Run `act` in a thread with these effective ids; it keeps our capabilities (SECBIT_NO_SETUID_FIXUP)."""

    def run() -> Result:
        system_call(NR.prctl, _PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
        system_call(NR.setresgid, -1, gid, -1)  # the raw calls change the calling thread alone
        system_call(NR.setresuid, -1, uid, -1)
        return act()

    return in_thread(run)


def filing(uid: int, gid: int, act: Callable[[], Result]) -> Result:
    """Run `act` in a thread that makes files as this user and group (setfsuid(2)); it keeps our capabilities."""

    def run() -> Result:
        system_call(NR.prctl, _PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP, 0, 0, 0)
        for number, wanted in ((NR.setfsgid, gid), (NR.setfsuid, uid)):
            system_call(number, wanted)  # what it returns is the id before
        return act()

    return in_thread(run)


def in_thread(act: Callable[[], Result]) -> Result:
    """Run `act` in a thread of its own, for what is a thread's: ids, groups, root."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(act())
        except BaseException as error:  # goes on in the caller
            errors.append(error)

    thread = threading.Thread(target=run, name="phaul-apart")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def file_system(fd: int) -> int:
    """The magic number of the file system that a descriptor lies on (statfs(2), f_type)."""
    room = ctypes.create_string_buffer(256)
    system_call(NR.fstatfs, fd, room)
    return int.from_bytes(room.raw[:8], "little")


_IPC_CREAT, _IPC_EXCL = 0o1000, 0o2000
_IPC_RMID, _IPC_SET, _IPC_STAT, _GETPID = 0, 1, 2, 11


def refresh_status(fd: int) -> None:
    """Have a network file system ask its server for the state of a file (statx(2), AT_STATX_FORCE_SYNC)."""
    flags = _AT_EMPTY_PATH | _AT_STATX_FORCE_SYNC
    room = ctypes.create_string_buffer(_STATX_SIZE)
    system_call(NR.statx, fd, ctypes.create_string_buffer(b""), flags, _STATX_BASIC_STATS, room)


def mount_id(fd: int) -> int:
    """The number that the mount of a descriptor's file has in mountinfo (statx(2), Linux 5.8)."""
    room = ctypes.create_string_buffer(_STATX_SIZE)
    flags = _AT_EMPTY_PATH | _AT_NO_AUTOMOUNT
    system_call(NR.statx, fd, ctypes.create_string_buffer(b""), flags, _STATX_MNT_ID, room)
    return int.from_bytes(room.raw[_STATX_MNT_ID_AT : _STATX_MNT_ID_AT + 8], "little")


def shm_status(ident: int, size: int) -> bytes:
    """struct shmid64_ds, `size` bytes, of a System V shared memory segment (shmctl(2), IPC_STAT)."""
    buffer = ctypes.create_string_buffer(size)
    system_call(NR.shmctl, ident, _IPC_STAT, buffer)
    return buffer.raw


def shm_create(key: int, size: int, mode: int) -> int:
    """The id of a new System V shared memory segment (shmget(2)); FileExistsError if the key is taken."""
    return system_call(NR.shmget, key, size, _IPC_CREAT | _IPC_EXCL | mode)


def shm_own(ident: int, uid: int, gid: int, mode: int) -> None:
    """Give a segment its owner and permissions (shmctl(2), IPC_SET)."""
    buffer = ctypes.create_string_buffer(struct.pack("<i5I", 0, uid, gid, 0, 0, mode), 112)
    system_call(NR.shmctl, ident, _IPC_SET, buffer)


def shm_remove(ident: int) -> None:
    """Remove a segment, once nobody has it attached any more (shmctl(2), IPC_RMID)."""
    system_call(NR.shmctl, ident, _IPC_RMID, 0)


def semaphore_user(ident: int, number: int) -> int:
    """The process that was the last to operate on a System V semaphore, 0 if there was none (semctl(2), GETPID)."""
    return system_call(NR.semctl, ident, number, _GETPID, 0)


def shm_attach(ident: int) -> int:
    """Attach a segment to our own memory, and where (shmat(2))."""
    return system_call(NR.shmat, ident, 0, 0)


def shm_detach(address: int) -> None:
    """Detach what is attached at an address (shmdt(2))."""
    system_call(NR.shmdt, address)
