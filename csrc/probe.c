/*
 * probe.c - tries each kernel primitive for real, each in a process of its own, and prints one line
 * per primitive: name, errno (0: works), a number where it has one. For `sandboxcore doctor`; never
 * part of starting a sandbox, so plain libc is fine here.
 */
#include "box.h"

#include <linux/filter.h>
#include <linux/keyctl.h>
#include <linux/prctl.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <stdio.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

static bool privileged(void)
{
	return geteuid() == 0 && prctl(PR_CAPBSET_READ, 21 /* CAP_SYS_ADMIN */) == 1;
}

/* Where only root could go on, go on as the root of a user namespace. */
static long enter(uint64_t flags)
{
	char uid_map[48], gid_map[48];

	if (!privileged() || flags & CLONE_NEWUSER) {
		sbx_format_path(uid_map, "0 ", (unsigned)geteuid(), " 1");
		sbx_format_path(gid_map, "0 ", (unsigned)getegid(), " 1");
		if (unshare(CLONE_NEWUSER) < 0)
			return -errno;
		int ret = sbx_idmap_write(open("/proc", O_PATH), getpid(), uid_map, gid_map, true);
		if (ret < 0)
			return ret;
		flags &= ~(uint64_t)CLONE_NEWUSER;
	}
	return unshare((int)flags) < 0 ? -errno : 0;
}

static long try_user(void)
{
	return enter(CLONE_NEWUSER);
}
static long try_mnt(void)
{
	return enter(CLONE_NEWNS);
}
static long try_net(void)
{
	return enter(CLONE_NEWNET);
}
static long try_ipc(void)
{
	return enter(CLONE_NEWIPC);
}
static long try_uts(void)
{
	return enter(CLONE_NEWUTS);
}
static long try_cgroup(void)
{
	return enter(CLONE_NEWCGROUP);
}
static long try_time(void)
{
	return enter(CLONE_NEWTIME);
}
static long try_pid(void)
{
	return enter(CLONE_NEWPID);
}

static long try_loopback(void)
{
	long ret = enter(CLONE_NEWNET);
	return ret < 0 ? ret : sbx_net_loopback();
}

/* A sandbox's own proc: needs a pid namespace, and a proc in sight without masks. */
static long try_proc(void)
{
	int status;
	long ret = enter(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID);

	if (ret < 0)
		return ret;
	pid_t pid = fork();
	if (pid == 0) {
		int fd = sbx_mount_fs("proc", NULL, MOUNT_ATTR_NOSUID);
		_exit(fd < 0 ? -fd : 0);
	}
	if (pid < 0 || waitpid(pid, &status, 0) < 0)
		return -errno;
	return WIFEXITED(status) ? -WEXITSTATUS(status) : -ECHILD;
}

static long try_overlay(void)
{
	long ret = enter(CLONE_NEWUSER | CLONE_NEWNS);
	if (ret < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
		return ret < 0 ? ret : -errno;
	if (mount("tmpfs", "/proc", "tmpfs", 0, NULL) < 0 || mkdir("/proc/lower", 0755) < 0 ||
	    mkdir("/proc/lower/dir", 0755) < 0 || mkdir("/proc/upper", 0755) < 0 || mkdir("/proc/work", 0755) < 0)
		return -errno;
	int fd = sbx_mount_fs("overlay",
			      "lowerdir\0/proc/lower\0upperdir\0/proc/upper\0workdir\0/proc/work\0userxattr\0\0", 0);
	if (fd < 0)
		return fd;
	/* a directory instead of another one: needs a whiteout, and an extended attribute */
	return unlinkat(fd, "dir", AT_REMOVEDIR) < 0 || mkdirat(fd, "dir", 0755) < 0 ? -errno : 0;
}

static long try_idmapped_mount(void)
{
	if (!privileged())
		return -EPERM;
	int tree = sbx_open_tree(AT_FDCWD, "/usr", 0);
	int proc = open("/proc", O_PATH);
	int userns = sbx_idmap_userns(proc, "0 1000 1", "0 1000 1");
	if (tree < 0 || userns < 0)
		return tree < 0 ? tree : userns;
	const struct mount_attr attr = { .attr_set = MOUNT_ATTR_IDMAP, .userns_fd = (__u64)userns };
	return sbx_mount_setattr(tree, 0, &attr);
}

static long try_seccomp(void)
{
	struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
	const struct sock_fprog program = { 1, &allow };

	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		return -errno;
	return sbx_sys(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
}

static long try_landlock(void)
{
	return sbx_sys(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);
}

static long try_keyring(void)
{
	return sbx_sys(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) < 0 ? -errno : 0;
}

static long try_close_range(void)
{
	return sbx_sys(SYS_close_range, 100, 200, 0);
}
static long try_openat2(void)
{
	return sbx_openat2(AT_FDCWD, "/", O_PATH, 0, SBX_RESOLVE_STRICT) < 0 ? -errno : 0;
}

int sbx_probe(void)
{
	static const struct {
		const char *name;
		long (*attempt)(void);
	} probes[] = {
		{ "user", try_user },	      { "mnt", try_mnt },
		{ "pid", try_pid },	      { "net", try_net },
		{ "ipc", try_ipc },	      { "uts", try_uts },
		{ "cgroup", try_cgroup },     { "time", try_time },
		{ "loopback", try_loopback }, { "proc", try_proc },
		{ "overlay", try_overlay },   { "idmapped_mount", try_idmapped_mount },
		{ "seccomp", try_seccomp },   { "landlock", try_landlock },
		{ "keyring", try_keyring },   { "close_range", try_close_range },
		{ "openat2", try_openat2 },
	};

	for (size_t i = 0; i < SBX_COUNT(probes); i++) {
		int pair[2];
		long result = -ECHILD;
		if (pipe(pair) < 0)
			return 1;
		pid_t pid = fork();
		if (pid == 0) {
			result = probes[i].attempt();
			_exit(write(pair[1], &result, sizeof result) != sizeof result);
		}
		sbx_close(pair[1]);
		if (pid < 0 || read(pair[0], &result, sizeof result) != sizeof result)
			result = -ECHILD;
		sbx_close(pair[0]);
		if (pid > 0)
			(void)waitpid(pid, NULL, 0);
		printf("%s %ld %ld\n", probes[i].name, result < 0 ? -result : 0, result < 0 ? 0 : result);
	}
	return 0;
}
