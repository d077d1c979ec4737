"""The verbs about who uses which sandbox: ``session ls``, ``attach``, ``detach``, ``suspend``, ``resume``,
``end``."""

import json
import time
from typing import TYPE_CHECKING, Any

import click

from sandboxcore.cli_common import each_of, json_option, living, pairs, print_table, span, verb
from sandboxcore.cli_manager import events_option, key_of, managing, room_option

if TYPE_CHECKING:
    from sandboxcore.records import SessionRecord

STATES = ("active", "detached", "suspended", "terminated")


@living.group("session")
def session() -> None:
    """Who uses which sandbox: create --client and session attach begin sessions.

    A session ends when it was without activity for too long (active: 5 minutes, detached: 1 hour, suspended:
    24 hours, unless it says otherwise), and with its last one a sandbox that was made for a client; gc sees
    to that. One that create made without a client stays.
    """


@verb("ls", session)
@click.option("--state", type=click.Choice(STATES), help="Default: all that have not ended.")
@click.option("--client", metavar="ID", help="Only those of this client.")
@click.option("--label", "labels", multiple=True, metavar="K=V", help="Only sessions with this label.")
@json_option
@click.argument("name", required=False)
def ls(
    name: str | None, labels: tuple[str, ...], as_json: bool, state_dir: str | None, **about: str | None
) -> None:
    """List the sessions, or those of the sandbox NAME, oldest first.

    LEFT: until it ends, without activity.
    """
    with managing(state_dir) as manager:
        wanted = pairs(labels, "--label")
        found = [one.record for one in manager.list_sessions(about["state"], about["client"], wanted)]
        names = {record.id: record.name for record in manager.list_sandboxes()}
        if name is not None:
            key = manager._ledger.find(key_of(manager, name)).id
            found = [one for one in found if one.sandbox == key]
    if as_json:
        click.echo(json.dumps([session_data(one, names.get(one.sandbox)) for one in found], indent=2))
    else:
        print_table(session_rows(found, names, time.time()))


def session_data(record: "SessionRecord", name: str | None) -> dict[str, Any]:
    """A session as plain data; ``name`` is that of its sandbox, None where that is gone."""
    from sandboxcore.session import deadline

    data: dict[str, Any] = {field: getattr(record, field) for field in record.__slots__}
    ends = None if record.state == "terminated" else deadline(record)
    return {**data, "sandbox_name": name, "expires_at": ends}


def session_rows(records: "list[SessionRecord]", names: dict[str, str], now: float) -> list[tuple[str, ...]]:
    """The table; ``names`` of sandboxes by their ids."""
    from sandboxcore.session import deadline

    rows: list[tuple[str, ...]] = [("ID", "SANDBOX", "CLIENT", "STATE", "AGE", "IDLE", "LEFT")]
    for one in records:
        ends = None if one.state == "terminated" else deadline(one)
        left = "-" if ends is None else "due" if ends <= now else span(ends - now)
        sandbox = names.get(one.sandbox, one.sandbox)
        age, idle = span(now - one.created_at), span(now - one.last_active_at)
        rows.append((one.id, sandbox, one.client or "-", one.state, age, idle, left))
    return rows


@verb("attach", session)
@events_option
@room_option
@click.option(
    "--client", default="", metavar="ID", help="Who wants to use it; default: nobody in particular."
)
@click.option("--create", is_flag=True, help="Make it if there is none of this name.")
@json_option
@click.argument("name")
def attach(name: str, client: str, create: bool, as_json: bool, state_dir: str | None) -> None:
    """Begin a session of the sandbox NAME, or go on with the client's detached one; print its id.

    A created or stopped sandbox is started.
    """
    with managing(state_dir) as manager:
        done = manager.attach(key_of(manager, name), client, create_if_missing=create)
        record = done.session.record
        if as_json:
            about = session_data(record, manager._ledger.find(record.sandbox).name)
            capabilities = done.capabilities.to_dict()
            about |= {"newly_created": done.newly_created, "capabilities": capabilities}
            click.echo(json.dumps(about, indent=2))
        else:
            click.echo(record.id)


@verb("detach", session)
@events_option
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
def detach(ids: tuple[str, ...], state_dir: str | None) -> None:
    """Leave the sandboxes of active sessions running, for their clients to come back to."""
    with managing(state_dir) as manager:
        each_of(ids, manager.detach)


@verb("suspend", session)
@events_option
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
def suspend(ids: tuple[str, ...], state_dir: str | None) -> None:
    """Stop all processes in the sandboxes of sessions, until session resume."""
    with managing(state_dir) as manager:
        each_of(ids, manager.suspend)


@verb("resume", session)
@events_option
@room_option
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
def resume(ids: tuple[str, ...], state_dir: str | None) -> None:
    """Go on with suspended or detached sessions."""
    with managing(state_dir) as manager:
        each_of(ids, manager.resume)


@verb("end", session)
@events_option
@click.argument("ids", nargs=-1, required=True, metavar="ID...")
def end(ids: tuple[str, ...], state_dir: str | None) -> None:
    """End sessions. A sandbox that was made for a client is destroyed with its last one."""
    with managing(state_dir) as manager:
        each_of(ids, manager.terminate)
