/*
 * unpack.c - a layer from a stream of struct sbx_entry: pack.c's other side. Each name is made in the directory that is
 * open, and has no slash; nothing that is there is followed or replaced. So no stream reaches anything else.
 */
#include "box.h"

#include <sys/mman.h>
#include <sys/stat.h>

enum { MAX_DEPTH = 65536 };

struct unpack {
	int at, stream, links; /* the directory; where it comes from; the first names of what has several */
	uint64_t depth;
	struct sbx_entry above[MAX_DEPTH]; /* directories get their owner, mode and time when all is in them */
	char name[SBX_NAME_MAX], target[4097], xattrs[262144], data[65536];
};

/* The next entry, and its texts: the name and the target are terminated in place. */
static long get(struct unpack *p, struct sbx_entry *e)
{
	long ret = sbx_transfer(SYS_read, p->stream, e, sizeof *e);
	if (ret < 0 || e->kind == SBX_ENTRY_LEAVE || e->kind == SBX_ENTRY_DATA)
		return ret;
	if (e->name >= SBX_NAME_MAX || e->target >= sizeof p->target || e->xattrs > sizeof p->xattrs)
		return -EBADMSG;
	ret = sbx_transfer(SYS_read, p->stream, p->name, e->name);
	if (ret >= 0)
		ret = sbx_transfer(SYS_read, p->stream, p->target, e->target);
	if (ret >= 0)
		ret = sbx_transfer(SYS_read, p->stream, p->xattrs, e->xattrs);
	p->name[e->name] = p->target[e->target] = '\0';
	return ret;
}

static bool name_ok(const char *name, uint32_t length)
{
	const bool dots = name[0] == '.' && (length == 1 || (length == 2 && name[1] == '.'));

	return length > 0 && strlen(name) == length && !memchr(name, '/', length) && !dots;
}

static long set_xattrs(const struct unpack *p, int fd, const struct sbx_entry *e)
{
	const char *at = p->xattrs, *end = at + e->xattrs;

	while (at < end) {
		const char *name = at;
		uint32_t size;
		const char *zero = memchr(at, '\0', (size_t)(end - at));
		if (!zero || (size_t)(end - zero - 1) < sizeof size || !sbx_own_xattr(name))
			return -EBADMSG;
		memcpy(&size, zero + 1, sizeof size);
		at = zero + 1 + sizeof size;
		if ((size_t)(end - at) < size)
			return -EBADMSG;
		long ret = sbx_sys(SYS_fsetxattr, fd, name, at, size, 0);
		if (ret < 0)
			return ret;
		at += size;
	}
	return 0;
}

/* Owner, mode, times; the mode last but for them, for a change of the owner clears bits of it. */
static long set_status(int fd, const struct sbx_entry *e)
{
	const struct timespec times[] = { { e->mtime, e->mtime_ns }, { e->mtime, e->mtime_ns } };

	long ret = sbx_sys(SYS_fchown, fd, e->uid, e->gid);
	if (ret >= 0)
		ret = sbx_sys(SYS_fchmod, fd, e->mode & 07777);
	return ret < 0 ? ret : sbx_sys(SYS_utimensat, fd, NULL, times, 0);
}

static long get_data(struct unpack *p, int fd, const struct sbx_entry *data)
{
	int64_t left = data->size;

	if (left < 0 || data->offset < 0 || sbx_sys(SYS_lseek, fd, data->offset, SEEK_SET) < 0)
		return -EBADMSG;
	while (left > 0) {
		const size_t chunk = left < (int64_t)sizeof p->data ? (size_t)left : sizeof p->data;
		long ret = sbx_transfer(SYS_read, p->stream, p->data, chunk);
		if (ret >= 0)
			ret = sbx_transfer(SYS_write, fd, p->data, chunk);
		if (ret < 0)
			return ret;
		left -= (int64_t)chunk;
	}
	return 0;
}

/* A file and what is in it; *e becomes the entry after that. */
static long make_file(struct unpack *p, struct sbx_entry *e)
{
	const int how = O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC;
	const struct sbx_entry file = *e;

	_cleanup_fd_ int fd = (int)sbx_sys(SYS_openat, p->at, p->name, how, 0600);
	long ret = fd < 0 ? fd : sbx_sys(SYS_ftruncate, fd, file.size);
	if (ret >= 0)
		ret = set_xattrs(p, fd, &file);
	if (ret >= 0 && file.ino) {
		char number[24];
		sbx_format_path(number, "", file.ino, "");
		ret = sbx_sys(SYS_linkat, p->at, p->name, p->links, number, 0);
	}
	while (ret >= 0 && (ret = get(p, e)) >= 0 && e->kind == SBX_ENTRY_DATA)
		ret = get_data(p, fd, e);
	return ret < 0 ? ret : set_status(fd, &file);
}

