/* The destination's side: a task is born as the static helper, interprets, is halted, and is let go. */
#include "birth.h"
#include "cleanup.h"
#include "kernel_abi.h"
#include "ph_interp.h"
#include "tracer.h"

#include <asm/unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

extern const unsigned char ph_helper_elf[];
extern const size_t ph_helper_elf_size;
extern const unsigned char ph_init_elf[];
extern const size_t ph_init_elf_size;

const void *
ph_init_image (size_t *size)
{
	*size = ph_init_elf_size;
	return ph_init_elf;
}

static int
memfd_with (const char *name, const void *content, size_t size, struct ph_error *err)
{
	cleanup_close int fd = memfd_create (name, MFD_CLOEXEC | 0x0010u /* MFD_EXEC */);

	if (fd < 0)
		fd = memfd_create (name, MFD_CLOEXEC);
	if (fd < 0 || write (fd, content, size) != (ssize_t) size)
		return ph_fail (err, errno, "make the memory file %s", name);
	return ph_steal_fd (&fd);
}

int
birth_image (struct ph_error *err)
{
	return memfd_with ("phaul-helper", ph_helper_elf, ph_helper_elf_size, err);
}

int
birth_code (struct ph_error *err)
{
	size_t size;
	const void *bytes = ph_interp_code (&size);

	return memfd_with ("phaul-interp", bytes, size, err);
}

void
birth_argument (const struct ph_birth *birth, char *text, size_t size)
{
	size_t code_size;

	ph_interp_code (&code_size);
	snprintf (text, size, "%lx %lx %lx %lx %x", birth->code_address, (code_size + 4095) & ~4095ul,
		  birth->arena_address, birth->arena_size, birth->slot);
}

/* What a child runs before it becomes another program has nowhere to count. GCOVR_EXCL_START */

/* A task that is not root in its user namespace would lose its capabilities in exec: be root, or keep them as ambient. */
static void
become_root (void)
{
	struct __user_cap_header_struct header = { _LINUX_CAPABILITY_VERSION_3, 0 };
	struct __user_cap_data_struct data[2];

	syscall (__NR_setgroups, 0, NULL);
	syscall (__NR_setresgid, 0, 0, 0);
	if (syscall (__NR_setresuid, 0, 0, 0) == 0 || syscall (__NR_capget, &header, data) < 0)
		return;
	data[0].inheritable = data[0].permitted;
	data[1].inheritable = data[1].permitted;
	syscall (__NR_capset, &header, data);
	for (int capability = 0; capability < 64; capability++)
		prctl (PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0);
}

/* Everything the child does before exec; it shares nothing with us but must not use libc state. */
static void
child_main (const struct ph_birth *birth, int code, int image, int gate, char *const argv[])
{
	int arena = birth->arena, socket = birth->socket;
	char byte;
	char *const environment[] = { NULL };

	prctl (PR_SET_PDEATHSIG, SIGKILL);
	while (read (gate, &byte, 1) < 0 && errno == EINTR)
		;
	if (birth->uid_map)
		become_root ();
	code = fcntl (code, F_DUPFD, 16);
	arena = fcntl (arena, F_DUPFD, 16);
	image = fcntl (image, F_DUPFD_CLOEXEC, 16);
	int kept = socket >= 0 ? fcntl (socket, F_DUPFD, 16) : -1;
	dup2 (code, FD_CODE);
	dup2 (arena, FD_ARENA);
	close (FD_SOCKET);
	if (kept >= 0)
		dup2 (kept, FD_SOCKET);
	dup3 (image, FD_IMAGE, O_CLOEXEC);
	for (int fd = 0; fd < 3; fd++)
		close (fd);
	syscall (__NR_close_range, FD_IMAGE + 1, ~0u, 0);
	syscall (__NR_execveat, FD_IMAGE, "", argv, environment, AT_EMPTY_PATH);
	_exit (101);
}

