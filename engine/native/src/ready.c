#include <errno.h>
#include <sys/mman.h>

#include "kernel_abi.h"
#include "ph_memory.h"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23
#endif

int
ph_make_ready (const struct ph_extents *list, struct ph_error *err)
{
	for (size_t i = 0; i < list->count; i++)
		{
			void *start = (void *) list->items[i].start;

			/* what another thread has unmapped meanwhile needs nothing */
			if (madvise (start, (size_t) list->items[i].nr_pages * PH_PAGE_SIZE, MADV_POPULATE_WRITE) < 0
			    && errno != ENOMEM && errno != EFAULT)
				return ph_fail (err, errno, "make memory at %p ready", start);
		}
	return 0;
}
