/* Process 1 of a PID namespace that was made for a tree (--pidns).
 *
 * Its argument is the number of the tree's first process. It reaps whatever is left to it, passes on signals that are
 * sent to it, and ends when nothing is left, as that process ended (the exit status, or 128 and the signal's number).
 * It is executed with all signals blocked, which is how they get here: process 1 ignores those that it has no handler
 * for (pid_namespaces(7)), unless it blocks them.
 */
#include "interp.h"

#include <asm/unistd.h>
#include <linux/prctl.h>
#include <linux/signal.h>
#include <linux/wait.h>

#define NO_CHILD (-10) /* -ECHILD */

static long
number (const char *text)
{
	long value = 0;

	for (; *text >= '0' && *text <= '9'; text++)
		value = value * 10 + (*text - '0');
	return value;
}

/* Reap all that is dead. Returns whether any child is left. */
static int
reap (long first, int *first_status, int *first_lives)
{
	int status;
	long pid;

	while ((pid = raw_syscall (__NR_wait4, -1, (long) &status, WNOHANG | __WALL, 0, 0, 0)) > 0)
		if (pid == first)
			{
				*first_status = status & 0x7f ? 128 + (status & 0x7f) : status >> 8 & 0xff;
				*first_lives = 0;
			}
	return pid != NO_CHILD;
}

__attribute__ ((noreturn, used)) void
init_main (long *stack)
{
	long first = number ((const char *) stack[2]); /* argv[1] */
	uint64_t all = ~0ull;
	int status = 0, lives = 1;

	raw_syscall (__NR_prctl, PR_SET_NAME, (long) "phaul-init", 0, 0, 0, 0);
	while (reap (first, &status, &lives))
		{
			long signal = raw_syscall (__NR_rt_sigtimedwait, (long) &all, 0, 0, sizeof (all), 0, 0);

			if (signal > 0 && signal != SIGCHLD && lives)
				raw_syscall (__NR_kill, first, signal, 0, 0, 0, 0);
		}
	raw_syscall (__NR_exit_group, status, 0, 0, 0, 0, 0);
	__builtin_unreachable ();
}

__asm__ (".globl _start\n"
	 "_start:\n"
	 "	mov %rsp, %rdi\n"
	 "	and $-16, %rsp\n"
	 "	call init_main\n");
