/* Inside of injections: what ph_inject and its siblings, and ph_visit, are made of. On the tracer thread only. */
#ifndef INJECT_H
#define INJECT_H

#include "tracer.h"

struct inject_job {
	const struct ph_thread_state *state;
	const struct ph_gadgets *gadgets;
	struct ph_injection *injection; /* tid, slots and spare filled in */
};

/* `argument` is a struct inject_job: map arena and code into the process and the arena here. On failure nothing is
   left of it. */
long inject_map (void *argument, struct ph_error *err);

/* Make the slot of a stopped thread ready: the signal frame by which it comes home stands in it. */
int inject_prepare (const struct ph_injection *injection, const struct ph_thread_state *state, int index,
		    int patience_ms, struct ph_error *err);

/* Let the thread interpret in that slot. */
int inject_start (const struct ph_injection *injection, const struct ph_thread_state *state, int index,
		  struct ph_error *err);

/* Stop interpreters and put their threads back where they were. */
int inject_leave (const struct ph_thread_state *const *states, size_t count, struct ph_error *err);

/* `argument` is a struct inject_job: unmap arena and code in the process. */
long inject_cure (void *argument, struct ph_error *err);

/* Unmap the arena here. */
void inject_forget (struct ph_injection *injection);

#endif
