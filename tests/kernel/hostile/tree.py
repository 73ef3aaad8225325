"""Hostile trees, threads and what they are like."""

from __future__ import annotations

from tests.kernel.hostile.breaking import (
    HUGE32,
    HUGE64,
    UNKNOWN,
    Break,
    add_process,
    chain_of,
    child,
    core,
    root,
    seccomp,
    signal_info,
    thread,
)

TREE: dict[str, tuple[str, Break]] = {
    "no process": ("holds no process", lambda c: c.adopt("pstree", None, [])),
    "process 0": ("with the number 0", lambda c: add_process(c, 0, root(c).pid)),
    "process beyond all numbers": ("with the number 4194305", lambda c: add_process(c, (1 << 22) + 1, root(c).pid)),
    "process -1": ("with the number 4294967295", lambda c: add_process(c, HUGE32, root(c).pid)),
    "thread 0": ("with the number 0", lambda c: root(c).threads.append(0)),
    "thread -1": ("with the number 4294967295", lambda c: root(c).threads.append(HUGE32)),
    "thread twice": ("is listed 2 times", lambda c: root(c).threads.append(root(c).threads[1])),
    "thread of another process": ("is listed 2 times", lambda c: child(c).threads.append(root(c).threads[1])),
    "thread without an image": ("core-4000000.img: is missing", lambda c: root(c).threads.append(UNKNOWN)),
    "a hundred thousand threads": (
        "generations and 1000",
        lambda c: root(c).threads.extend(range(10**6, 10**6 + 10**5)),
    ),
    "process that is not its own thread": ("its own first thread", lambda c: root(c).threads.reverse()),
    "parent that is not there": ("before its parent 4000000", lambda c: setattr(child(c), "ppid", UNKNOWN)),
    "process that is its own parent": ("before its parent", lambda c: setattr(child(c), "ppid", child(c).pid)),
    "two that are each other's parents": (
        "before its parent",
        lambda c: (add_process(c, UNKNOWN, UNKNOWN + 1), add_process(c, UNKNOWN + 1, UNKNOWN)),
    ),
    "child before its parent": ("before its parent", lambda c: c.share("pstree").reverse()),  # type: ignore[union-attr]
    "two roots": ("a second root", lambda c: add_process(c, UNKNOWN, 0)),
    "300 generations": ("has 301 generations", lambda c: chain_of(c, 300)),
    "huge process group": ("group 4294967295", lambda c: setattr(child(c), "pgid", HUGE32)),
    "huge session": ("session 4294967295", lambda c: setattr(child(c), "sid", HUGE32)),
    "session of a sibling": (
        "never was in|cannot|in task",
        lambda c: (add_process(c, UNKNOWN, root(c).pid, sid=child(c).pid), setattr(child(c), "sid", child(c).pid)),
    ),
    "dead root": ("has a lock of descriptor", lambda c: setattr(core(c).tc, "task_state", 2)),
    "root in a state that there is not": (
        "has a lock of descriptor",
        lambda c: setattr(core(c).tc, "task_state", 77),
    ),
    "no image of the root": ("is missing", lambda c: c.remove("core", root(c).pid)),
    "no table": ("ids-[0-9]+.img", lambda c: c.remove("ids", root(c).pid)),
    "no memory": ("is missing", lambda c: c.remove("mm", root(c).pid)),
    "no directories": ("is missing", lambda c: c.remove("fs", root(c).pid)),
}

