/*
 * watch.c - whether a command has used up what its control group may have: memory, by what the kernel tells, and
 * CPU time, looked at no sooner than it can be up.
 *
 * Shared by the helper, after clone, and the host.
 */
#include "util.h"

enum { OOM_NS = 500000000, OOM_LOOK_NS = 2000000, CPU_LOOK_NS = 1000000 };

/* `oom` is an eventfd that tells of a lack of memory in a group of version 1, or -1. */
void sbx_watch_begin(struct sbx_watch *w, struct sbx_gauge *gauge, int oom, uint64_t cpu_us)
{
	*w = (struct sbx_watch){ .gauge = gauge, .oom = oom, .cpu_us = cpu_us };
	if (!gauge)
		return;
	sbx_gauge_begin(gauge);
	if (oom >= 0) /* what an earlier command has left */
		(void)sbx_sys(SYS_read, oom, &(uint64_t){ 0 }, sizeof(uint64_t));
}

/* What to poll for want of memory. */
struct pollfd sbx_watch_event(const struct sbx_watch *w)
{
	int events = w->gauge ? sbx_gauge_events(w->gauge) : -1;

	return events >= 0 ? (struct pollfd){ .fd = events, .events = POLLPRI } :
			     (struct pollfd){ .fd = w->gauge ? w->oom : -1, .events = POLLIN };
}

/*
 * Whether a process was killed for want of memory; `event`: there was one to poll. Version 2 tells after a kill, in
 * the group of who was killed. Version 1 tells before it, in all groups below the one that is full: whether it
 * was one of ours shows a moment later.
 */
int sbx_watch_memory(struct sbx_watch *w, int event)
{
	uint64_t drop, now = sbx_now();

	if (!w->gauge)
		return 0;
	if (event && w->oom >= 0) {
		(void)sbx_sys(SYS_read, w->oom, &drop, sizeof drop);
		w->memory_until = now + OOM_NS;
	}
	return (event || now < w->memory_until) && sbx_gauge_out_of_memory(w->gauge);
}

static unsigned count_cpus(void)
{
	uint64_t mask[64] = { 0 };
	unsigned n = 0;

	long bytes = sbx_sys(SYS_sched_getaffinity, 0, sizeof mask, mask);
	for (long i = 0; i < bytes / 8; i++)
		for (uint64_t rest = mask[i]; rest; rest &= rest - 1)
			n++;
	return n ? n : 1;
}

/* The time is up when it is up on all CPUs at once, at the earliest. */
int sbx_watch_cpu(struct sbx_watch *w)
{
	uint64_t now = sbx_now();

	if (!w->cpu_us || !w->gauge || !sbx_gauge_has_cpu(w->gauge) || now < w->cpu_look)
		return 0;
	uint64_t used = sbx_gauge_cpu(w->gauge);
	if (used >= w->cpu_us)
		return 1;
	if (!w->cpus)
		w->cpus = count_cpus();
	uint64_t left = (w->cpu_us - used) * 1000 / w->cpus;
	w->cpu_look = now + (left < CPU_LOOK_NS ? CPU_LOOK_NS : left);
	return 0;
}

/* When to look again; 0: when something happens. */
uint64_t sbx_watch_next(const struct sbx_watch *w)
{
	uint64_t now = sbx_now();

	return now < w->memory_until ? now + OOM_LOOK_NS : w->cpu_look;
}
