/*
 * cred.c - identity and power: credentials(7), capabilities(7), PR_SET_NO_NEW_PRIVS.
 *
 * Raw system calls throughout: libc's set*id wrappers would signal threads that do not exist here.
 */
#include "box.h"

#include <linux/capability.h>
#include <linux/prctl.h>

static long set_ids(uint32_t uid, uint32_t gid)
{
	long ret = sbx_sys(SYS_setresgid, gid, gid, gid);
	return ret < 0 ? ret : sbx_sys(SYS_setresuid, uid, uid, uid);
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
 * us, because each file is looked up afresh for a new namespace. Written through the template's whole
 * proc, in the void that is the working directory while mounts are made: the sandbox's own may lack sys
 * (subset=pid), and will have it read-only.
 */
int sbx_cred_no_namespaces(struct sbx_error *err)
{
	long ret = sbx_write_file(AT_FDCWD, SBX_VOID_PROC "/sys/user/max_user_namespaces", "0");

	return ret < 0 ? sbx_fail(err, SBX_STAGE_NSLIMIT, 0, ret) : 0;
}

/* All five capability sets empty, the payload's ids, and no way back. */
int sbx_cred_drop(const struct sbx_plan *p, struct sbx_error *err)
{
	for (long cap = 0; cap < 64; cap++) {
		long ret = sbx_sys(SYS_prctl, PR_CAPBSET_DROP, cap);
		if (ret == -EINVAL && sbx_sys(SYS_prctl, PR_CAPBSET_READ, cap) == -EINVAL)
			break; /* beyond this kernel's last one */
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_CRED, 0, ret);
	}
	long ret = p->flags & SBX_PLAN_DENY_SETGROUPS ? 0 : sbx_sys(SYS_setgroups, 0, NULL);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_CRED, 1, ret);
	ret = p->flags & SBX_PLAN_NO_ROOT_ID ? 0 : set_ids(p->uid, p->gid);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_CRED, 2, ret);
	ret = set_capabilities(0);
	if (ret >= 0)
		ret = sbx_sys(SYS_prctl, PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_CRED, 3, ret);
	ret = sbx_sys(SYS_prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_CRED, 4, ret) : 0;
}

/* What a running sandbox's init still needs: to kill processes of another id in its own namespace. */
int sbx_cred_keep_kill(struct sbx_error *err)
{
	long ret = set_capabilities(1ULL << CAP_KILL);

	return ret < 0 ? sbx_fail(err, SBX_STAGE_INIT, 1, ret) : 0;
}
