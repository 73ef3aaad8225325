/* Looking at many descriptors of a process in one call.
 *
 * Inside the freeze every descriptor of every process is looked at, and most
 * are as they were: what costs is not the kernel's part of it.
 */
#ifndef PH_PROC_H
#define PH_PROC_H

#include <stddef.h>
#include <stdint.h>

#include "ph_error.h"

/* cffi: begin */
struct ph_descriptor {
	int32_t number;         /* in the process */
	int32_t own;            /* out: a duplicate of ours (pidfd_getfd(2)), close-on-exec; -errno if there is none */
	int32_t size;           /* out: bytes of its fdinfo text (proc_pid_fdinfo(5)); -errno if it could not be read */
	uint32_t at;            /* out: where in `room` the text begins */
};

/* For each of `count` descriptors, duplicate it through `pidfd` and read its text in the directory `fdinfo`
   (/proc/PID/fdinfo). Returns 0; -1 with ENOBUFS if `room` (of `size` bytes) does not hold all texts: then there are no
   duplicates. */
int ph_look_at_descriptors (int pidfd, int fdinfo, struct ph_descriptor *descriptors, size_t count, char *room,
			    uint32_t size, struct ph_error *err);
/* cffi: end */

#endif
