/*
 * box.h - the helper's table of contents: who does what between a request and a running payload.
 *
 * Every function returns 0 or a descriptor, or -1 with *err filled: which stage, which item of the
 * plan's list, which errno. They run in the spawner or in what it cloned; after clone they use raw
 * system calls only (sys.h).
 */
#ifndef SBX_BOX_H
#define SBX_BOX_H

#include "util.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/types.h>

/* A plan the spawner knows, mapped from the sealed memfd it came in, and its template. */
struct sbx_template {
	uint64_t id;
	const struct sbx_plan *plan;
	size_t size;
	int mount_ns;
	uint64_t used; /* for least-recently-used eviction */
};

/* The spawner's lasting descriptors. Children inherit them until they close everything. */
struct sbx_spawner {
	int host;	/* requests; end-of-file: the host process is gone or done with us */
	int host_pidfd; /* readable when the host process is dead, whoever still holds `host` */
	int proc;	/* O_PATH of the host's /proc */
	int host_ns;	/* the host's mount namespace, or our copy of it when rootless */
	int children;	/* signalfd for SIGCHLD */
	int net_maker;	/* socket to the process that makes network namespaces, or -1 */
	int shelf_ns;	/* the mount namespace of layers, or -1 */
	dev_t root_dev; /* the host process's "/" */
	ino_t root_ino;
};

/* One sandbox while it is being made: what its init and payload need. */
/* Roots of overlays that were replaced and wait for their end: sweep.c. */
struct sbx_retired {
	int overlay[8];
	unsigned count;
	uint32_t newest; /* layer of theirs */
	uint64_t due;	 /* CLOCK_MONOTONIC, ns */
};

/*
 * What a child of init is to do with layers, all of it opened by init: until the child runs, the overlays may have been
 * made anew, and then what it had of the old root leads to no mounts any more.
 */
struct sbx_chore {
	int scratch, to, tree; /* tree: of `to`, to be lent */
	uint32_t count, drops;
	int from[SBX_MAX_LAYERS]; /* what is copied, the topmost first */
	int gone[SBX_MAX_LAYERS + 1];
	uint32_t drop[SBX_MAX_LAYERS + 1]; /* what is removed */
};

struct sbx_box {
	const struct sbx_plan *plan;
	const struct sbx_request *request;
	const struct sbx_spawner *spawner;
	int control;  /* records to the host; end-of-file: die. Of a living sandbox: only the answer to its birth */
	int go;	      /* end-of-file before a byte: the spawner gave up */
	int stdio[3]; /* descriptors from the host, or -1 */
	int pass[SBX_MAX_PASS];
	uint64_t clock[SBX_CLOCKS];
	struct sbx_error error;	       /* written by the payload, which shares memory until exec */
	char applied[SBX_MAX_APPLIED]; /* SBX_REQUEST_RECORD: text read back from the kernel */
	uint32_t applied_size;
	/* a living sandbox's: */
	bool resident;	 /* its commands inherit what init has given up already */
	bool persistent; /* its sockets have names in the file system of the host, and no end-of-file */
	int keeper;	 /* socket of init: end-of-file: die; SIGNAL for every command */
	int work;	 /* socket of the launchers: EXEC, FILES */
	int pause_page;
	const struct sbx_pause *pause;
	uint64_t paused_before; /* up to RECEIVED, ns */
	unsigned peers;		/* launchers, which count against the limit of processes of a payload of their id */
	/* control groups: group.c */
	int born; /* or -1 */
	int move[SBX_MAX_GROUPS], slot_dir[SBX_MAX_GROUPS];
	uint32_t slot_use[SBX_MAX_GROUPS];
	int hold[SBX_MAX_GROUPS]; /* what the host wants to be open as long as init lives */
	unsigned moves, slots, holds;
	bool shared_view;	      /* of control groups: the spawner's */
	struct sbx_slot *slot;	      /* a launcher's own groups, or NULL */
	const struct sbx_pool *pool;  /* a launcher's */
	_Atomic unsigned char *state; /* its own there */
	/* overlays: layers.c */
	struct sbx_layers layers; /* what they consist of */
	struct sbx_retired retired;
	int layer_fds[SBX_MAX_LAYERS];
	int void_fd;		 /* where they are made: kept by the init of a living sandbox that has some, else -1 */
	struct sbx_binds *binds; /* of an init that may mount, else NULL */
	int later;		 /* detached: what comes after the start */
	int journal;		 /* detached */
};

