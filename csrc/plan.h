/*
 * plan.h - the bytes that travel: plan, request and record.
 *
 * A plan says how every sandbox of one spec is built; Python compiles it once and C executes it as
 * often as asked. A request says what one command needs. A record is the answer. All three are flat
 * arenas: a header of fixed-width fields, arrays of fixed records, and strings, linked by 32-bit
 * offsets from the arena's start, never by pointers, so they can be checked once, hashed, cached,
 * mapped from a sealed memfd and fuzzed. Offset 0 means "none".
 *
 * This file is the only definition: Python fills the same structs through cffi.
 */
#ifndef SBX_PLAN_H
#define SBX_PLAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cdef-begin */
enum { SBX_PLAN_MAGIC = 0x50584253, SBX_REQUEST_MAGIC = 0x52584253, SBX_LAYOUT = 6 };

/* Upper bounds that keep every loop in the child short and every array on its stack. */
enum {
	SBX_MAX_ARENA = 64 << 20,
	SBX_MAX_ITEMS = 4194304,
	SBX_MAX_LATE = 64,
	SBX_MAX_PASS = 64,
	SBX_MAX_FILTER = 4096,
	SBX_MAX_INLINE = 32768,
	SBX_MAX_APPLIED = 262144,
	SBX_MAX_GROUPS = 32,	 /* descriptors for enum sbx_group_use */
	SBX_MAX_FDS = 104,	 /* of one message: those to pass, the groups', and a few */
	SBX_MAX_LAUNCHERS = 256, /* commands at once in one sandbox; more of them queue */
	SBX_MAX_FOLLOWERS = 16,	 /* of one detached command */
	SBX_MAX_LAYERS = 64,	 /* sealed ones below what is written to */
	SBX_MAX_BINDS = 64,	 /* that come while a sandbox runs */
};

/* Where a set-up can fail. Append only: a number never changes its meaning. */
enum sbx_stage {
	SBX_STAGE_NONE = 0,
	SBX_STAGE_HOST,	    /* pipes, descriptors or memory in the calling process */
	SBX_STAGE_SPAWNER,  /* the spawner could not be started or went away */
	SBX_STAGE_PLAN,	    /* malformed or unknown plan */
	SBX_STAGE_REQUEST,  /* malformed request */
	SBX_STAGE_USERNS,   /* the spawner's outer user namespace (rootless) */
	SBX_STAGE_TEMPLATE, /* the template's own mount namespace */
	SBX_STAGE_SOURCE,   /* mounts[index]: its source */
	SBX_STAGE_NODE,	    /* nodes[index] of the template's root */
	SBX_STAGE_MOUNT,    /* mounts[index]: its target or the mount itself */
	SBX_STAGE_ROOT,	    /* pivot_root and detaching the host's tree */
	SBX_STAGE_NETNS,    /* taking a network namespace from the pool */
	SBX_STAGE_CLONE,    /* clone3 of the sandbox's init */
	SBX_STAGE_IDMAP,    /* uid_map, gid_map */
	SBX_STAGE_INIT,	    /* init's own state: descriptors, identity, its loop */
	SBX_STAGE_LOOPBACK, /* bringing lo up */
	SBX_STAGE_HOSTNAME, /* sethostname */
	SBX_STAGE_PROC,	    /* masks[index] or readonly[index] below /proc */
	SBX_STAGE_NSLIMIT,  /* user.max_user_namespaces */
	SBX_STAGE_TIME,	    /* the time namespace */
	SBX_STAGE_FORK,	    /* vfork of the payload */
	SBX_STAGE_SESSION,  /* setsid, session keyring */
	SBX_STAGE_STDIO,    /* stdin, stdout, stderr and passed descriptors */
	SBX_STAGE_RLIMIT,   /* rlimits[index] */
	SBX_STAGE_CRED,	    /* groups, ids, capabilities, no_new_privs */
	SBX_STAGE_FILE,	    /* files[index] */
	SBX_STAGE_CWD,	    /* the working directory */
	SBX_STAGE_LANDLOCK, /* rules[index] or the ruleset */
	SBX_STAGE_SECCOMP,  /* loading the filter */
	SBX_STAGE_EXEC,	    /* execve of every candidate path */
	SBX_STAGE_RECORD,   /* reading back what was applied */
	SBX_STAGE_LAUNCHER, /* a living sandbox's launcher: its birth, its loop, its pumps */
	SBX_STAGE_PTY,	    /* the command's terminal */
	SBX_STAGE_CGROUP,   /* entering groups[index], or making a launcher's own */
	SBX_STAGE_COUNT,
};

