/* A caught process becomes a task that interprets: it is given descriptors, and executes the helper. */
#include "birth.h"
#include "cleanup.h"
#include "tracer.h"

#include <asm/unistd.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define COUNT 4          /* descriptors that are passed */
#define FIRST_FREE 32    /* those of the task from here on are in nobody's way while they are put in order */
#define RESERVE 32768    /* bytes below the stack pointer where what is called finds its arguments */

struct adoption {
	pid_t pid;
	struct ph_birth *birth;
	struct user_regs_struct regs; /* at a system call instruction */
	uint64_t room;                /* where the task's copy of `page` is */
	struct {
		int pair[2];
		char byte, empty;
		struct iovec text;
		struct msghdr message;
		union {
			struct cmsghdr head;
			char bytes[CMSG_SPACE (COUNT * sizeof (int))];
		} rights;
		char name[16], argument[128];
		uint64_t argv[3], environment[1];
	} page;
};

#define THERE(to, field) ((to)->room + ((uint64_t) (uintptr_t) &(to)->page.field - (uint64_t) (uintptr_t) &(to)->page))

static int
move_page (struct adoption *to, bool out, struct ph_error *err)
{
	struct iovec here = { &to->page, sizeof (to->page) }, there = { (void *) to->room, sizeof (to->page) };
	ssize_t moved = (out ? process_vm_writev : process_vm_readv) (to->pid, &here, 1, &there, 1, 0);

	if (moved != (ssize_t) sizeof (to->page))
		return ph_fail (err, errno, "%s the memory of process %d", out ? "write" : "read", to->pid);
	return 0;
}

/* Write a system call where the task stands. It will execute something else before it goes on there. */
static int
stand_at_call (struct adoption *to, struct ph_error *err)
{
	static const unsigned char code[] = { 0x0f, 0x05, 0xf4 }; /* syscall; hlt: for one that should not have returned */
	long word;

	if (trace_get_regs (to->pid, &to->regs, err) < 0)
		return -1;
	errno = 0;
	word = ptrace (PTRACE_PEEKTEXT, to->pid, to->regs.rip, 0);
	if (errno)
		return ph_fail (err, errno, "read the program of process %d", to->pid);
	memcpy (&word, code, sizeof (code));
	if (ptrace (PTRACE_POKETEXT, to->pid, to->regs.rip, word) < 0)
		return ph_fail (err, errno, "write a system call into process %d", to->pid);
	to->room = (to->regs.rsp - RESERVE) & ~63ul;
	return 0;
}

static void
set_call (struct adoption *to, long number, const uint64_t arguments[5])
{
	to->regs.orig_rax = ~0ul;
	to->regs.rax = (uint64_t) number;
	to->regs.rdi = arguments[0];
	to->regs.rsi = arguments[1];
	to->regs.rdx = arguments[2];
	to->regs.r10 = arguments[3];
	to->regs.r8 = arguments[4];
}

static long
call (struct adoption *to, const char *what, long number, const uint64_t arguments[5], struct ph_error *err)
{
	long result;

	set_call (to, number, arguments);
	if (trace_call (to->pid, &to->regs, &result, err) < 0)
		return -1;
	return result < 0 ? ph_fail (err, (int) -result, "%s in process %d", what, to->pid) : result;
}

#define CALL(to, what, number, err, ...) call (to, what, number, (uint64_t[5]){ __VA_ARGS__ }, err)

/* Send descriptors through a socket of the task, of which we have a duplicate. */
static int
send_descriptors (struct adoption *to, int pidfd, const int fds[COUNT], struct ph_error *err)
{
	cleanup_close int socket = (int) syscall (__NR_pidfd_getfd, pidfd, to->page.pair[0], 0);
	struct iovec text = { &to->page.byte, 1 };
	struct msghdr message = { .msg_iov = &text,
				  .msg_iovlen = 1,
				  .msg_control = &to->page.rights,
				  .msg_controllen = sizeof (to->page.rights) };

	to->page.rights.head.cmsg_level = SOL_SOCKET;
	to->page.rights.head.cmsg_type = SCM_RIGHTS;
	to->page.rights.head.cmsg_len = CMSG_LEN (COUNT * sizeof (int));
	memcpy (CMSG_DATA (&to->page.rights.head), fds, COUNT * sizeof (int));
	if (socket < 0 || sendmsg (socket, &message, 0) != 1)
		return ph_fail (err, errno, "pass descriptors to process %d", to->pid);
	return 0;
}

