/*
 * hostile.c - the payload of the escape tests: makes the system calls it is told to, and says what
 * the kernel answered.
 *
 *   hostile [userns] [nocaps] call NR ARG... [, NR ARG...]...
 *   hostile [userns] [nocaps] BOMB ARG...
 *   hostile [userns] [nocaps] exec PROGRAM ARG...
 *
 * After "call", every system call prints one line: "ok RESULT" or the name of the error. An argument
 * is a number, "@text" (pointer to a string), "&hex" (pointer to these bytes; a "(hex)" among them is
 * a pointer, too), "$N" (the result of the N-th call, counted from 0) or "%" (pointer to a buffer;
 * what the last call put there is printed at the end, behind a NUL). A number "i386:N" is called
 * through the 32-bit entry.
 *
 * "userns" enters a new user namespace as its root, with all the other kinds of namespaces: where
 * an attack needs capabilities, that is how every user can show what it would do with them.
 * "nocaps" gives all of them up again.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum { CALLS = 512, ARGS = 6 };

static char buffer[65536];
static long results[CALLS];

static _Noreturn void die(const char *what)
{
	perror(what);
	exit(111);
}

/* --- calls ------------------------------------------------------------------------------------ */

/* The bytes that the text stands for, up to its end or a closing bracket; moves behind it. */
static void *bytes_of(const char **text)
{
	unsigned char *bytes = calloc(1, strlen(*text) * 8 + 8), *to = bytes;

	if (!bytes)
		die("calloc");
	for (; **text && **text != ')'; (*text)++) {
		if (**text == '(') {
			(*text)++;
			void *inner = bytes_of(text);
			memcpy(to, &inner, sizeof inner);
			to += sizeof inner;
		} else if (sscanf(*text, "%2hhx", to++) == 1) {
			(*text)++;
		} else {
			exit(112);
		}
	}
	return bytes;
}

static long value_of(const char *arg)
{
	switch (arg[0]) {
	case '@':
		return (long)(arg + 1);
	case '&':
		arg++;
		return (long)bytes_of(&arg);
	case '$':
		return results[atoi(arg + 1)];
	case '%':
		return (long)buffer;
	default:
		return (long)strtoull(arg, NULL, 0);
	}
}

static long make_call(const char *number, const long a[ARGS])
{
#ifdef __x86_64__
	if (strncmp(number, "i386:", 5) == 0) {
		long ret = strtol(number + 5, NULL, 0);
		__asm__ volatile("int $0x80"
				 : "+a"(ret)
				 : "b"(a[0]), "c"(a[1]), "d"(a[2])
				 : "memory", "r8", "r9", "r10", "r11");
		return (int)ret < 0 ? (errno = -(int)ret, -1) : ret;
	}
#endif
	return syscall((long)strtoull(number, NULL, 0), a[0], a[1], a[2], a[3], a[4], a[5]);
}

static int calls(char **argv)
{
	const pid_t self = getpid();
	bool wants_buffer = false;

	for (int n = 0; *argv && n < CALLS; n++) {
		const char *number = *argv++;
		long a[ARGS] = { 0 };
		for (int i = 0; i < ARGS && *argv && strcmp(*argv, ",") != 0; i++, argv++) {
			a[i] = value_of(*argv);
			wants_buffer |= **argv == '%';
		}
		if (*argv)
			argv++;
		errno = 0;
		results[n] = make_call(number, a);
		if (getpid() != self) /* the attack was to make a process */
			_exit(0);
		if (results[n] == -1 && errno)
			printf("%s\n", strerrorname_np(errno));
		else
			printf("ok %ld\n", results[n]);
		fflush(stdout);
	}
	if (wants_buffer) {
		putchar('\0');
		fwrite(buffer, 1, strnlen(buffer, sizeof buffer), stdout);
	}
	return 0;
}

/* --- who makes them --------------------------------------------------------------------------- */

static void write_map(const char *path, unsigned outside)
{
	char text[32];
	int fd = open(path, O_WRONLY);
	int size = snprintf(text, sizeof text, "0 %u 1", outside);

	if (fd < 0 || write(fd, text, (size_t)size) != size)
		die(path);
	close(fd);
}

/* Root of a new user namespace, in new namespaces of every other kind; pid 1 of the new tree. */
static void enter_userns(void)
{
	const unsigned uid = geteuid(), gid = getegid();
	const int rest = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP;

	if (unshare(CLONE_NEWUSER | rest) < 0)
		die("unshare");
	int fd = open("/proc/self/setgroups", O_WRONLY);
	if (fd < 0 || write(fd, "deny", 4) != 4)
		die("setgroups");
	close(fd);
	write_map("/proc/self/uid_map", uid);
	write_map("/proc/self/gid_map", gid);
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
		die("mount");

	pid_t child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		return;
	}
	int status;
	while (waitpid(child, &status, 0) < 0)
		;
	_exit(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
}

static void drop_caps(void)
{
	struct __user_cap_header_struct head = { .version = _LINUX_CAPABILITY_VERSION_3 };
	struct __user_cap_data_struct none[2] = { 0 };

	/* else execve would give root everything back */
	if (prctl(PR_SET_SECUREBITS, 0x3) < 0 || syscall(SYS_capset, &head, none) < 0)
		die("nocaps");
}

/* --- what is more than a call ----------------------------------------------------------------- */

/* Stay until killed, open to every debugger. */
static int hold(char **argv)
{
	(void)argv;
	prctl(PR_SET_PTRACER, -1L);
	puts("ready");
	fflush(stdout);
	while (pause() < 0)
		;
	return 0;
}

