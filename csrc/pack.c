/*
 * pack.c - a layer as a stream of struct sbx_entry, on its way to the host, which may not be able to read all of it as
 * itself. Names come one by one, each in its directory, so that no path is too long. Nobody changes the tree meanwhile.
 */
#include "box.h"

#include <sys/mman.h>
#include <sys/stat.h>

enum {
	MAX_DEPTH = 65536,
	ATTRIBUTE_MAX = 65536, /* XATTR_SIZE_MAX, XATTR_LIST_MAX */
};

struct pack {
	int at, stream; /* the directory; where it goes */
	bool content;
	uint64_t depth;
	int64_t next[MAX_DEPTH]; /* for each level above, where to read on */
	char names[ATTRIBUTE_MAX];
	char text[4 * ATTRIBUTE_MAX]; /* of one entry */
};

/* Appends "NAME\0", the size of the value, and the value, for each attribute. */
static long collect_xattrs(struct pack *p, int fd, struct sbx_entry *e, uint32_t used)
{
	long size = sbx_sys(SYS_flistxattr, fd, p->names, sizeof p->names);

	for (const char *name = p->names; size > 0 && name < p->names + size; name = sbx_next(name)) {
		if (!sbx_own_xattr(name))
			continue;
		const size_t length = strlen(name) + 1;
		if (used + length + sizeof(uint32_t) + ATTRIBUTE_MAX > sizeof p->text)
			return -E2BIG;
		char *at = p->text + used;
		memcpy(at, name, length);
		long value = sbx_sys(SYS_fgetxattr, fd, name, at + length + sizeof(uint32_t), ATTRIBUTE_MAX);
		if (value < 0)
			return value;
		const uint32_t length_of_value = (uint32_t)value;
		memcpy(at + length, &length_of_value, sizeof length_of_value);
		const uint32_t all = (uint32_t)(length + sizeof length_of_value) + length_of_value;
		used += all;
		e->xattrs += all;
	}
	return size < 0 ? size : 0;
}

static long put(struct pack *p, struct sbx_entry *e)
{
	long ret = sbx_transfer(SYS_write, p->stream, e, sizeof *e);

	return ret < 0 ? ret : sbx_transfer(SYS_write, p->stream, p->text, (size_t)e->name + e->target + e->xattrs);
}

static long put_data(struct pack *p, int fd, int64_t size)
{
	long at = 0;

	while (at < size) {
		long start = sbx_sys(SYS_lseek, fd, at, SEEK_DATA);
		if (start < 0)
			return start == -ENXIO ? 0 : start;
		long end = sbx_sys(SYS_lseek, fd, start, SEEK_HOLE);
		if (end < 0)
			return end;
		const struct sbx_entry data = { .kind = SBX_ENTRY_DATA, .offset = start, .size = end - start };
		long ret = sbx_transfer(SYS_write, p->stream, (void *)(uintptr_t)&data, sizeof data);
		off_t offset = start;
		while (ret >= 0 && offset < end) {
			ret = sbx_sys(SYS_sendfile, p->stream, fd, &offset, end - offset);
			if (ret == 0)
				ret = -EIO;
		}
		if (ret < 0)
			return ret;
		at = end;
	}
	return 0;
}

/* Begin an entry with its name and what stat(2) says. */
static void describe(struct pack *p, struct sbx_entry *e, const char *name, const struct stat *st)
{
	*e = (struct sbx_entry){
		.kind = S_ISDIR(st->st_mode) ? SBX_ENTRY_ENTER : SBX_ENTRY_OTHER,
		.mode = st->st_mode,
		.uid = st->st_uid,
		.gid = st->st_gid,
		.ino = !S_ISDIR(st->st_mode) && st->st_nlink > 1 ? st->st_ino : 0,
		.size = S_ISREG(st->st_mode) ? st->st_size : 0,
		.mtime = st->st_mtim.tv_sec,
		.mtime_ns = (uint32_t)st->st_mtim.tv_nsec,
		.rdev = (uint32_t)st->st_rdev,
		.name = (uint32_t)strlen(name),
	};
	memcpy(p->text, name, e->name);
}

