/*
 * pool.c - the launchers that init keeps ready: one is always idle, and each command has one to itself.
 *
 * All of them, and so all commands, have to be in one Landlock domain, or they could not signal each other. It is init's,
 * unless init has to mount while the sandbox runs. Then a child has it, the nursery, and makes the launchers as children of init
 * (CLONE_PARENT); and with other layers there is another nursery.
 */
#include "resident.h"

#include <linux/prctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>

enum { MAX_FAILURES = 100 /* to make a launcher, 50 ms apart */ };

struct ask {
	uint32_t number, first;
};

bool sbx_pool_any(const struct sbx_pool *pool, unsigned char state)
{
	for (unsigned i = 0; i < pool->used; i++)
		if (pool->state[i] == state)
			return true;
	return false;
}

bool sbx_pool_idle(const struct sbx_pool *pool)
{
	return sbx_pool_any(pool, SBX_LAUNCHER_IDLE) || sbx_pool_any(pool, SBX_LAUNCHER_STARTING);
}

/* The place of a child, SBX_MAX_LAUNCHERS for a stray. */
unsigned sbx_pool_find(const struct sbx_pool *pool, pid_t pid)
{
	for (unsigned i = 0; i < pool->used; i++)
		if (pool->pid[i] == pid)
			return i;
	return SBX_MAX_LAUNCHERS;
}

/* A place for a child; also for one that is no launcher, so that it is nobody's stray. */
unsigned sbx_pool_take(struct sbx_pool *pool, unsigned char state)
{
	unsigned i = 0;

	while (i < pool->used && pool->state[i] != SBX_LAUNCHER_NONE)
		i++;
	if (i == SBX_MAX_LAUNCHERS)
		return i;
	pool->pid[i] = 0;
	pool->state[i] = state;
	if (i == pool->used)
		pool->used = i + 1;
	return i;
}

void sbx_pool_forget(struct resident *r, unsigned number)
{
	if (r->pool->state[number] == SBX_LAUNCHER_NURSERY)
		sbx_close(sbx_steal_fd(&r->nursery));
	r->pool->pid[number] = 0;
	r->pool->state[number] = SBX_LAUNCHER_NONE;
	sbx_door_leave(r->pool, number);
	sbx_slot_remove(r->box, number);
}

/*
 * Signal what is below a process, or with 0 everything, but for the children that have places here when they are looked
 * at: a nursery may be making one meanwhile.
 */
long sbx_pool_signal(const struct sbx_pool *pool, pid_t ancestor, int sig)
{
	return sbx_proc_signal(ancestor, (const volatile pid_t *)pool->pid, SBX_MAX_LAUNCHERS, sig);
}

/* --- births -------------------------------------------------------------------------------------- */

/* A launcher in its place, by init or by the nursery. The kernel notes its number there before it runs. */
static long bear(struct resident *r, const struct ask *ask, uint64_t flags)
{
	struct clone_args args = {
		.flags = flags | CLONE_PARENT_SETTID,
		.parent_tid = (uintptr_t)&r->pool->pid[ask->number],
		.exit_signal = flags & CLONE_PARENT ? 0 : SIGCHLD,
	};
	struct sbx_slot slot, *own = r->box->slots ? &slot : NULL;

	long ret = own ? sbx_slot_make(r->box, ask->number, own) : 0;
	r->no_group = ret < 0;
	if (ret >= 0 && own && own->dir >= 0) {
		args.flags |= CLONE_INTO_CGROUP;
		args.cgroup = (unsigned)own->dir;
	}
	if (ret >= 0) {
		const struct sbx_launcher launcher = {
			r->box, r->pool, r->inbox, ask->number, r->poke, ask->first, own
		};
		ret = sbx_sys(SYS_clone3, &args, sizeof args);
		if (ret == 0)
			sbx_launcher_run(&launcher);
		if (own)
			sbx_slot_close(own);
	}
	if (ret < 0) {
		sbx_slot_remove(r->box, ask->number);
		r->pool->state[ask->number] = SBX_LAUNCHER_NONE;
		return ret;
	}
	return 0;
}

/* Whoever waits for the first launcher hears why there is none. */
static void give_up(const struct resident *r, const struct sbx_error *err)
{
	if (!r->begun)
		sbx_send_error(r->box->control, err);
	for (;;)
		(void)sbx_sys(SYS_exit_group, 1);
}

static void run_nursery(struct resident *r, int sock)
{
	const uint64_t one = 1;
	struct sbx_error err;
	struct ask ask;

	(void)sbx_sys(SYS_prctl, PR_SET_NAME, "sbx-nursery", 0, 0, 0);
	sbx_binds_forget(r->box->binds);
	sbx_retired_forget(&r->box->retired);
	/* the rules first: a payload may have closed a directory on the way to what they are about */
	if (sbx_landlock_restrict(r->box, &err) < 0 || sbx_cred_keep_launcher(r->box->plan, &err) < 0)
		give_up(r, &err);
	while (sbx_sys(SYS_recvfrom, sock, &ask, sizeof ask, 0, NULL, NULL) == sizeof ask) {
		long ret = bear(r, &ask, CLONE_PARENT);
		if (ret < 0 && ask.first) {
			sbx_fail(&err, r->no_group ? SBX_STAGE_CGROUP : SBX_STAGE_LAUNCHER, r->no_group ? 26 : 2, ret);
			give_up(r, &err);
		}
		r->begun = true;
		sbx_close(sbx_steal_fd(&r->box->control));
		(void)sbx_sys(SYS_write, r->poke, &one, sizeof one); /* init looks for it: it may be gone already */
	}
	for (;;)
		(void)sbx_sys(SYS_exit_group, 0);
}

