/*
 * source.c - a mount of something of the host's, lent to a sandbox that runs already: open_tree(2).
 *
 * Only the spawner can make one, also for an ordinary user: the host process has no power over its own mount
 * namespace. A child does it, and answers; whatever lies on a network that has gone holds up nobody else.
 */
#include "box.h"

#include <sys/stat.h>

/* Enter the host's mount namespace, and prove that "/" in it is the host process's own. */
long sbx_source_enter(const struct sbx_spawner *s)
{
	struct stat st;
	long ret = sbx_sys(SYS_setns, s->host_ns, CLONE_NEWNS);

	if (ret >= 0)
		ret = sbx_sys(SYS_newfstatat, AT_FDCWD, "/", &st, 0);
	if (ret >= 0 && (st.st_dev != s->root_dev || st.st_ino != s->root_ino))
		ret = -EXDEV; /* the host process lives in a chroot: its paths mean something else here */
	return ret;
}

static int open_source(const struct sbx_spawner *s, struct sbx_source *source, int given, struct sbx_error *err)
{
	struct stat same;
	long ret = sbx_source_enter(s);

	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_TEMPLATE, 0, ret);
	ret = sbx_sys(SYS_fstat, given, &same);
	source->same = &same;
	int tree = ret < 0 ? (int)ret : sbx_mount_clone(source, s->proc);
	return tree < 0 ? sbx_fail(err, SBX_STAGE_SOURCE, 0, tree) : tree;
}

static _Noreturn void lender(const struct sbx_spawner *s, struct sbx_source *source, const int *fds)
{
	const struct sbx_record done = { .kind = SBX_RECORD_DONE };
	struct sbx_error err;

	int tree = open_source(s, source, fds[1], &err);
	SBX_FAULT_ARM(0, 0);
	if (tree < 0)
		sbx_send_error(fds[0], &err);
	else
		(void)sbx_send_record(fds[0], &done, NULL, 0, tree);
	_exit(0);
}

/* MOUNT: `size` bytes of `of`. The answer comes from a child: a mount, attached nowhere. */
int sbx_source_lend(const struct sbx_spawner *s, const struct sbx_source_of *of, size_t size, const int *fds,
		    size_t nfds, struct sbx_error *err)
{
	const struct clone_args args = { .exit_signal = SIGCHLD };
	const char *end = (const char *)of + size, *text = (const char *)(of + 1);
	const char *part[3];

	if (size < sizeof *of + SBX_COUNT(part) || end[-1] || nfds != 2)
		return sbx_fail(err, SBX_STAGE_REQUEST, 22, -EBADF);
	for (size_t i = 0; i < SBX_COUNT(part); i++, text = sbx_next(text)) {
		if (text >= end)
			return sbx_fail(err, SBX_STAGE_REQUEST, 22, -EBADF);
		part[i] = text;
	}
	struct sbx_source source = {
		.path = part[0],
		.uid_map = *part[1] ? part[1] : NULL,
		.gid_map = *part[2] ? part[2] : NULL,
		.attrs = of->attrs,
		.recursive = AT_RECURSIVE,
		.dir = of->dir,
	};
	long pid = sbx_sys(SYS_clone3, &args, sizeof args);
	if (pid == 0) {
		SBX_FAULT_ARM(of->fault_at, of->fault_errno);
		lender(s, &source, fds);
	}
	return pid < 0 ? sbx_fail(err, SBX_STAGE_TEMPLATE, 8, pid) : 0;
}
