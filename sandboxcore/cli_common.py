"""What the verbs of the command line share: options that describe a sandbox, finding a persistent one,
results, exit statuses."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import click

from sandboxcore.errors import SandboxNotFound, SpecError
from sandboxcore.spec import PROFILES, Limits, SandboxSpec

if TYPE_CHECKING:
    from sandboxcore.detached import DetachedCommand
    from sandboxcore.persistent import PersistentSandbox

EXIT_TIMEOUT, EXIT_SETUP, EXIT_NOT_EXECUTABLE, EXIT_NOT_FOUND = 124, 125, 126, 127

Verb = Callable[..., None]


def spec_options(command: Verb) -> Verb:
    """The options that describe a sandbox, shared by ``run``, ``explain`` and ``create``."""
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


def make_spec(given: dict[str, Any]) -> SandboxSpec:
    """The spec of a file and options; an option overrides or, where it is a list, adds to the file."""
    spec_file = given.pop("spec_file")
    spec = SandboxSpec.from_toml(spec_file) if spec_file else SandboxSpec()
    changes: dict[str, Any] = {}
    limits = {name: given.pop(name) for name in ("memory", "cpus", "pids", "disk")}
    if wanted := {name: value for name, value in limits.items() if value is not None}:
        base = {name: getattr(spec.limits, name) for name in Limits.__dataclass_fields__}
        changes["limits"] = Limits(**(base | wanted))
    if env := given.pop("env"):
        changes["env"] = {**spec.env, **pairs(env, "--env")}
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


def exit_as(result: Any) -> NoReturn:
    """End as the command did."""
    sys.exit(exit_status(result))


# --- persistent sandboxes ---------------------------------------------------------------------------

living = click.Group()  # the verbs for them

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
user_option = click.option("--user", metavar="UID[:GID]", help="Identity inside; default the sandbox's.")


def verb(name: str) -> Callable[[Verb], click.Command]:
    """A verb for persistent sandboxes; each takes the state directory."""
    option = click.option(
        "--state-dir",
        metavar="DIR",
        envvar="SANDBOXCORE_STATE_DIR",
        callback=_check_dir,
        help="Where sandboxes are on record; default $SANDBOXCORE_STATE_DIR, ~/.local/state/sandboxcore.",
    )
    return lambda function: living.command(name)(option(function))


def _check_dir(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value == "":  # an unset variable of the shell, hardly the working directory
        raise click.BadParameter("is empty")
    return value


@contextlib.contextmanager
def opened(name: str, state_dir: str | None) -> Iterator["PersistentSandbox"]:
    """A handle of the sandbox of a name or id, which stays as it is."""
    from sandboxcore.persistent import PersistentSandbox

    with contextlib.closing(PersistentSandbox.connect(name, state_dir=state_dir)) as sandbox:
        yield sandbox


def find_command(sandbox: "PersistentSandbox", command: str | None) -> "DetachedCommand":
    """A detached command of it, default the latest."""
    if command is not None:
        return sandbox.command(command)
    if not (every := sandbox.commands()):
        raise SandboxNotFound(f"sandbox {sandbox.name} has no detached commands")
    return every[-1]