static long start_nursery(struct resident *r)
{
	const struct clone_args args = { .exit_signal = SIGCHLD };
	int sock[2];

	const unsigned number = sbx_pool_take(r->pool, SBX_LAUNCHER_NURSERY);
	if (number == SBX_MAX_LAUNCHERS)
		return -EAGAIN;
	long ret = sbx_sys(SYS_socketpair, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sock);
	if (ret >= 0) {
		r->nursery = sock[0];
		ret = sbx_sys(SYS_clone3, &args, sizeof args);
		if (ret == 0) {
			sbx_close(sock[0]);
			run_nursery(r, sock[1]);
		}
		sbx_close(sock[1]);
	}
	r->pool->pid[number] = ret > 0 ? (pid_t)ret : 0;
	if (ret < 0)
		sbx_pool_forget(r, number);
	return ret < 0 ? ret : 0;
}

/* Without waiting: it may have been stopped with all others. */
static long ask_nursery(struct resident *r, const struct ask *ask)
{
	long ret = r->nursery < 0 ? start_nursery(r) : 0;

	if (ret >= 0)
		ret = sbx_sys(SYS_sendto, r->nursery, ask, sizeof *ask, MSG_NOSIGNAL | MSG_DONTWAIT, NULL, 0);
	if (ret < 0)
		r->pool->state[ask->number] = SBX_LAUNCHER_NONE;
	return ret < 0 ? ret : 0;
}

/* One more launcher, unless there are as many as may be. 0 or -errno. */
long sbx_pool_add(struct resident *r)
{
	const struct ask ask = { sbx_pool_take(r->pool, SBX_LAUNCHER_STARTING), !r->begun };

	if (ask.number == SBX_MAX_LAUNCHERS)
		return 0;
	if (ask.first)
		r->first = ask.number;
	long ret = r->box->plan->flags & SBX_PLAN_MOUNTS ? ask_nursery(r, &ask) : bear(r, &ask, 0);
	r->begun = true;
	return ret;
}

/* Who will never start: not made by a nursery that was killed. */
void sbx_pool_look(struct resident *r)
{
	for (unsigned i = 0; i < r->pool->used && r->nursery < 0; i++)
		if (r->pool->state[i] == SBX_LAUNCHER_STARTING && r->pool->pid[i] == 0)
			sbx_pool_forget(r, i);
}

/*
 * There has to be one that is idle. What keeps one from being made is perhaps not there the next time: processes,
 * memory, descriptors, or somebody who tidies up groups. Without processes or memory the sandbox waits for ever,
 * for it may have used them up itself.
 */
long sbx_pool_ensure(struct resident *r)
{
	long ret = sbx_pool_idle(r->pool) ? 0 : sbx_pool_add(r);

	if (ret == -EAGAIN || ret == -ENOMEM)
		return -EAGAIN;
	r->failures = ret < 0 ? r->failures + 1 : 0;
	return ret < 0 && r->failures < MAX_FAILURES ? -EAGAIN : ret;
}

/* --- all of them anew ---------------------------------------------------------------------------- */

/* What it has to tell the host is told before it goes. */
static void await_end(const struct sbx_pool *pool, unsigned number)
{
	siginfo_t info = { .si_pid = 0 };

	for (int i = 0; i < 10000 && pool->state[number] == SBX_LAUNCHER_ENDING && info.si_pid == 0; i++) {
		sbx_nap(100000);
		(void)sbx_sys(SYS_waitid, P_PID, pool->pid[number], &info, WEXITED | WNOHANG | WNOWAIT, NULL);
	}
}

static void put_down(struct resident *r, unsigned number)
{
	const pid_t pid = r->pool->pid[number];

	if (pid) {
		(void)sbx_sys(SYS_kill, pid, SIGKILL);
		while (sbx_sys(SYS_wait4, pid, NULL, 0, NULL) == -EINTR)
			;
	}
	sbx_pool_forget(r, number);
}

/* Have all launchers born again: in other mounts, behind rules about these. None is busy. */
long sbx_pool_renew(struct resident *r)
{
	for (unsigned i = 0; i < r->pool->used; i++)
		if (r->pool->state[i] == SBX_LAUNCHER_NURSERY)
			put_down(r, i);
	for (unsigned i = 0; i < r->pool->used; i++) {
		const unsigned char state = r->pool->state[i];
		if (state == SBX_LAUNCHER_NONE || state == SBX_LAUNCHER_SWEEPER)
			continue;
		await_end(r->pool, i);
		put_down(r, i);
	}
	r->first = SBX_MAX_LAUNCHERS;
	return sbx_pool_add(r);
}
