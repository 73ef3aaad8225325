/* The injected program's interface: an interpreter of lists of system calls.
 *
 * One *arena* (memory shared between the engine and the tasks of one address
 * space family) holds a number of *slots*, one for each task that interprets.
 * The engine writes a program into a slot, rings it, and waits until the slot
 * says it is done. Values that a program computes stand in its registers;
 * bytes that it reads or writes stand in its slot's buffer.
 *
 * Nothing here is policy: which system calls, in which order, is decided by
 * Python (phaul_engine/program.py), which assembles these structures.
 */
#ifndef PH_INTERP_H
#define PH_INTERP_H

#include <stdint.h>

/* cffi: begin */
#define PH_SLOT_SIZE 262144     /* one slot, header to end, in the arena */
#define PH_SLOT_STACK 8192      /* of which the interpreter's own stack, at its end */
#define PH_SLOT_FRAME 16384     /* and, below that, room for a signal frame */
#define PH_REGISTERS 64         /* the slot's registers, 64-bit */

/* What an instruction does. */
#define PH_OP_END 0             /* the program is done */
#define PH_OP_CALL 1            /* regs[dst] = system call `nr` (args) */
#define PH_OP_SET 2             /* regs[dst] = arg0 */
#define PH_OP_ADD 3             /* regs[dst] = arg0 + arg1 */
#define PH_OP_STORE 4           /* *(u64 *) arg0 = arg1 */
#define PH_OP_LOAD 5            /* regs[dst] = *(u64 *) arg0 */
#define PH_OP_JUMP 6            /* go to instruction arg0 if arg1 != 0 */
#define PH_OP_LESS 7            /* regs[dst] = arg0 < arg1, signed */
#define PH_OP_FORK 8            /* clone3 with the struct clone_args at arg0 (its size arg1); the child
                                   starts interpreting in slot arg2. regs[dst] = its pid */
#define PH_OP_SIGRETURN 9       /* leave through the slot's signal frame: no way back */
#define PH_OP_COPY 10           /* copy arg2 bytes from arg1 to arg0 */
#define PH_OP_NEXT 11           /* go on with the program at offset arg0 of the slot, its buffer at arg1, of arg2
                                   instructions */
#define PH_OP_REST 12           /* the program is done; and system call `nr` (args), whatever comes of it. Nobody is
                                   woken: whoever waits looks often, and is not to stop the task on its way there */

/* What a failing CALL or FORK means. */
#define PH_FAIL_STOP 0          /* the program stops; the slot tells index and errno */
#define PH_FAIL_KEEP 1          /* regs[dst] = -errno, go on */
#define PH_FAIL_UNLESS_DST 2    /* stop also when the result is not the value regs[dst] had before */

/* How an operand is read. */
#define PH_ARG_IMMEDIATE 0      /* the value itself */
#define PH_ARG_REGISTER 1       /* regs[value] */
#define PH_ARG_BUFFER 2         /* address of the slot's buffer + value */

struct ph_instruction {
	uint16_t op;
	uint16_t policy;
	uint16_t dst;           /* a register's number */
	uint16_t nr;            /* the system call's number */
	uint8_t kind[8];        /* PH_ARG_* of each argument; [6] and [7] are unused */
	int64_t arg[6];
};

/* What a slot is doing. */
#define PH_SLOT_FREE 0          /* nobody interprets here */
#define PH_SLOT_IDLE 1          /* an interpreter waits here for a program */
#define PH_SLOT_RUN 2           /* rung by the engine; the program is being interpreted */
#define PH_SLOT_DONE 3          /* the program has ended, well or not */
#define PH_SLOT_LEFT 4          /* the interpreter has left by itself: its engine was silent too long */

/* The head of a slot. The program follows at `program`, the buffer at `buffer`
   (offsets from the slot's start). */
struct ph_slot {
	uint32_t state;         /* PH_SLOT_*; a futex, shared */
	uint32_t error;         /* errno of the failing instruction, 0 = all went well */
	uint32_t failed_at;     /* its index */
	uint32_t count;         /* number of instructions */
	uint32_t program;       /* offset */
	uint32_t buffer;        /* offset */
	uint32_t patience_ms;   /* how long an idle interpreter waits before it leaves by the signal frame; 0 = for ever */
	uint32_t tid;           /* of the interpreting task, set by it (its own pid namespace's number) */
	uint64_t frame;         /* address of the signal frame (its return address), 0 = none */
	uint64_t arena;         /* address of slot 0 in the task */
	int64_t result;         /* of the failing instruction, raw */
	int64_t regs[64];
};
/* cffi: end */

#endif
