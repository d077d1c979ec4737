/*
 * overlay.c - overlayfs: lower directories that stay as they are, and one for what is written, in the
 * scratch. Documentation/filesystems/overlayfs.rst; in a user namespace since Linux 5.11 ("userxattr").
 *
 * overlayfs takes paths, and copies the mounts that they lead to, which have to be in sight. So the template
 * parks every lower directory in the void, and the options name them relative to it, the working directory
 * while mounts are made.
 *
 * The root itself may be an overlay of the nodes and the layers of a root file system. One that nobody writes
 * to belongs to the template. A writable one is made in each sandbox; what the template has mounted on its own
 * root is then bound onto it. Those mounts cannot be moved: all that a new user namespace gets is locked,
 * mount_namespaces(7).
 */
#include "box.h"

#include <sys/mount.h>

static const struct sbx_mount *mount_at(const struct sbx_plan *p, uint32_t index)
{
	return (const struct sbx_mount *)sbx_at(p, p->mounts.off) + index;
}

/* Attach a detached tree in the void, under a name of its own. */
static long park(int void_fd, const char *name, int tree)
{
	long ret = sbx_sys(SYS_mkdirat, void_fd, name, 0700);
	_cleanup_fd_ int at = ret < 0 ? (int)ret :
					sbx_openat2(void_fd, name, O_PATH | O_DIRECTORY, 0, SBX_RESOLVE_STRICT);
	return at < 0 ? at : sbx_move_mount(tree, at);
}

static long park_lower(const struct sbx_plan *p, const struct sbx_lower *lower, int void_fd, const char *name, int proc)
{
	const struct sbx_source source = {
		.path = sbx_str(p, lower->source),
		.uid_map = sbx_optional(p, lower->uid_map),
		.gid_map = sbx_optional(p, lower->gid_map),
		.attrs = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV,
		.dir = true,
	};

	_cleanup_fd_ int tree = sbx_mount_clone(&source, proc);
	return tree < 0 ? tree : park(void_fd, name, tree);
}

/* Template: put everything that overlays are made of into the void. `root` has nothing mounted on it yet. */
int sbx_overlay_park(const struct sbx_plan *p, int root, int void_fd, int proc, struct sbx_error *err)
{
	const struct mount_attr readonly = { .attr_set = MOUNT_ATTR_RDONLY };
	const struct sbx_lower *lower = sbx_at(p, p->lowers.off);
	char name[32], number[16];

	if (p->flags & SBX_PLAN_OVERLAY_ROOT) {
		_cleanup_fd_ int nodes = sbx_open_tree(root, "", AT_EMPTY_PATH);
		long ret = nodes < 0 ? nodes : sbx_mount_setattr(nodes, 0, &readonly);
		if (ret >= 0)
			ret = park(void_fd, SBX_VOID_NODES, nodes);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_MOUNT, 0, ret);
	}
	for (uint32_t i = 0; i < p->mounts.count; i++)
		for (uint32_t k = 0; k < mount_at(p, i)->lowers; k++) {
			sbx_format_path(number, ".", k, "");
			sbx_format_path(name, "", i, number);
			long ret = park_lower(p, lower + mount_at(p, i)->lower + k, void_fd, name, proc);
			if (ret < 0)
				return sbx_fail(err, SBX_STAGE_SOURCE, i, ret);
		}
	return 0;
}

/* The directories "uINDEX" and "wINDEX" of the scratch: upperdir, with the root's owner and mode, and workdir. */
static long make_upper(const struct sbx_plan *p, uint32_t index, int scratch)
{
	char name[16];

	sbx_format_path(name, "w", index, "");
	long ret = sbx_sys(SYS_mkdirat, scratch, name, 0700);
	if (ret < 0)
		return ret;
	sbx_format_path(name, "u", index, "");
	ret = sbx_sys(SYS_mkdirat, scratch, name, 0700);
	if (ret >= 0)
		ret = sbx_sys(SYS_fchownat, scratch, name, p->uid, p->gid, AT_SYMLINK_NOFOLLOW);
	return ret < 0 ? ret : sbx_sys(SYS_fchmodat, scratch, name, mount_at(p, index)->mode);
}

/* mounts[index], detached. The void is the working directory. With `scratch` < 0 nobody can write to it. */
int sbx_overlay_open(const struct sbx_plan *p, uint32_t index, int scratch)
{
	const struct sbx_mount *m = mount_at(p, index);

	long ret = scratch < 0 ? 0 : make_upper(p, index, scratch);
	return ret < 0 ? (int)ret : sbx_mount_fs("overlay", sbx_str(p, m->options), m->attrs);
}

/* Template: cover `root` with the overlay that becomes the root, and take the void along. Returns the overlay. */
int sbx_overlay_template(const struct sbx_plan *p, int root, int void_fd, struct sbx_error *err)
{
	long ret = sbx_sys(SYS_fchdir, void_fd);
	_cleanup_fd_ int over = ret < 0 ? (int)ret : sbx_overlay_open(p, 0, -1);
	ret = over < 0 ? over : sbx_move_mount(over, root);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_MOUNT, 0, ret);
	_cleanup_fd_ int at = sbx_openat2(over, SBX_VOID, O_PATH | O_DIRECTORY, 0, SBX_RESOLVE_STRICT);
	ret = at < 0 ? at : sbx_move_mount(void_fd, at);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_MOUNT, 0, ret) : sbx_steal_fd(&over);
}

/* Bind what lies at `path` in the template's root to the same place of the overlay. */
static long carry(int root, int over, const char *path)
{
	_cleanup_fd_ int tree = sbx_open_tree(root, path + 1, AT_RECURSIVE | AT_SYMLINK_NOFOLLOW);
	if (tree < 0)
		return tree;
	_cleanup_fd_ int at = sbx_openat2(over, path, O_PATH | O_NOFOLLOW, 0, SBX_RESOLVE_STRICT);
	return at < 0 ? at : sbx_move_mount(tree, at);
}

/* Sandbox: make the writable root, and let go of the template's, `root`. */
int sbx_overlay_enter(const struct sbx_plan *p, int root, int scratch, struct sbx_error *err)
{
	const char *path = sbx_str(p, p->carried.off);

	_cleanup_fd_ int over = sbx_overlay_open(p, 0, scratch);
	long ret = over < 0 ? over : sbx_move_mount(over, root);
	for (uint32_t i = 0; i < p->carried.count && ret >= 0; i++, path = sbx_next(path))
		ret = carry(root, over, path);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_MOUNT, 0, ret) : sbx_root_enter(over, err);
}
