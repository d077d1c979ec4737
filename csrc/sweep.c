/*
 * sweep.c - what goes when a sandbox has got other layers: the overlays that were replaced, and layers that nobody has any more.
 *
 * A file system ends with its last descriptor, which takes as long as much of it is cached, and so does the removal of files.
 * A child of init does both, at the lowest priority; but the kernel frees what was cached in everybody's time (RCU), and who
 * takes a snapshot often goes on with the next operation at once. So overlays whose files all stay are kept until nothing
 * has changed for a while, a few of them at most. What is to be removed waits for nobody: it counts against limits.disk.
 */
#include "box.h"

#include <sched.h>

enum { QUIET_NS = 250000000 };

/* Keep the root of an overlay that was replaced by now. Returns false where there is no room. */
bool sbx_retire(struct sbx_box *box, int *overlay)
{
	struct sbx_retired *r = &box->retired;

	if (r->count == SBX_COUNT(r->overlay))
		return false;
	r->overlay[r->count++] = sbx_steal_fd(overlay);
	r->newest = box->layers.upper; /* nothing it consists of has a higher number */
	r->due = sbx_now() + QUIET_NS;
	return true;
}

/* Also in a child: it must not hold what init wants to end. */
void sbx_retired_forget(struct sbx_retired *r)
{
	while (r->count)
		sbx_close(r->overlay[--r->count]);
}

/* Whether it is time to end what was retired: also when something that it may hold is to be removed. */
bool sbx_retired_due(const struct sbx_retired *r, const struct sbx_layers *l)
{
	if (r->count == 0 || l->drops == SBX_DROP_OLD)
		return r->count;
	for (uint32_t i = 0; i < l->drops; i++)
		if (l->drop[i] <= r->newest)
			return true;
	return r->count == SBX_COUNT(r->overlay) || sbx_now() >= r->due;
}

/*
 * A child ends what was retired, if that is due, and what else it has and init will not have; it removes the layers that `l`
 * names, of `old` ones. Returns the child, or 0: there can be none, and init ends the overlays.
 */
pid_t sbx_sweep(struct sbx_box *box, bool due, const struct sbx_layers *old, const struct sbx_layers *l)
{
	const struct clone_args args = { .exit_signal = SIGCHLD };
	const struct sched_param none = { 0 };
	struct sbx_chore chore;

	(void)sbx_chore_begin(box, &chore);
	if (l->drops == SBX_DROP_OLD) {
		sbx_chore_drop(&chore, &old->upper, 1);
		sbx_chore_drop(&chore, old->number, old->count);
	} else {
		sbx_chore_drop(&chore, l->drop, l->drops);
	}
	long pid = sbx_sys(SYS_clone3, &args, sizeof args);
	if (pid != 0) {
		if (due)
			sbx_retired_forget(&box->retired);
		sbx_chore_close(&chore);
		return pid < 0 ? 0 : (pid_t)pid;
	}
	/* The kernel would have others wait for milliseconds behind it. */
	(void)sbx_sys(SYS_sched_setscheduler, 0, SCHED_IDLE, &none);
	if (!due)
		sbx_retired_forget(&box->retired);
	sbx_binds_forget(box->binds);
	sbx_layers_drop(&chore);
	for (;;)
		(void)sbx_sys(SYS_exit_group, 0);
}
