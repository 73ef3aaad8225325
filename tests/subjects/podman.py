"""Containers of Podman on the test hosts: an image that both have, storage of each host's own."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.hosts import Host, Hosts
from tests.hosts.bridges import BRIDGE
from tests.hosts.migrate import Migration, parse
from tests.subjects.programs import build, parse_status, wait_until

BUSYBOX = "/bin/busybox"
_CONFIGURATION = "/usr/share/containers/containers.conf"
_OURS = "/run/containers.conf"
_IMAGE = "/srv/shared/image.tar"
_SETTINGS = """[containers]
pids_limit = 0
default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]
[engine]
cgroup_manager = "cgroupfs"
runtime = "runc"
events_logger = "file"
[network]
network_backend = "{backend}"
network_config_dir = "{networks}"
"""
ADDRESS, MAC, PORT = "10.77.0.50", "02:77:00:00:00:50", 8077
LAN = "lan"
"""A network whose bridge is on the hosts' own network (`tests.hosts.bridges`), as an administrator writes one down."""
_LAN: dict[str, dict[str, Any]] = {
    "cni": {
        "cniVersion": "0.4.0",
        "name": LAN,
        "plugins": [
            {
                "type": "bridge",
                "bridge": BRIDGE,
                "hairpinMode": True,
                "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.77.0.0/24"}]]},
            },
            {"type": "portmap", "capabilities": {"portMappings": True}},
            {"type": "firewall"},
            {"type": "tuning"},
        ],
    },
    "netavark": {
        "name": LAN,
        "id": "77" * 32,
        "driver": "bridge",
        "network_interface": BRIDGE,
        "subnets": [{"subnet": "10.77.0.0/24"}],
        "internal": True,
        "ipam_options": {"driver": "host-local"},
    },
}
_FILES = {"cni": f"{LAN}.conflist", "netavark": f"{LAN}.json"}
_NETWORKS = "/run/container-networks"
_FORWARD = "/proc/sys/net/ipv4/ip_forward"
_PROGRAM = f"""[ -w / ] && {BUSYBOX} rm -rf /gone && {BUSYBOX} mkdir /made && echo early > /made/file
while :; do echo tick; {BUSYBOX} sleep 0.1; done &
/bin/echo server :: 7777 /data/echo.status &
exec /bin/heap --status /data/heap.status --heap 16 --rate 10
"""


