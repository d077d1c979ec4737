/*
 * restack.c - what the host wants of a sandbox's layers, as init does it: other ones, at once and while no command runs
 * (layers.c), or a copy, by a child and meanwhile (layer.c); and what was replaced ends (sweep.c). Who does anything for init has a
 * place among the launchers, or it would be a stray.
 */
#include "resident.h"

#include <sys/mman.h>

/* So that it is nobody's stray. */
static void place_sweeper(const struct resident *r, pid_t pid)
{
	const unsigned number = pid ? sbx_pool_take(r->pool, SBX_LAUNCHER_SWEEPER) : SBX_MAX_LAUNCHERS;

	if (number < SBX_MAX_LAUNCHERS)
		r->pool->pid[number] = pid;
}

/* End what was retired if it is time; `l` has what is about to be removed. */
void sbx_restack_sweep(const struct resident *r, const struct sbx_layers *l)
{
	static const struct sbx_layers nothing;

	if (sbx_retired_due(&r->box->retired, l))
		place_sweeper(r, sbx_sweep(r->box, true, &nothing, &nothing));
}

/* LAYERS. Returns false where the sandbox has to end. */
bool sbx_restack(struct resident *r, const struct sbx_layers *l, int *fds, size_t nfds)
{
	struct sbx_record done = { .kind = SBX_RECORD_DONE };
	const uint64_t one = 1;
	struct sbx_layers plain;
	pid_t sweeper;
	int ret = -1;

	if (nfds == 0)
		return true;
	const bool closed = sbx_door_close(r->pool);
	if (r->box->void_fd < 0 || l->count > SBX_MAX_LAYERS ||
	    (l->drops > SBX_COUNT(l->drop) && l->drops != SBX_DROP_OLD) ||
	    sbx_layers_take(&plain, l->number, l->count) != (int)nfds - 1)
		sbx_fail(&done.error, SBX_STAGE_LAUNCHER, 7, -EPROTO);
	else if (!closed || sbx_pool_any(r->pool, SBX_LAUNCHER_BUSY) || sbx_pool_any(r->pool, SBX_LAUNCHER_COPIER))
		sbx_fail(&done.error, SBX_STAGE_LAUNCHER, 8, -EBUSY);
	else {
		SBX_FAULT_ARM(l->fault_at, l->fault_errno);
		ret = sbx_layers_change(r->box, l, fds + 1, &sweeper, &done.error);
		SBX_FAULT_ARM(0, 0);
	}
	if (ret >= 0)
		place_sweeper(r, sweeper);
	if (ret >= 0 && sbx_pool_renew(r) < 0)
		(void)sbx_sys(SYS_write, r->poke, &one, sizeof one); /* as with every other that cannot be made */
	if (closed)
		sbx_door_open(r->pool);
	done.status = ret == -2;
	(void)sbx_send_record(fds[0], &done, NULL, 0, ret > 0 ? ret : -1);
	if (ret > 0)
		sbx_close(ret);
	return ret != -2;
}

/* COPY, in a child; of what is written to while all others stand still. */
static void copy_layer(const struct resident *r, unsigned self, struct sbx_chore *chore, const struct sbx_layers *l,
		       int answer)
{
	sbx_binds_forget(r->box->binds);
	sbx_retired_forget(&r->box->retired);
	struct sbx_record done = { .kind = SBX_RECORD_DONE };
	struct sbx_held *held = sbx_map_memory(sizeof *held, MAP_PRIVATE, &done.error);
	int layer = -1;

	sbx_layers_drop(chore);
	bool still = r->pool->state[self] == SBX_LAUNCHER_COPIER;
	long ret = held && still ? sbx_proc_hold(held) : 0;
	if (ret < 0)
		sbx_fail(&done.error, SBX_STAGE_LAUNCHER, 9, ret);
	if (held && ret == 0 && l->upper)
		layer = sbx_layers_copy(r->box, chore, l->upper, &done.error);
	else
		sbx_chore_cancel(chore, l->upper);
	SBX_FAULT_ARM(0, 0);
	if (held && ret == 0 && still)
		sbx_proc_let_go(held);
	/* launchers go on also where a payload had stopped them: init takes that for our work as long as we are here */
	for (unsigned i = 0; i < r->pool->used && still; i++)
		if (r->pool->pid[i] > 0)
			(void)sbx_sys(SYS_kill, r->pool->pid[i], SIGCONT);
	r->pool->state[self] = SBX_LAUNCHER_SWEEPER;
	(void)sbx_send_record(answer, &done, NULL, 0, layer);
	for (;;)
		(void)sbx_sys(SYS_exit_group, 0);
}

static long open_chore(const struct resident *r, const struct sbx_layers *l, struct sbx_chore *chore,
		       struct sbx_error *err)
{
	long ret = sbx_chore_begin(r->box, chore);

	if (ret >= 0 && l->upper)
		ret = sbx_chore_copy(chore, l->upper, l->count ? l->number : &r->box->layers.upper,
				     l->count ? l->count : 1);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_MOUNT, r->box->plan->mounts.count, ret), ret;
	sbx_chore_drop(chore, l->drop, l->drops);
	return 0;
}

void sbx_restack_copy(struct resident *r, const struct sbx_layers *l, int answer)
{
	const struct clone_args args = { .exit_signal = SIGCHLD };
	struct sbx_record failed = { .kind = SBX_RECORD_DONE };
	struct sbx_chore chore;
	long pid = -EPROTO;

	const unsigned char as = l->count || !l->upper ? SBX_LAUNCHER_SWEEPER : SBX_LAUNCHER_COPIER;

	if (r->box->void_fd >= 0 && !r->stopped && l->drops <= SBX_COUNT(l->drop) && l->count <= SBX_MAX_LAYERS)
		pid = sbx_pool_any(r->pool, SBX_LAUNCHER_COPIER) ? -EBUSY : -EAGAIN;
	if (pid == -EAGAIN)
		sbx_restack_sweep(r, l);
	const unsigned number = pid == -EAGAIN ? sbx_pool_take(r->pool, as) : SBX_MAX_LAUNCHERS;
	if (number < SBX_MAX_LAUNCHERS) {
		SBX_FAULT_ARM(l->fault_at, l->fault_errno);
		pid = open_chore(r, l, &chore, &failed.error);
		if (pid >= 0)
			pid = sbx_sys(SYS_clone3, &args, sizeof args);
		if (pid == 0)
			copy_layer(r, number, &chore, l, answer);
		SBX_FAULT_ARM(0, 0);
		if (pid < 0)
			sbx_chore_cancel(&chore, l->upper);
		sbx_chore_close(&chore);
		r->pool->pid[number] = pid < 0 ? 0 : (pid_t)pid;
		if (pid < 0)
			r->pool->state[number] = SBX_LAUNCHER_NONE;
	}
	if (pid > 0)
		return;
	if (failed.error.err == 0)
		failed.error.err = (int32_t)-pid;
	(void)sbx_send_record(answer, &failed, NULL, 0, -1);
}
