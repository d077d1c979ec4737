/* stream.h - see stream.c. Internal to the host side. */
#ifndef SBX_STREAM_H
#define SBX_STREAM_H

#include "sandboxcore.h"

#include <signal.h>
#include <sys/types.h>

/* A pipe that polls writable takes this much without blocking: PIPE_BUF of pipe(7). */
enum { SBX_RELAY_CHUNK = 4096 };

/* See sbx_shield_raise. */
struct sbx_shield {
	sigset_t before;
	bool pending;
};

ssize_t sbx_read_some(int fd, void *buf, size_t size);
int sbx_stream_read(struct sbx_stream *s);
int sbx_stream_flush(struct sbx_stream *s);
void sbx_stream_mark(struct sbx_stream *s);
void sbx_stream_finish(struct sbx_stream *s);
int sbx_run_start(struct sbx_run *run, struct sbx_error *err); /* ask.c */
void sbx_stdin_feed(struct sbx_run *run);
int sbx_stdin_refill(struct sbx_run *run);
void sbx_shield_raise(struct sbx_shield *sh);
void sbx_shield_lower(const struct sbx_shield *sh);

#endif
