/* Reading many socket options in one call.
 *
 * A socket has some eighty options that a program can have set, and a server
 * has thousands of sockets; inside the freeze every one of them is read.
 */
#ifndef PH_SOCKOPT_H
#define PH_SOCKOPT_H

#include <stdint.h>

/* cffi: begin */
struct ph_sockopt {
	int32_t level;
	int32_t name;
	uint32_t offset;        /* where the value goes */
	uint32_t size;          /* room there, bytes */
};

/* getsockopt (2) for each of `count` options of socket `fd`. Values go to
   `values` + offset, and lengths[i] is the value's length in bytes or -errno:
   an option that this kernel or this socket does not have is no error. Bytes
   of `values` that no option wrote are left as they were. */
void ph_sockopts_read (int fd, const struct ph_sockopt *options, uint32_t count,
		       uint8_t *values, int32_t *lengths);
/* cffi: end */

#endif
