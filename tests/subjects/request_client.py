"""A client that holds connections and asks without a pause; each answer is checked, and a connection must never end.

    python request_client.py files|visits|counter|memcached ADDRESS PORT CONNECTIONS

`files` asks an HTTP server for / and knows its content; `visits` does it over a new connection each time. `counter`
asks one whose answers only grow, for each connection. `memcached` sets a key of its own and reads it back. After the
first answer on each connection it prints {"ready": true}; for a line "count" on stdin the number of answers; for "stop"
{"answers": .., "errors": [..]}, and it ends.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO

TIMEOUT = 30.0
CONTENT = b"phaul\n"


class WrongAnswerError(Exception):
    """The server said something else than it must."""


def _http(stream: BinaryIO, sock: socket.socket) -> bytes:
    sock.sendall(b"GET / HTTP/1.1\r\nHost: service\r\n\r\n")
    status = stream.readline()
    length, chunked = None, False
    while (line := stream.readline()) not in (b"\r\n", b""):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
        chunked |= name.lower() == b"transfer-encoding"
    if status.split()[1:2] != [b"200"] or length is None or chunked:
        raise WrongAnswerError(f"{status!r}, length {length}")
    return stream.read(length)


def _files(stream: BinaryIO, sock: socket.socket, number: int, before: int) -> int:
    answer = _http(stream, sock)
    if answer != CONTENT:
        raise WrongAnswerError(f"{answer!r} instead of {CONTENT!r}")
    return before + 1


def _counter(stream: BinaryIO, sock: socket.socket, number: int, before: int) -> int:
    now = int(_http(stream, sock))
    if now <= before:
        raise WrongAnswerError(f"{now} after {before}")
    return now


def _memcached(stream: BinaryIO, sock: socket.socket, number: int, before: int) -> int:
    now = before + 1
    value = f"{number}:{now}".encode() * 100
    if before:
        sock.sendall(b"get key%d\r\n" % number)
        kept = f"{number}:{before}".encode() * 100
        lines = [stream.readline() for _ in range(3)]
        if lines != [b"VALUE key%d 0 %d\r\n" % (number, len(kept)), kept + b"\r\n", b"END\r\n"]:
            raise WrongAnswerError(f"{lines!r} instead of value {before}")
    sock.sendall(b"set key%d 0 0 %d\r\n%s\r\n" % (number, len(value), value))
    if (answer := stream.readline()) != b"STORED\r\n":
        raise WrongAnswerError(f"{answer!r} to a set")
    return now


ASK: dict[str, Callable[[BinaryIO, socket.socket, int, int], int]] = {
    "files": _files,
    "visits": _files,
    "counter": _counter,
    "memcached": _memcached,
}


class Client:
    """All connections, a thread for each."""

    def __init__(self, kind: str, address: str, port: int, connections: int) -> None:
        self.answers = [0] * connections
        self.errors: list[str] = []
        self._ask = ASK[kind]
        self._anew = kind == "visits"
        self._stopped = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, args=(number, address, port)) for number in range(connections)
        ]

    def start(self) -> None:
        """Begin; returns when every connection had an answer, or failed."""
        for thread in self._threads:
            thread.start()
        while not all(self.answers) and not self.errors:
            time.sleep(0.002)

    def stop(self) -> None:
        """End after the answers that are due."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _work(self, number: int, address: str, port: int) -> None:
        try:
            while not self._stopped.is_set():
                with socket.create_connection((address, port), timeout=TIMEOUT) as sock, sock.makefile("rb") as stream:
                    self._talk(number, stream, sock)
        except (OSError, ValueError, WrongAnswerError) as error:
            self.errors.append(f"connection {number} after {self.answers[number]} answers: {error!r}")

    def _talk(self, number: int, stream: BinaryIO, sock: socket.socket) -> None:
        last = 0
        while not self._stopped.is_set():
            last = self._ask(stream, sock, number, last)
            self.answers[number] += 1
            time.sleep(0.002)
            if self._anew:
                return


def main() -> None:
    """The command line."""
    kind, address, port, connections = sys.argv[1:]
    client = Client(kind, address, int(port), int(connections))
    client.start()
    print(json.dumps({"ready": not client.errors}), flush=True)
    for line in sys.stdin:
        if line.strip() == "stop":
            break
        print(json.dumps({"answers": sum(client.answers)}), flush=True)
    client.stop()
    print(json.dumps({"answers": sum(client.answers), "errors": client.errors}), flush=True)


if __name__ == "__main__":
    main()
