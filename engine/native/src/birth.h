/* Inside of the destination's side: what the births of skeleton tasks have in common. */
#ifndef BIRTH_H
#define BIRTH_H

#include "ph_tracer.h"

#include <sys/ptrace.h>
#include <sys/types.h>

#ifndef PTRACE_O_SUSPEND_SECCOMP
#define PTRACE_O_SUSPEND_SECCOMP (1 << 21)
#endif
#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x80
#endif

#define SKELETON_OPTIONS                                                                                            \
	(PTRACE_O_EXITKILL | PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEFORK | PTRACE_O_TRACEVFORK | PTRACE_O_TRACECLONE \
	 | PTRACE_O_SUSPEND_SECCOMP)

/* the helper's descriptors (interp/helper.c) and, above them, its image */
enum { FD_CODE = 3, FD_ARENA, FD_SOCKET, FD_IMAGE };

/* What follows runs on the tracer thread only. */

/* The helper's image and the interpreter's code as memory files; -1 if that fails. */
int birth_image (struct ph_error *err);
int birth_code (struct ph_error *err);

/* The helper's argument. */
void birth_argument (const struct ph_birth *birth, char *text, size_t size);

/* Set the clocks of the time namespace that children of `tid` are born into. */
int birth_set_clocks (const struct ph_birth *birth, pid_t tid, struct ph_error *err);

/* Wait until a task that runs, or is stopped at the beginning of its helper, interprets. */
int birth_wait_idle (pid_t pid, const struct ph_birth *birth, struct ph_error *err);

#endif