struct sbx_error {
	int32_t stage;
	int32_t index;
	int32_t err;
	int32_t syscall; /* the failing call's number; only fault-injection builds fill it */
};

struct sbx_span {
	uint32_t off;
	uint32_t count;
};

enum sbx_node_kind { SBX_NODE_DIR = 1, SBX_NODE_FILE, SBX_NODE_SYMLINK };

/* A directory, file or symbolic link of the template's root, in order. */
struct sbx_node {
	uint32_t kind;
	uint32_t path; /* string */
	uint32_t mode;
	uint32_t data; /* content or link target, `size` bytes and a NUL */
	uint32_t size;
};

enum sbx_mount_kind {
	SBX_MOUNT_BIND = 1,
	SBX_MOUNT_MASK,
	SBX_MOUNT_TMPFS,
	SBX_MOUNT_PROC,
	SBX_MOUNT_DEVPTS,
	SBX_MOUNT_SCRATCH, /* a directory of the sandbox's one scratch tmpfs, owned by the payload */
	SBX_MOUNT_OVERLAY, /* lower directories, and what is written, in the scratch; the first mount may be the root */
};

enum sbx_mount_flags {
	SBX_MOUNT_DIR = 1,     /* bind: the source is a directory (else any other type) */
	SBX_MOUNT_CREATE = 2,  /* make missing mount points; the parent is a tmpfs of ours */
	SBX_MOUNT_LATE = 4,    /* bind or mask below a per-sandbox mount: attached in the sandbox */
	SBX_MOUNT_BOUNDED = 8, /* bind: of a file system that is as large as somebody has said */
};

/*
 * Binds and masks belong to the template, the other kinds are made fresh in each sandbox. The array
 * is sorted so that a parent comes before what lies below it. An overlay with options is one that nobody
 * writes to; they name its lower directories as the template parks them: overlay.c.
 */
struct sbx_mount {
	uint32_t kind;
	uint32_t flags;
	uint32_t source;  /* string: absolute host path without symbolic links (bind) */
	uint32_t target;  /* string: absolute path inside */
	uint32_t attrs;	  /* MOUNT_ATTR_* of mount_setattr(2) and fsmount(2) */
	uint32_t options; /* key NUL value NUL ... NUL, for fsconfig(2); a flag has an empty value. BIND: of the ext4 on
			   * the block device that its source is */
	uint32_t uid_map; /* strings: id map of an id-mapped bind, or 0 */
	uint32_t gid_map;
	uint32_t mode;	/* SCRATCH, OVERLAY: of the directory */
	uint32_t lower; /* OVERLAY: the first of its lower directories, and how many there are */
	uint32_t lowers;
	uint32_t parent; /* 1 + the index of the overlay that it lies on, with no mount between, or 0 */
};

/* A directory of the host that is a layer of an overlay. */
struct sbx_lower {
	uint32_t source;  /* string: as a bind's */
	uint32_t uid_map; /* strings: id map, or 0 */
	uint32_t gid_map;
};

struct sbx_rlimit {
	uint32_t resource;
	uint32_t reserved;
	uint64_t soft;
	uint64_t hard;
};

struct sbx_rule {
	uint32_t path;
	uint32_t reserved;
	uint64_t access; /* LANDLOCK_ACCESS_FS_* */
};

