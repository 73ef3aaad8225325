/* The page sink: a thread for each stream that takes frames and puts their pages in place. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>
#include <zstd.h>

#include "channel.h"
#include "deadline.h"
#include "frame.h"
#include "page_io.h"
#include "stream_threads.h"

/* Where an object's pages go. */
struct target {
	uint64_t number;
	struct ph_place place;
	int uffd;                       /* for pages where nothing is yet, or -1 */
	bool image;
	struct ph_record *records;      /* of an image, in the order of the file */
	size_t nr_records;
	size_t records_room;
	uint64_t size;                  /* of the image */
};

struct stream {
	struct ph_sink *sink;
	struct ph_channel *channel;
	unsigned int number;
	int64_t marked;                 /* the last round that is over here, -1: none */
	struct ph_sink_stats stats;     /* the thread's */
	struct ph_sink_stats seen;      /* a copy for others to read */
	struct ph_extent extents[PH_FRAME_EXTENTS];
	uint8_t *wire;
	uint8_t *pages;
	ZSTD_DCtx *decompressor;
	pthread_t thread;
	bool started;
};

struct ph_sink {
	pthread_mutex_t lock;
	pthread_cond_t change;          /* of anything below */
	pthread_rwlock_t targets_lock;  /* held for reading while a frame is put in place */
	struct target **targets;
	size_t nr_targets;
	uint64_t guard_start, guard_end;        /* under targets_lock too */
	struct stream *streams;
	unsigned int count;
	int64_t allowed;
	int64_t complete;               /* the last round that is over on all streams */
	bool stop;
	bool failed;
	struct ph_error error;
	int event;
};

/* ---- Putting pages in place ----------------------------------------------- */

static struct target **
find_target (struct ph_sink *sink, uint64_t number)
{
	for (size_t i = 0; i < sink->nr_targets; i++)
		if (sink->targets[i]->number == number)
			return &sink->targets[i];
	return NULL;
}

/* Under the sink's lock. */
static int
note_record (struct target *target, const struct ph_extent *extent, uint64_t offset, struct ph_error *err)
{
	struct ph_record *last = target->nr_records ? &target->records[target->nr_records - 1] : NULL;
	uint64_t size = last ? (uint64_t) last->nr_pages * PH_PAGE_SIZE : 0;

	if (last && last->kind == extent->kind && last->start + size == extent->start
	    && (extent->kind == PH_EXTENT_DROP || last->offset + size == offset)
	    && last->nr_pages <= UINT32_MAX - extent->nr_pages) {
		last->nr_pages += extent->nr_pages;
		return 0;
	}
	if (target->nr_records == target->records_room) {
		size_t room = target->records_room ? target->records_room * 2 : 1024;
		struct ph_record *records = reallocarray (target->records, room, sizeof (*records));
		if (!records)
			return ph_fail (err, ENOMEM, "note what stands in an image");
		target->records = records;
		target->records_room = room;
	}
	target->records[target->nr_records++] = (struct ph_record) {
		.start = extent->start,
		.offset = extent->kind == PH_EXTENT_DROP ? 0 : offset,
		.nr_pages = extent->nr_pages,
		.kind = extent->kind,
	};
	return 0;
}

/* Append a frame's pages to an image. */
static int
put_in_image (struct stream *stream, struct target *target, const struct ph_frame *frame, struct ph_error *err)
{
	int failed = 0;

	pthread_mutex_lock (&stream->sink->lock);
	uint64_t offset = target->size;
	target->size += frame->raw_len;
	for (unsigned int i = 0, at = 0; !failed && i < frame->nr_extents; i++) {
		failed = note_record (target, &stream->extents[i], offset + at, err);
		if (stream->extents[i].kind == PH_EXTENT_DATA)
			at += stream->extents[i].nr_pages * PH_PAGE_SIZE;
	}
	pthread_mutex_unlock (&stream->sink->lock);
	if (failed || frame->raw_len == 0)
		return failed;
	struct ph_extent run = { offset, frame->raw_len / PH_PAGE_SIZE, PH_EXTENT_DATA };
	return ph_write_runs (target->place, &run, 1, stream->pages, err);
}

