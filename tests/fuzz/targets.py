"""Everything in Python that reads what others wrote, each as a function of bytes. It returns where the bytes were
understood, or refused with the error that its users expect; anything else that it raises is a finding.

`seeds` are where to begin. They are tried by hypothesis (test_targets.py) and by atheris (`make fuzz`)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from phaul_engine import plan, vdso
from phaul_engine.errors import IMPOSSIBLE, EngineError, ImageError, RebuildError
from phaul_engine.images import delta, verify
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.directory import ImageDirectory
from phaul_engine.images.framing import decode, encode, parse_message
from phaul_engine.images.kinds import KINDS
from phaul_engine.images.pages import parse_runs
from phaul_engine.images.pb import sk_opts_pb2
from phaul_engine.memory import fingerprint
from phaul_engine.network import lock, replay
from phaul_engine.objects import seccomp, socket_options
from phaul_engine.objects.base import Restoration
from phaul_engine.page_server import PageServer
from phaul_engine.page_wire import Command, PageStreamError, Wire, whose

from phaul import desk, events, session
from phaul.config import ConfigError, Settings, _read
from phaul.errors import JournalError, PhaulError
from phaul.haul import wire
from phaul.haul.arriving import Arriving
from phaul.journal import Row, Store, Task
from phaul.migration import Message, Role
from phaul.preflight import Answers, HostFacts, ProgramFacts
from phaul.shipping import Shipped
from phaul.transport import bootstrap, direct, hello
from phaul.transport.control import HEADER, Channel, Frame, StreamLink
from phaul.transport.pb.control_pb2 import Open
from tests.unit.images.checkpoints import complete

_MIGRATION = "0123456789ab"
_META = {"uid": 0, "gid": 0, "mode": 420, "mtime": 1, "attributes": {"user.a": "YQ=="}}


@dataclass(frozen=True)
class Target:
    """One decoder."""

    feed: Callable[[bytes], None]
    seeds: Callable[[], Iterable[bytes]]


# -- images -----------------------------------------------------------------------------------------------------------


def _one_image(data: bytes) -> None:
    """The first byte chooses the kind."""
    if not data:
        return
    kind = list(KINDS.values())[data[0] % len(KINDS)]
    with contextlib.suppress(ImageError):
        records = decode(kind, data[1:], "x")
        if kind.stem.startswith("pagemap"):
            parse_runs(records, "x")
        assert decode(kind, encode(kind, records, "x"), "x") == records


def _image_seeds() -> Iterable[bytes]:
    checkpoint = complete()
    numbers = {stem: index for index, stem in enumerate(KINDS)}
    for stem, ident in checkpoint.files():
        records = checkpoint.records(stem, ident)
        yield bytes([numbers[stem]]) + encode(KINDS[stem], records, stem)


def _tree(data: bytes) -> None:
    """A whole checkpoint, and all that is concluded from it before a process is made."""
    with contextlib.suppress(ImageError):
        checkpoint = Checkpoint.from_bytes(data)
        problems = verify.check(checkpoint, contents=False)
        if problems:
            return
        root = plan.read_tree(checkpoint)
        plan.order(root)
        plan.changes(root, root)
        restoration = Restoration(checkpoint)
        for ident in checkpoint.idents("core"):
            core = checkpoint.one("core", ident)
            if core.thread_core.HasField("seccomp_filter"):
                seccomp.chain(core.thread_core.seccomp_filter, restoration)


def _tree_seeds() -> Iterable[bytes]:
    yield complete().to_bytes()


def _changes(data: bytes) -> None:
    with contextlib.suppress(ImageError):
        delta.apply(complete(), data)


def _change_seeds() -> Iterable[bytes]:
    before, after = complete(), complete()
    after.one("fs", 10).umask = 0o77
    yield delta.Known(before).delta(after)
    yield delta.Known(Checkpoint()).delta(before)


def _options(data: bytes) -> None:
    """The options of a socket."""
    kind = sk_opts_pb2.sk_opts_entry
    with contextlib.suppress(ImageError, *IMPOSSIBLE):  # the latter become a RebuildError
        socket_options.decode(parse_message(kind, data))


def _vdso(data: bytes) -> None:
    with contextlib.suppress(RebuildError):
        code = vdso.parse(data)
        vdso.redirected(code, 0x7FFF00000000, code, 0x7FFF10000000)


def _vdso_seeds() -> Iterable[bytes]:
    here = vdso.local()
    yield here.code.data if here is not None else b"\x7fELF"


# -- what agents say --------------------------------------------------------------------------------------------------


def _letters(data: bytes) -> None:
    with contextlib.suppress(EngineError):
        letter = direct.parse(data)
        match letter.kind:
            case direct.Kind.PROTOCOL:
                letter.protocol()
            case direct.Kind.SETTINGS:
                letter.settings()
            case direct.Kind.CLOCK:
                letter.clocks()
            case direct.Kind.ROUND:
                letter.round()
            case direct.Kind.PLACE:
                letter.place()
            case direct.Kind.FINGERPRINTS:
                fingerprint.unpack(letter.body)
            case direct.Kind.FRAMES:
                list(replay.unpack(letter.body))
            case direct.Kind.SURVEY:
                _tree(letter.body)
            case direct.Kind.FINAL:
                _changes(letter.body)
            case direct.Kind.HAUL if letter.body[:1] == bytes([wire.Tag.RECORDS]):
                _files(letter.body)


def _files(body: bytes) -> None:
    """Records of files, in a directory with something in it; nothing outside may change."""
    with tempfile.TemporaryDirectory() as directory:
        outside = Path(directory, "outside")
        outside.write_text("outside")
        arriving = Arriving([f"{directory}/place"], "m", lambda _: None)
        try:
            arriving.make()
            Path(directory, "place.phaul-m", "f").write_text("content")
            Path(directory, "place.phaul-m", "link").symlink_to("..")
            with contextlib.suppress(EngineError):
                arriving.take(body)
        finally:
            arriving.close()
        assert sorted(os.listdir(directory)) == ["outside", "place", "place.phaul-m"]
        assert outside.read_text() == "outside"


def _letter_seeds() -> Iterable[bytes]:
    yield bytes([direct.Kind.PROTOCOL]) + b'{"message":"%s","why":"w"}' % next(iter(Message)).value.encode()
    yield bytes([direct.Kind.SETTINGS]) + b'{"clocks":[1,2],"options":{},"moved":[]}'
    yield bytes([direct.Kind.CLOCK]) + b"[1,2]"
    yield bytes([direct.Kind.ROUND]) + bytes(4)
    yield bytes([direct.Kind.FRAMES]) + replay.pack([bytes(80)])
    yield bytes([direct.Kind.FINGERPRINTS]) + fingerprint.pack([fingerprint.Print(1, 4096, 2, bytes(16))])
    yield bytes([direct.Kind.SURVEY]) + complete().to_bytes()
    records = (
        wire.Record({"op": "put", "tree": 0, "path": "d", "make": "new", "kind": 0o40000}),
        wire.Record({"op": "put", "tree": 0, "path": "d/f", "make": "hard", "other": "f"}),
        wire.Record({"op": "put", "tree": 0, "path": "f", "size": 4, "runs": [[0, 4]], "meta": _META}, b"1234"),
        wire.Record({"op": "data", "tree": 0, "path": "link/outside", "offset": 0}, b"1234"),
        wire.Record({"op": "hole", "tree": 0, "path": "f", "offset": 0, "length": 4096}),
        wire.Record({"op": "gone", "tree": 0, "path": "d"}),
    )
    yield bytes([direct.Kind.HAUL]) + wire.letter(wire.Tag.RECORDS, b"".join(map(wire.pack, records)))


class _Nowhere:
    """The writing half of a stream that nobody reads."""

    def write(self, data: bytes) -> None:
        """Forget it."""

    async def drain(self) -> None:
        """Nothing waits."""

    def close(self) -> None:
        """Nothing is open."""


def _conversation(data: bytes) -> None:
    """A hello, and frames after it, as an agent gets them through SSH."""

    async def talk() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        await hello.receive(reader)
        channel = Channel(StreamLink(reader, _Nowhere()), bootstrap.CATALOGUE)

        async def answer(asked: Open) -> Open:
            return asked

        channel.handle(Open, answer)
        await channel.run()

    with contextlib.suppress(PhaulError):
        asyncio.run(talk())


def _conversation_seeds() -> Iterable[bytes]:
    line = hello.local(frozenset({"a"})).line()
    body = Open(migration=_MIGRATION, fingerprint=bytes(32), streams=4, host="h").SerializeToString()
    yield line + HEADER.pack(len(body), 2, 0, 0, 1) + body
    yield b"motd\n" + line + HEADER.pack(0, 0x8001, 0, 0, 0)
    yield line + HEADER.pack(2, 1, 3, 0, 1) + b"\n\0"


def _bodies(data: bytes) -> None:
    """JSON in frames: what the desks, `phaul` and the agent ask and answer."""
    frame = Frame(1, data)
    for read in (desk._content, session._request, session._answer):
        with contextlib.suppress(PhaulError):
            read(frame)
    for kind in (desk.Standing, desk.Resolved, HostFacts, ProgramFacts, Answers, Shipped):
        with contextlib.suppress(PhaulError):
            desk._checked(kind, desk._content(frame))
    with contextlib.suppress(events.EventError):
        events.decode(data)
    with contextlib.suppress(ImageError):
        lock._read(data.decode("utf-8", "replace"))


def _body_seeds() -> Iterable[bytes]:
    yield b'{"path":"/a","size":1,"sha256":"00","uid":0,"gid":0,"mode":420,"mtime":5}'
    yield b'{"event":"notice","severity":"info","text":"t","advice":""}'
    yield b'{"data":{"id":"ab","bare":[1]}}'
    yield b'{"port": 5}'
    yield b"[" * 3000
    yield b'{"a":NaN,"b":1e400}'


# -- files ------------------------------------------------------------------------------------------------------------


def _journal(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "state"
        directory.mkdir(mode=0o700)
        (directory / f"{_MIGRATION}.destination").write_bytes(data)
        with contextlib.suppress(JournalError):
            journal = Store(directory).open(_MIGRATION, Role.DESTINATION)
            assert journal is not None
            with journal:
                journal.history()


def _journal_seeds() -> Iterable[bytes]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "state"
        row = Row(migration=_MIGRATION, role=Role.DESTINATION, boot="b", owner=Task(pid=1, start=1))
        with Store(directory).create(row, records=24) as journal:
            journal.note(program="p" * 700)
            yield journal.path.read_bytes()[: 24 * 512]


def _settings(data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with contextlib.suppress(ConfigError, ValueError):
            Settings.model_validate(_read(Path(file.name)))


def _settings_seeds() -> Iterable[bytes]:
    yield (Path(__file__).parents[2] / "configs" / "phaul.toml").read_bytes()
    yield b"a = " + b"[" * 2000


class _Bytes(Wire):
    """A connection that says certain bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def receive(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        self._at += len(taken)
        if taken and len(taken) < size:
            raise PageStreamError("the page stream ends within a message")
        return taken

    def receive_file(self, fd: int, offset: int, size: int) -> None:
        taken = self.receive(size)
        if len(taken) < size:
            raise PageStreamError("the page stream ends within pages")
        os.pwrite(fd, taken, offset)

    def send_file(self, fd: int, offset: int, size: int) -> None:
        raise AssertionError("a page server sends no pages")

    def send(self, data: bytes) -> None:
        pass


def _page_server(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name, ImageDirectory(name) as directory:
        with contextlib.suppress(PageStreamError, ImageError):
            PageServer(_Bytes(data), directory).serve()
        assert all(one.startswith(("pagemap-", "pages-", ".pagemap-")) for one in os.listdir(name))


def _page_server_seeds() -> Iterable[bytes]:
    task = whose("pagemap", 77)
    for form, large in (("<IxxxxQQQ", True), ("<IIQQ", False)):

        def head(command: int, flags: int = 0, pages: int = 0, address: int = 0, form: str = form) -> bytes:
            return struct.pack(form, command | flags << 16, pages, address, task)

        yield head(Command.OPEN2) + head(Command.ADD_F, 4, 1, 4096) + bytes(4096) + head(Command.CLOSE)
        yield head(Command.PARENT) + head(Command.OPEN) + head(Command.HOLE, 0, 1, 4096) if large else head(Command.GET)


def _nothing() -> Iterable[bytes]:
    yield b""


TARGETS: dict[str, Target] = {
    "image": Target(_one_image, _image_seeds),
    "tree": Target(_tree, _tree_seeds),
    "delta": Target(_changes, _change_seeds),
    "options": Target(_options, _nothing),
    "vdso": Target(_vdso, _vdso_seeds),
    "letter": Target(_letters, _letter_seeds),
    "conversation": Target(_conversation, _conversation_seeds),
    "body": Target(_bodies, _body_seeds),
    "journal": Target(_journal, _journal_seeds),
    "settings": Target(_settings, _settings_seeds),
    "page-server": Target(_page_server, _page_server_seeds),
}
