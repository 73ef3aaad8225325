/* The page source: a queue of lists of extents, and a thread for each stream that takes its share of each. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "deadline.h"
#include "frame_writer.h"
#include "stream_threads.h"

#define QUEUE_EXTENTS 1048576   /* extents that may wait, 16 MiB of them; then senders wait */
#define OBJECTS_MAX 65536

/* Work for all streams: the extents of one object, or (object NULL) the end of a round. */
struct batch {
	struct batch *next;
	struct ph_source_object *object;
	struct ph_extent *items;
	size_t count;
	uint32_t round;
	bool compare;
	unsigned int streams_left;
};

struct stream {
	struct ph_source *source;
	struct ph_frame_writer writer;
	struct ph_source_stats seen;    /* a copy of the writer's, for others to read */
	struct batch *next;             /* what this stream does next, NULL: nothing is queued */
	pthread_t thread;
	bool started;
};

struct ph_source {
	pthread_mutex_t lock;
	pthread_cond_t work;            /* a batch was queued, or `stop` */
	pthread_cond_t progress;        /* a batch or round is done, or a stream failed */
	pthread_cond_t clock;           /* the bandwidth limit changed, or `stop` */
	struct stream *streams;
	unsigned int count;
	struct ph_source_object **objects;
	size_t nr_objects;
	struct batch *first;            /* of the queue: the oldest that a stream has still to do */
	struct batch *last;
	size_t queued;                  /* extents in it */
	uint32_t round;                 /* what is sent now belongs to it */
	unsigned int marks_left;        /* streams that have not ended the round being ended */
	int64_t ended;                  /* the last round that all streams have ended */
	bool stop;
	bool failed;
	struct ph_error error;          /* of the first that failed */
	int event;
	uint64_t bandwidth;
	int64_t free_at;                /* when the next byte may go */
};

static int64_t
throttle (void *data, size_t bytes)
{
	struct ph_source *source = data;
	int64_t start = ph_now_ns (), now = start;

	pthread_mutex_lock (&source->lock);
	if (source->bandwidth && source->free_at < now)
		source->free_at = now;
	while (source->bandwidth && !source->stop && source->free_at > now) {
		struct timespec until = ph_timespec (source->free_at);
		pthread_cond_timedwait (&source->clock, &source->lock, &until);
		now = ph_now_ns ();
	}
	if (source->bandwidth)
		source->free_at += (int64_t) ((double) bytes * 1e9 / source->bandwidth);
	pthread_mutex_unlock (&source->lock);
	return now - start;
}

/* ---- A stream's thread ---------------------------------------------------- */

static int
do_batch (struct stream *stream, const struct batch *batch, struct ph_error *err)
{
	if (!batch->object)
		return ph_frame_writer_mark (&stream->writer, batch->round, err);
	if (ph_frame_writer_begin (&stream->writer, batch->object, batch->round, batch->compare, err) < 0)
		return -1;
	for (size_t i = 0; i < batch->count; i++)
		if (ph_frame_writer_extent (&stream->writer, &batch->items[i], err) < 0)
			return -1;
	return 0;
}

/* Under the lock: this stream is through with `batch`. */
static void
finish_batch (struct stream *stream, struct batch *batch)
{
	struct ph_source *source = stream->source;

	stream->seen = stream->writer.stats;
	stream->next = batch->next;
	if (!batch->object && --source->marks_left == 0) {
		source->ended = batch->round;
		ph_event_signal (source->event);
		pthread_cond_broadcast (&source->progress);
	}
	if (--batch->streams_left)
		return;
	source->queued -= batch->count;
	/* streams take batches in order, so the oldest is through first */
	source->first = batch->next;
	if (!source->first)
		source->last = NULL;
	free (batch->items);
	free (batch);
	pthread_cond_broadcast (&source->progress);
}

/* Under the lock: nobody will go on. */
static void
fail (struct ph_source *source, const struct ph_error *err)
{
	if (!source->failed && !source->stop)
		source->error = *err;
	source->failed = true;
	ph_event_signal (source->event);
	pthread_cond_broadcast (&source->progress);
	pthread_cond_broadcast (&source->work);
}

