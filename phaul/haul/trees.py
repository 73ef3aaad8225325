"""What is asked about the directories of a workload before anything is touched."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from phaul_engine.proc.mountinfo import own_mounts

from phaul import tokens
from phaul.events import Finding

from . import beside, index, rsync

State: TypeAlias = Literal["shared", "free", "taken"]

_ROOM = 1.05  # times what is there: directories and their like come on top
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@dataclass(frozen=True)
class Tree:
    """A directory that the workload lives on. `token` is the name of a file in it with `secret`; `names` and `size`
    (bytes) are what would be sent. `problem` is why it cannot be. A tree with a `room` is a file system that its
    runtime has mounted for it, and will have mounted somewhere at the destination, with much of the same in it."""

    path: str
    names: int = 0
    size: int = 0
    token: str = ""
    secret: str = ""
    problem: str = ""
    room: bool = False


@dataclass(frozen=True)
class TreeAnswer:
    """What the destination has in its place, and the bytes that are free there. `rsync`: it has the program."""

    state: State
    text: str = ""
    free: int = 0
    rsync: bool = False


def describe(path: str, *, counted: bool, room: bool = False) -> Tree:
    """A directory at the source; `counted` if it may have to be sent."""
    if not counted:
        return Tree(path, room=room)
    inside = _mounted_inside(path)
    if inside:
        return Tree(path, problem=f"{inside} is a mount of its own in it, and only what is on one file system is sent")
    return Tree(path, *index.count(path), room=room)


def _mounted_inside(path: str) -> str:
    return next((str(mount.point) for mount in own_mounts() if mount.point.startswith(f"{path}/")), "")


@contextlib.contextmanager
def with_tokens(trees: Iterable[Tree]) -> Iterator[tuple[Tree, ...]]:
    """The trees with a token in each that may be shared, for as long as the destination is asked."""
    with contextlib.ExitStack() as stack:
        yield tuple(tree if tree.room else stack.enter_context(_with_token(tree)) for tree in trees)


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


def answer(tree: Tree) -> TreeAnswer:
    """The destination's part: look, and touch nothing."""
    path = Path(tree.path)
    if tree.room:
        above = next(one for one in path.parents if one.is_dir())
        return TreeAnswer("free", free=shutil.disk_usage(above).free, rsync=rsync.here())
    if tokens.sees(tree.token, tree.secret, tree.path):
        return TreeAnswer("shared")
    if os.path.lexists(path) and (not path.is_dir() or path.is_symlink() or any(path.iterdir())):
        return TreeAnswer("taken", f"{path} is there already")
    if path.is_mount():
        return TreeAnswer("taken", f"{path} is a mount there: what comes in gets its name by rename(2)")
    above = next(one for one in path.parents if one.is_dir())
    status = above.stat()
    if status.st_uid != 0 or (status.st_mode & _OTHERS and not status.st_mode & stat.S_ISVTX):
        return TreeAnswer("taken", f"{above} there can be changed by others than root")
    return TreeAnswer("free", free=shutil.disk_usage(above).free, rsync=rsync.here())


def hauled(trees: Iterable[Tree], answers: dict[str, TreeAnswer]) -> tuple[str, ...]:
    """Those that have to be sent, and can be."""
    found = ((tree.path, answers.get(tree.path)) for tree in trees)
    return tuple(path for path, known in found if known is not None and known.state == "free")


def findings(trees: Iterable[Tree], answers: dict[str, TreeAnswer], there: str, *, ship: bool) -> Iterator[Finding]:
    """What speaks against it."""
    for tree in trees:
        known = answers.get(tree.path)
        if known is None or known.state == "shared":
            continue
        text = f"{tree.path} is not on storage that {there} sees"
        elsewhere = "keep it on storage that both hosts mount at the same place"
        if tree.room:
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
            sent = f"it will be sent ({tree.names:,} files, {tree.size:,} bytes), and kept here as NAME{beside.ASIDE}"
            yield Finding("warning", "tree-sent", text, sent)


def _of_room(tree: Tree, known: TreeAnswer, there: str, *, ship: bool) -> Finding:
    """The same of a tree in a room, which no other storage can be given."""
    text = f"what the container has written ({tree.path}) is not on {there}"
    if not ship:
        advice = "let phaul send it: --ship missing; or have it write nowhere but to volumes"
        return Finding("blocker", "tree-missing", text, advice)
    if tree.problem:
        return Finding("blocker", "tree-mounts", f"{text}, and cannot be sent: {tree.problem}", "unmount that")
    if not (known.rsync and rsync.here()):
        why = f"{text}: only rsync finds out what the runtime there lacks of it"
        return Finding("blocker", "tree-rsync", why, "install rsync on both hosts")
    if tree.size * _ROOM > known.free:
        room = f"{text}: with its image it has {tree.size:,} bytes, and {known.free:,} are free there"
        return Finding("blocker", "tree-room", room, "make room there")
    what = f"what the image there lacks of it will be sent ({tree.names:,} files, {tree.size:,} bytes in all)"
    return Finding("warning", "tree-sent", text, what)
