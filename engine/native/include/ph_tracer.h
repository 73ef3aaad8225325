/* Seizing, reading and driving tasks: everything that ptrace(2) does for us.
 *
 * ptrace is bound to a thread, and PTRACE_O_EXITKILL fires when that *thread*
 * ends; so one native thread, the tracer, makes every ptrace call of a
 * migration. Each function below hands its work to the tracer and returns when
 * it is done; they may be called from any thread, one call at a time.
 *
 * Numbers: pids are those of the caller's pid namespace; addresses are the
 * task's; times are milliseconds. Sources: ptrace(2), Linux
 * kernel/ptrace.c, arch/x86/kernel/ptrace.c.
 */
#ifndef PH_TRACER_H
#define PH_TRACER_H

#include "ph_error.h"
#include <stddef.h>
#include <stdint.h>

/* cffi: begin */
struct ph_tracer;

struct ph_tracer *ph_tracer_new (struct ph_error *err);
/* Ends the tracer thread: what is still seized with EXITKILL dies, the rest runs on. */
void ph_tracer_free (struct ph_tracer *tracer);

#define PH_TASK_STOPPED 1       /* in a ptrace stop of ours */
#define PH_TASK_JOB_STOPPED 2   /* likewise, and it was in a job-control stop before (SIGSTOP and friends) */
#define PH_TASK_ZOMBIE 3        /* dead, not reaped; not seized */

struct ph_task {
	int32_t pid;            /* thread group */
	int32_t tid;
	int32_t state;          /* PH_TASK_* */
	int32_t stop_signal;    /* of a job-control stop, else 0 */
};

/* Stop `root`, its descendants and all their threads; loops until no new task appears.
   Threads of one process stand together, its leader first; parents before children.
   On success returns the number of tasks. On failure everything is let go again: ETIMEDOUT
   names the task that did not stop, ESRCH that root is gone, EPERM who may not be traced,
   ENOBUFS that `capacity` is too small. */
long ph_stop_tree (struct ph_tracer *tracer, int root, int timeout_ms, struct ph_task *tasks, size_t capacity,
		   struct ph_error *err);

/* Likewise for processes that are to be killed, with all their descendants: from here on they die with the tracer, so
   that the cgroup that holds them may be thawed to run something inside. */
long ph_stop_doomed (struct ph_tracer *tracer, const int32_t *pids, size_t pid_count, int timeout_ms,
		     struct ph_task *tasks, size_t capacity, struct ph_error *err);

/* Let tasks go. A task in a job-control stop stays in it. Tasks that have died are passed over. */
int ph_detach (struct ph_tracer *tracer, const int32_t *tids, size_t count, struct ph_error *err);

#define PH_PECULIAR_DISPATCH 1  /* system calls go to a handler (PR_SET_SYSCALL_USER_DISPATCH; seen since Linux 6.4) */
#define PH_PECULIAR_PORTS 2     /* I/O ports are open to it (ioperm (2)) */

#define PH_XSTATE_MAX 16384
#define PH_GPREGS 27

struct ph_thread_state {
	int32_t tid;
	uint32_t xstate_size;
	uint64_t regs[27];              /* struct user_regs_struct (sys/user.h) */
	uint64_t sigmask;
	uint64_t rseq_address;          /* 0 = not registered */
	uint32_t rseq_size;
	uint32_t rseq_signature;
	uint32_t rseq_flags;
	uint32_t restarted;             /* 1: an EINTR that our own stop caused was taken back */
	uint32_t queued;                /* bit 0: signals wait for the thread, bit 1: for its process */
	uint32_t peculiar;              /* PH_PECULIAR_*: what cannot be carried, and may stand in an injection's way */
	uint32_t call;                  /* in: the call that restart_syscall (2) stands for, as far as is known; 0: none */
	uint64_t robust_head;
	uint64_t robust_size;
	uint8_t xstate[16384];          /* NT_X86_XSTATE, standard format */
};

/* Read the state of stopped threads (`states[i].tid` names them). A thread in whose registers our stop shows as
   EINTR gets its call back first (rip and rax are rewound in the task). */
