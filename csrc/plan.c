/*
 * plan.c - checks a plan or a request once, before anything is started from it.
 *
 * After sbx_plan_check() the executing code follows offsets without looking, so every offset, count,
 * terminator and enumeration is proved here. Pure: no system calls, no state; fuzzed by
 * tests/c/fuzz_plan.c.
 */
#include "plan.h"
#include "util.h"

#include <linux/filter.h>

struct arena {
	const char *base;
	uint32_t size;
	uint32_t header;
};

static bool string_ok(const struct arena *a, uint32_t off)
{
	return off >= a->header && off < a->size && memchr(a->base + off, '\0', a->size - off);
}

static bool optional_ok(const struct arena *a, uint32_t off)
{
	return off == 0 || string_ok(a, off);
}

static bool path_ok(const struct arena *a, uint32_t off)
{
	return string_ok(a, off) && a->base[off] == '/' && strlen(a->base + off) < 4096;
}

static bool bytes_ok(const struct arena *a, uint32_t off, uint32_t size)
{
	return off >= a->header && off < a->size && size < a->size - off && a->base[off + size] == '\0';
}

static bool array_ok(const struct arena *a, struct sbx_span span, size_t item, size_t align)
{
	if (span.count == 0)
		return true;
	return span.count <= SBX_MAX_ITEMS && span.off >= a->header && span.off % align == 0 && span.off <= a->size &&
	       span.count <= (a->size - span.off) / item;
}

/* `count` strings, one behind the other. */
static bool strings_ok(const struct arena *a, struct sbx_span span)
{
	uint32_t off = span.off;

	if (span.count > SBX_MAX_ITEMS)
		return false;
	for (uint32_t i = 0; i < span.count; i++) {
		if (!string_ok(a, off))
			return false;
		off += (uint32_t)strlen(a->base + off) + 1;
	}
	return true;
}

/* key NUL value NUL ... NUL; a flag has an empty value */
static bool options_ok(const struct arena *a, uint32_t off)
{
	if (off == 0)
		return true;
	for (int i = 0; i < 512; i++) { /* a pair for each layer of a root file system */
		if (!string_ok(a, off))
			return false;
		if (i % 2 == 0 && a->base[off] == '\0')
			return true;
		off += (uint32_t)strlen(a->base + off) + 1;
	}
	return false;
}

static bool nodes_ok(const struct arena *a, const struct sbx_plan *p)
{
	const struct sbx_node *node = sbx_at(p, p->nodes.off);

	if (!array_ok(a, p->nodes, sizeof *node, _Alignof(struct sbx_node)))
		return false;
	for (uint32_t i = 0; i < p->nodes.count; i++, node++) {
		if (node->kind < SBX_NODE_DIR || node->kind > SBX_NODE_SYMLINK || !path_ok(a, node->path) ||
		    node->mode > 07777)
			return false;
		if (node->kind != SBX_NODE_DIR && !bytes_ok(a, node->data, node->size))
			return false;
	}
	return true;
}

static bool mount_ok(const struct arena *a, const struct sbx_mount *m)
{
	const uint32_t attrs = MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC |
			       MOUNT_ATTR_IDMAP;

	if (m->kind < SBX_MOUNT_BIND || m->kind > SBX_MOUNT_OVERLAY || m->flags > 15 || m->mode > 07777 ||
	    (m->attrs & ~attrs))
		return false;
	if (!path_ok(a, m->target) || !options_ok(a, m->options))
		return false;
	if ((m->kind == SBX_MOUNT_BIND) != (m->source != 0) || (m->source && !path_ok(a, m->source)))
		return false;
	if ((m->attrs & MOUNT_ATTR_IDMAP) ? !string_ok(a, m->uid_map) || !string_ok(a, m->gid_map) :
					    m->uid_map || m->gid_map)
		return false;
	if (m->kind != SBX_MOUNT_OVERLAY && m->lowers)
		return false;
	if (m->flags & SBX_MOUNT_BOUNDED && m->kind != SBX_MOUNT_BIND)
		return false;
	return m->kind <= SBX_MOUNT_MASK || !(m->flags & SBX_MOUNT_LATE);
}

