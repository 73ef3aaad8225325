/* Authenticated streams: TLS 1.3 with pinned peers, and small messages over it.
 *
 * A channel is one TLS connection over any stream descriptor (a TCP socket, or
 * one end of a tunnel). Both ends prove themselves with certificates that were
 * made for one migration and whose SHA-256 fingerprints were exchanged before
 * over SSH (or that one authority signed: page servers). Nothing is read from a
 * peer before its handshake is over but the handshake itself, and the first
 * thing after it is a hello of fixed size.
 *
 * A channel may be used by one sender and one receiver at a time, which may be
 * two threads. Its descriptor is non-blocking; every call takes a deadline in
 * milliseconds (-1: none, 0: what can be done at once).
 *
 * Error codes beside those of the system calls: EACCES the peer is not who it
 * should be, EPROTO it said something that no peer says, ETIMEDOUT the deadline
 * passed, ENOTCONN it closed the connection, EMSGSIZE a message beyond the limit.
 */
#ifndef PH_STREAM_H
#define PH_STREAM_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "ph_error.h"

/* cffi: begin */
#define PH_MESSAGE_MAX 67108864 /* bytes in one message of a control channel */
#define PH_PIN_SIZE 32          /* SHA-256 of a certificate in DER */
#define PH_ID_SIZE 32           /* bytes that name a migration */
#define PH_STREAMS_MAX 64       /* page streams of one migration */

#define PH_ROLE_CONTROL 1       /* messages */
#define PH_ROLE_PAGES 2         /* page frames, from connector to listener */

struct ph_tls;
struct ph_channel;

/* What a connector says first. */
struct ph_hello {
	uint8_t role;           /* PH_ROLE_* */
	uint8_t stream;         /* its number among the page streams, from 0 */
	uint8_t streams;        /* how many page streams there are */
	uint8_t reserved;       /* 0 */
	uint8_t id[32];         /* PH_ID_SIZE bytes: the migration */
};

/* A context for many channels. `server` is 1 at the end that accepts. Certificate
   and key are PEM texts. The peer is accepted if the fingerprint of its certificate is `pin`
   (PH_PIN_SIZE bytes). NULL on failure. Free it when no channel will be made
   any more; channels that exist keep what they need. */
struct ph_tls *ph_tls_new (int server, const char *certificate, const char *key, const uint8_t *pin, struct ph_error *err);
void ph_tls_free (struct ph_tls *tls);

/* Connect or accept over `fd`, which the channel owns from then on, also when this
   fails. `ph_channel_connect` returns when the listener has admitted us (EACCES: it
   refused). `ph_channel_accept` returns when the hello is in; the connector waits
   until `ph_channel_admit` answers. */
struct ph_channel *ph_channel_connect (struct ph_tls *tls, int fd, const struct ph_hello *hello, int timeout_ms,
				       struct ph_error *err);
struct ph_channel *ph_channel_accept (struct ph_tls *tls, int fd, struct ph_hello *hello, int timeout_ms,
				      struct ph_error *err);
int ph_channel_admit (struct ph_channel *channel, int admitted, int timeout_ms, struct ph_error *err);

/* Close and free. `ph_channel_shutdown` ends both directions, from any thread: calls
   that wait return ENOTCONN. */
void ph_channel_free (struct ph_channel *channel);
void ph_channel_shutdown (struct ph_channel *channel);
int ph_channel_fd (const struct ph_channel *channel);

/* Send one message, whole. A deadline that passes in the middle ends the channel. */
int ph_channel_send (struct ph_channel *channel, const void *data, size_t size, int timeout_ms, struct ph_error *err);

/* Receive one message: *data points to it until the next call, the result is its
   size. With timeout 0 this is what follows readiness of the descriptor: call until
   ETIMEDOUT, for TLS may hold more than the descriptor shows. */
ssize_t ph_channel_recv (struct ph_channel *channel, const void **data, int timeout_ms, struct ph_error *err);
/* cffi: end */

#endif
