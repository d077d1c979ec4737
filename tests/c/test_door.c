/* Who is behind the door is waited for, however slow; who died there is not. */
#include "box.h"
#include "check.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static struct sbx_pool *pool;

/* A launcher that is behind the door, and leaves it when it goes on. */
static pid_t holder(unsigned number)
{
	int status;

	pid_t pid = fork();
	if (pid == 0) {
		sbx_door_enter(pool, number);
		raise(SIGSTOP);
		sbx_nap(200 * 1000000);
		sbx_door_leave(pool, number);
		_exit(0);
	}
	pool->pid[number] = pid;
	CHECK(waitpid(pid, &status, WUNTRACED) == pid && WIFSTOPPED(status));
	CHECK(pool->door == number + 1);
	return pid;
}

static void is_open_to_one(void)
{
	CHECK(sbx_door_close(pool));
	CHECK(pool->door != 0);
	sbx_door_leave(pool, 3); /* not by who is not there */
	CHECK(pool->door != 0);
	sbx_door_open(pool);
	CHECK(pool->door == 0);
}

static void waits_for_the_slow(void)
{
	const pid_t pid = holder(5);

	kill(pid, SIGCONT);
	uint64_t begin = sbx_now();
	CHECK(sbx_door_close(pool));
	CHECK(sbx_now() - begin > 100 * 1000000);
	sbx_door_open(pool);
	CHECK(waitpid(pid, NULL, 0) == pid);
}

static void waits_for_nobody_who_died(void)
{
	const pid_t pid = holder(6);

	kill(pid, SIGKILL);
	CHECK(sbx_door_close(pool));
	sbx_door_open(pool);
	CHECK(waitpid(pid, NULL, 0) == pid);
}

static void gives_up(void)
{
	const pid_t pid = holder(7);

	CHECK(!sbx_door_close(pool));
	CHECK(pool->door == 8);
	kill(pid, SIGKILL);
	CHECK(waitpid(pid, NULL, 0) == pid);
	sbx_door_leave(pool, 7); /* its place is forgotten */
	CHECK(pool->door == 0);
}

int main(void)
{
	pool = mmap(NULL, sizeof *pool, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	RUN(is_open_to_one);
	RUN(waits_for_the_slow);
	RUN(waits_for_nobody_who_died);
	RUN(gives_up);
	return check_status();
}
