"""What is asked about the directories of a workload before anything is touched."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from phaul_engine.proc.mountinfo import own_mounts

from phaul import tokens
from phaul.events import Finding

from . import beside, btrfs, index, layers, rsync
from .layers import Layers

State: TypeAlias = Literal["shared", "free", "taken"]

_ROOM = 1.05  # times what is there: directories and their like come on top
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Tree:
    """A directory that the workload lives on. `token` is the name of a file in it with `secret`; `names` and `size`
    (bytes) are what would be sent. `problem` is why it cannot be. A tree with a `room` is a file system that its
    runtime has mounted for it, and will have mounted somewhere at the destination, with much of the same in it. One
    with `layers` is a file system of those, which is mounted there by us; what was written to it is counted. A
    `subvolume` is one of btrfs that can be sent. What is `mounted` there cannot be given another name."""

    path: str
    names: int = 0
    size: int = 0
    token: str = ""
    secret: str = ""
    problem: str = ""
    room: bool = False
    layers: Layers | None = None
    subvolume: bool = False
    mounted: bool = False


@dataclass(frozen=True)
class TreeAnswer:
    """What the destination has in its place, and the bytes that are free there. `rsync`: it has the program. `btrfs`:
    the place is on that, and takes subvolumes."""

    state: State
    text: str = ""
    free: int = 0
    rsync: bool = False
    btrfs: bool = False


def describe(path: str, *, counted: bool, room: bool = False, overlays: Mapping[str, Layers] | None = None) -> Tree:
    """A directory at the source; `counted` if it may have to be sent. `overlays` are file systems of layers."""
    overlays = overlays or {}
    known = overlays.get(path)
    if not counted:
        return Tree(path, room=room, layers=known)
    inside = _mounted_inside(path, overlays)
    if inside:
        problem = f"{inside} is a mount of its own in it, and only what is on one file system is sent"
        return Tree(path, problem=problem, layers=known)
    if known is not None and known.problem:
        return Tree(path, problem=known.problem, layers=known)
    points = [point[len(path) + 1 :] for point in overlays if layers.below(point, path)]
    top, without = (known.upper, []) if known is not None else (path, [*layers.inside(path, overlays), *points])
    names, size, foreign = index.count(top, without)
    if foreign:
        problem = f"{foreign} is a subvolume of its own in it, and only what is on one file system is sent"
        return Tree(path, problem=problem, room=room, layers=known)
    subvolume = known is None and not room and not without and btrfs.can_send(path)
    mounted = any(mount.point == os.path.realpath(path) for mount in own_mounts())
    return Tree(path, names, size, room=room, layers=known, subvolume=subvolume, mounted=mounted)


def _mounted_inside(path: str, known: Container[str]) -> str:
    points = (mount.point for mount in own_mounts())
    return next((point for point in points if layers.below(point, path) and point not in known), "")


@contextlib.contextmanager
def with_tokens(trees: Iterable[Tree]) -> Iterator[tuple[Tree, ...]]:
    """The trees with a token in each that may be shared, for as long as the destination is asked."""
    with contextlib.ExitStack() as stack:
        yield tuple(tree if tree.room or tree.layers else stack.enter_context(_with_token(tree)) for tree in trees)


@contextlib.contextmanager
def _with_token(tree: Tree) -> Iterator[Tree]:
    """The directory's times are afterwards what they were."""
    before, made = os.stat(tree.path), None
    try:
        with tokens.token(tree.path) as made:
            yield tree if made is None else replace(tree, token=made.path, secret=made.secret)
    finally:
        if made is not None:
            with contextlib.suppress(OSError):
                os.utime(tree.path, ns=(before.st_atime_ns, before.st_mtime_ns))


def answer(tree: Tree, others: Iterable[str] = ()) -> TreeAnswer:
    """The destination's part: look, and touch nothing. `others` are directories that may come too."""
    path = Path(tree.path)
    if tree.layers is not None:
        return _answer_layers(path, tree.layers, [one for one in others if one != tree.path])
    if tree.room:
        return TreeAnswer("free", free=_room(path), rsync=rsync.here())
    if tokens.sees(tree.token, tree.secret, tree.path):
        return TreeAnswer("shared")
    ready = btrfs.can_take(str(_above(path)))
    return _taken(path) or TreeAnswer("free", free=_room(path), rsync=rsync.here(), btrfs=ready)


def _answer_layers(path: Path, known: Layers, others: list[str]) -> TreeAnswer:
    for lower in known.lower:
        if not Path(lower).is_dir() and not any(layers.below(lower, one) for one in others):
            return TreeAnswer("taken", f"its lower directory {lower} is not there")
    taken = (_taken(one) for one in (path, Path(known.upper), Path(known.work)))
    return next(filter(None, taken), None) or TreeAnswer("free", free=_room(Path(known.upper)), rsync=rsync.here())


