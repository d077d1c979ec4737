/* check.h - the whole test framework: CHECK counts, RUN names, and the exit status tells. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>

static int check_failed, check_count;

#define CHECK(condition)                                                         \
	do {                                                                     \
		check_count++;                                                   \
		if (!(condition)) {                                              \
			check_failed++;                                          \
			printf("# %s:%d: %s\n", __FILE__, __LINE__, #condition); \
		}                                                                \
	} while (0)

#define RUN(test)                                                                     \
	do {                                                                          \
		int before = check_failed;                                            \
		test();                                                               \
		printf("%s - %s\n", check_failed == before ? "ok" : "not ok", #test); \
	} while (0)

static inline int check_status(void)
{
	printf("%d checks, %d failed\n", check_count, check_failed);
	return check_failed != 0;
}

#endif
