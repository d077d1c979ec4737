"""The verbs of the command line for persistent sandboxes, which any process of the same user finds by name.

Like :mod:`sandboxcore.cli`: parses and prints, decides nothing, and loads what it uses where it uses it.
"""

import dataclasses
import json
import os
import signal
import subprocess
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from sandboxcore.cli_common import (
    each_of,
    end_by_exception,
    exit_as,
    find_command,
    json_option,
    make_spec,
    own_stdin,
    pairs,
    result_data,
    spec_options,
    user_option,
    verb,
)
from sandboxcore.cli_filter import terminal_safe
from sandboxcore.cli_manager import (
    DEFAULT,
    events_option,
    key_of,
    looking,
    managing,
    opened,
    policy_options,
    room_option,
    wanted_policy,
)
from sandboxcore.errors import InvalidTransition, SandboxError, SandboxGone

if TYPE_CHECKING:
    from sandboxcore.detached import DetachedCommand
    from sandboxcore.directory import Directory
    from sandboxcore.manager import SandboxManager
    from sandboxcore.persistent import PersistentSandbox
    from sandboxcore.records import SandboxRecord
    from sandboxcore.result import ExecResult

PATIENCE = 5.0  # seconds for a killed command to be gone

# --- the sandbox ------------------------------------------------------------------------------------


@verb("create")
@events_option
@room_option
@spec_options
@click.option("--label", "labels", multiple=True, metavar="K=V", help="Add a label.")
@click.option("--description", default="", metavar="TEXT")
@click.option("--ttl", type=float, metavar="S", help="Destroy it after so many seconds, whatever happens.")
@policy_options
@click.option("--wait", type=float, metavar="S", default=0.0, help="Wait for room so many seconds.")
@click.option("--client", metavar="ID", help="Begin a session of this client; with its last one it ends.")
@click.option("--no-start", is_flag=True, help="Put it on record only.")
@json_option
@click.argument("name")
def create(name: str, client: str | None, as_json: bool, state_dir: str | None, **given: Any) -> None:
    """Make the sandbox NAME, start it, and print its id. It stays until rm, or as the options say.

    Seconds without activity: --auto-stop stops it, --auto-archive puts it away (see archive),
    --auto-delete destroys it once it has been away so long. Whoever runs gc sees to that, or a
    SandboxManager.
    """
    end_by_exception()
    if client is not None and given["no_start"]:
        raise click.UsageError("--client: a session needs a sandbox that runs, without --no-start")
    given["labels"] = pairs(given["labels"], "--label")
    with managing(state_dir) as manager:
        if client is None:
            record, session = _create(manager, name, given), None
        else:
            record, session = _acquire(manager, name, client, given)
    if as_json:
        click.echo(json.dumps({**dataclasses.asdict(record), "session": session}, indent=2))
    else:
        click.echo(record.id)


def _create(manager: "SandboxManager", name: str, given: dict[str, Any]) -> "SandboxRecord":
    about = {key: given.pop(key) for key in ("labels", "description", "ttl", "wait")}
    about |= {"policy": wanted_policy(given), "start": not given.pop("no_start")}
    sandbox = manager.create(make_spec(given), name=name, **about)
    return manager._ledger.find(sandbox.id)


def _acquire(
    manager: "SandboxManager", name: str, client: str, given: dict[str, Any]
) -> tuple["SandboxRecord", dict[str, Any]]:
    from sandboxcore.selection import SelectionOptions

    about = {key: given.pop(key) for key in ("ttl", "wait")}
    options = SelectionOptions(required_labels=given.pop("labels"))
    policy, description = wanted_policy(given), given.pop("description")
    del given["no_start"]
    session = manager.acquire(make_spec(given), options, client, name=name, policy=policy, **about)
    if description:
        manager.describe(session.sandbox_id, description=description)
    return manager._ledger.find(session.sandbox_id), session.to_dict()


@verb("start")
@events_option
@room_option
@click.argument("name")
def start(name: str, state_dir: str | None) -> None:
    """Start a created or stopped sandbox.

    Everything private in it is new and empty.
    """
    with opened(name, state_dir) as sandbox:
        sandbox.start()


@verb("stop")
@events_option
@click.argument("name")
def stop(name: str, state_dir: str | None) -> None:
    """Kill everything in a sandbox. What is private in it is lost; it can start again."""
    with opened(name, state_dir) as sandbox:
        sandbox.stop()


@verb("suspend")
@events_option
@click.argument("name")
def suspend(name: str, state_dir: str | None) -> None:
    """Stop all processes of a sandbox, until resume.

    No limit of time counts meanwhile.
    """
    with opened(name, state_dir) as sandbox:
        sandbox.suspend()


@verb("resume")
@events_option
@click.argument("name")
def resume(name: str, state_dir: str | None) -> None:
    """Let a suspended sandbox go on."""
    with opened(name, state_dir) as sandbox:
        sandbox.resume()


@verb("rm")
@events_option
@click.option("-f", "--force", is_flag=True, help="Also while it runs.")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def rm(names: tuple[str, ...], force: bool, state_dir: str | None) -> None:
    """Remove sandboxes, with their commands' output. Their sessions end."""
    with looking(state_dir) as directory:
        each_of(names, lambda name: _remove(directory, name, force))


