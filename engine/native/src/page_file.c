/* Pages to and from image files, and their hashes. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "cleanup.h"
#include "page_io.h"

/* A list of runs, taken a chunk's worth at a time. */
struct cursor {
	const struct ph_extents *list;
	size_t index;
	uint64_t page;          /* in that extent */
};

/* The next runs, PH_CHUNK_PAGES pages at most; the number of runs, *pages of pages. */
static unsigned int
next_runs (struct cursor *cursor, struct ph_extent *runs, unsigned int *pages)
{
	unsigned int used = 0;

	*pages = 0;
	while (cursor->index < cursor->list->count && *pages < PH_CHUNK_PAGES) {
		const struct ph_extent *extent = &cursor->list->items[cursor->index];
		uint64_t left = extent->nr_pages - cursor->page, room = PH_CHUNK_PAGES - *pages;
		uint64_t part = left < room ? left : room;
		uint64_t start = extent->start + cursor->page * PH_PAGE_SIZE;
		runs[used++] = (struct ph_extent) { start, part, extent->kind };
		*pages += part;
		cursor->page += part;
		if (cursor->page == extent->nr_pages) {
			cursor->index++;
			cursor->page = 0;
		}
	}
	return used;
}

/* Note in `written` which of the pages that were read go to the file, and move those together. Their number, or -1. */
static ssize_t
pick (const struct ph_extent *runs, unsigned int count, uint8_t *buffer, const struct ph_gone *gone, bool keep_zero,
      struct ph_extents *written, struct ph_error *err)
{
	size_t kept = 0;
	unsigned int at = 0;

	for (unsigned int i = 0; i < count; i++) {
		for (unsigned int j = 0; j < runs[i].nr_pages; j++, at++) {
			uint8_t *page = buffer + (size_t) at * PH_PAGE_SIZE;
			uint64_t start = runs[i].start + (uint64_t) j * PH_PAGE_SIZE;
			if (ph_is_gone (gone, at))
				continue;
			if (!keep_zero && runs[i].kind == PH_EXTENT_DATA && ph_page_is_zero (page))
				continue;
			if (ph_extents_add (written, start, 1, PH_EXTENT_DATA, err) < 0)
				return -1;
			if (kept != at)
				memcpy (buffer + kept * PH_PAGE_SIZE, page, PH_PAGE_SIZE);
			kept++;
		}
	}
	return kept;
}

/* Without the runs that are no contents. */
static unsigned int
only_contents (struct ph_extent *runs, unsigned int count)
{
	unsigned int kept = 0;

	for (unsigned int i = 0; i < count; i++)
		if (runs[i].kind == PH_EXTENT_DATA || runs[i].kind == PH_EXTENT_PRIVATE)
			runs[kept++] = runs[i];
	return kept;
}

int
ph_dump_pages (struct ph_place place, const struct ph_extents *list, int out, uint64_t *offset, unsigned int flags,
	       struct ph_extents *written, struct ph_error *err)
{
	cleanup_free uint8_t *buffer = malloc (PH_CHUNK_SIZE);
	struct ph_place file = { 0, out };
	struct ph_extent runs[PH_CHUNK_PAGES];
	struct cursor cursor = { .list = list };
	struct ph_gone gone;
	unsigned int count, pages;

	if (!buffer)
		return ph_fail (err, ENOMEM, "allocate a buffer for pages");
	while ((count = next_runs (&cursor, runs, &pages))) {
		count = only_contents (runs, count);
		if (count == 0)
			continue;
		if (ph_read_runs (place, runs, count, buffer, &gone, err) < 0)
			return -1;
		ssize_t kept = pick (runs, count, buffer, &gone, flags & PH_DUMP_KEEP_ZERO, written, err);
		struct ph_extent to = { *offset, kept, PH_EXTENT_DATA };
		if (kept < 0 || (kept > 0 && ph_write_runs (file, &to, 1, buffer, err) < 0))
			return -1;
		*offset += (uint64_t) kept * PH_PAGE_SIZE;
	}
	return 0;
}

