/*
 * path.c - walking to the parent of a path inside a root, never through a symbolic link.
 */
#include "box.h"

/*
 * Open the directory that holds the last part of the absolute `path` below `root`, and copy that part
 * to `name`. Missing directories on the way are made if `make`. Returns a descriptor or -errno.
 */
int sbx_path_parent(int root, const char *path, bool make, char name[SBX_NAME_MAX])
{
	_cleanup_fd_ int at = -1;

	for (;;) {
		while (*path == '/')
			path++;
		const char *end = path;
		while (*end && *end != '/')
			end++;
		size_t len = (size_t)(end - path);
		if (len == 0 || len >= SBX_NAME_MAX)
			return len ? -ENAMETOOLONG : -EISDIR;
		memcpy(name, path, len);
		name[len] = '\0';

		int here = at < 0 ? root : at;
		if (!*end)
			return at >= 0 ? sbx_steal_fd(&at) :
					 sbx_openat2(root, "/", O_PATH | O_DIRECTORY, 0, RESOLVE_IN_ROOT);
		const uint64_t strict = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS;
		int next = sbx_openat2(here, name, O_PATH | O_DIRECTORY, 0, strict);
		if (next == -ENOENT && make) {
			long ret = sbx_sys(SYS_mkdirat, here, name, 0755);
			if (ret < 0 && ret != -EEXIST)
				return (int)ret;
			next = sbx_openat2(here, name, O_PATH | O_DIRECTORY, 0, strict);
		}
		if (next < 0)
			return next;
		sbx_close(at);
		at = next;
		path = end;
	}
}
