"""Packets are held while sockets move, and come in at the destination: no peer has to repeat anything."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from phaul_engine.errors import EngineError
from phaul_engine.network import address, announce, bpf, hold, ingress, interfaces, lock, replay, undo
from phaul_engine.network.hold import Match, Stage
from phaul_engine.network.ingress import Method

from .lab import SERVICE, Host, Lab, Move
from .test_tcp import BOTH, connect, listen, receive, retransmits


def netns(host: object) -> str:
    return f"/run/netns/{host.name}"  # type: ignore[attr-defined]


@pytest.fixture(params=list(Method), ids=[one.value for one in Method])
def holding(lab: Lab, request: pytest.FixtureRequest) -> Iterator[hold.Hold]:
    """A hold at the lab's source."""
    if request.param is Method.TCX and ingress.choose() is not Method.TCX:
        pytest.skip("this kernel has no TCX")
    made = hold.prepare(f"t{os.getpid()}", netns(lab.source), method=request.param)
    yield made
    made.close()
    assert left_behind(lab) == []


def left_behind(lab: Lab) -> list[str]:
    """Filters, qdiscs and TAPs at source and destination."""
    found = []
    for host in (lab.source, lab.destination):
        for kind in ("qdisc", "filter"):
            for device in ("lo", "e0"):
                shown = tc(host, kind, "show", "dev", device, *(["ingress"] if kind == "filter" else []))
                found += [line for line in shown.splitlines() if "noqueue" not in line]
        found += [name for _, name in host.inside(socket.if_nameindex) if name not in ("lo", "e0")]
    return found + [name for name in os.listdir("/sys/fs/bpf") if str(os.getpid()) in name]


