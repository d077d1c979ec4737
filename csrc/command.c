/*
 * command.c - one command of a living sandbox, from its start to its report, in the launcher that took it.
 *
 * A command is its process and everything below it. When the process ends, the rest is killed, however
 * often it forked away (the launcher is its subreaper), and only then the end is reported. It is killed,
 * too, when whoever asked for it lets go of its socket, or when its time is up; unless it is detached:
 * then it writes a journal, and messages come through a socket that anybody may hold who can reach it.
 */
#include "box.h"

#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>

enum { RETRY_NS = 50000000 };
enum slot { CHILDREN, LISTEN, MEMORY, FIRST_PUMP, SLOTS = FIRST_PUMP + SBX_PUMPS };

struct command {
	struct sbx_box *box;
	int listen; /* messages; if not detached, end-of-file: kill it */
	pid_t self, pid;
	int status;
	bool ended;	/* the process; its children may still be there */
	bool gone;	/* all of it */
	bool killed;	/* by us: all of it has to go */
	bool asked;	/* it was to be killed by somebody's wish */
	unsigned kills; /* of everything, before it */
	bool timed_out;
	bool out_of_time;   /* of CPU */
	bool out_of_memory; /* the kernel has killed a process of it, so we kill the rest */
	bool lacked;	    /* it has killed one, at any time; then: */
	struct sbx_counts full;
	struct sbx_watch watch;
	struct sbx_streams streams;
	struct sbx_usage usage;
	int followers[SBX_MAX_FOLLOWERS];
};

/* --- start ------------------------------------------------------------------------------------ */

/* What the host wants to know before the end. */
static long announce(struct command *c)
{
	const struct sbx_record lent = { .kind = SBX_RECORD_LENT };
	struct sbx_record started = { .kind = SBX_RECORD_STARTED, .pid = c->pid };
	uint32_t flags = c->box->request->flags;
	long ret = sbx_send_applied(c->box);

	if (ret >= 0 && c->streams.master >= 0 && !(flags & SBX_REQUEST_DETACHED)) {
		ret = sbx_send_record(c->box->control, &lent, NULL, 0, c->streams.master);
		sbx_close(sbx_steal_fd(&c->streams.master)); /* a copy here would keep it from hanging up */
	}
	if (ret >= 0 && flags & (SBX_REQUEST_NOTIFY | SBX_REQUEST_DETACHED)) {
		_cleanup_fd_ int pidfd = (int)sbx_sys(SYS_pidfd_open, c->pid, 0);
		memcpy(started.clock, c->box->clock, sizeof started.clock);
		ret = pidfd < 0 ? pidfd : sbx_send_record(c->box->control, &started, NULL, 0, pidfd);
	}
	return ret;
}

static void note(struct command *c, enum sbx_journal_state state)
{
	if (!(c->box->request->flags & SBX_REQUEST_DETACHED))
		return;
	c->streams.log.head.state = state;
	c->streams.log.head.pid = c->pid;
	(void)sbx_log_save(&c->streams.log);
}

static int start(struct command *c, int *fds, size_t nfds, struct sbx_error *err)
{
	bool open = sbx_streams_open(&c->streams, c->box, err) == 0;

	if (open)
		note(c, SBX_JOURNAL_RUNNING); /* before it does: where there is one id only, it may kill us at once */
	c->pid = open ? sbx_child_start(c->box, err) : -1;
	sbx_streams_hand_over(&c->streams, c->box, fds, nfds);
	if (c->pid >= 0 && c->box->error.stage != SBX_STAGE_NONE) {
		(void)sbx_sys(SYS_wait4, c->pid, NULL, 0, NULL);
		*err = c->box->error;
		c->pid = -1;
	}
	if (open)
		note(c, c->pid < 0 ? SBX_JOURNAL_NEW : SBX_JOURNAL_RUNNING);
	return c->pid < 0 ? -1 : 0;
}

/* --- while it runs ---------------------------------------------------------------------------- */