/* Have the task receive descriptors of ours; `theirs` are their numbers in it. */
static int
pass (struct adoption *to, int pidfd, const int fds[COUNT], int theirs[COUNT], struct ph_error *err)
{
	if (CALL (to, "make a socket", __NR_socketpair, err, AF_UNIX, SOCK_STREAM, 0, THERE (to, pair)) < 0
	    || move_page (to, false, err) < 0 || send_descriptors (to, pidfd, fds, err) < 0)
		return -1;
	to->page.text = (struct iovec){ (void *) THERE (to, byte), 1 };
	to->page.message = (struct msghdr){ .msg_iov = (void *) THERE (to, text),
					    .msg_iovlen = 1,
					    .msg_control = (void *) THERE (to, rights),
					    .msg_controllen = sizeof (to->page.rights) };
	memset (&to->page.rights, 0, sizeof (to->page.rights));
	if (move_page (to, true, err) < 0
	    || CALL (to, "receive descriptors", __NR_recvmsg, err, (uint64_t) to->page.pair[1], THERE (to, message)) < 0
	    || move_page (to, false, err) < 0)
		return -1;
	if (to->page.rights.head.cmsg_len != CMSG_LEN (COUNT * sizeof (int)))
		return ph_fail (err, EMFILE, "receive descriptors in process %d", to->pid);
	memcpy (theirs, CMSG_DATA (&to->page.rights.head), COUNT * sizeof (int));
	return 0;
}

/* Those that were passed get the helper's numbers, and no others stay. */
static int
order_descriptors (struct adoption *to, const int theirs[COUNT], struct ph_error *err)
{
	long moved[COUNT];

	for (int i = 0; i < COUNT; i++)
		{
			moved[i] = CALL (to, "move a descriptor", __NR_fcntl, err, (uint64_t) theirs[i], F_DUPFD, FIRST_FREE);
			if (moved[i] < 0)
				return -1;
		}
	for (int i = 0; i < COUNT; i++)
		{
			uint64_t flags = FD_CODE + i == FD_IMAGE ? O_CLOEXEC : 0;
			if (CALL (to, "move a descriptor", __NR_dup3, err, (uint64_t) moved[i], (uint64_t) (FD_CODE + i), flags) < 0)
				return -1;
		}
	if (CALL (to, "close descriptors", __NR_close_range, err, 0, FD_CODE - 1) < 0
	    || CALL (to, "close descriptors", __NR_close_range, err, FD_IMAGE + 1, ~0u) < 0)
		return -1;
	return 0;
}

static int
execute (struct adoption *to, struct ph_error *err)
{
	strcpy (to->page.name, "phaul-skeleton");
	birth_argument (to->birth, to->page.argument, sizeof (to->page.argument));
	to->page.argv[0] = THERE (to, name);
	to->page.argv[1] = THERE (to, argument);
	if (move_page (to, true, err) < 0)
		return -1;
	set_call (to, __NR_execveat,
		  (uint64_t[]){ FD_IMAGE, THERE (to, empty), THERE (to, argv), THERE (to, environment), AT_EMPTY_PATH });
	if (trace_set_regs (to->pid, &to->regs, err) < 0)
		return -1;
	if (ptrace (PTRACE_CONT, to->pid, 0, 0) < 0)
		return ph_fail (err, errno, "start the skeleton %d", to->pid);
	return birth_wait_idle (to->pid, to->birth, err);
}

struct adopt_job {
	pid_t pid;
	struct ph_birth *birth;
};

static long
adopt (void *argument, struct ph_error *err)
{
	struct adopt_job *job = argument;
	struct ph_birth *birth = job->birth;
	struct adoption to = { .pid = job->pid, .birth = birth };
	cleanup_close int code = birth_code (err);
	cleanup_close int image = code < 0 ? -1 : birth_image (err);
	cleanup_close int pidfd = -1;
	int theirs[COUNT];

	if (image < 0)
		return -1;
	pidfd = (int) syscall (__NR_pidfd_open, job->pid, 0);
	if (pidfd < 0)
		return ph_fail (err, errno, "open process %d", job->pid);
	if (stand_at_call (&to, err) < 0
	    || pass (&to, pidfd, (int[COUNT]){ code, birth->arena, birth->socket, image }, theirs, err) < 0
	    || order_descriptors (&to, theirs, err) < 0)
		return -1;
	/* The next program that it executes finds itself in that namespace (Linux 6.3). */
	if (birth->timens
	    && (CALL (&to, "make a time namespace", __NR_unshare, err, CLONE_NEWTIME) < 0
		|| birth_set_clocks (birth, job->pid, err) < 0))
		return -1;
	if (execute (&to, err) < 0)
		return -1;
	birth->pidfd = ph_steal_fd (&pidfd);
	return job->pid;
}

long
ph_adopt (struct ph_tracer *tracer, int pid, struct ph_birth *birth, struct ph_error *err)
{
	struct adopt_job job = { pid, birth };

	return ph_tracer_call (tracer, adopt, &job, err);
}
