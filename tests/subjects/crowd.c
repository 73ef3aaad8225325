/* crowd PROCESSES THREADS DESCRIPTORS: so many of each, asleep, but for the first thread, which wakes each millisecond.
 *
 * Every other descriptor is /dev/null, the others eventfds and ends of pipes.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

enum { STACK = 65536 };

static void
check (int failed, const char *what)
{
	if (failed)
	{
		fprintf (stderr, "crowd: %s: %s\n", what, strerror (errno));
		exit (1);
	}
}

static void *
sleep_on (void *nothing)
{
	for (;;)
		pause ();
	return nothing;
}

static void
open_one (int number)
{
	int ends[2];

	if (number % 2)
		check (open ("/dev/null", O_RDONLY) < 0, "open");
	else if (number % 4)
		check (eventfd ((unsigned) number, 0) < 0, "eventfd");
	else
	{
		check (pipe (ends), "pipe");
		check (dup2 (ends[1], ends[0]) < 0 || close (ends[1]), "dup2");
	}
}

int
main (int count, char **words)
{
	struct timespec millisecond = {.tv_nsec = 1000000};
	pthread_attr_t small;

	check (count != 4, "three numbers are wanted");
	for (int i = 0; i < atoi (words[3]); i++)
		open_one (i);
	for (int i = 1; i < atoi (words[1]); i++)
	{
		pid_t child = fork ();

		check (child < 0, "fork");
		if (child == 0)
			sleep_on (NULL);
	}
	pthread_attr_init (&small);
	pthread_attr_setstacksize (&small, STACK);
	for (int i = 1; i < atoi (words[2]); i++)
	{
		pthread_t thread;

		check (errno = pthread_create (&thread, &small, sleep_on, NULL), "pthread_create");
	}
	for (;;)
		nanosleep (&millisecond, NULL);
}
