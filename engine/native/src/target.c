/* A tree at the source: stop it, read its threads, let it go. */
#include "tracer.h"

#include "cleanup.h"

#include <asm/unistd.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef PTRACE_O_SUSPEND_SECCOMP
#define PTRACE_O_SUSPEND_SECCOMP (1 << 21)
#endif
#define MAX_PASSES 64
#define LET_GO_ROUNDS 1000      /* of a millisecond */

struct stop_tree {
	const int32_t *roots;
	size_t root_count;
	long options;
	int timeout_ms;
	struct ph_task *tasks;
	size_t capacity, count;
	int64_t deadline;
};

static bool
known (const struct stop_tree *tree, int tid)
{
	for (size_t i = 0; i < tree->count; i++)
		if (tree->tasks[i].tid == tid)
			return true;
	return false;
}

static char
proc_state (int pid, int tid)
{
	char path[64], line[512];
	cleanup_close int fd = -1;

	snprintf (path, sizeof (path), "/proc/%d/task/%d/stat", pid, tid);
	fd = open (path, O_RDONLY | O_CLOEXEC);
	ssize_t got = fd < 0 ? -1 : read (fd, line, sizeof (line) - 1);
	if (got <= 0)
		return 0;
	line[got] = 0;
	char *close = strrchr (line, ')');
	return close && close[1] == ' ' ? close[2] : 0;
}

/* Seize and interrupt one task; 0 = it is gone, 1 = it is on the list. */
static int
add_task (struct stop_tree *tree, int pid, int tid, struct ph_error *err)
{
	struct ph_task task = { .pid = pid, .tid = tid };

	if (tree->count == tree->capacity)
		return ph_fail (err, ENOBUFS, "the tree has more than %zu tasks", tree->capacity);
	long options = tree->options | PTRACE_O_TRACESYSGOOD;
	if (ptrace (PTRACE_SEIZE, tid, 0, (void *) (options | PTRACE_O_SUSPEND_SECCOMP)) < 0
	    && (errno != EINVAL || ptrace (PTRACE_SEIZE, tid, 0, (void *) options) < 0))
		{
			int code = errno;
			char state = proc_state (pid, tid), who[96];

			if (state == 'Z' || state == 'X')
				{
					task.state = PH_TASK_ZOMBIE;
					tree->tasks[tree->count++] = task;
					return 1;
				}
			if (code == ESRCH || state == 0)
				return 0;
			trace_describe (tid, who, sizeof (who));
			return ph_fail (err, code, "seize %s", who);
		}
	task.state = PH_TASK_STOPPED;
	tree->tasks[tree->count++] = task;
	if (ptrace (PTRACE_INTERRUPT, tid, 0, 0) < 0)
		return ph_fail (err, errno, "interrupt task %d", tid);
	return 1;
}

/* Seize the threads of `pid` that are not on the list yet; returns how many. */
static int
add_threads (struct stop_tree *tree, int pid, struct ph_error *err)
{
	char path[64];
	int added = 0;

	snprintf (path, sizeof (path), "/proc/%d/task", pid);
	cleanup_closedir DIR *dir = opendir (path);
	if (!dir)
		return 0;
	for (struct dirent *entry = readdir (dir); entry; entry = readdir (dir))
		{
			int tid = atoi (entry->d_name);

			if (tid <= 0 || known (tree, tid))
				continue;
			int got = add_task (tree, pid, tid, err);
			if (got < 0)
				return -1;
			added += got;
		}
	return added;
}

/* Add the children of every listed task; returns how many tasks are new. */
static int
add_children (struct stop_tree *tree, struct ph_error *err)
{
	int added = 0;

	for (size_t i = 0; i < tree->count; i++)
		{
			char path[80], text[4096];

			snprintf (path, sizeof (path), "/proc/%d/task/%d/children", tree->tasks[i].pid, tree->tasks[i].tid);
			cleanup_close int fd = open (path, O_RDONLY | O_CLOEXEC);
			size_t used = 0;
			for (ssize_t got; fd >= 0 && (got = read (fd, text + used, sizeof (text) - 1 - used)) > 0;)
				{
					char *at = text, *end;

					used += (size_t) got;
					text[used] = 0;
					for (long child; (end = strchr (at, ' ')) != NULL; at = end + 1)
						{
							child = strtol (at, NULL, 10);
							if (child <= 0 || known (tree, (int) child))
								continue;
							int more = add_threads (tree, (int) child, err);
							if (more < 0)
								return -1;
							added += more;
						}
					used = strlen (at);
					memmove (text, at, used);
				}
		}
	return added;
}

