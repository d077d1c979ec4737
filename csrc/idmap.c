/*
 * idmap.c - user namespace id maps: user_namespaces(7), and mount_setattr(2) on id-mapped mounts.
 */
#include "box.h"

#include <sys/wait.h>

/*
 * Write the maps of process `pid` from outside. setgroups is denied first where the writer has no
 * CAP_SETGID over the parent namespace, because the kernel refuses the gid map otherwise.
 */
int sbx_idmap_write(int proc, pid_t pid, const char *uid_map, const char *gid_map, bool deny_setgroups)
{
	char path[64];
	long ret = 0;

	if (deny_setgroups) {
		sbx_format_path(path, "", (unsigned)pid, "/setgroups");
		ret = sbx_write_file(proc, path, "deny");
	}
	if (ret >= 0) {
		sbx_format_path(path, "", (unsigned)pid, "/gid_map");
		ret = sbx_write_file(proc, path, gid_map);
	}
	if (ret >= 0) {
		sbx_format_path(path, "", (unsigned)pid, "/uid_map");
		ret = sbx_write_file(proc, path, uid_map);
	}
	return (int)ret;
}

/*
 * A user namespace that exists only to carry the maps of an id-mapped mount: a child is born in it,
 * gets the maps, and ends once the namespace is held by descriptor.
 */
int sbx_idmap_userns(int proc, const char *uid_map, const char *gid_map)
{
	struct clone_args args = { .flags = CLONE_NEWUSER, .exit_signal = SIGCHLD };
	char path[64], byte;
	int pair[2];

	long ret = sbx_sys(SYS_pipe2, pair, O_CLOEXEC);
	if (ret < 0)
		return (int)ret;
	long pid = sbx_sys(SYS_clone3, &args, sizeof args);
	if (pid == 0) {
		sbx_close(pair[1]);
		(void)syscall(SYS_read, pair[0], &byte, 1);
		_exit(0);
	}
	sbx_close(pair[0]);
	int fd = (int)pid;
	if (pid > 0)
		fd = sbx_idmap_write(proc, (pid_t)pid, uid_map, gid_map, false);
	if (pid > 0 && fd >= 0) {
		sbx_format_path(path, "", (unsigned)pid, "/ns/user");
		fd = (int)sbx_sys(SYS_openat, proc, path, O_RDONLY | O_CLOEXEC);
	}
	sbx_close(pair[1]);
	while (pid > 0 && syscall(SYS_wait4, pid, NULL, 0, NULL) < 0 && errno == EINTR)
		;
	return fd;
}
