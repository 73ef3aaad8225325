/* One TLS connection: handshake, hello, bytes, messages. */
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "channel.h"
#include "cleanup.h"
#include "deadline.h"

_Static_assert (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "numbers on the wire are little endian, as in memory");

#define MAGIC "PHAUL\0\0\1"     /* the last byte is the version */
#define MAGIC_SIZE 8
#define SMALL 65536     /* messages up to this are copied behind their length, so that both are one record */
#define GROWTH 1048576  /* a message's buffer grows with what has come, not with what was announced */

struct ph_channel {
	SSL *ssl;
	int fd;
	atomic_int ended;       /* shut down from this side, or broken in the middle of something */
	pthread_mutex_t lock;   /* around every call on `ssl` */
	/* the message that is coming in */
	uint32_t announced;
	size_t have;            /* bytes of it, its 4 bytes of length included */
	uint8_t length[4];
	uint8_t *body;
	size_t room;
};

struct greeting {
	uint8_t magic[MAGIC_SIZE];
	struct ph_hello hello;
};

struct welcome {
	uint8_t magic[MAGIC_SIZE];
	uint8_t admitted;
	uint8_t reserved[7];
};

static void
cleanup_channel (struct ph_channel **channel)
{
	ph_channel_free (*channel);
}

static int
wait_for (struct ph_channel *channel, short events, int64_t deadline, const char *what, struct ph_error *err)
{
	struct pollfd ready = { .fd = channel->fd, .events = events };

	for (;;) {
		int left = ph_left_ms (deadline);
		int found = poll (&ready, 1, left);
		if (atomic_load (&channel->ended))
			return ph_fail (err, ENOTCONN, "%s: the channel was closed", what);
		if (found > 0)
			return 0;
		if (found < 0 && errno != EINTR)
			return ph_fail (err, errno, "%s: wait for the socket", what);
		if (found == 0 && ph_left_ms (deadline) == 0)
			return ph_fail (err, ETIMEDOUT, "%s", what);
	}
}

/* What a TLS call that did not succeed asks for: 0 call again (it has waited), -1 failed, -2 failed and OpenSSL
   knows why. `cause` is the call's errno. */
static int
settle (struct ph_channel *channel, int code, int cause, int64_t deadline, const char *what,
	struct ph_error *err)
{
	switch (code) {
	case SSL_ERROR_WANT_READ:
		return wait_for (channel, POLLIN, deadline, what, err);
	case SSL_ERROR_WANT_WRITE:
		return wait_for (channel, POLLOUT, deadline, what, err);
	case SSL_ERROR_ZERO_RETURN:
		return ph_fail (err, ENOTCONN, "%s: the peer closed the connection", what);
	case SSL_ERROR_SYSCALL:
		if (cause == 0 || cause == EPIPE || cause == ECONNRESET || atomic_load (&channel->ended))
			return ph_fail (err, ENOTCONN, "%s: the connection was cut", what);
		return ph_fail (err, cause, "%s", what);
	default:
		return -2;
	}
}

enum step { STEP_HANDSHAKE, STEP_READ, STEP_WRITE };

/* One TLS call with its lock, and the wait after it. The count of bytes, 0 to call again, -1 failed. */
static ssize_t
step (struct ph_channel *channel, enum step which, void *data, size_t size, int64_t deadline, const char *what,
      struct ph_error *err)
{
	size_t moved = 0;
	int result, code = SSL_ERROR_NONE, cause = 0;

	if (atomic_load (&channel->ended))
		return ph_fail (err, ENOTCONN, "%s: the channel was closed", what);
	pthread_mutex_lock (&channel->lock);
	ERR_clear_error ();
	errno = 0;
	if (which == STEP_HANDSHAKE)
		result = SSL_do_handshake (channel->ssl);
	else if (which == STEP_READ)
		result = SSL_read_ex (channel->ssl, data, size, &moved);
	else
		result = SSL_write_ex (channel->ssl, data, size, &moved);
	cause = errno;
	if (result <= 0)
		code = SSL_get_error (channel->ssl, result);
	pthread_mutex_unlock (&channel->lock);
	if (result > 0)
		return which == STEP_HANDSHAKE ? 1 : (ssize_t) moved;
	int settled = settle (channel, code, cause, deadline, what, err);
	return settled == -2 ? ph_tls_fail (err, what) : settled;
}

