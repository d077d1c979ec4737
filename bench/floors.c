/*
 * floors: what the kernel alone charges for each step of starting a sandbox.
 *
 * A server on stdin and stdout, so that the runner can interleave these floors with everything
 * else it measures. Build and try it by hand:
 *
 *     cc -D_GNU_SOURCE -O2 -static floors.c -o floors
 *     echo clone.all 5 0 | ./floors SCRATCH TRUE LINEAR TREE
 *
 * SCRATCH: an empty directory for mounts. TRUE: the program to execute. LINEAR, TREE: files with
 * seccomp filters (arrays of struct sock_filter).
 *
 * A request is a line "NAME COUNT GAP_US" (GAP_US: sleep before each sample). An answer is a line
 * of JSON: {"us": [samples in microseconds], "step": "", "errno": 0}; where the host refuses a
 * step, the samples so far, the step and its errno.
 *
 * Mounts need privileges over a mount namespace. The server tries to get one of its own; where
 * that is refused (not root) it enters a user namespace first, as root of nothing but itself.
 * Everything it mounts is on a tmpfs in that namespace and ends with the process.
 *
 * clone3(2) namespaces(7) seccomp(2) pivot_root(2) netdevice(7)
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* The namespaces of a default sandbox; time is on request only, so it is a floor of its own. */
#define ALL_BUT_NET (CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP)

/* A step returns NULL, or its own name with errno set. */
typedef const char *step_fn(void);

struct floor {
	const char *name;
	const char *(*measure)(const struct floor *floor, double *ret_us);
	uint64_t flags;	  /* namespaces of the child in which the step runs */
	step_fn *prepare; /* in the child, not timed */
	step_fn *timed;	  /* in the child */
};

/* What a child tells the server, in shared memory: the child may have lost everything else.
 * `step` points to a constant of the image that both have. */
struct report {
	double us;
	const char *step;
	int error;
};

static struct report *report;
static char *true_path;
static const char *scratch_failed; /* the step that kept us from a scratch directory */
static int scratch_errno, netns_errno, netns_fd = -1;
static struct sock_fprog linear, tree;

static double now_us(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static const char *failed_with(int error, const char *step)
{
	errno = error;
	return step;
}

/* fork with namespaces; libc has no wrapper */
static pid_t clone_process(uint64_t flags)
{
	struct clone_args args = { .flags = flags, .exit_signal = SIGCHLD };

	return (pid_t)syscall(SYS_clone3, &args, sizeof args);
}

/* --- the three ways to measure ------------------------------------------------------------- */

/* Birth to reaped exit of an empty child, seen by its parent: teardown included. */
static const char *measure_lifetime(const struct floor *floor, double *ret_us)
{
	double start = now_us();
	pid_t child = clone_process(floor->flags);

	if (child == 0)
		_exit(0);
	if (child < 0)
		return "clone3";
	waitpid(child, NULL, 0);
	*ret_us = now_us() - start;
	return NULL;
}

/* CLONE_VFORK is spelled vfork(): a child that shares our stack needs libc's care. */
static const char *measure_exec(const struct floor *floor, double *ret_us)
{
	char *argv[] = { true_path, NULL }, *envp[] = { NULL };
	double start = now_us();
	pid_t child = floor->flags & CLONE_VFORK ? vfork() : clone_process(floor->flags);
	int status;

	if (child == 0) {
		execve(true_path, argv, envp);
		report->error = errno;
		_exit(127);
	}
	if (child < 0)
		return "fork";
	waitpid(child, &status, 0);
	*ret_us = now_us() - start;
	if (status == 0)
		return NULL;
	return failed_with(report->error ? report->error : ECANCELED, "execve");
}

/* One step, timed by the child that makes it: for what cannot be undone (a filter, a pivot) and
 * for what should be torn down out of sight. */
static const char *measure_inside(const struct floor *floor, double *ret_us)
{
	pid_t child = clone_process(floor->flags);
	int status;

	if (child < 0)
		return "clone3";
	if (child == 0) {
		const char *step = floor->prepare ? floor->prepare() : NULL;
		double start = now_us();

		if (!step)
			step = floor->timed();
		report->us = now_us() - start;
		report->error = errno;
		report->step = step;
		_exit(0);
	}
	waitpid(child, &status, 0);
	if (status != 0)
		return failed_with(ECANCELED, "the child that measures");
	*ret_us = report->us;
	return report->step ? failed_with(report->error, report->step) : NULL;
}

/* --- steps --------------------------------------------------------------------------------- */

static const char *load_linear(void)
{
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &linear) < 0 ? "seccomp" : NULL;
}

