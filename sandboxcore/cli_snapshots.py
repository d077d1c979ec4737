"""The verbs about the files of persistent sandboxes at earlier moments."""

import contextlib
import dataclasses
import json
import sys
import time

import click

from sandboxcore.changes import FileChange
from sandboxcore.cli_common import json_option, print_table, shown, size_text, verb
from sandboxcore.cli_manager import events_option, key_of, managing, opened, room_option
from sandboxcore.errors import SandboxNotFound
from sandboxcore.persistent import PersistentSandbox
from sandboxcore.saved import SnapshotStore
from sandboxcore.snapshots import Snapshot

_LETTERS = {"added": "A", "changed": "M", "removed": "D"}


@verb("snapshot")
@events_option
@click.argument("name")
@click.argument("snapshot", required=False)
def snapshot(name: str, snapshot: str | None, state_dir: str | None) -> None:
    """Keep the files of a sandbox as they are now, and print the snapshot's name.

    Of a sandbox with --writable or --overlay; not what is in /tmp. Everything stands still meanwhile.
    """
    with opened(name, state_dir) as sandbox, sandbox.snapshot(snapshot) as made:
        click.echo(made.name)


@verb("snapshots")
@json_option
def snapshots(as_json: bool, state_dir: str | None) -> None:
    """List the snapshots, oldest first."""
    found = SnapshotStore(state_dir).list()
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(one) for one in found], indent=2))
        return
    rows = [("NAME", "SIZE", "LAYERS", "SAVED", "SANDBOX")]
    rows += [
        (one.name, size_text(one.size), str(len(one.layers)), _time_text(one.saved_at), one.sandbox)
        for one in found
    ]
    print_table(rows, right=("SIZE", "LAYERS"))


def _time_text(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))


@verb("rm-snapshot")
@click.argument("names", nargs=-1, required=True, metavar="SNAPSHOT...")
def rm_snapshot(names: tuple[str, ...], state_dir: str | None) -> None:
    """Remove snapshots. Sandboxes that began with them live on."""
    store = SnapshotStore(state_dir)
    for name in names:
        store.delete(name)
    store.gc()


@verb("restore")
@events_option
@click.argument("name")
@click.argument("snapshot")
def restore(name: str, snapshot: str, state_dir: str | None) -> None:
    """Go back to a snapshot. What was written since is lost; no command may run."""
    with opened(name, state_dir) as sandbox, sandbox.snapshots.load(snapshot) as found:
        sandbox.restore(found)


@verb("fork")
@events_option
@room_option
@click.option("--from-snapshot", is_flag=True, help="NAME is that of a snapshot, not of a sandbox.")
@click.argument("name")
@click.argument("new", required=False)
def fork(name: str, new: str | None, from_snapshot: bool, state_dir: str | None) -> None:
    """Start another sandbox with the files of this one, and print its name.

    What is in /tmp stays behind, and so do commands.
    """
    with managing(state_dir) as manager:
        if from_snapshot:
            with SnapshotStore(state_dir).load(name) as found:
                click.echo(manager.create(name=new, template=found).name)
            return
        parent = manager.find(key_of(manager, name))
        with parent._moment() as now:
            about, more = {"name": new}, manager._more(None, None, None)
            click.echo(manager._created(None, about, more, session=None, template=now).name)


@verb("diff")
@json_option
@click.argument("name")
@click.argument("snapshot", required=False)
def diff(name: str, snapshot: str | None, as_json: bool, state_dir: str | None) -> None:
    """Show what differs in a sandbox from a snapshot, or from its beginning: added, modified, deleted."""
    with opened(name, state_dir) as sandbox:
        since = None if snapshot is None else sandbox.snapshots.load(snapshot)
        _print_changes(sandbox.diff(since), as_json=as_json)


@verb("commit")
@events_option
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@json_option
@click.argument("name")
@click.argument("paths", nargs=-1, metavar="[PATH]...")
def commit(name: str, paths: tuple[str, ...], dry_run: bool, as_json: bool, state_dir: str | None) -> None:
    """Put what was written to overlays into the host's directories: all of it, or these paths inside."""
    with opened(name, state_dir) as sandbox:
        done = sandbox.commit(paths or None, dry_run=dry_run, state_dir=state_dir)
        _print_changes(done, as_json=as_json)


def _print_changes(changes: list[FileChange], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(change) for change in changes], indent=2))
        return
    for change in changes:
        size = "" if change.size is None else f" {size_text(change.size)}"
        path = shown(change.path) + ("/" if change.type == "dir" else "")
        click.echo(f"{_LETTERS[change.kind]} {path}{size}")


@verb("export")
@click.argument("snapshot")
@click.argument("file", type=click.Path(allow_dash=True))
def export(snapshot: str, file: str, state_dir: str | None) -> None:
    """Write a snapshot to a tar file, or to stdout: "-"."""
    with SnapshotStore(state_dir).load(snapshot) as found:
        found.export(sys.stdout.buffer if file == "-" else file)


@verb("import")
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.argument("snapshot")
@click.argument("like", metavar="LIKE")
def import_(file: str, snapshot: str, like: str, state_dir: str | None) -> None:
    """Make a snapshot of an exported tar file, for sandboxes such as LIKE: a sandbox, or a snapshot."""
    store = SnapshotStore(state_dir)
    try:
        with contextlib.closing(PersistentSandbox.connect(like, state_dir=state_dir)) as sandbox:
            spec = sandbox.spec
    except SandboxNotFound:
        with store.load(like) as known:
            spec = known.spec
    with Snapshot.load(file, spec, name=snapshot) as made:
        store.save(made)
