/*
 * fsmount.c - new file systems by fsopen(2) and fsmount(2): of a type and a list of options, attached nowhere yet.
 */
#include "box.h"

#include <sys/mount.h>

/* A detached new mount of a file system type. */
int sbx_mount_fs(const char *fstype, const char *options, unsigned attrs)
{
	_cleanup_fd_ int fs = sbx_fsopen(fstype);
	long ret;

	if (fs < 0)
		return fs;
	for (const char *key = options; key && *key;) {
		const char *value = sbx_next(key);
		ret = *value ? sbx_sys(SYS_fsconfig, fs, FSCONFIG_SET_STRING, key, value, 0) :
			       sbx_sys(SYS_fsconfig, fs, FSCONFIG_SET_FLAG, key, NULL, 0);
		if (ret < 0)
			return (int)ret;
		key = sbx_next(value);
	}
	ret = sbx_sys(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0);
	if (ret < 0)
		return (int)ret;
	return (int)sbx_sys(SYS_fsmount, fs, FSMOUNT_CLOEXEC, attrs);
}
