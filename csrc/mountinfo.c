/*
 * mountinfo.c - where a mount is now, as proc(5) tells: /proc/self/mountinfo.
 */
#include "box.h"

/* One line: "ID PARENT MAJOR:MINOR ROOT TARGET ...", with odd characters as "\ooo". Returns 1 where it is that mount. */
static int take_line(const char *line, uint64_t id, char path[SBX_PATH_MAX])
{
	uint64_t number = 0;
	size_t len = 0;

	for (; *line >= '0' && *line <= '9'; line++)
		number = number * 10 + (uint64_t)(*line - '0');
	if (*line != ' ' || number != id)
		return 0;
	for (int field = 1; field < 5; field++) {
		while (*line && *line != ' ')
			line++;
		if (!*line++)
			return -EPROTO;
	}
	for (; *line && *line != ' '; line++) {
		if (len == SBX_PATH_MAX - 1)
			return -ENAMETOOLONG;
		path[len++] = *line;
		if (*line != '\\')
			continue;
		if (!line[1] || !line[2] || !line[3])
			return -EPROTO;
		path[len - 1] = (char)((line[1] - '0') << 6 | (line[2] - '0') << 3 | (line[3] - '0'));
		line += 3;
	}
	path[len] = '\0';
	return 1;
}

/* The path of a mount by its number, STATX_MNT_ID. Returns 1, 0 where there is none, or -errno. */
int sbx_mountinfo_find(uint64_t id, char path[SBX_PATH_MAX])
{
	char text[4 * SBX_PATH_MAX];
	size_t size = 0;

	_cleanup_fd_ int fd = sbx_openat2(AT_FDCWD, "/proc/self/mountinfo", O_RDONLY, 0, 0);
	if (fd < 0)
		return fd;
	for (;;) {
		long got = sbx_sys(SYS_read, fd, text + size, sizeof text - 1 - size);
		if (got <= 0)
			return (int)got;
		size += (size_t)got;
		char *line = text, *end;
		while ((end = memchr(line, '\n', size - (size_t)(line - text)))) {
			*end = '\0';
			int ret = take_line(line, id, path);
			if (ret)
				return ret;
			line = end + 1;
		}
		size -= (size_t)(line - text);
		memmove(text, line, size);
		if (size == sizeof text - 1)
			return -ENAMETOOLONG;
	}
}
