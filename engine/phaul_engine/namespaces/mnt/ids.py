"""Owners of files as a user namespace numbers them (user_namespaces(7)): what images hold."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from phaul_engine import calls
from phaul_engine.proc.id_map import OVERFLOW, IdMap, inside, outside, read_id_map

_ACL_USER, _ACL_GROUP = 0x02, 0x08
_ACLS = ("system.posix_acl_access", "system.posix_acl_default")
_CAPABILITY, _WITH_ROOT = "security.capability", 24  # bytes of version 3, which names a user at its end

Made = TypeVar("Made")


@dataclass(frozen=True)
class Ids:
    """The maps of a user namespace, from the engine's."""

    users: IdMap
    groups: IdMap

    @classmethod
    def of_task(cls, proc: int) -> Ids:
        """Those of the user namespace that a task is in."""
        return cls(*(read_id_map(proc, name) for name in ("uid_map", "gid_map")))

    @property
    def same(self) -> bool:
        """Whether every number stands for itself."""
        return self.users == self.groups == ((0, 0, 0xFFFFFFFF),)

    def user_inside(self, uid: int) -> int:
        """A user as the namespace numbers it; the overflow id if it is not in it."""
        return inside(self.users, uid)

    def group_inside(self, gid: int) -> int:
        """A group likewise."""
        return inside(self.groups, gid)

    def user_outside(self, uid: int) -> int:
        """A user as the engine numbers it."""
        return outside(self.users, uid)

    def group_outside(self, gid: int) -> int:
        """A group likewise."""
        return outside(self.groups, gid)

    def filing(self, act: Callable[[], Made]) -> Made:
        """Run `act`, which makes files, as root of the namespace: file systems that were mounted in it know nobody else
        (EOVERFLOW)."""
        root = self.user_outside(0), self.group_outside(0)
        return act() if root == (0, 0) or OVERFLOW in root else calls.filing(*root, act)

    def attribute(self, name: str, value: bytes, *, outwards: bool) -> bytes:
        """An extended attribute with the owners that it names in the other numbers (acl(5), capabilities(7))."""
        if self.same:
            return value
        user, group = (self.user_outside, self.group_outside) if outwards else (self.user_inside, self.group_inside)
        if name in _ACLS:
            entries = struct.iter_unpack("<HHI", value[4:])
            by_tag = {_ACL_USER: user, _ACL_GROUP: group}
            return value[:4] + b"".join(
                struct.pack("<HHI", tag, rights, by_tag[tag](ident) if tag in by_tag else ident)
                for tag, rights, ident in entries
            )
        if name == _CAPABILITY and len(value) == _WITH_ROOT:
            return value[:-4] + struct.pack("<I", user(struct.unpack("<I", value[-4:])[0]))
        return value
