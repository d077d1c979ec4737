"""``python -m sandboxcore`` is the ``sandboxcore`` command."""

from sandboxcore.cli import main

main()
