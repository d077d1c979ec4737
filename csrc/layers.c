/*
 * layers.c - a living sandbox's overlays, made anew on other layers: what is written to becomes a layer, or goes.
 * init does it, while no command runs. It takes the same few calls however much there is in the layers.
 *
 * Sealing is proved by the kernel: an overlay with a file that somebody has open for writing cannot be made
 * read-only, mount_setattr(2), EBUSY; and whoever looks for a file from then on finds the new overlay.
 *
 * An overlay that takes another's place is mounted beneath it (MOVE_MOUNT_BENEATH, Linux 6.5), so no path has to
 * lead there. What lies on the old one is cloned onto the new one, the root's as when it was made, overlay.c; also what
 * came while the sandbox ran: binds.c.
 * Everything that can fail for want of something comes before the first of them is changed.
 */
#include "box.h"

#include <linux/magic.h>
#include <sys/mount.h>
#include <sys/stat.h>

#ifndef MOVE_MOUNT_BENEATH
#define MOVE_MOUNT_BENEATH 0x00000200
#endif

enum { MAX_MOUNTS = 256 }; /* of a sandbox whose layers change */

/* One overlay and what replaces it. */
struct change {
	uint32_t index; /* of mounts */
	int old, over;	/* their roots */
};

struct changes {
	struct change each[SBX_MAX_LATE];
	uint32_t count;
	int root, void_fd, scratch;
	struct sbx_binds *binds;
};

static const struct sbx_mount *mount_at(const struct sbx_plan *p, uint32_t index)
{
	return (const struct sbx_mount *)sbx_at(p, p->mounts.off) + index;
}

static void release(struct changes *c)
{
	for (uint32_t i = 0; i < c->count; i++) {
		sbx_close(c->each[i].old);
		sbx_close(c->each[i].over);
	}
	sbx_binds_release(c->binds);
	sbx_close(c->root);
	sbx_close(c->void_fd);
	sbx_close(c->scratch);
}

/* The numbers of a message without its marks. Returns how many descriptors have to come with it, or -EPROTO. */
int sbx_layers_take(struct sbx_layers *l, const uint32_t *number, size_t count)
{
	int fresh = 0;

	if (count > SBX_MAX_LAYERS)
		return -EPROTO;
	for (size_t i = 0; i < count; i++) {
		fresh += (number[i] & SBX_LAYER_NEW) != 0;
		l->number[i] = number[i] & ~(uint32_t)SBX_LAYER_NEW;
	}
	l->count = (uint32_t)count;
	return fresh;
}

/* --- what may fail and changes nothing ------------------------------------------------------------ */

/* Whether a mount begins here, and one of overlayfs if asked: a payload may have renamed what leads here. */
static long begins_mount(int fd, bool overlay)
{
	struct statx st;
	long ret = sbx_sys(SYS_statx, fd, "", AT_EMPTY_PATH, STATX_TYPE, &st);

	if (ret >= 0 && !(st.stx_attributes & STATX_ATTR_MOUNT_ROOT))
		return -EXDEV;
	struct {
		long type;
		char rest[512];
	} fs;
	if (ret >= 0 && overlay)
		ret = sbx_sys(SYS_fstatfs, fd, &fs);
	return ret < 0 || !overlay || fs.type == OVERLAYFS_SUPER_MAGIC ? ret : -EXDEV;
}

static long open_old(const struct sbx_plan *p, struct change *c, int root)
{
	c->old = sbx_openat2(root, sbx_str(p, mount_at(p, c->index)->target), O_PATH | O_DIRECTORY | O_NOFOLLOW, 0,
			     SBX_RESOLVE_STRICT);
	return c->old < 0 ? c->old : begins_mount(c->old, true);
}

static int prepare(const struct sbx_box *box, const struct sbx_layers *l, struct changes *c, struct sbx_error *err)
{
	const struct sbx_plan *p = box->plan;

	if (p->mounts.count > MAX_MOUNTS)
		return sbx_fail(err, SBX_STAGE_MOUNT, MAX_MOUNTS, -E2BIG);
	if (sbx_binds_locate(box->binds, err) < 0)
		return -1;
	for (uint32_t i = 0; i < p->mounts.count; i++) {
		if (mount_at(p, i)->kind != SBX_MOUNT_OVERLAY || mount_at(p, i)->options)
			continue;
		if (c->count == SBX_COUNT(c->each))
			return sbx_fail(err, SBX_STAGE_MOUNT, i, -E2BIG);
		struct change *one = &c->each[c->count++];
		*one = (struct change){ i, -1, -1 };
		long ret = open_old(p, one, c->root);
		if (ret >= 0)
			ret = one->over = sbx_overlay_open(p, i, c->scratch, l);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_MOUNT, i, ret);
		size_t prefix = strlen(sbx_str(p, mount_at(p, i)->target));
		if (sbx_binds_prepare(box->binds, one->old, one->over, prefix > 1 ? prefix : 0, err) < 0)
			return -1;
	}
	return 0;
}

