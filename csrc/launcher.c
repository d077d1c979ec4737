/*
 * launcher.c - the process from which a living sandbox's commands are started: takes a request from the
 * socket that all launchers of the sandbox share, serves it to its end, takes the next.
 *
 * It was forked from init and never execs: root of the sandbox's own namespace without any power but to
 * become the payload and to kill it (cred.c), behind Landlock and the filter, not dumpable. A command is a
 * vfork away and inherits all of that. As the command's subreaper (prctl(2)) it knows everything that is
 * below it, and nothing below it outlives it.
 */
#include "box.h"

#include <linux/prctl.h>
#include <poll.h>

enum { SPARE = 2 }; /* so many idle ones are enough */

static unsigned count(const struct sbx_pool *pool, int state)
{
	unsigned n = 0;

	for (unsigned i = 0; i < pool->used; i++)
		n += pool->state[i] == state;
	return n;
}

/* Who is there and stays: not who ends perhaps, or is yet to come, for then a payload could have one process too many. */
static unsigned count_peers(const struct sbx_pool *pool)
{
	return count(pool, SBX_LAUNCHER_IDLE) + count(pool, SBX_LAUNCHER_BUSY) + count(pool, SBX_LAUNCHER_NURSERY);
}

static void execute(struct sbx_box *box, const struct sbx_message *msg, size_t len, int *fds, size_t nfds,
		    struct sbx_error *err)
{
	size_t mapped, own = nfds;
	const struct sbx_request *r = sbx_inbox_request(msg, len, fds, &own, &mapped, err);

	if (!r)
		return;
	SBX_FAULT_ARM(r->fault_at, r->fault_errno);
	if (r->flags & (SBX_REQUEST_SANDBOX | SBX_REQUEST_PERSISTENT))
		sbx_fail(err, SBX_STAGE_REQUEST, 26, -EINVAL);
	else if (sbx_box_fill(box, r, fds, own, err) == 0)
		sbx_command_run(box, fds, nfds, err);
	SBX_FAULT_ARM(0, 0);
	sbx_inbox_release(r, mapped);
}

/* Whoever asked may have let go while the request lay in the queue. */
static bool given_up(const int *fds, size_t nfds)
{
	const struct timespec now = { 0 };
	struct pollfd p = { .fd = nfds ? fds[0] : -1, .events = POLLRDHUP };

	return sbx_sys(SYS_ppoll, &p, 1, &now, NULL, 0) > 0 && p.revents & (POLLRDHUP | POLLHUP);
}

static void dispatch(const struct sbx_launcher *l, size_t len, int *fds, size_t nfds)
{
	const struct sbx_message *msg = (const void *)l->inbox->bytes;
	struct sbx_error err = { .stage = SBX_STAGE_NONE };
	struct sbx_box *box = l->box;

	if (given_up(fds, nfds))
		return;
	if (len < sizeof *msg || msg->magic != SBX_REQUEST_MAGIC || nfds == 0)
		return; /* nobody to answer: closing what came is the answer */
	box->peers = count_peers(l->pool);
	if (msg->kind == SBX_MESSAGE_EXEC)
		execute(box, msg, len, fds, nfds, &err);
	else if (msg->kind == SBX_MESSAGE_FILES)
		sbx_files_serve(box, fds[0]);
	else
		sbx_fail(&err, SBX_STAGE_LAUNCHER, 3, -EPROTO);
	*box->state = SBX_LAUNCHER_ENDING;
	if (err.stage != SBX_STAGE_NONE)
		sbx_send_error(fds[0], &err);
}

/* The next datagram. From its receipt on we are busy. */
static long take(const struct sbx_launcher *l, int *fds, size_t *nfds)
{
	long len = sbx_receive(l->box->work, l->inbox->bytes, sizeof l->inbox->bytes, fds, nfds);

	l->pool->state[l->number] = SBX_LAUNCHER_BUSY;
	return len;
}

/*
 * The same where init may replace us: it must never believe that we are idle while we have taken a request. So
 * that is done behind a door, when there is something to take.
 */
