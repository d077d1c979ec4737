/*
 * resident.c - PID 1 of a sandbox that stays. It keeps launchers ready, which do everything about
 * commands; it reaps, and it ends when the host lets go, and with it, by the kernel, everything else.
 *
 * By the time it runs it has given up whatever a payload may not have (child.c, lock_down) and stands behind
 * the same Landlock domain. It is not dumpable, so a payload of the same id cannot read or trace it; a signal
 * from inside does not reach it (pid_namespaces(7)); its sockets have names nowhere inside.
 *
 * A launcher is the subreaper of its command, so nothing but launchers is ever a child of init: whatever
 * else arrives here was below a launcher that died by force, and dies too.
 */
#include "box.h"

#include <linux/prctl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/wait.h>

enum { MAX_STOPS = 64, MAX_FAILURES = 100 /* to make a launcher, 50 ms apart */ };

struct resident {
	struct sbx_box *box;
	struct sbx_pool *pool;
	struct sbx_inbox *inbox; /* each launcher has its own copy */
	int poke;		 /* eventfd: no launcher is idle */
	bool no_group;		 /* what failed was to make a launcher's */
	bool stopped;		 /* by the host's will */
	unsigned stops;		 /* of launchers, by somebody else's */
	unsigned failures;	 /* to make one, one after the other */
	pid_t first;		 /* launcher; the others need not say that the sandbox is ready */
	pid_t pids[SBX_MAX_LAUNCHERS];
};

static bool any_idle(const struct sbx_pool *pool)
{
	for (unsigned i = 0; i < pool->used; i++)
		if (pool->state[i] == SBX_LAUNCHER_IDLE || pool->state[i] == SBX_LAUNCHER_STARTING)
			return true;
	return false;
}

static unsigned free_slot(const struct sbx_pool *pool)
{
	unsigned i = 0;

	while (i < pool->used && pool->state[i] != SBX_LAUNCHER_NONE)
		i++;
	return i;
}

/* One more launcher, unless there are as many as may be. 0 or -errno. */
static long add_launcher(struct resident *r)
{
	unsigned number = free_slot(r->pool);
	struct clone_args args = { .exit_signal = SIGCHLD };
	struct sbx_slot slot, *own = r->box->slots ? &slot : NULL;

	if (number == SBX_MAX_LAUNCHERS)
		return 0;
	long ret = own ? sbx_slot_make(r->box, number, own) : 0;
	r->no_group = ret < 0;
	if (ret < 0) {
		sbx_slot_remove(r->box, number);
		return ret;
	}
	if (own && own->dir >= 0) {
		args.flags = CLONE_INTO_CGROUP;
		args.cgroup = (unsigned)own->dir;
	}
	r->pool->state[number] = SBX_LAUNCHER_STARTING;
	if (number == r->pool->used)
		r->pool->used = number + 1;
	const struct sbx_launcher launcher = { r->box, r->pool, r->inbox, number, r->poke, !r->first, own };
	long pid = sbx_sys(SYS_clone3, &args, sizeof args);
	if (pid == 0)
		sbx_launcher_run(&launcher);
	if (own)
		sbx_slot_close(own);
	if (pid < 0) {
		r->pool->state[number] = SBX_LAUNCHER_NONE;
		sbx_slot_remove(r->box, number);
	}
	r->pids[number] = pid < 0 ? 0 : (pid_t)pid;
	r->first = r->first ? r->first : r->pids[number];
	return pid < 0 ? pid : 0;
}

static void forget(struct resident *r, pid_t pid)
{
	for (unsigned i = 0; i < r->pool->used; i++)
		if (r->pids[i] == pid) {
			r->pids[i] = 0;
			r->pool->state[i] = SBX_LAUNCHER_NONE;
			sbx_slot_remove(r->box, i);
		}
}

static bool is_launcher(const struct resident *r, pid_t pid)
{
	for (unsigned i = 0; i < r->pool->used; i++)
		if (r->pids[i] == pid)
			return true;
	return false;
}

/*
 * A launcher was stopped. Whoever does that again and again keeps it from its work, and from keeping time: then
 * every command is killed at once, which no fork slips through.
 */
static void resist(struct resident *r, pid_t pid)
{
	if (r->stopped)
		return;
	if (++r->stops % MAX_STOPS == 0)
		(void)sbx_sys(SYS_kill, -1, SIGKILL);
	else
		(void)sbx_sys(SYS_kill, pid, SIGCONT);
}