static long freeze(int mount, bool on)
{
	const struct mount_attr attr = { .attr_set = on ? MOUNT_ATTR_RDONLY : 0,
					 .attr_clr = on ? 0 : MOUNT_ATTR_RDONLY };

	return sbx_mount_setattr(mount, 0, &attr);
}

/* From here on nobody can change what is to be the layer of this number. Returns it. */
static int seal(const struct changes *c, uint32_t number, struct sbx_error *err)
{
	uint32_t i = 0;
	long ret = 0;

	while (i < c->count && (ret = freeze(c->each[i].old, true)) >= 0)
		i++;
	int tree = ret < 0 ? (int)ret : sbx_layer_lend(c->scratch, number);
	if (tree >= 0)
		return tree;
	sbx_fail(err, SBX_STAGE_MOUNT, i < c->count ? c->each[i].index : 0, tree);
	while (i-- > 0)
		(void)freeze(c->each[i].old, false);
	return -1;
}

/* --- the change ----------------------------------------------------------------------------------- */

/* Clone everything that lies directly on an overlay, to be put on another one. `trees` is by index. */
static int clone_children(const struct sbx_plan *p, const struct change *c, int *trees, struct sbx_error *err)
{
	size_t prefix = strlen(sbx_str(p, mount_at(p, c->index)->target));

	for (uint32_t i = 0; i < p->mounts.count; i++) {
		const struct sbx_mount *m = mount_at(p, i);
		if (m->parent != c->index + 1)
			continue;
		const char *path = sbx_str(p, m->target) + (prefix > 1 ? prefix : 0);
		_cleanup_fd_ int at = sbx_openat2(c->old, path, O_PATH | O_NOFOLLOW, 0, SBX_RESOLVE_STRICT);
		long ret = at < 0 ? at : begins_mount(at, false);
		if (ret >= 0)
			ret = trees[i] = sbx_open_tree(at, "", AT_EMPTY_PATH | AT_RECURSIVE);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_MOUNT, i, ret);
	}
	return 0;
}

static int attach_children(const struct sbx_plan *p, const struct change *c, const int *trees, struct sbx_error *err)
{
	size_t prefix = strlen(sbx_str(p, mount_at(p, c->index)->target));

	for (uint32_t i = 0; i < p->mounts.count; i++) {
		const char *path = sbx_str(p, mount_at(p, i)->target) + (prefix > 1 ? prefix : 0);
		if (trees[i] >= 0 && sbx_mount_attach_at(p, i, c->over, path, trees[i], err) < 0)
			return -1;
	}
	return 0;
}

/* One that is not the root. */
static int replace(struct sbx_box *box, const struct change *c, const int *trees, struct sbx_error *err)
{
	const struct sbx_plan *p = box->plan;
	const unsigned beneath = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH | MOVE_MOUNT_BENEATH;

	long ret = sbx_sys(SYS_move_mount, c->over, "", c->old, "", beneath);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_MOUNT, c->index, ret);
	if (attach_children(p, c, trees, err) < 0 || sbx_binds_attach(box->binds, c->old, err) < 0)
		return -1;
	ret = sbx_sys(SYS_fchdir, c->old);
	if (ret >= 0)
		ret = sbx_sys(SYS_umount2, ".", MNT_DETACH);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_MOUNT, c->index, ret) : 0;
}

/* The root: with what came from the template's own, and with the void, proc on it. */
static int replace_root(struct sbx_box *box, struct changes *c, const struct change *root, const int *trees,
			struct sbx_error *err)
{
	const struct sbx_plan *p = box->plan;

	long ret = sbx_move_mount(root->over, c->root);
	if (ret >= 0)
		ret = sbx_overlay_carry(p, c->root, root->over, c->void_fd);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_MOUNT, root->index, ret);
	_cleanup_fd_ int void_fd = (int)ret;
	if (attach_children(p, root, trees, err) < 0 || sbx_binds_attach(box->binds, root->old, err) < 0 ||
	    sbx_root_enter(root->over, err) < 0)
		return -1;
	sbx_close(box->void_fd);
	box->void_fd = sbx_steal_fd(&void_fd);
	return 0;
}

