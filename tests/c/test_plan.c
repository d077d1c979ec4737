/* The validators accept the sample and reject every single way of bending it. */
#include "check.h"
#include "sample.h"

#include <stdlib.h>

static struct sample s;
static struct sample_request r;
static struct sbx_error err;

static int plan_ok(void)
{
	return sbx_plan_check(&s, sizeof s, &err) == 0;
}

static int request_ok(void)
{
	return sbx_request_check(&r, sizeof r, &err) == 0;
}

/* Bend one field, expect a refusal at `section`, restore. */
#define REJECTS(field, value, section)                                        \
	do {                                                                  \
		sample_plan(&s);                                              \
		(field) = (value);                                            \
		CHECK(!plan_ok());                                            \
		CHECK(err.stage == SBX_STAGE_PLAN && err.index == (section)); \
		CHECK(err.err == EINVAL);                                     \
	} while (0)

static void accepts_samples(void)
{
	sample_plan(&s);
	CHECK(plan_ok());
	sample_request(&r);
	CHECK(request_ok());
}

static void rejects_headers(void)
{
	REJECTS(s.plan.magic, 0, 1);
	REJECTS(s.plan.layout, 99, 1);
	REJECTS(s.plan.size, sizeof s - 1, 1);
	REJECTS(s.plan.namespaces, CLONE_NEWPID | CLONE_NEWNS, 2);
	REJECTS(s.plan.namespaces, ~0ULL, 2);
	REJECTS(s.plan.flags, 1024, 2);
	REJECTS(s.plan.uid_map, 0, 3);
	REJECTS(s.plan.hostname, sizeof s, 3);
	REJECTS(s.plan.hostname, 4, 3); /* into the header */
	REJECTS(s.plan.time_offsets, ~0U, 3);
	sample_plan(&s);
	CHECK(sbx_plan_check(&s, 16, &err) < 0);
	CHECK(sbx_plan_check((char *)&s + 1, sizeof s - 1, &err) < 0);
}

static void rejects_lists(void)
{
	REJECTS(s.plan.nodes.count, SBX_MAX_ITEMS + 1, 4);
	REJECTS(s.plan.nodes.off, 3, 4);
	REJECTS(s.plan.nodes.off, sizeof s, 4);
	REJECTS(s.nodes[0].kind, 9, 4);
	REJECTS(s.nodes[0].mode, 010000, 4);
	REJECTS(s.nodes[1].size, sizeof s, 4);
	REJECTS(s.nodes[1].size, 3, 4); /* no NUL behind the content */
	REJECTS(s.mounts[1].kind, 0, 5);
	REJECTS(s.mounts[1].flags, 16, 5);
	REJECTS(s.mounts[1].flags, SBX_MOUNT_BOUNDED, 5);
	REJECTS(s.mounts[1].target, 0, 5);
	REJECTS(s.mounts[1].attrs, 1U << 31, 5);
	REJECTS(s.mounts[1].source, s.mounts[1].target, 5);
	REJECTS(s.mounts[1].flags, SBX_MOUNT_LATE, 5);
	REJECTS(s.mounts[3].source, 0, 5);
	REJECTS(s.mounts[3].attrs, MOUNT_ATTR_IDMAP, 5); /* without maps */
	REJECTS(s.mounts[2].options, sizeof s, 5);
	REJECTS(s.mounts[2].lowers, 1, 5);		      /* no overlay */
	REJECTS(s.mounts[0].options, s.mounts[2].options, 5); /* one that is written to has its own */
	REJECTS(s.plan.flags, SBX_PLAN_OVERLAY_ROOT, 5);      /* and any other needs some */
	REJECTS(s.mounts[0].parent, 1, 5);
	REJECTS(s.mounts[3].parent, 4, 5);
	REJECTS(s.mounts[0].lower, 2, 5);
	REJECTS(s.mounts[0].lowers, 2, 5);
	REJECTS(s.mounts[0].lowers, ~0U, 5);
	REJECTS(s.mounts[0].kind, SBX_MOUNT_SCRATCH, 5); /* no root */
	REJECTS(s.plan.flags, SBX_PLAN_WRITABLE_ROOT, 5);
	REJECTS(s.plan.flags, 0, 5); /* what is carried, and where to? */
	REJECTS(s.plan.carried.count, 600, 5);
	REJECTS(s.plan.carried.off, s.plan.hostname, 5); /* not absolute */
	REJECTS(s.plan.lowers.count, SBX_MAX_ITEMS + 1, 5);
	REJECTS(s.lowers[0].source, s.plan.hostname, 5);
	REJECTS(s.lowers[0].gid_map, 0, 5); /* a map for users only */
	REJECTS(s.rlimits[0].resource, 99, 6);
	REJECTS(s.rlimits[0].soft, 21, 6);
	REJECTS(s.plan.filter.count, SBX_MAX_FILTER + 1, 6);
	REJECTS(s.plan.masks.count, 600, 6);
	REJECTS(s.rules[0].path, s.plan.hostname, 6); /* not absolute */
}

