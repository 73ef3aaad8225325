"""What a program writes to storage that several hosts reach is there when the destination reads it."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
from pathlib import Path

import pytest
from phaul_engine.departure import Departure
from phaul_engine.errors import EngineError
from phaul_engine.objects import network_files
from phaul_engine.target import Tracer

from tests.kernel.test_tree import subject

_CACHESTAT = 451  # cachestat(2), Linux 6.5
_WRITER = """
written = os.open(f"{sys.argv[1]}/written", os.O_RDWR | os.O_CREAT)
fd = os.open(f"{sys.argv[1]}/mapped", os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 1 << 20)
mapped = mmap.mmap(fd, 1 << 20)
os.close(fd)
only_read = os.open(f"{sys.argv[1]}/read", os.O_RDONLY)
os.write(written, b"x" * (1 << 20))
mapped[:] = b"y" * (1 << 20)
change()
os.pwrite(written, b"z" * 10, 5000)
mapped[8192:8193] = b"z"
changed()
"""


def _dirty(path: Path) -> int:
    """How many pages of a file are not on its storage."""
    with path.open("rb") as file:
        everything, found = struct.pack("QQ", 0, 0), ctypes.create_string_buffer(40)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.syscall(_CACHESTAT, file.fileno(), everything, found, 0) != 0:
            pytest.skip(f"cachestat: {os.strerror(ctypes.get_errno())}")
    _, dirty, writeback, *_ = struct.unpack("5Q", found.raw)
    return int(dirty + writeback)


@pytest.mark.parametrize("network", [True, False])
def test_what_was_written_is_on_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: bool) -> None:
    """The file system of this test is taken for one of a network, and for what it is."""
    if network:
        monkeypatch.setattr(network_files, "_LOCAL", frozenset())
    (tmp_path / "read").write_bytes(b"not the program's")
    files = tmp_path / "written", tmp_path / "mapped"
    with subject(tmp_path, _WRITER) as made, Tracer() as tracer, Departure(tracer, made.root) as departure:
        made.wait_for("ready")
        assert [_dirty(file) for file in files] == [256, 256]
        assert not departure.survey(timeout_ms=2000).blockers
        assert [_dirty(file) for file in files] == [256, 256]
        departure.flush_files()
        assert [_dirty(file) for file in files] == ([0, 0] if network else [256, 256])
        os.kill(made.root, signal.SIGUSR2)
        made.wait_for("changed")
        assert all(_dirty(file) > 0 for file in files)
        departure.freeze(timeout_ms=2000)
        departure.collect(hold=lambda: None, seal=lambda _: None, note=lambda _: None)
        assert [_dirty(file) for file in files] == ([0, 0] if network else [256, 256])
        assert _dirty(tmp_path / "read") > 0
        departure.let_go()


def test_what_does_not_reach_the_storage_is_told() -> None:
    with open("/proc/self/stat") as no_storage, pytest.raises(EngineError, match="stat does not reach its storage"):
        network_files.flush([no_storage.fileno()])


def test_the_destination_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that it has read before are forgotten."""
    monkeypatch.setattr(network_files, "_LOCAL", frozenset())
    path = tmp_path / "file"
    path.write_bytes(b"x" * 40960)
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.read(fd, 40960)
        assert _cached(fd) == 10
        network_files.refresh(fd)
        assert _cached(fd) == 0
    finally:
        os.close(fd)


def _cached(fd: int) -> int:
    found = ctypes.create_string_buffer(40)
    if ctypes.CDLL(None).syscall(_CACHESTAT, fd, struct.pack("QQ", 0, 0), found, 0) != 0:
        pytest.skip("no cachestat")
    return int(struct.unpack("5Q", found.raw)[0])