enum sbx_plan_flags {
	SBX_PLAN_POOLED_NET = 1,      /* take a ready network namespace */
	SBX_PLAN_LOOPBACK = 2,	      /* bring lo up in a fresh one */
	SBX_PLAN_DENY_SETGROUPS = 4,  /* rootless own-id map */
	SBX_PLAN_NO_ROOT_ID = 8,      /* uid 0 is not mapped: init keeps the payload's id */
	SBX_PLAN_FRESH_PROC = 16,     /* the template mounts a new proc; else it binds the host's */
	SBX_PLAN_FILTER_ONCE = 32,    /* init and launchers can live under the filter: commands inherit it */
	SBX_PLAN_OVERLAY_ROOT = 64,   /* mounts[0] is the root: of the template, */
	SBX_PLAN_WRITABLE_ROOT = 128, /* or of each sandbox */
	SBX_PLAN_LAYERS = 256,	      /* it has overlays that are written to */
	SBX_PLAN_BINDS = 512,	      /* more binds may come while it runs */
};

struct sbx_plan {
	uint32_t magic;
	uint32_t layout;
	uint32_t size;
	uint32_t flags;
	uint64_t namespaces; /* CLONE_NEW* for clone3 */
	uint32_t uid;	     /* the payload's, as seen inside */
	uint32_t gid;
	uint32_t uid_map; /* strings: as written to /proc/PID/uid_map */
	uint32_t gid_map;
	uint32_t hostname;
	uint32_t time_offsets;	  /* string for timens_offsets (may be empty), 0: no time namespace */
	uint32_t root_options;	  /* fsconfig lists: of the root tmpfs, */
	uint32_t scratch_options; /* of the scratch tmpfs */
	uint32_t node_uid;	  /* owner of the nodes, as the spawner sees it */
	uint32_t node_gid;
	struct sbx_span nodes;
	struct sbx_span mounts;
	struct sbx_span lowers;
	struct sbx_span carried;  /* paths: what the template has there is bound onto a writable root */
	struct sbx_span masks;	  /* strings, NUL separated: names below /proc, hidden if they exist */
	struct sbx_span readonly; /* likewise, made read-only if they exist */
	struct sbx_span rlimits;
	struct sbx_span rules;
	struct sbx_span filter; /* struct sock_filter */
	uint64_t landlock_fs;	/* handled LANDLOCK_ACCESS_FS_*; 0: no Landlock */
	uint64_t landlock_scoped;
	int32_t landlock_abi;
	int32_t fault_at; /* fault-injection builds: which call of the template fails */
};

enum sbx_stdio {
	SBX_STDIO_NULL = 0,
	SBX_STDIO_PASSED, /* the payload gets this very descriptor: a pipe's end */
	SBX_STDIO_STDOUT, /* stderr: the same as stdout */
	SBX_STDIO_RELAY,  /* a pipe, and the launcher copies between it and the descriptor that came */
	SBX_STDIO_LOG,	  /* a pipe, and the launcher copies it to the journal */
};

enum sbx_request_flags {
	SBX_REQUEST_RECORD = 1,	      /* read back what was applied and send it */
	SBX_REQUEST_SANDBOX = 2,      /* no command: a sandbox that stays and waits for some */
	SBX_REQUEST_PERSISTENT = 4,   /* it does not end with the host process */
	SBX_REQUEST_NOTIFY = 8,	      /* EXEC: tell when the program runs */
	SBX_REQUEST_DRY = 16,	      /* EXEC: everything but the execve */
	SBX_REQUEST_PTY = 32,	      /* EXEC: a terminal of the sandbox's own is stdin, stdout and stderr */
	SBX_REQUEST_DETACHED = 64,    /* EXEC: the command outlives whoever started it */
	SBX_REQUEST_KEEP_STDIN = 128, /* EXEC, detached: stdin is a pipe whose end the launcher lends out */
};

/* A file written by the payload's identity just before exec. */
struct sbx_file {
	uint32_t path;
	uint32_t mode;
	uint32_t data;
	uint32_t size;
};

