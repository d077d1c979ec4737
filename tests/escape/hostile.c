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
#include <linux/rtnetlink.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/shm.h>
#include <sys/socket.h>
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

/* N processes with BYTES each; prints how many have got them. With "stay" they keep them. */
static int hogs(char **argv)
{
	size_t size = strtoul(argv[1], NULL, 0);
	int made = 0, ends[2];
	char byte;

	if (pipe(ends) < 0)
		die("pipe");
	for (int i = atoi(argv[0]); i > 0; i--)
		if (fork() == 0) {
			char *own = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			if (own == MAP_FAILED)
				_exit(1);
			memset(own, 1, size);
			if (write(ends[1], "", 1) == 1)
				pause();
			_exit(1);
		}
	close(ends[1]); /* end-of-file: one of them has died before it had all, and all of the others */
	while (made < atoi(argv[0]) && read(ends[0], &byte, 1) == 1)
		made++;
	printf("%d ok\n", made);
	fflush(stdout);
	if (argv[2] && strcmp(argv[2], "stay") == 0)
		pause();
	signal(SIGTERM, SIG_IGN);
	kill(0, SIGTERM);
	return 0;
}

/* --- kinds of memory ---------------------------------------------------------------------------- */

enum { PIECE = 1 << 20 };

/* Each of these takes about a piece of memory that stays taken, and says how much; -1 if it cannot. */

