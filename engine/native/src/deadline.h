/* Deadlines on the monotonic clock, in nanoseconds; -1 is never. */
#ifndef PH_DEADLINE_H
#define PH_DEADLINE_H

#include <stdint.h>
#include <time.h>

static inline int64_t
ph_now_ns (void)
{
	struct timespec now;

	clock_gettime (CLOCK_MONOTONIC, &now);
	return (int64_t) now.tv_sec * 1000000000 + now.tv_nsec;
}

static inline int64_t
ph_deadline (int timeout_ms)
{
	return timeout_ms < 0 ? -1 : ph_now_ns () + (int64_t) timeout_ms * 1000000;
}

/* What is left, for poll: rounded up, -1 for never. */
static inline int
ph_left_ms (int64_t deadline)
{
	if (deadline < 0)
		return -1;
	int64_t left = deadline - ph_now_ns ();
	return left <= 0 ? 0 : left / 1000000 >= 3600000 ? 3600000 : (int) ((left + 999999) / 1000000);
}

static inline struct timespec
ph_timespec (int64_t ns)
{
	return (struct timespec) { .tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000 };
}

#endif
