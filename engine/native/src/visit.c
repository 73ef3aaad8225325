/* Ask the threads of stopped processes, all at once: interpreters in, a program in each thread, interpreters out.
 *
 * One hand-over to the tracer in place of five, and no futex between engine and task: a thread finds its program when
 * it enters. The code of a program stands once in an arena, whoever runs it, in a slot of its own behind the threads'.
 */
#include "inject.h"

#include "cleanup.h"
#include "ph_interp.h"

#include <errno.h>
#include <linux/futex.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define HEAD 1024
#define SPINS 200
#define NAP_US 60
#define NAPS 64 /* between two looks whether it still lives: the end of a leader is not told before that of its threads */
#define WAITING 0
#define ANSWERED 1
#define FAILED 2
#define CALLER_SPIN_US 60
#define LOOK_NS 1000000 /* from look to look, should a wake be lost */
#define PATIENCE_MS 2000 /* an interpreter whose engine is silent for so long goes home by itself */
#define ROOM (PH_SLOT_SIZE - PH_SLOT_STACK - PH_SLOT_FRAME - 2048)

struct visit_job {
	struct ph_visit *visits;
	struct ph_question *questions;
	size_t visit_count, count;
	int timeout_ms;
	uint32_t answered; /* a futex: all have answered, or something has failed */
};

static struct ph_visit *
visit_of (const struct visit_job *job, const struct ph_question *question)
{
	return &job->visits[question->visit];
}

static struct inject_job
injection_of (struct ph_visit *visit)
{
	return (struct inject_job){ visit->state, &visit->gadgets, &visit->injection };
}

static struct ph_slot *
slot_of (const struct visit_job *job, const struct ph_question *question)
{
	return (struct ph_slot *) ((uint8_t *) visit_of (job, question)->injection.arena
				   + (uint64_t) question->slot * PH_SLOT_SIZE);
}

/* Where in the arena the code of a question stands; it is put there unless that of the question before is the same. */
static int
place_code (const struct visit_job *job, size_t index, uint64_t *used, struct ph_error *err)
{
	struct ph_question *question = &job->questions[index];
	const struct ph_question *before = index ? question - 1 : NULL;
	struct ph_injection *injection = &visit_of (job, question)->injection;
	uint64_t size = (question->count + 1) * sizeof (struct ph_instruction);

	if (before && before->visit == question->visit && before->code == question->code)
		{
			question->place = before->place;
			return 0;
		}
	if (!before || before->visit != question->visit)
		*used = 0;
	if (*used + size > PH_SLOT_SIZE)
		return ph_fail (err, ENOBUFS, "the programs for process %d", injection->tid);
	question->place = (uint64_t) (injection->slots - 1) * PH_SLOT_SIZE + *used;
	memcpy ((uint8_t *) injection->arena + question->place, question->code, size);
	*used += size;
	return 0;
}

static int
load (const struct visit_job *job, size_t index, uint64_t *used, struct ph_error *err)
{
	struct ph_question *question = &job->questions[index];
	struct ph_slot *slot = slot_of (job, question);

	if (HEAD + (uint64_t) question->buffer_size > ROOM)
		return ph_fail (err, ENOBUFS, "%u bytes for task %d", question->buffer_size, question->state->tid);
	if (place_code (job, index, used, err) < 0
	    || inject_prepare (&visit_of (job, question)->injection, question->state, question->slot, PATIENCE_MS, err) < 0)
		return -1;
	memcpy ((uint8_t *) slot + HEAD, question->buffer, question->buffer_size);
	slot->program = (uint32_t) (question->place - (uint64_t) question->slot * PH_SLOT_SIZE);
	slot->buffer = HEAD;
	slot->count = question->count;
	__atomic_store_n (&slot->state, PH_SLOT_RUN, __ATOMIC_RELEASE);
	return 0;
}

static int
look_after (pid_t tid, struct ph_error *err)
{
	int status;

	return waitpid (tid, &status, __WALL | WNOHANG) == tid ? trace_go_on (tid, status, err) : 0;
}

static int
await (const struct visit_job *job, struct ph_question *question, int64_t deadline, struct ph_error *err)
{
	struct ph_slot *slot = slot_of (job, question);

	for (unsigned round = 0;; round++)
		{
			uint32_t state = __atomic_load_n (&slot->state, __ATOMIC_ACQUIRE);

			if (state == PH_SLOT_DONE)
				break;
			if (state == PH_SLOT_LEFT || (round > SPINS && ph_now_us () > deadline))
				return ph_fail (err, ETIMEDOUT, "wait for a program of task %d", question->state->tid);
			if (round > SPINS && look_after (question->state->tid, err) < 0)
				return -1;
			if (round % NAPS == NAPS - 1 && round > SPINS && trace_state (question->state->tid) == 'Z')
				return ph_fail (err, ESRCH, "task %d has ended", question->state->tid);
			if (round > SPINS + 1 && !__atomic_load_n (&slot->tid, __ATOMIC_RELAXED))
				trace_make_way (question->state->tid);
			if (round > SPINS)
				syscall (SYS_futex, &slot->state, FUTEX_WAIT, state, &(struct timespec){ .tv_nsec = NAP_US * 1000 },
					 NULL, 0);
		}
	question->error = slot->error;
	question->failed_at = slot->failed_at;
	question->result = slot->result;
	memcpy (question->regs, slot->regs, sizeof (question->regs));
	memcpy (question->answer, (uint8_t *) slot + HEAD, question->buffer_size);
	return 0;
}

