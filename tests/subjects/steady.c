/* Threads that notice when anything is done to them: registers that change, calls that are cut short.
 *
 * steady FILE: FILE gets a struct of counters, mapped. SIGTERM ends it, with 0 if nothing was wrong.
 */
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { COMPUTES, SLEEPS, READS, POLLS, THREADS };

struct counters {
	_Atomic uint64_t ticks[THREADS];
	_Atomic uint64_t wrong[THREADS];
};

static struct counters *counters;
static int pipe_ends[2];

/* A value in every register that the kernel or a debugger could spoil, for some microseconds; how many have changed. */
static uint64_t
hold_registers (uint64_t seed)
{
	uint64_t wrong;

	__asm__ volatile ("mov %[seed], %%rbx\n\t"
			  "mov %[seed], %%r8\n\t"
			  "mov %[seed], %%r9\n\t"
			  "mov %[seed], %%r12\n\t"
			  "mov %[seed], %%r13\n\t"
			  "mov %[seed], %%r14\n\t"
			  "mov %[seed], %%r15\n\t"
			  "movq %[seed], %%xmm0\n\t"
			  "movq %[seed], %%xmm15\n\t"
			  "mov $2000, %%ecx\n"
			  "1:\tpause\n\t"
			  "dec %%ecx\n\t"
			  "jnz 1b\n\t"
			  "xor %[seed], %%rbx\n\t"
			  "xor %[seed], %%r8\n\t"
			  "xor %[seed], %%r9\n\t"
			  "xor %[seed], %%r12\n\t"
			  "xor %[seed], %%r13\n\t"
			  "xor %[seed], %%r14\n\t"
			  "xor %[seed], %%r15\n\t"
			  "movq %%xmm0, %%rax\n\t"
			  "xor %[seed], %%rax\n\t"
			  "movq %%xmm15, %%rdx\n\t"
			  "xor %[seed], %%rdx\n\t"
			  "or %%rdx, %%rax\n\t"
			  "or %%rbx, %%rax\n\t"
			  "or %%r8, %%rax\n\t"
			  "or %%r9, %%rax\n\t"
			  "or %%r12, %%rax\n\t"
			  "or %%r13, %%rax\n\t"
			  "or %%r14, %%rax\n\t"
			  "or %%r15, %%rax"
			  : "=&a"(wrong)
			  : [seed] "D"(seed)
			  : "rbx", "rcx", "rdx", "r8", "r9", "r12", "r13", "r14", "r15", "xmm0", "xmm15", "cc");
	return wrong;
}

static int
computes (uint64_t tick)
{
	return hold_registers (0x9e3779b97f4a7c15ull * (tick + 1)) == 0;
}

static int
sleeps (uint64_t tick)
{
	(void) tick;
	return nanosleep (&(struct timespec){ .tv_nsec = 3000000 }, NULL) == 0 && write (pipe_ends[1], "x", 1) == 1;
}

static int
reads (uint64_t tick)
{
	char byte;

	(void) tick;
	return read (pipe_ends[0], &byte, 1) == 1;
}

static int
polls (uint64_t tick)
{
	(void) tick;
	return poll (NULL, 0, 4) == 0;
}

static int (*const acts[THREADS]) (uint64_t tick) = { computes, sleeps, reads, polls };

static void *
run (void *argument)
{
	long which = (long) argument;

	for (;;)
		{
			if (!acts[which](counters->ticks[which]))
				counters->wrong[which]++;
			counters->ticks[which]++;
		}
	return NULL;
}

static void
end (int number)
{
	int wrong = 0;

	(void) number;
	for (int i = 0; i < THREADS; i++)
		wrong |= counters->wrong[i] != 0;
	_exit (wrong);
}

int
main (int argc, char **argv)
{
	int fd = argc == 2 ? open (argv[1], O_RDWR | O_CREAT, 0600) : -1;
	pthread_t thread;

	if (fd < 0 || ftruncate (fd, sizeof (*counters)) < 0 || pipe (pipe_ends) < 0)
		return 2;
	counters = mmap (NULL, sizeof (*counters), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (counters == MAP_FAILED)
		return 2;
	close (fd);
	signal (SIGTERM, end);
	for (long i = 1; i < THREADS; i++)
		if (pthread_create (&thread, NULL, run, (void *) i) != 0)
			return 2;
	run ((void *) 0);
}
