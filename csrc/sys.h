/*
 * sys.h - raw system calls.
 *
 * Everything that runs after clone calls the kernel through sbx_sys(): no libc wrapper that takes a
 * lock, signals threads or touches the heap; the result is the kernel's own, -errno on failure.
 * Builds with SBX_FAULT count these calls and make the chosen one fail (the fault walk of
 * tests/system/test_fault_walk.py); no other build contains that hook.
 */
#ifndef SBX_SYS_H
#define SBX_SYS_H

#include <errno.h>
#include <fcntl.h>
#include <linux/landlock.h>
#include <linux/mount.h>
#include <linux/openat2.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef CLONE_NEWTIME
#define CLONE_NEWTIME 0x00000080
#endif
#ifndef LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET /* Linux 6.12 */
#define LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET (1ULL << 0)
#define LANDLOCK_SCOPE_SIGNAL (1ULL << 1)
#endif

#ifdef SBX_FAULT
struct sbx_fault {
	long left; /* counts down; the call that reaches 0 fails */
	int err;
	int syscall; /* which one it was */
};
extern struct sbx_fault sbx_fault;

static inline int sbx_fault_hit(long nr)
{
	if (sbx_fault.left <= 0 || --sbx_fault.left > 0)
		return 0;
	sbx_fault.syscall = (int)nr;
	return 1;
}
#define SBX_FAULT_ARM(at, code) ((void)(sbx_fault.left = (at), sbx_fault.err = (code)))
#define SBX_FAULT_SYSCALL (sbx_fault.syscall)
#else
#define sbx_fault_hit(nr) 0
#define SBX_FAULT_ARM(at, code) ((void)0)
#define SBX_FAULT_SYSCALL 0
#endif

static inline long sbx_sys6(long nr, long a, long b, long c, long d, long e, long f)
{
#ifdef SBX_FAULT
	if (sbx_fault_hit(nr))
		return -sbx_fault.err;
#endif
	long ret = syscall(nr, a, b, c, d, e, f);
	return ret == -1 ? -errno : ret;
}

#define SBX_SYS_PAD(nr, a, b, c, d, e, f, ...) \
	sbx_sys6((nr), (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), (long)(f))
#define sbx_sys(...) SBX_SYS_PAD(__VA_ARGS__, 0, 0, 0, 0, 0, 0, 0)

/* close(2) releases the number whatever it returns: never retried, never failed on purpose. */
static inline void sbx_close(int fd)
{
	if (fd >= 0)
		(void)syscall(SYS_close, fd);
}

static inline int sbx_openat2(int dir, const char *path, int flags, unsigned mode, uint64_t resolve)
{
	struct open_how how = { .flags = (uint64_t)(unsigned)flags | O_CLOEXEC, .mode = mode, .resolve = resolve };
	return (int)sbx_sys(SYS_openat2, dir, path, &how, sizeof how);
}

/* Inside a root that may hold hostile links: nothing leads out of `dir`, no link is followed. */
#define SBX_RESOLVE_STRICT (RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS)

/* getdents64(2) */
struct sbx_dirent {
	uint64_t ino;
	int64_t off;
	unsigned short len;
	unsigned char type;
	char name[];
};

static inline int sbx_fsopen(const char *fstype)
{
	return (int)sbx_sys(SYS_fsopen, fstype, FSOPEN_CLOEXEC);
}

static inline int sbx_open_tree(int fd, const char *path, unsigned flags)
{
	return (int)sbx_sys(SYS_open_tree, fd, path, flags | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
}

/* Attach the detached tree `from` on top of what the descriptor `to` names. */
static inline int sbx_move_mount(int from, int to)
{
	return (int)sbx_sys(SYS_move_mount, from, "", to, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
}

static inline int sbx_mount_setattr(int fd, unsigned flags, const struct mount_attr *attr)
{
	return (int)sbx_sys(SYS_mount_setattr, fd, "", flags | AT_EMPTY_PATH, attr, sizeof *attr);
}

#endif
