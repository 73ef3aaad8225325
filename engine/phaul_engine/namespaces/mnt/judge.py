"""How each mount of a tree gets to the destination: with its directory from outside, made anew, or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from phaul_engine.images.pb import mnt_pb2
from phaul_engine.objects.base import Collection
from phaul_engine.proc.mountinfo import Mount

from . import externals, filesystems
from .filesystems import Way
from .ids import Ids
from .tree import MountTree, join, lies_in, os_text, relative

_DELETED = b"//deleted"


@dataclass
class Known:
    """What mounts the destination will have something of, by device: which directories of the file system, each with
    all below it. It is filled from namespace to namespace, the root's first."""

    origins: dict[int, list[bytes]] = field(default_factory=dict)

    def has(self, device: int, root: bytes) -> bool:
        """Whether a directory or file is below one of them."""
        return any(lies_in(root, origin) for origin in self.origins.get(device, ()))

    def add(self, device: int, root: bytes) -> None:
        """There is one more."""
        self.origins.setdefault(device, []).append(root)


class Host:
    """The mounts that the engine itself sees. Of several names of a place, one in a directory of `places` counts."""

    def __init__(self, mounts: Iterable[Mount], places: Iterable[str] = ()) -> None:
        self._by_device: dict[int, list[Mount]] = {}
        self.groups: set[int] = set()
        mounts = list(mounts)
        for mount in (*(narrowed(place, mounts) for place in places), *mounts):
            self._by_device.setdefault(mount.dev, []).append(mount)
            group = mount.propagates("shared")
            if group is not None:
                self.groups.add(group)

    def has(self, device: int) -> bool:
        """Whether a file system is mounted here too."""
        return device in self._by_device

    def path(self, device: int, root: bytes, inode: tuple[int, int] | None) -> str:
        """Where a directory or file of a file system is here; empty if it is nowhere. `inode`, if it is known, has to
        be there."""
        for mount in self._by_device.get(device, ()):
            top = os.fsencode(mount.root)
            if not lies_in(root, top):
                continue
            path = join(os.fsencode(mount.point), relative(root, top))
            try:
                status = os.stat(path)
            except OSError:
                continue
            if inode is None or (status.st_dev, status.st_ino) == inode:
                return os_text(path)
        return ""


def narrowed(place: str, mounts: list[Mount]) -> Mount:
    """The mount that a directory of this host is on, as if nothing else were mounted of it."""
    path = os.fsencode(place)
    above = [mount for mount in mounts if lies_in(path, os.fsencode(mount.point))]
    mount = max(above, key=lambda one: (len(one.point), one.id))
    root = join(os.fsencode(mount.root), relative(path, os.fsencode(mount.point)))
    return replace(mount, root=os_text(root), point=place)


