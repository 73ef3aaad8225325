/* Which pages have been sent. */
#include "sent.h"

#include <stdlib.h>
#include <string.h>

void
ph_sent_init (struct ph_sent *sent)
{
	memset (sent, 0, sizeof (*sent));
	pthread_mutex_init (&sent->lock, NULL);
}

void
ph_sent_destroy (struct ph_sent *sent)
{
	for (size_t i = 0; i < sent->room; i++) {
		if (sent->slots[i])
			free (sent->slots[i]->hashes);
		free (sent->slots[i]);
	}
	free (sent->slots);
	pthread_mutex_destroy (&sent->lock);
}

/* The slot of a number, or the empty one where it would be. */
static struct ph_sent_chunk **
slot_of (struct ph_sent_chunk **slots, size_t room, uint64_t number)
{
	size_t at = (number * 0x9E3779B97F4A7C15ull >> 20) & (room - 1);

	while (slots[at] && slots[at]->number != number)
		at = (at + 1) & (room - 1);
	return &slots[at];
}

static bool
enlarge (struct ph_sent *sent)
{
	size_t room = sent->room ? sent->room * 2 : 256;
	struct ph_sent_chunk **slots = calloc (room, sizeof (*slots));

	if (!slots)
		return false;
	for (size_t i = 0; i < sent->room; i++)
		if (sent->slots[i])
			*slot_of (slots, room, sent->slots[i]->number) = sent->slots[i];
	free (sent->slots);
	sent->slots = slots;
	sent->room = room;
	return true;
}

static struct ph_sent_chunk *
make_chunk (uint64_t number, bool hashed)
{
	struct ph_sent_chunk *chunk = calloc (1, sizeof (*chunk));

	if (!chunk)
		return NULL;
	chunk->number = number;
	if (hashed && !(chunk->hashes = calloc (PH_CHUNK_PAGES, sizeof (*chunk->hashes)))) {
		free (chunk);
		return NULL;
	}
	return chunk;
}

struct ph_sent_chunk *
ph_sent_find (struct ph_sent *sent, uint64_t number, bool make, bool hashed)
{
	struct ph_sent_chunk *chunk = NULL;

	pthread_mutex_lock (&sent->lock);
	if (sent->room)
		chunk = *slot_of (sent->slots, sent->room, number);
	if (!chunk && make && (sent->used < sent->room / 2 || enlarge (sent)) && (chunk = make_chunk (number, hashed))) {
		*slot_of (sent->slots, sent->room, number) = chunk;
		sent->used++;
	}
	pthread_mutex_unlock (&sent->lock);
	return chunk;
}

uint64_t *
ph_sent_list (struct ph_sent *sent, uint64_t first, uint64_t last, size_t *count)
{
	*count = 0;
	pthread_mutex_lock (&sent->lock);
	uint64_t *numbers = calloc (sent->used ? sent->used : 1, sizeof (*numbers));
	for (size_t i = 0; numbers && i < sent->room; i++) {
		const struct ph_sent_chunk *chunk = sent->slots[i];
		if (chunk && chunk->number >= first && chunk->number < last)
			numbers[(*count)++] = chunk->number;
	}
	pthread_mutex_unlock (&sent->lock);
	return numbers;
}

void
ph_sent_forget (struct ph_sent *sent, uint64_t start, uint64_t end)
{
	pthread_mutex_lock (&sent->lock);
	for (size_t i = 0; i < sent->room; i++) {
		struct ph_sent_chunk *chunk = sent->slots[i];
		if (!chunk)
			continue;
		uint64_t base = chunk->number * PH_CHUNK_SIZE;
		if (base >= end || base + PH_CHUNK_SIZE <= start)
			continue;
		for (unsigned int page = 0; page < PH_CHUNK_PAGES; page++) {
			uint64_t at = base + (uint64_t) page * PH_PAGE_SIZE;
			if (at >= start && at < end)
				ph_sent_set (chunk, page, false);
		}
	}
	pthread_mutex_unlock (&sent->lock);
}
