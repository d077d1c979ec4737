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

/* What is in a directory, but for "." and "..". Zeroed but for the descriptor at first. */
struct sbx_reader {
	int fd;
	long at, len;
	_Alignas(8) char entries[4096];
};

/* The next entry: 1; 0 at the end, or -errno. */
static inline long sbx_read_entry(struct sbx_reader *r, const struct sbx_dirent **entry)
{
	for (;;) {
		if (r->at >= r->len) {
			r->at = r->len = 0;
			long len = sbx_sys(SYS_getdents64, r->fd, r->entries, sizeof r->entries);
			if (len <= 0)
				return len;
			r->len = len;
		}
		*entry = (const void *)(r->entries + r->at);
		r->at += (*entry)->len;
		const char *name = (*entry)->name;
		if (name[0] != '.' || (name[1] && (name[1] != '.' || name[2])))
			return 1;
	}
}

/* Attributes that belong to whoever owns the file; overlayfs's among them. */
static inline bool sbx_own_xattr(const char *name)
{
	return strncmp(name, "user.", 5) == 0 || strncmp(name, "system.posix_acl_", 17) == 0;
}

/* read(2) or write(2) all of it. */
static inline long sbx_transfer(long call, int fd, void *data, size_t size)
{
	for (char *at = data; size > 0;) {
		long ret = sbx_sys(call, fd, at, size);
		if (ret == -EINTR)
			continue;
		if (ret <= 0)
			return ret < 0 ? ret : -EPIPE;
		at += ret;
		size -= (size_t)ret;
	}
	return 0;
}

/* Into a directory of the directory *at, to read on from there. */
static inline long sbx_enter(int *at, const char *name, int64_t from)
{
	const int how = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;

	_cleanup_fd_ int fd = (int)sbx_sys(SYS_openat, *at, name, how, 0);
	long ret = fd < 0 ? fd : sbx_sys(SYS_lseek, fd, from, SEEK_SET);
	if (ret < 0)
		return ret;
	sbx_close(*at);
	*at = sbx_steal_fd(&fd);
	return 0;
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
