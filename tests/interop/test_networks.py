"""A network namespace: CRIU restores what phaul stored of it, phaul restores what CRIU stored."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

_SETUP = """
ip link set lo up
ip link add br0 type bridge; ip link add v0 type veth peer name v1
ip link set v0 master br0 up; ip link set v1 mtu 1400 up; ip link set br0 up
ip addr add 10.1.0.1/24 dev br0; ip addr add fd01::1/64 dev br0 nodad
ip route add default via 10.1.0.2; ip -6 route add default via fd01::2
ip rule add from 10.9.0.0/16 lookup 77
ip tuntap add tap0 mode tap user 7
sysctl -qw net.ipv4.conf.br0.rp_filter=2 net.ipv6.conf.v1.accept_ra=0 net.unix.max_dgram_qlen=33
iptables-legacy -A INPUT -p tcp --dport 5 -j DROP
nft add table inet t
nft add chain inet t c '{ type filter hook input priority 0; }'
nft add rule inet t c tcp dport 7 drop
until ! ip addr | grep -q tentative; do sleep 0.1; done
echo ready > "$1"
exec sleep 1000
"""
_LOOK = """
ip -d link; ip addr; ip -4 route; ip -6 route; ip rule; iptables-legacy-save | grep ^-A; nft list table inet t
sysctl net.ipv4.conf.br0.rp_filter net.ipv6.conf.v1.accept_ra net.unix.max_dgram_qlen
"""
_VARYING = re.compile(r"\w+_timer +[\d.]+|[tg]so_max_\w+ \d+|nodad|proto kernel_\w+")


@pytest.fixture
def program(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program in a network namespace of its own."""
    quiet, ready = subprocess.DEVNULL, tmp_path / "ready"
    words = ["unshare", "--net", "bash", "-ec", _SETUP, "-", str(ready)]
    process = subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True, cwd="/")
    deadline = time.monotonic() + 30
    while not ready.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield process
    with suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.wait()


def _look(pid: int) -> list[str]:
    command = ["nsenter", "-n", "-t", str(pid), "bash", "-c", _LOOK]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted(_VARYING.sub("", line).strip() for line in told.splitlines())


def _run(*command: object) -> None:
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("stored", ["phaul", "criu"])
def test_the_other_restores_it(criu: Path, program: subprocess.Popen[bytes], tmp_path: Path, stored: str) -> None:
    images, pid = tmp_path / "images", program.pid
    images.mkdir()
    before = _look(pid)
    phaul = (sys.executable, "-m", "phaul")
    if stored == "phaul":
        _run(*phaul, "dump", "--pid", pid, "--images", images)
    else:
        _run(criu, "dump", "-t", pid, "-D", images, "-o", "dump.log")
    program.wait(10)
    if stored == "phaul":
        _run(criu, "restore", "-d", "-D", images, "-o", "restore.log")
    else:
        _run(*phaul, "restore", "--images", images, "--detach")
    deadline = time.monotonic() + 10
    while _look(pid) != before and time.monotonic() < deadline:  # carriers follow a moment later
        time.sleep(0.2)
    assert sorted({*before} ^ {*_look(pid)}) == []