static int
put_in_place (struct stream *stream, struct target *target, const struct ph_frame *frame, struct ph_error *err)
{
	struct ph_extent *runs = stream->extents;
	const struct ph_sink *sink = stream->sink;
	unsigned int kept = 0;

	for (unsigned int i = 0; target->place.pid > 0 && i < frame->nr_extents; i++)
		if (runs[i].start < sink->guard_end
		    && runs[i].start + (uint64_t) runs[i].nr_pages * PH_PAGE_SIZE > sink->guard_start)
			return ph_fail (err, EPROTO, "pages at %lx, where the engine works", (unsigned long) runs[i].start);
	/* dropped pages one by one, the others in one go */
	for (unsigned int i = 0; i < frame->nr_extents; i++) {
		if (runs[i].kind == PH_EXTENT_DATA)
			runs[kept++] = runs[i];
		else if (ph_zero_run (target->place, runs[i].start, runs[i].nr_pages, err) < 0)
			return -1;
		else
			stream->stats.pages_dropped += runs[i].nr_pages;
	}
	if (target->uffd >= 0)
		return ph_copy_runs (target->uffd, target->place, runs, kept, stream->pages, err);
	return kept ? ph_write_runs (target->place, runs, kept, stream->pages, err) : 0;
}

static int
apply (struct stream *stream, const struct ph_frame *frame, struct ph_error *err)
{
	struct ph_sink *sink = stream->sink;
	int failed;

	pthread_rwlock_rdlock (&sink->targets_lock);
	struct target **target = find_target (sink, frame->object);
	if (!target)
		failed = ph_fail (err, EPROTO, "pages of unknown object %lu", (unsigned long) frame->object);
	else if ((*target)->image)
		failed = put_in_image (stream, *target, frame, err);
	else
		failed = put_in_place (stream, *target, frame, err);
	pthread_rwlock_unlock (&sink->targets_lock);
	stream->stats.pages_data += frame->raw_len / PH_PAGE_SIZE;
	return failed;
}

/* ---- A stream's thread ---------------------------------------------------- */

static int
decode (struct stream *stream, const struct ph_frame *frame, struct ph_error *err)
{
	if (frame->codec == PH_CODEC_ZSTD) {
		size_t size = ZSTD_decompressDCtx (stream->decompressor, stream->pages, frame->raw_len, stream->wire,
						   frame->wire_len);
		if (ZSTD_isError (size) || size != frame->raw_len)
			return ph_fail (err, EPROTO, "frame that does not decompress to %u bytes", frame->raw_len);
	}
	if (frame->flags & PH_FRAME_CHECKSUM && ph_xxh64 (stream->pages, frame->raw_len) != frame->checksum)
		return ph_fail (err, EBADMSG, "pages of object %lu do not have their checksum", (unsigned long) frame->object);
	return 0;
}

/* Wait until frames of this round may be applied. */
static int
pass_gate (struct ph_sink *sink, uint32_t round, struct ph_error *err)
{
	pthread_mutex_lock (&sink->lock);
	while (!sink->stop && !sink->failed && sink->allowed < (int64_t) round)
		pthread_cond_wait (&sink->change, &sink->lock);
	bool closed = sink->stop || sink->failed;
	pthread_mutex_unlock (&sink->lock);
	return closed ? ph_fail (err, ECANCELED, "receive pages") : 0;
}

