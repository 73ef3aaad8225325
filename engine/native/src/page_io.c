/* Pages from and to a place: process_vm_readv(2) and process_vm_writev(2), or pread and pwrite. */
#include "page_io.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#define BATCH_RUNS 512  /* runs of one system call; below IOV_MAX */

static const char zeros[65536] __attribute__ ((aligned (PH_PAGE_SIZE)));

bool
ph_page_is_zero (const void *page)
{
	typedef uint64_t lane __attribute__ ((vector_size (32), may_alias, aligned (8)));
	const lane *lanes = page;

	for (unsigned int i = 0; i < PH_PAGE_SIZE / sizeof (lane); i += 4) {
		lane any = lanes[i] | lanes[i + 1] | lanes[i + 2] | lanes[i + 3];
		if (any[0] | any[1] | any[2] | any[3])
			return false;
	}
	return true;
}

/* A place in a list of runs: run `index`, `page` pages into it, `done` pages in all. */
struct position {
	unsigned int index;
	unsigned int page;
	unsigned int done;
};

static uint64_t
address_at (const struct ph_extent *runs, const struct position *at)
{
	return runs[at->index].start + (uint64_t) at->page * PH_PAGE_SIZE;
}

static void
advance (const struct ph_extent *runs, unsigned int count, struct position *at, uint64_t pages)
{
	at->done += pages;
	while (pages && at->index < count) {
		uint64_t left = runs[at->index].nr_pages - at->page;
		uint64_t step = pages < left ? pages : left;
		pages -= step;
		at->page += step;
		if (at->page == runs[at->index].nr_pages) {
			at->index++;
			at->page = 0;
		}
	}
}

/* The rest of the runs, from `at` on, as vectors; the count. */
static unsigned int
fill_vectors (const struct ph_extent *runs, unsigned int count, struct position at, struct iovec *vectors, size_t *bytes)
{
	unsigned int used = 0;

	*bytes = 0;
	for (; at.index < count && used < BATCH_RUNS; at.index++, at.page = 0) {
		size_t size = (size_t) (runs[at.index].nr_pages - at.page) * PH_PAGE_SIZE;
		vectors[used++] = (struct iovec) { (void *) (uintptr_t) address_at (runs, &at), size };
		*bytes += size;
	}
	return used;
}

/* Pages read by one call, 0 if the next one cannot be read so, -1 on an error. */
static ssize_t
read_some (pid_t pid, const struct ph_extent *runs, unsigned int count, struct position at, uint8_t *buffer,
	   struct ph_error *err)
{
	struct iovec remote[BATCH_RUNS], local;
	size_t bytes;
	unsigned int used = fill_vectors (runs, count, at, remote, &bytes);

	local = (struct iovec) { buffer + (size_t) at.done * PH_PAGE_SIZE, bytes };
	ssize_t got = process_vm_readv (pid, &local, 1, remote, used, 0);
	if (got >= 0)
		return got / PH_PAGE_SIZE;
	if (errno == EFAULT || errno == ESRCH || errno == ENOMEM)
		return 0;
	return ph_fail (err, errno, "read memory of process %d at %lx", pid, (unsigned long) address_at (runs, &at));
}

static int
read_process (struct ph_place place, const struct ph_extent *runs, unsigned int count, uint8_t *buffer,
	      struct ph_gone *gone, struct ph_error *err)
{
	struct position at = { 0 };

	while (at.index < count) {
		ssize_t pages = read_some (place.pid, runs, count, at, buffer, err);
		if (pages < 0)
			return -1;
		advance (runs, count, &at, pages);
		if (pages > 0)
			continue;
		/* an area that forbids reading, or none */
		if (place.fd < 0
		    || pread (place.fd, buffer + (size_t) at.done * PH_PAGE_SIZE, PH_PAGE_SIZE, address_at (runs, &at))
			       != PH_PAGE_SIZE)
			gone->bits[at.done / 64] |= 1ull << at.done % 64;
		advance (runs, count, &at, 1);
	}
	return 0;
}

/* Beyond the end of a file is zero, as a mapping would have it of a file that will grow again. */
static int
read_descriptor (int fd, const struct ph_extent *runs, unsigned int count, uint8_t *buffer, struct ph_error *err)
{
	for (unsigned int i = 0; i < count; i++) {
		size_t size = (size_t) runs[i].nr_pages * PH_PAGE_SIZE, have = 0;
		while (have < size) {
			ssize_t got = pread (fd, buffer + have, size - have, runs[i].start + have);
			if (got < 0 && errno == EINTR)
				continue;
			if (got < 0)
				return ph_fail (err, errno, "read a shared object at %lx", (unsigned long) runs[i].start);
			if (got == 0)
				break;
			have += got;
		}
		memset (buffer + have, 0, size - have);
		buffer += size;
	}
	return 0;
}

