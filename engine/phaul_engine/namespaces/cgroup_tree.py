"""The cgroups below the root of a tree's cgroup namespace (cgroups(7), kernel doc admin-guide/cgroup-v2.rst).

The image is CRIU's: which cgroup each task is in, and the directories with what is set in them. Here it is of the
version 2 hierarchy alone. Paths in it are as the source host has them; the first part, whose length it tells, is the
root of the namespace, which is another one at the destination.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from phaul_engine.cgroup import Hierarchy
from phaul_engine.errors import RebuildError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import cgroup_pb2
from phaul_engine.user_ids import UserIds

IMAGE = "cgroup"
_PATH = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_SUBTREE = "cgroup.subtree_control"
_ACTS = ("cgroup.procs", "cgroup.threads", "cgroup.kill", "cgroup.freeze", "cgroup.type")
_TRIGGERS = (".pressure", ".reclaim", ".peak", ".events", ".force_empty")  # what writing to does something once
_LARGEST = 4096


@dataclass
class Layout:
    """What an image says: the root of the namespace in the words of the source host, the directories below it, in their
    order, and where each set of tasks is, both from that root: "" is the root itself."""

    home: str
    directories: dict[str, cgroup_pb2.cgroup_dir_entry] = field(default_factory=dict)
    sets: dict[int, str] = field(default_factory=dict)


def read(checkpoint: Checkpoint) -> Layout | None:
    """The image, if there is one: trees whose tasks are all at the root of their namespace have none."""
    if not checkpoint.has(IMAGE):
        return None
    entry = checkpoint.one(IMAGE)
    layout = Layout("/")
    for one in entry.sets:
        for member in one.ctls:
            path = os.fsdecode(member.path)
            layout.home = path[: member.cgns_prefix] or "/"
            layout.sets[one.id] = path[member.cgns_prefix :].strip("/")
    for controller in entry.controllers:
        for top in controller.dirs:
            layout.directories.update(_flat(top, ""))
    return layout


def _flat(entry: cgroup_pb2.cgroup_dir_entry, path: str) -> Iterator[tuple[str, cgroup_pb2.cgroup_dir_entry]]:
    yield path, entry
    for one in entry.properties:
        if not _is_setting(os.fsdecode(one.name)) or b"/" in one.name:
            raise RebuildError(f"{os.fsdecode(one.name)!r} is nothing that is set in a cgroup")
    for child in entry.children:
        name = os.fsdecode(child.dir_name)
        if not name or "/" in name or name in (".", ".."):
            raise RebuildError(f"a cgroup cannot have the name {name!r}")
        yield from _flat(child, f"{path}/{name}".lstrip("/"))


def write(
    checkpoint: Checkpoint, home: str, top: cgroup_pb2.cgroup_dir_entry, places: Mapping[int, str]
) -> dict[int, int]:
    """Put the image into a checkpoint: the directories, and the place of each task, by its number in the images.
    Returned are the numbers of their sets."""
    image = cgroup_pb2.cgroup_entry()
    numbers: dict[str, int] = {}
    prefix = "" if home == "/" else home
    for place in places.values():
        if place not in numbers:
            numbers[place] = len(numbers) + 1
            path = os.fsencode(f"{prefix}/{place}" if place else prefix or "/")
            image.sets.add(id=numbers[place]).ctls.add(name="", path=path, cgns_prefix=len(os.fsencode(prefix)))
    image.controllers.add(cnames=[""]).dirs.append(top)
    checkpoint.put(IMAGE, None, image)
    return {pid: numbers[place] for pid, place in places.items()}


# -- at the source -------------------------------------------------------------------------------------------------


def names(hierarchy: Hierarchy, home: str, spare: str) -> list[str]:
    """The directories below a cgroup, without those whose names begin with `spare`."""
    top = hierarchy.open(home)
    try:
        base = f"/proc/self/fd/{top}/"
        found = []
        for directory, below, _ in os.walk(base):
            if directory == base:
                below[:] = [name for name in below if not name.startswith(spare)]
            below.sort()
            found += [os.path.join(directory, name)[len(base) :] for name in below]
        return found
    finally:
        os.close(top)


def describe(hierarchy: Hierarchy, home: str, below: list[str], ids: UserIds) -> cgroup_pb2.cgroup_dir_entry:
    """A cgroup and those below it, with what is set in them."""
    top = hierarchy.open(home)
    try:
        entries = {"": _describe(f"/proc/self/fd/{top}", ids)}
        entries[""].dir_name = os.fsencode(home)
        for path in below:
            with contextlib.suppress(FileNotFoundError):  # it has been removed meanwhile
                entry = _describe(f"/proc/self/fd/{top}/{path}", ids)
                parent, _, name = path.rpartition("/")
                entry.dir_name = os.fsencode(name)
                entries[path] = entries[parent].children.add()
                entries[path].CopyFrom(entry)
        return entries[""]
    finally:
        os.close(top)


def _describe(directory: str, ids: UserIds) -> cgroup_pb2.cgroup_dir_entry:
    status = os.stat(directory)
    entry = cgroup_pb2.cgroup_dir_entry(dir_name=b"")
    entry.dir_perms.mode = stat.S_IMODE(status.st_mode)
    entry.dir_perms.uid, entry.dir_perms.gid = ids.uid_inside(status.st_uid), ids.gid_inside(status.st_gid)
    for name in sorted(os.listdir(directory)):
        path = f"{directory}/{name}"
        found = os.lstat(path)
        if stat.S_ISREG(found.st_mode) and (found.st_mode & stat.S_IWUSR) and _is_setting(name):
            with contextlib.suppress(OSError), open(path, "rb") as file:  # some can be written only
                entry.properties.add(name=os.fsencode(name), value=file.read(_LARGEST))
    for name in sorted(os.listxattr(directory)):
        entry.phaul_xattrs.add(name=os.fsencode(name), value=os.getxattr(directory, name))
    return entry


def _is_setting(name: str) -> bool:
    return name not in _ACTS and (name == "cgroup.pressure" or not name.endswith(_TRIGGERS))


# -- at the destination --------------------------------------------------------------------------------------------


def make(hierarchy: Hierarchy, home: str, layout: Layout, ids: UserIds) -> list[str]:
    """Have the directories below `home`; those that were made are returned."""
    made = []
    for path, entry in layout.directories.items():
        if path:
            with contextlib.suppress(FileExistsError):
                os.mkdir(f"{home.strip('/')}/{path}".lstrip("/"), dir_fd=hierarchy.root)
                made.append(path)
            _dress(hierarchy, f"{home.rstrip('/')}/{path}", entry, ids)  # the root is the host's to dress
    return made


def _dress(hierarchy: Hierarchy, path: str, entry: cgroup_pb2.cgroup_dir_entry, ids: UserIds) -> None:
    directory = hierarchy.open(path)
    try:
        place = f"/proc/self/fd/{directory}/."
        if entry.HasField("dir_perms"):
            os.chown(place, ids.uid_here(entry.dir_perms.uid), ids.gid_here(entry.dir_perms.gid))
            os.chmod(place, entry.dir_perms.mode)
        there = {name: os.getxattr(place, name) for name in os.listxattr(place)}
        for attribute in entry.phaul_xattrs:
            name = os.fsdecode(attribute.name)
            if there.get(name) != attribute.value:
                os.setxattr(place, name, attribute.value)
    except OSError as error:
        raise RebuildError(f"cgroup {path} cannot be made as it was: {error.strerror}") from error
    finally:
        os.close(directory)


def set_all(hierarchy: Hierarchy, home: str, layout: Layout) -> None:
    """Have set what the images say, where it differs: when tasks are where they belong, since a cgroup with tasks gives
    no controllers to those below it."""
    for path, entry in layout.directories.items():
        properties = {os.fsdecode(one.name): one.value for one in entry.properties}
        directory = hierarchy.open(f"{home.rstrip('/')}/{path}")
        try:
            _enable(directory, path, properties.pop(_SUBTREE, b""))
            for name, value in properties.items() if path else ():  # those of the root are the host's to say
                _set(directory, path, name, value)
        finally:
            os.close(directory)


def _enable(directory: int, path: str, wanted: bytes) -> None:
    there = set(_read(directory, _SUBTREE).split())
    missing = [name for name in wanted.split() if name not in there]
    if missing:
        _write(directory, path, _SUBTREE, b" ".join(b"+" + name for name in missing))


def _set(directory: int, path: str, name: str, value: bytes) -> None:
    try:
        if _read(directory, name) == value:
            return
    except FileNotFoundError:
        raise RebuildError(f"the cgroups of this host have no {name}, which {path} has") from None
    for line in value.splitlines() or [b""]:
        _write(directory, path, name, line)


def _read(directory: int, name: str) -> bytes:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    with open(fd, "rb") as file:
        return file.read(_LARGEST)


def _write(directory: int, path: str, name: str, value: bytes) -> None:
    try:
        fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
        try:
            os.write(fd, value)
        finally:
            os.close(fd)
    except OSError as error:
        text = os.fsdecode(value)
        raise RebuildError(f"cgroup {path or '/'} cannot have {name} = {text}: {error.strerror}") from error


def remove(hierarchy: Hierarchy, home: str, paths: list[str]) -> None:
    """Remove directories that are empty; whoever else has done so, or uses one, is in nobody's way."""
    for path in sorted(paths, key=len, reverse=True):
        try:
            os.rmdir(f"{home.strip('/')}/{path}".lstrip("/"), dir_fd=hierarchy.root)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EBUSY):
                raise
