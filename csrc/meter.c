/*
 * meter.c - what a control group has counted. Its files are opened once and read before and after a
 * command. The kernel's cgroup-v2.rst; cgroup-v1/memory.rst, pids.rst, cpuacct.rst, blkio-controller.rst.
 *
 * Shared by the helper, after clone, and the host.
 */
#include "util.h"

enum file { CPU, ALL_NS, SYSTEM_NS, PEAK, NOW, EVENTS, PIDS_PEAK, PIDS_EVENTS, IO, FILES };
_Static_assert((int)FILES == (int)SBX_GAUGES, "struct sbx_gauge has room for every file");

static const struct {
	uint32_t use;
	enum file file;
	const char *name;
} NAMES[] = {
	{ SBX_GROUP_SLOTS, CPU, "cpu.stat" },
	{ SBX_GROUP_SLOTS, PEAK, "memory.peak" },
	{ SBX_GROUP_SLOTS, NOW, "memory.current" },
	{ SBX_GROUP_SLOTS, EVENTS, "memory.events" },
	{ SBX_GROUP_SLOTS, PIDS_PEAK, "pids.peak" },
	{ SBX_GROUP_SLOTS, PIDS_EVENTS, "pids.events" },
	{ SBX_GROUP_SLOTS, IO, "io.stat" },
	{ SBX_GROUP_SLOTS_MEMORY, PEAK, "memory.max_usage_in_bytes" },
	{ SBX_GROUP_SLOTS_MEMORY, NOW, "memory.usage_in_bytes" },
	{ SBX_GROUP_SLOTS_MEMORY, EVENTS, "memory.oom_control" },
	{ SBX_GROUP_SLOTS_PIDS, PIDS_PEAK, "pids.peak" },
	{ SBX_GROUP_SLOTS_PIDS, PIDS_EVENTS, "pids.events" },
	{ SBX_GROUP_SLOTS_CPUACCT, ALL_NS, "cpuacct.usage" },
	{ SBX_GROUP_SLOTS_CPUACCT, SYSTEM_NS, "cpuacct.usage_sys" },
	{ SBX_GROUP_SLOTS_BLKIO, IO, "blkio.throttle.io_service_bytes" },
};

void sbx_gauge_init(struct sbx_gauge *g)
{
	memset(g, 0, sizeof *g);
	for (int i = 0; i < FILES; i++)
		g->fd[i] = -1;
}

/* Open what this kernel has of the files of one directory. 0 or -errno. */
long sbx_gauge_open(struct sbx_gauge *g, int dir, uint32_t use)
{
	for (size_t i = 0; i < SBX_COUNT(NAMES); i++) {
		if (NAMES[i].use != use)
			continue;
		int *fd = &g->fd[NAMES[i].file];
		long ret = -EACCES;
		if (NAMES[i].file == PEAK) /* which can be set back, since Linux 6.12 or in version 1 */
			ret = sbx_sys(SYS_openat, dir, NAMES[i].name, O_RDWR | O_CLOEXEC);
		if (ret < 0)
			ret = sbx_sys(SYS_openat, dir, NAMES[i].name, O_RDONLY | O_CLOEXEC);
		if (ret == -ENOENT)
			continue;
		if (ret < 0)
			return ret;
		sbx_close(*fd);
		*fd = (int)ret;
		if (NAMES[i].file == EVENTS)
			g->polls = use == SBX_GROUP_SLOTS;
	}
	return 0;
}

void sbx_gauge_close(struct sbx_gauge *g)
{
	for (int i = 0; i < FILES; i++) {
		sbx_close(g->fd[i]);
		g->fd[i] = -1;
	}
}

/* The sum of the numbers behind each `key` that begins a word. */
static uint64_t sum_of(const char *text, const char *key)
{
	size_t length = strlen(key);
	uint64_t sum = 0;

	for (const char *at = text; *at; at++) {
		if ((at > text && at[-1] != ' ' && at[-1] != '\n') || strncmp(at, key, length) != 0)
			continue;
		uint64_t value = 0;
		for (at += length; *at >= '0' && *at <= '9'; at++)
			value = value * 10 + (uint64_t)(*at - '0');
		sum += value;
		if (!*at || !length)
			break;
	}
	return sum;
}

static bool read_text(int fd, char *text, size_t size)
{
	long n = fd < 0 ? -EBADF : sbx_sys(SYS_pread64, fd, text, size - 1, 0);

	text[n < 0 ? 0 : n] = '\0';
	return n >= 0;
}

static uint64_t number_in(int fd)
{
	char text[64];

	return read_text(fd, text, sizeof text) ? sum_of(text, "") : 0;
}

static void set(struct sbx_counts *c, enum sbx_meter meter, uint64_t value)
{
	c->value[meter] = value;
	c->known |= 1u << meter;
}

