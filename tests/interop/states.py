"""Programs that each set up some state and judge themselves when they are told to: `check` runs on SIGUSR1.

What both CRIU 4.2 and phaul carry is in them, and nothing that CRIU does not.
"""

from __future__ import annotations

from dataclasses import dataclass

HEAD = """
import ctypes, fcntl, mmap, os, resource, select, signal, socket, struct, sys, threading, time, traceback
work = sys.argv[1]
libc = ctypes.CDLL(None, use_errno=True)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
def ok(result):
    assert result >= 0, os.strerror(ctypes.get_errno())
    return result
def same(seen, expected):
    assert seen == expected, f"{seen!r} is not {expected!r}"
out = os.open(work + "/out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def tell(word):
    os.write(out, word.encode() + b"\\n")
"""
TAIL = """
tell("ready")
signal.sigwait([signal.SIGUSR1])
try:
    check()
    tell("well")
except BaseException:
    tell(traceback.format_exc())
os._exit(0)
"""


@dataclass(frozen=True)
class State:
    """`program` stands between HEAD and TAIL. `criu` are options that CRIU's dump and restore need for it."""

    program: str
    criu: tuple[str, ...] = ()


_THREADS = """
local, answers, slept, go, begun = threading.local(), {}, [], threading.Event(), []
def worker(number):
    local.value = number
    libc.prctl(15, b"worker%d" % number, 0, 0, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN + number])
    begun.append(number)
    go.wait()
    mask = sorted(signal.pthread_sigmask(signal.SIG_BLOCK, []))
    answers[number] = local.value, open("/proc/thread-self/comm").read(), threading.get_native_id(), mask
def sleeper(sleep):
    start = time.monotonic()
    begun.append(sleep)
    sleep()
    slept.append(time.monotonic() - start)
SLEEPS = (lambda: time.sleep(3), lambda: select.poll().poll(3000), lambda: select.epoll().poll(3),
          lambda: select.select([], [], [], 3), lambda: threading.Event().wait(3))
workers = [threading.Thread(target=worker, args=(number,)) for number in range(3)]
workers += [threading.Thread(target=sleeper, args=(sleep,)) for sleep in SLEEPS]
for one in workers:
    one.start()
while len(begun) < len(workers):
    time.sleep(0.01)
expected = {n: (n, f"worker{n}\\n", workers[n].native_id, [signal.SIGUSR1, signal.SIGRTMIN + n]) for n in range(3)}
def check():
    go.set()
    for one in workers:
        one.join()
    same(answers, expected)
    assert len(slept) == len(SLEEPS) and min(slept) > 2.99, slept
"""

_SIGNALS = """
heard, RT = [], signal.SIGRTMIN + 2
signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
signal.signal(signal.SIGHUP, signal.SIG_IGN)
pending = {signal.SIGTERM, signal.SIGALRM, RT}
signal.pthread_sigmask(signal.SIG_BLOCK, pending)
room = ctypes.create_string_buffer(1 << 15)
stack = struct.pack("<QI4xQ", ctypes.addressof(room), 0, 1 << 15)
ok(libc.syscall(131, stack, None))
for value in (5, 4, 6):
    ok(libc.sigqueue(os.getpid(), RT, ctypes.c_void_p(value)))
os.kill(os.getpid(), signal.SIGTERM)
signal.pthread_kill(threading.get_ident(), signal.SIGALRM)
def actions():
    found = []
    for number in (1, 2, 10, 12, 13, 17, 34, 40):
        action = ctypes.create_string_buffer(32)
        ok(libc.syscall(13, number, None, action, 8))
        found.append(action.raw.hex())
    return found
before = actions()
def take():
    info = ctypes.create_string_buffer(128)
    mask = struct.pack("<Q", sum(1 << number - 1 for number in pending))
    number = libc.syscall(128, mask, info, struct.pack("<QQ", 0, 0), 8)
    return number, struct.unpack_from("<i", info.raw, 8)[0], struct.unpack_from("<Q", info.raw, 24)[0]
def check():
    now = ctypes.create_string_buffer(24)
    ok(libc.syscall(131, None, now))
    same(now.raw, stack)
    same(actions(), before)
    same(set(signal.sigpending()), pending)
    taken = [take() for _ in range(5)]
    same({one[0] for one in taken[:2]}, {signal.SIGTERM, signal.SIGALRM})
    same(taken[2:], [(RT, -1, 5), (RT, -1, 4), (RT, -1, 6)])
    same(signal.sigpending(), set())
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGUSR2)
    time.sleep(0.01)
    same(heard, [signal.SIGUSR2])
"""

