/*
 * error.c - the names of the stages, for whoever renders an error. Runs only in the host process.
 */
#include "sandboxcore.h"

const char *sbx_stage_name(int stage)
{
	static const char *const names[SBX_STAGE_COUNT] = {
		[SBX_STAGE_NONE] = "none",	   [SBX_STAGE_HOST] = "host",	      [SBX_STAGE_SPAWNER] = "spawner",
		[SBX_STAGE_PLAN] = "plan",	   [SBX_STAGE_REQUEST] = "request",   [SBX_STAGE_USERNS] = "userns",
		[SBX_STAGE_TEMPLATE] = "template", [SBX_STAGE_SOURCE] = "source",     [SBX_STAGE_NODE] = "node",
		[SBX_STAGE_MOUNT] = "mount",	   [SBX_STAGE_ROOT] = "root",	      [SBX_STAGE_NETNS] = "netns",
		[SBX_STAGE_CLONE] = "clone",	   [SBX_STAGE_IDMAP] = "idmap",	      [SBX_STAGE_INIT] = "init",
		[SBX_STAGE_LOOPBACK] = "loopback", [SBX_STAGE_HOSTNAME] = "hostname", [SBX_STAGE_PROC] = "proc",
		[SBX_STAGE_NSLIMIT] = "nslimit",   [SBX_STAGE_TIME] = "time",	      [SBX_STAGE_FORK] = "fork",
		[SBX_STAGE_SESSION] = "session",   [SBX_STAGE_STDIO] = "stdio",	      [SBX_STAGE_RLIMIT] = "rlimit",
		[SBX_STAGE_CRED] = "cred",	   [SBX_STAGE_FILE] = "file",	      [SBX_STAGE_CWD] = "cwd",
		[SBX_STAGE_LANDLOCK] = "landlock", [SBX_STAGE_SECCOMP] = "seccomp",   [SBX_STAGE_EXEC] = "exec",
		[SBX_STAGE_RECORD] = "record",	   [SBX_STAGE_LAUNCHER] = "launcher", [SBX_STAGE_PTY] = "pty",
		[SBX_STAGE_CGROUP] = "cgroup",
	};

	return stage >= 0 && stage < SBX_STAGE_COUNT ? names[stage] : "unknown";
}
