/*
 * file.c - injected files and the working directory, as the payload's identity.
 *
 * Both happen after the credentials are dropped: a file lands only where the payload could have put
 * it, with the owner it would have had, and no link planted by an earlier payload leads elsewhere.
 */
#include "box.h"

#include <sys/stat.h>

static long write_one(const struct sbx_request *r, const struct sbx_file *file)
{
	const char *data = sbx_str(r, file->data);
	char name[SBX_NAME_MAX];
	struct stat st;

	_cleanup_fd_ int dir = sbx_path_parent(AT_FDCWD, sbx_str(r, file->path), true, name);
	if (dir < 0)
		return dir;
	_cleanup_fd_ int fd = sbx_openat2(dir, name, O_WRONLY | O_CREAT | O_TRUNC | O_NONBLOCK, file->mode,
					  RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS);
	if (fd < 0)
		return fd;
	long ret = sbx_sys(SYS_fstat, fd, &st);
	if (ret < 0 || !S_ISREG(st.st_mode))
		return ret < 0 ? ret : -EINVAL;
	for (uint32_t done = 0; done < file->size; done += (uint32_t)ret) {
		ret = sbx_sys(SYS_write, fd, data + done, file->size - done);
		if (ret <= 0)
			return ret < 0 ? ret : -ENOSPC;
	}
	return sbx_sys(SYS_fchmod, fd, file->mode);
}

int sbx_file_write(const struct sbx_request *r, struct sbx_error *err)
{
	const struct sbx_file *file = sbx_at(r, r->files.off);

	for (uint32_t i = 0; i < r->files.count; i++) {
		long ret = write_one(r, file + i);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_FILE, i, ret);
	}
	return 0;
}

/* Links inside the sandbox may be followed here; the root has nothing outside to lead to. */
int sbx_file_cwd(const struct sbx_request *r, struct sbx_error *err)
{
	char where[4096];

	_cleanup_fd_ int fd = sbx_openat2(AT_FDCWD, sbx_str(r, r->cwd), O_PATH | O_DIRECTORY, 0, RESOLVE_NO_MAGICLINKS);
	long ret = fd < 0 ? fd : sbx_sys(SYS_fchdir, fd);
	if (ret >= 0) /* CVE-2024-21626: a directory outside the root reads "(unreachable)..." */
		ret = sbx_sys(SYS_getcwd, where, sizeof where);
	if (ret >= 0 && where[0] != '/')
		ret = -EXDEV;
	return ret < 0 ? sbx_fail(err, SBX_STAGE_CWD, 0, ret) : 0;
}
