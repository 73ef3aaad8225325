"""A network namespace that somebody has made for the tree (`catching`), with devices: the tree's own take their place.

Where the outer ends of its veth pairs were is where those of the tree's belong.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from phaul_engine.catching import Port

from . import link, plain, veth
from .device import Outer, kind_of
from .netlink import Namespace

_SELF = "/proc/self/ns/net"


def clear(net: int, plugs: Mapping[int, Port]) -> dict[str, Outer]:
    """Remove all devices of a namespace (a descriptor) that did not come with it. Returned are the outer ends, in the
    engine's own namespace, that went with them, by the names of the inner ones. `plugs` say which bridges they were to
    be plugged into, by their indexes."""
    own = os.open(_SELF, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with Namespace(own) as home, Namespace(net) as namespace:
            outers = {}
            for found in link.read_links(namespace).values():
                outer = link.read_link(home, index=found.lower) if found.kind == veth.Veth.kind else None
                if outer is not None:
                    port = plugs.get(outer.index, Port(""))
                    outers[found.name] = Outer(outer.name, port.bridge, port.settings)
                if found.kind and not isinstance(kind_of(found), plain.Tunnel):
                    link.delete(namespace, found.index)
            return outers
    finally:
        os.close(own)
