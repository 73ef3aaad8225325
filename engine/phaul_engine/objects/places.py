"""Making an object in a namespace or directory that is not the engine's.

A socket belongs to the network namespace it was made in, and a name given to bind(2) is walked from the caller's root.
Both belong to the thread that calls, so a thread of its own goes there, acts, and ends (setns(2), unshare(2)).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
from collections.abc import Callable, Mapping
from typing import TypeVar

from phaul_engine.calls import in_thread

Result = TypeVar("Result")

_QUICK = frozenset({"ipc", "uts", "cgroup"})  # those that nothing but what is asked there depends on
_CLONE_FS = 0x200
_CLONE_NEWNS = 0x20000
_CLONE_NEWNET = 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_NS_GET_USERNS = 0xB701

_libc = ctypes.CDLL(None, use_errno=True)


def same_namespace(fd: int, name: str) -> bool:
    """Whether `fd` is the calling thread's own namespace `name` ("net", "mnt")."""
    theirs, ours = os.fstat(fd), os.stat(f"/proc/thread-self/ns/{name}")
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


def owner_of(fd: int) -> int:
    """A descriptor of the user namespace that a namespace belongs to (ioctl_ns(2)), to be closed. OSError EPERM if that
    is outside of ours."""
    return fcntl.ioctl(fd, _NS_GET_USERNS)


def in_network(net: int | None, act: Callable[[], Result]) -> Result:
    """Run `act` in the network namespace `net` (a descriptor of it; None is the engine's)."""
    if net is None or same_namespace(net, "net"):
        return act()

    def go() -> Result:
        _libc_call("setns", net, _CLONE_NEWNET)
        return act()

    return in_thread(go)


def inside(namespaces: Mapping[str, int], act: Callable[[], Result]) -> Result:
    """Run `act` in namespaces, descriptors by kind (net, ipc, uts, mnt, cgroup). A process of its own is needed for
    user, pid and time namespaces (`namespaces.inside`)."""

    if namespaces.keys() <= _QUICK:
        return _there_and_back(namespaces, act)

    def go() -> Result:
        if "mnt" in namespaces:
            _libc_call("unshare", _CLONE_FS)
        for name, fd in namespaces.items():
            if not same_namespace(fd, name):
                _libc_call("setns", fd, 0)
        return act()

    return in_thread(go)


def _there_and_back(namespaces: Mapping[str, int], act: Callable[[], Result]) -> Result:
    """In this thread: to begin another takes as long as all else that is done there."""
    with contextlib.ExitStack() as stack:
        for name, fd in namespaces.items():
            if not same_namespace(fd, name):
                own = os.open(f"/proc/thread-self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, own)
                _libc_call("setns", fd, 0)
                stack.callback(_libc_call, "setns", own, 0)
        return act()


def in_root(net: int | None, mnt: int | None, root: int | None, act: Callable[[], Result]) -> Result:
    """Run `act` in the network namespace `net` and the mount namespace `mnt` (None: the engine's), with `root`, a
    directory there, as its root. What it changes of that (chroot, chdir) is its own."""

    def go() -> Result:
        if net is not None and not same_namespace(net, "net"):
            _libc_call("setns", net, _CLONE_NEWNET)
        _libc_call("unshare", _CLONE_FS)
        if mnt is not None and not same_namespace(mnt, "mnt"):
            _libc_call("setns", mnt, _CLONE_NEWNS)
        if root is not None:
            os.fchdir(root)
            os.chroot(".")
        os.chdir("/")
        return act()

    return in_thread(go)


def in_new_network(act: Callable[[], Result]) -> Result:
    """Run `act` in a new network namespace, which ends with it unless it is kept open."""

    def go() -> Result:
        _libc_call("unshare", _CLONE_NEWNET)
        return act()

    return in_thread(go)


def hidden_directory() -> int:
    """A descriptor of the root of a new tmpfs that is mounted nowhere; it lives as long as it is used."""

    def go() -> int:
        _libc_call("unshare", _CLONE_FS | _CLONE_NEWNS)
        _libc_call("mount", None, b"/", None, _MS_REC | _MS_PRIVATE, None)
        mount("tmpfs", "/proc", "tmpfs")
        return os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    return in_thread(go)


def mount(source: str, target: str, kind: str) -> None:
    """Mount a file system of type `kind` (mount(2))."""
    _libc_call("mount", source.encode(), os.fsencode(target), kind.encode(), 0, None)


def _libc_call(name: str, *args: int | bytes | None) -> None:
    if getattr(_libc, name)(*(ctypes.c_ulong(arg) if isinstance(arg, int) else arg for arg in args)) < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error), name)
