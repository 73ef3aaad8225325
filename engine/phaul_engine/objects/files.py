"""The pass over the descriptor tables of a tree, and the files it holds otherwise: exe, cwd, root, mappings.

A pass takes a duplicate of every descriptor, finds which refer to one open file description, gives descriptions their
image ids, has each collected once by its kind, and writes the `files`, `fdinfo` and `fs` images. Ids are kept from
pass to pass by table and number, so that what the destination built from the survey is found again in the freeze;
entries of steady kinds are collected again only where something changed.
"""

from __future__ import annotations

import errno
import functools
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self, TypeAlias

from phaul_engine import calls
from phaul_engine.errors import EngineError, GoneError
from phaul_engine.images.pb import fdinfo_pb2, fs_pb2
from phaul_engine.proc import access, descriptors, fdinfo
from phaul_engine.proc.locks import FileLock

from . import file_locks, mounted, unsupported
from .base import Collection, Descriptor, DescriptorKind, Owner, descriptor_kinds, kind_of
from .description import is_path

_FD_CLOEXEC = 1
_GONE = (errno.EBADF, errno.ESRCH)  # of a descriptor, or of all of a process that is about to end


@dataclass(frozen=True)
class Table:
    """A descriptor table. Processes that share it (CLONE_FILES) are one table, read through any one of them.

    `pidfd` is of that process, for pidfd_getfd(2).
    """

    files_id: int
    owner: Owner
    pidfd: int


# A descriptor, and the table and number where it stands.
_Member: TypeAlias = tuple[tuple[int, int], Descriptor]


@dataclass(frozen=True)
class _Known:
    """What the last pass wrote about a description. The duplicate in `descriptor` is closed. `signals` is None where
    an entry does not stand by itself."""

    descriptor: Descriptor
    kind: DescriptorKind
    entry: fdinfo_pb2.file_entry
    signals: tuple[bytes, int] | None


class OpenFiles:
    """The open files of one tree, over all passes of one migration."""

    def __init__(self) -> None:
        self._next_id = 1
        self._ids: dict[object, int] = {}  # of the last pass: by (files_id, fd), or by what a path led to
        self._places: dict[int, list[object]] = {}  # by id, as far as asked for
        self._known: dict[int, _Known] = {}
        self._infos: dict[tuple[int, int], fdinfo.FdInfo] = {}
        self._ranks: dict[object, int] = {}
        self._kept: dict[object, int] = {}
        self.undo = ExitStack()

    def close(self) -> None:
        """Close what is kept between passes, and undo what was done for the tree's departure."""
        self.replace_kept({})
        self.undo.close()

    def kept(self, key: object) -> int | None:
        """A descriptor that was kept under a key."""
        return self._kept.get(key)

    def replace_kept(self, kept: dict[object, int]) -> None:
        """Keep these, and close what else was kept."""
        for key, fd in self._kept.items():
            if key not in kept:
                os.close(fd)
        self._kept = kept

    def begin(self, collection: Collection) -> FilesPass:
        """Start a pass; use it in a `with` statement."""
        return FilesPass(self, collection)

    def claim_id(self, places: Iterable[object], taken: set[int], status: os.stat_result) -> int:
        """The id that a description had at one of these places, or a new one. It was another description if it was of
        another file: the program has opened a new one of the same name, perhaps, under the same number."""
        for place in places:
            known = self._ids.get(place)
            if known is not None and known not in taken and self._is_of(known, status):
                return known
        self._next_id += 1
        return self._next_id - 1

    def _is_of(self, file_id: int, status: os.stat_result) -> bool:
        known = self._known.get(file_id)
        return known is None or os.path.samestat(known.descriptor.status, status)

    def places(self, file_id: int) -> Iterable[object]:
        """Where an id was found in the last pass."""
        if not self._places:
            for place, found in self._ids.items():
                self._places.setdefault(found, []).append(place)
        return self._places.get(file_id, ())

    def known(self, file_id: int) -> _Known | None:
        """What the last pass found under an id."""
        return self._known.get(file_id)

    def info(self, place: tuple[int, int]) -> fdinfo.FdInfo | None:
        """The fdinfo of a descriptor in the last pass."""
        return self._infos.get(place)

    def rank(self, place: object) -> int:
        """Where a descriptor stood in the order of kcmp(2) in the last pass: most still do."""
        return self._ranks.get(place, len(self._ranks))

    def replace(
        self,
        ids: dict[object, int],
        known: dict[int, _Known],
        infos: dict[tuple[int, int], fdinfo.FdInfo],
        ranks: dict[object, int],
    ) -> None:
        """End of a pass: from now on this is what is known."""
        self._ids, self._known, self._infos, self._ranks = ids, known, infos, ranks
        self._places = {}


