/* What has been sent of an object: a bit a page, and a hash a page where asked for.
 *
 * Kept by chunk (1 MiB). The table is shared by the streams' threads under a lock; a chunk belongs to
 * one of them.
 */
#ifndef PH_SENT_H
#define PH_SENT_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

#include "page_io.h"

struct ph_sent_chunk {
	uint64_t number;        /* start / PH_CHUNK_SIZE */
	uint64_t bits[PH_CHUNK_PAGES / 64];
	uint64_t *hashes;       /* of each page, or NULL */
};

struct ph_sent {
	pthread_mutex_t lock;
	struct ph_sent_chunk **slots;   /* open addressing; a power of two, at most half full */
	size_t room;
	size_t used;
};

void ph_sent_init (struct ph_sent *sent);
void ph_sent_destroy (struct ph_sent *sent);

/* The chunk with this number; with `make`, made if it is not there (NULL: no memory). */
struct ph_sent_chunk *ph_sent_find (struct ph_sent *sent, uint64_t number, bool make, bool hashed);

/* The numbers of the known chunks in [first, last); *count of them. To be freed; NULL: no memory. */
uint64_t *ph_sent_list (struct ph_sent *sent, uint64_t first, uint64_t last, size_t *count);

/* Pages of [start, end) were never sent. */
void ph_sent_forget (struct ph_sent *sent, uint64_t start, uint64_t end);

static inline bool
ph_sent_get (const struct ph_sent_chunk *chunk, unsigned int page)
{
	return chunk->bits[page / 64] >> page % 64 & 1;
}

static inline void
ph_sent_set (struct ph_sent_chunk *chunk, unsigned int page, bool value)
{
	uint64_t bit = 1ull << page % 64;

	chunk->bits[page / 64] = value ? chunk->bits[page / 64] | bit : chunk->bits[page / 64] & ~bit;
}

#endif
