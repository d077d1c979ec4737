/*
 * mount.c - executes the plan's mounts through the descriptor-based mount API.
 *
 * fsopen, fsmount, open_tree, move_mount (Linux 5.2), openat2 (5.6), mount_setattr (5.12): see the
 * man pages by these names. A mount point is always a descriptor obtained below the new root without
 * following any symbolic link, so nothing that a directory's owner plants can redirect a mount; a
 * mount's attributes are set on the detached tree, before anybody can see it.
 */
#include "box.h"

#include <sys/mount.h>
#include <sys/stat.h>

static const struct sbx_mount *mount_at(const struct sbx_plan *p, uint32_t index)
{
	return (const struct sbx_mount *)sbx_at(p, p->mounts.off) + index;
}

/* Give a detached tree the attributes and id maps of what it is to be. */
static int dress(int tree, const struct sbx_source *source, int proc)
{
	struct mount_attr attr = { .attr_set = source->attrs, .propagation = MS_PRIVATE };
	_cleanup_fd_ int userns = -1;

	if (source->uid_map) {
		userns = sbx_idmap_userns(proc, source->uid_map, source->gid_map);
		if (userns < 0)
			return userns;
		attr.attr_set |= MOUNT_ATTR_IDMAP;
		attr.userns_fd = (__u64)userns;
	}
	return (int)sbx_mount_setattr(tree, source->recursive, &attr);
}

/* A detached copy of what is mounted there, with these attributes and id maps. */
int sbx_mount_clone(const struct sbx_source *source, int proc)
{
	struct stat st;

	_cleanup_fd_ int fd = sbx_openat2(AT_FDCWD, source->path, O_PATH, 0,
					  RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS);
	long ret = fd < 0 ? fd : sbx_sys(SYS_fstat, fd, &st);
	if (ret < 0)
		return (int)ret;
	if (S_ISDIR(st.st_mode) != source->dir) /* swapped since the plan was made */
		return S_ISDIR(st.st_mode) ? -EISDIR : -ENOTDIR;
	if (source->same && (source->same->st_dev != st.st_dev || source->same->st_ino != st.st_ino))
		return -ESTALE;
	_cleanup_fd_ int tree = sbx_open_tree(fd, "", AT_EMPTY_PATH | source->recursive);
	if (tree < 0)
		return tree;
	ret = dress(tree, source, proc);
	return ret < 0 ? (int)ret : sbx_steal_fd(&tree);
}

/* A detached, recursive copy of a bind's source with the bind's attributes; or what is on the block device that it is. */
static int open_bind(const struct sbx_plan *p, const struct sbx_mount *m, int proc)
{
	const struct sbx_source source = {
		.path = sbx_str(p, m->source),
		.uid_map = sbx_optional(p, m->uid_map),
		.gid_map = sbx_optional(p, m->gid_map),
		.attrs = m->attrs,
		.recursive = m->options ? 0 : AT_RECURSIVE,
		.dir = m->flags & SBX_MOUNT_DIR,
	};

	if (!m->options)
		return sbx_mount_clone(&source, proc);
	_cleanup_fd_ int tree = sbx_mount_fs("ext4", sbx_str(p, m->options), 0);
	int ret = tree < 0 ? tree : dress(tree, &source, proc);
	return ret < 0 ? ret : sbx_steal_fd(&tree);
}

int sbx_mount_open_source(const struct sbx_plan *p, uint32_t index, int proc, struct sbx_error *err)
{
	int tree = open_bind(p, mount_at(p, index), proc);
	return tree < 0 ? sbx_fail(err, SBX_STAGE_SOURCE, index, tree) : tree;
}

/* Make the missing parts of an absolute path below `root`; the last part a file unless `dir`. */
static long make_target(int root, const char *path, bool dir)
{
	char name[SBX_NAME_MAX];

	_cleanup_fd_ int at = sbx_path_parent(root, path, true, name);
	if (at < 0)
		return at;
	return dir ? sbx_sys(SYS_mkdirat, at, name, 0755) : sbx_sys(SYS_mknodat, at, name, S_IFREG | 0644, 0);
}

