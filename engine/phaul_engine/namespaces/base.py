"""What a kind of namespace offers, and what it is given (namespaces(7)).

A tree may have namespaces of its own: those of a container, whose first process is the root of the tree, or of single
processes in it. Namespaces that the engine itself is in are not the tree's; they stay, and the tree finds others in
their place at the destination. Every other one has a number in the images (`ids`), which is the name of its own image
files too ("utsns-9.img"). Namespaces that several tasks are in have one number.

One module is one kind, with both directions side by side, as with kinds of objects: `collect` puts images of a
namespace into the checkpoint, `rebuild` makes what they say in a new namespace, `settle` brings it to its last state
in the freeze. Modules register an instance with `namespace_kind`; the order of registration (`catalogue`) is the order
in which they are collected and rebuilt.

What has to be done by a process that is in the namespaces runs in one (`inside`), or, where a thread will do, in a
thread (`objects.places`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from phaul_engine.objects.base import Collection, Owner, Restoration, SkeletonTask


@dataclass(frozen=True)
class NamespaceView:
    """A namespace at the source. `number` is what it is called in images, `owner` the process in it that is nearest to
    the root of the tree, `members` all processes that are in it, `of_root` whether the root is. In a `survey` the tree
    runs on afterwards: nothing may be changed in it, and large contents may be left out.

    `lord` is a process in the user namespace that it belongs to, or, of a user namespace, in its parent; `above` is the
    number of that if it is below the root's, else 0. Of a user namespace below the root's, `maker` is who made it, as
    the engine numbers users, `parent` the number of its parent, and `owns` are the numbers of others that belong to
    it. Of a pid namespace below the root's, `parent` is the number of its parent, -1 if nobody of the tree is in that.
    `spaces` are the pid namespaces of the tree, as `numbering` calls them, by device and inode."""

    name: str
    number: int
    owner: Owner
    members: tuple[Owner, ...]
    of_root: bool
    survey: bool
    lord: Owner
    above: int = 0
    maker: int = 0
    parent: int = 0
    owns: tuple[int, ...] = ()
    spaces: Mapping[tuple[int, int], int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"the {self.name} namespace of {self.owner}"


@dataclass
class NewNamespace:
    """A namespace at the destination, new and empty. `task` is a skeleton task that is in it: interpreting, so that
    `Restoration.inside` runs programs in it. `descriptors` are the namespaces that this task is in, by kind: what
    setns(2) takes; they are open as long as the skeleton. `owner` is the number of the user namespace that it belongs
    to, if that is below the tree's, whose task is not in that yet: `descriptors` has it."""

    name: str
    number: int
    task: SkeletonTask
    of_root: bool
    descriptors: dict[str, int] = field(default_factory=dict)
    owner: int = 0

    @property
    def descriptor(self) -> int:
        """Of the namespace itself."""
        return self.descriptors[self.name]


class NamespaceKind(ABC):
    """A kind of namespace."""

    name: ClassVar[str]  # as in /proc/PID/ns
    flag: ClassVar[int]  # CLONE_NEW*
    at_birth: ClassVar[bool] = True  # made for the first task in it, before `rebuild`, which else makes it

    @abstractmethod
    def collect(self, view: NamespaceView, collection: Collection) -> None:
        """Put images of a namespace into `collection.checkpoint`; what cannot be carried goes to `collection.block`.
        Called once a pass for each, after tasks and before files, when nothing is injected any more."""

    @abstractmethod
    def rebuild(self, place: NewNamespace, restoration: Restoration) -> None:
        """Make what the images say, early: right after the first task that is in it was born, which has no memory and
        no descriptors yet, and before any other task that is in it."""

    def welcome(self, place: NewNamespace, task: SkeletonTask, restoration: Restoration) -> None:
        """Another task has been born that is in it, and has nothing yet."""

    def complete(self, place: NewNamespace, restoration: Restoration) -> None:
        """A pid namespace of the tree has been made: what had to wait for it can be."""

    def update(self, place: NewNamespace, restoration: Restoration) -> None:
        """A round of pre-copy has brought other images: follow, where the tasks that follow next need it."""

    def settle(self, place: NewNamespace, restoration: Restoration) -> None:
        """Bring it to its final state, in the freeze: the images in `restoration.checkpoint` are the last ones. Only
        what differs is to be touched."""

    def release(self, place: NewNamespace, restoration: Restoration) -> None:
        """Called after the commit, before the tasks run: what nobody may notice before."""

    def let_go(self, place: NewNamespace, restoration: Restoration) -> None:
        """Called when all objects have been released, before the tasks run: close what they would be hindered by."""

    def discard(self, place: NewNamespace, restoration: Restoration) -> None:
        """Called when the tree will not run here: remove what would outlive the namespace."""


_kinds: dict[str, NamespaceKind] = {}


def namespace_kind(kind: type[NamespaceKind]) -> type[NamespaceKind]:
    """Class decorator: register a kind."""
    _kinds[kind.name] = kind()
    return kind


def kinds() -> Iterator[NamespaceKind]:
    """All kinds, in their order."""
    return iter(_kinds.values())


def kind_named(name: str) -> NamespaceKind | None:
    """The kind of that name; None if none is registered: such a namespace is a blocker."""
    return _kinds.get(name)
