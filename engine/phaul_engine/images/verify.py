"""Whether the images of a checkpoint are complete and agree with each other.

`check` looks at what the records say and needs no directory; `verify` reads a directory and holds the files of pages
and the rounds before against it too. Both go on after a problem: an operator wants all of them at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from phaul_engine.errors import ImageError
from phaul_engine.images import demands
from phaul_engine.images.checkpoint import Checkpoint
from phaul_engine.images.directory import ImageDirectory, Location, chain, file_name, opened
from phaul_engine.images.kinds import Ident
from phaul_engine.images.pages import PAGE_SIZE, PageImages, parse_runs
from phaul_engine.images.pb import core_pb2, fdinfo_pb2, pstree_pb2, remap_file_path_pb2
from phaul_engine.images.vma import Status
from phaul_engine.numbering import TREE, Numbering

# Which member of a file_entry is set for its type.
MEMBERS: dict[int, str] = {
    fdinfo_pb2.REG: "reg",
    fdinfo_pb2.PIPE: "pipe",
    fdinfo_pb2.FIFO: "fifo",
    fdinfo_pb2.INETSK: "isk",
    fdinfo_pb2.UNIXSK: "usk",
    fdinfo_pb2.EVENTFD: "efd",
    fdinfo_pb2.EVENTPOLL: "epfd",
    fdinfo_pb2.INOTIFY: "ify",
    fdinfo_pb2.SIGNALFD: "sgfd",
    fdinfo_pb2.PACKETSK: "psk",
    fdinfo_pb2.TTY: "tty",
    fdinfo_pb2.FANOTIFY: "ffy",
    fdinfo_pb2.NETLINKSK: "nlsk",
    fdinfo_pb2.NS: "nsf",
    fdinfo_pb2.TUNF: "tunf",
    fdinfo_pb2.EXT: "ext",
    fdinfo_pb2.TIMERFD: "tfd",
    fdinfo_pb2.MEMFD: "memfd",
    fdinfo_pb2.BPFMAP: "bpf",
    fdinfo_pb2.PIDFD: "pidfd",
}

# Files that describe a namespace which is the tree's own, by the field of its id.
NAMESPACE_FILES = {
    "net_ns_id": "netns",
    "ipc_ns_id": "ipcns-var",
    "uts_ns_id": "utsns",
    "mnt_ns_id": "mountpoints",
    "user_ns_id": "userns",
}

_ALIVE, _DEAD, _STOPPED = 1, 2, 3
_TCP = 6
_TCP_WITH_PEER = {1, 2, 4, 5, 8, 9, 11}  # ESTABLISHED, SYN_SENT, FIN_WAIT1 and 2, CLOSE_WAIT, LAST_ACK, CLOSING
_UNIX_ESTABLISHED = 1
_STREAM_TYPES = {1, 5}  # SOCK_STREAM, SOCK_SEQPACKET
_GUARD, _MEMFD, _SEGMENT = int(Status.GUARD), int(Status.MEMFD), int(Status.SYSVIPC)  # flags of enum take microseconds
_FILE, _SHARED = int(Status.FILE_PRIVATE | Status.FILE_SHARED), int(Status.ANON_SHARED)


@dataclass(frozen=True)
class Problem:
    """Something wrong with an image: the file's name, and what."""

    file: str
    text: str

    def __str__(self) -> str:
        return f"{self.file}: {self.text}"


def check(checkpoint: Checkpoint, *, contents: bool = True) -> list[Problem]:
    """What is wrong with the records of a complete checkpoint (not of a round before the last). Without `contents`
    those may be missing that a migration sends otherwise, or later: pages, and what is in connections."""
    return _Check(checkpoint, contents).run()


def require(checkpoint: Checkpoint, before: Checkpoint | None = None) -> None:
    """ImageError unless a tree can be made from the images that a migration begins with. Of those that follow `before`,
    for which that was so, only records that are others are looked at by themselves."""
    problems = _Check(checkpoint, contents=False, before=before).run()
    if problems:
        more = f"\nand {len(problems) - 8} problems more" if len(problems) > 8 else ""
        raise ImageError("\n".join(map(str, problems[:8])) + more)


