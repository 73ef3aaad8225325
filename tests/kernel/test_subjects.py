"""The subjects pass where nothing happens to them, and do not where something does: only so their verdict counts."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.hosts import Hosts
from tests.subjects.programs import start_echo_client, start_echo_server, start_heap
from tests.subjects.servers import RedisWriter, start_memcached, start_nginx, start_redis, why_missing


def heap_range(pid: int) -> tuple[int, int]:
    """The largest writable anonymous area of a process: where `heap` has its pages."""
    best = (0, 0)
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        words = line.split()
        if words[1] == "rw-p" and len(words) == 5:
            begin, end = (int(text, 16) for text in words[0].split("-"))
            best = max(best, (begin, end), key=lambda area: area[1] - area[0])
    return best


def test_heap_passes_and_tells_its_gap(hosts: Hosts) -> None:
    subject = start_heap(hosts.b, heap_mib=16, rate_mb=20, discard=50)
    subject.goes_on("discards")
    subject.clear_gap()
    pidfd = subject.process.pidfd
    signal.pidfd_send_signal(pidfd, signal.SIGSTOP)
    time.sleep(0.25)
    signal.pidfd_send_signal(pidfd, signal.SIGCONT)
    subject.goes_on("ticks")
    assert 240_000 < subject.number("gap_us") < 2_000_000
    assert int(subject.finish()["rounds"]) > 0


def test_heap_sees_one_changed_byte(hosts: Hosts) -> None:
    subject = start_heap(hosts.a, heap_mib=16, rate_mb=0)
    begin, end = heap_range(subject.process.outer_pid)
    memory = os.open(f"/proc/{subject.process.outer_pid}/mem", os.O_RDWR)
    place = (begin + end) // 2 // 4096 * 4096 + 2000
    byte = os.pread(memory, 1, place)
    os.pwrite(memory, bytes([byte[0] ^ 1]), place)
    os.close(memory)
    with pytest.raises(AssertionError, match="fill at word 250 is wrong"):
        subject.finish()


def test_echo_passes_and_counts_a_standstill(hosts: Hosts) -> None:
    server = start_echo_server(hosts.a, hosts.service)
    client = start_echo_client(hosts.client, hosts.service, connections=5, size=3000)
    client.goes_on("requests")
    client.clear_gap()
    signal.pidfd_send_signal(server.process.pidfd, signal.SIGSTOP)
    time.sleep(0.25)
    signal.pidfd_send_signal(server.process.pidfd, signal.SIGCONT)
    client.goes_on("requests")
    verdict = client.finish()
    assert int(verdict["slow"]) == 5
    assert int(verdict["gap_us"]) > 240_000
    server.finish()


def test_echo_client_fails_when_the_server_dies(hosts: Hosts) -> None:
    server = start_echo_server(hosts.a, hosts.service6)
    client = start_echo_client(hosts.client, hosts.service6, connections=2)
    client.goes_on("requests")
    server.process.kill()
    with pytest.raises(AssertionError, match="connection"):
        client.finish()


@pytest.mark.skipif(why_missing("redis-server") is not None, reason="redis-server is not installed")
def test_redis_writer_passes_and_sees_a_lost_write(hosts: Hosts) -> None:
    server = start_redis(hosts.a, hosts.service)
    with RedisWriter(hosts.client, hosts.service) as writer:
        time.sleep(0.3)
        assert writer.mark()["writes"] > 20
        verdict = writer.stop()
        assert verdict["writes"] > 20
        assert (verdict["lost"], verdict["connections_lost"], verdict["errors"]) == (0, 0, [])
    with RedisWriter(hosts.client, hosts.service, pause=0.05) as writer:
        time.sleep(0.3)
        hosts.client.run(["redis-cli", "-h", hosts.service, "set", "key:0:1", "0"])
        verdict = writer.stop()
        assert verdict["lost"] == 1
        assert "key:0:1 holds b'0', 1 was acknowledged" in verdict["errors"][0]
    assert server.process.stop() == 0


@pytest.mark.skipif(why_missing("redis-server") is not None, reason="redis-server is not installed")
def test_redis_writer_counts_lost_connections(hosts: Hosts) -> None:
    server = start_redis(hosts.a, hosts.service)
    with RedisWriter(hosts.client, hosts.service, connections=3) as writer:
        hosts.client.run(["redis-cli", "-h", hosts.service, "client", "kill", "type", "normal", "skipme", "yes"])
        time.sleep(0.1)
        verdict = writer.stop()
        assert verdict["connections_lost"] == 3
        assert verdict["lost"] == 0
    server.process.stop()


@pytest.mark.skipif(why_missing("nginx") is not None, reason="nginx is not installed")
def test_nginx_serves(hosts: Hosts) -> None:
    server = start_nginx(hosts.a, hosts.service)
    fetch = f"from urllib.request import urlopen; print(urlopen('http://{server.address}:{server.port}/').read())"
    assert "phaul" in hosts.client.run(["python3", "-S", "-c", fetch]).stdout
    assert server.process.stop() == 0


@pytest.mark.skipif(why_missing("memcached") is not None, reason="memcached is not installed")
def test_memcached_answers(hosts: Hosts) -> None:
    server = start_memcached(hosts.a, hosts.service)
    connect = f"import socket; s = socket.create_connection(({server.address!r}, {server.port}))"
    ask = connect + "; s.sendall(b'version\\r\\n'); print(s.recv(99))"
    assert "VERSION" in hosts.client.run(["python3", "-S", "-c", ask]).stdout
    server.process.stop()
