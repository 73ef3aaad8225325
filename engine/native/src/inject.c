/* An interpreter inside a running program's process, and out again.
 *
 * Nothing is written over: the first calls go through two pieces of code that
 * the program has anyway, `syscall; ret` and its signal restorer, with a signal
 * frame on unused stack below everything. So at any instant after the first
 * changed register, a task whose tracer is gone makes one more call, returns
 * into the restorer and is back where it was.
 */
#include "inject.h"

#include "cleanup.h"
#include "ph_interp.h"
#include "sigframe.h"

#include <asm/unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>

extern const unsigned char ph_interp_blob[];
extern const size_t ph_interp_blob_size;

#define PAGE 4096ull
#define CODE_SIZE ((ph_interp_blob_size + PAGE - 1) & ~(PAGE - 1))
#define SCAN_CHUNK (1u << 20)

const void *
ph_interp_code (size_t *size)
{
	*size = ph_interp_blob_size;
	return ph_interp_blob;
}

static int
read_task (int pid, uint64_t address, void *buffer, size_t size)
{
	struct iovec here = { buffer, size }, there = { (void *) address, size };

	return process_vm_readv (pid, &here, 1, &there, 1, 0) == (ssize_t) size ? 0 : -1;
}

static int
write_task (int pid, uint64_t address, const void *buffer, size_t size, struct ph_error *err)
{
	struct iovec here = { (void *) buffer, size }, there = { (void *) address, size };

	if (process_vm_writev (pid, &here, 1, &there, 1, 0) != (ssize_t) size)
		return ph_fail (err, errno, "write %zu bytes at %#lx of task %d", size, address, pid);
	return 0;
}

static void
find_in (const uint8_t *code, size_t size, uint64_t address, struct ph_gadgets *gadgets)
{
	static const uint8_t syscall_ret[] = { 0x0f, 0x05, 0xc3 };
	/* mov $15, %rax and mov $15, %eax, each followed by syscall: glibc, musl and Go have one of them */
	static const uint8_t restorer_long[] = { 0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05 };
	static const uint8_t restorer_short[] = { 0xb8, 0x0f, 0, 0, 0, 0x0f, 0x05 };
	const uint8_t *at;

	if (!gadgets->syscall_ret && (at = memmem (code, size, syscall_ret, sizeof (syscall_ret))))
		gadgets->syscall_ret = address + (uint64_t) (at - code);
	if (!gadgets->sigreturn && (at = memmem (code, size, restorer_long, sizeof (restorer_long))))
		gadgets->sigreturn = address + (uint64_t) (at - code);
	if (!gadgets->sigreturn && (at = memmem (code, size, restorer_short, sizeof (restorer_short))))
		gadgets->sigreturn = address + (uint64_t) (at - code);
}

int
ph_find_gadgets (int pid, const uint64_t *areas, size_t count, struct ph_gadgets *gadgets, struct ph_error *err)
{
	cleanup_free uint8_t *code = malloc (SCAN_CHUNK + 16);

	if (!code)
		return ph_fail (err, ENOMEM, "search the code of task %d", pid);
	*gadgets = (struct ph_gadgets){ 0 };
	for (size_t i = 0; i < count; i++)
		for (uint64_t at = areas[2 * i]; at < areas[2 * i + 1]; at += SCAN_CHUNK)
			{
				uint64_t left = areas[2 * i + 1] - at;
				size_t size = left < SCAN_CHUNK + 16 ? left : SCAN_CHUNK + 16;

				if (read_task (pid, at, code, size) == 0)
					find_in (code, size, at, gadgets);
				if (gadgets->syscall_ret && gadgets->sigreturn)
					return 0;
			}
	return ph_fail (err, ENOENT, "find a system call and a signal restorer in the code of task %d", pid);
}