def tc(host: Host, *words: str) -> str:
    command = ["nsenter", f"--net={netns(host)}", "tc", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Clients:
    """Closed-loop echo clients, each with one request on its way, that check every byte and time every answer."""

    def __init__(self, socks: list[socket.socket]) -> None:
        self._socks = socks
        self._stop = threading.Event()
        self.answers = 0
        self.slowest = 0.0
        self.errors: list[str] = []
        self._threads = [threading.Thread(target=self._loop, args=(sock,)) for sock in socks]
        for thread in self._threads:
            thread.start()

    def _loop(self, sock: socket.socket) -> None:
        number = 0
        try:
            while not self._stop.is_set():
                question = b"%08d" % number * 16
                started = time.perf_counter()
                sock.sendall(question)
                if receive(sock, len(question)) != question:
                    self.errors.append("wrong bytes")
                self.slowest = max(self.slowest, time.perf_counter() - started)
                self.answers, number = self.answers + 1, number + 1
                time.sleep(0.001)
        except OSError as error:
            self.errors.append(repr(error))

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


class EchoServer:
    """Answers what comes, in one thread, until it is paused: then it touches its sockets no more."""

    def __init__(self, socks: list[socket.socket]) -> None:
        self._socks = socks
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def _loop(self) -> None:
        import select

        poll = select.poll()
        by_fd = {sock.fileno(): sock for sock in self._socks}
        for sock in self._socks:
            sock.setblocking(False)
            poll.register(sock, select.POLLIN)
        while not self._stop.is_set():
            for fd, _ in poll.poll(5):
                sock = by_fd[fd]
                if content := sock.recv(4096):
                    sock.sendall(content)

    def pause(self) -> None:
        self._stop.set()
        self._thread.join()


@BOTH
@pytest.mark.parametrize("connections", [1, 20])
def test_no_byte_is_repeated(
    lab: Lab, move: Move, holding: hold.Hold, family: int, connections: int, capsys: pytest.CaptureFixture[str]
) -> None:
    width = 24 if family == socket.AF_INET else 64
    injector = replay.Injector.prepare(f"u{os.getpid()}", "e0", netns(lab.destination), method=holding.method)
    service = address.Address.prepare(f"{SERVICE[family]}/{width}@e0", netns(lab.destination))
    old = address.Address.prepare(f"{SERVICE[family]}/{width}@e0", netns(lab.source))
    speaker = announce.Announcer.prepare("e0", [SERVICE[family]], netns(lab.destination))
    with closing(injector), closing(service), closing(old), closing(speaker), closing(listen(lab.source, family)) as it:
        pairs = [connect(lab, it) for _ in range(connections)]
        servers = [server for _, server in pairs]
        holding.add([Match(None, SERVICE[family])])
        program = EchoServer(servers)
        clients = Clients([client for client, _ in pairs])
        time.sleep(0.2)
        move.collect([it, *servers], survey=True)
        move.rebuild()
        holding.set(Stage.SYN)
        time.sleep(0.005)
        started = time.perf_counter()
        program.pause()
        holding.set(Stage.ALL)
        collection = move.collect([it, *servers], survey=False)
        assert not collection.blockers
        move.settle()
        time.sleep(0.005)  # the rest of a freeze
        service.add()
        speaker.send()
        made = move.release()
        held = replay.unpack(replay.pack(replay.drain(holding.tap)))
        count = injector.inject(held)
        program = EchoServer(made[1:])
        gap = time.perf_counter() - started
        late = replay.drain(holding.tap)
        injector.inject(late)
        time.sleep(0.3)
        service.tidy()
        old.remove()
        for sock in (it, *servers):
            sock.close()
        clients.stop()
        program.pause()
        with capsys.disabled():
            print(
                f"\n{connections} connections: {1000 * gap:.1f} ms stopped, {count} frames held and {len(late)} late,"
                f" slowest answer {1000 * clients.slowest:.1f} ms"
            )
        assert clients.errors == []
        assert clients.answers > 30 * connections
        assert sum(retransmits(client) for client, _ in pairs) == 0
        for sock in (*made, *(client for client, _ in pairs)):
            sock.close()


@BOTH
def test_a_connect_waits_out_the_freeze(lab: Lab, move: Move, holding: hold.Hold, family: int) -> None:
    """A request for a connection that arrives meanwhile is answered by the destination, from its one SYN."""
    injector = replay.Injector.prepare(f"u{os.getpid()}", "e0", netns(lab.destination), method=holding.method)
    with closing(injector), closing(listen(lab.source, family)) as it:
        holding.add([Match(socket.IPPROTO_TCP, SERVICE[family], 7000)])
        move.collect([it], survey=True)
        move.rebuild()
        holding.set(Stage.SYN)
        client = lab.client.socket(family, socket.SOCK_STREAM)
        client.setblocking(False)
        started = time.monotonic()
        assert client.connect_ex((SERVICE[family], 7000)) != 0
        time.sleep(0.02)
        holding.set(Stage.ALL)
        assert not move.collect([it], survey=False).blockers
        move.settle()
        lab.move_address(family)
        (listener,) = move.release()
        assert injector.inject(replay.drain(holding.tap)) >= 1
        accepted, _ = listener.accept()
        assert time.monotonic() - started < 0.9  # a dropped SYN is repeated after a second
        client.setblocking(True)
        accepted.sendall(b"hello")
        assert receive(client, 5) == b"hello"
        assert retransmits(client) == 0
        for sock in (client, accepted, listener):
            sock.close()


@BOTH
def test_abort_gives_the_packets_back(lab: Lab, move: Move, holding: hold.Hold, family: int) -> None:
    with closing(listen(lab.source, family)) as it:
        client, server = connect(lab, it)
        holding.add([Match(socket.IPPROTO_TCP, SERVICE[family], 7000)])
        holding.set(Stage.ALL)
        collection = move.collect([server], survey=False)
        entry = json.loads(json.dumps(undo.repair_entry(collection)))
        client.sendall(b"in the freeze")
        time.sleep(0.02)
        holding.set(Stage.OFF)
        assert replay.give_back(holding.tap) >= 1
        undo.undo(entry)
        undo.undo(entry)
        assert receive(server, 13) == b"in the freeze"
        server.sendall(b"answer")
        assert receive(client, 6) == b"answer"
        assert retransmits(client) == 0
        client.close()
        server.close()


def test_only_what_moves_is_held(lab: Lab, holding: hold.Hold) -> None:
    """A port, one connection, an exception: the rest of the host does not notice."""
    family = socket.AF_INET
    with closing(listen(lab.source, family)) as moving, closing(listen(lab.source, family, port=7100)) as staying:
        held, held_server = connect(lab, moving)
        other, other_server = connect(lab, staying)
        spared, spared_server = connect(lab, moving)
        holding.add([Match(socket.IPPROTO_TCP, None, 7000)])
        holding.spare([Match(socket.IPPROTO_TCP, SERVICE[family], 7000, spared.getsockname())])
        holding.set(Stage.ALL)
        for sock in (held, other, spared):
            sock.sendall(b"x")
        assert receive(other_server, 1) == b"x"
        assert receive(spared_server, 1) == b"x"
        time.sleep(0.05)
        held_server.setblocking(False)
        with pytest.raises(BlockingIOError):
            held_server.recv(1)
        frames = replay.drain(holding.tap)
        assert frames
        assert all(frame[-1:] == b"x" for frame in frames)
        holding.set(Stage.OFF)
        for sock in (held, held_server, other, other_server, spared, spared_server):
            sock.close()


def test_udp_is_held(lab: Lab, holding: hold.Hold) -> None:
    receiver = lab.source.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    receiver.bind(("::", 7200))
    receiver.settimeout(0.2)
    sender = lab.client.socket(socket.AF_INET, socket.SOCK_DGRAM)
    holding.add([Match(socket.IPPROTO_UDP, SERVICE[socket.AF_INET], 7200)])
    holding.set(Stage.ALL)
    sender.sendto(b"datagram", (SERVICE[socket.AF_INET], 7200))
    with pytest.raises(TimeoutError):
        receiver.recv(100)
    holding.set(Stage.OFF)
    assert replay.give_back(holding.tap) == 1
    assert receiver.recv(100) == b"datagram"
    sender.close()
    receiver.close()


@pytest.mark.parametrize("method", list(Method), ids=[one.value for one in Method])
def test_a_dead_agent_leaves_a_drop_and_undo_cleans_up(lab: Lab, method: Method) -> None:
    """The hold outlives its process, nothing reaches the socket, and its journal entry is enough to take it away."""
    if method is Method.TCX and ingress.choose() is not Method.TCX:
        pytest.skip("this kernel has no TCX")
    identity = f"d{os.getpid()}"
    program = (
        "import os\n"
        "from phaul_engine.network import hold\n"
        f"made = hold.prepare({identity!r}, {netns(lab.source)!r}, method=hold.{method})\n"
        f"made.add([hold.Match(None, '{SERVICE[socket.AF_INET]}')])\n"
        "made.set(hold.Stage.ALL)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    entry = json.loads(json.dumps(hold.undo_entry(identity, netns(lab.source))))
    with closing(listen(lab.source, socket.AF_INET)) as it:
        client, server = connect(lab, it)
        assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
        client.sendall(b"x")
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.recv(1)
        assert left_behind(lab)
        undo.undo(entry)
        assert receive(server, 1) == b"x"  # the client repeats it
        assert left_behind(lab) == []
        undo.undo(entry)
        client.close()
        server.close()


def test_the_first_packet_after_undo_passes(lab: Lab) -> None:
    """What is played to a socket then has nobody to repeat it."""
    receiver = lab.source.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 7300))
    receiver.settimeout(5)
    sender = lab.source.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for number in range(30):
        entry = lab.source.inside(lock.plan)
        lab.source.inside(lambda entry=entry: lock.lock(entry, [Match(socket.IPPROTO_UDP, "127.0.0.1", 7300)]))  # type: ignore[misc]
        lab.source.inside(lambda entry=entry: undo.undo(entry))  # type: ignore[misc]
        sender.sendto(bytes([number]), ("127.0.0.1", 7300))
        assert receiver.recv(10) == bytes([number])
    sender.close()
    receiver.close()


