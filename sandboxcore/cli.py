"""The command line: ``sandboxcore run``, ``doctor`` and ``explain``. Parses and prints, decides nothing.

Exit status of ``run``: the command's own; 128+N when signal N ended it; 124 timeout; 125 the sandbox
could not be set up; 126 the command is not executable, 127 not found.
"""

import contextlib
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import click

from sandboxcore import __version__
from sandboxcore.errors import (
    ExecError,
    ProgramNotExecutable,
    ProgramNotFound,
    ProgramPathInvalid,
    SandboxError,
    SpecError,
    UnsupportedHost,
)
from sandboxcore.spec import PROFILES, Limits, SandboxSpec

EXIT_TIMEOUT, EXIT_SETUP, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND = 124, 125, 126, 127


def _spec_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that describe a sandbox, shared by ``run`` and ``explain``."""
    options = [
        click.option("--profile", type=click.Choice(list(PROFILES)), help="Preset of filter and /proc."),
        click.option("--rootfs", metavar="DIR", help="Directory that becomes the read-only root."),
        click.option("--ro", multiple=True, metavar="SRC[:DST]", help="Show a host path read-only."),
        click.option("--rw", multiple=True, metavar="SRC[:DST]", help="Show a host path, really writable."),
        click.option("--deny", multiple=True, metavar="PATH", help="Hide a path."),
        click.option("--tmpfs", multiple=True, metavar="DST[:SIZE]", help="Private directory in memory."),
        click.option("--network", type=click.Choice(["none", "private", "host"]), help="Default: none."),
        click.option("--hostname", metavar="H"),
        click.option("--workdir", metavar="DIR", help="Working directory and HOME; default /workspace."),
        click.option("--user", metavar="UID[:GID]", help="Identity inside; default 1000:1000."),
        click.option("--env", multiple=True, metavar="K=V", help="Add a variable."),
        click.option("--seccomp", metavar="PROFILE", help="minimal, standard or full."),
        click.option("--memory", metavar="SIZE"),
        click.option("--cpus", type=float, metavar="X"),
        click.option("--pids", type=int, metavar="N", help="Processes and threads at once."),
        click.option("--disk", metavar="SIZE", help="All private writable directories together."),
        click.option("--optional", multiple=True, metavar="NAME", help="What may be missing."),
        click.option("--spec", "spec_file", metavar="FILE.toml", help="Start from this spec."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _make_spec(given: dict[str, Any]) -> SandboxSpec:
    """The spec of a file and options; an option overrides or, where it is a list, adds to the file."""
    spec_file = given.pop("spec_file")
    spec = SandboxSpec.from_toml(spec_file) if spec_file else SandboxSpec()
    changes: dict[str, Any] = {}
    limits = {name: given.pop(name) for name in ("memory", "cpus", "pids", "disk")}
    if wanted := {name: value for name, value in limits.items() if value is not None}:
        base = {name: getattr(spec.limits, name) for name in Limits.__dataclass_fields__}
        changes["limits"] = Limits(**(base | wanted))
    if env := given.pop("env"):
        changes["env"] = {**spec.env, **dict(_pair(item) for item in env)}
    for name, value in given.items():
        if isinstance(value, tuple):
            if value:
                changes[name] = (*getattr(spec, name), *value)
        elif value is not None:
            changes[name] = value
    return spec.replace(**changes) if changes else spec


def _pair(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals:
        raise SpecError(f"--env: {item!r} is not NAME=VALUE")
    return name, value


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sandboxcore")
def cli() -> None:
    """Run code you did not write in fresh, isolated Linux sandboxes."""


@cli.command(context_settings={"ignore_unknown_options": False})
@_spec_options
@click.option("--timeout", type=float, metavar="S", help="Kill the whole tree after so many seconds.")
@click.option("--json", "as_json", is_flag=True, help="Capture output; print the result as JSON.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(command: tuple[str, ...], timeout: float | None, as_json: bool, **given: Any) -> None:
    """Run COMMAND in a fresh sandbox. Put -- before it.

    stdin, stdout and stderr pass through, by way of pipes. Exit status: the command's; 128+N on signal N;
    124 timeout; 125 set-up failed; 126 not executable; 127 not found.
    """
    from sandboxcore.process import run as run_command

    signal.signal(signal.SIGTERM, _interrupt)
    spec = _make_spec(given)
    if as_json:
        result = run_command(command, spec=spec, stdin=_stdin(), timeout=timeout, record=True)
        click.echo(json.dumps(_result_data(result), indent=2))
    else:
        with _terminal_safe(1) as out, _terminal_safe(2) as err:
            result = run_command(command, spec=spec, stdin=_stdin(), stdout=out, stderr=err, timeout=timeout)
    if result.timed_out:
        sys.exit(EXIT_TIMEOUT)
    sys.exit(result.returncode if result.returncode >= 0 else 128 - result.returncode)


def _interrupt(number: int, frame: object) -> NoReturn:
    """SIGTERM ends the run as Ctrl-C does: through an exception that kills the sandbox first."""
    raise SystemExit(128 + number)


def _stdin() -> int | None:
    """Descriptor 0, unless it is closed."""
    try:
        os.fstat(0)
    except OSError:
        return None
    return 0


# What a terminal obeys, other than colours (CSI ... m): other CSI and other escape sequences, C1 controls
# in either coding, and C0 controls but for BEL, BS, TAB, LF, VT, FF, CR.
_SEQUENCES = re.compile(
    rb"\x1b\[[0-?]*[ -/]*[@-ln-~]|\x1b[PX^_\]](?:[^\x07\x1b]|\x1b(?!\\))*(?:\x07|\x1b\\)"
    rb"|\x1b[ -/]*[0-Z\\^-~]|\xc2[\x80-\x9f]|[\x00-\x06\x0e-\x1a\x1c-\x1f\x7f]|\x1b(?!\[)"
)


@contextlib.contextmanager
def _terminal_safe(number: int) -> Iterator[int]:
    """The descriptor to write to: itself, or if it is a terminal, a pipe whose reader keeps the payload
    from sending it commands."""
    if not os.isatty(number):
        yield number
        return
    reader, writer = os.pipe()

    def copy() -> None:
        held = b""
        while data := os.read(reader, 65536):
            safe = _SEQUENCES.sub(b"", held + data)
            # an unfinished sequence at the end waits for its rest, but not for ever
            start = safe.rfind(b"\x1b")
            held = safe[start:] if start >= 0 and not re.match(rb"\x1b\[[0-9;:]*m", safe[start:]) else b""
            if len(held) > 4096:
                held = b""
            os.write(number, safe[: len(safe) - len(held)])

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield writer
    finally:
        os.close(writer)
        thread.join()
        os.close(reader)


def _result_data(result: Any) -> dict[str, Any]:
    return {
        "args": [os.fsdecode(arg) for arg in result.args],
        "returncode": result.returncode,
        "cause": result.cause.value,
        "signal": None if result.signal is None else int(result.signal),
        "timed_out": result.timed_out,
        "duration": result.duration,
        "stdout": result.stdout.decode(errors="replace"),
        "stderr": result.stderr.decode(errors="replace"),
        "stdout_total": result.stdout_total,
        "stderr_total": result.stderr_total,
        "truncated": result.truncated,
        "usage": {name: getattr(result.usage, name) for name in result.usage.__slots__},
        "timings": dict(result.timings),
        "applied": result.capabilities.to_dict() if result.capabilities else None,
    }


@cli.command()
@_spec_options
@click.option("--json", "as_json", is_flag=True)
def explain(as_json: bool, **given: Any) -> None:
    """Print the plan that a spec compiles to on this host."""
    from sandboxcore import host
    from sandboxcore.plan import compile_plan

    features = host.features()
    plan = compile_plan(_make_spec(given), features)
    if as_json:
        facts = {name: getattr(features, name) for name in features.__slots__}
        data = {
            "host": facts,
            "spec": plan.spec.to_dict(),
            "plan": list(plan.lines),
            "bytes": len(plan.data),
        }
        click.echo(json.dumps(data, indent=2))
        return
    click.echo(f"host: mode {features.mode}, uid {features.uid}, Landlock ABI {features.landlock_abi}")
    for line in plan.lines:
        click.echo(line)


@cli.command()
@click.option("--json", "as_json", is_flag=True)
def doctor(as_json: bool) -> None:
    """Try every kernel primitive for real; print what is missing and the remedy.

    Exit status 0 if sandboxes can run here, 1 if not.
    """
    from sandboxcore import host

    probes = host.probe()
    trial = _trial_run()
    if as_json:
        rows = [{"name": p.name, "errno": p.errno, "value": p.value, "essential": p.essential,
                 "remedy": p.remedy if p.errno else None} for p in probes]  # fmt: skip
        click.echo(json.dumps({"uname": " ".join(os.uname()[2:4:]), "probes": rows, "run": trial}, indent=2))
    else:
        _print_probes(probes, trial)
    sys.exit(0 if trial == "ok" else 1)


def _trial_run() -> str:
    from sandboxcore.process import run as run_command

    try:
        result = run_command(["/bin/sh", "-c", "exit 0"], timeout=30)
    except SandboxError as error:
        return str(error)
    return "ok" if result.ok else f"/bin/sh -c 'exit 0' gave {result.returncode}"


def _print_probes(probes: list[Any], trial: str) -> None:
    for probe in probes:
        number = f" {probe.value}" if probe.value else ""
        verdict = "ok" + number if not probe.errno else os.strerror(probe.errno)
        click.echo(f"{probe.name:<16}{verdict}")
        if probe.errno:
            need = "needed" if probe.essential else "optional"
            click.echo(f"{'':<16}  {need}: {probe.remedy}")
    click.echo(f"{'a sandbox':<16}{trial}")
    memory = [line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    click.echo(f"{'cgroup v2':<16}{memory[0][3:] if memory else 'not mounted'} (not used by this version)")


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
    except (SandboxError, UnsupportedHost) as error:
        _fail(error, EXIT_SETUP)
    sys.exit(0)


def _fail(error: object, status: int) -> NoReturn:
    click.echo(f"sandboxcore: {error}", err=True)
    sys.exit(status)
