/* Which pages changed: userfaultfd WP_ASYNC with PAGEMAP_SCAN, or soft-dirty bits.
 *
 * Sources: Documentation/admin-guide/mm/{pagemap,userfaultfd,soft-dirty}.rst, fs/proc/task_mmu.c.
 *
 * What the code is built around (measured on 6.18):
 * - PAGE_IS_WRITTEN alone in both masks is the kernel's fast path; PAGE_IS_FILE anywhere costs thirty times as much.
 * - Pages that were never there count as written until they are cleared, which puts markers into page tables:
 *   8 bytes a page, so whole empty blocks of 2 MiB are never cleared.
 * - Dropping a page of a private file mapping leaves a marker where it was clean: nothing is reported as written.
 * - A marker is reported as PAGE_IS_SWAPPED. Only of written pages does that bit mean contents.
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cleanup.h"
#include "kernel_abi.h"
#include "ph_memory.h"

#define REGIONS 2048    /* of one PAGEMAP_SCAN call */
#define BLOCK 0x200000ul        /* what one page table covers */
#define WINDOW 65536    /* pagemap entries read at once */
#define RANGE_SHARED (1u << 31) /* a mapping of shared memory: all of it is of a file */

#define PM_SOFT_DIRTY (1ull << 55)
#define PM_FILE (1ull << 61)
#define PM_SWAP (1ull << 62)
#define PM_FRAME ((1ull << 55) - 1)     /* where it is in memory; 0 without CAP_SYS_ADMIN */
#define PM_PRESENT (1ull << 63)

/* One call of PAGEMAP_SCAN from *at on, which moves to where it ended. The number of regions. */
static int
scan_regions (int pagemap, uint64_t *at, uint64_t end, uint64_t flags, uint64_t mask, uint64_t anyof,
	      uint64_t wanted, struct page_region *regions, struct ph_error *err)
{
	struct pm_scan_arg arg = {
		.size = sizeof (arg),
		.flags = flags,
		.start = *at,
		.end = end,
		.vec = (uint64_t) (uintptr_t) regions,
		.vec_len = REGIONS,
		.category_mask = mask,
		.category_anyof_mask = anyof,
		.return_mask = wanted,
	};
	int found = ioctl (pagemap, PAGEMAP_SCAN, &arg);

	if (found < 0)
		return ph_fail (err, errno, "scan pages %lx-%lx", (unsigned long) *at, (unsigned long) end);
	*at = arg.walk_end > *at ? arg.walk_end : end;
	return found;
}

static uint32_t
kind_of_region (const struct page_region *region, unsigned int range_flags)
{
	int here = (region->categories & (PAGE_IS_PRESENT | PAGE_IS_SWAPPED)) != 0;

	if (!(range_flags & PH_RANGE_FILE))
		return here ? PH_EXTENT_DATA : PH_EXTENT_DROP;
	return here && !(region->categories & PAGE_IS_FILE) ? PH_EXTENT_PRIVATE : PH_EXTENT_REVERT;
}

static int
add_region (struct ph_extents *list, uint64_t start, uint64_t end, uint32_t kind, struct ph_error *err)
{
	return start < end ? ph_extents_add (list, start, (end - start) / PH_PAGE_SIZE, kind, err) : 0;
}

/* Written pages of [at, end), told apart. `flags` are PM_SCAN_*. */
static int
classify (int pagemap, uint64_t at, uint64_t end, unsigned int range_flags, uint64_t flags, struct ph_extents *list,
	  struct ph_error *err)
{
	cleanup_free struct page_region *regions = malloc (REGIONS * sizeof (*regions));
	uint64_t wanted = PAGE_IS_WRITTEN | PAGE_IS_PRESENT | PAGE_IS_SWAPPED;

	if (!regions)
		return ph_fail (err, ENOMEM, "allocate a list of regions");
	if (range_flags & PH_RANGE_FILE)
		wanted |= PAGE_IS_FILE;
	while (at < end) {
		int found = scan_regions (pagemap, &at, end, flags, PAGE_IS_WRITTEN, 0, wanted, regions, err);
		if (found < 0)
			return -1;
		for (int i = 0; i < found; i++)
			if (add_region (list, regions[i].start, regions[i].end, kind_of_region (&regions[i], range_flags), err) < 0)
				return -1;
	}
	return 0;
}

