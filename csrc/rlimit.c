/*
 * rlimit.c - setrlimit(2). Since Linux 5.14 RLIMIT_NPROC counts per user namespace, so it bounds one
 * sandbox and not all of a user's.
 */
#include "box.h"

#include <sys/resource.h>

int sbx_rlimit_set(const struct sbx_box *box, struct sbx_error *err)
{
	bool own = box->request->rlimits.count != 0;
	const void *arena = own ? (const void *)box->request : (const void *)box->plan;
	const struct sbx_span span = own ? box->request->rlimits : box->plan->rlimits;
	const struct sbx_rlimit *limit = sbx_at(arena, span.off);

	bool ours = box->plan->flags & SBX_PLAN_NO_ROOT_ID || box->request->uid == 0; /* has the id of launchers */

	for (uint32_t i = 0; i < span.count; i++) {
		unsigned more = ours && limit[i].resource == RLIMIT_NPROC ? box->peers : 0;
		struct rlimit64 value = { limit[i].soft + more, limit[i].hard + more };
		long ret = sbx_sys(SYS_prlimit64, 0, limit[i].resource, &value, NULL);
		if (ret == -EPERM && more) { /* the host process has no more itself */
			value = (struct rlimit64){ limit[i].soft, limit[i].hard };
			ret = sbx_sys(SYS_prlimit64, 0, limit[i].resource, &value, NULL);
		}
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_RLIMIT, i, ret);
	}
	return 0;
}