/* Under the lock: the next batch; sends what is pending before it waits for one. NULL at the end. */
static struct batch *
await_batch (struct stream *stream, struct ph_error *err)
{
	struct ph_source *source = stream->source;

	while (!stream->next && !source->stop && !source->failed) {
		if (stream->writer.nr_runs || stream->writer.nr_extents) {
			pthread_mutex_unlock (&source->lock);
			int failed = ph_frame_writer_flush (&stream->writer, err);
			pthread_mutex_lock (&source->lock);
			if (failed) {
				fail (source, err);
				return NULL;
			}
			continue;
		}
		pthread_cond_wait (&source->work, &source->lock);
	}
	return source->stop || source->failed ? NULL : stream->next;
}

static void *
run_stream (void *data)
{
	struct stream *stream = data;
	struct ph_source *source = stream->source;
	struct ph_error err = { 0 };
	struct batch *batch;

	pthread_mutex_lock (&source->lock);
	while ((batch = await_batch (stream, &err))) {
		pthread_mutex_unlock (&source->lock);
		int failed = do_batch (stream, batch, &err);
		pthread_mutex_lock (&source->lock);
		if (failed) {
			fail (source, &err);
			break;
		}
		finish_batch (stream, batch);
	}
	pthread_mutex_unlock (&source->lock);
	return NULL;
}

static int
start_stream (struct ph_source *source, struct stream *stream, struct ph_error *err)
{
	if (ph_frame_writer_init (&stream->writer, err) < 0)
		return -1;
	stream->source = source;
	if (ph_stream_thread (&stream->thread, run_stream, stream, err) < 0)
		return -1;
	stream->started = true;
	return 0;
}

/* ---- Life ----------------------------------------------------------------- */

static void
init_locks (struct ph_source *source)
{
	pthread_mutex_init (&source->lock, NULL);
	ph_condition_init (&source->work);
	ph_condition_init (&source->progress);
	ph_condition_init (&source->clock);
}

static void
free_channels (struct ph_channel **channels, unsigned int count)
{
	for (unsigned int i = 0; i < count; i++)
		ph_channel_free (channels[i]);
}

struct ph_source *
ph_source_new (struct ph_channel **channels, unsigned int count, int codec, int level, unsigned int flags,
	       struct ph_error *err)
{
	struct ph_source *source = calloc (1, sizeof (*source));

	if (!source || count == 0 || count > PH_STREAMS_MAX || !(source->streams = calloc (count, sizeof (*source->streams)))) {
		ph_fail (err, source && (count == 0 || count > PH_STREAMS_MAX) ? EINVAL : ENOMEM,
			 "make a page source of %u streams", count);
		free_channels (channels, count);
		free (source);
		return NULL;
	}
	init_locks (source);
	source->count = count;
	source->ended = -1;
	source->event = eventfd (0, EFD_CLOEXEC | EFD_NONBLOCK);
	for (unsigned int i = 0; i < count; i++) {
		struct ph_frame_writer *writer = &source->streams[i].writer;
		writer->channel = channels[i];
		writer->stream = i;
		writer->streams = count;
		writer->codec = codec;
		writer->level = level;
		writer->flags = flags;
		writer->throttle = throttle;
		writer->throttle_data = source;
	}
	if (source->event < 0)
		ph_fail (err, errno, "make an eventfd");
	for (unsigned int i = 0; i < count && source->event >= 0; i++)
		if (start_stream (source, &source->streams[i], err) < 0)
			break;
	if (source->event < 0 || !source->streams[count - 1].started) {
		ph_source_free (source);
		return NULL;
	}
	return source;
}

static void
free_object (struct ph_source_object *object)
{
	if (object->place.fd >= 0)
		close (object->place.fd);
	ph_sent_destroy (&object->sent);
	free (object);
}

void
ph_source_free (struct ph_source *source)
{
	if (!source)
		return;
	pthread_mutex_lock (&source->lock);
	source->stop = true;
	pthread_cond_broadcast (&source->work);
	pthread_cond_broadcast (&source->clock);
	bool busy = source->last != NULL;
	pthread_mutex_unlock (&source->lock);
	for (unsigned int i = 0; i < source->count && busy; i++)
		ph_channel_shutdown (source->streams[i].writer.channel);
	for (unsigned int i = 0; i < source->count; i++) {
		if (source->streams[i].started)
			pthread_join (source->streams[i].thread, NULL);
		ph_channel_free (source->streams[i].writer.channel);
		ph_frame_writer_destroy (&source->streams[i].writer);
	}
	for (struct batch *batch = source->first, *next; batch; batch = next) {
		next = batch->next;
		free (batch->items);
		free (batch);
	}
	for (size_t i = 0; i < source->nr_objects; i++)
		free_object (source->objects[i]);
	if (source->event >= 0)
		close (source->event);
	pthread_cond_destroy (&source->work);
	pthread_cond_destroy (&source->progress);
	pthread_cond_destroy (&source->clock);
	pthread_mutex_destroy (&source->lock);
	free (source->objects);
	free (source->streams);
	free (source);
}

