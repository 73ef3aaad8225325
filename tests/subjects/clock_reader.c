/* Reads clocks through the vDSO all the time, and holds each reading against system calls before and after it.
 *
 * clock_reader STATUS: the line in the file STATUS is rewritten every millisecond or so.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define THREADS 2
#define BURST 20000

static atomic_long calls, wrong;
static char first_error[160];

static int64_t
in_ns (const struct timespec *when)
{
	return when->tv_sec * 1000000000l + when->tv_nsec;
}

static int64_t
asked (clockid_t clock)
{
	struct timespec now;

	return syscall (SYS_clock_gettime, clock, &now) == 0 ? in_ns (&now) : -1;
}

static void
fail (const char *what, int64_t before, int64_t read, int64_t after)
{
	if (atomic_fetch_add (&wrong, 1) == 0)
		snprintf (first_error, sizeof (first_error), "%s-%lld-%lld-%lld", what, (long long) before,
			  (long long) read, (long long) after);
}

static void
hold_against (const char *what, clockid_t clock)
{
	struct timespec now;
	int64_t before = asked (clock);
	int failed = clock_gettime (clock, &now);
	int64_t after = asked (clock);

	if (failed || before > in_ns (&now) || in_ns (&now) > after)
		fail (what, before, in_ns (&now), after);
}

static void
hold_others (void)
{
	struct timeval now;
	struct timespec grain;
	int64_t before = asked (CLOCK_REALTIME);
	int failed = gettimeofday (&now, NULL);
	int64_t after = asked (CLOCK_REALTIME), read = now.tv_sec * 1000000000l + now.tv_usec * 1000l;

	if (failed || read < before - 1000 || read > after)
		fail ("gettimeofday", before, read, after);
	before = asked (CLOCK_REALTIME_COARSE) / 1000000000;
	read = time (NULL);
	after = asked (CLOCK_REALTIME) / 1000000000;
	if (read < before || read > after)
		fail ("time", before, read, after);
	if (clock_getres (CLOCK_MONOTONIC, &grain) || in_ns (&grain) != 1)
		fail ("clock_getres", 0, in_ns (&grain), 0);
	if (sched_getcpu () < 0)
		fail ("getcpu", 0, -1, 0);
}

static void *
reader (void *unused)
{
	int64_t last = 0;

	(void) unused;
	for (;;)
		{
			for (int i = 0; i < BURST; i++)
				{
					struct timespec now;

					if (clock_gettime (CLOCK_MONOTONIC, &now) || in_ns (&now) < last)
						fail ("back", last, in_ns (&now), 0);
					last = in_ns (&now);
				}
			atomic_fetch_add (&calls, BURST);
			hold_against ("monotonic", CLOCK_MONOTONIC);
			hold_against ("realtime", CLOCK_REALTIME);
			hold_against ("boottime", CLOCK_BOOTTIME);
			hold_against ("coarse", CLOCK_MONOTONIC_COARSE);
			hold_against ("tai", CLOCK_TAI);
			hold_others ();
			usleep (50);
		}
	return NULL;
}

int
main (int argc, char **argv)
{
	int status = argc > 1 ? open (argv[1], O_WRONLY | O_CREAT | O_TRUNC, 0644) : -1;
	char line[256];

	if (status < 0)
		return 2;
	for (int i = 0; i < THREADS; i++)
		{
			pthread_t thread;
			if (pthread_create (&thread, NULL, reader, NULL))
				return 2;
		}
	for (;;)
		{
			int length = snprintf (line, sizeof (line), "calls=%020ld wrong=%020ld error=%-160s\n", calls, wrong,
					       first_error);
			if (pwrite (status, line, (size_t) length, 0) != length)
				return 2;
			usleep (1000);
		}
}
