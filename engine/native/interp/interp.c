/* The injected program. See ph_interp.h for what it promises.
 *
 * It must not touch FPU or SSE state (the engine puts back general registers
 * only), must not use the task's stack, and must not arm the task's
 * restart_block: an interrupted nanosleep or poll of the program is to go on
 * after us. Hence futex_waitv, which is restarted without one
 * (kernel/futex/waitwake.c), in place of FUTEX_WAIT with a timeout.
 */
#include "interp.h"

#include <asm/unistd.h>
#include <linux/futex.h>
#include <linux/sched.h>
#include <linux/time_types.h>

#define CLOCK_MONOTONIC 1
#define ETIMEDOUT 110
#define SPINS 256

_Static_assert(sizeof (struct ph_instruction) == 64, "an instruction is 64 bytes");
_Static_assert(PH_SLOT_SIZE == 0x40000, "interp_entry.S says so too");
_Static_assert(sizeof (struct ph_slot) <= 1024, "a slot's head fits in 1 KiB");

/* arch/x86_64/interp_entry.S */
long interp_clone3 (struct clone_args *args, unsigned long size, struct ph_slot *child);
void interp_sigreturn (uint64_t frame) __attribute__ ((noreturn));

static void
wake (uint32_t *word)
{
	raw_syscall (__NR_futex, (long) word, FUTEX_WAKE, 0x7fffffff, 0, 0, 0);
}

/* Wait until *word is no longer `seen`. Returns 0, or -1 when `patience_ms` (0 = for ever) has passed. */
static int
wait_while (uint32_t *word, uint32_t seen, uint32_t patience_ms)
{
	struct futex_waitv waiter = { .val = seen, .uaddr = (uint64_t) word, .flags = FUTEX_32 };
	struct __kernel_timespec deadline;

	for (int i = 0; i < SPINS; i++)
		{
			if (__atomic_load_n (word, __ATOMIC_ACQUIRE) != seen)
				return 0;
			__asm__ volatile ("pause");
		}
	raw_syscall (__NR_clock_gettime, CLOCK_MONOTONIC, (long) &deadline, 0, 0, 0, 0);
	deadline.tv_sec += patience_ms / 1000;
	deadline.tv_nsec += (patience_ms % 1000) * 1000000l;
	if (deadline.tv_nsec >= 1000000000l)
		{
			deadline.tv_nsec -= 1000000000l;
			deadline.tv_sec++;
		}
	while (__atomic_load_n (word, __ATOMIC_ACQUIRE) == seen)
		{
			long result = raw_syscall (__NR_futex_waitv, (long) &waiter, 1, 0,
						   patience_ms ? (long) &deadline : 0, CLOCK_MONOTONIC, 0);
			if (result == -ETIMEDOUT)
				return -1;
		}
	return 0;
}

static int64_t
operand (const struct ph_slot *slot, const struct ph_instruction *insn, int index)
{
	int64_t value = insn->arg[index];

	if (insn->kind[index] == PH_ARG_REGISTER)
		return slot->regs[value & (PH_REGISTERS - 1)];
	if (insn->kind[index] == PH_ARG_BUFFER)
		return (int64_t) ((uintptr_t) slot + slot->buffer + (uint64_t) value);
	return value;
}

static int64_t
fork_into (struct ph_slot *slot, const struct ph_instruction *insn)
{
	struct clone_args *args = (struct clone_args *) operand (slot, insn, 0);
	struct ph_slot *child = (struct ph_slot *) (slot->arena + (uint64_t) operand (slot, insn, 2) * PH_SLOT_SIZE);

	args->stack = (uint64_t) child;
	args->stack_size = PH_SLOT_SIZE - 64;
	return interp_clone3 (args, (unsigned long) operand (slot, insn, 1), child);
}

