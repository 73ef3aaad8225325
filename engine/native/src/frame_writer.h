/* Builds frames of one stream: reads pages, leaves out what need not travel, compresses, sends. */
#ifndef PH_FRAME_WRITER_H
#define PH_FRAME_WRITER_H

#include <zstd.h>

#include "frame.h"
#include "page_io.h"
#include "sent.h"

/* An object as the source knows it. */
struct ph_source_object {
	uint64_t number;
	struct ph_place place;
	unsigned int flags;     /* PH_OBJECT_* */
	struct ph_sent sent;
};

/* Waits until `bytes` may be sent; returns the nanoseconds it took. */
typedef int64_t (*ph_throttle) (void *data, size_t bytes);

struct ph_frame_writer {
	struct ph_channel *channel;
	unsigned int stream;
	unsigned int streams;
	int codec;              /* PH_CODEC_*, AUTO too */
	int level;
	unsigned int flags;     /* PH_SOURCE_* */
	ph_throttle throttle;
	void *throttle_data;
	struct ph_source_stats stats;

	/* the frame being built */
	struct ph_source_object *object;
	uint32_t round;
	bool compare;
	struct ph_extent runs[PH_CHUNK_PAGES];  /* to be read; `kind` as the scan said */
	unsigned int nr_runs;
	unsigned int nr_pages;                  /* in them */
	struct ph_extent extents[PH_FRAME_EXTENTS];
	unsigned int nr_extents;
	uint8_t *pages;                         /* head room, then PH_CHUNK_SIZE */
	uint8_t *packed;                        /* the same */
	ZSTD_CCtx *compressor;

	/* what AUTO has measured, in nanoseconds a byte, and bytes a byte */
	double pack_cost;
	double pack_ratio;
	double send_cost;
	unsigned int frames;
};

int ph_frame_writer_init (struct ph_frame_writer *writer, struct ph_error *err);
void ph_frame_writer_destroy (struct ph_frame_writer *writer);

/* What the next extents belong to; sends what is pending if that changes. */
int ph_frame_writer_begin (struct ph_frame_writer *writer, struct ph_source_object *object, uint32_t round,
			   bool compare, struct ph_error *err);
/* One extent of any length; chunks of other streams are passed over. */
int ph_frame_writer_extent (struct ph_frame_writer *writer, const struct ph_extent *extent, struct ph_error *err);
/* Send what is pending. */
int ph_frame_writer_flush (struct ph_frame_writer *writer, struct ph_error *err);
int ph_frame_writer_mark (struct ph_frame_writer *writer, uint32_t round, struct ph_error *err);

#endif
