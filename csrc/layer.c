/*
 * layer.c - one layer of a sandbox's overlays: lent, removed, made of others. They lie in the scratch, "lNUMBER", with
 * "uINDEX" for each overlay: directories, or mounts of what other sandboxes have written.
 */
#include "box.h"

#include <sys/mount.h>

static const struct sbx_mount *mount_at(const struct sbx_plan *p, uint32_t index)
{
	return (const struct sbx_mount *)sbx_at(p, p->mounts.off) + index;
}

/* A descriptor of a layer, for whoever wants it as his: a mount of its own that nobody can write to. */
int sbx_layer_lend(int scratch, uint32_t number)
{
	const struct mount_attr readonly = { .attr_set = MOUNT_ATTR_RDONLY };
	char name[16];

	sbx_format_path(name, "l", number, "");
	_cleanup_fd_ int tree = sbx_open_tree(scratch, name, 0);
	long ret = tree < 0 ? tree : sbx_mount_setattr(tree, 0, &readonly);
	return ret < 0 ? (int)ret : sbx_steal_fd(&tree);
}

static int open_layer(int scratch, uint32_t number)
{
	char name[16];

	sbx_format_path(name, "l", number, "");
	return sbx_openat2(scratch, name, O_PATH | O_DIRECTORY, 0, 0);
}

static long copy_part(int from, int to, uint32_t index, int links)
{
	char name[16];

	sbx_format_path(name, "u", index, "");
	long ret = sbx_sys(SYS_mkdirat, to, name, 0700);
	_cleanup_fd_ int upper = ret < 0 && ret != -EEXIST ? (int)ret :
							     sbx_openat2(from, name, O_PATH | O_DIRECTORY, 0, 0);
	_cleanup_fd_ int copy = upper < 0 ? upper : sbx_openat2(to, name, O_PATH | O_DIRECTORY, 0, 0);
	return copy < 0 ? copy : sbx_copy_tree(upper, copy, links);
}

static int make_directory(int at, const char *name)
{
	long ret = sbx_sys(SYS_mkdirat, at, name, 0700);

	return ret < 0 ? (int)ret : sbx_openat2(at, name, O_PATH | O_DIRECTORY, 0, 0);
}

static long copy_parts(const struct sbx_plan *p, int from, int to)
{
	_cleanup_fd_ int links = make_directory(to, "links");
	long ret = links < 0 ? links : 0;

	for (uint32_t i = 0; i < p->mounts.count && ret >= 0; i++)
		if (mount_at(p, i)->kind == SBX_MOUNT_OVERLAY && !mount_at(p, i)->options)
			ret = copy_part(from, to, i, links);
	return ret < 0 ? ret : sbx_remove_tree(to, "links", false);
}

/* --- what a child does ---------------------------------------------------------------------------- */

void sbx_chore_close(const struct sbx_chore *c)
{
	sbx_close(c->scratch);
	sbx_close(c->to);
	sbx_close(c->tree);
	for (uint32_t i = 0; i < c->count; i++)
		sbx_close(c->from[i]);
	for (uint32_t i = 0; i < c->drops; i++)
		sbx_close(c->gone[i]);
}

long sbx_chore_begin(const struct sbx_box *box, struct sbx_chore *c)
{
	c->to = c->tree = -1;
	c->count = c->drops = 0;
	c->scratch = sbx_openat2(box->void_fd, SBX_VOID_SCRATCH, O_PATH | O_DIRECTORY, 0, SBX_RESOLVE_STRICT);
	return c->scratch;
}

/* What nobody has any more. One that came from elsewhere is a mount: it is no more, but for the child, who ends it. */
void sbx_chore_drop(struct sbx_chore *c, const uint32_t *number, uint32_t count)
{
	char name[16];

	if (c->scratch < 0 || sbx_sys(SYS_fchdir, c->scratch) < 0)
		return;
	for (uint32_t i = 0; i < count && c->drops < SBX_COUNT(c->drop); i++) {
		c->gone[c->drops] = open_layer(c->scratch, number[i]);
		c->drop[c->drops++] = number[i];
		sbx_format_path(name, "l", number[i], "");
		(void)sbx_sys(SYS_umount2, name, MNT_DETACH | UMOUNT_NOFOLLOW);
	}
	(void)syscall(SYS_chdir, "/"); /* which nothing can refuse */
}

/* A new layer of this number, empty until the child has run: a copy of others. */
long sbx_chore_copy(struct sbx_chore *c, uint32_t upper, const uint32_t *number, uint32_t count)
{
	char name[16];

	sbx_format_path(name, "l", upper, "");
	long ret = c->to = make_directory(c->scratch, name);
	if (ret >= 0)
		ret = c->tree = sbx_layer_lend(c->scratch, upper);
	for (; c->count < count && ret >= 0; c->count++)
		ret = c->from[c->count] = open_layer(c->scratch, number[c->count]);
	return ret;
}

/* There is no child, and nothing to be copied to. */
void sbx_chore_cancel(const struct sbx_chore *c, uint32_t upper)
{
	char name[16];

	sbx_format_path(name, "l", upper, "");
	(void)sbx_sys(SYS_unlinkat, c->scratch, name, AT_REMOVEDIR);
}

void sbx_layers_drop(const struct sbx_chore *c)
{
	char name[16];

	for (uint32_t i = 0; i < c->drops; i++) {
		sbx_format_path(name, "l", c->drop[i], "");
		(void)sbx_remove_tree(c->scratch, name, false);
	}
}

/* Fill the new layer. Returns a descriptor of it, or -1 with *err filled, and then there is nothing of it. */
int sbx_layers_copy(const struct sbx_box *box, struct sbx_chore *c, uint32_t upper, struct sbx_error *err)
{
	uint32_t i = c->count;
	char name[16];
	long ret = 0;

	while (i-- > 0 && ret >= 0)
		ret = copy_parts(box->plan, c->from[i], c->to);
	if (ret >= 0)
		return sbx_steal_fd(&c->tree);
	sbx_format_path(name, "l", upper, "");
	(void)sbx_remove_tree(c->scratch, name, false);
	return sbx_fail(err, SBX_STAGE_MOUNT, box->plan->mounts.count, ret);
}
