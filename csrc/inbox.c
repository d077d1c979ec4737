/*
 * inbox.c - from a datagram of the host to a checked request and the descriptors it is about. The same for
 * the spawner and for a sandbox's launchers, so raw system calls only.
 */
#include "box.h"

#include <sys/mman.h>
#include <sys/stat.h>

/* Map a sealed memfd: from here on nobody can change it. Returns NULL with *err filled. */
const void *sbx_map_sealed(int fd, enum sbx_stage stage, size_t *size, struct sbx_error *err)
{
	const int seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE;
	struct stat st;

	long ret = sbx_sys(SYS_fcntl, fd, F_GET_SEALS);
	if (ret >= 0 && (ret & seals) == seals)
		ret = sbx_sys(SYS_fstat, fd, &st);
	else
		ret = -EINVAL;
	if (ret < 0 || st.st_size <= 0 || st.st_size > SBX_MAX_ARENA) {
		sbx_fail(err, stage, 20, -EINVAL);
		return NULL;
	}
	long map = sbx_sys(SYS_mmap, NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (map < 0 && map > -4096) {
		sbx_fail(err, stage, 21, map);
		return NULL;
	}
	*size = (size_t)st.st_size;
	return (const void *)map;
}

/*
 * The checked request of a message of `len` bytes: behind it, or in its last descriptor, which *nfds then
 * leaves out; *mapped is what to unmap afterwards. NULL with *err filled.
 */
const struct sbx_request *sbx_inbox_request(const struct sbx_message *msg, size_t len, const int *fds, size_t *nfds,
					    size_t *mapped, struct sbx_error *err)
{
	const void *request = msg + 1;
	size_t size = len - sizeof *msg;

	*mapped = 0;
	if (msg->in_memfd) {
		if (*nfds < 2) {
			sbx_fail(err, SBX_STAGE_REQUEST, 24, -EBADF);
			return NULL;
		}
		request = sbx_map_sealed(fds[--*nfds], SBX_STAGE_REQUEST, mapped, err);
		size = *mapped;
	}
	if (!request)
		return NULL;
	if (sbx_request_check(request, size, err) < 0) {
		sbx_inbox_release(request, *mapped);
		return NULL;
	}
	return request;
}

void sbx_inbox_release(const void *request, size_t mapped)
{
	if (mapped)
		(void)sbx_sys(SYS_munmap, request, mapped);
}

static int take_stdio(struct sbx_box *box, const int *fds, size_t nfds, size_t *next)
{
	for (size_t i = 0; i < 3; i++) {
		uint32_t how = box->request->stdio[i];
		box->stdio[i] = -1;
		if (how != SBX_STDIO_PASSED && how != SBX_STDIO_RELAY)
			continue;
		if (*next == nfds)
			return -EBADF;
		box->stdio[i] = fds[(*next)++];
	}
	return 0;
}

/* Point the box at one command: its request, and its descriptors in the order of struct sbx_message. */
int sbx_box_fill(struct sbx_box *box, const struct sbx_request *r, const int *fds, size_t nfds, struct sbx_error *err)
{
	bool detached = r->flags & SBX_REQUEST_DETACHED;
	size_t next = 1;

	if (nfds <= r->groups.count)
		return sbx_fail(err, SBX_STAGE_REQUEST, 21, -EBADF);
	nfds -= r->groups.count;
	sbx_group_take(box, sbx_at(r, r->groups.off), fds + nfds, r->groups.count);
	box->request = r;
	box->control = fds[0];
	box->error = (struct sbx_error){ .stage = SBX_STAGE_NONE };
	box->applied_size = 0;
	box->later = box->journal = -1;
	box->resident = r->flags & SBX_REQUEST_SANDBOX || box->resident;
	if (!box->resident || r->flags & SBX_REQUEST_SANDBOX) {
		box->layers.upper = box->layers.count = 0;
		box->void_fd = -1;
	}
	if (r->flags & SBX_REQUEST_SANDBOX) {
		box->persistent = r->flags & SBX_REQUEST_PERSISTENT;
		if (nfds != 4)
			return sbx_fail(err, SBX_STAGE_REQUEST, 22, -EBADF);
		box->keeper = fds[1];
		box->work = fds[2];
		box->pause_page = fds[3];
		return 0;
	}
	int ret = take_stdio(box, fds, nfds, &next);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_REQUEST, 22, ret);
	if (nfds - next != r->pass.count + (detached ? 2 : 0))
		return sbx_fail(err, SBX_STAGE_REQUEST, 23, -EBADF);
	for (size_t i = 0; i < r->pass.count; i++)
		box->pass[i] = fds[next++];
	if (detached) {
		box->later = fds[next++];
		box->journal = fds[next];
	}
	return 0;
}
