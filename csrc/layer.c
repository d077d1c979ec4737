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

/* Remove what nobody has any more. */
static void drop_layers(int scratch, const struct sbx_layers *l)
{
	char name[16];

	for (uint32_t i = 0; i < l->drops; i++) {
		sbx_format_path(name, "l", l->drop[i], "");
		if (sbx_sys(SYS_fchdir, scratch) >= 0) /* one that came from elsewhere is a mount */
			(void)sbx_sys(SYS_umount2, name, MNT_DETACH | UMOUNT_NOFOLLOW);
		(void)sbx_remove_tree(scratch, name, false);
	}
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

/* In a child. */
void sbx_layers_drop(const struct sbx_box *box, const struct sbx_layers *l)
{
	_cleanup_fd_ int scratch = sbx_openat2(box->void_fd, SBX_VOID_SCRATCH, O_PATH | O_DIRECTORY, 0,
					       SBX_RESOLVE_STRICT);

	if (scratch >= 0)
		drop_layers(scratch, l);
}

/* One layer of some, the topmost first. `to` is empty. */
static long merge(const struct sbx_plan *p, int scratch, const uint32_t *number, uint32_t count, int to)
{
	char name[16];
	long ret = 0;

	while (count-- > 0 && ret >= 0) {
		sbx_format_path(name, "l", number[count], "");
		_cleanup_fd_ int from = sbx_openat2(scratch, name, O_PATH | O_DIRECTORY, 0, 0);
		ret = from < 0 ? from : copy_parts(p, from, to);
	}
	return ret;
}

/*
 * A new layer: a copy of those that are named, or of what is written to, while nobody writes. Returns a descriptor of
 * it, or -1 with *err filled, and then there is nothing of it.
 */
int sbx_layers_copy(const struct sbx_box *box, const struct sbx_layers *l, struct sbx_error *err)
{
	const uint32_t *number = l->count ? l->number : &box->layers.upper;
	char name[16];

	sbx_format_path(name, "l", l->upper, "");
	_cleanup_fd_ int scratch = sbx_openat2(box->void_fd, SBX_VOID_SCRATCH, O_PATH | O_DIRECTORY, 0,
					       SBX_RESOLVE_STRICT);
	_cleanup_fd_ int to = scratch < 0 ? scratch : make_directory(scratch, name);
	long ret = to < 0 ? to : merge(box->plan, scratch, number, l->count ? l->count : 1, to);
	int layer = ret < 0 ? (int)ret : sbx_layer_lend(scratch, l->upper);
	if (layer >= 0)
		return layer;
	if (to >= 0)
		(void)sbx_remove_tree(scratch, name, false);
	return sbx_fail(err, SBX_STAGE_MOUNT, box->plan->mounts.count, layer);
}
