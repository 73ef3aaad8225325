#include "sigframe.h"

#include <cpuid.h>
#include <string.h>
#include <sys/user.h>

/* kernel-internal results of an interrupted call (include/linux/errno.h) */
#define ERESTARTSYS 512
#define ERESTARTNOINTR 513
#define ERESTARTNOHAND 514
#define ERESTART_RESTARTBLOCK 516

#define UC_FP_XSTATE 1
#define UC_SIGCONTEXT_SS 2
#define UC_STRICT_RESTORE_SS 4
#define FP_XSTATE_MAGIC1 0x46505853u
#define FP_XSTATE_MAGIC2 0x46505845u
#define SW_RESERVED 464

struct frame {
	uint64_t restorer;
	uint64_t flags, link;
	uint64_t stack_address;
	uint32_t stack_flags, pad;
	uint64_t stack_size;
	uint64_t r8, r9, r10, r11, r12, r13, r14, r15, di, si, bp, bx, dx, ax, cx, sp, ip, eflags;
	uint16_t cs, gs, fs, ss;
	uint64_t err, trapno, oldmask, cr2, fpstate, reserved[8];
	uint64_t sigmask;
};

struct software_bytes {
	uint32_t magic1, extended_size;
	uint64_t features;
	uint32_t xstate_size;
};

_Static_assert(sizeof (struct frame) == 8 + 304, "struct ucontext has 304 bytes");

size_t
ph_build_frame (const struct ph_thread_state *state, uint64_t address, uint64_t restorer, void *buffer)
{
	struct user_regs_struct regs;
	struct frame *frame = buffer;
	uint8_t *fpstate = (uint8_t *) buffer + 512;
	uint32_t magic2 = FP_XSTATE_MAGIC2;

	memcpy (&regs, state->regs, sizeof (regs));
	if ((long) regs.orig_rax >= 0)
		switch (-(long) regs.rax)
			{
			case ERESTARTSYS:
			case ERESTARTNOINTR:
			case ERESTARTNOHAND:
			case ERESTART_RESTARTBLOCK:
				/* a return from a signal clears restart_block: make the call again, as the program did */
				regs.rax = state->call ? state->call : regs.orig_rax;
				regs.rip -= 2;
			}
	*frame = (struct frame){
		.restorer = restorer,
		.flags = UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS,
		.stack_flags = 0x7f, /* not a legal mode: the alternate stack stays as it is */
		.r8 = regs.r8, .r9 = regs.r9, .r10 = regs.r10, .r11 = regs.r11, .r12 = regs.r12, .r13 = regs.r13,
		.r14 = regs.r14, .r15 = regs.r15, .di = regs.rdi, .si = regs.rsi, .bp = regs.rbp, .bx = regs.rbx,
		.dx = regs.rdx, .ax = regs.rax, .cx = regs.rcx, .sp = regs.rsp, .ip = regs.rip, .eflags = regs.eflags,
		.cs = (uint16_t) regs.cs, .ss = (uint16_t) regs.ss,
		.sigmask = state->sigmask,
	};
	if (state->xstate_size <= SW_RESERVED + 48)
		return sizeof (*frame);
	frame->flags |= UC_FP_XSTATE;
	frame->fpstate = address + 512;
	memcpy (fpstate, state->xstate, state->xstate_size);
	struct software_bytes software = { .magic1 = FP_XSTATE_MAGIC1, .extended_size = state->xstate_size + 4,
					   .xstate_size = state->xstate_size };
	memcpy (&software.features, state->xstate + SW_RESERVED, 8);
	memset (fpstate + SW_RESERVED, 0, 48);
	memcpy (fpstate + SW_RESERVED, &software, sizeof (software));
	memcpy (fpstate + state->xstate_size, &magic2, sizeof (magic2));
	return 512 + state->xstate_size + sizeof (magic2);
}

unsigned
ph_xstate_component (unsigned index, unsigned *offset)
{
	unsigned size = 0, c, d;

	*offset = 0;
	if (!__get_cpuid_count (0xd, index, &size, offset, &c, &d))
		return 0;
	return size;
}

void
ph_xstate_layout (unsigned *size, uint64_t *xcr0)
{
	unsigned low = 0, high = 0, c, d;

	__asm__ volatile ("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
	*xcr0 = (uint64_t) high << 32 | low;
	__get_cpuid_count (0xd, 0, &low, size, &c, &d);
}
