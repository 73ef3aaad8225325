/* Memory of programs: what changed, and how it gets to the other side.
 *
 * Extents are runs of pages. The trackers below find them, the page source reads
 * what they name and sends it over the streams of ph_stream.h, the page sink puts
 * it in place. Python hands whole lists from one to the other and never looks at
 * a single page.
 *
 * An *object* is an address space or the memory behind a descriptor (a memfd, a
 * tmpfs file, shared anonymous memory through /proc/PID/map_files, SysV shared memory); both ends know
 * it under a number that Python gives. Positions are addresses in the first and
 * byte offsets in the second.
 */
#ifndef PH_MEMORY_H
#define PH_MEMORY_H

#include <stddef.h>
#include <stdint.h>

#include "ph_error.h"
#include "ph_stream.h"

/* cffi: begin */
#define PH_PAGE_SIZE 4096
#define PH_CHUNK_SIZE 1048576   /* payload of a frame at most, and the grain of the choice of a stream */

/* What an extent says about its pages. */
#define PH_EXTENT_DATA 0        /* contents to carry; if all zero and never sent, nothing is */
#define PH_EXTENT_DROP 1        /* gone: reads as zero now; matters only where it was sent before */
#define PH_EXTENT_PRIVATE 2     /* a private copy of a file's page: carried also if zero */
#define PH_EXTENT_REVERT 3      /* the file's own page again (or absent); read and carried if it was sent before */
#define PH_EXTENT_SAME 4        /* of a dump: the images of the round before hold it as it is now */

struct ph_extent {
	uint64_t start;         /* address or offset in bytes, a multiple of the page size */
	uint32_t nr_pages;
	uint32_t kind;          /* PH_EXTENT_* */
};

struct ph_extents {
	struct ph_extent *items;
	size_t count;
	size_t room;
};

/* Where pages are read from or written to: the memory of process `pid`, with `fd` a descriptor
   of its /proc/PID/mem (for areas that forbid reading or writing) or -1; or, with pid 0, the
   contents of `fd`. */
struct ph_place {
	int32_t pid;
	int32_t fd;
};

struct ph_extents *ph_extents_new (void);
void ph_extents_free (struct ph_extents *list);
void ph_extents_clear (struct ph_extents *list);
/* Append; grows the last extent if this one continues it. */
int ph_extents_add (struct ph_extents *list, uint64_t start, uint64_t nr_pages, uint32_t kind, struct ph_error *err);
/* Append the extents of another list that are of one kind. */
int ph_extents_append (struct ph_extents *list, const struct ph_extents *other, uint32_t kind, struct ph_error *err);
/* Sort, merge and unite: a page named twice stays once, by the lowest kind that names it (so DATA wins over DROP). */
int ph_extents_unite (struct ph_extents *list, struct ph_error *err);
/* Take pages out of a list; both ascending and disjoint. */
int ph_extents_exclude (struct ph_extents *list, const struct ph_extents *holes, struct ph_error *err);
uint64_t ph_extents_pages (const struct ph_extents *list, uint32_t kind);

/* ---- Trackers ------------------------------------------------------------- */

#define PH_TRACK_WP_ASYNC 1     /* userfaultfd WP_ASYNC and PAGEMAP_SCAN (Linux >= 6.7) */
#define PH_TRACK_SOFT_DIRTY 2   /* pagemap bit 55 and clear_refs (CONFIG_MEM_SOFT_DIRTY) */

/* Which of them work here, tried on a page of our own (clear_refs succeeds without soft-dirty too). */
unsigned int ph_tracker_probe (void);

/* Ready a userfaultfd that was made inside the target, and (un)register an area with it.
   EPERM: a shared mapping of a read-only descriptor; EBUSY: the program has its own. */
int ph_uffd_enable (int uffd, struct ph_error *err);
int ph_uffd_track (int uffd, uint64_t start, uint64_t end, struct ph_error *err);
int ph_uffd_untrack (int uffd, uint64_t start, uint64_t end, struct ph_error *err);

#define PH_SCAN_CLEAR 1         /* start a new interval: what is reported now is reported again only if it changes */
#define PH_SCAN_ALL 2           /* what is there, changed or not */

#define PH_RANGE_FILE 1         /* a private mapping of a file: report PRIVATE and REVERT instead of DATA and DROP */

/* A stretch of private memory, all of it of one kind. */
struct ph_range {
	uint64_t start;
	uint64_t end;
	uint32_t flags;         /* PH_RANGE_* */
	uint32_t reserved;
};

/* A scan and how far it is: zero `index` and `at`, then call until it returns 0. */
struct ph_scan {
	int32_t pagemap;        /* a descriptor of /proc/PID/pagemap */
	uint32_t backend;       /* PH_TRACK_*; 0 with PH_SCAN_ALL for a process that nobody tracks */
	uint32_t flags;         /* PH_SCAN_* */
	uint32_t reserved;
	uint64_t at;
	size_t index;           /* of the range that is being scanned */
	size_t limit;           /* stop early when the list holds that many extents, so that lists stay small */
};