/* An O_PATH descriptor of a mount's target, at `path` below `root`, and whether it is a directory. */
static int open_target(const struct sbx_plan *p, uint32_t index, int root, const char *path, bool *dir,
		       struct sbx_error *err)
{
	struct stat st;

	_cleanup_fd_ int fd = sbx_openat2(root, path, O_PATH | O_NOFOLLOW, 0, SBX_RESOLVE_STRICT);
	if (fd == -ENOENT && mount_at(p, index)->flags & SBX_MOUNT_CREATE) {
		long ret = make_target(root, path, *dir);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_MOUNT, index, ret);
		fd = sbx_openat2(root, path, O_PATH | O_NOFOLLOW, 0, SBX_RESOLVE_STRICT);
	}
	if (fd < 0)
		return sbx_fail(err, SBX_STAGE_MOUNT, index, fd);
	long ret = sbx_sys(SYS_fstat, fd, &st);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_MOUNT, index, ret);
	if (S_ISLNK(st.st_mode))
		return sbx_fail(err, SBX_STAGE_MOUNT, index, -ELOOP);
	*dir = S_ISDIR(st.st_mode);
	return sbx_steal_fd(&fd);
}

/* Attach the detached `tree` of mounts[index] at `path` below `root`. */
int sbx_mount_attach_at(const struct sbx_plan *p, uint32_t index, int root, const char *path, int tree,
			struct sbx_error *err)
{
	const struct sbx_mount *m = mount_at(p, index);
	bool dir = m->kind != SBX_MOUNT_BIND || (m->flags & SBX_MOUNT_DIR);

	_cleanup_fd_ int target = open_target(p, index, root, path, &dir, err);
	if (target < 0)
		return -1;
	int ret = sbx_move_mount(tree, target);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_MOUNT, index, ret) : 0;
}

/* The same at its target. */
int sbx_mount_attach(const struct sbx_plan *p, uint32_t index, int root, int tree, struct sbx_error *err)
{
	return sbx_mount_attach_at(p, index, root, sbx_str(p, mount_at(p, index)->target), tree, err);
}

/* Hide an existing target behind an empty directory or file of ours; `empty` is the void. */
int sbx_mount_mask(const struct sbx_plan *p, uint32_t index, int root, int empty, struct sbx_error *err)
{
	bool dir = true;

	_cleanup_fd_ int target = open_target(p, index, root, sbx_str(p, mount_at(p, index)->target), &dir, err);
	if (target < 0)
		return -1;
	_cleanup_fd_ int tree = sbx_open_tree(empty, dir ? SBX_VOID_DIR : SBX_VOID_FILE, AT_SYMLINK_NOFOLLOW);
	if (tree < 0)
		return sbx_fail(err, SBX_STAGE_MOUNT, index, tree);
	/* rootless, the empty things have the payload's own id, and all sandboxes of a plan share them */
	int ret = sbx_mount_setattr(tree, 0, &(struct mount_attr){ .attr_set = MOUNT_ATTR_RDONLY });
	if (ret >= 0)
		ret = sbx_move_mount(tree, target);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_MOUNT, index, ret) : 0;
}

static long cover_one(const char *name, bool mask)
{
	const unsigned long frozen = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC;
	char path[300] = "/proc/";
	size_t len = strlen(name);

	if (len == 0 || len >= sizeof path - 6)
		return -ENAMETOOLONG;
	memcpy(path + 6, name, len + 1);
	const char *source = !mask ? path : name[len - 1] == '/' ? SBX_VOID_DIR : SBX_VOID_EMPTY;
	long ret = sbx_sys(SYS_mount, source, path, NULL, MS_BIND, NULL);
	if (ret == -ENOENT && sbx_absent(AT_FDCWD, path)) /* what this kernel's proc lacks needs no cover */
		return 0;
	return ret < 0 || mask ? ret : sbx_sys(SYS_mount, NULL, path, NULL, frozen, NULL);
}

