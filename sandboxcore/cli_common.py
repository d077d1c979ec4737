"""What the verbs of the command line share: options that describe a sandbox, finding a persistent one,
results, exit statuses, tables."""

import contextlib
import dataclasses
import os
import shutil
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from sandboxcore.errors import SandboxError, SandboxNotFound, SpecError
from sandboxcore.spec import PROFILES, Limits, SandboxSpec

if TYPE_CHECKING:
    from sandboxcore.detached import DetachedCommand
    from sandboxcore.persistent import PersistentSandbox

EXIT_TIMEOUT, EXIT_SETUP, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND = 124, 125, 126, 127

Verb = Callable[..., None]


# --- limits -----------------------------------------------------------------------------------------

NONE = "none"  # lifts a limit


_NUMBERS = ("cpus", "cpu_weight", "cpu_time", "wall_time", "pids", "open_files", "inodes")


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text  # for Limits to complain about


def _check_limit(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """A limit as :class:`Limits` has it; None where it is not given."""
    if value is None or value == NONE:
        return value
    field = str(param.name)
    plain: Any = _number(value) if field in _NUMBERS else value
    try:
        return getattr(Limits(**{field: plain}), field)
    except SpecError as error:
        raise click.BadParameter(str(error)) from None


def _limit_option(field: str, metavar: str, help: str) -> Callable[[Verb], Verb]:
    flag = f"--{field.replace('_', '-')}"
    return click.option(flag, callback=_check_limit, metavar=metavar, help=help)


_LIMIT_OPTIONS = (
    _limit_option(
        "memory",
        "SIZE",
        "Memory at once, with page cache and tmpfs: bytes, or 64M, 1.5G. none lifts a limit.",
    ),
    _limit_option("swap", "SIZE", "Swap on top of --memory; default 0."),
    _limit_option("cpus", "X", "CPU time per time: 0.5 is half of one CPU."),
    _limit_option("cpu_weight", "N", "Share when others want the CPU: 1 to 10000, usual 100."),
    _limit_option("cpu_time", "S", "CPU seconds of a command, all of its processes together."),
    _limit_option("wall_time", "S", "Seconds until a command is killed with all of its processes."),
    _limit_option("pids", "N", "Processes and threads at once."),
    _limit_option("open_files", "N", "Descriptors of each process."),
    _limit_option("file_size", "SIZE", "Largest file."),
    _limit_option("io", "SIZE", "Bytes per second, read and written each, on every disk."),
    _limit_option("cpuset", "LIST", "CPUs it may use: 0-3,8."),
    _limit_option("disk", "SIZE", "All private writable directories together."),
    _limit_option("inodes", "N", "Files in them."),
    _limit_option("output", "SIZE", "Captured of stdout and of stderr, each; see --output-action."),
    click.option(
        "--output-action",
        type=click.Choice(["truncate", "kill"]),
        help="What happens beyond --output: only its ends are kept (default), or the command is killed.",
    ),
)


def limit_options(command: Verb) -> Verb:
    """The options for limits, for :func:`wanted_limits`."""
    return _with_options(command, _LIMIT_OPTIONS)


def _with_options(command: Verb, options: Sequence[Callable[..., Any]]) -> Verb:
    for option in reversed(options):
        command = option(command)
    return command


def wanted_limits(given: dict[str, Any]) -> dict[str, Any]:
    """The limits among the options, taken out of them; None: to be lifted."""
    values = {name: given.pop(name) for name in Limits.__dataclass_fields__}
    return {name: None if value == NONE else value for name, value in values.items() if value is not None}


# --- the sandbox ------------------------------------------------------------------------------------


def spec_options(command: Verb) -> Verb:
    """The options that describe a sandbox, shared by ``run``, ``explain`` and ``create``."""
    options: list[Any] = [
        click.option("--profile", type=click.Choice(list(PROFILES)), help="Preset of filter and /proc."),
        click.option(
            "--rootfs",
            multiple=True,
            metavar="PATH",
            help="What becomes the read-only root: a directory, a tar archive, or an OCI image layout"
            " (DIRECTORY:TAG). Several are its layers, the lowest first.",
        ),
        click.option(
            "--writable", is_flag=True, default=None, help="A root to write to; that ends with the sandbox."
        ),
        click.option("--ro", multiple=True, metavar="SRC[:DST]", help="Show a host path read-only."),
        click.option("--rw", multiple=True, metavar="SRC[:DST]", help="Show a host path, really writable."),
        click.option(
            "--overlay",
            multiple=True,
            metavar="SRC[:DST]",
            help="Show a host directory; what is written there ends with the sandbox.",
        ),
        click.option(
            "--volume",
            "volumes",
            multiple=True,
            metavar="NAME:DST[:ro]",
            help="Show a volume (see the verb volume), writable or read-only.",
        ),
        click.option("--deny", multiple=True, metavar="PATH", help="Hide a path."),
        click.option("--tmpfs", multiple=True, metavar="DST[:SIZE]", help="Private directory in memory."),
        click.option("--network", type=click.Choice(["none", "private", "host"]), help="Default: none."),
        click.option("--hostname", metavar="H"),
        click.option("--workdir", metavar="DIR", help="Working directory and HOME; default /workspace."),
        click.option("--user", metavar="UID[:GID]", help="Identity inside; default 1000:1000."),
        click.option("--env", multiple=True, metavar="K=V", help="Add a variable."),
        click.option("--seccomp", metavar="PROFILE", help="minimal, standard or full."),
        *_LIMIT_OPTIONS,
        click.option(
            "--accounting",
            is_flag=True,
            default=None,
            help="Measure every command in a control group, also where no limit needs one.",
        ),
        click.option(
            "--optional",
            multiple=True,
            metavar="NAME",
            help="What may be missing on this host: landlock, accounting, or a limit, such as memory.",
        ),
        click.option("--spec", "spec_file", metavar="FILE.toml", help="Start from this spec."),
    ]
    return _with_options(command, options)


def make_spec(given: dict[str, Any]) -> SandboxSpec:
    """The spec of a file and options; an option overrides or, where it is a list, adds to the file."""
    spec_file = given.pop("spec_file")
    spec = SandboxSpec.from_toml(spec_file) if spec_file else SandboxSpec()
    changes: dict[str, Any] = {}
    if wanted := wanted_limits(given):
        changes["limits"] = dataclasses.replace(spec.limits, **wanted)
    if env := given.pop("env"):
        changes["env"] = {**spec.env, **pairs(env, "--env")}
    if rootfs := given.pop("rootfs"):
        changes["rootfs"] = rootfs[0] if len(rootfs) == 1 else rootfs
    for name, value in given.items():
        if isinstance(value, tuple):
            if value:
                changes[name] = (*getattr(spec, name), *value)
        elif value is not None:
            changes[name] = value
    return spec.replace(**changes) if changes else spec


def pairs(items: Iterable[str], option: str) -> dict[str, str]:
    """What several ``NAME=VALUE`` say. Raises :class:`SpecError`."""
    found = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise SpecError(f"{option}: {item!r} is not NAME=VALUE")
        found[name] = value
    return found


def end_by_exception() -> None:
    """From now on SIGTERM ends this program as Ctrl-C does: through an exception, which kills what it
    started first."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def own_stdin() -> int | None:
    """Descriptor 0, unless it is closed."""
    try:
        os.fstat(0)
    except OSError:
        return None
    return 0


def result_data(result: Any) -> dict[str, Any]:
    """An :class:`ExecResult` as plain data."""
    return {
        "args": [os.fsdecode(arg) for arg in result.args],
        "returncode": result.returncode,
        "cause": result.cause.value,
        "detail": result.detail,
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


def exit_status(result: Any) -> int:
    """What the shell gets to see of an :class:`ExecResult`."""
    if result.timed_out:
        return EXIT_TIMEOUT
    code: int = result.returncode
    return code if code >= 0 else 128 - code


def exit_as(result: Any, *, say: bool = True) -> NoReturn:
    """End as the command did. ``say``: and tell on stderr which limit ended it, if one did."""
    if say and (line := limit_line(result)):
        with contextlib.suppress(OSError):  # closed; the status tells, too
            complain(line)
    sys.exit(exit_status(result))


def limit_line(result: Any) -> str:
    """The limit that ended a command; empty if none did."""
    detail = result.detail
    if result.timed_out and not detail:
        detail = f"killed after {result.duration:.3f} s"
    return f"{result.cause.value}: {detail}" if detail else ""


# --- tables -----------------------------------------------------------------------------------------


def print_table(rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> None:
    """Columns side by side, the first row names them; on a terminal no wider than that. ``right``: columns
    of numbers."""
    plain = [[shown(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*plain, strict=True)]
    justify = [str.rjust if name in right else str.ljust for name in rows[0]]
    room = shutil.get_terminal_size().columns if os.isatty(1) else None
    for row in plain:
        cells = (put(cell, width) for put, cell, width in zip(justify, row, widths, strict=True))
        click.echo("  ".join(cells).rstrip()[:room])


def shown(text: str) -> str:
    """What a terminal may get of a text from elsewhere."""
    return "".join(c if c.isprintable() else "?" for c in text)


def complain(text: object) -> None:
    """Say it on stderr, as a terminal may get it: an error may name what a payload has made."""
    click.echo("sandboxcore: " + "\n".join(map(shown, str(text).split("\n"))), err=True)


def size_text(size: int | None) -> str:
    """Bytes for people, as an option takes them: ``1.5M``; ``-`` for None."""
    if size is None:
        return "-"
    for unit, factor in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if size >= factor:
            return f"{size / factor:.1f}".removesuffix(".0") + unit
    return str(size)


def span(seconds: float) -> str:
    """A time for people: ``59s``, ``2m``."""
    whole = max(0, int(seconds))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if whole >= 2 * size:
            return f"{whole // size}{unit}"
    return f"{whole}s"


def seconds_or_none(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    """The callback of an option for seconds: a number, or NONE; None where it is not given."""
    if value is None or value == NONE:
        return value
    with contextlib.suppress(ValueError):
        return float(value)
    raise click.BadParameter(f"{value!r} is not a number of seconds, nor {NONE}")


def each_of(names: Iterable[str], action: Callable[[str], object]) -> None:
    """Do it to each, also after a refusal; the last refusal is raised, the others are told."""
    failed = []
    for name in names:
        try:
            action(name)
        except SandboxError as error:
            failed.append(error)
    for other in failed[:-1]:
        complain(other)
    if failed:
        raise failed[-1]


# --- persistent sandboxes ---------------------------------------------------------------------------

living = click.Group()  # the verbs for them

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
user_option = click.option("--user", metavar="UID[:GID]", help="Identity inside; default the sandbox's.")


def verb(name: str, group: click.Group = living) -> Callable[[Verb], click.Command]:
    """A verb for persistent sandboxes, or of another group; each takes the state directory."""
    option = click.option(
        "--state-dir",
        metavar="DIR",
        envvar="SANDBOXCORE_STATE_DIR",
        callback=_check_dir,
        help="Where sandboxes are on record; default $SANDBOXCORE_STATE_DIR, ~/.local/state/sandboxcore.",
    )
    return lambda function: group.command(name)(option(function))


def _check_dir(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value == "":  # an unset variable of the shell, hardly the working directory
        raise click.BadParameter("is empty")
    return value


def find_command(sandbox: "PersistentSandbox", command: str | None) -> "DetachedCommand":
    """A detached command of it, default the latest."""
    if command is not None:
        return sandbox.command(command)
    if not (every := sandbox.commands()):
        raise SandboxNotFound(f"sandbox {sandbox.name} has no detached commands")
    return every[-1]