/* The groups that a launcher and its commands have to themselves. */
struct sbx_slot {
	struct sbx_gauge gauge;
	int dir;      /* version 2: where it is born */
	int oom;      /* version 1: eventfd */
	int limit[2]; /* its limits of memory, and in version 1 of memory and swap together; or -1 */
	bool lifted;  /* these, which were: */
	uint64_t was[2];
	int whole; /* the sandbox's limit of memory, or -1 */
	int procs[SBX_MAX_GROUPS];
	unsigned count; /* of procs: version 1, where it goes by itself */
};

/* Where init keeps its capabilities, over namespaces of its own, for it mounts while the sandbox runs. */
enum { SBX_PLAN_MOUNTS = SBX_PLAN_LAYERS | SBX_PLAN_BINDS };

/* The launchers of a sandbox, shared between them and init. */
enum {
	SBX_LAUNCHER_NONE = 0,
	SBX_LAUNCHER_STARTING,
	SBX_LAUNCHER_IDLE,
	SBX_LAUNCHER_BUSY,
	SBX_LAUNCHER_ENDING, /* nothing runs any more, and the host may have heard of that already */
	SBX_LAUNCHER_SWEEPER,
	SBX_LAUNCHER_COPIER,  /* nobody else runs */
	SBX_LAUNCHER_NURSERY, /* makes launchers: pool.c */
};
struct sbx_pool {
	_Atomic unsigned char state[SBX_MAX_LAUNCHERS];
	_Atomic pid_t pid[SBX_MAX_LAUNCHERS];
	_Atomic unsigned used;	/* slots from here on were never used */
	_Atomic unsigned kills; /* how often the host had every command killed */
	_Atomic unsigned door;	/* who takes a request, or keeps others from that, 0 for nobody: door.c */
};

/* What a command and everything below it used: the sum over wait4(2), the largest of ru_maxrss. */
struct sbx_usage {
	uint64_t utime_us, stime_us, maxrss_kib, majflt, inblock, oublock;
};

/* spawn.c: the parent's half. Takes over no descriptor. */
int sbx_spawn(struct sbx_box *box, int mount_ns, struct sbx_error *err);

/* child.c: the recipe. Neither returns. */
_Noreturn void sbx_child(struct sbx_box *box);

pid_t sbx_child_start(struct sbx_box *box, struct sbx_error *err);

/* inbox.c: what a message brought */
const void *sbx_map_sealed(int fd, enum sbx_stage stage, size_t *size, struct sbx_error *err);
const struct sbx_request *sbx_inbox_request(const struct sbx_message *msg, size_t len, const int *fds, size_t *nfds,
					    size_t *mapped, struct sbx_error *err);
void sbx_inbox_release(const void *request, size_t mapped);
int sbx_box_fill(struct sbx_box *box, const struct sbx_request *r, const int *fds, size_t nfds, struct sbx_error *err);

/* init.c: PID 1 after the payload has started: waits, kills, reaps, reports. */
int sbx_init_run(struct sbx_box *box, pid_t payload, struct sbx_error *err);

/* resident.c: PID 1 of a sandbox that stays. Returns only if it could not become that. */
int sbx_resident_run(struct sbx_box *box, struct sbx_error *err);

/* launcher.c: takes requests, one at a time. */
struct sbx_inbox {
	_Alignas(16) char bytes[sizeof(struct sbx_message) + SBX_MAX_INLINE];
};
struct sbx_launcher {
	struct sbx_box *box;
	struct sbx_pool *pool;
	struct sbx_inbox *inbox;
	unsigned number;
	int poke;   /* eventfd: wakes init when no launcher is idle */
	bool first; /* says that the sandbox is ready, or why not */
	struct sbx_slot *slot;
};
_Noreturn void sbx_launcher_run(const struct sbx_launcher *l);

/* group.c */
void sbx_group_take(struct sbx_box *box, const uint32_t *use, const int *fds, size_t count);
int sbx_group_move(const struct sbx_box *box, pid_t pid, struct sbx_error *err);
int sbx_group_hide(const struct sbx_box *box, struct sbx_error *err);
int sbx_group_root(int proc, int dir, struct sbx_error *err);
long sbx_slot_make(const struct sbx_box *box, unsigned number, struct sbx_slot *slot);
long sbx_slot_enter(struct sbx_slot *slot);
void sbx_slot_lift(struct sbx_slot *slot);
bool sbx_slot_restore(struct sbx_slot *slot);
void sbx_slot_close(struct sbx_slot *slot);
void sbx_slot_remove(const struct sbx_box *box, unsigned number);