_TIMERS = """
def timer(clock, notify, signo, value, period):
    made = ctypes.c_int(-1)
    ok(libc.syscall(222, clock, struct.pack("<Qiii44x", 77, signo, notify, 0), ctypes.byref(made)))
    ok(libc.syscall(223, made, 0, struct.pack("<4q", period, 0, value, 0), None))
    return made.value
def left(number):
    room = ctypes.create_string_buffer(32)
    ok(libc.syscall(224, number, room))
    isec, _, vsec, _ = struct.unpack("<4q", room.raw)
    return isec, vsec
ok(libc.syscall(226, timer(1, 1, 0, 1, 0)))
posix = [timer(1, 0, signal.SIGRTMIN + 3, 1000, 5), timer(0, 0, signal.SIGRTMIN + 4, 2000, 0), timer(1, 1, 0, 0, 0)]
signal.setitimer(signal.ITIMER_REAL, 1000, 4)
signal.setitimer(signal.ITIMER_VIRTUAL, 1000, 3)
signal.setitimer(signal.ITIMER_PROF, 2000, 0)
running, expired = libc.timerfd_create(1, 0), libc.timerfd_create(0, os.O_NONBLOCK)
ok(libc.timerfd_settime(running, 0, struct.pack("<4q", 7, 0, 500, 0), None))
ok(libc.timerfd_settime(expired, 0, struct.pack("<4q", 0, 0, 0, 1), None))
listing = [line for line in open("/proc/self/timers") if not line.startswith("signal")]
def within(seen, period, value):
    assert seen[0] == period and value - 200 < seen[1] <= value, (seen, period, value)
def check():
    same([line for line in open("/proc/self/timers") if not line.startswith("signal")], listing)
    within(left(posix[0]), 5, 1000)
    within(left(posix[1]), 0, 2000)
    same(left(posix[2]), (0, 0))
    for which, value, period in ((0, 1000, 4), (1, 1000, 3), (2, 2000, 0)):
        now, again = signal.getitimer(which)
        within((again, now), period, value + 1)
    room = ctypes.create_string_buffer(32)
    ok(libc.timerfd_gettime(running, room))
    isec, _, vsec, _ = struct.unpack("<4q", room.raw)
    within((isec, vsec), 7, 500)
    same(os.read(expired, 8), struct.pack("<Q", 1))
"""

_PIPES = """
reader, writer = os.pipe()
fcntl.fcntl(writer, 1031, 1 << 17)
os.write(writer, b"piped" * 20000)
early, late = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
os.write(late, b"end"); os.close(late)
os.mkfifo(work + "/fifo")
taking = os.open(work + "/fifo", os.O_RDONLY | os.O_NONBLOCK)
into = os.open(work + "/fifo", os.O_WRONLY)
os.write(into, b"first in")
def check():
    same(fcntl.fcntl(writer, 1032), 1 << 17)
    got = b""
    while len(got) < 100000:
        got += os.read(reader, 1 << 17)
    same(got, b"piped" * 20000)
    os.write(writer, b"more")
    same(os.read(reader, 10), b"more")
    same((os.read(early, 10), os.read(early, 10)), (b"end", b""))
    assert fcntl.fcntl(early, fcntl.F_GETFL) & os.O_NONBLOCK and fcntl.fcntl(early, fcntl.F_GETFD) == 1
    same(os.read(taking, 100), b"first in")
    again = os.open(work + "/fifo", os.O_WRONLY)
    os.write(again, b"next in")
    same(os.read(taking, 100), b"next in")
"""

