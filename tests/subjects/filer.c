/* Works with files in every way that a haul has to follow, and knows at any moment what each of them should be.
 *
 * filer DIRECTORY STATUS: works in DIRECTORY until SIGTERM; STATUS gets a line with what it says of itself.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/xattr.h>
#include <time.h>
#include <unistd.h>

enum {
	PAGE = 4096,
	BIG_PAGES = 2048,
	SPARSE_PAGES = 16384,
	MAPPED_PAGES = 256,
	TEMPORARIES = 8,
	RECORD = 32,
	ROTATE = 400,
};

static volatile sig_atomic_t ended;
static char error[400];
static uint64_t writes, seed = 88172645463325252ull;
static uint32_t big[BIG_PAGES], sparse[SPARSE_PAGES], mapped[MAPPED_PAGES];
static uint32_t *map;
static int big_fd, sparse_fd, mapped_fd, log_fd;
static uint64_t records, configuration, attribute, list, temporary, moved, linked, mode, stamp;
static const char *status_file;

static void
end (int number)
{
	(void) number;
	ended = 1;
}

static uint64_t
any (uint64_t limit)
{
	seed ^= seed << 13, seed ^= seed >> 7, seed ^= seed << 17;
	return seed % limit;
}

static void __attribute__ ((format (printf, 1, 2)))
wrong (const char *format, ...)
{
	va_list list_of;

	if (error[0])
		return;
	va_start (list_of, format);
	vsnprintf (error, sizeof error, format, list_of);
	va_end (list_of);
}

static int
checked (int result, const char *what)
{
	if (result < 0)
		wrong ("%s: %s", what, strerror (errno));
	return result;
}

static void
say (const char *state)
{
	FILE *file = fopen ("status.new", "w");

	if (!file)
		return;
	fprintf (file, "state=%s writes=%llu error=%s\n", state, (unsigned long long) writes, error);
	fclose (file);
	checked (rename ("status.new", status_file), "status");
}

static void
put (const char *name, const char *text)
{
	int fd = checked (open (name, O_WRONLY | O_CREAT | O_TRUNC, 0644), name);

	checked (write (fd, text, strlen (text)), name);
	close (fd);
}

static void
expect (const char *name, const char *text)
{
	char found[200] = "";
	int fd = checked (open (name, O_RDONLY), name);

	checked (read (fd, found, sizeof found - 1), name);
	close (fd);
	if (strcmp (found, text))
		wrong ("%s holds '%.80s' and should hold '%s'", name, found, text);
}

static const char *
text_of (const char *form, uint64_t number)
{
	static char texts[4][100];
	static int next;
	char *text = texts[next++ % 4];

	snprintf (text, sizeof texts[0], form, (unsigned long long) number);
	return text;
}

static void
fill (int fd, uint32_t *numbers, uint64_t page)
{
	uint32_t content[PAGE / 4];

	numbers[page] = (uint32_t) ++writes;
	for (int i = 0; i < PAGE / 4; i++)
		content[i] = numbers[page] + (uint32_t) page;
	if (pwrite (fd, content, PAGE, (off_t) page * PAGE) != PAGE)
		wrong ("pwrite: %s", strerror (errno));
}

static void
compare (const char *name, int fd, const uint32_t *numbers, uint64_t pages)
{
	uint32_t content[PAGE / 4];

	for (uint64_t page = 0; page < pages; page++) {
		uint32_t wanted = numbers[page] ? numbers[page] + (uint32_t) page : 0;

		if (pread (fd, content, PAGE, (off_t) page * PAGE) != PAGE) {
			wrong ("%s ends before page %llu", name, (unsigned long long) page);
			return;
		}
		for (int i = 0; i < PAGE / 4; i++)
			if (content[i] != wanted) {
				wrong ("%s page %llu word %d is %u and should be %u", name,
				       (unsigned long long) page, i, content[i], wanted);
				return;
			}
	}
}

static void
append (void)
{
	char record[RECORD + 1];

	if (records == ROTATE) {
		checked (rename ("log", "log.old"), "log");
		/* what comes now goes into the file that has another name */
	}
	if (records == ROTATE + 50) {
		close (log_fd);
		log_fd = checked (open ("log", O_RDWR | O_CREAT | O_EXCL | O_APPEND, 0640), "log");
		records = 0;
	}
	snprintf (record, sizeof record, "%-*llu\n", RECORD - 1, (unsigned long long) records++);
	if (write (log_fd, record, RECORD) != RECORD)
		wrong ("log: %s", strerror (errno));
	writes++;
}