/*
 * Hide or freeze single entries of the sandbox's fresh proc, which nothing but this process has touched
 * yet. Called with the void as the working directory: the old mount(2) takes 3 us where open_tree and
 * move_mount take 8.
 */
static int cover_proc(const struct sbx_plan *p, struct sbx_error *err)
{
	const char *name = sbx_str(p, p->masks.off);
	uint32_t index = 0;

	for (uint32_t i = 0; i < p->masks.count; i++, index++, name = sbx_next(name)) {
		long ret = cover_one(name, true);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_PROC, index, ret);
	}
	name = sbx_str(p, p->readonly.off);
	for (uint32_t i = 0; i < p->readonly.count; i++, index++, name = sbx_next(name)) {
		long ret = cover_one(name, false);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_PROC, index, ret);
	}
	return 0;
}

static int mount_late(const struct sbx_plan *p, uint32_t index, int root, int void_fd, struct sbx_error *err)
{
	const struct sbx_mount *m = mount_at(p, index);
	char stage[16];

	if (m->kind == SBX_MOUNT_MASK)
		return sbx_mount_mask(p, index, root, void_fd, err);
	sbx_format_path(stage, "", index, "");
	_cleanup_fd_ int tree = sbx_open_tree(void_fd, stage, AT_RECURSIVE);
	if (tree < 0)
		return sbx_fail(err, SBX_STAGE_MOUNT, index, tree);
	return sbx_mount_attach(p, index, root, tree, err);
}

/*
 * The scratch: one tmpfs for everything private and writable, so that one size and one inode limit
 * hold for the whole sandbox. It is attached in the void, which proc covers later, because
 * open_tree(2) clones only attached mounts before Linux 6.15.
 */
static int attach_scratch(const struct sbx_plan *p, int void_fd)
{
	_cleanup_fd_ int scratch = sbx_mount_fs("tmpfs", sbx_optional(p, p->scratch_options),
						MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
	if (scratch < 0)
		return scratch;
	_cleanup_fd_ int at = sbx_openat2(void_fd, SBX_VOID_SCRATCH, O_PATH | O_DIRECTORY, 0, SBX_RESOLVE_STRICT);
	int ret = at < 0 ? at : sbx_move_mount(scratch, at);
	return ret < 0 ? ret : sbx_steal_fd(&scratch);
}

/* One directory of the scratch: the payload's, with the mode of its use (/tmp 1777, ...). */
static int open_scratch(const struct sbx_plan *p, uint32_t index, int scratch)
{
	char name[16];

	sbx_format_path(name, "", index, "");
	long ret = sbx_sys(SYS_mkdirat, scratch, name, 0700);
	if (ret >= 0)
		ret = sbx_sys(SYS_fchownat, scratch, name, p->uid, p->gid, AT_SYMLINK_NOFOLLOW);
	if (ret >= 0)
		ret = sbx_sys(SYS_fchmodat, scratch, name, mount_at(p, index)->mode);
	return ret < 0 ? (int)ret : sbx_open_tree(scratch, name, 0);
}

static int open_fresh(const struct sbx_box *box, uint32_t index, int scratch)
{
	const struct sbx_plan *p = box->plan;
	const struct sbx_mount *m = mount_at(p, index);

	if (m->kind == SBX_MOUNT_OVERLAY)
		return sbx_overlay_open(p, index, scratch, &box->layers);
	if (m->kind == SBX_MOUNT_SCRATCH)
		return open_scratch(p, index, scratch);
	const char *type = m->kind == SBX_MOUNT_PROC ? "proc" : m->kind == SBX_MOUNT_TMPFS ? "tmpfs" : "devpts";
	return sbx_mount_fs(type, sbx_optional(p, m->options), m->attrs);
}

/* Where mounts are made: descriptors of the root, of the void and of the scratch; and of the sandbox's own proc. */
struct site {
	int root, void_fd, scratch, proc;
};

static void leave_site(struct site *at)
{
	sbx_close(at->root);
	sbx_close(at->void_fd);
	sbx_close(at->scratch);
	sbx_close(at->proc);
}

/* The void becomes the working directory, for the sources of masks and overlays. */
static int enter_site(struct site *at, struct sbx_error *err)
{
	at->root = sbx_openat2(AT_FDCWD, "/", O_PATH | O_DIRECTORY, 0, 0);
	at->void_fd = at->root < 0 ? at->root :
				     sbx_openat2(at->root, SBX_VOID, O_PATH | O_DIRECTORY, 0, SBX_RESOLVE_STRICT);
	long ret = at->void_fd < 0 ? at->void_fd : sbx_sys(SYS_fchdir, at->void_fd);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_MOUNT, 0, ret) : 0;
}

