/* The tracer thread and the ptrace moves that the other files are made of. */
#include "tracer.h"

#include "cleanup.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define SPIN_US 60         /* for a job's end */
#define IDLE_SPIN_US 150   /* for the next job */
#define D_STATE_US 100000
#define SPINS 12   /* looks at a task that is about to stop, before it gets our CPU */
#define FIRST_LOOKS 3      /* after */
#define FIRST_LOOK_NS 50000l /* each: it may have no CPU */
#define LOOK_NS 10000000l /* from look to look at one that does not stop */
#define STOP_EVENT(status) ((unsigned) (status) >> 16)

struct ph_tracer {
	pthread_t thread;
	pthread_mutex_t call_lock;      /* one caller at a time */
	pthread_mutex_t lock;
	pthread_cond_t changed;
	ph_job job;
	void *args;
	struct ph_error *err;
	long result;
	bool pending, done, quit;
	timer_t alarm;          /* interrupts its waits, which have no time limit of their own */
	bool has_alarm;
	pid_t busy;             /* the caller, if it goes on meanwhile */
	int lent;               /* the processor that it was called to, -1 if it was not */
	cpu_set_t where;        /* it may run, but for that */
};

static _Thread_local struct ph_tracer *ourselves;

/* proc_pid_stat(5) of a task, as much of it as there is room for; empty if there is no such task. */
static void
read_stat (pid_t tid, char *line, size_t size)
{
	char path[64];

	snprintf (path, sizeof (path), "/proc/%d/stat", tid);
	cleanup_close int fd = open (path, O_RDONLY | O_CLOEXEC);
	ssize_t got = fd < 0 ? 0 : read (fd, line, size - 1);
	line[got > 0 ? got : 0] = '\0';
}

/* The processor that a task is on, or was on last (field 39); -1 if it cannot be told. */
static int
processor_of (pid_t tid)
{
	char line[1024];
	int processor = -1;

	read_stat (tid, line, sizeof (line));
	const char *field = strrchr (line, ')');
	for (int number = 2; field && number < 39; number++)
		field = strchr (field + 1, ' ');
	return field && sscanf (field, " %d", &processor) == 1 ? processor : -1;
}

void
trace_make_way (pid_t tid)
{
	struct ph_tracer *tracer = ourselves;
	int here = sched_getcpu (), there;
	cpu_set_t only;

	if (!tracer->busy || here < 0 || here >= CPU_SETSIZE || tracer->lent == here)
		return;
	there = processor_of (tid);
	if (there < 0 || there == here || there != (tracer->lent < 0 ? processor_of (tracer->busy) : tracer->lent)
	    || (tracer->lent < 0 && sched_getaffinity (tracer->busy, sizeof (tracer->where), &tracer->where) < 0))
		return;
	CPU_ZERO (&only);
	CPU_SET (here, &only);
	if (sched_setaffinity (tracer->busy, sizeof (only), &only) == 0)
		tracer->lent = here;
}

static void
free_caller (struct ph_tracer *tracer)
{
	if (tracer->lent >= 0)
		sched_setaffinity (tracer->busy, sizeof (tracer->where), &tracer->where);
	tracer->lent = -1;
}

/* Inside the freeze one job follows the other within microseconds: to sleep and be woken for each would cost more than
   the jobs. */
static void
spin_until (const bool *flag, int64_t us)
{
	for (int64_t end = ph_now_us () + us; !__atomic_load_n (flag, __ATOMIC_ACQUIRE) && ph_now_us () < end;)
		for (int i = 0; i < 32; i++)
			__builtin_ia32_pause ();
}

static void
wake_up (int signal)
{
	(void) signal;
}

/* A signal for this thread alone, in no way the process's own. Without it waits are naps. */
static void
make_alarm (struct ph_tracer *tracer)
{
	struct sigevent event = { .sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMAX };
	struct sigaction action = { .sa_handler = wake_up };
	sigset_t set;

	event._sigev_un._tid = (pid_t) syscall (SYS_gettid);
	sigemptyset (&set);
	sigaddset (&set, SIGRTMAX);
	tracer->has_alarm = sigaction (SIGRTMAX, &action, NULL) == 0 && pthread_sigmask (SIG_UNBLOCK, &set, NULL) == 0
			    && timer_create (CLOCK_MONOTONIC, &event, &tracer->alarm) == 0;
}