/* GCOVR_EXCL_STOP */

int
birth_set_clocks (const struct ph_birth *birth, pid_t tid, struct ph_error *err)
{
	char path[64], text[128];

	/* not in /proc/thread-self: only a task's own directory has the file, and any thread has one */
	snprintf (path, sizeof (path), "/proc/%d/timens_offsets", tid);
	cleanup_close int fd = open (path, O_WRONLY | O_CLOEXEC);
	int size = snprintf (text, sizeof (text), "monotonic %lld %lld\nboottime %lld %lld\n", (long long) birth->monotonic_sec,
			     (long long) birth->monotonic_nsec, (long long) birth->boottime_sec,
			     (long long) birth->boottime_nsec);
	if (fd < 0 || write (fd, text, (size_t) size) != size)
		return ph_fail (err, errno, "set the clocks of a time namespace to monotonic %+lld s, boottime %+lld s",
				(long long) birth->monotonic_sec, (long long) birth->boottime_sec);
	return 0;
}

/* Children of this thread are born into a time namespace with these offsets (time_namespaces(7)). */
static int
enter_time (const struct ph_birth *birth, struct ph_error *err)
{
	if (syscall (__NR_unshare, CLONE_NEWTIME) < 0)
		return ph_fail (err, errno, "make a time namespace");
	return birth_set_clocks (birth, (pid_t) syscall (__NR_gettid), err);
}

static pid_t
clone_child (struct ph_birth *birth, int *pidfd, struct ph_error *err)
{
	struct clone_args args = {
		.flags = CLONE_PIDFD | birth->namespaces,
		.pidfd = (uint64_t) pidfd,
		.exit_signal = SIGCHLD,
		.set_tid = (uint64_t) birth->set_tid,
		.set_tid_size = birth->set_tid_count,
	};

	if (birth->set_tid_count == 0)
		args.set_tid = 0;
	if (birth->cgroup >= 0)
		{
			args.flags |= CLONE_INTO_CGROUP;
			args.cgroup = (uint64_t) birth->cgroup;
		}
	pid_t pid = (pid_t) syscall (__NR_clone3, &args, sizeof (args));
	if (pid < 0)
		return ph_fail (err, errno, "start a process with pid %d", birth->set_tid_count ? birth->set_tid[0] : 0);
	return pid;
}

static int
write_map (pid_t pid, const char *name, const char *text, struct ph_error *err)
{
	char path[64];
	size_t size = text ? strlen (text) : 0;

	if (size == 0)
		return 0;
	snprintf (path, sizeof (path), "/proc/%d/%s", pid, name);
	cleanup_close int fd = open (path, O_WRONLY | O_CLOEXEC);
	if (fd < 0 || write (fd, text, size) != (ssize_t) size)
		return ph_fail (err, errno, "write the %s of a user namespace", name);
	return 0;
}

struct spawn_job {
	struct ph_birth *birth;
};

int
birth_wait_idle (pid_t pid, const struct ph_birth *birth, struct ph_error *err)
{
	size_t offset = (size_t) birth->slot * PH_SLOT_SIZE;
	struct ph_slot *slot = mmap (NULL, PH_SLOT_SIZE, PROT_READ, MAP_SHARED, birth->arena, (off_t) offset);
	int64_t deadline = ph_now_us () + 5000000;
	int status, result = 0;

	if (slot == MAP_FAILED)
		return ph_fail (err, errno, "map a slot");
	while (__atomic_load_n (&slot->state, __ATOMIC_ACQUIRE) != PH_SLOT_IDLE && result == 0)
		{
			pid_t got = waitpid (pid, &status, __WALL | WNOHANG);
			if (got == pid && WIFSTOPPED (status) && WSTOPSIG (status) != SIGSEGV)
				ptrace (PTRACE_CONT, pid, 0, 0);
			else if (got != 0)
				result = ph_fail (err, ECHILD, "the skeleton's helper ended with status %#x", status);
			else if (ph_now_us () > deadline)
				result = ph_fail (err, ETIMEDOUT, "wait for the skeleton's helper");
			else
				usleep (50);
		}
	munmap (slot, PH_SLOT_SIZE);
	return result;
}

