/*
 * door.c - who takes a request of a sandbox whose layers change: one launcher at a time, and none while init makes the
 * overlays anew. What a launcher has taken must not be lost with it: so init waits for who is behind the door, however
 * long it is kept from running, and only the dead are not waited for.
 */
#include "box.h"

#include <limits.h>
#include <signal.h>
#include <sys/wait.h>

enum { PATIENCE_MS = 2000 };
static const unsigned INIT = UINT_MAX;

void sbx_door_enter(struct sbx_pool *pool, unsigned number)
{
	for (unsigned nobody = 0; !atomic_compare_exchange_strong(&pool->door, &nobody, number + 1); nobody = 0)
		(void)sbx_sys(SYS_sched_yield);
}

/* Also for one that has died: its place is about to be another's. */
void sbx_door_leave(struct sbx_pool *pool, unsigned number)
{
	unsigned own = number + 1;

	(void)atomic_compare_exchange_strong(&pool->door, &own, 0);
}

static bool has_ended(pid_t pid)
{
	siginfo_t info = { .si_pid = 0 };

	long ret = sbx_sys(SYS_waitid, P_PID, pid, &info, WEXITED | WNOHANG | WNOWAIT, NULL);
	return ret == -ECHILD || info.si_pid != 0;
}

/* By init, whose children they are. Returns false where somebody stays behind it who lives. */
bool sbx_door_close(struct sbx_pool *pool)
{
	for (int i = 0; i < PATIENCE_MS; i++) {
		unsigned holder = 0;
		if (atomic_compare_exchange_strong(&pool->door, &holder, INIT))
			return true;
		if (has_ended(pool->pid[holder - 1]))
			sbx_door_leave(pool, holder - 1);
		else
			sbx_nap(1000000);
	}
	return false;
}

void sbx_door_open(struct sbx_pool *pool)
{
	atomic_store(&pool->door, 0);
}
