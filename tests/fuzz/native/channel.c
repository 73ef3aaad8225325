/* A connection's hello and messages, with a TLS that gives whatever the input says, in pieces of any size.
 *
 * The input: for each read a byte that says how many bytes it gives (0: it would block, once), then those.
 */
#include <errno.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "channel.h"

static struct {
	const uint8_t *next;
	size_t left;
	int code;       /* of the last call, for SSL_get_error */
	uint8_t given[1 << 20];
	size_t total;
} input;

static void
require (int condition, const char *what)
{
	if (condition)
		return;
	fprintf (stderr, "%s\n", what);
	abort ();
}

/* ---- In place of OpenSSL -------------------------------------------------- */

int
SSL_read_ex (SSL *ssl, void *data, size_t size, size_t *moved)
{
	(void) ssl;
	if (input.left == 0) {
		input.code = SSL_ERROR_ZERO_RETURN;
		return 0;
	}
	size_t wanted = *input.next++;
	input.left--;
	if (wanted == 0) {
		input.code = SSL_ERROR_WANT_READ;
		return 0;
	}
	if (wanted > size)
		wanted = size;
	if (wanted > input.left)
		wanted = input.left;
	if (wanted == 0) {
		input.code = SSL_ERROR_ZERO_RETURN;
		return 0;
	}
	memcpy (data, input.next, wanted);
	if (input.total + wanted <= sizeof (input.given))
		memcpy (input.given + input.total, input.next, wanted);
	input.total += wanted;
	input.next += wanted;
	input.left -= wanted;
	*moved = wanted;
	return 1;
}

int
SSL_write_ex (SSL *ssl, const void *data, size_t size, size_t *moved)
{
	(void) ssl, (void) data;
	*moved = size;
	return 1;
}

static char connection;

SSL *
SSL_new (SSL_CTX *context)
{
	(void) context;
	return (SSL *) &connection;
}

int
SSL_get_error (const SSL *ssl, int result)
{
	(void) ssl, (void) result;
	return input.code;
}

int
SSL_do_handshake (SSL *ssl)
{
	(void) ssl;
	return 1;
}

int
SSL_set_fd (SSL *ssl, int fd)
{
	(void) ssl, (void) fd;
	return 1;
}

int
SSL_is_init_finished (const SSL *ssl)
{
	(void) ssl;
	return 1;
}

int
SSL_shutdown (SSL *ssl)
{
	(void) ssl;
	return 1;
}

long
SSL_ctrl (SSL *ssl, int command, long number, void *data)
{
	(void) ssl, (void) command, (void) number, (void) data;
	return 1;
}

int
SSL_set1_host (SSL *ssl, const char *host)
{
	(void) ssl, (void) host;
	return 1;
}

void
SSL_set_accept_state (SSL *ssl)
{
	(void) ssl;
}

void
SSL_set_connect_state (SSL *ssl)
{
	(void) ssl;
}

void
SSL_free (SSL *ssl)
{
	(void) ssl;
}

void
ERR_clear_error (void)
{
}

int
ph_tls_fail (struct ph_error *err, const char *what)
{
	return ph_fail (err, EPROTO, "%s", what);
}

/* ---- The subject ---------------------------------------------------------- */

int
LLVMFuzzerTestOneInput (const uint8_t *data, size_t size)
{
	struct ph_tls tls = { .server = 1 };
	struct ph_error err = { 0 };
	struct ph_hello hello;
	const void *message;

	input.next = data;
	input.left = size;
	input.total = 0;
	struct ph_channel *channel = ph_channel_accept (&tls, eventfd (1, 0), &hello, 100, &err);
	if (!channel) {
		require (err.code != 0, "no error");
		return 0;
	}
	require (hello.role == PH_ROLE_CONTROL || (hello.stream < hello.streams && hello.streams <= PH_STREAMS_MAX), "a hello");
	size_t at = input.total;
	for (;;) {
		ssize_t length = ph_channel_recv (channel, &message, 100, &err);
		if (length < 0)
			break;
		uint32_t told;
		require (at + sizeof (told) + length <= input.total, "a message that did not come");
		if (at + sizeof (told) + length <= sizeof (input.given)) {
			memcpy (&told, input.given + at, sizeof (told));
			require (told == (size_t) length, "a message of another length");
			require (length == 0 || memcmp (message, input.given + at + sizeof (told), length) == 0, "another message");
		}
		at += sizeof (told) + length;
	}
	require (err.code != 0, "no error at the end");
	ph_channel_free (channel);
	return 0;
}
