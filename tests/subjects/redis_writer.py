"""A client that writes to redis and remembers every acknowledgement.

    python -S redis_writer.py HOST PORT [--connections N] [--pause SECONDS]

Each connection has its own counter and keys: INCR must answer exactly one more than the last time, SET must answer OK,
and every 16th GET must give back the last value acknowledged. A connection that ends or answers wrongly is an error
and is not made again. Commands come on standard input, one a line, each answered by one line of JSON:

    mark    numbers since the last mark: writes, gap_ms (the longest time without any answer), latency_ms (the longest
            wait for one answer), slow (answers that took over 150 ms)
    stop    finish the outstanding commands, read every key back, and tell: writes, lost, connections_lost, errors

The end of standard input is `stop`. Only the standard library, so that it starts in the blink of an eye.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

KEYS = 1000
SLOW_S = 0.150
PATIENCE_S = 10.0


class ReplyError(Exception):
    """redis answered what it must not."""


@dataclass
class Figures:
    """What has happened since the last mark."""

    writes: int = 0
    gap: float = 0.0
    latency: float = 0.0
    slow: int = 0
    last: float = field(default_factory=time.monotonic)

    def note(self, asked: float, answered: float) -> None:
        """One answer has come."""
        self.writes += 1
        self.gap = max(self.gap, answered - self.last)
        self.latency = max(self.latency, answered - asked)
        self.slow += answered - asked > SLOW_S
        self.last = answered

    def report(self) -> dict[str, float]:
        """As `mark` tells it; the silence that still lasts counts."""
        gap = max(self.gap, time.monotonic() - self.last)
        return {
            "writes": self.writes,
            "gap_ms": round(gap * 1000, 3),
            "latency_ms": round(self.latency * 1000, 3),
            "slow": self.slow,
        }


class Connection:
    """One connection with its keys and what was acknowledged on it."""

    def __init__(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.number = number
        self.reader = reader
        self.writer = writer
        self.count = 0
        self.acknowledged: dict[int, int] = {}
        self.error: str | None = None

    async def command(self, *words: str) -> bytes | int | None:
        """Send a command, wait for its answer: RESP2."""
        text = f"*{len(words)}\r\n" + "".join(f"${len(word)}\r\n{word}\r\n" for word in words)
        self.writer.write(text.encode())
        line = await self.reader.readuntil(b"\r\n")
        kind, rest = line[:1], line[1:-2]
        if kind == b":":
            return int(rest)
        if kind == b"+":
            return rest
        if kind == b"$":
            length = int(rest)
            return None if length < 0 else (await self.reader.readexactly(length + 2))[:-2]
        raise ReplyError(f"{words}: {line!r}")

    async def write_once(self) -> None:
        """INCR, SET, and now and then GET, each compared with what it must be."""
        count = await self.command("INCR", f"counter:{self.number}")
        if count != self.count + 1:
            raise ReplyError(f"INCR gave {count!r} after {self.count}")
        self.count += 1
        key = self.count % KEYS
        answer = await self.command("SET", f"key:{self.number}:{key}", str(self.count))
        if answer != b"OK":
            raise ReplyError(f"SET gave {answer!r}")
        self.acknowledged[key] = self.count
        if self.count % 16 == 0:
            await self.check(key * 7 % KEYS)

    async def check(self, key: int) -> None:
        """Compare a key with what was acknowledged last."""
        value = await self.command("GET", f"key:{self.number}:{key}")
        wanted = self.acknowledged.get(key)
        if value != (None if wanted is None else str(wanted).encode()):
            raise ReplyError(f"key {key} holds {value!r}, {wanted} was acknowledged")

    async def lost(self, reader: Connection) -> list[str]:
        """Every acknowledged write that is not there, asked over `reader`. Where this connection broke, one write
        more than was acknowledged may be there."""
        wanted = {f"key:{self.number}:{key}": value for key, value in self.acknowledged.items()}
        wanted[f"counter:{self.number}"] = self.count
        most = self.count + (self.error is not None)
        found = []
        for name, least in wanted.items():
            value = await reader.command("GET", name)
            if not isinstance(value, bytes) or not least <= int(value) <= most:
                found.append(f"{name} holds {value!r}, {least} was acknowledged")
        return found


class Writer:
    """All connections."""

    def __init__(self, pause: float) -> None:
        self.pause = pause
        self.figures = Figures()
        self.total = 0
        self.stopping = False
        self.connections: list[Connection] = []

    async def connect(self, host: str, port: int, count: int) -> None:
        """Open them, with nothing left of an earlier run."""
        for number in range(count):
            reader, writer = await asyncio.open_connection(host, port)
            self.connections.append(Connection(number, reader, writer))
        await self.connections[0].command("FLUSHALL")

    async def work(self, connection: Connection) -> None:
        """Write on one connection until told to stop."""
        try:
            while not self.stopping:
                asked = time.monotonic()
                await connection.write_once()
                self.figures.note(asked, time.monotonic())
                if self.pause:
                    await asyncio.sleep(self.pause)
        except (ReplyError, OSError, EOFError) as error:
            connection.error = f"connection {connection.number}: {error!r}"

    def mark(self) -> dict[str, float]:
        """The figures, which begin anew."""
        report = self.figures.report()
        self.total += self.figures.writes
        self.figures = Figures()
        return report

    async def verdict(self) -> dict[str, object]:
        """Read everything back over a connection that still lives, or a new one."""
        self.mark()
        broken = [connection.error for connection in self.connections if connection.error]
        lost: list[str] = []
        for connection in self.connections:
            reader = connection
            if connection.error:
                peer = connection.writer.get_extra_info("peername")
                reader = Connection(connection.number, *await asyncio.open_connection(peer[0], peer[1]))
            lost += await connection.lost(reader)
        errors = [*broken, *lost]
        return {"writes": self.total, "lost": len(lost), "connections_lost": len(broken), "errors": errors[:10]}


def say(answer: Mapping[str, object]) -> None:
    """One line of JSON."""
    print(json.dumps(answer), flush=True)


async def main(options: argparse.Namespace) -> int:
    """Write until `stop`; the exit status is 1 when anything was lost or wrong."""
    writer = Writer(options.pause)
    await writer.connect(options.host, options.port, options.connections)
    tasks = [asyncio.create_task(writer.work(connection)) for connection in writer.connections]
    commands = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    say({"ready": len(tasks)})
    while (line := await commands.readline()) and line.strip() != b"stop":
        say(writer.mark())
    writer.stopping = True
    _, silent = await asyncio.wait(tasks, timeout=PATIENCE_S)
    for connection, task in zip(writer.connections, tasks, strict=True):
        if task in silent:
            task.cancel()
            connection.error = f"connection {connection.number}: no answer for {PATIENCE_S} s"
    verdict = await asyncio.wait_for(writer.verdict(), PATIENCE_S)
    say(verdict)
    return 1 if verdict["errors"] else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two writes of a connection")
    sys.exit(asyncio.run(main(parser.parse_args())))
