/*
 * run.c - one command from request to result in one call: sends the request, feeds stdin, drains
 * stdout and stderr, enforces the timeout, and returns when nothing of the sandbox's tree is left.
 *
 * The control socket tells everything: PIDFD from the spawner; then from init either ERROR (nothing
 * ran) or EXIT (the payload's status, sent after the last other process was reaped). Letting go of
 * it is how a run is killed; the pidfd is the second way, for an init that does not answer.
 */
#include "stream.h"
#include "util.h"

#include <linux/sockios.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

enum state { NEW = 0, RUNNING, STOPPING, KILLED, LOST, DRAINING, DONE };

enum { SIGNAL_NS = 100000000 };			    /* how long a signal of the host may wait */
enum { PAUSED_NS = 20000000 };			    /* between two looks whether it goes on */
enum { LOST_NS = 50000000 };			    /* init's time to kill what a dead launcher left */
enum { SOFT_NS = 500000000, HARD_NS = 2000000000 }; /* init's chance to report; then the kernel's */

enum slot { CONTROL, PIDFD, STDIN, SOURCE, OUT, ERR, OUT_RELAY, ERR_RELAY, MEMORY, SLOTS };

static void drop(int32_t *fd)
{
	sbx_close(*fd);
	*fd = -1;
}

/* --- the control socket ------------------------------------------------------------------------ */

static int keep_applied(struct sbx_run *run, const void *text, size_t size)
{
	unsigned char *grown = realloc(run->applied, run->applied_size + size + 1);

	if (!grown)
		return -ENOMEM;
	memcpy(grown + run->applied_size, text, size);
	run->applied = grown;
	run->applied_size += size;
	return 0;
}

/*
 * Nothing of the tree is left to write: what is in the pipes is all there will ever be; unless another
 * command of a living sandbox was given the pipe (SCM_RIGHTS). So what counts is what is there now.
 */
static void drain(struct sbx_run *run)
{
	for (int i = 0; i < 2; i++)
		sbx_stream_mark(&run->out[i]);
	run->state = DRAINING;
}

/* Read what init or the spawner says. 0, or -1 with *err filled. */
static int hear(struct sbx_run *run, struct sbx_error *err)
{
	char text[SBX_MAX_INLINE];
	struct sbx_record rec;
	int fd;

	long len = sbx_wire_receive(run->control, &rec, text, sizeof text, 0, &fd);
	if (len <= 0) { /* nobody holds the other end: init is gone, or never was */
		drop(&run->control);
		if (run->kind == SBX_MESSAGE_RUN && run->pidfd < 0)
			return sbx_fail(err, SBX_STAGE_SPAWNER, 15, len < 0 ? len : -EPIPE);
		run->lost = 1;
		if (run->kind == SBX_MESSAGE_EXEC && run->state != KILLED) {
			run->state = LOST;
			run->give_up_ns = sbx_now() + LOST_NS;
		}
		return 0;
	}
	if (rec.kind == SBX_RECORD_PIDFD) {
		run->pidfd = fd;
		return 0;
	}
	sbx_close(fd);
	if (rec.kind == SBX_RECORD_ERROR) {
		*err = rec.error;
		return -1;
	}
	if (rec.kind == SBX_RECORD_APPLIED) {
		int ret = keep_applied(run, text, (size_t)len - sizeof rec);
		return ret < 0 ? sbx_fail(err, SBX_STAGE_HOST, 12, ret) : 0;
	}
	if (rec.kind != SBX_RECORD_EXIT)
		return sbx_fail(err, SBX_STAGE_SPAWNER, 16, -EPROTO);
	run->exit = rec;
	bool killed = rec.status == SIGKILL; /* else it ended just in time */
	run->timed_out &= killed;
	run->out_of_memory &= killed;
	run->out_of_time &= killed;
	run->flooded &= killed;
	drain(run);
	return 0;
}

/* --- the loop ---------------------------------------------------------------------------------- */