/* Whether the program may go on after a CALL or FORK that gave `result`. */
static int
accept (struct ph_slot *slot, const struct ph_instruction *insn, int64_t result)
{
	int64_t *dst = &slot->regs[insn->dst & (PH_REGISTERS - 1)];
	int failed = result < 0 && result > -4096;
	int unexpected = insn->policy == PH_FAIL_UNLESS_DST && result != *dst;

	slot->result = result;
	if (insn->policy != PH_FAIL_KEEP && (failed || unexpected))
		{
			slot->error = failed ? (uint32_t) -result : 1;
			return 0;
		}
	*dst = result;
	return 1;
}

/* Whether the slot says already that the program has ended. */
static int
run (struct ph_slot *slot)
{
	const struct ph_instruction *program = (const struct ph_instruction *) ((uintptr_t) slot + slot->program);
	uint32_t at = 0;

	slot->error = 0;
	while (at < slot->count)
		{
			const struct ph_instruction *insn = &program[at];
			int64_t a[6];
			int64_t *dst = &slot->regs[insn->dst & (PH_REGISTERS - 1)];

			for (int i = 0; i < 6; i++)
				a[i] = operand (slot, insn, i);
			slot->failed_at = at++;
			switch (insn->op)
				{
				case PH_OP_END:
					return 0;
				case PH_OP_CALL:
					if (!accept (slot, insn, raw_syscall (insn->nr, a[0], a[1], a[2], a[3], a[4], a[5])))
						return 0;
					break;
				case PH_OP_FORK:
					if (!accept (slot, insn, fork_into (slot, insn)))
						return 0;
					break;
				case PH_OP_SET:
					*dst = a[0];
					break;
				case PH_OP_ADD:
					*dst = a[0] + a[1];
					break;
				case PH_OP_LESS:
					*dst = a[0] < a[1];
					break;
				case PH_OP_STORE:
					*(volatile int64_t *) a[0] = a[1];
					break;
				case PH_OP_LOAD:
					*dst = *(volatile int64_t *) a[0];
					break;
				case PH_OP_JUMP:
					if (a[1])
						at = (uint32_t) a[0];
					break;
				case PH_OP_COPY:
					for (int64_t i = 0; i < a[2]; i++)
						((volatile char *) a[0])[i] = ((volatile char *) a[1])[i];
					break;
				case PH_OP_NEXT:
					slot->program = (uint32_t) a[0];
					slot->buffer = (uint32_t) a[1];
					slot->count = (uint32_t) a[2];
					program = (const struct ph_instruction *) ((uintptr_t) slot + slot->program);
					at = 0;
					break;
				case PH_OP_REST:
					__atomic_store_n (&slot->state, PH_SLOT_DONE, __ATOMIC_RELEASE);
					raw_syscall (insn->nr, a[0], a[1], a[2], a[3], a[4], a[5]);
					return 1;
				case PH_OP_SIGRETURN:
					interp_sigreturn (slot->frame);
				default:
					slot->error = 38; /* ENOSYS */
					return 0;
				}
		}
	return 0;
}

__attribute__ ((noreturn, used)) void
interp_main (struct ph_slot *slot)
{
	slot->tid = (uint32_t) raw_syscall (__NR_gettid, 0, 0, 0, 0, 0, 0);
	uint32_t seen = PH_SLOT_FREE;
	if (__atomic_compare_exchange_n (&slot->state, &seen, PH_SLOT_IDLE, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
		wake (&slot->state);
	for (;;)
		{
			uint32_t state = __atomic_load_n (&slot->state, __ATOMIC_ACQUIRE);

			if (state != PH_SLOT_RUN)
				{
					if (wait_while (&slot->state, state, slot->frame ? slot->patience_ms : 0) == 0)
						continue;
					if (!__atomic_compare_exchange_n (&slot->state, &state, PH_SLOT_LEFT, 0, __ATOMIC_ACQ_REL,
									  __ATOMIC_ACQUIRE))
						continue;
					interp_sigreturn (slot->frame);
				}
			if (run (slot))
				continue;
			__atomic_store_n (&slot->state, PH_SLOT_DONE, __ATOMIC_RELEASE);
			wake (&slot->state);
		}
}
