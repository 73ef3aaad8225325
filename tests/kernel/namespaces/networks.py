"""Network namespaces that a test sets up with the usual tools, and looks at with them."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from phaul_engine.errors import Blocker
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.namespaces.net import plug
from phaul_engine.namespaces.net.device import Making, externals
from phaul_engine.namespaces.net.netlink import Namespace
from phaul_engine.namespaces.net.reader import Reader
from phaul_engine.namespaces.net.state import Builder, State, from_images, to_images
from phaul_engine.objects import places
from phaul_engine.objects.base import Collection

NUMBER = 21
_PATIENCE = 5.0
_VARYING = re.compile(
    r"expires \w+|(?:valid|preferred)_lft \d+sec|\w+_timer +[\d.]+|[tg]so_max_\w+ \d+|@if\d+|"
    r"(?:forwarding|learning|listening) (?=priority)"
)
_ORDERLESS = ("fdb", "nexthop", "neigh", "route")


def _own() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


class Network:
    """A network namespace: a new one, unless there is a descriptor of one."""

    def __init__(self, net: int = -1) -> None:
        self.net = net if net >= 0 else places.in_new_network(_own)

    def run(self, script: str) -> str:
        """Run a shell script in it; what it writes. A device of a kind that this kernel lacks skips the test."""

        def go() -> subprocess.CompletedProcess[str]:
            return subprocess.run(["bash", "-ec", script], capture_output=True, text=True, check=False, timeout=60)

        done = places.in_network(self.net, go)
        if "Unknown device type" in done.stderr or "does not recognize" in done.stderr:
            pytest.skip(f"this kernel lacks it: {script.strip().splitlines()[-1]}: {done.stderr.strip()}")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def look(self, *tools: str) -> dict[str, list[str]]:
        """What tools tell of it, without what counts down."""
        found = {}
        for tool in tools:
            lines = [_VARYING.sub("", line) for line in self.run(tool).splitlines() if not line.startswith("#")]
            found[tool] = sorted(lines) if any(word in tool for word in _ORDERLESS) else lines
        return found

    def settle(self) -> None:
        """Wait until the kernel has found its addresses to be its own."""
        deadline = time.monotonic() + _PATIENCE
        while "tentative" in self.run("ip addr"):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def attach(self, other: Network, inner: str, outer: str) -> None:
        """A veth pair: `inner` in this namespace, `outer` in another."""
        target = f"/proc/{os.getpid()}/fd/{self.net}"

        def go() -> None:
            command = ["ip", "link", "add", outer, "type", "veth", "peer", "name", inner, "netns", target]
            subprocess.run(command, check=True, capture_output=True)

        places.in_network(other.net, go)

    def close(self) -> None:
        """Nothing of it is left when nobody else has it."""
        os.close(self.net)


@contextmanager
def networks(count: int) -> Iterator[list[Network]]:
    """So many new namespaces."""
    made = [Network() for _ in range(count)]
    try:
        yield made
    finally:
        for one in made:
            one.close()


def need(*tools: str) -> None:
    """Skip where a tool is not installed."""
    missing = [tool for tool in tools if shutil.which(tool, path="/usr/sbin:/usr/bin:/sbin:/bin") is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


def read(network: Network, home: Network) -> tuple[State, list[Blocker]]:
    """The state of a namespace, by way of images, and what it cannot be moved with."""
    reader = Reader(os.dup(network.net), os.dup(home.net), NUMBER)
    try:
        collection = Collection(Checkpoint(), survey=True)
        to_images(reader.read(collection), NUMBER, collection.checkpoint)
    finally:
        reader.close()
    return from_images(Checkpoint.from_bytes(collection.checkpoint.to_bytes()), NUMBER), collection.blockers


@contextmanager
def built(network: Network, home: Network, state: State, *external: str) -> Iterator[Builder]:
    """The state, made in a new namespace."""
    with Namespace(network.net) as namespace, Namespace(home.net) as outside:
        options: dict[str, object] = {"external": list(external)}
        builder = Builder(Making(namespace, outside, NUMBER, externals(options)))
        try:
            builder.build(state)
            assert not builder.pending
            yield builder
        finally:
            builder.close()


def carry(script: str, *tools: str) -> None:
    """Set up a namespace, carry it, and hold what tools tell of it against what they told before."""
    with networks(3) as (source, destination, home):
        source.run(script)
        source.settle()
        state, blockers = read(source, home)
        assert not blockers, blockers
        before = source.look(*tools)
        with built(destination, home, state) as builder:
            plugged(builder)
            agree(destination, before)
            builder.build(state)  # nothing differs now
            agree(destination, before)


def plugged(builder: Builder) -> None:
    """Let it be heard."""
    assert builder.done is not None
    for pair in plug.prepare(builder.making, builder.done):
        pair.do(builder.making.home)
        pair.close()


def agree(network: Network, wanted: dict[str, list[str]]) -> None:
    """Wait until tools tell what is wanted: carriers and states of links follow a moment later."""
    deadline = time.monotonic() + _PATIENCE
    while (found := network.look(*wanted)) != wanted and time.monotonic() < deadline:
        time.sleep(0.1)
    told = [line for tool, lines in wanted.items() for line in difflib.unified_diff(lines, found[tool], tool, n=0)]
    assert not told, "\n".join(told)
