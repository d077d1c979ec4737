/* resident.h - what init of a sandbox that stays knows: resident.c, pool.c, restack.c. */
#ifndef SBX_RESIDENT_H
#define SBX_RESIDENT_H

#include "box.h"

struct resident {
	struct sbx_box *box;
	struct sbx_pool *pool;
	struct sbx_inbox *inbox; /* each launcher has its own copy */
	int poke;		 /* eventfd: no launcher is idle, or the nursery has made one */
	int nursery;		 /* socket, or -1 */
	bool no_group;		 /* what failed was to make a launcher's */
	bool stopped;		 /* by the host's will */
	unsigned stops;		 /* of launchers, by somebody else's */
	unsigned failures;	 /* to make one, one after the other */
	bool begun;		 /* there was a launcher that says that the sandbox is ready, or why not */
	unsigned first;		 /* its place, until launchers are born again */
};

long sbx_pool_add(struct resident *r);
long sbx_pool_ensure(struct resident *r);
unsigned sbx_pool_take(struct sbx_pool *pool, unsigned char state);
unsigned sbx_pool_find(const struct sbx_pool *pool, pid_t pid);
void sbx_pool_forget(struct resident *r, unsigned number);
void sbx_pool_look(struct resident *r);
long sbx_pool_signal(const struct sbx_pool *pool, pid_t ancestor, int sig);
bool sbx_pool_idle(const struct sbx_pool *pool);
bool sbx_pool_any(const struct sbx_pool *pool, unsigned char state);
long sbx_pool_renew(struct resident *r);

/* resident.c */
void *sbx_map_memory(size_t size, int how, struct sbx_error *err);

/* restack.c */
bool sbx_restack(struct resident *r, const struct sbx_layers *l, int *fds, size_t nfds);
void sbx_restack_copy(struct resident *r, const struct sbx_layers *l, int answer);
void sbx_restack_sweep(const struct resident *r, const struct sbx_layers *l);

#endif