/* ---- Objects -------------------------------------------------------------- */

static struct ph_source_object **
find_object (struct ph_source *source, uint64_t number)
{
	for (size_t i = 0; i < source->nr_objects; i++)
		if (source->objects[i]->number == number)
			return &source->objects[i];
	return NULL;
}

static int
idle (struct ph_source *source, const char *what, struct ph_error *err)
{
	return source->last ? ph_fail (err, EBUSY, "%s inside a round", what) : 0;
}

static struct ph_source_object *
make_object (uint64_t number, struct ph_place place, unsigned int flags, struct ph_error *err)
{
	struct ph_source_object *object = calloc (1, sizeof (*object));

	if (!object) {
		ph_fail (err, ENOMEM, "add an object");
		return NULL;
	}
	object->number = number;
	object->flags = flags;
	object->place = (struct ph_place) { place.pid, -1 };
	ph_sent_init (&object->sent);
	if (place.fd >= 0 && (object->place.fd = fcntl (place.fd, F_DUPFD_CLOEXEC, 3)) < 0) {
		ph_fail (err, errno, "duplicate an object's descriptor");
		free_object (object);
		return NULL;
	}
	return object;
}

int
ph_source_add (struct ph_source *source, uint64_t number, struct ph_place place, unsigned int flags, struct ph_error *err)
{
	struct ph_source_object *object = make_object (number, place, flags, err);
	struct ph_source_object **objects = NULL;

	if (!object)
		return -1;
	pthread_mutex_lock (&source->lock);
	int failed = 0;
	if (find_object (source, number))
		failed = ph_fail (err, EEXIST, "add object %lu", (unsigned long) number);
	else if (source->nr_objects == OBJECTS_MAX
		 || !(objects = reallocarray (source->objects, source->nr_objects + 1, sizeof (*objects))))
		failed = ph_fail (err, ENOMEM, "add object %lu", (unsigned long) number);
	if (!failed) {
		source->objects = objects;
		source->objects[source->nr_objects++] = object;
	}
	pthread_mutex_unlock (&source->lock);
	if (failed)
		free_object (object);
	return failed;
}

int
ph_source_remove (struct ph_source *source, uint64_t number, struct ph_error *err)
{
	struct ph_source_object *object = NULL;

	pthread_mutex_lock (&source->lock);
	int failed = idle (source, "remove an object", err);
	struct ph_source_object **slot = failed ? NULL : find_object (source, number);
	if (slot) {
		object = *slot;
		*slot = source->objects[--source->nr_objects];
		/* no frame is pending: a round ends with a flush */
		for (unsigned int i = 0; i < source->count; i++)
			if (source->streams[i].writer.object == object)
				source->streams[i].writer.object = NULL;
	} else if (!failed) {
		failed = ph_fail (err, ENOENT, "remove object %lu", (unsigned long) number);
	}
	pthread_mutex_unlock (&source->lock);
	if (object)
		free_object (object);
	return failed;
}

int
ph_source_forget (struct ph_source *source, uint64_t number, uint64_t start, uint64_t end, struct ph_error *err)
{
	pthread_mutex_lock (&source->lock);
	int failed = idle (source, "forget pages", err);
	struct ph_source_object **slot = failed ? NULL : find_object (source, number);
	if (slot)
		ph_sent_forget (&(*slot)->sent, start, end);
	else if (!failed)
		failed = ph_fail (err, ENOENT, "forget pages of object %lu", (unsigned long) number);
	pthread_mutex_unlock (&source->lock);
	return failed;
}

/* ---- Rounds --------------------------------------------------------------- */

void
ph_source_set_bandwidth (struct ph_source *source, uint64_t bytes_per_second)
{
	pthread_mutex_lock (&source->lock);
	source->bandwidth = bytes_per_second;
	source->free_at = 0;
	pthread_cond_broadcast (&source->clock);
	pthread_mutex_unlock (&source->lock);
}

