#include "ph_sockopt.h"

#include <errno.h>
#include <sys/socket.h>

void
ph_sockopts_read (int fd, const struct ph_sockopt *options, uint32_t count,
		  uint8_t *values, int32_t *lengths)
{
	for (uint32_t i = 0; i < count; i++) {
		const struct ph_sockopt *option = &options[i];
		socklen_t length = option->size;

		if (getsockopt (fd, option->level, option->name, values + option->offset, &length) < 0)
			lengths[i] = -errno;
		else
			lengths[i] = (int32_t) length;
	}
}
