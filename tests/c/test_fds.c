/* Everything but the listed descriptors is closed, whatever their order. */
#include "box.h"
#include "check.h"

static bool is_open(int fd)
{
	return fcntl(fd, F_GETFD) >= 0;
}

static void closes_all_but(void)
{
	int keep[] = { 40, 0, 33, 2, 1, 33, -1 };

	for (int fd = 30; fd < 45; fd++)
		CHECK(dup2(1, fd) == fd);
	CHECK(sbx_fds_close_except(keep, SBX_COUNT(keep)) == 0);
	for (int fd = 0; fd < 60; fd++)
		CHECK(is_open(fd) == (fd < 3 || fd == 33 || fd == 40));
}

int main(void)
{
	RUN(closes_all_but);
	return check_status();
}
