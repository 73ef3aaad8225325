#include "ph_proc.h"

#include "cleanup.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The size of the text, -errno if it cannot be read; as much as there is room for means that there may be more. */
static int32_t
read_text (int directory, int number, char *text, uint32_t room)
{
	char name[16];
	uint32_t size = 0;

	snprintf (name, sizeof (name), "%d", number);
	cleanup_close int fd = openat (directory, name, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	while (size < room)
		{
			ssize_t got = read (fd, text + size, room - size);

			if (got < 0)
				return -errno;
			if (got == 0)
				break;
			size += (uint32_t) got;
		}
	return (int32_t) size;
}

static void
close_all (const struct ph_descriptor *descriptors, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (descriptors[i].own >= 0)
			close (descriptors[i].own);
}

int
ph_look_at_descriptors (int pidfd, int fdinfo, struct ph_descriptor *descriptors, size_t count, char *room,
			uint32_t size, struct ph_error *err)
{
	uint32_t used = 0;

	for (size_t i = 0; i < count; i++)
		{
			struct ph_descriptor *one = &descriptors[i];
			long own = syscall (SYS_pidfd_getfd, pidfd, one->number, 0);

			one->own = own < 0 ? -errno : (int32_t) own;
			one->at = used;
			one->size = own < 0 ? -EBADF : read_text (fdinfo, one->number, room + used, size - used);
			if (one->size > 0 && (used += (uint32_t) one->size) >= size)
				{
					close_all (descriptors, i + 1);
					return ph_fail (err, ENOBUFS, "the texts of %zu descriptors", count);
				}
		}
	return 0;
}
