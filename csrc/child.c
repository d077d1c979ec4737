/*
 * child.c - the recipe: what becomes of a fresh clone, in order, on one page.
 *
 * The rules of this zone. The code runs in a copy of the spawner after clone3, and from vfork to
 * exec in memory that it shares with init. So: raw system calls only (sys.h), no allocation beyond
 * one anonymous mapping, no formatting, no locks, no writable statics; everything it needs was
 * prepared and checked before. Any failure is final: it travels to the host as (stage, index, errno)
 * and nothing of the sandbox remains. tests/unit/test_csource.py enforces the symbols,
 * tests/system/test_fault_walk.py makes every single call fail.
 *
 * The order is not free:
 *   id maps before ids; ids before mounts, so that a tmpfs has a mapped owner;
 *   the clocks' offsets before the ids change, which makes /proc/self somebody else's;
 *   the keyring while its key still counts against the spawner's quota;
 *   non-dumpable after the maps, which are written through /proc/PID of a dumpable process;
 *   credentials before files and cwd, so that both obey the payload's permissions;
 *   limits after all of that: they bound the command, not its preparation;
 *   no_new_privs before Landlock and seccomp, which demand it; the filter last, for it forbids the
 *   rest.
 */
#include "box.h"

#include <linux/prctl.h>
#include <sys/mman.h>

#ifdef SBX_FAULT
struct sbx_fault sbx_fault; /* test builds only: see sys.h */
#endif

#define TRY(step)                  \
	do {                       \
		if ((step) < 0)    \
			return -1; \
	} while (0)

static int wait_for_go(const struct sbx_box *box, struct sbx_error *err)
{
	char byte;
	long ret = sbx_sys(SYS_read, box->go, &byte, 1);

	return ret == 1 ? 0 : sbx_fail(err, SBX_STAGE_IDMAP, 1, ret < 0 ? ret : -ECHILD);
}

static int set_hostname(const struct sbx_plan *p, struct sbx_error *err)
{
	const char *name = sbx_str(p, p->hostname);
	long ret = sbx_sys(SYS_sethostname, name, strlen(name));

	return ret < 0 ? sbx_fail(err, SBX_STAGE_HOSTNAME, 0, ret) : 0;
}

static int bring_loopback_up(const struct sbx_plan *p, struct sbx_error *err)
{
	int ret = p->flags & SBX_PLAN_LOOPBACK ? sbx_net_loopback() : 0;

	return ret < 0 ? sbx_fail(err, SBX_STAGE_LOOPBACK, 0, ret) : 0;
}

/* No ptrace, no /proc/1/{mem,environ,exe,fd} for the payload, which may have the same id. */
static int hide_init(struct sbx_error *err)
{
	long ret = sbx_sys(SYS_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0);

	return ret < 0 ? sbx_fail(err, SBX_STAGE_INIT, 4, ret) : 0;
}

static int make_sandbox(struct sbx_box *box, struct sbx_error *err)
{
	const struct sbx_plan *p = box->plan;

	TRY(wait_for_go(box, err));
	TRY(sbx_group_hide(box, err));
	TRY(sbx_session_keyring(err));
	TRY(sbx_time_enter(p, box->spawner->proc, err));
	TRY(sbx_cred_become_root(p, err));
	TRY(sbx_mount_sandbox(box, err));
	TRY(set_hostname(p, err));
	TRY(bring_loopback_up(p, err));
	TRY(hide_init(err));
	return 0;
}

/*
 * What init and the launchers of a living sandbox give up once, and every command inherits; but the filter is
 * loaded by each launcher, for it would not let init make them in control groups. Where init has to be able to
 * mount, for other layers of overlays or for binds to come, which no Landlock domain allows, it is the nursery
 * that gives it up: pool.c.
 */
static int lock_down(const struct sbx_box *box, struct sbx_error *err)
{
	TRY(sbx_cred_lock_down(box->plan, err));
	if (box->plan->flags & SBX_PLAN_MOUNTS)
		return 0;
	TRY(sbx_cred_keep_launcher(box->plan, err));
	TRY(sbx_landlock_restrict(box, err));
	return 0;
}

static int prepare_payload(struct sbx_box *box, struct sbx_error *err)
{
	const struct sbx_plan *p = box->plan;
	const struct sbx_request *r = box->request;
	bool heir = box->resident;

	TRY(sbx_session_new(err));
	TRY(sbx_fds_arrange(box, err));
	TRY(heir ? sbx_cred_switch(box, err) : sbx_cred_drop(p, err));
	TRY(sbx_file_write(r, err));
	TRY(sbx_file_cwd(r, err));
	TRY(heir ? 0 : sbx_landlock_restrict(box, err));
	TRY(sbx_rlimit_set(box, err));
	TRY(heir && p->flags & SBX_PLAN_FILTER_ONCE ? 0 : sbx_seccomp_load(p, err));
	TRY(r->flags & SBX_REQUEST_RECORD ? sbx_record_read(box, err) : 0);
	return 0;
}

/* Try the candidates in turn; as execvp(3), a file that may not be executed outranks a missing one. */
static int exec_first(const struct sbx_request *r, char **argv, char **env, struct sbx_error *err)
{
	const char *path = sbx_str(r, r->paths.off);
	long best = -ENOENT;

	for (uint32_t i = 0; i < r->paths.count; i++, path = sbx_next(path)) {
		long ret = sbx_sys(SYS_execve, path, argv, env);
		if (r->paths.count > 1 && (ret == -ENOENT || ret == -ENOTDIR))
			continue;
		if (ret != -EACCES)
			return sbx_fail(err, SBX_STAGE_EXEC, i, ret);
		best = ret;
	}
	return sbx_fail(err, SBX_STAGE_EXEC, 0, best);
}

