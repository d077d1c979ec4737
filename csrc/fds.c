/*
 * fds.c - stdio and passed descriptors in place, everything else closed: close_range(2), Linux 5.9.
 */
#include "box.h"

#include <sys/ioctl.h>

/* Close every descriptor that is not in `keep`, which gets sorted. Returns 0 or -errno. */
int sbx_fds_close_except(int *keep, size_t count)
{
	unsigned from = 0;

	for (size_t i = 1; i < count; i++)
		for (size_t j = i; j > 0 && keep[j - 1] > keep[j]; j--) {
			int swap = keep[j];
			keep[j] = keep[j - 1];
			keep[j - 1] = swap;
		}
	for (size_t i = 0; i < count; i++) {
		if (keep[i] < 0 || (unsigned)keep[i] < from)
			continue;
		if ((unsigned)keep[i] > from) {
			long ret = sbx_sys(SYS_close_range, from, (unsigned)keep[i] - 1, 0);
			if (ret < 0)
				return (int)ret;
		}
		from = (unsigned)keep[i] + 1;
	}
	return (int)sbx_sys(SYS_close_range, from, ~0U, 0);
}

static long arrange_stdio(const struct sbx_box *box)
{
	for (int i = 0; i < 3; i++) {
		long ret;
		if (box->stdio[i] >= 0) {
			ret = sbx_sys(SYS_dup3, box->stdio[i], i, 0);
		} else if (box->request->stdio[i] == SBX_STDIO_STDOUT) {
			ret = sbx_sys(SYS_dup3, 1, i, 0);
		} else { /* the sandbox's own null device: no host descriptor to reopen */
			_cleanup_fd_ int null = sbx_openat2(AT_FDCWD, "/dev/null", O_RDWR, 0, RESOLVE_NO_SYMLINKS);
			ret = null < 0 ? null : sbx_sys(SYS_dup3, null, i, 0);
		}
		if (ret < 0)
			return ret;
	}
	return 0;
}

/* Descriptors 0, 1, 2 and the passed ones under the numbers that the request asks for. */
int sbx_fds_arrange(const struct sbx_box *box, struct sbx_error *err)
{
	const struct sbx_request *r = box->request;
	const int32_t *target = sbx_at(r, r->pass.off);
	int keep[SBX_MAX_PASS + 3] = { 0, 1, 2 };
	int source[SBX_MAX_PASS], top = 2;

	long ret = arrange_stdio(box);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_STDIO, 0, ret);
	ret = r->flags & SBX_REQUEST_PTY ? sbx_sys(SYS_ioctl, 0, TIOCSCTTY, 0) : 0;
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_PTY, 3, ret);
	for (uint32_t i = 0; i < r->pass.count; i++)
		if (target[i] > top)
			top = target[i];
	for (uint32_t i = 0; i < r->pass.count; i++) { /* out of the way of every target first */
		source[i] = (int)sbx_sys(SYS_fcntl, box->pass[i], F_DUPFD_CLOEXEC, top + 1);
		if (source[i] < 0)
			return sbx_fail(err, SBX_STAGE_STDIO, i + 1, source[i]);
	}
	for (uint32_t i = 0; i < r->pass.count; i++) {
		ret = sbx_sys(SYS_dup3, source[i], target[i], 0);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_STDIO, i + 1, ret);
		keep[i + 3] = target[i];
	}
	ret = sbx_fds_close_except(keep, r->pass.count + 3);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_STDIO, 0, ret) : 0;
}