static int
do_pages (struct stream *stream, const struct ph_frame *frame, struct ph_error *err)
{
	size_t extents_size = frame->nr_extents * sizeof (struct ph_extent);
	uint8_t *to = frame->codec == PH_CODEC_RAW ? stream->pages : stream->wire;
	int64_t start = ph_now_ns ();

	if (ph_channel_read (stream->channel, stream->extents, extents_size, -1, err) < 0
	    || ph_frame_check_extents (frame, stream->extents, stream->number, stream->sink->count, err) < 0
	    || ph_channel_read (stream->channel, to, frame->wire_len, -1, err) < 0)
		return -1;
	int64_t received = ph_now_ns ();
	if (decode (stream, frame, err) < 0 || pass_gate (stream->sink, frame->round, err) < 0)
		return -1;
	int64_t decoded = ph_now_ns ();
	if (apply (stream, frame, err) < 0)
		return -1;
	stream->stats.bytes_wire += sizeof (*frame) + extents_size + frame->wire_len;
	stream->stats.ns_receive += received - start;
	stream->stats.ns_decode += decoded - received;
	stream->stats.ns_write += ph_now_ns () - decoded;
	return 0;
}

static void
do_mark (struct stream *stream, uint32_t round)
{
	struct ph_sink *sink = stream->sink;

	pthread_mutex_lock (&sink->lock);
	stream->marked = round;
	stream->seen = stream->stats;
	int64_t complete = round;
	for (unsigned int i = 0; i < sink->count; i++)
		if (sink->streams[i].marked < complete)
			complete = sink->streams[i].marked;
	if (complete > sink->complete) {
		sink->complete = complete;
		ph_event_signal (sink->event);
	}
	pthread_cond_broadcast (&sink->change);
	pthread_mutex_unlock (&sink->lock);
}

static int
do_frame (struct stream *stream, struct ph_error *err)
{
	struct ph_frame frame;

	if (ph_channel_read (stream->channel, &frame, sizeof (frame), -1, err) < 0
	    || ph_frame_check (&frame, stream->marked, err) < 0)
		return -1;
	if (frame.type == PH_FRAME_PAGES)
		return do_pages (stream, &frame, err);
	do_mark (stream, frame.round);
	return 0;
}

static void *
run_stream (void *data)
{
	struct stream *stream = data;
	struct ph_sink *sink = stream->sink;
	struct ph_error err = { 0 };

	while (do_frame (stream, &err) == 0)
		continue;
	pthread_mutex_lock (&sink->lock);
	if (!sink->failed && !sink->stop)
		sink->error = err;
	sink->failed = true;
	ph_event_signal (sink->event);
	pthread_cond_broadcast (&sink->change);
	pthread_mutex_unlock (&sink->lock);
	return NULL;
}

static int
start_stream (struct stream *stream, struct ph_error *err)
{
	if (posix_memalign ((void **) &stream->wire, PH_PAGE_SIZE, PH_CHUNK_SIZE)
	    || posix_memalign ((void **) &stream->pages, PH_PAGE_SIZE, PH_CHUNK_SIZE)
	    || !(stream->decompressor = ZSTD_createDCtx ()))
		return ph_fail (err, ENOMEM, "allocate a stream's buffers");
	/* touched now, not in the freeze */
	memset (stream->wire, 1, PH_CHUNK_SIZE);
	memset (stream->pages, 1, PH_CHUNK_SIZE);
	if (ph_stream_thread (&stream->thread, run_stream, stream, err) < 0)
		return -1;
	stream->started = true;
	return 0;
}

/* ---- Life ----------------------------------------------------------------- */

static void
init_locks (struct ph_sink *sink)
{
	pthread_mutex_init (&sink->lock, NULL);
	ph_condition_init (&sink->change);
	pthread_rwlock_init (&sink->targets_lock, NULL);
}

