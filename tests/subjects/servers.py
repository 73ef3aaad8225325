"""Real servers as subjects, and the client that writes to redis."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.hosts.host import PIPE, Host, Process, virtual_environment
from tests.subjects.programs import wait_until

NGINX_CONFIGURATION = """
daemon off;
user root;
worker_processes {workers};
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 256; }}
http {{
	access_log off;
	keepalive_requests 1000000;
	client_body_temp_path {directory}/body;
	proxy_temp_path {directory}/proxy;
	fastcgi_temp_path {directory}/fastcgi;
	uwsgi_temp_path {directory}/uwsgi;
	scgi_temp_path {directory}/scgi;
	server {{
		listen {address}:{port};
		root {directory}/html;
	}}
}}
"""


@dataclass
class Service:
    """What a client connects to."""

    address: str
    port: int


@dataclass
class Server(Service):
    """A server that listens; `process` is its leader."""

    process: Process

    @property
    def pid(self) -> int:
        """The leader's PID, the same on every host."""
        return self.process.pid


def why_missing(program: str) -> str | None:
    """Why a test with that program is skipped; None where it is installed."""
    return None if shutil.which(program, path="/usr/sbin:/usr/bin:/sbin:/bin") else f"{program} is not installed"


def _listens(host: Host, port: int) -> bool:
    """Whether something listens on that TCP port, asked without connecting."""
    lines = []
    for name in ("tcp", "tcp6"):
        lines += host.path("/proc/1/net").joinpath(name).read_text().splitlines()[1:]
    return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines)


def _start(host: Host, words: list[str], address: str, port: int, log: str) -> Server:
    process = host.popen(words, stdout=log, stderr=log)

    def ready() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"{words} ended with status {process.returncode}: {host.path(log).read_text()}")
        return _listens(host, port)

    wait_until(ready, f"{words[0]} listens on port {port}")
    return Server(address, port, process)


def start_redis(host: Host, address: str, directory: str = "/srv/shared/redis", port: int = 6379) -> Server:
    """redis without snapshots of its own, its directory and log on storage that hosts share."""
    host.path(directory).mkdir(parents=True, exist_ok=True)
    words = ["redis-server", "--bind", address, "--port", str(port), "--dir", directory, "--save", ""]
    words += ["--appendonly", "no", "--daemonize", "no", "--protected-mode", "no"]
    return _start(host, words, address, port, f"{directory}/redis.log")


def start_memcached(host: Host, address: str, port: int = 11211, log: str = "/srv/shared/memcached.log") -> Server:
    """memcached with four threads."""
    words = ["memcached", "-u", "root", "-l", address, "-p", str(port), "-U", "0", "-m", "64", "-t", "4"]
    return _start(host, words, address, port, log)


def start_nginx(
    host: Host, address: str, directory: str = "/srv/shared/nginx", port: int = 8080, workers: int = 2
) -> Server:
    """nginx with a master and `workers`, serving `directory`/html, which holds index.html."""
    outside = host.path(directory)
    (outside / "html").mkdir(parents=True, exist_ok=True)
    (outside / "html" / "index.html").write_text("phaul\n")
    text = NGINX_CONFIGURATION.format(directory=directory, address=address, port=port, workers=workers)
    (outside / "nginx.conf").write_text(text)
    words = ["nginx", "-c", f"{directory}/nginx.conf", "-e", f"{directory}/error.log"]
    return _start(host, words, address, port, f"{directory}/nginx.log")


def start_node(host: Host, address: str, port: int = 8090, log: str = "/srv/shared/node.log") -> Server:
    """node with an HTTP server that counts: counter.js."""
    words = ["node", str(Path(__file__).with_name("counter.js")), address, str(port)]
    return _start(host, words, address, port, log)


