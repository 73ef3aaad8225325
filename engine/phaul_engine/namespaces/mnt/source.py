"""The source's side: mount namespaces become images."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from phaul_engine import calls
from phaul_engine.errors import EngineError
from phaul_engine.images.checkpoint import Record
from phaul_engine.images.pb import mnt_pb2
from phaul_engine.namespaces.base import NamespaceView
from phaul_engine.namespaces.inside import Worker
from phaul_engine.numbering import TREE
from phaul_engine.objects import mounted, places
from phaul_engine.objects.base import Collection, Owner
from phaul_engine.proc import access
from phaul_engine.proc.mountinfo import Mount, own_mounts, parse_mounts

from . import api, archive, externals, filesystems, peel
from .filesystems import Way
from .ids import Ids
from .judge import Host, Judge, Known, make_entry, narrowed
from .tree import MountTree, lies_in, os_text

IMAGE = "mountpoints"
CONTENT = "tmpfs-dev"
_MEMORY = mounted.SCRATCH
_MOST_DELETED = 1 << 20  # bytes of a deleted file that is mounted
_MAPPED = ("uid=", "gid=")  # options of file systems that name owners


class Seen:
    """A namespace as a pass found it: `text` is its mountinfo, `tree` what the image holds, `held` are mounts of ours
    that its content is read through, by number."""

    def __init__(self, text: bytes, tree: MountTree, ids: Ids, *, blocked: bool) -> None:
        self.text = text
        self.tree = tree
        self.ids = ids
        self.blocked = blocked
        self.records = [Record(entry, b"") for entry in tree.order()]
        self.held: dict[int, int] = {}

    def close(self) -> None:
        """Close what is held."""
        while self.held:
            os.close(self.held.popitem()[1])


@dataclass
class _Kept:
    """The content of a directory of a file system as it was read at last."""

    signature: bytes
    content: archive.Content
    packed: list[Record]
    members: archive.Members


@dataclass
class Pass:
    """What is known across the namespaces of one pass."""

    host: Host
    hauled: tuple[Mount, ...] = ()
    known: Known = field(default_factory=Known)
    trees: dict[int, MountTree] = field(default_factory=dict)  # by the engine's number of a process
    content: dict[int, dict[bytes, _Kept]] = field(default_factory=dict)  # by device, and directory of it
    mapped: dict[int, set[int]] = field(default_factory=dict)  # devices, by the number of a namespace
    shown: dict[int, int] = field(default_factory=dict)  # whose processes file systems show, by device

    def written(self, view: NamespaceView) -> set[int]:
        """The devices with files that are mapped so that they can be written: that shows in no time of theirs."""
        if view.number not in self.mapped:
            lines = (
                line.split(b" ", 4) for one in view.members for line in access.read_bytes(one.proc, "maps").splitlines()
            )
            shown = {line[3] for line in lines if line[1].endswith(b"s")}
            numbers = (device.split(b":") for device in shown)
            self.mapped[view.number] = {int(major, 16) << 20 | int(minor, 16) for major, minor in numbers}
        return self.mapped[view.number]

    def own(self, owner: Owner) -> bool:
        """See `objects.mounted`."""
        return owner.pid in self.trees

    def known_in(self, owner: Owner, mount: int) -> bool:
        """See `objects.mounted`."""
        return mount in self.trees[owner.pid].entries

    def leads_to(self, owner: Owner, name: str) -> int:
        """See `objects.mounted`."""
        path = os.fsencode(name.removesuffix(" (deleted)"))
        return self.trees[owner.pid].at(path).mnt_id if path.startswith(b"/") else mounted.NOWHERE

    def shows(self, owner: Owner, mount: int) -> int:
        """See `objects.mounted`."""
        return self.trees[owner.pid].entries[mount].phaul_pid_ns

    def comes_along(self, device: int) -> bool:
        """See `objects.mounted`."""
        return _number(device) in self.content

    def in_tree(self, owner: Owner, mount: int) -> bool:
        """See `objects.mounted`."""
        entry = self.trees[owner.pid].entries.get(mount)
        if entry is None:
            return False
        known = (os.fsencode(one.root) for one in self.hauled if _number(one.dev) == entry.root_dev)
        return any(lies_in(entry.root, root) for root in known)

    def hides(self, owner: Owner, mount: int, name: str) -> bool:
        """See `objects.mounted`."""
        entry, path = self.trees[owner.pid].entries[mount], os.fsencode(name)
        return lies_in(path, entry.mountpoint) and self.trees[owner.pid].at(path) is not entry


def collect(view: NamespaceView, collection: Collection) -> None:
    """Put the images of a mount namespace into the checkpoint."""
    memory: dict[str, Any] = collection.memory.setdefault(_MEMORY, {"seen": {}, "kept": {}})
    now = collection.scratch.get(_MEMORY)
    if now is None:
        alone = collection.options.get(externals.MOUNTED, ())
        mounts = [mount for mount in own_mounts() if mount.point not in alone]
        trees = collection.options.get(externals.TREES, ())
        hauled = tuple(narrowed(place, mounts) for place in trees)
        now = collection.scratch[_MEMORY] = Pass(Host(mounts, trees), hauled)
    with ExitStack() as stack:
        reader = _Reader(view, stack)
        text = reader.mounts()
        seen = memory["seen"].get(view.number)
        if seen is None or seen.text != text or seen.blocked:
            if seen is not None:
                seen.close()
            seen = _look(view, reader, text, now, collection)
            memory["seen"][view.number] = seen
        else:
            for entry in seen.tree.entries.values():
                _remember(entry, now)
        collection.checkpoint.adopt(IMAGE, view.number, seen.records)
        _collect_content(view, reader, seen, now, collection)
    now.trees.update((member.pid, seen.tree) for member in view.members)


def _top(mountinfo: bytes) -> int:
    """The number of the mount at the root that nothing else is mounted on there."""
    lines = (line.split(b" ", 5) for line in mountinfo.splitlines())
    parents = {int(line[0]): int(line[1]) for line in lines if line[4] == b"/"}
    (top, *_) = parents.keys() - parents.values() or {-1}
    return top


def _number(device: int) -> int:
    """A device as images have it."""
    return os.major(device) << 20 | os.minor(device)


def close(memory: dict[str, Any]) -> None:
    """Close what was kept open between passes, with the memory of them."""
    for seen in memory.pop(_MEMORY, {}).get("seen", {}).values():
        seen.close()


class _Reader:
    """Looks into a mount namespace, and opens what is in it."""

    def __init__(self, view: NamespaceView, stack: ExitStack) -> None:
        self.view = view
        self._stack = stack
        self._proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, self._proc)
        self._namespaces = {}
        for name in ("cgroup", "mnt"):
            self._namespaces[name] = access.open_at(view.owner.proc, f"ns/{name}")
            stack.callback(os.close, self._namespaces[name])

    def mounts(self) -> bytes:
        """Its mountinfo, from the root of the namespace."""
        return self._read_mounts(self._namespaces)

    def roots_of_cgroups(self) -> dict[int, bytes] | None:
        """The roots of its mounts of cgroups as our own cgroup namespace names them, by number; None if it has no other
        cgroup namespace."""
        if places.same_namespace(self._namespaces["cgroup"], "cgroup"):
            return None
        mounts = parse_mounts(self._read_mounts({"mnt": self._namespaces["mnt"]}))
        return {one.id: os.fsencode(one.root) for one in mounts if one.fstype in ("cgroup", "cgroup2")}

    def _read_mounts(self, namespaces: Mapping[str, int]) -> bytes:
        """What a process there has, if its root is that of the namespace; else no process but one that goes there."""
        owner = self.view.owner
        if access.read_link(owner.proc, "root") == "/":
            others = {name: fd for name, fd in namespaces.items() if name != "mnt"}
            found = places.inside(others, lambda: access.read_bytes(owner.proc, "mountinfo"))
            if _top(found) == calls.mount_id(owner.root):
                return found
        return places.inside(namespaces, lambda: access.read_bytes(self._proc, "thread-self/mountinfo"))

    def clones(self, tree: MountTree, entries: Iterable[mnt_pb2.mnt_entry]) -> dict[int, int]:
        """Mounts of the same as those, with nothing on them, attached nowhere: by number, to be closed with all."""
        wanted = list(entries)
        plain = [entry for entry in wanted if tree.visible(entry)]
        hidden = [entry for entry in wanted if not tree.visible(entry)]
        found = places.inside(self._namespaces, lambda: {one.mnt_id: _clone(one) for one in plain}) if plain else {}
        if hidden:
            found |= self._peel(tree, hidden)
        for fd in found.values():
            self._stack.callback(os.close, fd)
        return found

    def _peel(self, tree: MountTree, hidden: list[mnt_pb2.mnt_entry]) -> dict[int, int]:
        order = list(tree.order())
        points = [os_text(entry.mountpoint) for entry in order]
        indices = [index for index, entry in enumerate(order) if any(entry is one for one in hidden)]
        user = places.owner_of(self._namespaces["mnt"])  # a process may be in one below it
        self._stack.callback(os.close, user)
        if places.same_namespace(user, "user"):
            found = places.inside(self._namespaces, lambda: peel.peel(points, indices))
        else:  # only its own user namespace may unmount what is in it
            with Worker({"user": user, "mnt": self._namespaces["mnt"]}, modules=(peel.__name__,)) as worker:
                made = worker.call(peel.peel_inside, points, indices)
            found = {index: one.fd for index, one in zip(indices, made, strict=True)}
        return {order[index].mnt_id: fd for index, fd in found.items()}


def _clone(entry: mnt_pb2.mnt_entry) -> int:
    point = os_text(entry.mountpoint)
    fd = os.open(point, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if calls.mount_id(fd) != entry.mnt_id:
            raise EngineError(f"another mount appeared at {point}", advice="try again")
        clone = api.clone("", fd)
    finally:
        os.close(fd)
    api.leave_no_trace(clone)
    return clone


def _look(view: NamespaceView, reader: _Reader, text: bytes, now: Pass, collection: Collection) -> Seen:
    """Everything about a namespace whose mounts have changed."""
    ids = Ids.of_task(view.lord.proc)
    mounts = {mount.id: mount for mount in parse_mounts(text)}
    tree = MountTree(make_entry(mount, _options(mount, ids, now.host)) for mount in mounts.values())
    blockers = len(collection.blockers)
    inodes = places.inside(reader._namespaces, lambda: _inodes(tree))
    arguments = tree, mounts, now.host, now.known, inodes, ids, collection
    judge = Judge(*arguments, lower=bool(view.above), roots=reader.roots_of_cgroups())
    judge.decide(str(view), of_root=view.of_root)
    if view.spaces:
        _tell_processes(view, tree, reader, now, collection)
    removed = [entry for entry in tree.entries.values() if entry.deleted]
    for number, fd in reader.clones(tree, removed).items():
        _carry_removed(tree.entries[number], fd, ids, view, collection)
    return Seen(text, tree, ids, blocked=len(collection.blockers) != blockers)


def _tell_processes(view: NamespaceView, tree: MountTree, reader: _Reader, now: Pass, collection: Collection) -> None:
    """Whose processes each proc file system shows: its process 1 is the first of its pid namespace."""
    made = [entry for entry in tree.entries.values() if filesystems.kind_of(entry) == "proc" and not entry.ext_key]
    made = [entry for entry in made if not now.host.has(_device(entry.root_dev))]
    new = {entry.root_dev: entry for entry in sorted(made, key=tree.visible) if entry.root == b"/"}
    asked = [entry for device, entry in new.items() if device not in now.shown]
    for entry in asked:
        identity = (0, 0)
        with suppress(EngineError, FileNotFoundError, ProcessLookupError):
            status = os.stat("1/ns/pid", dir_fd=reader.clones(tree, [entry])[entry.mnt_id])
            identity = status.st_dev, status.st_ino
        if identity in view.spaces:
            now.shown[entry.root_dev] = view.spaces[identity]
        elif not tree.visible(entry):  # a user namespace may keep it hidden: what nobody sees shows the tree
            now.shown[entry.root_dev] = TREE
    for entry in made:
        if entry.root_dev in now.shown:
            entry.phaul_pid_ns = now.shown[entry.root_dev]
        else:
            where = f"{os_text(entry.mountpoint)} in {view}"
            why = "it shows a pid namespace that no process of the tree is in"
            collection.block(where, "a mount that cannot be made again", why, "unmount it")


def _options(mount: Mount, ids: Ids, host: Host) -> bytes:
    """Owners named in options are shown in the numbers of the initial user namespace."""
    options = list(mount.super_options)
    if not ids.same and not host.has(mount.dev):
        for index, option in enumerate(options):
            if option.startswith(_MAPPED) and option[4:].isdecimal():
                inside = ids.user_inside if option.startswith("uid") else ids.group_inside
                options[index] = option[:4] + str(inside(int(option[4:])))
    return filesystems.pack_options(mount.fstype, options)


def _inodes(tree: MountTree) -> dict[int, tuple[int, int]]:
    """The roots of mounts that can be reached."""
    found = {}
    for entry in tree.entries.values():
        if tree.visible(entry):
            try:
                status = os.lstat(entry.mountpoint)
            except OSError:
                continue
            found[entry.mnt_id] = status.st_dev, status.st_ino
    return found


def _device(number: int) -> int:
    """A device as images number it."""
    return os.makedev(number >> 20, number & 0xFFFFF)


def _remember(entry: mnt_pb2.mnt_entry, now: Pass) -> None:
    """What an earlier pass has decided stands."""
    known = now.known
    if entry.HasField("phaul_pid_ns"):
        now.shown[entry.root_dev] = entry.phaul_pid_ns
    kind = filesystems.kind_of(entry)
    device = _device(entry.root_dev)
    if entry.ext_key or entry.phaul_path:
        known.add(device, entry.root)
    elif filesystems.way(kind) is not Way.OUTSIDE:
        known.add(device, b"/")


def _carry_removed(entry: mnt_pb2.mnt_entry, fd: int, ids: Ids, view: NamespaceView, collection: Collection) -> None:
    """What a mount is of that was deleted: it is made again, mounted, and deleted again."""
    status = os.fstat(fd)
    removed = entry.phaul_removed
    removed.mode = status.st_mode
    removed.uid, removed.gid = ids.user_inside(status.st_uid), ids.group_inside(status.st_gid)
    if stat.S_ISDIR(status.st_mode):
        return
    where = f"{os_text(entry.mountpoint)} in {view}"
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_DELETED:
        why = f"it is deleted, and of {status.st_size} bytes or no file"
        collection.block(where, "a mount that cannot be made again", why, "unmount it")
        return
    file = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        removed.content = os.pread(file, status.st_size, 0)
    finally:
        os.close(file)


# -- contents --------------------------------------------------------------------------------------------------------


def _collect_content(view: NamespaceView, reader: _Reader, seen: Seen, now: Pass, collection: Collection) -> None:
    """The files on file systems that exist nowhere but in the tree's mounts."""
    filled = {device: entries for device, entries in _filled(seen.tree).items() if not now.host.has(_device(device))}
    missing = [entries[0] for entries in filled.values() if entries[0].mnt_id not in seen.held]
    seen.held |= {number: os.dup(fd) for number, fd in reader.clones(seen.tree, missing).items()}
    for device, entries in filled.items():
        parts = now.content.setdefault(device, {})
        for entry in entries:
            if any(lies_in(entry.root, root) for root in parts):
                continue
            for root in [root for root in parts if lies_in(root, entry.root)]:
                del parts[root]
            content = _read_content(view, reader, seen, entry, now, collection)
            if content is not None:
                parts[entry.root] = content
        if parts:
            collection.checkpoint.adopt(CONTENT, device, _packed(parts))