static bool lowers_ok(const struct arena *a, const struct sbx_plan *p)
{
	const struct sbx_lower *lower = sbx_at(p, p->lowers.off);

	if (!array_ok(a, p->lowers, sizeof *lower, _Alignof(struct sbx_lower)))
		return false;
	for (uint32_t i = 0; i < p->lowers.count; i++, lower++)
		if (!path_ok(a, lower->source) || !optional_ok(a, lower->uid_map) || !optional_ok(a, lower->gid_map) ||
		    !lower->uid_map != !lower->gid_map)
			return false;
	return true;
}

/* A root that is an overlay is the first mount, and what it carries are paths. */
static bool root_ok(const struct arena *a, const struct sbx_plan *p)
{
	const struct sbx_mount *m = sbx_at(p, p->mounts.off);
	uint32_t off = p->carried.off;

	if (!(p->flags & SBX_PLAN_OVERLAY_ROOT))
		return !(p->flags & SBX_PLAN_WRITABLE_ROOT) && p->carried.count == 0;
	if (p->mounts.count == 0 || m->kind != SBX_MOUNT_OVERLAY || !strings_ok(a, p->carried) ||
	    !m->options != !!(p->flags & SBX_PLAN_WRITABLE_ROOT))
		return false;
	for (uint32_t i = 0; i < p->carried.count; i++) {
		if (!path_ok(a, off))
			return false;
		off += (uint32_t)strlen(a->base + off) + 1;
	}
	return true;
}

static bool mounts_ok(const struct arena *a, const struct sbx_plan *p)
{
	const struct sbx_mount *m = sbx_at(p, p->mounts.off);
	uint32_t late = 0;

	if (!array_ok(a, p->mounts, sizeof *m, _Alignof(struct sbx_mount)))
		return false;
	for (uint32_t i = 0; i < p->mounts.count; i++, m++) {
		if (!mount_ok(a, m) || m->lower > p->lowers.count || m->lowers > p->lowers.count - m->lower ||
		    m->parent > i)
			return false;
		late += (m->flags & SBX_MOUNT_LATE) != 0;
	}
	return late <= SBX_MAX_LATE;
}

static bool rlimits_ok(const struct arena *a, struct sbx_span span)
{
	const struct sbx_rlimit *limit = sbx_at(a->base, span.off);

	if (!array_ok(a, span, sizeof *limit, _Alignof(struct sbx_rlimit)))
		return false;
	for (uint32_t i = 0; i < span.count; i++)
		if (limit[i].resource > 15 || limit[i].soft > limit[i].hard)
			return false;
	return true;
}

static bool limits_ok(const struct arena *a, const struct sbx_plan *p)
{
	const struct sbx_rule *rule = sbx_at(p, p->rules.off);

	if (!rlimits_ok(a, p->rlimits) || !array_ok(a, p->rules, sizeof *rule, _Alignof(struct sbx_rule)) ||
	    !array_ok(a, p->filter, sizeof(struct sock_filter), _Alignof(struct sock_filter)))
		return false;
	for (uint32_t i = 0; i < p->rules.count; i++)
		if (!path_ok(a, rule[i].path))
			return false;
	return p->filter.count <= SBX_MAX_FILTER && strings_ok(a, p->masks) && strings_ok(a, p->readonly);
}

int sbx_plan_check(const void *arena, size_t len, struct sbx_error *err)
{
	const uint64_t namespaces = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS |
				    CLONE_NEWCGROUP | CLONE_NEWNET;
	const uint64_t required = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS;
	const struct sbx_plan *p = arena;

	if (len < sizeof *p || len > SBX_MAX_ARENA || (uintptr_t)arena % _Alignof(struct sbx_plan))
		return sbx_fail(err, SBX_STAGE_PLAN, 0, -EINVAL);
	if (p->magic != SBX_PLAN_MAGIC || p->layout != SBX_LAYOUT || p->size != len)
		return sbx_fail(err, SBX_STAGE_PLAN, 1, -EINVAL);

	const struct arena a = { arena, p->size, sizeof *p };
	if ((p->namespaces & ~namespaces) || (p->namespaces & required) != required || p->flags > 1023)
		return sbx_fail(err, SBX_STAGE_PLAN, 2, -EINVAL);
	if (!string_ok(&a, p->uid_map) || !string_ok(&a, p->gid_map) || !string_ok(&a, p->hostname) ||
	    !optional_ok(&a, p->time_offsets) || !options_ok(&a, p->root_options) ||
	    !options_ok(&a, p->scratch_options))
		return sbx_fail(err, SBX_STAGE_PLAN, 3, -EINVAL);
	if (!nodes_ok(&a, p))
		return sbx_fail(err, SBX_STAGE_PLAN, 4, -EINVAL);
	if (!lowers_ok(&a, p) || !mounts_ok(&a, p) || !root_ok(&a, p))
		return sbx_fail(err, SBX_STAGE_PLAN, 5, -EINVAL);
	if (!limits_ok(&a, p))
		return sbx_fail(err, SBX_STAGE_PLAN, 6, -EINVAL);
	return 0;
}