static long take_anonymous(void)
{
	void *own = mmap(NULL, PIECE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	return own == MAP_FAILED ? -1 : (memset(own, 1, PIECE), PIECE);
}

static long append(int fd)
{
	long done = 0;

	for (ssize_t n; fd >= 0 && done < PIECE; done += n)
		if ((n = write(fd, buffer, sizeof buffer)) < 0)
			return done ? done : -1;
	return done ? done : -1;
}

static long take_tmp(void)
{
	static int fd = -1;

	if (fd < 0)
		fd = open("/tmp/fill", O_WRONLY | O_CREAT | O_TRUNC, 0600);
	return append(fd);
}

static long take_shm(void)
{
	static int fd = -1;

	if (fd < 0)
		fd = open("/dev/shm/fill", O_WRONLY | O_CREAT | O_TRUNC, 0600);
	if (fd >= 0)
		unlink("/dev/shm/fill"); /* a control leaves nothing outside */
	return append(fd);
}

static long take_memfd(void)
{
	return append(memfd_create("fill", 0));
}

static long take_sysv(void)
{
	int id = shmget(IPC_PRIVATE, PIECE, IPC_CREAT | 0600);
	void *own = id < 0 ? (void *)-1 : shmat(id, NULL, 0);

	if (own == (void *)-1)
		return -1;
	shmctl(id, IPC_RMID, NULL); /* when its last user has gone */
	memset(own, 1, PIECE);
	return PIECE;
}

static long take_messages(void)
{
	struct {
		long type;
		char text[4096];
	} message = { .type = 1 };
	long done = 0;

	for (int id; done < PIECE;)
		for (id = msgget(IPC_PRIVATE, IPC_CREAT | 0600);; done += sizeof message.text)
			if (id < 0)
				return -1;
			else if (msgsnd(id, &message, sizeof message.text, IPC_NOWAIT) < 0)
				break;
	return done;
}

/* As much as goes into it without waiting. */
static long stuff(int fd, size_t piece)
{
	long done = 0;

	if (fcntl(fd, F_SETFL, O_NONBLOCK) < 0)
		return -1;
	for (ssize_t n; (n = write(fd, buffer, piece)) > 0;)
		done += n;
	return done ? done : -1;
}

static long take_pipe(void)
{
	int ends[2];

	if (pipe(ends) < 0)
		return -1;
	(void)fcntl(ends[1], F_SETPIPE_SZ, PIECE);
	return stuff(ends[1], 4096);
}

static long take_unix(void)
{
	int ends[2];

	return socketpair(AF_UNIX, SOCK_STREAM, 0, ends) < 0 ? -1 : stuff(ends[1], 4096);
}

/* Two ends on lo: as much as TCP takes; of datagrams, as many as fit for sure, for what does not is lost. */
static long take_inet(int type)
{
	struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
	socklen_t size = sizeof at;
	int to = socket(AF_INET, type, 0), from = socket(AF_INET, type, 0);
	long done = 0;

	if (to < 0 || from < 0 || bind(to, (void *)&at, size) < 0 || getsockname(to, (void *)&at, &size) < 0)
		return -1;
	if ((type == SOCK_STREAM && listen(to, 1) < 0) || connect(from, (void *)&at, size) < 0)
		return -1;
	if (type == SOCK_STREAM)
		return stuff(from, sizeof buffer);
	for (ssize_t n; done < 131072 && (n = send(from, buffer, 32768, MSG_DONTWAIT)) > 0;)
		done += n;
	return done ? done : -1;
}

static long take_tcp(void)
{
	return take_inet(SOCK_STREAM);
}

static long take_udp(void)
{
	return take_inet(SOCK_DGRAM);
}

/* Answers of the kernel that nobody reads. */
static long take_netlink(void)
{
	const struct {
		struct nlmsghdr head;
		struct ifinfomsg body;
	} ask = { { sizeof ask, RTM_GETLINK, NLM_F_REQUEST, 0, 0 }, { .ifi_index = 1 } };
	int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
	int many = 0;

	for (; fd >= 0 && many < 1000 && send(fd, &ask, sizeof ask, MSG_DONTWAIT) > 0; many++)
		;
	int room = 0;
	socklen_t size = sizeof room;
	if (getsockopt(fd, SOL_SOCKET, SO_RCVBUF, &room, &size) < 0)
		return -1;
	return room / 2;
}

/* A page of tables for each touch of a page that all processes share. */
static long take_tables(void)
{
	const size_t each = 2 << 20, pages = PIECE / 4096;
	char *own = mmap(NULL, each * pages, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (own == MAP_FAILED)
		return -1;
	(void)madvise(own, each * pages, MADV_NOHUGEPAGE);
	for (size_t i = 0; i < pages; i++)
		(void)*(volatile char *)(own + i * each);
	return PIECE;
}

/* Locks of files; with many on one, each new one takes longer. */
static long take_locks(void)
{
	const int each = 192, count = 1024;
	int fd = memfd_create("locks", 0);

	for (int i = 0; i < count; i++) {
		struct flock lock = { .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = 2 * i, .l_len = 1 };
		if (fcntl(fd, F_OFD_SETLK, &lock) < 0)
			return -1;
	}
	return each * count;
}

/* Up to N bytes of one kind, "pieces" at a time; says after each how many it has. */
static int fill(char **argv)
{
	static const struct {
		const char *name;
		long (*take)(void);
	} kinds[] = {
		{ "anonymous", take_anonymous },
		{ "tmp", take_tmp },
		{ "shm", take_shm },
		{ "memfd", take_memfd },
		{ "sysv", take_sysv },
		{ "messages", take_messages },
		{ "pipe", take_pipe },
		{ "unix", take_unix },
		{ "tcp", take_tcp },
		{ "udp", take_udp },
		{ "netlink", take_netlink },
		{ "tables", take_tables },
		{ "locks", take_locks },
	};
	long done = 0, wanted = atol(argv[1]), n = 0;
	size_t kind = 0;

	while (kind < sizeof kinds / sizeof kinds[0] && strcmp(kinds[kind].name, argv[0]) != 0)
		kind++;
	if (kind == sizeof kinds / sizeof kinds[0])
		return 64;
	for (; done < wanted && (n = kinds[kind].take()) > 0; printf("%ld ok\n", done += n))
		fflush(stdout);
	if (n <= 0)
		printf("%ld %s\n", done, strerrorname_np(errno));
	return 0;
}

/* --- the rest --------------------------------------------------------------------------------- */

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
		{ "flood", flood },	  { "linger", linger },	    { "barrage", barrage },	{ "hogs", hogs },
		{ "fill", fill },
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
