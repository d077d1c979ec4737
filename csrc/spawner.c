/*
 * spawner.c - the helper's main loop: one small static process per host process, from which every
 * sandbox is cloned.
 *
 * Theory of operation. The host process execs this program once (client.c) and talks to it over a
 * SOCK_SEQPACKET pair: HELLO first, then PLAN (a sealed memfd, answered when the template stands) and
 * RUN (a request and the descriptors of one command). Whatever concerns one command, good or bad, is
 * answered on that command's own control socket, by init where there is one and by the spawner where
 * there is not; so requests need no numbers and threads of the host no lock. The image is free of
 * the host's memory, its page tables and descriptor table are small, and cloning it costs the same
 * however large the host process is.
 *
 * It ends when the host process ends, and its process group with it: every sandbox that does not stay. These
 * watch the host themselves, too, but one that is suspended sees nothing. When the host is done with it and
 * lives, it waits for that until the last of its sandboxes is gone.
 */
#include "box.h"

#include <linux/prctl.h>
#include <poll.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/wait.h>

enum { TEMPLATES = 64, FD_HOST = 3, FD_PIDFD = 4 };

struct state {
	struct sbx_spawner s;
	struct sbx_template templates[TEMPLATES];
	uint64_t tick;
	struct sbx_box box;
	_Alignas(16) char inbox[sizeof(struct sbx_message) + SBX_MAX_INLINE];
};

/* --- start ------------------------------------------------------------------------------------ */

/*
 * What a launcher may have of its own and a payload must not inherit: real-time scheduling, a negative nice
 * value, a personality without address randomisation, protection from the out-of-memory killer.
 */
static int reset_privileges(void)
{
	const struct sched_param none = { 0 };
	char score[16] = "";

	int fd = open("/proc/self/oom_score_adj", O_RDWR | O_CLOEXEC);
	if (fd < 0 || read(fd, score, sizeof score - 1) < 0)
		return -errno;
	bool preferred = score[0] == '-';
	if ((preferred && pwrite(fd, "0", 1, 0) < 0) || sched_setscheduler(0, SCHED_OTHER, &none) < 0)
		return -errno;
	sbx_close(fd);
	errno = 0;
	if (getpriority(PRIO_PROCESS, 0) < 0 && setpriority(PRIO_PROCESS, 0, 0) < 0)
		return -errno;
	return personality(PER_LINUX) < 0 ? -errno : 0;
}

static int reset_process(struct sbx_spawner *s)
{
	struct stat st;
	sigset_t ended, blocked;

	(void)setsid(); /* out of the terminal's foreground group: Ctrl-C is the host's business */
	for (int sig = 1; sig < 65; sig++)
		if (sig != SIGKILL && sig != SIGSTOP)
			(void)signal(sig, SIG_DFL); /* an ignored signal would stay ignored across exec */
	sigemptyset(&ended);
	sigaddset(&ended, SIGCHLD);
	blocked = ended;
	sigaddset(&blocked, SIGPIPE); /* of an init that is killed while it is told to go */
	(void)umask(0);
	if (sigprocmask(SIG_SETMASK, &blocked, NULL) < 0 || chdir("/") < 0 || stat("/", &st) < 0)
		return -errno;
	s->root_dev = st.st_dev;
	s->root_ino = st.st_ino;
	s->host = FD_HOST;
	s->host_pidfd = FD_PIDFD;
	s->net_maker = s->shelf_ns = -1;
	s->children = signalfd(-1, &ended, SFD_CLOEXEC | SFD_NONBLOCK);
	s->proc = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
	return s->children < 0 || s->proc < 0 ? -errno : 0;
}

