/* heap: a program that writes memory at a given rate, checks all of it the whole time, and knows how long it stood.

   usage: heap --status FILE [--heap MIB] [--rate MB/S] [--threads N] [--discard N] [--slow N]

   Every page holds its index, a sequence number that each write raises, a mark made of both in every eighth of the
   page, and a fill that never changes. The numbers that the pages must have stand in a table elsewhere. Each writer
   owns every N-th page, writes at random, and checks other pages of its own between the writes; with --discard, one in
   N writes gives the page back (MADV_DONTNEED) in place of writing it, after which it must read as zeroes.

   A ticker sleeps 200 us at a time on CLOCK_MONOTONIC and notes its longest gap: the program's own view of a freeze.
   Two threads hand a number to and fro through a condition variable and a pipe.  Every 50 ms FILE holds one line of
   NAME=VALUE: state (running, pass, fail), ticks, gap_us, move_us (the gap in which the node's name became another:
   that of the last move), writes, discards, checked, rounds (of the number), error.
   With - for FILE it is a memory file, which others find as /proc/PID/fd/3. With --slow all pauses are N times as long,
   for slow processors.
   SIGUSR1 sets gap_us to nought. SIGTERM stops the writers, checks every page, writes the verdict and ends with status 0
   or 1.  */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

enum
{
	PAGE = 4096,
	WORDS = PAGE / 8,
	MARKS = 8,
	MARK_STRIDE = WORDS / MARKS,
	STATUS_BYTES = 512,
	TICK_NS = 200 * 1000,
	LONG_NS = 600 * 1000, /* a move takes longer */
	CHECKS_PER_TICK = 16,
	MAX_THREADS = 64,
};

struct writer
{
	pthread_t thread;
	unsigned number;
	uint64_t random;
	uint64_t cursor;
	int tid;
};

static uint64_t *heap;
static uint32_t *expected; /* What each page's sequence number must be; 0: discarded. */
static uint64_t pages;
static unsigned threads = 2;
static uint64_t rate = 10 * 1000 * 1000;
static unsigned discard;
static long slow = 1;
static int status_fd = -1;
static struct writer writers[MAX_THREADS];

static atomic_bool stopping;
static atomic_bool failed;
static char reason[256];
static atomic_ullong ticks, gap_ns, move_ns, writes, discards, checked, rounds;

static pthread_mutex_t baton_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t baton_moved = PTHREAD_COND_INITIALIZER;
static uint64_t baton;
static int baton_pipe[2];

static uint64_t
mix (uint64_t value)
{
	value ^= value >> 33;
	value *= 0xff51afd7ed558ccdULL;
	value ^= value >> 33;
	value *= 0xc4ceb9fe1a85ec53ULL;
	return value ^ (value >> 33);
}

static uint64_t
now_ns (void)
{
	struct timespec now;

	clock_gettime (CLOCK_MONOTONIC, &now);
	return (uint64_t) now.tv_sec * 1000000000u + (uint64_t) now.tv_nsec;
}

static void __attribute__ ((format (printf, 1, 2))) fail (const char *format, ...)
{
	va_list arguments;

	if (atomic_exchange (&failed, true))
		return;
	va_start (arguments, format);
	vsnprintf (reason, sizeof reason, format, arguments);
	va_end (arguments);
}

static uint64_t
mark (uint64_t index, uint32_t sequence, unsigned place)
{
	return mix (index << 24 ^ (uint64_t) sequence << 4 ^ place) | 1;
}

/* Words 0 and 1 of the page are its index and number; the first word of every other eighth is a mark.  */
static void
write_page (uint64_t index)
{
	uint64_t *page = heap + index * WORDS;
	bool empty = expected[index] == 0;
	uint32_t sequence = expected[index] + 1;

	if (empty)
		for (unsigned word = 0; word < WORDS; word++)
			page[word] = mix (index * WORDS + word);
	page[0] = index + 1;
	page[1] = sequence;
	for (unsigned place = 1; place < MARKS; place++)
		page[place * MARK_STRIDE] = mark (index, sequence, place);
	expected[index] = sequence;
	atomic_fetch_add_explicit (&writes, 1, memory_order_relaxed);
}

static void
discard_page (uint64_t index)
{
	if (madvise (heap + index * WORDS, PAGE, MADV_DONTNEED) < 0)
		fail ("madvise: %s", strerror (errno));
	expected[index] = 0;
	atomic_fetch_add_explicit (&discards, 1, memory_order_relaxed);
}