static const char *load_tree(void)
{
	return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &tree) < 0 ? "seccomp" : NULL;
}

static const char *in_scratch(void)
{
	return scratch_failed ? failed_with(scratch_errno, scratch_failed) : NULL;
}

static const char *mount_target(const char *type, const char *options)
{
	return mount(type, "target", type, MS_NOSUID | MS_NODEV, options) < 0 ? "mount" : NULL;
}

static const char *mount_overlay(void)
{
	/* userxattr: the only kind of attribute that overlayfs may use in a user namespace */
	return mount_target("overlay", "lowerdir=lower,upperdir=upper,workdir=work,userxattr");
}

static const char *mount_proc(void)
{
	return mount_target("proc", NULL);
}

static const char *mount_tmpfs(void)
{
	return mount_target("tmpfs", "mode=755");
}

static const char *enter_new_root(void)
{
	const char *step = in_scratch();

	if (step || (step = mount_tmpfs()))
		return step;
	return chdir("target") < 0 ? "chdir target" : NULL;
}

static const char *pivot_and_umount(void)
{
	if (syscall(SYS_pivot_root, ".", ".") < 0)
		return "pivot_root";
	return umount2(".", MNT_DETACH) < 0 ? "umount2" : NULL;
}

static const char *create_netns(void)
{
	return unshare(CLONE_NEWNET) < 0 ? "unshare CLONE_NEWNET" : NULL;
}

static const char *enter_netns(void)
{
	if (netns_errno)
		return failed_with(netns_errno, "a ready network namespace");
	return setns(netns_fd, CLONE_NEWNET) < 0 ? "setns" : NULL;
}

static const char *lo_up(void)
{
	struct ifreq request = { .ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING };
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		return "socket";
	return ioctl(fd, SIOCSIFFLAGS, &request) < 0 ? "ioctl SIOCSIFFLAGS lo" : NULL;
}

#define LIFETIME(name, flags) { name, measure_lifetime, flags, NULL, NULL }
#define INSIDE(name, flags, prepare, timed) { name, measure_inside, flags, prepare, timed }

static const struct floor floors[] = {
	{ "vfork_exec", measure_exec, CLONE_VFORK, NULL, NULL },
	{ "fork_exec", measure_exec, 0, NULL, NULL },
	LIFETIME("clone.none", 0),
	LIFETIME("clone.user", CLONE_NEWUSER),
	LIFETIME("clone.mnt", CLONE_NEWNS),
	LIFETIME("clone.pid", CLONE_NEWPID),
	LIFETIME("clone.net", CLONE_NEWNET),
	LIFETIME("clone.ipc", CLONE_NEWIPC),
	LIFETIME("clone.uts", CLONE_NEWUTS),
	LIFETIME("clone.cgroup", CLONE_NEWCGROUP),
	LIFETIME("clone.time", CLONE_NEWTIME),
	LIFETIME("clone.all_but_net", ALL_BUT_NET),
	LIFETIME("clone.all", ALL_BUT_NET | CLONE_NEWNET),
	INSIDE("seccomp_load.linear", 0, NULL, load_linear),
	INSIDE("seccomp_load.tree", 0, NULL, load_tree),
	INSIDE("overlay_mount", CLONE_NEWNS, in_scratch, mount_overlay),
	INSIDE("proc_mount", CLONE_NEWNS | CLONE_NEWPID, in_scratch, mount_proc),
	INSIDE("tmpfs_mount", CLONE_NEWNS, in_scratch, mount_tmpfs),
	INSIDE("pivot_umount", CLONE_NEWNS, enter_new_root, pivot_and_umount),
	INSIDE("netns_create", 0, NULL, create_netns),
	INSIDE("netns_setns", 0, NULL, enter_netns),
	INSIDE("lo_up", CLONE_NEWNET, NULL, lo_up),
};

