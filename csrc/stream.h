/* stream.h - see stream.c. Internal to the host side. */
#ifndef SBX_STREAM_H
#define SBX_STREAM_H

#include "sandboxcore.h"

/* A pipe that polls writable takes this much without blocking: PIPE_BUF of pipe(7). */
enum { SBX_RELAY_CHUNK = 4096 };

int sbx_stream_read(struct sbx_stream *s);
int sbx_stream_flush(struct sbx_stream *s);
void sbx_stream_finish(struct sbx_stream *s);

#endif
