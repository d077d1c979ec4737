/*
 * template.c - a mount namespace prepared once per plan; each sandbox starts as a copy of it.
 *
 * The builder is a process of its own: it sees the host's tree, copies what the plan names, builds
 * the root, pivots into it and lets go of everything else. The spawner then takes the namespace by
 * descriptor and the builder ends. While it works, the new root lies over the host's /proc, the one
 * directory that no plan may name as a source.
 */
#include "box.h"

#include <poll.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>

/* A private copy of the host's mount namespace. */
static int enter_host_tree(const struct sbx_spawner *s, struct sbx_error *err)
{
	long ret = sbx_source_enter(s);

	if (ret >= 0)
		ret = sbx_sys(SYS_unshare, CLONE_NEWNS);
	if (ret >= 0)
		ret = sbx_sys(SYS_mount, NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_TEMPLATE, 0, ret) : 0;
}

/* The kernel lets a user namespace mount proc only where a whole one is in sight already. */
static int open_whole_proc(const struct sbx_plan *p)
{
	if (p->flags & SBX_PLAN_FRESH_PROC)
		return sbx_mount_fs("proc", NULL, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
	return sbx_open_tree(AT_FDCWD, "/proc", AT_RECURSIVE);
}

/* Attach the root over /proc, the void in it, and the whole proc in the void. Returns the void. */
static int attach_root(const struct sbx_plan *p, int root, struct sbx_error *err)
{
	_cleanup_fd_ int proc = open_whole_proc(p);
	if (proc < 0)
		return sbx_fail(err, SBX_STAGE_TEMPLATE, 1, proc);
	_cleanup_fd_ int over = sbx_openat2(AT_FDCWD, "/proc", O_PATH | O_DIRECTORY, 0, RESOLVE_NO_SYMLINKS);
	int ret = over < 0 ? over : sbx_move_mount(root, over);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_TEMPLATE, 2, ret);

	_cleanup_fd_ int void_fd = sbx_root_void(err);
	if (void_fd < 0)
		return -1;
	_cleanup_fd_ int at = sbx_openat2(root, SBX_VOID, O_PATH | O_DIRECTORY, 0, SBX_RESOLVE_STRICT);
	ret = at < 0 ? at : sbx_move_mount(void_fd, at);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_TEMPLATE, 3, ret);
	_cleanup_fd_ int below = sbx_openat2(void_fd, SBX_VOID_PROC, O_PATH | O_DIRECTORY, 0, SBX_RESOLVE_STRICT);
	ret = below < 0 ? below : sbx_move_mount(proc, below);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_TEMPLATE, 4, ret);
	return sbx_steal_fd(&void_fd);
}

/* Park a bind that lies below a per-sandbox mount in the void, under its index. */
static int stage_late(int void_fd, uint32_t index, bool dir, int tree, struct sbx_error *err)
{
	char name[16];

	sbx_format_path(name, "", index, "");
	long ret = dir ? sbx_sys(SYS_mkdirat, void_fd, name, 0) : sbx_sys(SYS_mknodat, void_fd, name, S_IFREG, 0);
	_cleanup_fd_ int at = ret < 0 ? (int)ret : sbx_openat2(void_fd, name, O_PATH, 0, SBX_RESOLVE_STRICT);
	ret = at < 0 ? at : sbx_move_mount(tree, at);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_MOUNT, index, ret) : 0;
}

static int attach_mounts(const struct sbx_spawner *s, const struct sbx_plan *p, int root, int void_fd,
			 struct sbx_error *err)
{
	const struct sbx_mount *m = sbx_at(p, p->mounts.off);

	for (uint32_t i = 0; i < p->mounts.count; i++, m++) {
		int ret = 0;
		if (m->kind == SBX_MOUNT_BIND) {
			_cleanup_fd_ int tree = sbx_mount_open_source(p, i, s->proc, err);
			if (tree < 0)
				return -1;
			ret = m->flags & SBX_MOUNT_LATE ? stage_late(void_fd, i, m->flags & SBX_MOUNT_DIR, tree, err) :
							  sbx_mount_attach(p, i, root, tree, err);
		} else if (m->kind == SBX_MOUNT_MASK && !(m->flags & SBX_MOUNT_LATE)) {
			ret = sbx_mount_mask(p, i, root, void_fd, err);
		}
		if (ret < 0)
			return -1;
	}
	return 0;
}

