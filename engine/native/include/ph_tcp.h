/* One TCP connection read from, and written into, a socket in repair mode.
 *
 * A connection costs a dozen system calls each way, and a server has thousands
 * of them; inside the freeze they are made from here.  What is in its queues
 * is moved by the caller.  Sources: tcp(7), net/ipv4/tcp.c (TCP_REPAIR*),
 * linux/include/uapi/linux/tcp.h.
 */
#ifndef PH_TCP_H
#define PH_TCP_H

#include "ph_error.h"

#include <stdint.h>

/* cffi: begin */
/* What tells whether a connection is still the one that was described: its
   state (TCP_INFO), poll (2) events of what must be noticed, and both ends as
   the kernel writes them, with zeros behind. */
struct ph_tcp_look {
	uint8_t state;
	uint8_t events;         /* POLLPRI, POLLERR */
	uint8_t local[28];
	uint8_t remote[28];
};

/* Numbers as in struct tcp_info, TCP_QUEUE_SEQ and struct tcp_repair_window.
   `unread`, `unacknowledged` and `unsent` are SIOCINQ, SIOCOUTQ, SIOCOUTQNSD. */
struct ph_tcp_stream {
	uint8_t state;
	uint8_t options;
	uint8_t scales;
	uint8_t reserved;
	uint32_t unread;
	uint32_t unacknowledged;
	uint32_t unsent;
	uint32_t received_to;
	uint32_t written_to;
	uint32_t mss;
	uint32_t timestamp;     /* only where options say so */
	uint32_t window[5];
};

/* Look at a connection; nothing is changed. */
int ph_tcp_look (int fd, struct ph_tcp_look *look, struct ph_error *err);

/* Put a socket into repair mode, leave it there, and read its numbers. A
   delayed acknowledgement goes out. */
int ph_tcp_read (int fd, struct ph_tcp_stream *stream, struct ph_error *err);

/* Make a socket in repair mode a connection whose queues begin at `received_to`
   and `written_to`: bind it to `here` unless `bound`, connect it to `there`,
   both `length` bytes of struct sockaddr, and negotiate `options` with `mss`
   and `scales`. Nothing leaves. */
int ph_tcp_connect (int fd, const struct ph_tcp_stream *stream, const uint8_t *here,
		    const uint8_t *there, uint32_t length, int bound, struct ph_error *err);
/* cffi: end */

#endif