/*
 * There has to be one that is idle. What keeps one from being made is perhaps not there the next time: processes,
 * memory, descriptors, or somebody who tidies up groups. Without processes or memory the sandbox waits for ever,
 * for it may have used them up itself.
 */
static long ensure_launcher(struct resident *r)
{
	long ret = any_idle(r->pool) ? 0 : add_launcher(r);

	if (ret == -EAGAIN || ret == -ENOMEM)
		return -EAGAIN;
	r->failures = ret < 0 ? r->failures + 1 : 0;
	return ret < 0 && r->failures < MAX_FAILURES ? -EAGAIN : ret;
}

/* Reap what has ended; kill what a dead launcher left behind. */
static long reap(struct resident *r)
{
	bool strays = false, failed = false;
	int status;

	for (;;) {
		long pid = sbx_sys(SYS_wait4, -1, &status, WNOHANG | WUNTRACED, NULL);
		if (pid == -EINTR)
			continue;
		if (pid < 0 && pid != -ECHILD)
			return pid;
		if (pid <= 0)
			break;
		if (WIFSTOPPED(status)) { /* where there is one id only, a payload can do that to a launcher */
			resist(r, (pid_t)pid);
			continue;
		}
		strays |= !is_launcher(r, (pid_t)pid) || !WIFEXITED(status);
		failed |= is_launcher(r, (pid_t)pid) && WIFEXITED(status) && WEXITSTATUS(status);
		if (failed && pid == r->first)
			return -ECHILD; /* it has said why */
		forget(r, (pid_t)pid);
	}
	if (strays)
		(void)sbx_proc_signal(1, r->pids, r->pool->used, SIGKILL);
	return failed && !any_idle(r->pool) ? -EAGAIN : ensure_launcher(r);
}

/*
 * SIGNAL for every command. Stopping and continuing concerns the launchers as well and is one call, which
 * no process can slip through; so does nothing else.
 */
static long signal_all(struct resident *r, int sig)
{
	if (sig == SIGSTOP || sig == SIGCONT) {
		r->stopped = sig == SIGSTOP;
		long ret = sbx_sys(SYS_kill, -1, sig);
		return ret == -ESRCH ? 0 : ret;
	}
	r->pool->kills += sig == SIGKILL;
	return sbx_proc_signal(0, r->pids, r->pool->used, sig);
}

/* A message from the host. Returns false when there will be no more. */
static bool hear(struct resident *r)
{
	struct sbx_record done = { .kind = SBX_RECORD_DONE };
	struct sbx_message msg;
	size_t nfds = 1;
	int answer = -1;

	long len = sbx_receive(r->box->keeper, &msg, sizeof msg, &answer, &nfds), ret = -EPROTO;
	if (len == sizeof msg && msg.magic == SBX_REQUEST_MAGIC) {
		if (msg.kind == SBX_MESSAGE_END)
			return false;
		if (msg.kind == SBX_MESSAGE_SIGNAL && msg.signal >= 0 && msg.signal <= 64)
			ret = signal_all(r, msg.signal);
	}
	if (nfds == 0)
		return true;
	done.error.err = ret < 0 ? (int32_t)-ret : 0;
	(void)sbx_send_record(answer, &done, NULL, 0, -1);
	sbx_close(answer);
	return true;
}

/*
 * A persistent sandbox is its owner's like any other, until the owner says that it is on record; so there
 * is none that nobody knows of, whenever the owner dies.
 */
static bool may_stay(const struct sbx_box *box)
{
	struct sbx_message msg;
	size_t nfds = 0;

	return sbx_receive(box->control, &msg, sizeof msg, NULL, &nfds) == sizeof msg &&
	       msg.magic == SBX_REQUEST_MAGIC && msg.kind == SBX_MESSAGE_STAY;
}

