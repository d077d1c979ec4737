/*
 * landlock.c - landlock(7), Linux 5.13: a second wall behind the mounts. Python chose the access
 * rights that this kernel's ABI knows; here they are applied, or the sandbox does not start.
 */
#include "box.h"

/* Up to ABI 6 the structs grew at the end; the size tells the kernel how much it gets. */
static size_t ruleset_size(int abi)
{
	return abi >= 6 ? 24 : abi >= 4 ? 16 : 8;
}

int sbx_landlock_restrict(const struct sbx_plan *p, struct sbx_error *err)
{
	const uint64_t attr[3] = { p->landlock_fs, 0, p->landlock_scoped };
	const struct sbx_rule *rule = sbx_at(p, p->rules.off);

	if (!p->landlock_fs)
		return 0;
	_cleanup_fd_ int ruleset = (int)sbx_sys(SYS_landlock_create_ruleset, attr, ruleset_size(p->landlock_abi), 0);
	if (ruleset < 0)
		return sbx_fail(err, SBX_STAGE_LANDLOCK, 0, ruleset);
	for (uint32_t i = 0; i < p->rules.count; i++, rule++) {
		_cleanup_fd_ int fd = sbx_openat2(AT_FDCWD, sbx_str(p, rule->path), O_PATH, 0, RESOLVE_NO_MAGICLINKS);
		struct landlock_path_beneath_attr beneath = { .allowed_access = rule->access, .parent_fd = fd };
		long ret = fd < 0 ? fd :
				    sbx_sys(SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH_BENEATH, &beneath, 0);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_LANDLOCK, i, ret);
	}
	long ret = sbx_sys(SYS_landlock_restrict_self, ruleset, 0);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_LANDLOCK, p->rules.count, ret) : 0;
}
