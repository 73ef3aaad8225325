"""The process that makes the hosts and holds them together.

    python -S -E -c '...; main(...)' STATE CGROUP [systemd]

It stands for the switch: its network namespace has the bridge. For each host it forks a keeper, which enters the
host's cgroup, leaves for new namespaces and forks the host's process 1 (`tests.hosts.init`). When every host is up it
writes STATE/ready.json; from then on it only waits. Everything it made lives in namespaces that nothing else
holds: killing the processes of CGROUP removes the hosts, links and mounts included.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from tests.hosts import init, syscalls
from tests.hosts.cgroups import enter
from tests.hosts.spec import DEVICE, HOSTS, HostSpec

NAMESPACES = (
    syscalls.CLONE_NEWCGROUP
    | syscalls.CLONE_NEWNET
    | syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWIPC
)


def ip_batch(lines: list[str]) -> None:
    """Run ip(8) commands in the caller's network namespace; raises CalledProcessError at the first that fails."""
    subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True)


def _become_host(spec: HostSpec, state: Path, listener: socket.socket, go: int, pid_out: int) -> None:
    """In the host's keeper: make the namespaces, fork process 1, wait for its end."""
    syscalls.prctl(syscalls.PR_SET_PDEATHSIG, signal.SIGKILL)
    timens = syscalls.CLONE_NEWTIME if spec.monotonic is not None else 0
    syscalls.unshare(NAMESPACES | timens)
    if spec.monotonic is not None:
        offsets = f"monotonic {spec.monotonic} 0\nboottime {spec.boottime} 0\n"
        Path("/proc/self/timens_offsets").write_text(offsets)
    child = os.fork()
    if child == 0:
        os.close(pid_out)
        init.main(spec, state, listener, go)
    os.write(pid_out, f"{child}\n".encode())
    os.close(pid_out)
    os.waitpid(child, 0)


def _fork_host(spec: HostSpec, state: Path, cgroup: Path) -> tuple[int, int, int]:
    """Start one host: the PID of its process 1, a descriptor of which it awaits one byte, the keeper's PID."""
    directory = state / spec.name
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(directory / "control"))
    listener.listen(16)
    pid_in, pid_out = os.pipe()
    go_in, go_out = os.pipe()
    keeper = os.fork()
    if keeper == 0:
        try:
            os.close(go_out)
            enter(cgroup / spec.name)
            _become_host(spec, state, listener, go_in, pid_out)
        finally:
            os._exit(1)
    for fd in (pid_out, go_in):
        os.close(fd)
    listener.close()
    with os.fdopen(pid_in) as pipe:
        text = pipe.read()
    if not text:
        raise RuntimeError(f"host {spec.name} did not start; the reason is in {state}/holder.log")
    return int(text), go_out, keeper


def _plug(spec: HostSpec, pid: int) -> list[str]:
    """The commands that lay a cable from the bridge to the host whose process 1 is `pid`."""
    port = f"port-{spec.name}"
    return [
        f"link add {port} type veth peer name {DEVICE} address {spec.mac} netns {pid}",
        f"link set {port} master br0 up",
    ]


def main(state_text: str, cgroup_text: str, *process_1: str) -> None:
    """Make the hosts, say so, and wait to be killed."""
    state, cgroup = Path(state_text), Path(cgroup_text)
    syscalls.prctl(syscalls.PR_SET_NAME, b"hosts-holder")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    syscalls.unshare(syscalls.CLONE_NEWNET)
    specs = [replace(spec, systemd=spec.sshd and "systemd" in process_1) for spec in HOSTS]
    started = {spec.name: _fork_host(spec, state, cgroup) for spec in specs}
    lines = ["link add br0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0", "link set br0 up"]
    for spec in HOSTS:
        lines += _plug(spec, started[spec.name][0])
    ip_batch(lines)
    for _, go, _ in started.values():
        os.write(go, b"g")
        os.close(go)
    ready = state / "ready.json"
    ready.with_suffix(".new").write_text(json.dumps({name: pid for name, (pid, _, _) in started.items()}))
    ready.with_suffix(".new").rename(ready)
    for _, _, keeper in started.values():
        os.waitpid(keeper, 0)
    sys.exit("all hosts have ended")