static void *
tracer_main (void *argument)
{
	struct ph_tracer *tracer = ourselves = argument;

	prctl (PR_SET_NAME, "phaul-tracer");
	prctl (PR_SET_TIMERSLACK, 1ul); /* its naps are of 20 us, the usual slack 50 */
	make_alarm (tracer);
	for (;;)
		{
			spin_until (&tracer->pending, IDLE_SPIN_US);
			pthread_mutex_lock (&tracer->lock);
			while (!tracer->pending && !tracer->quit)
				pthread_cond_wait (&tracer->changed, &tracer->lock);
			if (tracer->quit)
				break;
			tracer->pending = false;
			pthread_mutex_unlock (&tracer->lock);
			long result = tracer->job (tracer->args, tracer->err);
			free_caller (tracer);
			pthread_mutex_lock (&tracer->lock);
			tracer->result = result;
			__atomic_store_n (&tracer->done, true, __ATOMIC_RELEASE);
			pthread_cond_broadcast (&tracer->changed);
			pthread_mutex_unlock (&tracer->lock);
		}
	pthread_mutex_unlock (&tracer->lock);
	if (tracer->has_alarm)
		timer_delete (tracer->alarm);
	return NULL;
}

struct ph_tracer *
ph_tracer_new (struct ph_error *err)
{
	struct ph_tracer *tracer = calloc (1, sizeof (*tracer));

	if (!tracer)
		{
			ph_fail (err, ENOMEM, "tracer");
			return NULL;
		}
	tracer->lent = -1;
	pthread_mutex_init (&tracer->call_lock, NULL);
	pthread_mutex_init (&tracer->lock, NULL);
	pthread_cond_init (&tracer->changed, NULL);
	int failed = pthread_create (&tracer->thread, NULL, tracer_main, tracer);
	if (failed)
		{
			ph_fail (err, failed, "start the tracer thread");
			free (tracer);
			return NULL;
		}
	return tracer;
}

void
ph_tracer_free (struct ph_tracer *tracer)
{
	if (!tracer)
		return;
	pthread_mutex_lock (&tracer->lock);
	tracer->quit = true;
	pthread_cond_broadcast (&tracer->changed);
	pthread_mutex_unlock (&tracer->lock);
	pthread_join (tracer->thread, NULL);
	free (tracer);
}

static void
begin (struct ph_tracer *tracer, ph_job job, void *args, pid_t busy, struct ph_error *err)
{
	pthread_mutex_lock (&tracer->call_lock);
	pthread_mutex_lock (&tracer->lock);
	tracer->job = job;
	tracer->args = args;
	tracer->err = err;
	tracer->busy = busy;
	tracer->done = false;
	__atomic_store_n (&tracer->pending, true, __ATOMIC_RELEASE);
	pthread_cond_broadcast (&tracer->changed);
	pthread_mutex_unlock (&tracer->lock);
}

void
ph_tracer_begin (struct ph_tracer *tracer, ph_job job, void *args, struct ph_error *err)
{
	begin (tracer, job, args, (pid_t) syscall (SYS_gettid), err);
}

long
ph_tracer_end (struct ph_tracer *tracer)
{
	spin_until (&tracer->done, SPIN_US);
	pthread_mutex_lock (&tracer->lock);
	while (!tracer->done)
		pthread_cond_wait (&tracer->changed, &tracer->lock);
	long result = tracer->result;
	pthread_mutex_unlock (&tracer->lock);
	pthread_mutex_unlock (&tracer->call_lock);
	return result;
}

long
ph_tracer_call (struct ph_tracer *tracer, ph_job job, void *args, struct ph_error *err)
{
	begin (tracer, job, args, 0, err);
	return ph_tracer_end (tracer);
}

