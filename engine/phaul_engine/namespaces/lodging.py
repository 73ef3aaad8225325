"""Mount namespaces that a tree finds at the destination, as it found its own at the source.

A service manager gives a program a mount namespace of its own: a view of the host's files with some hidden, some
read-only, some private. It makes one on either host, so none is carried. The tree is collected as if it were in the
engine's (`LENT`), and goes into that of a process which is there (`LODGING`): names of files lead to what they lead to
in it.
"""

from __future__ import annotations

import os

from phaul_engine.errors import RebuildError
from phaul_engine.objects.base import Restoration
from phaul_engine.program import Program
from phaul_engine.syscalls import NR
from phaul_engine.transfer import Runner, Table

LENT = "lent mount namespace"
"""Option of a collection: whether the mount namespace of the root of the tree is such a one."""
LODGING = "lodging"
"""Option of a restoration: the process in whose mount namespace the tree is to be."""

_NEWNS = 0x20000


def enter(table: Table, run: Runner, restoration: Restoration) -> bool:
    """Have the root of a skeleton go where the tree is to be. False if that is where it is."""
    host = int(restoration.options.get(LODGING, 0))
    if not host:
        return False
    try:
        if os.readlink(f"/proc/{host}/root") != "/":
            raise RebuildError(f"process {host}, in whose mount namespace the tree is to be, has changed its root")
        fd = os.open(f"/proc/{host}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise RebuildError(f"process {host}, in whose mount namespace the tree is to be, is gone") from error
    try:
        (theirs,) = table.receive(run, [fd])
    finally:
        os.close(fd)
    program = Program()
    program.order(NR.setns, theirs, _NEWNS, label="join the mount namespace")
    table.close(program, [theirs])
    run(program)
    return True