/* A link, a fifo, a socket, a whiteout; or another name of something. */
static long make_other(struct unpack *p, const struct sbx_entry *e)
{
	const struct timespec times[] = { { e->mtime, e->mtime_ns }, { e->mtime, e->mtime_ns } };
	const char *name = p->name;
	char number[24];
	long ret;

	sbx_format_path(number, "", e->ino, "");
	if (e->kind == SBX_ENTRY_LINK)
		return sbx_sys(SYS_linkat, p->links, number, p->at, name, 0);
	if (S_ISLNK(e->mode))
		ret = sbx_sys(SYS_symlinkat, p->target, p->at, name);
	else if (S_ISFIFO(e->mode) || S_ISSOCK(e->mode) || (S_ISCHR(e->mode) && e->rdev == 0))
		ret = sbx_sys(SYS_mknodat, p->at, name, e->mode & S_IFMT, e->rdev);
	else
		return -EBADMSG;
	if (ret >= 0)
		ret = sbx_sys(SYS_fchownat, p->at, name, e->uid, e->gid, AT_SYMLINK_NOFOLLOW);
	if (ret >= 0 && !S_ISLNK(e->mode))
		ret = sbx_sys(SYS_fchmodat, p->at, name, e->mode & 07777);
	if (ret >= 0)
		ret = sbx_sys(SYS_utimensat, p->at, name, times, AT_SYMLINK_NOFOLLOW);
	return ret < 0 || !e->ino ? ret : sbx_sys(SYS_linkat, p->at, name, p->links, number, 0);
}

static long make_directory(struct unpack *p, const struct sbx_entry *e)
{
	if (p->depth == MAX_DEPTH)
		return -ELOOP;
	long ret = p->depth ? sbx_sys(SYS_mkdirat, p->at, p->name, 0700) : 0;
	if (ret >= 0)
		ret = sbx_enter(&p->at, p->depth ? p->name : ".", 0);
	p->above[p->depth++] = *e;
	return ret < 0 ? ret : set_xattrs(p, p->at, e);
}

static long leave_directory(struct unpack *p)
{
	long ret = set_status(p->at, &p->above[--p->depth]);

	return ret < 0 || p->depth == 0 ? ret : sbx_enter(&p->at, "..", 0);
}

static long get_all(struct unpack *p)
{
	struct sbx_entry e;
	long ret = get(p, &e);

	if (ret >= 0 && (e.kind != SBX_ENTRY_ENTER || e.name))
		return -EBADMSG;
	while (ret >= 0) {
		const bool file = e.kind == SBX_ENTRY_OTHER && S_ISREG(e.mode);
		if (e.kind != SBX_ENTRY_LEAVE && p->depth && !name_ok(p->name, e.name))
			return -EBADMSG;
		if (file)
			ret = make_file(p, &e);
		else if (e.kind == SBX_ENTRY_ENTER)
			ret = make_directory(p, &e);
		else if (e.kind == SBX_ENTRY_LEAVE)
			ret = leave_directory(p);
		else if (e.kind == SBX_ENTRY_OTHER || e.kind == SBX_ENTRY_LINK)
			ret = make_other(p, &e);
		else
			return -EBADMSG;
		if (ret >= 0 && p->depth == 0)
			return 0;
		if (ret >= 0 && !file)
			ret = get(p, &e);
	}
	return ret;
}

/* Make the tree that comes from a stream in the empty directory `root`. `links` is another one. 0 or -errno. */
long sbx_unpack_tree(int root, int stream, int links)
{
	const int how = PROT_READ | PROT_WRITE;

	long map = sbx_sys(SYS_mmap, NULL, sizeof(struct unpack), how, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (map < 0 && map > -4096)
		return map;
	struct unpack *p = (struct unpack *)map;
	p->at = (int)sbx_sys(SYS_fcntl, root, F_DUPFD_CLOEXEC, 3);
	p->stream = stream;
	p->links = links;
	long ret = p->at < 0 ? p->at : get_all(p);
	sbx_close(p->at);
	(void)sbx_sys(SYS_munmap, map, sizeof *p);
	return ret;
}