/* The init to kill when nothing else helps: the run's own, or that of the sandbox it is in. */
static int last_resort(const struct sbx_run *run)
{
	return run->kind == SBX_MESSAGE_EXEC ? run->sandbox : run->pidfd;
}

static void watch(const struct sbx_run *run, struct pollfd *p)
{
	bool hungry = run->stdin_fd >= 0 && !run->input && run->stdin_offset == run->stdin_size;

	p[CONTROL] = (struct pollfd){ .fd = run->state < DRAINING ? run->control : -1, .events = POLLIN };
	/* init's end matters only when init can no longer say so itself */
	p[PIDFD] = (struct pollfd){ .fd = run->control < 0 ? last_resort(run) : -1, .events = POLLIN };
	p[MEMORY] = run->watch && run->state == RUNNING ? sbx_watch_event(run->watch) : (struct pollfd){ .fd = -1 };
	p[STDIN] = (struct pollfd){ .fd = run->stdin_fd, .events = hungry ? 0 : POLLOUT };
	p[SOURCE] = (struct pollfd){ .fd = hungry ? run->stdin_relay : -1, .events = POLLIN };
	for (int i = 0; i < 2; i++) {
		const struct sbx_stream *s = &run->out[i];
		p[OUT + i] = (struct pollfd){ .fd = s->pending ? -1 : s->fd, .events = POLLIN };
		p[OUT_RELAY + i] = (struct pollfd){ .fd = s->pending ? s->relay : -1, .events = POLLOUT };
	}
}

static int serve_streams(struct sbx_run *run, const struct pollfd *p, struct sbx_error *err)
{
	if (p[STDIN].revents & POLLOUT)
		sbx_stdin_feed(run);
	else if (p[STDIN].revents & (POLLERR | POLLNVAL))
		drop(&run->stdin_fd);
	if (run->stdin_fd >= 0 && p[SOURCE].revents && sbx_stdin_refill(run) < 0)
		return sbx_fail(err, SBX_STAGE_HOST, 13, -ENOMEM);
	for (int i = 0; i < 2; i++) {
		struct sbx_stream *s = &run->out[i];
		if (p[OUT_RELAY + i].revents && !sbx_stream_flush(s)) {
			s->pending = 0;
			drop(&s->fd); /* as with any broken pipe: the payload gets SIGPIPE */
		}
		if (s->fd < 0 || !p[OUT + i].revents)
			continue;
		int ret = sbx_stream_read(s);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_HOST, 14 + (uint32_t)i, ret);
		if (ret == 0)
			drop(&s->fd);
	}
	return 0;
}

/*
 * Whether requests lie in the socket that no launcher has taken: they all are busy. Ours may be among them,
 * and will be dropped, because we let go of it; if it is not, its launcher kills it for the same reason.
 * unix(7), SIOCOUTQ.
 */
static bool waits_in_queue(const struct sbx_run *run)
{
	int bytes = 0;

	return ioctl(run->spawner, SIOCOUTQ, &bytes) == 0 && bytes > 0;
}

/* The clock struck: first let init end it and report, then let the kernel, then admit defeat. */
static int escalate(struct sbx_run *run, uint64_t now, struct sbx_error *err)
{
	switch (run->state) {
	case RUNNING:
		run->timed_out = 1;
		run->state = STOPPING;
		run->give_up_ns = now + SOFT_NS;
		(void)shutdown(run->control, SHUT_WR);
		return 0;
	case STOPPING:
		if (run->kind == SBX_MESSAGE_EXEC && waits_in_queue(run)) {
			run->exit.status = SIGKILL;
			run->lost = 1;
			run->state = DRAINING;
			return 0;
		}
		run->state = KILLED;
		run->give_up_ns = now + HARD_NS;
		if (last_resort(run) >= 0)
			(void)syscall(SYS_pidfd_send_signal, last_resort(run), SIGKILL, NULL, 0);
		return 0;
	case LOST: /* only the launcher was killed, and so the command; init lives */
		run->exit.status = SIGKILL;
		drain(run);
		return 0;
	default: /* a process in uninterruptible sleep: it dies when the kernel lets it */
		return sbx_fail(err, SBX_STAGE_INIT, 20, -ETIME);
	}
}

