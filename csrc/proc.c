/*
 * proc.c - who is below whom, and who stands still, read from /proc/PID/stat, proc(5); and signals by it. Only where
 * a command left something behind or is killed, or all have to stop: never on the way of one that just ends.
 *
 * A child that its parent has not reaped keeps its number, so between the look and the signal the number
 * cannot become somebody else's where the caller is the parent.
 */
#include "box.h"

enum { ZOMBIE = 'Z', DEAD = 'X', STOPPED = 'T', TRACED = 't' };

struct who {
	pid_t pid, parent, group;
	char state;
	bool dead; /* has ended and waits for its parent */
};

static const char *number(const char *text, pid_t *value)
{
	*value = 0;
	while (*text >= '0' && *text <= '9')
		*value = *value * 10 + (*text++ - '0');
	return text;
}

/*
 * "(name) S parent group ...", where the name may hold anything, parentheses too. A zombie with threads is
 * none: only its first one has ended (field 20, num_threads).
 */
static bool parse(const char *stat, size_t len, struct who *who)
{
	pid_t threads = 0;

	while (len > 0 && stat[len] != ')')
		len--;
	const char *at = stat + len;
	if (strlen(at) < 6)
		return false;
	who->state = at[2];
	(void)number(number(at + 4, &who->parent) + 1, &who->group);
	for (int field = 2; field < 20 && *at; at++)
		field += *at == ' ';
	(void)number(at, &threads);
	who->dead = (who->state == ZOMBIE && threads <= 1) || who->state == DEAD;
	return true;
}

static bool look(int proc, const char *name, struct who *who)
{
	char path[32], stat[512];

	if (*number(name, &who->pid))
		return false;
	sbx_format_path(path, "", (unsigned)who->pid, "/stat");
	_cleanup_fd_ int fd = (int)sbx_sys(SYS_openat, proc, path, O_RDONLY | O_CLOEXEC);
	long len = fd < 0 ? fd : sbx_sys(SYS_read, fd, stat, sizeof stat - 1);
	if (len <= 0) /* gone meanwhile */
		return false;
	stat[len] = '\0';
	return parse(stat, (size_t)len, who);
}

static bool listed(pid_t pid, const volatile pid_t *list, size_t count)
{
	for (size_t i = 0; i < count; i++)
		if (list[i] == pid)
			return true;
	return false;
}

/*
 * Whether `ancestor` (0: anybody) is above. The way up ends at whoever is spared: what is below a launcher
 * is that one's.
 */
static bool below(int proc, struct who who, pid_t ancestor, const volatile pid_t *spare, size_t count)
{
	char name[16];

	for (int depth = 0; depth < 4096 && ancestor != 0; depth++) {
		if (who.parent == ancestor)
			return true;
		sbx_format_path(name, "", (unsigned)who.parent, "");
		if (who.parent <= 1 || listed(who.parent, spare, count) || !look(proc, name, &who))
			return false;
	}
	return ancestor == 0;
}

/* Killed with its whole group: whoever is in it was below the same command, and cannot fork away. */
static void signal_one(const struct who *who, int sig)
{
	if (sig == SIGKILL && who->group > 1)
		(void)sbx_sys(SYS_kill, -who->group, sig);
	(void)sbx_sys(SYS_kill, who->pid, sig);
}

