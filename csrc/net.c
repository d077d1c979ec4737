/*
 * net.c - network namespaces with a working loopback, made ahead of time.
 *
 * A new network namespace is by far the dearest of all (about 350 us here, milliseconds elsewhere),
 * so a process of its own makes them at low priority and keeps a few ready in a socket's queue. They
 * belong to the spawner's user namespace: whatever a payload becomes in its own, it has no power over
 * its network.
 */
#include "box.h"

#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>

enum { NET_READY = 8 };

/* Bring lo up; the kernel adds 127.0.0.1 and ::1 by itself. */
int sbx_net_loopback(void)
{
	struct ifreq ifr = { .ifr_name = "lo" };

	_cleanup_fd_ int fd = (int)sbx_sys(SYS_socket, AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return fd;
	ifr.ifr_flags = IFF_UP | IFF_RUNNING;
	long ret = sbx_sys(SYS_ioctl, fd, SIOCSIFFLAGS, &ifr);
	return ret < 0 ? (int)ret : 0;
}

/* One more ready namespace per byte asked for; an error travels as a record without a descriptor. */
static _Noreturn void maker(int sock)
{
	struct sbx_record rec;
	size_t nfds = 0;
	char byte;

	(void)prctl(PR_SET_NAME, "sbx-netns");
	(void)setpriority(PRIO_PROCESS, 0, 10);
	while (sbx_receive(sock, &byte, sizeof byte, NULL, &nfds) == 1) {
		rec = (struct sbx_record){ .kind = SBX_RECORD_READY };
		long ret = sbx_sys(SYS_unshare, CLONE_NEWNET);
		if (ret >= 0)
			ret = sbx_net_loopback();
		_cleanup_fd_ int ns = ret < 0 ? (int)ret : open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
		if (ns < 0)
			rec.error = (struct sbx_error){ SBX_STAGE_NETNS, 0, ret < 0 ? (int)-ret : errno, 0 };
		if (sbx_send_record(sock, &rec, NULL, 0, ns) < 0)
			break;
	}
	_exit(0);
}

/* Starts the maker; returns the socket to it. It ends with the socket. */
int sbx_net_start_maker(void)
{
	const struct clone_args args = { .exit_signal = SIGCHLD };
	int pair[2];

	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair) < 0)
		return -errno;
	long pid = sbx_sys(SYS_clone3, &args, sizeof args);
	if (pid == 0) {
		sbx_fds_close_except(&pair[1], 1);
		maker(pair[1]);
	}
	sbx_close(pair[1]);
	for (int i = 0; pid > 0 && i < NET_READY; i++)
		if (send(pair[0], "", 1, MSG_NOSIGNAL) < 0)
			pid = -errno;
	if (pid < 0) {
		sbx_close(pair[0]);
		return (int)pid;
	}
	return pair[0];
}

/* Move the calling process into a ready namespace and order the next one. */
int sbx_net_take(int sock)
{
	struct sbx_record rec;
	int ns = -1;
	size_t nfds = 1;

	if (send(sock, "", 1, MSG_NOSIGNAL) < 0)
		return -errno;
	long ret = sbx_receive(sock, &rec, sizeof rec, &ns, &nfds);
	if (ret != sizeof rec)
		return ret < 0 ? (int)ret : -EPIPE;
	if (nfds == 0)
		return rec.error.err ? -rec.error.err : -EMFILE;
	ret = setns(ns, CLONE_NEWNET) < 0 ? -errno : 0;
	sbx_close(ns);
	return (int)ret;
}
