/*
 * shelf.c - the spawner keeps layers for sandboxes to come: a mount namespace with nothing else in it.
 *
 * A mount that is attached nowhere, as a descriptor brings it, can be attached once. To be cloned for one sandbox after
 * the other it has to be in the namespace of whoever clones it, open_tree(2). It lasts until it is taken from the shelf and
 * no sandbox uses it.
 */
#include "box.h"

#include <sys/mount.h>
#include <sys/stat.h>

static void name_layer(char name[32], uint64_t id)
{
	sbx_format_path(name, "/", id, "");
}

/* From any template: its void has a place for a file system, which becomes the root, and the rest goes. */
static int make_shelf(struct sbx_spawner *s, int mount_ns, struct sbx_error *err)
{
	if (setns(mount_ns, CLONE_NEWNS) < 0 || unshare(CLONE_NEWNS) < 0)
		return sbx_fail(err, SBX_STAGE_TEMPLATE, 11, -errno);
	_cleanup_fd_ int tree = sbx_mount_fs("tmpfs",
					     "mode\0"
					     "0700\0",
					     MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
	_cleanup_fd_ int at = tree < 0 ? tree :
					 sbx_openat2(AT_FDCWD, SBX_VOID "/" SBX_VOID_SCRATCH, O_PATH | O_DIRECTORY, 0,
						     RESOLVE_NO_SYMLINKS);
	int ret = at < 0 ? at : sbx_move_mount(tree, at);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_TEMPLATE, 12, ret);
	if (sbx_root_enter(tree, err) < 0)
		return -1;
	s->shelf_ns = openat(s->proc, "self/ns/mnt", O_RDONLY | O_CLOEXEC);
	return s->shelf_ns < 0 ? sbx_fail(err, SBX_STAGE_TEMPLATE, 13, -errno) : 0;
}

static int enter_shelf(const struct sbx_spawner *s, struct sbx_error *err)
{
	if (s->shelf_ns < 0)
		return sbx_fail(err, SBX_STAGE_TEMPLATE, 14, -ENOENT);
	return setns(s->shelf_ns, CLONE_NEWNS) < 0 ? sbx_fail(err, SBX_STAGE_TEMPLATE, 14, -errno) : 0;
}

/* Keep a layer under a number that the host has chosen. `mount_ns` is of any template. */
int sbx_shelf_put(struct sbx_spawner *s, int mount_ns, uint64_t id, int tree, struct sbx_error *err)
{
	char name[32];

	if ((s->shelf_ns < 0 ? make_shelf(s, mount_ns, err) : enter_shelf(s, err)) < 0)
		return -1;
	name_layer(name, id);
	long ret = sbx_sys(SYS_mkdirat, AT_FDCWD, name, 0700);
	_cleanup_fd_ int at = ret < 0 ? (int)ret : sbx_openat2(AT_FDCWD, name, O_PATH | O_DIRECTORY, 0, 0);
	ret = at < 0 ? at : sbx_move_mount(tree, at);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_TEMPLATE, 15, ret) : 0;
}

/* A mount of it, attached nowhere. */
int sbx_shelf_get(const struct sbx_spawner *s, uint64_t id, struct sbx_error *err)
{
	char name[32];

	if (enter_shelf(s, err) < 0)
		return -1;
	name_layer(name, id);
	int tree = sbx_open_tree(AT_FDCWD, name, AT_SYMLINK_NOFOLLOW);
	return tree < 0 ? sbx_fail(err, SBX_STAGE_TEMPLATE, 16, tree) : tree;
}

int sbx_shelf_drop(const struct sbx_spawner *s, uint64_t id, struct sbx_error *err)
{
	char name[32];

	if (enter_shelf(s, err) < 0)
		return -1;
	name_layer(name, id);
	long ret = sbx_sys(SYS_umount2, name, MNT_DETACH | UMOUNT_NOFOLLOW);
	if (ret >= 0)
		ret = sbx_sys(SYS_unlinkat, AT_FDCWD, name, AT_REMOVEDIR);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_TEMPLATE, 17, ret) : 0;
}

/* An empty layer under a number, that may become so large. */
static int make_layer(struct sbx_spawner *s, int mount_ns, uint64_t id, unsigned mebibytes, struct sbx_error *err)
{
	static const char start[] = "mode\0"
				    "0700\0"
				    "size";
	char options[64] = "";

	memcpy(options, start, sizeof start);
	sbx_format_path(options + sizeof start, "", mebibytes, "m");
	_cleanup_fd_ int tree = sbx_mount_fs("tmpfs", options, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV);
	return tree < 0 ? sbx_fail(err, SBX_STAGE_TEMPLATE, 18, tree) : sbx_shelf_put(s, mount_ns, id, tree, err);
}

static long unpack(int tree, int stream)
{
	long ret = sbx_sys(SYS_mkdirat, tree, "links", 0700);
	_cleanup_fd_ int links = ret < 0 ? (int)ret : sbx_openat2(tree, "links", O_PATH | O_DIRECTORY, 0, 0);
	ret = links < 0 ? links : sbx_unpack_tree(tree, stream, links);
	return ret < 0 ? ret : sbx_remove_tree(tree, "links", false);
}

/* A child does what takes as long as there is much of it, and answers. */
static int fork_for(const struct sbx_message *msg, int tree, const int *fds, struct sbx_error *err)
{
	const struct clone_args args = { .exit_signal = SIGCHLD };
	const struct sbx_record done = { .kind = SBX_RECORD_DONE };

	long pid = sbx_sys(SYS_clone3, &args, sizeof args);
	if (pid != 0)
		return pid < 0 ? sbx_fail(err, SBX_STAGE_TEMPLATE, 19, pid) : 0;
	long ret = msg->kind == SBX_MESSAGE_PACK ? sbx_pack_tree(tree, fds[1], msg->flags) : unpack(tree, fds[1]);
	if (ret < 0) {
		sbx_fail(err, SBX_STAGE_TEMPLATE, 20, ret);
		sbx_send_error(fds[0], err);
	} else {
		(void)sbx_send_record(fds[0], &done, NULL, 0, -1);
	}
	_exit(0);
}

/* PACK, UNPACK: with the answer's socket, and the stream. */
int sbx_shelf_stream(struct sbx_spawner *s, int mount_ns, const struct sbx_message *msg, const int *fds,
		     struct sbx_error *err)
{
	if (msg->kind == SBX_MESSAGE_UNPACK && make_layer(s, mount_ns, msg->plan, msg->flags, err) < 0)
		return -1;
	_cleanup_fd_ int tree = sbx_shelf_get(s, msg->plan, err);
	return tree < 0 ? -1 : fork_for(msg, tree, fds, err);
}
