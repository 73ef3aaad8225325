"""Containers of LXC on the test hosts: their configuration on both, one root file system that both see."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests import debian
from tests.hosts import Host, Hosts
from tests.hosts.bridges import BRIDGE
from tests.hosts.migrate import Migration, parse
from tests.subjects.programs import build, parse_status, wait_until

ADDRESS, ADDRESS6, MAC = "10.77.0.50", "fd77::50", "02:77:00:00:00:50"
NETWORK = f"""lxc.net.0.type = veth
lxc.net.0.link = {BRIDGE}
lxc.net.0.flags = up
lxc.net.0.hwaddr = {MAC}
lxc.net.0.ipv4.address = {ADDRESS}/24
lxc.net.0.ipv6.address = {ADDRESS6}/64
"""
BASIC = """lxc.include = /usr/share/lxc/config/common.conf
lxc.apparmor.profile = unconfined
"""
FIRST_ID = 100_000
UNPRIVILEGED = f"""lxc.include = /usr/share/lxc/config/userns.conf
lxc.idmap = u 0 {FIRST_ID} 65536
lxc.idmap = g 0 {FIRST_ID} 65536
"""
LOG = "/tmp/lxc.log"
"""What lxc-start says, on the host."""
_HOME = "/var/lib/lxc"
_IDS = "/run/subordinate-ids"
_INIT = """#!/bin/busybox sh
/bin/heap --status /heap.status --heap 16 --rate 10 &
/bin/echo server :: 7777 /echo.status &
while :; do wait; /bin/busybox sleep 1; done
"""


@dataclass
class Container:
    """One, wherever it is. `settings` are lines of its configuration. Its root file system is on storage that both
    hosts see, or, with `own`, on that of the host it is on."""

    hosts: Hosts
    settings: str
    name: str = "web"
    own: Host | None = None

    @property
    def place(self) -> str:
        """The directory of it, as hosts see it."""
        return f"{'/srv/shared' if self.own is None else '/srv/own'}/lxc-{self.name}"

    @property
    def root(self) -> Path:
        """Its root file system, from outside."""
        return (self.own or self.hosts.a).path(f"{self.place}/rootfs")

    def configure(self, *hosts: Host) -> None:
        """Write its configuration on hosts, on both by default."""
        lines = f"lxc.uts.name = {self.name}\nlxc.rootfs.path = dir:{self.place}/rootfs\n{self.settings}"
        for host in hosts or (self.hosts.a, self.hosts.b):
            home = host.path(f"{_HOME}/{self.name}")
            home.mkdir(parents=True, exist_ok=True)
            (home / "config").write_text(lines)

    def start(self, host: Host) -> None:
        """Start it; LXC's own words if that fails."""
        done = host.run(["lxc-start", "-n", self.name, "-l", "INFO", "-o", LOG], check=False)
        assert done.returncode == 0, f"{done.stderr}\n{host.path(LOG).read_text()[-3000:]}"

    def info(self, host: Host) -> dict[str, str]:
        """What lxc-info says."""
        said = host.run(["lxc-info", "-n", self.name], check=False).stdout
        pairs = (line.partition(":") for line in said.splitlines())
        return {key.strip(): value.strip() for key, _, value in pairs}

    def state(self, host: Host) -> str:
        """RUNNING, STOPPED or nothing."""
        return self.info(host).get("State", "")

    def inside(self, host: Host, *words: str, check: bool = True) -> str:
        """What a command says that lxc-attach runs in it."""
        done = host.run(["lxc-attach", "-n", self.name, "--clear-env", "--", *words], check=False)
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout.strip()

    def move(self, source: Host, options: Sequence[str] = ()) -> Migration:
        """Ask for it."""
        words = ["phaul", "migrate", "--lxc", self.name, f"root@{self.hosts.other(source).address}"]
        done = source.run([*words, "--json", "--yes", "--max-downtime", "5000", *options], check=False, timeout=90.0)
        return parse(done)

    def stop(self, host: Host) -> None:
        """End it at once."""
        host.run(["lxc-stop", "-k", "-n", self.name])
        wait_until(lambda: self.state(host) == "STOPPED", "it stops")

    def remove(self) -> None:
        """Stop it wherever it runs; nothing of it stays."""
        for host in (self.hosts.a, self.hosts.b):
            if self.state(host) == "RUNNING":
                self.stop(host)
            shutil.rmtree(host.path(_HOME))
            pivot = host.path("/sys/fs/cgroup/lxc.pivot")  # LXC leaves it to the next container
            if pivot.exists():
                pivot.rmdir()
            shutil.rmtree(host.path(self.place), ignore_errors=True)

    def counter(self, file: str, name: str) -> int:
        """A number in the status file of a program in it."""
        return int(self.status(file).get(name, 0))  # just begun, it is empty

    def status(self, file: str) -> dict[str, str]:
        """What a program in it says of itself."""
        return parse_status((self.root / file).read_text())

    def goes_on(self, file: str, name: str) -> None:
        """Wait until a program in it has gone on, without an error."""
        for _ in range(2):
            before = self.counter(file, name)
            wait_until(lambda now=before: self.counter(file, name) > now, f"{name} goes on", 20.0)  # type: ignore[misc]
        assert self.status(file)["state"] == "running", self.status(file)


def allow_ids(host: Host) -> None:
    """Have newuidmap, which LXC asks where it is installed, give root of a host the ids of `UNPRIVILEGED`."""
    host.path(_IDS).write_text(f"root:{FIRST_ID}:65536\n")
    for name in ("/etc/subuid", "/etc/subgid"):
        if host.path(name).exists():
            host.run(["mount", "--bind", _IDS, name])


def forbid_ids(host: Host) -> None:
    """The opposite."""
    for name in ("/etc/subuid", "/etc/subgid"):
        host.run(["umount", name], check=False)
    host.path(_IDS).unlink()


def make_debian_root(root: Path, *, unprivileged: bool) -> None:
    """A Debian with systemd. A privileged one has no services that systemd gives BPF programs to."""
    root.parent.mkdir(parents=True)
    debian.copy(root, FIRST_ID if unprivileged else 0)
    for unit in () if unprivileged else ("systemd-journald", "systemd-logind", "redis-server"):
        place = root / "etc" / "systemd" / "system" / f"{unit}.service.d"
        place.mkdir()
        (place / "plain.conf").write_text(
            "[Service]\nIPAddressDeny=\nDeviceAllow=\nDevicePolicy=auto\nPrivateDevices=no\n"
        )


def make_small_root(root: Path) -> None:
    """A root file system of busybox, a heap that checks itself, and an echo server; its init is a shell."""
    for directory in ("bin", "sbin", "dev", "etc", "proc", "run", "sys", "tmp"):
        (root / directory).mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    for name in ("heap", "echo"):
        shutil.copy(build(name, "-static"), root / "bin" / name)
    init = root / "sbin" / "init"
    init.write_text(_INIT)
    init.chmod(0o755)
