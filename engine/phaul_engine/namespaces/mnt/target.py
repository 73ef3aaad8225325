"""The destination's side: mount namespaces are made from images.

All mounts of a namespace are made in the workshop, attached nowhere; then they are put together, each on its parent,
which is known by a descriptor, so that what is hidden can be reached; then the first becomes the root. While that is
done all are private. Who shares with whom comes last.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial

from phaul_engine import catching
from phaul_engine.errors import RebuildError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import fdinfo_pb2, mnt_pb2
from phaul_engine.namespaces import pid as pid_namespace
from phaul_engine.namespaces.base import NewNamespace
from phaul_engine.namespaces.inside import InsideError, Worker
from phaul_engine.numbering import TREE
from phaul_engine.objects import confinement, places
from phaul_engine.objects.base import Restoration
from phaul_engine.objects.mounted import Way
from phaul_engine.proc.id_map import OVERFLOW
from phaul_engine.user_ids import UserIds

from . import api, archive, externals, filesystems, making
from .filesystems import Way as Moving
from .ids import Ids
from .source import CONTENT, IMAGE
from .tree import MountTree, lies_in, os_text, relative
from .workshop import Workshop

_PLACE = os.O_PATH | os.O_CLOEXEC


@dataclass
class Built:
    """A namespace that was made: its mounts as descriptors, by number in the images."""

    place: NewNamespace
    tree: MountTree
    ids: Ids
    mounts: dict[int, int] = field(default_factory=dict)


class Mounts:
    """The mounts of all namespaces of one tree."""

    def __init__(self, restoration: Restoration) -> None:
        self._restoration = restoration
        self._workshop = Workshop()
        self._built: dict[int, Built] = {}
        self._content: dict[int, tuple[bytes, archive.Content, Ids]] = {}  # as it was filled in, by device
        self._hidden: dict[int, int] = {}
        self._directories: dict[tuple[int, str], int] = {}  # hidden ones, by mount and name
        self._followed = restoration.checkpoint
        self._caught = bool(restoration.options.get(catching.ROOT))

    def close(self) -> None:
        """Let go of all mounts: what is attached stays."""
        mounts = (fd for built in self._built.values() for fd in built.mounts.values())
        for fd in (*mounts, *self._hidden.values(), *self._directories.values()):
            os.close(fd)
        self._built.clear()
        self._hidden.clear()
        self._directories.clear()
        self._workshop.close()

    # -- for those who open files ------------------------------------------------------------------------------------

    def root_of(self, mount: int) -> int | None:
        """The root of the namespace that a mount of the images is in; None if there is no such mount."""
        self.follow()
        for built in self._built.values():
            if mount in built.tree.entries:
                return built.mounts[built.tree.root.mnt_id]
        return None

    def maker_of(self, mount: int) -> tuple[int, int] | None:
        """See `objects.mounted`."""
        self.follow()
        entry = next((one.tree.entries[mount] for one in self._built.values() if mount in one.tree.entries), None)
        if entry is None or entry.root_dev not in self._content:
            return None
        ids = self._content[entry.root_dev][2]
        root = ids.user_outside(0), ids.group_outside(0)
        return None if OVERFLOW in root else root

    def hidden(self, file_id: int) -> int | None:
        """A file that is on a mount where no path leads to, as an O_PATH descriptor; None for any other."""
        self.follow()
        return self._hidden.get(file_id)

    def ways(self, mount: int, directory: str) -> tuple[Way, Way] | None:
        """See `objects.mounted`."""
        self.follow()
        for built in self._built.values():
            entry = built.tree.entries.get(mount)
            if entry is not None and lies_in(os.fsencode(directory) or b"/", entry.mountpoint):
                below = relative(os.fsencode(directory) or b"/", entry.mountpoint)
                origin, path = self._workshop.origin(entry)
                hidden = self._directories.get((mount, directory))
                opening = Way(built.mounts[mount], below) if hidden is None else Way(hidden, "")
                return Way(origin, f"{path}/{below}"), opening
        return None

    # -- building ----------------------------------------------------------------------------------------------------

    def build(self, place: NewNamespace) -> None:
        """Make what the images say, in a namespace that is a copy of another one."""
        confinement.check_namespace(self._restoration)
        tree = read_tree(self._restoration.checkpoint, place.number)
        built = self._built[place.number] = Built(place, tree, self._ids(place))
        possible = self._possible(tree)
        first = [entry for entry in possible if not self._layered(entry, tree)]
        later = [entry for entry in possible if self._layered(entry, tree)]
        self._provide(built, first)
        made = self._clone(built, first)
        namespace = {"mnt": place.descriptor}

        def assemble() -> None:
            top = os.open("/", _PLACE)
            try:
                api.set_propagation(top, api.MS_PRIVATE, recursive=True)
                api.attach(made[tree.root.mnt_id], top, "")
            finally:
                os.close(top)
            self._attach(built, [entry for entry in first if entry is not tree.root], made)
            os.fchdir(made[tree.root.mnt_id])
            api.pivot()

        places.inside(namespace, assemble)
        for entry in later:
            self._provide(built, [entry])
            made = self._clone(built, [entry])
            places.inside(namespace, partial(self._attach, built, [entry], made))
        self._workshop.remove_again()
        self._share(built)

    def complete(self) -> None:
        """A pid namespace has been made: mount what shows its processes, and what is on that."""
        for built in self._built.values():
            new = [entry for entry in self._possible(built.tree) if entry.mnt_id not in built.mounts]
            if new:
                ours = [number for number in built.mounts if not built.tree.entries[number].phaul_shared_outside]

                def part(built: Built = built, ours: list[int] = ours) -> None:
                    for number in ours:
                        api.set_propagation(built.mounts[number], api.MS_PRIVATE)

                places.inside({"mnt": built.place.descriptor}, part)
                self._add(built, new)

    def _possible(self, tree: MountTree) -> list[mnt_pb2.mnt_entry]:
        """The mounts that can be made, in their order: what shows the processes of a pid namespace needs that."""
        found: dict[int, mnt_pb2.mnt_entry] = {}
        for entry in tree.order():
            space = entry.phaul_pid_ns
            there = entry.ext_key or space == TREE or ("pid", space) in self._restoration.namespaces
            if there and (entry is tree.root or entry.parent_mnt_id in found):
                found[entry.mnt_id] = entry
        return list(found.values())

    def _add(self, built: Built, entries: Iterable[mnt_pb2.mnt_entry]) -> None:
        """Mount more, when all others are private."""
        for entry in entries:
            self._provide(built, [entry])
            made = self._clone(built, [entry])
            places.inside({"mnt": built.place.descriptor}, partial(self._attach, built, [entry], made))
        self._workshop.remove_again()
        self._share(built)

    def _ids(self, place: NewNamespace) -> Ids:
        """How the user namespace that a mount namespace belongs to numbers owners."""
        if place.owner:
            return Ids(*UserIds(self._restoration.checkpoint, place.owner).maps)
        return Ids.of_task(place.task.proc)

    def _layered(self, entry: mnt_pb2.mnt_entry, tree: MountTree) -> bool:
        """Whether a mount is of a file system that lies over others of the tree, or is on such a mount."""
        while entry is not tree.root:
            way = filesystems.way(filesystems.kind_of(entry))
            if way is Moving.LAYERED and not entry.ext_key:
                return True
            entry = tree.entries[entry.parent_mnt_id]
        return False

    def _provide(self, built: Built, entries: Iterable[mnt_pb2.mnt_entry]) -> None:
        """Have in the workshop what mounts are of."""
        missing: dict[int, list[mnt_pb2.mnt_entry]] = {}
        for entry in entries:
            if self._caught and built.place.of_root and entry is built.tree.root:
                self._workshop.add(entry.root_dev, entry.root, _clone_inside(built.place.descriptor, b"/"))
            elif self._caught and built.place.of_root and _is_of_runtime(entry):
                self._workshop.add(entry.root_dev, entry.root, _clone_inside(built.place.descriptor, entry.mountpoint))
            elif entry.ext_key or (built.place.of_root and entry is built.tree.root and not self._filled(entry)):
                path = self._path_outside(entry, is_root=built.place.of_root and entry is built.tree.root)
                what = f"the mount at {os_text(entry.mountpoint)}"
                confinement.check_mount(self._restoration, path, what)
                self._workshop.add(entry.root_dev, entry.root, self._clone_outside(path, entry))
        for entry in entries:
            if not self._workshop.has(entry.root_dev, entry.root):
                missing.setdefault(entry.root_dev, []).append(entry)
        if not missing:
            return
        with ExitStack() as stack:
            usual: Worker | None = None
            for same in missing.values():
                whole = min(same, key=lambda entry: len(entry.root))
                if whole.HasField("phaul_pid_ns"):
                    with self._worker_in(whole.phaul_pid_ns, built) as worker:
                        self._make(built, whole, worker)
                else:
                    usual = usual or stack.enter_context(_worker(built.place.descriptors))
                    self._make(built, whole, usual)

    def _worker_in(self, space: int, built: Built) -> Worker:
        """A process in a pid namespace, to mount what shows it. Whose that is says the pid namespace, not the mounter;
        and we may mount it, whatever else can be seen in the tree's mount namespace."""
        namespaces = self._restoration.namespaces
        if space != TREE:
            return Worker({"pid": namespaces["pid", space].descriptor}, modules=(making.__name__,))
        root = next((place for place in namespaces.values() if place.name == "pid" and place.of_root), None)
        found = {name: fd for name, fd in built.place.descriptors.items() if name != "pid"}
        return _worker(found | ({"pid": root.descriptor} if root else {}))

    def _filled(self, entry: mnt_pb2.mnt_entry) -> bool:
        return self._restoration.checkpoint.has(CONTENT, entry.root_dev)

    def _path_outside(self, entry: mnt_pb2.mnt_entry, *, is_root: bool) -> str:
        """Where on this host is what a mount is of."""
        options = self._restoration.options
        if is_root:
            path = externals.root(options) or os_text(entry.phaul_path)
            missing = "the images do not hold the root of the tree's mount namespace", "give its directory with --root"
        else:
            key = os_text(entry.ext_key)
            found = os_text(entry.source) if entry.ext_key == externals.FOUND else ""
            path = externals.given(options).get(key) or found
            what = f"the mount at {os_text(entry.mountpoint)} comes from outside of the tree"
            missing = what, f"say from where with --external mnt[{key}]:PATH"
        if not path:
            raise RebuildError(missing[0], advice=missing[1])
        return externals.place(options, path)

    def _clone_outside(self, path: str, entry: mnt_pb2.mnt_entry) -> int:
        init: int | None = self._restoration.scratch.get(pid_namespace.NAME)
        try:
            if init is not None and filesystems.kind_of(entry) == "proc":  # that of the tree's pid namespace
                return places.inside({"mnt": init}, lambda: api.clone(path))
            return api.clone(path)
        except OSError as error:
            raise RebuildError(
                f"cannot mount {path} at {os_text(entry.mountpoint)} of the tree: {error.strerror}",
                advice="make it here as it was at the source, or name another with --root or --external",
            ) from error

    def _make(self, built: Built, entry: mnt_pb2.mnt_entry, worker: Worker) -> None:
        """Make a file system anew, with what is in it."""
        kind = filesystems.kind_of(entry)
        if filesystems.way(kind) is Moving.OUTSIDE:
            raise RebuildError(
                f"the mount at {os_text(entry.mountpoint)} is of a file system that cannot be made anew",
                advice="name it with --external when the images are made, and when they are restored",
            )
        flags = filesystems.super_flag_names(entry.sb_flags)
        try:
            options = filesystems.unpack_options(entry)
            early = [flag for flag in flags if flag != "ro"]
            mount = worker.call(making.make, kind, os_text(entry.source), options, early).fd
        except InsideError as error:
            where = f"{kind} file system for {os_text(entry.mountpoint)}"
            raise RebuildError(f"cannot make the {where}: {error}") from error
        self._workshop.add(entry.root_dev, b"/", mount)
        if self._filled(entry):
            self._fill(entry.root_dev, built.ids)
        if "ro" in flags:
            api.reconfigure(mount, ["ro"])

    def _fill(self, device: int, ids: Ids) -> None:
        """Bring the content of a file system to what the images say."""
        root = self._workshop.root(device)
        if root is None:
            return
        (record,) = self._restoration.checkpoint.records(CONTENT, device)
        before = self._content.get(device)
        if before is not None and before[0] == record.payload:
            return
        content = archive.unpack(record.payload)
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
        try:
            ids.filing(lambda: archive.fill(directory, content, ids, before[1] if before else None))
        except OSError as error:
            raise RebuildError(f"cannot make a file of a file system of the tree: {error}") from error
        finally:
            os.close(directory)
        self._content[device] = record.payload, content, ids

    def _clone(self, built: Built, entries: list[mnt_pb2.mnt_entry]) -> dict[int, int]:
        """New mounts with their flags, attached nowhere; and what is open on them where no path will lead to."""
        unreachable = _unreachable(built.tree, self._restoration.checkpoint)

        def act() -> None:
            for entry in entries:
                if entry.deleted and not entry.HasField("phaul_removed"):
                    _guess_removed(entry, built)
                mount = built.mounts[entry.mnt_id] = self._workshop.clone(entry, built.ids)
                if not entry.phaul_shared_outside:
                    outside = entry.master_id and entry.master_id not in self._devices()
                    api.set_propagation(mount, api.MS_SLAVE if outside else api.MS_PRIVATE)
                api.set_flags(mount, entry.flags)
                for file_id, name in unreachable.get(entry.mnt_id, ()):
                    self._open_hidden(file_id, name, entry, mount)

        self._workshop.run(act)
        return built.mounts

    def _open_hidden(self, file_id: int, name: bytes, entry: mnt_pb2.mnt_entry, mount: int) -> None:
        """A file that other mounts will hide, and the directory it is in. It may be gone: then it is a ghost."""
        directory = os.path.dirname(os_text(name))
        key = entry.mnt_id, directory
        with suppress(FileNotFoundError, NotADirectoryError):
            if lies_in(os.fsencode(directory), entry.mountpoint) and key not in self._directories:
                path = relative(os.fsencode(directory), entry.mountpoint) or "."
                self._directories[key] = os.open(path, _PLACE | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=mount)
            path = relative(name, entry.mountpoint) or "."
            self._hidden[file_id] = os.open(path, _PLACE | os.O_NOFOLLOW, dir_fd=mount)

    def _attach(self, built: Built, entries: Iterable[mnt_pb2.mnt_entry], made: dict[int, int]) -> None:
        """Put mounts where they belong. To be called in the namespace."""
        for entry in entries:
            try:
                api.attach(made[entry.mnt_id], built.mounts[entry.parent_mnt_id], built.tree.place(entry))
            except OSError as error:
                raise RebuildError(
                    f"cannot mount anything at {os_text(entry.mountpoint)}: {error.strerror}",
                    advice="what it is mounted on has to be there as it was at the source",
                ) from error

    # -- sharing -----------------------------------------------------------------------------------------------------

    def _devices(self) -> dict[int, int]:
        """The peer groups of the tree, with the file system of each."""
        checkpoint = self._restoration.checkpoint
        records = (record for ident in checkpoint.idents(IMAGE) for record in checkpoint.records(IMAGE, ident))
        return {one.message.shared_id: one.message.root_dev for one in records if one.message.shared_id}

    def _masters(self) -> dict[int, int]:
        checkpoint = self._restoration.checkpoint
        records = (record for ident in checkpoint.idents(IMAGE) for record in checkpoint.records(IMAGE, ident))
        return {one.message.shared_id: one.message.master_id for one in records if one.message.shared_id}

    def _share(self, built: Built) -> None:
        """Give mounts their peers and masters."""
        devices, masters = self._devices(), self._masters()
        groups: dict[int, int] = {}
        sharing = [built.tree.entries[number] for number in built.mounts]
        sharing = [entry for entry in sharing if not entry.phaul_shared_outside]

        def find() -> None:
            for entry in sharing:
                group = entry.shared_id or entry.master_id
                if group in devices and (not entry.master_id or entry.master_id in devices):
                    groups[entry.mnt_id] = self._workshop.group(group, masters, devices, entry)

        def join() -> None:
            for entry in sharing:
                mount = built.mounts[entry.mnt_id]
                if entry.mnt_id in groups:
                    api.share(groups[entry.mnt_id], mount)
                    if not entry.shared_id:
                        api.set_propagation(mount, api.MS_SLAVE)
                elif entry.shared_id:  # its master, which is outside, it has from what it was cloned from
                    api.set_propagation(mount, api.MS_SHARED)
                if entry.flags & api.MS_UNBINDABLE:
                    api.set_propagation(mount, api.MS_UNBINDABLE)

        self._workshop.run(find)
        places.inside({"mnt": built.place.descriptor}, join)

    # -- later images ------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Bring all namespaces to what the images say by now."""
        checkpoint = self._restoration.checkpoint
        if self._followed is checkpoint:
            return
        before, self._followed = self._followed, checkpoint
        for device in list(self._content):
            if checkpoint.has(CONTENT, device):
                self._fill(device, self._content[device][2])
        for number, built in self._built.items():
            if checkpoint.has(IMAGE, number) and not _same(before, checkpoint, number):
                self._change(built, read_tree(checkpoint, number))

    def _change(self, built: Built, tree: MountTree) -> None:
        """Mounts were added, removed or changed in a namespace that was made."""
        old = built.tree
        if _mount_of(old.root) != _mount_of(tree.root):
            raise RebuildError("the root of a mount namespace changed while the tree was moved", advice="try again")
        kept = {
            number
            for number, entry in old.entries.items()
            if number in tree.entries and _mount_of(entry) == _mount_of(tree.entries[number])
        }
        for entry in old.order():  # what is on a mount that goes, goes too
            if entry is not old.root and entry.parent_mnt_id not in kept:
                kept.discard(entry.mnt_id)
        kept &= built.mounts.keys()
        gone = [entry for entry in old.order() if entry.mnt_id in built.mounts and entry.mnt_id not in kept]

        def remove() -> None:
            for mount in built.mounts.values():
                api.set_propagation(mount, api.MS_PRIVATE)
            for entry in reversed(gone):
                os.fchdir(built.mounts[entry.parent_mnt_id])
                api.detach(old.place(entry) or ".")
            os.chdir("/")
            for number in kept:
                api.set_flags(built.mounts[number], tree.entries[number].flags)

        places.inside({"mnt": built.place.descriptor}, remove)
        for entry in gone:
            os.close(built.mounts.pop(entry.mnt_id))
        built.tree = tree
        self._add(built, [entry for entry in self._possible(tree) if entry.mnt_id not in kept])