/* Wait until every listed task from `first` on stands; those that have ended are taken off. */
static int
wait_all (struct stop_tree *tree, size_t first, struct ph_error *err)
{
	size_t kept = first;

	for (size_t i = first; i < tree->count; i++)
		{
			struct ph_task task = tree->tasks[i];

			if (task.state != PH_TASK_ZOMBIE
			    && trace_wait_stop (task.tid, tree->deadline, &task.stop_signal, err) < 0)
				{
					if (err->code != ESRCH)
						return -1;
					char state = proc_state (task.pid, task.tid);
					if (state != 'Z')
						continue;
					task.state = PH_TASK_ZOMBIE;
				}
			if (task.stop_signal)
				task.state = PH_TASK_JOB_STOPPED;
			tree->tasks[kept++] = task;
		}
	tree->count = kept;
	return 0;
}

/* Calls that can give EINTR after any stop, without the kernel restarting them (signal(7), "Interruption of system calls
   ... by stop signals"): on sockets where a time limit is set for them, select and its like where their time limit
   stands in memory that the kernel cannot write. */
static bool
restarts_by_hand (uint64_t nr)
{
	switch (nr)
		{
		case __NR_epoll_wait:
		case __NR_epoll_pwait:
		case __NR_epoll_pwait2:
		case __NR_select:
		case __NR_pselect6:
		case __NR_ppoll:
		case __NR_rt_sigtimedwait:
		case __NR_semop:
		case __NR_semtimedop:
		case __NR_io_getevents:
		case __NR_io_pgetevents:
		case __NR_read:
		case __NR_readv:
		case __NR_recvfrom:
		case __NR_recvmsg:
		case __NR_recvmmsg:
		case __NR_accept:
		case __NR_accept4:
		case __NR_connect:
		case __NR_write:
		case __NR_writev:
		case __NR_sendto:
		case __NR_sendmsg:
		case __NR_sendmmsg:
		case __NR_sendfile:
		case __NR_splice:
		case __NR_msgrcv:
		case __NR_msgsnd:
			return true;
		default:
			return false;
		}
}

static bool
is_cut_short (const struct user_regs_struct *regs)
{
	return (long) regs->orig_rax >= 0 && (long) regs->rax == -EINTR && restarts_by_hand (regs->orig_rax);
}

/* Note in which queues signals wait for a thread. Returns whether one of them is not blocked. */
static bool
look_at_signals (struct ph_thread_state *state)
{
	siginfo_t infos[32];
	bool deliverable = false;

	state->queued = 0;
	for (unsigned shared = 0; shared < 2; shared++)
		{
			struct __ptrace_peeksiginfo_args args
				= { .flags = shared ? PTRACE_PEEKSIGINFO_SHARED : 0, .nr = 32 };
			long got = ptrace (PTRACE_PEEKSIGINFO, state->tid, &args, infos);

			if (got > 0)
				state->queued |= 1u << shared;
			for (long i = 0; i < got; i++)
				deliverable |= !(state->sigmask & (1ull << (infos[i].si_signo - 1)));
		}
	return deliverable;
}

static int
take_back_eintr (struct ph_thread_state *state, struct user_regs_struct *regs, struct ph_error *err)
{
	if (look_at_signals (state) || !is_cut_short (regs))
		return 0;
	regs->rip -= 2;
	regs->rax = regs->orig_rax;
	regs->orig_rax = ~0ull;
	state->restarted = 1;
	return trace_set_regs (state->tid, regs, err);
}

/* The same for a task that is let go before its state was asked for. */
static void
spare_eintr (pid_t tid)
{
	struct ph_thread_state state = { .tid = tid };
	struct user_regs_struct regs;
	struct ph_error unread;

	if (trace_get_regs (tid, &regs, &unread) == 0 && is_cut_short (&regs)
	    && ptrace (PTRACE_GETSIGMASK, tid, sizeof (state.sigmask), &state.sigmask) == 0)
		take_back_eintr (&state, &regs, &unread);
}

/* Detach from one task if it stands; what stopped it instead of us reaches it. */
static bool
detach_standing (const struct ph_task *task)
{
	int status = 0;

	if (task->state == PH_TASK_ZOMBIE)
		return true;
	spare_eintr (task->tid);
	if (ptrace (PTRACE_DETACH, task->tid, 0, 0) == 0)
		return true;
	pid_t got = waitpid (task->tid, &status, __WALL | WNOHANG);
	if (got < 0 || (got > 0 && !WIFSTOPPED (status)))
		return true;
	bool signal = got > 0 && (unsigned) status >> 16 == 0;
	if (got > 0 && !signal)
		spare_eintr (task->tid);
	return got > 0 && ptrace (PTRACE_DETACH, task->tid, 0, signal ? WSTOPSIG (status) : 0) == 0;
}

