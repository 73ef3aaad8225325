"""A small checkpoint that is complete, for tests to break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.directory import ImageDirectory
from phaul_engine.images.pages import PAGE_SIZE, PageWriter
from phaul_engine.images.pb import (
    core_pb2,
    fdinfo_pb2,
    fs_pb2,
    inventory_pb2,
    mm_pb2,
    pstree_pb2,
)
from phaul_engine.images.vma import Status

PID, THREAD = 10, 11
AREA = 0x400000
PRIVATE = 0x22  # MAP_PRIVATE | MAP_ANONYMOUS
IDS = {"vm_id": 1, "files_id": 2, "fs_id": 3, "sighand_id": 4, "net_ns_id": 5}


def fill(message: Any) -> Any:
    """Set every required field that is not set, to 0 or its like, and return the message."""
    for field in message.DESCRIPTOR.fields:
        if field.message_type is not None:
            if field.is_required:
                getattr(message, field.name).SetInParent()
                fill(getattr(message, field.name))
        elif field.is_required and not message.HasField(field.name):
            setattr(message, field.name, field.default_value)
    return message


def core(*, leader: bool) -> core_pb2.core_entry:
    """The state of a thread."""
    entry = core_pb2.core_entry(mtype=core_pb2.core_entry.X86_64)
    fill(entry.thread_info)
    fill(entry.thread_core)
    if leader:
        fill(entry.tc).task_state = 1
        entry.ids.CopyFrom(core_pb2.task_kobj_ids_entry(**IDS))
    return entry


def file(number: int, name: bytes = b"/bin/true") -> fdinfo_pb2.file_entry:
    """An open file."""
    entry = fdinfo_pb2.file_entry(type=fdinfo_pb2.REG, id=number)
    entry.reg.id, entry.reg.name = number, name
    fill(entry.reg)
    return entry


def complete() -> Checkpoint:
    """One process with two threads, a file, and two pages of memory (which are on disk only)."""
    checkpoint = Checkpoint()
    inventory = inventory_pb2.inventory_entry(img_version=2, fdinfo_per_id=True, ns_per_id=True)
    inventory.root_ids.CopyFrom(core_pb2.task_kobj_ids_entry(**IDS))
    checkpoint.put("inventory", None, inventory)
    tree = pstree_pb2.pstree_entry(pid=PID, ppid=0, pgid=PID, sid=PID, threads=[PID, THREAD])
    checkpoint.put("pstree", None, tree)
    checkpoint.put("core", PID, core(leader=True))
    checkpoint.put("core", THREAD, core(leader=False))
    checkpoint.put("files", None, file(1))
    checkpoint.put("files", None, file(2, b"/"))
    checkpoint.put("fdinfo", 2, fdinfo_pb2.fdinfo_entry(id=1, flags=1, type=fdinfo_pb2.REG, fd=0))
    checkpoint.put("fs", PID, fs_pb2.fs_entry(cwd_id=2, root_id=2, umask=0o22))
    mm = fill(mm_pb2.mm_entry(exe_file_id=1))
    area = mm.vmas.add(start=AREA, end=AREA + 4 * PAGE_SIZE, fd=-1, flags=PRIVATE, prot=3)
    area.status = Status.REGULAR | Status.ANON_PRIVATE
    fill(area)
    checkpoint.put("mm", PID, mm)
    return checkpoint


def save(checkpoint: Checkpoint, path: Path, pages: bytes = bytes(2 * PAGE_SIZE)) -> None:
    """Write a checkpoint and its pages into a directory."""
    checkpoint.save(path)
    with ImageDirectory(path) as directory, PageWriter(directory, "pagemap", PID, 1) as writer:
        offset = writer.add([AREA], [len(pages) // PAGE_SIZE])
        with open(writer.fd, "r+b", closefd=False) as file:
            file.seek(offset)
            file.write(pages)