/* Under the lock: wait for progress until the deadline. */
static int
await_progress (struct ph_source *source, int64_t deadline, const char *what, struct ph_error *err)
{
	if (deadline < 0) {
		pthread_cond_wait (&source->progress, &source->lock);
		return 0;
	}
	struct timespec until = ph_timespec (deadline);
	if (ph_now_ns () >= deadline || pthread_cond_timedwait (&source->progress, &source->lock, &until) == ETIMEDOUT)
		return ph_fail (err, ETIMEDOUT, "%s", what);
	return 0;
}

/* Under the lock. */
static void
append (struct ph_source *source, struct batch *batch)
{
	batch->streams_left = source->count;
	for (unsigned int i = 0; i < source->count; i++)
		if (!source->streams[i].next)
			source->streams[i].next = batch;
	if (source->last)
		source->last->next = batch;
	else
		source->first = batch;
	source->last = batch;
	source->queued += batch->count;
	pthread_cond_broadcast (&source->work);
}

static int
copy_error (const struct ph_source *source, struct ph_error *err)
{
	*err = source->error;
	return -1;
}

int
ph_source_send (struct ph_source *source, uint64_t number, struct ph_extents *list, unsigned int flags, int timeout_ms,
		struct ph_error *err)
{
	int64_t deadline = ph_deadline (timeout_ms);
	struct batch *batch = calloc (1, sizeof (*batch));
	int failed = 0;

	if (!batch)
		return ph_fail (err, ENOMEM, "queue extents");
	pthread_mutex_lock (&source->lock);
	struct ph_source_object **slot = find_object (source, number);
	if (!slot)
		failed = ph_fail (err, ENOENT, "send pages of object %lu", (unsigned long) number);
	while (!failed && !source->failed && source->queued && source->queued + list->count > QUEUE_EXTENTS)
		failed = await_progress (source, deadline, "wait for room in the queue of pages", err);
	if (!failed && source->failed)
		failed = copy_error (source, err);
	if (!failed) {
		batch->object = *slot;
		batch->compare = flags & PH_SEND_COMPARE;
		batch->round = source->round;
		batch->items = list->items;
		batch->count = list->count;
		*list = (struct ph_extents) { 0 };
		append (source, batch);
	}
	pthread_mutex_unlock (&source->lock);
	if (failed)
		free (batch);
	return failed;
}

int
ph_source_end (struct ph_source *source, uint32_t round, struct ph_error *err)
{
	struct batch *batch = calloc (1, sizeof (*batch));
	int failed = 0;

	if (!batch)
		return ph_fail (err, ENOMEM, "end a round");
	batch->round = round;
	pthread_mutex_lock (&source->lock);
	if (source->failed)
		failed = copy_error (source, err);
	else if (source->marks_left)
		failed = ph_fail (err, EBUSY, "end round %u before the one before is over", round);
	else if (round != source->round)
		failed = ph_fail (err, EINVAL, "end round %u in round %u", round, source->round);
	if (!failed) {
		source->round = round + 1;
		source->marks_left = source->count;
		append (source, batch);
	}
	pthread_mutex_unlock (&source->lock);
	if (failed)
		free (batch);
	return failed;
}

int
ph_source_fd (const struct ph_source *source)
{
	return source->event;
}

int
ph_source_wait (struct ph_source *source, uint32_t round, int timeout_ms, struct ph_error *err)
{
	int64_t deadline = ph_deadline (timeout_ms);
	int failed = 0;

	pthread_mutex_lock (&source->lock);
	while (!failed && !source->failed && source->ended < (int64_t) round)
		failed = await_progress (source, deadline, "wait for the end of a round of pages", err);
	if (!failed && source->failed)
		failed = copy_error (source, err);
	pthread_mutex_unlock (&source->lock);
	return failed;
}

void
ph_source_stats (struct ph_source *source, struct ph_source_stats *stats)
{
	memset (stats, 0, sizeof (*stats));
	pthread_mutex_lock (&source->lock);
	for (unsigned int i = 0; i < source->count; i++)
		ph_stats_add (stats, &source->streams[i].seen, sizeof (*stats));
	pthread_mutex_unlock (&source->lock);
}
