/* Threads of streams: start, tell, count. */
#include "stream_threads.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define STACK_SIZE 262144
#define NICE 5          /* programs come first on a busy host, the one that is moved among them */

struct beginning {
	void *(*run) (void *);
	void *data;
};

static void *
begin (void *argument)
{
	struct beginning own = *(struct beginning *) argument;

	free (argument);
	setpriority (PRIO_PROCESS, (id_t) gettid (), NICE); /* of this thread alone (setpriority(2)) */
	return own.run (own.data);
}

void
ph_condition_init (pthread_cond_t *condition)
{
	pthread_condattr_t monotonic;

	pthread_condattr_init (&monotonic);
	pthread_condattr_setclock (&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init (condition, &monotonic);
	pthread_condattr_destroy (&monotonic);
}

void
ph_event_signal (int fd)
{
	uint64_t one = 1;
	ssize_t put = write (fd, &one, sizeof (one));

	(void) put;     /* full is as good: it is readable */
}

int
ph_stream_thread (pthread_t *thread, void *(*run) (void *), void *data, struct ph_error *err)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	struct beginning *own = malloc (sizeof (*own));

	if (!own)
		return ph_fail (err, ENOMEM, "start a stream's thread");
	*own = (struct beginning){ run, data };
	sigfillset (&all);
	pthread_attr_init (&attributes);
	pthread_attr_setstacksize (&attributes, STACK_SIZE);
	pthread_sigmask (SIG_SETMASK, &all, &before);
	int failed = pthread_create (thread, &attributes, begin, own);
	pthread_sigmask (SIG_SETMASK, &before, NULL);
	pthread_attr_destroy (&attributes);
	if (failed)
		free (own);
	return failed ? ph_fail (err, failed, "start a stream's thread") : 0;
}

void
ph_stats_add (void *sum, const void *one, size_t size)
{
	uint64_t *to = sum;
	const uint64_t *from = one;

	for (size_t i = 0; i < size / sizeof (*to); i++)
		to[i] += from[i];
}
