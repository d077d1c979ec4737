"""The manager that a verb goes over: opened for it alone, without pools, threads or sweeps."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import click

from sandboxcore.cli_common import NONE, Verb, seconds_or_none
from sandboxcore.errors import SandboxNotFound, SpecError

if TYPE_CHECKING:
    from sandboxcore.directory import Directory
    from sandboxcore.eventlog import EventLog
    from sandboxcore.events import Event
    from sandboxcore.manager import SandboxManager
    from sandboxcore.persistent import PersistentSandbox
    from sandboxcore.policy import LifecyclePolicy

KEY_FILE = "SANDBOXCORE_EVENT_KEY_FILE"
DEFAULT = "-"  # instead of a name: the default sandbox
MAXIMUM = 100  # as of SandboxManager

# --- options ----------------------------------------------------------------------------------------


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """For whoever opens the manager: the verb itself does not need it."""
    ctx.meta[f"sandboxcore.{param.name}"] = value
    return value


def _asked(name: str) -> Any:
    return click.get_current_context().meta.get(f"sandboxcore.{name}")


def _maximum(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    if value is None:
        number: int | None = MAXIMUM
    elif value == NONE:
        number = None
    elif value.isdecimal() and int(value) > 0:
        number = int(value)
    else:
        raise click.BadParameter(f"{value!r} is not a positive whole number, nor {NONE}")
    return _remember(ctx, param, (number,))


events_option = click.option(
    "--events",
    metavar="FILE",
    envvar="SANDBOXCORE_EVENTS",
    expose_value=False,
    callback=_remember,
    help="Append what happens to this file (default $SANDBOXCORE_EVENTS), a line of JSON each; chained if"
    f" ${KEY_FILE} names a file with a key.",
)

room_option = click.option(
    "--max-sandboxes",
    metavar="N",
    envvar="SANDBOXCORE_STATE_MAX_SANDBOXES",
    expose_value=False,
    callback=_maximum,
    help="How many may live at once in the state directory: a number, or none; default"
    f" $SANDBOXCORE_STATE_MAX_SANDBOXES, {MAXIMUM}.",
)


_POLICY = {
    "auto_stop": "Without activity for so many seconds, it is stopped.",
    "auto_archive": "Without activity for so many seconds, it is archived.",
    "auto_delete": "Archived for so many seconds, or never archived and stopped, it is destroyed.",
}


def policy_options(command: Verb) -> Verb:
    """The options of a policy, for :func:`wanted_policy`."""
    for name, help_ in reversed(_POLICY.items()):
        flag = f"--{name.replace('_', '-')}"
        command = click.option(flag, callback=seconds_or_none, metavar="S", help=help_)(command)
    return command


def wanted_policy(given: dict[str, Any], now: "LifecyclePolicy | None" = None) -> "LifecyclePolicy | None":
    """The policy among the options, taken out of them, which change the one that is now; None: no option."""
    values = {name: given.pop(name) for name in _POLICY}
    changes = {name: None if value == NONE else value for name, value in values.items() if value is not None}
    if not changes:
        return None
    from sandboxcore.policy import LifecyclePolicy

    return (now or LifecyclePolicy()).replace(**changes)


def read_key(path: str) -> bytes:
    """The key in a file, without a newline at its end."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_mode & 0o007:
            raise SpecError(f"{path}: others may use this key; take that away: chmod o= {path}")
        return file.read(1 << 16).removesuffix(b"\n")


# --- the manager ------------------------------------------------------------------------------------


@contextlib.contextmanager
def managing(state_dir: str | None) -> Iterator["SandboxManager"]:
    """The manager of a state directory."""
    from sandboxcore.manager import SandboxManager

    with _told() as on_event:
        maximum = _room()
        with SandboxManager(
            state_dir, max_sandboxes=maximum, sweep_interval=None, on_event=on_event
        ) as manager:
            yield manager


@contextlib.contextmanager
def looking(state_dir: str | None) -> Iterator["Directory"]:
    """The part of it that knows sandboxes, and does without what the rest takes to load."""
    from sandboxcore.directory import Directory

    with _told() as on_event:
        directory = Directory(state_dir, max_sandboxes=_room(), policy=None, on_event=on_event)
        try:
            yield directory
        finally:
            for sandbox in list(directory._handles.values()):
                sandbox.close()
            directory._ledger.close()


@contextlib.contextmanager
def opened(name: str, state_dir: str | None) -> Iterator["PersistentSandbox"]:
    """The sandbox of a name or id, which stays as it is."""
    with looking(state_dir) as directory:
        yield cast("PersistentSandbox", directory.find(key_of(directory, name)))


def key_of(directory: "Directory", name: str) -> str:
    """A name, or for "-" the id of the default sandbox."""
    if name != DEFAULT:
        return name
    if (found := directory.get_default_sandbox()) is None:
        raise SandboxNotFound(f"there is no default sandbox in {directory.state_dir}")
    return found


def _room() -> int | None:
    """How many sandboxes there may be."""
    asked: tuple[int | None] | None = _asked("max_sandboxes")
    return None if asked is None else asked[0]  # None: this verb starts none


# --- who is told ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _told() -> Iterator[tuple[Callable[["Event"], object], ...]]:
    """Who hears of everything: the file of ``--events``. What it does not take is told at the end."""
    path = _asked("events")
    if not path:
        yield ()
        return
    from sandboxcore.eventlog import EventLog

    key = os.environ.get(KEY_FILE)
    with EventLog(path, key=read_key(key) if key else None) as log:
        told = _Appender(log)
        try:
            yield (told,)
        finally:
            if told.error is not None:
                click.echo(f"sandboxcore: --events: {told.lost} events are missing: {told.error}", err=True)


class _Appender:
    """Puts events into a log, and remembers what failed: the sandbox has been told to go on."""

    def __init__(self, log: "EventLog") -> None:
        self._log, self.lost = log, 0
        self.error: OSError | None = None

    def __call__(self, event: "Event") -> None:
        try:
            self._log.append(event)
        except OSError as error:
            self.lost, self.error = self.lost + 1, error
