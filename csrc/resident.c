/*
 * resident.c - PID 1 of a sandbox that stays. It keeps launchers ready, which do everything about
 * commands; it reaps, and it ends when the host lets go, and with it, by the kernel, everything else.
 *
 * By the time it runs it has given up whatever a payload may not have (child.c, lock_down) and stands behind
 * the same Landlock domain. It is not dumpable, so a payload of the same id cannot read or trace it; a signal
 * from inside does not reach it (pid_namespaces(7)); its sockets have names nowhere inside.
 *
 * A launcher is the subreaper of its command, so nothing but launchers is ever a child of init: whatever
 * else arrives here was below a launcher that died by force, and dies too. Where there are overlays, or binds may come, init
 * keeps its capabilities, over namespaces of its own, for what restack.c and binds.c do; a child of it may sweep or copy for
 * a while.
 */
#include "resident.h"

#include <linux/prctl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/wait.h>

enum { MAX_STOPS = 64 };

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

/* Reap what has ended; kill what a dead launcher left behind. */
static long reap(struct resident *r)
{
	/* first: one that ends meanwhile has let go before, but we may still hear of those it had stopped */
	const bool copying = sbx_pool_any(r->pool, SBX_LAUNCHER_COPIER);
	bool strays = false, failed = false, held = false;
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
			if (!copying)
				resist(r, (pid_t)pid);
			continue;
		}
		const unsigned number = sbx_pool_find(r->pool, (pid_t)pid);
		strays |= number == SBX_MAX_LAUNCHERS || !WIFEXITED(status);
		if (number == SBX_MAX_LAUNCHERS)
			continue;
		const bool broken = WIFEXITED(status) && WEXITSTATUS(status);
		if (broken && (number == r->first || r->pool->state[number] == SBX_LAUNCHER_NURSERY))
			return -ECHILD; /* it has said why */
		failed |= broken;
		held |= r->pool->state[number] == SBX_LAUNCHER_COPIER;
		sbx_pool_forget(r, number);
	}
	sbx_pool_look(r);
	if (strays)
		(void)sbx_pool_signal(r->pool, 1, SIGKILL);
	if (held && !r->stopped) /* their holder was killed: all go on, also who stood still before */
		(void)sbx_sys(SYS_kill, -1, SIGCONT);
	if (sbx_pool_any(r->pool, SBX_LAUNCHER_COPIER)) /* nobody may start anything */
		return 0;
	return failed && !sbx_pool_idle(r->pool) ? -EAGAIN : sbx_pool_ensure(r);
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
	return sbx_pool_signal(r->pool, 0, sig);
}

void *sbx_map_memory(size_t size, int how, struct sbx_error *err)
{
	long map = sbx_sys(SYS_mmap, NULL, size, PROT_READ | PROT_WRITE, how | MAP_ANONYMOUS, -1, 0);

	if (map >= 0 || map <= -4096)
		return (void *)map;
	sbx_fail(err, SBX_STAGE_LAUNCHER, 0, map);
	return NULL;
}

/* BIND, UNBIND; also while commands run, who see it at once. */
static void change_binds(struct resident *r, const struct sbx_bind *b, const int *fds, size_t nfds)
{
	const bool more = b->kind == SBX_MESSAGE_BIND;
	struct sbx_record done = { .kind = SBX_RECORD_DONE };

	if (nfds == 0)
		return;
	if (!r->box->binds || nfds != (more ? 2 : 1) || b->number >= SBX_MAX_BINDS || b->target[sizeof b->target - 1])
		sbx_fail(&done.error, SBX_STAGE_LAUNCHER, 10, -EPROTO);
	else {
		SBX_FAULT_ARM(b->fault_at, b->fault_errno);
		(void)(more ? sbx_bind_add(r->box->binds, b, fds[1], &done.error) :
			      sbx_bind_remove(r->box->binds, b, &done.error));
		SBX_FAULT_ARM(0, 0);
	}
	(void)sbx_send_record(fds[0], &done, NULL, 0, -1);
}

