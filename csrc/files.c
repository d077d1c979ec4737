/*
 * files.c - file operations from inside: a launcher serves them to the host, one datagram at a time, with
 * the payload's rights (cred.c) and in the sandbox's own mount namespace. Whatever a payload does to links,
 * names and directories meanwhile, nothing here can lead to the host: openat2(2).
 *
 * A path is resolved from the sandbox's root, where links may be followed; or, if a directory came with the
 * request, from there, without any link and without a way up, so that a tree can be walked while it changes.
 */
#include "box.h"

#include <linux/magic.h>
#include <sys/stat.h>
#include <sys/statfs.h>

enum {
	PATH_ROOM = 4096,
	/* openat2 says EAGAIN where a rename raced with "..", EXDEV where with the way down */
	RETRIES = 64,
};

struct ask {
	const struct sbx_file_op *op;
	int root, dir; /* where paths begin; `dir` is -1, or came with the request */
	char *path, *second;
};

struct inbox {
	_Alignas(16) char bytes[sizeof(struct sbx_file_op) + 2 * PATH_ROOM];
};

/* --- paths ------------------------------------------------------------------------------------ */

static int look_up(const struct ask *a, const char *path, int flags, unsigned mode)
{
	const uint64_t beneath = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS;
	const uint64_t in_root = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS;
	int fd = -EAGAIN;

	for (int i = 0; i < RETRIES && (fd == -EAGAIN || fd == -EXDEV); i++)
		fd = a->dir >= 0 ? sbx_openat2(a->dir, path, flags, mode, beneath) :
				   sbx_openat2(a->root, path, flags, mode, in_root);
	return fd;
}

/*
 * Open the directory of the path's last part, which is copied to `name`. Shortens the path in place. The
 * root has no parent; a "." or ".." at the end names no entry.
 */
static int open_parent(const struct ask *a, char *path, char name[SBX_NAME_MAX])
{
	size_t end = strlen(path), start;

	while (end > 0 && path[end - 1] == '/')
		path[--end] = '\0';
	for (start = end; start > 0 && path[start - 1] != '/';)
		start--;
	size_t len = end - start;
	if (len == 0)
		return -EBUSY;
	if (len >= SBX_NAME_MAX)
		return -ENAMETOOLONG;
	if (path[start] == '.' && (len == 1 || (len == 2 && path[start + 1] == '.')))
		return -EINVAL;
	memcpy(name, path + start, len + 1);
	path[start] = '\0';
	return look_up(a, start ? path : ".", O_PATH | O_DIRECTORY, 0);
}

/* --- operations ------------------------------------------------------------------------------- */

/*
 * What is opened may be anything: the host looks at it. Only what happens by opening is decided here: no
 * fifo or device blocks (O_NONBLOCK), none becomes a terminal of ours, nothing but a real file is cut, and
 * the switches of proc, which a planted link may lead to, are nothing to write to.
 */
static int do_open(const struct ask *a)
{
	const uint32_t known = O_ACCMODE | O_CREAT | O_EXCL | O_TRUNC | O_APPEND | O_DIRECTORY | O_NOFOLLOW | O_PATH;
	uint32_t flags = a->op->flags;
	struct statfs fs;
	struct stat st;

	if (flags & ~known || a->op->mode & ~0777u)
		return -EINVAL;
	if (flags & O_PATH)
		return look_up(a, a->path, (int)(flags & (O_PATH | O_DIRECTORY | O_NOFOLLOW)), 0);
	int wanted = (int)(flags & ~(uint32_t)O_TRUNC) | O_NONBLOCK | O_NOCTTY;
	_cleanup_fd_ int fd = look_up(a, a->path, wanted, flags & O_CREAT ? a->op->mode : 0);
	if (fd < 0 || (flags & O_ACCMODE) == O_RDONLY)
		return sbx_steal_fd(&fd);
	long ret = sbx_sys(SYS_fstat, fd, &st);
	if (ret >= 0 && S_ISREG(st.st_mode)) {
		ret = sbx_sys(SYS_fstatfs, fd, &fs);
		if (ret >= 0 && (fs.f_type == PROC_SUPER_MAGIC || fs.f_type == SYSFS_MAGIC))
			ret = -EPERM;
		if (ret >= 0 && flags & O_TRUNC && st.st_size > 0)
			ret = sbx_sys(SYS_ftruncate, fd, 0);
	}
	return ret < 0 ? (int)ret : sbx_steal_fd(&fd);
}

static long make_one(const struct ask *a, char *path, unsigned mode)
{
	char name[SBX_NAME_MAX];

	_cleanup_fd_ int dir = open_parent(a, path, name);
	return dir < 0 ? dir : sbx_sys(SYS_mkdirat, dir, name, mode);
}

/* Each directory on the way, then the last one. What is there already, links too, is taken as it is. */
static long do_mkdir(const struct ask *a)
{
	char part[PATH_ROOM];
	size_t size = strlen(a->path);

	if (a->op->flags & ~(uint32_t)SBX_FILE_PARENTS || a->op->mode & ~01777u)
		return -EINVAL;
	for (size_t i = 1; a->op->flags & SBX_FILE_PARENTS && i < size; i++) {
		if (a->path[i] != '/' || a->path[i - 1] == '/')
			continue;
		memcpy(part, a->path, i);
		part[i] = '\0';
		long ret = make_one(a, part, 0755);
		if (ret < 0 && ret != -EEXIST && ret != -EINVAL) /* EINVAL: "." or ".." */
			return ret;
	}
	return make_one(a, a->path, a->op->mode);
}

