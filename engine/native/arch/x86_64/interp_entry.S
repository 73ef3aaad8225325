/* Entry of the injected program, and the two things C cannot say: a clone3
 * whose child wakes up on another stack, and leaving through a signal frame.
 */
#include <asm/unistd.h>

	.section .text.entry, "ax", @progbits
	.globl interp_entry
interp_entry:                           /* rdi = the slot, PH_SLOT_SIZE bytes */
	lea	(0x40000 - 64)(%rdi), %rsp
	xor	%ebp, %ebp
	call	interp_main
	ud2

	.text
	.globl interp_clone3
interp_clone3:                          /* (args, size, child's slot) */
	mov	%rdx, %r8               /* kept by the kernel in parent and child */
	mov	$__NR_clone3, %eax
	syscall
	test	%rax, %rax
	jz	1f
	ret
1:	mov	%r8, %rdi
	jmp	interp_entry

	.globl interp_sigreturn
interp_sigreturn:                       /* (frame): as if a handler had returned */
	lea	8(%rdi), %rsp
	mov	$__NR_rt_sigreturn, %eax
	syscall
	ud2

	.section .note.GNU-stack, "", @progbits
