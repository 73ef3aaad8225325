/* The static helper that a destination skeleton begins as.
 *
 * It is executed with two descriptors, 3 = the interpreter's code and 4 = the
 * arena, and one argument with five hexadecimal numbers: the code's address
 * and size, the arena's address and size, and the slot's number. It maps both
 * and jumps. Everything else, dropping this image first of all, is done by
 * programs.
 */
#include "interp.h"

#include <linux/mman.h>
#include <asm/unistd.h>


static uint64_t
hex (const char **text)
{
	uint64_t value = 0;

	for (; **text && **text != ' '; (*text)++)
		value = value * 16 + (uint64_t) (**text <= '9' ? **text - '0' : **text - 'a' + 10);
	if (**text)
		(*text)++;
	return value;
}

static void
map (uint64_t address, uint64_t size, int prot, int flags, int fd)
{
	long got = raw_syscall (__NR_mmap, (long) address, (long) size, prot, flags | MAP_FIXED_NOREPLACE, fd, 0);

	if (got != (long) address)
		raw_syscall (__NR_exit_group, 100, 0, 0, 0, 0, 0);
	raw_syscall (__NR_close, fd, 0, 0, 0, 0, 0);
}

__attribute__ ((noreturn, used)) void
helper_main (long *stack)
{
	const char *text = (const char *) stack[2]; /* argv[1] */
	uint64_t code = hex (&text);
	uint64_t code_size = hex (&text);
	uint64_t arena = hex (&text);
	uint64_t arena_size = hex (&text);
	uint64_t slot = hex (&text);

	map (code, code_size, PROT_READ | PROT_EXEC, MAP_PRIVATE, 3);
	map (arena, arena_size, PROT_READ | PROT_WRITE, MAP_SHARED, 4);
	((void (*) (uint64_t)) code) (arena + slot * PH_SLOT_SIZE);
	__builtin_unreachable ();
}

__asm__ (".globl _start\n"
	 "_start:\n"
	 "	mov %rsp, %rdi\n"
	 "	and $-16, %rsp\n"
	 "	call helper_main\n");