static long do_unlink(const struct ask *a, int flags)
{
	char name[SBX_NAME_MAX];

	_cleanup_fd_ int dir = open_parent(a, a->path, name);
	return dir < 0 ? dir : sbx_sys(SYS_unlinkat, dir, name, flags);
}

static long do_rename(const struct ask *a)
{
	char from[SBX_NAME_MAX], to[SBX_NAME_MAX];

	_cleanup_fd_ int here = open_parent(a, a->path, from);
	if (here < 0)
		return here;
	_cleanup_fd_ int there = open_parent(a, a->second, to);
	return there < 0 ? there : sbx_sys(SYS_renameat2, here, from, there, to, 0);
}

static long do_symlink(const struct ask *a)
{
	char name[SBX_NAME_MAX];

	_cleanup_fd_ int dir = open_parent(a, a->second, name);
	return dir < 0 ? dir : sbx_sys(SYS_symlinkat, a->path, dir, name);
}

/* Through the descriptor's own name, because a file that its owner may not read cannot be opened otherwise. */
static long do_chmod(const struct ask *a)
{
	char name[32];

	if (a->op->mode & ~01777u) /* set-id bits could land in a directory of the host */
		return -EINVAL;
	if (a->dir >= 0 && !*a->path)
		return sbx_sys(SYS_fchmod, a->dir, a->op->mode);
	_cleanup_fd_ int fd = look_up(a, a->path, O_PATH, 0);
	if (fd < 0)
		return fd;
	sbx_format_path(name, "/proc/self/fd/", (unsigned)fd, "");
	return sbx_sys(SYS_fchmodat, AT_FDCWD, name, a->op->mode);
}

static long do_remove_tree(const struct ask *a)
{
	char name[SBX_NAME_MAX];

	_cleanup_fd_ int dir = open_parent(a, a->path, name);
	return dir < 0 ? dir : sbx_remove_tree(dir, name, false);
}

/* --- requests --------------------------------------------------------------------------------- */

/* Split a datagram of `len` bytes: one or two terminated strings behind the head, and nothing else. */
static long parse(struct ask *a, struct inbox *inbox, long len)
{
	const struct sbx_file_op *op = (const void *)inbox->bytes;
	size_t size = (size_t)len;

	if (size <= sizeof *op || op->magic != SBX_REQUEST_MAGIC || inbox->bytes[size - 1] != '\0')
		return -EPROTO;
	a->op = op;
	a->path = inbox->bytes + sizeof *op;
	size -= sizeof *op + strlen(a->path) + 1;
	a->second = a->path + strlen(a->path) + 1; /* if there is one */
	bool two = op->op == SBX_FILE_RENAME || op->op == SBX_FILE_SYMLINK;
	if (two != (size > 0) || (size && strlen(a->second) + 1 != size))
		return -EPROTO;
	if (strlen(a->path) >= PATH_ROOM || size > PATH_ROOM)
		return -ENAMETOOLONG;
	bool plain = op->op != SBX_FILE_OPEN && op->op != SBX_FILE_MKDIR;
	return plain && op->flags ? -EINVAL : 0;
}

/* Returns a descriptor (never 0) for OPEN, 0 for the others, or -errno. */
static long perform(const struct ask *a)
{
	switch (a->op->op) {
	case SBX_FILE_OPEN:
		return do_open(a);
	case SBX_FILE_MKDIR:
		return do_mkdir(a);
	case SBX_FILE_UNLINK:
		return do_unlink(a, 0);
	case SBX_FILE_RMDIR:
		return do_unlink(a, AT_REMOVEDIR);
	case SBX_FILE_REMOVE_TREE:
		return do_remove_tree(a);
	case SBX_FILE_RENAME:
		return do_rename(a);
	case SBX_FILE_SYMLINK:
		return do_symlink(a);
	case SBX_FILE_CHMOD:
		return do_chmod(a);
	default:
		return -EINVAL;
	}
}

/* One request. Returns false when there will be no more. */
static bool serve(int sock, int root, struct inbox *inbox)
{
	struct sbx_record done = { .kind = SBX_RECORD_DONE };
	_cleanup_fd_ int dir = -1;
	_cleanup_fd_ int fd = -1;
	size_t nfds = 1;

	long len = sbx_receive(sock, inbox->bytes, sizeof inbox->bytes, &dir, &nfds), ret = len;
	if (len <= 0 && len != -EMSGSIZE && len != -EMFILE)
		return false;
	if (len > 0) {
		struct ask a = { .root = root, .dir = dir };
		ret = parse(&a, inbox, len);
		if (ret == 0)
			ret = perform(&a);
		if (ret > 0)
			fd = (int)ret;
	}
	done.error.err = ret < 0 ? (int32_t)-ret : 0;
	return sbx_send_record(sock, &done, NULL, 0, fd) >= 0;
}

void sbx_files_serve(const struct sbx_box *box, int sock)
{
	struct sbx_error err;
	struct inbox inbox;

	if (sbx_cred_borrow(box->plan, box->plan->uid, box->plan->gid, &err) < 0) {
		sbx_send_error(sock, &err);
		return;
	}
	_cleanup_fd_ int root = (int)sbx_sys(SYS_openat, AT_FDCWD, "/", O_PATH | O_DIRECTORY | O_CLOEXEC);
	while (root >= 0 && serve(sock, root, &inbox))
		;
	if (sbx_cred_borrow(box->plan, 0, 0, &err) < 0)
		(void)syscall(SYS_exit_group, 1); /* never serve commands half as somebody else */
}
