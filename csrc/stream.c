/*
 * stream.c - stdin, stdout and stderr of one run, on non-blocking pipes: capture with a bound, or a
 * relay to a descriptor of the caller.
 *
 * A payload never gets the caller's own descriptor, only a pipe: through /proc/self/fd it could
 * reopen a file with another mode, read a terminal it should only write, or leave either non-blocking.
 */
#include "stream.h"
#include "util.h"

#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>

enum { CHUNK = 65536 };

/* How many bytes of a bounded capture are its head; the rest is a ring with the tail. */
static size_t head_size(const struct sbx_stream *s)
{
	return (size_t)(s->limit - s->limit / 2);
}

static int grow(struct sbx_stream *s)
{
	size_t room = s->room ? s->room * 2 : CHUNK;

	if (room > s->limit)
		room = (size_t)s->limit;
	unsigned char *data = realloc(s->data, room ? room : 1);
	if (!data)
		return -ENOMEM;
	s->data = data;
	s->room = room;
	return 0;
}

/* Bytes beyond the limit overwrite the oldest of the ring. */
static void keep_tail(struct sbx_stream *s, const unsigned char *from, size_t size)
{
	size_t head = head_size(s), ring = s->room - head;

	for (size_t i = 0; ring && i < size;) {
		size_t pos = (size_t)((s->total - s->limit + i) % ring);
		size_t n = size - i < ring - pos ? size - i : ring - pos;
		memcpy(s->data + head + pos, from + i, n);
		i += n;
	}
}

/* Read once. 1: more may come, 0: end of file, or -errno. */
static int capture_once(struct sbx_stream *s)
{
	unsigned char beyond[16384];

	if (s->size == s->room && s->room < s->limit) {
		int ret = grow(s);
		if (ret < 0)
			return ret;
	}
	size_t space = s->room - s->size;
	ssize_t n = space ? read(s->fd, s->data + s->size, space) : read(s->fd, beyond, sizeof beyond);
	if (n == 0)
		return 0;
	if (n < 0)
		return errno == EAGAIN ? -EAGAIN : errno == EINTR ? 1 : -errno;
	if (space)
		s->size += (size_t)n;
	else
		keep_tail(s, beyond, (size_t)n);
	s->total += (uint64_t)n;
	return 1;
}

/* Capture what is there, but not for ever: the other descriptors and the clock want a look too. */
static int capture(struct sbx_stream *s)
{
	int ret = 1;

	for (int i = 0; i < 16 && ret == 1; i++)
		ret = capture_once(s);
	return ret == -EAGAIN ? 1 : ret;
}

/*
 * The caller's descriptors may be shared with other readers and writers, who can be faster between poll
 * and here; and they may not be made non-blocking, which would affect those others. So ask for one
 * non-blocking transfer where the kernel can (RWF_NOWAIT: preadv2(2)); a regular file never blocks for
 * long, but says EAGAIN when it is not cached.
 */
static bool is_regular(int fd)
{
	struct stat st;

	return fstat(fd, &st) == 0 && S_ISREG(st.st_mode);
}

ssize_t sbx_read_some(int fd, void *buf, size_t size)
{
	const struct iovec iov = { buf, size };
	ssize_t n = preadv2(fd, &iov, 1, -1, RWF_NOWAIT);

	return n < 0 && (errno == EOPNOTSUPP || (errno == EAGAIN && is_regular(fd))) ? read(fd, buf, size) : n;
}

static ssize_t write_some(int fd, const void *buf, size_t size)
{
	const struct iovec iov = { (void *)(uintptr_t)buf, size };
	ssize_t n = pwritev2(fd, &iov, 1, -1, RWF_NOWAIT);

	return n < 0 && (errno == EOPNOTSUPP || (errno == EAGAIN && is_regular(fd))) ? write(fd, buf, size) : n;
}

/* Move one bounded piece towards the caller's descriptor; it was polled, so no write blocks. */
static int relay_in(struct sbx_stream *s)
{
	if (!s->data && !(s->data = malloc(SBX_RELAY_CHUNK)))
		return -ENOMEM;
	ssize_t n = read(s->fd, s->data, SBX_RELAY_CHUNK);
	if (n == 0)
		return 0;
	if (n < 0)
		return errno == EAGAIN || errno == EINTR ? 1 : -errno;
	s->total += (uint64_t)n;
	s->pending = (uint32_t)n;
	s->offset = 0;
	return 1;
}