int
ph_read_runs (struct ph_place place, const struct ph_extent *runs, unsigned int count, void *buffer,
	      struct ph_gone *gone, struct ph_error *err)
{
	memset (gone, 0, sizeof (*gone));
	if (place.pid > 0)
		return read_process (place, runs, count, buffer, gone, err);
	return read_descriptor (place.fd, runs, count, buffer, err);
}

static int
write_process (struct ph_place place, const struct ph_extent *runs, unsigned int count, const uint8_t *buffer,
	       struct ph_error *err)
{
	struct iovec remote[BATCH_RUNS], local;
	struct position at = { 0 };
	size_t bytes;

	while (at.index < count) {
		unsigned int used = fill_vectors (runs, count, at, remote, &bytes);
		const uint8_t *from = buffer + (size_t) at.done * PH_PAGE_SIZE;
		local = (struct iovec) { (void *) from, bytes };
		ssize_t put = process_vm_writev (place.pid, &local, 1, remote, used, 0);
		if (put < 0 && errno != EFAULT)
			return ph_fail (err, errno, "write memory of process %d", place.pid);
		if (put >= PH_PAGE_SIZE) {
			advance (runs, count, &at, put / PH_PAGE_SIZE);
			continue;
		}
		/* an area that forbids writing, or none */
		uint64_t address = address_at (runs, &at);
		errno = EFAULT;
		if (place.fd < 0 || pwrite (place.fd, from, PH_PAGE_SIZE, address) != PH_PAGE_SIZE)
			return ph_fail (err, errno, "write memory of process %d at %lx", place.pid, (unsigned long) address);
		advance (runs, count, &at, 1);
	}
	return 0;
}

static int
write_descriptor (int fd, const struct ph_extent *runs, unsigned int count, const uint8_t *buffer, struct ph_error *err)
{
	for (unsigned int i = 0; i < count; i++) {
		size_t left = (size_t) runs[i].nr_pages * PH_PAGE_SIZE;
		off_t to = runs[i].start;
		while (left) {
			ssize_t put = pwrite (fd, buffer, left, to);
			if (put < 0 && errno == EINTR)
				continue;
			if (put <= 0)
				return ph_fail (err, put ? errno : ENOSPC, "write a file at %lx", (unsigned long) to);
			buffer += put;
			to += put;
			left -= put;
		}
	}
	return 0;
}

int
ph_write_runs (struct ph_place place, const struct ph_extent *runs, unsigned int count, const void *buffer,
	       struct ph_error *err)
{
	if (place.pid > 0)
		return write_process (place, runs, count, buffer, err);
	return write_descriptor (place.fd, runs, count, buffer, err);
}

int
ph_copy_runs (int uffd, struct ph_place place, const struct ph_extent *runs, unsigned int count, const void *buffer,
	      struct ph_error *err)
{
	const uint8_t *from = buffer;

	for (unsigned int i = 0; i < count; i++) {
		uint64_t size = (uint64_t) runs[i].nr_pages * PH_PAGE_SIZE;
		struct uffdio_copy copy = {
			.dst = runs[i].start,
			.src = (uintptr_t) from,
			.len = size,
			.mode = UFFDIO_COPY_MODE_DONTWAKE,
		};
		uint64_t done = ioctl (uffd, UFFDIO_COPY, &copy) == 0 ? size : copy.copy > 0 ? (uint64_t) copy.copy : 0;
		struct ph_extent rest = { runs[i].start + done, (size - done) / PH_PAGE_SIZE, PH_EXTENT_DATA };
		if (rest.nr_pages && ph_write_runs (place, &rest, 1, from + done, err) < 0)
			return -1;
		from += size;
	}
	return 0;
}

int
ph_zero_run (struct ph_place place, uint64_t start, uint64_t nr_pages, struct ph_error *err)
{
	if (place.pid <= 0
	    && fallocate (place.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, nr_pages * PH_PAGE_SIZE) == 0)
		return 0;
	while (nr_pages) {
		uint64_t most = sizeof (zeros) / PH_PAGE_SIZE, pages = nr_pages < most ? nr_pages : most;
		struct ph_extent run = { start, pages, PH_EXTENT_DATA };
		if (ph_write_runs (place, &run, 1, zeros, err) < 0)
			return -1;
		start += pages * PH_PAGE_SIZE;
		nr_pages -= pages;
	}
	return 0;
}
