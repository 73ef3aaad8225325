/* From extents to frames. */
#include "frame_writer.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "channel.h"
#include "cleanup.h"
#include "deadline.h"

#define HEAD (sizeof (struct ph_frame) + PH_FRAME_EXTENTS * sizeof (struct ph_extent))
#define HEAD_ROOM ((HEAD + PH_PAGE_SIZE - 1) / PH_PAGE_SIZE * PH_PAGE_SIZE)
#define SAMPLE_EVERY 32         /* frames between two looks at what AUTO does not do at present */
#define WORTH 0.9               /* AUTO compresses if that takes less than this part of the time */
#define WEIGHT 0.125            /* of a new measurement */
#define SMALL_FRAME 16384       /* too short to learn from */

int
ph_frame_writer_init (struct ph_frame_writer *writer, struct ph_error *err)
{
	size_t size = HEAD_ROOM + PH_CHUNK_SIZE;

	if (posix_memalign ((void **) &writer->pages, PH_PAGE_SIZE, size)
	    || posix_memalign ((void **) &writer->packed, PH_PAGE_SIZE, size))
		return ph_fail (err, ENOMEM, "allocate frames");
	/* touched now, not in the freeze */
	memset (writer->pages, 1, size);
	memset (writer->packed, 1, size);
	writer->compressor = ZSTD_createCCtx ();
	if (!writer->compressor)
		return ph_fail (err, ENOMEM, "allocate a compressor");
	return 0;
}

void
ph_frame_writer_destroy (struct ph_frame_writer *writer)
{
	free (writer->pages);
	free (writer->packed);
	ZSTD_freeCCtx (writer->compressor);
}

static void
learn (double *value, double measured)
{
	*value = *value > 0 ? *value + (measured - *value) * WEIGHT : measured;
}

/* ---- Sending -------------------------------------------------------------- */

/* Compress the frame's pages; the size, or 0 where that gains nothing. */
static size_t
pack (struct ph_frame_writer *writer, size_t raw_len)
{
	int64_t start = ph_now_ns ();
	size_t size = ZSTD_compressCCtx (writer->compressor, writer->packed + HEAD_ROOM, raw_len - 1,
					 writer->pages + HEAD_ROOM, raw_len, writer->level);
	int64_t took = ph_now_ns () - start;
	bool failed = ZSTD_isError (size);

	writer->stats.ns_encode += took;
	if (raw_len >= SMALL_FRAME) {
		learn (&writer->pack_cost, (double) took / raw_len);
		learn (&writer->pack_ratio, failed ? 1.0 : (double) size / raw_len);
	}
	return failed ? 0 : size;
}

/* Whether to compress this frame. */
static bool
should_pack (struct ph_frame_writer *writer, size_t raw_len)
{
	if (writer->codec != PH_CODEC_AUTO)
		return writer->codec == PH_CODEC_ZSTD && raw_len > 0;
	if (raw_len < SMALL_FRAME)
		return false;
	if (writer->pack_cost == 0 || writer->frames++ % SAMPLE_EVERY == 0)
		return true;
	return writer->pack_cost + writer->pack_ratio * writer->send_cost < WORTH * writer->send_cost;
}

static int
send_bytes (struct ph_frame_writer *writer, const void *data, size_t size, struct ph_error *err)
{
	int64_t waited = writer->throttle (writer->throttle_data, size), start = ph_now_ns ();

	if (ph_channel_write (writer->channel, data, size, -1, err) < 0)
		return -1;
	int64_t took = ph_now_ns () - start;
	writer->stats.ns_throttled += waited;
	writer->stats.ns_send += took;
	writer->stats.bytes_wire += size;
	if (size >= SMALL_FRAME)
		learn (&writer->send_cost, (double) (took + waited) / size);
	return 0;
}

/* Send the frame whose pages and extents are complete. */
static int
send_frame (struct ph_frame_writer *writer, size_t raw_len, struct ph_error *err)
{
	struct ph_frame frame = {
		.magic = PH_FRAME_MAGIC,
		.type = PH_FRAME_PAGES,
		.object = writer->object->number,
		.round = writer->round,
		.nr_extents = writer->nr_extents,
		.raw_len = raw_len,
		.wire_len = raw_len,
	};
	size_t extents_size = writer->nr_extents * sizeof (struct ph_extent);
	uint8_t *body = writer->pages + HEAD_ROOM;

	if (writer->flags & PH_SOURCE_CHECKSUM) {
		frame.flags |= PH_FRAME_CHECKSUM;
		frame.checksum = ph_xxh64 (body, raw_len);
	}
	size_t packed = should_pack (writer, raw_len) ? pack (writer, raw_len) : 0;
	if (packed) {
		frame.codec = PH_CODEC_ZSTD;
		frame.wire_len = packed;
		body = writer->packed + HEAD_ROOM;
	}
	/* header and extents right in front of the pages: one write */
	uint8_t *start = body - extents_size - sizeof (frame);
	memcpy (start, &frame, sizeof (frame));
	memcpy (start + sizeof (frame), writer->extents, extents_size);
	writer->stats.bytes_raw += raw_len;
	writer->nr_extents = 0;
	return send_bytes (writer, start, body + frame.wire_len - start, err);
}