/* The images of the round before, walked in address order. */
struct known {
	const struct ph_piece *pieces;
	size_t count;
	size_t index;
};

enum verdict { LEAVE_OUT, SAME, WRITE };

/* The known bytes of the page at `start` into `page`: 1, or 0 if the round before has none, or -1. */
static int
read_known (struct known *known, uint64_t start, uint8_t *page, struct ph_error *err)
{
	while (known->index < known->count) {
		const struct ph_piece *piece = &known->pieces[known->index];
		if (start < piece->start)
			return 0;
		if (start - piece->start < (uint64_t) piece->nr_pages * PH_PAGE_SIZE) {
			ssize_t got = pread (piece->fd, page, PH_PAGE_SIZE, piece->offset + (start - piece->start));
			if (got != PH_PAGE_SIZE)
				return ph_fail (err, got < 0 ? errno : ENODATA, "read page %lx from the round before",
						(unsigned long) start);
			return 1;
		}
		known->index++;
	}
	return 0;
}

/* What becomes of a page; an enum verdict, or -1. */
static int
judge (const uint8_t *page, uint64_t start, uint32_t kind, struct known *known, struct ph_error *err)
{
	uint8_t before[PH_PAGE_SIZE];
	int held = read_known (known, start, before, err);

	if (held < 0)
		return -1;
	if (held)
		return memcmp (before, page, PH_PAGE_SIZE) == 0 ? SAME : WRITE;
	return kind == PH_EXTENT_DATA && ph_page_is_zero (page) ? LEAVE_OUT : WRITE;
}

/* As `pick`, against the round before. */
static ssize_t
pick_changed (const struct ph_extent *runs, unsigned int count, uint8_t *buffer, const struct ph_gone *gone,
	      struct known *known, struct ph_extents *written, struct ph_error *err)
{
	size_t kept = 0;
	unsigned int at = 0;

	for (unsigned int i = 0; i < count; i++) {
		for (unsigned int j = 0; j < runs[i].nr_pages; j++, at++) {
			uint8_t *page = buffer + (size_t) at * PH_PAGE_SIZE;
			uint64_t start = runs[i].start + (uint64_t) j * PH_PAGE_SIZE;
			if (ph_is_gone (gone, at))
				continue;
			int verdict = judge (page, start, runs[i].kind, known, err);
			if (verdict == LEAVE_OUT)
				continue;
			uint32_t kind = verdict == SAME ? PH_EXTENT_SAME : PH_EXTENT_DATA;
			if (verdict < 0 || ph_extents_add (written, start, 1, kind, err) < 0)
				return -1;
			if (verdict == SAME)
				continue;
			if (kept != at)
				memcpy (buffer + kept * PH_PAGE_SIZE, page, PH_PAGE_SIZE);
			kept++;
		}
	}
	return kept;
}

int
ph_dump_changed (struct ph_place place, const struct ph_extents *list, const struct ph_piece *pieces, size_t piece_count,
		 int out, uint64_t *offset, struct ph_extents *written, struct ph_error *err)
{
	cleanup_free uint8_t *buffer = malloc (PH_CHUNK_SIZE);
	struct ph_place file = { 0, out };
	struct ph_extent runs[PH_CHUNK_PAGES];
	struct cursor cursor = { .list = list };
	struct known known = { pieces, piece_count, 0 };
	struct ph_gone gone;
	unsigned int count, pages;

	if (!buffer)
		return ph_fail (err, ENOMEM, "allocate a buffer for pages");
	while ((count = next_runs (&cursor, runs, &pages))) {
		count = only_contents (runs, count);
		if (count == 0)
			continue;
		if (ph_read_runs (place, runs, count, buffer, &gone, err) < 0)
			return -1;
		ssize_t kept = pick_changed (runs, count, buffer, &gone, &known, written, err);
		struct ph_extent to = { *offset, kept, PH_EXTENT_DATA };
		if (kept < 0 || (kept > 0 && ph_write_runs (file, &to, 1, buffer, err) < 0))
			return -1;
		*offset += (uint64_t) kept * PH_PAGE_SIZE;
	}
	return 0;
}