/* A stretch of pages that a clearing scan will look at as one. */
struct cluster {
	int pagemap;
	unsigned int range_flags;
	uint64_t start;
	uint64_t end;
	struct ph_extents *list;
};

static int
clear_cluster (struct cluster *cluster, struct ph_error *err)
{
	uint64_t start = cluster->start, end = cluster->end;

	cluster->start = cluster->end = 0;
	if (start >= end)
		return 0;
	return classify (cluster->pagemap, start, end, cluster->range_flags,
			 PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC, cluster->list, err);
}

static int
extend_cluster (struct cluster *cluster, uint64_t start, uint64_t end, struct ph_error *err)
{
	if (start >= end)
		return 0;
	if (cluster->end && start - cluster->end > BLOCK && clear_cluster (cluster, err) < 0)
		return -1;
	if (!cluster->end)
		cluster->start = start;
	cluster->end = end;
	return 0;
}

/* A written region that holds whole blocks: those that are empty are reported but not cleared. Where one is
   filled meanwhile, it stays written and the next scan has it. */
static int
skip_holes (struct cluster *cluster, uint64_t at, uint64_t end, struct ph_error *err)
{
	cleanup_free struct page_region *regions = malloc (REGIONS * sizeof (*regions));
	uint64_t done = at;

	if (!regions)
		return ph_fail (err, ENOMEM, "allocate a list of regions");
	while (at < end) {
		int found = scan_regions (cluster->pagemap, &at, end, 0, PAGE_IS_WRITTEN, 0,
					  PAGE_IS_WRITTEN | PAGE_IS_PRESENT | PAGE_IS_SWAPPED, regions, err);
		if (found < 0)
			return -1;
		for (int i = 0; i < found; i++) {
			uint64_t first = (regions[i].start + BLOCK - 1) & ~(BLOCK - 1);
			uint64_t last = regions[i].end & ~(BLOCK - 1);
			if (regions[i].categories & (PAGE_IS_PRESENT | PAGE_IS_SWAPPED) || first >= last)
				continue;
			if (extend_cluster (cluster, done, first, err) < 0 || clear_cluster (cluster, err) < 0)
				return -1;
			uint32_t kind = cluster->range_flags & PH_RANGE_FILE ? PH_EXTENT_REVERT : PH_EXTENT_DROP;
			if (add_region (cluster->list, first, last, kind, err) < 0)
				return -1;
			done = last;
		}
	}
	return extend_cluster (cluster, done, end, err);
}

/* One window of a clearing scan: a fast look for written regions, then a clearing one at them only. */
static int
scan_and_clear (int pagemap, uint64_t *at, const struct ph_range *range, struct ph_extents *list, struct ph_error *err)
{
	cleanup_free struct page_region *regions = malloc (REGIONS * sizeof (*regions));
	struct cluster cluster = { .pagemap = pagemap, .range_flags = range->flags, .list = list };

	if (!regions)
		return ph_fail (err, ENOMEM, "allocate a list of regions");
	int found = scan_regions (pagemap, at, range->end, PM_SCAN_CHECK_WPASYNC, PAGE_IS_WRITTEN, 0, PAGE_IS_WRITTEN,
				  regions, err);
	if (found < 0)
		return -1;
	for (int i = 0; i < found; i++) {
		uint64_t start = regions[i].start, end = regions[i].end;
		int failed = end - start >= BLOCK ? skip_holes (&cluster, start, end, err)
						  : extend_cluster (&cluster, start, end, err);
		if (failed)
			return -1;
	}
	return clear_cluster (&cluster, err);
}

/* One window of a scan that clears nothing. Small runs are reported as contents without a second look: the reader
   finds out that they are zero. */