@pytest.fixture
def passing() -> Iterator[str]:
    """The path of a pinned program that lets everything pass."""
    code = bpf.Assembler()
    code.set(0, bpf.NEXT)
    code.exit()
    program = bpf.load(code.assemble(), "others")
    path = f"/sys/fs/bpf/others-{os.getpid()}"
    bpf.pin(program, path)
    os.close(program)
    yield path
    os.unlink(path)


def test_filters_of_others_stay_and_come_second(lab: Lab, passing: str) -> None:
    place = ("dev", "e0", "ingress")
    tc(lab.source, "qdisc", "add", "dev", "e0", "clsact")
    tc(lab.source, "filter", "add", *place, "prio", "1", "bpf", "da", "object-pinned", passing)
    before = tc(lab.source, "filter", "show", *place)
    made = hold.prepare(f"t{os.getpid()}", netns(lab.source), method=Method.CLSACT)
    shown = tc(lab.source, "filter", "show", *place)
    assert shown.index("phaul-t") < shown.index("others")
    made.close()
    assert tc(lab.source, "filter", "show", *place) == before
    assert "clsact" in tc(lab.source, "qdisc", "show", "dev", "e0")
    assert "clsact" not in tc(lab.source, "qdisc", "show", "dev", "lo")


def test_a_qdisc_goes_with_the_last_of_two_holds(lab: Lab) -> None:
    first, second = (hold.prepare(f"{n}{os.getpid()}", netns(lab.source), method=Method.CLSACT) for n in "tu")
    first.close()
    assert "clsact" in tc(lab.source, "qdisc", "show", "dev", "e0")
    second.close()
    assert left_behind(lab) == []


