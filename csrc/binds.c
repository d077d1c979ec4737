/*
 * binds.c - directories and files of the host that come and go while a sandbox runs: move_mount(2), umount(2).
 *
 * init attaches what the spawner has cloned, while payloads rename and link as they like. So the target is found from
 * the root without following a link, what was mounted is looked for where it should be, and from then on it is known by
 * the directory it lies in: that may be renamed, but inside not what is mounted on (rename(2), EBUSY). To take it away no
 * path is looked up again; but for one on a directory of the host, where somebody outside may have renamed it, too.
 *
 * Nothing is made here but on an overlay of other layers, in its private part. The host had the payload make the target.
 */
#include "box.h"

#include <sys/mount.h>

enum { MOMENT = 30 /* ms */ };

#define EACH(binds, e) \
	for (struct sbx_bound *e = (binds) ? (binds)->each : NULL; e && e < (binds)->each + SBX_MAX_BINDS; e++)

static int failed(const struct sbx_binds *binds, const struct sbx_bound *e, long ret, struct sbx_error *err)
{
	return sbx_fail(err, SBX_STAGE_MOUNT, SBX_BIND_FIRST + (uint32_t)(e - binds->each), ret);
}

void sbx_binds_init(struct sbx_binds *binds)
{
	EACH (binds, e)
		e->at = e->overlay = e->tree = e->place = -1;
}

/* In a child: it must not hold what init wants to take away. */
void sbx_binds_forget(struct sbx_binds *binds)
{
	EACH (binds, e)
		sbx_close(sbx_steal_fd(&e->at));
}

static long look(int fd, struct statx *st)
{
	return sbx_sys(SYS_statx, fd, "", AT_EMPTY_PATH, STATX_TYPE | STATX_MNT_ID, st);
}

/* What lies in a directory under this name, not the target of a link. */
static int open_name(int at, const char *name)
{
	return sbx_openat2(at, name, O_PATH | O_NOFOLLOW, 0, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS);
}

/* Where something can be mounted that is a directory or not. */
static int open_place(int at, const char *name, bool dir)
{
	struct statx st;

	_cleanup_fd_ int fd = open_name(at, name);
	long ret = fd < 0 ? fd : look(fd, &st);
	if (ret < 0)
		return (int)ret;
	if (S_ISLNK(st.stx_mode))
		return -ELOOP;
	if (st.stx_attributes & STATX_ATTR_MOUNT_ROOT)
		return -EBUSY;
	if (S_ISDIR(st.stx_mode) != dir)
		return dir ? -ENOTDIR : -EISDIR;
	return sbx_steal_fd(&fd);
}

/* The number of the mount that begins there; 0 if none does. */
static long mount_there(int at, const char *name, uint64_t *id)
{
	struct statx st;

	*id = 0;
	_cleanup_fd_ int fd = open_name(at, name);
	if (fd == -ENOENT)
		return 0;
	long ret = fd < 0 ? fd : look(fd, &st);
	if (ret >= 0 && st.stx_attributes & STATX_ATTR_MOUNT_ROOT)
		*id = st.stx_mnt_id;
	return ret;
}

static int open_root(void)
{
	return sbx_openat2(AT_FDCWD, "/", O_PATH | O_DIRECTORY, 0, 0);
}

/* --- one ------------------------------------------------------------------------------------------ */

/* Attach it, and see that it is there: a payload may have renamed the target until it was mounted on. */
static long attach(int tree, int at, const char *name, uint64_t *id)
{
	struct statx st;
	uint64_t there = 0;

	long ret = look(tree, &st);
	_cleanup_fd_ int place = ret < 0 ? (int)ret : open_place(at, name, S_ISDIR(st.stx_mode));
	ret = place < 0 ? place : sbx_move_mount(tree, place);
	if (ret < 0)
		return ret;
	ret = look(tree, &st);
	if (ret >= 0)
		ret = mount_there(at, name, &there);
	if (ret >= 0 && there != st.stx_mnt_id)
		ret = -ESTALE;
	if (ret >= 0) {
		*id = there;
		return 0;
	}
	if (sbx_sys(SYS_fchdir, tree) >= 0)
		(void)sbx_sys(SYS_umount2, ".", MNT_DETACH);
	(void)syscall(SYS_chdir, "/");
	return ret;
}

int sbx_bind_add(struct sbx_binds *binds, const struct sbx_bind *b, int tree, struct sbx_error *err)
{
	struct sbx_bound *e = &binds->each[b->number];

	if (e->at >= 0)
		return failed(binds, e, -EEXIST, err);
	_cleanup_fd_ int root = open_root();
	_cleanup_fd_ int at = root < 0 ? root : sbx_path_parent(root, b->target, false, e->name);
	long ret = at < 0 ? at : attach(tree, at, e->name, &e->id);
	if (ret < 0)
		return failed(binds, e, ret, err);
	e->at = sbx_steal_fd(&at);
	return 0;
}

/*
 * See that it is where we know it, or find where it is. Returns 1, 0 where it is no more, or -errno. Whoever removes its
 * place from outside, by another mount, takes it along.
 */