int
ph_find_syscall (int pid, const uint64_t *areas, size_t count, uint64_t *address, struct ph_error *err)
{
	static const uint8_t instruction[] = { 0x0f, 0x05 };
	cleanup_free uint8_t *code = malloc (SCAN_CHUNK + 1);

	if (!code)
		return ph_fail (err, ENOMEM, "search the code of task %d", pid);
	for (size_t i = 0; i < count; i++)
		for (uint64_t at = areas[2 * i]; at < areas[2 * i + 1]; at += SCAN_CHUNK)
			{
				uint64_t left = areas[2 * i + 1] - at;
				size_t size = left < SCAN_CHUNK + 1 ? left : SCAN_CHUNK + 1;
				const uint8_t *found;

				if (read_task (pid, at, code, size) == 0 && (found = memmem (code, size, instruction, 2)))
					{
						*address = at + (uint64_t) (found - code);
						return 0;
					}
			}
	return ph_fail (err, ENOENT, "find a system call in the code of task %d", pid);
}

/* The registers of a call made at the program's own `syscall; ret`, which would come home through the frame. */
static struct user_regs_struct
call_regs (const struct ph_thread_state *state, const struct ph_gadgets *gadgets, uint64_t frame, long nr, uint64_t a,
	   uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f)
{
	struct user_regs_struct regs;

	memcpy (&regs, state->regs, sizeof (regs));
	regs.rip = gadgets->syscall_ret;
	regs.rsp = frame;
	regs.orig_rax = ~0ull;
	regs.rax = (uint64_t) nr;
	regs.rdi = a;
	regs.rsi = b;
	regs.rdx = c;
	regs.r10 = d;
	regs.r8 = e;
	regs.r9 = f;
	return regs;
}

static int
put_back (const struct ph_thread_state *state, struct ph_error *err)
{
	if (trace_set_regs (state->tid, (const struct user_regs_struct *) state->regs, err) < 0)
		return -1;
	return trace_set_mask (state->tid, state->sigmask, err);
}

static uint64_t
align_up (uint64_t value, uint64_t to)
{
	return (value + to - 1) & ~(to - 1);
}

static int
write_spare_frame (const struct inject_job *job, struct ph_error *err)
{
	uint8_t frame[PH_FRAME_SIZE] = { 0 };
	uint64_t address = align_up (job->injection->spare, 64);
	size_t size = ph_build_frame (job->state, address, job->gadgets->sigreturn, frame);

	if (address + size > job->injection->spare + job->injection->spare_size)
		return ph_fail (err, ENOBUFS, "a signal frame of %zu bytes in task %d", size, job->state->tid);
	return write_task (job->state->tid, address, frame, size, err);
}

static int
call_in_task (const struct inject_job *job, const char *what, long nr, const uint64_t args[6], long *result,
	      struct ph_error *err)
{
	struct user_regs_struct regs
		= call_regs (job->state, job->gadgets, align_up (job->injection->spare, 64), nr, args[0], args[1], args[2],
			     args[3], args[4], args[5]);

	if (trace_call (job->state->tid, &regs, result, err) < 0)
		return -1;
	if (*result < 0 && *result > -4096)
		return ph_fail (err, (int) -*result, "%s in task %d", what, job->state->tid);
	return 0;
}

