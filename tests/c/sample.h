/* sample.h - a small valid plan and request, for tests to bend. */
#ifndef SAMPLE_H
#define SAMPLE_H

#include "plan.h"
#include "sys.h"

#include <linux/filter.h>
#include <string.h>

struct sample {
	struct sbx_plan plan;
	struct sbx_node nodes[3];
	struct sbx_mount mounts[4];
	struct sbx_lower lowers[1];
	struct sbx_rlimit rlimits[1];
	struct sbx_rule rules[1];
	struct sock_filter filter[1];
	char strings[512];
};

struct sample_request {
	struct sbx_request request;
	struct sbx_file files[1];
	int32_t pass[2];
	char strings[256];
};

#define SAMPLE_OFF(type, field) ((uint32_t)offsetof(type, field))

/* Append a string (and one more NUL) to an arena's strings; returns its offset. */
static inline uint32_t sample_text(char *strings, uint32_t base, uint32_t *used, const char *text, size_t len)
{
	uint32_t at = *used;

	memcpy(strings + at, text, len);
	*used += (uint32_t)len + 1;
	return base + at;
}

static inline void sample_plan(struct sample *s)
{
	uint32_t used = 0, base = SAMPLE_OFF(struct sample, strings);
#define TEXT(literal) sample_text(s->strings, base, &used, literal, sizeof(literal) - 1)

	memset(s, 0, sizeof *s);
	s->plan = (struct sbx_plan){
		.magic = SBX_PLAN_MAGIC,
		.layout = SBX_LAYOUT,
		.size = sizeof *s,
		.flags = SBX_PLAN_POOLED_NET | SBX_PLAN_OVERLAY_ROOT | SBX_PLAN_WRITABLE_ROOT | SBX_PLAN_LAYERS,
		.namespaces = CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNS,
		.uid = 1000,
		.gid = 1000,
		.uid_map = TEXT("0 100000 65536"),
		.gid_map = TEXT("0 100000 65536"),
		.hostname = TEXT("sandbox"),
		.root_options = TEXT("mode\0"
				     "0755\0"),
		.nodes = { SAMPLE_OFF(struct sample, nodes), 3 },
		.mounts = { SAMPLE_OFF(struct sample, mounts), 4 },
		.lowers = { SAMPLE_OFF(struct sample, lowers), 1 },
		.rlimits = { SAMPLE_OFF(struct sample, rlimits), 1 },
		.rules = { SAMPLE_OFF(struct sample, rules), 1 },
		.filter = { SAMPLE_OFF(struct sample, filter), 1 },
	};
	s->plan.masks = (struct sbx_span){ TEXT("kallsyms\0keys"), 2 };
	s->plan.carried = (struct sbx_span){ TEXT("/proc\0/dev"), 2 };
	s->nodes[0] = (struct sbx_node){ SBX_NODE_DIR, TEXT("/proc"), 0755, 0, 0 };
	s->nodes[1] = (struct sbx_node){ SBX_NODE_FILE, TEXT("/etc"), 0644, TEXT("text"), 4 };
	s->nodes[2] = (struct sbx_node){ SBX_NODE_SYMLINK, TEXT("/bin"), 0777, TEXT("usr/bin"), 7 };
	s->mounts[0] = (struct sbx_mount){ .kind = SBX_MOUNT_OVERLAY, .target = TEXT("/"), .lowers = 1 };
	s->lowers[0] = (struct sbx_lower){ TEXT("/srv"), TEXT("0 100000 65536"), TEXT("0 100000 65536") };
	s->mounts[1] = (struct sbx_mount){ .kind = SBX_MOUNT_PROC, .target = TEXT("/proc") };
	s->mounts[2] = (struct sbx_mount){ .kind = SBX_MOUNT_TMPFS,
					   .target = TEXT("/tmp"),
					   .options = TEXT("size\0"
							   "1m\0") };
	s->mounts[3] = (struct sbx_mount){
		.kind = SBX_MOUNT_BIND,
		.flags = SBX_MOUNT_DIR | SBX_MOUNT_LATE,
		.source = TEXT("/usr"),
		.target = TEXT("/tmp/usr"),
		.parent = 1,
		.attrs = MOUNT_ATTR_RDONLY,
	};
	s->rlimits[0] = (struct sbx_rlimit){ 6, 0, 10, 20 };
	s->rules[0] = (struct sbx_rule){ TEXT("/"), 0, 1 };
#undef TEXT
}

static inline void sample_request(struct sample_request *s)
{
	uint32_t used = 0, base = SAMPLE_OFF(struct sample_request, strings);
#define TEXT(literal) sample_text(s->strings, base, &used, literal, sizeof(literal) - 1)

	memset(s, 0, sizeof *s);
	s->request = (struct sbx_request){
		.magic = SBX_REQUEST_MAGIC,
		.layout = SBX_LAYOUT,
		.size = sizeof *s,
		.files = { SAMPLE_OFF(struct sample_request, files), 1 },
		.pass = { SAMPLE_OFF(struct sample_request, pass), 2 },
		.umask = 022,
	};
	s->request.argv = (struct sbx_span){ TEXT("true\0-x"), 2 };
	s->request.paths = (struct sbx_span){ TEXT("/usr/bin/true"), 1 };
	s->request.cwd = TEXT("/workspace");
	s->files[0] = (struct sbx_file){ TEXT("/workspace/a"), 0644, TEXT("data"), 4 };
#undef TEXT
}

#endif