struct sbx_request {
	uint32_t magic;
	uint32_t layout;
	uint32_t size; /* from here to `paths`: what differs from one command of a plan to the next */
	uint32_t flags;
	uint32_t stdio[3]; /* enum sbx_stdio */
	uint32_t umask;
	struct sbx_span argv;  /* NUL-terminated strings, one behind the other */
	struct sbx_span paths; /* candidates for execve, in order */
	uint64_t plan;	       /* the id under which the spawner knows the plan */
	uint64_t timeout_ns;   /* EXEC: from its receipt; 0: none */
	struct sbx_span env;
	struct sbx_span files;
	struct sbx_span pass;	 /* int32_t: the numbers that passed descriptors get */
	struct sbx_span rlimits; /* EXEC: instead of the plan's, if there are any */
	struct sbx_span groups;	 /* uint32_t: enum sbx_group_use of the last descriptors */
	uint64_t cpu_us;	 /* EXEC: of all its processes together; 0: no limit */
	uint32_t uid;		 /* EXEC: the command's identity, as seen inside */
	uint32_t gid;
	uint32_t rows; /* PTY */
	uint32_t columns;
	uint32_t cwd;
	int32_t fault_at;
	int32_t fault_errno;
	uint32_t reserved;
	struct sbx_span layers; /* SANDBOX: uint64_t: what it begins with, as they were put on the shelf */
};

/*
 * What a sandbox's overlays consist of, on top of what the plan names. A layer, and what is written now, has a
 * number in the sandbox that has it: a directory of the scratch, with "uINDEX" for each overlay. What it begins
 * with has the numbers from 1 on, what it writes to first 0.
 */
enum {
	SBX_LAYER_NEW = 1u << 30, /* added to a number: it comes with the message, as a descriptor */
	SBX_DROP_OLD = 1u << 16,  /* as `drops`: all that there was */
};
struct sbx_layers {
	uint32_t magic; /* SBX_REQUEST_MAGIC */
	uint32_t kind;	/* SBX_MESSAGE_LAYERS, SBX_MESSAGE_COPY */
	int32_t fault_at, fault_errno;
	uint32_t seal;	/* what was written until now comes back as a layer */
	uint32_t upper; /* the number of the directory to write to from now on; COPY: of the copy, 0 for none */
	uint32_t count, drops;
	uint32_t number[64]; /* the topmost first */
	uint32_t drop[64];   /* to be removed, once the overlays are without them */
};

/*
 * A layer as a stream. An entry is followed by its name, the target of a link, and extended attributes, each of them
 * "NAME\0", its uint32_t size, and its value. The first one is the layer's own directory and has no name.
 */
enum sbx_entry_kind {
	SBX_ENTRY_ENTER = 1, /* a directory; what is in it comes next */
	SBX_ENTRY_LEAVE,
	SBX_ENTRY_OTHER, /* anything else; after a file its data, if wanted */
	SBX_ENTRY_LINK,	 /* one more name of an entry that had this `ino` (only to the spawner) */
	SBX_ENTRY_DATA,	 /* `size` bytes, that belong to `offset` of the file */
};
struct sbx_entry {
	uint32_t kind;
	uint32_t mode;
	uint32_t uid;
	uint32_t gid;
	uint64_t ino; /* of what has several names, else 0 */
	int64_t size;
	int64_t offset;
	int64_t mtime; /* seconds since the epoch */
	uint32_t mtime_ns;
	uint32_t rdev;
	uint32_t name; /* lengths of what follows */
	uint32_t target;
	uint32_t xattrs;
	uint32_t reserved;
};

/* A bind that comes or goes while the sandbox runs. Errors have its number behind BIND_FIRST. With BIND comes a mount, as the spawner has lent it. */
enum { SBX_BIND_FIRST = 1 << 16 };
struct sbx_bind {
	uint32_t magic; /* SBX_REQUEST_MAGIC */
	uint32_t kind;	/* SBX_MESSAGE_BIND, SBX_MESSAGE_UNBIND */
	int32_t fault_at, fault_errno;
	uint32_t number; /* of those that it has: below SBX_MAX_BINDS */
	uint32_t lazy;	 /* UNBIND: also where it is in use */
	char target[4096];
};

/* What a descriptor has to do with the sandbox's control groups: cgroups(7). */
enum sbx_group_use {
	SBX_GROUP_BORN = 1,	/* a directory of version 2: init is born there */
	SBX_GROUP_MOVE,		/* cgroup.procs of version 1: init is moved there before it starts */
	SBX_GROUP_SLOTS,	/* a directory of version 2 in which each launcher gets a group of its own */
	SBX_GROUP_SLOTS_MEMORY, /* the same, version 1, one per controller */
	SBX_GROUP_SLOTS_PIDS,
	SBX_GROUP_SLOTS_CPUACCT,
	SBX_GROUP_SLOTS_BLKIO,
	SBX_GROUP_HOLD, /* no group: what the host wants to be open as long as init lives */
};