static void add_usage(struct sbx_usage *sum, const struct rusage *ru)
{
	sum->utime_us += (uint64_t)ru->ru_utime.tv_sec * 1000000u + (uint64_t)ru->ru_utime.tv_usec;
	sum->stime_us += (uint64_t)ru->ru_stime.tv_sec * 1000000u + (uint64_t)ru->ru_stime.tv_usec;
	if (sum->maxrss_kib < (uint64_t)ru->ru_maxrss)
		sum->maxrss_kib = (uint64_t)ru->ru_maxrss;
	sum->majflt += (uint64_t)ru->ru_majflt;
	sum->inblock += (uint64_t)ru->ru_inblock;
	sum->oublock += (uint64_t)ru->ru_oublock;
}

static void lack_memory(struct command *c)
{
	if (c->lacked)
		return;
	c->lacked = true;
	sbx_gauge_end(c->watch.gauge, 1, &c->full);
	sbx_slot_lift(c->box->slot); /* or what we do about it needs some, and we are next */
	if (!c->killed && !c->ended)
		c->killed = c->out_of_memory = true;
}

static void kill_all(struct command *c)
{
	if (!c->ended)
		(void)sbx_sys(SYS_kill, -c->pid, SIGKILL); /* its group, which cannot fork away */
	(void)sbx_proc_signal(c->self, NULL, 0, SIGKILL);
}

/* Reap what has ended; with the process, everything below it has to go. */
static void reap(struct command *c)
{
	struct rusage usage;
	int status;

	for (;;) {
		long pid = sbx_sys(SYS_wait4, -1, &status, WNOHANG, &usage);
		if (pid < 0 && pid != -ECHILD)
			continue;
		if (pid <= 0) {
			c->gone = pid != 0;
			break;
		}
		if (WIFSTOPPED(status)) /* of one that made us its tracer */
			continue;
		add_usage(&c->usage, &usage);
		bool killed = WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
		if (killed && !c->lacked && c->watch.gauge &&
		    sbx_gauge_out_of_memory(c->watch.gauge)) /* the event may come later */
			lack_memory(c);
		if (pid == c->pid) {
			c->status = status;
			c->ended = true;
			c->box->clock[SBX_CLOCK_EXITED] = sbx_now();
		}
	}
	if (!c->gone && (c->ended || c->killed))
		kill_all(c);
}

static void send_signal(struct command *c, uint32_t scope, int sig)
{
	c->asked |= sig == SIGKILL && !c->ended;
	if (scope == SBX_SCOPE_TREE && sig == SIGKILL)
		c->killed = true;
	if (scope == SBX_SCOPE_TREE)
		(void)sbx_proc_signal(c->self, NULL, 0, sig);
	else if (!c->ended) /* not reaped, so the number is still its own */
		(void)sbx_sys(SYS_kill, scope == SBX_SCOPE_GROUP ? -c->pid : c->pid, sig);
}

static void tell(int *follower)
{
	if (*follower < 0)
		return;
	long ret = sbx_sys(SYS_sendto, *follower, "", 1, MSG_DONTWAIT | MSG_NOSIGNAL, NULL, 0);
	if (ret < 0 && ret != -EAGAIN)
		sbx_close(sbx_steal_fd(follower));
}

static void tell_followers(struct command *c)
{
	for (int i = 0; i < SBX_MAX_FOLLOWERS; i++)
		tell(&c->followers[i]);
}

/* Those that have left make room. */
static void drop_followers(struct command *c)
{
	struct timespec now = { 0 };
	struct pollfd fds[SBX_MAX_FOLLOWERS];

	for (int i = 0; i < SBX_MAX_FOLLOWERS; i++)
		fds[i] = (struct pollfd){ .fd = c->followers[i] };
	if (sbx_sys(SYS_ppoll, fds, SBX_MAX_FOLLOWERS, &now, NULL, 0) <= 0)
		return;
	for (int i = 0; i < SBX_MAX_FOLLOWERS; i++)
		if (fds[i].revents)
			sbx_close(sbx_steal_fd(&c->followers[i]));
}

/* Without room its end closes with the message. */
static void add_follower(struct command *c, int *fd)
{
	drop_followers(c);
	for (int i = 0; i < SBX_MAX_FOLLOWERS; i++)
		if (c->followers[i] < 0) {
			c->followers[i] = sbx_steal_fd(fd);
			tell(&c->followers[i]); /* it may have missed something before */
			return;
		}
}