int
ph_channel_write (struct ph_channel *channel, const void *data, size_t size, int64_t deadline, struct ph_error *err)
{
	const uint8_t *next = data;

	while (size) {
		ssize_t moved = step (channel, STEP_WRITE, (void *) next, size, deadline, "send", err);
		if (moved < 0)
			return -1;
		next += moved;
		size -= moved;
	}
	return 0;
}

int
ph_channel_read (struct ph_channel *channel, void *data, size_t size, int64_t deadline, struct ph_error *err)
{
	uint8_t *next = data;

	while (size) {
		ssize_t moved = step (channel, STEP_READ, next, size, deadline, "receive", err);
		if (moved < 0)
			return -1;
		next += moved;
		size -= moved;
	}
	return 0;
}

/* ---- Making one ----------------------------------------------------------- */

static int
attach_ssl (struct ph_channel *channel, struct ph_tls *tls, struct ph_error *err)
{
	int on = 1, flags = fcntl (channel->fd, F_GETFL);

	if (flags < 0 || fcntl (channel->fd, F_SETFL, flags | O_NONBLOCK) < 0)
		return ph_fail (err, errno, "make the socket non-blocking");
	setsockopt (channel->fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof (on));   /* not every stream is TCP */
	channel->ssl = SSL_new (tls->context);
	if (!channel->ssl || !SSL_set_fd (channel->ssl, channel->fd))
		return ph_tls_fail (err, "make a TLS connection");
	if (tls->server) {
		SSL_set_accept_state (channel->ssl);
		return 0;
	}
	SSL_set_connect_state (channel->ssl);
	return 0;
}

static struct ph_channel *
open_channel (struct ph_tls *tls, int fd, int64_t deadline, struct ph_error *err)
{
	struct ph_channel *channel = calloc (1, sizeof (*channel));
	ssize_t done = 0;

	if (!channel) {
		close (fd);
		ph_fail (err, ENOMEM, "make a channel");
		return NULL;
	}
	channel->fd = fd;
	pthread_mutex_init (&channel->lock, NULL);
	if (attach_ssl (channel, tls, err) < 0)
		done = -1;
	while (done == 0)
		done = step (channel, STEP_HANDSHAKE, NULL, 0, deadline, "TLS handshake", err);
	if (done < 0) {
		ph_channel_free (channel);
		return NULL;
	}
	return channel;
}

struct ph_channel *
ph_channel_connect (struct ph_tls *tls, int fd, const struct ph_hello *hello, int timeout_ms, struct ph_error *err)
{
	int64_t deadline = ph_deadline (timeout_ms);
	__attribute__ ((cleanup (cleanup_channel))) struct ph_channel *channel = open_channel (tls, fd, deadline, err);
	struct greeting greeting = { .magic = MAGIC, .hello = *hello };
	struct welcome welcome;

	if (!channel || ph_channel_write (channel, &greeting, sizeof (greeting), deadline, err) < 0
	    || ph_channel_read (channel, &welcome, sizeof (welcome), deadline, err) < 0)
		return NULL;
	if (memcmp (welcome.magic, MAGIC, MAGIC_SIZE) != 0) {
		ph_fail (err, EPROTO, "the listener does not speak this protocol or version");
		return NULL;
	}
	if (!welcome.admitted) {
		ph_fail (err, EACCES, "the listener refused this connection");
		return NULL;
	}
	struct ph_channel *made = channel;
	channel = NULL;
	return made;
}

static int
check_hello (const struct greeting *greeting, struct ph_error *err)
{
	const struct ph_hello *hello = &greeting->hello;

	if (memcmp (greeting->magic, MAGIC, MAGIC_SIZE) != 0)
		return ph_fail (err, EPROTO, "the connector does not speak this protocol or version");
	if (hello->role != PH_ROLE_CONTROL && hello->role != PH_ROLE_PAGES)
		return ph_fail (err, EPROTO, "hello with role %u", hello->role);
	if (hello->role == PH_ROLE_PAGES && (hello->streams > PH_STREAMS_MAX || hello->stream >= hello->streams))
		return ph_fail (err, EPROTO, "hello of stream %u of %u", hello->stream, hello->streams);
	return 0;
}

struct ph_channel *
ph_channel_accept (struct ph_tls *tls, int fd, struct ph_hello *hello, int timeout_ms, struct ph_error *err)
{
	int64_t deadline = ph_deadline (timeout_ms);
	struct ph_channel *channel = open_channel (tls, fd, deadline, err);
	struct greeting greeting;

	if (!channel)
		return NULL;
	if (ph_channel_read (channel, &greeting, sizeof (greeting), deadline, err) < 0 || check_hello (&greeting, err) < 0) {
		ph_channel_free (channel);
		return NULL;
	}
	*hello = greeting.hello;
	return channel;
}

