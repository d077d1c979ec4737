"""The verbs that look at persistent sandboxes and at what their detached commands write."""

import codecs
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from sandboxcore.cli_common import (
    end_by_exception,
    exit_as,
    exit_status,
    find_command,
    json_option,
    pairs,
    print_table,
    shown,
    span,
    verb,
)
from sandboxcore.cli_filter import TerminalFilter, write_all
from sandboxcore.cli_manager import looking, opened
from sandboxcore.errors import SandboxGone

if TYPE_CHECKING:
    from sandboxcore.detached import DetachedCommand
    from sandboxcore.journal import Log
    from sandboxcore.records import SandboxRecord
    from sandboxcore.result import ExecResult

Write = Callable[[str, bytes, int], None]
STREAMS = ("stdout", "stderr")
STATES = ("created", "running", "paused", "stopped", "archived")
PIECE = 65536


# --- what there is ----------------------------------------------------------------------------------


@verb("ls")
@click.option("--label", "labels", multiple=True, metavar="K=V", help="Only sandboxes with this label.")
@click.option("--state", type=click.Choice(STATES), help="Only sandboxes in this state.")
@click.option("-l", "--long", "wide", is_flag=True, help="Who uses them, and how long they stay.")
@json_option
@click.argument("name", required=False)
def ls(name: str | None, wide: bool, as_json: bool, state_dir: str | None, **only: Any) -> None:
    """List the sandboxes, or the detached commands of the sandbox NAME.

    With --long: SESSIONS that have not ended, OWNER, IDLE since something happened, EXPIRES in that time. A
    state such as running/pool is that of a sandbox which belongs to a pool of a process, and ends with it.
    """
    if name is None:
        only["labels"] = pairs(only["labels"], "--label")
        _list_sandboxes(only, wide, as_json, state_dir)
    elif wide or only["labels"] or only["state"]:
        raise click.UsageError("--label, --state and --long are for the list of sandboxes")
    else:
        with opened(name, state_dir) as sandbox:
            _list_commands(sandbox.commands(), as_json)


def _list_sandboxes(only: dict[str, Any], wide: bool, as_json: bool, state_dir: str | None) -> None:
    with looking(state_dir) as directory:
        records = directory.list_sandboxes(**only)
        sessions = directory._ledger.session_states() if wide or as_json else {}
        for damage in directory.damaged():
            click.echo(f"sandboxcore: damaged record: {shown(damage)}", err=True)
    if as_json:
        data = [{**dataclasses.asdict(one), "sessions": sessions.get(one.id, {})} for one in records]
        click.echo(json.dumps(data, indent=2))
    elif wide:
        print_table(long_rows(records, sessions, time.time()), right=("SESSIONS",))
    else:
        print_table(short_rows(records))


def short_rows(records: "Sequence[SandboxRecord]") -> list[tuple[str, ...]]:
    """The list of sandboxes."""
    rows: list[tuple[str, ...]] = [("NAME", "ID", "STATE", "PID", "AGE", "LABELS")]
    for one in records:
        age, pid = _age(one.created_at), str(one.pid or "-")
        rows.append((one.name, one.id, _state(one), pid, age, _labels(one)))
    return rows


def long_rows(
    records: "Sequence[SandboxRecord]", sessions: Mapping[str, Mapping[str, str]], now: float
) -> list[tuple[str, ...]]:
    """The long one; ``sessions``: the states of those that have not ended, by sandbox and id."""
    rows: list[tuple[str, ...]] = [("NAME", "STATE", "SESSIONS", "OWNER", "AGE", "IDLE", "EXPIRES", "LABELS")]
    for one in records:
        ends, many = one.expires_at, len(sessions.get(one.id, {}))
        left = "-" if ends is None else "due" if ends <= now else span(ends - now)
        idle = span(now - max(one.last_active_at, one.created_at))
        about = (str(many or "-"), one.owner or "-", span(now - one.created_at), idle, left)
        rows.append((one.name, _state(one), *about, _labels(one)))
    return rows


def _state(record: "SandboxRecord") -> str:
    return f"{record.state}/pool" if record.host else record.state


def _labels(record: "SandboxRecord") -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(record.labels.items()))


def _list_commands(commands: Sequence["DetachedCommand"], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([_command_data(command) for command in commands], indent=2))
        return
    rows = [("ID", "STATUS", "EXIT", "PID", "AGE", "COMMAND")]
    for command in commands:
        result = command.result
        status = "-" if result is None else str(exit_status(result))
        pid = str(command.pid_inside) if result is None else "-"
        line = shlex.join(map(os.fsdecode, command.args))
        rows.append((command.id, _status(result), status, pid, _age(command.started_at), line))
    print_table(rows)


def _status(result: "ExecResult | None") -> str:
    return "running" if result is None else "completed" if result.ok else "failed"


def _command_data(command: "DetachedCommand") -> dict[str, Any]:
    result, written = command.result, command.written
    return {
        "id": command.id,
        "status": _status(result),
        "args": [os.fsdecode(arg) for arg in command.args],
        "pty": command.pty,
        "started_at": command.started_at,
        "pid": command.pid_inside if result is None else None,
        "stdout_total": written[0],
        "stderr_total": written[1],
        **_end_data(result),
    }


def _end_data(result: "ExecResult | None") -> dict[str, Any]:
    if result is None:
        return dict.fromkeys(("returncode", "signal", "cause", "detail", "duration"))
    return {
        "returncode": result.returncode,
        "signal": None if result.signal is None else int(result.signal),
        "cause": result.cause.value,
        "detail": result.detail,
        "duration": result.duration,
    }