/* command.c: from the start of one command to its report. Closes all of `fds` but the first. */
void sbx_command_run(struct sbx_box *box, int *fds, size_t nfds, struct sbx_error *err);

/* pump.c: copies between a command's pipes and what lies behind them. */
enum { SBX_PUMP_ROOM = 65536 };
struct sbx_pump {
	int from;	 /* -1: this pump has ended */
	int to;		 /* -1: the journal */
	uint32_t stream; /* journal: 0 stdout, 1 stderr */
	bool inward;	 /* `from` is the host's: never block on it, never change it */
	bool last;	 /* its writers have ended: */
	uint32_t left;	 /* this much may still be there */
	uint32_t size, offset;
	char *room; /* SBX_PUMP_ROOM bytes */
};
/* Where pumps without another end write to. */
struct sbx_log {
	int file;
	struct sbx_journal head;
};
/* stdio.c: what becomes of a command's stdin, stdout and stderr */
enum { SBX_PUMPS = 3 };
struct sbx_streams {
	int master; /* its terminal, or -1 */
	int input;  /* detached: what INPUT lends out where there is no terminal, or -1 */
	struct sbx_pump pumps[SBX_PUMPS];
	struct sbx_log log;
};
int sbx_streams_open(struct sbx_streams *s, struct sbx_box *box, struct sbx_error *err);
void sbx_streams_hand_over(struct sbx_streams *s, struct sbx_box *box, int *fds, size_t nfds);
void sbx_streams_close(struct sbx_streams *s);

int sbx_pump_pipe(const struct sbx_box *box, int ends[2]);
long sbx_pump_fill(struct sbx_pump *pump);
long sbx_pump_drain(struct sbx_pump *pump, struct sbx_log *log);
void sbx_pump_end(struct sbx_pump *pump);
bool sbx_pump_last(struct sbx_pump *pump, bool gone);
long sbx_log_open(struct sbx_log *log, int file);
long sbx_log_save(const struct sbx_log *log);

/* files.c: file operations as the payload's identity, inside. */
void sbx_files_serve(const struct sbx_box *box, int sock);

/* remove.c */
long sbx_remove_tree(int dir, const char *name, bool force);

/* proc.c: who is below whom, as /proc tells. */
long sbx_proc_signal(pid_t ancestor, const volatile pid_t *spare, size_t count, int sig);

/* Processes that had been stopped when all were, and those that were not. */
enum { SBX_MAX_HELD = 65536 };
struct sbx_held {
	size_t count, all;
	pid_t self, stopped[SBX_MAX_HELD], held[SBX_MAX_HELD];
};
long sbx_proc_hold(struct sbx_held *held);
void sbx_proc_let_go(struct sbx_held *held);

/* room.c */
void sbx_room_look(const struct sbx_plan *p, struct sbx_room *room);

/* pty.c */
int sbx_pty_open(const struct sbx_box *box, int *slave, struct sbx_error *err);

/* template.c: builds the plan's mount namespace in a process of its own; returns its descriptor. */
int sbx_template_build(const struct sbx_spawner *s, const struct sbx_plan *plan, struct sbx_error *err);

/* Something of the host's tree, to be copied from it: mount.c. */
struct sbx_source {
	const char *path, *uid_map, *gid_map; /* the maps may be NULL */
	uint64_t attrs;			      /* MOUNT_ATTR_* */
	unsigned recursive;		      /* AT_RECURSIVE, or 0 for the one mount */
	bool dir;
	const struct stat *same; /* what has to be there, or NULL */
};

/* source.c: the spawner lends a mount to a sandbox that runs */
long sbx_source_enter(const struct sbx_spawner *s);
int sbx_source_lend(const struct sbx_spawner *s, const struct sbx_source_of *of, size_t size, const int *fds,
		    size_t nfds, struct sbx_error *err);

/* mount.c */
int sbx_mount_open_source(const struct sbx_plan *p, uint32_t index, int proc, struct sbx_error *err);
int sbx_mount_attach(const struct sbx_plan *p, uint32_t index, int root, int tree, struct sbx_error *err);
int sbx_mount_attach_at(const struct sbx_plan *p, uint32_t index, int root, const char *path, int tree,
			struct sbx_error *err);
