"""A command in a fresh sandbox, for asyncio: :func:`run`."""

import os
from collections.abc import Mapping, Sequence

from sandboxcore import _native, groups, host
from sandboxcore.aio_exec import converse
from sandboxcore.aio_loop import with_spawner
from sandboxcore.census import place
from sandboxcore.plan import compile_plan
from sandboxcore.request import (
    PIPE,
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