/* What a group has counted; differences, if it was there before. */
enum sbx_meter {
	SBX_METER_CPU_USER, /* us */
	SBX_METER_CPU_SYSTEM,
	SBX_METER_MEMORY, /* the peak, bytes */
	SBX_METER_OOM_KILLS,
	SBX_METER_PIDS, /* the peak */
	SBX_METER_PIDS_REFUSED,
	SBX_METER_IO_READ, /* bytes */
	SBX_METER_IO_WRITTEN,
	SBX_METERS,
};

/* Counters, or differences of them; `known` are bits of enum sbx_meter. */
struct sbx_counts {
	uint64_t value[8];
	uint32_t known;
	uint32_t reserved;
};

/* The open files of one group: meter.c. */
enum { SBX_GAUGES = 9 };
struct sbx_gauge {
	int32_t fd[9];
	uint32_t resets; /* the peak can be set back */
	uint32_t begun;
	uint32_t polls; /* memory.events of version 2 can be polled */
	uint64_t base;	/* memory in use at the beginning */
	struct sbx_counts start;
	struct sbx_counts birth; /* at the first beginning */
};

void sbx_gauge_init(struct sbx_gauge *g);
long sbx_gauge_open(struct sbx_gauge *g, int dir, uint32_t use);
void sbx_gauge_close(struct sbx_gauge *g);
void sbx_gauge_begin(struct sbx_gauge *g);
void sbx_gauge_end(const struct sbx_gauge *g, uint32_t own, struct sbx_counts *c);
int sbx_gauge_worn(const struct sbx_gauge *g, uint64_t left);
int sbx_gauge_has_cpu(const struct sbx_gauge *g);
uint64_t sbx_gauge_cpu(const struct sbx_gauge *g);
int sbx_gauge_out_of_memory(const struct sbx_gauge *g);
int sbx_gauge_events(const struct sbx_gauge *g);

/* Whether a command has used up what its group may have: watch.c. */
struct sbx_watch {
	struct sbx_gauge *gauge; /* or NULL: nothing is watched */
	int32_t oom;		 /* version 1: eventfd, or -1 */
	uint32_t cpus;
	uint64_t cpu_us;       /* limit; 0: none */
	uint64_t cpu_look;     /* when to look at the CPU time again */
	uint64_t memory_until; /* version 1: how long to look whether a process of it was killed */
};

void sbx_watch_begin(struct sbx_watch *w, struct sbx_gauge *gauge, int oom, uint64_t cpu_us);
int sbx_watch_memory(struct sbx_watch *w, int event);
int sbx_watch_cpu(struct sbx_watch *w);
uint64_t sbx_watch_next(const struct sbx_watch *w);

/* What a sandbox that stays has for itself, on top of the limits of its commands. */
enum { SBX_OWN_PIDS = 8, SBX_OWN_MEMORY = 8 << 20 };

enum sbx_message_kind {
	SBX_MESSAGE_HELLO = 1, /* to the spawner */
	SBX_MESSAGE_MAPPED,
	SBX_MESSAGE_PLAN,
	SBX_MESSAGE_RUN,
	SBX_MESSAGE_EXEC,   /* to a sandbox's launchers: a request */
	SBX_MESSAGE_FILES,  /* to a sandbox's launchers: serve file operations on the socket that came */
	SBX_MESSAGE_SIGNAL, /* to a command's launcher, or to init: for every command */
	SBX_MESSAGE_FOLLOW, /* to a detached command's launcher: a byte on the socket that came per news */
	SBX_MESSAGE_INPUT,  /* to a detached command's launcher: lend out its terminal or its stdin */
	SBX_MESSAGE_STAY,   /* to a persistent sandbox's init, on the answer's socket: its owner has it on record */
	SBX_MESSAGE_END,    /* to init: end, and everything with you */
	SBX_MESSAGE_CGROUP, /* to the spawner: the directory whose cgroup namespace sandboxes that stay are in */
	SBX_MESSAGE_SHELVE, /* to the spawner: keep a layer for sandboxes to come, under the number in `plan` */
	SBX_MESSAGE_UNSHELVE,
	SBX_MESSAGE_BORROW, /* to the spawner: lend a layer of the shelf, for LAYERS */
	SBX_MESSAGE_LAYERS, /* to init: struct sbx_layers instead; its overlays are made anew */
	SBX_MESSAGE_COPY,   /* to init: the same, it lends a copy of what was written until now, or of some layers */
	SBX_MESSAGE_PACK,   /* to the spawner: write a layer of the shelf to the stream that comes along */
	SBX_MESSAGE_UNPACK, /* to the spawner: put what comes from the stream on the shelf, `flags` MiB at most */
	SBX_MESSAGE_MOUNT,  /* to the spawner: lend a mount of what came, an O_PATH descriptor; struct sbx_source_of */
	SBX_MESSAGE_BIND,   /* to init: struct sbx_bind instead */
	SBX_MESSAGE_UNBIND, /* to init: the same */
};