static long
spawn (void *argument, struct ph_error *err)
{
	struct ph_birth *birth = ((struct spawn_job *) argument)->birth;
	cleanup_close int code = birth_code (err);
	cleanup_close int image = code < 0 ? -1 : birth_image (err);
	cleanup_close int pidfd = -1;
	cleanup_close int gate_in = -1, gate_out = -1;
	int gate[2];
	char text[128];
	char name[] = "phaul-skeleton";
	char *const argv[] = { name, text, NULL };

	if (image < 0 || (birth->timens && enter_time (birth, err) < 0))
		return -1;
	if (pipe2 (gate, O_CLOEXEC) < 0)
		return ph_fail (err, errno, "make a pipe");
	gate_in = gate[0];
	gate_out = gate[1];
	if (birth->deny_setgroups) /* nor could it leave the groups that it has from this thread */
		syscall (__NR_setgroups, 0, NULL);
	birth_argument (birth, text, sizeof (text));
	pid_t pid = clone_child (birth, &pidfd, err);
	if (pid == 0)
		child_main (birth, code, image, gate_in, argv);
	if (pid < 0)
		return -1;
	if (ptrace (PTRACE_SEIZE, pid, 0, SKELETON_OPTIONS) < 0
	    && ptrace (PTRACE_SEIZE, pid, 0, SKELETON_OPTIONS & ~PTRACE_O_SUSPEND_SECCOMP) < 0)
		ph_fail (err, errno, "seize the skeleton %d", pid);
	else if (birth->deny_setgroups && write_map (pid, "setgroups", "deny", err) < 0)
		;
	else if (write_map (pid, "gid_map", birth->gid_map, err) < 0 || write_map (pid, "uid_map", birth->uid_map, err) < 0)
		;
	else if (write (gate_out, "", 1) != 1)
		ph_fail (err, errno, "start the skeleton %d", pid);
	else if (birth_wait_idle (pid, birth, err) == 0)
		{
			birth->pidfd = ph_steal_fd (&pidfd);
			return pid;
		}
	kill (pid, SIGKILL);
	waitpid (pid, NULL, __WALL);
	return -1;
}

long
ph_spawn (struct ph_tracer *tracer, struct ph_birth *birth, struct ph_error *err)
{
	struct spawn_job job = { birth };

	return ph_tracer_call (tracer, spawn, &job, err);
}

struct halt_job {
	int tid, timeout_ms;
};

struct tasks_job {
	const int32_t *tids;
	size_t count;
	int timeout_ms;
};

static long
halt (void *argument, struct ph_error *err)
{
	struct halt_job *job = argument;

	return trace_interrupt (job->tid, ph_now_us () + (int64_t) job->timeout_ms * 1000, err);
}

int
ph_halt (struct ph_tracer *tracer, int tid, int timeout_ms, struct ph_error *err)
{
	struct halt_job job = { tid, timeout_ms };

	return (int) ph_tracer_call (tracer, halt, &job, err);
}

struct calls_job {
	struct ph_call *calls;
	size_t count;
};

static int
begin_call (const struct ph_call *call, struct ph_error *err)
{
	struct user_regs_struct regs;

	if (trace_get_regs (call->tid, &regs, err) < 0)
		return -1;
	regs.rip = call->gadget;
	regs.orig_rax = ~0ull;
	regs.rax = (uint64_t) call->nr;
	regs.rdi = call->args[0];
	regs.rsi = call->args[1];
	regs.rdx = call->args[2];
	regs.r10 = call->args[3];
	regs.r8 = call->args[4];
	regs.r9 = call->args[5];
	return trace_call_begin (call->tid, &regs, err);
}

