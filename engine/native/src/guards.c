/* Guard pages: markers of madvise (MADV_GUARD_INSTALL) in page tables, which no area shows.
 *
 * Sources: madvise(2), Documentation/admin-guide/mm/pagemap.rst (PAGE_IS_GUARD, Linux 6.15).
 */
#include <errno.h>
#include <stdlib.h>
#include <sys/ioctl.h>

#include "cleanup.h"
#include "kernel_abi.h"
#include "ph_memory.h"

#define REGIONS 512
#define PAGE_IS_GUARD (1 << 8)

static int
scan_extent (int pagemap, uint64_t at, uint64_t end, struct page_region *regions, struct ph_extents *found,
	     struct ph_error *err)
{
	while (at < end) {
		struct pm_scan_arg arg = {
			.size = sizeof (arg),
			.start = at,
			.end = end,
			.vec = (uint64_t) (uintptr_t) regions,
			.vec_len = REGIONS,
			.category_mask = PAGE_IS_GUARD,
			.return_mask = PAGE_IS_GUARD,
		};
		int count = ioctl (pagemap, PAGEMAP_SCAN, &arg);

		if (count < 0)
			return ph_fail (err, errno, "look for guard pages in %lx-%lx", (unsigned long) at,
					(unsigned long) end);
		for (int i = 0; i < count; i++)
			if (ph_extents_add (found, regions[i].start, (regions[i].end - regions[i].start) / PH_PAGE_SIZE,
					    PH_EXTENT_DATA, err) < 0)
				return -1;
		at = arg.walk_end > at ? arg.walk_end : end;
	}
	return 0;
}

int
ph_scan_guards (int pagemap, const struct ph_extents *where, struct ph_extents *found, struct ph_error *err)
{
	cleanup_free struct page_region *regions = malloc (REGIONS * sizeof (*regions));

	if (!regions)
		return ph_fail (err, ENOMEM, "allocate a list of regions");
	for (size_t i = 0; i < where->count; i++) {
		const struct ph_extent *extent = &where->items[i];
		uint64_t end = extent->start + (uint64_t) extent->nr_pages * PH_PAGE_SIZE;

		if (scan_extent (pagemap, extent->start, end, regions, found, err) < 0)
			return -1;
	}
	return 0;
}