static _Noreturn void payload(struct sbx_box *box, char **argv, char **env)
{
	static const uint64_t none = 0; /* the kernel's sigset_t */

	if (prepare_payload(box, &box->error) == 0) {
		long ret = sbx_sys(SYS_umask, box->request->umask);
		if (ret >= 0)
			ret = sbx_sys(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, sizeof none);
		box->clock[SBX_CLOCK_EXEC] = sbx_now();
		if (ret < 0)
			sbx_fail(&box->error, SBX_STAGE_EXEC, 0, ret);
		else if (!(box->request->flags & SBX_REQUEST_DRY))
			(void)exec_first(box->request, argv, env, &box->error);
	}
	(void)syscall(SYS_exit_group, box->error.stage == SBX_STAGE_NONE ? 0 : 127);
	__builtin_unreachable();
}

static char **point_at(char **out, const void *arena, struct sbx_span span)
{
	const char *item = sbx_str(arena, span.off);

	for (uint32_t i = 0; i < span.count; i++, item = sbx_next(item))
		*out++ = (char *)(uintptr_t)item;
	*out++ = NULL;
	return out;
}

enum { FEW = 64 };

static size_t pointers_size(const struct sbx_request *r)
{
	return ((size_t)r->argv.count + r->env.count + 2) * sizeof(char *);
}

/* argv and envp as execve wants them: in `room`, which is for a few, or in a mapping. */
static char **make_pointers(const struct sbx_request *r, char **room, char ***env, struct sbx_error *err)
{
	size_t size = pointers_size(r);
	long map = (long)(uintptr_t)room;

	if (size > FEW * sizeof(char *))
		map = sbx_sys(SYS_mmap, NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (map < 0 && map > -4096) {
		sbx_fail(err, SBX_STAGE_INIT, 5, map);
		return NULL;
	}
	char **argv = (char **)map;
	*env = point_at(argv, r, r->argv);
	point_at(*env, r, r->env);
	return argv;
}

/*
 * The payload tells init how far it came by writing to *box. vfork shares all memory; but a child of
 * another time namespace may not (EINVAL; the exemption for vfork came and went between 5.19 and 6.3),
 * so there the box alone is shared, and init waits for exec all the same.
 */
static struct sbx_box *share_box(struct sbx_box *box, struct sbx_error *err)
{
	long map = sbx_sys(SYS_mmap, NULL, sizeof *box, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (map < 0 && map > -4096) {
		sbx_fail(err, SBX_STAGE_TIME, 1, map);
		return NULL;
	}
	struct sbx_box *shared = (struct sbx_box *)map;
	memcpy(shared, box, sizeof *box);
	return shared;
}

/* Returns when the payload has exec'ed or ended; in the payload, not at all. */
static pid_t fork_payload(struct sbx_box *box, char **argv, char **env)
{
	const struct clone_args copy = { .flags = CLONE_VFORK, .exit_signal = SIGCHLD };
	pid_t pid;

#ifdef SBX_FAULT
	if (sbx_fault_hit(SYS_vfork))
		return -sbx_fault.err;
#endif
	if (box->plan->time_offsets && !box->resident) /* a launcher was born into the new one already */
		pid = (pid_t)sbx_sys(SYS_clone3, &copy, sizeof copy);
	else if ((pid = vfork()) < 0)
		pid = -errno;
	if (pid == 0)
		payload(box, argv, env);
	return pid;
}

/* Start the request's command from a launcher. Returns its pid; box->error tells whether it got to exec. */
pid_t sbx_child_start(struct sbx_box *box, struct sbx_error *err)
{
	const struct sbx_request *r = box->request;
	char *room[FEW], **env, **argv = make_pointers(r, room, &env, err);

	if (!argv)
		return -1;
	box->clock[SBX_CLOCK_FORK] = sbx_now();
	pid_t pid = fork_payload(box, argv, env);
	if (pid < 0)
		sbx_fail(err, SBX_STAGE_FORK, 0, pid);
	if (argv != room)
		(void)sbx_sys(SYS_munmap, argv, pointers_size(r));
	return pid < 0 ? -1 : pid;
}

static int run_payload(struct sbx_box *box, struct sbx_error *err)
{
	char *room[FEW], **env, **argv = make_pointers(box->request, room, &env, err);

	if (argv && box->plan->time_offsets)
		box = share_box(box, err);
	if (!argv || !box)
		return -1;
	box->clock[SBX_CLOCK_FORK] = sbx_now();
	pid_t pid = fork_payload(box, argv, env);
	if (pid < 0)
		return sbx_fail(err, SBX_STAGE_FORK, 0, pid);
	return sbx_init_run(box, pid, err);
}

static int run(struct sbx_box *box, struct sbx_error *err)
{
	TRY(make_sandbox(box, err));
	if (!box->resident)
		return run_payload(box, err);
	TRY(lock_down(box, err));
	return sbx_resident_run(box, err);
}

_Noreturn void sbx_child(struct sbx_box *box)
{
	struct sbx_error err = { .stage = SBX_STAGE_NONE };

	SBX_FAULT_ARM(box->request->fault_at, box->request->fault_errno);
	box->clock[SBX_CLOCK_STARTED] = sbx_now();
	if (run(box, &err) < 0) {
		SBX_FAULT_ARM(0, 0);
		sbx_send_error(box->control, &err);
	}
	(void)syscall(SYS_exit_group, 0);
	__builtin_unreachable();
}
