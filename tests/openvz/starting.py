"""How a container begins: cgroup, VE, namespaces, root, devices, and in the end its init.

The order is libvzctl's: the process that will be init is born into everything, and waits until its host has plugged it
in and noted it; it says that all is well by the closing of a pipe upon execve(2).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from tests.hosts import syscalls
from tests.openvz import files

_NEWUSER = 0x10000000
_ALL = (
    _NEWUSER
    | syscalls.CLONE_NEWNS
    | syscalls.CLONE_NEWUTS
    | syscalls.CLONE_NEWIPC
    | syscalls.CLONE_NEWPID
    | syscalls.CLONE_NEWNET
)
_MS_SLAVE = 1 << 19
_MAP = "0 0 4294967295"
_INITS = ("/sbin/init", "/etc/init", "/bin/init")
_NODES = ("null", "zero", "full", "random", "urandom", "tty")
_NOSUID = syscalls.MS_NOSUID | syscalls.MS_NOEXEC | syscalls.MS_NODEV


def start(ctid: str, parameters: dict[str, str]) -> None:
    """Start it; OSError, with what did not work, if that fails."""
    group = files.GROUPS / ctid
    group.mkdir(parents=True, exist_ok=True)
    _make_ve(ctid, parameters)
    ready, go, failed = os.pipe(), os.pipe(), os.pipe()
    apart = os.fork()
    if apart == 0:
        try:
            os.close(failed[0])
            _be_born(group, ready[1], go[0], failed[1], parameters)
        except BaseException as error:  # whatever it is, whoever waits is told
            os.write(failed[1], str(error).encode()[:900])
            os._exit(1)
        os._exit(0)
    os.close(failed[1])
    os.close(ready[1])
    for name in ("uid_map", "gid_map"):
        _when_apart(apart)
        Path(f"/proc/{apart}/{name}").write_text(_MAP)
    os.write(go[1], b"m")
    said = os.read(ready[0], 32)
    os.waitpid(apart, 0)
    if not said:
        raise OSError(os.read(failed[0], 1000).decode() or "the container has not begun")
    pid = int(said)
    files.init_pid(ctid).write_text(f"{pid}\n")
    files.NETNS.mkdir(exist_ok=True)
    link = files.NETNS / ctid
    link.unlink(missing_ok=True)
    link.symlink_to(f"/proc/{pid}/ns/net")
    for inner, outer, bridge, mac in _interfaces(parameters):
        _plug(pid, inner, outer, bridge, mac)
    os.write(go[1], b"g")
    complaint = os.read(failed[0], 1000)
    if complaint:
        raise OSError(complaint.decode())


def _make_ve(ctid: str, parameters: dict[str, str]) -> None:
    values = dict(files.DEFAULTS)
    values["ve.veid"] = ctid if ctid.isdigit() else str(int(ctid.partition("-")[0], 16))
    for word in parameters.get("FEATURES", "").split():
        if word.endswith(":on"):
            values["ve.features"] = str(int(values["ve.features"]) | 1 << len(word))
    directory = files.ve(ctid)
    directory.mkdir(parents=True, exist_ok=True)
    for name, value in values.items():
        (directory / name).write_text(value)


def _when_apart(pid: int) -> None:
    """Wait until a process has a user namespace of its own."""
    deadline = time.monotonic() + 10
    while os.readlink(f"/proc/{pid}/ns/user") == os.readlink("/proc/self/ns/user"):
        if time.monotonic() > deadline:
            raise OSError("it has no user namespace")
        time.sleep(0.001)


def _be_born(group: Path, ready: int, go: int, failed: int, parameters: dict[str, str]) -> None:
    """In the process whose child will be init: everything it is born into."""
    (group / "cgroup.procs").write_text("0")
    os.setsid()
    syscalls.unshare(_ALL)
    if os.read(go, 1) != b"m":
        raise OSError("nobody has given it ids")
    os.setgroups([])
    _fresh_clocks()
    pid = os.fork()
    if pid:
        os.write(ready, str(pid).encode())
        return
    try:
        os.close(ready)
        _be_init(go, failed, parameters)
    except BaseException as error:
        os.write(failed, str(error).encode()[:900])
        os._exit(1)


def _fresh_clocks() -> None:
    """A time namespace in which the container has just been booted."""
    syscalls.unshare(syscalls.CLONE_NEWTIME)
    offsets = Path("/proc/self/timens_offsets")
    lines = [line.split() for line in offsets.read_text().splitlines()]
    text = ""
    for (name, seconds, _), clock in zip(lines, (time.CLOCK_MONOTONIC, time.CLOCK_BOOTTIME), strict=True):
        text += f"{name} {int(seconds) - int(time.clock_gettime(clock))} 0\n"
    offsets.write_text(text)


def _be_init(go: int, failed: int, parameters: dict[str, str]) -> None:
    """In the container: its root, and in the end its program."""
    root, ctid = parameters["VE_ROOT"], parameters["VEID"]
    syscalls.mount("none", "/", flags=syscalls.MS_REC | _MS_SLAVE)
    syscalls.mount(root, root, flags=syscalls.MS_BIND | syscalls.MS_REC)
    os.chdir(root)
    os.makedirs(".old-root", exist_ok=True)
    if ctypes.CDLL(None, use_errno=True).syscall(155, b".", b".old-root") < 0:  # pivot_root
        raise OSError(ctypes.get_errno(), "pivot_root")
    os.chdir("/")
    syscalls.mount("proc", "/proc", "proc", _NOSUID)
    syscalls.mount("sysfs", "/sys", "sysfs", _NOSUID)
    syscalls.mount("tmpfs", "/dev", "tmpfs", syscalls.MS_NOSUID, "mode=755")
    for name in _NODES:  # no process in a user namespace makes devices: those of the host are bound
        Path("/dev", name).touch()
        syscalls.mount(f"/.old-root/dev/{name}", f"/dev/{name}", flags=syscalls.MS_BIND)
    Path("/dev/pts").mkdir()
    syscalls.mount("devpts", "/dev/pts", "devpts", syscalls.MS_NOSUID, "newinstance,ptmxmode=0666,mode=0620")
    syscalls.detach("/.old-root")
    os.rmdir("/.old-root")
    syscalls.sethostname(parameters.get("HOSTNAME", f"ct{ctid}"))
    if os.read(go, 1) != b"g":
        raise OSError("nobody has plugged it in")
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.set_inheritable(failed, False)
    os.closerange(3, failed)
    os.closerange(failed + 1, 1 << 12)
    environment = {"PATH": "/bin:/sbin:/usr/bin:/usr/sbin", "container": f"ve-{ctid}", "TERM": "linux", "HOME": "/"}
    for program in _INITS:
        if os.path.exists(program):
            os.execve(program, ["init"], environment)
    raise OSError("it has no init")


def _interfaces(parameters: dict[str, str]) -> Iterator[tuple[str, str, str, str]]:
    for one in filter(None, parameters.get("NETIF", "").split(";")):
        fields = dict(part.partition("=")[::2] for part in one.split(","))
        yield fields["ifname"], fields["host_ifname"], fields.get("bridge", ""), fields.get("mac", "")


def _plug(pid: int, inner: str, outer: str, bridge: str, mac: str) -> None:
    address = ["address", mac] if mac else []
    peer = ["peer", "name", inner, *address, "netns", str(pid)]
    subprocess.run(["ip", "link", "add", outer, "type", "veth", *peer], check=True)
    subprocess.run(["ip", "link", "set", outer, *(["master", bridge] if bridge else []), "up"], check=True)