static int
scan_only (int pagemap, uint64_t *at, const struct ph_range *range, struct ph_extents *list, struct ph_error *err)
{
	cleanup_free struct page_region *regions = malloc (REGIONS * sizeof (*regions));

	if (!regions)
		return ph_fail (err, ENOMEM, "allocate a list of regions");
	int found = scan_regions (pagemap, at, range->end, PM_SCAN_CHECK_WPASYNC, PAGE_IS_WRITTEN, 0, PAGE_IS_WRITTEN,
				  regions, err);
	if (found < 0)
		return -1;
	for (int i = 0; i < found; i++) {
		uint64_t start = regions[i].start, end = regions[i].end;
		int failed = range->flags & PH_RANGE_FILE || end - start >= BLOCK
				     ? classify (pagemap, start, end, range->flags, 0, list, err)
				     : add_region (list, start, end, PH_EXTENT_DATA, err);
		if (failed)
			return -1;
	}
	return 0;
}

/* Everything that is there, of a process that nobody tracks. Zero pages are left to the reader. */
static int
scan_present (int pagemap, uint64_t *at, const struct ph_range *range, struct ph_extents *list, struct ph_error *err)
{
	cleanup_free struct page_region *regions = malloc (REGIONS * sizeof (*regions));
	uint64_t here = PAGE_IS_PRESENT | PAGE_IS_SWAPPED;
	uint64_t file = range->flags & PH_RANGE_FILE ? PAGE_IS_FILE : 0;

	if (!regions)
		return ph_fail (err, ENOMEM, "allocate a list of regions");
	int found = scan_regions (pagemap, at, range->end, 0, 0, here, here | file, regions, err);
	if (found < 0)
		return -1;
	for (int i = 0; i < found; i++) {
		uint32_t kind = kind_of_region (&regions[i], range->flags);
		if (kind != PH_EXTENT_REVERT && add_region (list, regions[i].start, regions[i].end, kind, err) < 0)
			return -1;
	}
	return 0;
}

/* The private copies in [at, end). */
static int
scan_private_copies (int pagemap, uint64_t at, uint64_t end, struct ph_extents *list, struct ph_error *err)
{
	cleanup_free struct page_region *regions = malloc (REGIONS * sizeof (*regions));

	if (!regions)
		return ph_fail (err, ENOMEM, "allocate a list of regions");
	while (at < end) {
		int found = scan_regions (pagemap, &at, end, 0, PAGE_IS_PRESENT, 0, PAGE_IS_PRESENT | PAGE_IS_FILE, regions, err);
		if (found < 0)
			return -1;
		for (int i = 0; i < found; i++)
			if (!(regions[i].categories & PAGE_IS_FILE)
			    && add_region (list, regions[i].start, regions[i].end, PH_EXTENT_PRIVATE, err) < 0)
				return -1;
	}
	return 0;
}

int
ph_scan_reverted (int pagemap, const struct ph_extents *known, struct ph_extents *kept, struct ph_extents *list,
		  struct ph_error *err)
{
	for (size_t i = 0; i < known->count; i++) {
		uint64_t at = known->items[i].start, end = at + (uint64_t) known->items[i].nr_pages * PH_PAGE_SIZE;
		struct ph_extents here = { 0 };
		int failed = scan_private_copies (pagemap, at, end, &here, err);

		for (size_t j = 0; !failed && j < here.count; j++) {
			const struct ph_extent *copy = &here.items[j];
			failed = add_region (list, at, copy->start, PH_EXTENT_REVERT, err) < 0
				 || ph_extents_add (kept, copy->start, copy->nr_pages, PH_EXTENT_PRIVATE, err) < 0;
			at = copy->start + (uint64_t) copy->nr_pages * PH_PAGE_SIZE;
		}
		free (here.items);
		if (failed || add_region (list, at, end, PH_EXTENT_REVERT, err) < 0)
			return -1;
	}
	return 0;
}

/* ---- By the entries of pagemap -------------------------------------------- */