static int
enter_calls (const struct calls_job *job, struct ph_error *err)
{
	for (size_t i = 0; i < job->count; i++)
		if (!job->calls[i].made && begin_call (&job->calls[i], err) < 0)
			return -1;
	for (size_t i = 0; i < job->count; i++)
		if (!job->calls[i].made && trace_call_enter (job->calls[i].tid, &job->calls[i].held_stop, err) < 0)
			return -1;
	return 0;
}

static int
end_calls (const struct calls_job *job, struct ph_error *err)
{
	long result;

	for (size_t i = 0; i < job->count; i++)
		{
			if (job->calls[i].made)
				continue;
			if (trace_call_end (job->calls[i].tid, job->calls[i].held_stop, &result, err) < 0)
				return -1;
			job->calls[i].result = result;
		}
	return 0;
}

static int
make_calls (const struct calls_job *job, struct ph_error *err)
{
	return enter_calls (job, err) < 0 || end_calls (job, err) < 0 ? -1 : 0;
}

static long
calls (void *argument, struct ph_error *err)
{
	return make_calls (argument, err);
}

/* Whether a halted task was in this call, for which the kernel keeps when it ends. */
static int
is_in_call (struct ph_call *call, struct ph_error *err)
{
	struct user_regs_struct regs;

	if (trace_get_regs (call->tid, &regs, err) < 0)
		return -1;
	call->result = (long) regs.rax;
	return regs.orig_rax == call->nr && call->result == -ERESTART_RESTARTBLOCK;
}

/* Make each call in its task, unless it is in it. */
static int
sleep_on (const struct calls_job *job, struct ph_error *err)
{
	for (size_t i = 0; i < job->count; i++)
		{
			int is_in = is_in_call (&job->calls[i], err);

			if (is_in < 0)
				return -1;
			job->calls[i].made = is_in;
		}
	return make_calls (job, err);
}

int
ph_calls (struct ph_tracer *tracer, struct ph_call *list, size_t count, struct ph_error *err)
{
	struct calls_job job = { list, count };

	return (int) ph_tracer_call (tracer, calls, &job, err);
}

struct park_job {
	const struct ph_thread_state *states;
	size_t count;
	int timeout_ms;
	struct calls_job sleeps, last;
};

/* `among`: those that make the last call, or all others. They stand in the order of the calls. */
static int
set_states (const struct park_job *job, bool among, struct ph_error *err)
{
	size_t next = 0;

	for (size_t i = 0; i < job->count; i++)
		{
			bool calls = next < job->last.count && job->last.calls[next].tid == job->states[i].tid;

			next += calls;
			if (calls == among && trace_set_state (&job->states[i], err) < 0)
				return -1;
		}
	return 0;
}

static long
park (void *argument, struct ph_error *err)
{
	struct park_job *job = argument;
	int64_t deadline = ph_now_us () + (int64_t) job->timeout_ms * 1000;

	for (size_t i = 0; i < job->count; i++)
		if (ptrace (PTRACE_INTERRUPT, job->states[i].tid, 0, 0) < 0)
			return ph_fail (err, errno, "interrupt task %d", job->states[i].tid);
	for (size_t i = 0; i < job->count; i++)
		if (trace_wait_stop (job->states[i].tid, deadline, NULL, err) < 0)
			return -1;
	if (sleep_on (&job->sleeps, err) < 0 || enter_calls (&job->last, err) < 0 || set_states (job, false, err) < 0)
		return -1;
	return end_calls (&job->last, err) < 0 || set_states (job, true, err) < 0 ? -1 : 0;
}

int
ph_park (struct ph_tracer *tracer, const struct ph_thread_state *states, size_t count, struct ph_call *sleeps,
	 size_t sleep_count, struct ph_call *last, size_t last_count, int timeout_ms, struct ph_error *err)
{
	struct park_job job = { states, count, timeout_ms, { sleeps, sleep_count }, { last, last_count } };

	return (int) ph_tracer_call (tracer, park, &job, err);
}

