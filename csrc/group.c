/*
 * group.c - control groups from inside: how init gets into the sandbox's, and the one that each launcher of a
 * living sandbox has to itself, so that what a command used can be told from everything else. cgroups(7).
 *
 * With version 2 a process is born in its group (CLONE_INTO_CGROUP, Linux 5.7): writing to cgroup.procs would
 * make every fork of the machine wait for a grace period. Version 1 has no other way. The host makes the
 * sandbox's group and its limits, which belong to it; init only makes children of it.
 */
#include "box.h"

#include <sys/eventfd.h>

/* Where each descriptor of the request belongs. `fds` are the last of the message. */
void sbx_group_take(struct sbx_box *box, const uint32_t *use, const int *fds, size_t count)
{
	box->born = -1;
	box->moves = box->slots = box->holds = 0;
	box->shared_view = false;
	for (size_t i = 0; i < count; i++) {
		if (use[i] == SBX_GROUP_BORN)
			box->born = fds[i];
		else if (use[i] == SBX_GROUP_MOVE)
			box->move[box->moves++] = fds[i];
		else if (use[i] == SBX_GROUP_HOLD)
			box->hold[box->holds++] = fds[i];
		else {
			box->slot_use[box->slots] = use[i];
			box->slot_dir[box->slots++] = fds[i];
		}
		/* init could not put launchers into groups outside of its namespace: so it has the spawner's */
		box->shared_view |= use[i] == SBX_GROUP_SLOTS;
	}
}

/* From the spawner: a child that waits for its id maps goes into the groups of version 1. */
int sbx_group_move(const struct sbx_box *box, pid_t pid, struct sbx_error *err)
{
	char number[16];

	sbx_format_path(number, "", (unsigned)pid, "");
	for (unsigned i = 0; i < box->moves; i++) {
		long ret = sbx_sys(SYS_write, box->move[i], number, strlen(number));
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_CGROUP, i, ret);
	}
	return 0;
}

/* The sandbox's group is the root of what it sees of groups: cgroup_namespaces(7). */
int sbx_group_hide(const struct sbx_box *box, struct sbx_error *err)
{
	bool grouped = box->born >= 0 || box->moves;
	long ret = grouped && !box->shared_view ? sbx_sys(SYS_unshare, CLONE_NEWCGROUP) : 0;

	return ret < 0 ? sbx_fail(err, SBX_STAGE_CGROUP, 20, ret) : 0;
}

/* --- a launcher's own ---------------------------------------------------------------------------- */

static void name_slot(char name[32], unsigned number)
{
	sbx_format_path(name, "cmd-", number, "");
}

/*
 * A limit of the sandbox's is on the whole, with something on top for init and the launchers. A command shall meet
 * it here, where that is seen, and where the kernel finds no other process to kill than the command's.
 */
static const struct {
	uint32_t use;
	const char *file;
	const char *none;
	uint64_t own;	 /* the whole has more than a command by so much */
	uint64_t shared; /* what a command has its launcher uses, too */
	bool lifts;	 /* sbx_slot_lift */
} LIMITS[] = {
	{ SBX_GROUP_SLOTS, "pids.max", "max", SBX_OWN_PIDS, 1, false },
	{ SBX_GROUP_SLOTS, "memory.max", "max", SBX_OWN_MEMORY, 0, true },
	{ SBX_GROUP_SLOTS_PIDS, "pids.max", "max", SBX_OWN_PIDS, 1, false },
	{ SBX_GROUP_SLOTS_MEMORY, "memory.limit_in_bytes", "-1", SBX_OWN_MEMORY, 0, true },
	{ SBX_GROUP_SLOTS_MEMORY, "memory.memsw.limit_in_bytes", "-1", SBX_OWN_MEMORY, 0, true }, /* never less */
	/* what sockets hold is counted only of groups in which that was asked for */
	{ SBX_GROUP_SLOTS_MEMORY, "memory.kmem.tcp.limit_in_bytes", "-1", SBX_OWN_MEMORY, 0, false },
};
static const uint64_t NO_LIMIT = 1ULL << 60; /* version 1 says LONG_MAX, rounded to pages */

/* The limit in a file, or NO_LIMIT. 0 or -errno. */
static long read_limit(int fd, uint64_t *limit)
{
	char text[32] = "";

	long ret = sbx_sys(SYS_pread64, fd, text, sizeof text - 1, 0);
	*limit = text[0] < '0' || text[0] > '9' ? NO_LIMIT : 0;
	for (const char *at = text; *limit < NO_LIMIT && *at >= '0' && *at <= '9'; at++)
		*limit = *limit * 10 + (uint64_t)(*at - '0');
	return ret < 0 ? ret : 0;
}

static long write_limit(int fd, const char *none, uint64_t limit)
{
	char text[32];

	sbx_format_path(text, "", limit, "");
	if (limit < NO_LIMIT)
		none = text;
	long ret = sbx_sys(SYS_write, fd, none, strlen(none));
	return ret < 0 ? ret : 0;
}

