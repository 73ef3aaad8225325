/* Inside of the tracer: how work gets onto its thread. */
#ifndef TRACER_H
#define TRACER_H

#include "ph_tracer.h"

#include <stdbool.h>
#include <sys/types.h>
#include <sys/user.h>

_Static_assert(sizeof (struct user_regs_struct) == sizeof (uint64_t) * PH_GPREGS, "27 registers");

typedef long (*ph_job) (void *args, struct ph_error *err);

/* Run `job (args, err)` on the tracer thread; returns what it returns. */
long ph_tracer_call (struct ph_tracer *tracer, ph_job job, void *args, struct ph_error *err);

/* The same in two halves, of one thread, in between which it may do something else, but no other call. `args` and `err`
   must live until the second. */
void ph_tracer_begin (struct ph_tracer *tracer, ph_job job, void *args, struct ph_error *err);
long ph_tracer_end (struct ph_tracer *tracer);

/* CLOCK_MONOTONIC in microseconds. */
int64_t ph_now_us (void);

/* What follows runs on the tracer thread only. */

/* Wait for a stop of `tid`, passing every signal on, until `deadline` (ph_now_us). `stop_signal` (may be NULL) gets
   the signal of a job-control stop, or 0. Returns 0 for a PTRACE_EVENT_STOP; -1 with ESRCH when it died, ETIMEDOUT. */
int trace_wait_stop (pid_t tid, int64_t deadline, int *stop_signal, struct ph_error *err);

int trace_get_regs (pid_t tid, struct user_regs_struct *regs, struct ph_error *err);
int trace_set_regs (pid_t tid, const struct user_regs_struct *regs, struct ph_error *err);
int trace_set_mask (pid_t tid, uint64_t mask, struct ph_error *err);
/* All of these and the extended registers. */
int trace_set_state (const struct ph_thread_state *state, struct ph_error *err);

/* Let the task make the system call at which `regs` stand, with all signals blocked, and stop after it. Its result goes
   to *result. The call must not sleep: it is interrupted. */
int trace_call (pid_t tid, const struct user_regs_struct *regs, long *result, struct ph_error *err);

/* The same in three steps, so that several tasks can be on their way at once: each waits for what the one before has
   begun. `held_stop`: a SIGSTOP has come in between. */
int trace_call_begin (pid_t tid, const struct user_regs_struct *regs, struct ph_error *err);
int trace_call_enter (pid_t tid, bool *held_stop, struct ph_error *err);
int trace_call_end (pid_t tid, bool held_stop, long *result, struct ph_error *err);

/* Task `tid`, which is waited for, has done nothing for a while. If the caller goes on meanwhile, it may be in its way: it
   is as urgent as we are, and on a host with few processors the task would wait until it is done. If they are on the same
   processor, the caller is called to ours, and goes on there while we sleep, until the job is over. */
void trace_make_way (pid_t tid);

/* PTRACE_INTERRUPT and wait for the stop. */
int trace_interrupt (pid_t tid, int64_t deadline, struct ph_error *err);

/* A task that interprets has changed its state: births and harmless signals go on; ECHILD when it died or was hit by a
   signal of its own making. */
int trace_go_on (pid_t tid, int status, struct ph_error *err);

/* Name and state of a task, for messages. */
void trace_describe (pid_t tid, char *text, size_t size);

/* The letter of a task's state, as in proc_pid_stat(5); something else where there is no such task. */
char trace_state (pid_t tid);

#endif