/* A task that does not stand yet may be waiting for another of the list (a vfork parent for its child): so all that
   stand go first, and the rest gets a moment. What sleeps uninterruptibly for longer is let go when this thread ends. */
static void
let_go (struct ph_task *tasks, size_t count)
{
	for (int round = 0; round < LET_GO_ROUNDS && count > 0; round++)
		{
			size_t left = 0;

			for (size_t i = 0; i < count; i++)
				if (!detach_standing (&tasks[i]))
					tasks[left++] = tasks[i];
			count = left;
			if (count > 0)
				usleep (1000);
		}
}

static int
by_process (const void *left, const void *right)
{
	const struct ph_task *a = left, *b = right;

	if (a->pid != b->pid)
		return 0;
	return a->tid == a->pid ? -1 : b->tid == b->pid ? 1 : a->tid - b->tid;
}

/* Group threads by process, leader first, processes in the order found. */
static void
sort_tasks (struct stop_tree *tree)
{
	for (size_t i = 1; i < tree->count; i++)
		{
			struct ph_task task = tree->tasks[i];
			size_t first = i, to = i;

			for (size_t j = 0; j < i; j++)
				if (tree->tasks[j].pid == task.pid)
					{
						first = j;
						break;
					}
			if (first == i)
				continue;
			for (to = first; to < i && tree->tasks[to].pid == task.pid && by_process (&tree->tasks[to], &task) <= 0;)
				to++;
			memmove (&tree->tasks[to + 1], &tree->tasks[to], (i - to) * sizeof (task));
			tree->tasks[to] = task;
		}
}

static long
stop_tree (void *argument, struct ph_error *err)
{
	struct stop_tree *tree = argument;

	tree->deadline = ph_now_us () + (int64_t) tree->timeout_ms * 1000;
	int added = 0;
	for (size_t i = 0; i < tree->root_count && added >= 0; i++)
		{
			int more = add_threads (tree, tree->roots[i], err);
			added = more < 0 ? -1 : added + more;
		}
	if (added == 0)
		return ph_fail (err, ESRCH, "process %d", tree->root_count ? tree->roots[0] : 0);
	for (int pass = 0; added > 0 && pass < MAX_PASSES; pass++)
		{
			if (wait_all (tree, tree->count - (size_t) added, err) < 0)
				{
					added = -1;
					break;
				}
			int more = 0;
			for (size_t i = 0; i < tree->count && more >= 0; i++)
				if (tree->tasks[i].tid == tree->tasks[i].pid)
					{
						int got = add_threads (tree, tree->tasks[i].pid, err);
						more = got < 0 ? -1 : more + got;
					}
			int children = more < 0 ? -1 : add_children (tree, err);
			added = children < 0 ? -1 : more + children;
		}
	if (added != 0)
		{
			let_go (tree->tasks, tree->count);
			return added < 0 ? -1 : ph_fail (err, EAGAIN, "the tree keeps growing");
		}
	sort_tasks (tree);
	return (long) tree->count;
}

long
ph_stop_tree (struct ph_tracer *tracer, int root, int timeout_ms, struct ph_task *tasks, size_t capacity,
	      struct ph_error *err)
{
	const int32_t roots[] = { root };
	struct stop_tree tree
		= { .roots = roots, .root_count = 1, .timeout_ms = timeout_ms, .tasks = tasks, .capacity = capacity };

	return ph_tracer_call (tracer, stop_tree, &tree, err);
}

long
ph_stop_doomed (struct ph_tracer *tracer, const int32_t *pids, size_t pid_count, int timeout_ms, struct ph_task *tasks,
		size_t capacity, struct ph_error *err)
{
	struct stop_tree tree = { .roots = pids, .root_count = pid_count, .options = PTRACE_O_EXITKILL,
				  .timeout_ms = timeout_ms, .tasks = tasks, .capacity = capacity };

	return ph_tracer_call (tracer, stop_tree, &tree, err);
}

struct tid_list {
	const int32_t *tids;
	size_t count;
};

