/* The page sink behind a connection that says anything: frames, in one stream, for a memory file and for an image. */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "channel.h"
#include "ph_memory.h"

#define MEMORY 5
#define IMAGE 6

/* In place of src/channel.c: what comes is the input. */
struct ph_channel {
	const uint8_t *next;
	size_t left;
};

int
ph_channel_read (struct ph_channel *channel, void *data, size_t size, int64_t deadline, struct ph_error *err)
{
	(void) deadline;
	if (size > channel->left)
		return ph_fail (err, ENOTCONN, "the end");
	memcpy (data, channel->next, size);
	channel->next += size;
	channel->left -= size;
	return 0;
}

void
ph_channel_shutdown (struct ph_channel *channel)
{
	(void) channel;
}

void
ph_channel_free (struct ph_channel *channel)
{
	(void) channel;
}

static void
require (int condition, const char *what)
{
	if (condition)
		return;
	fprintf (stderr, "%s\n", what);
	abort ();
}

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
	static int memory = -1, image = -1;
	struct ph_channel channel = { data, size }, *channels[] = { &channel };
	struct ph_error err = { 0 };
	struct ph_sink_stats stats;

	if (memory < 0) {
		memory = memfd_create ("memory", 0);
		image = memfd_create ("image", 0);
	}
	struct ph_sink *sink = ph_sink_new (channels, 1, &err);
	require (sink != NULL, "a sink");
	require (ph_sink_add (sink, MEMORY, (struct ph_place) { 0, memory }, &err) == 0, "memory");
	require (ph_sink_add_image (sink, IMAGE, image, &err) == 0, "an image");
	ph_sink_allow (sink, UINT32_MAX);
	/* the input ends, so the stream fails, if not before, or the last round of all was marked */
	int failed = ph_sink_wait (sink, UINT32_MAX, 10000, &err);
	require (failed == 0 || (err.code != 0 && err.code != ETIMEDOUT), "no error at the end");
	ph_sink_stats (sink, &stats);
	require (stats.bytes_wire <= size, "more was applied than came");
	size_t count = ph_sink_records (sink, IMAGE, NULL, 0);
	struct ph_record *records = calloc (count + 1, sizeof (*records));
	ph_sink_records (sink, IMAGE, records, count);
	for (size_t i = 0; i < count; i++)
		require (records[i].start % PH_PAGE_SIZE == 0 && records[i].nr_pages > 0, "an impossible record");
	free (records);
	ph_sink_free (sink);
	require (ftruncate (memory, 0) == 0 && ftruncate (image, 0) == 0, "empty");
	return 0;
}
