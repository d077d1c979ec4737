/*
 * client.c - starts the spawner and hands it plans.
 *
 * The spawner must not become a child of the calling program, whose SIGCHLD and wait calls are its
 * own. So a short-lived process in between starts it: cloned with no exit signal, it is invisible to
 * wait(2) without __WALL, and the spawner is an orphan from the start. Both are vfork-like clones
 * that share the caller's memory until exec, so the rules of child.c hold here as well: all signals
 * are blocked, nothing is allocated, only system calls are made.
 */
#include "sandboxcore.h"
#include "util.h"

#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/wait.h>

struct launch {
	const char *path;
	int socket;
	int host_pidfd;
	int null;
	int diagnostics;
	int err;
	char **env;
	char *stack; /* two stacks of STACK bytes */
};

enum { STACK = 64 * 1024 };

static int become_spawner(void *arg)
{
	struct launch *l = arg;
	char *argv[] = { (char *)(uintptr_t)"sandboxcore-spawner", (char *)(uintptr_t)"serve", NULL };
	const int from[] = { l->null, l->null, l->diagnostics >= 0 ? l->diagnostics : l->null, l->socket,
			     l->host_pidfd };
	int safe[SBX_COUNT(from)];
	struct rlimit64 files;

	/* the caller's soft limit bounds its own tables; a spawner holds a descriptor per template */
	if (syscall(SYS_prlimit64, 0, RLIMIT_NOFILE, NULL, &files) == 0) {
		files.rlim_cur = files.rlim_max;
		(void)syscall(SYS_prlimit64, 0, RLIMIT_NOFILE, &files, NULL);
	}
	for (int i = 0; i < (int)SBX_COUNT(from); i++) {
		safe[i] = fcntl(from[i], F_DUPFD_CLOEXEC, 10);
		if (safe[i] < 0)
			goto failed;
	}
	for (int i = 0; i < (int)SBX_COUNT(from); i++)
		if (dup2(safe[i], i) < 0)
			goto failed;
	if (syscall(SYS_close_range, SBX_COUNT(from), ~0U, 0) < 0)
		goto failed;
	execve(l->path, argv, l->env);
failed:
	l->err = errno;
	return 1; /* clone(2) ends the process with this */
}

static int start_orphan(void *arg)
{
	struct launch *l = arg;

	if (clone(become_spawner, l->stack + 2 * STACK, CLONE_VM | CLONE_VFORK | SIGCHLD, l) < 0)
		l->err = errno;
	return 0;
}

static int launch(struct launch *l)
{
	sigset_t all, before;

	l->stack = mmap(NULL, 2 * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
	if (l->stack == MAP_FAILED)
		return -errno;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	int pid = clone(start_orphan, l->stack + STACK, CLONE_VM | CLONE_VFORK, l);
	int saved = errno;
	while (pid > 0 && waitpid(pid, NULL, __WALL) < 0 && errno == EINTR)
		;
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	munmap(l->stack, 2 * STACK);
	return pid < 0 ? -saved : -l->err;
}

int sbx_spawner_start(const char *path, int diagnostics, struct sbx_error *err)
{
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return sbx_fail(err, SBX_STAGE_HOST, 0, -errno);
	_cleanup_fd_ int ours = pair[0], theirs = pair[1];
	_cleanup_fd_ int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	if (null < 0)
		return sbx_fail(err, SBX_STAGE_HOST, 1, -errno);
	_cleanup_fd_ int self = (int)syscall(SYS_pidfd_open, getpid(), 0);
	if (self < 0)
		return sbx_fail(err, SBX_STAGE_HOST, 2, -errno);

	char *env[] = { NULL };
#ifdef __SANITIZE_ADDRESS__
	char **pass = environ; /* ASAN_OPTIONS */
#else
	char **pass = env;
#endif
	struct launch l = { .path = path,
			    .socket = theirs,
			    .host_pidfd = self,
			    .null = null,
			    .diagnostics = diagnostics,
			    .env = pass };
	(void)env;
	int ret = launch(&l);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_SPAWNER, 10, ret) : sbx_steal_fd(&ours);
}

/* The record that answers a message on `sock`; anything but READY is an error. */
static int expect_ready(int sock, struct sbx_record *rec, struct sbx_error *err)
{
	const struct timeval patience = { .tv_sec = 60 }; /* a source on a dead network file system */
	int fd;

	(void)setsockopt(sock, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
	long len = sbx_wire_receive(sock, rec, NULL, 0, 0, &fd);
	sbx_close(fd);
	if (len <= 0)
		return sbx_fail(err, SBX_STAGE_SPAWNER, 11, len < 0 ? len : -EPIPE);
	if (rec->kind == SBX_RECORD_ERROR) {
		*err = rec->error;
		return -1;
	}
	return rec->kind == SBX_RECORD_READY ? 0 : sbx_fail(err, SBX_STAGE_SPAWNER, 12, -EPROTO);
}

int sbx_spawner_hello(int spawner, uint32_t kind, uint32_t flags, struct sbx_record *rec, struct sbx_error *err)
{
	const struct sbx_message msg = { .magic = SBX_REQUEST_MAGIC, .kind = kind, .flags = flags };
	int ret = sbx_wire_send(spawner, &msg, NULL, 0, NULL, 0);

	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_SPAWNER, 13, ret);
	return expect_ready(spawner, rec, err);
}

int sbx_spawner_plan(int spawner, uint64_t id, const void *plan, size_t size, struct sbx_error *err)
{
	const struct sbx_message msg = { .magic = SBX_REQUEST_MAGIC, .kind = SBX_MESSAGE_PLAN, .plan = id };
	struct sbx_record rec;
	int pair[2];

	if (sbx_plan_check(plan, size, err) < 0)
		return -1;
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return sbx_fail(err, SBX_STAGE_HOST, 3, -errno);
	_cleanup_fd_ int ours = pair[0], theirs = pair[1];
	_cleanup_fd_ int memfd = sbx_wire_memfd(plan, size);
	if (memfd < 0)
		return sbx_fail(err, SBX_STAGE_HOST, 4, memfd);
	int ret = sbx_wire_send(spawner, &msg, NULL, 0, (int[]){ theirs, memfd }, 2);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_SPAWNER, 14, ret);
	sbx_close(sbx_steal_fd(&theirs)); /* so that a spawner that dies reads as end-of-file */
	return expect_ready(ours, &rec, err);
}

int sbx_landlock_abi(void)
{
	long abi = syscall(SYS_landlock_create_ruleset, NULL, 0, LANDLOCK_CREATE_RULESET_VERSION);

	return abi > 0 ? (int)abi : 0;
}
