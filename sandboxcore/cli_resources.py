"""The verbs about what persistent sandboxes use, and may use."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import click

from sandboxcore.cli_common import (
    json_option,
    limit_options,
    print_table,
    shown,
    size_text,
    verb,
    wanted_limits,
)
from sandboxcore.cli_manager import events_option, key_of, looking, managing, opened, room_option
from sandboxcore.errors import InvalidTransition, SandboxGone, SandboxNotFound, SpecError

if TYPE_CHECKING:
    from sandboxcore.cgroup import GroupUsage
    from sandboxcore.directory import Directory
    from sandboxcore.manager_stats import ManagerStats
    from sandboxcore.persistent import PersistentSandbox

SIZES = ("memory", "swap", "file_size", "output", "disk", "io")
LIVE = ("running", "paused")


# --- stats ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One sandbox. ``limits``: its spec's, without those that were left out on this host. ``usage``: None
    where no control group measures it."""

    name: str
    id: str
    state: str
    limits: Mapping[str, Any]
    usage: "GroupUsage | None"


@verb("stats")
@room_option
@click.option("--summary", is_flag=True, help="All of them together: how many, how fast, how often.")
@click.option("--prometheus", is_flag=True, help="The same in the text format of Prometheus.")
@json_option
@click.argument("names", nargs=-1, metavar="[NAME]...")
def stats(
    names: tuple[str, ...], summary: bool, prometheus: bool, as_json: bool, state_dir: str | None
) -> None:
    """Show what running and suspended sandboxes use.

    Default: all of them, but for those of other processes' pools. MEMORY, PEAK: with page cache and tmpfs,
    now and at most. CPU: seconds, since the start. PIDS: processes and threads, with those of the sandbox
    itself. READ, WRITTEN: on disks. PRESSURE: the share of the last 10 seconds in which something waited.
    "-" is what the kernel does not count here.
    """
    if summary + prometheus + bool(names) > 1 or (prometheus and as_json):
        raise click.UsageError("one of NAME, --summary and --prometheus; the last one without --json")
    if summary or prometheus:
        with managing(state_dir) as manager:
            if prometheus:
                click.echo(manager.prometheus(), nl=False)
            else:
                _print_summary(manager.stats(), as_json)
        return
    with looking(state_dir) as directory:
        rows = list(_named(directory, names) if names else _living(directory))
    if as_json:
        click.echo(json.dumps([_row_data(row) for row in rows], indent=2))
        return
    _print_rows(rows)
    if unmeasured := [row.name for row in rows if row.usage is None]:
        click.echo(
            f"sandboxcore: no control group measures {', '.join(unmeasured)}: create such sandboxes with"
            " --accounting, or with a limit such as --memory",
            err=True,
        )


def _named(directory: "Directory", names: tuple[str, ...]) -> Iterator[Row]:
    for name in names:
        sandbox = directory.find(key_of(directory, name))
        if sandbox.state not in LIVE:
            raise InvalidTransition(f"sandbox {sandbox.name}", sandbox.state.value, "show its usage")
        yield _row(cast("PersistentSandbox", sandbox))


def _living(directory: "Directory") -> Iterator[Row]:
    for record in directory.list_sandboxes():
        if record.state in LIVE and not record.host:
            with contextlib.suppress(SandboxNotFound, SandboxGone):
                sandbox = directory.find(record.id)
                if sandbox.state in LIVE:  # or it ended just now
                    yield _row(cast("PersistentSandbox", sandbox))


def _print_summary(stats: "ManagerStats", as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(stats.to_dict(), indent=2))
        return
    maximum = "any number" if stats.max_sandboxes is None else str(stats.max_sandboxes)
    click.echo(f"sandboxes  {_counts(stats.sandboxes)}")
    click.echo(f"sessions   {_counts(stats.sessions)}")
    click.echo(f"room       {stats.living} places taken, of {maximum}")
    if stats.damaged:
        click.echo(f"damaged    {stats.damaged} records")


def _counts(numbers: Mapping[str, int]) -> str:
    """How many there are, by state."""
    parts = ", ".join(f"{many} {shown(state)}" for state, many in numbers.items() if many)
    return f"{sum(numbers.values())}{f': {parts}' if parts else ''}"


def _row(sandbox: "PersistentSandbox") -> Row:
    record, limits = sandbox.record, dataclasses.asdict(sandbox.spec.limits)
    for name in record.omitted:  # as "limits.memory"
        limits.pop(name.removeprefix("limits."), None)
    try:
        usage = sandbox.usage()
    except SpecError:
        usage = None
    return Row(record.name, record.id, record.state, limits, usage)


def _row_data(row: Row) -> dict[str, Any]:
    usage = None if row.usage is None else dataclasses.asdict(row.usage)
    return {"name": row.name, "id": row.id, "state": row.state, "limits": row.limits, "usage": usage}


def _print_rows(rows: list[Row]) -> None:
    numbers = ("MEMORY", "PEAK", "LIMIT", "CPU", "PIDS", "READ", "WRITTEN")
    table = [("NAME", "STATE", *numbers, "PRESSURE")]
    for row in rows:
        usage, limit = row.usage, size_text(row.limits.get("memory"))
        pids = f"/{_plain(row.limits.get('pids'))}"
        if usage is None:
            table.append((row.name, row.state, "-", "-", limit, "-", f"-{pids}", "-", "-", "-"))
            continue
        table.append(
            (
                row.name,
                row.state,
                size_text(usage.memory),
                size_text(usage.memory_peak),
                limit,
                _cpu_text(usage),
                f"{_plain(usage.pids)}{pids}",
                size_text(usage.io_read),
                size_text(usage.io_written),
                _pressure_text(usage.pressure),
            )
        )
    print_table(table, right=numbers)


def _plain(value: int | None) -> str:
    return "-" if value is None else str(value)


def _cpu_text(usage: "GroupUsage") -> str:
    if usage.cpu_user is None or usage.cpu_system is None:
        return "-"
    return f"{usage.cpu_user + usage.cpu_system:.2f}s"


def _pressure_text(pressure: Mapping[str, float] | None) -> str:
    if pressure is None:
        return "-"
    return " ".join(f"{name} {share:g}%" for name, share in pressure.items() if share) or "none"


# --- update -----------------------------------------------------------------------------------------


@verb("update")
@events_option
@limit_options
@json_option
@click.argument("name")
def update(name: str, as_json: bool, state_dir: str | None, **given: Any) -> None:
    """Change limits of the sandbox NAME.

    All of them change, or none; the value none lifts one. Prints each with its value before and after, and
    when that applies: now, with the next command, or with the next start.
    """
    changes = wanted_limits(given)
    if not changes:
        raise click.UsageError("no limit is given; for example --memory 512M")
    with opened(name, state_dir) as sandbox:
        done = sandbox.update(**changes)
    if as_json:
        data = {limit: dataclasses.asdict(change) for limit, change in done.items()}
        click.echo(json.dumps(data, indent=2))
        return
    for limit, change in done.items():
        before, value = _limit_text(limit, change.before), _limit_text(limit, change.value)
        click.echo(f"{limit}: {before} -> {value} ({change.applies})")


def _limit_text(name: str, value: Any) -> str:
    if value is None:
        return "none"
    return size_text(value) if name in SIZES else f"{value:g}" if isinstance(value, float) else str(value)
