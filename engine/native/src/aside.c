/* Threads out of code that will not be the same on the other side: the vDSO.
 *
 * A single-step would be a signal-delivery-stop, whose SIGTRAP kills the program
 * if we die there. So a thread runs on to its next system call, which is taken
 * back, or to an interruption; every stop on the way is one that it survives
 * without us.
 */
#include "tracer.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/wait.h>

#define STOP_EVENT(status) ((unsigned) (status) >> 16)
#define SYSCALL_STOP (SIGTRAP | 0x80)
#define FIRST_RUN_US 2
#define LONGEST_RUN_US 8000

struct aside_job {
	const int32_t *tids;
	const uint64_t *bounds;
	size_t count;
	int timeout_ms;
};

/* Wait for a stop until `deadline`; past it, if `patient` says so, interrupt and wait on. */
static int
wait_or_interrupt (int tid, int64_t deadline, int *status, struct ph_error *err)
{
	int64_t last = ph_now_us () + 1000000;

	for (bool asked = false;;)
		{
			pid_t got = waitpid (tid, status, __WALL | WNOHANG);
			if (got == tid && WIFSTOPPED (*status))
				return 0;
			if (got == tid || (got < 0 && errno != EINTR))
				return ph_fail (err, ESRCH, "task %d is gone", tid);
			if (!asked && ph_now_us () >= deadline)
				{
					if (ptrace (PTRACE_INTERRUPT, tid, 0, 0) < 0)
						return ph_fail (err, errno, "interrupt task %d", tid);
					asked = true;
				}
			if (ph_now_us () > last)
				return ph_fail (err, ETIMEDOUT, "task %d does not stop", tid);
			sched_yield ();
		}
}

static bool
enters_call (int tid)
{
	struct __ptrace_syscall_info info;

	return ptrace (PTRACE_GET_SYSCALL_INFO, tid, sizeof (info), &info) > 0 && info.op == PTRACE_SYSCALL_INFO_ENTRY;
}

/* From the entry of a call back to the instruction that makes it, in one write: before it the call is made, after it
   the instruction is run again. */
static int
take_back_call (int tid, struct user_regs_struct *regs, struct ph_error *err)
{
	regs->rip -= 2;
	regs->rax = regs->orig_rax;
	regs->orig_rax = ~0ull;
	if (trace_set_regs (tid, regs, err) < 0)
		return -1;
	if (ptrace (PTRACE_INTERRUPT, tid, 0, 0) < 0 || ptrace (PTRACE_CONT, tid, 0, 0) < 0)
		return ph_fail (err, errno, "let task %d out of a call", tid);
	return trace_wait_stop (tid, ph_now_us () + 1000000, NULL, err);
}

static int
aside_one (int tid, uint64_t start, uint64_t end, int64_t deadline, struct ph_error *err)
{
	struct user_regs_struct regs, before;
	int64_t run = FIRST_RUN_US;
	int status, signal = 0;

	if (trace_get_regs (tid, &regs, err) < 0)
		return -1;
	while (regs.rip - start < end - start)
		{
			if (ph_now_us () > deadline)
				return ph_fail (err, ETIMEDOUT, "task %d stays in %lx-%lx", tid, start, end);
			if (ptrace (PTRACE_SYSCALL, tid, 0, signal) < 0)
				return ph_fail (err, errno, "let task %d run", tid);
			signal = 0;
			before = regs;
			if (wait_or_interrupt (tid, ph_now_us () + run, &status, err) < 0 || trace_get_regs (tid, &regs, err) < 0)
				return -1;
			bool moved = memcmp (&before, &regs, sizeof (regs)) != 0;
			if (STOP_EVENT (status) == PTRACE_EVENT_STOP && WSTOPSIG (status) != SIGTRAP)
				return ph_fail (err, EAGAIN, "task %d was stopped by signal %d", tid, WSTOPSIG (status));
			if (STOP_EVENT (status) == 0 && WSTOPSIG (status) != SYSCALL_STOP)
				{
					signal = WSTOPSIG (status);
					regs.rip = start;       /* not yet: the signal has to be taken first */
				}
			else if (STOP_EVENT (status) == 0 && enters_call (tid) && regs.rip - 2 - start >= end - start)
				return take_back_call (tid, &regs, err);
			else if (STOP_EVENT (status) == 0)
				regs.rip = start;       /* a call of this code's own: through it */
			/* one that was stopped again before a CPU took it up gets more time */
			run = moved || run >= LONGEST_RUN_US ? FIRST_RUN_US : run * 2;
		}
	return 0;
}

static long
aside (void *argument, struct ph_error *err)
{
	struct aside_job *job = argument;
	int64_t deadline = ph_now_us () + (int64_t) job->timeout_ms * 1000;

	for (size_t i = 0; i < job->count; i++)
		if (aside_one (job->tids[i], job->bounds[2 * i], job->bounds[2 * i + 1], deadline, err) < 0)
			return -1;
	return 0;
}

int
ph_step_aside (struct ph_tracer *tracer, const int32_t *tids, const uint64_t *bounds, size_t count, int timeout_ms,
	       struct ph_error *err)
{
	struct aside_job job = { tids, bounds, count, timeout_ms };

	return (int) ph_tracer_call (tracer, aside, &job, err);
}
