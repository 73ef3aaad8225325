"""Making file systems inside the namespaces of a tree: who makes one owns it, and sees his processes and network in it.

It runs in a process that was sent there.
"""

from __future__ import annotations

from phaul_engine.namespaces.inside import Descriptor

from . import api


def make(kind: str, source: str, options: list[str], super_flags: list[str]) -> Descriptor:
    """A new file system, as a mount that is attached nowhere."""
    return Descriptor(api.new_file_system(kind, source, options, super_flags))
