/*
 * stdio.c - stdin, stdout and stderr of a living sandbox's command: what the host sent, pipes that the
 * launcher pumps, or a terminal.
 */
#include "box.h"

#include <sys/mman.h>

static int add_pump(struct sbx_streams *s, struct sbx_pump pump)
{
	if (!s->pumps[0].room) {
		long map = sbx_sys(SYS_mmap, NULL, SBX_PUMPS * SBX_PUMP_ROOM, PROT_READ | PROT_WRITE,
				   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (map < 0 && map > -4096)
			return (int)map;
		for (int i = 0; i < SBX_PUMPS; i++)
			s->pumps[i].room = (char *)map + i * SBX_PUMP_ROOM;
	}
	for (int i = 0; i < SBX_PUMPS; i++)
		if (s->pumps[i].from < 0) {
			pump.room = s->pumps[i].room;
			s->pumps[i] = pump;
			return 0;
		}
	return -E2BIG;
}

/* A pipe for stdin, stdout or stderr; the launcher keeps the other end. */
static int open_stream(struct sbx_streams *s, struct sbx_box *box, int number)
{
	int ends[2], host = box->stdio[number];
	int ret = sbx_pump_pipe(box, ends);

	if (ret < 0)
		return ret;
	int ours = ends[number == 0];
	box->stdio[number] = ends[number != 0];
	ret = (int)sbx_sys(SYS_fcntl, ours, F_SETFL, O_NONBLOCK);
	if (ret >= 0 && number == 0)
		ret = add_pump(s, (struct sbx_pump){ .from = host, .to = ours, .inward = true });
	else if (ret >= 0)
		ret = add_pump(s, (struct sbx_pump){ .from = ours, .to = host, .stream = number == 2 });
	if (ret < 0)
		sbx_close(ours);
	return ret;
}

/* Detached: stdin stays open for whoever asks for it. */
static int open_input(struct sbx_streams *s, struct sbx_box *box)
{
	int ends[2], ret = sbx_pump_pipe(box, ends);

	if (ret == 0) {
		box->stdio[0] = ends[0];
		s->input = ends[1];
	}
	return ret;
}

static int open_terminal(struct sbx_streams *s, struct sbx_box *box, struct sbx_error *err)
{
	int slave;

	s->master = sbx_pty_open(box, &slave, err);
	if (s->master < 0)
		return -1;
	box->stdio[0] = box->stdio[1] = box->stdio[2] = slave;
	if (!(box->request->flags & SBX_REQUEST_DETACHED))
		return 0;
	/* whoever borrows the master has to cope: we must not wait in a read that somebody else was faster at */
	long ret = sbx_sys(SYS_fcntl, s->master, F_SETFL, O_RDWR | O_NONBLOCK);
	_cleanup_fd_ int copy = ret < 0 ? (int)ret : (int)sbx_sys(SYS_fcntl, s->master, F_DUPFD_CLOEXEC, 0);
	ret = copy < 0 ? copy : add_pump(s, (struct sbx_pump){ .from = copy, .to = -1 });
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_PTY, 2, ret);
	copy = -1;
	return 0;
}

int sbx_streams_open(struct sbx_streams *s, struct sbx_box *box, struct sbx_error *err)
{
	const struct sbx_request *r = box->request;
	s->master = s->input = -1;
	for (int i = 0; i < SBX_PUMPS; i++)
		s->pumps[i] = (struct sbx_pump){ .from = -1, .to = -1 };
	long ret = r->flags & SBX_REQUEST_DETACHED ? sbx_log_open(&s->log, box->journal) : 0;

	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_LAUNCHER, 4, ret);
	if (r->flags & SBX_REQUEST_PTY)
		return open_terminal(s, box, err);
	for (int i = 0; i < 3 && ret >= 0; i++)
		if (r->stdio[i] == SBX_STDIO_RELAY || r->stdio[i] == SBX_STDIO_LOG)
			ret = open_stream(s, box, i);
	if (ret >= 0 && r->flags & SBX_REQUEST_KEEP_STDIN)
		ret = open_input(s, box);
	return ret < 0 ? sbx_fail(err, SBX_STAGE_STDIO, 0, ret) : 0;
}

/*
 * The payload has its ends; ours must go, or nobody would ever see end-of-file. What is kept is closed by
 * sbx_streams_close.
 */
void sbx_streams_hand_over(struct sbx_streams *s, struct sbx_box *box, int *fds, size_t nfds)
{
	for (size_t i = 1; i < nfds; i++) {
		bool keep = fds[i] == box->later || fds[i] == box->journal;
		for (int j = 0; j < SBX_PUMPS; j++)
			keep |= fds[i] == s->pumps[j].from || fds[i] == s->pumps[j].to;
		for (int j = 0; j < 3; j++)
			if (fds[i] == box->stdio[j])
				box->stdio[j] = -1;
		if (!keep)
			sbx_close(fds[i]);
		fds[i] = -1;
	}
	for (int i = 0; i < 3; i++) /* those that were made here; a terminal's is the same thrice */
		if (i == 0 || box->stdio[i] != box->stdio[0])
			sbx_close(box->stdio[i]);
}

void sbx_streams_close(struct sbx_streams *s)
{
	char *room = s->pumps[0].room;

	for (int i = 0; i < SBX_PUMPS; i++)
		sbx_pump_end(&s->pumps[i]);
	if (room)
		(void)sbx_sys(SYS_munmap, room, SBX_PUMPS * SBX_PUMP_ROOM);
	sbx_close(s->master);
	sbx_close(s->input);
}