/* Exchange two names until killed. */
static int swap(char **argv)
{
	puts("ready");
	fflush(stdout);
	while (renameat2(AT_FDCWD, argv[0], AT_FDCWD, argv[1], RENAME_EXCHANGE) == 0)
		;
	die("renameat2");
}

/* Up to N processes at once; prints how many there were and why there was no further one. */
static int forkbomb(char **argv)
{
	int made = 0;

	while (made < atoi(argv[0])) {
		pid_t pid = fork();
		if (pid == 0) {
			pause();
			_exit(0);
		}
		if (pid < 0)
			break;
		made++;
	}
	printf("%d %s\n", made, made < atoi(argv[0]) ? strerrorname_np(errno) : "ok");
	fflush(stdout);
	signal(SIGTERM, SIG_IGN);
	kill(0, SIGTERM);
	return 0;
}

/* Up to N bytes into one file. */
static int diskbomb(char **argv)
{
	long long done = 0, wanted = atoll(argv[1]);
	int fd = open(argv[0], O_WRONLY | O_CREAT | O_TRUNC, 0600);
	ssize_t n = fd;

	while (n >= 0 && done < wanted) {
		n = write(fd, buffer, sizeof buffer);
		if (n > 0)
			done += n;
	}
	printf("%lld %s\n", done, n < 0 ? strerrorname_np(errno) : "ok");
	return 0;
}

/* Up to N empty files in a directory. */
static int inodebomb(char **argv)
{
	int made = 0, fd = 0;

	if (chdir(argv[0]) < 0)
		die(argv[0]);
	for (char name[16]; made < atoi(argv[1]); made++) {
		snprintf(name, sizeof name, "%d", made);
		fd = open(name, O_WRONLY | O_CREAT | O_EXCL, 0600);
		if (fd < 0)
			break;
		close(fd);
	}
	printf("%d %s\n", made, fd < 0 ? strerrorname_np(errno) : "ok");
	return 0;
}

/* Up to N descriptors. */
static int fdbomb(char **argv)
{
	int made = 0, fd = 0;

	for (; made < atoi(argv[0]); made++) {
		fd = dup(0);
		if (fd < 0)
			break;
	}
	printf("%d %s\n", made, fd < 0 ? strerrorname_np(errno) : "ok");
	return 0;
}

/* N bytes to stdout, as fast as possible. */
static int flood(char **argv)
{
	memset(buffer, 'x', sizeof buffer);
	for (long long left = atoll(argv[0]); left > 0; left -= (long long)sizeof buffer)
		if (write(1, buffer, sizeof buffer) < 0)
			return 1;
	return 0;
}

/*
 * A process that does not want to go, in one of several ways; the last argument, a text to find it
 * by, is only there to stand on the command line. Prints "ready" once it is out of reach.
 */
static int linger(char **argv)
{
	const char *how = argv[0];

	for (int sig = 1; strcmp(how, "deaf") == 0 && sig < 65; sig++)
		signal(sig, SIG_IGN);
	if (strcmp(how, "crowd") == 0) /* as many as there may be */
		for (pid_t pid = 1; pid > 0;)
			if ((pid = fork()) == 0)
				pause();
	if (strcmp(how, "daemon") == 0) { /* orphaned, own session, nothing held open */
		if (fork() > 0) {
			int byte = 0;
			return read(0, &byte, 1) < 0;
		}
		setsid();
		if (fork() > 0)
			_exit(0);
		puts("ready");
		fflush(stdout);
		close(0);
		close(1);
		close(2);
	} else {
		puts("ready");
		fflush(stdout);
	}
	if (strcmp(how, "orphan") == 0 && fork() > 0) /* stdout stays open in the child */
		return 7;
	if (strcmp(how, "stopped") == 0)
		raise(SIGSTOP);
	if (strcmp(how, "vfork") == 0 && vfork() == 0) /* the parent sleeps until the child ends */
		for (;;)
			pause();
	if (strcmp(how, "zombies") == 0)
		for (int i = 0; i < 50; i++)
			if (fork() == 0) {
				if (fork() == 0 && fork() == 0)
					pause();
				_exit(0);
			}
	if (strcmp(how, "breeding") == 0) /* always one step ahead of a kill by pid */
		for (;;)
			if (fork() > 0)
				_exit(0);
	while (pause() < 0)
		;
	return 0;
}

/* Every signal to a process; prints how many could be sent. */
static int barrage(char **argv)
{
	int sent = 0;

	for (int sig = 1; sig < 65; sig++)
		sent += kill(atoi(argv[0]), sig) == 0;
	printf("%d\n", sent);
	return 42;
}

static int run(char **argv)
{
	fflush(stdout);
	execvp(argv[0], argv);
	puts(strerrorname_np(errno));
	return 113;
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		int (*act)(char **argv);
	} acts[] = {
		{ "call", calls },	  { "exec", run },	    { "hold", hold },		{ "swap", swap },
		{ "forkbomb", forkbomb }, { "diskbomb", diskbomb }, { "inodebomb", inodebomb }, { "fdbomb", fdbomb },
		{ "flood", flood },	  { "linger", linger },	    { "barrage", barrage },
	};

	argv++;
	for (; argc > 1 && *argv; argv++) {
		if (strcmp(*argv, "userns") == 0)
			enter_userns();
		else if (strcmp(*argv, "nocaps") == 0)
			drop_caps();
		else
			break;
	}
	for (size_t i = 0; *argv && i < sizeof acts / sizeof acts[0]; i++)
		if (strcmp(*argv, acts[i].name) == 0)
			return acts[i].act(argv + 1);
	return 64;
}