int
ph_frame_writer_mark (struct ph_frame_writer *writer, uint32_t round, struct ph_error *err)
{
	struct ph_frame mark = { .magic = PH_FRAME_MAGIC, .type = PH_FRAME_MARK, .round = round };

	if (ph_frame_writer_flush (writer, err) < 0)
		return -1;
	return ph_channel_write (writer->channel, &mark, sizeof (mark), -1, err);
}

/* ---- Looking at pages ----------------------------------------------------- */

static void
tell (struct ph_frame_writer *writer, uint64_t start, uint32_t kind)
{
	struct ph_extent *last = writer->nr_extents ? &writer->extents[writer->nr_extents - 1] : NULL;

	if (last && last->kind == kind && start % PH_CHUNK_SIZE
	    && last->start + (uint64_t) last->nr_pages * PH_PAGE_SIZE == start)
		last->nr_pages++;
	else
		writer->extents[writer->nr_extents++] = (struct ph_extent) { start, 1, kind };
}

/* Whether a page has to travel; notes what the destination will have then. */
static bool
must_carry (struct ph_frame_writer *writer, struct ph_sent_chunk *chunk, const struct ph_extent *run, uint64_t start,
	    const uint8_t *page)
{
	unsigned int index = start % PH_CHUNK_SIZE / PH_PAGE_SIZE;

	if (ph_page_is_zero (page)) {
		bool told = ph_sent_get (chunk, index) || run->kind == PH_EXTENT_PRIVATE;
		if (told)
			tell (writer, start, PH_EXTENT_DROP);
		/* where a file lies below, zero is contents too: it stays noted */
		ph_sent_set (chunk, index, run->kind == PH_EXTENT_PRIVATE || run->kind == PH_EXTENT_REVERT);
		if (chunk->hashes)
			chunk->hashes[index] = 0;
		writer->stats.pages_zero++;
		writer->stats.pages_dropped += told;
		return false;
	}
	if (chunk->hashes) {
		uint64_t hash = ph_xxh64 (page, PH_PAGE_SIZE);
		if (writer->compare && ph_sent_get (chunk, index) && chunk->hashes[index] == hash) {
			writer->stats.pages_unchanged++;
			return false;
		}
		chunk->hashes[index] = hash;
	}
	ph_sent_set (chunk, index, true);
	tell (writer, start, PH_EXTENT_DATA);
	writer->stats.pages_data++;
	return true;
}

/* Look at the pages that were read, and move those that travel together. The bytes that do, or -1. */
static ssize_t
pick_pages (struct ph_frame_writer *writer, const struct ph_gone *gone, struct ph_error *err)
{
	uint8_t *pages = writer->pages + HEAD_ROOM;
	bool hashed = writer->object->flags & PH_OBJECT_HASHED;
	struct ph_sent_chunk *chunk = NULL;
	size_t kept = 0;
	unsigned int at = 0;

	for (unsigned int i = 0; i < writer->nr_runs; i++) {
		const struct ph_extent *run = &writer->runs[i];
		for (unsigned int j = 0; j < run->nr_pages; j++, at++) {
			uint64_t start = run->start + (uint64_t) j * PH_PAGE_SIZE;
			uint8_t *page = pages + (size_t) at * PH_PAGE_SIZE;
			if (ph_is_gone (gone, at)) {
				writer->stats.pages_gone++;
				continue;
			}
			if (!chunk || chunk->number != start / PH_CHUNK_SIZE)
				chunk = ph_sent_find (&writer->object->sent, start / PH_CHUNK_SIZE, true, hashed);
			if (!chunk)
				return ph_fail (err, ENOMEM, "note what was sent");
			if (!must_carry (writer, chunk, run, start, page))
				continue;
			if (kept != at)
				memcpy (pages + kept * PH_PAGE_SIZE, page, PH_PAGE_SIZE);
			kept++;
		}
	}
	return kept * PH_PAGE_SIZE;
}

int
ph_frame_writer_flush (struct ph_frame_writer *writer, struct ph_error *err)
{
	struct ph_gone gone;
	int64_t start = ph_now_ns ();

	if (writer->nr_runs == 0)
		return writer->nr_extents ? send_frame (writer, 0, err) : 0;
	if (ph_read_runs (writer->object->place, writer->runs, writer->nr_runs, writer->pages + HEAD_ROOM, &gone, err) < 0)
		return -1;
	ssize_t kept = pick_pages (writer, &gone, err);
	writer->nr_runs = writer->nr_pages = 0;
	writer->stats.ns_read += ph_now_ns () - start;
	if (kept < 0)
		return -1;
	return writer->nr_extents ? send_frame (writer, kept, err) : 0;
}

