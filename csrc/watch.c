/*
 * watch.c - whether a command has used up what its control group may have: memory, by what the kernel tells, and
 * CPU time, looked at no sooner than it can be up.
 */
#include "box.h"

#include <poll.h>

enum { OOM_NS = 500000000, OOM_LOOK_NS = 2000000, CPU_LOOK_NS = 1000000 };

void sbx_watch_begin(struct sbx_watch *w, struct sbx_slot *slot, uint64_t cpu_us)
{
	*w = (struct sbx_watch){ .gauge = slot ? &slot->gauge : NULL, .oom = slot ? slot->oom : -1, .cpu_us = cpu_us };
	if (!slot)
		return;
	sbx_gauge_begin(w->gauge);
	if (w->oom >= 0) /* what an earlier command has left */
		(void)sbx_sys(SYS_read, w->oom, &(uint64_t){ 0 }, sizeof(uint64_t));
}

/* What to poll for want of memory. */
struct pollfd sbx_watch_event(const struct sbx_watch *w)
{
	int events = w->gauge ? sbx_gauge_events(w->gauge) : -1;

	return events >= 0 ? (struct pollfd){ .fd = events, .events = POLLPRI } :
			     (struct pollfd){ .fd = w->oom, .events = POLLIN };
}

/*
 * Version 2 tells after a kill, in the group of who was killed. Version 1 tells before it, in all groups below the
 * one that is full: whether it was one of ours shows a moment later.
 */
bool sbx_watch_memory(struct sbx_watch *w, const struct pollfd *event)
{
	uint64_t drop, now = sbx_now();

	if (event->revents && event->fd == w->oom) {
		(void)sbx_sys(SYS_read, event->fd, &drop, sizeof drop);
		w->memory_until = now + OOM_NS;
	}
	if (!w->gauge || (!event->revents && now >= w->memory_until))
		return false;
	return sbx_gauge_out_of_memory(w->gauge);
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
bool sbx_watch_cpu(struct sbx_watch *w)
{
	uint64_t now = sbx_now();

	if (!w->cpu_us || !w->gauge || !sbx_gauge_has_cpu(w->gauge) || now < w->cpu_look)
		return false;
	uint64_t used = sbx_gauge_cpu(w->gauge);
	if (used >= w->cpu_us)
		return true;
	if (!w->cpus)
		w->cpus = count_cpus();
	uint64_t left = (w->cpu_us - used) * 1000 / w->cpus;
	w->cpu_look = now + (left < CPU_LOOK_NS ? CPU_LOOK_NS : left);
	return false;
}

/* When to look again; 0: when something happens. */
uint64_t sbx_watch_next(const struct sbx_watch *w)
{
	uint64_t now = sbx_now();

	return now < w->memory_until ? now + OOM_LOOK_NS : w->cpu_look;
}
