/* What a frame may say. Every count is checked before it is used. */
#include "frame.h"

#include <errno.h>

int
ph_frame_check (const struct ph_frame *frame, int64_t last, struct ph_error *err)
{
	if (frame->magic != PH_FRAME_MAGIC)
		return ph_fail (err, EPROTO, "frame with magic %08x", frame->magic);
	if (frame->type != PH_FRAME_PAGES && frame->type != PH_FRAME_MARK)
		return ph_fail (err, EPROTO, "frame of type %u", frame->type);
	if (frame->codec != PH_CODEC_RAW && frame->codec != PH_CODEC_ZSTD)
		return ph_fail (err, EPROTO, "frame with codec %u", frame->codec);
	if (frame->flags & ~PH_FRAME_CHECKSUM)
		return ph_fail (err, EPROTO, "frame with flags %x", frame->flags);
	if ((int64_t) frame->round <= last)
		return ph_fail (err, EPROTO, "frame of round %u after the mark of round %lld", frame->round, (long long) last);
	if (frame->type == PH_FRAME_MARK) {
		if (frame->nr_extents || frame->raw_len || frame->wire_len)
			return ph_fail (err, EPROTO, "mark with contents");
		return 0;
	}
	if (frame->nr_extents == 0 || frame->nr_extents > PH_FRAME_EXTENTS)
		return ph_fail (err, EPROTO, "frame with %u extents", frame->nr_extents);
	if (frame->raw_len > PH_CHUNK_SIZE || frame->raw_len % PH_PAGE_SIZE)
		return ph_fail (err, EPROTO, "frame with %u bytes of pages", frame->raw_len);
	if (frame->codec == PH_CODEC_RAW ? frame->wire_len != frame->raw_len
					 : frame->wire_len == 0 || frame->wire_len >= frame->raw_len)
		return ph_fail (err, EPROTO, "frame with %u bytes for %u", frame->wire_len, frame->raw_len);
	return 0;
}

int
ph_frame_check_extents (const struct ph_frame *frame, const struct ph_extent *extents, unsigned int stream,
			unsigned int streams, struct ph_error *err)
{
	uint64_t bytes = 0;

	for (unsigned int i = 0; i < frame->nr_extents; i++) {
		const struct ph_extent *extent = &extents[i];
		uint64_t size = (uint64_t) extent->nr_pages * PH_PAGE_SIZE;
		if (extent->kind != PH_EXTENT_DATA && extent->kind != PH_EXTENT_DROP)
			return ph_fail (err, EPROTO, "extent of kind %u", extent->kind);
		if (extent->start % PH_PAGE_SIZE || size == 0 || extent->start > INT64_MAX || extent->start % PH_CHUNK_SIZE + size > PH_CHUNK_SIZE)
			return ph_fail (err, EPROTO, "extent of %u pages at %lx", extent->nr_pages,
					(unsigned long) extent->start);
		if (ph_stream_of (frame->object, extent->start, streams) != stream)
			return ph_fail (err, EPROTO, "extent at %lx on stream %u", (unsigned long) extent->start, stream);
		if (extent->kind == PH_EXTENT_DATA)
			bytes += size;
	}
	if (bytes != frame->raw_len)
		return ph_fail (err, EPROTO, "extents of %lu bytes in a frame of %u", (unsigned long) bytes, frame->raw_len);
	return 0;
}
