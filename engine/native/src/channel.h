/* What page source and sink use of a channel: bytes instead of messages. */
#ifndef PH_CHANNEL_H
#define PH_CHANNEL_H

#include <openssl/ssl.h>
#include <stdint.h>

#include "ph_stream.h"

struct ph_tls {
	SSL_CTX *context;
	int server;
	uint8_t pin[PH_PIN_SIZE];
};

/* All of it, before the deadline (ph_deadline), or -1. */
int ph_channel_write (struct ph_channel *channel, const void *data, size_t size, int64_t deadline, struct ph_error *err);
int ph_channel_read (struct ph_channel *channel, void *data, size_t size, int64_t deadline, struct ph_error *err);

/* Fill *err from OpenSSL's error queue, which it empties. */
int ph_tls_fail (struct ph_error *err, const char *what);

#endif