def read_tree(checkpoint: Checkpoint, number: int) -> MountTree:
    """The mounts of a namespace in images; ImageError if they are no tree."""
    return MountTree(record.message for record in checkpoint.records(IMAGE, number))


def _same(before: Checkpoint, now: Checkpoint, number: int) -> bool:
    old, new = before.share(IMAGE, number), now.share(IMAGE, number)
    if old is new:
        return True
    return old is not None and new is not None and [one.message for one in old] == [one.message for one in new]


def _mount_of(entry: mnt_pb2.mnt_entry) -> tuple[object, ...]:
    """What cannot be changed in a mount that is there."""
    return (
        *(entry.parent_mnt_id, entry.mountpoint, entry.root_dev, entry.root, entry.deleted),
        *(entry.ext_key, entry.fstype, entry.options, entry.sb_flags),
    )


def _worker(found: Mapping[str, int]) -> Worker:
    """A process that is where the first task of a namespace is, as far as that is not where we are."""
    names = [name for name, fd in found.items() if name != "time" and not places.same_namespace(fd, name)]
    return Worker(found, names=names, modules=(making.__name__,))


def _is_of_runtime(entry: mnt_pb2.mnt_entry) -> bool:
    """Whether a mount is what the runtime mounts, or has the consoles in it whose masters the runtime holds."""
    kind = filesystems.kind_of(entry)
    return entry.ext_key == externals.RUNTIME or (kind, entry.mountpoint, entry.root) == ("devpts", b"/dev/pts", b"/")