class FilesPass:
    """One pass. Call `tables`, then `fs` and `file_at` as often as wanted, then `finish`."""

    def __init__(self, files: OpenFiles, collection: Collection) -> None:
        self._files = files
        self.collection = self._collection = collection
        self._stack = ExitStack()
        self._proc_self = -1
        self._finished = False
        self._kept: dict[object, int] = {}
        self._ids: dict[object, int] = {}
        self._infos: dict[tuple[int, int], fdinfo.FdInfo] = {}
        self._locks: dict[int, list[tuple[int, FileLock]]] = {}  # that descriptors show, by their table
        self._ranks: dict[object, int] = {}
        self._taken: set[int] = set()
        self._known: dict[int, _Known] = {}
        self._entries: dict[int, fdinfo_pb2.file_entry] = {}
        self._like: dict[object, list[tuple[Descriptor, int]]] = {}  # one descriptor of each description, by its look

    def __enter__(self) -> Self:
        self._proc_self = access.open_process(os.getpid())
        self._stack.callback(os.close, self._proc_self)
        self._collection.register = self.register
        self._collection.keep = self.keep
        self._collection.undo = self._undo
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if self._finished:
            self._files.replace_kept(self._kept)
        else:  # what the last pass kept stays
            for key, fd in self._kept.items():
                if self._files.kept(key) != fd:
                    os.close(fd)

    def tables(self, tables: Iterable[Table]) -> None:
        """Collect all descriptor tables of the tree: in one call, since descriptions are shared between them."""
        found: dict[object, list[_Member]] = {}
        order: list[tuple[int, Descriptor]] = []
        tables = list(tables)
        for table in tables:
            numbers = access.list_numbers(table.owner.proc, "fd")
            looks = descriptors.look_at(table.owner.proc, table.pidfd, numbers)
            for look in looks:
                if look.own >= 0:
                    self._stack.callback(os.close, look.own)
            for fd, look in zip(numbers, looks, strict=True):
                descriptor = self._examine(table, fd, look)
                if descriptor is not None:
                    found.setdefault(self._look(descriptor), []).append(((table.files_id, fd), descriptor))
                    order.append((table.files_id, descriptor))
        for appearance, members in found.items():
            for same in self._descriptions(members):
                file_id = self._files.claim_id((place for place, _ in same), self._taken, same[0][1].status)
                self._taken.add(file_id)
                for place, descriptor in same:
                    self._ids[place] = file_id
                    self._collection.numbers.setdefault(descriptor.fd, set()).add(file_id)
                self._like.setdefault(appearance, []).append((same[0][1], file_id))
                self._collection.descriptors[file_id] = same[0][1]
        for file_id, descriptor in list(self._collection.descriptors.items()):
            self._collect(descriptor, file_id)
        self._write_tables(tables, order)

    def locks(self, files_id: int) -> Iterator[tuple[int, FileLock]]:
        """The locks that the descriptors of a table show, each with the descriptor's number."""
        yield from self._locks.get(files_id, ())

    def register(self, own: int, owner: Owner, where: str) -> int:
        """The id of a description that we hold as `own` and that may stand in no table; `own` is closed later."""
        self._stack.callback(os.close, own)
        info = fdinfo.read(self._proc_self, own)
        status = os.fstat(own)
        link = _link(self._proc_self, own, status, info.flags)
        descriptor = Descriptor(owner, -1, own, link, replace(info, flags=info.flags & ~os.O_CLOEXEC), status, where)
        look = self._look(descriptor)
        for other, file_id in self._like.get(look, ()):
            if calls.compare_descriptions(own, other.own) == 0:
                return file_id
        return self._add(descriptor, look, ("register", look, where))

    def keep(self, key: object, opener: Callable[[], int]) -> int:
        """A descriptor that is kept from pass to pass: see `Collection.keep`."""
        if key not in self._kept:
            known = self._files.kept(key)
            self._kept[key] = opener() if known is None else known
        return self._kept[key]

    def _undo(self, act: Callable[[], None]) -> None:
        self._files.undo.callback(act)

    def file_at(self, owner: Owner, where: str, flags: int, what: str = "") -> int:
        """The id of the file that a link in the process's /proc directory leads to, as if opened with `flags`.

        `where` is "exe", "cwd", "root" or "map_files/FROM-TO"; `what` names it in blockers. 0 if it is blocked.
        """
        link = access.read_link(owner.proc, where)
        own = access.open_at(owner.proc, where, os.O_PATH)
        try:
            status, mount = os.fstat(own), mounted.number_at(own, owner, self._collection)
        except BaseException:
            os.close(own)
            raise
        key = ("path", link, mount, status.st_dev, status.st_ino, flags)
        if key in self._ids:
            os.close(own)
            return self._ids[key]
        self._stack.callback(os.close, own)
        info = fdinfo.FdInfo(pos=0, flags=flags, mnt_id=mount, ino=status.st_ino, raw="")
        descriptor = Descriptor(owner, -1, own, link, info, status, what or where)
        return self._add(descriptor, key, key)

    def again(self, file_ids: Iterable[int]) -> bool:
        """Files that `file_at` found in the last pass, where the links that led there are known to be the same.

        False, and nothing is done, if one of them has to be looked at again.
        """
        wanted = set(file_ids) - self._taken
        known = {file_id: self._files.known(file_id) for file_id in wanted}
        if not all(one and one.kind.steady(one.descriptor, self._collection) for one in known.values()):
            return False
        for file_id, one in known.items():
            assert one is not None
            self._ids.update(dict.fromkeys(self._files.places(file_id), file_id))
            self._taken.add(file_id)
            self._known[file_id], self._entries[file_id] = one, one.entry
        return True

    def fs(self, owner: Owner, umask: int) -> None:
        """Write the `fs` image of a process: working directory, root directory, umask."""
        entry = fs_pb2.fs_entry(cwd_id=self.file_at(owner, "cwd", 0, "the working directory"), umask=umask)
        entry.root_id = self.file_at(owner, "root", 0, "the root directory")
        self._collection.checkpoint.put("fs", owner.inner_pid, entry)

    def finish(self) -> None:
        """Let the kinds finish, write the `files` image, and remember what was found."""
        for kind in descriptor_kinds():
            kind.finish(self._collection)
        for file_id in sorted(self._entries):
            self._collection.checkpoint.put("files", None, self._entries[file_id])
        self._files.replace(self._ids, self._known, self._infos, self._ranks)
        self._finished = True

    def _add(self, descriptor: Descriptor, look: object, place: object) -> int:
        file_id = self._files.claim_id((place,), self._taken, descriptor.status)
        self._taken.add(file_id)
        self._ids[place] = file_id
        self._like.setdefault(look, []).append((descriptor, file_id))
        self._collection.descriptors[file_id] = descriptor
        return file_id if self._collect(descriptor, file_id) else 0

    def _examine(self, table: Table, fd: int, look: descriptors.Look) -> Descriptor | None:
        """One descriptor; None if a running process has closed it meanwhile."""
        try:
            if look.own < 0 and -look.own not in _GONE:
                raise EngineError(f"cannot duplicate fd {fd} of {table.owner}: {os.strerror(-look.own)}")
            if look.own < 0 or not look.text:
                raise GoneError(f"fd {fd} of {table.owner} is gone")
            status, info = os.fstat(look.own), self._info((table.files_id, fd), look.text)
            link = _link(table.owner.proc, fd, status, info.flags)
            return Descriptor(table.owner, fd, look.own, link, info, status)
        except GoneError:
            if self._collection.survey:
                return None
            raise

    def _look(self, descriptor: Descriptor) -> object:
        """What is equal for all descriptors of one description, and tells most of them apart. In a survey the tree may
        run meanwhile, and move its offsets."""
        status, info = descriptor.status, descriptor.info
        return (
            status.st_dev,
            status.st_ino,
            stat.S_IFMT(status.st_mode),
            info.flags & ~os.O_CLOEXEC,
            0 if self._collection.survey else info.pos,
            info.eventfd_id,
            descriptor.link,
        )

    def _info(self, place: tuple[int, int], text: str) -> fdinfo.FdInfo:
        known = self._files.info(place)
        info = known if known is not None and known.raw == text else fdinfo.parse(text)
        self._infos[place] = info
        if info.locks:
            self._locks.setdefault(place[0], []).extend((place[1], lock) for lock in info.locks)
        return info

    def _descriptions(self, members: list[_Member]) -> list[list[_Member]]:
        """Part descriptors that look alike into descriptions. Kcmp orders, so this is a sort; what was sorted in the
        last pass is sorted still."""
        if len(members) == 1:
            return [members]

        def compare(left: _Member, right: _Member) -> int:
            return calls.compare_descriptions(left[1].own, right[1].own)

        members.sort(key=lambda member: self._files.rank(member[0]))
        members.sort(key=functools.cmp_to_key(compare))
        parts = [[members[0]]]
        for member in members[1:]:
            if compare(parts[-1][0], member) == 0:
                parts[-1].append(member)
            else:
                parts.append([member])
        self._ranks.update((place, len(self._ranks) + index) for index, (place, _) in enumerate(members))
        return [sorted(part, key=lambda member: member[0]) for part in parts]

    def _collect(self, descriptor: Descriptor, file_id: int) -> bool:
        if file_id in self._entries:
            return True
        known = self._files.known(file_id)
        same = known is not None and _unchanged(known.descriptor, descriptor)
        if same and known is not None and known.signals is not None and known.signals == _signals(descriptor):
            self._entries[file_id] = known.entry
            self._known[file_id] = known
            return True
        kind = known.kind if same and known is not None else kind_of(descriptor)
        if kind is None:
            unsupported.block(descriptor, self._collection)
            return False
        signals = _signals(descriptor) if kind.steady(descriptor, self._collection) else None
        entry = kind.collect(descriptor, file_id, self._collection)
        self._entries[file_id] = entry
        self._known[file_id] = _Known(descriptor, kind, entry, signals)
        return True

    def _write_tables(self, tables: list[Table], order: list[tuple[int, Descriptor]]) -> None:
        for files_id, descriptor in order:
            entry = self._entries.get(self._ids[files_id, descriptor.fd])
            if entry is None:
                continue
            record = fdinfo_pb2.fdinfo_entry(
                id=entry.id,
                flags=_FD_CLOEXEC if descriptor.info.cloexec else 0,
                type=entry.type,
                fd=descriptor.fd,
            )
            self._collection.checkpoint.put("fdinfo", files_id, record)
        by_table: dict[int, list[tuple[int, Descriptor]]] = {table.files_id: [] for table in tables}
        for files_id, descriptor in order:
            by_table[files_id].append((self._ids[files_id, descriptor.fd], descriptor))
        for table in tables:
            file_locks.collect(table.files_id, table.owner, by_table[table.files_id], self._collection)


