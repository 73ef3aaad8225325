/* Lists of runs of pages: any order of appending, uniting and excluding leaves what a set of pages would be. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ph_memory.h"

#define PAGES 256       /* the model: the pages from 0 on */

static void
require (int condition, const char *what)
{
	if (condition)
		return;
	fprintf (stderr, "%s\n", what);
	abort ();
}

static void
check (const struct ph_extents *list, const uint8_t *model)
{
	uint8_t found[PAGES] = { 0 };
	uint64_t end = 0;

	for (size_t i = 0; i < list->count; i++) {
		const struct ph_extent *one = &list->items[i];
		require (one->nr_pages > 0 && one->start >= end, "runs are in order and apart");
		end = one->start + (uint64_t) one->nr_pages * PH_PAGE_SIZE;
		require (end <= (uint64_t) PAGES * PH_PAGE_SIZE, "a page from nowhere");
		memset (found + one->start / PH_PAGE_SIZE, 1, one->nr_pages);
	}
	require (memcmp (found, model, PAGES) == 0, "the same pages");
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
	struct ph_extents *list = ph_extents_new (), *holes = ph_extents_new ();
	uint8_t model[PAGES] = { 0 }, gone[PAGES] = { 0 };
	struct ph_error err = { 0 };

	for (; size >= 3; data += 3, size -= 3) {
		unsigned int start = data[1], pages = data[2] % 16 + 1;
		if (start + pages > PAGES)
			pages = PAGES - start;
		switch (data[0] % 4) {
		case 0:
		case 1:
			require (ph_extents_add (list, (uint64_t) start * PH_PAGE_SIZE, pages, data[0] / 4 % 4, &err) == 0, "add");
			memset (model + start, 1, pages);
			break;
		case 2:
			require (ph_extents_add (holes, (uint64_t) start * PH_PAGE_SIZE, pages, PH_EXTENT_DATA, &err) == 0, "add");
			memset (gone + start, 1, pages);
			break;
		case 3:
			require (ph_extents_unite (list, &err) == 0 && ph_extents_unite (holes, &err) == 0, "unite");
			check (list, model);
			check (holes, gone);
			require (ph_extents_exclude (list, holes, &err) == 0, "exclude");
			for (unsigned int i = 0; i < PAGES; i++)
				model[i] &= !gone[i];
			check (list, model);
			ph_extents_clear (holes);
			memset (gone, 0, sizeof (gone));
			break;
		}
	}
	ph_extents_free (list);
	ph_extents_free (holes);
	return 0;
}
