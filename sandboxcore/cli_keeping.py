"""The verbs about what becomes of sandboxes in time: times to live and policies, the archive, what is due."""

import dataclasses
import json
import logging
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from sandboxcore.cli_common import NONE, json_option, seconds_or_none, shown, verb
from sandboxcore.cli_manager import (
    events_option,
    key_of,
    managing,
    policy_options,
    room_option,
    wanted_policy,
)

if TYPE_CHECKING:
    from sandboxcore.policy import Action
    from sandboxcore.recovery import Collected

_DONE = {
    "stop": "stopped",
    "archive": "archived",
    "delete": "destroyed",
    "terminate": "ended",
    "forget": "forgot",
}

# --- the archive ------------------------------------------------------------------------------------


@verb("archive")
@events_option
@click.option("--why", default="", metavar="TEXT", help="Goes on record.")
@click.argument("name")
def archive(name: str, why: str, state_dir: str | None) -> None:
    """Put a sandbox away: it is stopped, and cannot start before recover.

    What was written to its root or overlays (--writable, --overlay) is kept on the disk; the rest is lost.
    """
    with managing(state_dir) as manager:
        manager.archive(key_of(manager, name), why)


@verb("recover")
@events_option
@room_option
@click.option("--start", is_flag=True, help="And start it.")
@click.argument("name")
def recover(name: str, start: bool, state_dir: str | None) -> None:
    """Bring a sandbox back from the archive: it is stopped, and can start."""
    with managing(state_dir) as manager:
        manager.recover(key_of(manager, name), start=start)


# --- times ------------------------------------------------------------------------------------------


@verb("extend")
@events_option
@click.argument("name")
@click.argument("seconds", callback=seconds_or_none, metavar="SECONDS|none")
def extend(name: str, seconds: float | str, state_dir: str | None) -> None:
    """Give a sandbox more time: so many seconds after it would expire.

    Where it would not, so many from now; none: it does not expire. Prints when it will.
    """
    with managing(state_dir) as manager:
        more = None if isinstance(seconds, str) else seconds
        when = manager.extend_ttl(key_of(manager, name), more)
    click.echo(NONE if when is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when)))


@verb("policy")
@events_option
@policy_options
@json_option
@click.argument("name")
def policy(name: str, as_json: bool, state_dir: str | None, **given: Any) -> None:
    """Show what becomes of a sandbox by itself, or change it; the value none lifts a rule.

    The rules are applied by gc, and by every SandboxManager.
    """
    from sandboxcore.policy import LifecyclePolicy

    with managing(state_dir) as manager:
        record = manager._ledger.find(key_of(manager, name))
        rules = LifecyclePolicy.from_dict(record.policy)
        if (wanted := wanted_policy(given, rules)) is not None:
            manager.set_policy(record.id, wanted)
            rules = wanted
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(rules), indent=2))
        return
    for rule, seconds in dataclasses.asdict(rules).items():
        click.echo(f"{rule}: {NONE if seconds is None else f'{seconds:g}'}")


@verb("default")
@click.option("--unset", is_flag=True, help="There is none any more.")
@click.argument("name", required=False)
def default(name: str | None, unset: bool, state_dir: str | None) -> None:
    """Show the default sandbox, or make NAME that: for shell without a name, and "-" where one is due.

    Exit status 1 if there is none.
    """
    if unset and name is not None:
        raise click.UsageError("NAME and --unset exclude each other")
    with managing(state_dir) as manager:
        if unset or name is not None:
            manager.set_default_sandbox(name)
            return
        key = manager.get_default_sandbox()
        record = None if key is None else manager.get_record(key)
    if record is None:
        sys.exit(1)
    click.echo(record.name)


# --- what is due ------------------------------------------------------------------------------------


@verb("gc")
@events_option
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@click.option(
    "--unused-layers",
    type=click.FloatRange(min=0),
    metavar="DAYS",
    help="Also remove unpacked layers of images that nobody has used for so many days.",
)
@json_option
def gc(dry_run: bool, unused_layers: float | None, as_json: bool, state_dir: str | None) -> None:
    """Do what is due, and set the records right after crashes.

    Sessions without activity for too long end, and sandboxes with their last one; sandboxes are destroyed
    when their time is over, and stopped, archived, destroyed by their policy. Sandboxes that are gone are put
    down as stopped; what no record knows is removed; so are the control groups of sandboxes and of processes
    that are gone, layers of no snapshot, and images half unpacked. Commits that were interrupted are
    finished. Exit status 1 if something due could not be done.
    """
    logging.getLogger("sandboxcore").addHandler(logging.NullHandler())  # we tell it ourselves
    with managing(state_dir) as manager:
        done = manager.reconcile(dry_run=dry_run)
        collected, damaged = done.collected, manager.damaged()
        if unused_layers is not None:
            layers = _unused(manager.state_dir, unused_layers, dry_run)
            removed = tuple(dict.fromkeys((*collected.removed, *layers)))
            collected = dataclasses.replace(collected, removed=removed)
    if as_json:
        actions = [dataclasses.asdict(action) for action in done.actions]
        data = {**dataclasses.asdict(collected), "actions": actions, "damaged": damaged, "dry_run": dry_run}
        click.echo(json.dumps(data, indent=2))
    else:
        _print_actions(done.actions)
        _print_collected(collected)
        for damage in damaged:
            click.echo(f"sandboxcore: damaged record: {shown(damage)}", err=True)
    sys.exit(1 if done.failed else 0)


def _unused(state_dir: Any, days: float, dry_run: bool) -> list[str]:
    from sandboxcore.layerstore import collect

    return [f"layers/{layer}" for layer in collect(state_dir, unused_for=days * 86400, dry_run=dry_run)]


def _print_actions(actions: tuple["Action", ...]) -> None:
    for action in actions:
        name = shown(action.id if action.id.startswith("sess-") else action.name)
        reason = shown(action.reason)
        if action.error:
            click.echo(f"sandboxcore: {action.kind} {name} ({reason}): {shown(action.error)}", err=True)
        else:
            click.echo(f"{_DONE[action.kind]} {name}: {reason}")


def _print_collected(done: "Collected") -> None:
    said = (
        ("ended", done.ended), ("removed", done.removed), ("removed group", done.groups),
        ("removed layer", done.layers), ("finished commit to", done.commits),
    )  # fmt: skip
    for word, names in said:
        for name in names:
            click.echo(f"{word} {shown(name)}")


# --- whether it works -------------------------------------------------------------------------------


@verb("health")
@room_option
@json_option
def health(as_json: bool, state_dir: str | None) -> None:
    """Try whether sandboxes can be made here: a command in one, the state directory, room for more.

    Exit status 0 if so, 1 if not.
    """
    with managing(state_dir) as manager:
        found = manager.health()
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
    else:
        took = "" if found.seconds is None else f", a command in {1000 * found.seconds:.1f} ms"
        click.echo(f"{'healthy' if found.healthy else 'not healthy'}: {found.mode}, {found.backend}{took}")
        for warning in found.warnings:
            click.echo(shown(warning))
    sys.exit(0 if found.healthy else 1)