int
ph_channel_admit (struct ph_channel *channel, int admitted, int timeout_ms, struct ph_error *err)
{
	struct welcome welcome = { .magic = MAGIC, .admitted = admitted != 0 };

	return ph_channel_write (channel, &welcome, sizeof (welcome), ph_deadline (timeout_ms), err);
}

void
ph_channel_free (struct ph_channel *channel)
{
	if (!channel)
		return;
	if (channel->ssl && SSL_is_init_finished (channel->ssl) && !atomic_load (&channel->ended))
		SSL_shutdown (channel->ssl);    /* say goodbye if that is possible at once */
	ERR_clear_error ();
	SSL_free (channel->ssl);
	close (channel->fd);
	pthread_mutex_destroy (&channel->lock);
	free (channel->body);
	free (channel);
}

void
ph_channel_shutdown (struct ph_channel *channel)
{
	atomic_store (&channel->ended, 1);
	shutdown (channel->fd, SHUT_RDWR);
}

int
ph_channel_fd (const struct ph_channel *channel)
{
	return channel->fd;
}

/* ---- Messages ------------------------------------------------------------- */

int
ph_channel_send (struct ph_channel *channel, const void *data, size_t size, int timeout_ms, struct ph_error *err)
{
	int64_t deadline = ph_deadline (timeout_ms);
	uint32_t length = size;
	int failed;

	if (size > PH_MESSAGE_MAX)
		return ph_fail (err, EMSGSIZE, "send a message of %zu bytes", size);
	if (size <= SMALL) {
		cleanup_free uint8_t *record = malloc (sizeof (length) + size);
		if (!record)
			return ph_fail (err, ENOMEM, "send a message of %zu bytes", size);
		memcpy (record, &length, sizeof (length));
		memcpy (record + sizeof (length), data, size);
		failed = ph_channel_write (channel, record, sizeof (length) + size, deadline, err);
	} else {
		failed = ph_channel_write (channel, &length, sizeof (length), deadline, err);
		if (!failed)
			failed = ph_channel_write (channel, data, size, deadline, err);
	}
	if (failed)
		ph_channel_shutdown (channel);  /* half a message may be out */
	return failed;
}

/* Room for more of the announced message. */
static int
make_room (struct ph_channel *channel, struct ph_error *err)
{
	size_t body = channel->have - sizeof (channel->length);
	size_t wanted = body + GROWTH < channel->announced ? body + GROWTH : channel->announced;

	if (wanted <= channel->room)
		return 0;
	uint8_t *bigger = realloc (channel->body, wanted);
	if (!bigger)
		return ph_fail (err, ENOMEM, "receive a message of %u bytes", channel->announced);
	channel->body = bigger;
	channel->room = wanted;
	return 0;
}

static int
receive_some (struct ph_channel *channel, int64_t deadline, struct ph_error *err)
{
	size_t head = sizeof (channel->length), want;
	uint8_t *to;

	if (channel->have < head) {
		to = channel->length + channel->have;
		want = head - channel->have;
	} else {
		size_t body = channel->have - head;
		if (make_room (channel, err) < 0)
			return -1;
		to = channel->body + body;
		want = (channel->announced < channel->room ? channel->announced : channel->room) - body;
	}
	size_t had = channel->have;
	ssize_t moved = step (channel, STEP_READ, to, want, deadline, "receive a message", err);
	if (moved <= 0)
		return moved;
	channel->have += moved;
	if (had < head && channel->have == head) {
		memcpy (&channel->announced, channel->length, head);
		if (channel->announced > PH_MESSAGE_MAX)
			return ph_fail (err, EMSGSIZE, "receive a message of %u bytes", channel->announced);
	}
	return 0;
}

ssize_t
ph_channel_recv (struct ph_channel *channel, const void **data, int timeout_ms, struct ph_error *err)
{
	int64_t deadline = ph_deadline (timeout_ms);
	size_t head = sizeof (channel->length);

	while (channel->have < head || channel->have < head + channel->announced) {
		if (receive_some (channel, deadline, err) < 0) {
			if (err->code == EMSGSIZE)
				ph_channel_shutdown (channel);
			return -1;
		}
	}
	channel->have = 0;
	*data = channel->body;
	return channel->announced;
}