static int build(const struct sbx_spawner *s, const struct sbx_plan *p, struct sbx_error *err)
{
	const struct mount_attr readonly = { .attr_set = MOUNT_ATTR_RDONLY };

	if (enter_host_tree(s, err) < 0)
		return -1;
	_cleanup_fd_ int root = sbx_root_build(p, err);
	if (root < 0)
		return -1;
	_cleanup_fd_ int void_fd = attach_root(p, root, err);
	if (void_fd < 0)
		return -1;
	if (sbx_overlay_park(p, root, void_fd, s->proc, err) < 0)
		return -1;
	if ((p->flags & (SBX_PLAN_OVERLAY_ROOT | SBX_PLAN_WRITABLE_ROOT)) == SBX_PLAN_OVERLAY_ROOT) {
		int over = sbx_overlay_template(p, root, void_fd, err);
		if (over < 0)
			return -1;
		sbx_close(root);
		root = over;
	}
	if (attach_mounts(s, p, root, void_fd, err) < 0)
		return -1;
	int ret = sbx_mount_setattr(void_fd, 0, &readonly);
	if (ret >= 0)
		ret = sbx_mount_setattr(root, 0, &readonly);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_TEMPLATE, 5, ret);
	return sbx_root_enter(root, err);
}

/* The builder: one record, then wait until the spawner holds the namespace. */
static _Noreturn void builder(const struct sbx_spawner *s, const struct sbx_plan *p, int report)
{
	struct sbx_error err = { .stage = SBX_STAGE_NONE };
	char byte;

	SBX_FAULT_ARM(p->fault_at, EUCLEAN);
	(void)build(s, p, &err);
	SBX_FAULT_ARM(0, 0);
	if (sbx_sys(SYS_write, report, &err, sizeof err) == sizeof err && err.stage == SBX_STAGE_NONE)
		(void)sbx_sys(SYS_read, report, &byte, 1);
	_exit(0);
}

/* The builder's record; a builder that died without one, or a host that is gone, is an error too. */
static void read_report(const struct sbx_spawner *s, int report, struct sbx_error *err)
{
	struct pollfd fds[] = { { .fd = report, .events = POLLIN }, { .fd = s->host_pidfd, .events = POLLIN } };

	while (poll(fds, SBX_COUNT(fds), -1) < 0 && errno == EINTR)
		;
	if (!fds[0].revents || read(report, err, sizeof *err) != sizeof *err)
		sbx_fail(err, SBX_STAGE_TEMPLATE, 6, -ECHILD);
}

int sbx_template_build(const struct sbx_spawner *s, const struct sbx_plan *plan, struct sbx_error *err)
{
	struct clone_args args = { .exit_signal = SIGCHLD };
	_cleanup_fd_ int mount_ns = -1;
	char path[64];
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return sbx_fail(err, SBX_STAGE_TEMPLATE, 7, -errno);
	_cleanup_fd_ int report = pair[0];
	long pid = sbx_sys(SYS_clone3, &args, sizeof args);
	if (pid == 0) {
		sbx_close(pair[0]);
		builder(s, plan, pair[1]);
	}
	sbx_close(pair[1]);
	if (pid < 0)
		return sbx_fail(err, SBX_STAGE_TEMPLATE, 8, pid);

	read_report(s, report, err);
	if (err->stage == SBX_STAGE_NONE) {
		sbx_format_path(path, "", (unsigned)pid, "/ns/mnt");
		mount_ns = openat(s->proc, path, O_RDONLY | O_CLOEXEC);
		if (mount_ns < 0)
			sbx_fail(err, SBX_STAGE_TEMPLATE, 9, -errno);
	} else {
		kill((pid_t)pid, SIGKILL);
	}
	sbx_close(sbx_steal_fd(&report)); /* the builder's cue to end */
	while (waitpid((pid_t)pid, NULL, 0) < 0 && errno == EINTR)
		;
	return err->stage == SBX_STAGE_NONE ? sbx_steal_fd(&mount_ns) : -1;
}