/* The frame that reads of anonymous memory nobody has written find; 0 if it is not to be known. */
static uint64_t
zero_frame (void)
{
	static _Atomic uint64_t known;
	uint64_t frame = known;

	if (frame)
		return frame;
	cleanup_close int pagemap = open ("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	volatile char *page = mmap (NULL, PH_PAGE_SIZE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	uint64_t entry = 0;

	if (page == MAP_FAILED)
		return 0;
	if (page[0] == 0 && pread (pagemap, &entry, 8, (uintptr_t) page / PH_PAGE_SIZE * 8) == 8 && entry & PM_PRESENT)
		known = frame = entry & PM_FRAME;
	munmap ((void *) page, PH_PAGE_SIZE);
	return frame;
}

/* Whether an entry of anonymous memory is one of the zero pages. Reading a page that was dropped maps one without a
   soft-dirty bit. The large one counts as a page of a file. */
static int
is_zero_page (uint64_t entry, uint64_t zero)
{
	return (entry & PM_PRESENT) && ((entry & PM_FILE) || (zero && (entry & PM_FRAME) == zero));
}

/* The kind of a page by its entry; -1 if there is nothing to say about it. */
static int
kind_of_entry (uint64_t entry, unsigned int range_flags, uint64_t zero, int all)
{
	int file = range_flags & PH_RANGE_FILE;
	int own = (entry & (PM_PRESENT | PM_SWAP)) != 0;

	if (file)
		own = own && !(entry & PM_PRESENT && entry & PM_FILE);
	else if (!(range_flags & RANGE_SHARED))
		own = own && !is_zero_page (entry, zero);
	if (!own)
		return all ? -1 : file ? PH_EXTENT_REVERT : PH_EXTENT_DROP;
	if (!all && !(entry & PM_SOFT_DIRTY))
		return -1;
	return file ? PH_EXTENT_PRIVATE : PH_EXTENT_DATA;
}

static int
scan_entries (int pagemap, uint64_t *at, const struct ph_range *range, int all, struct ph_extents *list,
	      struct ph_error *err)
{
	cleanup_free uint64_t *entries = malloc (WINDOW * sizeof (*entries));
	uint64_t pages = (range->end - *at) / PH_PAGE_SIZE, zero = zero_frame ();

	if (!entries)
		return ph_fail (err, ENOMEM, "allocate a window of pagemap");
	if (pages > WINDOW)
		pages = WINDOW;
	ssize_t got = pread (pagemap, entries, pages * 8, *at / PH_PAGE_SIZE * 8);
	if (got < 0)
		return ph_fail (err, errno, "read pagemap of %lx", (unsigned long) *at);
	if ((size_t) got < pages * 8)
		memset ((char *) entries + got, 0, pages * 8 - got);    /* past the end of the address space */
	for (uint64_t i = 0; i < pages; i++) {
		int kind = kind_of_entry (entries[i], range->flags, zero, all);
		if (kind >= 0 && ph_extents_add (list, *at + i * PH_PAGE_SIZE, 1, kind, err) < 0)
			return -1;
	}
	*at += pages * PH_PAGE_SIZE;
	return 0;
}

static int
scan_window (struct ph_scan *scan, const struct ph_range *range, struct ph_extents *list, struct ph_error *err)
{
	if (scan->backend == PH_TRACK_SOFT_DIRTY)
		return scan_entries (scan->pagemap, &scan->at, range, scan->flags & PH_SCAN_ALL, list, err);
	if (scan->flags & PH_SCAN_ALL) {
		if (scan_present (scan->pagemap, &scan->at, range, list, err) == 0)
			return 0;
		/* before 6.7 */
		return err->code == ENOTTY ? scan_entries (scan->pagemap, &scan->at, range, 1, list, err) : -1;
	}
	if (scan->flags & PH_SCAN_CLEAR)
		return scan_and_clear (scan->pagemap, &scan->at, range, list, err);
	return scan_only (scan->pagemap, &scan->at, range, list, err);
}

int
ph_scan_private (struct ph_scan *scan, const struct ph_range *ranges, size_t count, struct ph_extents *list,
		 struct ph_error *err)
{
	while (scan->index < count) {
		const struct ph_range *range = &ranges[scan->index];

		if (scan->at < range->start)
			scan->at = range->start;
		if (scan->at >= range->end) {
			scan->index++;
			scan->at = 0;
			continue;
		}
		if (scan_window (scan, range, list, err) < 0)
			return -1;
		if (list->count >= scan->limit)
			return 1;
	}
	return 0;
}

int
ph_clear_soft_dirty (int clear_refs, struct ph_error *err)
{
	if (pwrite (clear_refs, "4", 1, 0) != 1)
		return ph_fail (err, errno, "clear soft-dirty bits");
	return 0;
}

/* ---- Shared objects ------------------------------------------------------- */

int
ph_scan_descriptor (int fd, uint64_t size, struct ph_extents *list, struct ph_error *err)
{
	uint64_t mask = PH_PAGE_SIZE - 1, at = 0;

	size = (size + mask) & ~mask;
	while (at < size) {
		off_t data = lseek (fd, at, SEEK_DATA);
		if (data < 0 && errno != ENXIO)
			return ph_fail (err, errno, "look for data after %lx", (unsigned long) at);
		uint64_t start = data < 0 || (uint64_t) data > size ? size : (uint64_t) data & ~mask;
		off_t hole = start < size ? lseek (fd, start, SEEK_HOLE) : (off_t) size;
		if (hole < 0)
			return ph_fail (err, errno, "look for a hole after %lx", (unsigned long) start);
		uint64_t end = ((uint64_t) hole + mask) & ~mask;
		if (end > size || end <= start)
			end = size;
		if (add_region (list, at, start, PH_EXTENT_DROP, err) < 0
		    || add_region (list, start, end, PH_EXTENT_DATA, err) < 0)
			return -1;
		at = end;
	}
	return 0;
}

/* Written pages of a mapping's part [at, end), reported `shift` further down, in offsets. */
static int
scan_mapped_data (const struct ph_scan *scan, uint64_t at, uint64_t end, uint64_t shift, struct ph_extents *list,
		  struct ph_error *err)
{
	cleanup_free struct page_region *regions = malloc (REGIONS * sizeof (*regions));
	uint64_t flags = PM_SCAN_CHECK_WPASYNC | (scan->flags & PH_SCAN_CLEAR ? PM_SCAN_WP_MATCHING : 0);

	if (!regions)
		return ph_fail (err, ENOMEM, "allocate a list of regions");
	while (at < end) {
		int found = scan_regions (scan->pagemap, &at, end, flags, PAGE_IS_WRITTEN, 0, PAGE_IS_WRITTEN, regions, err);
		if (found < 0)
			return -1;
		for (int i = 0; i < found; i++)
			if (add_region (list, regions[i].start - shift, regions[i].end - shift, PH_EXTENT_DATA, err) < 0)
				return -1;
	}
	return 0;
}

static int
scan_mapped_entries (const struct ph_scan *scan, uint64_t at, uint64_t end, uint64_t shift, struct ph_extents *list,
		     struct ph_error *err)
{
	struct ph_range range = { .start = at, .end = end, .flags = RANGE_SHARED };
	struct ph_extents found = { 0 };
	int failed = 0;

	while (!failed && at < end)
		failed = scan_entries (scan->pagemap, &at, &range, 0, &found, err);
	for (size_t i = 0; !failed && i < found.count; i++)
		if (found.items[i].kind == PH_EXTENT_DATA)
			failed = ph_extents_add (list, found.items[i].start - shift, found.items[i].nr_pages,
						 PH_EXTENT_DATA, err);
	free (found.items);
	return failed;
}

int
ph_scan_mapping (const struct ph_scan *scan, uint64_t start, uint64_t size, uint64_t offset,
		 const struct ph_extents *data, struct ph_extents *list, struct ph_error *err)
{
	for (size_t i = 0; i < data->count; i++) {
		const struct ph_extent *extent = &data->items[i];
		uint64_t from = extent->start, to = from + (uint64_t) extent->nr_pages * PH_PAGE_SIZE;

		from = from > offset ? from : offset;
		to = to < offset + size ? to : offset + size;
		if (extent->kind != PH_EXTENT_DATA || from >= to)
			continue;
		uint64_t shift = start - offset;        /* may wrap; so does the sum */
		int failed = scan->backend == PH_TRACK_SOFT_DIRTY
				     ? scan_mapped_entries (scan, from + shift, to + shift, shift, list, err)
				     : scan_mapped_data (scan, from + shift, to + shift, shift, list, err);
		if (failed)
			return -1;
	}
	return 0;
}

/* ---- userfaultfd and the probe -------------------------------------------- */

int
ph_uffd_enable (int uffd, struct ph_error *err)
{
	struct uffdio_api api = {
		.api = UFFD_API,
		.features = UFFD_FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED,
	};

	if (ioctl (uffd, UFFDIO_API, &api) < 0)
		return ph_fail (err, errno, "ask userfaultfd for WP_ASYNC");
	return 0;
}

int
ph_uffd_track (int uffd, uint64_t start, uint64_t end, struct ph_error *err)
{
	struct uffdio_register area = { .range = { start, end - start }, .mode = UFFDIO_REGISTER_MODE_WP };

	if (ioctl (uffd, UFFDIO_REGISTER, &area) < 0)
		return ph_fail (err, errno, "track %lx-%lx", (unsigned long) start, (unsigned long) end);
	return 0;
}

int
ph_uffd_untrack (int uffd, uint64_t start, uint64_t end, struct ph_error *err)
{
	struct uffdio_range range = { start, end - start };

	if (ioctl (uffd, UFFDIO_UNREGISTER, &range) < 0)
		return ph_fail (err, errno, "stop tracking %lx-%lx", (unsigned long) start, (unsigned long) end);
	return 0;
}

static int
wp_async_works (int pagemap, volatile char *page)
{
	uint64_t start = (uint64_t) (uintptr_t) page, at = start;
	struct ph_range range = { .start = start, .end = start + PH_PAGE_SIZE };
	struct ph_extents list = { 0 };
	struct ph_error err;
	cleanup_close int uffd = syscall (SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY);

	if (uffd < 0 || ph_uffd_enable (uffd, &err) < 0 || ph_uffd_track (uffd, start, range.end, &err) < 0)
		return 0;
	page[0] = 1;
	int works = scan_and_clear (pagemap, &at, &range, &list, &err) == 0 && ph_extents_pages (&list, PH_EXTENT_DATA) == 1;
	at = start;
	list.count = 0;
	works = works && scan_only (pagemap, &at, &range, &list, &err) == 0 && list.count == 0;
	page[0] = 2;
	at = start;
	works = works && scan_only (pagemap, &at, &range, &list, &err) == 0 && list.count == 1;
	free (list.items);
	return works;
}

static int
soft_dirty_works (int pagemap, volatile char *page)
{
	struct ph_error err;
	uint64_t clean, dirty;
	off_t where = (uintptr_t) page / PH_PAGE_SIZE * 8;
	cleanup_close int clear_refs = open ("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC);

	page[0] = 1;
	if (clear_refs < 0 || ph_clear_soft_dirty (clear_refs, &err) < 0 || pread (pagemap, &clean, 8, where) != 8)
		return 0;
	page[0] = 2;
	return pread (pagemap, &dirty, 8, where) == 8 && !(clean & PM_SOFT_DIRTY) && (dirty & PM_SOFT_DIRTY);
}

unsigned int
ph_tracker_probe (void)
{
	cleanup_close int pagemap = open ("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	unsigned int works = 0;

	if (pagemap < 0)
		return 0;
	for (unsigned int backend = PH_TRACK_WP_ASYNC; backend <= PH_TRACK_SOFT_DIRTY; backend <<= 1) {
		char *page = mmap (NULL, PH_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (page == MAP_FAILED)
			return works;
		if (backend == PH_TRACK_WP_ASYNC ? wp_async_works (pagemap, page) : soft_dirty_works (pagemap, page))
			works |= backend;
		munmap (page, PH_PAGE_SIZE);
	}
	return works;
}
