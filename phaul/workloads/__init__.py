"""What is being moved: a plain process tree, or what a container runtime of the host knows by a name.

One module is one kind. At the source it finds the first process, and has the runtime forget it when it is gone; at the
destination it has the runtime get ready, and in the end believe that what arrived is its own.
"""

from __future__ import annotations

from phaul.errors import UsageError

from .base import Found, Note, Place, Workload
from .lxc import Lxc
from .oci import Oci
from .openvz import OpenVz
from .plain import Plain
from .podman import Podman
from .unit import Unit

__all__ = ["Found", "Note", "Place", "Workload", "of"]

_KINDS: dict[str, Workload] = {kind.kind: kind for kind in (Plain(), Lxc(), Oci(), Podman(), Unit(), OpenVz())}


def of(kind: str) -> Workload:
    """The module of a kind; UsageError if there is none."""
    if kind not in _KINDS:
        raise UsageError(f"moving a {kind} is not possible yet", advice="give the PID of its first process")
    return _KINDS[kind]