def _taken(path: Path) -> TreeAnswer | None:
    """Why something cannot be made in a place."""
    if os.path.lexists(path) and (not path.is_dir() or path.is_symlink() or any(path.iterdir())):
        return TreeAnswer("taken", f"{path} is there already")
    if path.is_mount():
        text = f"{path} is a mount or a subvolume there: what comes in gets its name by rename(2)"
        return TreeAnswer("taken", text)
    above = _above(path)
    status = above.stat()
    if status.st_uid != 0 or (status.st_mode & _OTHERS and not status.st_mode & stat.S_ISVTX):
        return TreeAnswer("taken", f"{above} there can be changed by others than root")
    return None


def _above(path: Path) -> Path:
    return next(one for one in path.parents if one.is_dir())


def _room(path: Path) -> int:
    return shutil.disk_usage(_above(path)).free


def hauled(trees: Iterable[Tree], answers: dict[str, TreeAnswer]) -> tuple[str, ...]:
    """Those that have to be sent, and can be."""
    found = ((tree.path, answers.get(tree.path)) for tree in trees)
    return tuple(path for path, known in found if known is not None and known.state == "free")


def too_old(overlays: Iterable[str], there: str, *, able: bool) -> Iterator[Finding]:
    """What the destination's phaul cannot do; `able`: mount file systems of layers."""
    for path in () if able else overlays:
        yield Finding(
            "blocker", "tree-version", f"phaul on {there} is too old to mount {path}", f"phaul deploy {there}"
        )


def subvolumes(trees: Iterable[Tree], answers: dict[str, TreeAnswer], hauled: Iterable[str]) -> tuple[str, ...]:
    """Those of them that btrfs sends at first."""
    able = {tree.path for tree in trees if tree.subvolume and answers[tree.path].btrfs}
    return tuple(path for path in hauled if path in able)


def findings(trees: Iterable[Tree], answers: dict[str, TreeAnswer], there: str, *, ship: bool) -> Iterator[Finding]:
    """What speaks against it."""
    for tree in trees:
        known = answers.get(tree.path)
        if known is None or known.state == "shared":
            continue
        text = f"{tree.path} is not on storage that {there} sees"
        elsewhere = "keep it on storage that both hosts mount at the same place"
        if tree.room or (tree.layers is not None and (ship or known.state == "free")):
            yield _of_room(tree, known, there, ship=ship)
        elif not ship and known.state == "free":
            yield Finding("blocker", "tree-missing", text, f"{elsewhere}, or let phaul send it: --ship missing")
        elif not ship:
            continue  # it was brought there before, by somebody who knows
        elif tree.problem:
            yield Finding("blocker", "tree-mounts", f"{text}, and cannot be sent: {tree.problem}", elsewhere)
        elif known.state == "taken":
            advice = "move it out of the way there, or see to it yourself and say --ship none"
            yield Finding("blocker", "tree-in-the-way", f"{text} and would be sent, but {known.text}", advice)
        elif tree.size * _ROOM > known.free:
            room = f"{text} and would be sent: {tree.size:,} bytes, and {known.free:,} are free there"
            yield Finding("blocker", "tree-room", room, "make room there")
        else:
            sent = f"it will be sent ({tree.names:,} files, {tree.size:,} bytes), and kept here"
            name = "under its name, for it is a mount: unmount it then" if tree.mounted else f"as NAME{beside.ASIDE}"
            yield Finding("warning", "tree-sent", text, f"{sent} {name}")


def _of_room(tree: Tree, known: TreeAnswer, there: str, *, ship: bool) -> Finding:
    """The same of a tree with much in it that the destination has, and for which there is no other storage."""
    text = f"what the container has written ({tree.path}) is not on {there}"
    if not ship:
        advice = "let phaul send it: --ship missing; or have it write nowhere but to volumes"
        return Finding("blocker", "tree-missing", text, advice)
    if tree.problem:
        return Finding("blocker", "tree-mounts", f"{text}, and cannot be sent: {tree.problem}", "unmount that")
    if known.state == "taken":
        advice = "have its image there under the same name, and nothing where it will be; or see to it yourself and say"
        return Finding(
            "blocker", "tree-in-the-way", f"{text}, and cannot be sent: {known.text}", f"{advice} --ship none"
        )
    if not (known.rsync and rsync.here()):
        why = f"{text}: only rsync finds out what the runtime there lacks of it"
        return Finding("blocker", "tree-rsync", why, "install rsync on both hosts")
    if tree.size * _ROOM > known.free:
        image = "with its image" if tree.layers is None else "without its image"
        room = f"{text}: {image} it has {tree.size:,} bytes, and {known.free:,} are free there"
        return Finding("blocker", "tree-room", room, "make room there")
    extent = "in all" if tree.layers is None else "have been written"
    what = f"what the image there lacks of it will be sent ({tree.names:,} files, {tree.size:,} bytes {extent})"
    return Finding("warning", "tree-sent", text, what)
