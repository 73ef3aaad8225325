"""Build the C subjects, start them on a host, read what they say of themselves."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.hosts.host import Host, Process
from tests.hosts.rootfs import REPOSITORY

SOURCES = Path(__file__).parent
FLAGS = ("-O2", "-g", "-Wall", "-Wextra", "-Werror", "-pthread")


def build(name: str, *flags: str) -> Path:
    """The program made of `name`.c, built anew only when source or flags have changed.

    CalledProcessError when it does not compile; the compiler's words are on stderr.
    """
    source = SOURCES / f"{name}.c"
    digest = hashlib.sha256(source.read_bytes() + " ".join((*FLAGS, *flags)).encode()).hexdigest()[:16]
    program = REPOSITORY / ".state" / "subjects" / f"{name}-{digest}"
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        temporary = program.with_suffix(f".{os.getpid()}")
        subprocess.run(["gcc", *FLAGS, *flags, "-o", temporary, source], check=True)
        temporary.rename(program)
    return program


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 10.0) -> None:
    """Poll `condition` every 5 ms; TimeoutError names `what`."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} after {timeout} s: no")
        time.sleep(0.005)


def parse_status(text: str) -> dict[str, str]:
    """The NAME=VALUE words of a status line; `error`, the last, may have spaces in it."""
    words, _, error = text.strip().partition(" error=")
    fields = dict(word.split("=", 1) for word in words.split())
    return fields | {"error": error}


@dataclass
class Subject:
    """A C subject on some host: known by PID and status file, wherever it has moved."""

    host: Host
    process: Process
    status_file: str
    """A path that every host knows."""

    @property
    def pid(self) -> int:
        """The same on every host."""
        return self.process.pid

    def status(self) -> dict[str, str]:
        """Its last words."""
        return parse_status(self.host.path(self.status_file).read_text())

    def number(self, name: str) -> int:
        """A number among its last words."""
        return int(self.status()[name])

    def moved_to(self, host: Host) -> None:
        """It runs there from now on."""
        self.host = host

    def clear_gap(self) -> None:
        """Forget the gaps so far, and wait until that is in the status."""
        before = self.number("ticks") if "ticks" in self.status() else 0
        self.host.kill(self.pid, 10)
        wait_until(lambda: "ticks" not in self.status() or self.number("ticks") > before, "a new status")
        time.sleep(0.06)

    def goes_on(self, name: str = "writes", timeout: float = 5.0) -> None:
        """Wait until a counter has moved twice: TimeoutError when the program stands still.

        The first status after a standstill may be written before the other threads have run; the second was not.
        """
        for _ in range(2):
            self._moves(name, timeout)

    def _moves(self, name: str, timeout: float) -> None:
        before = self.number(name)
        wait_until(lambda: self.number(name) > before, f"{name} of process {self.pid} moves", timeout)

    def finish(self, timeout: float = 30.0) -> dict[str, str]:
        """End it; its verdict. AssertionError with its own reason unless it passes."""
        self.host.kill(self.pid, 15)
        wait_until(lambda: not self.host.alive(self.pid), f"the end of process {self.pid}", timeout)
        status = self.status()
        assert status["state"] == "pass", f"process {self.pid} on host {self.host.name}: {status}"
        return status


def start(host: Host, words: list[str], status_file: str, begun: Callable[[int], object] = lambda pid: None) -> Subject:
    """Start a subject and wait until it tells of itself. `begun` is called with its PID right after its start."""
    process = host.popen(words, stderr=f"{status_file}.err")
    begun(process.pid)
    subject = Subject(host, process, status_file)

    def ready() -> bool:
        if process.poll() is not None:
            said = host.path(f"{status_file}.err").read_text().strip()
            raise RuntimeError(f"{words[0]} ended with status {process.returncode}: {said}")
        file = host.path(status_file)
        return file.exists() and file.read_text().startswith("state=")

    wait_until(ready, f"a status of {words[0]}", 30.0)
    return subject


def start_heap(
    host: Host,
    *,
    heap_mib: int = 64,
    rate_mb: int = 10,
    threads: int = 2,
    discard: int = 0,
    status: str = "/srv/shared/heap.status",
) -> Subject:
    """Start `heap`: see heap.c. `rate_mb` is in 10^6 bytes a second; `status` a path on storage that hosts share."""
    options = {"--status": status, "--heap": heap_mib, "--rate": rate_mb, "--threads": threads, "--discard": discard}
    words = [str(build("heap"))]
    for name, value in options.items():
        words += [name, str(value)]
    return start(host, words, status)


def start_echo_server(
    host: Host, address: str, port: int = 7777, status: str = "/srv/shared/echo-server.status"
) -> Subject:
    """Start `echo server`: see echo.c."""
    return start(host, [str(build("echo")), "server", address, str(port), status], status)


def start_echo_client(
    host: Host,
    address: str,
    port: int = 7777,
    *,
    connections: int = 10,
    size: int = 1000,
    status: str = "/srv/shared/echo-client.status",
) -> Subject:
    """Start `echo client` with requests of `size` bytes: see echo.c."""
    words = [str(build("echo")), "client", address, str(port), status, str(connections), str(size)]
    return start(host, words, status)
