/*
 * message.c - datagrams with descriptors over SOCK_SEQPACKET: unix(7), SCM_RIGHTS.
 */
#include "box.h"

#include <sys/socket.h>
#include <sys/uio.h>

/* Send a record, `size` bytes of text behind it, and a descriptor if `fd` is not negative. */
int sbx_send_record(int sock, const struct sbx_record *rec, const void *text, size_t size, int fd)
{
	struct iovec iov[] = { { (void *)(uintptr_t)rec, sizeof *rec }, { (void *)(uintptr_t)text, size } };
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(sizeof fd)];
	} control = { 0 };
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = SBX_COUNT(iov) };

	if (fd >= 0) {
		msg.msg_control = &control;
		msg.msg_controllen = sizeof control;
		struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(sizeof fd);
		memcpy(CMSG_DATA(cmsg), &fd, sizeof fd);
	}
	long ret;
	do
		ret = sbx_sys(SYS_sendmsg, sock, &msg, MSG_NOSIGNAL);
	while (ret == -EINTR);
	return ret < 0 ? (int)ret : 0;
}

void sbx_send_error(int sock, const struct sbx_error *err)
{
	const struct sbx_record rec = { .kind = SBX_RECORD_ERROR, .error = *err };

	(void)sbx_send_record(sock, &rec, NULL, 0, -1); /* a host that is gone needs no answer */
}

/* The text that the payload left, in datagrams of a size that every socket takes. */
long sbx_send_applied(const struct sbx_box *box)
{
	for (uint32_t sent = 0; sent < box->applied_size;) {
		uint32_t size = box->applied_size - sent;
		if (size > SBX_MAX_INLINE)
			size = SBX_MAX_INLINE;
		const struct sbx_record rec = { .kind = SBX_RECORD_APPLIED, .size = size };
		long ret = sbx_send_record(box->control, &rec, box->applied + sent, size, -1);
		if (ret < 0)
			return ret;
		sent += size;
	}
	return 0;
}

/*
 * Receive one datagram and at most *nfds descriptors; *nfds becomes their number. A datagram that
 * does not fit, or brings more descriptors than wanted or than this process may open, is -EMSGSIZE or
 * -EMFILE, and what came is closed.
 */
long sbx_receive(int sock, void *buf, size_t size, int *fds, size_t *nfds)
{
	struct iovec iov = { buf, size };
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(sizeof(int) * SBX_MAX_FDS)];
	} control;
	struct msghdr msg = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control
	};
	size_t wanted = *nfds, got = 0;
	long ret;

	*nfds = 0; /* whatever happens, the caller closes no others */
	do
		ret = sbx_sys(SYS_recvmsg, sock, &msg, MSG_CMSG_CLOEXEC);
	while (ret == -EINTR);
	if (ret < 0)
		return ret;
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);
	int received[SBX_MAX_FDS];
	if (cmsg && cmsg->cmsg_level == SOL_SOCKET && cmsg->cmsg_type == SCM_RIGHTS) {
		got = (cmsg->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		memcpy(received, CMSG_DATA(cmsg), got * sizeof(int));
	}
	if (msg.msg_flags & (MSG_TRUNC | MSG_CTRUNC) || got > wanted) {
		for (size_t i = 0; i < got; i++)
			sbx_close(received[i]);
		return msg.msg_flags & MSG_TRUNC ? -EMSGSIZE : -EMFILE;
	}
	if (got)
		memcpy(fds, received, got * sizeof(int));
	*nfds = got;
	return ret;
}