static bool files_ok(const struct arena *a, const struct sbx_request *r)
{
	const struct sbx_file *file = sbx_at(r, r->files.off);

	if (!array_ok(a, r->files, sizeof *file, _Alignof(struct sbx_file)))
		return false;
	for (uint32_t i = 0; i < r->files.count; i++, file++)
		if (!path_ok(a, file->path) || file->mode > 0777 || !bytes_ok(a, file->data, file->size))
			return false;
	return true;
}

static bool stdio_ok(const struct sbx_request *r)
{
	for (int i = 0; i < 3; i++)
		if (r->stdio[i] > SBX_STDIO_LOG || (r->stdio[i] == SBX_STDIO_STDOUT && i != 2) ||
		    (r->stdio[i] == SBX_STDIO_LOG && (i == 0 || !(r->flags & SBX_REQUEST_DETACHED))))
			return false;
	return r->rows <= UINT16_MAX && r->columns <= UINT16_MAX;
}

static bool groups_ok(const struct arena *a, const struct sbx_request *r)
{
	const uint32_t *use = sbx_at(r, r->groups.off);

	if (!array_ok(a, r->groups, sizeof *use, _Alignof(uint32_t)) || r->groups.count > SBX_MAX_GROUPS)
		return false;
	for (uint32_t i = 0; i < r->groups.count; i++)
		if (use[i] < SBX_GROUP_BORN || use[i] > SBX_GROUP_HOLD)
			return false;
	return true;
}

static bool layers_ok(const struct arena *a, const struct sbx_request *r)
{
	return array_ok(a, r->layers, sizeof(uint64_t), _Alignof(uint64_t)) && r->layers.count <= SBX_MAX_LAYERS;
}

int sbx_request_check(const void *arena, size_t len, struct sbx_error *err)
{
	const struct sbx_request *r = arena;

	if (len < sizeof *r || len > SBX_MAX_ARENA || (uintptr_t)arena % _Alignof(struct sbx_request))
		return sbx_fail(err, SBX_STAGE_REQUEST, 0, -EINVAL);
	if (r->magic != SBX_REQUEST_MAGIC || r->layout != SBX_LAYOUT || r->size != len || r->flags > 255)
		return sbx_fail(err, SBX_STAGE_REQUEST, 1, -EINVAL);

	const struct arena a = { arena, r->size, sizeof *r };
	if (!groups_ok(&a, r) || !layers_ok(&a, r))
		return sbx_fail(err, SBX_STAGE_REQUEST, 6, -EINVAL);
	if (r->flags & SBX_REQUEST_SANDBOX)
		return 0; /* has no command */
	if (r->argv.count == 0 || r->paths.count == 0 || !strings_ok(&a, r->argv) || !strings_ok(&a, r->env) ||
	    !strings_ok(&a, r->paths) || !path_ok(&a, r->cwd) || r->umask > 0777)
		return sbx_fail(err, SBX_STAGE_REQUEST, 2, -EINVAL);
	if (!stdio_ok(r) || r->pass.count > SBX_MAX_PASS || !array_ok(&a, r->pass, sizeof(int32_t), _Alignof(int32_t)))
		return sbx_fail(err, SBX_STAGE_REQUEST, 3, -EINVAL);
	if (!files_ok(&a, r))
		return sbx_fail(err, SBX_STAGE_REQUEST, 4, -EINVAL);
	if (!rlimits_ok(&a, r->rlimits))
		return sbx_fail(err, SBX_STAGE_REQUEST, 5, -EINVAL);
	return 0;
}