/* Any single byte changed: accepted or refused, but never read out of bounds (ASan watches). */
static void survives_every_byte(void)
{
	for (size_t i = 0; i < sizeof s; i++)
		for (int bit = 0; bit < 8; bit++) {
			void *copy = malloc(sizeof s);
			sample_plan(&s);
			CHECK(copy != NULL);
			if (!copy)
				return;
			memcpy(copy, &s, sizeof s);
			((unsigned char *)copy)[i] ^= (unsigned char)(1 << bit);
			(void)sbx_plan_check(copy, sizeof s, &err);
			free(copy);
		}
	CHECK(1);
}

#define REJECTS_REQUEST(field, value, section)                                   \
	do {                                                                     \
		sample_request(&r);                                              \
		(field) = (value);                                               \
		CHECK(!request_ok());                                            \
		CHECK(err.stage == SBX_STAGE_REQUEST && err.index == (section)); \
	} while (0)

static void rejects_requests(void)
{
	REJECTS_REQUEST(r.request.magic, SBX_PLAN_MAGIC, 1);
	REJECTS_REQUEST(r.request.flags, 256, 1);
	REJECTS_REQUEST(r.request.argv.count, 0, 2);
	REJECTS_REQUEST(r.request.argv.count, 400, 2);
	REJECTS_REQUEST(r.request.paths.off, sizeof r, 2);
	REJECTS_REQUEST(r.request.cwd, 0, 2);
	REJECTS_REQUEST(r.request.umask, 01000, 2);
	REJECTS_REQUEST(r.request.stdio[0], SBX_STDIO_STDOUT, 3);
	REJECTS_REQUEST(r.request.pass.count, SBX_MAX_PASS + 1, 3);
	REJECTS_REQUEST(r.files[0].mode, 04755, 4);
	REJECTS_REQUEST(r.files[0].size, 99999, 4);
	REJECTS_REQUEST(r.request.stdio[1], SBX_STDIO_LOG + 1, 3);
	REJECTS_REQUEST(r.request.stdio[1], SBX_STDIO_LOG, 3); /* only of what is detached */
	REJECTS_REQUEST(r.request.rows, 65536, 3);
	REJECTS_REQUEST(r.request.columns, 65536, 3);
	REJECTS_REQUEST(r.request.rlimits.count, 1, 5); /* at offset 0: nowhere */
	REJECTS_REQUEST(r.request.layers.count, 1, 6);
	REJECTS_REQUEST(r.request.layers, ((struct sbx_span){ 1, 1 }), 6); /* not aligned */
	REJECTS_REQUEST(r.request.layers, ((struct sbx_span){ sizeof r.request, SBX_MAX_LAYERS + 1 }), 6);
	REJECTS_REQUEST(r.request.rlimits.count, SBX_MAX_ITEMS + 1, 5);
}

static void accepts_requests_of_living_sandboxes(void)
{
	sample_request(&r);
	r.request.flags = SBX_REQUEST_DETACHED | SBX_REQUEST_KEEP_STDIN;
	r.request.stdio[1] = r.request.stdio[2] = SBX_STDIO_LOG;
	r.request.rows = r.request.columns = 65535;
	CHECK(request_ok());
	r.request.stdio[0] = SBX_STDIO_LOG; /* nothing can be read from it */
	CHECK(!request_ok() && err.index == 3);
	struct sbx_request none = {
		.magic = SBX_REQUEST_MAGIC, .layout = SBX_LAYOUT, .size = sizeof none, .flags = SBX_REQUEST_SANDBOX
	};
	CHECK(sbx_request_check(&none, sizeof none, &err) == 0);
	none.flags = 0;
	CHECK(sbx_request_check(&none, sizeof none, &err) < 0);
}

static void checks_limits_of_requests(void)
{
	struct {
		struct sample_request r;
		struct sbx_rlimit limits[2];
	} more;

	sample_request(&more.r);
	more.r.request.size = sizeof more;
	more.r.request.rlimits = (struct sbx_span){ SAMPLE_OFF(typeof(more), limits), 2 };
	more.limits[0] = (struct sbx_rlimit){ 7, 0, 10, 20 };
	more.limits[1] = (struct sbx_rlimit){ 6, 0, 20, 20 };
	CHECK(sbx_request_check(&more, sizeof more, &err) == 0);
	more.limits[1].soft = 21;
	CHECK(sbx_request_check(&more, sizeof more, &err) < 0 && err.index == 5);
	more.limits[1] = (struct sbx_rlimit){ 16, 0, 1, 1 };
	CHECK(sbx_request_check(&more, sizeof more, &err) < 0 && err.index == 5);
	more.r.request.rlimits.off++; /* not aligned */
	CHECK(sbx_request_check(&more, sizeof more, &err) < 0);
}

int main(void)
{
	RUN(accepts_samples);
	RUN(rejects_headers);
	RUN(rejects_lists);
	RUN(survives_every_byte);
	RUN(rejects_requests);
	RUN(accepts_requests_of_living_sandboxes);
	RUN(checks_limits_of_requests);
	return check_status();
}
