/* Ring interpreters, and wait for them, looking after the births and deaths that happen meanwhile. */
#include "tracer.h"

#include "ph_interp.h"

#include <errno.h>
#include <linux/futex.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define NAP_US 50

struct run_job {
	uint8_t *arena;
	const int32_t *slots, *tids;
	size_t count;
	int timeout_ms;
};

static struct ph_slot *
slot_of (const struct run_job *job, size_t index)
{
	return (struct ph_slot *) (job->arena + (uint64_t) job->slots[index] * PH_SLOT_SIZE);
}

static bool
is_awaited (const struct run_job *job, pid_t tid)
{
	for (size_t i = 0; i < job->count; i++)
		if (job->tids[i] == tid)
			return __atomic_load_n (&slot_of (job, i)->state, __ATOMIC_ACQUIRE) != PH_SLOT_DONE;
	return false;
}

int
trace_go_on (pid_t tid, int status, struct ph_error *err)
{
	char who[96];

	if (!WIFSTOPPED (status))
		return ph_fail (err, ECHILD, "task %d died (status %#x)", tid, status);
	int signal = WSTOPSIG (status), event = status >> 16;
	if (event == 0
	    && (signal == SIGSEGV || signal == SIGBUS || signal == SIGILL || signal == SIGFPE || signal == SIGTRAP
		|| signal == SIGSYS))
		{
			trace_describe (tid, who, sizeof (who));
			return ph_fail (err, ECHILD, "%s was hit by signal %d", who, signal);
		}
	if (ptrace (PTRACE_CONT, tid, 0, 0) < 0 && errno != ESRCH)
		return ph_fail (err, errno, "let task %d go on", tid);
	return 0;
}

/* Tasks whose programs are not waited for may end. */
static int
handle_event (const struct run_job *job, pid_t tid, int status, struct ph_error *err)
{
	return WIFSTOPPED (status) || is_awaited (job, tid) ? trace_go_on (tid, status, err) : 0;
}

static int
handle_events (const struct run_job *job, struct ph_error *err)
{
	for (;;)
		{
			int status;
			pid_t tid = waitpid (-1, &status, __WALL | WNOHANG | __WNOTHREAD);

			if (tid <= 0)
				return 0;
			if (handle_event (job, tid, status, err) < 0)
				return -1;
		}
}

void
ph_ring (void *arena, int slot)
{
	struct ph_slot *head = (struct ph_slot *) ((uint8_t *) arena + (uint64_t) slot * PH_SLOT_SIZE);

	__atomic_store_n (&head->state, PH_SLOT_RUN, __ATOMIC_RELEASE);
	syscall (SYS_futex, &head->state, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static void
nap (struct ph_slot *slot, uint32_t seen, long us)
{
	syscall (SYS_futex, &slot->state, FUTEX_WAIT, seen, &(struct timespec){ .tv_nsec = us * 1000 }, NULL, 0);
}

/* The last that was rung is likely to end last, and wakes us once. */
int
ph_run_wait (void *arena, const int32_t *slots, size_t count, int nap_us, int patience_us)
{
	const struct run_job job = { arena, slots, NULL, count, 0 };
	int64_t deadline = ph_now_us () + patience_us;
	size_t left = count;

	while (left > 0)
		{
			struct ph_slot *slot = slot_of (&job, left - 1);
			uint32_t state = __atomic_load_n (&slot->state, __ATOMIC_ACQUIRE);

			if (state == PH_SLOT_DONE)
				left--;
			else if (ph_now_us () > deadline)
				break;
			else
				nap (slot, state, nap_us);
		}
	return (int) left;
}

static long
run (void *argument, struct ph_error *err)
{
	struct run_job *job = argument;
	int64_t deadline = ph_now_us () + (int64_t) job->timeout_ms * 1000;
	size_t left = job->count;

	for (unsigned round = 0; left > 0; round++)
		{
			struct ph_slot *slot = slot_of (job, left - 1);
			uint32_t state = __atomic_load_n (&slot->state, __ATOMIC_ACQUIRE);

			if (state == PH_SLOT_DONE)
				{
					left--;
					continue;
				}
			if (state == PH_SLOT_LEFT)
				return ph_fail (err, ETIMEDOUT, "the interpreter of task %d had left", job->tids[left - 1]);
			if (round % 8 == 7 && handle_events (job, err) < 0)
				return -1;
			if (ph_now_us () > deadline)
				return ph_fail (err, ETIMEDOUT, "wait for a program of task %d", job->tids[left - 1]);
			if (round > 64)
				nap (slot, state, NAP_US);
		}
	return handle_events (job, err);
}

struct ph_running {
	struct ph_tracer *tracer;
	struct run_job job;
};

struct ph_running *
ph_run_begin (struct ph_tracer *tracer, void *arena, const int32_t *slots, const int32_t *tids, size_t count,
	      int timeout_ms, struct ph_error *err)
{
	struct ph_running *running = malloc (sizeof (*running));

	if (!running)
		{
			ph_fail (err, ENOMEM, "run %zu programs", count);
			return NULL;
		}
	*running = (struct ph_running){ tracer, { arena, slots, tids, count, timeout_ms } };
	ph_tracer_begin (tracer, run, &running->job, err);
	return running;
}

int
ph_run_end (struct ph_running *running)
{
	int result = (int) ph_tracer_end (running->tracer);

	free (running);
	return result;
}
