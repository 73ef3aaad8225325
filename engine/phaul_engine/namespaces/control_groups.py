"""Cgroup namespaces (cgroup_namespaces(7)): what is the root of all cgroups to a tree is the cgroup that it lives in.

At the destination it is the cgroup that the tree will live in, whatever its name is there. If the tree has cgroups
below it, as systemd makes them, they are made there (`cgroup_tree`), and each task put into its own as soon as it is
born.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import ClassVar

from phaul_engine.cgroup import PREFIX, Hierarchy
from phaul_engine.errors import RebuildError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import cgroup_pb2
from phaul_engine.objects import cgroup_set, places
from phaul_engine.objects.base import Collection, Restoration, SkeletonTask
from phaul_engine.proc import access
from phaul_engine.proc.cgroup import CgroupMembership, read_cgroups, unified_path
from phaul_engine.program import Program
from phaul_engine.syscalls import NR

from . import cgroup_tree
from .base import NamespaceKind, NamespaceView, NewNamespace, namespace_kind

_NAME = "cgroups"


@dataclass
class _Described:
    """The directories as they were when a survey looked at them."""

    below: list[str]
    top: cgroup_pb2.cgroup_dir_entry


@dataclass
class _Made:
    """A tree of cgroups at the destination. `places` is where tasks were put, by their numbers in the images."""

    hierarchy: Hierarchy
    home: str
    layout: cgroup_tree.Layout
    made: list[str] = field(default_factory=list)
    places: dict[int, str] = field(default_factory=dict)


@namespace_kind
class ControlGroups(NamespaceKind):
    """Its root is the cgroup that its first task is in when it is made. Until the tree is let go a cgroup of ours below
    may hold it."""

    name: ClassVar = "cgroup"
    flag: ClassVar = 0x02000000
    at_birth: ClassVar = False

    def collect(self, view: NamespaceView, collection: Collection) -> None:
        inner = _seen_from_inside(view)
        _judge(view, inner, collection)
        paths = {pid: next((one.path for one in found if one.unified), "/") for pid, found in inner.items()}
        own = {pid: "" if path.startswith(f"/{PREFIX}") else path.strip("/") for pid, path in paths.items()}
        if not view.of_root:
            return
        outer = unified_path(view.owner.proc) or "/"
        home = outer.removesuffix(paths[view.owner.inner_pid]) or "/"
        with Hierarchy.find() as hierarchy:
            below = cgroup_tree.names(hierarchy, home, PREFIX)
            if not below:
                return
            known: _Described | None = collection.memory.get(_NAME)
            if known is None or view.survey or known.below != below:
                known = _Described(below, cgroup_tree.describe(hierarchy, home, below, collection.ids))
                collection.memory[_NAME] = known
        sets = cgroup_tree.write(collection.checkpoint, home, known.top, own)
        collection.scratch[cgroup_set.SETS] = sets

    def rebuild(self, place: NewNamespace, restoration: Restoration) -> None:
        if place.owner:  # it was made by another process, and joined
            return
        home = unified_path(place.task.proc) or "/"
        above, _, name = home.rpartition("/")
        ours = name.startswith(PREFIX)
        program = Program()
        program.order(NR.unshare, self.flag, label="make a cgroup namespace")
        assert restoration.inside is not None
        with contextlib.ExitStack() as stack:
            if ours:
                hierarchy = stack.enter_context(Hierarchy.find())
                hierarchy.put(place.task.pid, above or "/")
                stack.callback(hierarchy.put, place.task.pid, home)
            restoration.inside(place.task.inner_pid, program)
        layout = cgroup_tree.read(restoration.checkpoint) if place.of_root else None
        if layout is not None:
            made = restoration.scratch[_NAME] = _Made(Hierarchy.find(), (above or "/") if ours else home, layout)
            made.made = cgroup_tree.make(made.hierarchy, made.home, layout, restoration.ids)
            self.welcome(place, place.task, restoration)
            cgroup_tree.set_all(made.hierarchy, made.home, layout)

    def welcome(self, place: NewNamespace, task: SkeletonTask, restoration: Restoration) -> None:
        made: _Made | None = restoration.scratch.get(_NAME)
        if made is None:
            return
        wanted = _place_of(task.inner_pid, made.layout, restoration.checkpoint)
        if made.places.get(task.inner_pid) == wanted:
            return
        there = (unified_path(task.proc) or "/").removeprefix(made.home).strip("/")
        held = there.startswith(PREFIX)  # what holds the tree stands for its root
        if held and wanted:
            raise RebuildError(f"process {task.inner_pid} has gone to another cgroup, {wanted}, since it was looked at")
        if there != wanted and not held:  # else it was born where it belongs
            made.hierarchy.put(task.pid, f"{made.home.rstrip('/')}/{wanted}")
        made.places[task.inner_pid] = wanted

    def update(self, place: NewNamespace, restoration: Restoration) -> None:
        self.settle(place, restoration)

    def settle(self, place: NewNamespace, restoration: Restoration) -> None:
        made: _Made | None = restoration.scratch.get(_NAME)
        layout = cgroup_tree.read(restoration.checkpoint)
        if made is None or layout is None:
            return
        before, made.layout = made.layout, layout
        if before.directories != layout.directories:
            made.made += cgroup_tree.make(made.hierarchy, made.home, layout, restoration.ids)
        for inner_pid in sorted(made.places.keys() - restoration.tasks.keys()):
            del made.places[inner_pid]
        for task in restoration.tasks.values():
            if task.inner_pid in made.places:
                self.welcome(place, task, restoration)
        if before.directories != layout.directories:
            cgroup_tree.set_all(made.hierarchy, made.home, layout)
            gone = [path for path in made.made if path not in layout.directories]
            cgroup_tree.remove(made.hierarchy, made.home, gone)

    def let_go(self, place: NewNamespace, restoration: Restoration) -> None:
        made: _Made | None = restoration.scratch.pop(_NAME, None)
        if made is not None:
            made.hierarchy.close()

    def discard(self, place: NewNamespace, restoration: Restoration) -> None:
        made: _Made | None = restoration.scratch.pop(_NAME, None)
        if made is not None:
            cgroup_tree.remove(made.hierarchy, made.home, made.made)
            made.hierarchy.close()


def root_for(inner_pid: int, restoration: Restoration) -> str:
    """The cgroup that a cgroup namespace below the tree's is to begin at, in which a process is the first."""
    made: _Made | None = restoration.scratch.get(_NAME)
    if made is not None:
        return f"{made.home.rstrip('/')}/{_place_of(inner_pid, made.layout, restoration.checkpoint)}"
    home = unified_path(next(iter(restoration.tasks.values())).proc) or "/"
    above, _, name = home.rpartition("/")
    return (above or "/") if name.startswith(PREFIX) else home


