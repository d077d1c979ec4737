/*
 * util.h - small helpers that are safe after clone: no allocation, no formatting, no locks.
 */
#ifndef SBX_UTIL_H
#define SBX_UTIL_H

#include "plan.h"
#include "sys.h"

#include <poll.h>
#include <stdbool.h>
#include <string.h>
#include <time.h>

#define SBX_COUNT(array) (sizeof(array) / sizeof((array)[0]))

static inline void sbx_cleanup_fd(int *fd)
{
	sbx_close(*fd);
}
#define _cleanup_fd_ __attribute__((cleanup(sbx_cleanup_fd)))

static inline int sbx_steal_fd(int *fd)
{
	int taken = *fd;
	*fd = -1;
	return taken;
}

/* Fill *err from a call's negative result. Returns -1, so a step can end with `return sbx_fail(...)`. */
static inline int sbx_fail(struct sbx_error *err, enum sbx_stage stage, uint32_t index, long ret)
{
	*err = (struct sbx_error){
		.stage = (int32_t)stage, .index = (int32_t)index, .err = (int32_t)-ret, .syscall = SBX_FAULT_SYSCALL
	};
	return -1;
}

static inline uint64_t sbx_now(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now); /* vDSO */
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* The raw call writes what is left of the time back. */
static inline void sbx_nap(long nanoseconds)
{
	struct timespec time = { .tv_nsec = nanoseconds };

	(void)sbx_sys(SYS_ppoll, NULL, 0, &time, NULL, 0);
}

/* Decimal digits of `value` behind `prefix`, then `suffix`; `out` must hold them all. */
static inline void sbx_format_path(char *out, const char *prefix, uint64_t value, const char *suffix)
{
	char digits[20];
	size_t n = 0;

	while (*prefix)
		*out++ = *prefix++;
	do
		digits[n++] = (char)('0' + value % 10);
	while (value /= 10);
	while (n)
		*out++ = digits[--n];
	while (*suffix)
		*out++ = *suffix++;
	*out = '\0';
}

/* Write all of it to an existing file below `dir` in one go (proc files accept one write only). */
static inline long sbx_write_file(int dir, const char *path, const char *text)
{
	_cleanup_fd_ int fd = (int)sbx_sys(SYS_openat, dir, path, O_WRONLY | O_CLOEXEC);
	if (fd < 0)
		return fd;
	long ret = sbx_sys(SYS_write, fd, text, strlen(text));
	return ret < 0 ? ret : 0;
}

/* Whether nothing of that name exists: asked before an ENOENT is taken for "not built in". */
static inline bool sbx_absent(int dir, const char *path)
{
	return sbx_sys(SYS_faccessat, dir, path, 0 /* F_OK */) == -ENOENT;
}

/* watch.c, which the host shares, too */
struct pollfd sbx_watch_event(const struct sbx_watch *w);

/* The next string of a NUL-separated list. */
static inline const char *sbx_next(const char *item)
{
	return item + strlen(item) + 1;
}

#endif
