/* Lists of runs of pages. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "ph_memory.h"

struct ph_extents *
ph_extents_new (void)
{
	return calloc (1, sizeof (struct ph_extents));
}

void
ph_extents_free (struct ph_extents *list)
{
	if (list)
		free (list->items);
	free (list);
}

void
ph_extents_clear (struct ph_extents *list)
{
	list->count = 0;
}

static int
grow (struct ph_extents *list, struct ph_error *err)
{
	size_t room = list->room ? list->room * 2 : 256;
	struct ph_extent *items = reallocarray (list->items, room, sizeof (*items));

	if (!items)
		return ph_fail (err, ENOMEM, "allocate %zu extents", room);
	list->items = items;
	list->room = room;
	return 0;
}

int
ph_extents_add (struct ph_extents *list, uint64_t start, uint64_t nr_pages, uint32_t kind, struct ph_error *err)
{
	while (nr_pages) {
		struct ph_extent *last = list->count ? &list->items[list->count - 1] : NULL;

		if (last && last->kind == kind && last->start + (uint64_t) last->nr_pages * PH_PAGE_SIZE == start
		    && nr_pages <= UINT32_MAX - last->nr_pages) {
			last->nr_pages += nr_pages;
			return 0;
		}
		if (list->count == list->room && grow (list, err) < 0)
			return -1;
		uint32_t part = nr_pages > UINT32_MAX ? UINT32_MAX : nr_pages;
		list->items[list->count++] = (struct ph_extent) { start, part, kind };
		start += (uint64_t) part * PH_PAGE_SIZE;
		nr_pages -= part;
	}
	return 0;
}

int
ph_extents_append (struct ph_extents *list, const struct ph_extents *other, uint32_t kind, struct ph_error *err)
{
	for (size_t i = 0; i < other->count; i++)
		if (other->items[i].kind == kind
		    && ph_extents_add (list, other->items[i].start, other->items[i].nr_pages, kind, err) < 0)
			return -1;
	return 0;
}

static int
compare_starts (const void *left, const void *right)
{
	const struct ph_extent *a = left, *b = right;

	if (a->start != b->start)
		return a->start < b->start ? -1 : 1;
	return a->kind < b->kind ? -1 : a->kind > b->kind;
}

static uint64_t
end_of (const struct ph_extent *extent)
{
	return extent->start + (uint64_t) extent->nr_pages * PH_PAGE_SIZE;
}

/* One kind's extents of a sorted list, merged into `out`; `covered` (sorted, disjoint) is left out. */
static int
merge_kind (const struct ph_extents *list, uint32_t kind, const struct ph_extents *covered, struct ph_extents *out,
	    struct ph_error *err)
{
	uint64_t done = 0;
	size_t next = 0;

	for (size_t i = 0; i < list->count; i++) {
		if (list->items[i].kind != kind)
			continue;
		uint64_t start = list->items[i].start > done ? list->items[i].start : done;
		uint64_t end = end_of (&list->items[i]);
		while (start < end) {
			while (next < covered->count && end_of (&covered->items[next]) <= start)
				next++;
			const struct ph_extent *cover = next < covered->count ? &covered->items[next] : NULL;
			uint64_t stop = cover && cover->start < end ? cover->start : end;
			if (stop > start && ph_extents_add (out, start, (stop - start) / PH_PAGE_SIZE, kind, err) < 0)
				return -1;
			start = stop < end ? end_of (cover) : end;
		}
		if (end > done)
			done = end;
	}
	return 0;
}

int
ph_extents_unite (struct ph_extents *list, struct ph_error *err)
{
	if (list->count < 2)
		return 0;
	qsort (list->items, list->count, sizeof (*list->items), compare_starts);
	struct ph_extents covered = { 0 };
	for (uint32_t kind = PH_EXTENT_DATA; kind <= PH_EXTENT_SAME; kind++) {
		struct ph_extents mine = { 0 };
		int failed = merge_kind (list, kind, &covered, &mine, err);
		for (size_t i = 0; !failed && i < mine.count; i++) {
			if (covered.count == covered.room && grow (&covered, err) < 0)
				failed = -1;
			else
				covered.items[covered.count++] = mine.items[i];
		}
		free (mine.items);
		if (failed) {
			free (covered.items);
			return -1;
		}
		if (covered.count)
			qsort (covered.items, covered.count, sizeof (*covered.items), compare_starts);
	}
	free (list->items);
	*list = covered;
	return 0;
}

int
ph_extents_exclude (struct ph_extents *list, const struct ph_extents *holes, struct ph_error *err)
{
	struct ph_extents kept = { 0 };

	for (uint32_t kind = PH_EXTENT_DATA; kind <= PH_EXTENT_SAME; kind++)
		if (merge_kind (list, kind, holes, &kept, err) < 0) {
			free (kept.items);
			return -1;
		}
	if (kept.count)
		qsort (kept.items, kept.count, sizeof (*kept.items), compare_starts);
	free (list->items);
	*list = kept;
	return 0;
}

uint64_t
ph_extents_pages (const struct ph_extents *list, uint32_t kind)
{
	uint64_t pages = 0;

	for (size_t i = 0; i < list->count; i++)
		if (list->items[i].kind == kind)
			pages += list->items[i].nr_pages;
	return pages;
}
