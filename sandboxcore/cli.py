"""The command line. Parses and prints, decides nothing. The verbs of persistent sandboxes are in
modules of their own.

Exit status: the command's own; 128+N when signal N ended it; 124 timeout; 125 the sandbox could not be set
up, or what was asked for cannot be; 126 the command is not executable, 127 not found.
"""

import importlib
import json
import signal
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import click

from sandboxcore import __version__
from sandboxcore.cli_common import (
    EXIT_NOT_EXECUTABLE,
    EXIT_NOT_FOUND,
    EXIT_SETUP,
    complain,
    end_by_exception,
    exit_as,
    living,
    make_spec,
    own_stdin,
    result_data,
    spec_options,
)
from sandboxcore.errors import (
    ExecError,
    ProgramNotExecutable,
    ProgramNotFound,
    ProgramPathInvalid,
    SandboxError,
)

if TYPE_CHECKING:
    from sandboxcore.plan import Plan


_MODULES = {  # where the verbs of persistent sandboxes are
    "cli_living": ("create", "exec", "kill", "resume", "rm", "shell", "start", "stop", "suspend"),
    "cli_reading": ("attach", "logs", "ls"),
    "cli_resources": ("stats", "update"),
    "cli_sessions": ("session",),
    "cli_keeping": ("archive", "default", "extend", "gc", "health", "policy", "recover"),
    "cli_events": ("events",),
    "cli_snapshots": (
        "commit", "diff", "export", "fork", "import", "restore", "rm-snapshot", "snapshot", "snapshots",
    ),
    "cli_volumes": ("volume",),
}  # fmt: skip
_MODULE_OF = {verb: module for module, verbs in _MODULES.items() for verb in verbs}


class _Verbs(click.Group):
    """Those of persistent sandboxes are loaded when they are asked for, each with its module only."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*self.commands, *_MODULE_OF})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULE_OF:
            return super().get_command(ctx, cmd_name)
        importlib.import_module(f"sandboxcore.{_MODULE_OF[cmd_name]}")  # which adds them
        return living.get_command(ctx, cmd_name)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sandboxcore")
def cli() -> None:
    """Run code you did not write in isolated Linux sandboxes.

    run makes a fresh one for one command; create makes one with a name, which stays until rm.
    """


@cli.command(context_settings={"ignore_unknown_options": False})
@spec_options
@click.option("--timeout", type=float, metavar="S", help="Kill the whole tree after so many seconds.")
@click.option("--json", "as_json", is_flag=True, help="Capture output; print the result as JSON.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(command: tuple[str, ...], timeout: float | None, as_json: bool, **given: Any) -> None:
    """Run COMMAND in a fresh sandbox. Put -- before it.

    stdin, stdout and stderr pass through, by way of pipes. Exit status: the command's; 128+N on signal N;
    124 timeout; 125 set-up failed; 126 not executable; 127 not found.
    """
    from sandboxcore.cli_filter import terminal_safe
    from sandboxcore.process import run as run_command

    end_by_exception()
    if not as_json and (given["output"] or given["output_action"]):
        raise click.UsageError("--output and --output-action are about captured output: use them with --json")
    spec = make_spec(given)
    if as_json:
        result = run_command(command, spec=spec, stdin=own_stdin(), timeout=timeout, record=True)
        click.echo(json.dumps(result_data(result), indent=2))
    else:
        with terminal_safe(1) as out, terminal_safe(2) as err:
            result = run_command(
                command, spec=spec, stdin=own_stdin(), stdout=out, stderr=err, timeout=timeout
            )
    exit_as(result, say=not as_json)


@cli.command()
@spec_options
@click.option("--json", "as_json", is_flag=True)
def explain(as_json: bool, **given: Any) -> None:
    """Print the plan that a spec compiles to on this host."""
    from sandboxcore import host
    from sandboxcore.plan import compile_plan

    features = host.features()
    plan = compile_plan(make_spec(given), features)
    if as_json:
        facts = {name: getattr(features, name) for name in features.__slots__}
        data = {
            "host": facts,
            "spec": plan.spec.to_dict(),
            "plan": list(plan.lines),
            "controllers": list(plan.controllers),
            "group_limits": _group_limits(plan),
            "omitted": list(plan.omitted),
            "bytes": len(plan.data),
        }
        click.echo(json.dumps(data, indent=2))
        return
    click.echo(f"host: mode {features.mode}, uid {features.uid}, Landlock ABI {features.landlock_abi}")
    for line in plan.lines:
        click.echo(line)
    for name, value in _group_limits(plan).items():
        extra = ", and the sandbox's own processes" if name == "pids" else ""
        click.echo(f"group limit: {name} {value}{extra}")


def _group_limits(plan: "Plan") -> dict[str, Any]:
    """What would be written to the sandbox's control group."""
    from sandboxcore.cgroup import LIMITS

    values = {name: getattr(plan.group_limits, name) for name in LIMITS if LIMITS[name] in plan.controllers}
    return {name: value for name, value in values.items() if value is not None}


@cli.command()
@click.option("--json", "as_json", is_flag=True)
def doctor(as_json: bool) -> None:
    """Try every kernel primitive and control groups for real; print what is missing and the remedy.

    Exit status 0 if sandboxes can run here, 1 if not.
    """
    from sandboxcore.cli_doctor import examine, show

    report = examine()
    if as_json:
        click.echo(json.dumps(report.to_dict(), indent=2))
    else:
        show(report)
    sys.exit(0 if report.run == "ok" else 1)


def main() -> NoReturn:
    """Entry point: one line and the right exit status for every failure."""
    try:
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        _fail(f"{error.format_message()} (see --help)", EXIT_SETUP)
    except click.exceptions.Abort:
        sys.exit(128 + signal.SIGINT)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (ProgramNotFound, ProgramPathInvalid) as error:
        _fail(error, EXIT_NOT_FOUND)
    except (ProgramNotExecutable, ExecError) as error:
        _fail(error, EXIT_NOT_EXECUTABLE)
    except (SandboxError, OSError, ValueError) as error:
        _fail(error, EXIT_SETUP)
    sys.exit(0)


def _fail(error: object, status: int) -> NoReturn:
    complain(error)
    sys.exit(status)
