/*
 * workload.c - the payload of the tests of resources: uses so much of something, and no more.
 *
 *   workload STEP...
 *
 * Steps, each a word and its arguments, one after the other; at the end it exits with 0:
 *
 *   alloc BYTES            memory, and every page of it touched; kept
 *   burn MILLISECONDS      CPU time, until this process has had so much
 *   spin                   CPU time without end
 *   write PATH BYTES       a file, through the page cache, brought to its disk at the end
 *   direct PATH BYTES      a file, past the page cache
 *   read PATH              a file, past the page cache
 *   keep PATH BYTES        a file that is written, and no more
 *   fork N                 so many children that take the remaining steps; then waits for all, and exits with 0
 *   bomb                   every process forks until it cannot; all go on with the next step
 *   hold                   nothing, without end
 *   forget                 children that end are nobody's to wait for
 *   say TEXT               a line on stdout
 *   go                     waits for a byte on stdin
 *   raise SIGNAL           this signal, to itself, with its default action
 *   exit STATUS
 *   # TEXT                 nothing: a mark in the list of processes
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { PIECE = 1 << 20 };

static _Noreturn void die(const char *what)
{
	perror(what);
	exit(111);
}

static void allocate(size_t size)
{
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		die("mmap");
	(void)madvise(memory, size, MADV_NOHUGEPAGE);
	for (size_t at = 0; at < size; at += 4096)
		((volatile char *)memory)[at] = 1;
}

static long long spent_ns(void)
{
	struct timespec spent;

	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &spent);
	return spent.tv_sec * 1000000000LL + spent.tv_nsec;
}

static void burn(long milliseconds)
{
	while (spent_ns() < milliseconds * 1000000LL)
		for (volatile int i = 0; i < 10000; i++)
			;
}

/* `direct`: past the page cache. `sync`: until it is on its disk. */
static void put(const char *path, size_t size, bool direct, bool sync)
{
	void *piece;
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | (direct ? O_DIRECT : 0), 0644);

	if (fd < 0 || posix_memalign(&piece, 4096, PIECE) != 0)
		die(path);
	memset(piece, 1, PIECE);
	for (size_t left = size; left;) {
		ssize_t done = write(fd, piece, left < PIECE ? left : PIECE);
		if (done < 0)
			die(path);
		left -= (size_t)done;
	}
	if (sync && fsync(fd) < 0)
		die(path);
	close(fd);
	free(piece);
}

static void get(const char *path)
{
	void *piece;
	ssize_t done;
	int fd = open(path, O_RDONLY | O_DIRECT);

	if (fd < 0 || posix_memalign(&piece, 4096, PIECE) != 0)
		die(path);
	while ((done = read(fd, piece, PIECE)) > 0)
		;
	if (done < 0)
		die(path);
	close(fd);
	free(piece);
}

/* Returns in each child; in the parent never. */
static void multiply(int count)
{
	for (int i = 0; i < count; i++) {
		pid_t pid = fork();
		if (pid < 0)
			die("fork");
		if (pid == 0)
			return;
	}
	while (wait(NULL) > 0 || errno == EINTR)
		;
	exit(0);
}

static void bomb(void)
{
	while (fork() >= 0)
		;
}

static void await_go(void)
{
	char drop;

	if (read(0, &drop, 1) != 1)
		exit(112);
}

static const char *next(char ***argv)
{
	if (!**argv)
		exit(113);
	return *(*argv)++;
}

int main(int argc, char **argv)
{
	(void)argc;
	for (argv++; *argv;) {
		const char *step = next(&argv);
		const char *first = strcmp(step, "spin") && strcmp(step, "bomb") && strcmp(step, "hold") &&
						    strcmp(step, "go") && strcmp(step, "forget") ?
					    next(&argv) :
					    "";
		if (!strcmp(step, "alloc"))
			allocate(strtoul(first, NULL, 10));
		else if (!strcmp(step, "burn"))
			burn(atol(first));
		else if (!strcmp(step, "spin"))
			for (volatile int i = 0;; i++)
				;
		else if (!strcmp(step, "write"))
			put(first, strtoul(next(&argv), NULL, 10), false, true);
		else if (!strcmp(step, "direct"))
			put(first, strtoul(next(&argv), NULL, 10), true, false);
		else if (!strcmp(step, "keep"))
			put(first, strtoul(next(&argv), NULL, 10), false, false);
		else if (!strcmp(step, "read"))
			get(first);
		else if (!strcmp(step, "fork"))
			multiply(atoi(first));
		else if (!strcmp(step, "bomb"))
			bomb();
		else if (!strcmp(step, "hold"))
			for (;;)
				pause();
		else if (!strcmp(step, "forget"))
			signal(SIGCHLD, SIG_IGN);
		else if (!strcmp(step, "say"))
			puts(first), fflush(stdout);
		else if (!strcmp(step, "go"))
			await_go();
		else if (!strcmp(step, "raise"))
			signal(atoi(first), SIG_DFL), raise(atoi(first));
		else if (!strcmp(step, "exit"))
			_exit(atoi(first));
		else if (strcmp(step, "#"))
			exit(114);
	}
	return 0;
}