/* Anything but a directory. */
static long put_other(struct pack *p, const char *name, const struct stat *st)
{
	struct sbx_entry e;
	_cleanup_fd_ int fd = -1;

	describe(p, &e, name, st);
	if (S_ISLNK(st->st_mode)) {
		long len = sbx_sys(SYS_readlinkat, p->at, name, p->text + e.name, 4096);
		if (len < 0)
			return len;
		e.target = (uint32_t)len;
	}
	if (S_ISREG(st->st_mode)) {
		fd = (int)sbx_sys(SYS_openat, p->at, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC, 0);
		long ret = fd < 0 ? fd : collect_xattrs(p, fd, &e, e.name);
		if (ret < 0)
			return ret;
	}
	long ret = put(p, &e);
	return ret < 0 || fd < 0 || !p->content ? ret : put_data(p, fd, st->st_size);
}

static long enter(struct pack *p, const char *name)
{
	struct sbx_entry e;
	struct stat st;

	long ret = sbx_enter(&p->at, name, 0);
	if (ret >= 0)
		ret = sbx_sys(SYS_fstat, p->at, &st);
	if (ret < 0)
		return ret;
	describe(p, &e, p->depth ? name : "", &st);
	ret = collect_xattrs(p, p->at, &e, e.name);
	return ret < 0 ? ret : put(p, &e);
}

/* Put entries up to the first directory: 1, and its name. 0: there are no more. */
static long put_entries(struct pack *p, char name[SBX_NAME_MAX], int64_t *next)
{
	struct sbx_reader reader = { .fd = p->at };
	const struct sbx_dirent *entry;
	struct stat st;

	for (;;) {
		long ret = sbx_read_entry(&reader, &entry);
		if (ret > 0)
			ret = sbx_sys(SYS_newfstatat, p->at, entry->name, &st, AT_SYMLINK_NOFOLLOW) < 0 ? -EIO : 1;
		if (ret <= 0)
			return ret;
		if (S_ISDIR(st.st_mode)) {
			memcpy(name, entry->name, strlen(entry->name) + 1); /* NAME_MAX is the kernel's promise */
			*next = entry->off;
			return 1;
		}
		ret = put_other(p, entry->name, &st);
		if (ret < 0)
			return ret;
	}
}

static long put_all(struct pack *p)
{
	const struct sbx_entry leave = { .kind = SBX_ENTRY_LEAVE };
	char name[SBX_NAME_MAX];
	int64_t next;

	for (long ret = enter(p, ".");;) {
		if (ret >= 0)
			ret = put_entries(p, name, &next);
		if (ret == 1 && p->depth + 1 == MAX_DEPTH)
			ret = -ELOOP;
		if (ret < 0)
			return ret;
		if (ret == 1) {
			p->next[p->depth++] = next;
			ret = enter(p, name);
			continue;
		}
		ret = sbx_transfer(SYS_write, p->stream, (void *)(uintptr_t)&leave, sizeof leave);
		if (ret < 0 || p->depth == 0)
			return ret;
		ret = sbx_enter(&p->at, "..", p->next[--p->depth]);
	}
}

/* Write the tree `root` to a stream, with what is in its files if asked. 0 or -errno. */
long sbx_pack_tree(int root, int stream, bool content)
{
	const int how = PROT_READ | PROT_WRITE;

	long map = sbx_sys(SYS_mmap, NULL, sizeof(struct pack), how, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (map < 0 && map > -4096)
		return map;
	struct pack *p = (struct pack *)map;
	p->at = (int)sbx_sys(SYS_fcntl, root, F_DUPFD_CLOEXEC, 3);
	p->stream = stream;
	p->content = content;
	long ret = p->at < 0 ? p->at : put_all(p);
	sbx_close(p->at);
	(void)sbx_sys(SYS_munmap, map, sizeof *p);
	return ret;
}
