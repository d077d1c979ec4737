/*
 * copy.c - copies a tree that nobody changes meanwhile: content with its holes, hard links, owners, modes, times,
 * attributes, and whatever else has a name. Two descriptors and no recursion, so that no depth is too much that a
 * payload can make and its owner can wait for.
 *
 * What overlayfs knows about a layer is in it, too: whiteouts are device nodes, which anybody may make (Linux 5.8), and
 * the rest is in attributes. So the copy of a layer is one, and copied over another it makes one layer of both.
 */
#include "box.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/xattr.h>

enum {
	MAX_DEPTH = 65536,
	ATTRIBUTE_MAX = 65536, /* XATTR_SIZE_MAX, XATTR_LIST_MAX */
	CHUNK = 1 << 30,
};

/* Where the copy is. `links` has the first copy of everything that has more than one name, by its number. */
struct copy {
	int from, to, links;
	uint64_t depth;
	int64_t *next; /* for each level above, where to read on */
};

/* --- attributes ---------------------------------------------------------------------------------- */

static bool is_wanted(const char *name, bool overlay)
{
	return strncmp(name, "user.overlay.", 13) == 0 ? overlay : sbx_own_xattr(name);
}

static long copy_each_xattr(int from, int to, bool overlay, char *names, char *value)
{
	long size = sbx_sys(SYS_flistxattr, from, names, ATTRIBUTE_MAX), ret = size;

	for (const char *name = names; ret >= 0 && name < names + size; name = sbx_next(name)) {
		if (!is_wanted(name, overlay))
			continue;
		ret = sbx_sys(SYS_fgetxattr, from, name, value, ATTRIBUTE_MAX);
		if (ret >= 0)
			ret = sbx_sys(SYS_fsetxattr, to, name, value, ret, 0);
	}
	return ret < 0 ? ret : 0;
}

/* What `to` has, and `from` does not; but for overlayfs's own. */
static long drop_each_xattr(int from, int to, char *names)
{
	long size = sbx_sys(SYS_flistxattr, to, names, ATTRIBUTE_MAX), ret = size;

	for (const char *name = names; ret >= 0 && name < names + size; name = sbx_next(name))
		if (is_wanted(name, false) && sbx_sys(SYS_fgetxattr, from, name, NULL, 0) == -ENODATA)
			ret = sbx_sys(SYS_fremovexattr, to, name);
	return ret < 0 ? ret : 0;
}

static long copy_xattrs(int from, int to, bool overlay)
{
	long ret = sbx_sys(SYS_flistxattr, from, NULL, 0);
	if (ret == 0)
		ret = sbx_sys(SYS_flistxattr, to, NULL, 0);
	if (ret <= 0)
		return ret;
	long map = sbx_sys(SYS_mmap, NULL, 2 * ATTRIBUTE_MAX, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
			   0);
	if (map < 0 && map > -4096)
		return map;
	ret = drop_each_xattr(from, to, (char *)map);
	if (ret >= 0)
		ret = copy_each_xattr(from, to, overlay, (char *)map, (char *)map + ATTRIBUTE_MAX);
	(void)sbx_sys(SYS_munmap, map, 2 * ATTRIBUTE_MAX);
	return ret;
}

/* Owner, mode, extended attributes and times of a file or directory; overlayfs's own only if asked. */
long sbx_copy_attributes(int from, int to, bool overlay)
{
	struct stat st;

	long ret = sbx_sys(SYS_fstat, from, &st);
	if (ret >= 0)
		ret = sbx_sys(SYS_fchown, to, st.st_uid, st.st_gid);
	if (ret >= 0)
		ret = sbx_sys(SYS_fchmod, to, st.st_mode & 07777);
	if (ret >= 0)
		ret = copy_xattrs(from, to, overlay);
	const struct timespec times[] = { st.st_atim, st.st_mtim };
	return ret < 0 ? ret : sbx_sys(SYS_utimensat, to, NULL, times, 0);
}

/* --- one entry ----------------------------------------------------------------------------------- */

/* What is in a file, without its holes. */
static long copy_data(int from, int to, off_t size)
{
	long at = 0, ret = sbx_sys(SYS_ftruncate, to, size);

	while (ret >= 0 && at < size) {
		long start = sbx_sys(SYS_lseek, from, at, SEEK_DATA);
		if (start < 0)
			return start == -ENXIO ? 0 : start;
		long end = sbx_sys(SYS_lseek, from, start, SEEK_HOLE);
		ret = end < 0 ? end : sbx_sys(SYS_lseek, to, start, SEEK_SET);
		off_t offset = start;
		while (ret >= 0 && offset < end) {
			ret = sbx_sys(SYS_sendfile, to, from, &offset, end - offset < CHUNK ? end - offset : CHUNK);
			if (ret == 0)
				ret = -EIO;
		}
		at = end;
	}
	return ret < 0 ? ret : 0;
}

static long copy_file(const struct copy *c, const char *name, const struct stat *st)
{
	const int how = O_NOFOLLOW | O_CLOEXEC;

	_cleanup_fd_ int from = (int)sbx_sys(SYS_openat, c->from, name, O_RDONLY | how, 0);
	if (from < 0)
		return from;
	_cleanup_fd_ int to = (int)sbx_sys(SYS_openat, c->to, name, O_WRONLY | O_CREAT | O_EXCL | how, 0600);
	long ret = to < 0 ? to : copy_data(from, to, st->st_size);
	return ret < 0 ? ret : sbx_copy_attributes(from, to, true);
}

static long copy_link(const struct copy *c, const char *name)
{
	char target[4097];

	long len = sbx_sys(SYS_readlinkat, c->from, name, target, sizeof target - 1);
	if (len < 0)
		return len;
	target[len] = '\0';
	return sbx_sys(SYS_symlinkat, target, c->to, name);
}