/* Append to `list` what was written in the ranges since the last clearing scan (or since they were
   registered). Returns 1 if it stopped early, 0 at the end. EPERM: part of range `index` is not registered.
   With soft-dirty clearing is not the scan's: see `ph_clear_soft_dirty`. */
int ph_scan_private (struct ph_scan *scan, const struct ph_range *ranges, size_t count, struct ph_extents *list,
		     struct ph_error *err);

/* Which of the pages `known` are no private copies any more: `kept` gets those that are (as PRIVATE), `list` the
   others (as REVERT). Needed with WP_ASYNC, which does not report that a page of a private mapping of a file (or
   of hugetlbfs) was dropped: the kernel keeps the mark that it was not written. */
int ph_scan_reverted (int pagemap, const struct ph_extents *known, struct ph_extents *kept, struct ph_extents *list,
		      struct ph_error *err);

/* Begin a new interval for a whole process: before a scan with PH_SCAN_ALL, and else after the scan,
   with the process stopped since before it. */
int ph_clear_soft_dirty (int clear_refs, struct ph_error *err);

/* Data (as DATA) and holes (as DROP) of a shared object up to `size` (lseek SEEK_DATA). */
int ph_scan_descriptor (int fd, uint64_t size, struct ph_extents *list, struct ph_error *err);

/* What was written through one mapping of a shared object: `start` is where offset `offset` is mapped,
   `size` the length of the mapping, `data` the object's extents from `ph_scan_descriptor`, of which
   only DATA is looked at. Appends DATA in offsets; of `scan` its descriptor, backend and flags count. */
int ph_scan_mapping (const struct ph_scan *scan, uint64_t start, uint64_t size, uint64_t offset,
		     const struct ph_extents *data, struct ph_extents *list, struct ph_error *err);

/* Append the guard pages (madvise(2), MADV_GUARD_INSTALL) within `where` to `found`. EINVAL: this kernel does not show
   them (before 6.15), ENOTTY: it has none (before 6.7). */
int ph_scan_guards (int pagemap, const struct ph_extents *where, struct ph_extents *found, struct ph_error *err);

/* Have these pages of our own be writable without a fault (MADV_POPULATE_WRITE, Linux 5.14). Returns 0, or -1 with what the
   kernel has against it: EINVAL where it does not know that. */
int ph_make_ready (const struct ph_extents *list, struct ph_error *err);

/* ---- Page source ---------------------------------------------------------- */

#define PH_CODEC_RAW 0
#define PH_CODEC_ZSTD 1
#define PH_CODEC_AUTO 2         /* zstd where it is measured to be faster than the link */

#define PH_SOURCE_CHECKSUM 1    /* each frame carries XXH64 of its pages */

#define PH_SEND_COMPARE 1       /* send only pages whose hash differs from the last sent one (needs PH_OBJECT_HASHED) */

#define PH_OBJECT_HASHED 1      /* keep a hash of every page sent: 8 bytes a page */

struct ph_source_stats {
	uint64_t pages_data;            /* carried with contents */
	uint64_t pages_zero;            /* read, found zero */
	uint64_t pages_dropped;         /* told to be zero */
	uint64_t pages_unchanged;       /* compared, found as sent */
	uint64_t pages_gone;            /* not readable any more: an area went away; the next round knows */
	uint64_t bytes_raw;             /* contents carried */
	uint64_t bytes_wire;            /* frames, before TLS */
	uint64_t ns_read;               /* summed over the streams' threads: reading and looking at pages, */
	uint64_t ns_encode;             /* compressing, */
	uint64_t ns_send;               /* TLS and the socket, */
	uint64_t ns_throttled;          /* waiting for the bandwidth limit */
};

struct ph_source;

/* A thread for each of `count` channels, which the source owns from then on, also when this fails. `level` is zstd's. */
struct ph_source *ph_source_new (struct ph_channel **channels, unsigned int count, int codec, int level,
				 unsigned int flags, struct ph_error *err);
void ph_source_free (struct ph_source *source);

/* Make an object known (the source duplicates place.fd), or forget it. Not inside a round. */
int ph_source_add (struct ph_source *source, uint64_t object, struct ph_place place, unsigned int flags,
		   struct ph_error *err);
int ph_source_remove (struct ph_source *source, uint64_t object, struct ph_error *err);
/* [start, end) of an object was never sent: the destination made it anew. Not inside a round. */
int ph_source_forget (struct ph_source *source, uint64_t object, uint64_t start, uint64_t end, struct ph_error *err);

/* Bytes a second on the wire, all streams together; 0 = no limit. */
void ph_source_set_bandwidth (struct ph_source *source, uint64_t bytes_per_second);

/* Send what `list` names, as part of `round`. Takes the list's contents (it is empty afterwards) and returns
   at once, unless much is queued already (then within timeout_ms). */