/* Rootless: become the root of an outer user namespace; the host maps it, or its own id suffices. */
static int enter_userns(const struct sbx_spawner *s, uint32_t flags, struct sbx_error *err)
{
	char uid_map[48], gid_map[48];
	struct sbx_message msg;
	size_t nfds = 0;

	sbx_format_path(uid_map, "0 ", (unsigned)geteuid(), " 1");
	sbx_format_path(gid_map, "0 ", (unsigned)getegid(), " 1");
	if (unshare(CLONE_NEWUSER) < 0)
		return sbx_fail(err, SBX_STAGE_USERNS, 0, -errno);
	if (flags & SBX_HELLO_SELF_MAP) {
		int ret = sbx_idmap_write(s->proc, getpid(), uid_map, gid_map, true);
		return ret < 0 ? sbx_fail(err, SBX_STAGE_USERNS, 1, ret) : 0;
	}
	const struct sbx_record ask = { .kind = SBX_RECORD_READY, .pid = getpid() };
	if (sbx_send_record(s->host, &ask, NULL, 0, -1) < 0 ||
	    sbx_receive(s->host, &msg, sizeof msg, NULL, &nfds) != sizeof msg || msg.kind != SBX_MESSAGE_MAPPED)
		return sbx_fail(err, SBX_STAGE_USERNS, 2, -EPROTO);
	if (syscall(SYS_setresgid, 0, 0, 0) < 0 || syscall(SYS_setresuid, 0, 0, 0) < 0)
		return sbx_fail(err, SBX_STAGE_USERNS, 3, -errno);
	(void)prctl(PR_SET_DUMPABLE, 1); /* a change of ids clears it; the maps of children need it */
	return 0;
}

/* The host's tree, from which templates are built: itself as root, else our slave copy of it. */
static int hold_host_tree(struct sbx_spawner *s, bool userns, struct sbx_error *err)
{
	if (userns && (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_SLAVE, NULL) < 0))
		return sbx_fail(err, SBX_STAGE_USERNS, 4, -errno);
	s->host_ns = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
	return s->host_ns < 0 ? sbx_fail(err, SBX_STAGE_USERNS, 5, -errno) : 0;
}

static int start(struct sbx_spawner *s, struct sbx_error *err)
{
	struct sbx_message hello;
	size_t nfds = 0;

	int ret = reset_process(s);
	if (ret >= 0)
		ret = reset_privileges();
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_SPAWNER, 0, ret);
	if (sbx_receive(s->host, &hello, sizeof hello, NULL, &nfds) != sizeof hello ||
	    hello.magic != SBX_REQUEST_MAGIC || hello.kind != SBX_MESSAGE_HELLO)
		return sbx_fail(err, SBX_STAGE_SPAWNER, 1, -EPROTO);
	bool userns = hello.flags & SBX_HELLO_USERNS;
	if (userns && enter_userns(s, hello.flags, err) < 0)
		return -1;
	if (hold_host_tree(s, userns, err) < 0)
		return -1;
	if (hello.flags & SBX_HELLO_NET_POOL) {
		s->net_maker = sbx_net_start_maker();
		if (s->net_maker < 0)
			return sbx_fail(err, SBX_STAGE_SPAWNER, 2, s->net_maker);
	}
	return 0;
}

/* --- plans ------------------------------------------------------------------------------------ */

static struct sbx_template *find_template(struct state *st, uint64_t id)
{
	for (size_t i = 0; i < TEMPLATES; i++)
		if (st->templates[i].plan && st->templates[i].id == id) {
			st->templates[i].used = ++st->tick;
			return &st->templates[i];
		}
	return NULL;
}

static void drop_template(struct sbx_template *t)
{
	if (!t->plan)
		return;
	sbx_close(t->mount_ns);
	(void)munmap((void *)(uintptr_t)t->plan, t->size);
	t->plan = NULL;
}

static struct sbx_template *oldest_template(struct state *st)
{
	struct sbx_template *oldest = &st->templates[0];

	for (size_t i = 0; i < TEMPLATES; i++) {
		if (!st->templates[i].plan)
			return &st->templates[i];
		if (st->templates[i].used < oldest->used)
			oldest = &st->templates[i];
	}
	return oldest;
}

static int add_plan(struct state *st, uint64_t id, int memfd, struct sbx_error *err)
{
	struct sbx_template t = { .id = id, .used = ++st->tick };

	t.plan = sbx_map_sealed(memfd, SBX_STAGE_PLAN, &t.size, err);
	if (!t.plan)
		return -1;
	t.mount_ns = sbx_plan_check(t.plan, t.size, err) < 0 ? -1 : sbx_template_build(&st->s, t.plan, err);
	if (t.mount_ns < 0) {
		(void)munmap((void *)(uintptr_t)t.plan, t.size);
		return -1;
	}
	struct sbx_template *slot = find_template(st, id);
	slot = slot ? slot : oldest_template(st);
	drop_template(slot);
	*slot = t;
	return 0;
}

