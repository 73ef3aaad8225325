/* Frames of the page stream.
 *
 * A frame is its header, `nr_extents` wire extents, and `wire_len` bytes that decode to the pages of its
 * DATA extents, one behind the other. An extent lies within one aligned chunk of 1 MiB, whose object
 * and number choose the stream, so that a page always goes the same way. A MARK says that all frames of
 * its round have been sent on this stream.
 */
#ifndef PH_FRAME_H
#define PH_FRAME_H

#include <stdint.h>

#include "ph_memory.h"

#define PH_FRAME_MAGIC 0x52464850u      /* "PHFR" */
#define PH_FRAME_PAGES 1
#define PH_FRAME_MARK 2
#define PH_FRAME_CHECKSUM 1     /* flag: `checksum` is the XXH64 of the decoded pages */
#define PH_FRAME_EXTENTS 1024   /* at most in one frame */

struct ph_frame {
	uint32_t magic;
	uint8_t type;
	uint8_t codec;          /* PH_CODEC_RAW or PH_CODEC_ZSTD */
	uint16_t flags;
	uint64_t object;
	uint32_t round;
	uint32_t nr_extents;
	uint32_t raw_len;
	uint32_t wire_len;
	uint64_t checksum;
};
_Static_assert (sizeof (struct ph_frame) == 40, "the header has no holes");
_Static_assert (sizeof (struct ph_extent) == 16, "nor has an extent");

/* The stream that carries a chunk. */
static inline unsigned int
ph_stream_of (uint64_t object, uint64_t start, unsigned int streams)
{
	uint64_t hash = (start / PH_CHUNK_SIZE + object * 0x9E3779B97F4A7C15ull) * 0xD6E8FEB86659FD93ull;

	hash = (hash ^ hash >> 32) * 0xD6E8FEB86659FD93ull;
	return (hash >> 32) * streams >> 32;
}

/* Whether a header, and then the extents under it, say something that a source says. EPROTO if not. `last` is the
   last round marked on this stream, -1 for none. */
int ph_frame_check (const struct ph_frame *frame, int64_t last, struct ph_error *err);
int ph_frame_check_extents (const struct ph_frame *frame, const struct ph_extent *extents, unsigned int stream,
			    unsigned int streams, struct ph_error *err);

#endif