static long
detach (void *argument, struct ph_error *err)
{
	struct tid_list *list = argument;

	for (size_t i = 0; i < list->count; i++)
		if (ptrace (PTRACE_DETACH, list->tids[i], 0, 0) < 0 && errno != ESRCH)
			return ph_fail (err, errno, "detach from task %d", list->tids[i]);
	return 0;
}

int
ph_detach (struct ph_tracer *tracer, const int32_t *tids, size_t count, struct ph_error *err)
{
	struct tid_list list = { tids, count };

	return (int) ph_tracer_call (tracer, detach, &list, err);
}

struct rseq_configuration {
	uint64_t address;
	uint32_t size, signature, flags, pad;
};
#ifndef PTRACE_GET_RSEQ_CONFIGURATION
#define PTRACE_GET_RSEQ_CONFIGURATION 0x420f
#endif

struct rseq_section {
	uint32_t version, flags;
	uint64_t start, length, abort;
};

/* A thread inside a restartable sequence goes to its abort handler, as after any preemption: the section's
   descriptor would be forgotten by what is injected and by the registration on the other side. */
static int
leave_rseq (struct ph_thread_state *state, struct user_regs_struct *regs, struct ph_error *err)
{
	uint64_t address = 0;
	struct rseq_section section;
	struct iovec here = { &address, sizeof (address) }, there = { (void *) (state->rseq_address + 8), sizeof (address) };

	if (!state->rseq_address || process_vm_readv (state->tid, &here, 1, &there, 1, 0) != sizeof (address) || !address)
		return 0;
	here = (struct iovec){ &section, sizeof (section) };
	there = (struct iovec){ (void *) address, sizeof (section) };
	if (process_vm_readv (state->tid, &here, 1, &there, 1, 0) != sizeof (section)
	    || regs->rip - section.start >= section.length)
		return 0;
	regs->rip = section.abort;
	return trace_set_regs (state->tid, regs, err);
}

#ifndef PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG
#define PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG 0x4211
#endif
#ifndef NT_386_IOPERM
#define NT_386_IOPERM 0x201
#endif

/* What the kernel does not know or show is taken for absent. */
static uint32_t
look_for_peculiarities (int tid)
{
	struct {
		uint64_t mode, selector, offset, size;
	} dispatch = { 0 };
	uint64_t ports[16];
	struct iovec iov = { ports, sizeof (ports) };
	uint32_t found = 0;

	if (ptrace (PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, sizeof (dispatch), &dispatch) == 0 && dispatch.mode)
		found |= PH_PECULIAR_DISPATCH;
	if (ptrace (PTRACE_GETREGSET, tid, (void *) (long) NT_386_IOPERM, &iov) == 0)
		found |= PH_PECULIAR_PORTS;
	return found;
}

static int
get_state (struct ph_thread_state *state, struct ph_error *err)
{
	struct user_regs_struct regs;
	struct iovec iov = { state->xstate, sizeof (state->xstate) };
	struct rseq_configuration rseq = { 0 };
	size_t robust_size = 0;
	void *robust = NULL;

	if (ptrace (PTRACE_GETSIGMASK, state->tid, sizeof (state->sigmask), &state->sigmask) < 0)
		return ph_fail (err, errno, "read the signal mask of task %d", state->tid);
	if (trace_get_regs (state->tid, &regs, err) < 0 || take_back_eintr (state, &regs, err) < 0)
		return -1;
	if (ptrace (PTRACE_GET_RSEQ_CONFIGURATION, state->tid, sizeof (rseq), &rseq) > 0)
		{
			state->rseq_address = rseq.address;
			state->rseq_size = rseq.size;
			state->rseq_signature = rseq.signature;
			state->rseq_flags = rseq.flags;
		}
	if (leave_rseq (state, &regs, err) < 0)
		return -1;
	state->peculiar = look_for_peculiarities (state->tid);
	memcpy (state->regs, &regs, sizeof (regs));
	if (ptrace (PTRACE_GETREGSET, state->tid, (void *) (long) NT_X86_XSTATE, &iov) < 0)
		return ph_fail (err, errno, "read the extended state of task %d", state->tid);
	state->xstate_size = (uint32_t) iov.iov_len;
	if (syscall (SYS_get_robust_list, state->tid, &robust, &robust_size) == 0)
		{
			state->robust_head = (uint64_t) robust;
			state->robust_size = robust_size;
		}
	return 0;
}

struct state_list {
	struct ph_thread_state *states;
	size_t count;
};

