"""Consoles of a container: terminals (pty(7)) whose masters are the runtime's, as LXC's /dev/console and /dev/tty1.

They stay, and the runtime at the destination, which has started the container there (`catching`), has made others with
the same numbers. What the tree has of one is its slave: descriptors, settings, and the session that it controls. The
image is that of a slave without a master.
"""

from __future__ import annotations

import fcntl
import os
import struct
import termios
from collections.abc import Sequence

from phaul_engine.errors import GoneError, RebuildError
from phaul_engine.images.pb import tty_pb2
from phaul_engine.proc.access import open_process
from phaul_engine.proc.stat import read_stat

from .base import Collection, Descriptor, Restoration
from .regular_file import open_at_root

OPTION = "consoles"
"""The option that says that the runtime will have made the terminals whose masters are not in the tree."""


def leaders(device: int, collection: Collection) -> tuple[int, int]:
    """The session that a terminal controls, and its group in the foreground, as the tree numbers them; 0 for none.
    The kernel tells that only to who is in the session, so it is what processes say of themselves."""
    for pid in collection.inner_pids:
        try:
            proc = open_process(pid)
        except GoneError:
            continue
        try:
            stat = read_stat(proc)
        except GoneError:
            continue
        finally:
            os.close(proc)
        if device_of(stat.tty) == device and stat.tty:
            inner = collection.inner_pids
            return inner.get(stat.session, 0), inner.get(stat.tty_pgrp, 0)
    return 0, 0


def device_of(number: int) -> int:
    """A device as proc_pid_stat(5) writes it (tty_nr)."""
    return os.makedev(number >> 8 & 0xFFF, number & 0xFF | number >> 12 & 0xFFF00)


def refuse_unread(index: int, slaves: Sequence[Descriptor], collection: Collection) -> None:
    """What was typed and not read yet cannot be read without taking it from the program."""
    slave = slaves[0]
    if struct.unpack("i", fcntl.ioctl(slave.own, termios.FIONREAD, bytes(4)))[0] > 0:
        why, advice = "it cannot be read without taking it from the program", "try again when it has been read"
        collection.block(slave, f"console /dev/pts/{index} with unread input", why, advice, passing=True)


def is_console(info: tty_pb2.tty_info_entry, restoration: Restoration) -> bool:
    """Whether an image of a slave is that of a console: there is none of its master."""
    ids = {record.message.id for record in restoration.checkpoint.records("tty-info")}
    return not info.id & 1 and info.id | 1 not in ids


def open_slave(index: int, flags: int, restoration: Restoration) -> int:
    """What the runtime has made here."""
    try:
        return open_at_root(f"/dev/pts/{index}", flags & (os.O_ACCMODE | os.O_NONBLOCK), restoration, os.O_NOCTTY)
    except OSError as error:
        raise RebuildError(
            f"the container has no console /dev/pts/{index} here: {error.strerror}",
            advice="its configuration has to give it as many as it had (lxc.console.path, lxc.tty.max)",
        ) from error