def test_a_first_place_that_is_taken_is_told(lab: Lab, passing: str) -> None:
    place = ("dev", "e0", "ingress", "protocol", "ip", "prio", "1")
    tc(lab.source, "qdisc", "add", "dev", "e0", "clsact")
    tc(lab.source, "filter", "add", *place, "bpf", "da", "object-pinned", passing)
    with pytest.raises(EngineError, match="another filter stands first at the ingress of e0"):
        hold.prepare(f"t{os.getpid()}", netns(lab.source), method=Method.CLSACT)
    tc(lab.source, "qdisc", "del", "dev", "e0", "clsact")
    assert [line for line in left_behind(lab) if "others" not in line] == []


@pytest.mark.parametrize("text", ["10.99.0.77/32", "fd99::77/128"])
def test_address_and_its_undo(lab: Lab, text: str) -> None:
    place = address.Address.prepare(f"{text}@e0", netns(lab.destination))
    place.add()
    place.add()

    def there() -> bool:
        host = text.partition("/")[0]
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            try:
                sock.connect((host, 9))
                return bool(sock.getsockname()[0] == host)  # only what is local is reached from itself
            except OSError:
                return False

    assert lab.destination.inside(there)
    entry = json.loads(json.dumps(place.undo_add()))
    undo.undo(entry)
    undo.undo(entry)
    assert not lab.destination.inside(there)
    place.close()
    with pytest.raises(EngineError, match="form"):
        address.Address.prepare("10.99.0.77@e0")
    with pytest.raises(EngineError, match="no interface nosuch"):
        address.Address.prepare("10.99.0.77/24@nosuch")


def test_frames_cut_off_are_refused() -> None:
    packed = replay.pack([bytes(80), bytes(200)])
    assert [len(frame) for frame in replay.unpack(packed)] == [80, 200]
    with pytest.raises(EngineError, match="impossible"):
        list(replay.unpack(packed[:-1]))
    with pytest.raises(EngineError, match="middle"):
        list(replay.unpack(packed + b"\0"))


def test_interfaces(lab: Lab) -> None:
    found = {one.name: one for one in lab.source.inside(interfaces.ethernet_interfaces)}
    assert found["lo"].loopback
    assert len(found["e0"].address) == 6
    assert not found["e0"].loopback
