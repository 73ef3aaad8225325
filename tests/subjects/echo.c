/* echo: a TCP echo server that is moved, and a client that checks every byte and times every answer.

   usage: echo server ADDRESS PORT STATUS
          echo client ADDRESS PORT STATUS CONNECTIONS BYTES

   The client keeps one request of BYTES bytes outstanding on each connection; the bytes are a function of connection
   and place in the stream, so a lost, doubled or swapped byte is seen. Each request is timed (CLOCK_MONOTONIC); a
   connection that ends or fails is an error, never made again. The server sends back what comes and counts it.

   Every 50 ms STATUS holds one line of NAME=VALUE: state (running, pass, fail), connections, bytes, requests,
   gap_us (the client's longest wait for an answer since SIGUSR1), slow (answers that took more than 150 ms), error.
   SIGTERM ends it: the client waits for the outstanding answers first, and its verdict and exit status tell.  */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum
{
	BUFFER = 65536,
	STATUS_BYTES = 512,
	EVENTS = 64,
	REPORT_MS = 50,
	SLOW_US = 150000,
	MAX_FDS = 4096,
};

struct connection
{
	int fd;
	unsigned number;
	uint64_t sent, received; /* Places in the stream. */
	uint64_t target;	 /* Where the outstanding request ends. */
	uint64_t asked_ns;
	size_t held, gone; /* The server's bytes that wait to be sent. */
	unsigned char *buffer;
	bool sending;
};

static struct connection *connections[MAX_FDS]; /* By descriptor. */
static unsigned alive;
static uint64_t bytes, requests, slow, longest_us;
static char reason[256] = "none";
static bool failed;
static int poller, status_fd, listener = -1;
static size_t request_bytes;
static volatile sig_atomic_t stop, clear_gap;

static void
on_signal (int number)
{
	if (number == SIGTERM)
		stop = 1;
	else
		clear_gap = 1;
}

static uint64_t
now_ns (void)
{
	struct timespec now;

	clock_gettime (CLOCK_MONOTONIC, &now);
	return (uint64_t) now.tv_sec * 1000000000u + (uint64_t) now.tv_nsec;
}

static void __attribute__ ((format (printf, 1, 2))) fail (const char *format, ...)
{
	va_list arguments;

	if (failed)
		return;
	failed = true;
	va_start (arguments, format);
	vsnprintf (reason, sizeof reason, format, arguments);
	va_end (arguments);
}

static void __attribute__ ((noreturn)) die (const char *what)
{
	perror (what);
	exit (2);
}

static unsigned char
stream_byte (unsigned connection, uint64_t place)
{
	uint64_t value = (place + 1) * 0x9e3779b97f4a7c15ULL + connection * 0xc2b2ae3d27d4eb4fULL;

	return (unsigned char) (value >> 56);
}

static void
watch (struct connection *self, bool sending)
{
	struct epoll_event event = { .events = EPOLLIN | (sending ? EPOLLOUT : 0), .data.fd = self->fd };

	if (self->sending != sending && epoll_ctl (poller, EPOLL_CTL_MOD, self->fd, &event) < 0)
		die ("epoll_ctl");
	self->sending = sending;
}

