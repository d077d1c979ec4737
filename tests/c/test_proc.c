/* Who is below whom: whatever a process calls itself, and whether or not its first thread has ended. */
#include "box.h"
#include "check.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>

static const char *const names[] = { "plain", "a b", ") Z 1 1 (", "))))))", "((((", ") X 0 0 0", "", "\n) S 1\n" };

static void *linger(void *unused)
{
	for (;;)
		pause();
	return unused;
}

/* A child in a session of its own, for SIGKILL goes to whole groups. It says when it is ready. */
static pid_t start(const char *name, bool headless)
{
	int ready[2];
	char byte;

	CHECK(pipe(ready) == 0);
	pid_t pid = fork();
	if (pid == 0) {
		pthread_t thread;
		setsid();
		prctl(PR_SET_NAME, name);
		if (headless && pthread_create(&thread, NULL, linger, NULL) != 0)
			_exit(1);
		close(ready[0]);
		if (write(ready[1], "", 1) != 1)
			_exit(1);
		if (headless)
			syscall(SYS_exit, 0);
		linger(NULL);
	}
	close(ready[1]);
	CHECK(read(ready[0], &byte, 1) == 1);
	close(ready[0]);
	return pid;
}

static bool killed(pid_t pid)
{
	int status = 0;

	for (int i = 0; i < 5000; i++) {
		if (waitpid(pid, &status, WNOHANG) == pid)
			return WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
		usleep(1000);
	}
	return false;
}

static void finds_odd_names(void)
{
	pid_t pids[SBX_COUNT(names)];

	for (size_t i = 0; i < SBX_COUNT(names); i++)
		pids[i] = start(names[i], false);
	CHECK(sbx_proc_signal(getpid(), NULL, 0, SIGKILL) == 0);
	for (size_t i = 0; i < SBX_COUNT(names); i++)
		CHECK(killed(pids[i]));
}

/* Field 3 of its stat says Z, and yet it runs. */
static void finds_what_lost_its_first_thread(void)
{
	char path[64], stat[512] = "";
	pid_t pid = start("headless", true);

	snprintf(path, sizeof path, "/proc/%d/stat", pid);
	for (int i = 0; i < 5000 && !strstr(stat, ") Z "); i++) {
		int fd = open(path, O_RDONLY);
		ssize_t len = read(fd, stat, sizeof stat - 1);
		stat[len > 0 ? len : 0] = '\0';
		close(fd);
		usleep(1000);
	}
	CHECK(strstr(stat, ") Z ") != NULL);
	CHECK(sbx_proc_signal(getpid(), NULL, 0, SIGKILL) == 0);
	CHECK(killed(pid));
}

static void leaves_the_dead_and_the_spared(void)
{
	siginfo_t info;
	pid_t dead = fork();
	if (dead == 0)
		_exit(3);
	CHECK(waitid(P_PID, (id_t)dead, &info, WEXITED | WNOWAIT) == 0); /* a zombie now */
	pid_t spared = start("spared", false), other = start("other", false);

	CHECK(sbx_proc_signal(getpid(), &spared, 1, SIGKILL) == 0); /* ends, though the zombie stays */
	CHECK(killed(other));
	CHECK(waitpid(spared, NULL, WNOHANG) == 0);
	CHECK(sbx_proc_signal(getpid(), NULL, 0, SIGKILL) == 0);
	CHECK(killed(spared));
	int status;
	CHECK(waitpid(dead, &status, 0) == dead && WEXITSTATUS(status) == 3);
}

/* Below a child, in another session; and what is not below is left alone. */
static void reaches_grandchildren_only_of_its_own(void)
{
	pid_t stranger = start("stranger", false);
	int ready[2];
	pid_t grandchild = 0, child;

	CHECK(pipe(ready) == 0);
	child = fork();
	if (child == 0) {
		setsid();
		pid_t pid = start("grandchild", false);
		if (write(ready[1], &pid, sizeof pid) != sizeof pid)
			_exit(1);
		linger(NULL);
	}
	CHECK(read(ready[0], &grandchild, sizeof grandchild) == sizeof grandchild);
	CHECK(sbx_proc_signal(child, NULL, 0, SIGKILL) == 0);
	CHECK(waitpid(child, NULL, WNOHANG) == 0);
	CHECK(waitpid(stranger, NULL, WNOHANG) == 0);
	char path[64], stat[512] = "";
	snprintf(path, sizeof path, "/proc/%d/stat", grandchild);
	for (int i = 0; i < 5000 && !strstr(stat, ") Z "); i++) { /* its parent does not reap it */
		int fd = open(path, O_RDONLY);
		ssize_t len = fd < 0 ? 0 : read(fd, stat, sizeof stat - 1);
		stat[len > 0 ? len : 0] = '\0';
		close(fd);
		usleep(1000);
	}
	CHECK(strstr(stat, ") Z ") != NULL);
	CHECK(sbx_proc_signal(getpid(), NULL, 0, SIGKILL) == 0);
	CHECK(killed(child) && killed(stranger));
}

int main(void)
{
	prctl(PR_SET_CHILD_SUBREAPER, 1); /* what loses its parent stays below us */
	RUN(finds_odd_names);
	RUN(finds_what_lost_its_first_thread);
	RUN(leaves_the_dead_and_the_spared);
	RUN(reaches_grandchildren_only_of_its_own);
	return check_status();
}
