/*
 * sandboxcore.h - the C API of the host process: start a spawner, give it a plan, run a request.
 *
 * Every call is synchronous and takes no lock; the caller may be one of many threads. Functions
 * return 0, or -1 with *err filled; sbx_run() also returns 1 when a signal interrupted it, so that
 * the caller can look at the signal and call again.
 */
#ifndef SANDBOXCORE_H
#define SANDBOXCORE_H

#include "plan.h"

/* cdef-begin */
enum sbx_stream_mode { SBX_STREAM_NONE = 0, SBX_STREAM_CAPTURE, SBX_STREAM_RELAY };

/* stdout or stderr of one run. */
struct sbx_stream {
	int32_t mode;
	int32_t relay;	     /* RELAY: where the bytes go; the descriptor stays the caller's */
	uint64_t limit;	     /* CAPTURE: at most so many bytes are kept, half head, half tail */
	uint64_t total;	     /* bytes the payload wrote */
	uint64_t last;	     /* after its end: where the stream ends */
	unsigned char *data; /* CAPTURE: owned by the run, freed by sbx_run_close */
	size_t size;
	size_t room;
	int32_t fd;	  /* our end of the pipe, or -1 */
	uint32_t pending; /* RELAY: bytes of `data` not written yet, from `offset` */
	uint64_t offset;
};

/* One run: fill the first part, call sbx_run until it does not return 1, read the second. */
struct sbx_run {
	int32_t spawner;     /* RUN: the spawner's socket; EXEC: the one of the sandbox's launchers */
	uint32_t kind;	     /* SBX_MESSAGE_RUN or _EXEC */
	int32_t sandbox;     /* EXEC: init's pidfd, killed when a command does not end otherwise */
	int32_t stdin_relay; /* where stdin's bytes come from, or -1; stays the caller's */
	const unsigned char *request;
	size_t request_size;
	const unsigned char *input; /* stdin's bytes, or NULL */
	size_t input_size;
	int64_t timeout_ns; /* from the start; negative: none */
	const int32_t *pass;
	uint32_t pass_count;
	uint32_t owned;	    /* whether the pipes are to belong to owner_uid, owner_gid, so that the */
	uint32_t owner_uid; /* payload can open them again through /dev/stdout and its like */
	uint32_t owner_gid;
	const struct sbx_pause *pause; /* EXEC: of its sandbox, or NULL */
	uint64_t paused_before;
	struct sbx_watch *watch; /* RUN: of its group, begun; or NULL */
	uint64_t kill_flood;	 /* whether a stream that exceeds its limit ends the command */
	struct sbx_stream out[2];

	struct sbx_record exit;
	int32_t timed_out;
	int32_t lost;	   /* init ended without a record: killed from outside */
	uint64_t began_ns; /* CLOCK_MONOTONIC */
	uint64_t ended_ns;
	uint64_t totals[2]; /* of out: once more, so that a reader finds everything in one place */
	uint64_t sizes[2];
	uint64_t applied_size;
	unsigned char *applied;

	int32_t state;
	int32_t control;
	int32_t pidfd;
	int32_t stdin_fd;
	int32_t out_of_memory; /* we have ended it */
	int32_t out_of_time;   /* of CPU: the same */
	int32_t flooded;       /* the same */
	int32_t reserved;
	unsigned char *stdin_buffer;
	size_t stdin_offset;
	size_t stdin_size;
	uint64_t give_up_ns;
};

/*
 * Start a spawner from the program at `path`. Returns the connection; the spawner ends when it is
 * closed or the calling process ends. It is no child of the caller: no SIGCHLD, nothing to wait for.
 * `diagnostics` becomes its stderr, or -1.
 */
int sbx_spawner_start(const char *path, int diagnostics, struct sbx_error *err);

/* Send HELLO or MAPPED and receive the record that answers it. */
int sbx_spawner_hello(int spawner, uint32_t kind, uint32_t flags, struct sbx_record *rec, struct sbx_error *err);

/* Check a plan and have its template built under `id`. */
int sbx_spawner_plan(int spawner, uint64_t id, const void *plan, size_t size, struct sbx_error *err);

int sbx_run(struct sbx_run *run, struct sbx_error *err);

/* Kill whatever is left of a run, wait for its end (2 s at the most), free everything. Idempotent. */
void sbx_run_close(struct sbx_run *run);

/*
 * One message; a body too large for a datagram travels in a memfd. 0 or -errno: EAGAIN where the socket has
 * a time limit, or does not block, and is full.
 */
int sbx_send(int sock, const struct sbx_message *msg, const void *body, size_t size, const int32_t *fds, size_t nfds);

/*
 * One record that is there already, at most `size` bytes of text behind it, and the descriptor it brings
 * (or -1). Returns 1, 0 at end-of-file, or -errno: EAGAIN when there is none.
 */
int sbx_receive_record(int sock, struct sbx_record *rec, void *text, size_t size, int32_t *fd);

/* Ask a launcher that serves files for one operation, relative to the directory `fd` unless -1. 0 or -errno. */
int sbx_file_send(int sock, const struct sbx_file_op *op, const void *paths, size_t size, int fd);

const char *sbx_stage_name(int stage);

/*
 * A detached mount of a new file system (or of one that is mounted already, if that is of a block device): fsmount(2).
 * `options`: key NUL value NUL ... NUL. A descriptor or -errno.
 */
int sbx_mount_fs(const char *fstype, const char *options, unsigned attrs);

/* Remove what `name` is in the directory `dir`, with everything below, through no link. 0 or -errno. */
long sbx_remove_tree(int dir, const char *name, bool force);

/* The kernel's Landlock ABI, or 0. */
int sbx_landlock_abi(void);

/* libc's: Python has only sync(2), which waits for everybody. */
int syncfs(int fd);

/* libc's: Python has none. */
int inotify_init1(int flags);
int inotify_add_watch(int fd, const char *path, uint32_t mask);
/* cdef-end */

/* wire.c: shared by client.c and run.c */
int sbx_wire_send(int sock, const struct sbx_message *msg, const void *body, size_t size, const int *fds, size_t nfds);
int sbx_wire_memfd(const void *data, size_t size);
long sbx_wire_receive(int sock, struct sbx_record *rec, void *text, size_t size, int flags, int *fd);

#endif
