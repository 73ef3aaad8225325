#include "ph_tcp.h"

#include <errno.h>
#include <linux/sockios.h>
#include <netinet/in.h>
#include <poll.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <linux/tcp.h>

enum {
	ACKNOWLEDGE_ONCE = 2,   /* TCP_QUICKACK with an even value leaves the mode as it is */
	OPTION_MSS = 2,         /* TCPOPT_ numbers, as TCP_REPAIR_OPTIONS takes them */
	OPTION_WINDOW = 3,
	OPTION_SACK_PERMITTED = 4,
	OPTION_TIMESTAMP = 8,
	MOST_OPTIONS = 4,
	STATE_CLOSE = 7         /* TCP_CLOSE (linux/include/net/tcp_states.h) */
};

/* The first bytes of struct tcp_info, whose scales are a bit field. */
struct info {
	uint8_t state, congestion, retransmits, probes, backoff, options, scales, limits;
};

static int
set_number (int fd, int name, uint32_t value, struct ph_error *err)
{
	if (setsockopt (fd, IPPROTO_TCP, name, &value, sizeof (value)) < 0)
		return ph_fail (err, errno, "set TCP option %d to %u", name, value);
	return 0;
}

static int
get (int fd, int name, void *value, socklen_t length, struct ph_error *err)
{
	socklen_t got = length;

	if (getsockopt (fd, IPPROTO_TCP, name, value, &got) < 0)
		return ph_fail (err, errno, "read TCP option %d", name);
	if (got != length)
		return ph_fail (err, EPROTO, "read TCP option %d: %u bytes in place of %u", name, got, length);
	return 0;
}

static int
count (int fd, unsigned long request, uint32_t *value, struct ph_error *err)
{
	if (ioctl (fd, request, value) < 0)
		return ph_fail (err, errno, "ask for queue length %#lx", request);
	return 0;
}

int
ph_tcp_look (int fd, struct ph_tcp_look *look, struct ph_error *err)
{
	struct info info;
	struct pollfd ready = { .fd = fd, .events = POLLPRI };
	socklen_t local = sizeof (look->local), remote = sizeof (look->remote);

	memset (look, 0, sizeof (*look));
	if (get (fd, TCP_INFO, &info, sizeof (info), err) < 0)
		return -1;
	if (poll (&ready, 1, 0) < 0)
		return ph_fail (err, errno, "poll a connection");
	if (getsockname (fd, (struct sockaddr *) look->local, &local) < 0)
		return ph_fail (err, errno, "getsockname");
	if (getpeername (fd, (struct sockaddr *) look->remote, &remote) < 0 && errno != ENOTCONN)
		return ph_fail (err, errno, "getpeername");
	look->state = info.state;
	look->events = (uint8_t) (ready.revents & (POLLPRI | POLLERR));
	return 0;
}

static int
read_queue (int fd, uint32_t queue, uint32_t *sequence, struct ph_error *err)
{
	if (set_number (fd, TCP_REPAIR_QUEUE, queue, err) < 0)
		return -1;
	return get (fd, TCP_QUEUE_SEQ, sequence, sizeof (*sequence), err);
}

int
ph_tcp_read (int fd, struct ph_tcp_stream *stream, struct ph_error *err)
{
	struct info info;

	memset (stream, 0, sizeof (*stream));
	if (set_number (fd, TCP_REPAIR, TCP_REPAIR_ON, err) < 0
	    || set_number (fd, TCP_QUICKACK, ACKNOWLEDGE_ONCE, err) < 0
	    || get (fd, TCP_INFO, &info, sizeof (info), err) < 0)
		return -1;
	stream->state = info.state;
	stream->options = info.options;
	stream->scales = info.scales;
	if (info.state == STATE_CLOSE)
		return 0;
	if (count (fd, SIOCINQ, &stream->unread, err) < 0
	    || count (fd, SIOCOUTQ, &stream->unacknowledged, err) < 0
	    || count (fd, SIOCOUTQNSD, &stream->unsent, err) < 0
	    || read_queue (fd, TCP_RECV_QUEUE, &stream->received_to, err) < 0
	    || read_queue (fd, TCP_SEND_QUEUE, &stream->written_to, err) < 0
	    || set_number (fd, TCP_REPAIR_QUEUE, TCP_NO_QUEUE, err) < 0
	    || get (fd, TCP_MAXSEG, &stream->mss, sizeof (stream->mss), err) < 0
	    || get (fd, TCP_REPAIR_WINDOW, stream->window, sizeof (stream->window), err) < 0)
		return -1;
	if (!(info.options & TCPI_OPT_TIMESTAMPS))
		return 0;
	return get (fd, TCP_TIMESTAMP, &stream->timestamp, sizeof (stream->timestamp), err);
}

static int
begin_queue (int fd, uint32_t queue, uint32_t sequence, struct ph_error *err)
{
	if (set_number (fd, TCP_REPAIR_QUEUE, queue, err) < 0)
		return -1;
	return set_number (fd, TCP_QUEUE_SEQ, sequence, err);
}

static int
negotiate (int fd, const struct ph_tcp_stream *stream, struct ph_error *err)
{
	struct tcp_repair_opt options[MOST_OPTIONS];
	uint32_t used = 0;

	options[used++] = (struct tcp_repair_opt) { OPTION_MSS, stream->mss };
	if (stream->options & TCPI_OPT_SACK)
		options[used++] = (struct tcp_repair_opt) { OPTION_SACK_PERMITTED, 0 };
	if (stream->options & TCPI_OPT_WSCALE)
		options[used++] = (struct tcp_repair_opt) {
			OPTION_WINDOW, (stream->scales & 15u) | (uint32_t) (stream->scales >> 4) << 16
		};
	if (stream->options & TCPI_OPT_TIMESTAMPS)
		options[used++] = (struct tcp_repair_opt) { OPTION_TIMESTAMP, 0 };
	if (setsockopt (fd, IPPROTO_TCP, TCP_REPAIR_OPTIONS, options, used * sizeof (options[0])) < 0)
		return ph_fail (err, errno, "set the options of the handshake");
	if (!(stream->options & TCPI_OPT_TIMESTAMPS) || stream->timestamp == 0)
		return 0;
	return set_number (fd, TCP_TIMESTAMP, stream->timestamp, err);
}

int
ph_tcp_connect (int fd, const struct ph_tcp_stream *stream, const uint8_t *here,
		const uint8_t *there, uint32_t length, int bound, struct ph_error *err)
{
	if (!bound && bind (fd, (const struct sockaddr *) here, length) < 0)
		return ph_fail (err, errno, "bind");
	if (begin_queue (fd, TCP_RECV_QUEUE, stream->received_to, err) < 0
	    || begin_queue (fd, TCP_SEND_QUEUE, stream->written_to, err) < 0)
		return -1;
	if (connect (fd, (const struct sockaddr *) there, length) < 0)
		return ph_fail (err, errno, "connect");
	if (negotiate (fd, stream, err) < 0)
		return -1;
	return set_number (fd, TCP_REPAIR_QUEUE, TCP_NO_QUEUE, err);
}
