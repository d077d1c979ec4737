/*
 * init.c - PID 1 of a running sandbox. It waits for the payload, reaps what it orphans, kills
 * everything when the host lets go, and reports when nothing but itself is left.
 *
 * It never execs, so it closes what it inherited; it is not dumpable, holds CAP_KILL in its own
 * namespace and a few descriptors. A signal from inside cannot end it (pid_namespaces(7)); when it
 * ends, the kernel kills whatever else is there. The tree is gone when wait4 says ECHILD: kill(-1)
 * reaches every process of the namespace, and a process under a pending SIGKILL cannot fork.
 */
#include "box.h"

#include <poll.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/wait.h>

/* The host's report of a failed set-up or exec; the payload is a zombie already. */
static int payload_failed(const struct sbx_box *box, pid_t payload, struct sbx_error *err)
{
	(void)sbx_sys(SYS_wait4, payload, NULL, 0, NULL);
	*err = box->error;
	return -1;
}

/*
 * Reap what has ended. Returns 1 when the payload was among it, 2 when nothing else is left either, 0 when it was
 * not, or -errno. A child that made init its tracer (PTRACE_TRACEME, where a filter allows it) reports stops here
 * too: those are no end.
 */
static long reap(pid_t payload, int *status, int flags)
{
	long seen = 0;

	for (;;) {
		int ended;
		long pid = sbx_sys(SYS_wait4, -1, &ended, flags, NULL);
		if (pid == payload && !WIFSTOPPED(ended)) {
			*status = ended;
			seen = 1;
		}
		if (pid == -EINTR)
			continue;
		if (pid == -ECHILD)
			return 2 * seen;
		if (pid <= 0)
			return pid == 0 ? seen : pid;
	}
}

/*
 * Until the payload has ended (0), with everything else (2), or the host process lets go of the sandbox (1). Whoever
 * has no parent any more is init's child before that parent can be reaped: without a child, init is alone.
 */
static long wait_for_end(const struct sbx_box *box, pid_t payload, int *status)
{
	struct pollfd fds[] = {
		{ .fd = box->spawner->children, .events = POLLIN },
		{ .fd = box->control, .events = POLLIN | POLLRDHUP },
		{ .fd = box->spawner->host_pidfd, .events = POLLIN },
	};
	struct signalfd_siginfo info;

	for (;;) {
		long ret = reap(payload, status, WNOHANG);
		if (ret != 0)
			return ret == 1 ? 0 : ret;
		ret = sbx_sys(SYS_ppoll, fds, SBX_COUNT(fds), NULL, NULL, 0);
		if (ret < 0 && ret != -EINTR)
			return ret;
		if (ret > 0 && (fds[1].revents || fds[2].revents))
			return 1;
		if (ret > 0 && fds[0].revents) {
			ret = sbx_sys(SYS_read, fds[0].fd, &info, sizeof info);
			if (ret < 0 && ret != -EINTR)
				return ret;
		}
	}
}

static uint64_t microseconds(struct timeval time)
{
	return (uint64_t)time.tv_sec * 1000000u + (uint64_t)time.tv_usec;
}

static long report(struct sbx_box *box, int status)
{
	struct sbx_record rec = { .kind = SBX_RECORD_EXIT, .status = status };
	struct rusage usage;

	long ret = sbx_sys(SYS_getrusage, RUSAGE_CHILDREN, &usage);
	if (ret < 0)
		return ret;
	rec.utime_us = microseconds(usage.ru_utime);
	rec.stime_us = microseconds(usage.ru_stime);
	rec.maxrss_kib = (uint64_t)usage.ru_maxrss;
	rec.majflt = (uint64_t)usage.ru_majflt;
	rec.inblock = (uint64_t)usage.ru_inblock;
	rec.oublock = (uint64_t)usage.ru_oublock;
	if (status)
		sbx_room_look(box->plan, &rec.room);
	box->clock[SBX_CLOCK_EXITED] = sbx_now();
	memcpy(rec.clock, box->clock, sizeof rec.clock);
	return sbx_send_record(box->control, &rec, NULL, 0, -1);
}

int sbx_init_run(struct sbx_box *box, pid_t payload, struct sbx_error *err)
{
	int keep[3 + SBX_MAX_GROUPS] = { box->control, box->spawner->host_pidfd, box->spawner->children };
	int status = 0;

	if (box->error.stage != SBX_STAGE_NONE)
		return payload_failed(box, payload, err);
	memcpy(keep + 3, box->hold, box->holds * sizeof(int));
	long ret = sbx_fds_close_except(keep, 3 + box->holds);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_INIT, 6, ret);
	if (sbx_cred_keep_kill(err) < 0)
		return -1;
	ret = sbx_send_applied(box);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_RECORD, 100, ret);
	ret = wait_for_end(box, payload, &status);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_INIT, 7, ret);
	if (ret != 2) { /* it looks at every process of the host */
		ret = sbx_sys(SYS_kill, -1, SIGKILL);
		if (ret >= 0 || ret == -ESRCH)
			ret = reap(payload, &status, 0);
	}
	if (ret >= 0)
		ret = report(box, status);
	return ret < 0 && ret != -EPIPE ? sbx_fail(err, SBX_STAGE_INIT, 8, ret) : 0;
}