class Judge:
    """Decides about the mounts of one namespace. `inodes` are those of the roots of mounts that can be reached; `lower`
    says that it belongs to a user namespace below the tree's, whose root can mount less. If those who are in it
    have a cgroup namespace of their own, `roots` are the roots of mounts of cgroups as the engine's names them."""

    def __init__(
        self,
        tree: MountTree,
        mounts: Mapping[int, Mount],
        host: Host,
        known: Known,
        inodes: Mapping[int, tuple[int, int]],
        ids: Ids,
        collection: Collection,
        *,
        lower: bool,
        roots: Mapping[int, bytes] | None,
    ) -> None:
        self._lower = lower
        self._own_groups = roots is not None
        self._roots = roots or {}
        self._tree = tree
        self._mounts = mounts
        self._host = host
        self._known = known
        self._inodes = inodes
        self._ids = ids
        self._collection = collection

    def decide(self, where: str, *, of_root: bool) -> None:
        """Put into the entries where they come from; what cannot be carried becomes a blocker."""
        left = [entry for entry in self._tree.order() if not self._given(entry, of_root=of_root)]
        left = [entry for entry in left if not self._below(entry)]
        for entry in sorted(left, key=lambda entry: len(entry.root)):  # what is wider first: it may hold the others
            if not self._below(entry) and not self._anew(entry) and not self._found(entry, of_root=of_root):
                self._block(entry, where)
        for entry in self._tree.entries.values():
            if entry.shared_id in self._host.groups:
                entry.phaul_shared_outside = True
            mount = self._mounts[entry.mnt_id]
            if "idmapped" in mount.options and not entry.ext_key:
                why = "the kernel does not tell which ids it maps to which"
                self._say(entry, where, "an idmapped mount", why, "name it with --external, and mount it there")

    def _given(self, entry: mnt_pb2.mnt_entry, *, of_root: bool) -> bool:
        """Named by an option, or the root of all."""
        if not of_root:
            return False
        key = externals.given(self._collection.options).get(os_text(entry.mountpoint))
        if key and entry is not self._tree.root:
            entry.ext_key = os.fsencode(key)
            self._known.add(self._device(entry), entry.root)
            return True
        anew = filesystems.way(self._kind(entry)) is Way.CONTENT and not self._host.has(self._device(entry))
        if entry is not self._tree.root or (anew and not externals.root(self._collection.options)):
            return False
        path = self._host.path(self._device(entry), entry.root, self._inodes.get(entry.mnt_id))
        if path:
            entry.phaul_path = os.fsencode(path)
        self._known.add(self._device(entry), entry.root)
        return True

    def _below(self, entry: mnt_pb2.mnt_entry) -> bool:
        return self._known.has(self._device(entry), entry.root)

    def _anew(self, entry: mnt_pb2.mnt_entry) -> bool:
        kind = self._kind(entry)
        ours = self._host.has(self._device(entry))
        if filesystems.way(kind) is Way.OUTSIDE or (ours and not self._same_anywhere(kind)):
            return False
        if not filesystems.may_make(kind, self._ids, own_groups=self._own_groups):
            return False
        self._known.add(self._device(entry), b"/")
        return True

    def _same_anywhere(self, kind: str) -> bool:
        return not self._lower and filesystems.same_anywhere(kind, self._ids, own_groups=self._own_groups)

    def _found(self, entry: mnt_pb2.mnt_entry, *, of_root: bool) -> bool:
        if entry.deleted:
            return False
        root = self._roots.get(entry.mnt_id, entry.root)
        path = self._host.path(self._device(entry), root, self._inodes.get(entry.mnt_id))
        if not path:
            return False
        of_runtime = of_root and externals.MOUNTED in self._collection.options
        entry.ext_key = externals.RUNTIME if of_runtime else externals.FOUND
        entry.source = os.fsencode(path)
        self._known.add(self._device(entry), entry.root)
        return True

    def _block(self, entry: mnt_pb2.mnt_entry, where: str) -> None:
        mount = self._mounts[entry.mnt_id]
        if entry.deleted:
            why = f"what it is of ({mount.root}) was deleted, and was outside of the container"
            advice = "unmount it"
        elif mount.fstype == "autofs":
            why, advice = "the daemon that serves it cannot be told of another mount", "unmount it for the move"
        else:
            why = f"it is a {mount.fstype} file system of {mount.source}, which is mounted nowhere else on this host"
            advice = f"unmount it, or name it with --external mnt[{mount.point}]:KEY and have it mounted there"
        self._say(entry, where, "a mount that cannot be made again", why, advice)

    def _say(self, entry: mnt_pb2.mnt_entry, where: str, kind: str, why: str, advice: str) -> None:
        self._collection.block(f"{os_text(entry.mountpoint)} in {where}", kind, why, advice)

    def _kind(self, entry: mnt_pb2.mnt_entry) -> str:
        return self._mounts[entry.mnt_id].fstype

    def _device(self, entry: mnt_pb2.mnt_entry) -> int:
        return self._mounts[entry.mnt_id].dev


def make_entry(mount: Mount, options: bytes) -> mnt_pb2.mnt_entry:
    """What mountinfo says of a mount, as images hold it."""
    code, name = filesystems.code(mount.fstype)
    root = os.fsencode(mount.root)
    entry = mnt_pb2.mnt_entry(
        fstype=code,
        mnt_id=mount.id,
        root_dev=os.major(mount.dev) << 20 | os.minor(mount.dev),
        parent_mnt_id=mount.parent,
        flags=filesystems.mount_flags(mount.options) | filesystems.propagation_flags(mount),
        root=root.removesuffix(_DELETED),
        mountpoint=os.fsencode(mount.point),
        source=os.fsencode(mount.source),
        options=options,
        shared_id=mount.propagates("shared") or 0,
        master_id=mount.propagates("master") or 0,
        sb_flags=filesystems.super_flags(mount.super_options),
    )
    if name:
        entry.fsname = name
    if root.endswith(_DELETED):
        entry.deleted = True
    return entry