static void
check_page (uint64_t index, bool whole)
{
	const uint64_t *page = heap + index * WORDS;
	uint32_t sequence = expected[index];

	atomic_fetch_add_explicit (&checked, 1, memory_order_relaxed);
	if (page[0] != (sequence ? index + 1 : 0) || page[1] != sequence)
		{
			fail ("page %llu holds number %llu of page %lld, expected %u", (unsigned long long) index,
			      (unsigned long long) page[1], (long long) page[0] - 1, sequence);
			return;
		}
	for (unsigned place = 1; place < MARKS; place++)
		if (page[place * MARK_STRIDE] != (sequence ? mark (index, sequence, place) : 0))
			fail ("page %llu, number %u: mark %u is wrong", (unsigned long long) index, sequence, place);
	for (unsigned word = 2; word < WORDS; word += whole ? 1 : 61)
		if (word % MARK_STRIDE && page[word] != (sequence ? mix (index * WORDS + word) : 0))
			{
				fail ("page %llu, number %u: fill at word %u is wrong", (unsigned long long) index, sequence, word);
				return;
			}
}

static uint64_t
own_page (struct writer *self, uint64_t value)
{
	uint64_t mine = (pages - self->number + threads - 1) / threads;

	return value % mine * threads + self->number;
}

/* As many pages a millisecond as the rate allows; after a freeze it does not catch up with more than 5 ms.  */
static void *
write_and_check (void *argument)
{
	struct writer *self = argument;
	uint64_t last = now_ns ();
	double credit = 0;

	self->tid = gettid ();
	for (uint64_t count = 0; !atomic_load (&stopping);)
		{
			struct timespec pause = { .tv_nsec = slow * 1000 * 1000 };
			uint64_t now = now_ns (), most = (uint64_t) slow * 5000000u;
			uint64_t passed = now - last < most ? now - last : most;

			last = now;
			for (credit += (double) rate / threads * (double) passed / 1e9 / PAGE; credit >= 1; credit -= 1)
				{
					uint64_t index;

					self->random = mix (self->random + 0x9e3779b97f4a7c15ULL);
					index = own_page (self, self->random);
					if (discard && ++count % discard == 0)
						discard_page (index);
					else
						write_page (index);
				}
			for (unsigned i = 0; i < CHECKS_PER_TICK; i++)
				check_page (own_page (self, self->cursor++), false);
			if (syscall (SYS_gettid) != self->tid)
				fail ("thread %d has become %ld", self->tid, syscall (SYS_gettid));
			if (nanosleep (&pause, NULL) < 0)
				fail ("nanosleep: %s", strerror (errno));
		}
	return NULL;
}

static void *
tick (void *unused)
{
	char node[sizeof ((struct utsname *) 0)->nodename];
	struct utsname names;
	uint64_t last = now_ns ();

	uname (&names);
	strcpy (node, names.nodename);
	while (!atomic_load (&stopping))
		{
			struct timespec pause = { .tv_nsec = slow * TICK_NS };
			uint64_t now, gap;

			if (nanosleep (&pause, NULL) < 0)
				fail ("nanosleep of the ticker: %s", strerror (errno));
			now = now_ns ();
			if (now < last)
				fail ("CLOCK_MONOTONIC went back by %llu us", (unsigned long long) (last - now) / 1000);
			gap = now - last;
			last = now;
			for (unsigned long long old = atomic_load (&gap_ns); gap > old;)
				if (atomic_compare_exchange_weak (&gap_ns, &old, gap))
					break;
			if (gap > LONG_NS && !uname (&names) && strcmp (names.nodename, node))
				{
					strcpy (node, names.nodename);
					atomic_store (&move_ns, gap);
				}
			atomic_fetch_add (&ticks, 1);
		}
	return unused;
}

/* Even numbers come by the condition variable, odd ones by the pipe.  */
static void *
pass_on (void *unused)
{
	uint64_t number = 0, received;

	while (!atomic_load (&stopping))
		{
			struct timespec pause = { .tv_nsec = slow * 2000 * 1000 };

			pthread_mutex_lock (&baton_lock);
			baton = ++number;
			pthread_cond_signal (&baton_moved);
			pthread_mutex_unlock (&baton_lock);
			if (read (baton_pipe[0], &received, sizeof received) != sizeof received)
				fail ("pipe: %s", strerror (errno));
			else if (received != number)
				fail ("the pipe gave %llu after %llu", (unsigned long long) received, (unsigned long long) number);
			atomic_store (&rounds, number);
			nanosleep (&pause, NULL);
		}
	pthread_mutex_lock (&baton_lock);
	baton = UINT64_MAX;
	pthread_cond_signal (&baton_moved);
	pthread_mutex_unlock (&baton_lock);
	return unused;
}

static void *
hand_back (void *unused)
{
	for (uint64_t last = 0;;)
		{
			pthread_mutex_lock (&baton_lock);
			while (baton == last)
				pthread_cond_wait (&baton_moved, &baton_lock);
			last = baton;
			pthread_mutex_unlock (&baton_lock);
			if (last == UINT64_MAX)
				return unused;
			if (write (baton_pipe[1], &last, sizeof last) != sizeof last)
				fail ("pipe: %s", strerror (errno));
		}
}

