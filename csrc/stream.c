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

/* Where the next bytes of the capture go, and how many fit there in one piece. */
static int next_space(struct sbx_stream *s, unsigned char **at, size_t *size)
{
	if (s->size == s->room && s->room < s->limit) {
		int ret = grow(s);
		if (ret < 0)
			return ret;
	}
	if (s->size < s->room) {
		*at = s->data + s->size;
		*size = s->room - s->size;
		return 0;
	}
	size_t head = head_size(s), ring = s->room - head;
	size_t pos = ring ? (size_t)((s->total - s->limit) % ring) : 0;
	*at = s->data + head + pos;
	*size = ring - pos;
	return 0;
}

/* Capture what is there. 1: more may come, 0: end of file, or -errno. */
static int capture(struct sbx_stream *s)
{
	unsigned char *at, scrap[4096];
	size_t size;

	for (int i = 0; i < 16; i++) { /* then look at the other descriptors and the clock */
		int ret = next_space(s, &at, &size);
		if (ret < 0)
			return ret;
		bool discard = size == 0; /* a limit of 0 or 1 leaves no ring */
		ssize_t n = discard ? read(s->fd, scrap, sizeof scrap) : read(s->fd, at, size);
		if (n == 0)
			return 0;
		if (n < 0)
			return errno == EAGAIN || errno == EINTR ? 1 : -errno;
		s->total += (uint64_t)n;
		if (!discard && s->size < s->room)
			s->size += (size_t)n;
	}
	return 1;
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
	ssize_t n = write(s->relay, s->data + s->offset, s->pending);

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