/* Write the pages of `run` that are not in memory as they are in `buffer`. They are read through /proc/PID/mem:
   process_vm_readv (2) pins pages, and of a shared page that makes a copy (gup_must_unshare in mm/internal.h). */
static int
write_changed (struct ph_place place, const struct ph_extent *run, const uint8_t *buffer, uint8_t *there,
	       struct ph_error *err)
{
	struct ph_place contents = { .pid = 0, .fd = place.fd };
	struct ph_gone gone;

	if (ph_read_runs (contents, run, 1, there, &gone, err) < 0)
		return -1;
	for (uint32_t page = 0; page < run->nr_pages;) {
		uint32_t first = page;
		const uint8_t *ours = buffer + (size_t) first * PH_PAGE_SIZE;

		while (page < run->nr_pages
		       && memcmp (buffer + (size_t) page * PH_PAGE_SIZE, there + (size_t) page * PH_PAGE_SIZE, PH_PAGE_SIZE))
			page++;
		struct ph_extent changed = { run->start + (uint64_t) first * PH_PAGE_SIZE, page - first, PH_EXTENT_DATA };
		if (page > first && ph_write_runs (place, &changed, 1, ours, err) < 0)
			return -1;
		if (page == first)
			page++;
	}
	return 0;
}

int
ph_fill_pages (struct ph_place place, const struct ph_piece *pieces, size_t count, unsigned int flags,
	       struct ph_error *err)
{
	cleanup_free uint8_t *buffer = malloc (PH_CHUNK_SIZE);
	cleanup_free uint8_t *there = malloc (PH_CHUNK_SIZE);

	if (!buffer || !there)
		return ph_fail (err, ENOMEM, "allocate a buffer for pages");
	for (size_t i = 0; i < count; i++) {
		for (uint64_t page = 0; page < pieces[i].nr_pages;) {
			uint64_t left = pieces[i].nr_pages - page;
			uint64_t part = left < PH_CHUNK_PAGES ? left : PH_CHUNK_PAGES;
			size_t size = part * PH_PAGE_SIZE;
			uint64_t at = page * PH_PAGE_SIZE;
			ssize_t got = pread (pieces[i].fd, buffer, size, pieces[i].offset + at);
			if (got < 0 || (size_t) got != size)
				return ph_fail (err, got < 0 ? errno : ENODATA, "read pages of %lx from an image",
						(unsigned long) (pieces[i].start + at));
			struct ph_extent run = { pieces[i].start + at, part, PH_EXTENT_DATA };
			int failed = flags & PH_FILL_COMPARE ? write_changed (place, &run, buffer, there, err)
							     : ph_write_runs (place, &run, 1, buffer, err);
			if (failed < 0)
				return -1;
			page += part;
		}
	}
	return 0;
}

int
ph_hash_pages (struct ph_place place, const struct ph_extents *list, uint64_t *hashes, size_t room, struct ph_error *err)
{
	cleanup_free uint8_t *buffer = malloc (PH_CHUNK_SIZE);
	struct ph_extent runs[PH_CHUNK_PAGES];
	struct cursor cursor = { .list = list };
	struct ph_gone gone;
	unsigned int count, pages;
	size_t done = 0;

	if (!buffer)
		return ph_fail (err, ENOMEM, "allocate a buffer for pages");
	while ((count = next_runs (&cursor, runs, &pages))) {
		if (room - done < pages)
			return ph_fail (err, ENOBUFS, "hash more than %zu pages", room);
		if (ph_read_runs (place, runs, count, buffer, &gone, err) < 0)
			return -1;
		for (unsigned int i = 0; i < pages; i++, done++)
			hashes[done] = ph_is_gone (&gone, i) ? 0 : ph_xxh64 (buffer + (size_t) i * PH_PAGE_SIZE, PH_PAGE_SIZE);
	}
	return 0;
}