/* --- requests --------------------------------------------------------------------------------- */

/* What a sandbox begins with, as mounts of its own. The caller closes them, also after an error. */
static int take_layers(struct state *st, const struct sbx_request *r, struct sbx_error *err)
{
	const uint64_t *id = sbx_at(r, r->layers.off);
	struct sbx_box *box = &st->box;

	for (uint32_t i = 0; i < r->layers.count; i++) {
		int tree = sbx_shelf_get(&st->s, id[i], err);
		if (tree < 0)
			return -1;
		box->layers.number[i] = i + 1;
		box->layer_fds[i] = tree;
		box->layers.count = i + 1;
	}
	return 0;
}

static int run(struct state *st, size_t len, const int *fds, size_t nfds, struct sbx_error *err)
{
	size_t mapped;
	const struct sbx_request *r = sbx_inbox_request((const void *)st->inbox, len, fds, &nfds, &mapped, err);

	if (!r)
		return -1;
	st->box.spawner = &st->s;
	st->box.resident = false;
	st->box.slot = NULL;
	int ret = sbx_box_fill(&st->box, r, fds, nfds, err);
	if (ret == 0)
		ret = take_layers(st, r, err);
	const struct sbx_template *t = ret < 0 ? NULL : find_template(st, r->plan);
	if (t) {
		st->box.plan = t->plan;
		ret = sbx_spawn(&st->box, t->mount_ns, err);
	} else if (ret == 0) {
		ret = sbx_fail(err, SBX_STAGE_PLAN, 0, -ESTALE);
	}
	for (uint32_t i = 0; i < st->box.layers.count; i++)
		sbx_close(st->box.layer_fds[i]);
	st->box.layers.count = 0;
	sbx_inbox_release(r, mapped);
	return ret;
}

static const struct sbx_template *any_template(const struct state *st)
{
	for (size_t i = 0; i < TEMPLATES; i++)
		if (st->templates[i].plan)
			return &st->templates[i];
	return NULL;
}

/* What concerns the shelf, but for streams. *lent is a descriptor, or stays as it is. */
static int shelve(struct state *st, const struct sbx_message *msg, const int *fds, size_t nfds, int *lent,
		  struct sbx_error *err)
{
	if (nfds != (msg->kind == SBX_MESSAGE_UNSHELVE || msg->kind == SBX_MESSAGE_BORROW ? 1 : 2))
		return sbx_fail(err, SBX_STAGE_REQUEST, 22, -EBADF);
	if (msg->kind == SBX_MESSAGE_BORROW)
		return *lent = sbx_shelf_get(&st->s, msg->plan, err);
	if (msg->kind == SBX_MESSAGE_UNSHELVE)
		return sbx_shelf_drop(&st->s, msg->plan, err);
	const struct sbx_template *t = any_template(st);
	if (!t)
		return sbx_fail(err, SBX_STAGE_PLAN, 0, -ESTALE);
	if (msg->kind == SBX_MESSAGE_SHELVE)
		return sbx_shelf_put(&st->s, t->mount_ns, msg->plan, fds[1], err);
	return sbx_shelf_stream(&st->s, t->mount_ns, msg, fds, err);
}

