"""Where the mounts of a tree are made, at the destination.

It is a mount namespace of ours, which nobody else is in. Each file system of the tree is mounted in it once, whole;
what is mounted in the tree is cloned from there. Mounts that stand for those who share with each other stay in it until
the tree is let go.
"""

from __future__ import annotations

import itertools
import os
import stat
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import TypeVar

from phaul_engine.errors import RebuildError
from phaul_engine.images.pb import mnt_pb2
from phaul_engine.objects import places

from . import api
from .ids import Ids
from .tree import lies_in, os_text, relative

Result = TypeVar("Result")

_ROOT = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_OWN = "/proc/thread-self/ns/mnt"


class Workshop:
    """One for a tree. Descriptors that it gives out are open as long as it is."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._numbers = itertools.count(1)
        self._origins: dict[int, list[tuple[bytes, int]]] = {}
        self._removed: dict[tuple[int, bytes], int] = {}
        self._temporary: list[tuple[int, str, bool, os.stat_result]] = []  # directory, name in it, whether that is one,
        # and what the directory was like before
        self._groups: dict[int, int] = {}

        def begin() -> tuple[int, int]:
            api.own_namespace()
            root = os.open("/", _ROOT)
            try:
                api.set_propagation(root, api.MS_SLAVE, recursive=True)
                yard = api.new_file_system("tmpfs", "phaul", ["mode=700"])
                api.attach(yard, root, "")
            finally:
                os.close(root)
            return yard, os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)

        own = os.open(_OWN, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._yard, self._namespace = places.inside({"mnt": own}, begin)
        finally:
            os.close(own)
        self._stack.callback(os.close, self._yard)
        self._stack.callback(os.close, self._namespace)

    def close(self) -> None:
        """Give up all that nobody else has."""
        self.remove_again()
        self._stack.close()

    def run(self, act: Callable[[], Result]) -> Result:
        """Run `act` in here."""
        return places.inside({"mnt": self._namespace}, act)

    # -- file systems ------------------------------------------------------------------------------------------------

    def add(self, device: int, root: bytes, mount: int) -> int:
        """Keep a mount that is attached nowhere, of what the images call directory (or file) `root` of file system
        `device`; the descriptor becomes ours, and is returned."""
        self._stack.callback(os.close, mount)
        self.run(lambda: self._keep(mount))
        self._origins.setdefault(device, []).append((root, mount))
        return mount

    def has(self, device: int, root: bytes) -> bool:
        """Whether there is something of a file system that has this directory or file in it."""
        return any(lies_in(root, origin) for origin, _ in self._origins.get(device, ()))

    def root(self, device: int) -> int | None:
        """The mount of a whole file system, if there is one."""
        return next((mount for root, mount in self._origins.get(device, ()) if root == b"/"), None)

    def clone(self, entry: mnt_pb2.mnt_entry, ids: Ids) -> int:
        """A new mount of what an entry is of, attached nowhere; the caller closes it. To be called in here."""
        if entry.deleted:
            return api.clone("", self._removed_origin(entry, ids))
        origin, path = self.origin(entry)
        try:
            return api.clone(path, origin)
        except OSError as error:
            raise RebuildError(
                f"cannot mount {os_text(entry.root)} at {os_text(entry.mountpoint)}: {error.strerror}",
                advice="it has to be there as it was at the source",
            ) from error

    def origin(self, entry: mnt_pb2.mnt_entry) -> tuple[int, str]:
        """What has the directory of an entry in it, the nearest, and where in that."""
        fitting = [one for one in self._origins.get(entry.root_dev, ()) if lies_in(entry.root, one[0])]
        if not fitting:
            raise RebuildError(
                f"nothing here has what was mounted at {os_text(entry.mountpoint)} ({os_text(entry.root)})",
                advice="name it with --external when the images are made, and when they are restored",
            )
        root, mount = max(fitting, key=lambda one: len(one[0]))
        return mount, relative(entry.root, root)

    def _keep(self, mount: int) -> None:
        """Attach a mount where it is out of the way."""
        name = str(next(self._numbers))
        if stat.S_ISDIR(os.fstat(mount).st_mode):
            os.mkdir(name, 0o700, dir_fd=self._yard)
        else:
            os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=self._yard))
        api.attach(mount, self._yard, name)

    # -- what was deleted --------------------------------------------------------------------------------------------

    def remove_again(self) -> None:
        """Remove what was made to be mounted although it was deleted: once the mounts of it are attached."""
        self._removed.clear()
        for directory, name, is_directory, before in reversed(self._temporary):
            with suppress(OSError):
                (os.rmdir if is_directory else os.unlink)(name, dir_fd=directory)
                os.utime(".", ns=(before.st_atime_ns, before.st_mtime_ns), dir_fd=directory)
            os.close(directory)
        self._temporary.clear()

    def _removed_origin(self, entry: mnt_pb2.mnt_entry, ids: Ids) -> int:
        """A mount of something that will be removed again. The kernel attaches no mount of what is removed already."""
        key = (entry.root_dev, entry.root)
        if key not in self._removed:
            try:
                directory, name = ids.filing(lambda: self._make_way(*self.origin(entry)))
                is_directory = stat.S_ISDIR(entry.phaul_removed.mode or stat.S_IFDIR)
                self._temporary.append((directory, name, is_directory, os.fstat(directory)))
                ids.filing(lambda: _make_removed(entry, directory, name, ids))
                self._removed[key] = api.clone(name, directory)
            except OSError as error:
                what = f"cannot make {os_text(entry.root)} again, which is deleted but mounted: {error.strerror}"
                raise RebuildError(what) from error
            self._stack.callback(os.close, self._removed[key])
            self._keep(self._removed[key])
        return self._removed[key]

    def _make_way(self, origin: int, path: str) -> tuple[int, str]:
        """The directory that a path is in, with those above it that are missing; and a free name there."""
        *above, leaf = path.split("/")
        directory = os.dup(origin)
        for part in above:
            try:
                before = os.fstat(directory)
                os.mkdir(part, 0o700, dir_fd=directory)
                self._temporary.append((os.dup(directory), part, True, before))
            except FileExistsError:
                pass
            below = os.open(part, _ROOT | os.O_NOFOLLOW, dir_fd=directory)
            os.close(directory)
            directory = below
        try:
            os.stat(leaf, dir_fd=directory, follow_symlinks=False)
        except FileNotFoundError:
            return directory, leaf
        return directory, f"{leaf}.{next(self._numbers)}"  # something else has the name by now

    # -- sharing -----------------------------------------------------------------------------------------------------

    def group(self, number: int, masters: dict[int, int], devices: dict[int, int], entry: mnt_pb2.mnt_entry) -> int:
        """A mount in peer group `number` of the images, which mounts of the same file system can be put into. `masters`
        are the groups that groups receive from, `devices` their file systems. To be called in here."""
        if number not in self._groups:
            fitting = (one for one in self._origins.get(devices[number], ()) if lies_in(entry.root, one[0]))
            _, origin = min(fitting, key=lambda one: len(one[0]), default=(b"", -1))
            if origin < 0:
                raise RebuildError(f"nothing here has all of what shares its mounts with {os_text(entry.mountpoint)}")
            mount = api.clone("", origin)
            self._stack.callback(os.close, mount)
            self._keep(mount)
            master = masters.get(number)
            if master in devices:
                api.set_propagation(mount, api.MS_PRIVATE)
                api.share(self.group(master, masters, devices, entry), mount)
            api.set_propagation(mount, api.MS_SLAVE if master else api.MS_PRIVATE)
            api.set_propagation(mount, api.MS_SHARED)
            self._groups[number] = mount
        return self._groups[number]


def _make_removed(entry: mnt_pb2.mnt_entry, directory: int, name: str, ids: Ids) -> None:
    removed = entry.phaul_removed
    mode = removed.mode or stat.S_IFDIR | 0o755  # images of CRIU do not tell
    if stat.S_ISDIR(mode):
        os.mkdir(name, 0o700, dir_fd=directory)
    else:
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
        try:
            os.write(fd, removed.content)
        finally:
            os.close(fd)
    uid, gid = ids.user_outside(removed.uid), ids.group_outside(removed.gid)
    os.chown(name, uid, gid, dir_fd=directory, follow_symlinks=False)
    os.chmod(name, stat.S_IMODE(mode), dir_fd=directory)
