/*
 * room.c - is there room left in what the sandbox may write to? Asked once, when a command has failed and nothing of
 * it is left: the kernel counts no refusals of a file system, so the state at the end is all the evidence there is.
 */
#include "box.h"

#include <sys/vfs.h>

/* A disk's file system takes a large write in large pieces, and none of one that is too large. */
enum { PIECE = 2 << 20 };

/* Whether what is mounted at `path` is full. What a payload has moved out of the way tells nothing. */
static bool full(const char *path, bool disk, struct sbx_room *room)
{
	struct statfs fs;

	_cleanup_fd_ int fd = sbx_openat2(AT_FDCWD, path, O_PATH, 0, RESOLVE_NO_SYMLINKS);
	if (fd < 0 || sbx_sys(SYS_fstatfs, fd, &fs) < 0)
		return false;
	uint64_t block = (uint64_t)fs.f_bsize, size = (uint64_t)fs.f_blocks * block,
		 left = (uint64_t)fs.f_bavail * block;
	uint64_t spare = !disk ? 0 : size / 8 < PIECE ? size / 8 : PIECE;
	if (size && left <= spare)
		*room = (struct sbx_room){ .full = SBX_FULL_BYTES, .size = size, .used = size - left };
	else if (fs.f_files && !fs.f_ffree) /* one without a number of inodes has no limit of them */
		*room = (struct sbx_room){ .full = SBX_FULL_INODES,
					   .size = (uint64_t)fs.f_files,
					   .used = (uint64_t)fs.f_files };
	return room->full != SBX_FULL_NOT;
}

void sbx_room_look(const struct sbx_plan *p, struct sbx_room *room)
{
	const struct sbx_mount *m = sbx_at(p, p->mounts.off);

	for (uint32_t i = 0; i < p->mounts.count && !room->full; i++, m++) {
		bool scratch = m->kind == SBX_MOUNT_SCRATCH || (m->kind == SBX_MOUNT_OVERLAY && !m->options);
		if (!scratch && m->kind != SBX_MOUNT_TMPFS && !(m->flags & SBX_MOUNT_BOUNDED))
			continue;
		if (full(sbx_str(p, m->target), m->flags & SBX_MOUNT_BOUNDED, room))
			room->where = scratch ? SBX_ROOM_SCRATCH : SBX_ROOM_MOUNT + i;
	}
}
