"""The verbs about logs of events: ``events show``, ``events verify``."""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sandboxcore.cli_common import complain, json_option, living, shown
from sandboxcore.cli_manager import KEY_FILE, read_key

if TYPE_CHECKING:
    from sandboxcore.eventchain import Verification
    from sandboxcore.events import Event

_file = click.argument("file", type=click.Path())


@living.group("events")
def events() -> None:
    """The log that --events writes: what happened to sandboxes, sessions, commands and files."""


@events.command("show")
@click.option("--kind", "kinds", multiple=True, metavar="KIND", help="Only these: command.ended, or command.")
@click.option("--sandbox", metavar="ID", help="Only of this sandbox.")
@click.option("--session", metavar="ID", help="Only of this session.")
@click.option("--client", metavar="ID", help="Only of this client.")
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON for each.")
@_file
def show(file: str, kinds: tuple[str, ...], as_json: bool, **about: str | None) -> None:
    """Print the events of FILE, oldest first, a line each. Lines that are no event are told, and left out."""
    from sandboxcore.eventchain import read_log

    wanted = {name: value for name, value in about.items() if value is not None}
    for event in read_log(file, bad=_tell_bad):
        if is_wanted(event, kinds, wanted):
            click.echo(json.dumps(event.to_dict()) if as_json else event_line(event))


def _tell_bad(file: Path, number: int, why: str) -> None:
    complain(f"{file}: line {number}: {why}")


def is_wanted(event: "Event", kinds: tuple[str, ...], about: Mapping[str, str]) -> bool:
    """Whether it is of one of the kinds, or of what they begin with, and about all of that."""
    if kinds and not any(event.kind == kind or event.kind.startswith(f"{kind}.") for kind in kinds):
        return False
    return all(getattr(event, name) == value for name, value in about.items())


def event_line(event: "Event") -> str:
    """An event for people: when, what, who, and the rest as K=V."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at))
    names = [(name, getattr(event, name)) for name in ("sandbox", "session", "client", "trace_id")]
    rest = [*((name, value) for name, value in names if value is not None), *event.data.items()]
    words = " ".join(f"{name}={_word(value)}" for name, value in rest)
    return shown(f"{when} {event.kind.value:<18} {words}".rstrip())


def _word(value: Any) -> str:
    """Text that is one word as it is, everything else as JSON."""
    if isinstance(value, str) and value and not set(value) & set(" \"'=\n\t"):
        return value
    return json.dumps(value, ensure_ascii=False)


@events.command("verify")
@click.option("--key-file", metavar="FILE", envvar=KEY_FILE, required=True, help=f"Default ${KEY_FILE}.")
@click.option(
    "--last", metavar="MAC", help="A mac that has to be there: of the last line of an earlier look."
)
@click.option("--lines", type=click.IntRange(min=0), metavar="N", help="At least so many have to be there.")
@click.option("--not-whole", is_flag=True, help="The oldest lines may be missing.")
@json_option
@_file
def verify(file: str, key_file: str, not_whole: bool, as_json: bool, **expected: Any) -> None:
    """Check the chain of a log that was written with a key: that no line was changed, removed or inserted.

    That the end is missing shows only with --last or --lines. Exit status 1 if something is wrong.
    """
    from sandboxcore.eventchain import verify_log

    key = read_key(key_file)
    about = {f"expect_{name}": value for name, value in expected.items()}
    found = verify_log(file, key, whole=not not_whole, **about)
    if as_json:
        data = dataclasses.asdict(found)
        data["file"] = None if found.file is None else os.fspath(found.file)
        click.echo(json.dumps(data, indent=2))
    else:
        click.echo(_verdict(found))
    sys.exit(0 if found.ok else 1)


def _verdict(found: "Verification") -> str:
    if found.ok:
        return f"ok: {found.lines} lines, last {found.last or '-'}"
    where = "" if found.file is None else f"{found.file}: line {found.at_line}: "
    return shown(f"wrong: {where}{found.problem}")