def home_of_spread(checkpoint: Checkpoint) -> str | None:
    """The root of the tree's cgroup namespace, in the words of the source host, if tasks are in cgroups below it: then
    nothing smaller holds them all."""
    layout = cgroup_tree.read(checkpoint)
    return layout.home if layout is not None and any(layout.sets.values()) else None


def _place_of(inner_pid: int, layout: cgroup_tree.Layout, checkpoint: Checkpoint) -> str:
    return layout.sets.get(checkpoint.one("core", inner_pid).thread_core.cg_set, "")


def _seen_from_inside(view: NamespaceView) -> dict[int, tuple[CgroupMembership, ...]]:
    """The cgroups of all in a namespace, as it shows them, by their numbers in the images."""
    namespace = access.open_at(view.owner.proc, "ns/cgroup")
    try:
        return places.inside(
            {"cgroup": namespace}, lambda: {owner.inner_pid: read_cgroups(owner.proc) for owner in view.members}
        )
    finally:
        os.close(namespace)


def _judge(view: NamespaceView, inner: dict[int, tuple[CgroupMembership, ...]], collection: Collection) -> None:
    for owner in view.members:
        for one in inner[owner.inner_pid]:
            at_root = one.path == "/" or one.path.startswith(f"/{PREFIX}")
            if one.path.startswith("/..") or (not view.of_root and not at_root):
                why = "only cgroups below the root of the tree's own cgroup namespace are made again"
                collection.block(owner, f"in cgroup {one.path} of its cgroup namespace", why, "move it to the root")
            elif not one.unified and not at_root:
                why = "cgroups of version 1 are not made again"
                collection.block(
                    owner, f"in cgroup {one.path} of {','.join(one.controllers)}", why, "move it to the root"
                )
