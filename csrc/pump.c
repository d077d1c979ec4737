/*
 * pump.c - a launcher copies between a command's pipes and what lies behind them: a descriptor of the host,
 * which no payload gets to see, or the journal of a detached command.
 *
 * The command's side is always a pipe of ours and non-blocking. The host's side may be shared with others:
 * its flags are left alone, and each transfer is asked for without waiting where the kernel can
 * (RWF_NOWAIT: preadv2(2)); else it was polled first, and no more is written than what a pipe that polls
 * writable takes (PIPE_BUF).
 */
#include "box.h"

#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/uio.h>

enum { RELAY_PIECE = 4096 };

/* A pipe that belongs to the payload, who may open it again as /dev/stdout. The launcher's end is `ours`. */
int sbx_pump_pipe(const struct sbx_box *box, int ends[2])
{
	struct sbx_error ignored;

	if (sbx_cred_borrow(box->plan, box->request->uid, box->request->gid, &ignored) < 0)
		return -EPERM;
	long ret = sbx_sys(SYS_pipe2, ends, O_CLOEXEC);
	if (sbx_cred_borrow(box->plan, 0, 0, &ignored) < 0)
		return -EPERM;
	return (int)ret;
}

/* A regular file says EAGAIN when it is not cached, but never blocks for long. */
static bool may_block(int fd, long ret)
{
	struct stat st;

	return ret == -EOPNOTSUPP || (ret == -EAGAIN && sbx_sys(SYS_fstat, fd, &st) == 0 && S_ISREG(st.st_mode));
}

static long read_some(const struct sbx_pump *p)
{
	const struct iovec iov = { p->room, SBX_PUMP_ROOM };

	if (!p->inward)
		return sbx_sys(SYS_read, p->from, p->room, SBX_PUMP_ROOM);
	long ret = sbx_sys(SYS_preadv2, p->from, &iov, 1, -1, -1, RWF_NOWAIT);
	return may_block(p->from, ret) ? sbx_sys(SYS_read, p->from, p->room, SBX_PUMP_ROOM) : ret;
}

static long write_some(const struct sbx_pump *p)
{
	uint32_t size = p->size - p->offset;

	if (p->inward)
		return sbx_sys(SYS_write, p->to, p->room + p->offset, size);
	const struct iovec iov = { p->room + p->offset, size < RELAY_PIECE ? size : RELAY_PIECE };
	long ret = sbx_sys(SYS_pwritev2, p->to, &iov, 1, -1, -1, RWF_NOWAIT);
	return may_block(p->to, ret) ? sbx_sys(SYS_write, p->to, iov.iov_base, iov.iov_len) : ret;
}

/* The ring first, then the count that readers go by. */
static long log_write(struct sbx_log *log, const struct sbx_pump *p)
{
	uint64_t ring = log->head.ring, *written = &log->head.written[p->stream];

	for (uint32_t done = 0; done < p->size;) {
		uint64_t at = (*written + done) % ring;
		uint64_t room = ring - at, left = p->size - done;
		long ret = sbx_sys(SYS_pwrite64, log->file, p->room + done, left < room ? left : room,
				   (long)(SBX_JOURNAL_HEAD + p->stream * ring + at));
		if (ret <= 0)
			return ret < 0 ? ret : -ENOSPC;
		done += (uint32_t)ret;
	}
	*written += p->size;
	return sbx_log_save(log);
}

long sbx_log_save(const struct sbx_log *log)
{
	long ret = sbx_sys(SYS_pwrite64, log->file, &log->head, sizeof log->head, 0);
	return ret < 0 ? ret : 0;
}

/* The journal came with its dimensions filled in. */
long sbx_log_open(struct sbx_log *log, int file)
{
	long ret = sbx_sys(SYS_pread64, file, &log->head, sizeof log->head, 0);
	if (ret < 0)
		return ret;
	const struct sbx_journal *j = &log->head;
	if (ret != sizeof *j || j->magic != SBX_JOURNAL_MAGIC || j->layout != SBX_LAYOUT || j->keep == 0 ||
	    j->keep > 1 << 30 || j->ring != j->keep + SBX_JOURNAL_SLACK || j->state != SBX_JOURNAL_NEW)
		return -EINVAL;
	log->file = file;
	return 0;
}

void sbx_pump_end(struct sbx_pump *p)
{
	sbx_close(sbx_steal_fd(&p->from));
	sbx_close(sbx_steal_fd(&p->to));
	p->size = p->offset = 0;
}

/*
 * Whether all is read, once those who wrote have ended. Another command of the sandbox may have the pipe, too
 * (SCM_RIGHTS), and never stop: what is there at the end is what counts.
 */
bool sbx_pump_last(struct sbx_pump *p, bool gone)
{
	int there = 0;

	if (gone && !p->last) {
		long ret = sbx_sys(SYS_ioctl, p->from, FIONREAD, &there);
		p->left = ret < 0 ? SBX_PUMP_ROOM : (uint32_t)there;
		p->last = true;
	}
	return p->last && p->left == 0;
}

/* Read the next piece. 1: there is one; 0: none now, or this was the end. */
long sbx_pump_fill(struct sbx_pump *p)
{
	long ret = read_some(p);

	if (ret == -EAGAIN || ret == -EINTR)
		return 0;
	if (ret <= 0) { /* the end; or a terminal whose other side is closed: EIO */
		sbx_pump_end(p);
		return 0;
	}
	p->size = (uint32_t)ret;
	p->offset = 0;
	p->left = p->left > p->size ? p->left - p->size : 0;
	return 1;
}

/* Pass on what is there. A reader that is gone ends the pump: its writer gets SIGPIPE, as with any pipe. */
long sbx_pump_drain(struct sbx_pump *p, struct sbx_log *log)
{
	long ret = p->to < 0 ? log_write(log, p) : write_some(p);

	if (ret == -EAGAIN || ret == -EINTR)
		return 0;
	if (ret < 0) {
		sbx_pump_end(p);
		return ret;
	}
	p->offset = p->to < 0 ? p->size : p->offset + (uint32_t)ret;
	if (p->offset == p->size)
		p->size = p->offset = 0;
	return 0;
}
