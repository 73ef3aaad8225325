"""A real sshd on a loopback port, with keys and configuration of its own."""

from __future__ import annotations

import dataclasses
import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from phaul.transport.ssh_config import Destination, SshOptions


def _sshd() -> str | None:
    return shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


@dataclasses.dataclass
class Server:
    """The running sshd and what a client needs for it."""

    port: int
    home: Path
    key: Path
    host_key: Path

    @property
    def destination(self) -> Destination:
        return Destination("127.0.0.1", getpass.getuser(), self.port)

    def known_hosts(self, host_key: Path | None = None) -> Path:
        """A known_hosts file with this server's key, or another."""
        kind, data = Path(f"{host_key or self.host_key}.pub").read_text().split()[:2]
        path = self.home / f"known_hosts.{(host_key or self.host_key).name}"
        path.write_text(f"[127.0.0.1]:{self.port} {kind} {data}\n")
        return path

    def options(self, *more: str, known: Path | None = None, **changes: object) -> SshOptions:
        known = self.known_hosts() if known is None else known
        options = SshOptions(
            identity=(str(self.key),),
            options=(f"UserKnownHostsFile={known}", "GlobalKnownHostsFile=none", "IdentitiesOnly=yes", *more),
            config="none",
            connect_timeout=10,
        )
        return dataclasses.replace(options, **changes)  # type: ignore[arg-type]


def make_key(path: Path) -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    sshd = _sshd()
    if sshd is None:
        pytest.skip("openssh-server is not installed")
    home = tmp_path_factory.mktemp("sshd")
    host_key, key = make_key(home / "host"), make_key(home / "user")
    (home / "authorized_keys").write_text(Path(f"{key}.pub").read_text())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = (
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {host_key}\nPidFile none\nStrictModes no\nUsePAM no\n"
        f"AuthorizedKeysFile {home}/authorized_keys\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"AcceptEnv PATH PHAUL_TEST_*\nPrintMotd no\n"
    )
    (home / "sshd_config").write_text(settings)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # privilege separation directory of Debian's sshd
    log = (home / "log").open("w")
    process = subprocess.Popen([sshd, "-D", "-e", "-f", home / "sshd_config"], stderr=log, stdin=subprocess.DEVNULL)
    try:
        _wait_for(port, process, home / "log")
        yield Server(port, home, key, host_key)
    finally:
        process.terminate()
        process.wait(5)
        log.close()


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if process.poll() is not None:
            pytest.fail(f"sshd ended: {log.read_text()}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    pytest.fail("sshd does not listen")