def _read_content(
    view: NamespaceView, reader: _Reader, seen: Seen, entry: mnt_pb2.mnt_entry, now: Pass, collection: Collection
) -> _Kept | None:
    kept: dict[tuple[int, bytes], _Kept] = collection.memory[_MEMORY]["kept"]
    if entry.mnt_id not in seen.held:
        seen.held[entry.mnt_id] = os.dup(reader.clones(seen.tree, [entry])[entry.mnt_id])
    clone = seen.held[entry.mnt_id]
    mapped = not view.survey and entry.root_dev in now.written(view)
    if not stat.S_ISDIR(os.fstat(clone).st_mode):
        where = f"{os_text(entry.mountpoint)} in {view}"
        why = f"it is a file of a {filesystems.kind_of(entry)} file system that is mounted nowhere as a whole"
        collection.block(where, "a mount that cannot be made again", why, "unmount it")
        return None
    root = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=clone)
    try:
        signature = archive.signature(root)
        known = kept.get((entry.root_dev, entry.root))
        if known is None or known.signature != signature or mapped:
            content, members = archive.read(root, seen.ids), known.members if known is not None else {}
            packed = [Record(None, archive.pack(content, members))]
            known = kept[entry.root_dev, entry.root] = _Kept(signature, content, packed, members)
        return known
    finally:
        os.close(root)


def _packed(parts: dict[bytes, _Kept]) -> list[Record]:
    """The image of a content: that of the whole, or, where only parts are mounted, of all of them."""
    if list(parts) == [b"/"]:
        return parts[b"/"].packed
    content: archive.Content = {}
    for root, part in sorted(parts.items()):
        archive.put_below(content, os_text(root).strip("/"), part.content)
    return [Record(None, archive.pack(content))]


def _filled(tree: MountTree) -> dict[int, list[mnt_pb2.mnt_entry]]:
    """The file systems whose content is carried, by device, with the mounts to read them through: the widest first,
    and those that can be reached."""
    outside = {entry.root_dev for entry in tree.entries.values() if entry.ext_key or entry.phaul_path}
    found: dict[int, list[mnt_pb2.mnt_entry]] = {}
    for entry in tree.order():
        filled = filesystems.way(filesystems.kind_of(entry)) is Way.CONTENT
        if filled and not entry.deleted and entry.root_dev not in outside:
            found.setdefault(entry.root_dev, []).append(entry)
    for entries in found.values():
        entries.sort(key=lambda entry: (len(entry.root), not tree.visible(entry)))
    return found
