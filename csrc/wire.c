/*
 * wire.c - the host's end of the datagrams: messages out, records in. unix(7), memfd_create(2).
 */
#include "sandboxcore.h"
#include "util.h"

#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>

/* Send `head`, `size` bytes behind it, and all of `fds`, as one datagram. 0 or -errno. */
static int send_datagram(int sock, struct iovec head, const void *body, size_t size, const int *fds, size_t nfds)
{
	struct iovec iov[] = { head, { (void *)(uintptr_t)body, size } };
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(sizeof(int) * SBX_MAX_FDS)];
	} control = { 0 };
	struct msghdr msg = { .msg_iov = iov, .msg_iovlen = SBX_COUNT(iov) };

	if (nfds > SBX_MAX_FDS)
		return -E2BIG;
	if (nfds) {
		msg.msg_control = &control;
		msg.msg_controllen = CMSG_SPACE(sizeof(int) * nfds);
		struct cmsghdr *cmsg = CMSG_FIRSTHDR(&msg);
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(sizeof(int) * nfds);
		memcpy(CMSG_DATA(cmsg), fds, sizeof(int) * nfds);
	}
	while (sendmsg(sock, &msg, MSG_NOSIGNAL) < 0)
		if (errno != EINTR)
			return -errno;
	return 0;
}

int sbx_wire_send(int sock, const struct sbx_message *msg, const void *body, size_t size, const int *fds, size_t nfds)
{
	return send_datagram(sock, (struct iovec){ (void *)(uintptr_t)msg, sizeof *msg }, body, size, fds, nfds);
}

/* A sealed memfd with a copy of `data`: the receiver can map it and trust it not to change. */
int sbx_wire_memfd(const void *data, size_t size)
{
	_cleanup_fd_ int fd = memfd_create("sandboxcore", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	if (fd < 0)
		return -errno;
	for (size_t done = 0; done < size;) {
		ssize_t n = write(fd, (const char *)data + done, size - done);
		if (n < 0 && errno != EINTR)
			return -errno;
		done += n > 0 ? (size_t)n : 0;
	}
	if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_WRITE | F_SEAL_SEAL) < 0)
		return -errno;
	return sbx_steal_fd(&fd);
}

/*
 * recvmsg(2), but that 0 is the end: without waiting, the kernel looks for a datagram and then whether the other end has
 * closed (unix_dgram_recvmsg, at least to Linux 6.18), and says 0 also where it sent its last one in between.
 */
static ssize_t receive(int sock, struct msghdr *head, int flags)
{
	const struct msghdr fresh = *head;
	bool end = false;
	ssize_t len;

	while ((len = recvmsg(sock, head, flags)) < 0 ? errno == EINTR : len == 0 && !end) {
		end = len == 0;
		*head = fresh;
	}
	return len;
}

/*
 * Receive one record, at most `size` bytes of text behind it, and the descriptor it may bring.
 * Returns the datagram's length, 0 at end-of-file, or -errno.
 */
long sbx_wire_receive(int sock, struct sbx_record *rec, void *text, size_t size, int flags, int *fd)
{
	struct iovec iov[] = { { rec, sizeof *rec }, { text, size } };
	union {
		struct cmsghdr align;
		char space[CMSG_SPACE(sizeof(int))];
	} control;
	struct msghdr head = {
		.msg_iov = iov, .msg_iovlen = SBX_COUNT(iov), .msg_control = &control, .msg_controllen = sizeof control
	};

	*fd = -1;
	ssize_t len = receive(sock, &head, MSG_CMSG_CLOEXEC | flags);
	if (len < 0)
		return -errno;
	struct cmsghdr *cmsg = CMSG_FIRSTHDR(&head);
	if (cmsg && cmsg->cmsg_level == SOL_SOCKET && cmsg->cmsg_type == SCM_RIGHTS)
		memcpy(fd, CMSG_DATA(cmsg), sizeof *fd);
	if (len > 0 && (len < (ssize_t)sizeof *rec || head.msg_flags & MSG_TRUNC)) {
		sbx_close(sbx_steal_fd(fd));
		return -EPROTO;
	}
	return len;
}

int sbx_send(int sock, const struct sbx_message *msg, const void *body, size_t size, const int32_t *fds, size_t nfds)
{
	struct sbx_message head = *msg;
	int all[SBX_MAX_FDS];

	if (nfds >= SBX_MAX_FDS)
		return -E2BIG;
	if (nfds)
		memcpy(all, fds, nfds * sizeof *all);
	if (size <= SBX_MAX_INLINE)
		return sbx_wire_send(sock, &head, body, size, all, nfds);
	_cleanup_fd_ int memfd = sbx_wire_memfd(body, size);
	if (memfd < 0)
		return memfd;
	head.in_memfd = 1;
	all[nfds++] = memfd;
	return sbx_wire_send(sock, &head, NULL, 0, all, nfds);
}

int sbx_receive_record(int sock, struct sbx_record *rec, void *text, size_t size, int32_t *fd)
{
	int got;
	long len = sbx_wire_receive(sock, rec, text, size, MSG_DONTWAIT, &got);

	*fd = got;
	return len > 0 ? 1 : (int)len;
}

int sbx_file_send(int sock, const struct sbx_file_op *op, const void *paths, size_t size, int fd)
{
	return send_datagram(sock, (struct iovec){ (void *)(uintptr_t)op, sizeof *op }, paths, size, &fd, fd >= 0);
}
