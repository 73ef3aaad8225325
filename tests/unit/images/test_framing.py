"""The bytes of image files."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phaul_engine.errors import ImageError
from phaul_engine.images.framing import (
    Record,
    decode,
    encode,
    head_of,
    pack_ipc_messages,
    parse_message,
    unpack_ipc_messages,
)
from phaul_engine.images.kinds import KINDS, Kind, parse_name
from phaul_engine.images.pb import (
    core_pb2,
    ghost_file_pb2,
    inventory_pb2,
    ipc_msg_pb2,
    ipc_sem_pb2,
    pagemap_pb2,
    pipe_data_pb2,
    pstree_pb2,
    regfile_pb2,
    tcp_stream_pb2,
)

from tests.image_messages import files


@given(files())
@settings(max_examples=80, deadline=None)
def test_records_come_back(file: tuple[Kind, list[Record]]) -> None:
    kind, records = file
    assert decode(kind, encode(kind, records, "x"), "x") == records


@pytest.mark.parametrize(
    ("stem", "head"),
    [  # the first bytes of files that CRIU 4.2 wrote
        ("inventory", "16313158"),
        ("core", "1943565447380555"),
        ("pagemap", "1943565425400856"),
        ("pagemap-shmem", "1943565425400856"),
        ("files", "1943565438313056"),
        ("stats", "4059105506330957"),
        ("pstree", "1943565430302750"),
        ("fdinfo", "1943565432372156"),
        ("ids", "1943565430204354"),
        ("mm", "1943565420284957"),
        ("fs", "1943565412394051"),
        ("timens", "1943565433441143"),
        ("memfd", "1943565499344548"),
        ("ghost-file", "1943565405365852"),
        ("seccomp", "1943565449304164"),
        ("pages", ""),
        ("ifaddr", ""),
    ],
)
def test_heads(stem: str, head: str) -> None:
    assert head_of(KINDS[stem]).hex() == head


def test_magics_tell_kinds_apart() -> None:
    magics = [kind.magic for stem, kind in KINDS.items() if kind.magic and stem != "pagemap-shmem"]
    assert len(set(magics)) == len(magics)


def test_bytes_of_an_inventory() -> None:
    records = [Record(inventory_pb2.inventory_entry(img_version=2, fdinfo_per_id=True))]
    assert encode(KINDS["inventory"], records, "x").hex(" ", 4) == "16313158 04000000 08021001"


def test_bytes_of_a_process_tree() -> None:
    entry = pstree_pb2.pstree_entry(pid=7, ppid=0, pgid=7, sid=3, threads=[7, 8])
    expected = "19435654 30302750 0c000000 08071000 18072003 28072808"  # threads are not packed
    assert encode(KINDS["pstree"], [Record(entry)], "x").hex(" ", 4) == expected


def test_a_message_that_is_written_otherwise_is_read_all_the_same() -> None:
    """By whoever packs what we do not, or has another order; but nothing strange in it is passed over."""
    entry = pstree_pb2.pstree_entry(pid=7, ppid=0, pgid=7, sid=3, threads=[7, 8])
    otherwise = bytes.fromhex("2a020708 2003 1807 1000 0807")
    assert parse_message(pstree_pb2.pstree_entry, otherwise) == entry
    with pytest.raises(ImageError, match="does not know"):
        parse_message(pstree_pb2.pstree_entry, otherwise + bytes.fromhex("a00601"))
    with pytest.raises(ImageError, match="lacks pid"):
        parse_message(pstree_pb2.pstree_entry, otherwise[:-2])


def test_queue_of_a_pipe_follows_its_record() -> None:
    entry = pipe_data_pb2.pipe_data_entry(pipe_id=1, bytes=3, size=4096)
    assert encode(KINDS["pipes-data"], [Record(entry, b"abc")], "x").endswith(entry.SerializeToString() + b"abc")


def test_semaphores_are_padded_to_eight_bytes() -> None:
    entry = ipc_sem_pb2.ipc_sem_entry(nsems=3)
    entry.desc.SetInParent()
    for field in entry.desc.DESCRIPTOR.fields:
        if field.is_required:
            setattr(entry.desc, field.name, 1)
    data = encode(KINDS["ipcns-sem"], [Record(entry, b"abcdef")], "x")
    assert data.endswith(b"abcdef\0\0")
    assert decode(KINDS["ipcns-sem"], data, "x")[0].payload == b"abcdef"


def test_whole_ghost_file_is_the_rest() -> None:
    entry = ghost_file_pb2.ghost_file_entry(uid=0, gid=0, mode=0o100644)
    data = encode(KINDS["ghost-file"], [Record(entry, b"contents")], "x")
    assert decode(KINDS["ghost-file"], data, "x") == [Record(entry, b"contents")]


def test_ghost_file_in_chunks() -> None:
    head = ghost_file_pb2.ghost_file_entry(uid=0, gid=0, mode=0o100644, chunks=True, size=9000)
    records = [
        Record(head),
        Record(ghost_file_pb2.ghost_chunk_entry(off=0, len=2), b"ab"),
        Record(ghost_file_pb2.ghost_chunk_entry(off=8192, len=3), b"cde"),
    ]
    assert decode(KINDS["ghost-file"], encode(KINDS["ghost-file"], records, "x"), "x") == records


def test_system_v_messages() -> None:
    messages = [(ipc_msg_pb2.ipc_msg(mtype=n, msize=n), bytes(n)) for n in (0, 1, 8, 13)]
    entry = ipc_msg_pb2.ipc_msg_entry(qbytes=0, qnum=4)
    assert unpack_ipc_messages(entry, pack_ipc_messages(messages)) == messages


def test_names_without_an_encoding_survive() -> None:
    entry = regfile_pb2.reg_file_entry(id=1, flags=0, pos=0, name=b"/tmp/caf\xe9\xff")
    assert regfile_pb2.reg_file_entry.FromString(entry.SerializePartialToString()).name == b"/tmp/caf\xe9\xff"


@pytest.mark.parametrize("stem", sorted(KINDS))
def test_names_come_back(stem: str) -> None:
    kind = KINDS[stem]
    ident = {"": None, "-%s": "dump"}.get(kind.naming.value, 0xABC)
    assert parse_name(kind.name(ident)) == (kind, ident)


@given(st.integers(0, (1 << 64) - 1))
def test_numbers_in_names_come_back(number: int) -> None:
    for stem in ("core", "tcp-stream", "pagemap-shmem", "tmpfs-dev"):
        assert parse_name(KINDS[stem].name(number)) == (KINDS[stem], number)


@pytest.mark.parametrize(
    "name", ["dump.log", "parent", "core-1.img.new", ".core-1.img.new", "stats-", "stats-Dump", ""]
)
def test_other_names_are_no_images(name: str) -> None:
    assert parse_name(name) is None


@pytest.mark.parametrize(
    ("stem", "ident"),
    [("core", None), ("core", "1"), ("core", -1), ("core", 1 << 64), ("files", 1), ("stats", "../x"), ("stats", 1)],
)
def test_idents_that_cannot_stand_in_a_name(stem: str, ident: Any) -> None:
    with pytest.raises(ImageError):
        KINDS[stem].name(ident)


@pytest.mark.parametrize(
    ("stem", "records"),
    [
        ("inventory", [Record(inventory_pb2.inventory_entry())]),
        ("inventory", [Record(inventory_pb2.inventory_entry(img_version=2))] * 2),
        ("inventory", [Record(None)]),
        ("core", [Record(inventory_pb2.inventory_entry(img_version=2))]),
        ("core", [Record(core_pb2.core_entry())]),
        ("pagemap", [Record(pagemap_pb2.pagemap_entry(vaddr=0, compat_nr_pages=1))]),
        ("pagemap", [Record(pagemap_pb2.pagemap_head(pages_id=1))] * 2),
        ("pipes-data", [Record(pipe_data_pb2.pipe_data_entry(pipe_id=1, bytes=3), b"ab")]),
        ("pipes-data", [Record(pipe_data_pb2.pipe_data_entry(pipe_id=1, bytes=0))] * 2),
        ("inventory", [Record(inventory_pb2.inventory_entry(img_version=2), b"tail")]),
        ("ifaddr", [Record(inventory_pb2.inventory_entry(img_version=2))]),
        ("ifaddr", [Record(None, b"a"), Record(None, b"b")]),
        ("tcp-stream", [Record(tcp_stream_pb2.tcp_stream_entry(inq_len=1, outq_len=1), b"ab")]),
        ("ghost-file", [Record(ghost_file_pb2.ghost_file_entry(uid=0, gid=0, mode=0, chunks=True), b"x")]),
    ],
)
def test_records_that_cannot_be_written(stem: str, records: list[Record]) -> None:
    with pytest.raises(ImageError):
        encode(KINDS[stem], records, "x")