/* Every process but init that has not ended, until a visit returns an error. Returns the sum of what they return. */
static long each(long (*visit)(void *with, int proc, const struct who *), void *with)
{
	const struct sbx_dirent *entry;
	long found = 0, ret;

	_cleanup_fd_ int proc = (int)sbx_sys(SYS_openat, AT_FDCWD, "/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (proc < 0)
		return proc;
	struct sbx_reader reader = { .fd = proc };
	while ((ret = sbx_read_entry(&reader, &entry)) > 0) {
		struct who who;
		if (!look(proc, entry->name, &who) || who.pid <= 1 || who.dead)
			continue;
		ret = visit(with, proc, &who);
		if (ret < 0)
			return ret;
		found += ret;
	}
	return ret < 0 ? ret : found;
}

struct targets {
	pid_t ancestor;
	const volatile pid_t *spare;
	size_t count;
	int sig;
};

static long signal_target(void *with, int proc, const struct who *who)
{
	const struct targets *t = with;

	if (listed(who->pid, t->spare, t->count) || !below(proc, *who, t->ancestor, t->spare, t->count))
		return 0;
	signal_one(who, t->sig);
	return 1;
}

/*
 * Signal everything below `ancestor`, or with 0 every process, but init and those in `spare`. SIGKILL goes
 * out until nobody new is found; what forks faster than that is left to the caller's next attempt.
 */
long sbx_proc_signal(pid_t ancestor, const volatile pid_t *spare, size_t count, int sig)
{
	struct targets targets = { ancestor, spare, count, sig };
	long ret = 1;

	for (int round = 0; round < 16 && ret > 0; round++) {
		ret = each(signal_target, &targets);
		if (sig != SIGKILL)
			break;
	}
	return ret < 0 ? ret : 0;
}

/* --- everything at a standstill ------------------------------------------------------------------ */

static long note_stopped(void *with, int proc, const struct who *who)
{
	struct sbx_held *held = with;

	(void)proc;
	if (who->state != STOPPED)
		return 0;
	if (held->count == SBX_MAX_HELD)
		return -E2BIG;
	held->stopped[held->count++] = who->pid;
	return 1;
}

/* Threads that run, or will; whoever waits for a vfork(2) looks as if it would. */
static long count_moving(void *with, int proc, const struct who *who)
{
	const struct sbx_dirent *entry;
	char path[32];
	long moving = 0, ret = 0;

	if (who->pid == *(const pid_t *)with)
		return 0;
	sbx_format_path(path, "", (unsigned)who->pid, "/task");
	_cleanup_fd_ int tasks = (int)sbx_sys(SYS_openat, proc, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	struct sbx_reader reader = { .fd = tasks };
	while (tasks >= 0 && (ret = sbx_read_entry(&reader, &entry)) > 0) {
		struct who thread;
		moving += look(tasks, entry->name, &thread) && thread.state != STOPPED && thread.state != TRACED &&
			  thread.state != ZOMBIE && thread.state != DEAD;
	}
	return ret < 0 && ret != -ENOENT && ret != -ESRCH ? ret : moving;
}

/* Whoever waits for a child of vfork(2) stands still when that has gone on, and executed something. */
static long release_child(void *with, int proc, const struct who *who)
{
	const struct sbx_held *held = with;
	struct who parent;
	char name[16];

	sbx_format_path(name, "", (unsigned)who->parent, "");
	if (who->state != STOPPED || who->parent <= 1 || listed(who->pid, held->stopped, held->count) ||
	    !look(proc, name, &parent) || count_moving((void *)(uintptr_t)&held->self, proc, &parent) <= 0)
		return 0;
	return sbx_sys(SYS_kill, who->pid, SIGCONT);
}

/*
 * Have every process but init and the caller stand still, within 2 s: 0 or -errno, and then all go on. Nobody slips
 * through: a fork(2) does not end while a signal is pending. `held` remembers those that stood still anyway.
 */
long sbx_proc_hold(struct sbx_held *held)
{
	const uint64_t until = sbx_now() + 2000000000;

	held->count = 0;
	held->self = (pid_t)syscall(SYS_getpid);
	long ret = each(note_stopped, held);
	for (int round = 1; ret >= 0; round++) {
		(void)sbx_sys(SYS_kill, -1, SIGSTOP);
		ret = each(count_moving, &held->self);
		if (ret == 0)
			return 0;
		if (ret > 0 && sbx_now() > until)
			ret = -EBUSY;
		if (ret > 0 && round % 8 == 0)
			ret = each(release_child, held);
		sbx_nap(200000);
	}
	sbx_proc_let_go(held);
	return ret;
}

static long note_held(void *with, int proc, const struct who *who)
{
	struct sbx_held *held = with;

	(void)proc;
	if (listed(who->pid, held->stopped, held->count) || held->all == SBX_MAX_HELD)
		return 0;
	held->held[held->all++] = who->pid;
	return 1;
}

/* Let them go on. Who was born later first: a parent that looks must not find its child stopped. */
void sbx_proc_let_go(struct sbx_held *held)
{
	held->all = 0;
	if (each(note_held, held) < 0 || held->all == SBX_MAX_HELD)
		(void)sbx_sys(SYS_kill, -1, SIGCONT);
	while (held->all > 0)
		(void)sbx_sys(SYS_kill, held->held[--held->all], SIGCONT);
}
