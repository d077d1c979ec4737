/*
 * pty.c - a terminal for one command, from the sandbox's own devpts: pty(7), ioctl_tty(2).
 *
 * The slave is opened through its master, TIOCGPTPEER (Linux 4.13), not by a name that something else
 * could stand under. The node belongs to the payload, who finds it as /dev/pts/N.
 */
#include "box.h"

#include <asm/termbits.h>
#include <sys/ioctl.h>

/* Returns the master; *slave becomes the other end. */
int sbx_pty_open(const struct sbx_box *box, int *slave, struct sbx_error *err)
{
	const struct sbx_request *r = box->request;
	const struct winsize size = { .ws_row = (unsigned short)r->rows, .ws_col = (unsigned short)r->columns };
	const int unlock = 0;

	if (sbx_cred_borrow(box->plan, r->uid, r->gid, err) < 0)
		return -1;
	_cleanup_fd_ int master = sbx_openat2(AT_FDCWD, "/dev/ptmx", O_RDWR | O_NOCTTY, 0, RESOLVE_NO_MAGICLINKS);
	if (sbx_cred_borrow(box->plan, 0, 0, err) < 0)
		return -1;
	if (master < 0)
		return sbx_fail(err, SBX_STAGE_PTY, 0, master);
	long ret = sbx_sys(SYS_ioctl, master, TIOCSPTLCK, &unlock);
	if (ret >= 0)
		ret = sbx_sys(SYS_ioctl, master, TIOCSWINSZ, &size);
	if (ret >= 0)
		ret = sbx_sys(SYS_ioctl, master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	if (ret < 0)
		return sbx_fail(err, SBX_STAGE_PTY, 1, ret);
	*slave = (int)ret;
	return sbx_steal_fd(&master);
}