/* The host may change the whole's meanwhile, and then looks for the groups that there are. Returns a descriptor. */
static long limit_one(int above, int dir, size_t which)
{
	_cleanup_fd_ int own = (int)sbx_sys(SYS_openat, dir, LIMITS[which].file, O_RDWR | O_CLOEXEC);
	uint64_t whole = 0, before = 0, more;

	if (own < 0)
		return own;
	/* The host changes it, too, and as an ordinary user has another id; nobody else gets past its directory. */
	long ret = sbx_sys(SYS_fchmod, own, 0666);
	for (int i = 0; i < 8 && ret == 0; i++, before = whole) {
		ret = read_limit(above, &whole);
		if (ret < 0 || (i > 0 && whole == before))
			break;
		more = whole > LIMITS[which].own ? LIMITS[which].own : 0;
		ret = write_limit(own, LIMITS[which].none,
				  whole < NO_LIMIT ? whole - more + LIMITS[which].shared : NO_LIMIT);
	}
	if (ret >= 0) /* the first reading of a file takes memory, which there may not be when it matters */
		ret = read_limit(own, &whole);
	return ret < 0 ? ret : sbx_steal_fd(&own);
}

/* `old`: a directory that could not be removed with its launcher, and may have any limits. */
static long limit_slot(struct sbx_slot *slot, int parent, int dir, uint32_t use, bool old)
{
	unsigned lifts = 0;

	for (size_t i = SBX_COUNT(LIMITS); old && i-- > 0;)
		if (LIMITS[i].use == use)
			(void)sbx_write_file(dir, LIMITS[i].file, LIMITS[i].none);
	for (size_t i = 0; i < SBX_COUNT(LIMITS); i++) {
		if (LIMITS[i].use != use || sbx_absent(dir, LIMITS[i].file))
			continue;
		_cleanup_fd_ int above = (int)sbx_sys(SYS_openat, parent, LIMITS[i].file, O_RDONLY | O_CLOEXEC);
		long ret = above < 0 ? above : limit_one(above, dir, i);
		if (ret < 0)
			return ret;
		if (LIMITS[i].lifts && lifts == 0)
			slot->whole = sbx_steal_fd(&above);
		if (LIMITS[i].lifts)
			slot->limit[lifts++] = (int)ret;
		else
			sbx_close((int)ret);
	}
	return 0;
}

static const char *no_limit(const struct sbx_slot *slot)
{
	return slot->oom >= 0 ? "-1" : "max"; /* version 1, version 2 */
}

/*
 * Memory has run out in the launcher's group, and what was killed for it is not gone yet: until that is so, its
 * limit is the whole's.
 */
void sbx_slot_lift(struct sbx_slot *slot)
{
	slot->lifted = true;
	for (int i = 1; i >= 0; i--) {
		(void)read_limit(slot->limit[i], &slot->was[i]);
		(void)write_limit(slot->limit[i], no_limit(slot), NO_LIMIT);
	}
}

/*
 * Whether its limit is as before. Not with version 2: there one that is less than what is in use kills, the launcher
 * at last, and what a group has counted is not lost with it, so there may as well be another one.
 */
bool sbx_slot_restore(struct sbx_slot *slot)
{
	uint64_t now, whole;

	if (!slot->lifted)
		return true;
	if (slot->oom < 0 || read_limit(slot->whole, &whole) < 0)
		return false;
	if (read_limit(slot->limit[0], &now) == 0 && now < NO_LIMIT) { /* it was not, in the end */
		slot->lifted = false;
		return true;
	}
	if (whole != slot->was[0] + SBX_OWN_MEMORY) /* the host has changed it meanwhile */
		return false;
	for (int i = 0; i < 2; i++) {
		if (slot->limit[i] < 0)
			continue;
		if (read_limit(slot->limit[i], &now) < 0)
			return false;
		if (now >= NO_LIMIT && write_limit(slot->limit[i], no_limit(slot), slot->was[i]) < 0)
			return false;
	}
	slot->lifted = false;
	return true;
}

