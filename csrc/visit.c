/*
 * visit.c - two more uses of the helper, for processes that another program dumps or restores (CRIU). Plain libc is fine:
 * both are processes of their own.
 *
 *   visit PIDFD ID PROGRAM ARGS...   run a program in a sandbox's namespaces, but for that of users
 *   reap PID STATUS LIFE USERS       be the parent of what was restored there
 */
#include "box.h"

#include <grp.h>
#include <linux/capability.h>
#include <linux/keyctl.h>
#include <linux/prctl.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>

enum { SPACES = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP };

enum { HIGHEST = 32000 }; /* below the usual pid_max */

static int complain(const char *what)
{
	perror(what);
	return 125;
}

/* The power of root with an id that the sandbox's user namespace maps, or there could be no file in its file systems. */
static int become(uid_t id)
{
	struct __user_cap_header_struct head = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[2];

	if (prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) < 0 || setresgid(id, id, id) < 0 || setgroups(0, NULL) < 0 ||
	    setresuid(id, id, id) < 0 || syscall(SYS_capget, &head, data) < 0)
		return -1;
	for (int i = 0; i < 2; i++)
		data[i].effective = data[i].inheritable = data[i].permitted;
	if (syscall(SYS_capset, &head, data) < 0)
		return -1;
	for (int cap = 0; cap < 64; cap++)
		if (data[cap / 32].permitted >> cap % 32 & 1 &&
		    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0) < 0)
			return -1;
	return 0;
}

/* Into the pid namespace, with a number that what is restored there does not need. */
static long fork_aside(void)
{
	long ret = -EEXIST;

	for (pid_t number = HIGHEST; ret == -EEXIST && number > HIGHEST - 1000; number--) {
		const struct clone_args args = {
			.exit_signal = SIGCHLD,
			.set_tid = (uint64_t)(uintptr_t)&number,
			.set_tid_size = 1,
		};
		ret = sbx_sys(SYS_clone3, &args, sizeof args);
	}
	return ret;
}

/*
 * What the program restores inherits from it what CRIU does not know of: no new privileges, and a session keyring with
 * nothing in it.
 */
int sbx_visit(int pidfd, uid_t id, char **argv)
{
	int status;

	if (syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) < 0 && errno != ENOSYS)
		return complain("keyctl");
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		return complain("PR_SET_NO_NEW_PRIVS");
	if (setns(pidfd, SPACES) < 0)
		return complain("setns");
	if (become(id) < 0)
		return complain("setresuid");
	if (fcntl(pidfd, F_SETFD, FD_CLOEXEC) < 0)
		return complain("fcntl");
	pid_t pid = (pid_t)fork_aside();
	if (pid < 0) {
		errno = -pid;
		return complain("clone3");
	}
	if (pid == 0) {
		(void)prctl(PR_SET_PDEATHSIG, SIGKILL);
		execv(argv[0], argv);
		_exit(complain(argv[0]));
	}
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return complain("waitpid");
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* As a launcher: the power to kill, in the sandbox's own user namespace, and nothing else. */
static int keep_kill(int users)
{
	struct __user_cap_header_struct head = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[2] = { { .effective = 1u << CAP_KILL, .permitted = 1u << CAP_KILL } };

	if (setns(users, CLONE_NEWUSER) < 0)
		return -1;
	for (int cap = 0; prctl(PR_CAPBSET_READ, cap) >= 0; cap++)
		if (prctl(PR_CAPBSET_DROP, cap) < 0)
			return -1;
	return syscall(SYS_capset, &head, data) < 0 ? -1 : prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
}

/* Returns whether anybody is left. */
static bool bury(pid_t pid, int *ended)
{
	int status;
	pid_t found;

	while ((found = waitpid(-1, &status, WNOHANG)) > 0)
		if (found == pid)
			*ended = status;
	return found == 0 || errno == EINTR;
}

/*
 * It replaces the restoring program, so the restored process is its child, and what that leaves behind comes here. Ends when
 * all of it is gone: with the process, or with LIFE, everything is killed. STATUS gets "ready", and wait4's number at the end.
 */
int sbx_reap(pid_t pid, int status_fd, int life, int users)
{
	int keep[] = { status_fd, life }, ended = -1;
	sigset_t mask;

	sigemptyset(&mask);
	sigaddset(&mask, SIGCHLD);
	if (sigprocmask(SIG_SETMASK, &mask, NULL) < 0 || prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0 ||
	    keep_kill(users) < 0 || sbx_fds_close_except(keep, SBX_COUNT(keep)) < 0)
		return 125;
	int children = signalfd(-1, &mask, SFD_CLOEXEC | SFD_NONBLOCK);
	struct pollfd fds[] = { { .fd = children, .events = POLLIN }, { .fd = life, .events = POLLIN } };
	const pid_t self = getpid();
	bool killing = children < 0 || write(status_fd, "ready\n", 6) != 6;

	while (bury(pid, &ended)) {
		struct signalfd_siginfo info;
		killing |= ended >= 0 || fds[1].revents;
		if (killing)
			(void)sbx_proc_signal(self, NULL, 0, SIGKILL);
		(void)poll(fds, killing ? 1 : 2, killing ? 50 : -1);
		while (read(children, &info, sizeof info) > 0)
			;
	}
	dprintf(status_fd, "%d\n", ended);
	return 0;
}
