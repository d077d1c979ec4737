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
	box->born = box->oom = box->hold = -1;
	box->moves = box->slots = 0;
	box->shared_view = false;
	for (size_t i = 0; i < count; i++) {
		if (use[i] == SBX_GROUP_BORN)
			box->born = fds[i];
		else if (use[i] == SBX_GROUP_MOVE)
			box->move[box->moves++] = fds[i];
		else if (use[i] == SBX_GROUP_OOM)
			box->oom = fds[i];
		else if (use[i] == SBX_GROUP_HOLD)
			box->hold = fds[i];
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

/* The sandbox's limit of processes is on the whole; a command that meets it shall do so here, to be told. */
static void limit_pids(int parent, int dir)
{
	char text[32] = "";
	_cleanup_fd_ int fd = (int)sbx_sys(SYS_openat, parent, "pids.max", O_RDONLY | O_CLOEXEC);

	if (fd < 0 || sbx_sys(SYS_read, fd, text, sizeof text - 1) <= 0 || text[0] < '0' || text[0] > '9')
		return;
	unsigned limit = 0;
	for (const char *at = text; *at >= '0' && *at <= '9'; at++)
		limit = limit * 10 + (unsigned)(*at - '0');
	if (limit <= SBX_OWN_PIDS)
		return;
	sbx_format_path(text, "", limit - SBX_OWN_PIDS + 1, ""); /* one: the launcher */
	(void)sbx_write_file(dir, "pids.max", text);
}

/* Version 1 tells of a lack of memory through an eventfd only: cgroup-v1/memory.rst, 9 and 10. */
static int watch_memory(int dir)
{
	_cleanup_fd_ int control = (int)sbx_sys(SYS_openat, dir, "memory.oom_control", O_RDONLY | O_CLOEXEC);
	_cleanup_fd_ int event = (int)sbx_sys(SYS_eventfd2, 0, EFD_CLOEXEC | EFD_NONBLOCK);
	char text[32];

	if (control < 0 || event < 0)
		return -1;
	sbx_format_path(text, "", (unsigned)event, " ");
	sbx_format_path(text + strlen(text), "", (unsigned)control, "");
	return sbx_write_file(dir, "cgroup.event_control", text) < 0 ? -1 : sbx_steal_fd(&event);
}

static long add_directory(struct sbx_slot *slot, int parent, uint32_t use, const char *name)
{
	/* The host has to see whether it is empty, and as an ordinary user has another id than init. */
	long ret = sbx_sys(SYS_mkdirat, parent, name, 0755);
	if (ret < 0 && ret != -EEXIST) /* one that could not be removed when its launcher ended */
		return ret;
	_cleanup_fd_ int dir = (int)sbx_sys(SYS_openat, parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	if (dir < 0)
		return dir;
	sbx_gauge_open(&slot->gauge, dir, use);
	if (use == SBX_GROUP_SLOTS || use == SBX_GROUP_SLOTS_PIDS)
		limit_pids(parent, dir);
	if (use == SBX_GROUP_SLOTS_MEMORY) {
		slot->oom = watch_memory(dir);
		/* version 1 counts what sockets hold of groups only in which that was asked for; the limit is above */
		ret = sbx_write_file(dir, "memory.kmem.tcp.limit_in_bytes", "-1");
		if (ret < 0 && ret != -ENOENT)
			return ret;
	}
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
}

/* Make the groups of launcher `number`. 0 or -errno. */
long sbx_slot_make(const struct sbx_box *box, unsigned number, struct sbx_slot *slot)
{
	char name[32];
	long ret = 0;

	slot->dir = slot->oom = -1;
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