class RequestClient:
    """request_client.py at work on a host, which is the client and does not move: `kind` is files, visits,
    counter or memcached."""

    def __init__(self, host: Host, kind: str, server: Service, *, connections: int = 4) -> None:
        program = Path(__file__).with_name("request_client.py")
        words = [str(virtual_environment() / "bin" / "python"), "-S", "-E", str(program)]
        words += [kind, server.address, str(server.port), str(connections)]
        self.process = host.popen(words, stdin=PIPE, stdout=PIPE)
        if not self._answer()["ready"]:
            raise RuntimeError(f"the client could not begin: {self.stop()}")

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def _say(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(word.encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def goes_on(self, by: int = 20) -> None:
        """Wait until so many more answers have come."""
        before = int(self._say("count")["answers"])
        wait_until(lambda: int(self._say("count")["answers"]) >= before + by, "answers come")

    def stop(self) -> dict[str, Any]:
        """Its verdict: answers, errors."""
        verdict = self._say("stop")
        self.process.wait(40)
        return verdict

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.__exit__(None, None, None)


class RedisWriter:
    """redis_writer.py at work on a host, which is the client and does not move."""

    def __init__(
        self, host: Host, address: str, port: int = 6379, *, connections: int = 4, pause: float = 0.001
    ) -> None:
        program = Path(__file__).with_name("redis_writer.py")
        words = [str(virtual_environment() / "bin" / "python"), "-S", "-E", str(program), address, str(port)]
        words += ["--connections", str(connections), "--pause", str(pause)]
        self.process = host.popen(words, stdin=PIPE, stdout=PIPE, stderr="/srv/shared/redis-writer.log")
        self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            said = self.process.host.path("/srv/shared/redis-writer.log").read_text().strip()
            raise RuntimeError(f"the writing client ended: {said}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _say(self, word: str) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(word.encode() + b"\n")
        self.process.stdin.flush()
        return self._answer()

    def mark(self) -> dict[str, float]:
        """writes, gap_ms, latency_ms and slow since the last mark."""
        return self._say("mark")

    def stop(self) -> dict[str, Any]:
        """Its verdict: writes, lost, connections_lost, errors."""
        verdict = self._say("stop")
        self.process.wait(10)
        return verdict

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.__exit__(None, None, None)


POSTGRES = "/usr/lib/postgresql/15/bin"
POSTGRES_SETTINGS = {
    "fsync": "off",
    "shared_buffers": "16MB",
    "huge_pages": "off",
    "dynamic_shared_memory_type": "mmap",
    "unix_socket_directories": "",
}
"""Small and quick; memory of other kinds (huge pages, files in /dev/shm) is refused by name."""


def start_postgres(host: Host, address: str, directory: str = "/srv/shared/postgres", port: int = 5432) -> Server:
    """PostgreSQL with a new cluster of its own, which anybody may use; System V memory is its lock against a second
    server."""
    outside = host.path(directory)
    outside.mkdir()
    shutil.chown(outside, "postgres", "postgres")
    user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"]
    host.run([*user, f"{POSTGRES}/initdb", "-D", directory, "-A", "trust", "--no-sync", "--no-instructions"])
    with (outside / "pg_hba.conf").open("a") as rules:
        rules.write("host all all 10.77.0.0/24 trust\n")
    words = [*user, f"{POSTGRES}/postgres", "-D", directory, "-p", str(port), "-c", f"listen_addresses={address}"]
    for name, value in POSTGRES_SETTINGS.items():
        words += ["-c", f"{name}={value}"]
    server = _start(host, words, address, port, "/srv/shared/postgres.log")
    wait_until(lambda: "ready to accept" in host.path("/srv/shared/postgres.log").read_text(), "PostgreSQL is ready")
    return server


class PostgresSession:
    """psql on a host, which is the client and does not move: one connection, asked line by line."""

    def __init__(self, host: Host, server: Server) -> None:
        words = [f"{POSTGRES}/psql", "-h", server.address, "-p", str(server.port), "-U", "postgres", "-qAtX"]
        log = "/srv/shared/psql.log"
        self.process = host.popen([*words, "-v", "ON_ERROR_STOP=1"], stdin=PIPE, stdout=PIPE, stderr=log)
        self._log = host.path(log)

    def do(self, command: str) -> str:
        """The result of a command that has one line of it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command.encode() + b";\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline().decode().strip()
        if not line:
            raise RuntimeError(f"{command} failed: {self._log.read_text()}")
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.__exit__(None, None, None)