enum sbx_scope { SBX_SCOPE_PROCESS, SBX_SCOPE_GROUP, SBX_SCOPE_TREE };

enum sbx_hello_flags {
	SBX_HELLO_USERNS = 1,	/* enter an outer user namespace first */
	SBX_HELLO_SELF_MAP = 2, /* and map only the own id; else wait for SBX_MESSAGE_MAPPED */
	SBX_HELLO_NET_POOL = 4, /* leave the host's network and keep ready namespaces */
};

/*
 * From the host. Descriptors: the answer's socket first, then what the kind needs.
 * RUN of a sandbox: keeper, work, a page for struct sbx_pause. EXEC: stdin, stdout, stderr where PASSED or RELAY, those to pass;
 * if detached, the socket that later messages come from, and the journal.
 */
struct sbx_message {
	uint32_t magic; /* SBX_REQUEST_MAGIC */
	uint32_t kind;
	uint32_t flags;	   /* HELLO: flags; SIGNAL: enum sbx_scope; INPUT: 1: for good */
	uint32_t in_memfd; /* RUN, EXEC: the request is the last descriptor, not inline */
	uint64_t plan;	   /* PLAN: its id */
	int32_t signal;	   /* SIGNAL */
	int32_t reserved;
};

/* Behind MOUNT; and then three strings, NUL-terminated: where it is, uid map and gid map, which may be empty. */
struct sbx_source_of {
	uint32_t attrs; /* as of struct sbx_mount */
	uint32_t dir;	/* whether it is a directory */
	int32_t fault_at, fault_errno;
};

/*
 * To a launcher that serves files: this, then the path and perhaps a second one, NUL-terminated. A directory
 * may come with it: paths then begin there. CHMOD of an empty path is of what came.
 */
struct sbx_file_op {
	uint32_t magic; /* SBX_REQUEST_MAGIC */
	uint32_t op;
	uint32_t flags; /* OPEN: of open(2); MKDIR: enum sbx_file_flags */
	uint32_t mode;
};

enum sbx_file_flags { SBX_FILE_PARENTS = 1 }; /* MKDIR: and what is missing on the way, with 0755 */

enum sbx_file_ops {
	SBX_FILE_OPEN = 1,
	SBX_FILE_MKDIR,
	SBX_FILE_UNLINK,
	SBX_FILE_RMDIR,
	SBX_FILE_REMOVE_TREE,
	SBX_FILE_RENAME,
	SBX_FILE_SYMLINK, /* its target, then its path */
	SBX_FILE_CHMOD,
};

enum sbx_record_kind {
	SBX_RECORD_READY = 1, /* spawner or template ready */
	SBX_RECORD_PIDFD,     /* the init's pidfd is attached */
	SBX_RECORD_ERROR,
	SBX_RECORD_APPLIED, /* followed by a piece of the text read back from the kernel */
	SBX_RECORD_EXIT,    /* the payload ended and nothing of the command is left */
	SBX_RECORD_STARTED, /* the program runs; a pidfd is attached */
	SBX_RECORD_LENT,    /* a terminal's master or a pipe's end is attached */
	SBX_RECORD_DONE,    /* answers FILES' operations and init's SIGNAL: error.err, perhaps a descriptor */
};