_EVENTS = """
import select
reader, writer = os.pipe()
count = os.eventfd(3, os.EFD_NONBLOCK)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
heard = libc.signalfd(-1, struct.pack("<Q", 1 << signal.SIGUSR2 - 1), os.O_NONBLOCK)
os.kill(os.getpid(), signal.SIGUSR2)
inner, outer = select.epoll(), select.epoll()
inner.register(count, select.EPOLLIN)
inner.register(reader, select.EPOLLIN | select.EPOLLET)
outer.register(inner.fileno(), select.EPOLLIN)
outer.register(heard, select.EPOLLIN)
watcher = ok(libc.inotify_init1(os.O_NONBLOCK))
os.mkdir(work + "/watched"); open(work + "/file", "w").close()
watches = [ok(libc.inotify_add_watch(watcher, (work + name).encode(), mask)) for name, mask in
           (("/watched", 0x100), ("/file", 0x2))]
def check():
    same(sorted(fd for fd, _ in outer.poll(0)), sorted([inner.fileno(), heard]))
    same([fd for fd, _ in inner.poll(0)], [count])
    same(os.eventfd_read(count), 3)
    same(struct.unpack_from("<I", os.read(heard, 128))[0], signal.SIGUSR2)
    same(outer.poll(0), [])
    os.write(writer, b"x")
    same([fd for fd, _ in inner.poll(0)], [reader])
    same([fd for fd, _ in inner.poll(0)], [])
    open(work + "/watched/new", "w").close()
    open(work + "/file", "w").write("x")
    told, events = os.read(watcher, 1000), []
    while told:
        wd, mask, _, length = struct.unpack_from("<iIII", told)
        events.append((wd, mask, told[16:16 + length].rstrip(b"\\0")))
        told = told[16 + length:]
    same(events[:1], [(watches[0], 0x100, b"new")])
    same({one for one in events[1:]}, {(watches[1], 0x2, b"")})
"""

_UNIX = """
KINDS = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET
pairs = [socket.socketpair(socket.AF_UNIX, kind) for kind in KINDS]
for left, right in pairs:
    left.send(b"queued")
    left.send(b"again")
    right.send(b"back")
keep = os.open(work + "/passed", os.O_RDWR | os.O_CREAT)
os.write(keep, b"passed")
carrier, taker = socket.socketpair()
socket.send_fds(carrier, [b"take"], [keep])
listener = socket.socket(socket.AF_UNIX)
listener.bind(work + "/sock"); listener.listen(5)
client = socket.socket(socket.AF_UNIX); client.connect(work + "/sock")
server, _ = listener.accept()
client.send(b"to the server"); server.send(b"to the client")
half, other = socket.socketpair(); half.send(b"last"); half.shutdown(socket.SHUT_WR)
named = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); named.bind(work + "/box")
sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); sender.connect(work + "/box"); sender.send(b"letter")
def check():
    for left, right in pairs:
        got = right.recv(100) if left.type == socket.SOCK_STREAM else right.recv(100) + right.recv(100)
        same(got, b"queuedagain")
        same(left.recv(100), b"back")
    content, (fd,), _, _ = socket.recv_fds(taker, 100, 1)
    same((content, os.pread(fd, 100, 0)), (b"take", b"passed"))
    same(os.lseek(fd, 0, os.SEEK_CUR), 6)
    os.lseek(keep, 2, os.SEEK_SET)
    same(os.lseek(fd, 0, os.SEEK_CUR), 2)
    same((server.recv(100), client.recv(100)), (b"to the server", b"to the client"))
    late = socket.socket(socket.AF_UNIX); late.connect(work + "/sock")
    accepted, _ = listener.accept()
    late.send(b"late"); same(accepted.recv(10), b"late")
    same((other.recv(100), other.recv(100)), (b"last", b""))
    other.send(b"still"); same(half.recv(100), b"still")
    same(named.recv(100), b"letter")
    sender.send(b"another"); same(named.recv(100), b"another")
"""

_INET = """
ends, queues = [], []
for host in ("127.0.0.1", "::1"):
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    client = socket.create_connection(listener.getsockname()[:2])
    server, _ = listener.accept()
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    client.sendall(b"asked" * 5000)
    server.sendall(b"answered" * 1000)
    ends.append((listener, client, server))
    queues.append((client.getsockname(), server.getsockname()))
box = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); box.bind(("127.0.0.1", 0))
sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); sender.connect(box.getsockname())
sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
port = box.getsockname()
def take(sock, length):
    got = b""
    while len(got) < length:
        got += sock.recv(length - len(got))
    return got
def check():
    for (listener, client, server), names in zip(ends, queues):
        same((client.getsockname(), server.getsockname()), names)
        same(take(server, 25000), b"asked" * 5000)
        same(take(client, 8000), b"answered" * 1000)
        assert client.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1
        assert server.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        server.sendall(b"more"); same(take(client, 4), b"more")
        late = socket.create_connection(listener.getsockname()[:2])
        accepted, _ = listener.accept()
        late.sendall(b"late"); same(take(accepted, 4), b"late")
        client.close(); same(server.recv(1), b"")
    same(box.getsockname(), port)
    sender.send(b"datagram"); same(box.recv(100), b"datagram")
    same(sender.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST), 1)
"""