def _remove(directory: "Directory", name: str, force: bool) -> None:
    record = directory._ledger.find(key_of(directory, name))
    if not force and (state := directory.find(record.id).state) in ("running", "paused"):
        raise SandboxError(f"sandbox {name}: it is {state}; stop it first, or use --force")
    directory.destroy(record.id)


# --- commands in it ---------------------------------------------------------------------------------


@verb("exec")
@events_option
@click.option("-t", "--tty", is_flag=True, help="Give the command a terminal of its own.")
@click.option("-d", "--detach", is_flag=True, help="Leave it running; print its id.")
@click.option("--timeout", type=float, metavar="S", help="Kill all of it after so many seconds.")
@click.option("--env", multiple=True, metavar="K=V", help="Add a variable.")
@click.option("--workdir", metavar="DIR", help="Working directory; default the sandbox's.")
@user_option
@click.option("--json", "as_json", is_flag=True, help="Capture output; print the result as JSON.")
@click.argument("name")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(name: str, command: tuple[str, ...], tty: bool, detach: bool, as_json: bool, **given: Any) -> None:
    """Run COMMAND in the sandbox NAME. Put -- before it.

    stdin, stdout and stderr pass through, by way of pipes. Exit status: the command's; 128+N on signal N;
    124 timeout; 125 not possible; 126 not executable; 127 not found.
    """
    if as_json and (tty or detach):
        raise click.UsageError("--json is not for --tty or --detach")
    if tty and not detach and not os.isatty(0):
        raise click.UsageError("--tty: standard input is not a terminal")
    end_by_exception()
    with opened(name, given["state_dir"]) as sandbox:
        options = {
            "timeout": given["timeout"],
            "cwd": given["workdir"],
            "user": given["user"],
            "env": _environment(sandbox, given["env"], tty),
        }
        if detach:
            with closing(sandbox.detach(command, pty=_size() if tty else False, **options)) as detached:
                click.echo(detached.id)
            return
        if tty:
            exit_as(sandbox.interact(command, **options))
        exit_as(_executed(sandbox, command, as_json, options), say=not as_json)


def _environment(sandbox: "PersistentSandbox", given: tuple[str, ...], tty: bool) -> dict[str, str]:
    from sandboxcore.execution import USER_VARIABLES

    ours = {name: os.environ[name] for name in USER_VARIABLES if tty and name in os.environ}
    return {**sandbox.environment, **ours, **sandbox.spec.env, **pairs(given, "--env")}


def _size() -> tuple[int, int]:
    """Rows and columns of our terminal, or of the usual one."""
    try:
        columns, rows = os.get_terminal_size(0)
    except OSError:
        return 24, 80
    return rows or 24, columns or 80


def _executed(
    sandbox: "PersistentSandbox", command: tuple[str, ...], as_json: bool, options: dict[str, Any]
) -> "ExecResult":
    if as_json:
        result = sandbox.exec(command, stdin=own_stdin(), record=True, **options)
        click.echo(json.dumps(result_data(result), indent=2))
        return result
    with terminal_safe(1) as out, terminal_safe(2) as err:
        return sandbox.exec(command, stdin=own_stdin(), stdout=out, stderr=err, **options)


@verb("shell")
@events_option
@user_option
@click.argument("name", default=DEFAULT)
def shell(name: str, user: str | None, state_dir: str | None) -> None:
    """Work in a sandbox with a shell, at this terminal. Without NAME: in the default one."""
    if not os.isatty(0):
        raise click.UsageError("standard input is not a terminal; use exec")
    end_by_exception()
    with opened(name, state_dir) as sandbox:
        exit_as(sandbox.interact(user=user))


@verb("kill")
@events_option
@click.option("--signal", "number", default="KILL", metavar="NAME|N", help="Default: KILL.")
@click.argument("name")
@click.argument("command", required=False)
def kill(name: str, command: str | None, number: str, state_dir: str | None) -> None:
    """Send a signal to a detached COMMAND, or to all.

    Without COMMAND every process in the sandbox gets it, and the sandbox stays. KILL takes everything below
    the command with it.
    """
    wanted = _signal(number)
    with opened(name, state_dir) as sandbox:
        if command is None:
            if wanted in (signal.SIGSTOP, signal.SIGCONT):
                raise click.UsageError("for a whole sandbox, use suspend and resume")
            sandbox.signal(wanted)
            return
        with closing(find_command(sandbox, command)) as found:
            if found.returncode is not None:
                raise SandboxGone(f"command {command}: it has ended")
            if sandbox.state == "paused":
                raise InvalidTransition(name, "paused", "send a signal")
            if wanted == signal.SIGKILL:
                found.kill()
                _await_end(found)
            else:
                found.send_signal(wanted)


def _await_end(command: "DetachedCommand") -> None:
    try:
        command.wait(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise SandboxError(f"command {command.id}: it does not end within {PATIENCE:.0f} s") from None


def _signal(text: str) -> int:
    name = text.upper().removeprefix("SIG")
    known = {item.name.removeprefix("SIG"): int(item) for item in signal.Signals}
    number = int(name) if name.isdecimal() else known.get(name, 0)
    if not 1 <= number <= signal.SIGRTMAX:
        raise click.UsageError(f"--signal: {text!r} is not a signal")
    return number
