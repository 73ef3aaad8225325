"""Options that another kernel has and this one does not."""

from __future__ import annotations

import socket
import struct

import pytest
from phaul_engine.errors import RebuildError
from phaul_engine.objects.socket_options import Options, read, write

_UNKNOWN = (socket.SOL_SOCKET, 999)


def test_an_unknown_option_that_nobody_asked_for_is_left_out() -> None:
    with socket.socket() as sock:
        values = read(sock).values
        write(sock, Options({**values, _UNKNOWN: struct.pack("i", 0)}, b""))
        assert read(sock).values == values
        with pytest.raises(RebuildError, match="option 999 of level 1 cannot be set to 05000000"):
            write(sock, Options({_UNKNOWN: struct.pack("i", 5)}, b""))


def test_a_socket_without_an_offset_to_peek_at_takes_none() -> None:
    """As a TCP socket before Linux 6.9; a netlink socket has no such offset."""
    offset = (socket.SOL_SOCKET, 42)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW) as sock:
        assert offset not in read(sock).values
        write(sock, Options({offset: struct.pack("i", -1)}, b""))
        with pytest.raises(RebuildError, match="SO_PEEK_OFF"):
            write(sock, Options({offset: struct.pack("i", 7)}, b""))