int ph_get_states (struct ph_tracer *tracer, struct ph_thread_state *states, size_t count, struct ph_error *err);
/* Write registers, xstate and signal mask of stopped threads. */
int ph_set_states (struct ph_tracer *tracer, const struct ph_thread_state *states, size_t count, struct ph_error *err);

/* Let stopped threads that are in the code [bounds[2 i], bounds[2 i + 1]) run on until they are outside of it, in front
   of their next system call at the latest, and stop them again. Code that waits for nothing: the vDSO. ETIMEDOUT names
   one that does not get out of it, EAGAIN one that a job-control signal has stopped meanwhile. */
int ph_step_aside (struct ph_tracer *tracer, const int32_t *tids, const uint64_t *bounds, size_t count, int timeout_ms,
		   struct ph_error *err);

/* Queued signals of a stopped thread: siginfo_t (128 bytes each) into `siginfos`; the thread's own, or those of its
   process if `shared`. Returns how many there are, at most `capacity`. */
long ph_peek_signals (struct ph_tracer *tracer, int tid, int shared, void *siginfos, size_t capacity,
		      struct ph_error *err);

/* The seccomp filter with this index, 0 = the oldest (struct sock_filter, 8 bytes each).
   Returns its length; 0 = there is none. */
long ph_seccomp_filter (struct ph_tracer *tracer, int tid, unsigned index, void *instructions, size_t capacity,
			struct ph_error *err);

/* The flags that this filter was installed with, of those that the kernel keeps (SECCOMP_FILTER_FLAG_LOG). */
long ph_seccomp_flags (struct ph_tracer *tracer, int tid, unsigned index, struct ph_error *err);

/* Where in a task's code the injection may begin. */
struct ph_gadgets {
	uint64_t syscall_ret;   /* address of `syscall; ret` */
	uint64_t sigreturn;     /* address of `mov $15, %eax; syscall` (any encoding) */
};

/* An interpreter inside a source process. */
struct ph_injection {
	int32_t tid;            /* the thread that was used to make the mappings */
	int32_t slots;
	uint64_t address;       /* of the arena in the task; the code follows it */
	uint64_t size;          /* of both */
	uint64_t code;
	void *arena;            /* the arena in our own memory */
	uint64_t spare;         /* address of the stretch of unused stack that holds the first signal frame */
	uint64_t spare_size;
};

/* Search executable areas for the two gadgets. `areas` are start, end pairs. Returns 0 when both were found,
   else ENOENT. */
int ph_find_gadgets (int pid, const uint64_t *areas, size_t count, struct ph_gadgets *gadgets, struct ph_error *err);

/* Search executable areas for a `syscall` instruction; ENOENT if there is none. */
int ph_find_syscall (int pid, const uint64_t *areas, size_t count, uint64_t *address, struct ph_error *err);

/* Map arena and code into the process of a stopped thread. `spare` is memory of the task that holds nothing
   (the low end of its stack area), at least 20480 bytes. From the first changed register on, the task gets back to
   where it was by itself if we die: it runs through a signal frame. */
int ph_inject (struct ph_tracer *tracer, const struct ph_thread_state *state, const struct ph_gadgets *gadgets,
	       uint64_t spare, uint64_t spare_size, int slots, struct ph_injection *injection, struct ph_error *err);

/* Let stopped threads interpret, each in its slot. `states` is what they get back at the end. */
int ph_enter (struct ph_tracer *tracer, struct ph_injection *injection, const struct ph_thread_state *const *states,
	      const int32_t *slots, size_t count, int patience_ms, struct ph_error *err);

/* Stop the interpreters of threads again and put back what `states` say. */
int ph_leave (struct ph_tracer *tracer, const struct ph_thread_state *const *states, size_t count,
	      struct ph_error *err);

/* Unmap arena and code in the task (`state->tid` is stopped and interprets no more) and here. */
int ph_cure (struct ph_tracer *tracer, struct ph_injection *injection, const struct ph_thread_state *state,
	     const struct ph_gadgets *gadgets, struct ph_error *err);

/* A process whose threads are asked, and where the injection begins in it. */
struct ph_visit {
	const struct ph_thread_state *state;    /* of the thread that makes the mappings */
	struct ph_gadgets gadgets;
	uint64_t spare, spare_size;             /* as in ph_inject */
	int32_t slots;                          /* threads that are asked, at most */
	struct ph_injection injection;          /* ours */
};

