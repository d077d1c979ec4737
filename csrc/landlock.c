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

static long allow(int ruleset, int fd, uint64_t access)
{
	const struct landlock_path_beneath_attr beneath = { .allowed_access = access, .parent_fd = fd };

	return sbx_sys(SYS_landlock_add_rule, ruleset, LANDLOCK_RULE_PATH_BENEATH, &beneath, 0);
}

/* The groups of its launchers, which init makes and removes. Nobody else has a way to them: they are not mounted. */
static long allow_groups(int ruleset, const struct sbx_box *box)
{
	const uint64_t access = LANDLOCK_ACCESS_FS_READ_FILE | LANDLOCK_ACCESS_FS_WRITE_FILE |
				LANDLOCK_ACCESS_FS_READ_DIR | LANDLOCK_ACCESS_FS_MAKE_DIR |
				LANDLOCK_ACCESS_FS_REMOVE_DIR;
	long ret = 0;

	for (unsigned i = 0; i < box->slots && ret >= 0; i++)
		ret = allow(ruleset, box->slot_dir[i], access & box->plan->landlock_fs);
	return ret;
}

int sbx_landlock_restrict(const struct sbx_box *box, struct sbx_error *err)
{
	const struct sbx_plan *p = box->plan;
	const uint64_t attr[3] = { p->landlock_fs, 0, p->landlock_scoped };
	const struct sbx_rule *rule = sbx_at(p, p->rules.off);

	if (!p->landlock_fs)
		return 0;
	_cleanup_fd_ int ruleset = (int)sbx_sys(SYS_landlock_create_ruleset, attr, ruleset_size(p->landlock_abi), 0);
	if (ruleset < 0)
		return sbx_fail(err, SBX_STAGE_LANDLOCK, 0, ruleset);
	for (uint32_t i = 0; i < p->rules.count; i++, rule++) {
		_cleanup_fd_ int fd = sbx_openat2(AT_FDCWD, sbx_str(p, rule->path), O_PATH, 0, RESOLVE_NO_MAGICLINKS);
		long ret = fd < 0 ? fd : allow(ruleset, fd, rule->access);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_LANDLOCK, i, ret);
	}
	long ret = box->resident ? allow_groups(ruleset, box) : 0;
	if (ret >= 0)
		ret = sbx_sys(SYS_landlock_restrict_self, ruleset, 0);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_LANDLOCK, p->rules.count, ret) : 0;
}