/* `last`: it is given away, so that closing it is end-of-file for the command. */
static void lend_input(struct command *c, int answer, bool last)
{
	const struct sbx_record lent = { .kind = SBX_RECORD_LENT };
	struct sbx_record none = { .kind = SBX_RECORD_DONE, .error = { .err = EBADF } };
	int fd = c->streams.master >= 0 ? c->streams.master : c->streams.input;

	(void)sbx_send_record(answer, fd >= 0 ? &lent : &none, NULL, 0, fd);
	if (last)
		sbx_close(sbx_steal_fd(&c->streams.input));
}

static void hear(struct command *c)
{
	struct sbx_message msg;
	_cleanup_fd_ int fd = -1;
	size_t nfds = 1;

	long len = sbx_receive(c->listen, &msg, sizeof msg, &fd, &nfds);
	bool detached = c->box->request->flags & SBX_REQUEST_DETACHED;
	if (len == 0 && !detached)
		c->killed = true;
	if (len != sizeof msg || msg.magic != SBX_REQUEST_MAGIC)
		return;
	if (msg.kind == SBX_MESSAGE_SIGNAL && msg.signal >= 0 && msg.signal <= 64)
		send_signal(c, msg.flags, msg.signal);
	else if (msg.kind == SBX_MESSAGE_FOLLOW && nfds && detached)
		add_follower(c, &fd);
	else if (msg.kind == SBX_MESSAGE_INPUT && nfds && detached)
		lend_input(c, fd, msg.flags);
}

static bool pumping(const struct command *c)
{
	bool any = false;

	for (int i = 0; i < SBX_PUMPS; i++)
		any |= c->streams.pumps[i].from >= 0;
	return any;
}

static void pump(struct command *c, const struct pollfd *fds)
{
	bool news = false;

	for (int i = 0; i < SBX_PUMPS; i++) {
		struct sbx_pump *p = &c->streams.pumps[i];
		const struct pollfd *ready = &fds[FIRST_PUMP + i];
		if (p->from < 0)
			continue;
		bool over = ready->revents ? !p->size && sbx_pump_last(p, c->gone) : !p->size || c->killed;
		if (c->gone && (p->inward || over))
			sbx_pump_end(p); /* nobody is left to read it; to write more; to wait for */
		else if (!p->size && ready->revents)
			news |= sbx_pump_fill(p) > 0;
		if (p->from >= 0 && p->size && (p->to < 0 || ready->revents))
			(void)sbx_pump_drain(p, &c->streams.log);
	}
	if (news)
		tell_followers(c);
}

/* Until the next event. A pump with a piece in hand waits for its reader, the others for their writer. */
static long wait_for_event(const struct command *c, struct pollfd *fds, uint64_t deadline)
{
	uint64_t now = deadline ? sbx_now() : 0, left = deadline > now ? deadline - now : 0;
	struct timespec limit = { (time_t)(left / 1000000000), (long)(left % 1000000000) };
	bool at_once = false, again = !c->gone && (c->ended || c->killed);

	fds[CHILDREN] = (struct pollfd){ .fd = c->box->spawner->children, .events = POLLIN };
	fds[LISTEN] = (struct pollfd){ .fd = c->listen, .events = POLLIN | POLLRDHUP };
	fds[MEMORY] = c->lacked ? (struct pollfd){ .fd = -1 } : sbx_watch_event(&c->watch);
	for (int i = 0; i < SBX_PUMPS; i++) {
		const struct sbx_pump *p = &c->streams.pumps[i];
		fds[FIRST_PUMP + i] = p->size ? (struct pollfd){ .fd = p->to, .events = POLLOUT } :
						(struct pollfd){ .fd = p->from, .events = POLLIN };
		at_once |= c->gone && p->from >= 0 && (!p->size || c->killed);
	}
	if (at_once || again) /* what could not be killed, because memory or a descriptor was lacking, is tried again */
		limit = (struct timespec){ .tv_nsec = at_once ? 0 : RETRY_NS };
	return sbx_sys(SYS_ppoll, fds, SLOTS, deadline || at_once || again ? &limit : NULL, NULL, 0);
}