static void
report (const char *state)
{
	char line[STATUS_BYTES + 1];
	int length = snprintf (line, sizeof line,
			       "state=%s ticks=%llu gap_us=%llu move_us=%llu writes=%llu discards=%llu checked=%llu rounds=%llu error=%s",
			       state, atomic_load (&ticks), atomic_load (&gap_ns) / 1000,
			       atomic_load (&move_ns) / 1000, atomic_load (&writes),
			       atomic_load (&discards), atomic_load (&checked), atomic_load (&rounds),
			       atomic_load (&failed) ? reason : "none");

	memset (line + length, ' ', (size_t) (STATUS_BYTES - length));
	line[STATUS_BYTES - 1] = '\n';
	if (pwrite (status_fd, line, STATUS_BYTES, 0) != STATUS_BYTES)
		fail ("status file: %s", strerror (errno));
}

static void
usage (void)
{
	fprintf (stderr, "usage: heap --status FILE [--heap MIB] [--rate MB/S] [--threads N] [--discard N] [--slow N]\n");
	exit (2);
}

static void
parse (int argc, char **argv)
{
	for (int i = 1; i < argc; i += 2)
		{
			if (i + 1 == argc)
				usage ();
			if (!strcmp (argv[i], "--status"))
				status_fd = strcmp (argv[i + 1], "-") ? open (argv[i + 1], O_RDWR | O_CREAT | O_CLOEXEC, 0644)
								      : memfd_create ("status", MFD_CLOEXEC);
			else if (!strcmp (argv[i], "--heap"))
				pages = strtoull (argv[i + 1], NULL, 10) * (1024 * 1024 / PAGE);
			else if (!strcmp (argv[i], "--rate"))
				rate = strtoull (argv[i + 1], NULL, 10) * 1000 * 1000;
			else if (!strcmp (argv[i], "--threads"))
				threads = (unsigned) strtoul (argv[i + 1], NULL, 10);
			else if (!strcmp (argv[i], "--discard"))
				discard = (unsigned) strtoul (argv[i + 1], NULL, 10);
			else if (!strcmp (argv[i], "--slow"))
				slow = strtol (argv[i + 1], NULL, 10);
			else
				usage ();
		}
	if (status_fd < 0 || threads < 1 || threads > MAX_THREADS || slow < 1 || slow > 400)
		usage ();
	if (pages < threads)
		pages = 16 * 1024 * 1024 / PAGE;
}

static void
map_heap (void)
{
	const int protection = PROT_READ | PROT_WRITE;

	heap = mmap (NULL, pages * PAGE, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	expected = mmap (NULL, pages * sizeof *expected, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (heap == MAP_FAILED || expected == MAP_FAILED)
		{
			perror ("heap: mmap");
			exit (1);
		}
	for (uint64_t index = 0; index < pages; index++)
		write_page (index);
}

int
main (int argc, char **argv)
{
	struct timespec interval = { .tv_nsec = 50 * 1000 * 1000 };
	pthread_t others[3];
	sigset_t signals;
	pid_t pid = getpid ();
	int received;

	parse (argc, argv);
	map_heap ();
	sigemptyset (&signals);
	sigaddset (&signals, SIGTERM);
	sigaddset (&signals, SIGUSR1);
	pthread_sigmask (SIG_BLOCK, &signals, NULL);
	if (pipe2 (baton_pipe, O_CLOEXEC) < 0)
		return 1;
	for (unsigned i = 0; i < threads; i++)
		{
			writers[i] = (struct writer){ .number = i, .random = i + 1 };
			pthread_create (&writers[i].thread, NULL, write_and_check, &writers[i]);
		}
	pthread_create (&others[0], NULL, tick, NULL);
	pthread_create (&others[1], NULL, pass_on, NULL);
	pthread_create (&others[2], NULL, hand_back, NULL);

	while ((received = sigtimedwait (&signals, NULL, &interval)) != SIGTERM)
		{
			if (received == SIGUSR1)
				atomic_store (&gap_ns, 0);
			else if (received < 0 && errno != EAGAIN && errno != EINTR) /* EINTR after any stop: signal(7) */
				fail ("sigtimedwait: %s", strerror (errno));
			if (getpid () != pid)
				fail ("process %d has become %d", pid, getpid ());
			report (atomic_load (&failed) ? "fail" : "running");
		}

	atomic_store (&stopping, true);
	for (unsigned i = 0; i < threads; i++)
		pthread_join (writers[i].thread, NULL);
	for (unsigned i = 0; i < 3; i++)
		pthread_join (others[i], NULL);
	for (uint64_t index = 0; index < pages; index++)
		check_page (index, true);
	report (atomic_load (&failed) ? "fail" : "pass");
	return atomic_load (&failed);
}
