"""The same for asyncio: :func:`run`, :class:`Sandbox`, :class:`PersistentSandbox`, :class:`SandboxPool`,
:class:`Process` and :class:`DetachedCommand` under the same names.

Everything waits by the event loop's own callbacks; no thread waits for it. (Control groups are tidied up and
made ahead by a thread, one for the process, whoever uses them; and each pool has one, which starts sandboxes
ahead of time.) What still blocks:

- what starting a program takes anyway: the first use in a process starts the spawner, and looks at what the
  host can do; the first control group is made. That takes some tens of milliseconds.
- making a control group, some milliseconds: for each sandbox with limits that need one, and for a
  :func:`run` that finds none ready, because many run at once. Taking a ready one does not.
- :meth:`Sandbox.update` of ``memory`` below what is in use: the kernel reclaims before it answers.
- statements of a persistent sandbox's database.

Who is cancelled leaves nothing: a sandbox that was to be created, a command that was to be executed, are
gone, or have been killed and are going, before :class:`asyncio.CancelledError` is raised. The command of a
:class:`Process` belongs to the handle, not to the task: leave it by ``async with``.

A sandbox and its processes belong to the event loop in which they were made.
"""

import os
from collections.abc import Mapping, Sequence

from sandboxcore import _native, groups, host
from sandboxcore.aio_detached import DetachedCommand
from sandboxcore.aio_exec import converse
from sandboxcore.aio_files import Files
from sandboxcore.aio_loop import with_spawner
from sandboxcore.aio_persistent import PersistentSandbox, gc, list_sandboxes
from sandboxcore.aio_pool import SandboxPool, SandboxPools
from sandboxcore.aio_process import Process
from sandboxcore.aio_sandbox import Sandbox
from sandboxcore.census import place
from sandboxcore.command import Exit, Stderr, Stdout
from sandboxcore.plan import compile_plan
from sandboxcore.request import (
    DEVNULL,
    PIPE,
    STDOUT,
    File,
    FileContent,
    Program,
    Request,
    StrOrBytes,
    make_streams,
)
from sandboxcore.result import Decoder, ExecResult, make_result
from sandboxcore.spawner import Spawner
from sandboxcore.spec import SandboxSpec
from sandboxcore.volumes import in_use

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "DetachedCommand",
    "Exit",
    "Files",
    "PersistentSandbox",
    "Process",
    "Sandbox",
    "SandboxPool",
    "SandboxPools",
    "Stderr",
    "Stdout",
    "gc",
    "list_sandboxes",
    "run",
]


async def run(
    argv: Sequence[Program],
    *,
    spec: SandboxSpec | None = None,
    input: StrOrBytes | None = None,
    stdin: File = None,
    stdout: File = PIPE,
    stderr: File = PIPE,
    timeout: float | None = None,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    text: bool = False,
    encoding: str | None = None,
    errors: str | None = None,
    check: bool = False,
    files: Mapping[str, FileContent] | None = None,
    pass_fds: Sequence[int] = (),
    record: bool = False,
) -> ExecResult:
    """:func:`sandboxcore.run`, with the same parameters, results and errors."""
    plan = compile_plan(spec or SandboxSpec(), host.features())
    streams, stdio = make_streams(plan, input, (stdin, stdout, stderr), encoding)
    request = Request(
        plan, argv, cwd=cwd, env=env, files=files, pass_fds=pass_fds, stdio=stdio, record=record
    )
    limits = plan.spec.limits
    deadlines = [seconds for seconds in (timeout, limits.wall_time) if seconds is not None]
    seconds = max(0.0, min(deadlines)) if deadlines else None

    flood = limits.output_action == "kill"

    async def action(connection: Spawner) -> _native.NativeResult:
        if not plan.controllers:
            return await converse(
                "RUN", connection.fd, request, streams, seconds, held=held, kill_flood=flood
            )
        with groups.leased(plan, connection) as group:
            done = await converse(
                "RUN",
                connection.fd,
                request,
                streams,
                seconds,
                group=group,
                held=held,
                kill_flood=flood,
            )
            return groups.counted(done, group)

    with place(), in_use(plan.volumes, f"run-{os.getpid()}", until_end=True) as held:
        done = await with_spawner(plan, request, action)
    result = make_result(plan, request.args, streams, done, Decoder(text, encoding, errors))
    if check:
        result.check_returncode()
    return result