static void
compare_log (void)
{
	char record[RECORD + 1], found[RECORD + 1] = "";
	struct stat by_name, by_fd;

	if (fstat (log_fd, &by_fd) < 0 || stat (records > ROTATE ? "log.old" : "log", &by_name) < 0)
		wrong ("log: %s", strerror (errno));
	else if (by_fd.st_ino != by_name.st_ino)
		wrong ("the open log is not the one that has its name");
	else if ((uint64_t) by_fd.st_size != records * RECORD)
		wrong ("log has %lld bytes and should have %llu", (long long) by_fd.st_size,
		       (unsigned long long) records * RECORD);
	for (uint64_t i = 0; i < records && !error[0]; i++) {
		snprintf (record, sizeof record, "%-*llu\n", RECORD - 1, (unsigned long long) i);
		if (pread (log_fd, found, RECORD, (off_t) (i * RECORD)) != RECORD || memcmp (record, found, RECORD))
			wrong ("log record %llu is '%.20s'", (unsigned long long) i, found);
	}
}

/* An access control list with one named user (acl(5)), as the kernel has it in system.posix_acl_access. */
static size_t
make_list (uint64_t number, uint8_t *room)
{
	struct {
		uint16_t tag, permissions;
		uint32_t id;
	} entries[] = {
		{ 1, 6, ~0u }, { 2, 4, 2000 + (uint32_t) (number % 100) }, { 4, 4, ~0u }, { 16, 4, ~0u }, { 32, 4, ~0u },
	};
	uint32_t version = 2;

	memcpy (room, &version, 4);
	memcpy (room + 4, entries, sizeof entries);
	return 4 + sizeof entries;
}

static void
work (void)
{
	uint8_t room[100];
	uint64_t page;

	switch (any (12)) {
	case 0:
	case 1:
		append ();
		break;
	case 2:
		put ("configuration.new", text_of ("%llu", ++configuration));
		checked (rename ("configuration.new", "configuration"), "rename");
		break;
	case 3:
		fill (big_fd, big, any (BIG_PAGES));
		break;
	case 4:
		fill (sparse_fd, sparse, any (SPARSE_PAGES / 64) * 64);
		break;
	case 5:
		page = any (MAPPED_PAGES);
		mapped[page] = (uint32_t) ++writes;
		for (int i = 0; i < PAGE / 4; i++)
			map[page * PAGE / 4 + (uint64_t) i] = mapped[page] + (uint32_t) page;
		break;
	case 6:
		checked (setxattr ("attributes", "user.count", &(uint64_t){ ++attribute }, 8, 0), "setxattr");
		break;
	case 7:
		checked (setxattr ("attributes", "system.posix_acl_access", room, make_list (++list, room), 0), "acl");
		break;
	case 8:
		temporary++;
		put (text_of ("temporary.%llu", temporary), text_of ("%llu", temporary));
		if (temporary > TEMPORARIES)
			checked (unlink (text_of ("temporary.%llu", temporary - TEMPORARIES)), "unlink");
		break;
	case 9:
		moved++;
		checked (mkdir (text_of ("made.%llu", moved), 0750), "mkdir");
		put (text_of ("made.%llu/file", moved), text_of ("%llu", moved));
		checked (rename (text_of ("made.%llu", moved), text_of ("moved.%llu", moved)), "rename");
		if (moved > TEMPORARIES) {
			checked (unlink (text_of ("moved.%llu/file", moved - TEMPORARIES)), "unlink");
			checked (rmdir (text_of ("moved.%llu", moved - TEMPORARIES)), "rmdir");
		}
		break;
	case 10:
		linked++;
		checked (link ("linked", text_of ("linked.%llu", linked)), "link");
		if (linked > TEMPORARIES)
			checked (unlink (text_of ("linked.%llu", linked - TEMPORARIES)), "unlink");
		put (text_of ("linked.%llu", linked), text_of ("%llu", linked));
		break;
	case 11:
		mode = (mode + 1) % 512;
		checked (chmod ("mode", (mode_t) mode), "chmod");
		stamp = any (1000000000) * 1000000007;
		checked (utimensat (AT_FDCWD, "mode",
				    (struct timespec[]){ { 0, UTIME_OMIT },
							 { (time_t) (stamp / 1000000000), (long) (stamp % 1000000000) } },
				    0),
			 "utimensat");
		break;
	}
	writes++;
}