static long find(struct sbx_bound *e)
{
	uint64_t there;

	for (int i = 0; i < MOMENT; i++) {
		long ret = mount_there(e->at, e->name, &there);
		if (ret < 0 || there == e->id)
			return ret < 0 ? ret : 1;
		ret = sbx_mountinfo_find(e->id, e->path);
		if (ret <= 0)
			return ret;
		_cleanup_fd_ int root = open_root();
		int at = root < 0 ? root : sbx_path_parent(root, e->path, false, e->name);
		if (at >= 0) {
			sbx_close(e->at);
			e->at = at;
		} else if (at != -ENOENT && at != -ELOOP) {
			return at;
		}
	}
	return -ESTALE;
}

/*
 * Until it is gone. Whoever has just let go of it, a launcher that has sent a descriptor say, may not have closed it yet. And
 * where somebody outside renames its place meanwhile, it is not under that name any more, or something else is.
 */
static long take_away(struct sbx_bound *e, bool lazy)
{
	const int how = UMOUNT_NOFOLLOW | (lazy ? MNT_DETACH : 0);
	long there = find(e), ret = there;

	for (int i = 0; there > 0 && i < MOMENT; i++) {
		if (i > 0)
			sbx_nap(1000000);
		ret = sbx_sys(SYS_fchdir, e->at);
		if (ret >= 0)
			ret = sbx_sys(SYS_umount2, e->name, how);
		(void)syscall(SYS_chdir, "/"); /* which nothing can refuse */
		if (ret < 0 && ret != -EBUSY && ret != -EINVAL && ret != -ENOENT)
			return ret;
		there = find(e);
	}
	if (there > 0)
		return ret < 0 ? ret : -ESTALE;
	return ret < 0 && there < 0 ? there : 0;
}

int sbx_bind_remove(struct sbx_binds *binds, const struct sbx_bind *b, struct sbx_error *err)
{
	struct sbx_bound *e = &binds->each[b->number];

	long ret = e->at < 0 ? 0 : take_away(e, b->lazy);
	if (ret < 0)
		return failed(binds, e, ret, err);
	sbx_close(sbx_steal_fd(&e->at));
	return 0;
}

/* --- all of them, when overlays are made anew ------------------------------------------------------- */

/* Their paths as they are now. Nobody inside renames anything meanwhile. */
int sbx_binds_locate(struct sbx_binds *binds, struct sbx_error *err)
{
	EACH (binds, e) {
		int ret = e->at < 0 ? 1 : sbx_mountinfo_find(e->id, e->path);
		if (ret < 0)
			return failed(binds, e, ret, err);
		if (ret == 0) /* as in find() */
			sbx_close(sbx_steal_fd(&e->at));
	}
	return 0;
}

/* Where it goes on the new overlay: made there, if those layers lack it. */
static int make_place(int over, const char *path, bool dir)
{
	char name[SBX_NAME_MAX];

	_cleanup_fd_ int at = sbx_path_parent(over, path, true, name);
	if (at < 0)
		return at;
	int place = open_place(at, name, dir);
	if (place != -ENOENT)
		return place;
	long ret = dir ? sbx_sys(SYS_mkdirat, at, name, 0755) : sbx_sys(SYS_mknodat, at, name, S_IFREG | 0644, 0);
	return ret < 0 ? (int)ret : open_place(at, name, dir);
}

/* Clone what lies directly on the overlay `old`, `prefix` bytes from the root's path, to be put on `over`. */
int sbx_binds_prepare(struct sbx_binds *binds, int old, int over, size_t prefix, struct sbx_error *err)
{
	struct statx overlay, st;

	EACH (binds, e) {
		if (e->at < 0)
			continue;
		long ret = look(old, &overlay);
		if (ret >= 0)
			ret = look(e->at, &st);
		if (ret >= 0 && st.stx_mnt_id != overlay.stx_mnt_id)
			continue;
		if (ret >= 0)
			ret = e->tree = sbx_open_tree(e->at, e->name, AT_RECURSIVE | AT_SYMLINK_NOFOLLOW);
		if (ret >= 0)
			ret = look(e->tree, &st);
		if (ret >= 0)
			ret = e->place = make_place(over, e->path + prefix, S_ISDIR(st.stx_mode));
		if (ret < 0)
			return failed(binds, e, ret, err);
		e->overlay = old;
	}
	return 0;
}

int sbx_binds_attach(struct sbx_binds *binds, int old, struct sbx_error *err)
{
	EACH (binds, e) {
		long ret = e->overlay == old ? sbx_move_mount(e->tree, e->place) : 0;
		if (ret < 0)
			return failed(binds, e, ret, err);
	}
	return 0;
}

/* Their directories are others now: of new overlays, or of clones. */
int sbx_binds_reopen(struct sbx_binds *binds, struct sbx_error *err)
{
	_cleanup_fd_ int root = binds ? open_root() : -1;

	EACH (binds, e) {
		if (e->at < 0)
			continue;
		int at = root < 0 ? root : sbx_path_parent(root, e->path, false, e->name);
		long ret = at < 0 ? at : mount_there(at, e->name, &e->id);
		if (ret < 0) {
			sbx_close(at);
			return failed(binds, e, ret, err);
		}
		sbx_close(e->at);
		e->at = at;
	}
	return 0;
}

void sbx_binds_release(struct sbx_binds *binds)
{
	EACH (binds, e) {
		sbx_close(sbx_steal_fd(&e->tree));
		sbx_close(sbx_steal_fd(&e->place));
		e->overlay = -1;
	}
}