static int
ask (const struct visit_job *job, const struct ph_thread_state **entered, size_t *count, struct ph_error *err)
{
	int64_t deadline = ph_now_us () + (int64_t) job->timeout_ms * 1000;
	uint64_t used = 0;

	for (size_t i = 0; i < job->count; i++)
		if (load (job, i, &used, err) < 0)
			return -1;
	for (size_t i = 0; i < job->count; i++)
		{
			struct ph_question *question = &job->questions[i];

			if (inject_start (&visit_of (job, question)->injection, question->state, question->slot, err) < 0)
				return -1;
			entered[(*count)++] = question->state;
		}
	for (size_t i = 0; i < job->count; i++)
		if (await (job, &job->questions[i], deadline, err) < 0)
			return -1;
	return 0;
}

/* Whether one of the first `count` threads could not be taken out of a process's interpreter. It goes home by itself
   when it is let go, so long as that is there. */
static bool
is_inside (const struct visit_job *job, size_t index, size_t count)
{
	const struct ph_injection *injection = &job->visits[index].injection;
	struct user_regs_struct regs;
	struct ph_error ignored;

	for (size_t i = 0; i < count; i++)
		if ((size_t) job->questions[i].visit == index
		    && trace_get_regs (job->questions[i].state->tid, &regs, &ignored) == 0
		    && regs.rip - injection->address < injection->size)
			return true;
	return false;
}

static void
tell (uint32_t *word, uint32_t value)
{
	__atomic_store_n (word, value, __ATOMIC_RELEASE);
	syscall (SYS_futex, word, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
}

static long
visit (void *argument, struct ph_error *err)
{
	struct visit_job *job = argument;
	cleanup_free const struct ph_thread_state **entered = calloc (job->count + 1, sizeof (*entered));
	struct ph_error second;
	size_t mapped = 0, count = 0;
	long result = entered ? 0 : ph_fail (err, ENOMEM, "ask %zu threads", job->count);

	for (; result == 0 && mapped < job->visit_count; mapped++)
		{
			struct inject_job one = injection_of (&job->visits[mapped]);

			result = inject_map (&one, err);
			if (result < 0)
				break;
		}
	if (result == 0)
		result = ask (job, entered, &count, err);
	tell (&job->answered, result == 0 ? ANSWERED : FAILED);
	/* whatever failed, all threads go back to where they were; the first error is the one to tell */
	if (inject_leave (entered, count, result < 0 ? &second : err) < 0)
		result = -1;
	for (size_t i = 0; i < mapped; i++)
		{
			struct inject_job one = injection_of (&job->visits[i]);

			if (result < 0 && is_inside (job, i, count))
				continue;
			if (inject_cure (&one, result < 0 ? &second : err) < 0)
				result = -1;
		}
	return result;
}

struct ph_visiting {
	struct ph_tracer *tracer;
	struct visit_job job;
};

struct ph_visiting *
ph_visit_begin (struct ph_tracer *tracer, struct ph_visit *visits, size_t visit_count, struct ph_question *questions,
		size_t count, int timeout_ms, struct ph_error *err)
{
	struct ph_visiting *visiting = malloc (sizeof (*visiting));

	if (!visiting)
		{
			ph_fail (err, ENOMEM, "ask %zu threads", count);
			return NULL;
		}
	*visiting = (struct ph_visiting){ tracer, { visits, questions, visit_count, count, timeout_ms, WAITING } };
	for (size_t i = 0; i < visit_count; i++)
		visits[i].injection = (struct ph_injection){ .tid = visits[i].state->tid, .slots = visits[i].slots + 1,
							     .spare = visits[i].spare, .spare_size = visits[i].spare_size };
	ph_tracer_begin (tracer, visit, &visiting->job, err);
	return visiting;
}

int
ph_visit_await (struct ph_visiting *visiting)
{
	uint32_t *word = &visiting->job.answered, now;
	int64_t end = ph_now_us () + CALLER_SPIN_US;

	while ((now = __atomic_load_n (word, __ATOMIC_ACQUIRE)) == WAITING)
		if (ph_now_us () < end)
			__builtin_ia32_pause ();
		else
			syscall (SYS_futex, word, FUTEX_WAIT_PRIVATE, WAITING, &(struct timespec){ .tv_nsec = LOOK_NS }, NULL, 0);
	return now == ANSWERED;
}

int
ph_visit_end (struct ph_visiting *visiting)
{
	int result = (int) ph_tracer_end (visiting->tracer);

	for (size_t i = 0; i < visiting->job.visit_count; i++)
		inject_forget (&visiting->job.visits[i].injection);
	free (visiting);
	return result;
}