int sbx_mount_mask(const struct sbx_plan *p, uint32_t index, int root, int empty, struct sbx_error *err);
int sbx_mount_sandbox(struct sbx_box *box, struct sbx_error *err);
int sbx_mount_clone(const struct sbx_source *source, int proc);

/* fsmount.c */
int sbx_mount_fs(const char *fstype, const char *options, unsigned attrs);

/* overlay.c */
int sbx_overlay_park(const struct sbx_plan *p, int root, int void_fd, int proc, struct sbx_error *err);
int sbx_overlay_open(const struct sbx_plan *p, uint32_t index, int scratch, const struct sbx_layers *l);
int sbx_overlay_template(const struct sbx_plan *p, int root, int void_fd, struct sbx_error *err);
int sbx_overlay_carry(const struct sbx_plan *p, int root, int over, int void_fd);
int sbx_overlay_enter(const struct sbx_plan *p, int root, int void_fd, int scratch, const struct sbx_layers *l,
		      struct sbx_error *err);
int sbx_overlay_add(int scratch, uint32_t number, int tree);

/* shelf.c: layers for sandboxes to come */
int sbx_shelf_put(struct sbx_spawner *s, int mount_ns, uint64_t id, int tree, struct sbx_error *err);
int sbx_shelf_get(const struct sbx_spawner *s, uint64_t id, struct sbx_error *err);
int sbx_shelf_stream(struct sbx_spawner *s, int mount_ns, const struct sbx_message *msg, const int *fds,
		     struct sbx_error *err);
int sbx_shelf_drop(const struct sbx_spawner *s, uint64_t id, struct sbx_error *err);

/* copy.c */
long sbx_copy_attributes(int from, int to, bool overlay);
long sbx_copy_tree(int from, int to, int links);

/* pack.c */
long sbx_pack_tree(int root, int stream, bool content);
long sbx_unpack_tree(int root, int stream, int links);

/* layers.c: other layers for the overlays of a sandbox that stays. */
int sbx_layers_take(struct sbx_layers *l, const uint32_t *number, size_t count);
int sbx_layers_change(struct sbx_box *box, const struct sbx_layers *l, const int *fds, pid_t *sweeper,
		      struct sbx_error *err);

/* sweep.c */
bool sbx_retire(struct sbx_box *box, int *overlay);
void sbx_retired_forget(struct sbx_retired *r);
bool sbx_retired_due(const struct sbx_retired *r, const struct sbx_layers *l);
pid_t sbx_sweep(struct sbx_box *box, bool due, const struct sbx_layers *old, const struct sbx_layers *l);

/* path.c */
enum { SBX_NAME_MAX = 256, SBX_PATH_MAX = 4096 };
int sbx_path_parent(int root, const char *path, bool make, char name[SBX_NAME_MAX]);

/* mountinfo.c */
int sbx_mountinfo_find(uint64_t id, char path[SBX_PATH_MAX]);

/* binds.c: those that come while a sandbox runs, and init's list of them */
struct sbx_bound {
	int at; /* the directory it lies in, or -1: there is none of this number */
	char name[SBX_NAME_MAX];
	uint64_t id; /* of the mount */
	/* while overlays are made anew: on which it lies, its clone, where that goes; or -1 */
	int overlay, tree, place;
	char path[SBX_PATH_MAX];
};
struct sbx_binds {
	struct sbx_bound each[SBX_MAX_BINDS];
};
void sbx_binds_init(struct sbx_binds *binds);
void sbx_binds_forget(struct sbx_binds *binds);
int sbx_bind_add(struct sbx_binds *binds, const struct sbx_bind *b, int tree, struct sbx_error *err);
int sbx_bind_remove(struct sbx_binds *binds, const struct sbx_bind *b, struct sbx_error *err);
int sbx_binds_locate(struct sbx_binds *binds, struct sbx_error *err);
int sbx_binds_prepare(struct sbx_binds *binds, int old, int over, size_t prefix, struct sbx_error *err);
int sbx_binds_attach(struct sbx_binds *binds, int old, struct sbx_error *err);
int sbx_binds_reopen(struct sbx_binds *binds, struct sbx_error *err);
void sbx_binds_release(struct sbx_binds *binds);

