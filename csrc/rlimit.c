/*
 * rlimit.c - setrlimit(2). Since Linux 5.14 RLIMIT_NPROC counts per user namespace, so it bounds one
 * sandbox and not all of a user's.
 */
#include "box.h"

#include <sys/resource.h>

int sbx_rlimit_set(const struct sbx_plan *p, struct sbx_error *err)
{
	const struct sbx_rlimit *limit = sbx_at(p, p->rlimits.off);

	for (uint32_t i = 0; i < p->rlimits.count; i++) {
		const struct rlimit64 value = { limit[i].soft, limit[i].hard };
		long ret = sbx_sys(SYS_prlimit64, 0, limit[i].resource, &value, NULL);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_RLIMIT, i, ret);
	}
	return 0;
}