/* Version 1 tells of a lack of memory through an eventfd only: cgroup-v1/memory.rst, 9 and 10. 0 or -errno. */
static long watch_memory(struct sbx_slot *slot, int dir)
{
	_cleanup_fd_ int control = (int)sbx_sys(SYS_openat, dir, "memory.oom_control", O_RDONLY | O_CLOEXEC);
	char text[32];

	if (control < 0)
		return control;
	slot->oom = (int)sbx_sys(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (slot->oom < 0)
		return slot->oom;
	sbx_format_path(text, "", (unsigned)slot->oom, " ");
	sbx_format_path(text + strlen(text), "", (unsigned)control, "");
	return sbx_write_file(dir, "cgroup.event_control", text);
}

static long add_directory(struct sbx_slot *slot, int parent, uint32_t use, const char *name)
{
	/* The host has to see whether it is empty, and as an ordinary user has another id than init. */
	long ret = sbx_sys(SYS_mkdirat, parent, name, 0755);
	bool old = ret == -EEXIST;
	if (ret < 0 && !old)
		return ret;
	_cleanup_fd_ int dir = (int)sbx_sys(SYS_openat, parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (dir < 0)
		return dir;
	ret = sbx_gauge_open(&slot->gauge, dir, use);
	if (ret >= 0)
		ret = limit_slot(slot, parent, dir, use, old);
	if (ret >= 0 && use == SBX_GROUP_SLOTS_MEMORY)
		ret = watch_memory(slot, dir);
	if (ret < 0)
		return ret;
	if (use == SBX_GROUP_SLOTS) {
		slot->dir = sbx_steal_fd(&dir);
		return 0;
	}
	ret = sbx_sys(SYS_openat, dir, "cgroup.procs", O_WRONLY | O_CLOEXEC);
	if (ret >= 0)
		slot->procs[slot->count++] = (int)ret;
	return ret < 0 ? ret : 0;
}

void sbx_slot_close(struct sbx_slot *slot)
{
	sbx_gauge_close(&slot->gauge);
	for (unsigned i = 0; i < slot->count; i++)
		sbx_close(slot->procs[i]);
	slot->count = 0;
	sbx_close(sbx_steal_fd(&slot->dir));
	sbx_close(sbx_steal_fd(&slot->oom));
	sbx_close(sbx_steal_fd(&slot->limit[0]));
	sbx_close(sbx_steal_fd(&slot->limit[1]));
	sbx_close(sbx_steal_fd(&slot->whole));
}

/* Make the groups of launcher `number`. 0 or -errno. */
long sbx_slot_make(const struct sbx_box *box, unsigned number, struct sbx_slot *slot)
{
	char name[32];
	long ret = 0;

	slot->dir = slot->oom = slot->limit[0] = slot->limit[1] = slot->whole = -1;
	slot->lifted = false;
	slot->count = 0;
	sbx_gauge_init(&slot->gauge);
	name_slot(name, number);
	for (unsigned i = 0; i < box->slots && ret == 0; i++)
		ret = add_directory(slot, box->slot_dir[i], box->slot_use[i], name);
	if (ret < 0)
		sbx_slot_close(slot);
	return ret;
}

/* What the launcher has left to do when it is born: with version 2, nothing. */
long sbx_slot_enter(struct sbx_slot *slot)
{
	long ret = 0;

	for (unsigned i = 0; i < slot->count && ret >= 0; i++)
		ret = sbx_sys(SYS_write, slot->procs[i], "0", 1);
	for (unsigned i = 0; i < slot->count; i++)
		sbx_close(slot->procs[i]);
	slot->count = 0;
	sbx_close(sbx_steal_fd(&slot->dir));
	return ret < 0 ? ret : 0;
}

/* After its launcher. What is not empty yet stays; it will serve the next one of that number. */
void sbx_slot_remove(const struct sbx_box *box, unsigned number)
{
	char name[32];

	name_slot(name, number);
	for (unsigned i = 0; i < box->slots; i++)
		(void)sbx_sys(SYS_unlinkat, box->slot_dir[i], name, AT_REMOVEDIR);
}

/* --- the spawner's view -------------------------------------------------------------------------- */

/*
 * A cgroup namespace whose root is the directory `dir`, for everything that is cloned from here on. It can only
 * be made by a process in that group; a child goes there, makes it, and leaves its descriptor in the table
 * that it shares with us. The group must not have controllers for its children yet.
 */
int sbx_group_root(int proc, int dir, struct sbx_error *err)
{
	const struct clone_args args = {
		.flags = CLONE_INTO_CGROUP | CLONE_FILES,
		.exit_signal = SIGCHLD,
		.cgroup = (unsigned)dir,
	};
	int status;

	long pid = sbx_sys(SYS_clone3, &args, sizeof args);
	if (pid == 0) {
		long fd = sbx_sys(SYS_unshare, CLONE_NEWCGROUP);
		if (fd >= 0)
			fd = sbx_sys(SYS_openat, proc, "self/ns/cgroup", O_RDONLY | O_CLOEXEC);
		(void)syscall(SYS_exit_group, fd < 0 || fd > 200 ? 255 : fd);
	}
	if (pid < 0)
		return sbx_fail(err, SBX_STAGE_CGROUP, 21, pid);
	while (sbx_sys(SYS_wait4, pid, &status, 0, NULL) == -EINTR)
		;
	_cleanup_fd_ int ns = status >> 8 & 255;
	if (status & 127 || ns == 255) {
		ns = -1;
		return sbx_fail(err, SBX_STAGE_CGROUP, 22, -EPERM);
	}
	long ret = sbx_sys(SYS_setns, ns, CLONE_NEWCGROUP);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_CGROUP, 23, ret) : 0;
}