struct end_job {
	int tid, signal;
};

/* The signal is injected at its signal-delivery-stop: from there no action of ours comes between it and the task. */
static long
end (void *argument, struct ph_error *err)
{
	struct end_job *job = argument;
	int status;

	if (trace_interrupt (job->tid, ph_now_us () + 5000000, err) < 0 || trace_set_mask (job->tid, 0, err) < 0)
		return -1;
	if (kill (job->tid, job->signal) < 0 || (ptrace (PTRACE_CONT, job->tid, 0, 0) < 0 && errno != ESRCH))
		return ph_fail (err, errno, "end task %d by signal %d", job->tid, job->signal);
	while (waitpid (job->tid, &status, __WALL) == job->tid)
		{
			if (!WIFSTOPPED (status))
				return WIFSIGNALED (status) && WTERMSIG (status) == job->signal
					       ? 0
					       : ph_fail (err, EINVAL, "task %d ended with status %#x", job->tid, status);
			if (ptrace (PTRACE_CONT, job->tid, 0, status >> 16 ? 0 : WSTOPSIG (status)) < 0)
				return ph_fail (err, errno, "end task %d by signal %d", job->tid, job->signal);
		}
	return ph_fail (err, errno, "wait for the end of task %d", job->tid);
}

int
ph_end (struct ph_tracer *tracer, int tid, int signal, struct ph_error *err)
{
	struct end_job job = { tid, signal };

	return (int) ph_tracer_call (tracer, end, &job, err);
}

/* Whether a task is dead and its tracer has been told, or it is none of ours. */
static int
is_reaped (pid_t tid)
{
	int status;
	pid_t got = waitpid (tid, &status, __WALL | WNOHANG);

	return got == tid ? !WIFSTOPPED (status) : got < 0 && errno == ECHILD;
}

static long
reap (void *argument, struct ph_error *err)
{
	struct tasks_job *job = argument;
	int64_t deadline = ph_now_us () + (int64_t) job->timeout_ms * 1000;
	uint8_t *dead = calloc (job->count ? job->count : 1, 1);
	size_t left = job->count;

	if (!dead)
		return ph_fail (err, ENOMEM, "wait for the end of tasks");
	while (left > 0 && ph_now_us () < deadline)
		{
			for (size_t i = 0; i < job->count; i++)
				if (!dead[i] && is_reaped (job->tids[i]))
					{
						dead[i] = 1;
						left--;
					}
			if (left > 0)
				usleep (200);
		}
	free (dead);
	return left > 0 ? ph_fail (err, ETIMEDOUT, "wait for the end of %zu tasks", left) : 0;
}

int
ph_reap (struct ph_tracer *tracer, const int32_t *tids, size_t count, int timeout_ms, struct ph_error *err)
{
	struct tasks_job job = { tids, count, timeout_ms };

	return (int) ph_tracer_call (tracer, reap, &job, err);
}

static long
release (void *argument, struct ph_error *err)
{
	struct tasks_job *job = argument;

	for (size_t i = 0; i < job->count; i++)
		if (ptrace (PTRACE_SETOPTIONS, job->tids[i], 0, 0) < 0)
			return ph_fail (err, errno, "clear EXITKILL of task %d", job->tids[i]);
	for (size_t i = 0; i < job->count; i++)
		if (ptrace (PTRACE_DETACH, job->tids[i], 0, 0) < 0)
			return ph_fail (err, errno, "detach from task %d", job->tids[i]);
	return 0;
}

int
ph_release (struct ph_tracer *tracer, const int32_t *tids, size_t count, struct ph_error *err)
{
	struct tasks_job job = { tids, count, 0 };

	return (int) ph_tracer_call (tracer, release, &job, err);
}
