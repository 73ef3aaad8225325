"""A whole program with sockets of every kind is collected, killed, made again, and its peers notice nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from phaul_engine.objects import catalogue
from phaul_engine.target import Tracer, stop_tree

from tests.kernel.skeletons import collect, remake

_SERVER = """
import os, select, socket, sys
poll = select.epoll()
socks, names = {}, {}
def add(sock, name):
    socks[sock.fileno()], names[sock.fileno()] = sock, name
    poll.register(sock, select.EPOLLIN)
tcp = socket.create_server(("127.0.0.1", 0)); add(tcp, "listener")
unix = socket.socket(socket.AF_UNIX); unix.bind(sys.argv[1] + "/sock"); unix.listen(); add(unix, "listener")
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.bind(("127.0.0.1", 0)); add(udp, "udp")
left, right = socket.socketpair(); add(right, "relay"); back = {}
print(tcp.getsockname()[1], udp.getsockname()[1], flush=True)
while True:
    for fd, _ in poll.poll():
        sock = socks[fd]
        if names[fd] == "listener":
            add(sock.accept()[0], "stream")
        elif names[fd] == "udp":
            content, sender = sock.recvfrom(4096)
            sock.sendto(b"%d:%s" % (os.getpid(), content), sender)
        elif names[fd] == "stream":
            content = sock.recv(4096)
            if content:
                left.sendall(fd.to_bytes(2, "big") + content)
            else:
                poll.unregister(fd); socks.pop(fd).close()
        else:
            content = sock.recv(4096)
            socks[int.from_bytes(content[:2], "big")].sendall(b"%d:%s" % (os.getpid(), content[2:]))
"""


def ask(sock: socket.socket, content: bytes, pid: int) -> None:
    """Have the server answer, by way of its pair of sockets."""
    sock.sendall(content)
    expect(sock, content, pid)


def expect(sock: socket.socket, content: bytes, pid: int) -> None:
    wanted = b"%d:%s" % (pid, content)
    got = b""
    while len(got) < len(wanted) and (piece := sock.recv(len(wanted) - len(got))):
        got += piece
    assert got == wanted


def test_a_server_of_all_sorts(tmp_path: Path) -> None:
    assert catalogue.tcp
    program = subprocess.Popen(
        [sys.executable, "-c", _SERVER, str(tmp_path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert program.stdout is not None
    tcp_port, udp_port = map(int, program.stdout.readline().split())
    stream = socket.create_connection(("127.0.0.1", tcp_port), timeout=10)
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.settimeout(10)
    datagrams.connect(("127.0.0.1", udp_port))
    ask(stream, b"before", program.pid)
    ask(datagrams, b"before", program.pid)
    program.stdout.close()
    with Tracer() as tracer, stop_tree(tracer, program.pid, timeout_ms=1000) as tree:
        stream.sendall(b"while it stands")
        datagrams.send(b"while it stands")
        checkpoint, pages = collect(tree, program.pid)
        program.kill()
    program.wait()
    remake(program.pid, checkpoint, pages)
    try:
        expect(stream, b"while it stands", program.pid)
        expect(datagrams, b"while it stands", program.pid)
        ask(stream, b"after", program.pid)
        ask(datagrams, b"after", program.pid)
        late = socket.create_connection(("127.0.0.1", tcp_port), timeout=10)
        ask(late, b"late", program.pid)
        local = socket.socket(socket.AF_UNIX)
        local.settimeout(10)
        local.connect(str(tmp_path / "sock"))
        ask(local, b"local", program.pid)
        assert os.listdir(tmp_path) == ["sock"]
        for sock in (stream, datagrams, late, local):
            sock.close()
    finally:
        os.kill(program.pid, 9)
        os.waitpid(program.pid, 0)