static long take_behind_door(const struct sbx_launcher *l, int *fds, size_t *nfds)
{
	struct pollfd p = { .fd = l->box->work, .events = POLLIN };
	const struct timespec now = { 0 };

	for (;;) {
		(void)sbx_sys(SYS_ppoll, &p, 1, NULL, NULL, 0);
		sbx_door_enter(l->pool, l->number);
		bool ready = sbx_sys(SYS_ppoll, &p, 1, &now, NULL, 0) > 0;
		long len = ready ? take(l, fds, nfds) : 0;
		sbx_door_leave(l->pool, l->number);
		if (ready)
			return len;
	}
}

/* One request. Returns false when there will be no more. */
static bool serve(const struct sbx_launcher *l)
{
	int fds[SBX_MAX_FDS];
	size_t nfds = SBX_COUNT(fds);
	const uint64_t one = 1;

	long len = l->box->plan->flags & SBX_PLAN_LAYERS ? take_behind_door(l, fds, &nfds) : take(l, fds, &nfds);
	if (len == 0 && !l->box->persistent) { /* the host has let go: init knows, too */
		(void)sbx_sys(SYS_ppoll, NULL, 0, NULL, NULL, 0);
		return false;
	}
	l->box->paused_before = sbx_paused(l->box->pause, sbx_now()); /* first: we may be frozen at any moment */
	l->box->clock[SBX_CLOCK_RECEIVED] = l->box->clock[SBX_CLOCK_STARTED] = sbx_now();
	if (count(l->pool, SBX_LAUNCHER_IDLE) + count(l->pool, SBX_LAUNCHER_STARTING) == 0)
		(void)sbx_sys(SYS_write, l->poke, &one, sizeof one);
	dispatch(l, len < 0 ? 0 : (size_t)len, fds, nfds);
	for (size_t i = 0; i < nfds; i++)
		sbx_close(fds[i]);
	if (count(l->pool, SBX_LAUNCHER_IDLE) >= SPARE)
		return false;
	if (l->slot && (!sbx_slot_restore(l->slot) || sbx_gauge_worn(&l->slot->gauge, UINT64_MAX)))
		return false;
	l->pool->state[l->number] = SBX_LAUNCHER_IDLE;
	return true;
}

/* From a copy of init to what takes commands. */
static int settle(const struct sbx_launcher *l, struct sbx_error *err)
{
	int keep[24] = { 0, 1, 2, l->box->work, l->poke, l->box->spawner->children, l->first ? l->box->control : -1 };
	size_t kept = 7;

	long ret = l->slot ? sbx_slot_enter(l->slot) : 0;
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_CGROUP, 25, ret);
	ret = sbx_sys(SYS_prctl, PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
	(void)sbx_sys(SYS_prctl, PR_SET_NAME, "sbx-launcher", 0, 0, 0);
	for (int i = 0; l->slot && i < SBX_GAUGES; i++)
		keep[kept++] = l->slot->gauge.fd[i];
	if (l->slot) {
		keep[kept++] = l->slot->oom;
		keep[kept++] = l->slot->limit[0];
		keep[kept++] = l->slot->limit[1];
		keep[kept++] = l->slot->whole;
	}
	if (ret >= 0)
		ret = sbx_fds_close_except(keep, kept);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_LAUNCHER, 5, ret);
	if (l->box->plan->flags & SBX_PLAN_FILTER_ONCE && sbx_seccomp_load(l->box->plan, err) < 0)
		return -1;
	if (l->slot)
		sbx_gauge_begin(&l->slot->gauge);
	return 0;
}

_Noreturn void sbx_launcher_run(const struct sbx_launcher *l)
{
	const struct sbx_record ready = { .kind = SBX_RECORD_READY };
	struct sbx_error err = { .stage = SBX_STAGE_NONE };

	int ret = settle(l, &err);
	if (l->first && ret < 0)
		sbx_send_error(l->box->control, &err);
	else if (l->first)
		ret = sbx_send_record(l->box->control, &ready, NULL, 0, -1);
	if (ret >= 0) {
		if (l->first)
			sbx_close(l->box->control);
		l->box->control = l->box->keeper = -1;
		l->box->slot = l->slot;
		l->box->pool = l->pool;
		l->box->state = &l->pool->state[l->number];
		l->pool->state[l->number] = SBX_LAUNCHER_IDLE;
		while (serve(l))
			;
	}
	(void)syscall(SYS_exit_group, ret < 0 ? 1 : 0);
	__builtin_unreachable();
}
