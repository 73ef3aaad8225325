"""What the rebuilding of a tree may do to the files of its host, which images do not decide.

The engine works as root, and what it opens or makes for a tree it does with its own power. Where the host's policy does
not trust who sends the images, a `Confinement` stands among the options: files are made, and opened for writing, only
beneath certain directories, and every file is opened as one of the tree's own accounts would open it. It is asked where
the deed is done, with what was really opened: neither a symbolic link nor a name in an image leads around it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from phaul_engine import calls
from phaul_engine.errors import RebuildError
from phaul_engine.footprint import Account, accounts
from phaul_engine.paths import beneath
from phaul_engine.syscalls import NR

from .base import Restoration

OPTION = "confinement"
"""Of a restoration."""

Result = TypeVar("Result")
_libc = ctypes.CDLL(None, use_errno=True)
_SPECIAL = stat.S_ISUID | stat.S_ISGID


@dataclass(frozen=True)
class Confinement:
    """`paths` are the directories beneath which files may be made or written. With `privileged`, the tree may have what
    root may have: files are opened with the engine's power, and may be made with any owner and mode."""

    paths: tuple[str, ...]
    privileged: bool = False

    def covers(self, path: str) -> bool:
        """Whether a path, with all links followed, lies beneath one of the directories."""
        return any(beneath(path, directory) for directory in self.paths)


def prepare() -> None:
    """To be called before a thread that changes its root asks."""
    _descriptors()


def check_place(restoration: Restoration, parent: int, path: str) -> None:
    """Before anything is made in, or removed from, the directory `parent`, where the image calls it `path`.
    RebuildError if it may not be."""
    confinement = _of(restoration)
    if confinement is None:
        return
    real = os.path.join(_seen(parent, restoration), os.path.basename(path))
    if not confinement.covers(real):
        raise _refusal(f"make {path}", f"this host lets it make files beneath {_list(confinement.paths)} only")


def check_making(restoration: Restoration, parent: int, path: str, uid: int, gid: int, mode: int) -> None:
    """The same, of a file with this owner, type and mode."""
    check_place(restoration, parent, path)
    check_owner(restoration, path, uid, gid, mode)


def check_owner(restoration: Restoration, path: str, uid: int, gid: int, mode: int) -> None:
    """Before a file is given this owner and mode. RebuildError if it may not have them."""
    confinement = _of(restoration)
    if confinement is None or confinement.privileged:
        return
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise _refusal(f"make the device {path}", "this host does not let it have what root has")
    known = accounts(restoration.checkpoint)
    if uid not in {one.uid for one in known}:
        raise _refusal(f"make {path}", f"it would belong to uid {uid}, which no process of the program is")
    if mode & _SPECIAL and gid not in {group for one in known for group in (one.gid, *one.groups)}:
        raise _refusal(f"make {path}", f"it would run as group {gid}, which no process of the program is in")


def check_namespace(restoration: Restoration) -> None:
    """Before the tree gets a mount namespace of its own, with whatever files and devices the images tell of."""
    confinement = _of(restoration)
    if confinement is not None and not confinement.privileged:
        raise _refusal("have mounts of its own", "this host does not let it have what root has")


def check_mount(restoration: Restoration, path: str, what: str) -> None:
    """Before `path` of this host becomes a mount (`what`) of the tree, which may then do to it whatever it can."""
    confinement = _of(restoration)
    if confinement is not None and not confinement.covers(os.path.realpath(path)):
        raise _refusal(f"have {path} as {what}", f"this host lets it write beneath {_list(confinement.paths)} only")


def check_attribute(restoration: Restoration, path: str, name: str) -> None:
    """Before a file is given an extended attribute: those of the `security` and `trusted` kind are root's to give."""
    confinement = _of(restoration)
    if confinement is not None and not confinement.privileged and name.startswith(("security.", "trusted.")):
        raise _refusal(f"give {path} the attribute {name}", "this host does not let it have what root has")


def opened(restoration: Restoration, path: str, act: Callable[[], int]) -> int:
    """The descriptor that `act` opens for what the image calls `path`, as one of the tree's accounts may have it.
    RebuildError if none may; OSError if it cannot be opened at all."""
    confinement = _of(restoration)
    if confinement is None:
        return act()
    fd = act() if confinement.privileged else _as_one_of(accounts(restoration.checkpoint), path, act)
    try:
        if _writes(fd) and not confinement.covers(_seen(fd, restoration)):
            why = f"this host lets it write files beneath {_list(confinement.paths)} only"
            raise _refusal(f"have {path} open for writing", why)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _of(restoration: Restoration) -> Confinement | None:
    found = restoration.options.get(OPTION)
    return found if isinstance(found, Confinement) else None


def _writes(fd: int) -> bool:
    """Whether a descriptor can change a file. Devices are let through: who may open them is their mode's business."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & os.O_PATH or flags & os.O_ACCMODE == os.O_RDONLY:
        return False
    return not stat.S_ISCHR(os.fstat(fd).st_mode)


@functools.cache
def _descriptors() -> int:
    """/proc/self/fd, which a thread that has changed its root may not find."""
    return os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def _seen(fd: int, restoration: Restoration) -> str:
    """Where a file is, seen from the tree's root."""
    path = os.readlink(str(fd), dir_fd=_descriptors())
    if restoration.root is None:
        return path
    root = os.readlink(str(restoration.root), dir_fd=_descriptors())
    return path if root == "/" else "/" + path.removeprefix(root).lstrip("/")


def _refusal(what: str, why: str) -> RebuildError:
    return RebuildError(f"the program may not {what} here: {why}", advice="see /etc/phaul/agent.toml on this host")


def _list(paths: Iterable[str]) -> str:
    return ", ".join(paths) or "no directory"


# -- another account's eyes --------------------------------------------------------------------------------------


def _as_one_of(known: tuple[Account, ...], path: str, act: Callable[[], int]) -> int:
    for account in known:
        try:
            return as_account(account, act)
        except PermissionError:
            continue
    names = ", ".join(str(one.uid) for one in known) or "nobody"
    raise _refusal(f"have {path} open", f"its accounts (uid {names}) could not open it by themselves")


def as_account(account: Account, act: Callable[[], Result]) -> Result:
    """Run `act` with the rights that an account has on files. In a thread of its own: groups and file-system ids are a
    thread's, and with the id of root go the capabilities that override permissions (capabilities(7))."""

    def run() -> Result:
        _become(account)
        return act()

    return calls.in_thread(run)


def _become(account: Account) -> None:
    groups = (ctypes.c_uint32 * len(account.groups))(*account.groups)
    if _libc.syscall(ctypes.c_long(NR.setgroups), ctypes.c_long(len(account.groups)), groups) != 0:
        raise OSError(ctypes.get_errno(), "setgroups")
    for number, wanted in ((NR.setfsgid, account.gid), (NR.setfsuid, account.uid)):
        _libc.syscall(ctypes.c_long(number), ctypes.c_ulong(wanted))
        if _libc.syscall(ctypes.c_long(number), ctypes.c_ulong(0xFFFFFFFF)) != wanted:
            raise OSError(errno.EPERM, f"become uid {account.uid}, gid {account.gid}")