int64_t
ph_now_us (void)
{
	struct timespec now;

	clock_gettime (CLOCK_MONOTONIC, &now);
	return (int64_t) now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

void
trace_describe (pid_t tid, char *text, size_t size)
{
	char line[128];

	read_stat (tid, line, sizeof (line));
	char *open = strchr (line, '('), *close = strrchr (line, ')');
	if (!open || !close || close[1] != ' ')
		snprintf (text, size, "task %d", tid);
	else
		snprintf (text, size, "task %d %.*s in state %c", tid, (int) (close - open + 1), open, close[2]);
}

char
trace_state (pid_t tid)
{
	char who[96];

	trace_describe (tid, who, sizeof (who));
	return who[strlen (who) - 1];
}

static void
set_alarm (long nanoseconds)
{
	struct timespec every = { .tv_nsec = nanoseconds };

	timer_settime (ourselves->alarm, 0, &(struct itimerspec){ every, every }, NULL);
}

/* waitpid, which sleeps until the task has changed, but not for long: 0, or -1 with EINTR, if it has not. */
static pid_t
wait_a_while (pid_t tid, long nanoseconds, int *status)
{
	if (!ourselves->has_alarm)
		{
			nanosleep (&(struct timespec){ .tv_nsec = 20000 }, NULL);
			return waitpid (tid, status, __WALL | WNOHANG);
		}
	set_alarm (nanoseconds);
	pid_t got = waitpid (tid, status, __WALL);
	int reason = errno;
	set_alarm (0);
	errno = reason;
	return got;
}

/* Wait for any state change of `tid` until `deadline`. A task that needs the CPU that we run on gets it soon. */
static int
wait_change (pid_t tid, int64_t deadline, int *status, struct ph_error *err)
{
	char who[96];
	int64_t begun = ph_now_us ();

	for (unsigned round = 0;; round++)
		{
			long look = round < SPINS + FIRST_LOOKS ? FIRST_LOOK_NS : LOOK_NS;
			pid_t got = round < SPINS ? waitpid (tid, status, __WALL | WNOHANG) : wait_a_while (tid, look, status);
			if (got == tid)
				return 0;
			if (got < 0 && errno != EINTR)
				return ph_fail (err, ESRCH, "task %d is gone", tid);
			if (round >= SPINS)
				trace_make_way (tid);
			char state = round >= SPINS && ph_now_us () - begun > D_STATE_US ? trace_state (tid) : 0;
			if (state == 'Z') /* a leader, whose end is not told while we have other threads to reap */
				return ph_fail (err, ESRCH, "task %d has ended", tid);
			/* 'D' for so long: it is likely to wait for a task that we have stopped, as a vfork parent does */
			if (ph_now_us () > deadline || state == 'D')
				{
					trace_describe (tid, who, sizeof (who));
					return ph_fail (err, ETIMEDOUT, "%s does not stop", who);
				}
		}
}

int
trace_wait_stop (pid_t tid, int64_t deadline, int *stop_signal, struct ph_error *err)
{
	for (;;)
		{
			int status;

			if (wait_change (tid, deadline, &status, err) < 0)
				return -1;
			if (!WIFSTOPPED (status))
				return ph_fail (err, ESRCH, "task %d has ended", tid);
			if (STOP_EVENT (status) == PTRACE_EVENT_STOP)
				{
					if (stop_signal)
						*stop_signal = WSTOPSIG (status) == SIGTRAP ? 0 : WSTOPSIG (status);
					return 0;
				}
			/* a signal on its way to the task: pass it on, the stop follows */
			int signal = STOP_EVENT (status) ? 0 : WSTOPSIG (status);
			if (ptrace (PTRACE_CONT, tid, 0, signal) < 0)
				return ph_fail (err, errno, "let task %d take signal %d", tid, signal);
		}
}

int
trace_interrupt (pid_t tid, int64_t deadline, struct ph_error *err)
{
	if (ptrace (PTRACE_INTERRUPT, tid, 0, 0) < 0)
		return ph_fail (err, errno, "interrupt task %d", tid);
	return trace_wait_stop (tid, deadline, NULL, err);
}

int
trace_get_regs (pid_t tid, struct user_regs_struct *regs, struct ph_error *err)
{
	if (ptrace (PTRACE_GETREGS, tid, 0, regs) < 0)
		return ph_fail (err, errno, "read the registers of task %d", tid);
	return 0;
}

int
trace_set_regs (pid_t tid, const struct user_regs_struct *regs, struct ph_error *err)
{
	if (ptrace (PTRACE_SETREGS, tid, 0, regs) < 0)
		return ph_fail (err, errno, "write the registers of task %d", tid);
	return 0;
}

int
trace_set_mask (pid_t tid, uint64_t mask, struct ph_error *err)
{
	if (ptrace (PTRACE_SETSIGMASK, tid, sizeof (mask), &mask) < 0)
		return ph_fail (err, errno, "set the signal mask of task %d", tid);
	return 0;
}

static int
go_on (pid_t tid, enum __ptrace_request how, struct ph_error *err)
{
	return ptrace (how, tid, 0, 0) < 0 ? ph_fail (err, errno, "let task %d run", tid) : 0;
}

static int
next_stop (pid_t tid, int *status, struct ph_error *err)
{
	if (wait_change (tid, ph_now_us () + 5000000, status, err) < 0)
		return -1;
	return WIFSTOPPED (*status) ? 0 : ph_fail (err, ESRCH, "task %d has ended", tid);
}

/* The stops used here are the entry of the call and PTRACE_EVENT_STOP after it: a single-step would be a
   signal-delivery-stop, whose SIGTRAP hits the program if we die there; and from the exit of a call the kernel does
   not look at the registers' restart codes again (arch_do_signal_or_restart), which from an event stop it does. */
int
trace_call_begin (pid_t tid, const struct user_regs_struct *regs, struct ph_error *err)
{
	if (trace_set_regs (tid, regs, err) < 0 || trace_set_mask (tid, ~0ull, err) < 0)
		return -1;
	return go_on (tid, PTRACE_SYSCALL, err);
}

int
trace_call_enter (pid_t tid, bool *held_stop, struct ph_error *err)
{
	int status;

	*held_stop = false;
	for (int tries = 0;; tries++)
		{
			if (next_stop (tid, &status, err) < 0)
				return -1;
			if (STOP_EVENT (status) == 0 && WSTOPSIG (status) == (SIGTRAP | 0x80))
				break;
			/* SIGSTOP cannot be blocked: it shows first, and the call has not been made */
			if (STOP_EVENT (status) == 0 && WSTOPSIG (status) == SIGSTOP)
				*held_stop = true;
			else if (STOP_EVENT (status) != PTRACE_EVENT_STOP || tries > 8)
				return ph_fail (err, EIO, "task %d stops with status %#x in place of a call", tid, status);
			if (go_on (tid, PTRACE_SYSCALL, err) < 0)
				return -1;
		}
	if (ptrace (PTRACE_INTERRUPT, tid, 0, 0) < 0)
		return ph_fail (err, errno, "interrupt task %d", tid);
	return go_on (tid, PTRACE_CONT, err);
}

int
trace_call_end (pid_t tid, bool held_stop, long *result, struct ph_error *err)
{
	struct user_regs_struct after;
	int status;

	if (next_stop (tid, &status, err) < 0)
		return -1;
	if (STOP_EVENT (status) != PTRACE_EVENT_STOP)
		return ph_fail (err, EIO, "task %d stops with status %#x after a call", tid, status);
	if (trace_get_regs (tid, &after, err) < 0)
		return -1;
	*result = (long) after.rax;
	if (held_stop)
		kill (tid, SIGSTOP);
	return 0;
}

int
trace_call (pid_t tid, const struct user_regs_struct *regs, long *result, struct ph_error *err)
{
	bool held_stop;

	if (trace_call_begin (tid, regs, err) < 0 || trace_call_enter (tid, &held_stop, err) < 0)
		return -1;
	return trace_call_end (tid, held_stop, result, err);
}