struct ph_sink *
ph_sink_new (struct ph_channel **channels, unsigned int count, struct ph_error *err)
{
	struct ph_sink *sink = calloc (1, sizeof (*sink));

	if (!sink || count == 0 || count > PH_STREAMS_MAX || !(sink->streams = calloc (count, sizeof (*sink->streams)))) {
		ph_fail (err, sink && (count == 0 || count > PH_STREAMS_MAX) ? EINVAL : ENOMEM,
			 "make a page sink of %u streams", count);
		for (unsigned int i = 0; i < count; i++)
			ph_channel_free (channels[i]);
		free (sink);
		return NULL;
	}
	init_locks (sink);
	sink->count = count;
	sink->allowed = sink->complete = -1;
	sink->event = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
	for (unsigned int i = 0; i < count; i++) {
		sink->streams[i].sink = sink;
		sink->streams[i].channel = channels[i];
		sink->streams[i].number = i;
		sink->streams[i].marked = -1;
	}
	if (sink->event < 0)
		ph_fail (err, errno, "make an eventfd");
	for (unsigned int i = 0; i < count && sink->event >= 0; i++)
		if (start_stream (&sink->streams[i], err) < 0)
			break;
	if (sink->event < 0 || !sink->streams[count - 1].started) {
		ph_sink_free (sink);
		return NULL;
	}
	return sink;
}

static void
free_target (struct target *target)
{
	if (target->place.fd >= 0)
		close (target->place.fd);
	if (target->uffd >= 0)
		close (target->uffd);
	free (target->records);
	free (target);
}

void
ph_sink_free (struct ph_sink *sink)
{
	if (!sink)
		return;
	pthread_mutex_lock (&sink->lock);
	sink->stop = true;
	pthread_cond_broadcast (&sink->change);
	pthread_mutex_unlock (&sink->lock);
	for (unsigned int i = 0; i < sink->count; i++)
		if (sink->streams[i].started)
			ph_channel_shutdown (sink->streams[i].channel);
	for (unsigned int i = 0; i < sink->count; i++) {
		struct stream *stream = &sink->streams[i];
		if (stream->started)
			pthread_join (stream->thread, NULL);
		ph_channel_free (stream->channel);
		ZSTD_freeDCtx (stream->decompressor);
		free (stream->wire);
		free (stream->pages);
	}
	for (size_t i = 0; i < sink->nr_targets; i++)
		free_target (sink->targets[i]);
	if (sink->event >= 0)
		close (sink->event);
	pthread_rwlock_destroy (&sink->targets_lock);
	pthread_cond_destroy (&sink->change);
	pthread_mutex_destroy (&sink->lock);
	free (sink->targets);
	free (sink->streams);
	free (sink);
}

/* ---- Objects -------------------------------------------------------------- */

static int
add_target (struct ph_sink *sink, uint64_t number, struct ph_place place, bool image, struct ph_error *err)
{
	struct target *target = calloc (1, sizeof (*target)), **targets = NULL;
	int failed = 0;

	if (!target)
		return ph_fail (err, ENOMEM, "add object %lu", (unsigned long) number);
	target->number = number;
	target->image = image;
	target->uffd = -1;
	target->place = (struct ph_place) { place.pid, -1 };
	if (place.fd >= 0 && (target->place.fd = fcntl (place.fd, F_DUPFD_CLOEXEC, 3)) < 0) {
		free_target (target);
		return ph_fail (err, errno, "duplicate an object's descriptor");
	}
	pthread_rwlock_wrlock (&sink->targets_lock);
	if (find_target (sink, number))
		failed = ph_fail (err, EEXIST, "add object %lu", (unsigned long) number);
	else if (!(targets = reallocarray (sink->targets, sink->nr_targets + 1, sizeof (*targets))))
		failed = ph_fail (err, ENOMEM, "add object %lu", (unsigned long) number);
	if (!failed) {
		sink->targets = targets;
		sink->targets[sink->nr_targets++] = target;
	}
	pthread_rwlock_unlock (&sink->targets_lock);
	if (failed)
		free_target (target);
	return failed;
}

int
ph_sink_add (struct ph_sink *sink, uint64_t number, struct ph_place place, struct ph_error *err)
{
	return add_target (sink, number, place, false, err);
}

int
ph_sink_add_image (struct ph_sink *sink, uint64_t number, int fd, struct ph_error *err)
{
	return add_target (sink, number, (struct ph_place) { 0, fd }, true, err);
}

