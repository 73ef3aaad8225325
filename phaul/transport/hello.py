"""The first line that two phauls exchange, before anything else is said.

`phaul agent --stdio` writes it as soon as it starts: `PHAUL {json}`. What a login shell may print before is skipped
within bounds. The other side answers with its own. What follows are frames (control.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from dataclasses import asdict, dataclass
from typing import Protocol

from phaul import __version__, jsontext
from phaul.errors import ConnectError, VersionError

PROTOCOLS = (1, 1)  # the oldest and the newest protocol that this phaul speaks
MAGIC = b"PHAUL "
MAX_LINE = 8192  # bytes of a hello
MAX_NOISE = 65536  # bytes of anything else before it

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")


class ByteReader(Protocol):
    """The reading half of a byte stream: asyncio.StreamReader, asyncssh.SSHReader."""

    async def readuntil(self, separator: bytes, /) -> bytes:
        """Bytes up to and including `separator`."""
        ...

    async def readexactly(self, n: int, /) -> bytes:
        """Exactly `n` bytes; asyncio.IncompleteReadError at the end."""
        ...


@dataclass(frozen=True)
class Hello:
    """Who speaks. `features` are names of abilities that both sides must have before one uses them."""

    version: str
    protocols: tuple[int, int]
    features: frozenset[str] = frozenset()
    kernel: str = ""
    boot_id: str = ""
    uid: int = -1

    def line(self) -> bytes:
        """The hello as it goes over the wire."""
        content = {**asdict(self), "features": sorted(self.features)}
        line = MAGIC + json.dumps(content, separators=(",", ":")).encode() + b"\n"
        if len(line) > MAX_LINE:
            raise ValueError(f"a hello of {len(line)} bytes")
        return line


@dataclass(frozen=True)
class Agreement:
    """What two sides have in common."""

    protocol: int
    features: frozenset[str]


def local(features: frozenset[str] = frozenset()) -> Hello:
    """This process's own hello."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot_id = file.read().strip()
    return Hello(__version__, PROTOCOLS, features, os.uname().release, boot_id, os.geteuid())


def parse(line: bytes) -> Hello:
    """The hello of a line that begins with MAGIC. It comes from another host: everything is checked."""
    try:
        content = jsontext.parse(line.removeprefix(MAGIC))
        oldest, newest = content["protocols"]
        hello = Hello(
            version=_text(content["version"]),
            protocols=(int(oldest), int(newest)),
            features=frozenset(_feature(name) for name in content["features"]),
            kernel=_text(content.get("kernel", "")),
            boot_id=_text(content.get("boot_id", "")),
            uid=int(content.get("uid", -1)),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise VersionError(f"the other phaul introduced itself in a way this one cannot read: {error!r}") from error
    return hello


def agree(ours: Hello, theirs: Hello, host: str) -> Agreement:
    """The newest protocol that both speak, and the features that both have."""
    protocol = min(ours.protocols[1], theirs.protocols[1])
    if protocol < max(ours.protocols[0], theirs.protocols[0]):
        raise VersionError(
            f"phaul {theirs.version} on {host} speaks protocols {_range(theirs)}, "
            f"this one ({ours.version}) speaks {_range(ours)}",
            advice=f"install the same version on both: phaul deploy {host} brings this one there",
        )
    if _series(ours.version) != _series(theirs.version):
        raise VersionError(
            f"phaul {theirs.version} on {host} is too different from this one ({ours.version})",
            advice=f"install the same version on both: phaul deploy {host} brings this one there",
        )
    return Agreement(protocol, ours.features & theirs.features)


def _series(version: str) -> tuple[str, ...]:
    """What two versions must have in common: before 1.0 every minor version may change what agents say."""
    parts = version.split(".")
    return tuple(parts[:2]) if parts[0] == "0" else tuple(parts[:1])


async def receive(reader: ByteReader) -> Hello:
    """Wait for the other side's hello. ConnectError if the stream ends or fills up before one comes."""
    noise = bytearray()
    while len(noise) < MAX_NOISE:
        try:
            line = await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            noise += error.partial
            raise ConnectError(f"the stream ended before phaul said anything{_quote(noise)}") from error
        except asyncio.LimitOverrunError as error:
            raise ConnectError("the other side sends something that is not phaul's protocol") from error
        if line.startswith(MAGIC):
            if len(line) > MAX_LINE:
                raise ConnectError(f"a hello of {len(line)} bytes")
            return parse(line)
        noise += line
    raise ConnectError(f"the other side sends something that is not phaul's protocol{_quote(noise)}")


def _text(value: object) -> str:
    if not isinstance(value, str) or len(value) > 256 or not value.isprintable():
        raise ValueError(f"not a name: {value!r:.300}")
    return value


def _feature(value: object) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise ValueError(f"not a feature: {value!r:.100}")
    return value


def _range(hello: Hello) -> str:
    oldest, newest = hello.protocols
    return str(newest) if oldest == newest else f"{oldest} to {newest}"


def _quote(noise: bytes | bytearray) -> str:
    text = bytes(noise).decode(errors="replace").strip()
    return f"; it said {text[-200:]!r}" if text else ""
