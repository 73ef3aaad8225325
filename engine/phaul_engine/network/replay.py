"""Frames on their way: out of the hold's TAP, along the migration's channel, into the destination's stack.

A frame is what a TAP gives: a struct virtio_net_hdr (10 bytes: what of the checksum is to be filled in, how a large
segment is to be cut) and the Ethernet frame. It arrives at the destination's interface as if the wire had brought it;
only the receiver's hardware address in it becomes the destination's.

Nothing is injected before the commit, and nothing for a socket that is not there: the stack would answer with RST.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from phaul_engine.errors import EngineError

from . import ingress, interfaces
from .hold import inject_at, inside, tap_name, undo
from .ingress import Method
from .interfaces import Interface, Tap

_HEADER = 10  # struct virtio_net_hdr
_LARGEST = _HEADER + 14 + 65536
_LENGTH = struct.Struct(">I")


def drain(tap: Tap, most: int = 1 << 30) -> list[bytes]:
    """All frames that the TAP has for us now, at most `most`."""
    frames: list[bytes] = []
    while len(frames) < most:
        try:
            frames.append(os.read(tap.fd, _LARGEST))
        except BlockingIOError:
            break
    return frames


def pack(frames: Iterable[bytes]) -> bytes:
    """Frames as bytes for the channel; concatenations are as good."""
    return b"".join(_LENGTH.pack(len(frame)) + frame for frame in frames)


def unpack(content: bytes) -> Iterator[bytes]:
    """The reverse of `pack`. Raises `EngineError` if frames are cut off or impossibly large."""
    view, position = memoryview(content), 0
    while position < len(view):
        if position + _LENGTH.size > len(view):
            raise EngineError("held frames end in the middle of a length")
        (length,) = _LENGTH.unpack_from(view, position)
        position += _LENGTH.size
        if not _HEADER + 14 <= length <= _LARGEST or position + length > len(view):
            raise EngineError(f"a held frame has an impossible length, {length}")
        yield bytes(view[position : position + length])
        position += length


@dataclass
class Injector:
    """A TAP through which frames come in at an interface of the destination."""

    identity: str
    netns: str
    tap: Tap
    interface: Interface

    @classmethod
    def prepare(cls, identity: str, interface: str, netns: str = "", *, method: Method | None = None) -> Injector:
        """Set it up, before the freeze."""
        return inside(netns, lambda: cls._prepare(identity, interface, netns, method or ingress.choose()))

    @classmethod
    def _prepare(cls, identity: str, name: str, netns: str, method: Method) -> Injector:
        found = [one for one in interfaces.ethernet_interfaces() if one.name == name]
        if not found:
            raise EngineError(f"{name} is no Ethernet interface that is up here")
        tap = Tap.create(tap_name(identity), found[0].mtu)
        made = cls(identity, netns, tap, found[0])
        try:
            inject_at(found[0], identity, tap, method)
        except BaseException:
            made.close()
            raise
        return made

    def inject(self, frames: Iterable[bytes]) -> int:
        """Let frames come in; their number. A frame that the kernel refuses is a lost packet, as any can be."""
        count = 0
        for frame in frames:
            head = frame[:_HEADER] + self.interface.address + frame[_HEADER + 6 :]
            try:
                os.write(self.tap.fd, head)
                count += 1
            except OSError:
                continue
        return count

    def entry(self) -> dict[str, Any]:
        """What the journal must hold for `hold.undo`: the TAP is persistent."""
        return {"kind": "hold", "data": {"id": self.identity, "netns": self.netns, "bare": []}}

    def close(self) -> None:
        """Take it away."""
        self.tap.close()
        undo(self.entry()["data"])


def give_back(tap: Tap) -> int:
    """An abort: what was held comes in at the source after all. The hold must have been switched off before."""
    frames = drain(tap)
    for frame in frames:
        os.write(tap.fd, frame)
    return len(frames)