int
ph_sink_remove (struct ph_sink *sink, uint64_t number, struct ph_error *err)
{
	struct target *target = NULL;

	pthread_rwlock_wrlock (&sink->targets_lock);
	struct target **slot = find_target (sink, number);
	if (slot) {
		target = *slot;
		*slot = sink->targets[--sink->nr_targets];
	}
	pthread_rwlock_unlock (&sink->targets_lock);
	if (!target)
		return ph_fail (err, ENOENT, "remove object %lu", (unsigned long) number);
	free_target (target);
	return 0;
}

int
ph_sink_fill (struct ph_sink *sink, uint64_t number, int uffd, struct ph_error *err)
{
	int ours = uffd < 0 ? -1 : fcntl (uffd, F_DUPFD_CLOEXEC, 3);
	int failed = uffd >= 0 && ours < 0 ? ph_fail (err, errno, "duplicate a userfaultfd") : 0;

	if (failed)
		return failed;
	pthread_rwlock_wrlock (&sink->targets_lock);
	struct target **slot = find_target (sink, number);
	if (slot) {
		int before = (*slot)->uffd;
		(*slot)->uffd = ours;
		ours = before;
	} else {
		failed = ph_fail (err, ENOENT, "fill object %lu", (unsigned long) number);
	}
	pthread_rwlock_unlock (&sink->targets_lock);
	if (ours >= 0)
		close (ours);
	return failed;
}

void
ph_sink_guard (struct ph_sink *sink, uint64_t start, uint64_t end)
{
	pthread_rwlock_wrlock (&sink->targets_lock);
	sink->guard_start = start;
	sink->guard_end = end;
	pthread_rwlock_unlock (&sink->targets_lock);
}

/* ---- Rounds --------------------------------------------------------------- */

void
ph_sink_allow (struct ph_sink *sink, uint32_t round)
{
	pthread_mutex_lock (&sink->lock);
	if (round > sink->allowed)
		sink->allowed = round;
	pthread_cond_broadcast (&sink->change);
	pthread_mutex_unlock (&sink->lock);
}

int
ph_sink_fd (const struct ph_sink *sink)
{
	return sink->event;
}

int
ph_sink_wait (struct ph_sink *sink, uint32_t round, int timeout_ms, struct ph_error *err)
{
	int64_t deadline = ph_deadline (timeout_ms);
	struct timespec until = ph_timespec (deadline < 0 ? 0 : deadline);
	int waited = 0;

	pthread_mutex_lock (&sink->lock);
	/* a stream that fails after the round is over does not undo it */
	while (sink->complete < (int64_t) round && !sink->failed && waited != ETIMEDOUT) {
		if (deadline < 0)
			pthread_cond_wait (&sink->change, &sink->lock);
		else
			waited = pthread_cond_timedwait (&sink->change, &sink->lock, &until);
	}
	bool complete = sink->complete >= (int64_t) round, failed = sink->failed;
	if (!complete && failed)
		*err = sink->error;
	pthread_mutex_unlock (&sink->lock);
	if (complete)
		return 0;
	return failed ? -1 : ph_fail (err, ETIMEDOUT, "wait for the pages of round %u", round);
}

void
ph_sink_stats (struct ph_sink *sink, struct ph_sink_stats *stats)
{
	memset (stats, 0, sizeof (*stats));
	pthread_mutex_lock (&sink->lock);
	for (unsigned int i = 0; i < sink->count; i++)
		ph_stats_add (stats, &sink->streams[i].seen, sizeof (*stats));
	pthread_mutex_unlock (&sink->lock);
}

size_t
ph_sink_records (struct ph_sink *sink, uint64_t number, struct ph_record *records, size_t room)
{
	size_t count = 0;

	pthread_rwlock_rdlock (&sink->targets_lock);
	struct target **target = find_target (sink, number);
	pthread_mutex_lock (&sink->lock);
	if (target)
		count = (*target)->nr_records;
	if (count && records)
		memcpy (records, (*target)->records, (count < room ? count : room) * sizeof (*records));
	pthread_mutex_unlock (&sink->lock);
	pthread_rwlock_unlock (&sink->targets_lock);
	return count;
}
