/* Scope-bound release of resources (GCC/Clang cleanup attribute). */
#ifndef PH_CLEANUP_H
#define PH_CLEANUP_H

#include <dirent.h>
#include <stdlib.h>
#include <unistd.h>

static inline void
ph_cleanup_free (void *pointer)
{
	free (*(void **) pointer);
}

static inline void
ph_cleanup_close (int *fd)
{
	if (*fd >= 0)
		close (*fd);
}

static inline void
ph_cleanup_closedir (DIR **dir)
{
	if (*dir)
		closedir (*dir);
}

#define cleanup_free __attribute__ ((cleanup (ph_cleanup_free)))
#define cleanup_close __attribute__ ((cleanup (ph_cleanup_close)))
#define cleanup_closedir __attribute__ ((cleanup (ph_cleanup_closedir)))

/* Take a descriptor out of its cleanup. */
static inline int
ph_steal_fd (int *fd)
{
	int taken = *fd;
	*fd = -1;
	return taken;
}

#endif
