/* In place of libFuzzer, where there is no clang: runs every input of the corpus, and then changed ones for a while.
 *
 * Arguments: seconds, a seed, directories of inputs. What an input did is known by its name on stderr, or by the
 * file `crash-SEED` in the working directory, which is written before it is run.
 */
#include <dirent.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define LARGEST 65536
#define MOST 4096

int LLVMFuzzerTestOneInput (const uint8_t *data, size_t size);

static struct {
	uint8_t *data;
	size_t size;
} inputs[MOST];
static size_t count;
static uint64_t state;

static uint64_t
draw (void)
{
	state ^= state << 13;
	state ^= state >> 7;
	state ^= state << 17;
	return state;
}

static void
take (const char *directory)
{
	DIR *entries = opendir (directory);
	char path[PATH_MAX];

	for (struct dirent *entry; entries && count < MOST && (entry = readdir (entries));) {
		snprintf (path, sizeof (path), "%s/%s", directory, entry->d_name);
		int fd = open (path, O_RDONLY);
		struct stat status;
		if (fd >= 0 && fstat (fd, &status) == 0 && S_ISREG (status.st_mode) && status.st_size <= LARGEST) {
			inputs[count].data = malloc (LARGEST);
			inputs[count].size = read (fd, inputs[count].data, LARGEST);
			fprintf (stderr, "%s\n", path);
			LLVMFuzzerTestOneInput (inputs[count].data, inputs[count].size);
			count++;
		}
		close (fd);
	}
	if (entries)
		closedir (entries);
}

static size_t
change (uint8_t *data, size_t size)
{
	static const uint64_t special[] = { 0, 1, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, UINT64_MAX, 4096 };
	uint64_t value = special[draw () % (sizeof (special) / sizeof (*special))];
	size_t at = size ? draw () % size : 0, length = 1 + draw () % 16;

	switch (draw () % 6) {
	case 0:
		if (size)
			data[at] ^= 1 << draw () % 8;
		return size;
	case 1:
		if (size)
			data[at] = draw ();
		return size;
	case 2:
		length = 1 << draw () % 4;
		if (at + length <= size)
			memcpy (data + at, &value, length);
		return size;
	case 3: /* take out */
		if (length > size - at)
			length = size - at;
		memmove (data + at, data + at + length, size - at - length);
		return size - length;
	case 4: /* put in */
		if (size + length > LARGEST)
			return size;
		memmove (data + at + length, data + at, size - at);
		for (size_t i = 0; i < length; i++)
			data[at + i] = draw ();
		return size + length;
	default: /* the end of another */
	{
		size_t other = draw () % count, from = inputs[other].size ? draw () % inputs[other].size : 0;
		length = inputs[other].size - from;
		if (length > LARGEST - at)
			length = LARGEST - at;
		memcpy (data + at, inputs[other].data + from, length);
		return at + length;
	}
	}
}

int
main (int argc, char **argv)
{
	static uint8_t data[LARGEST];
	char path[64];
	uint64_t runs = 0;

	if (argc < 4)
		return 2;
	time_t end = time (NULL) + atoi (argv[1]);
	state = strtoull (argv[2], NULL, 10) * 0x9E3779B97F4A7C15ull + 1;
	for (int i = 3; i < argc; i++)
		take (argv[i]);
	if (count == 0)
		return 2;
	snprintf (path, sizeof (path), "crash-%s", argv[2]);
	int crash = open (path, O_RDWR | O_CREAT | O_TRUNC, 0600);
	for (; time (NULL) < end; runs++) {
		size_t of = draw () % count, size = inputs[of].size;
		memcpy (data, inputs[of].data, size);
		for (unsigned int i = 0; i < 1 + draw () % 6; i++)
			size = change (data, size);
		if (ftruncate (crash, 0) < 0 || pwrite (crash, data, size, 0) != (ssize_t) size)
			return 2;
		LLVMFuzzerTestOneInput (data, size);
	}
	unlink (path);
	printf ("%llu runs\n", (unsigned long long) runs);
	return 0;
}