/* ---- Extents -------------------------------------------------------------- */

int
ph_frame_writer_begin (struct ph_frame_writer *writer, struct ph_source_object *object, uint32_t round, bool compare,
		       struct ph_error *err)
{
	if (object != writer->object || round != writer->round || compare != writer->compare)
		if (ph_frame_writer_flush (writer, err) < 0)
			return -1;
	writer->object = object;
	writer->round = round;
	writer->compare = compare;
	return 0;
}

static int
add_run (struct ph_frame_writer *writer, uint64_t start, uint64_t nr_pages, uint32_t kind, struct ph_error *err)
{
	while (nr_pages) {
		unsigned int room = PH_CHUNK_PAGES - writer->nr_pages;
		unsigned int part = nr_pages < room ? nr_pages : room;
		writer->runs[writer->nr_runs++] = (struct ph_extent) { start, part, kind };
		writer->nr_pages += part;
		start += (uint64_t) part * PH_PAGE_SIZE;
		nr_pages -= part;
		/* the pages read may need an extent each, beside those that wait already */
		if ((writer->nr_pages == PH_CHUNK_PAGES || writer->nr_extents + PH_CHUNK_PAGES >= PH_FRAME_EXTENTS)
		    && ph_frame_writer_flush (writer, err) < 0)
			return -1;
	}
	return 0;
}

/* The pages of [start, end), all of one chunk, that were sent before: tell that they are gone, or read them. */
static int
revisit_chunk (struct ph_frame_writer *writer, uint64_t start, uint64_t end, uint32_t kind, struct ph_error *err)
{
	struct ph_sent_chunk *chunk = ph_sent_find (&writer->object->sent, start / PH_CHUNK_SIZE, false, false);

	for (; chunk && start < end; start += PH_PAGE_SIZE) {
		unsigned int page = start % PH_CHUNK_SIZE / PH_PAGE_SIZE;
		if (!ph_sent_get (chunk, page))
			continue;
		if (kind == PH_EXTENT_REVERT) {
			if (add_run (writer, start, 1, kind, err) < 0)
				return -1;
			continue;
		}
		ph_sent_set (chunk, page, false);
		tell (writer, start, PH_EXTENT_DROP);
		writer->stats.pages_dropped++;
		if (writer->nr_extents + PH_CHUNK_PAGES >= PH_FRAME_EXTENTS && ph_frame_writer_flush (writer, err) < 0)
			return -1;
	}
	return 0;
}

/* Very long runs of nothing: look at what was sent, not at every chunk. */
static int
revisit_known (struct ph_frame_writer *writer, const struct ph_extent *extent, uint64_t end, struct ph_error *err)
{
	uint64_t first = extent->start / PH_CHUNK_SIZE, last = (end + PH_CHUNK_SIZE - 1) / PH_CHUNK_SIZE;
	size_t count;
	cleanup_free uint64_t *numbers = ph_sent_list (&writer->object->sent, first, last, &count);

	if (!numbers)
		return ph_fail (err, ENOMEM, "list what was sent");
	for (size_t i = 0; i < count; i++) {
		uint64_t start = numbers[i] * PH_CHUNK_SIZE, stop = start + PH_CHUNK_SIZE;
		if (ph_stream_of (writer->object->number, start, writer->streams) != writer->stream)
			continue;
		start = start > extent->start ? start : extent->start;
		if (revisit_chunk (writer, start, stop < end ? stop : end, extent->kind, err) < 0)
			return -1;
	}
	return 0;
}

int
ph_frame_writer_extent (struct ph_frame_writer *writer, const struct ph_extent *extent, struct ph_error *err)
{
	uint64_t at = extent->start, end = at + (uint64_t) extent->nr_pages * PH_PAGE_SIZE;
	bool revisit = extent->kind == PH_EXTENT_DROP || extent->kind == PH_EXTENT_REVERT;

	if (revisit && end - at > 64 * (uint64_t) PH_CHUNK_SIZE)
		return revisit_known (writer, extent, end, err);
	while (at < end) {
		uint64_t stop = (at / PH_CHUNK_SIZE + 1) * PH_CHUNK_SIZE;
		if (stop > end)
			stop = end;
		if (ph_stream_of (writer->object->number, at, writer->streams) == writer->stream) {
			int failed = revisit ? revisit_chunk (writer, at, stop, extent->kind, err)
					     : add_run (writer, at, (stop - at) / PH_PAGE_SIZE, extent->kind, err);
			if (failed)
				return -1;
		}
		at = stop;
	}
	return 0;
}