/* A message from the host. Returns false when there will be no more. */
static bool hear(struct resident *r)
{
	struct sbx_record done = { .kind = SBX_RECORD_DONE };
	union {
		struct sbx_message msg;
		struct sbx_layers layers;
		struct sbx_bind bind;
	} in;
	int fds[1 + SBX_MAX_LAYERS];
	size_t nfds = SBX_COUNT(fds);
	bool more = true;

	long len = sbx_receive(r->box->keeper, &in, sizeof in, fds, &nfds), ret = -EPROTO;
	bool layers = len == sizeof in.layers && in.layers.magic == SBX_REQUEST_MAGIC;
	if (layers && in.layers.kind == SBX_MESSAGE_LAYERS) {
		more = sbx_restack(r, &in.layers, fds, nfds);
	} else if (layers && in.layers.kind == SBX_MESSAGE_COPY && nfds == 1) {
		sbx_restack_copy(r, &in.layers, fds[0]);
	} else if (len == sizeof in.bind && in.bind.magic == SBX_REQUEST_MAGIC &&
		   (in.bind.kind == SBX_MESSAGE_BIND || in.bind.kind == SBX_MESSAGE_UNBIND)) {
		change_binds(r, &in.bind, fds, nfds);
	} else {
		if (len == sizeof in.msg && in.msg.magic == SBX_REQUEST_MAGIC) {
			if (in.msg.kind == SBX_MESSAGE_END)
				more = false;
			if (in.msg.kind == SBX_MESSAGE_SIGNAL && in.msg.signal >= 0 && in.msg.signal <= 64)
				ret = signal_all(r, in.msg.signal);
		}
		done.error.err = ret < 0 ? (int32_t)-ret : 0;
		if (nfds && more)
			(void)sbx_send_record(fds[0], &done, NULL, 0, -1);
	}
	for (size_t i = 0; i < nfds; i++)
		sbx_close(fds[i]);
	return more;
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
	static const struct sbx_layers nothing;
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
		bool waits = again || box->retired.count;
		long ret = sbx_sys(SYS_ppoll, fds, SBX_COUNT(fds), waits ? &soon : NULL, NULL, 0);
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
		sbx_restack_sweep(r, &nothing);
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

/* Out of the way of 0 to 2. */
static int lift(int fd)
{
	return fd >= 0 && fd < 3 ? (int)sbx_sys(SYS_fcntl, fd, F_DUPFD_CLOEXEC, 3) : fd;
}

/* A process closes what it holds before the kernel kills the rest of its namespace: who waits for it shall find nobody. */
static void leave_empty(void)
{
	long ret = sbx_sys(SYS_kill, -1, SIGKILL);

	while (ret >= 0)
		ret = sbx_sys(SYS_wait4, -1, NULL, 0, NULL);
}

int sbx_resident_run(struct sbx_box *box, struct sbx_error *err)
{
	static const uint64_t all = ~0ULL; /* the kernel's sigset_t; a command gets an empty one */
	struct resident r = { .box = box, .nursery = -1 };

	if (box->persistent && sbx_session_new(err) < 0) /* the spawner's group ends with the host: spawner.c */
		return -1;

	(void)sbx_sys(SYS_rt_sigprocmask, SIG_SETMASK, &all, NULL, sizeof all);
	(void)sbx_sys(SYS_prctl, PR_SET_NAME, "sbx-init", 0, 0, 0);

	r.pool = sbx_map_memory(sizeof *r.pool, MAP_SHARED, err);
	box->pause = map_pause(box->pause_page, err);
	if (!box->pause)
		return -1;
	r.inbox = r.pool ? sbx_map_memory(sizeof *r.inbox, MAP_PRIVATE, err) : NULL;
	if (!r.inbox)
		return -1;
	bool mounts = box->plan->flags & SBX_PLAN_MOUNTS;
	box->binds = mounts ? sbx_map_memory(sizeof *box->binds, MAP_PRIVATE, err) : NULL;
	if (mounts && !box->binds)
		return -1;
	sbx_binds_init(box->binds);
	r.poke = lift((int)sbx_sys(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK));
	bool overlays = box->void_fd >= 0;
	box->void_fd = lift(box->void_fd);
	if (r.poke < 0 || (overlays && box->void_fd < 0))
		return sbx_fail(err, SBX_STAGE_LAUNCHER, 1, -EMFILE);
	int keep[] = {
		box->control,		box->keeper, box->work,	   box->spawner->host_pidfd,
		box->spawner->children, r.poke,	     box->void_fd,
	};
	int kept[SBX_COUNT(keep) + 2 * SBX_MAX_GROUPS];
	memcpy(kept, keep, sizeof keep);
	memcpy(kept + SBX_COUNT(keep), box->slot_dir, box->slots * sizeof(int));
	memcpy(kept + SBX_COUNT(keep) + box->slots, box->hold, box->holds * sizeof(int));
	long ret = sbx_fds_close_except(kept, SBX_COUNT(keep) + box->slots + box->holds);
	if (ret >= 0)
		ret = fill_stdio();
	if (ret >= 0)
		ret = sbx_pool_add(&r);
	if (ret < 0)
		return sbx_fail(err, r.no_group ? SBX_STAGE_CGROUP : SBX_STAGE_LAUNCHER, r.no_group ? 26 : 2, ret);
	if (!box->persistent)
		sbx_close(sbx_steal_fd(&box->control));
	(void)serve(&r);
	if (box->holds)
		leave_empty();
	return 0; /* nobody is there to hear of an error any more: the end is the answer */
}
