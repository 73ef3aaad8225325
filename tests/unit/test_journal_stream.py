"""What streams to the journal begin with; with a journal, they are tested in tests/migration/test_systemd.py."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from phaul_engine.errors import ImageError, RebuildError
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.pb import sk_unix_pb2
from phaul_engine.objects import journal_stream
from phaul_engine.objects.base import Collection, Restoration

# As systemd-journald 252 writes it; the file's name is DEVICE:INODE of its end of the connection.
STATE = """# This is private data. Do not parse
PRIORITY=28
LEVEL_PREFIX=1
FORWARD_TO_SYSLOG=0
FORWARD_TO_KMSG=1
FORWARD_TO_CONSOLE=0
STREAM_ID=d0d4ea1bd51e47d4a2b1c4c6e2a6b2ff
IDENTIFIER="a \\"web\\" server"
UNIT=web.service
"""


def entry(**changes: object) -> sk_unix_pb2.unix_sk_entry:
    usk = sk_unix_pb2.unix_sk_entry(type=socket.SOCK_STREAM)
    journal = usk.phaul_journal
    journal.identifier, journal.unit, journal.priority = b"web", b"web.service", 28
    journal.level_prefix, journal.to_syslog, journal.to_kmsg, journal.to_console = True, False, True, False
    for name, value in changes.items():
        setattr(journal, name, value)
    return usk


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Somebody who listens where the journal does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "stdout"))
        listener.listen()
        listener.settimeout(5.0)
        monkeypatch.setattr(journal_stream, "PEER", str(tmp_path / "stdout"))
        yield listener


def said(journal: socket.socket, usk: sk_unix_pb2.unix_sk_entry, unit: str) -> list[bytes]:
    restoration = Restoration(Checkpoint(), options={journal_stream.UNIT: unit})
    journal_stream.connect(usk, restoration).close()
    peer, _ = journal.accept()
    with peer:
        return peer.recv(1000).split(b"\n")


def test_it_begins_as_it_did(journal: socket.socket) -> None:
    assert said(journal, entry(), "web.service") == [b"web", b"web.service", b"28", b"1", b"0", b"1", b"0", b""]


def test_nobody_logs_for_another_unit(journal: socket.socket) -> None:
    assert said(journal, entry(), "other.service") == [b"web", b"", b"28", b"1", b"0", b"0", b"0", b""]
    assert said(journal, entry(unit=b""), "")[1] == b""


@pytest.mark.parametrize("changes", [{"identifier": b"a\nb"}, {"unit": b"x\0"}, {"identifier": b"x" * 5000}])
def test_impossible_lines_are_refused(journal: socket.socket, changes: dict[str, object]) -> None:
    with pytest.raises(ImageError):
        journal_stream.connect(entry(**changes), Restoration(Checkpoint(), options={journal_stream.UNIT: "x"}))


def test_a_host_without_a_journal_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_stream, "PEER", str(tmp_path / "nobody"))
    with pytest.raises(RebuildError, match="takes no output"):
        journal_stream.connect(entry(), Restoration(Checkpoint()))


def test_what_the_journal_has_written_down_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_stream, "_STREAMS", str(tmp_path))
    (tmp_path / "8:77").write_text(STATE)
    usk = sk_unix_pb2.unix_sk_entry(type=socket.SOCK_STREAM)
    assert not journal_stream.collect(7, usk, Collection(Checkpoint()))
    assert journal_stream.collect(77, usk, Collection(Checkpoint()))
    assert usk.phaul_journal == entry(identifier=b'a "web" server').phaul_journal
    monkeypatch.setattr(journal_stream, "_STREAMS", str(tmp_path / "none"))
    assert not journal_stream.collect(77, usk, Collection(Checkpoint()))
