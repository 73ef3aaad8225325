"""Containers of OpenVZ 7 and 9 (`--vz CTID`), by vzctl(8) and the kernel's own word for a container, the VE.

At the destination vzctl itself starts the container, from a private area and a configuration that are made of what the
source has told: VE, cgroups, namespaces, root. Its first process is caught before its program begins
(`phaul_engine.catching`), and what arrives takes its place, so that vzctl has a container that it has started. At the
source vzctl stops and unregisters it when the copy there is dead, and the private area is kept as vzmigrate(8) keeps
it, under another name. docs/openvz.md says what of this has run on which kernel.
"""

from .workload import OpenVz

__all__ = ["OpenVz"]