static void read_cpu(const struct sbx_gauge *g, char *text, size_t size, struct sbx_counts *c)
{
	if (read_text(g->fd[CPU], text, size)) {
		set(c, SBX_METER_CPU_USER, sum_of(text, "user_usec "));
		set(c, SBX_METER_CPU_SYSTEM, sum_of(text, "system_usec "));
	} else if (read_text(g->fd[ALL_NS], text, size)) {
		/* only the sum is exact; what is the kernel's share of it was seen at clock ticks, and may be more */
		uint64_t all = sum_of(text, "") / 1000;
		uint64_t kernel = read_text(g->fd[SYSTEM_NS], text, size) ? sum_of(text, "") / 1000 : 0;
		set(c, SBX_METER_CPU_USER, all - kernel);
		set(c, SBX_METER_CPU_SYSTEM, kernel);
	}
}

/* Everything as it stands now. */
static void read_all(const struct sbx_gauge *g, struct sbx_counts *c)
{
	char text[4096];

	memset(c, 0, sizeof *c);
	read_cpu(g, text, sizeof text, c);
	if (read_text(g->fd[PEAK], text, sizeof text))
		set(c, SBX_METER_MEMORY, sum_of(text, ""));
	if (read_text(g->fd[EVENTS], text, sizeof text))
		set(c, SBX_METER_OOM_KILLS, sum_of(text, "oom_kill "));
	if (read_text(g->fd[PIDS_PEAK], text, sizeof text))
		set(c, SBX_METER_PIDS, sum_of(text, ""));
	if (read_text(g->fd[PIDS_EVENTS], text, sizeof text))
		set(c, SBX_METER_PIDS_REFUSED, sum_of(text, "max "));
	if (read_text(g->fd[IO], text, sizeof text)) {
		set(c, SBX_METER_IO_READ, sum_of(text, "rbytes=") + sum_of(text, "Read "));
		set(c, SBX_METER_IO_WRITTEN, sum_of(text, "wbytes=") + sum_of(text, "Write "));
	}
}

/* From here on it counts for the next command. */
void sbx_gauge_begin(struct sbx_gauge *g)
{
	g->resets = g->fd[PEAK] >= 0 && sbx_sys(SYS_pwrite64, g->fd[PEAK], "0", 1, 0) == 1;
	g->base = number_in(g->fd[NOW]);
	read_all(g, &g->start);
	if (!g->begun)
		g->birth = g->start;
	g->begun = 1;
}

/*
 * What has happened since, without `own` processes of ours. A peak that was there before says nothing about
 * this command: then it is not known. What the group already held (pages of files that earlier commands read)
 * is not this command's.
 */
void sbx_gauge_end(const struct sbx_gauge *g, uint32_t own, struct sbx_counts *c)
{
	const struct sbx_counts *s = &g->start;

	read_all(g, c);
	for (int i = 0; i < SBX_METERS; i++) {
		uint64_t *value = &c->value[i], now = *value;
		*value = now - s->value[i];
		if (i == SBX_METER_MEMORY)
			*value = now > g->base ? now - g->base : 0;
		if (i == SBX_METER_PIDS)
			*value = now > own ? now - own : 0;
		bool stale = i == SBX_METER_MEMORY ? !g->resets : i == SBX_METER_PIDS;
		if (stale && now <= s->value[i] && s->value[i])
			c->known &= ~(1u << i);
	}
	uint64_t *user = &c->value[SBX_METER_CPU_USER];
	if ((int64_t)*user < 0) {
		c->value[SBX_METER_CPU_SYSTEM] += *user;
		*user = 0;
	}
}

/* CPU time since the beginning, us. */
uint64_t sbx_gauge_cpu(const struct sbx_gauge *g)
{
	struct sbx_counts c = { 0 };
	char text[2048];

	read_cpu(g, text, sizeof text, &c);
	uint64_t sum = c.value[SBX_METER_CPU_USER] + c.value[SBX_METER_CPU_SYSTEM];
	return sum - g->start.value[SBX_METER_CPU_USER] - g->start.value[SBX_METER_CPU_SYSTEM];
}

int sbx_gauge_has_cpu(const struct sbx_gauge *g)
{
	return g->fd[CPU] >= 0 || g->fd[ALL_NS] >= 0;
}

/* Whether processes were killed for want of memory since the beginning. */
int sbx_gauge_out_of_memory(const struct sbx_gauge *g)
{
	char text[1024];

	return read_text(g->fd[EVENTS], text, sizeof text) &&
	       sum_of(text, "oom_kill ") > g->start.value[SBX_METER_OOM_KILLS];
}

/* What polls with POLLPRI when that may have happened (version 2), or -1. */
int sbx_gauge_events(const struct sbx_gauge *g)
{
	return g->polls ? g->fd[EVENTS] : -1;
}

/* Whether a small command could no longer be measured, after the last one; or more is `left` than that. */
int sbx_gauge_worn(const struct sbx_gauge *g, uint64_t left)
{
	const uint64_t *at = g->birth.value;

	return (!g->resets && number_in(g->fd[PEAK]) > at[SBX_METER_MEMORY] + (1u << 20)) ||
	       number_in(g->fd[PIDS_PEAK]) > at[SBX_METER_PIDS] + 8 || number_in(g->fd[NOW]) > left;
}
