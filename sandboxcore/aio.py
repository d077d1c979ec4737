"""The same for asyncio: :func:`run`, :class:`Sandbox`, :class:`PersistentSandbox`, :class:`SandboxPool`,
:class:`Process` and :class:`DetachedCommand` under the same names.

Everything waits by the event loop's own callbacks; no thread waits for it. (Control groups are tidied up and
made ahead by a thread, one for the process, whoever uses them; and each pool has one, which starts sandboxes
ahead of time.) What still blocks:

- what starting a program takes anyway: the first use in a process starts the spawner, and looks at what the
  host can do; the first control group is made. That takes some tens of milliseconds.
- making a control group, some milliseconds: for each sandbox with limits that need one, and for a
  :func:`run` that finds none ready, because many run at once. Taking a ready one does not.
- :meth:`Sandbox.update` of ``memory`` below what is in use: the kernel reclaims before it answers.
- statements of a persistent sandbox's database.

Who is cancelled leaves nothing: a sandbox that was to be created, a command that was to be executed, are
gone, or have been killed and are going, before :class:`asyncio.CancelledError` is raised. The command of a
:class:`Process` belongs to the handle, not to the task: leave it by ``async with``.

A sandbox and its processes belong to the event loop in which they were made.
"""

from sandboxcore.aio_detached import DetachedCommand
from sandboxcore.aio_files import Files
from sandboxcore.aio_manager import SandboxManager
from sandboxcore.aio_persistent import PersistentSandbox, gc, list_sandboxes
from sandboxcore.aio_pool import SandboxPool, SandboxPools
from sandboxcore.aio_process import Process
from sandboxcore.aio_run import run
from sandboxcore.aio_sandbox import Sandbox
from sandboxcore.aio_session import AttachResult, SandboxSession
from sandboxcore.command import Exit, Stderr, Stdout
from sandboxcore.request import DEVNULL, PIPE, STDOUT

__all__ = [
    "DEVNULL",
    "PIPE",
    "STDOUT",
    "AttachResult",
    "DetachedCommand",
    "Exit",
    "Files",
    "PersistentSandbox",
    "Process",
    "Sandbox",
    "SandboxManager",
    "SandboxPool",
    "SandboxPools",
    "SandboxSession",
    "Stderr",
    "Stdout",
    "gc",
    "list_sandboxes",
    "run",
]