/*
 * How long a sandbox that stays was suspended: in a page that the host writes and the launchers read, for no
 * limit of time counts that.
 */
struct sbx_pause {
	uint64_t total; /* ns, of those that are over */
	uint64_t since; /* CLOCK_MONOTONIC, ns; 0: it runs */
};

/* What was full when a command had failed: room.c. */
enum sbx_full { SBX_FULL_NOT = 0, SBX_FULL_BYTES, SBX_FULL_INODES };
enum { SBX_ROOM_SCRATCH = 1, SBX_ROOM_MOUNT = 2 };
struct sbx_room {
	uint32_t full;	/* enum sbx_full */
	uint32_t where; /* SCRATCH, or MOUNT + index */
	uint64_t size;	/* bytes or inodes */
	uint64_t used;
};

enum sbx_clock { SBX_CLOCK_RECEIVED, SBX_CLOCK_STARTED, SBX_CLOCK_FORK, SBX_CLOCK_EXEC, SBX_CLOCK_EXITED, SBX_CLOCKS };

struct sbx_record {
	uint32_t kind;
	int32_t status;	    /* EXIT: as from wait(2); LAYERS: 1: the sandbox ends */
	int32_t pid;	    /* READY: the spawner's; PIDFD: init's, as the spawner sees it; STARTED: as seen inside */
	uint32_t size;	    /* APPLIED: bytes of text that follow */
	uint32_t timed_out; /* EXIT: the launcher's clock struck */
	uint32_t killed;    /* EXIT: SIGKILL was asked for, or whoever started it let go */
	uint32_t out_of_memory; /* EXIT: killed for it */
	uint32_t out_of_time;	/* EXIT: killed because its processes have used cpu_us */
	struct sbx_error error;
	struct sbx_counts counts; /* EXIT: of its own group */
	uint64_t clock[5];	  /* ns, CLOCK_MONOTONIC */
	uint64_t utime_us;	  /* of everything that ran in the sandbox */
	uint64_t stime_us;
	uint64_t maxrss_kib; /* of the largest process */
	uint64_t majflt;
	uint64_t inblock;
	uint64_t oublock;
	struct sbx_room room; /* EXIT, if it failed */
};

/*
 * A detached command's life, first page of its journal; behind it the rings of stdout and stderr, `ring`
 * bytes each. Byte n of a stream lies at n modulo `ring`; the last `keep` are whole.
 */
enum { SBX_JOURNAL_MAGIC = 0x4a584253, SBX_JOURNAL_HEAD = 4096, SBX_JOURNAL_SLACK = 65536 };
enum sbx_journal_state { SBX_JOURNAL_NEW = 0, SBX_JOURNAL_RUNNING, SBX_JOURNAL_ENDED };

struct sbx_journal {
	uint32_t magic;
	uint32_t layout;
	uint64_t keep;
	uint64_t ring; /* keep + SBX_JOURNAL_SLACK */
	uint64_t written[2];
	uint32_t state;
	int32_t pid;		/* as seen inside */
	struct sbx_record exit; /* ENDED */
};

/* Bounds, alignment, known values, terminated strings. No system calls. 0, or -1 and *err filled. */
int sbx_plan_check(const void *arena, size_t len, struct sbx_error *err);
int sbx_request_check(const void *arena, size_t len, struct sbx_error *err);
/* cdef-end */

/* Until `now`, ns. */
static inline uint64_t sbx_paused(const struct sbx_pause *pause, uint64_t now)
{
	if (!pause)
		return 0;
	uint64_t since = __atomic_load_n(&pause->since, __ATOMIC_ACQUIRE);
	uint64_t total = __atomic_load_n(&pause->total, __ATOMIC_ACQUIRE);
	return total + (since && now > since ? now - since : 0);
}

static inline const void *sbx_at(const void *arena, uint32_t off)
{
	return (const char *)arena + off;
}

static inline const char *sbx_str(const void *arena, uint32_t off)
{
	return (const char *)arena + off;
}

/* A string that the plan may leave out. */
static inline const char *sbx_optional(const void *arena, uint32_t off)
{
	return off ? sbx_str(arena, off) : NULL;
}

#endif