def verify(location: Location) -> list[Problem]:
    """What is wrong with a directory of images. Directories of earlier rounds, which hold pages only, are told by
    their lack of a process tree. `ImageError` if there is no such directory."""
    with opened(location) as directory:
        checkpoint, problems = _load(directory)
        if checkpoint.has("pstree"):
            problems += check(checkpoint)
        elif not checkpoint.has("inventory"):
            problems.append(Problem("inventory.img", "is missing: this is not a directory of images"))
        return problems + _verify_pages(directory, checkpoint)


def _load(directory: ImageDirectory) -> tuple[Checkpoint, list[Problem]]:
    checkpoint = Checkpoint()
    problems: list[Problem] = []
    for name in directory.names():
        try:
            checkpoint.load_file(directory, name)
        except ImageError as error:
            problems.append(Problem(name, str(error)))
    return checkpoint, problems


def _verify_pages(directory: ImageDirectory, checkpoint: Checkpoint) -> list[Problem]:
    """Every page is somewhere, every pages file is as long as its pagemap says and belongs to one pagemap."""
    problems: list[Problem] = []
    users: Counter[str] = Counter()
    with PageImages(directory) as images:
        for kind in ("pagemap", "pagemap-shmem"):
            for ident in checkpoint.idents(kind):
                name = file_name(kind, ident)
                try:
                    runs = parse_runs(checkpoint.records(kind, ident), name)
                    pages = file_name("pages", runs.pages_id)
                    users[pages] += 1
                    if (size := directory.size(pages)) != runs.present() * PAGE_SIZE:
                        problems.append(Problem(pages, f"has {size} bytes; {name} has {runs.present()} pages in it"))
                    images.extents(kind, ident)
                except ImageError as error:
                    problems.append(Problem(name, str(error)))
    problems += [Problem(name, f"belongs to {count} pagemaps") for name, count in users.items() if count > 1]
    with ExitStack() as levels:
        try:
            for level in chain(directory):  # which goes on from each: none may be closed before the end
                if level is not directory:
                    levels.callback(level.close)
        except ImageError as error:
            problems.append(Problem("parent", str(error)))
    return problems