/* Our own view of the arena, by the kernel's link to the mapped object. */
static int
map_here (struct ph_injection *injection, uint64_t arena_size, struct ph_error *err)
{
	char path[96];

	snprintf (path, sizeof (path), "/proc/%d/map_files/%lx-%lx", injection->tid, injection->address,
		  injection->address + arena_size);
	cleanup_close int fd = open (path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return ph_fail (err, errno, "open %s", path);
	void *arena = mmap (NULL, arena_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (arena == MAP_FAILED)
		return ph_fail (err, errno, "map the arena of task %d", injection->tid);
	injection->arena = arena;
	return 0;
}

/* The code goes in by /proc/PID/mem: the mapping is never writable in the task. */
static int
write_code (const struct ph_injection *injection, struct ph_error *err)
{
	char path[64];

	snprintf (path, sizeof (path), "/proc/%d/mem", injection->tid);
	cleanup_close int fd = open (path, O_RDWR | O_CLOEXEC);
	if (fd < 0 || pwrite (fd, ph_interp_blob, ph_interp_blob_size, (off_t) injection->code) != (ssize_t) ph_interp_blob_size)
		return ph_fail (err, errno, "write the interpreter into task %d", injection->tid);
	return 0;
}

static long
make_injection (const struct inject_job *job, struct ph_error *err)
{
	struct ph_injection *injection = job->injection;
	uint64_t arena_size = (uint64_t) injection->slots * PH_SLOT_SIZE;
	long address, code;

	injection->size = arena_size + CODE_SIZE;
	if (write_spare_frame (job, err) < 0)
		return -1;
	const uint64_t arena_args[6] = { 0, injection->size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, ~0ull, 0 };
	if (call_in_task (job, "mmap of the arena", __NR_mmap, arena_args, &address, err) < 0)
		return -1;
	injection->address = (uint64_t) address;
	injection->code = injection->address + arena_size;
	const uint64_t code_args[6] = { injection->code, CODE_SIZE, PROT_READ | PROT_EXEC,
					MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, ~0ull, 0 };
	if (call_in_task (job, "mmap of the interpreter", __NR_mmap, code_args, &code, err) < 0
	    || write_code (injection, err) < 0 || map_here (injection, arena_size, err) < 0)
		{
			struct ph_error ignored;
			const uint64_t args[6] = { injection->address, injection->size };

			call_in_task (job, "munmap", __NR_munmap, args, &code, &ignored);
			return -1;
		}
	return 0;
}

long
inject_map (void *argument, struct ph_error *err)
{
	struct inject_job *job = argument;
	struct ph_error second;
	long result = make_injection (job, err);

	if (put_back (job->state, result < 0 ? &second : err) < 0)
		return -1;
	return result;
}

int
ph_inject (struct ph_tracer *tracer, const struct ph_thread_state *state, const struct ph_gadgets *gadgets,
	   uint64_t spare, uint64_t spare_size, int slots, struct ph_injection *injection, struct ph_error *err)
{
	struct inject_job job = { .state = state, .gadgets = gadgets, .injection = injection };

	*injection = (struct ph_injection){ .tid = state->tid, .slots = slots, .spare = spare, .spare_size = spare_size };
	return (int) ph_tracer_call (tracer, inject_map, &job, err);
}

int
inject_prepare (const struct ph_injection *injection, const struct ph_thread_state *state, int index, int patience_ms,
		struct ph_error *err)
{
	uint64_t address = injection->address + (uint64_t) index * PH_SLOT_SIZE;
	struct ph_slot *slot = (struct ph_slot *) ((uint8_t *) injection->arena + (uint64_t) index * PH_SLOT_SIZE);
	uint64_t frame_offset = PH_SLOT_SIZE - PH_SLOT_STACK - PH_SLOT_FRAME - 1024;
	uint8_t *frame = (uint8_t *) slot + frame_offset;

	if (index < 0 || index >= injection->slots)
		return ph_fail (err, EINVAL, "slot %d of %d", index, injection->slots);
	if (ph_build_frame (state, address + frame_offset, 0, frame) > PH_SLOT_FRAME + 1024)
		return ph_fail (err, ENOBUFS, "the signal frame of task %d", state->tid);
	*slot = (struct ph_slot){ .arena = injection->address, .frame = address + frame_offset,
				  .patience_ms = (uint32_t) patience_ms };
	return 0;
}

int
inject_start (const struct ph_injection *injection, const struct ph_thread_state *state, int index, struct ph_error *err)
{
	uint64_t address = injection->address + (uint64_t) index * PH_SLOT_SIZE;
	struct user_regs_struct regs;
	struct ph_error second;

	memcpy (&regs, state->regs, sizeof (regs));
	regs.rip = injection->code;
	regs.rdi = address;
	regs.rsp = address + PH_SLOT_SIZE - 64;
	regs.orig_rax = ~0ull;
	regs.rax = 0;
	int result = trace_set_regs (state->tid, &regs, err) < 0 ? -1 : trace_set_mask (state->tid, ~0ull, err);
	if (result == 0 && ptrace (PTRACE_CONT, state->tid, 0, 0) < 0)
		result = ph_fail (err, errno, "start the interpreter of task %d", state->tid);
	if (result < 0)
		put_back (state, &second); /* where it would go on is about to be unmapped */
	return result;
}

struct enter_job {
	struct ph_injection *injection;
	const struct ph_thread_state *const *states;
	const int32_t *slots;
	size_t count;
	int patience_ms;
};

static long
enter (void *argument, struct ph_error *err)
{
	struct enter_job *job = argument;
	struct ph_error second;

	for (size_t i = 0; i < job->count; i++)
		if (inject_prepare (job->injection, job->states[i], job->slots[i], job->patience_ms, err) < 0
		    || inject_start (job->injection, job->states[i], job->slots[i], err) < 0)
			{
				inject_leave (job->states, i, &second);
				return -1;
			}
	return 0;
}

int
ph_enter (struct ph_tracer *tracer, struct ph_injection *injection, const struct ph_thread_state *const *states,
	  const int32_t *slots, size_t count, int patience_ms, struct ph_error *err)
{
	struct enter_job job = { injection, states, slots, count, patience_ms };

	return (int) ph_tracer_call (tracer, enter, &job, err);
}

int
inject_leave (const struct ph_thread_state *const *states, size_t count, struct ph_error *err)
{
	struct ph_error second;
	int result = 0;

	/* one may have been killed; the others go back all the same: what they run now is about to be unmapped */
	for (size_t i = 0; i < count; i++)
		if (ptrace (PTRACE_INTERRUPT, states[i]->tid, 0, 0) < 0)
			result = ph_fail (result < 0 ? &second : err, errno, "interrupt task %d", states[i]->tid);
	for (size_t i = 0; i < count; i++)
		if (trace_wait_stop (states[i]->tid, ph_now_us () + 5000000, NULL, result < 0 ? &second : err) < 0
		    || put_back (states[i], result < 0 ? &second : err) < 0)
			result = -1;
	return result;
}

static long
leave (void *argument, struct ph_error *err)
{
	struct enter_job *job = argument;

	return inject_leave (job->states, job->count, err);
}

int
ph_leave (struct ph_tracer *tracer, const struct ph_thread_state *const *states, size_t count, struct ph_error *err)
{
	struct enter_job job = { .states = states, .count = count };

	return (int) ph_tracer_call (tracer, leave, &job, err);
}

long
inject_cure (void *argument, struct ph_error *err)
{
	struct inject_job *job = argument;
	const uint64_t args[6] = { job->injection->address, job->injection->size };
	long result;

	if (write_spare_frame (job, err) < 0)
		return -1;
	int called = call_in_task (job, "munmap of the interpreter", __NR_munmap, args, &result, err);
	return put_back (job->state, err) < 0 ? -1 : called;
}

void
inject_forget (struct ph_injection *injection)
{
	if (injection->arena)
		munmap (injection->arena, (uint64_t) injection->slots * PH_SLOT_SIZE);
	injection->arena = NULL;
}

int
ph_cure (struct ph_tracer *tracer, struct ph_injection *injection, const struct ph_thread_state *state,
	 const struct ph_gadgets *gadgets, struct ph_error *err)
{
	struct inject_job job = { .state = state, .gadgets = gadgets, .injection = injection };

	int result = (int) ph_tracer_call (tracer, inject_cure, &job, err);
	inject_forget (injection);
	return result;
}