/* Those below others first: who comes later takes along what lies on it. */
static int replace_all(struct sbx_box *box, struct changes *c, struct sbx_error *err)
{
	const struct sbx_plan *p = box->plan;
	int trees[MAX_MOUNTS];

	for (uint32_t i = c->count; i-- > 0;) {
		const struct change *one = &c->each[i];
		bool root = one->index == 0 && p->flags & SBX_PLAN_WRITABLE_ROOT;
		memset(trees, -1, sizeof trees);
		int ret = clone_children(p, one, trees, err);
		if (ret == 0)
			ret = root ? replace_root(box, c, one, trees, err) : replace(box, one, trees, err);
		for (uint32_t k = 0; k < p->mounts.count; k++)
			sbx_close(trees[k]);
		if (ret < 0)
			return -1;
	}
	return 0;
}

static int open_places(const struct sbx_box *box, struct changes *c, struct sbx_error *err)
{
	c->root = sbx_openat2(AT_FDCWD, "/", O_PATH | O_DIRECTORY, 0, 0);
	c->void_fd = (int)sbx_sys(SYS_fcntl, box->void_fd, F_DUPFD_CLOEXEC, 3);
	c->scratch = sbx_openat2(c->void_fd, SBX_VOID_SCRATCH, O_PATH | O_DIRECTORY, 0, SBX_RESOLVE_STRICT);
	long ret = c->root < 0 ? c->root : c->void_fd < 0 ? c->void_fd : c->scratch;
	if (ret >= 0)
		ret = sbx_sys(SYS_fchdir, c->void_fd);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_MOUNT, box->plan->mounts.count, ret) : 0;
}

static int add_layers(struct changes *c, const struct sbx_layers *wanted, const struct sbx_layers *l, const int *fds,
		      struct sbx_error *err)
{
	for (uint32_t i = 0; i < l->count; i++) {
		int ret = wanted->number[i] & SBX_LAYER_NEW ? sbx_overlay_add(c->scratch, l->number[i], *fds++) : 0;
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_MOUNT, 0, ret);
	}
	return 0;
}

/* Nothing has changed, and nothing stays. */
static int take_back(struct changes *c, uint32_t upper)
{
	char name[16];

	sbx_binds_release(c->binds);
	for (uint32_t i = 0; i < c->count; i++)
		sbx_close(sbx_steal_fd(&c->each[i].over));
	sbx_format_path(name, "l", upper, "");
	(void)sbx_remove_tree(c->scratch, name, false);
	return -1;
}

/*
 * Returns a descriptor of the layer that was sealed, or 0; -1 with *err filled where nothing has changed, and -2 where
 * the sandbox cannot go on. *sweeper is the child that clears up, or 0.
 */
int sbx_layers_change(struct sbx_box *box, const struct sbx_layers *wanted, const int *fds, pid_t *sweeper,
		      struct sbx_error *err)
{
	__attribute__((
		cleanup(release))) struct changes c = { .root = -1, .void_fd = -1, .scratch = -1, .binds = box->binds };
	struct sbx_layers l = { .upper = wanted->upper };
	int sealed = -1;

	(void)sbx_layers_take(&l, wanted->number, wanted->count);
	if (open_places(box, &c, err) < 0)
		return -1;
	if (add_layers(&c, wanted, &l, fds, err) < 0 || prepare(box, &l, &c, err) < 0)
		return take_back(&c, l.upper);
	if (wanted->seal && (sealed = seal(&c, box->layers.upper, err)) < 0)
		return take_back(&c, l.upper);
	if (replace_all(box, &c, err) < 0)
		return sbx_close(sealed), -2;
	long ret = sbx_sys(SYS_chdir, "/");
	if (ret < 0)
		return sbx_close(sealed), sbx_fail(err, SBX_STAGE_MOUNT, 0, ret), -2;
	if (sbx_binds_reopen(box->binds, err) < 0)
		return sbx_close(sealed), -2;
	bool later = wanted->seal && !wanted->drops;
	for (uint32_t i = 0; i < c.count && wanted->seal; i++)
		later &= sbx_retire(box, &c.each[i].old);
	bool due = sbx_retired_due(&box->retired, wanted);
	*sweeper = later ? 0 : sbx_sweep(box, due, &box->layers, wanted);
	box->layers = l;
	return wanted->seal ? sealed : 0;
}
