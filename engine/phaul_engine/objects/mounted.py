"""Files and the mounts they are open on, where a tree has mount namespaces of its own.

A name starts from the root of a mount namespace, and a mount may hide what it leads to. So the image of a file says on
which mount it is open, by the mount's number, and mounts know the rest (`namespaces.mnt`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Protocol

from phaul_engine import calls
from phaul_engine.numbering import TREE

from .base import Collection, Descriptor, Owner, Restoration

SCRATCH = "mnt"
"""Where in `scratch` of a collection is a `Source`, and in that of a restoration a `Target`."""
NOWHERE = -1
"""The number where no mount is told: the file is found by its name from the root of the tree's mount namespace."""


@dataclass(frozen=True)
class Way:
    """A directory: `path` from what descriptor `root` is of, without a leading slash."""

    root: int
    path: str


class Source(Protocol):
    """The mounts of the tree's own mount namespaces, at the source."""

    def own(self, owner: Owner) -> bool:
        """Whether a process is in such a namespace."""

    def known_in(self, owner: Owner, mount: int) -> bool:
        """Whether a mount is one of those of the namespace that a process is in."""

    def leads_to(self, owner: Owner, name: str) -> int:
        """The mount of that namespace that a name leads to."""

    def hides(self, owner: Owner, mount: int, name: str) -> bool:
        """Whether the name of a file that is open on a mount leads to another mount now."""

    def shows(self, owner: Owner, mount: int) -> int:
        """The pid namespace whose processes a proc file system shows, as `numbering` calls it."""

    def comes_along(self, device: int) -> bool:
        """Whether a file system, by the number that stat(2) tells, is carried with all its files."""

    def in_tree(self, owner: Owner, mount: int) -> bool:
        """Whether a mount is of something in a directory of this host that goes along by itself."""


class Target(Protocol):
    """The same at the destination; descriptors stay the giver's."""

    def root_of(self, mount: int) -> int | None:
        """The root of the mount namespace that a mount is in; None if there is no such mount."""

    def maker_of(self, mount: int) -> tuple[int, int] | None:
        """The user and group of ours that are root to the file system of a mount, if it was made for the tree."""

    def hidden(self, file_id: int) -> int | None:
        """A file that no name leads to, as an O_PATH descriptor; None of any other."""

    def ways(self, mount: int, directory: str) -> tuple[Way, Way] | None:
        """To a directory, by its name in the namespace of a mount: where files can be made in it, even if that mount is
        read-only, and where it is on that mount. None if nothing is known of the mount."""


def number_of(descriptor: Descriptor, collection: Collection) -> int:
    """The mount that a file is open on, as images name it; or, if it is mounted no more, or outside, that which the
    file's name leads to."""
    source: Source | None = collection.scratch.get(SCRATCH)
    if source is None or not source.own(descriptor.owner):
        return NOWHERE
    number = _open_on(descriptor)
    return number if source.known_in(descriptor.owner, number) else source.leads_to(descriptor.owner, descriptor.link)


def _open_on(descriptor: Descriptor) -> int:
    number = descriptor.info.mnt_id
    return number if number != NOWHERE else calls.mount_id(descriptor.own)


def number_at(own: int, owner: Owner, collection: Collection) -> int:
    """The same of an O_PATH descriptor of ours."""
    source: Source | None = collection.scratch.get(SCRATCH)
    return calls.mount_id(own) if source is not None and source.own(owner) else NOWHERE


def is_hidden(descriptor: Descriptor, mount: int, collection: Collection) -> bool:
    """Whether a file is where its name said, below a mount that hides it."""
    source: Source | None = collection.scratch.get(SCRATCH)
    return source is not None and mount != NOWHERE and source.hides(descriptor.owner, mount, descriptor.link)


def is_attached(descriptor: Descriptor, mount: int, collection: Collection) -> bool:
    """Whether the mount that a file is on is still mounted in the process's mount namespace."""
    return mount == NOWHERE or _open_on(descriptor) == mount


def processes(descriptor: Descriptor, collection: Collection) -> set[int]:
    """What the processes of the tree are called by the proc file system that a file is on."""
    source: Source | None = collection.scratch.get(SCRATCH)
    if source is None or not source.own(descriptor.owner):
        return collection.numbers_in(TREE)
    return collection.numbers_in(source.shows(descriptor.owner, number_of(descriptor, collection)))


def comes_along(device: int, collection: Collection) -> bool:
    """Whether a file system is carried with all its files."""
    source: Source | None = collection.scratch.get(SCRATCH)
    return source is not None and source.comes_along(device)


def in_tree(descriptor: Descriptor, collection: Collection) -> bool:
    """Whether a file is in a directory of this host that goes along by itself."""
    source: Source | None = collection.scratch.get(SCRATCH)
    if source is None or not source.own(descriptor.owner):
        return False
    return source.in_tree(descriptor.owner, _open_on(descriptor))


def names_start(mount: int, restoration: Restoration) -> int:
    """The directory that names of files on a mount start from, to be closed by the caller."""
    target: Target | None = restoration.scratch.get(SCRATCH)
    root = target.root_of(mount) if target is not None and mount > 0 else None
    if root is None:
        root = restoration.root
    if root is None:
        return os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return os.dup(root)


def is_own(mount: int, restoration: Restoration) -> bool:
    """Whether a mount is of a mount namespace of the tree's own. What of this host is in that was asked about when it
    was mounted (`confinement.check_mount`)."""
    target: Target | None = restoration.scratch.get(SCRATCH)
    return target is not None and mount > 0 and target.root_of(mount) is not None


def maker(mount: int, restoration: Restoration) -> tuple[int, int] | None:
    """As whom to make files on a mount, for `Restoration.filing`: one that a user namespace below the tree's has made
    knows nobody else."""
    target: Target | None = restoration.scratch.get(SCRATCH)
    return target.maker_of(mount) if target is not None and mount > 0 else None


def hidden(file_id: int, restoration: Restoration) -> int | None:
    """A file that no name leads to, as an O_PATH descriptor that stays ours; None of any other."""
    target: Target | None = restoration.scratch.get(SCRATCH)
    return target.hidden(file_id) if target is not None else None


def ways(mount: int, directory: str, restoration: Restoration) -> tuple[Way, Way]:
    """Where to make files in a directory, and where to open them; the roots are to be closed by the caller."""
    target: Target | None = restoration.scratch.get(SCRATCH)
    found = target.ways(mount, directory) if target is not None and mount > 0 else None
    if found is None:
        way = Way(names_start(mount, restoration), directory.strip("/"))
        return way, Way(os.dup(way.root), way.path)
    making, opening = found
    return Way(os.dup(making.root), making.path), Way(os.dup(opening.root), opening.path)