/* --- set-up, once -------------------------------------------------------------------------- */

static int write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_CLOEXEC);
	ssize_t done;

	if (fd < 0)
		return -1;
	done = write(fd, text, strlen(text));
	close(fd);
	return done < 0 ? -1 : 0;
}

static const char *own_mount_namespace(void)
{
	char uid_map[32], gid_map[32];

	if (unshare(CLONE_NEWNS) == 0)
		return NULL;
	snprintf(uid_map, sizeof uid_map, "0 %u 1", geteuid());
	snprintf(gid_map, sizeof gid_map, "0 %u 1", getegid());
	if (unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0)
		return "unshare CLONE_NEWUSER";
	if (write_file("/proc/self/setgroups", "deny") || write_file("/proc/self/uid_map", uid_map))
		return "uid_map";
	return write_file("/proc/self/gid_map", gid_map) ? "gid_map" : NULL;
}

static const char *make_scratch(const char *directory)
{
	const char *step = own_mount_namespace();

	if (step)
		return step;
	if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
		return "mount MS_PRIVATE";
	if (mount("tmpfs", directory, "tmpfs", MS_NOSUID | MS_NODEV, NULL) < 0 || chdir(directory) < 0)
		return "mount tmpfs on SCRATCH";
	if (mkdir("lower", 0755) || mkdir("upper", 0755) || mkdir("work", 0755) || mkdir("target", 0755))
		return "mkdir";
	return NULL;
}

/* The descriptor keeps the namespace; the server moves on to another, so that it never "enters"
 * the one it is in. The way back to the host's is closed without root, and nobody needs it. */
static void open_netns(void)
{
	if (unshare(CLONE_NEWNET) == 0)
		netns_fd = open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
	if (netns_fd < 0 || unshare(CLONE_NEWNET) < 0)
		netns_errno = errno;
}

/* No file, no program: the kernel then refuses it with EINVAL. */
static struct sock_fprog read_filter(const char *path)
{
	struct sock_fprog program = { .filter = calloc(BPF_MAXINSNS, sizeof *program.filter) };
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t size = read(fd, program.filter, BPF_MAXINSNS * sizeof *program.filter);

	program.len = (unsigned short)(size > 0 ? (size_t)size / sizeof *program.filter : 0);
	close(fd);
	return program;
}

/* --- the server ---------------------------------------------------------------------------- */

static void answer(const struct floor *floor, int count, useconds_t gap_us)
{
	const char *step = NULL;
	double us;
	int error = 0;

	printf("{\"us\": [");
	for (int i = 0; i < count && !step; i++) {
		if (gap_us)
			usleep(gap_us);
		*report = (struct report){ 0 };
		step = floor->measure(floor, &us);
		error = errno;
		if (!step)
			printf("%s%.2f", i ? ", " : "", us);
	}
	printf("], \"step\": \"%s\", \"errno\": %d}\n", step ? step : "", step ? error : 0);
}

static void serve(char *line)
{
	char name[64];
	int count = 0;
	unsigned gap_us = 0;

	if (sscanf(line, "%63s %d %u", name, &count, &gap_us) == 3)
		for (size_t i = 0; i < sizeof floors / sizeof floors[0]; i++)
			if (strcmp(name, floors[i].name) == 0) {
				answer(&floors[i], count, gap_us);
				return;
			}
	printf("{\"error\": \"want: NAME COUNT GAP_US\"}\n");
}

int main(int argc, char **argv)
{
	char line[256];

	if (argc != 5) {
		fprintf(stderr, "usage: floors SCRATCH TRUE LINEAR TREE\n");
		return 2;
	}
	true_path = argv[2];
	linear = read_filter(argv[3]);
	tree = read_filter(argv[4]);
	report = mmap(NULL, sizeof *report, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (report == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); /* inherited; loading a filter requires it */
	scratch_failed = make_scratch(argv[1]);
	scratch_errno = errno;
	open_netns();
	/* a full buffer must not be written in the middle of a block */
	setvbuf(stdout, NULL, _IOFBF, 1 << 16);
	while (fgets(line, sizeof line, stdin)) {
		serve(line);
		fflush(stdout);
	}
	return 0;
}
