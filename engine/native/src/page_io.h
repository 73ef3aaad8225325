/* Pages from and to a place, many at a time. */
#ifndef PH_PAGE_IO_H
#define PH_PAGE_IO_H

#include <stdbool.h>
#include <stdint.h>

#include "ph_memory.h"

#define PH_CHUNK_PAGES (PH_CHUNK_SIZE / PH_PAGE_SIZE)

/* Pages of a batch that could not be read: a bit a page. */
struct ph_gone {
	uint64_t bits[PH_CHUNK_PAGES / 64];
};

static inline bool
ph_is_gone (const struct ph_gone *gone, unsigned int page)
{
	return gone->bits[page / 64] >> page % 64 & 1;
}

/* Read the pages of `runs` one behind the other into `buffer`: at most PH_CHUNK_PAGES in all. Pages that
   are not there (an area or the process went away) are marked, their bytes undefined. */
int ph_read_runs (struct ph_place place, const struct ph_extent *runs, unsigned int count, void *buffer,
		  struct ph_gone *gone, struct ph_error *err);

/* The other way round; here what is not there is an error. */
int ph_write_runs (struct ph_place place, const struct ph_extent *runs, unsigned int count, const void *buffer,
		   struct ph_error *err);

/* Into memory of a process where nothing is yet, by a userfaultfd of it (UFFDIO_COPY in ioctl_userfaultfd(2)): no page is
   cleared first. What is there already, or not registered, is written as by `ph_write_runs`. */
int ph_copy_runs (int uffd, struct ph_place place, const struct ph_extent *runs, unsigned int count, const void *buffer,
		  struct ph_error *err);

/* Make pages read as zero: written in a process (nothing drops pages of another one), punched out of a descriptor. */
int ph_zero_run (struct ph_place place, uint64_t start, uint64_t nr_pages, struct ph_error *err);

bool ph_page_is_zero (const void *page);

uint64_t ph_xxh64 (const void *data, size_t size);

#endif
