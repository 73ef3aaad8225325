"""Sets of ip_set (ipset(8)), as `ipset save` tells them. They come before the rules that name them."""

from __future__ import annotations

import errno
import struct

from phaul_engine.errors import EngineError

from . import tools
from .netlink import NETLINK_NETFILTER, Namespace, attribute

_LIST, _PROTOCOL, _OUR_PROTOCOL = 6 << 8 | 7, 1, 6  # NFNL_SUBSYS_IPSET, IPSET_CMD_LIST, IPSET_ATTR_PROTOCOL
_WHAT = "ipset sets"


def exist(namespace: Namespace) -> bool:
    """Whether there is any."""
    body = struct.pack("=BBH", 2, 0, 0) + attribute(_PROTOCOL, bytes([_OUR_PROTOCOL]))
    try:
        return bool(namespace.netlink(NETLINK_NETFILTER).dump(_LIST, body))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.ENOENT):
            return False
        raise


def save(namespace: Namespace) -> bytes:
    """All sets as text; empty if there is none."""
    return tools.run(namespace, _WHAT, tools.need(_WHAT, "ipset"), "save") if exist(namespace) else b""


def restore(namespace: Namespace, text: bytes) -> None:
    """Have these sets and no others. Rules must not name any yet, or any more."""
    if not text and not exist(namespace):
        return
    program = tools.need(_WHAT, "ipset")
    try:
        tools.run(namespace, _WHAT, program, "restore", given=b"destroy\n" + text)
    except EngineError:
        # Sets that rules use cannot be destroyed: what is in them is changed in place.
        names = [line.split()[1] for line in text.splitlines() if line.startswith(b"create ")]
        flushed = b"".join(b"flush %s\n" % name for name in names)
        tools.run(
            namespace, _WHAT, program, "restore", "-exist", given=text.replace(b"\nadd ", b"\n" + flushed + b"add ", 1)
        )
