/* The last record of somebody who has closed is heard, also when the end is told before it. */
#include "check.h"
#include "sandboxcore.h"
#include "util.h"

#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>

static int sock[2], calls;
static bool early; /* the first call finds nothing; then the other end sends, and closes */

static void send_last_words(void)
{
	const struct sbx_record rec = { .kind = SBX_RECORD_EXIT, .status = 7 };

	CHECK(send(sock[1], &rec, sizeof rec, 0) == sizeof rec);
	CHECK(close(sock[1]) == 0);
}

/* libc's, as the kernel does it where that comes between its two looks. */
ssize_t recvmsg(int fd, struct msghdr *msg, int flags)
{
	if (calls++ == 0 && early) {
		send_last_words();
		msg->msg_controllen = 0;
		return 0;
	}
	return syscall(SYS_recvmsg, fd, msg, flags);
}

static long receive(struct sbx_record *rec)
{
	char text[SBX_MAX_INLINE];
	int fd;

	calls = 0;
	*rec = (struct sbx_record){ 0 };
	long len = sbx_wire_receive(sock[0], rec, text, sizeof text, MSG_DONTWAIT, &fd);
	CHECK(fd == -1);
	return len;
}

static void last_words_are_heard(void)
{
	struct sbx_record rec;

	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sock) == 0);
	early = true;
	CHECK(receive(&rec) == sizeof rec);
	CHECK(rec.kind == SBX_RECORD_EXIT && rec.status == 7);
	early = false;
	CHECK(receive(&rec) == 0);
	CHECK(calls == 2);
	close(sock[0]);
}

static void waits_for_nobody(void)
{
	struct sbx_record rec;

	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sock) == 0);
	CHECK(receive(&rec) == -EAGAIN);
	CHECK(calls == 1);
	close(sock[0]);
	close(sock[1]);
}

int main(void)
{
	RUN(last_words_are_heard);
	RUN(waits_for_nobody);
	return check_status();
}