def _link(proc: int, fd: int, status: os.stat_result, flags: int) -> str:
    """The text of a descriptor's link, without asking where it is known beforehand. GoneError where it is of another
    file, which a running process has opened meanwhile."""
    if flags & os.O_PATH:
        return access.read_link(proc, f"fd/{fd}")
    if stat.S_ISSOCK(status.st_mode):
        return f"socket:[{status.st_ino}]"
    if stat.S_ISFIFO(status.st_mode) and status.st_dev == _pipefs():
        return f"pipe:[{status.st_ino}]"
    link = access.read_link(proc, f"fd/{fd}")
    if link.startswith(("socket:[", "pipe:[")):
        raise GoneError(f"fd {fd} is of another file now")
    return link


@functools.cache
def _pipefs() -> int:
    reader, writer = os.pipe()
    try:
        return os.fstat(reader).st_dev
    finally:
        os.close(reader)
        os.close(writer)


def _signals(descriptor: Descriptor) -> tuple[bytes, int]:
    return (b"", 0) if is_path(descriptor.own) else calls.signal_state(descriptor.own)


def _unchanged(before: Descriptor, now: Descriptor) -> bool:
    """Whether link, fdinfo, mode, inode, device, links, owner and size are the same."""
    return (
        before.link == now.link
        and (before.info is now.info or (before.info.raw == now.info.raw and before.info.flags == now.info.flags))
        and before.status[:7] == now.status[:7]
        and before.status.st_rdev == now.status.st_rdev
    )
