"""A Debian container of LXC with systemd, sshd, nginx and redis between two hosts, and clients that hold connections to
it through the bridge: redis written to, HTTP kept alive, a session of ssh."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from tests import debian
from tests.hosts import Host, Hosts
from tests.hosts.bridges import bridged
from tests.hosts.host import PIPE
from tests.subjects.lxc import (
    ADDRESS,
    BASIC,
    FIRST_ID,
    LOG,
    NETWORK,
    UNPRIVILEGED,
    Container,
    allow_ids,
    forbid_ids,
    make_debian_root,
)
from tests.subjects.programs import wait_until
from tests.subjects.servers import RedisWriter, RequestClient, Service

_REDIS, _HTTP = 6379, 80
_PAUSE = 0.001  # seconds between a client's questions
_START = 120.0  # seconds for systemd and the servers to be there
_FILES = {
    "etc/nginx/conf.d/connections.conf": "keepalive_requests 1000000;\n",
    "var/www/html/index.html": "phaul\n",
}
_OPEN_REDIS = "bind 0.0.0.0\nprotected-mode no\n"


def why_missing() -> str:
    """Why there can be none; empty if there can."""
    return "" if shutil.which("lxc-start") else "LXC is not installed: apt-get install lxc"


@contextmanager
def serving(hosts: Hosts) -> Iterator[Container]:
    """The container, running on host a with all of its servers up; it may have moved when it is removed. It is
    unprivileged, as systemd gives services of a privileged one BPF programs, which do not move."""
    debian.tree()
    with bridged(hosts), ExitStack() as stack:
        container = Container(hosts, BASIC + UNPRIVILEGED + NETWORK, name="servers")
        _make_root(container.root, hosts.client)
        for host in (hosts.a, hosts.b):
            allow_ids(host)
            stack.callback(forbid_ids, host)
        container.configure()
        stack.callback(container.remove)
        container.start(hosts.a)
        wait_until(lambda: _up(container, hosts.a), "the container's servers are up", _START)
        hosts.a.path(LOG).unlink()
        yield container


def _make_root(root: Path, client: Host) -> None:
    make_debian_root(root, unprivileged=True)
    files = {**_FILES, "root/.ssh/authorized_keys": client.key.with_suffix(".pub").read_text()}
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.write_text(text)
        for one in (path.parent, path):
            os.chown(one, FIRST_ID, FIRST_ID)
    with (root / "etc/redis/redis.conf").open("a") as settings:
        settings.write(_OPEN_REDIS)


def _up(container: Container, host: Host) -> bool:
    said = container.inside(host, "systemctl", "is-system-running", check=False)
    units = container.inside(host, "systemctl", "is-active", "ssh", "nginx", "redis-server", check=False)
    return any(word in ("running", "degraded") for word in said.split()) and units.split() == ["active"] * 3


def redis_client(hosts: Hosts) -> RedisWriter:
    """Four connections that write and compare, a question each millisecond or so."""
    return RedisWriter(hosts.client, ADDRESS, _REDIS, pause=_PAUSE)


def http_client(hosts: Hosts) -> RequestClient:
    """Four connections that are kept alive, on which a file is asked for again and again."""
    return RequestClient(hosts.client, "files", Service(ADDRESS, _HTTP))


class Session:
    """A session of ssh in the container in which a program repeats what it is told, line by line, without an end."""

    def __init__(self, hosts: Hosts) -> None:
        log = "/srv/shared/ssh-session.log"
        words = [
            "ssh",
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
            f"root@{ADDRESS}",
            "cat",
        ]
        self._process = hosts.client.popen(words, stdin=PIPE, stdout=PIPE, stderr=log)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._talk)
        self.lines = 0
        self.error = ""
        self._thread.start()

    def _talk(self) -> None:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        while not self._ending.wait(_PAUSE):
            line = f"line {self.lines}\n".encode()
            try:
                os.write(process.stdin.fileno(), line)
                answer = process.stdout.readline()
            except OSError as error:
                self.error = f"the ssh session ended after {self.lines} lines: {error}"
                return
            if answer != line:
                self.error = f"the ssh session answered {line!r} with {answer!r}"
                return
            self.lines += 1

    def goes_on(self, by: int = 5) -> None:
        """Wait until so many more lines have come back."""
        before = self.lines
        wait_until(lambda: bool(self.error) or self.lines >= before + by, "lines come back", 30.0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._process.kill()
        self._thread.join()
        self._process.__exit__(None, None, None)