THREAD: dict[str, tuple[str, Break]] = {
    "another machine": ("machine type 3", lambda c: setattr(core(c), "mtype", 3)),
    "no registers": ("lacks the registers", lambda c: core(c).ClearField("thread_info")),
    "half a register area": (
        "extended registers of 100 bytes",
        lambda c: setattr(core(c).thread_info, "xstate", b"x" * 100),
    ),
    "endless register area": (
        "extended registers of",
        lambda c: setattr(core(c).thread_info, "xstate", bytes(1 << 17)),
    ),
    "half a layout": ("laid out in 9", lambda c: setattr(core(c).thread_info, "xstate_layout", bytes(9))),
    "too few SSE registers": (
        "32 words of x87 and 3 of SSE",
        lambda c: (
            core(c).thread_info.ClearField("xstate"),
            core(c).thread_info.fpregs.st_space.__setitem__(slice(None), [0] * 32),
            core(c).thread_info.fpregs.xmm_space.__setitem__(slice(None), [1, 2, 3]),
        ),
    ),
    "wide control word": ("more than 16 bits", lambda c: setattr(core(c).thread_info.fpregs, "cwd", 1 << 16)),
    "segment that is the kernel's": (" registers|task", lambda c: setattr(core(c).thread_info.gpregs, "cs", 0x10)),
    "short signal": ("not 128 bytes", lambda c: signal_info(c, 12)),
    "long signal": ("not 128 bytes", lambda c: signal_info(c, 4096)),
    "signal 0 queued": ("queueing signal", lambda c: core(c).tc.signals_s.signals.add(siginfo=b"\xff" * 128)),
    "hundred signal actions": (
        "signal actions",
        lambda c: [core(c).tc.sigactions.add(sigaction=0, flags=0, restorer=0, mask=0) for _ in range(100)],
    ),
    "thirty limits": ("limits", lambda c: [core(c).tc.rlimits.rlimits.add(cur=1, max=1) for _ in range(30)]),
    "soft limit above the hard": (
        "setting the limit",
        lambda c: (setattr(core(c).tc.rlimits.rlimits[4], "max", 5), setattr(core(c).tc.rlimits.rlimits[4], "cur", 10)),
    ),
    "stopped by signal 200": ("names signal 200", lambda c: setattr(core(c).tc, "stop_signo", 200)),
    "dies by signal 77": ("names signal 77", lambda c: setattr(thread(c), "pdeath_sig", 77)),
    "sleep of 584 years": ("sleeps for", lambda c: setattr(thread(c), "remaining_ns", 1 << 63)),
    "interval timer that overflows": (
        "has an interval timer",
        lambda c: setattr(core(c).tc.timers.real, "vsec", 1 << 63),
    ),
    "interval timer with a million microseconds": (
        "has an interval timer",
        lambda c: setattr(core(c).tc.timers.prof, "iusec", 10**6),
    ),
    "POSIX timer that overflows": ("an impossible time", lambda c: setattr(core(c).tc.timers.posix[0], "isec", HUGE64)),
    "POSIX timer with a billion nanoseconds": (
        "an impossible time",
        lambda c: setattr(core(c).tc.timers.posix[0], "vnsec", 10**9),
    ),
    "POSIX timer -1": ("an impossible POSIX timer", lambda c: setattr(core(c).tc.timers.posix[0], "it_id", HUGE32)),
    "POSIX timer twice": ("or has it twice", lambda c: core(c).tc.timers.posix.append(core(c).tc.timers.posix[0])),
    "POSIX timer on a clock that there is not": (
        "timer_create",
        lambda c: setattr(core(c).tc.timers.posix[0], "clock_id", 77),
    ),
    "POSIX timer that signals 9999": ("timer_create", lambda c: setattr(core(c).tc.timers.posix[0], "si_signo", 9999)),
    "capabilities of 96 bits": ("more than 64 bits", lambda c: thread(c).creds.cap_eff.append(1)),
    "capabilities that there are not": ("lacks on this host", lambda c: thread(c).creds.cap_prm.__setitem__(1, HUGE32)),
    "ambient capabilities that are not permitted": (
        "ambient",
        lambda c: (
            thread(c).creds.cap_prm.__setitem__(slice(None), [0, 0]),
            thread(c).creds.cap_eff.__setitem__(slice(None), [0, 0]),
            thread(c).creds.cap_amb.__setitem__(slice(None), [0, 1 << 31]),
        ),
    ),
    "in seventy thousand groups": ("is in 70000 groups", lambda c: thread(c).creds.groups.extend(range(70000))),
    "more groups than fit": ("too large|setgroups", lambda c: thread(c).creds.groups.extend(range(65536))),
    "securebits that there are not": ("securebits", lambda c: setattr(thread(c).creds, "secbits", HUGE32)),
    "CPUs of 2000 bytes": ("masks of 2000 bytes", lambda c: setattr(thread(c).phaul, "affinity", b"\xff" * 2000)),
    "CPUs that are not here": (
        "none of which is here",
        lambda c: setattr(thread(c).phaul, "affinity", bytes(1000) + b"\x80"),
    ),
    "NUMA nodes of 2000 bytes": ("of NUMA nodes", lambda c: setattr(thread(c).phaul, "numa_nodes", b"\xff" * 2000)),
    "NUMA policy that there is not": ("set_mempolicy", lambda c: setattr(thread(c).phaul, "numa_policy", 77)),
    "nice as nobody": ("nice value 50", lambda c: setattr(thread(c), "sched_nice", 50)),
    "priority 1000": ("priority 1000", lambda c: setattr(thread(c), "sched_prio", 1000)),
    "scheduling policy 77": ("sched_setattr", lambda c: setattr(thread(c), "sched_policy", 77)),
    "I/O priority -1": ("ioprio_set", lambda c: setattr(thread(c).phaul, "ioprio", HUGE32)),
    "machine check policy 99": ("prctl", lambda c: setattr(thread(c).phaul, "machine_check", 99)),
    "time stamp counter 9": ("prctl", lambda c: setattr(thread(c).phaul, "tsc", 9)),
    "barriers that there are not": (
        "registering for membarrier",
        lambda c: setattr(core(c).tc, "membarrier_registration_mask", HUGE32),
    ),
    "dies at 5000": ("oom_score_adj 5000", lambda c: setattr(core(c).tc, "oom_score_adj", 5000)),
    "filter that is not there": ("refers to seccomp filter 77", lambda c: setattr(thread(c), "seccomp_filter", 77)),
    "no filters": ("seccomp.img: is missing", lambda c: c.remove("seccomp")),
    "filter of an odd size": ("filter 0 of 9 bytes", lambda c: seccomp(c, filter=bytes(9))),
    "empty filter": ("filter 0 of 0 bytes", lambda c: seccomp(c, filter=b"")),
    "filter without end": ("filter 0 of 524288 bytes", lambda c: seccomp(c, filter=bytes(1 << 19))),
    "filter that is no program": ("seccomp", lambda c: seccomp(c, filter=b"\xff" * 8)),
    "filter that hands out a listener": ("filter 0 with flags 0x8", lambda c: seccomp(c, flags=8)),
    "filter of unknown kind": ("filter 0 with flags 0x10", lambda c: seccomp(c, flags=16)),
    "filter upon itself": ("filter 0 that follows filter 0", lambda c: seccomp(c, prev=0)),
    "robust list of an odd size": ("set_robust_list", lambda c: setattr(thread(c), "futex_rla_len", 7)),
    "alternate stack in the kernel": (
        "sigaltstack",
        lambda c: (setattr(thread(c).sas, "ss_flags", 0xFF), setattr(thread(c).sas, "ss_size", 1 << 20)),
    ),
}