/* Owner and times of what has no descriptor: links, fifos, sockets, whiteouts. */
static long copy_other(const struct copy *c, const char *name, const struct stat *st)
{
	const struct timespec times[] = { st->st_atim, st->st_mtim };

	long ret = S_ISLNK(st->st_mode) ? copy_link(c, name) :
					  sbx_sys(SYS_mknodat, c->to, name, st->st_mode & S_IFMT, st->st_rdev);
	if (ret >= 0)
		ret = sbx_sys(SYS_fchownat, c->to, name, st->st_uid, st->st_gid, AT_SYMLINK_NOFOLLOW);
	if (ret >= 0 && !S_ISLNK(st->st_mode))
		ret = sbx_sys(SYS_fchmodat, c->to, name, st->st_mode & 07777);
	return ret < 0 ? ret : sbx_sys(SYS_utimensat, c->to, name, times, AT_SYMLINK_NOFOLLOW);
}

/* Whether a directory shows nothing of what layers below have there. */
static bool is_opaque(int dir, const char *name)
{
	char value = 0;

	_cleanup_fd_ int fd = (int)sbx_sys(SYS_openat, dir, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0);
	return fd < 0 || (sbx_sys(SYS_fgetxattr, fd, "user.overlay.opaque", &value, 1) > 0 && value == 'y');
}

/* What is in the way, of a layer below. Returns 1 where it is a directory that this one is merged with. */
static long make_way(const struct copy *c, const char *name, const struct stat *st)
{
	struct stat other;

	long ret = sbx_sys(SYS_newfstatat, c->to, name, &other, AT_SYMLINK_NOFOLLOW);
	if (ret < 0)
		return ret == -ENOENT ? 0 : ret;
	if (S_ISDIR(st->st_mode) && S_ISDIR(other.st_mode) && !is_opaque(c->from, name))
		return 1;
	return sbx_remove_tree(c->to, name, false);
}

/* 0, 1 for a directory to be entered, or -errno. */
static long copy_entry(const struct copy *c, const char *name)
{
	char number[24];
	struct stat st;

	long ret = sbx_sys(SYS_newfstatat, c->from, name, &st, AT_SYMLINK_NOFOLLOW);
	if (ret < 0)
		return ret;
	ret = make_way(c, name, &st);
	if (ret != 0)
		return ret;
	if (S_ISDIR(st.st_mode)) {
		ret = sbx_sys(SYS_mkdirat, c->to, name, 0700);
		return ret < 0 ? ret : 1;
	}
	sbx_format_path(number, "", st.st_ino, "");
	if (st.st_nlink > 1) {
		ret = sbx_sys(SYS_linkat, c->links, number, c->to, name, 0);
		if (ret != -ENOENT)
			return ret;
	}
	ret = S_ISREG(st.st_mode) ? copy_file(c, name, &st) : copy_other(c, name, &st);
	return ret < 0 || st.st_nlink == 1 ? ret : sbx_sys(SYS_linkat, c->to, name, c->links, number, 0);
}

/* --- the walk ------------------------------------------------------------------------------------ */

/* Go to two other directories; `next` is where to read on in the first. */
static long move_to(struct copy *c, const char *name, int64_t next)
{
	long ret = sbx_enter(&c->from, name, next);

	return ret < 0 ? ret : sbx_enter(&c->to, name, 0);
}

/* Copy entries up to the first directory: 1, and its name. 0: there are no more. */
static long copy_entries(const struct copy *c, char name[SBX_NAME_MAX], int64_t *next)
{
	struct sbx_reader reader = { .fd = c->from };
	const struct sbx_dirent *entry;

	for (;;) {
		long ret = sbx_read_entry(&reader, &entry);
		if (ret <= 0)
			return ret;
		ret = copy_entry(c, entry->name);
		if (ret == 1) {
			memcpy(name, entry->name, strlen(entry->name) + 1); /* NAME_MAX is the kernel's promise */
			*next = entry->off;
		}
		if (ret != 0)
			return ret;
	}
}

static long copy_all(struct copy *c)
{
	char name[SBX_NAME_MAX];
	int64_t next;

	for (;;) {
		long ret = copy_entries(c, name, &next);
		if (ret == 1 && c->depth == MAX_DEPTH)
			ret = -ELOOP;
		if (ret == 1) {
			c->next[c->depth++] = next;
			ret = move_to(c, name, 0);
		} else if (ret == 0) {
			ret = sbx_copy_attributes(c->from, c->to, true);
			if (ret >= 0 && c->depth == 0)
				return 0;
			if (ret >= 0)
				ret = move_to(c, "..", c->next[--c->depth]);
		}
		if (ret < 0)
			return ret;
	}
}

/*
 * Copy everything in the directory `from` to the directory `to`, over what is there, and what concerns itself. `links` is
 * an empty one, for the time being. 0 or -errno.
 */
long sbx_copy_tree(int from, int to, int links)
{
	const size_t size = MAX_DEPTH * sizeof(int64_t);
	struct copy c = { .from = -1, .to = -1, .links = links };

	long map = sbx_sys(SYS_mmap, NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (map < 0 && map > -4096)
		return map;
	c.next = (int64_t *)map;
	c.from = sbx_openat2(from, ".", O_RDONLY | O_DIRECTORY, 0, 0);
	c.to = sbx_openat2(to, ".", O_RDONLY | O_DIRECTORY, 0, 0);
	long ret = c.from < 0 ? c.from : c.to < 0 ? c.to : copy_all(&c);
	sbx_close(c.from);
	sbx_close(c.to);
	(void)sbx_sys(SYS_munmap, map, size);
	return ret;
}
