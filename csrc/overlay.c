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
#include <sys/stat.h>

static const struct sbx_mount *mount_at(const struct sbx_plan *p, uint32_t index)
{
	return (const struct sbx_mount *)sbx_at(p, p->mounts.off) + index;
}

/* As "lNUMBER/uINDEX", a layer's part for mounts[index], or "INDEX.NUMBER", a lower directory of the plan's. */
static void name_part(char name[40], const char *prefix, uint32_t number, const char *kind, uint32_t index)
{
	char tail[16];

	sbx_format_path(tail, kind, index, "");
	sbx_format_path(name, prefix, number, tail);
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
	char name[40];

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
			name_part(name, "", i, ".", k);
			long ret = park_lower(p, lower + mount_at(p, i)->lower + k, void_fd, name, proc);
			if (ret < 0)
				return sbx_fail(err, SBX_STAGE_SOURCE, i, ret);
		}
	return 0;
}

/* Attach a layer that came as a descriptor in the scratch, under its number. */
int sbx_overlay_add(int scratch, uint32_t number, int tree)
{
	char name[16];

	sbx_format_path(name, "l", number, "");
	return (int)park(scratch, name, tree);
}

/* upperdir and workdir of mounts[index] in the scratch. */
static long make_upper(const struct sbx_plan *p, uint32_t index, int scratch, const struct sbx_layers *l)
{
	const int how = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
	char name[40];

	sbx_format_path(name, "l", l->upper, "");
	long ret = sbx_sys(SYS_mkdirat, scratch, name, 0700);
	if (ret < 0 && ret != -EEXIST)
		return ret;
	name_part(name, "l", l->upper, "/w", index);
	ret = sbx_sys(SYS_mkdirat, scratch, name, 0700);
	if (ret < 0)
		return ret;
	name_part(name, "l", l->upper, "/u", index);
	ret = sbx_sys(SYS_mkdirat, scratch, name, 0700);
	_cleanup_fd_ int upper = ret < 0 ? (int)ret : (int)sbx_sys(SYS_openat, scratch, name, how, 0);
	if (upper < 0)
		return upper;
	if (l->count == 0) {
		ret = sbx_sys(SYS_fchown, upper, p->uid, p->gid);
		return ret < 0 ? ret : sbx_sys(SYS_fchmod, upper, mount_at(p, index)->mode);
	}
	name_part(name, "l", l->number[0], "/u", index);
	_cleanup_fd_ int below = (int)sbx_sys(SYS_openat, scratch, name, how, 0);
	return below < 0 ? below : sbx_copy_attributes(below, upper, false); /* the overlay's root looks as before */
}

static long set_path(int fs, const char *key, uint32_t number, const char *kind, uint32_t index)
{
	char path[40];

	name_part(path, SBX_VOID_SCRATCH "/l", number, kind, index);
	return sbx_sys(SYS_fsconfig, fs, FSCONFIG_SET_STRING, key, path, 0);
}

/* The sandbox's layers, the topmost first; below them what the plan names. "lowerdir+": Linux 6.5. */
static long set_lowers(int fs, const struct sbx_plan *p, uint32_t index, const struct sbx_layers *l)
{
	char name[40];
	long ret = 0;

	for (uint32_t i = 0; i < l->count && ret >= 0; i++)
		ret = set_path(fs, "lowerdir+", l->number[i], "/u", index);
	if (ret >= 0 && index == 0 && p->flags & SBX_PLAN_OVERLAY_ROOT)
		ret = sbx_sys(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "lowerdir+", SBX_VOID_NODES, 0);
	for (uint32_t k = 0; k < mount_at(p, index)->lowers && ret >= 0; k++) {
		name_part(name, "", index, ".", k);
		ret = sbx_sys(SYS_fsconfig, fs, FSCONFIG_SET_STRING, "lowerdir+", name, 0);
	}
	return ret;
}

/* mounts[index] as a detached overlay that is written to. The void is the working directory. */
int sbx_overlay_open(const struct sbx_plan *p, uint32_t index, int scratch, const struct sbx_layers *l)
{
	long ret = make_upper(p, index, scratch, l);
	_cleanup_fd_ int fs = ret < 0 ? (int)ret : sbx_fsopen("overlay");
	if (fs < 0)
		return fs;
	ret = set_lowers(fs, p, index, l);
	if (ret >= 0)
		ret = set_path(fs, "upperdir", l->upper, "/u", index);
	if (ret >= 0)
		ret = set_path(fs, "workdir", l->upper, "/w", index);
	if (ret >= 0)
		ret = sbx_sys(SYS_fsconfig, fs, FSCONFIG_SET_FLAG, "userxattr", NULL, 0);
	if (ret >= 0)
		ret = sbx_sys(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0);
	return ret < 0 ? (int)ret : (int)sbx_sys(SYS_fsmount, fs, FSMOUNT_CLOEXEC, mount_at(p, index)->attrs);
}

/* Template: cover `root` with the overlay that becomes the root, and take the void along. Returns the overlay. */
int sbx_overlay_template(const struct sbx_plan *p, int root, int void_fd, struct sbx_error *err)
{
	long ret = sbx_sys(SYS_fchdir, void_fd);
	const struct sbx_mount *m = mount_at(p, 0);
	_cleanup_fd_ int over = ret < 0 ? (int)ret : sbx_mount_fs("overlay", sbx_str(p, m->options), m->attrs);
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

/*
 * What the plan says the template has, from `root` to `over`, and the void, proc on it if there is one. Returns the
 * new void.
 */
int sbx_overlay_carry(const struct sbx_plan *p, int root, int over, int void_fd)
{
	const char *path = sbx_str(p, p->carried.off);
	long ret = 0;

	for (uint32_t i = 0; i < p->carried.count && ret >= 0; i++, path = sbx_next(path))
		ret = carry(root, over, path);
	_cleanup_fd_ int tree = ret < 0 ? (int)ret : sbx_open_tree(void_fd, "", AT_EMPTY_PATH | AT_RECURSIVE);
	_cleanup_fd_ int at = tree < 0 ? tree :
					 sbx_openat2(over, SBX_VOID, O_PATH | O_DIRECTORY, 0, SBX_RESOLVE_STRICT);
	ret = at < 0 ? at : sbx_move_mount(tree, at);
	return ret < 0 ? (int)ret : sbx_steal_fd(&tree);
}

/* Sandbox: make the writable root, and let go of the template's, `root`. */
int sbx_overlay_enter(const struct sbx_plan *p, int root, int void_fd, int scratch, const struct sbx_layers *l,
		      struct sbx_error *err)
{
	_cleanup_fd_ int over = sbx_overlay_open(p, 0, scratch, l);
	long ret = over < 0 ? over : sbx_move_mount(over, root);
	_cleanup_fd_ int fresh = ret < 0 ? (int)ret : sbx_overlay_carry(p, root, over, void_fd);
	return fresh < 0 ? sbx_fail(err, SBX_STAGE_MOUNT, 0, fresh) : sbx_root_enter(over, err);
}
