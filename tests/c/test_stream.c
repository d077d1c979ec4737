/* A bounded capture keeps exactly the first and the last half, whatever the sizes of the pieces. */
#include "check.h"
#include "stream.h"
#include "util.h"

#include <stdlib.h>

static void capture_all(struct sbx_stream *s, size_t total, size_t piece)
{
	int pair[2];
	char buf[512];

	CHECK(pipe2(pair, O_NONBLOCK) == 0);
	s->fd = pair[0];
	for (size_t done = 0; done < total;) {
		size_t n = total - done < piece ? total - done : piece;
		for (size_t i = 0; i < n; i++)
			buf[i] = (char)((done + i) % 251);
		CHECK(write(pair[1], buf, n) == (ssize_t)n);
		done += n;
		CHECK(sbx_stream_read(s) == 1);
	}
	close(pair[1]);
	CHECK(sbx_stream_read(s) == 0);
	close(pair[0]);
	sbx_stream_finish(s);
}

static void check_capture(size_t limit, size_t total, size_t piece)
{
	struct sbx_stream s = { .mode = SBX_STREAM_CAPTURE, .limit = limit };

	capture_all(&s, total, piece);
	size_t kept = total < limit ? total : limit;
	size_t head = total <= limit ? kept : limit - limit / 2;
	CHECK(s.total == total);
	CHECK(s.size == kept);
	for (size_t i = 0; i < kept && i < s.size; i++) {
		size_t from = i < head ? i : total - kept + i;
		CHECK(s.data[i] == from % 251);
	}
	free(s.data);
}

static void keeps_head_and_tail(void)
{
	static const size_t limits[] = { 0, 1, 2, 3, 7, 64, 100, 101, 1000 };
	static const size_t totals[] = { 0, 1, 2, 3, 6, 7, 8, 63, 64, 65, 150, 999, 1000, 1001, 1777 };
	static const size_t pieces[] = { 1, 3, 64, 500 };

	for (size_t l = 0; l < SBX_COUNT(limits); l++)
		for (size_t t = 0; t < SBX_COUNT(totals); t++)
			for (size_t p = 0; p < SBX_COUNT(pieces); p++)
				check_capture(limits[l], totals[t], pieces[p]);
}

static void relays_in_pieces(void)
{
	struct sbx_stream s = { .mode = SBX_STREAM_RELAY };
	int from[2], to[2];
	char buf[16];

	CHECK(pipe2(from, O_NONBLOCK) == 0 && pipe2(to, O_NONBLOCK) == 0);
	s.fd = from[0];
	s.relay = to[1];
	CHECK(sbx_stream_read(&s) == 1 && s.pending == 0); /* nothing there yet */
	CHECK(write(from[1], "hello", 5) == 5);
	CHECK(sbx_stream_read(&s) == 1 && s.pending == 5);
	CHECK(sbx_stream_flush(&s) == 1 && s.pending == 0);
	CHECK(read(to[0], buf, sizeof buf) == 5 && memcmp(buf, "hello", 5) == 0);
	close(to[0]);
	signal(SIGPIPE, SIG_IGN);
	CHECK(write(from[1], "x", 1) == 1);
	CHECK(sbx_stream_read(&s) == 1 && sbx_stream_flush(&s) == 0); /* the reader is gone */
	close(from[0]);
	close(from[1]);
	close(to[1]);
	free(s.data);
}

int main(void)
{
	RUN(keeps_head_and_tail);
	RUN(relays_in_pieces);
	return check_status();
}