static void watch(struct command *c)
{
	const struct sbx_pause *pause = c->box->pause;
	uint64_t timeout = c->box->request->timeout_ns, before = c->box->paused_before;
	struct pollfd fds[SLOTS];
	char drop[128];

	for (;;) {
		if (!c->killed && !c->ended && sbx_watch_cpu(&c->watch))
			c->killed = c->out_of_time = true;
		reap(c);
		if (c->gone && !pumping(c))
			return;
		uint64_t look = sbx_watch_next(&c->watch), deadline = 0;
		if (timeout)
			deadline = c->box->clock[SBX_CLOCK_RECEIVED] + timeout + sbx_paused(pause, sbx_now()) - before;
		uint64_t next = look && (!deadline || look < deadline) ? look : deadline;
		long ret = wait_for_event(c, fds, c->killed ? 0 : next);
		if (ret < 0) /* EINTR; or no memory just now */
			continue;
		uint64_t now = sbx_now(), paused = sbx_paused(pause, now) - before;
		if (timeout && !c->killed && now - c->box->clock[SBX_CLOCK_RECEIVED] >= timeout + paused) {
			c->timed_out = !c->ended;
			c->killed = true;
		}
		if (!c->lacked && sbx_watch_memory(&c->watch, fds[MEMORY].revents))
			lack_memory(c);
		if (fds[CHILDREN].revents)
			(void)sbx_sys(SYS_read, fds[CHILDREN].fd, drop, sizeof drop);
		if (fds[LISTEN].revents & (POLLRDHUP | POLLHUP)) {
			c->asked |= !c->ended;
			c->killed = true;
			c->listen = -1; /* closed with the other descriptors of the request */
		} else if (fds[LISTEN].revents) {
			hear(c);
		}
		pump(c, fds);
	}
}

/* --- the end ---------------------------------------------------------------------------------- */

static void report(struct command *c)
{
	const struct sbx_usage *u = &c->usage;
	struct sbx_record rec = {
		.kind = SBX_RECORD_EXIT,
		.status = c->status,
		.pid = c->pid,
		.timed_out = c->timed_out,
		.killed = c->asked || c->box->pool->kills != c->kills,
		.out_of_memory = c->out_of_memory,
		.out_of_time = c->out_of_time,
		.utime_us = u->utime_us,
		.stime_us = u->stime_us,
		.majflt = u->majflt,
		.inblock = u->inblock,
		.oublock = u->oublock,
		.maxrss_kib = u->maxrss_kib,
	};

	if (c->status)
		sbx_room_look(c->box->plan, &rec.room);
	*c->box->state = SBX_LAUNCHER_ENDING;
	memcpy(rec.clock, c->box->clock, sizeof rec.clock);
	if (c->watch.gauge)
		sbx_gauge_end(c->watch.gauge, 1, &rec.counts);
	if (c->lacked) /* what came after the limit was lifted says nothing */
		rec.counts.value[SBX_METER_MEMORY] = c->full.value[SBX_METER_MEMORY];
	else if (rec.counts.value[SBX_METER_OOM_KILLS]) /* not seen in time */
		c->box->slot->lifted = true;
	if (!(c->box->request->flags & SBX_REQUEST_DETACHED)) {
		(void)sbx_send_record(c->box->control, &rec, NULL, 0, -1);
		return;
	}
	c->streams.log.head.exit = rec; /* whole before it counts: readers take no lock */
	(void)sbx_log_save(&c->streams.log);
	c->streams.log.head.state = SBX_JOURNAL_ENDED;
	(void)sbx_log_save(&c->streams.log);
	tell_followers(c);
}

void sbx_command_run(struct sbx_box *box, int *fds, size_t nfds, struct sbx_error *err)
{
	bool detached = box->request->flags & SBX_REQUEST_DETACHED;
	struct command c = { .box = box,
			     .listen = detached ? box->later : box->control,
			     .self = (pid_t)sbx_sys(SYS_getpid) };

	sbx_watch_begin(&c.watch, box->slot ? &box->slot->gauge : NULL, box->slot ? box->slot->oom : -1,
			box->request->cpu_us);
	c.kills = box->pool->kills;
	memset(c.followers, -1, sizeof c.followers);
	if (start(&c, fds, nfds, err) == 0) {
		if (announce(&c) < 0) /* whoever asked has gone already */
			c.killed = true;
		if (detached)
			sbx_close(sbx_steal_fd(&fds[0]));
		watch(&c);
		report(&c);
	}
	for (int i = 0; i < SBX_MAX_FOLLOWERS; i++)
		sbx_close(c.followers[i]);
	sbx_streams_close(&c.streams);
	sbx_close(box->later);
	sbx_close(box->journal);
}
