/* Preloaded: has one call of one library fail, as the kernel or the C library would have it fail.
 *
 * failing_watch (from, to): count the calls that code between these addresses makes, by the address they return to.
 * failing_arm (site, hit, error): the hit-th call (from 1) that returns to `site` is not made but fails; with `error`,
 * or with the one of this function if that is 0. With -1 it moves half as many bytes as it could. failing_sites: what
 * was counted. failing_done: whether it has failed.
 */
#include <stddef.h>
#include <stdint.h>

#define SITES 4096
#define PUBLIC __attribute__ ((visibility ("default")))

extern int *__errno_location (void);
extern void *dlsym (void *, const char *);
extern void *dlopen (const char *, int);
extern void *__libc_malloc (size_t);
extern void *__libc_calloc (size_t, size_t);
extern void *__libc_realloc (void *, size_t);
extern void *__libc_memalign (size_t, size_t);

struct site {
	uint64_t address;
	uint64_t count;
	const char *name;
};

static struct site sites[SITES];
static uint64_t from, to, armed_site, armed_hit;
static int armed_error, done;
static char busy;

PUBLIC void
failing_watch (uint64_t first, uint64_t end)
{
	from = first;
	to = end;
}

PUBLIC void
failing_arm (uint64_t site, uint64_t hit, int error)
{
	armed_site = site;
	armed_hit = hit;
	armed_error = error;
}

PUBLIC const struct site *
failing_sites (void)
{
	return sites;
}

PUBLIC int
failing_done (void)
{
	return done;
}

/* Whether this call is the one; then errno is set. 2: it is to fall short. */
static int
due (void *site, const char *name, int error)
{
	uint64_t address = (uint64_t) site;
	int found = 0;

	if (address < from || address >= to)
		return 0;
	while (__atomic_test_and_set (&busy, __ATOMIC_ACQUIRE))
		;
	for (int i = 0; i < SITES; i++)
		if (sites[i].address == address || !sites[i].address)
			{
				sites[i].address = address;
				sites[i].name = name;
				found = ++sites[i].count == armed_hit && address == armed_site;
				break;
			}
	done |= found;
	__atomic_clear (&busy, __ATOMIC_RELEASE);
	if (!found)
		return 0;
	*__errno_location () = armed_error > 0 ? armed_error : error;
	return armed_error < 0 ? 2 : 1;
}

/* asm-generic/errno-base.h and errno.h; some of these names are not on every system's list */
enum { E_PERM = 1, E_NOENT = 2, E_SRCH = 3, E_INTR = 4, E_IO = 5, E_AGAIN = 11, E_NOMEM = 12, E_MFILE = 24,
       E_NOSPC = 28, E_NOBUFS = 105 };

