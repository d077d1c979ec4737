/*
 * record.c - reads back from the kernel what really holds for the payload, after the last step and
 * before exec. The text goes to Python unparsed: each part is a file's name, its content and a NUL.
 */
#include "box.h"

static long append(struct sbx_box *box, const char *text, size_t size)
{
	if (size > sizeof box->applied - box->applied_size)
		return -ENOBUFS;
	memcpy(box->applied + box->applied_size, text, size);
	box->applied_size += (uint32_t)size;
	return 0;
}

static long append_file(struct sbx_box *box, const char *path)
{
	_cleanup_fd_ int fd = (int)sbx_sys(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return fd;
	for (;;) {
		size_t room = sizeof box->applied - box->applied_size;
		long ret = room ? sbx_sys(SYS_read, fd, box->applied + box->applied_size, room) : -ENOBUFS;
		if (ret <= 0)
			return ret;
		box->applied_size += (uint32_t)ret;
	}
}

static long append_link(struct sbx_box *box, const char *path)
{
	char target[64];
	long ret = sbx_sys(SYS_readlinkat, AT_FDCWD, path, target, sizeof target);

	return ret < 0 ? ret : append(box, target, (size_t)ret);
}

int sbx_record_read(struct sbx_box *box, struct sbx_error *err)
{
	static const char *const parts[] = {
		"/proc/self/status",  "/proc/self/mountinfo", "/proc/self/limits",    "/proc/self/uid_map",
		"/proc/self/ns/user", "/proc/self/ns/mnt",    "/proc/self/ns/pid",    "/proc/self/ns/net",
		"/proc/self/ns/ipc",  "/proc/self/ns/uts",    "/proc/self/ns/cgroup", "/proc/self/ns/time",
	};

	for (uint32_t i = 0; i < SBX_COUNT(parts); i++) {
		long ret = append(box, parts[i], strlen(parts[i]) + 1);
		if (ret >= 0)
			ret = i < 4 ? append_file(box, parts[i]) : append_link(box, parts[i]);
		if (ret >= 0)
			ret = append(box, "", 1);
		if (ret < 0)
			return sbx_fail(err, SBX_STAGE_RECORD, i, ret);
	}
	return 0;
}
