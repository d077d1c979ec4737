/*
 * remove.c - removes a tree while somebody may rename, swap and add to what is in it. Three descriptors and
 * no recursion, so that no depth is too much; never through a link, never onto another mount. The way up is
 * "..", which is only believed if it is the directory that it came from.
 */
#include "box.h"

#include <sys/mman.h>
#include <sys/stat.h>

enum { KNOWN_LEVELS = 65536 }; /* so many ways back up are remembered */

#define PATIENCE_NS 50000000000u /* less than the host's */

#define BELOW (RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV)

struct level {
	uint64_t dev, ino;
};

/* Where the removal is: `top` and `at` are open, the levels between them are only known. */
struct removal {
	int top, at;
	bool force;
	uint64_t depth, known; /* levels above `at`; so many of them are in `above` */
	struct level *above;   /* KNOWN_LEVELS of them, by depth modulo that */
};

static bool gone(long ret)
{
	return ret == -ENOENT || ret == -ENOTDIR || ret == -ELOOP;
}

/* One entry: 0 removed or gone, 1 a directory with something in it, or -errno. */
static long remove_entry(int dir, const char *name)
{
	long ret = sbx_sys(SYS_unlinkat, dir, name, 0);

	if (ret == -EISDIR || ret == -EPERM) {
		long other = sbx_sys(SYS_unlinkat, dir, name, AT_REMOVEDIR);
		if (other != -ENOTDIR)
			ret = other;
	}
	if (ret == -ENOTEMPTY || ret == -EEXIST)
		return 1;
	return ret == -ENOENT ? 0 : ret;
}

/* Remove what is in a directory up to the first directory that is not empty: 1, and its name. 0: all gone. */
static long clear_directory(int dir, char name[SBX_NAME_MAX], uint64_t deadline)
{
	struct sbx_reader reader = { .fd = dir };
	const struct sbx_dirent *entry;

	for (;;) {
		long ret = sbx_read_entry(&reader, &entry);
		if (ret <= 0)
			return gone(ret) ? 0 : ret;
		if (reader.at == entry->len && sbx_now() > deadline) /* once for each buffer */
			return -ETIMEDOUT;
		ret = remove_entry(dir, entry->name);
		if (ret == 1)
			memcpy(name, entry->name, strlen(entry->name) + 1); /* NAME_MAX is the kernel's promise */
		if (ret != 0)
			return ret;
	}
}

static long identify(int fd, struct level *level)
{
	struct stat st;
	long ret = sbx_sys(SYS_fstat, fd, &st);

	*level = (struct level){ st.st_dev, st.st_ino };
	return ret;
}

static void move_to(struct removal *r, int fd)
{
	sbx_close(r->at);
	r->at = fd;
}

/* A directory of one's own whose mode keeps its owner out is opened up: for who wants all of it gone. */
static void unlock(int dir, const char *name)
{
	_cleanup_fd_ int fd = sbx_openat2(dir, name, O_PATH | O_DIRECTORY | O_NOFOLLOW, 0, BELOW);
	if (fd >= 0)
		(void)sbx_sys(SYS_fchmodat, dir, name, 0700); /* whoever could swap it could do this himself */
}

/* Never onto another mount: what is attached there was granted, and is not this tree's. */
static long descend(struct removal *r, const char *name)
{
	if (r->force)
		unlock(r->at, name);
	int fd = sbx_openat2(r->at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, BELOW);
	if (fd < 0)
		return gone(fd) ? 0 : fd == -EXDEV ? -EBUSY : fd;
	long ret = identify(r->at, &r->above[r->depth % KNOWN_LEVELS]);
	if (ret < 0) {
		sbx_close(fd);
		return ret;
	}
	r->depth++;
	r->known += r->known < KNOWN_LEVELS;
	move_to(r, fd);
	return 0;
}

/* Up where it came from; if the directory has been moved, or the way is too long to know, from the top again. */
static long ascend(struct removal *r)
{
	struct level up;
	int fd = -1;

	if (r->known) {
		const struct level *was = &r->above[--r->depth % KNOWN_LEVELS];
		r->known--;
		fd = sbx_openat2(r->at, "..", O_RDONLY | O_DIRECTORY, 0, RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV);
		if (fd >= 0 && (identify(fd, &up) < 0 || up.dev != was->dev || up.ino != was->ino))
			sbx_close(sbx_steal_fd(&fd));
	}
	if (fd < 0) {
		r->depth = r->known = 0;
		fd = sbx_openat2(r->top, ".", O_RDONLY | O_DIRECTORY, 0, 0);
	}
	if (fd < 0)
		return gone(fd) ? 0 : fd;
	move_to(r, fd);
	return 0;
}

static long remove_below(struct removal *r, int dir, const char *name)
{
	const uint64_t deadline = sbx_now() + PATIENCE_NS;
	char child[SBX_NAME_MAX];

	for (;;) {
		long ret = clear_directory(r->at, child, deadline);
		if (ret == 0 && r->depth == 0) {
			ret = sbx_sys(SYS_unlinkat, dir, name, AT_REMOVEDIR);
			if (ret != -ENOTEMPTY && ret != -EEXIST)
				return gone(ret) ? 0 : ret;
		}
		if (ret == -ETIMEDOUT || sbx_now() > deadline)
			return -ETIMEDOUT;
		/* from the start of a directory that was read before: open it anew */
		ret = ret == 1 ? descend(r, child) : ret < 0 && ret != -ENOTEMPTY && ret != -EEXIST ? ret : ascend(r);
		if (ret < 0)
			return ret;
	}
}

/*
 * Remove what `name` is in the directory `dir`, with everything below. `force`: whatever the modes of directories, for
 * an owner to whom nobody does anything there meanwhile. 0 or -errno.
 */
long sbx_remove_tree(int dir, const char *name, bool force)
{
	const size_t size = KNOWN_LEVELS * sizeof(struct level);

	long ret = sbx_sys(SYS_unlinkat, dir, name, 0);
	if (ret != -EISDIR && ret != -EPERM)
		return ret;
	if (force)
		unlock(dir, name);
	_cleanup_fd_ int top = sbx_openat2(dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW, 0, BELOW);
	if (top < 0)
		return top == -EXDEV ? -EBUSY : gone(top) ? ret : top;
	long map = sbx_sys(SYS_mmap, NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (map < 0 && map > -4096)
		return map;
	struct removal r = { .top = top, .at = -1, .force = force, .above = (struct level *)map };
	ret = ascend(&r);
	if (ret >= 0)
		ret = remove_below(&r, dir, name);
	sbx_close(r.at);
	(void)sbx_sys(SYS_munmap, map, size);
	return ret;
}
