"""Cgroup namespaces (cgroup_namespaces(7)): what is the root of all cgroups to a tree is the cgroup that it lives in.

At the destination it is the cgroup that the tree will live in, whatever its name is there. Cgroups below it are not
made: a tree that has such is a blocker.
"""

from __future__ import annotations

import contextlib
import os
from typing import ClassVar

from phaul_engine.cgroup import Hierarchy
from phaul_engine.objects import places
from phaul_engine.objects.base import Collection, Restoration
from phaul_engine.proc import access
from phaul_engine.proc.cgroup import read_cgroups, unified_path
from phaul_engine.program import Program
from phaul_engine.syscalls import NR

from .base import NamespaceKind, NamespaceView, NewNamespace, namespace_kind

_OURS = "/phaul-"  # what holds a tree that moves (`cgroup.Hold`)


@namespace_kind
class ControlGroups(NamespaceKind):
    """Its root is the cgroup that its first task is in when it is made. Until the tree is let go a cgroup of ours below
    that holds it."""

    name: ClassVar = "cgroup"
    flag: ClassVar = 0x02000000
    at_birth: ClassVar = False

    def collect(self, view: NamespaceView, collection: Collection) -> None:
        if not view.survey:
            return
        namespace = access.open_at(view.owner.proc, "ns/cgroup")
        try:
            places.inside({"cgroup": namespace}, lambda: _judge(view, collection))
        finally:
            os.close(namespace)

    def rebuild(self, place: NewNamespace, restoration: Restoration) -> None:
        program = Program()
        program.order(NR.unshare, self.flag, label="make a cgroup namespace")
        assert restoration.inside is not None
        with contextlib.ExitStack() as stack:
            home = unified_path(place.task.proc) or "/"
            above, _, name = home.rpartition("/")
            if f"/{name}".startswith(_OURS):
                hierarchy = stack.enter_context(Hierarchy.find())
                hierarchy.put(place.task.pid, above or "/")
                stack.callback(hierarchy.put, place.task.pid, home)
            restoration.inside(place.task.inner_pid, program)


def _judge(view: NamespaceView, collection: Collection) -> None:
    for owner in view.members:
        paths = {one.path for one in read_cgroups(owner.proc)}
        below = sorted(path for path in paths if path != "/" and not path.startswith(_OURS))
        if below:
            why = "only the root of its cgroup namespace is made again"
            collection.block(owner, f"in cgroup {below[0]} of its cgroup namespace", why, "move it to the root")
