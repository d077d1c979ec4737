/* Formatting after clone, walking to a parent without following links, datagrams with descriptors. */
#include "box.h"
#include "check.h"

#include <stdlib.h>
#include <sys/stat.h>

static void formats_numbers(void)
{
	char out[64];

	sbx_format_path(out, "", 0, "");
	CHECK(strcmp(out, "0") == 0);
	sbx_format_path(out, "a/", 4294967295u, "/b");
	CHECK(strcmp(out, "a/4294967295/b") == 0);
}

static void walks_strictly(void)
{
	char dir[] = "/tmp/sbx-test-XXXXXX", name[SBX_NAME_MAX], longest[400] = "/";

	CHECK(mkdtemp(dir) != NULL);
	int root = open(dir, O_PATH | O_DIRECTORY);
	CHECK(symlinkat("/", root, "out") == 0);
	int at = sbx_path_parent(root, "/a//b/c", true, name);
	CHECK(at >= 0 && strcmp(name, "c") == 0);
	CHECK(faccessat(root, "a/b", F_OK, 0) == 0);
	close(at);
	CHECK(sbx_path_parent(root, "/x/y", false, name) == -ENOENT);
	CHECK(sbx_path_parent(root, "/out/etc/passwd", true, name) == -ELOOP);
	CHECK(sbx_path_parent(root, "/../etc/passwd", true, name) == -EXDEV);
	memset(longest + 1, 'n', 300);
	CHECK(sbx_path_parent(root, longest, true, name) == -ENAMETOOLONG);
	unlinkat(root, "out", 0);
	unlinkat(root, "a/b", AT_REMOVEDIR);
	unlinkat(root, "a", AT_REMOVEDIR);
	close(root);
	rmdir(dir);
}

static void passes_descriptors(void)
{
	struct sbx_record rec = { .kind = SBX_RECORD_PIDFD, .pid = 42 }, got;
	int pair[2], fds[2] = { -1, -1 };
	size_t nfds = 1;

	CHECK(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) == 0);
	CHECK(sbx_send_record(pair[0], &rec, NULL, 0, 0) == 0);
	CHECK(sbx_receive(pair[1], &got, sizeof got, fds, &nfds) == sizeof got);
	CHECK(nfds == 1 && fds[0] >= 0 && got.pid == 42);
	close(fds[0]);

	nfds = 0; /* more descriptors than wanted: refused, and none leaks */
	int before = dup(0);
	close(before);
	CHECK(sbx_send_record(pair[0], &rec, NULL, 0, 0) == 0);
	CHECK(sbx_receive(pair[1], &got, sizeof got, fds, &nfds) == -EMFILE && nfds == 0);
	int after = dup(0);
	close(after);
	CHECK(before == after);

	CHECK(sbx_send_record(pair[0], &rec, "text", 4, -1) == 0);
	CHECK(sbx_receive(pair[1], &got, sizeof got, fds, &nfds) == -EMSGSIZE);
	nfds = 2; /* an error brings none: whoever closes what came must not close anything else */
	CHECK(sbx_receive(-1, &got, sizeof got, fds, &nfds) == -EBADF && nfds == 0);
	close(pair[0]);
	CHECK(sbx_receive(pair[1], &got, sizeof got, fds, &nfds) == 0);
	close(pair[1]);
}

int main(void)
{
	RUN(formats_numbers);
	RUN(walks_strictly);
	RUN(passes_descriptors);
	return check_status();
}