static long
get_states (void *argument, struct ph_error *err)
{
	struct state_list *list = argument;

	for (size_t i = 0; i < list->count; i++)
		if (get_state (&list->states[i], err) < 0)
			return -1;
	return 0;
}

int
ph_get_states (struct ph_tracer *tracer, struct ph_thread_state *states, size_t count, struct ph_error *err)
{
	struct state_list list = { states, count };

	return (int) ph_tracer_call (tracer, get_states, &list, err);
}

int
trace_set_state (const struct ph_thread_state *state, struct ph_error *err)
{
	struct iovec iov = { (void *) state->xstate, state->xstate_size };

	if (state->xstate_size && ptrace (PTRACE_SETREGSET, state->tid, (void *) (long) NT_X86_XSTATE, &iov) < 0)
		return ph_fail (err, errno, "write the extended state of task %d", state->tid);
	if (trace_set_regs (state->tid, (const struct user_regs_struct *) state->regs, err) < 0)
		return -1;
	return trace_set_mask (state->tid, state->sigmask, err);
}

static long
set_states (void *argument, struct ph_error *err)
{
	struct state_list *list = argument;

	for (size_t i = 0; i < list->count; i++)
		if (trace_set_state (&list->states[i], err) < 0)
			return -1;
	return 0;
}

int
ph_set_states (struct ph_tracer *tracer, const struct ph_thread_state *states, size_t count, struct ph_error *err)
{
	struct state_list list = { (struct ph_thread_state *) states, count };

	return (int) ph_tracer_call (tracer, set_states, &list, err);
}

struct peek {
	int tid, shared;
	void *buffer;
	size_t capacity;
};

static long
peek_signals (void *argument, struct ph_error *err)
{
	struct peek *peek = argument;
	size_t count = 0;

	while (count < peek->capacity)
		{
			struct __ptrace_peeksiginfo_args args
				= { .off = count, .flags = peek->shared ? PTRACE_PEEKSIGINFO_SHARED : 0,
				    .nr = (int32_t) (peek->capacity - count) };
			long got = ptrace (PTRACE_PEEKSIGINFO, peek->tid, &args, (siginfo_t *) peek->buffer + count);

			if (got < 0)
				return ph_fail (err, errno, "read the queued signals of task %d", peek->tid);
			if (got == 0)
				break;
			count += (size_t) got;
		}
	return (long) count;
}

long
ph_peek_signals (struct ph_tracer *tracer, int tid, int shared, void *siginfos, size_t capacity, struct ph_error *err)
{
	struct peek peek = { tid, shared, siginfos, capacity };

	return ph_tracer_call (tracer, peek_signals, &peek, err);
}

static long
seccomp_filter (void *argument, struct ph_error *err)
{
	struct peek *peek = argument;
	long length = ptrace (PTRACE_SECCOMP_GET_FILTER, peek->tid, (void *) (long) peek->shared, NULL);

	if (length < 0)
		{
			if (errno == ENOENT || errno == EINVAL) /* no more, or a task that has none at all */
				return 0;
			return ph_fail (err, errno, "read seccomp filter %d of task %d", peek->shared, peek->tid);
		}
	if ((size_t) length > peek->capacity)
		return ph_fail (err, ENOBUFS, "a seccomp filter of %ld instructions", length);
	if (ptrace (PTRACE_SECCOMP_GET_FILTER, peek->tid, (void *) (long) peek->shared, peek->buffer) < 0)
		return ph_fail (err, errno, "read seccomp filter %d of task %d", peek->shared, peek->tid);
	return length;
}

long
ph_seccomp_filter (struct ph_tracer *tracer, int tid, unsigned index, void *instructions, size_t capacity,
		   struct ph_error *err)
{
	struct peek peek = { tid, (int) index, instructions, capacity };

	return ph_tracer_call (tracer, seccomp_filter, &peek, err);
}

static long
seccomp_flags (void *argument, struct ph_error *err)
{
	struct peek *peek = argument;
	struct __ptrace_seccomp_metadata told = { .filter_off = (uint64_t) peek->shared };

	if (ptrace (PTRACE_SECCOMP_GET_METADATA, peek->tid, (void *) sizeof (told), &told) < 0)
		return ph_fail (err, errno, "read the flags of seccomp filter %d of task %d", peek->shared, peek->tid);
	return (long) told.flags;
}

long
ph_seccomp_flags (struct ph_tracer *tracer, int tid, unsigned index, struct ph_error *err)
{
	struct peek peek = { tid, (int) index, NULL, 0 };

	return ph_tracer_call (tracer, seccomp_flags, &peek, err);
}