/* The same on the writable root, which takes the place of the template's. */
static int change_root(const struct sbx_box *box, struct site *at, struct sbx_error *err)
{
	const struct sbx_plan *p = box->plan;

	if (!(p->flags & SBX_PLAN_WRITABLE_ROOT))
		return 0;
	if (sbx_overlay_enter(p, at->root, at->void_fd, at->scratch, &box->layers, err) < 0)
		return -1;
	leave_site(at);
	*at = (struct site){ -1, -1, -1, -1 };
	if (enter_site(at, err) < 0)
		return -1;
	at->scratch = sbx_openat2(at->void_fd, SBX_VOID_SCRATCH, O_PATH | O_DIRECTORY, 0, SBX_RESOLVE_STRICT);
	return at->scratch < 0 ? sbx_fail(err, SBX_STAGE_MOUNT, p->mounts.count, at->scratch) : 0;
}

static int mount_each(const struct sbx_box *box, struct site *at, struct sbx_error *err)
{
	const struct sbx_plan *p = box->plan;

	for (uint32_t i = p->flags & SBX_PLAN_OVERLAY_ROOT ? 1 : 0; i < p->mounts.count; i++) {
		const struct sbx_mount *m = mount_at(p, i);
		if (m->flags & SBX_MOUNT_LATE) {
			if (mount_late(p, i, at->root, at->void_fd, err) < 0)
				return -1;
		} else if (m->kind >= SBX_MOUNT_TMPFS) {
			_cleanup_fd_ int tree = open_fresh(box, i, at->scratch);
			if (tree < 0)
				return sbx_fail(err, SBX_STAGE_MOUNT, i, tree);
			if (sbx_mount_attach(p, i, at->root, tree, err) < 0)
				return -1;
			if (m->kind == SBX_MOUNT_PROC && at->proc < 0)
				at->proc = sbx_steal_fd(&tree);
		}
	}
	return 0;
}

/*
 * What each sandbox must have of its own, in its copy of the template: a writable root, proc of its pid
 * namespace, tmpfs, overlays, devpts, and the binds that lie below them.
 */
int sbx_mount_sandbox(struct sbx_box *box, struct sbx_error *err)
{
	__attribute__((cleanup(leave_site))) struct site at = { -1, -1, -1, -1 };
	const struct sbx_plan *p = box->plan;

	if (enter_site(&at, err) < 0)
		return -1;
	at.scratch = attach_scratch(p, at.void_fd);
	if (at.scratch < 0)
		return sbx_fail(err, SBX_STAGE_MOUNT, p->mounts.count, at.scratch);
	for (uint32_t i = 0; i < box->layers.count; i++) {
		int ret = sbx_overlay_add(at.scratch, box->layers.number[i], box->layer_fds[i]);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_MOUNT, p->mounts.count, ret);
	}
	if (change_root(box, &at, err) < 0 || mount_each(box, &at, err) < 0)
		return -1;
	if (sbx_cred_no_namespaces(at.proc, err) < 0 || cover_proc(p, err) < 0)
		return -1;
	if (box->resident && p->flags & SBX_PLAN_LAYERS)
		box->void_fd = sbx_steal_fd(&at.void_fd);
	long ret = sbx_sys(SYS_chdir, "/");
	return ret < 0 ? sbx_fail(err, SBX_STAGE_MOUNT, 0, ret) : 0;
}
