/*
 * libFuzzer target: whatever the bytes, the validators do not read out of bounds; and what they accept
 * can be walked the way the executing code walks it.
 */
#include "plan.h"
#include "util.h"

#include <stdlib.h>

static size_t walk_plan(const struct sbx_plan *p)
{
	const struct sbx_mount *m = sbx_at(p, p->mounts.off);
	const struct sbx_node *n = sbx_at(p, p->nodes.off);
	const char *mask = sbx_str(p, p->masks.off);
	size_t sum = strlen(sbx_str(p, p->uid_map)) + strlen(sbx_str(p, p->hostname));

	for (uint32_t i = 0; i < p->nodes.count; i++)
		sum += strlen(sbx_str(p, n[i].path)) + (n[i].kind == SBX_NODE_DIR ? 0 : strlen(sbx_str(p, n[i].data)));
	for (uint32_t i = 0; i < p->mounts.count; i++) {
		sum += strlen(sbx_str(p, m[i].target));
		for (const char *key = sbx_optional(p, m[i].options); key && *key; key = sbx_next(sbx_next(key)))
			sum += strlen(sbx_next(key));
	}
	for (uint32_t i = 0; i < p->masks.count; i++, mask = sbx_next(mask))
		sum += strlen(mask);
	return sum;
}

static size_t walk_request(const struct sbx_request *r)
{
	const struct sbx_file *file = sbx_at(r, r->files.off);
	const char *arg = sbx_str(r, r->argv.off), *env = sbx_str(r, r->env.off);
	size_t sum = strlen(sbx_str(r, r->cwd));

	for (uint32_t i = 0; i < r->argv.count; i++, arg = sbx_next(arg))
		sum += strlen(arg);
	for (uint32_t i = 0; i < r->env.count; i++, env = sbx_next(env))
		sum += strlen(env);
	for (uint32_t i = 0; i < r->files.count; i++)
		sum += strlen(sbx_str(r, file[i].path)) + file[i].size;
	const struct sbx_rlimit *limit = sbx_at(r, r->rlimits.off);
	for (uint32_t i = 0; i < r->rlimits.count; i++)
		sum += limit[i].resource + limit[i].soft;
	const uint32_t *use = sbx_at(r, r->groups.off);
	for (uint32_t i = 0; i < r->groups.count; i++)
		sum += use[i];
	return sum;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct sbx_error err;
	void *copy = malloc(size ? size : 1); /* exact size, so that the sanitizer sees one byte too many */
	volatile size_t sum = 0;

	if (!copy)
		return 0;
	memcpy(copy, data, size);
	if (sbx_plan_check(copy, size, &err) == 0)
		sum += walk_plan(copy);
	const struct sbx_request *r = copy;
	if (sbx_request_check(copy, size, &err) == 0 && !(r->flags & SBX_REQUEST_SANDBOX)) /* which has no more */
		sum += walk_request(copy);
	free(copy);
	return 0;
}