static long serve(struct resident *r)
{
	const short gone = POLLRDHUP | POLLHUP | POLLERR;
	struct sbx_box *box = r->box;
	struct pollfd fds[] = {
		{ .fd = box->spawner->children, .events = POLLIN },
		{ .fd = r->poke, .events = POLLIN },
		{ .fd = box->keeper, .events = POLLIN | POLLRDHUP },
		{ .fd = box->spawner->host_pidfd, .events = POLLIN },
		{ .fd = box->control, .events = POLLIN | POLLRDHUP },
	};
	char drop[256];
	bool again = false;

	for (;;) {
		struct timespec soon = { .tv_nsec = 50000000 };
		long ret = sbx_sys(SYS_ppoll, fds, SBX_COUNT(fds), again ? &soon : NULL, NULL, 0);
		if (ret < 0 && ret != -EINTR)
			return ret;
		if (ret < 0)
			continue;
		if (fds[4].revents) {
			if (!may_stay(box))
				return 0;
			sbx_close(sbx_steal_fd(&box->control));
			fds[3].fd = fds[4].fd = -1;
			continue;
		}
		if (fds[3].revents || fds[2].revents & gone)
			return 0;
		for (int i = 0; i < 2; i++)
			if (fds[i].revents)
				(void)sbx_sys(SYS_read, fds[i].fd, drop, sizeof drop);
		ret = reap(r);
		again = ret == -EAGAIN;
		if (ret < 0 && !again)
			return ret;
		if (fds[2].revents && !hear(r)) /* after reaping: its answer says that strays are dead */
			return 0;
	}
}

/* Descriptors 0 to 2 must not become those of a request: the payload's are put there. */
static long fill_stdio(void)
{
	for (int i = 0; i < 3; i++) {
		int null = sbx_openat2(AT_FDCWD, "/dev/null", O_RDWR, 0, RESOLVE_NO_SYMLINKS);
		if (null != i)
			return null < 0 ? null : -EBADF;
	}
	return 0;
}

/* One page of the host's; NULL with *err filled. */
static const struct sbx_pause *map_pause(int fd, struct sbx_error *err)
{
	long map = sbx_sys(SYS_mmap, NULL, sizeof(struct sbx_pause), PROT_READ, MAP_SHARED, fd, 0);

	if (map >= 0 || map <= -4096)
		return (const struct sbx_pause *)map;
	sbx_fail(err, SBX_STAGE_LAUNCHER, 6, map);
	return NULL;
}

static void *map_memory(size_t size, int how, struct sbx_error *err)
{
	long map = sbx_sys(SYS_mmap, NULL, size, PROT_READ | PROT_WRITE, how | MAP_ANONYMOUS, -1, 0);

	if (map >= 0 || map <= -4096)
		return (void *)map;
	sbx_fail(err, SBX_STAGE_LAUNCHER, 0, map);
	return NULL;
}

int sbx_resident_run(struct sbx_box *box, struct sbx_error *err)
{
	static const uint64_t all = ~0ULL; /* the kernel's sigset_t; a command gets an empty one */
	struct resident r = { .box = box };

	if (box->persistent && sbx_session_new(err) < 0) /* the spawner's group ends with the host: spawner.c */
		return -1;

	(void)sbx_sys(SYS_rt_sigprocmask, SIG_SETMASK, &all, NULL, sizeof all);
	(void)sbx_sys(SYS_prctl, PR_SET_NAME, "sbx-init", 0, 0, 0);

	r.pool = map_memory(sizeof *r.pool, MAP_SHARED, err);
	box->pause = map_pause(box->pause_page, err);
	if (!box->pause)
		return -1;
	r.inbox = r.pool ? map_memory(sizeof *r.inbox, MAP_PRIVATE, err) : NULL;
	if (!r.inbox)
		return -1;
	r.poke = (int)sbx_sys(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (r.poke < 0)
		return sbx_fail(err, SBX_STAGE_LAUNCHER, 1, r.poke);
	int keep[7 + SBX_MAX_GROUPS] = { box->control,		 box->keeper, box->work, box->spawner->host_pidfd,
					 box->spawner->children, r.poke,      box->hold };
	memcpy(keep + 7, box->slot_dir, box->slots * sizeof(int));
	long ret = sbx_fds_close_except(keep, 7 + box->slots);
	if (ret >= 0)
		ret = fill_stdio();
	if (ret >= 0)
		ret = add_launcher(&r);
	if (ret < 0)
		return sbx_fail(err, r.no_group ? SBX_STAGE_CGROUP : SBX_STAGE_LAUNCHER, r.no_group ? 26 : 2, ret);
	if (!box->persistent)
		sbx_close(sbx_steal_fd(&box->control));
	(void)serve(&r);
	return 0; /* nobody is there to hear of an error any more: the end is the answer */
}
