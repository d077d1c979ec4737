/*
 * spawn.c - the parent's half of a sandbox's birth: clone3(2), id maps, the pidfd to the host.
 *
 * The spawner stands in the template's mount namespace and in a ready network namespace, so the child
 * is born in copies or members of them. The child waits for its id maps on a pipe: a byte means go,
 * end-of-file means that the spawner gave up or died.
 */
#include "box.h"

#include <sys/wait.h>

static int finish_birth(const struct sbx_box *box, pid_t pid, int pidfd, int go, struct sbx_error *err)
{
	const struct sbx_plan *p = box->plan;
	const struct sbx_record born = { .kind = SBX_RECORD_PIDFD, .pid = pid };

	int ret = sbx_idmap_write(box->spawner->proc, pid, sbx_str(p, p->uid_map), sbx_str(p, p->gid_map),
				  p->flags & SBX_PLAN_DENY_SETGROUPS);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_IDMAP, 0, ret);
	if (sbx_group_move(box, pid, err) < 0)
		return -1;
	/* A host that stopped listening closed the control socket too; init will notice. */
	if (box->resident) /* before its init can say READY, which completes the answer */
		(void)sbx_send_record(box->control, &born, NULL, 0, pidfd);
	if (write(go, "", 1) < 0)
		return sbx_fail(err, SBX_STAGE_INIT, 2, -errno);
	if (!box->resident)
		(void)sbx_send_record(box->control, &born, NULL, 0, pidfd);
	return 0;
}

int sbx_spawn(struct sbx_box *box, int mount_ns, struct sbx_error *err)
{
	int pidfd = -1, pipe[2];
	struct clone_args args = {
		.flags = box->plan->namespaces | CLONE_PIDFD,
		.pidfd = (uint64_t)(uintptr_t)&pidfd,
		.exit_signal = SIGCHLD,
	};

	if (box->born >= 0) {
		args.flags |= CLONE_INTO_CGROUP;
		args.cgroup = (unsigned)box->born;
	}
	if (box->born >= 0 || box->moves) /* its view of groups: sbx_group_hide */
		args.flags &= ~(uint64_t)CLONE_NEWCGROUP;
	if (setns(mount_ns, CLONE_NEWNS) < 0)
		return sbx_fail(err, SBX_STAGE_TEMPLATE, 10, -errno);
	if (box->plan->flags & SBX_PLAN_POOLED_NET) {
		int ret = sbx_net_take(box->spawner->net_maker);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_NETNS, 0, ret);
	}
	if (pipe2(pipe, O_CLOEXEC) < 0)
		return sbx_fail(err, SBX_STAGE_INIT, 3, -errno);
	_cleanup_fd_ int go = pipe[1];
	long pid = sbx_sys(SYS_clone3, &args, sizeof args);
	if (pid == 0) {
		sbx_close(go);
		box->go = pipe[0];
		sbx_child(box);
	}
	sbx_close(pipe[0]);
	if (pid < 0)
		return sbx_fail(err, box->born >= 0 ? SBX_STAGE_CGROUP : SBX_STAGE_CLONE, 30, pid);

	_cleanup_fd_ int held = pidfd;
	if (finish_birth(box, (pid_t)pid, held, go, err) < 0) {
		kill((pid_t)pid, SIGKILL); /* not reaped yet: the number is still its own */
		return -1;
	}
	return 0;
}
