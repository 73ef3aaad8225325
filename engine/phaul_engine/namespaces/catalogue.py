"""Every kind of namespace the engine carries: importing this module registers them all.

They are collected and rebuilt in this order: each finds those before it made. What a process may do in its namespaces
is up to the user namespace; file systems (proc, mqueue, sysfs) show the pid, ipc and network namespaces that their
mounter is in, so mounts come last.
"""

# ruff: noqa: I001

from __future__ import annotations

import phaul_engine.namespaces.user
import phaul_engine.namespaces.pids
import phaul_engine.namespaces.uts
import phaul_engine.namespaces.ipc.kind
import phaul_engine.namespaces.control_groups
import phaul_engine.namespaces.clock
import phaul_engine.namespaces.net.kind
import phaul_engine.namespaces.mnt.kind

from .base import kinds

ORDER = tuple(kind.name for kind in kinds())
"""Names of kinds, in their order."""

assert phaul_engine.namespaces