def _age(since: float) -> str:
    return span(time.time() - since)


# --- what they write --------------------------------------------------------------------------------


@verb("logs")
@click.option("-f", "--follow", is_flag=True, help="Go on until the command has ended.")
@click.option("--stream", type=click.Choice([*STREAMS, "both"]), default="both", help="Default: both.")
@click.option("--since", type=click.IntRange(0), metavar="OFFSET", help="Bytes of each stream to leave out.")
@click.option("--tail", type=click.IntRange(0), metavar="BYTES", help="Only the last bytes of each stream.")
@json_option
@click.argument("name")
@click.argument("command", required=False)
def logs(
    name: str, command: str | None, follow: bool, as_json: bool, state_dir: str | None, **given: Any
) -> None:
    """Print the output of a detached COMMAND.

    Default: the latest. What is kept is the end of each stream. Its stdout goes to stdout, its stderr to
    stderr. With --json: one object; with --follow one per line.
    """
    if given["since"] is not None and given["tail"] is not None:
        raise click.UsageError("--since and --tail exclude each other")
    end_by_exception()
    with opened(name, state_dir) as sandbox, closing(find_command(sandbox, command)) as found:
        ends = dict(zip(STREAMS, found.written, strict=True))
        starts = _starts(ends, **given)
        if follow:
            _follow(found, starts, _json_lines() if as_json else _plain_output(), as_json)
        elif as_json:
            _print_logs(found, starts, ends)
        else:
            _copy_logs(found, starts, ends, _plain_output())


def _starts(ends: dict[str, int], *, stream: str, since: int | None, tail: int | None) -> dict[str, int]:
    """Where to begin, of the streams that are wanted."""
    wanted = STREAMS if stream == "both" else (stream,)
    return {name: since or 0 if tail is None else max(0, ends[name] - tail) for name in wanted}


@verb("attach")
@click.argument("name")
@click.argument("command", required=False)
def attach(name: str, command: str | None, state_dir: str | None) -> None:
    """Go on with a detached COMMAND at this terminal.

    Default: the latest. Ctrl-P Ctrl-Q leaves it. What is kept of its output comes first. Without a terminal,
    here or there, its output is followed. Exit status: the command's, or 0 when it was left.
    """
    end_by_exception()
    with opened(name, state_dir) as sandbox, closing(find_command(sandbox, command)) as found:
        if found.pty and os.isatty(0) and found.returncode is None:
            with contextlib.suppress(SandboxGone):  # it ended just now
                if (result := found.attach()) is None:
                    click.echo(f"\nsandboxcore: left; {found.id} runs on", err=True)
                    return
                exit_as(result)
        exit_as(_follow(found, dict.fromkeys(STREAMS, 0), _plain_output(), as_json=False))


def _follow(command: "DetachedCommand", starts: dict[str, int], write: Write, as_json: bool) -> "ExecResult":
    from sandboxcore.command import Exit, Stdout

    for event in command.follow(stdout=starts.get("stdout"), stderr=starts.get("stderr")):
        if not isinstance(event, Exit):
            write("stdout" if isinstance(event, Stdout) else "stderr", event.data, event.offset)
    result = command.wait()
    if as_json:
        click.echo(json.dumps(_end_data(result)))
    return result


def _kept(command: Any, stream: str, start: int, end: int) -> Iterator["Log"]:
    """What there is now, in pieces; a command that goes on writing does not keep us."""
    while start < end:
        log = command.logs(stream, since=start, size=min(PIECE, end - start))
        if not log.data:
            break
        yield log
        start = log.end


def _copy_logs(
    command: "DetachedCommand", starts: dict[str, int], ends: dict[str, int], write: Write
) -> None:
    for stream, start in starts.items():
        for log in _kept(command, stream, start, ends[stream]):
            write(stream, log.data, log.offset)


def _print_logs(command: "DetachedCommand", starts: dict[str, int], ends: dict[str, int]) -> None:
    data: dict[str, Any] = {"id": command.id, "status": command.status, **_end_data(command.result)}
    for stream, start in starts.items():
        logs = list(_kept(command, stream, start, ends[stream]))
        text = b"".join(log.data for log in logs)
        offset = logs[0].offset if logs else max(start, ends[stream])
        data[stream] = {"offset": offset, "end": offset + len(text), "data": text.decode(errors="replace")}
    click.echo(json.dumps(data, indent=2))


def _plain_output() -> Write:
    """Writes to our own stdout and stderr; a terminal gets no commands."""
    numbers = dict(zip(STREAMS, (1, 2), strict=True))
    filters = {number: TerminalFilter() for number in (1, 2) if os.isatty(number)}

    def write(stream: str, data: bytes, offset: int) -> None:
        number = numbers[stream]
        try:
            write_all(number, filters[number].clean(data) if number in filters else data)
        except BrokenPipeError:
            sys.exit(128 + signal.SIGPIPE)

    return write


def _json_lines() -> Write:
    """Writes one object per piece to stdout; characters are kept whole."""
    decoders = {stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in STREAMS}

    def write(stream: str, data: bytes, offset: int) -> None:
        text = decoders[stream].decode(data)
        click.echo(json.dumps({"stream": stream, "offset": offset, "end": offset + len(data), "data": text}))

    return write