_FILES = """
log = os.open(work + "/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.write(log, b"before ")
plain = os.open(work + "/plain", os.O_RDWR | os.O_CREAT)
os.write(plain, b"0123456789"); os.lseek(plain, 4, os.SEEK_SET)
twin = os.dup(plain); os.set_inheritable(plain, True)
ghost = os.open(work + "/ghost", os.O_RDWR | os.O_CREAT); os.write(ghost, b"unlinked" * 1000)
map = mmap.mmap(ghost, 4096); os.unlink(work + "/ghost")
place = os.open(work, os.O_PATH); directory = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
null = os.open("/dev/null", os.O_RDWR)
os.mkdir(work + "/home"); os.chdir(work + "/home")
locked = [os.open(work + f"/lock{n}", os.O_RDWR | os.O_CREAT) for n in range(2)]
fcntl.flock(locked[0], fcntl.LOCK_EX)
fcntl.lockf(locked[1], fcntl.LOCK_EX, 10, 5)
def locks(fd):
    return [line.split(":", 2)[2].split()[:3] for line in open(f"/proc/self/fdinfo/{fd}") if line.startswith("lock:")]
held = [locks(fd) for fd in locked]
assert all(held), held
def check():
    os.write(log, b"after")
    same(open(work + "/log", "rb").read(), b"before after")
    same(os.read(plain, 3), b"456")
    same(os.lseek(twin, 0, os.SEEK_CUR), 7)
    same((fcntl.fcntl(plain, fcntl.F_GETFD), fcntl.fcntl(twin, fcntl.F_GETFD)), (0, 1))
    same(os.pread(ghost, 8000, 0), b"unlinked" * 1000)
    same(os.fstat(ghost).st_nlink, 0)
    map[:4] = b"UNLI"
    same(os.pread(ghost, 8, 0), b"UNLInked")
    same((os.readlink(f"/proc/self/fd/{place}"), os.listdir(directory)), (work, os.listdir("/")))
    assert fcntl.fcntl(place, fcntl.F_GETFL) & os.O_PATH
    same(os.write(null, b"x"), 1)
    same(os.getcwd(), work + "/home")
    same([locks(fd) for fd in locked], held)
"""

_MEMORY = """
def put(area, text):
    area[:len(text)] = text
file = os.open(work + "/data", os.O_RDWR | os.O_CREAT); os.write(file, b"file" * 4096)
code = os.open(sys.executable, os.O_RDONLY)
own = mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); put(own, b"own")
between = mmap.mmap(-1, 1 << 16); put(between, b"shared")
changed = mmap.mmap(file, 1 << 14, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE); put(changed, b"changed")
through = mmap.mmap(file, 1 << 14, mmap.MAP_SHARED)
hole = mmap.mmap(-1, 1 << 24, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); hole[1 << 23] = 7
memory = os.memfd_create("memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING); os.write(memory, b"memory" * 1000)
view = mmap.mmap(memory, 6000); fcntl.fcntl(memory, 1033, 0x2 | 0x4)
advised = mmap.mmap(-1, 1 << 16, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
advised.madvise(mmap.MADV_DONTFORK); advised.madvise(mmap.MADV_DONTDUMP); advised.madvise(mmap.MADV_SEQUENTIAL)
os.close(code)
child, (ask, answer) = None, socket.socketpair()
child = os.fork()
if child == 0:
    while ask.recv(1):
        put(between, b"child!"); answer_back = bytes(between[:6]); ask.send(answer_back)
    os._exit(0)
ask.close()
def areas():
    found, name = [], ""
    for line in open("/proc/self/smaps"):
        if line.startswith("VmFlags:"):
            found.append((name, sorted(set(line.split()[1:]) - {"sd", "wp", "uw", "um"})))
        elif "-" in line.split()[0]:
            name = line.split()[0:2]
    return found
seen = {(str(place), tuple(flags)) for place, flags in areas()}
def check():
    same((own[:3], own[3], between[:6], changed[:7], through[:4], hole[1 << 23], hole[5]),
         (b"own", 0, b"shared", b"changed", b"file", 7, 0))
    answer.send(b"x"); same(answer.recv(10), b"child!"); same(between[:6], b"child!")
    put(through, b"FILE"); same(os.pread(file, 4, 0), b"FILE")
    same(os.pread(memory, 6000, 0), b"memory" * 1000)
    same(fcntl.fcntl(memory, 1034), 0x6)
    put(view, b"MEMORY"); same(os.pread(memory, 6, 0), b"MEMORY")
    now = {(str(place), tuple(flags)) for place, flags in areas()}
    wanted = {one for one in seen if "dc" in one[1] or "sr" in one[1]}
    assert wanted and wanted <= now, wanted - now
    os.kill(child, 9); os.waitpid(child, 0)
"""