/* When its time is up; what it was suspended does not count. */
static uint64_t time_is_up(const struct sbx_run *run)
{
	return run->began_ns + (uint64_t)run->timeout_ns + sbx_paused(run->pause, sbx_now()) - run->paused_before;
}

static uint64_t next_deadline(const struct sbx_run *run)
{
	if (run->state == STOPPING || run->state == KILLED || run->state == LOST)
		return run->give_up_ns;
	if (run->state == RUNNING && run->timeout_ns >= 0)
		return time_is_up(run) +
		       (run->pause && run->pause->since ? PAUSED_NS : 0); /* it does not come nearer */
	return UINT64_MAX;
}

/* A pipe that was not asked this time, because its last piece was still pending, may hold more. */
static bool drained(const struct sbx_run *run, const struct pollfd *p)
{
	for (int i = 0; i < 2; i++) {
		const struct sbx_stream *s = &run->out[i];
		bool more = s->fd >= 0 && s->total < s->last && (p[OUT + i].fd < 0 || p[OUT + i].revents);
		if (s->pending || more)
			return false;
	}
	return true;
}

static void abandon_relays(struct sbx_run *run)
{
	for (int i = 0; i < 2; i++)
		if (run->out[i].pending) {
			run->out[i].pending = 0;
			drop(&run->out[i].fd);
		}
}

/* End it as when its time is up, but for another reason. */
static void put_down(struct sbx_run *run, int32_t *reason)
{
	*reason = 1;
	run->state = STOPPING;
	run->give_up_ns = sbx_now() + SOFT_NS;
	(void)shutdown(run->control, SHUT_WR);
}

/* Whether it has used up what its group may have. Returns when to look again. */
static uint64_t look_at_group(struct sbx_run *run, bool event)
{
	if (!run->watch || run->state != RUNNING)
		return UINT64_MAX;
	if (sbx_watch_memory(run->watch, event))
		put_down(run, &run->out_of_memory);
	else if (sbx_watch_cpu(run->watch))
		put_down(run, &run->out_of_time);
	uint64_t next = sbx_watch_next(run->watch);
	return next ? next : UINT64_MAX;
}

static void look_at_output(struct sbx_run *run)
{
	for (int i = 0; i < 2 && run->kill_flood && run->state == RUNNING; i++)
		if (run->out[i].mode == SBX_STREAM_CAPTURE && run->out[i].total > run->out[i].limit)
			put_down(run, &run->flooded);
}

static int step(struct sbx_run *run, struct sbx_error *err)
{
	struct pollfd p[SLOTS];
	uint64_t now = sbx_now(), deadline = next_deadline(run);

	if (now >= deadline)
		return escalate(run, now, err);
	uint64_t look = look_at_group(run, false);
	deadline = look < deadline ? look : deadline;
	watch(run, p);
	/* not for ever: a signal may have come just before ppoll */
	uint64_t wait = deadline - now < 1000000000 ? deadline - now : 1000000000;
	struct timespec limit = { .tv_sec = (time_t)(wait / 1000000000), .tv_nsec = (long)(wait % 1000000000) };
	if (run->state == DRAINING)
		limit = (struct timespec){ .tv_nsec = run->out[0].pending || run->out[1].pending ? 200000000 : 0 };
	int ready = ppoll(p, SLOTS, &limit, NULL);
	if (ready < 0)
		return errno == EINTR ? 1 : sbx_fail(err, SBX_STAGE_HOST, 17, -errno);
	if (ready == 0 && run->state == RUNNING)
		return sbx_now() < deadline;
	if (ready == 0 && run->state == DRAINING && run->timeout_ns >= 0 &&
	    now >= time_is_up(run)) /* its reader had its time, too */
		abandon_relays(run);
	if (serve_streams(run, p, err) < 0)
		return -1;
	look_at_output(run);
	if (p[MEMORY].revents)
		(void)look_at_group(run, true);
	if (run->state == DRAINING && drained(run, p))
		run->state = DONE;
	if (p[CONTROL].revents && hear(run, err) < 0)
		return -1;
	if (run->state == DRAINING && run->out[0].fd < 0 && run->out[1].fd < 0)
		run->state = DONE; /* their ends came before the command's */
	if (p[PIDFD].revents && run->lost && run->state < DRAINING) {
		run->exit.status = SIGKILL; /* its init was killed, so everything was */
		drain(run);
	}
	return 0;
}

