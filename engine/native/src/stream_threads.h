/* What the page source and the page sink share: a thread for each stream, and an eventfd that tells the loop. */
#ifndef PH_STREAM_THREADS_H
#define PH_STREAM_THREADS_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include "ph_error.h"

/* A condition whose deadlines are on the monotonic clock. */
void ph_condition_init (pthread_cond_t *condition);

/* Make a non-blocking eventfd readable; it stays so until it is read. */
void ph_event_signal (int fd);

/* Start a thread that gets no signal. Returns 0, or -1 with the error of pthread_create(3). */
int ph_stream_thread (pthread_t *thread, void *(*run) (void *), void *data, struct ph_error *err);

/* Add the counters of `one` to those of `sum`: both are structs of nothing but uint64_t, `size` bytes long. */
void ph_stats_add (void *sum, const void *one, size_t size);

#endif