_TREE = """
libc.prctl(36, 1, 0, 0, 0)
shared = os.open(work + "/shared", os.O_RDWR | os.O_CREAT); os.write(shared, b"0123456789")
born, told = os.pipe()
def child(*acts):
    pid = os.fork()
    if pid == 0:
        for act in acts:
            act()
        os.write(told, struct.pack("<i", os.getpid()))
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
        signal.sigwait([signal.SIGUSR2])
        os.lseek(shared, 3, os.SEEK_SET)
        os._exit(5)
    return pid
first = child(os.setsid, lambda: child(lambda: os.setpgid(0, 0)))
second = child(lambda: os.setpgid(0, 0), lambda: child())
pids = [struct.unpack("<i", os.read(born, 4))[0] for _ in range(4)]
dead = {}
for how in (7, -9):
    pid = os.fork()
    if pid == 0:
        os._exit(how) if how > 0 else os.kill(os.getpid(), -how)
    dead[pid] = how << 8 if how > 0 else -how
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
def look():
    return [open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1:4] for pid in (*pids, *dead, os.getpid())]
seen = [one if number < len(pids) + len(dead) else one[1:] for number, one in enumerate(look())]
def check():
    same([one if number < len(pids) + len(dead) else one[1:] for number, one in enumerate(look())], seen)
    for pid, status in dead.items():
        same(os.waitpid(pid, 0), (pid, status))
    os.kill(second, signal.SIGUSR2)
    same(os.waitpid(second, 0), (second, 5 << 8))
    same(os.lseek(shared, 0, os.SEEK_CUR), 3)
    for pid in pids:
        if pid != second:
            os.kill(pid, 9)
"""

_ATTRIBUTES = """
libc.prctl(15, b"renamed", 0, 0, 0); libc.prctl(36, 1, 0, 0, 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 400)); resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
os.umask(0o027); os.nice(3); open("/proc/self/oom_score_adj", "w").write("300")
libc.prctl(8, 1, 0, 0, 0)
os.setgroups([3001, 3002, 3003]); os.setresgid(2001, 2002, 2003); os.setresuid(1001, 1002, 1003)
caps = (1 << 10, 1 << 10 | 1 << 13, 1 << 10)
ok(libc.syscall(126, struct.pack("<Ii", 0x20080522, 0), struct.pack("<6I", *caps, 0, 0, 0)))
ok(libc.prctl(38, 1, 0, 0, 0))
KEPT = ("Name", "Umask", "Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Seccomp:")
def look():
    lines = [line for line in open("/proc/self/status") if line.startswith(KEPT)]
    limits = [resource.getrlimit(n) for n in range(16)]
    room = ctypes.c_int(); libc.prctl(37, ctypes.byref(room), 0, 0, 0)
    return lines, limits, os.getpriority(os.PRIO_PROCESS, 0), libc.prctl(27, 0, 0, 0, 0), room.value
filters = [(0x20, 0, 0, 0), (0x15, 0, 1, 110), (0x06, 0, 0, 0x50000 | 123), (0x06, 0, 0, 0x7fff0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *one) for one in filters))
ok(libc.syscall(317, 1, 0, struct.pack("<HxxxxxxQ", 4, ctypes.addressof(code))))
seen = look()
def check():
    same(look(), seen)
    same((libc.syscall(110), ctypes.get_errno()), (-1, 123))
"""

STATES = {
    "threads": State(_THREADS),
    "signals": State(_SIGNALS),
    "timers": State(_TIMERS),
    "pipes": State(_PIPES),
    "events": State(_EVENTS),
    "unix": State(_UNIX),
    "inet": State(_INET, ("--tcp-established",)),
    "files": State(_FILES, ("--file-locks",)),
    "memory": State(_MEMORY),
    "tree": State(_TREE),
    "attributes": State(_ATTRIBUTES),
}
