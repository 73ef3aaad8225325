"""Trees of mounts from images, and what options and owners become in them."""

from __future__ import annotations

import struct

import pytest
from phaul_engine.errors import ImageError
from phaul_engine.images.pb import mnt_pb2
from phaul_engine.namespaces.mnt import externals, filesystems
from phaul_engine.namespaces.mnt.ids import Ids
from phaul_engine.namespaces.mnt.judge import make_entry
from phaul_engine.namespaces.mnt.tree import MountTree, join, lies_in, relative
from phaul_engine.proc.mountinfo import parse_mounts

INSIDE = Ids(((0, 1000, 1), (1, 100000, 65536)), ((0, 2000, 10),))


def entry(number: int, parent: int, point: str) -> mnt_pb2.mnt_entry:
    return mnt_pb2.mnt_entry(
        fstype=mnt_pb2.TMPFS,
        mnt_id=number,
        root_dev=number,
        parent_mnt_id=parent,
        flags=0,
        root=b"/",
        mountpoint=point.encode(),
        source=b"",
        options=b"",
    )


def test_what_hides_comes_after_what_is_hidden() -> None:
    tree = MountTree(
        [
            entry(7, 2, "/a/b"),  # on the one that is hidden at /a/b/c? no: beside it
            entry(4, 1, "/a"),  # hides 2 and 3
            entry(3, 2, "/a/b/c"),
            entry(2, 1, "/a/b"),
            entry(1, 99, "/"),
            entry(5, 4, "/a/b"),
            entry(6, 1, "/other"),
        ]
    )
    order = [one.mnt_id for one in tree.order()]
    assert order[0] == 1
    for below, above in ((2, 4), (3, 4), (7, 4), (2, 3), (4, 5), (3, 7)):
        assert order.index(below) < order.index(above), (below, above, order)
    assert [tree.visible(tree.entries[number]) for number in (1, 2, 3, 4, 5, 6, 7)] == [
        *(True, False, False, True),
        *(True, True, False),
    ]
    assert tree.at(b"/a/b/c/d").mnt_id == 5
    assert tree.at(b"/a/x").mnt_id == 4
    assert tree.at(b"/others").mnt_id == 1
    assert [tree.place(tree.entries[number]) for number in (2, 3, 7)] == ["a/b", "c", ""]


def test_a_mount_over_the_root_hides_all() -> None:
    tree = MountTree([entry(1, 0, "/"), entry(2, 1, "/a"), entry(3, 1, "/"), entry(4, 3, "/a")])
    assert [one.mnt_id for one in tree.order()] == [1, 2, 3, 4]
    assert [tree.visible(tree.entries[number]) for number in (1, 2, 3, 4)] == [False, False, True, True]


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [entry(1, 0, "/"), entry(2, 5, "/a")],  # two roots
        [entry(1, 0, "/"), entry(2, 3, "/a"), entry(3, 2, "/a")],  # each other's parents
        [entry(1, 0, "/"), entry(2, 1, "/a/../b")],
        [entry(1, 0, "/"), entry(2, 1, "a")],
        [entry(1, 0, "/"), entry(2, 1, "/a\0b")],
        [entry(1, 0, "/"), entry(2, 1, "/a"), entry(3, 2, "/b")],  # not in its parent
    ],
)
def test_impossible_trees_are_refused(entries: list[mnt_pb2.mnt_entry]) -> None:
    with pytest.raises(ImageError):
        MountTree(entries)


def test_paths() -> None:
    assert lies_in(b"/a/b", b"/a")
    assert lies_in(b"/a", b"/a")
    assert not lies_in(b"/ab", b"/a")
    assert lies_in(b"/ab", b"/")
    assert relative(b"/a/b/c", b"/a") == "b/c"
    assert relative(b"/a/b/c", b"/") == "a/b/c"
    assert relative(b"/a", b"/a") == ""
    assert [join(b"/", "x"), join(b"/a", "x/y"), join(b"/a", "")] == [b"/x", b"/a/x/y", b"/a"]


def test_a_line_of_mountinfo_becomes_an_entry() -> None:
    line = b"36 35 0:52 /mnt1//deleted /mnt\\0402 ro,noexec,noatime,nosymfollow shared:7 master:1 unbindable"
    (mount,) = parse_mounts(line + b" - tmpfs src rw,size=4k\n")
    found = make_entry(mount, filesystems.pack_options("tmpfs", mount.super_options))
    assert (found.mnt_id, found.parent_mnt_id, found.root_dev) == (36, 35, 52)
    assert (found.root, found.deleted, found.mountpoint) == (b"/mnt1", True, b"/mnt 2")
    assert (found.shared_id, found.master_id, found.sb_flags) == (7, 1, 0)
    assert found.flags == 1 | 8 | 256 | 1024 | 1 << 17 | 1 << 19 | 1 << 20
    assert found.options == b"size=4k"
    assert filesystems.kind_of(found) == "tmpfs"


def test_options_come_back() -> None:
    given = ["rw", "sync", "lowerdir=/a,b:/c", "xino=off", "seclabel"]
    found = mnt_pb2.mnt_entry(
        options=filesystems.pack_options("overlay", given), sb_flags=filesystems.super_flags(given)
    )
    assert filesystems.unpack_options(found) == ["lowerdir=/a,b:/c", "xino=off"]
    assert filesystems.super_flag_names(found.sb_flags) == ["sync"]
    found.options = filesystems.pack_options("devpts", ["mode=620"])
    assert (found.options, filesystems.unpack_options(found)) == (b"mode=620,newinstance", ["mode=620"])


def test_owners_are_translated() -> None:
    assert [INSIDE.user_inside(number) for number in (1000, 100005, 5)] == [0, 6, 65534]
    assert [INSIDE.group_outside(number) for number in (0, 9, 10)] == [2000, 2009, 65534]
    acl = struct.pack("<IHHIHHI", 2, 2, 7, 100005, 4, 7, 0xFFFFFFFF)
    inside = INSIDE.attribute("system.posix_acl_access", acl, outwards=False)
    assert inside == struct.pack("<IHHIHHI", 2, 2, 7, 6, 4, 7, 0xFFFFFFFF)
    assert INSIDE.attribute("system.posix_acl_access", inside, outwards=True) == acl
    capability = struct.pack("<5I", 0x03000001, 1, 0, 0, 0) + struct.pack("<I", 1000)
    assert INSIDE.attribute("security.capability", capability, outwards=False)[-4:] == bytes(4)
    assert INSIDE.attribute("user.any", b"\1\2", outwards=False) == b"\1\2"


def test_what_is_outside_is_told_as_to_criu() -> None:
    options = {"external": ["mnt[/dev]:KEY", "mnt[]:ms", "net[4026531992]:x", "mnt[/a[b]]:/p:q"], "root": "/r"}
    assert externals.given(options) == {"/dev": "KEY", "/a[b]": "/p:q"}
    assert (externals.root(options), externals.root({})) == ("/r", "")
