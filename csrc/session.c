/*
 * session.c - what else a process inherits without being told: its session, keyring and clocks.
 */
#include "box.h"

#include <linux/keyctl.h>

/*
 * A fresh anonymous session keyring, so that request_key(2) finds none of the host's keys even where
 * the filter is off. Joined before the ids change: the key counts against the quota of whoever runs
 * the spawner, which for root is large. A kernel without keyrings has none to leak.
 */
int sbx_session_keyring(struct sbx_error *err)
{
	long ret = sbx_sys(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL);

	if (ret == -ENOSYS && sbx_sys(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 0) == -ENOSYS)
		return 0;
	return ret < 0 ? sbx_fail(err, SBX_STAGE_SESSION, 0, ret) : 0;
}

/* Own session and process group: no controlling terminal to type into, and kill(0) stays inside. */
int sbx_session_new(struct sbx_error *err)
{
	long ret = sbx_sys(SYS_setsid);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_SESSION, 1, ret) : 0;
}

/*
 * time_namespaces(7): this process's children are born into a new one. The offsets can be written
 * only while nobody is in it; `proc` is the host's, because the sandbox has none yet.
 */
int sbx_time_enter(const struct sbx_plan *p, int proc, struct sbx_error *err)
{
	const char *offsets = sbx_optional(p, p->time_offsets);

	if (!offsets)
		return 0;
	long ret = sbx_sys(SYS_unshare, CLONE_NEWTIME);
	if (ret >= 0 && *offsets)
		ret = sbx_write_file(proc, "self/timens_offsets", offsets);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_TIME, 0, ret) : 0;
}
