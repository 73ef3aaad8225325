/* XXH64, seed 0, from its specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md). Not for
   adversaries: it finds mistakes and changes, TLS keeps others out. */
#include <string.h>

#include "page_io.h"

#define PRIME1 0x9E3779B185EBCA87ull
#define PRIME2 0xC2B2AE3D27D4EB4Full
#define PRIME3 0x165667B19E3779F9ull
#define PRIME4 0x85EBCA77C2B2AE63ull
#define PRIME5 0x27D4EB2F165667C5ull

static inline uint64_t
rotate (uint64_t value, int bits)
{
	return value << bits | value >> (64 - bits);
}

static inline uint64_t
load64 (const uint8_t *at)
{
	uint64_t value;

	memcpy (&value, at, sizeof (value));
	return value;
}

static inline uint64_t
mix (uint64_t lane, uint64_t input)
{
	return rotate (lane + input * PRIME2, 31) * PRIME1;
}

static inline uint64_t
merge (uint64_t sum, uint64_t lane)
{
	return (sum ^ mix (0, lane)) * PRIME1 + PRIME4;
}

static uint64_t
finish (uint64_t sum, const uint8_t *at, size_t left)
{
	for (; left >= 8; at += 8, left -= 8)
		sum = rotate (sum ^ mix (0, load64 (at)), 27) * PRIME1 + PRIME4;
	if (left >= 4) {
		uint32_t word;
		memcpy (&word, at, sizeof (word));
		sum = rotate (sum ^ word * PRIME1, 23) * PRIME2 + PRIME3;
		at += 4;
		left -= 4;
	}
	for (; left; at++, left--)
		sum = rotate (sum ^ *at * PRIME5, 11) * PRIME1;
	sum = (sum ^ sum >> 33) * PRIME2;
	sum = (sum ^ sum >> 29) * PRIME3;
	return sum ^ sum >> 32;
}

uint64_t
ph_xxh64 (const void *data, size_t size)
{
	const uint8_t *at = data;
	uint64_t sum = PRIME5, lanes[4] = { PRIME1 + PRIME2, PRIME2, 0, 0 - PRIME1 };
	size_t left = size;

	if (left >= 32) {
		for (; left >= 32; left -= 32)
			for (int i = 0; i < 4; i++, at += 8)
				lanes[i] = mix (lanes[i], load64 (at));
		sum = rotate (lanes[0], 1) + rotate (lanes[1], 7) + rotate (lanes[2], 12) + rotate (lanes[3], 18);
		for (int i = 0; i < 4; i++)
			sum = merge (sum, lanes[i]);
	}
	return finish (sum + size, at, left);
}