/* A program for one thread of a visited process (ph_interp.h). */
struct ph_question {
	const struct ph_thread_state *state;
	int32_t visit;          /* index of its process */
	int32_t slot;           /* which of that process's threads it is */
	uint32_t count;         /* instructions, without the END that follows them */
	uint32_t buffer_size;
	const void *code;       /* questions of one process that follow each other may have the same */
	const void *buffer;     /* what the buffer holds at first */
	void *answer;           /* out: what it holds at the end */
	uint64_t place;         /* ours */
	uint32_t error;         /* out: as in struct ph_slot */
	uint32_t failed_at;
	int64_t result;
	int64_t regs[64];
};

/* Run a program in each of these threads, all at once, and leave nothing behind: ph_inject, ph_enter, ph_run, ph_leave
   and ph_cure for all processes in one go. It begins with the first call, which returns NULL if it cannot, and is over
   with the second, which must follow in the same thread: in between the caller may look at the tree from outside, but
   not call the tracer. Everything given lives until then, `err` too. A program that fails says so in its question; the
   second call fails with ETIMEDOUT; then, too, the threads are where they were. */
struct ph_visiting;
struct ph_visiting *ph_visit_begin (struct ph_tracer *tracer, struct ph_visit *visits, size_t visit_count,
				    struct ph_question *questions, size_t count, int timeout_ms, struct ph_error *err);
int ph_visit_end (struct ph_visiting *visiting);

/* Between the two: wait until all have answered, while threads are still on their way out. Whether they have; if not, the
   second call tells why. */
int ph_visit_await (struct ph_visiting *visiting);

/* Ring the interpreter in a slot of an arena, and wait for nothing. */
void ph_ring (void *arena, int slot);

/* Wait, without the tracer and not for long, until the interpreters in these slots, which have been rung, are done.
   Returns how many may not be. It looks every `nap_us`, and when the last of them that is not done wakes it; each time a
   task may have to give it a CPU. */
int ph_run_wait (void *arena, const int32_t *slots, size_t count, int nap_us, int patience_us);

/* Wait until the interpreters in these slots, which have been rung, are done. Events of traced tasks (births) are handled
   meanwhile. In two halves, as ph_visit_begin and ph_visit_end. Fails with ETIMEDOUT, or ECHILD naming a task that died
   or was hit by a signal. */
struct ph_running;
struct ph_running *ph_run_begin (struct ph_tracer *tracer, void *arena, const int32_t *slots, const int32_t *tids,
				 size_t count, int timeout_ms, struct ph_error *err);
int ph_run_end (struct ph_running *running);

/* What a skeleton is born with. */
struct ph_birth {
	int32_t set_tid[8];     /* wanted pids, innermost namespace first */
	uint32_t set_tid_count; /* 0 = any */
	int32_t cgroup;         /* descriptor of its cgroup v2 directory, -1 = ours */
	uint64_t namespaces;    /* CLONE_NEW* */
	const char *uid_map;    /* what is written to its uid_map and gid_map, in a new user namespace; NULL = nothing */
	const char *gid_map;
	int32_t deny_setgroups; /* 1: forbid setgroups(2) there */
	int32_t arena;          /* descriptor of the arena's memfd */
	int32_t socket;         /* descriptor that the task gets as number 5, the only one it keeps; -1 = none */
	int32_t slot;
	uint64_t arena_address; /* in the task */
	uint64_t arena_size;
	uint64_t code_address;
	int32_t timens;         /* 1: a new time namespace with these offsets */
	int32_t pidfd;          /* out: a pidfd */
	int64_t monotonic_sec, monotonic_nsec, boottime_sec, boottime_nsec;
};

/* Start the root of a skeleton: a traced (EXITKILL, births followed) task that interprets. Returns its pid. */
long ph_spawn (struct ph_tracer *tracer, struct ph_birth *birth, struct ph_error *err);

#define PH_PORT_SETTINGS 128

/* A network device that was to become a port of a bridge. */
struct ph_plug {
	char bridge[16];
	int32_t port;      /* its index */
	uint32_t set_size; /* bytes in `set` */
	uint8_t set[PH_PORT_SETTINGS]; /* what was to be set of it as a port: attributes, IFLA_BRPORT_* */
};

