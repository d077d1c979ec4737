/*
 * ask.c - the start of a run: pipes and a control socket, and the request that brings their other ends.
 */
#include "stream.h"
#include "util.h"

#include <sys/socket.h>

/* One pipe; `ours` is the end this process keeps, non-blocking, `theirs` joins the message. */
static int add_pipe(const struct sbx_run *run, int our_end, int32_t *ours, int *fds, size_t *nfds)
{
	int pair[2];

	if (pipe2(pair, O_CLOEXEC) < 0)
		return -errno;
	*ours = pair[our_end];
	fds[(*nfds)++] = pair[!our_end];
	if (run->owned && fchown(*ours, run->owner_uid, run->owner_gid) < 0)
		return -errno;
	return fcntl(*ours, F_SETFL, O_NONBLOCK) < 0 ? -errno : 0;
}

static int make_channels(struct sbx_run *run, int *fds, size_t *nfds)
{
	int pair[2], ret = 0;

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return -errno;
	run->control = pair[0];
	fds[(*nfds)++] = pair[1];
	if (run->input || run->stdin_relay >= 0)
		ret = add_pipe(run, 1, &run->stdin_fd, fds, nfds);
	for (int i = 0; i < 2 && ret == 0; i++)
		if (run->out[i].mode != SBX_STREAM_NONE)
			ret = add_pipe(run, 0, &run->out[i].fd, fds, nfds);
	return ret;
}

static int send_request(const struct sbx_run *run, int *fds, size_t nfds)
{
	const struct sbx_message msg = { .magic = SBX_REQUEST_MAGIC, .kind = run->kind };

	for (uint32_t i = 0; i < run->pass_count; i++)
		fds[nfds++] = run->pass[i];
	return sbx_send(run->spawner, &msg, run->request, run->request_size, fds, nfds);
}

int sbx_run_start(struct sbx_run *run, struct sbx_error *err)
{
	int fds[SBX_MAX_FDS];
	size_t nfds = 0;

	run->began_ns = sbx_now();
	run->paused_before = sbx_paused(run->pause, run->began_ns);
	run->control = run->pidfd = run->stdin_fd = run->out[0].fd = run->out[1].fd = -1;
	if (run->pass_count > SBX_MAX_PASS + SBX_MAX_GROUPS)
		return sbx_fail(err, SBX_STAGE_REQUEST, 25, -E2BIG);
	int ret = sbx_request_check(run->request, run->request_size, err);
	if (ret < 0)
		return -1;
	ret = make_channels(run, fds, &nfds);
	if (ret < 0)
		sbx_fail(err, SBX_STAGE_HOST, 10, ret);
	else if ((ret = send_request(run, fds, nfds)) < 0)
		sbx_fail(err, ret == -EPIPE || ret == -ECONNRESET ? SBX_STAGE_SPAWNER : SBX_STAGE_HOST, 11, ret);
	for (size_t i = 0; i < nfds; i++)
		sbx_close(fds[i]);
	return ret < 0 ? -1 : 0;
}