static int run_to_end(struct sbx_run *run, struct sbx_error *err)
{
	if (run->state == NEW) {
		int ret = sbx_run_start(run, err);
		run->state = RUNNING;
		if (ret < 0)
			return -1;
	}
	uint64_t look = sbx_now() + SIGNAL_NS;
	while (run->state != DONE) {
		int ret = step(run, err);
		if (ret != 0)
			return ret;
		if (run->state != DONE && sbx_now() >= look)
			return 1; /* ppoll says EINTR only when it waits, and it may never have to */
	}
	for (int i = 0; i < 2; i++) {
		sbx_stream_finish(&run->out[i]);
		run->totals[i] = run->out[i].total;
		run->sizes[i] = run->out[i].mode == SBX_STREAM_CAPTURE ? run->out[i].size : 0;
	}
	run->ended_ns = sbx_now();
	return 0;
}

int sbx_run(struct sbx_run *run, struct sbx_error *err)
{
	bool writes = run->input || run->stdin_relay >= 0 || run->out[0].mode == SBX_STREAM_RELAY ||
		      run->out[1].mode == SBX_STREAM_RELAY;
	struct sbx_shield shield;

	if (!writes)
		return run_to_end(run, err);
	sbx_shield_raise(&shield);
	int ret = run_to_end(run, err);
	sbx_shield_lower(&shield);
	return ret;
}

/* After a failure: kill what may be left and wait until it is gone, but not for ever. */
static void await_end(struct sbx_run *run)
{
	struct sbx_error ignored;
	uint64_t until = sbx_now() + HARD_NS;
	bool killed = false;

	if (run->control >= 0)
		(void)shutdown(run->control, SHUT_WR);
	while (run->control >= 0 || run->pidfd >= 0) {
		uint64_t now = sbx_now();
		struct pollfd p = { .fd = run->control >= 0 ? run->control : run->pidfd, .events = POLLIN };
		if (now >= until || poll(&p, 1, (int)((until - now) / 1000000) + 1) == 0) {
			if (run->kind == SBX_MESSAGE_EXEC)
				(void)syscall(SYS_pidfd_send_signal, run->sandbox, SIGKILL, NULL, 0);
			return;
		}
		if (run->pidfd >= 0 && !killed)
			killed = syscall(SYS_pidfd_send_signal, run->pidfd, SIGKILL, NULL, 0) == 0;
		if (run->control >= 0)
			(void)hear(run, &ignored); /* the pidfd, a late record, or end-of-file */
		else if (p.revents)
			return;
	}
}

void sbx_run_close(struct sbx_run *run)
{
	if (run->state == NEW)
		return;
	if (run->state != DONE)
		await_end(run);
	drop(&run->control);
	drop(&run->pidfd);
	drop(&run->stdin_fd);
	for (int i = 0; i < 2; i++) {
		drop(&run->out[i].fd);
		free(run->out[i].data);
		run->out[i].data = NULL;
	}
	free(run->applied);
	free(run->stdin_buffer);
	run->applied = run->stdin_buffer = NULL;
	run->applied_size = 0;
	run->state = NEW;
}