#define PH_PLUGS 32

/* A command that will start a container. */
struct ph_catch {
	const char *path;
	char *const *argv;
	char *const *environment;
	int32_t input, output; /* descriptors; its standard error is `output` too */
	int32_t timeout_ms;
	_Bool privileged;       /* the first process keeps what its runtime would take from it */
	uint32_t plug_count;    /* out */
	struct ph_plug plugs[PH_PLUGS];
};

/* Run a command that goes to its end with exit status 0, having started a process in a pid namespace of its own, and
   catch that before it has run any instruction of its program. Returns its pid: traced (EXITKILL, births followed), and
   stopped; nothing else of what was started is traced any more. -1: none of it is left, so far as it was traced.
   Nothing is plugged into bridges meanwhile (SIOCBRADDIF of netdevice(7), IFLA_MASTER of rtnetlink(7)), so far as this
   is done in the caller's network namespace, to a device that is there; one that is made as a port stays down. What would
   have been stands in `plugs`.
   With `privileged` no call of the first process is made that would take capabilities or its ids from it, or confine it
   by a filter (capabilities(7), setuid(2), seccomp(2)): a runtime that takes them before the program is executed would
   leave a task that nothing can be built in. */
long ph_catch (struct ph_tracer *tracer, struct ph_catch *wanted, struct ph_error *err);

/* Make a caught process the root of a skeleton, with the descriptors, the arena and the clocks of `birth`; it stays in
   the namespaces and the cgroup that it is in, and keeps its parent, its ids and its limits. Returns its pid. */
long ph_adopt (struct ph_tracer *tracer, int pid, struct ph_birth *birth, struct ph_error *err);

/* Stop the interpreter of a skeleton task for good. */
int ph_halt (struct ph_tracer *tracer, int tid, int timeout_ms, struct ph_error *err);

/* A system call in a halted task, through the `syscall` instruction at `gadget`. */
struct ph_call {
	int32_t tid;
	_Bool made, held_stop;  /* ours */
	uint64_t gadget;
	uint64_t nr;
	uint64_t args[6];
	int64_t result;         /* out: -errno and restart codes included */
};

/* Make calls in halted tasks, no two in the same, all at once. -1: one could not be made. */
int ph_calls (struct ph_tracer *tracer, struct ph_call *calls, size_t count, struct ph_error *err);

/* Stop the interpreters of skeleton tasks for good, have some of them sleep, then make a last call in some, and give each
   its state. A task that is in its sleep already (PH_OP_REST) only stops; in others it is made and interrupted. All in
   one go: `last` stands in the order of the states. -1: something could not be done, or a task did not stop in time. */
int ph_park (struct ph_tracer *tracer, const struct ph_thread_state *states, size_t count, struct ph_call *sleeps,
	     size_t sleep_count, struct ph_call *last, size_t last_count, int timeout_ms, struct ph_error *err);

/* End a skeleton task by a signal whose default action does so, so that its wait status is the signal's. */
int ph_end (struct ph_tracer *tracer, int tid, int signal, struct ph_error *err);

/* Wait until these traced tasks, which have been killed, are dead, and take notice of it: process 1 of a pid namespace
   ends only when nobody has to be told any more of the deaths of all others in it. Those that are gone count as dead. */
int ph_reap (struct ph_tracer *tracer, const int32_t *tids, size_t count, int timeout_ms, struct ph_error *err);

/* Clear EXITKILL and detach: from here the tasks live by themselves. They must be held by a frozen cgroup. */
int ph_release (struct ph_tracer *tracer, const int32_t *tids, size_t count, struct ph_error *err);

/* Where component `index` (5 = AVX-512 masks, ...) of the standard-format XSAVE area stands, from CPUID leaf 0xd.
   Returns its size, 0 if this CPU has none. */
unsigned ph_xstate_component (unsigned index, unsigned *offset);
/* The size of that area with the components the kernel has enabled, and their set (XCR0). */
void ph_xstate_layout (unsigned *size, uint64_t *xcr0);

/* The executable of a PID namespace's process 1 (interp/init.c). */
const void *ph_init_image (size_t *size);

/* The injected code, for arenas made elsewhere. */
const void *ph_interp_code (size_t *size);
/* cffi: end */

#endif