def _clone_inside(namespace: int, point: bytes) -> int:
    """What the runtime of a container has mounted, in a namespace that it has made (`catching`)."""
    try:
        return places.inside({"mnt": namespace}, lambda: api.clone(os_text(point)))
    except OSError as error:
        what = f"the runtime has mounted nothing at {os_text(point)} of the container here: {error.strerror}"
        raise RebuildError(what, advice="create the container there with the same options") from error


def _guess_removed(entry: mnt_pb2.mnt_entry, built: Built) -> None:
    """Images of CRIU do not tell what was deleted: it is a file if it is mounted on one."""
    status = os.stat(built.tree.place(entry) or ".", dir_fd=built.mounts[entry.parent_mnt_id], follow_symlinks=False)
    mode = stat.S_IFDIR | 0o755 if stat.S_ISDIR(status.st_mode) else stat.S_IFREG | 0o600
    entry.phaul_removed.mode, entry.phaul_removed.uid, entry.phaul_removed.gid = mode, 0, 0


def _unreachable(tree: MountTree, checkpoint: Checkpoint) -> dict[int, list[tuple[int, bytes]]]:
    """The files that are open, and the names of sockets, on mounts where no path leads to: ids and names by mount."""
    found: dict[int, list[tuple[int, bytes]]] = {}
    for record in checkpoint.records("files"):
        one = record.message
        if one.type == fdinfo_pb2.REG:
            number, name = one.reg.mnt_id, one.reg.name
        elif one.type == fdinfo_pb2.UNIXSK:
            number, name = one.usk.mnt_id, one.usk.phaul_path
        else:
            continue
        entry = tree.entries.get(number)
        if entry is not None and lies_in(name, entry.mountpoint) and tree.at(name) is not entry:
            found.setdefault(number, []).append((one.id, name))
    return found