/* door.c */
void sbx_door_enter(struct sbx_pool *pool, unsigned number);
void sbx_door_leave(struct sbx_pool *pool, unsigned number);
bool sbx_door_close(struct sbx_pool *pool);
void sbx_door_open(struct sbx_pool *pool);

/* layer.c */
int sbx_layer_lend(int scratch, uint32_t number);
long sbx_chore_begin(const struct sbx_box *box, struct sbx_chore *c);
void sbx_chore_drop(struct sbx_chore *c, const uint32_t *number, uint32_t count);
long sbx_chore_copy(struct sbx_chore *c, uint32_t upper, const uint32_t *number, uint32_t count);
void sbx_chore_cancel(const struct sbx_chore *c, uint32_t upper);
void sbx_chore_close(const struct sbx_chore *c);
void sbx_layers_drop(const struct sbx_chore *c);
int sbx_layers_copy(const struct sbx_box *box, struct sbx_chore *c, uint32_t upper, struct sbx_error *err);

/* root.c */
int sbx_root_build(const struct sbx_plan *p, struct sbx_error *err);
int sbx_root_void(struct sbx_error *err);
int sbx_root_enter(int root, struct sbx_error *err);

/* The directory of ours that the template keeps below /proc until a sandbox's proc covers it. */
#define SBX_VOID "/proc"
#define SBX_VOID_DIR "dir"	   /* an empty directory nobody may enter */
#define SBX_VOID_FILE "file"	   /* an empty file nobody may open */
#define SBX_VOID_EMPTY "empty"	   /* an empty file everybody may read */
#define SBX_VOID_SCRATCH "scratch" /* where a sandbox's scratch tmpfs is attached first */
#define SBX_VOID_PROC "proc"	   /* a whole proc, without which the kernel refuses a new one */
#define SBX_VOID_NODES "nodes"	   /* the root's nodes without what is mounted on them: a layer */

/* idmap.c */
int sbx_idmap_write(int proc, pid_t pid, const char *uid_map, const char *gid_map, bool deny_setgroups);
int sbx_idmap_userns(int proc, const char *uid_map, const char *gid_map);

/* net.c */
int sbx_net_loopback(void);
int sbx_net_start_maker(void);
int sbx_net_take(int maker);

/* probe.c: the helper's other use: which primitives does this host grant? */
int sbx_probe(void);

/* visit.c: and two more: programs that dump and restore processes of a sandbox, and the parent of those */
int sbx_visit(int pidfd, uid_t id, char **argv);
int sbx_reap(pid_t pid, int status_fd, int life, int users);

/* message.c: datagrams with descriptors */
int sbx_send_record(int sock, const struct sbx_record *rec, const void *text, size_t size, int fd);
long sbx_send_applied(const struct sbx_box *box);
void sbx_send_error(int sock, const struct sbx_error *err);
long sbx_receive(int sock, void *buf, size_t size, int *fds, size_t *nfds);

/* init's and the payload's steps */
int sbx_time_enter(const struct sbx_plan *p, int proc, struct sbx_error *err);
int sbx_session_keyring(struct sbx_error *err);
int sbx_session_new(struct sbx_error *err);
int sbx_fds_arrange(const struct sbx_box *box, struct sbx_error *err);
int sbx_fds_close_except(int *keep, size_t count);
int sbx_rlimit_set(const struct sbx_box *box, struct sbx_error *err);
int sbx_cred_become_root(const struct sbx_plan *p, struct sbx_error *err);
int sbx_cred_no_namespaces(int proc, struct sbx_error *err);
int sbx_cred_drop(const struct sbx_plan *p, struct sbx_error *err);
int sbx_cred_keep_kill(struct sbx_error *err);
int sbx_cred_keep_launcher(const struct sbx_plan *p, struct sbx_error *err);
int sbx_cred_lock_down(const struct sbx_plan *p, struct sbx_error *err);
int sbx_cred_switch(const struct sbx_box *box, struct sbx_error *err);
int sbx_cred_borrow(const struct sbx_plan *p, uint32_t uid, uint32_t gid, struct sbx_error *err);
int sbx_file_write(const struct sbx_request *r, struct sbx_error *err);
int sbx_file_cwd(const struct sbx_request *r, struct sbx_error *err);
int sbx_landlock_restrict(const struct sbx_box *box, struct sbx_error *err);
int sbx_seccomp_load(const struct sbx_plan *p, struct sbx_error *err);
int sbx_record_read(struct sbx_box *box, struct sbx_error *err);

#endif
