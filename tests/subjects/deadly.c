/* A library to be preloaded: the process dies by kill -9 before its n-th act on another process.
 *
 * Acts are ptrace(2) and writes into another's memory. Instead of letting a task run on, it can have it make single
 * steps first; the task stands after the last of them when the tracer dies, as it would have at that instant.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long countdown = -1, steps = -1, done;
static int told;

/* Die before act `n`, counted from 0; -1 = never. With `how_many` >= 0 that act is the n-th PTRACE_CONT. How many steps
   were made then goes to the descriptor `report`. */
void
deadly_arm (long n, long how_many, int report)
{
	countdown = n;
	steps = how_many;
	done = 0;
	told = report;
}

/* How many acts there have been since. */
long
deadly_count (void)
{
	return done;
}

static void
die (long made)
{
	dprintf (told, "%ld", made);
	kill (getpid (), SIGKILL);
	for (;;)
		pause ();
}

static void
count (void)
{
	done++;
	if (steps < 0 && countdown-- == 0)
		die (0);
}

static long
really (enum __ptrace_request request, pid_t pid, void *addr, void *data)
{
	static long (*next) (enum __ptrace_request, ...);

	if (!next)
		*(void **) &next = dlsym (RTLD_NEXT, "ptrace");
	return next (request, pid, addr, data);
}

/* Whether a task sleeps in a call: on a busy machine one that does not may wait long for a processor. */
static bool
sleeps (pid_t tid)
{
	char path[32], text[128] = "";
	const char *end;
	FILE *file;

	snprintf (path, sizeof path, "/proc/%d/stat", tid);
	file = fopen (path, "r");
	if (!file)
		return true;
	end = fgets (text, sizeof text, file) ? strrchr (text, ')') : NULL;
	fclose (file);
	return !end || end[2] == 'S' || end[2] == 'D';
}

/* Wait for a stop, until the task has slept for 50 ms. */
static bool
stopped (pid_t tid)
{
	for (int asleep = 0; asleep < 500; asleep = sleeps (tid) ? asleep + 1 : 0)
		{
			int status;

			if (waitpid (tid, &status, __WALL | WNOHANG) == tid)
				return WIFSTOPPED (status);
			nanosleep (&(struct timespec){ .tv_nsec = 100000 }, NULL);
		}
	return false;
}

/* Let the task stand, or sleep, as without a step: of one that dies in the stop of a step the SIGTRAP would be its own,
   and the flag that makes it would stay. From there to an event stop it makes no instruction. */
static void
forget_step (pid_t tid)
{
	if (really (PTRACE_INTERRUPT, tid, NULL, NULL) == 0 && really (PTRACE_CONT, tid, NULL, NULL) == 0)
		stopped (tid);
}

static void
step_and_die (pid_t tid)
{
	for (long i = 0; i < steps; i++)
		if (really (PTRACE_SINGLESTEP, tid, NULL, NULL) < 0 || !stopped (tid))
			{ /* it sleeps in a call, and does so again when it has stood, for the interruption and for the step */
				really (PTRACE_INTERRUPT, tid, NULL, NULL);
				while (stopped (tid))
					really (PTRACE_CONT, tid, NULL, NULL);
				die (i);
			}
	if (steps > 0)
		forget_step (tid);
	die (steps);
}

long
ptrace (enum __ptrace_request request, ...)
{
	va_list arguments;

	va_start (arguments, request);
	pid_t pid = va_arg (arguments, pid_t);
	void *addr = va_arg (arguments, void *), *data = va_arg (arguments, void *);
	va_end (arguments);
	if (steps >= 0 && request == PTRACE_CONT && countdown-- == 0)
		step_and_die (pid);
	count ();
	return really (request, pid, addr, data);
}

ssize_t
process_vm_writev (pid_t pid, const struct iovec *here, unsigned long n, const struct iovec *there, unsigned long m,
		   unsigned long flags)
{
	static ssize_t (*next) (pid_t, const struct iovec *, unsigned long, const struct iovec *, unsigned long,
				unsigned long);

	if (!next)
		*(void **) &next = dlsym (RTLD_NEXT, "process_vm_writev");
	count ();
	return next (pid, here, n, there, m, flags);
}

ssize_t
pwrite (int fd, const void *buffer, size_t size, off_t offset)
{
	static ssize_t (*next) (int, const void *, size_t, off_t);

	if (!next)
		*(void **) &next = dlsym (RTLD_NEXT, "pwrite");
	count ();
	return next (fd, buffer, size, offset);
}