int sbx_stream_read(struct sbx_stream *s)
{
	return s->mode == SBX_STREAM_RELAY ? relay_in(s) : capture(s);
}

/* 1: go on, 0: the reader behind the caller's descriptor is gone. */
int sbx_stream_flush(struct sbx_stream *s)
{
	ssize_t n = write_some(s->relay, s->data + s->offset, s->pending);

	if (n < 0)
		return errno == EAGAIN || errno == EINTR;
	s->offset += (uint32_t)n;
	s->pending -= (uint32_t)n;
	return 1;
}

static void reverse(unsigned char *from, unsigned char *to)
{
	while (from < --to) {
		unsigned char swap = *from;
		*from++ = *to;
		*to = swap;
	}
}

/* Who wrote has ended: the stream ends behind what is in the pipe now. */
void sbx_stream_mark(struct sbx_stream *s)
{
	int there = 0;

	if (s->fd >= 0 && ioctl(s->fd, FIONREAD, &there) == 0)
		s->last = s->total + (uint64_t)there;
}

/* Turn the ring so that the tail reads in order. */
void sbx_stream_finish(struct sbx_stream *s)
{
	if (s->mode != SBX_STREAM_CAPTURE || s->total <= s->limit)
		return;
	unsigned char *ring = s->data + head_size(s), *end = s->data + s->room;
	if (ring >= end)
		return;
	unsigned char *oldest = ring + (s->total - s->limit) % (uint64_t)(end - ring);
	reverse(ring, oldest);
	reverse(oldest, end);
	reverse(ring, end);
}

/* Write the next piece; a reader that is gone is the payload's choice, not an error. */
void sbx_stdin_feed(struct sbx_run *run)
{
	const unsigned char *from = run->input ? run->input : run->stdin_buffer;
	size_t size = run->input ? run->input_size : run->stdin_size;
	ssize_t n = write(run->stdin_fd, from + run->stdin_offset, size - run->stdin_offset);

	if (n < 0 && errno != EAGAIN && errno != EINTR)
		sbx_close(sbx_steal_fd(&run->stdin_fd));
	if (n > 0)
		run->stdin_offset += (size_t)n;
	if (run->input && run->stdin_offset == size)
		sbx_close(sbx_steal_fd(&run->stdin_fd));
}

/* The next piece for stdin, from the caller's descriptor. */
int sbx_stdin_refill(struct sbx_run *run)
{
	if (!run->stdin_buffer && !(run->stdin_buffer = malloc(65536)))
		return -ENOMEM;
	ssize_t n = sbx_read_some(run->stdin_relay, run->stdin_buffer, 65536);
	if (n < 0 && (errno == EAGAIN || errno == EINTR))
		return 0;
	run->stdin_offset = 0;
	run->stdin_size = n > 0 ? (size_t)n : 0;
	if (n <= 0)
		sbx_close(sbx_steal_fd(&run->stdin_fd)); /* the source has ended or broken: so does stdin */
	return 0;
}

/*
 * A write to a pipe whose reader is gone raises SIGPIPE in this thread, which not every host program
 * ignores. Block it meanwhile, and take back the one that this call caused.
 */
void sbx_shield_raise(struct sbx_shield *sh)
{
	sigset_t set;

	sigpending(&set);
	sh->pending = sigismember(&set, SIGPIPE) == 1;
	sigemptyset(&set);
	sigaddset(&set, SIGPIPE);
	pthread_sigmask(SIG_BLOCK, &set, &sh->before);
}

void sbx_shield_lower(const struct sbx_shield *sh)
{
	const struct timespec now = { 0 };
	sigset_t set;

	sigemptyset(&set);
	sigaddset(&set, SIGPIPE);
	while (!sh->pending && sigtimedwait(&set, NULL, &now) < 0 && errno == EINTR)
		;
	pthread_sigmask(SIG_SETMASK, &sh->before, NULL);
}
