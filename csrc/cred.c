/*
 * cred.c - identity and power: credentials(7), capabilities(7), PR_SET_NO_NEW_PRIVS.
 *
 * Raw system calls throughout: libc's set*id wrappers would signal threads that do not exist here.
 */
#include "box.h"

#include <linux/capability.h>
#include <linux/prctl.h>

/*
 * A change of ids makes the memory as dumpable as the sysctl fs.suid_dumpable says, and until exec it is shared with init
 * or a launcher: no /proc/PID/mem for the payload's other processes. proc(5), PR_SET_DUMPABLE.
 */
static long set_ids(uint32_t uid, uint32_t gid)
{
	long ret = sbx_sys(SYS_setresgid, gid, gid, gid);
	if (ret >= 0)
		ret = sbx_sys(SYS_setresuid, uid, uid, uid);
	return ret < 0 ? ret : sbx_sys(SYS_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0);
}

static long set_capabilities(uint64_t caps)
{
	struct __user_cap_header_struct head = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct data[2] = {
		{ .effective = (uint32_t)caps, .permitted = (uint32_t)caps },
		{ .effective = (uint32_t)(caps >> 32), .permitted = (uint32_t)(caps >> 32) },
	};

	return sbx_sys(SYS_capset, &head, data);
}

/* Init becomes the namespace's root, so that what it mounts has a mapped owner. */
int sbx_cred_become_root(const struct sbx_plan *p, struct sbx_error *err)
{
	long ret = p->flags & SBX_PLAN_NO_ROOT_ID ? 0 : set_ids(0, 0);

	return ret < 0 ? sbx_fail(err, SBX_STAGE_INIT, 0, ret) : 0;
}

/*
 * No further user namespace below this one: a second wall behind the filter. The other seven kinds need
 * CAP_SYS_ADMIN, which a payload could only get in a new user namespace; writing their limits too took 84
 * us, because each file is looked up afresh for a new namespace. Written through the sandbox's own `proc`, which
 * is not covered yet: one that several sandboxes share has this file once for each that lives, all in one chain,
 * and 1000 made it take 0.6 ms. Where it lacks sys (subset=pid) or is read-only, through the template's whole proc,
 * in the void that is the working directory while mounts are made.
 */
int sbx_cred_no_namespaces(int proc, struct sbx_error *err)
{
	long ret = proc < 0 ? -ENOENT : sbx_write_file(proc, "sys/user/max_user_namespaces", "0");

	if (ret == -ENOENT || ret == -EROFS)
		ret = sbx_write_file(AT_FDCWD, SBX_VOID_PROC "/sys/user/max_user_namespaces", "0");
	return ret < 0 ? sbx_fail(err, SBX_STAGE_NSLIMIT, 0, ret) : 0;
}

static int drop_bounding_set(struct sbx_error *err)
{
	for (long cap = 0; cap < 64; cap++) {
		long ret = sbx_sys(SYS_prctl, PR_CAPBSET_DROP, cap);
		if (ret == -EINVAL && sbx_sys(SYS_prctl, PR_CAPBSET_READ, cap) == -EINVAL)
			break; /* beyond this kernel's last one */
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_CRED, 0, ret);
	}
	return 0;
}

static int drop_groups(const struct sbx_plan *p, struct sbx_error *err)
{
	long ret = p->flags & SBX_PLAN_DENY_SETGROUPS ? 0 : sbx_sys(SYS_setgroups, 0, NULL);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_CRED, 1, ret) : 0;
}

/* No way to more than `caps`, in any of the five sets, by any exec. */
static int keep_only(uint64_t caps, struct sbx_error *err)
{
	long ret = set_capabilities(caps);
	if (ret >= 0)
		ret = sbx_sys(SYS_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_CRED, 3, ret);
	ret = sbx_sys(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_CRED, 4, ret) : 0;
}

/* All five capability sets empty, the payload's ids, and no way back. */
int sbx_cred_drop(const struct sbx_plan *p, struct sbx_error *err)
{
	if (drop_bounding_set(err) < 0 || drop_groups(p, err) < 0)
		return -1;
	long ret = p->flags & SBX_PLAN_NO_ROOT_ID ? 0 : set_ids(p->uid, p->gid);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_CRED, 2, ret);
	return keep_only(0, err);
}

/*
 * Init and the launchers of a living sandbox: what a payload must not have, they have not either, but for
 * three capabilities in their own namespace: to become the payload, and to kill it. Where there is only
 * one id they need none of them; but whoever has less than they may not trace them or change their priority.
 */
int sbx_cred_keep_launcher(const struct sbx_plan *p, struct sbx_error *err)
{
	const uint64_t needed = 1ULL << CAP_KILL | 1ULL << CAP_SETUID | 1ULL << CAP_SETGID;

	return keep_only(p->flags & SBX_PLAN_NO_ROOT_ID ? 1ULL << CAP_KILL : needed, err);
}

/* What concerns init, too, which may have to keep its capabilities for what only it does. */
int sbx_cred_lock_down(const struct sbx_plan *p, struct sbx_error *err)
{
	return drop_bounding_set(err) < 0 || drop_groups(p, err) < 0 ? -1 : 0;
}

/*
 * From a launcher to a command. Leaving id 0 clears the capabilities (capabilities(7)); whoever stays 0
 * has to let go of them.
 */
int sbx_cred_switch(const struct sbx_box *box, struct sbx_error *err)
{
	const struct sbx_request *r = box->request;

	bool only = box->plan->flags & SBX_PLAN_NO_ROOT_ID;
	if (only && (r->uid != box->plan->uid || r->gid != box->plan->gid))
		return sbx_fail(err, SBX_STAGE_CRED, 2, -EINVAL);
	long ret = only ? 0 : set_ids(r->uid, r->gid);
	if (ret >= 0 && (only || r->uid == 0))
		ret = set_capabilities(0);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_CRED, 2, ret) : 0;
}

/*
 * A launcher's file access becomes the payload's, while it stays out of reach of the payload's signals,
 * which go by the real and saved ids; with 0, it is its own again. credentials(7): the filesystem ids.
 */
int sbx_cred_borrow(const struct sbx_plan *p, uint32_t uid, uint32_t gid, struct sbx_error *err)
{
	if (p->flags & SBX_PLAN_NO_ROOT_ID)
		return 0;
	(void)sbx_sys(SYS_setfsgid, gid);
	(void)sbx_sys(SYS_setfsuid, uid);
	/* they return the id before, whatever happened: ask again */
	if (sbx_sys(SYS_setfsgid, gid) != (long)gid || sbx_sys(SYS_setfsuid, uid) != (long)uid)
		return sbx_fail(err, SBX_STAGE_CRED, 5, -EPERM);
	return 0;
}

/* What a running sandbox's init still needs: to kill processes of another id in its own namespace. */
int sbx_cred_keep_kill(struct sbx_error *err)
{
	long ret = set_capabilities(1ULL << CAP_KILL);

	return ret < 0 ? sbx_fail(err, SBX_STAGE_INIT, 1, ret) : 0;
}