int ph_source_send (struct ph_source *source, uint64_t object, struct ph_extents *list, unsigned int flags,
		    int timeout_ms, struct ph_error *err);
/* End the round: each stream gets its mark behind what was sent. The descriptor becomes readable
   (an eventfd; read it to reset) when all streams have written theirs or one has failed. */
int ph_source_end (struct ph_source *source, uint32_t round, struct ph_error *err);
int ph_source_fd (const struct ph_source *source);
/* Wait for the end of `round`. Fails as the first failing stream did. */
int ph_source_wait (struct ph_source *source, uint32_t round, int timeout_ms, struct ph_error *err);
void ph_source_stats (struct ph_source *source, struct ph_source_stats *stats);

/* ---- Page sink ------------------------------------------------------------ */

/* A run of pages in an image file. */
struct ph_record {
	uint64_t start;
	uint64_t offset;        /* in the file, bytes; 0 for a DROP */
	uint32_t nr_pages;
	uint32_t kind;          /* PH_EXTENT_DATA or PH_EXTENT_DROP */
};

struct ph_sink_stats {
	uint64_t pages_data;
	uint64_t pages_dropped;
	uint64_t bytes_wire;
	uint64_t ns_receive;
	uint64_t ns_decode;
	uint64_t ns_write;
};

struct ph_sink;

/* A thread for each channel, owned from then on, also when this fails. */
struct ph_sink *ph_sink_new (struct ph_channel **channels, unsigned int count, struct ph_error *err);
void ph_sink_free (struct ph_sink *sink);

/* Where an object's pages go (place.fd is duplicated). Dropped pages are written as zeros in a process
   and punched out of a descriptor. At any time. */
int ph_sink_add (struct ph_sink *sink, uint64_t object, struct ph_place place, struct ph_error *err);
/* The object's pages are appended to the image file `fd`; `ph_sink_records` tells what stands where. */
int ph_sink_add_image (struct ph_sink *sink, uint64_t object, int fd, struct ph_error *err);
int ph_sink_remove (struct ph_sink *sink, uint64_t object, struct ph_error *err);
/* Pages of a process where there are none yet come in by `uffd` (duplicated), a userfaultfd of it whose areas are
   registered; -1 ends that. At any time. */
int ph_sink_fill (struct ph_sink *sink, uint64_t object, int uffd, struct ph_error *err);
/* Pages of processes never go to [start, end): there is memory of the engine's own. EPROTO for those that would. */
void ph_sink_guard (struct ph_sink *sink, uint64_t start, uint64_t end);

/* Frames of rounds up to `round` may be applied; those of later ones wait, until changes of areas are made. */
void ph_sink_allow (struct ph_sink *sink, uint32_t round);
/* An eventfd: readable when a round is complete on all streams, or one has failed. */
int ph_sink_fd (const struct ph_sink *sink);
int ph_sink_wait (struct ph_sink *sink, uint32_t round, int timeout_ms, struct ph_error *err);
void ph_sink_stats (struct ph_sink *sink, struct ph_sink_stats *stats);
/* The records of an image object in the order of the file; the count. NULL `records` only counts. */
size_t ph_sink_records (struct ph_sink *sink, uint64_t object, struct ph_record *records, size_t room);

/* ---- Files and comparison ------------------------------------------------- */

#define PH_DUMP_KEEP_ZERO 1     /* write zero pages too (there is a parent image, or a file below) */

/* Append the pages of `list` to image file `out` from byte *offset on, which moves. `written` gets one
   extent for each run that is in the file now, in its order. Unreadable pages are left out. */
int ph_dump_pages (struct ph_place place, const struct ph_extents *list, int out, uint64_t *offset,
		   unsigned int flags, struct ph_extents *written, struct ph_error *err);

#define PH_FILL_COMPARE 1        /* leave pages alone that hold that already: others may share them; needs place.fd */

/* Pages from a file into memory. */
struct ph_piece {
	uint64_t start;         /* where in the place */
	uint64_t offset;        /* where in the file */
	uint32_t nr_pages;
	int32_t fd;             /* the file */
};
int ph_fill_pages (struct ph_place place, const struct ph_piece *pieces, size_t count, unsigned int flags,
		   struct ph_error *err);

/* As `ph_dump_pages`, but pages that equal those of the round before are only noted, as SAME. `known` is where the
   images have those: ascending, disjoint. A zero page of anonymous memory that they hold otherwise is written. */
int ph_dump_changed (struct ph_place place, const struct ph_extents *list, const struct ph_piece *known, size_t count,
		     int out, uint64_t *offset, struct ph_extents *written, struct ph_error *err);

/* XXH64 of every page of `list`, in its order; unreadable pages hash to 0. `room` is the size of `hashes` in elements. */
int ph_hash_pages (struct ph_place place, const struct ph_extents *list, uint64_t *hashes, size_t room,
		   struct ph_error *err);
/* cffi: end */

#endif