static struct connection *
add (int fd, unsigned number)
{
	struct epoll_event event = { .events = EPOLLIN, .data.fd = fd };
	struct connection *self = calloc (1, sizeof *self);
	int one = 1;

	if (!self || fd >= MAX_FDS || !(self->buffer = malloc (BUFFER)))
		die ("echo: a connection");
	self->fd = fd;
	self->number = number;
	setsockopt (fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
	if (fcntl (fd, F_SETFL, O_NONBLOCK) < 0 || epoll_ctl (poller, EPOLL_CTL_ADD, fd, &event) < 0)
		die ("echo: a connection");
	connections[fd] = self;
	alive++;
	return self;
}

static void
drop (struct connection *self)
{
	close (self->fd);
	connections[self->fd] = NULL;
	free (self->buffer);
	free (self);
	alive--;
}

/* The server sends back what it holds, then reads more.  */
static void
serve (struct connection *self)
{
	while (true)
		{
			ssize_t count;

			while (self->gone < self->held)
				{
					count = send (self->fd, self->buffer + self->gone, self->held - self->gone, MSG_NOSIGNAL);
					if (count < 0)
						{
							watch (self, true);
							return;
						}
					self->gone += (size_t) count;
					bytes += (uint64_t) count;
				}
			watch (self, false);
			self->held = self->gone = 0;
			count = recv (self->fd, self->buffer, BUFFER, 0);
			if (count < 0 && errno == EAGAIN)
				return;
			if (count < 0)
				fail ("descriptor %d: %s", self->fd, strerror (errno));
			if (count <= 0)
				{
					drop (self);
					return;
				}
			self->held = (size_t) count;
		}
}

/* The client sends the rest of its request.  */
static void
ask (struct connection *self)
{
	while (self->sent < self->target)
		{
			size_t length = (size_t) (self->target - self->sent);
			ssize_t count;

			length = length < BUFFER ? length : BUFFER;
			for (size_t i = 0; i < length; i++)
				self->buffer[i] = stream_byte (self->number, self->sent + i);
			count = send (self->fd, self->buffer, length, MSG_NOSIGNAL);
			if (count < 0 && errno == EAGAIN)
				break;
			if (count < 0)
				{
					fail ("connection %u: send: %s", self->number, strerror (errno));
					drop (self);
					return;
				}
			self->sent += (uint64_t) count;
		}
	watch (self, self->sent < self->target);
}

static void
ask_next (struct connection *self)
{
	self->asked_ns = now_ns ();
	self->target += request_bytes;
	ask (self);
}

static void
note_answer (struct connection *self)
{
	uint64_t us = (now_ns () - self->asked_ns) / 1000;

	requests++;
	slow += us > SLOW_US;
	if (us > longest_us)
		longest_us = us;
	if (!stop)
		ask_next (self);
}

static void
receive (struct connection *self)
{
	static unsigned char data[BUFFER];
	ssize_t count = recv (self->fd, data, sizeof data, 0);

	if (count < 0 && errno == EAGAIN)
		return;
	if (count <= 0)
		{
			fail ("connection %u: %s", self->number, count ? strerror (errno) : "the server closed it");
			drop (self);
			return;
		}
	for (ssize_t i = 0; i < count; i++)
		if (data[i] != stream_byte (self->number, self->received + (uint64_t) i))
			fail ("connection %u: byte %llu is wrong", self->number,
			      (unsigned long long) self->received + (unsigned long long) i);
	self->received += (uint64_t) count;
	bytes += (uint64_t) count;
	if (self->received > self->sent)
		fail ("connection %u: more came back than was sent", self->number);
	if (self->received == self->target)
		note_answer (self);
}

static unsigned
outstanding (void)
{
	unsigned count = 0;

	for (int fd = 0; fd < MAX_FDS; fd++)
		count += connections[fd] && connections[fd]->received < connections[fd]->target;
	return count;
}

static void
report (const char *state)
{
	char line[STATUS_BYTES + 1];
	int length = snprintf (line, sizeof line,
			       "state=%s connections=%u bytes=%llu requests=%llu gap_us=%llu slow=%llu error=%s", state, alive,
			       (unsigned long long) bytes, (unsigned long long) requests, (unsigned long long) longest_us,
			       (unsigned long long) slow, reason);

	memset (line + length, ' ', (size_t) (STATUS_BYTES - length));
	line[STATUS_BYTES - 1] = '\n';
	if (pwrite (status_fd, line, STATUS_BYTES, 0) != STATUS_BYTES)
		fail ("status file: %s", strerror (errno));
}

static int
open_socket (const char *address, const char *port, bool serving)
{
	struct addrinfo hints = { .ai_socktype = SOCK_STREAM, .ai_flags = AI_NUMERICHOST | AI_NUMERICSERV }, *found;
	int fd, one = 1;

	if (getaddrinfo (address, port, &hints, &found))
		die ("echo: the address");
	fd = socket (found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
	setsockopt (fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
	if (serving ? bind (fd, found->ai_addr, found->ai_addrlen) || listen (fd, 1024)
		    : connect (fd, found->ai_addr, found->ai_addrlen))
		die (serving ? "echo: bind" : "echo: connect");
	freeaddrinfo (found);
	return fd;
}

static void
accept_all (void)
{
	int fd;

	while ((fd = accept4 (listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK)) >= 0)
		add (fd, 0);
	if (errno != EAGAIN && errno != ECONNABORTED)
		fail ("accept: %s", strerror (errno));
}

static void
handle (const struct epoll_event *event)
{
	int fd = event->data.fd;

	if (fd == listener)
		accept_all ();
	else if (listener >= 0)
		serve (connections[fd]);
	else if (event->events & EPOLLOUT)
		ask (connections[fd]);
	else
		receive (connections[fd]);
}

static void
loop (void)
{
	uint64_t reported = 0;

	while (!stop || (listener < 0 && outstanding ()))
		{
			struct epoll_event events[EVENTS];
			int count = epoll_wait (poller, events, EVENTS, REPORT_MS);

			if (count < 0 && errno != EINTR)
				fail ("epoll_wait: %s", strerror (errno));
			for (int i = 0; i < count; i++)
				handle (&events[i]);
			if (clear_gap)
				clear_gap = 0, longest_us = 0;
			if (now_ns () - reported >= REPORT_MS * 1000000u)
				{
					report (failed ? "fail" : "running");
					reported = now_ns ();
				}
		}
}

int
main (int argc, char **argv)
{
	struct sigaction action = { .sa_handler = on_signal };
	bool serving = argc == 5 && !strcmp (argv[1], "server");

	if (!serving && !(argc == 7 && !strcmp (argv[1], "client")))
		{
			fprintf (stderr, "usage: echo server ADDRESS PORT STATUS\n"
					 "       echo client ADDRESS PORT STATUS CONNECTIONS BYTES\n");
			return 2;
		}
	sigaction (SIGTERM, &action, NULL);
	sigaction (SIGUSR1, &action, NULL);
	poller = epoll_create1 (EPOLL_CLOEXEC);
	status_fd = open (argv[4], O_RDWR | O_CREAT | O_CLOEXEC, 0644);
	if (poller < 0 || status_fd < 0)
		die ("echo: the status file");
	if (serving)
		{
			struct epoll_event event = { .events = EPOLLIN };

			event.data.fd = listener = open_socket (argv[2], argv[3], true);
			if (fcntl (listener, F_SETFL, O_NONBLOCK) < 0 || epoll_ctl (poller, EPOLL_CTL_ADD, listener, &event) < 0)
				die ("echo: the listener");
		}
	else
		{
			request_bytes = strtoul (argv[6], NULL, 10);
			for (unsigned i = 0; i < strtoul (argv[5], NULL, 10); i++)
				ask_next (add (open_socket (argv[2], argv[3], false), i));
		}
	loop ();
	report (failed ? "fail" : "pass");
	return failed;
}
