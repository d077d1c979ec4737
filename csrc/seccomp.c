/*
 * seccomp.c - seccomp(2): loads a ready BPF program; never builds one (sandboxcore/seccomp.py does).
 */
#include "box.h"

#include <linux/filter.h>
#include <linux/seccomp.h>

int sbx_seccomp_load(const struct sbx_plan *p, struct sbx_error *err)
{
	const struct sock_fprog program = {
		.len = (unsigned short)p->filter.count,
		.filter = (struct sock_filter *)(uintptr_t)sbx_at(p, p->filter.off),
	};

	if (p->filter.count == 0)
		return 0;
	long ret = sbx_sys(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_SECCOMP, 0, ret) : 0;
}
