"""The verbs about volumes: ``volume create``, ``ls``, ``rm``."""

import json
from typing import Any

import click

from sandboxcore.cli_common import each_of, json_option, living, pairs, print_table, size_text, verb
from sandboxcore.errors import VolumeNotFound


@living.group("volume")
def volume() -> None:
    """Named directories that outlive sandboxes; run and create show them with --volume."""


@verb("create", volume)
@click.option("--quota", metavar="SIZE", help="What it may occupy: bytes, or 64M, 1.5G. Only as root.")
@click.option("--inodes", type=int, metavar="N", help="Files in it; with --quota.")
@click.option("--exclusive", is_flag=True, help="For one sandbox at a time.")
@click.option("--label", "labels", multiple=True, metavar="K=V", help="Add a label.")
@click.argument("name")
def create(name: str, labels: tuple[str, ...], state_dir: str | None, **about: Any) -> None:
    """Make the empty volume NAME."""
    from sandboxcore.volumes import Volumes

    Volumes(state_dir).create(name, labels=pairs(labels, "--label"), **about)


@verb("ls", volume)
@click.option("--label", "labels", multiple=True, metavar="K=V", help="Only volumes with this label.")
@json_option
def ls(labels: tuple[str, ...], as_json: bool, state_dir: str | None) -> None:
    """List the volumes, what they hold and who has them."""
    from sandboxcore.volumes import Volumes

    volumes = Volumes(state_dir)
    rows = [("NAME", "USED", "QUOTA", "FILES", "KIND", "USERS")]
    found = []
    for one in volumes.list(labels=pairs(labels, "--label")):
        try:
            usage = volumes.describe(one.name)
        except VolumeNotFound:  # removed meanwhile
            continue
        found.append({**one.to_dict(), "used": usage.bytes, "files": usage.inodes, "users": usage.users})
        files = "-" if usage.inodes is None else str(usage.inodes)
        kind = "exclusive" if one.exclusive else "shared"
        users = ",".join(usage.users)
        rows.append((one.name, size_text(usage.bytes), size_text(one.quota), files, kind, users))
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        print_table(rows, right=("USED", "QUOTA", "FILES"))


@verb("rm", volume)
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def rm(names: tuple[str, ...], state_dir: str | None) -> None:
    """Remove volumes with everything in them; none that a sandbox has."""
    from sandboxcore.volumes import Volumes

    each_of(names, Volumes(state_dir).delete)