@dataclass
class Container:
    """One, on both hosts, that is created with `options`, on `network`, which `backend` makes. Its program writes to
    its own layer, or, if it has one, to a volume on storage that both see, and to its log; another one answers at port
    7777."""

    hosts: Hosts
    options: list[str] = field(default_factory=list)
    name: str = "web"
    volume: bool = False
    network: str = "none"
    backend: str = "cni"

    def set_up(self) -> None:
        """Have podman work on the hosts, without the privileges that tests may lack; and the image."""
        files, processes = (resource.getrlimit(one)[1] for one in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC))
        root = self.hosts.shared / "image"
        for directory in ("bin", "data", "etc", "gone", "tmp"):
            (root / directory).mkdir(parents=True)
        for directory in ("data", "tmp"):
            (root / directory).chmod(0o777)
        shutil.copytree(root / "data", self.hosts.shared / "data")
        shutil.copy(BUSYBOX, root / "bin" / "busybox")
        for name in ("heap", "echo"):
            shutil.copy(build(name, "-static"), root / "bin" / name)
        (root / "gone" / "file").write_text("of the image\n")
        for host in (self.hosts.a, self.hosts.b):
            settings = {"files": files, "processes": processes, "networks": _NETWORKS, "backend": self.backend}
            host.path(_OURS).write_text(_SETTINGS.format(**settings))
            host.path(_NETWORKS).mkdir()
            host.path(f"{_NETWORKS}/{_FILES[self.backend]}").write_text(json.dumps(_LAN[self.backend]))
            host.run(["mount", "--bind", _OURS, _CONFIGURATION])
            if host is self.hosts.a:
                host.run(["sh", "-c", "tar -C /srv/shared/image -c . | podman import - small"])
                host.run(["podman", "save", "-o", _IMAGE, "small"])
            else:
                host.run(["podman", "load", "-i", _IMAGE])

    def tear_down(self) -> None:
        """Nothing of it stays."""
        for host in (self.hosts.a, self.hosts.b):
            host.run(["podman", "rm", "--force", "--all", "--time", "0"])
            wait_until(partial(_idle, host), "what podman has started ends")
            host.run(["umount", "/var/lib/containers/storage/overlay"], check=False)  # where podman has left it
            host.run(["umount", _CONFIGURATION])
            host.run(["rm", "-rf", "/var/lib/containers", "/run/containers", "/run/libpod", _OURS])
            _clear_networks(host)
            host.run(["rmdir", "/sys/fs/cgroup/libpod_parent"], check=False)  # where a container ran
        for directory in ("image", "data"):
            shutil.rmtree(self.hosts.shared / directory)
        (self.hosts.shared / "image.tar").unlink()

    def create(self, *hosts: Host, options: Sequence[str] | None = None) -> None:
        """Create it on hosts, on both by default; with other options there is another."""
        for host in hosts or (self.hosts.a, self.hosts.b):
            host.run(["podman", "rm", "--force", "--ignore", self.name])
            chosen = [*(self.options if options is None else options)]
            chosen += ["--read-only", "--volume", "/srv/shared/data:/data"] if self.volume else []
            program = [BUSYBOX, "sh", "-c", _PROGRAM]
            host.run(["podman", "create", "--name", self.name, "--network", self.network, *chosen, "small", *program])

    def start(self, host: Host) -> None:
        """Start it, and wait until its program works."""
        host.run(["podman", "start", self.name])
        wait_until(lambda: "writes" in self.status(host), "it runs", 20.0)

    def told(self, host: Host) -> dict[str, Any]:
        """What podman tells of it."""
        return dict(json.loads(host.run(["podman", "inspect", self.name]).stdout)[0])

    def state(self, host: Host) -> str:
        """running, exited, created, ..."""
        return str(self.told(host)["State"]["Status"])

    def names(self, host: Host) -> list[str]:
        """The containers that a host has, whether they run or not."""
        return host.run(["podman", "ps", "--all", "--format", "{{.Names}}"]).stdout.split()

    def inside(self, host: Host, *words: str) -> str:
        """What a command of busybox says that podman runs in it."""
        return host.run(["podman", "exec", self.name, BUSYBOX, *words]).stdout.strip()

    def log(self, host: Host) -> list[str]:
        """What it has said, as podman has it."""
        return host.run(["podman", "logs", self.name]).stdout.split()

    def layer(self, host: Host) -> Path:
        """What it has written, from outside."""
        return host.path(self.told(host)["GraphDriver"]["Data"]["UpperDir"])

    def status(self, host: Host) -> dict[str, str]:
        """What the program says of itself."""
        place = self.hosts.shared if self.volume else self.layer(host)
        try:
            return parse_status((place / "data" / "heap.status").read_text())
        except FileNotFoundError:
            return {}

    def goes_on(self, host: Host) -> None:
        """Wait until it has written more, in memory and to its log, without an error."""
        before, said = int(self.status(host)["writes"]), len(self.log(host))
        wait_until(lambda: int(self.status(host).get("writes", 0)) > before, "it writes", 20.0)
        wait_until(lambda: len(self.log(host)) > said, "it is heard", 20.0)
        assert self.status(host)["state"] == "running", self.status(host)

    def move(self, source: Host, *options: str) -> Migration:
        """Ask for it."""
        words = ["phaul", "migrate", "--podman", self.name, f"root@{self.hosts.other(source).address}"]
        done = source.run([*words, "--json", "--yes", "--max-downtime", "5000", *options], check=False, timeout=90.0)
        return parse(done)


def _clear_networks(host: Host) -> None:
    """What podman leaves of its networks when no container is on them any more."""
    host.run(["umount", "--recursive", "/run/netns"], check=False)
    host.run(["rm", "-rf", "/var/lib/cni", "/run/netns", _NETWORKS])
    host.run(["nft", "flush", "ruleset"])
    for bridge in ("cni-podman0", "cni-podman1", "podman0", "podman1"):
        host.run(["ip", "link", "delete", bridge], check=False)
    host.run(["sh", "-c", f"echo 0 > {_FORWARD}"])


def _idle(host: Host) -> bool:
    """Whether podman does nothing on a host: it does by itself where a container ends."""
    return host.run(["pgrep", "-x", "podman|conmon"], check=False).returncode != 0
