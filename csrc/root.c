/*
 * root.c - the template's root: a small tmpfs of our own, filled with nodes, then entered.
 *
 * The root is never a host directory, so every mount point can be made without writing to the host.
 */
#include "box.h"

#include <sys/mount.h>
#include <sys/stat.h>

static long fill_node(int root, const struct sbx_plan *p, const struct sbx_node *node)
{
	const char *path = sbx_str(p, node->path) + 1;
	const char *data = sbx_str(p, node->data);

	if (node->kind == SBX_NODE_DIR)
		return sbx_sys(SYS_mkdirat, root, path, node->mode);
	if (node->kind == SBX_NODE_SYMLINK)
		return sbx_sys(SYS_symlinkat, data, root, path);
	_cleanup_fd_ int fd = (int)sbx_sys(SYS_openat, root, path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC,
					   node->mode);
	if (fd < 0)
		return fd;
	long ret = node->size ? sbx_sys(SYS_write, fd, data, node->size) : 0;
	return ret < 0 ? ret : ret == (long)node->size ? 0 : -ENOSPC;
}

static long make_node(int root, const struct sbx_plan *p, const struct sbx_node *node)
{
	long ret = fill_node(root, p, node);

	if (ret < 0 || !p->node_uid)
		return ret;
	return sbx_sys(SYS_fchownat, root, sbx_str(p, node->path) + 1, p->node_uid, p->node_gid, AT_SYMLINK_NOFOLLOW);
}

/* A detached tmpfs holding the plan's nodes. Returns its descriptor. */
int sbx_root_build(const struct sbx_plan *p, struct sbx_error *err)
{
	const struct sbx_node *node = sbx_at(p, p->nodes.off);

	_cleanup_fd_ int root = sbx_mount_fs("tmpfs", sbx_optional(p, p->root_options),
					     MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
	if (root < 0)
		return sbx_fail(err, SBX_STAGE_ROOT, 0, root);
	for (uint32_t i = 0; i < p->nodes.count; i++, node++) {
		long ret = make_node(root, p, node);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_NODE, i, ret);
	}
	return sbx_steal_fd(&root);
}

/* A detached tmpfs with the empty things that masks are made of. Not yet read-only. */
int sbx_root_void(struct sbx_error *err)
{
	static const struct {
		const char *name;
		mode_t mode;
	} nodes[] = {
		{ SBX_VOID_DIR, S_IFDIR },	   { SBX_VOID_FILE, S_IFREG },	  { SBX_VOID_EMPTY, S_IFREG | 0444 },
		{ SBX_VOID_PROC, S_IFDIR | 0555 }, { SBX_VOID_SCRATCH, S_IFDIR },
	};

	_cleanup_fd_ int fd = sbx_mount_fs("tmpfs",
					   "mode\0"
					   "0755\0"
					   "size\0"
					   "64k\0",
					   MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
	if (fd < 0)
		return sbx_fail(err, SBX_STAGE_ROOT, 1, fd);
	for (size_t i = 0; i < SBX_COUNT(nodes); i++) {
		long ret = S_ISDIR(nodes[i].mode) ? sbx_sys(SYS_mkdirat, fd, nodes[i].name, nodes[i].mode & 07777) :
						    sbx_sys(SYS_mknodat, fd, nodes[i].name, nodes[i].mode, 0);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_ROOT, 1, ret);
	}
	return sbx_steal_fd(&fd);
}

/* Make the attached tmpfs `root` the root of this mount namespace and drop the host's tree. */
int sbx_root_enter(int root, struct sbx_error *err)
{
	long ret = sbx_sys(SYS_fchdir, root);
	if (ret >= 0)
		ret = sbx_sys(SYS_pivot_root, ".", ".");
	if (ret >= 0) /* pivot_root(2), NOTES: the old root now lies on top of the new one */
		ret = sbx_sys(SYS_umount2, ".", MNT_DETACH);
	if (ret >= 0)
		ret = sbx_sys(SYS_chdir, "/");
	return ret < 0 ? sbx_fail(err, SBX_STAGE_ROOT, 2, ret) : 0;
}
