/* What meter.c and watch.c read in the files of a control group: a directory of plain files stands for one. */
#include "check.h"
#include "util.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/stat.h>

static char directory[64];
static int dir;

static void make_group(void)
{
	snprintf(directory, sizeof directory, "/tmp/sandboxcore-meter-XXXXXX");
	CHECK(mkdtemp(directory) != NULL);
	dir = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
	CHECK(dir >= 0);
}

/* As the kernel does it: the same file, another content. */
static void set(const char *name, const char *text)
{
	int fd = openat(dir, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);

	CHECK(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
	close(fd);
}

static void remove_group(void)
{
	const char *names[] = { "cpu.stat",
				"memory.peak",
				"memory.current",
				"memory.events",
				"pids.peak",
				"pids.events",
				"io.stat",
				"memory.max_usage_in_bytes",
				"cpuacct.usage",
				"cpuacct.usage_sys",
				"memory.oom_control",
				"blkio.throttle.io_service_bytes" };

	for (size_t i = 0; i < SBX_COUNT(names); i++)
		(void)unlinkat(dir, names[i], 0);
	close(dir);
	CHECK(rmdir(directory) == 0);
}

static void counts_differences(void)
{
	struct sbx_gauge g;
	struct sbx_counts c;

	make_group();
	set("cpu.stat", "usage_usec 30\nuser_usec 10\nsystem_usec 20\nnr_periods 5\n");
	set("memory.events", "low 0\nhigh 0\nmax 7\noom 2\noom_kill 1\noom_group_kill 9\n");
	set("pids.events", "max 3\n");
	set("io.stat",
	    "8:0 rbytes=100 wbytes=200 rios=1 wios=2 dbytes=0 dios=0\n8:16 rbytes=1 wbytes=2 rios=0 wios=0\n");
	sbx_gauge_init(&g);
	sbx_gauge_open(&g, dir, SBX_GROUP_SLOTS);
	sbx_gauge_begin(&g);
	set("cpu.stat", "usage_usec 90\nuser_usec 1010\nsystem_usec 20\nnr_periods 5\n");
	set("memory.events", "low 0\nhigh 0\nmax 7\noom 2\noom_kill 3\noom_group_kill 9\n");
	set("pids.events", "max 5\n");
	set("io.stat",
	    "8:0 rbytes=150 wbytes=200 rios=1 wios=2 dbytes=0 dios=0\n8:16 rbytes=1 wbytes=12 rios=0 wios=0\n");
	CHECK(sbx_gauge_cpu(&g) == 1000 && sbx_gauge_has_cpu(&g) && sbx_gauge_out_of_memory(&g));
	sbx_gauge_end(&g, 1, &c);
	CHECK(c.value[SBX_METER_CPU_USER] == 1000 && c.value[SBX_METER_CPU_SYSTEM] == 0);
	CHECK(c.value[SBX_METER_OOM_KILLS] == 2 && c.value[SBX_METER_PIDS_REFUSED] == 2);
	CHECK(c.value[SBX_METER_IO_READ] == 50 && c.value[SBX_METER_IO_WRITTEN] == 10);
	CHECK(!(c.known & 1u << SBX_METER_MEMORY) && !(c.known & 1u << SBX_METER_PIDS)); /* no such files */
	CHECK(sbx_gauge_events(&g) >= 0);
	sbx_gauge_close(&g);
	remove_group();
}

/* An empty io.stat is no io; a file that is not there is not known. */
static void tells_nothing_from_zero(void)
{
	struct sbx_gauge g;
	struct sbx_counts c;

	make_group();
	set("io.stat", "");
	sbx_gauge_init(&g);
	sbx_gauge_open(&g, dir, SBX_GROUP_SLOTS);
	sbx_gauge_begin(&g);
	sbx_gauge_end(&g, 1, &c);
	CHECK(c.known == (1u << SBX_METER_IO_READ | 1u << SBX_METER_IO_WRITTEN) && c.value[SBX_METER_IO_READ] == 0);
	CHECK(!sbx_gauge_has_cpu(&g) && !sbx_gauge_out_of_memory(&g) && sbx_gauge_events(&g) < 0);
	sbx_gauge_close(&g);
	remove_group();
}

/* Where the kernel cannot set a peak back (the file refuses to be written), an old one says nothing. */
static void an_old_peak_is_not_this_commands(void)
{
	struct sbx_gauge g;
	struct sbx_counts c;

	make_group();
	set("memory.peak", "5000000\n");
	set("memory.current", "1000\n");
	set("pids.peak", "4\n");
	sbx_gauge_init(&g);
	sbx_gauge_open(&g, dir, SBX_GROUP_SLOTS);
	close(g.fd[3]);
	g.fd[3] = openat(dir, "memory.peak", O_RDONLY | O_CLOEXEC); /* as root may write to any file */
	sbx_gauge_begin(&g);
	CHECK(!g.resets);
	sbx_gauge_end(&g, 1, &c);
	CHECK(!(c.known & 1u << SBX_METER_MEMORY) && !(c.known & 1u << SBX_METER_PIDS) && !sbx_gauge_worn(&g, 1000) &&
	      sbx_gauge_worn(&g, 999));
	set("memory.peak", "9000000\n");
	set("pids.peak", "6\n");
	sbx_gauge_end(&g, 1, &c);
	CHECK(c.known & 1u << SBX_METER_MEMORY && c.value[SBX_METER_MEMORY] == 9000000 - 1000);
	CHECK(c.known & 1u << SBX_METER_PIDS && c.value[SBX_METER_PIDS] == 5);
	CHECK(sbx_gauge_worn(&g, UINT64_MAX));
	sbx_gauge_close(&g);
	remove_group();
}

static void version_1(void)
{
	struct sbx_gauge g;
	struct sbx_counts c;

	make_group();
	set("cpuacct.usage", "6000000\n");
	set("cpuacct.usage_sys", "1000000\n");
	set("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n");
	set("memory.max_usage_in_bytes", "123\n");
	set("blkio.throttle.io_service_bytes", "8:0 Read 4096\n8:0 Write 512\n8:0 Total 4608\nTotal 4608\n");
	sbx_gauge_init(&g);
	sbx_gauge_open(&g, dir, SBX_GROUP_SLOTS_CPUACCT);
	sbx_gauge_open(&g, dir, SBX_GROUP_SLOTS_MEMORY);
	sbx_gauge_open(&g, dir, SBX_GROUP_SLOTS_BLKIO);
	sbx_gauge_begin(&g);
	CHECK(g.resets);
	set("cpuacct.usage", "10000000\n");
	set("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n");
	set("memory.max_usage_in_bytes", "77\n");
	set("blkio.throttle.io_service_bytes", "8:0 Read 8192\n8:0 Write 512\n8:0 Total 8704\nTotal 8704\n");
	sbx_gauge_end(&g, 1, &c);
	CHECK(c.value[SBX_METER_CPU_USER] == 4000 && c.value[SBX_METER_CPU_SYSTEM] == 0);
	CHECK(c.value[SBX_METER_OOM_KILLS] == 1 && c.value[SBX_METER_MEMORY] == 77);
	CHECK(c.value[SBX_METER_IO_READ] == 4096 && c.value[SBX_METER_IO_WRITTEN] == 0);
	CHECK(sbx_gauge_events(&g) < 0); /* an eventfd tells, not this file */
	sbx_gauge_close(&g);
	remove_group();
}

/* Looked at when it may be up on all CPUs at once, and not before. */
static void watches_cpu_time(void)
{
	struct sbx_gauge g;
	struct sbx_watch w;

	make_group();
	set("cpu.stat", "user_usec 1000\nsystem_usec 500\n");
	sbx_gauge_init(&g);
	CHECK(sbx_gauge_open(&g, dir, SBX_GROUP_SLOTS) == 0);
	sbx_watch_begin(&w, &g, -1, 60000000);
	set("cpu.stat", "user_usec 40001000\nsystem_usec 10000500\n");
	CHECK(!sbx_watch_cpu(&w) && w.cpus > 0);
	uint64_t left = sbx_watch_next(&w) - sbx_now();
	CHECK(left <= 10000000000 / w.cpus && left > 5000000000 / w.cpus);
	set("cpu.stat", "user_usec 50001000\nsystem_usec 10000500\n");
	CHECK(!sbx_watch_cpu(&w)); /* not asked yet */
	w.cpu_look = 0;
	CHECK(sbx_watch_cpu(&w));
	sbx_watch_begin(&w, &g, -1, 0);
	CHECK(!sbx_watch_cpu(&w) && sbx_watch_next(&w) == 0);
	sbx_watch_begin(&w, NULL, -1, 1);
	CHECK(!sbx_watch_cpu(&w) && !sbx_watch_memory(&w, 1) && sbx_watch_event(&w).fd < 0);
	sbx_gauge_close(&g);
	remove_group();
}

/* Version 1 tells all groups below a full one, a moment before it kills in one of them. */
static void watches_memory(void)
{
	struct sbx_gauge g;
	struct sbx_watch w;
	uint64_t told = 1;
	int event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);

	make_group();
	set("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n");
	sbx_gauge_init(&g);
	CHECK(sbx_gauge_open(&g, dir, SBX_GROUP_SLOTS_MEMORY) == 0);
	CHECK(write(event, &told, sizeof told) == sizeof told);
	sbx_watch_begin(&w, &g, event, 0);
	CHECK(read(event, &told, sizeof told) < 0 && errno == EAGAIN); /* what was told before is no news */
	CHECK(sbx_watch_event(&w).fd == event && sbx_watch_next(&w) == 0);
	CHECK(!sbx_watch_memory(&w, 0) && !sbx_watch_memory(&w, 1));
	CHECK(sbx_watch_next(&w) != 0); /* not yet; perhaps not at all */
	set("memory.oom_control", "oom_kill_disable 0\nunder_oom 1\noom_kill 2\n");
	CHECK(sbx_watch_memory(&w, 0));
	w.memory_until = 0;
	CHECK(!sbx_watch_memory(&w, 0) && sbx_watch_next(&w) == 0);
	sbx_gauge_close(&g);
	close(event);
	remove_group();
}

/* What cannot be read is no kernel that has it not. */
static void says_what_cannot_be_opened(void)
{
	struct sbx_gauge g;

	make_group();
	CHECK(symlinkat("memory.peak", dir, "memory.peak") == 0);
	sbx_gauge_init(&g);
	CHECK(sbx_gauge_open(&g, dir, SBX_GROUP_SLOTS) == -ELOOP);
	sbx_gauge_close(&g);
	remove_group();
}

int main(void)
{
	RUN(watches_cpu_time);
	RUN(watches_memory);
	RUN(says_what_cannot_be_opened);
	RUN(counts_differences);
	RUN(tells_nothing_from_zero);
	RUN(an_old_peak_is_not_this_commands);
	RUN(version_1);
	return check_status();
}