class _Check:
    """One pass over a checkpoint."""

    def __init__(self, checkpoint: Checkpoint, contents: bool, before: Checkpoint | None = None) -> None:
        self.checkpoint = checkpoint
        self.before = before
        self.contents = contents
        self.problems: list[Problem] = []
        self.entries: dict[tuple[int, int], Any] = {
            (record.message.type, record.message.id): record.message for record in checkpoint.records("files")
        }
        self.ids = {number for _, number in self.entries}
        self.tables: dict[int, set[int]] = {}  # descriptors, by the pid that has them
        self.unix_inodes = {entry.usk.ino for entry in self.entries.values() if entry.HasField("usk")}
        self.memfd_inodes = {record.message.inode_id for record in checkpoint.records("memfd")}
        self.terminals = {record.message.id for record in checkpoint.records("tty-info")}
        self.segments = {
            record.message.desc.id
            for ident in checkpoint.idents("ipcns-shm")
            for record in checkpoint.records("ipcns-shm", ident)
        }
        self.cgroup_sets = {one.id for record in checkpoint.records("cgroup") for one in record.message.sets}
        self.tcp_closes = any(record.message.tcp_close for record in checkpoint.records("inventory"))

    def run(self) -> list[Problem]:
        """All checks; the problems."""
        self.inventory()
        self.demands()
        for process in self.tree():
            self.process(process)
        for (kind, number), entry in self.entries.items():
            self.entry(kind, number, entry)
        self.user_namespaces()
        self.numbers()
        self.queues()
        self.remaps()
        self.memfds()
        self.locks()
        return self.problems

    def wrong(self, kind: str, ident: Ident, text: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(file_name(kind, ident), text))

    def need(self, kind: str, ident: Ident, user: str) -> Any:
        """The message of a file that must be there and hold one record; None if it is not."""
        if not self.checkpoint.has(kind, ident):
            self.wrong(kind, ident, f"is missing; {user} refers to it")
            return None
        records = self.checkpoint.records(kind, ident)
        return records[0].message if records else None

    def demands(self) -> None:
        """No record asks for what cannot be, nor do all of them together."""
        for kind, ident, text in demands.wrong(self.checkpoint, self.before):
            self.wrong(kind, ident, text)
        watches = [max((one.wd for one in entry.ify.wd), default=0) for entry in self.entries.values()]
        if sum(watches) > demands.MAX_WATCHES:
            self.wrong("files", None, f"has inotify instances with {sum(watches)} watch numbers to be counted through")

    def inventory(self) -> None:
        """The inventory is there and of a version and layout that can be read."""
        inventory = self.need("inventory", None, "every checkpoint")
        if inventory is None:
            return
        if inventory.img_version not in (1, 2):
            self.wrong("inventory", None, f"is of version {inventory.img_version}; 1 and 2 are known")
        if not inventory.fdinfo_per_id or not inventory.ns_per_id:
            self.wrong("inventory", None, "is of a layout that has been out of use since CRIU 1.0")

    def tree(self) -> Iterable[Any]:
        """The processes, each after its parent."""
        processes = [record.message for record in self.checkpoint.records("pstree")]
        if not processes:
            self.wrong("pstree", None, "holds no process")
        generation = {0: 0}
        tids: Counter[int] = Counter()
        for index, process in enumerate(processes):
            threads = [tid for tid in process.threads if tid]  # CRIU lists thread 0 of one that has ended
            if threads[:1] != [process.pid] and (threads or not self.has_ended(process.pid)):
                self.wrong("pstree", None, f"process {process.pid} is not its own first thread")
            if process.ppid == 0 and index:
                self.wrong("pstree", None, f"process {process.pid} is a second root")
            if process.ppid not in generation:
                self.wrong("pstree", None, f"process {process.pid} stands before its parent {process.ppid}")
            generation[process.pid] = generation.get(process.ppid, 0) + 1
            tids.update(threads)
        if max(generation.values()) > demands.MAX_DEPTH or len(tids) > demands.MAX_THREADS:
            self.wrong("pstree", None, f"has {max(generation.values())} generations and {len(tids)} threads")
        for tid, count in tids.items():
            if count > 1:
                self.wrong("pstree", None, f"thread {tid} is listed {count} times")
        return processes

    def has_ended(self, pid: int) -> bool:
        """Whether a process was a zombie."""
        return self.checkpoint.has("core", pid) and self.checkpoint.one("core", pid).tc.task_state == _DEAD

    def process(self, process: pstree_pb2.pstree_entry) -> None:
        """What a process refers to."""
        pid = process.pid
        leader = self.core(pid, leader=True)
        if leader is None or leader.tc.task_state not in (_ALIVE, _STOPPED):
            return
        for tid in process.threads:
            if tid != pid:
                self.core(tid, leader=False)
        ids = leader.ids if leader.HasField("ids") else self.need("ids", pid, f"process {pid}")
        if ids is not None:
            self.descriptors(pid, ids.files_id)
            self.namespaces(pid, ids)
        fs = self.need("fs", pid, f"process {pid}")
        if fs is not None:
            for number in (fs.cwd_id, fs.root_id):
                self.refers("fs", pid, number, fdinfo_pb2.REG)
        mm = self.need("mm", pid, f"process {pid}")
        if mm is not None:
            self.memory(pid, mm)

    def core(self, tid: int, *, leader: bool) -> Any:
        """The state of a thread."""
        core = self.need("core", tid, "pstree.img")
        if core is None:
            return None
        if core.mtype != core_pb2.core_entry.X86_64:
            self.wrong("core", tid, f"is of machine type {core.mtype}, not x86-64")
        if core.HasField("tc") != leader or (not leader and core.HasField("ids")):
            self.wrong("core", tid, "a leader and only a leader has the process's state")
            return None
        alive = not leader or core.tc.task_state in (_ALIVE, _STOPPED)
        if alive and not (core.HasField("thread_info") and core.HasField("thread_core")):
            self.wrong("core", tid, "lacks the registers or state of the thread")
        self.thread(tid, core.thread_core)
        return core

    def thread(self, tid: int, thread: Any) -> None:
        """The seccomp filter and the cgroup set of a thread exist."""
        if thread.HasField("seccomp_filter"):
            seccomp = self.need("seccomp", None, file_name("core", tid))
            count = len(seccomp.seccomp_filters) if seccomp is not None else 0
            if thread.seccomp_filter >= count:
                self.wrong("core", tid, f"refers to seccomp filter {thread.seccomp_filter} of {count}")
        if thread.HasField("cg_set") and self.checkpoint.has("cgroup") and thread.cg_set not in self.cgroup_sets:
            self.wrong("core", tid, f"refers to cgroup set {thread.cg_set}, which is not in cgroup.img")

    def refers(self, kind: str, ident: Ident, number: int, *types: int) -> None:
        """A file id stands for a description of one of the types."""
        if not any((one, number) in self.entries for one in types):
            words = " or ".join(fdinfo_pb2.fd_types.Name(one) for one in types)
            self.wrong(kind, ident, f"refers to file {number}, and files.img has no {words} of that id")

    def descriptors(self, pid: int, table: int) -> None:
        """The descriptor table of a process; one that is empty has no file."""
        self.tables[pid] = set()
        for record in self.checkpoint.records("fdinfo", table):
            self.tables[pid].add(record.message.fd)
            if (record.message.type, record.message.id) not in self.entries:
                self.refers("fdinfo", table, record.message.id, record.message.type)
            if record.message.flags & ~1:
                self.wrong("fdinfo", table, f"descriptor {record.message.fd} has flags {record.message.flags:#x}")

    def namespaces(self, pid: int, ids: Any) -> None:
        """A namespace that is the tree's own is described."""
        inventory = self.checkpoint.records("inventory")
        if not inventory or not inventory[0].message.HasField("root_ids"):
            return
        outside = inventory[0].message.root_ids
        for field, kind in NAMESPACE_FILES.items():
            number = getattr(ids, field)
            if ids.HasField(field) and number != getattr(outside, field) and not self.checkpoint.has(kind, number):
                self.wrong(kind, number, f"is missing; process {pid} is in that namespace")

    def user_namespaces(self) -> None:
        """One is the tree's own, at most, and above all others; and what threads below are outside of them is told."""
        found = {ident: self.checkpoint.records("userns", ident) for ident in self.checkpoint.idents("userns")}
        entries = {ident: records[0].message for ident, records in found.items() if records}
        above = {ident: entry.phaul_parent for ident, entry in entries.items() if entry.HasField("phaul_parent")}
        for ident in entries.keys() - above.keys():
            if len(entries) - len(above) > 1:
                self.wrong("userns", ident, "is a second one that is below no other")
        for ident in above:
            passed, one = {ident}, above[ident]
            while one in above and one not in passed:
                passed.add(one)
                one = above[one]
            if one in passed:
                self.wrong("userns", ident, "is below itself")
        for record in self.checkpoint.records("pstree") if above else ():
            pid = record.message.pid
            if self.checkpoint.has("ids", pid) and self.checkpoint.one("ids", pid).user_ns_id in above:
                for tid in record.message.threads:
                    self.outer_ids(tid)

    def numbers(self) -> None:
        """What tasks are called in pid namespaces below the tree's, and who refers to such a namespace."""
        try:
            numbering = Numbering(self.checkpoint)
        except ImageError as error:
            self.wrong("pstree", None, str(error))
            return
        processes = [record.message for record in self.checkpoint.records("pstree")]
        spaces = {TREE}
        for pid in (process.pid for process in processes if self.checkpoint.has("ids", process.pid)):
            space = numbering.name(pid).space
            spaces.add(space)
            if space not in (TREE, self.checkpoint.one("ids", pid).pid_ns_id):
                self.wrong("ids", pid, f"does not say that it is in pid namespace {space}, as pstree.img does")
        for process in processes:
            if process.phaul_children_pid_ns not in spaces:
                self.wrong("pstree", None, f"has process {process.pid} with children in a pid namespace of nobody")
        for ident in self.checkpoint.idents("mountpoints"):
            for record in self.checkpoint.records("mountpoints", ident):
                if record.message.phaul_pid_ns not in spaces:
                    self.wrong("mountpoints", ident, "has a mount that shows a pid namespace of nobody")

    def outer_ids(self, tid: int) -> None:
        """What a thread is outside of its user namespace."""
        creds = self.checkpoint.one("core", tid).thread_core.creds if self.checkpoint.has("core", tid) else None
        if creds is None or (len(creds.phaul_outer_uids), len(creds.phaul_outer_gids)) != (4, 4):
            self.wrong("core", tid, "does not tell users and groups of a thread in a user namespace below the tree's")

    def memory(self, pid: int, mm: Any) -> None:
        """The areas of a process are in order, what they map exists, and all pages lie within them."""
        self.refers("mm", pid, mm.exe_file_id, fdinfo_pb2.REG)
        for area in mm.vmas:
            if area.status & _GUARD:  # behind all others, each within one of those
                continue
            if area.status & _MEMFD:
                self.refers("mm", pid, area.shmid, fdinfo_pb2.MEMFD)
            elif area.status & _FILE:
                self.refers("mm", pid, area.shmid, fdinfo_pb2.REG)
            elif area.status & _SEGMENT:
                if area.shmid not in self.segments:
                    self.wrong("mm", pid, f"maps System V shared memory {area.shmid}, which is not in ipcns-shm.img")
            elif area.status & _SHARED and self.contents:
                self.need("pagemap-shmem", area.shmid, f"the area {area.start:#x} of process {pid}")
        if self.contents and self.need("pagemap", pid, f"process {pid}") is not None:
            self.pages_in_areas(pid, mm)

    def pages_in_areas(self, pid: int, mm: Any) -> None:
        """No run of pages begins or ends outside of the areas."""
        try:
            runs = parse_runs(self.checkpoint.records("pagemap", pid), file_name("pagemap", pid))
        except ImageError:
            return  # what is wrong with it is told where the pages are verified
        areas = _united((area.start, area.end) for area in mm.vmas)
        index = 0
        for vaddr, pages in zip(runs.vaddr, runs.pages, strict=True):
            while index < len(areas) and areas[index][1] <= vaddr:
                index += 1
            if index == len(areas) or vaddr < areas[index][0] or vaddr + pages * PAGE_SIZE > areas[index][1]:
                self.wrong("pagemap", pid, f"{pages} pages at {vaddr:#x} are not within the areas of mm-{pid}.img")

    def entry(self, kind: int, number: int, entry: Any) -> None:
        """One description."""
        member = MEMBERS.get(kind)
        found = {name for name in MEMBERS.values() if entry.HasField(name)}
        if member is None or found != {member}:
            self.wrong(
                "files", None, f"entry {number} is of type {kind} and has {', '.join(sorted(found)) or 'nothing'}"
            )
            return
        detail = getattr(entry, member)
        if detail.id != number:
            self.wrong("files", None, f"entry {number} holds the id {detail.id}")
        if kind == fdinfo_pb2.FIFO:
            self.refers("files", None, detail.regf_id if detail.HasField("regf_id") else number, fdinfo_pb2.REG)
        elif kind == fdinfo_pb2.MEMFD and detail.inode_id not in self.memfd_inodes:
            self.wrong("files", None, f"memfd {number} refers to inode {detail.inode_id}, which is not in memfd.img")
        elif kind == fdinfo_pb2.TTY and detail.tty_info_id not in self.terminals:
            self.wrong("files", None, f"terminal {number} refers to {detail.tty_info_id}, which is not in tty-info.img")
        elif kind == fdinfo_pb2.INETSK:
            self.connection(detail)
        elif kind == fdinfo_pb2.UNIXSK:
            self.unix_peer(detail)

    def connection(self, socket: Any) -> None:
        """A TCP connection has its stream."""
        if self.contents and socket.proto == _TCP and socket.state in _TCP_WITH_PEER and not self.tcp_closes:
            self.need("tcp-stream", socket.ino, f"socket {socket.id}")

    def unix_peer(self, socket: Any) -> None:
        """A connected pair is whole, unless it is marked as leading out of the tree."""
        if socket.phaul_waits_at and socket.phaul_waits_at not in self.unix_inodes:
            self.wrong("files", None, f"unix socket {socket.id} waits at a listener that is not in the checkpoint")
        connected = socket.type in _STREAM_TYPES and socket.state == _UNIX_ESTABLISHED and socket.peer
        if connected and not socket.uflags and socket.peer not in self.unix_inodes:
            self.wrong("files", None, f"the peer of unix socket {socket.id} is not in the checkpoint")

    def queues(self) -> None:
        """Queued data belongs to something, and descriptors in flight are described."""
        pipes = {e.pipe.pipe_id for e in self.entries.values() if e.HasField("pipe")}
        fifos = {e.fifo.pipe_id for e in self.entries.values() if e.HasField("fifo")}
        for kind, known in (("pipes-data", pipes), ("fifo-data", fifos)):
            for record in self.checkpoint.records(kind):
                if record.message.pipe_id not in known:
                    self.wrong(kind, None, f"has data of pipe {record.message.pipe_id}, which nobody has open")
        for record in self.checkpoint.records("sk-queues"):
            if record.message.id_for not in self.ids:
                self.wrong("sk-queues", None, f"has data of socket {record.message.id_for}, which nobody has open")
            for number in (right for scm in record.message.scm for right in scm.rights):
                if number not in self.ids:
                    self.wrong("sk-queues", None, f"carries file {number}, which is not in files.img")

    def remaps(self) -> None:
        """What stands in for a file without a name exists, one for each."""
        found: Counter[int] = Counter()
        for record in self.checkpoint.records("remap-fpath"):
            remap = record.message
            found[remap.orig_id] += 1
            if found[remap.orig_id] > 1:
                self.wrong("remap-fpath", None, f"has file {remap.orig_id} more than once")
            self.refers("remap-fpath", None, remap.orig_id, fdinfo_pb2.REG)
            if remap.remap_type == remap_file_path_pb2.GHOST:
                self.need("ghost-file", remap.remap_id, f"file {remap.orig_id}")
            elif remap.remap_type == remap_file_path_pb2.LINKED:
                self.refers("remap-fpath", None, remap.remap_id, fdinfo_pb2.REG)

    def memfds(self) -> None:
        """The contents of memory files are there."""
        for record in self.checkpoint.records("memfd") if self.contents else ():
            self.need("pagemap-shmem", record.message.shmid, f"memfd inode {record.message.inode_id}")

    def locks(self) -> None:
        """A file lock is held through a descriptor that is there."""
        for record in self.checkpoint.records("filelocks"):
            lock = record.message
            if lock.fd not in self.tables.get(lock.pid, ()):
                self.wrong(
                    "filelocks", None, f"has a lock of descriptor {lock.fd} of process {lock.pid}, which is not there"
                )


def _united(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those that touch made one."""
    united: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if united and start <= united[-1][1]:
            united[-1] = (united[-1][0], max(end, united[-1][1]))
        else:
            united.append((start, end))
    return united
