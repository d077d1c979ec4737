/*
 * proc.c - who is below whom, read from /proc/PID/stat, proc(5); and signals by it. Only where a command
 * left something behind or is killed: never on the way of one that just ends.
 *
 * A child that its parent has not reaped keeps its number, so between the look and the signal the number
 * cannot become somebody else's where the caller is the parent.
 */
#include "box.h"

enum { ZOMBIE = 'Z', DEAD = 'X' };

struct who {
	pid_t pid, parent, group;
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
	char state = at[2];
	(void)number(number(at + 4, &who->parent) + 1, &who->group);
	for (int field = 2; field < 20 && *at; at++)
		field += *at == ' ';
	(void)number(at, &threads);
	who->dead = (state == ZOMBIE && threads <= 1) || state == DEAD;
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

static bool listed(pid_t pid, const pid_t *list, size_t count)
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
static bool below(int proc, struct who who, pid_t ancestor, const pid_t *spare, size_t count)
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

static long signal_once(pid_t ancestor, const pid_t *spare, size_t count, int sig)
{
	_Alignas(8) char entries[4096];
	long found = 0;

	_cleanup_fd_ int proc = (int)sbx_sys(SYS_openat, AT_FDCWD, "/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (proc < 0)
		return proc;
	for (;;) {
		long len = sbx_sys(SYS_getdents64, proc, entries, sizeof entries);
		if (len <= 0)
			return len < 0 ? len : found;
		for (long at = 0; at < len;) {
			const struct sbx_dirent *entry = (const void *)(entries + at);
			struct who who;
			at += entry->len;
			if (!look(proc, entry->name, &who) || who.pid <= 1 || who.dead ||
			    listed(who.pid, spare, count) || !below(proc, who, ancestor, spare, count))
				continue;
			signal_one(&who, sig);
			found++;
		}
	}
}

/*
 * Signal everything below `ancestor`, or with 0 every process, but init and those in `spare`. SIGKILL goes
 * out until nobody new is found; what forks faster than that is left to the caller's next attempt.
 */
long sbx_proc_signal(pid_t ancestor, const pid_t *spare, size_t count, int sig)
{
	long ret = 1;

	for (int round = 0; round < 16 && ret > 0; round++) {
		ret = signal_once(ancestor, spare, count, sig);
		if (sig != SIGKILL)
			break;
	}
	return ret < 0 ? ret : 0;
}