#define REAL(result, name, parameters) \
	static result (*real) parameters; \
	if (!real) \
		real = (result (*) parameters) dlsym ((void *) -1l /* RTLD_NEXT */, #name);

#define FAILS(result, name, parameters, arguments, failed, error) \
	PUBLIC result name parameters \
	{ \
		REAL (result, name, parameters) \
		return due (__builtin_return_address (0), #name, error) ? (result) failed : real arguments; \
	}

/* What moves bytes: as many as are half of what was asked for, or of what was moved. */
#define HALVES(name, parameters, arguments, half, error) \
	PUBLIC long name parameters \
	{ \
		REAL (long, name, parameters) \
		switch (due (__builtin_return_address (0), #name, error)) \
			{ \
			case 0: \
				return real arguments; \
			case 1: \
				return -1; \
			default: \
				return half; \
			} \
	}

#define FAILS_TO(result, name, parameters, call, failed, error) \
	PUBLIC result name parameters \
	{ \
		return due (__builtin_return_address (0), #name, error) ? (result) failed : call; \
	}

FAILS_TO (void *, malloc, (size_t size), __libc_malloc (size), 0, E_NOMEM)
FAILS_TO (void *, calloc, (size_t count, size_t size), __libc_calloc (count, size), 0, E_NOMEM)
FAILS_TO (void *, realloc, (void *old, size_t size), __libc_realloc (old, size), 0, E_NOMEM)
FAILS_TO (void *, reallocarray, (void *old, size_t count, size_t size), __libc_realloc (old, count * size), 0, E_NOMEM)

PUBLIC int
posix_memalign (void **memory, size_t alignment, size_t size)
{
	if (due (__builtin_return_address (0), "posix_memalign", E_NOMEM))
		return E_NOMEM;
	*memory = __libc_memalign (alignment, size);
	return *memory ? 0 : E_NOMEM;
}

FAILS (long, ptrace, (long a, long b, long c, long d), (a, b, c, d), -1, E_SRCH)
FAILS (int, waitpid, (int pid, int *status, int options), (pid, status, options), -1, E_INTR)
FAILS (long, syscall, (long nr, long a, long b, long c, long d, long e, long f), (nr, a, b, c, d, e, f), -1, E_PERM)
HALVES (process_vm_readv, (long pid, void *a, long b, void *c, long d, long e), (pid, a, b, c, d, e), real (pid, a, b, c, d, e) / 2, E_SRCH)
HALVES (process_vm_writev, (long pid, void *a, long b, void *c, long d, long e), (pid, a, b, c, d, e), real (pid, a, b, c, d, e) / 2, E_SRCH)
FAILS (int, kill, (int pid, int number), (pid, number), -1, E_SRCH)
FAILS (int, prctl, (int option, long a, long b, long c, long d), (option, a, b, c, d), -1, E_PERM)
FAILS (int, open64, (const char *path, int flags, int mode), (path, flags, mode), -1, E_MFILE)
FAILS (void *, fopen64, (const char *path, const char *mode), (path, mode), 0, E_MFILE)
FAILS (void *, opendir, (const char *path), (path), 0, E_MFILE)
FAILS (int, stat64, (const char *path, void *buffer), (path, buffer), -1, E_NOENT)
FAILS (int, fcntl64, (int fd, int command, long argument), (fd, command, argument), -1, E_MFILE)
FAILS (int, dup2, (int fd, int number), (fd, number), -1, E_MFILE)
FAILS (int, dup3, (int fd, int number, int flags), (fd, number, flags), -1, E_MFILE)
FAILS (int, pipe2, (int *fds, int flags), (fds, flags), -1, E_MFILE)
FAILS (int, eventfd, (unsigned value, int flags), (value, flags), -1, E_MFILE)
FAILS (int, memfd_create, (const char *name, unsigned flags), (name, flags), -1, E_MFILE)
FAILS (int, ioctl, (int fd, long request, long argument), (fd, request, argument), -1, E_IO)
FAILS (void *, mmap64, (void *at, size_t size, int prot, int flags, int fd, long offset),
       (at, size, prot, flags, fd, offset), -1l, E_NOMEM)
HALVES (read, (int fd, void *buffer, size_t size), (fd, buffer, size), real (fd, buffer, (size + 1) / 2), E_IO)
HALVES (write, (int fd, const void *buffer, size_t size), (fd, buffer, size), real (fd, buffer, (size + 1) / 2), E_NOSPC)
HALVES (pread64, (int fd, void *buffer, size_t size, long at), (fd, buffer, size, at),
	real (fd, buffer, (size + 1) / 2, at), E_IO)
HALVES (pwrite64, (int fd, const void *buffer, size_t size, long at), (fd, buffer, size, at),
	real (fd, buffer, (size + 1) / 2, at), E_NOSPC)
FAILS (long, lseek64, (int fd, long offset, int whence), (fd, offset, whence), -1, E_IO)
FAILS (int, fallocate64, (int fd, int mode, long offset, long size), (fd, mode, offset, size), -1, E_NOSPC)
FAILS (int, bind, (int fd, const void *address, unsigned size), (fd, address, size), -1, E_NOBUFS)
FAILS (int, connect, (int fd, const void *address, unsigned size), (fd, address, size), -1, E_NOBUFS)
FAILS (int, getsockname, (int fd, void *address, unsigned *size), (fd, address, size), -1, E_NOBUFS)
FAILS (int, getpeername, (int fd, void *address, unsigned *size), (fd, address, size), -1, E_NOBUFS)
FAILS (int, getsockopt, (int fd, int level, int name, void *value, unsigned *size), (fd, level, name, value, size), -1, E_NOBUFS)
FAILS (int, setsockopt, (int fd, int level, int name, const void *value, unsigned size), (fd, level, name, value, size), -1,
       E_NOBUFS)
FAILS (long, sendmsg, (int fd, const void *message, int flags), (fd, message, flags), -1, E_NOBUFS)
FAILS (char *, if_indextoname, (unsigned index, char *name), (index, name), 0, E_NOENT)
FAILS (int, poll, (void *fds, unsigned long count, int timeout), (fds, count, timeout), -1, E_NOMEM)

/* Of libraries that only the watched one has loaded, which dlsym does not find after us. */
#define FAILS_OF(library, result, name, parameters, arguments, failed) \
	PUBLIC result name parameters \
	{ \
		static result (*real) parameters; \
		if (!real) \
			real = (result (*) parameters) dlsym (dlopen (library, 5 /* RTLD_LAZY | RTLD_NOLOAD */), #name); \
		return due (__builtin_return_address (0), #name, E_NOMEM) ? (result) failed : real arguments; \
	}

#define SSL_FAILS(result, name, parameters, arguments) \
	FAILS_OF ("libssl.so.3", result, name, parameters, arguments, 0)
#define CRYPTO_FAILS(result, name, parameters, arguments) \
	FAILS_OF ("libcrypto.so.3", result, name, parameters, arguments, 0)

SSL_FAILS (void *, SSL_CTX_new, (const void *method), (method))
SSL_FAILS (void *, SSL_new, (void *context), (context))
SSL_FAILS (int, SSL_CTX_use_certificate, (void *context, void *certificate), (context, certificate))
SSL_FAILS (int, SSL_CTX_use_PrivateKey, (void *context, void *key), (context, key))
SSL_FAILS (int, SSL_CTX_check_private_key, (const void *context), (context))
SSL_FAILS (int, SSL_CTX_set_ciphersuites, (void *context, const char *names), (context, names))
SSL_FAILS (long, SSL_CTX_ctrl, (void *context, int command, long number, void *pointer), (context, command, number, pointer))
SSL_FAILS (int, SSL_set_fd, (void *ssl, int fd), (ssl, fd))
CRYPTO_FAILS (void *, BIO_new_mem_buf, (const void *memory, int size), (memory, size))
CRYPTO_FAILS (void *, PEM_read_bio_X509, (void *bio, void *place, void *ask, void *data), (bio, place, ask, data))
CRYPTO_FAILS (void *, PEM_read_bio_PrivateKey, (void *bio, void *place, void *ask, void *data), (bio, place, ask, data))
CRYPTO_FAILS (int, X509_digest, (const void *one, const void *kind, void *digest, void *size), (one, kind, digest, size))
FAILS_OF ("libzstd.so.1", void *, ZSTD_createCCtx, (void), (), 0)
FAILS_OF ("libzstd.so.1", void *, ZSTD_createDCtx, (void), (), 0)
FAILS_OF ("libzstd.so.1", size_t, ZSTD_compressCCtx, (void *c, void *to, size_t room, const void *from, size_t size, int level),
	  (c, to, room, from, size, level), -64l /* an error code of its own */)
FAILS_OF ("libzstd.so.1", size_t, ZSTD_decompressDCtx, (void *d, void *to, size_t room, const void *from, size_t size),
	  (d, to, room, from, size), -64l)

PUBLIC int
pthread_create (unsigned long *thread, const void *attributes, void *(*start) (void *), void *argument)
{
	REAL (int, pthread_create, (unsigned long *, const void *, void *(*) (void *), void *))
	if (due (__builtin_return_address (0), "pthread_create", E_AGAIN))
		return E_AGAIN;
	return real (thread, attributes, start, argument);
}