/* One datagram from the host. Returns false when there will be no more. */
static bool serve(struct state *st)
{
	const struct sbx_message *msg = (const void *)st->inbox;
	struct sbx_error err = { .stage = SBX_STAGE_NONE };
	int fds[SBX_MAX_FDS];
	size_t nfds = SBX_COUNT(fds);

	st->box.clock[SBX_CLOCK_RECEIVED] = sbx_now();
	long len = sbx_receive(st->s.host, st->inbox, sizeof st->inbox, fds, &nfds);
	if (len == 0 || len == -ECONNRESET)
		return false;
	if (len < (long)sizeof *msg || msg->magic != SBX_REQUEST_MAGIC || nfds == 0) {
		for (size_t i = 0; i < nfds; i++)
			sbx_close(fds[i]);
		return true; /* nobody to answer: closing the control socket is the answer */
	}
	if (msg->kind == SBX_MESSAGE_PLAN) {
		const struct sbx_record ready = { .kind = SBX_RECORD_READY };
		if (nfds != 2)
			sbx_fail(&err, SBX_STAGE_PLAN, 22, -EBADF);
		else if (add_plan(st, msg->plan, fds[1], &err) == 0)
			(void)sbx_send_record(fds[0], &ready, NULL, 0, -1);
	} else if (msg->kind == SBX_MESSAGE_CGROUP) {
		const struct sbx_record ready = { .kind = SBX_RECORD_READY };
		if (nfds != 2)
			sbx_fail(&err, SBX_STAGE_CGROUP, 24, -EBADF);
		else if (sbx_group_root(st->s.proc, fds[1], &err) == 0)
			(void)sbx_send_record(fds[0], &ready, NULL, 0, -1);
	} else if ((msg->kind >= SBX_MESSAGE_SHELVE && msg->kind <= SBX_MESSAGE_BORROW) ||
		   msg->kind == SBX_MESSAGE_PACK || msg->kind == SBX_MESSAGE_UNPACK) {
		const struct sbx_record done = { .kind = SBX_RECORD_DONE };
		_cleanup_fd_ int lent = -1;
		if (shelve(st, msg, fds, nfds, &lent, &err) >= 0 && msg->kind <= SBX_MESSAGE_BORROW)
			(void)sbx_send_record(fds[0], &done, NULL, 0, lent);
	} else if (msg->kind == SBX_MESSAGE_MOUNT) {
		(void)sbx_source_lend(&st->s, (const void *)(msg + 1), (size_t)len - sizeof *msg, fds, nfds, &err);
	} else if (msg->kind == SBX_MESSAGE_RUN) {
		(void)run(st, (size_t)len, fds, nfds, &err);
	} else {
		sbx_fail(&err, SBX_STAGE_SPAWNER, 3, -EPROTO);
	}
	if (err.stage != SBX_STAGE_NONE)
		sbx_send_error(fds[0], &err);
	for (size_t i = 0; i < nfds; i++)
		sbx_close(fds[i]);
	return true;
}

/* Returns whether there are more. */
static bool reap_children(int children)
{
	struct signalfd_siginfo info;
	pid_t pid;

	while (read(children, &info, sizeof info) > 0)
		;
	while ((pid = waitpid(-1, NULL, WNOHANG)) > 0)
		;
	return pid == 0;
}

static int loop(struct state *st)
{
	struct pollfd fds[] = {
		{ .fd = st->s.host, .events = POLLIN },
		{ .fd = st->s.children, .events = POLLIN },
		{ .fd = st->s.host_pidfd, .events = POLLIN },
	};

	for (;;) {
		if (poll(fds, SBX_COUNT(fds), -1) < 0 && errno != EINTR)
			return 1;
		if (fds[2].revents)
			return kill(0, SIGKILL);
		if (fds[0].revents && !serve(st)) { /* requests first: reaping can wait, callers do not */
			fds[0].fd = -1;
			sbx_close(sbx_steal_fd(&st->s.net_maker)); /* which ends by that */
		}
		if ((fds[1].revents || fds[0].fd < 0) && !reap_children(st->s.children) && fds[0].fd < 0)
			return 0;
	}
}

int main(int argc, char **argv)
{
	struct sbx_error err = { .stage = SBX_STAGE_NONE };
	struct sbx_record rec = { .kind = SBX_RECORD_READY };

	if (argc == 2 && strcmp(argv[1], "probe") == 0)
		return sbx_probe();
	if (argc >= 5 && strcmp(argv[1], "visit") == 0)
		return sbx_visit(atoi(argv[2]), (uid_t)strtoul(argv[3], NULL, 10), argv + 4);
	if (argc == 6 && strcmp(argv[1], "reap") == 0)
		return sbx_reap(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]), atoi(argv[5]));
	if (argc != 2 || strcmp(argv[1], "serve") != 0)
		return 64;
	struct state *st = mmap(NULL, sizeof *st, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (st == MAP_FAILED)
		return 71;
	if (start(&st->s, &err) < 0) {
		rec.kind = SBX_RECORD_ERROR;
		rec.error = err;
	}
	rec.pid = (int32_t)getpid();
	if (sbx_send_record(FD_HOST, &rec, NULL, 0, -1) < 0 || err.stage != SBX_STAGE_NONE)
		return 1;
	return loop(st);
}