static void
compare_all (void)
{
	uint8_t wanted[100], found[100];
	uint64_t count = 0;
	struct stat status;

	compare_log ();
	expect ("configuration", text_of ("%llu", configuration));
	compare ("big", big_fd, big, BIG_PAGES);
	compare ("sparse", sparse_fd, sparse, SPARSE_PAGES);
	if (fstat (sparse_fd, &status) < 0 || status.st_blocks * 512ll > SPARSE_PAGES / 2 * (long long) PAGE)
		wrong ("sparse takes %lld blocks", (long long) status.st_blocks);
	compare ("mapped", mapped_fd, mapped, MAPPED_PAGES);
	if (attribute && (getxattr ("attributes", "user.count", &count, 8) != 8 || count != attribute))
		wrong ("user.count is %llu and should be %llu", (unsigned long long) count,
		       (unsigned long long) attribute);
	if (list) {
		size_t size = make_list (list, wanted);

		if (getxattr ("attributes", "system.posix_acl_access", found, sizeof found) != (ssize_t) size
		    || memcmp (wanted, found, size))
			wrong ("the access control list is another one");
	}
	for (uint64_t i = temporary > TEMPORARIES ? temporary - TEMPORARIES : 0; i++ < temporary;)
		expect (text_of ("temporary.%llu", i), text_of ("%llu", i));
	if (temporary > TEMPORARIES && !access (text_of ("temporary.%llu", temporary - TEMPORARIES), F_OK))
		wrong ("temporary.%llu was removed", (unsigned long long) temporary - TEMPORARIES);
	for (uint64_t i = moved > TEMPORARIES ? moved - TEMPORARIES : 0; i++ < moved;) {
		expect (text_of ("moved.%llu/file", i), text_of ("%llu", i));
		if (!access (text_of ("made.%llu", i), F_OK))
			wrong ("made.%llu was renamed", (unsigned long long) i);
	}
	for (uint64_t i = linked > TEMPORARIES ? linked - TEMPORARIES : 0; i++ < linked;)
		expect (text_of ("linked.%llu", i), text_of ("%llu", linked));
	if (stat ("linked", &status) < 0 || status.st_nlink != 1 + (linked < TEMPORARIES ? linked : TEMPORARIES))
		wrong ("linked has %d names", (int) status.st_nlink);
	if (stat ("mode", &status) < 0 || (status.st_mode & 07777) != mode)
		wrong ("mode is %o and should be %o", status.st_mode & 07777, (unsigned) mode);
	else if (stamp && (uint64_t) status.st_mtim.tv_sec * 1000000000 + (uint64_t) status.st_mtim.tv_nsec != stamp)
		wrong ("the time of mode is another one");
}

int
main (int argc, char **argv)
{
	struct sigaction action = { .sa_handler = end };

	if (argc != 3 || chdir (argv[1]) < 0)
		return 2;
	status_file = argv[2];
	sigaction (SIGTERM, &action, NULL);
	put ("attributes", "");
	put ("linked", "0");
	put ("mode", "");
	chmod ("mode", 0);
	put ("configuration", "0");
	log_fd = checked (open ("log", O_RDWR | O_CREAT | O_APPEND, 0640), "log");
	big_fd = checked (open ("big", O_RDWR | O_CREAT, 0600), "big");
	sparse_fd = checked (open ("sparse", O_RDWR | O_CREAT, 0600), "sparse");
	mapped_fd = checked (open ("mapped", O_RDWR | O_CREAT, 0600), "mapped");
	checked (ftruncate (big_fd, BIG_PAGES * PAGE), "big");
	checked (ftruncate (sparse_fd, SPARSE_PAGES * (off_t) PAGE), "sparse");
	checked (ftruncate (mapped_fd, MAPPED_PAGES * PAGE), "mapped");
	for (uint64_t page = 0; page < BIG_PAGES; page++)
		fill (big_fd, big, page);
	map = mmap (NULL, MAPPED_PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, mapped_fd, 0);
	if (map == MAP_FAILED)
		wrong ("mmap: %s", strerror (errno));
	for (uint64_t round = 0; !ended; round++) {
		for (int i = 0; i < 20 && !error[0]; i++)
			work ();
		if (round % 20 == 0 && !error[0])
			compare_all ();
		say (error[0] ? "failed" : "running");
		nanosleep (&(struct timespec){ 0, 5000000 }, NULL);
	}
	if (!error[0])
		compare_all ();
	say (error[0] ? "failed" : "pass");
	return error[0] != 0;
}
